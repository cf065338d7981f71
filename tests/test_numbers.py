"""Numbers at the ends of what a number can be: an option is refused by name, or the run is planned with it."""

import math

import pytest

from qpsft import cli
from qpsft.errors import RecipeError
from qpsft.psft.config import MOST, PSFTConfig
from qpsft.psft.trust_region import TrustRegion
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.flags import members_of, option_types

ENDS = ["0", "-1", "-1e308", "1e-308", "1e308", "inf", "-inf", "nan", str(2**31), str(2**63), "9" * 400, "9" * 5000]
NUMERIC = [
    name
    for name, hint in option_types([ModelArguments, LoraArguments, DataArguments, RunArguments, PSFTConfig]).items()
    if {int, float} & set(members_of(hint))
]


def test_every_numeric_option_takes_every_number_or_refuses_it(capsys):
    """Only the options are read: there is no file of that name."""
    for name in NUMERIC:
        for value in ENDS:
            assert (
                cli.main(["preview", "--model_name_or_path=demo", "--dataset_name=no.jsonl", f"--{name}={value}"]) == 2
            )
            said = " ".join(capsys.readouterr().err.split())
            assert said.startswith("error: ") and len(said) < 700, (name, value, said)


@pytest.mark.parametrize("name", MOST)
def test_more_than_any_run_takes_is_refused_from_python_too(name):
    for value in (MOST[name] * 2, math.inf, math.nan):
        if isinstance(getattr(PSFTConfig, name), int) and not math.isfinite(value):
            continue
        with pytest.raises((RecipeError, ValueError)):
            PSFTConfig("runs/x", use_cpu=True, **{name: int(value) if math.isfinite(value) else value})


def test_an_extreme_epsilon_is_refused_by_name(capsys):
    argv = ["train", "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--epsilon=1e308"]
    assert cli.main(argv) == 2
    assert "epsilon is 1e+308; it must be at most 1000." in " ".join(capsys.readouterr().err.split())


def test_a_run_whose_entropy_explodes_says_so_once():
    region = TrustRegion(0.28)
    region.warn_if_far(0.0, 1.5)
    region.warn_if_far(0.0, 3.4)
    with pytest.warns(UserWarning, match=r"entropy has risen from 1\.50 to 3\.60 nats per token"):
        region.warn_if_far(0.0, 3.6)
    with pytest.warns(UserWarning, match="approx_kl is 2.0 nats per token"):
        region.warn_if_far(2.0, 9.0)
