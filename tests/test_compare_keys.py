"""Which runs of a comparison are the same: all that decides training or a measurement is in the key of a result."""

import json

import pytest
import torch
from comparing import FakeRuns, write_recipe
from safetensors.torch import save_file
from small_runs import make_base

from qpsft.compare import compare, queue, report
from qpsft.compare.arms import find_arms, pairs
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.options import load_comparison
from qpsft.compare.run import base_key
from qpsft.errors import OutputError, RecipeError


@pytest.fixture
def runs(monkeypatch):
    """Stands in for the runs, and remembers which were asked for."""
    runs = FakeRuns(scores=lambda spec: ([(0.5, 0.5), (0.6, 0.4)], 0.5))
    monkeypatch.setattr(report, "write_report", lambda comparison, folder: None)
    monkeypatch.setattr(queue, "do_run", runs)
    return runs


@pytest.mark.parametrize(
    "change",
    [
        {"k": 3},
        {"temperatures": [1.0]},
        {"max_new_tokens": 7},
        {"verifier": "exact"},
        {"metric": "nll"},
        {"sample_rows": 1},
        {"in_domain": "other.jsonl"},
        {"validation": "other.jsonl"},
        {"out_of_domain": ["other.jsonl"]},
        {"out_of_domain": ["renamed.jsonl"]},
    ],
    ids=str,
)
def test_what_decides_a_measurement_makes_another_run(tmp_path, monkeypatch, runs, change):
    for name in ("rows", "same", "other", "renamed"):
        texts = [f"{name == 'other':d}{number}" for number in range(9)]
        rows = [{"prompt": f"reverse: {text}", "completion": text[::-1]} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path)
    sets = {"in_domain": "rows.jsonl", "validation": "rows.jsonl", "out_of_domain": ["same.jsonl"]}
    fixed = {"arms": "sft", "seeds": 1, "metric": "accuracy", "verifier": "auto"}
    monkeypatch.chdir(tmp_path)
    compare(recipe, **fixed | sets)
    runs.specs.clear()
    compare(recipe, **fixed | sets)
    assert not runs.specs
    compare(recipe, **fixed | sets | change)
    assert "nll-lr2e-3-seed3" in [spec.label for spec in runs.specs]


def test_a_set_with_the_name_of_another_hides_none(tmp_path, runs):
    """A file called in_domain.jsonl once took the in-domain rows' place in the key, so that stale runs were read."""
    recipe = write_recipe(tmp_path)
    for number, name in enumerate(("first", "second", "in_domain", "validation", "train")):
        row = {"prompt": f"reverse: {number}12", "completion": f"21{number}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    others = [str(tmp_path / f"{name}.jsonl") for name in ("in_domain", "validation", "train")]
    for name in ("first", "second"):
        runs.specs.clear()
        found = compare(recipe, arms="sft", seeds=1, in_domain=str(tmp_path / f"{name}.jsonl"), out_of_domain=others)
        assert "nll-lr2e-3-seed3" in [spec.label for spec in runs.specs]
    assert found.counts["train"] == 16 and {"in_domain-2", "validation-2", "train-2"} <= found.counts.keys()


def test_another_base_makes_other_runs(tmp_path):
    """Weights in the middle of a file, and what the generation settings say of stop tokens."""
    base = make_base(tmp_path / "base")
    keys = {base_key(str(base))}
    assert keys == {base_key(str(base))}
    big = {"a": torch.zeros(2**20), "b": torch.zeros(2**20), "c": torch.zeros(2**20)}
    save_file(big, base / "model.safetensors")
    keys.add(base_key(str(base)))
    save_file(big | {"b": torch.ones(2**20)}, base / "model.safetensors")
    keys.add(base_key(str(base)))
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 5}))
    keys.add(base_key(str(base)))
    assert len(keys) == 4


def test_results_that_cannot_be_kept_are_told_before_the_first_run(tmp_path, runs):
    (tmp_path / "file").write_text("mine")
    recipe = write_recipe(tmp_path)
    with pytest.raises(OutputError, match="results_dir .*file cannot be written to"):
        compare(recipe, arms="sft", results_dir=str(tmp_path / "file"))
    with pytest.raises(RecipeError, match="A comparison needs no --resume"):
        compare(recipe, ["--resume"], arms="sft")
    assert not runs.specs and (tmp_path / "file").read_text() == "mine"


def test_samples_of_a_base_are_those_of_its_rounding(tmp_path):
    keys = set()
    for flags in ([], ["--quantization=none"], ["--double_quant=false"], ["--dtype=bfloat16"]):
        recipe, options = load_comparison(write_recipe(tmp_path), flags)
        keys.add(make_setting(recipe, options, prepare(recipe)).rounded_key)
    assert len(keys) == 4


def test_a_control_at_another_learning_rate_is_none():
    arms = find_arms(["sft", "sft_matched", "sft_blocks", "psft", "psft_visits"])
    rates = {"sft": 1e-3, "sft_matched": 2e-3, "sft_blocks": 2e-3, "psft": 2e-3, "psft_visits": 4e-3}
    with_sft = [(name, "sft") for name in ("sft_matched", "sft_blocks", "psft", "psft_visits")]
    assert pairs(arms, rates) == [*with_sft, ("psft", "sft_matched")]
    assert pairs(arms, rates | {"psft_visits": 2e-3}) == [*pairs(arms, rates), ("psft_visits", "sft_blocks")]
