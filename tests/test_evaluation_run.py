"""`qpsft evaluate` as a user runs it: adapters and models, the table, the JSON file, and mistakes."""

import json
import warnings

import pytest
import torch

from qpsft import cli
from qpsft.data import built_in
from qpsft.errors import RecipeError
from qpsft.evaluate import evaluate
from qpsft.evaluate.options import EvaluationOptions
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.recipe.arguments import LoraArguments
from qpsft.recipe.flags import Parser, parse


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder like qpsft train's: an adapter that changes the demo base, its tokenizer and a recipe."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model, tokenizer = load_base("demo", device="cpu", verbose=False)
    torch.manual_seed(0)
    model = add_adapter(model, LoraArguments(lora_r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text("dataset_name: demo-clean\ndataset_limit: 50\nlearning_rate: 0.001\n")
    return folder


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli.main(["evaluate", *map(str, arguments)])


def test_an_adapter_is_measured_on_its_own_base(adapter, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    assert run(adapter, "--limit", 4, "--k", 2, "--json", target, "--completions") == 0
    out = capsys.readouterr().out
    record = json.loads(target.read_text(encoding="utf-8"))
    assert list(record["data"]) == ["in_domain", *built_in.OUT_OF_DOMAIN]
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    model, tokenizer = load_base("demo", device="cpu", verbose=False)
    from peft import PeftModel

    rows = built_in.out_of_domain("test", 100)["styles"]
    alone = evaluate(PeftModel.from_pretrained(model, adapter), tokenizer, rows, k=2, limit=4, max_new_tokens=56)
    styles = record["data"]["styles"]
    for name, estimate in alone.metrics.items():
        assert styles["metrics"][name]["value"] == pytest.approx(estimate.value, rel=1e-4), name
    assert styles["metrics"]["kl_samples"]["value"] > 0
    assert [one["greedy"][0] for one in styles["completions"]] == [one.greedy[0] for one in alone.completions]
    assert styles["counts"]["duplicate_rows"] == 0 and record["settings"]["k"] == 2
    assert "styles · 4 rows · verifier demo" in out and "0 of its rows are exact duplicates of training rows" in out
    assert f"{alone['nll']:.3f}" in out and "KL from the base on samples" in out and f"written: {target}" in out


def test_rows_seen_in_training_are_reported(adapter, tmp_path, capsys):
    rows = built_in.demonstrations("clean", 8)
    file = tmp_path / "seen.jsonl"
    rows[5]["completion"][0]["content"] += "!"
    file.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n" for row in rows))
    assert run(adapter, "--data", file, "--k", 0, "--no_drift", "--max_new_tokens", 30) == 0
    out = capsys.readouterr().out
    assert "7 of its rows are exact duplicates of training rows, 8 of its prompts" in out and "KL from" not in out
    assert run("demo", "--data", file, "--k", 0, "--train_data", file, "--max_new_tokens", 30) == 0
    assert "8 of its rows are exact duplicates" in capsys.readouterr().out


def test_a_model_without_adapter_and_data_in_other_columns(stories, gsm8k, tmp_path, capsys):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join((gsm8k / "test.jsonl").open(encoding="utf-8").readlines()[:3]), encoding="utf-8")
    columns = "{prompt: question, completion: answer}"
    assert run(stories, "--data", file, "--dataset_columns", columns, "--k", 1, "--max_new_tokens", 8) == 0
    out = capsys.readouterr().out
    assert "verifier gsm8k · 0 of 6 completions parsed" in out and "100.0%" in out and "KL" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "nothing to evaluate on"),
        (["demo", "--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["demo", "--data", "demo-noisy", "--verifier", "exakt"], "Did you mean exact?"),
        (["demo", "--data", "demo-noisy", "--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
        (["demo", "--data", "demo-noisy", "--limit", "0"], "limit is 0; it must be at least 1"),
        (["demo", "--data", "demo-noisy", "--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["demo", "--data", "demo-noisy", "--base", "demo"], "not an adapter's folder"),
        (["demo", "--task_data", "gsm8k=."], "--task_data is given without --tasks"),
        (["/nowhere/model", "--data", "demo-noisy"], "/nowhere/model"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and "Traceback" not in captured.err


def test_prompts_without_references_say_what_is_missing(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "2 + 2 ="}\n')
    assert run("demo", "--data", file) == 2
    assert "has prompts but no references" in " ".join(capsys.readouterr().err.split())


def test_an_adapter_without_its_training_rows_says_so(adapter, tmp_path, capsys):
    import shutil

    folder = tmp_path / "moved"
    shutil.copytree(adapter, folder)
    (folder / "recipe.yaml").write_text("dataset_name: gone.jsonl\n")
    assert run(folder, "--data", "demo-clean", "--limit", 1, "--k", 0) == 0
    out = capsys.readouterr().out
    assert "the training rows (gone.jsonl) are not here" in out and "exact duplicates" not in out


def test_options_are_read_as_they_are_declared():
    def read(*argv):
        return parse(Parser("qpsft evaluate", "", ""), argv, EvaluationOptions)

    options = read("m", "--tasks", "gsm8k,ifeval", "arc_easy", "--task_data", "gsm8k=a", "--k", "3", "--no_drift")
    assert options.tasks == ["gsm8k", "ifeval", "arc_easy"] and options.k == 3 and options.no_drift
    assert options.task_data == ["gsm8k=a"] and options.max_new_tokens is None and options.data == []
    assert read("m", "--dataset_columns", "{prompt: q}").dataset_columns == {"prompt": "q"}
    assert read("m", "--quantization", "none").quantization == "none"
    with pytest.raises(RecipeError, match="--dataset_columns is 'prompt'; it must be a mapping"):
        read("m", "--dataset_columns", "prompt")
    with pytest.raises(RecipeError, match="k is -1"):
        read("m", "--k", "-1")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed=-1"], "seed is -1"),
        (["--use_chat_template=foo"], "must be auto, always, never or none"),
        (["--temperature=inf"], "must be a finite number"),
        (["--temperature=nan"], "must be a finite number"),
        (["--data", "demo-noisy", "--split=validaton"], "no split 'validaton'"),
    ],
)
def test_a_misspelt_value_is_not_taken_for_another(adapter, capsys, flags, said):
    assert run(adapter, *flags) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_cut_references_are_told(adapter, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "1" * 3000}) + "\n")
    assert run(adapter, "--data", tmp_path / "long.jsonl") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 8 and "1 references cut where the model's context ends" in out
    for line in out.splitlines():
        assert len(line) <= 80 or str(adapter) in line or str(tmp_path) in line  # paths stay whole


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    from qpsft import files
    from qpsft.errors import OutputError
    from qpsft.evaluate import run

    target = tmp_path / "a.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        run.write_json(target, {"a": 1})
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
