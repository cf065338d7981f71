"""What a comparison judges on: text sampled from any base, and for each set the score that says something."""

import json

import pytest
from comparing import write_recipe
from small_runs import make_base

from qpsft.compare import data
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.data import BASE_SAMPLES, base_written
from qpsft.compare.measure import Measurement, measure
from qpsft.compare.options import load_comparison
from qpsft.data.tokenize import IGNORED
from qpsft.evaluate.rows import as_rows, duplicates, encode
from qpsft.model.base import load_base, load_tokenizer
from qpsft.recipe.arguments import DataArguments

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


# ---- rows set aside ----


def talks(count):
    """Conversations of several turns."""
    asked = [{"role": "user", "content": "sort: 210"}, {"role": "assistant", "content": "012"}]
    return [
        {"messages": [*asked, {"role": "user", "content": f"sort: {n}10"}, {"role": "assistant", "content": f"01{n}"}]}
        for n in range(count)
    ]


@pytest.mark.parametrize("given", [{}, {"in_domain": "test.jsonl"}, {"validation": "test.jsonl"}], ids=str)
def test_conversations_are_set_aside_with_their_last_answers(tmp_path, given):
    write(tmp_path / "talks.jsonl", talks(40))
    write(tmp_path / "test.jsonl", checked(4))
    text = f"{MODEL}dataset_name: talks.jsonl\ncompare: {json.dumps({'eval_rows': 3} | given)}\n"
    recipe, options = load_comparison(write_recipe(tmp_path, text), [], {})
    data = make_setting(recipe, options, prepare(recipe)).data
    aside = data.validation if "in_domain" in given else data.in_domain
    assert [len(row["prompt"]) for row in aside.rows] == [3] * 3
    assert all(row["completion"][0]["content"].startswith("01") for row in aside.rows)
    assert data.counts["train"] == 40 - 3 * (2 - len(given))
    assert all(found["duplicate_prompts"] == 0 for found in data.overlap.values())


def test_rows_set_aside_keep_what_their_verifier_needs(tmp_path):
    rows = [{"prompt": f"which? {n}", "completion": "b", "choices": ["a", "b"]} for n in range(40)]
    write(tmp_path / "choices.jsonl", rows)
    recipe, options = load_comparison(write_recipe(tmp_path, f"{MODEL}dataset_name: choices.jsonl\n"), [], {})
    data = make_setting(recipe, options, prepare(recipe)).data
    assert data.metric == "accuracy"
    assert all(row["choices"] == ["a", "b"] for row in [*data.in_domain.rows, *data.validation.rows])


def test_an_answer_without_a_question_is_no_duplicate():
    alone = {"messages": [{"role": "assistant", "content": "7"}]}
    row = {"prompt": "3+4=", "completion": "7"}
    assert duplicates([alone, row], [row]) == {"duplicate_rows": 1, "duplicate_prompts": 1}


def test_cut_rows_are_counted(tmp_path):
    write(tmp_path / "long.jsonl", [*checked(30), *({"prompt": "1 " * 200, "completion": "2"} for _ in range(10))])
    text = "model_name_or_path: demo\nmax_length: 12\ndataset_name: long.jsonl\n"
    recipe, options = load_comparison(write_recipe(tmp_path, text), [], {})
    data = make_setting(recipe, options, prepare(recipe)).data
    assert data.shortened["dropped"] > 0 and data.shortened["truncated"] == data.counts["train"]
    assert data.shortened["max_length"] == 12


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

    real = data.generate
    monkeypatch.setattr(data, "generate", generate)
    rows = base_written(BASE_SAMPLES, lambda: (model, NoBeginning(tokenizer)), tmp_path / "samples.jsonl")
    assert starts == [[first]] * 128 and len(rows) > 100  # else the end of a text, behind which another begins


def test_a_text_that_the_cap_cut_off_has_no_end(tmp_path, monkeypatch):
    model, tokenizer = load_base(make_base(tmp_path / "base"), device="cpu")
    monkeypatch.setattr(data, "SAMPLED_LENGTH", 24)
    path = tmp_path / "samples.jsonl"
    rows = base_written(BASE_SAMPLES, lambda: (model, tokenizer), path)
    assert base_written(BASE_SAMPLES, lambda: pytest.fail("they are kept"), path) == rows
    path.write_text(path.read_text()[:-7])  # of a run that was killed while it wrote
    assert base_written(BASE_SAMPLES, lambda: (model, tokenizer), path) == rows
    open_ended = [row for row in rows if row.get("cut_off")]
    assert 10 < len(open_ended) < len(rows)
    encoded = encode(as_rows(rows, "samples"), model, tokenizer, DataArguments())
    eos = tokenizer.eos_token_id
    for row, text in zip(rows, encoded.texts, strict=True):
        assert (text["input_ids"][-1] == eos) is ("cut_off" not in row)
        supervised = [label for label in text["labels"] if label != IGNORED]
        assert (eos in supervised) is ("cut_off" not in row)
        assert len(text["input_ids"]) == len(text["labels"])


def test_the_likelihood_of_what_the_base_wrote_is_about_its_entropy(tmp_path, stories, monkeypatch):
    """Text that a model sampled costs it its own entropy; an end that it never wrote would cost more."""
    monkeypatch.setattr(data, "SAMPLED_TEXTS", 48)
    model, tokenizer = load_base(stories, device="cpu")
    rows = base_written(BASE_SAMPLES, lambda: (model, tokenizer), tmp_path / "samples.jsonl")
    how = Measurement(0, (), 1, 1, "auto", DataArguments())
    compared = data.ComparedData("x", None, *[as_rows(rows[:2], "texts")] * 2, {"own": as_rows(rows, "own")}, "nll")
    found = measure(model, tokenizer, compared, how)["metrics"]
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
    metrics = measure(model, load_tokenizer("demo"), found.data, found.measurement)["metrics"]
    assert metrics["in_domain"] <= 1 and metrics["out_of_domain/free"] == metrics["out_of_domain/free_nll"] > 1
