"""`qpsft schema`: what a recipe may say, as editors check it, against what `qpsft train` reads."""

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

import qpsft.schema
from qpsft import cli
from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.schema.recipe_schema import recipe_schema, schema_of

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = Path(qpsft.schema.__file__).with_name("recipe.schema.json")
RECIPES = sorted(
    path
    for folder in ("adapters", "qpsft/demo", "benchmarks/recipes", "tests/recipes")
    for path in (ROOT / folder).rglob("*.yaml")
)
CHECK = jsonschema.Draft202012Validator(recipe_schema())


def pinned(package: str) -> bool:
    return f"{package}=={version(package)}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_shipped_schema_is_what_the_command_prints(capsys):
    jsonschema.Draft202012Validator.check_schema(json.loads(SHIPPED.read_text(encoding="utf-8")))
    if not all(map(pinned, ("transformers", "trl"))):
        pytest.skip("made with the versions of constraints.txt")
    assert cli.main(["schema"]) == 0
    assert capsys.readouterr().out == SHIPPED.read_text(encoding="utf-8"), f"qpsft schema > {SHIPPED}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_project_is_right(path):
    CHECK.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_there_are_recipes():
    assert len(RECIPES) > 10


WRONG = [
    "learning_rte: 2e-4",
    "learning_rate: fast",
    "learning_rate: [1]",
    "lora_r: 8.5",
    "lora_r: none at all",
    "quantization: nf5",
    "gradient_checkpointing: 1",
    "dataset_columns: question",
    "dataset_mix: [{dataset_name: a, share: half}, {dataset_name: b}]",
    "dataset_mix: [{dataset_name: a, dataset_split: x}, {dataset_name: b}]",
    "dataset_mix: [{share: 0.5}, {dataset_name: b}]",
    "replay_dataset: {dataset_name: a, share: 0.1}",
    "loss_type: sft",
    "save_strategy: sometimes",
    "optim: adam_of_mine",
    "compare: {seed: 3}",
    "compare: {seeds: many}",
    "compare: {metric: loss}",
    "guard: {evry: 3}",
    "guard: {metric: loss}",
    "guard: old.jsonl",
    "extends: [a.yaml]",
    "lora_modules_to_save: {a: b}",
]
RIGHT = [
    "extends: ../other.yaml",
    "learning_rate: 2e-4",
    "learning_rate: 0.0002",
    "learning_rate: 1",
    "max_length: null",
    "lora_target_modules: [q_proj, v_proj]",
    "lora_target_modules: q_proj,v_proj",
    "report_to: [tensorboard]",
    "dataset_mix: [{dataset_name: a, share: 2e-1, dataset_columns: {prompt: question}}, {dataset_name: b}]",
    "replay_dataset: old.jsonl",
    "replay_dataset: {dataset_name: a, dataset_train_split: x}",
    "save_strategy: 'no'",
    "optim: paged_adamw_8bit",
    "gradient_checkpointing_kwargs: {every_n_layers: 2}",
    "compare: {seeds: 3, arm_rates: {sft: 2e-3}, temperatures: [1.0, 6e-1]}",
    "bf16: true",
    "guard: {data: old.jsonl, metric: kl, max_drop: 1e-1, every: 20, action: lower_lr, limit: null}",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_seen(text):
    assert not CHECK.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_passes(text):
    assert CHECK.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("text", [text for text in WRONG if not text.startswith(("compare", "extends"))])
def test_what_the_schema_refuses_the_recipe_refuses_too(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path, ["--use_cpu"], PSFTConfig)


def test_types():
    assert schema_of(int | None) == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema_of(list[str]) == {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}


def test_every_option_has_its_help_and_default():
    properties = recipe_schema()["properties"]
    assert properties["epsilon"]["default"] == 0.28 and "Trust region" in properties["epsilon"]["description"]
    assert properties["loss_type"]["enum"] == ["psft", "nll", "dft", "eaft", "trsft", "stm"]
    assert properties["assistant_only_loss"]["deprecated"] is True
    assert "report_to" in properties and "parallelism_config" in properties
