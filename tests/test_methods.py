"""`method:` in a recipe of ten lines: the options it sets, what wins over it, and every method trained for real."""

import json
import re
from pathlib import Path

import pytest
import yaml

from qpsft import cli
from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig
from qpsft.psft.losses import LOSSES
from qpsft.recipe.file import load_recipe
from qpsft.recipe.methods import METHODS

LOSS_OF = {"sft": "nll", "sft_kl": "nll", "sft_replay": "nll", "asft": "dft"} | dict.fromkeys(
    ["psft_visits", "psft_kl", "psft_replay"], "psft"
)


def options_of(tmp_path, flags=(), **lines):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True, **lines}))
    recipe = load_recipe(tmp_path, list(flags), PSFTConfig)
    trainer, data = recipe.trainer, recipe.data
    names = ("loss_type", "num_iterations", "sft_warmup_steps", "base_kl")
    return {name: getattr(trainer, name) for name in names} | {"replay_share": data.replay_share}


PLAIN = {"loss_type": "psft", "num_iterations": 1, "sft_warmup_steps": 0, "base_kl": 0.0, "replay_share": None}
EXPECTED = {
    "psft_visits": {"num_iterations": 4, "sft_warmup_steps": 8},
    "sft_kl": {"base_kl": 0.05},
    "asft": {"base_kl": 0.05},
    "psft_kl": {"base_kl": 0.05},
    "psft_replay": {"replay_share": 0.1},
    "sft_replay": {"replay_share": 0.1},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_its_options_and_no_other(tmp_path, method):
    expected = {**PLAIN, "loss_type": LOSS_OF.get(method, method), **EXPECTED.get(method, {})}
    assert options_of(tmp_path, method=method) == expected
    assert expected["loss_type"] in LOSSES


def test_what_is_given_beside_a_method_wins(tmp_path):
    given = options_of(tmp_path, method="psft_visits", num_iterations=2, reference_steps=4)
    assert (given["num_iterations"], given["sft_warmup_steps"]) == (2, 4)  # the warm-up is one block
    given = options_of(tmp_path, ["--method=asft", "--base_kl", "0.5"], method="psft_visits", loss_type="nll")
    assert given == {**PLAIN, "loss_type": "nll", "base_kl": 0.5}


def test_the_page_has_every_method():
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text().partition("## The losses")[0]
    assert set(re.findall(r"`(\w+)`(?=[^|]*\|[^|]*\|$)", table, re.MULTILINE)) - {"method"} == set(METHODS)


def test_an_unknown_method_is_named_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="no method 'psft_visit'.*Did you mean psft_visits"):
        options_of(tmp_path, method="psft_visit")


def train(folder, method, prompts, **lines):
    """`qpsft train` from a recipe of ten lines. Returns the last log line."""
    recipe = {"method": method, "learning_rate": 2e-3, "max_steps": 3, "reference_steps": 2, "use_cpu": True, **lines}
    assert len(recipe) <= 10
    if method.endswith("replay"):
        (folder / "prompts.txt").write_text(prompts)
        recipe["replay_prompts"] = str(folder / "prompts.txt")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1"]  # stated: nothing is planned
    assert cli.main(["train", str(folder), *small]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "nll" in line][-1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_embedded_base(tmp_path, capsys, method):
    data = dict(model_name_or_path="demo", dataset_name="demo-noisy", dataset_limit=64, max_length=96)
    last = train(tmp_path, method, "reverse: 4821\nsort: 9031\nadd one: 4455\n", **data)
    capsys.readouterr()
    assert last["step"] == 3 and last["nll"] > 0
    assert ("kl_to_base" in last) and last["kl_to_base"] > 0


@pytest.mark.journey
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_stories260k_on_gsm8k(tmp_path, capsys, stories, gsm8k, method):
    data = dict(
        model_name_or_path=str(stories),
        dataset_name=str(gsm8k / "train.jsonl"),
        dataset_columns={"prompt": "question", "completion": "answer"},
        dataset_limit=48,
        max_length=256,
    )
    last = train(tmp_path, method, "Once upon a time\nThe cat\n", **data)
    capsys.readouterr()
    assert last["step"] == 3 and last["nll"] > 0
