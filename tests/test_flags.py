"""The one reader of flags: dataclass fields as argparse flags, values read strictly, options that are gone."""

from dataclasses import dataclass
from typing import Literal

import pytest

from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.recipe.flags import Parser, add_flags, option, parse, parse_known, read_values


@dataclass
class Options:
    folder: str = option(help="a folder")
    other: str = option(help="another one")
    to: Literal["here", "none"] | None = option(None, "where to, 100 % sure")
    output: str | None = option(None, "to write", short="-o", metavar="FILE")
    count: int = option(3, "how many")
    rate: float | None = option(None, "a number (default: the usual one)")
    names: list[str] = option(["a", "b"], "some names", metavar="NAME")
    numbers: list[float] | None = option(None, "some numbers")
    mapping: dict | None = option(None, "which is which")
    dry_run: bool = option(False, "only list")
    double: bool = option(True, "twice")


def parser():
    return Parser("qpsft test", "FOLDER OTHER [options]", "What it does.")


def read(*argv):
    return parse(parser(), argv, Options)


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {}),
        (["--count", "4"], {"count": 4}),
        (["--count=4"], {"count": 4}),
        (["-o", "x"], {"output": "x"}),
        (["--output", "x"], {"output": "x"}),
        (["--dry_run"], {"dry_run": True}),
        (["--dry-run"], {"dry_run": True}),
        (["--dry-run", "false", "--double=no"], {"dry_run": False, "double": False}),
        (["--rate", "-1e-4"], {"rate": -1e-4}),
        (["--rate=1e3"], {"rate": 1000.0}),
        (["--rate", "none"], {"rate": None}),
        (["--output", "-x-"], {"output": "-x-"}),
        (["--output", "- a b"], {"output": "- a b"}),
        (["--names", "x"], {"names": ["x"]}),
        (["--names", "x,y"], {"names": ["x", "y"]}),
        (["--names", "x", "y,z"], {"names": ["x", "y", "z"]}),
        (["--names", "[x, 'y,z']"], {"names": ["x", "y,z"]}),
        (["--numbers", "1", "2e-3"], {"numbers": [1.0, 2e-3]}),
        (["--mapping", "{a: b}"], {"mapping": {"a": "b"}}),
        (["--to", "none"], {"to": "none"}),
        (["--count", "4", "--count", "5"], {"count": 5}),
    ],
)
def test_flags_are_read_as_their_fields_declare(argv, given):
    """Wherever the flags stand, unless a list before the positional arguments takes these for its own."""
    expected = {name: given.get(name, value) for name, value in vars(Options("f", "g")).items()}
    assert vars(read("f", "g", *argv)) == expected
    assert vars(read("f", *argv, "g")) == expected if "--names" not in argv and "--numbers" not in argv else True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "qpsft test: the following arguments are required: FOLDER, OTHER"),
        (["f"], "required: OTHER"),
        (["f", "g", "h"], "'h' belongs to no option"),
        (["f", "g", "-x"], "'-x' belongs to no option"),
        (["f", "g", "--cuont", "3"], "--cuont: there is no such option. Did you mean count?"),
        (["f", "g", "--zzz=3"], "--zzz: there is no such option. `qpsft test --help` lists the options."),
        (["f", "g", "--count"], "--count needs a value. It must be a whole number"),
        (["f", "g", "--count", "--double"], "--count needs a value. It must be a whole number"),
        (["f", "g", "--names"], "--names needs a value. It must be a list"),
        (["f", "g", "--count", "1.5"], "--count is '1.5'; it must be a whole number"),
        (["f", "g", "--rate", "nan"], "--rate is 'nan'; it must be a finite number or none"),
        (["f", "g", "--to", "there"], "--to is 'there'; it must be here or none"),
        (["f", "g", "--mapping", "a"], "--mapping is 'a'; it must be a mapping or none"),
        (["f", "g", "--dry_run=maybe"], "--dry_run is 'maybe'; it must be true or false"),
        (["f", "g", "--dry_run", "maybe"], "'maybe' belongs to no option"),
        (["f", "g", "--coun", "4"], "--coun: there is no such option"),  # no abbreviations
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(RecipeError) as caught:
        read(*argv)
    assert message in str(caught.value)


def test_help_is_made_of_the_fields():
    shown = parser()
    add_flags(shown, Options)
    lines = {" ".join(line.split()) for line in shown.format_help().splitlines()}
    assert "usage: qpsft test FOLDER OTHER [options]" in lines
    for line in (
        "FOLDER a folder",
        "--to {here,none} where to, 100 % sure",
        "-o FILE, --output FILE",
        "--count N how many (default: 3)",
        "--rate X a number (default: the usual one)",
        "--names [NAME ...] some names (default: a,b)",
        "--numbers [X ...] some numbers",
        "--mapping MAPPING which is which",
        "--dry_run only list",
        "--double {true,false}",
        "twice (default: true)",
    ):
        assert line in lines, line


def test_words_for_another_reader_are_left_in_their_order():
    @dataclass
    class Own:
        jobs: int = option(1, "at a time")
        tune: bool = option(False, "choose")

    argv = ["recipe", "--tune", "--lora-r", "4", "--jobs", "2", "--lr", "-1e-4", "--use_dora"]
    options, rest = parse_known(Parser("qpsft test", "", ""), argv, Own)
    assert (options.jobs, options.tune) == (2, True)
    assert rest == ["recipe", "--lora_r", "4", "--lr=-1e-4", "--use_dora"]


def test_a_list_that_is_the_default_is_nobody_else_s():
    Options("f", "g").names.append("c")
    assert Options("f", "g").names == ["a", "b"]


# ---- options that are gone ----


@pytest.mark.parametrize(
    ("name", "value", "todo"),
    [
        ("reference", "last_visit", "keep no more than plain SFT. Leave it out."),
        ("reference_placement", "device", "pinned host memory. Leave it out."),
        ("reference_placement", "host", "pinned host memory. Leave it out."),
        ("quantization", "int8", "Use nf4."),
        ("lora_bias", "all", "PSFTTrainer(peft_config=…)."),
        ("init_lora_weights", "pissa", "PSFTTrainer(peft_config=…)."),
        ("init_lora_weights", "pissa_niter_4", "PSFTTrainer(peft_config=…)."),
        ("init_lora_weights", "gaussian", "PSFTTrainer(peft_config=…)."),
        ("init_lora_weights", "olora", "PSFTTrainer(peft_config=…)."),
    ],
)
def test_a_recipe_with_an_option_that_is_gone_says_what_to_use_instead(name, value, todo, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{name}: {value}\n")
    for recipe, flags, where in ((path, [], f"{path}: {name}: "), (None, [f"--{name}={value}"], f"--{name}: ")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, flags, PSFTConfig)
        assert str(caught.value).startswith(where) and todo in str(caught.value)


def test_what_holds_anyway_may_still_be_said():
    """As in the resolved recipes of adapters that were trained before."""
    given = {"reference": "snapshot", "reference_placement": "auto", "lora_bias": "none", "count": 2}
    given["init_lora_weights"] = True
    where = dict.fromkeys(given, "recipe.yaml")
    assert read_values(given, {"count": int}, where, others="") == {"count": 2}


def test_the_noise_of_compare_is_a_program_of_its_own(tmp_path):
    from qpsft.compare.options import load_comparison

    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: demo\ndataset_name: demo-noisy\ncompare: {noise: [0, 0.1]}\n")
    for flags in ([], ["--noise", "0,0.1"]):
        with pytest.raises(RecipeError, match=r"noise.*Use `python benchmarks/noise_study\.py RECIPE --noise"):
            load_comparison(path, flags)
