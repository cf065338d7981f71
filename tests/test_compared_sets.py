"""What a comparison judges on: text sampled from any base, and for each set the score that says something."""

import json

import pytest
from comparing import write_recipe
from small_runs import make_base

from qpsft.base import load_base, load_tokenizer
from qpsft.compare import make_setting, prepare
from qpsft.comparison import compared_data
from qpsft.comparison.compare_options import load_comparison
from qpsft.comparison.compared_data import sample_base
from qpsft.comparison.compared_evaluation import Measurement, measure
from qpsft.data import IGNORED
from qpsft.evaluation.evaluation_rows import as_rows, encode
from qpsft.recipe import DataArguments

MODEL = "model_name_or_path: demo\nmax_length: 128\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def checked(count, start=0):
    """Rows whose answers hold `####`, as GSM8K's."""
    return [{"prompt": f"sort: {n}210", "completion": f"0{n}\n#### {n}"} for n in range(start, start + count)]


def free(count):
    return [{"prompt": f"say it: {n}", "completion": f"well {n}"} for n in range(count)]


def setting(folder, **compare):
    write(folder / "rows.jsonl", checked(40))
    options = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in compare.items())
    text = f"{MODEL}dataset_name: rows.jsonl\ncompare:\n  eval_rows: 3\n  out_of_domain_rows: 3\n{options}"
    recipe, found = load_comparison(write_recipe(folder, text), [], {})
    return make_setting(recipe, found, prepare(recipe))


# ---- text sampled from the base ----


class NoBeginning:
    """A tokenizer as Qwen's: it names no token that begins a text."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(("in_config", "first"), [(7, 7), (None, 2)])
def test_a_base_whose_tokenizer_begins_no_text_can_be_sampled(tmp_path, monkeypatch, in_config, first):
    model, tokenizer = load_base(make_base(tmp_path / "base"), device="cpu")
    model.config.bos_token_id = model.generation_config.bos_token_id = in_config
    starts = []

    def generate(model, prompts, **options):
        starts.extend(prompts)
        return real(model, prompts, **options | {"max_new_tokens": 4})

    real = compared_data.generate
    monkeypatch.setattr(compared_data, "generate", generate)
    rows = sample_base(lambda: (model, NoBeginning(tokenizer)), tmp_path / "samples.jsonl")
    assert starts == [[first]] * 128 and len(rows) > 100  # else the end of a text, behind which another begins


def test_a_text_that_the_cap_cut_off_has_no_end(tmp_path, monkeypatch):
    model, tokenizer = load_base(make_base(tmp_path / "base"), device="cpu")
    monkeypatch.setattr(compared_data, "SAMPLED_LENGTH", 24)
    path = tmp_path / "samples.jsonl"
    rows = sample_base(lambda: (model, tokenizer), path)
    assert sample_base(lambda: pytest.fail("they are kept"), path) == rows
    open_ended = [row for row in rows if row.get("cut_off")]
    assert 10 < len(open_ended) < len(rows)
    encoded = encode(as_rows(rows, "samples"), model, tokenizer, DataArguments())
    eos = tokenizer.eos_token_id
    for row, text in zip(rows, encoded.texts, strict=True):
        assert (text["input_ids"][-1] == eos) is ("cut_off" not in row)
        supervised = [label for label in text["labels"] if label != IGNORED]
        assert (eos in supervised) is ("cut_off" not in row)
        assert len(text["input_ids"]) == len(text["labels"])


def test_the_likelihood_of_what_the_base_wrote_is_about_its_entropy(tmp_path, stories):
    """Text that a model sampled costs it its own entropy; an end that it never wrote would cost more."""
    model, tokenizer = load_base(stories, device="cpu")
    rows = sample_base(lambda: (model, tokenizer), tmp_path / "samples.jsonl")[:48]
    how = Measurement(0, (), 1, 1, "auto", DataArguments())
    data = compared_data.ComparedData(
        "x", None, *[as_rows(rows[:2], "texts")] * 2, {"own": as_rows(rows, "own")}, "nll"
    )
    found = measure(model, tokenizer, data, how)["metrics"]
    assert abs(found["out_of_domain/own"] - found["out_of_domain/own_entropy"]) < 0.06


# ---- scores ----


def test_each_side_gets_the_score_that_says_something(tmp_path):
    write(tmp_path / "old.jsonl", checked(4, start=50))
    write(tmp_path / "free.jsonl", free(4))
    write(tmp_path / "text.jsonl", [{"text": "reverse: 0123 -> 3210"}] * 4)

    def metric(*others, **compare):
        return setting(tmp_path, out_of_domain=list(others), **compare).data.metric

    assert metric("old.jsonl") == "accuracy"
    assert metric("old.jsonl", "free.jsonl") == "mixed"  # an exact match of free answers says nothing
    assert metric("text.jsonl") == "mixed"
    assert metric("text.jsonl", metric="nll") == "nll"
    assert metric("free.jsonl", verifier="exact") == "accuracy"  # who asks for it gets it
    assert metric("text.jsonl", in_domain="free.jsonl") == "nll"


def test_a_verifier_that_cannot_read_a_set_leaves_it_its_own(tmp_path):
    write(tmp_path / "free.jsonl", free(4))
    found = setting(tmp_path, out_of_domain=["free.jsonl"], verifier="gsm8k", k=0, max_new_tokens=4)
    assert found.data.metric == "mixed"
    model, tokenizer = load_base("demo", device="cpu")
    metrics = measure(model, load_tokenizer("demo"), found.data, found.how)["metrics"]
    assert metrics["in_domain"] <= 1 and metrics["out_of_domain/free"] == metrics["out_of_domain/free_nll"] > 1
