"""eval_dataset and its options in `qpsft train`: what is evaluated, which adapter is written, when it stops."""

import math

import pytest
import yaml
from test_guard import ADAPTER, RUN, one_line, write_rows
from test_resume import StopAt

from qpsft import cli
from qpsft.compare.options import load_comparison
from qpsft.compare.run import decisive_options
from qpsft.data import built_in
from qpsft.errors import DataError, RecipeError
from qpsft.evaluate.likelihood import text_statistics
from qpsft.model.base import load_base, load_tokenizer
from qpsft.psft.config import PSFTConfig
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.file import load_recipe
from qpsft.train import run
from qpsft.train.evaluation import load_evaluation_set
from qpsft.train.progress import read_metrics

EVALUATION = ["--eval_strategy=steps", "--eval_steps=2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    found = built_in.in_domain("test", 6)
    return write_rows(tmp_path_factory.mktemp("rows") / "eval.jsonl", found)


def train(folder, *flags, callbacks=()):
    return run.train(load_recipe(None, [*RUN, f"--output_dir={folder}", *flags], PSFTConfig), callbacks)


@pytest.fixture
def losses(monkeypatch):
    """Losses that evaluations find one after another, in place of their own."""
    told, real = [], PSFTTrainer.log

    def log(self, logs, *args):
        if "eval_loss" in logs:
            logs["eval_loss"] = told.pop(0)
        real(self, logs, *args)

    monkeypatch.setattr(PSFTTrainer, "log", log)
    return told


# ---- what is evaluated ----


def test_evaluations_are_logged_printed_and_right(rows, tmp_path, capsys):
    train(tmp_path / "a", *EVALUATION, f"--eval_dataset={rows}", "--max_steps=4", "--per_device_eval_batch_size=8")
    printed = capsys.readouterr().out
    assert "eval: " in printed and "6 rows" in one_line(printed)
    assert all(len(line) <= 80 for line in printed.splitlines())
    lines = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert one_line(f"step 4/4 evaluation: nll {lines[1]['eval_loss']:.3f}") in one_line(printed)
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base("demo", verbose=False)[0], tmp_path / "a")
    recipe = load_recipe(None, [*RUN, *EVALUATION, f"--eval_dataset={rows}"], PSFTConfig)
    tokens = load_evaluation_set(recipe, load_tokenizer("demo")).dataset
    found = text_statistics(model, list(tokens))
    assert lines[1]["eval_loss"] == pytest.approx(found["nll"], rel=1e-4)
    assert lines[1]["eval_entropy"] == pytest.approx(found["entropy"], rel=1e-4)


def test_evaluating_does_not_change_what_is_learned(rows, tmp_path):
    noisy = ["--lora_dropout=0.2", "--loss_type=nll", "--num_iterations=1", "--max_steps=4"]
    for name, flags in {"without": [], "with": [*EVALUATION, f"--eval_dataset={rows}"]}.items():
        train(tmp_path / name, *noisy, *flags)
    assert (tmp_path / "with" / ADAPTER).read_bytes() == (tmp_path / "without" / ADAPTER).read_bytes()


def test_rows_are_prepared_as_the_training_rows(rows):
    same = load_recipe(None, [*RUN, *EVALUATION, f"--eval_dataset={rows}"], PSFTConfig)
    as_training = load_recipe(None, [*RUN, f"--dataset_name={rows}"], PSFTConfig)
    wanted = run.read_training_data(as_training, load_tokenizer("demo")).rows
    got = load_evaluation_set(same, load_tokenizer("demo")).dataset
    assert got["input_ids"][:] == wanted["input_ids"][:] and got["labels"][:] == wanted["labels"][:]


def test_a_broken_row_is_named(tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": 7}])
    with pytest.raises(DataError, match=r"eval_dataset: .*bad.jsonl, line 1"):
        train(tmp_path / "a", *EVALUATION, f"--eval_dataset={bad}")


# ---- the best adapter ----


def test_the_best_adapter_is_written(rows, losses, tmp_path, capsys):
    losses += [3.0, 1.0, 2.0, 1.5]
    summary = train(tmp_path / "a", *EVALUATION, f"--eval_dataset={rows}", "--load_best_model_at_end")
    assert (summary.steps, summary.written) == (8, 4)
    written = (tmp_path / "a" / ADAPTER).read_bytes()
    assert written == (tmp_path / "a" / "checkpoint-4" / ADAPTER).read_bytes()
    assert written != (tmp_path / "a" / "checkpoint-8" / ADAPTER).read_bytes()
    assert "written: the best adapter, of step 4, evaluation nll 1.0000" in one_line(str(summary))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| optimizer steps | 4 |" in card and "- written: the best adapter, of step 4" in card
    resolved = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert resolved["eval_dataset"] == str(rows) and resolved["load_best_model_at_end"] is True


def test_early_stopping_and_resuming_it(rows, losses, tmp_path):
    flags = [*EVALUATION, f"--eval_dataset={rows}", "--early_stopping_patience=2", "--load_best_model_at_end"]
    losses += [3.0, 2.0, 2.5, 2.2, "never asked for"]
    whole = train(tmp_path / "whole", *flags, "--max_steps=12")
    assert (whole.steps, whole.written) == (8, 4)
    assert "stopped early at step 8: no better nll in 2 evaluations" in one_line(str(whole))
    losses[:] = [3.0, 2.0, 2.5]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", *flags, "--max_steps=12", callbacks=[StopAt(6)])
    losses[:] = [2.2]
    resumed = train(tmp_path / "cut", *flags, "--max_steps=12", "--resume")
    assert (resumed.steps, resumed.written) == (8, 4)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_stopped_before_the_first_log_line_and_back_to_where_it_was_resumed(rows, losses, tmp_path):
    """A run that is resumed at its best step and ends there again has learned something all the same."""
    flags = [*EVALUATION, f"--eval_dataset={rows}", "--early_stopping_patience=1", "--load_best_model_at_end"]
    losses += [1.0]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", *flags, "--logging_steps=50", callbacks=[StopAt(2)])
    losses[:] = [2.0]
    resumed = train(tmp_path / "a", *flags, "--logging_steps=50", "--resume")
    assert (resumed.steps, resumed.written) == (4, 2) and math.isfinite(resumed.numbers["nll"])


# ---- options ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy=steps"], "--eval_strategy: there is no evaluation set. Name one: eval_dataset"),
        (["--eval_dataset=x.jsonl"], "--eval_dataset has no effect without eval_strategy"),
        (["--load_best_model_at_end"], "--load_best_model_at_end has no effect without eval_strategy"),
        (["--early_stopping_patience=2"], "--early_stopping_patience has no effect without eval_strategy"),
        (["--save_strategy=best"], "--save_strategy has no effect without eval_strategy"),
        ([*EVALUATION, "--eval_dataset=x", "--early_stopping_patience=0"], "patience is 0; it must be at least 1"),
        ([*EVALUATION, "--eval_dataset=x", "--metric_for_best_model=f1"], "'f1', .* Use one of loss, nll"),
        (["--eval_strategy=epoch", "--eval_dataset=x", "--load_best_model_at_end"], "save and eval strategy to match"),
    ],
)
def test_options_that_do_not_go_together(flags, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, flags, PSFTConfig)


def test_what_follows_from_options():
    given = [*EVALUATION, "--eval_dataset=x", "--early_stopping_patience=2", "--per_device_train_batch_size=3"]
    recipe = load_recipe(None, given, PSFTConfig)
    assert (recipe.trainer.metric_for_best_model, recipe.trainer.greater_is_better) == ("loss", False)
    assert recipe.trainer.per_device_eval_batch_size == 3
    recipe = load_recipe(None, [*given, "--metric_for_best_model=nll"], PSFTConfig)
    assert (recipe.trainer.metric_for_best_model, recipe.trainer.greater_is_better) == ("loss", False)
    recipe = load_recipe(None, [*given, "--metric_for_best_model=mean_token_accuracy"], PSFTConfig)
    assert recipe.trainer.greater_is_better is True


def test_a_comparison_does_not_evaluate_as_training_does(tmp_path):
    text = "model_name_or_path: demo\ndataset_name: demo-noisy\neval_dataset: demo-noisy\neval_strategy: steps\n"
    (tmp_path / "recipe.yaml").write_text(f"{text}eval_steps: 2\nload_best_model_at_end: true\nsave_steps: 2\n")
    options = decisive_options(load_comparison(tmp_path / "recipe.yaml", [])[0])
    assert not {name for name in options if "eval" in name or "best" in name}
    assert PSFTConfig(tmp_path, **options).eval_strategy == "no"


def test_help_lists_them(capsys):
    assert cli.main(["train", "--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("eval_dataset", "eval_strategy", "eval_steps", "early_stopping_patience", "guard"):
        assert f"--{name} " in listed
