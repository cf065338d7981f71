"""The shelf: every recipe resolves strictly, fits its card and runs; the trained adapter is what its recipe makes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import shared_path
from peft import PeftModel
from safetensors.torch import load_file

from qpsft import cli
from qpsft.compare.options import load_comparison
from qpsft.files import file_sha256
from qpsft.merge import merge_adapter
from qpsft.model.base import load_base
from qpsft.plan import make_plan
from qpsft.plan.cards import find_card
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train.model_card import RUN_OPTIONS
from qpsft.train.progress import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SHELF = ROOT / "adapters"
NAMES = sorted(path.parent.name for path in SHELF.glob("*/recipe.yaml"))
MODELS = [name for name in NAMES if not name.startswith("demo-")]
SHIPPED = SHELF / "demo-psft"
COMMIT = re.compile(r"[0-9a-f]{40}")
CARDS = {"T4": "Colab's free T4", "8GB": "8 GB", "12GB": "12 GB", "16GB": "16 GB", "24GB": "24 GB"}


def read(name: str, *flags: str, file: str = "recipe.yaml"):
    return load_recipe(SHELF / name / file, flags, PSFTConfig)


def card(name: str) -> str:
    """The card that a recipe is for, from the comment that says so."""
    return re.search(r"^# card: (\w+)$", (SHELF / name / "recipe.yaml").read_text(encoding="utf-8"), flags=re.M)[1]


def own_conversations() -> list[str]:
    return [name for name in MODELS if read(name).data.dataset_name == "data.jsonl"]


# --- recipes ---


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_strictly(name):
    recipe, options = load_comparison(SHELF / name, [])
    assert recipe.model.model_name_or_path and recipe.data.dataset_name and recipe.trainer.loss_type == "psft"
    assert recipe.trainer.train_batch_size * recipe.trainer.gradient_accumulation_steps == 16
    assert options.seeds >= 1
    if name in MODELS:
        assert card(name) in CARDS and COMMIT.fullmatch(recipe.model.model_revision)
        assert recipe.data.dataset_name == "data.jsonl" or COMMIT.fullmatch(recipe.data.dataset_revision)
        text = (SHELF / name / "recipe.yaml").read_text(encoding="utf-8")
        for option in ("learning_rate", "num_train_epochs", "reference_steps", "epsilon", "max_length"):
            assert re.search(rf"^{option}: \S+ # \S", text, flags=re.M), f"{option} gives no reason"


def test_the_shelf_has_both_kinds_of_data_and_every_card():
    assert {card(name) for name in MODELS} == CARDS.keys()
    assert 2 <= len(own_conversations()) < len(MODELS) and 8 <= len(MODELS) <= 12
    assert {read(name).data.dataset_name for name in MODELS} == {"data.jsonl", "openai/gsm8k"}


def plans() -> list:
    """Models to plan; on the meta device Qwen3.5's linear attention takes a step of Python for every token."""
    marks = {"qwen3.5-4b": [pytest.mark.slow], "mistral-7b": []}
    return [pytest.param(name, marks=marks.get(name, [pytest.mark.journey])) for name in MODELS]


@pytest.mark.parametrize("name", plans())
def test_it_fits_its_card_with_a_tenth_to_spare(name):
    plan = make_plan(read(name), card=find_card(card(name)))
    assert plan.needed_bytes <= 0.9 * plan.gpu_bytes and plan.notes == []
    needs, has = plan.needed_bytes / 2**30, plan.gpu_bytes / 2**30
    table = re.search(rf"^\| \[{re.escape(name)}\].*$", (SHELF / "README.md").read_text(encoding="utf-8"), flags=re.M)[
        0
    ]
    for text in (table, (SHELF / name / "README.md").read_text(encoding="utf-8")):
        said = re.search(r"\| ([\d.]+) of ([\d.]+) GiB \|", text)
        assert (float(said[1]), float(said[2])) == pytest.approx((needs, has), rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_the_twin_differs_in_the_loss_alone(name):
    recipe, twin = read(name), read(name, file="sft.yaml")
    differing = {key for key, value in recipe.values().items() if twin.values().get(key) != value}
    assert differing <= {"loss_type", "output_dir"} and recipe.values().keys() <= twin.values().keys()
    assert twin.trainer.loss_type == "nll" and twin.trainer.output_dir == f"runs/{name}-sft"
    assert twin.run.compare == recipe.run.compare


def conversations(path: Path, count: int = 24) -> None:
    turns = [{"role": "user", "content": "sort 31"}, {"role": "assistant", "content": "13"}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(count)), encoding="utf-8")


@pytest.mark.parametrize(("file", "loss"), [("recipe.yaml", "psft"), ("sft.yaml", "nll")])
def test_own_conversations_lie_beside_the_recipe(tmp_path, monkeypatch, file, loss):
    """The recipe as it is, on the embedded base: only the base's name and the length of the run are other ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHELF / "llama-3.1-8b", tmp_path / "mine")
    conversations(tmp_path / "mine" / "data.jsonl")
    flags = ["--model_name_or_path=demo", "--max_steps=2", "--max_length=64", "--save_strategy=no", "--use_cpu"]
    assert cli.main(["train", f"mine/{file}", *flags, "--output_dir=out"]) == 0
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert resolved["loss_type"] == loss and Path(resolved["dataset_name"]) == Path("mine/data.jsonl")
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")


def test_without_the_data_the_file_is_named(tmp_path, capsys):
    assert cli.main(["preview", str(SHELF / "mistral-7b"), "--model_name_or_path=demo"]) == 2
    assert "There is no file data.jsonl" in capsys.readouterr().err


def test_the_gsm8k_recipes_take_its_rows(tmp_path):
    rows = shared_path("data/gsm8k/train.jsonl")
    flags = ["--model_name_or_path=demo", f"--dataset_name={rows}", "--dataset_limit=32", "--max_steps=1"]
    flags += ["--save_strategy=no", "--use_cpu", "--per_device_train_batch_size=1"]
    assert cli.main(["train", str(SHELF / "qwen3-4b-gsm8k"), *flags, f"--output_dir={tmp_path}"]) == 0
    longest = max(len(row["question"]) + len(row["answer"]) for row in map(json.loads, rows.open(encoding="utf-8")))
    assert f"{longest:,} characters" in (SHELF / "qwen3-4b-gsm8k" / "recipe.yaml").read_text(encoding="utf-8")


# --- what the READMEs say; their links and commands are tests/test_docs.py's ---


@pytest.mark.parametrize("name", MODELS)
def test_each_card_says_what_its_recipe_is(name):
    text, recipe = (SHELF / name / "README.md").read_text(encoding="utf-8"), read(name)
    assert text.startswith(f"# {name}\n") and f"https://huggingface.co/{recipe.model.model_name_or_path})" in text
    assert f"| card | {CARDS[card(name)]}" in text and recipe.data.dataset_name in text
    assert (
        f"qpsft plan adapters/{name} --gpu {card(name)}\n" in text
        and f"qpsft train adapters/{name} " in text
        and f"qpsft train adapters/{name}/sft.yaml" in text
    )


def test_the_table_of_the_shelf_has_a_row_for_each():
    text = (SHELF / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\S+)\]\((?:\S+)\) \| (.*) \|$", text, flags=re.M))
    assert rows.keys() == set(NAMES)
    for name in MODELS:
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert cells[0] == read(name).model.model_name_or_path.partition("/")[2]
        assert cells[1] == card(name).replace("GB", " GB")


def test_wheels_hold_the_package_alone():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"(.+)"', re.search(r"^packages = \[(.*?)\]", project, flags=re.M | re.S)[1])
    assert packages and all(package.split(".")[0] == "qpsft" for package in packages)
    assert not (SHELF / "__init__.py").exists()


# --- the trained adapter ---


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The shipped adapter, trained anew from its recipe."""
    folder = tmp_path_factory.mktemp("again") / "demo-psft"
    assert cli.main(["train", str(SHIPPED), f"--output_dir={folder}"]) == 0
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logprobs(folder: Path) -> torch.Tensor:
    """Of the tokens of the shipped verify prompts that follow each prompt, under the adapter in `folder`."""
    base, _ = load_base("demo", device="cpu", verbose=False)
    model = PeftModel.from_pretrained(base, folder).eval()
    found = []
    for line in (SHIPPED / "verify_prompts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            every = model(ids).logits.float().log_softmax(-1)[0, :-1]
        found.append(every.gather(-1, ids[0, 1:, None])[row["prompt_length"] - 1 :, 0])
    return torch.cat(found)


def made_with(folder: Path) -> list[str]:
    """Versions, CPU and its instructions, as the resolved recipe's comments say; not the number of cores."""
    text = next(folder.glob("recipe*.resolved.yaml"), folder / "recipe.yaml").read_text(encoding="utf-8")
    return [re.sub(r", \d+ cores$", "", line) for line in text.splitlines() if line.startswith("# ")][1:]


def log_lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "nll" in line]


@pytest.mark.journey
def test_the_trained_adapter_is_what_its_recipe_makes(again):
    """The same bytes where it was made; elsewhere the same run, until rounding has grown.

    With AVX2 instead of AVX512 (measured on this recipe) log lines differ by a relative 2e-7, 8e-7 and 2e-4 at steps 8,
    16 and 24, where half the learning rate differs by 6e-2 at once; at the end the NLL of the prompts differs by 0.008.
    """
    shipped, made = tensors(SHIPPED), tensors(again)
    assert shipped.keys() == made.keys()
    if made_with(SHIPPED) == made_with(again):
        assert all(torch.equal(shipped[name], made[name]) for name in shipped), "training has changed: see its README"
    before, now = log_lines(SHIPPED), log_lines(again)
    assert [line["step"] for line in before] == [line["step"] for line in now]
    for old, new in zip(before[:3], now[:3], strict=True):
        for name in ("loss", "nll", "entropy", "mean_token_accuracy"):
            assert new[name] == pytest.approx(old[name], rel=2e-3), (name, new["step"])
    assert now[-1]["nll"] == pytest.approx(before[-1]["nll"], rel=0.03)
    assert abs(float(logprobs(SHIPPED).mean() - logprobs(again).mean())) < 0.05


@pytest.mark.journey
def test_it_came_with_all_that_a_run_leaves(again):
    left = {path.name for path in again.iterdir()} - {"recipe.yaml", ".qpsft"} | {"recipe.yaml", "recipe.resolved.yaml"}
    assert left == {path.name for path in SHIPPED.iterdir() if not path.name.startswith(".")}
    card, last = (SHIPPED / "README.md").read_text(encoding="utf-8"), log_lines(SHIPPED)[-1]
    assert f"| {last['nll']:.4f} nats per token |" in card and f"| {int(last['step'])} |" in card
    assert all(version in card for version in made_with(SHIPPED)[0].removeprefix("# ").split(", "))
    size = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert size < 500_000


@pytest.mark.journey
def test_its_record_is_what_its_recipe_makes(again):
    shipped, made = (json.loads((folder / "base_quantization.json").read_text("utf-8")) for folder in (SHIPPED, again))
    digests = [record.pop("adapter_sha256") for record in (shipped, made)]
    assert shipped == made
    assert digests == [file_sha256(folder / "adapter_model.safetensors") for folder in (SHIPPED, again)]


def test_its_options_are_its_recipe_s():
    resolved = yaml.safe_load((SHIPPED / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    recipe = read("demo-psft")
    values = recipe.values() | {name: getattr(recipe.run, name) for name in RUN_OPTIONS}
    assert resolved == {name: value for name, value in values.items() if name != "output_dir"}


def test_it_merges_into_the_model_that_was_trained(tmp_path):
    config = json.loads((SHIPPED / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "qpsft/demo/model"  # from the repository's root; no one's own folder
    report = merge_adapter(SHIPPED, tmp_path / "merged")
    assert report.verification["same_model"]
