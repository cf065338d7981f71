"""`qpsft train` as a user runs it: what it writes, what it refuses, and that nothing is half-written."""

import errno
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from qpsft import cli
from qpsft.data.tokenize import load_dataset
from qpsft.errors import OutputError
from qpsft.model.base import load_base, load_tokenizer
from qpsft.psft.config import PSFTConfig
from qpsft.psft.losses import LOSSES
from qpsft.recipe.file import load_recipe
from qpsft.train import outputs, plot, run
from qpsft.train.data import hold_out
from qpsft.train.progress import log_line, read_metrics

FLAGS = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128", "--lora_r=4",
    "--learning_rate=1e-3", "--warmup_steps=0", "--reference_steps=2", "--per_device_train_batch_size=4",
    "--gradient_accumulation_steps=1", "--gradient_checkpointing=false", "--logging_steps=2", "--seed=1",
]  # fmt: skip

WRITTEN = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_quantization.json",
    "chat_template.jinja",
    "metrics.jsonl",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.png",
    "verify_prompts.jsonl",
}


def train(folder, *flags):
    return cli.main(["train", *FLAGS, f"--output_dir={folder}", *flags])


def error(capsys) -> str:
    """What was printed to stderr, as one line."""
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "draw_training", plot.draw_training)  # conftest.py leaves it out
        assert train(folder, "--max_steps=6", "--save_steps=3") == 0
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_the_folder_holds_exactly_what_was_promised(trained):
    assert files(trained) == WRITTEN
    assert {p.name for p in trained.iterdir() if p.is_dir()} == {".qpsft", "checkpoint-3", "checkpoint-6"}
    assert all(t.dtype == torch.float32 for t in load_file(trained / "adapter_model.safetensors").values())
    assert os.stat(trained / "adapter_model.safetensors").st_mode & 0o777 == 0o644


def test_peft_loads_it_into_the_model_that_was_trained(trained):
    base, _ = load_base("demo", verbose=False)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        without = base(ids).logits
        logits = PeftModel.from_pretrained(base, trained)(ids).logits
    assert (logits - without).abs().max() > 1e-3
    again, _ = load_base("demo", verbose=False)
    with torch.no_grad():
        from_checkpoint = PeftModel.from_pretrained(again, trained / "checkpoint-6")(ids).logits
    assert torch.equal(logits, from_checkpoint)


def test_the_log_has_every_number_at_every_entry(trained):
    lines = [line for line in read_metrics(trained / "metrics.jsonl") if "nll" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {"loss", "nll", "entropy", "clip_fraction", "approx_kl", "ratio_max", "grad_norm", "mean_token_accuracy"}
    for line in lines:
        assert names | {"tokens_per_second", "learning_rate", "num_tokens"} <= set(line)
    assert lines[0]["loss"] < -0.9 and lines[-1]["nll"] < lines[0]["nll"]


def test_the_resolved_recipe_repeats_the_run(trained, tmp_path):
    text = (trained / "recipe.yaml").read_text()
    assert "torch 2." in text and yaml.safe_load(text)["reference_steps"] == 2
    assert cli.main(["train", str(trained / "recipe.yaml"), f"--output_dir={tmp_path / 'b'}"]) == 0
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "b"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_the_card_has_the_numbers_and_the_plot_is_one(trained):
    card = (trained / "README.md").read_text()
    last = [line for line in read_metrics(trained / "metrics.jsonl") if "nll" in line][-1]
    assert f"{last['nll']:.4f}" in card and "library_name: peft" in card and "Proximal SFT" in card
    assert f"torch {torch.__version__.split('+')[0]}" in card and platform.python_version() in card
    assert (trained / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_held_out_rows_are_kept_for_verification_and_never_trained_on(trained):
    prompts = [json.loads(line) for line in (trained / "verify_prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 6  # a tenth of 64 rows
    tokenizer = load_tokenizer("demo")
    for prompt in prompts:
        assert tokenizer.decode(prompt["input_ids"]) == prompt["text"]
        assert 0 < prompt["prompt_length"] < len(prompt["input_ids"])
    recipe = load_recipe(None, FLAGS, PSFTConfig)
    rows = load_dataset(recipe.data, tokenizer, 128, show_progress=False)
    kept, held_out = hold_out(rows, 16, seed=1)
    assert [row["input_ids"] for row in held_out] == [p["input_ids"] for p in prompts]
    assert len(kept) + len(held_out) == 64
    trained_on = {tuple(row["input_ids"]) for row in kept}
    assert not trained_on & {tuple(p["input_ids"]) for p in prompts}


def test_a_run_that_was_cut_off_continues_to_the_same_bytes(trained, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    for name in WRITTEN - {"metrics.jsonl"}:
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-6")
    assert train(folder, "--max_steps=6", "--save_steps=3", "--resume") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "nll" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_another_run_is_never_overwritten_unasked(trained, tmp_path, capsys):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(folder, "--max_steps=2") == 2
    assert "already holds a run" in error(capsys)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(folder, "--max_steps=2", "--overwrite", "--save_strategy=no") == 0
    assert files(folder) == WRITTEN and not list(folder.glob("checkpoint-*"))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 2


@pytest.mark.parametrize("started_with", ["recipe.yaml", "twin.yaml"])
def test_a_recipe_in_the_output_folder_is_left_as_it_is(tmp_path, started_with):
    text = "# mine\nmodel_name_or_path: demo\ndataset_name: demo-noisy\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "twin.yaml").write_text("extends: recipe.yaml\n")
    flags = [flag for flag in FLAGS if "dataset_name" not in flag]
    assert cli.main(["train", str(tmp_path / started_with), *flags, "--max_steps=1"]) == 0
    assert (tmp_path / "recipe.yaml").read_text() == text
    assert yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())["max_steps"] == 1


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name"])
def test_a_missing_model_or_dataset(name, tmp_path, capsys):
    flags = [flag for flag in FLAGS if name not in flag]
    assert cli.main(["train", *flags, f"--output_dir={tmp_path / 'a'}"]) == 2
    assert f"{name} is missing" in error(capsys)
    assert cli.main(["train", *flags, f"--{name}=./nowhere/x.jsonl", f"--output_dir={tmp_path / 'a'}"]) == 2
    assert "nowhere" in error(capsys)


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert train(tmp_path / "file") == 2
    assert "is a file" in error(capsys) and (tmp_path / "file").read_text() == "mine"
    assert train(tmp_path / "file" / "below") == 2
    assert "cannot be written" in error(capsys)


def test_output_that_is_not_writable(tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)  # root may write everywhere, so permissions alone test nothing
    with pytest.raises(OutputError, match="Permission denied"):
        run.check_output(tmp_path, resume=False, overwrite=False)


def test_nothing_to_resume(tmp_path, capsys):
    assert train(tmp_path / "a", "--resume") == 2
    assert "no whole checkpoint" in error(capsys)


def test_a_full_disk_at_the_end_leaves_no_half_written_adapter(tmp_path, monkeypatch, capsys):
    real = outputs.draw_training

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "draw_training", full)
    assert train(tmp_path / "a", "--max_steps=2", "--save_steps=2") == 2
    assert "No space left on device" in error(capsys)
    assert (
        files(tmp_path / "a") <= {"metrics.jsonl", "README.md", "base_quantization.json"}
        and not (tmp_path / "a" / ".partial").exists()
    )
    monkeypatch.setattr(outputs, "draw_training", real)
    assert train(tmp_path / "a", "--max_steps=2", "--save_steps=2", "--resume") == 0  # as the message says
    assert files(tmp_path / "a") == WRITTEN
    saved, written = (tmp_path / "a" / f / "adapter_model.safetensors" for f in ("checkpoint-2", "."))
    assert saved.read_bytes() == written.read_bytes()  # not a step more


def test_no_supervised_token_is_an_error_before_training(tmp_path, capsys):
    assert train(tmp_path / "a", "--max_length=4") == 2
    assert "supervised" in error(capsys)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "psft"])
def test_the_baselines_run(loss_type, tmp_path):
    assert train(tmp_path / "a", "--max_steps=2", f"--loss_type={loss_type}", "--save_strategy=no") == 0
    last = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "nll" in line][-1]
    assert last["clip_fraction"] == 0.0 and last["ratio_max"] == 1.0
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8").lower()
    assert f"by {'plain sft' if loss_type == 'nll' else loss_type}" in card


def test_a_run_shorter_than_a_log_interval_still_ends_with_its_numbers(tmp_path):
    assert train(tmp_path / "a", "--max_steps=1", "--logging_steps=50", "--save_strategy=no") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "nll" in line] == [1]


def test_a_log_line_fits_eighty_columns():
    numbers = {"nll": 12.3456, "entropy": 10.5, "clip_fraction": 1.0, "tokens_per_second": 123456.0}
    for kl in (0.0, 1.2345e-5, 1.2345e-4, 10.1234, 7818.4, 1e12):
        assert len(log_line(12345, 12345, numbers | {"learning_rate": 2e-4, "approx_kl": kl})) <= 80


def test_preview_shows_rows_and_counts(capsys):
    assert cli.main(["preview", "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=20"]) == 0
    out = capsys.readouterr().out
    assert "⟦" in out and "20" in out


@pytest.mark.parametrize("verb", ["preview", "train"])
def test_rows_past_the_end_of_the_model_s_context_are_warned_of(verb, tmp_path, capsys):
    def said(words: int, *more: str) -> str:
        row = {"prompt": "sort: 7", "completion": "7 " * words}
        (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
        flags = ["--model_name_or_path=demo", f"--dataset_name={tmp_path / 'rows.jsonl'}", "--use_cpu=true", *more]
        if verb == "train":
            flags += ["--max_steps=1", f"--output_dir={tmp_path / 'a'}", "--overwrite", "--loss_type=nll"]
            flags += ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=1"]
        assert cli.main([verb, *flags]) == 0
        return " ".join(capsys.readouterr().err.split())

    assert "The model's context ends at 512 tokens" in said(300) and "context ends" not in said(3)
    assert "context ends" not in said(300, "--max_length=512")


def test_resuming_a_finished_run_trains_no_further(trained, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    (folder / "adapter_model.safetensors").unlink()
    assert train(folder, "--max_steps=6", "--save_steps=3", "--resume") == 0
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        if name == "metrics.jsonl":  # transformers adds its closing line once more
            lines = [[line for line in read_metrics(f / name) if "nll" in line] for f in (folder, trained)]
            assert lines[0] == lines[1]
        else:
            assert (folder / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("mistake", ["--dataset_name=nope.jsonl", "--lora_target_modules=zzz", "--max_length=4"])
def test_a_mistake_beside_overwrite_costs_nothing(mistake, trained, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(folder, "--overwrite", mistake) == 2
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_start_that_failed_does_not_block_the_next(tmp_path, capsys):
    assert train(tmp_path / "a", "--max_steps=2", "--sft_warmup_steps=2") == 2
    assert "PSFT never begins" in error(capsys)
    assert train(tmp_path / "a", "--max_steps=2", "--save_strategy=no") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--quantization=fp4", "quantization = nf4, this one fp4"),
        ("--lora_r=8", "r = 4, this run has 8"),
        ("--dataset_name=demo-clean", "rows_sha256"),
        ("--lora_alpha=4", "lora_alpha"),
    ],
)
def test_a_run_goes_on_only_as_it_began(change, message, trained, tmp_path, capsys):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    before = (folder / "base_quantization.json").read_bytes()
    assert train(folder, "--max_steps=8", "--resume", change) == 2
    assert message in error(capsys)
    assert (folder / "base_quantization.json").read_bytes() == before


def test_packing_needs_a_length(tmp_path, capsys):
    assert train(tmp_path / "a", "--packing=true", "--max_length=none") == 2
    assert "packing needs max_length" in error(capsys)


def test_what_the_trainer_refuses_is_one_paragraph(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("padding_free does not go with that.\nA long explanation.")

    monkeypatch.setattr("trl.SFTTrainer.__init__", refuse)
    assert train(tmp_path / "a") == 2
    message = error(capsys)
    assert "cannot be set up: padding_free does not go with that." in message and "explanation" not in message


def test_truncated_rows_are_mentioned(capsys, tmp_path):
    assert train(tmp_path / "a", "--max_steps=1", "--max_length=60", "--save_strategy=no") == 0
    out = capsys.readouterr().out
    assert "truncated at 60 tokens" in out and "qpsft merge" in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(("data:", "  README")))


def test_the_peak_of_an_earlier_run_does_not_count(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(run, "forget_earlier_peak", lambda: order.append("peak"))
    monkeypatch.setattr(run, "load_base", lambda *args, **kwargs: order.append("base") or sys.exit())
    recipe = load_recipe(None, [*FLAGS, f"--output_dir={tmp_path}"], PSFTConfig)
    with pytest.raises(SystemExit):
        run.train(recipe)
    assert order == ["peak", "base"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    run.forget_earlier_peak()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run.forget_earlier_peak()
    assert order[2:] == ["reset"]
