"""Damage is named: flipped bytes and cut-off files in checkpoints and adapters, and bases with values that are none."""

import random
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import make_base
from verbs import TRAIN, flip, half, said, train

from qpsft import cli
from qpsft.errors import BaseModelError
from qpsft.model.fingerprint import check_finite
from qpsft.psft.checkpoint import check_bytes

# ---- checkpoints ----

FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "psft_reference.safetensors",
    "psft_scores_0.safetensors", "psft_run.json", "trainer_state.json", "adapter_config.json", "training_args.bin",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    assert train(folder, *TRAIN, "--max_steps=2", "--save_steps=1") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(folder: Path) -> int:
    return train(folder, *TRAIN, "--max_steps=3", "--save_steps=1", "--resume")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_of_a_checkpoint_is_refused_by_name(run, capsys, name):
    flip(run / "checkpoint-2" / name, random.Random(name))
    before = (run / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert resume(run) == 2
    words = said(capsys)
    assert "checkpoint-2 is damaged" in words and name in words and "remove that folder" in words
    assert "Traceback" not in words and (run / "adapter_model.safetensors").read_bytes() == before


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", pytest.param("adapter_model.safetensors", marks=SLOW), pytest.param("scheduler.pt", marks=SLOW)],
)
def test_a_file_that_is_cut_off_is_named_and_the_checkpoint_before_is_taken(run, capsys, name):
    half(run / "checkpoint-2" / name)
    capsys.readouterr()
    assert resume(run) == 0
    assert f"checkpoint-2 is half-written ({name} is missing or has another size)" in said(capsys)
    check_bytes(run / "checkpoint-2")


def test_python_is_told_too(run):
    from qpsft.errors import TrainingError

    flip(run / "checkpoint-1" / "scheduler.pt", random.Random(0))
    with pytest.raises(TrainingError, match="checkpoint-1 is damaged: scheduler.pt has SHA-256"):
        check_bytes(run / "checkpoint-1")
    check_bytes(run / "checkpoint-2")


def test_every_file_is_on_the_disk_before_the_mark(run, monkeypatch):
    """The order in which files reach the disk, as seen at the only place that syncs."""
    import qpsft.files as files

    order, real = [], files.sync
    monkeypatch.setattr(files, "sync", lambda file: (order.append(Path(file.name).name), real(file)))
    files_there = {path.name for path in (run / "checkpoint-2").iterdir()} - {"complete.json"}
    (run / "checkpoint-2" / "complete.json").unlink()
    from qpsft.psft.checkpoint import mark_complete

    mark_complete(run / "checkpoint-2")
    assert set(order[:-1]) == files_there and order[-1].startswith(".complete.json")


# ---- adapters ----

DAMAGE = {"cut in half": lambda path: half(path), "a flipped byte": lambda path: flip(path, random.Random(3))}
VERBS = {
    "chat": ["chat", "{}"],
    "evaluate": ["evaluate", "{}", "--data", "{data}", "--k=0", "--no_drift"],
    "verify": ["verify", "{}", "{merged}"],
    "train": ["train", *TRAIN, "--max_steps=1", "--adapter_name_or_path={}", "--output_dir={out}"],
    "push": ["push", "{}", "owner/name"],
    "push, dry run": ["push", "{}", "owner/name", "--dry_run"],
    "vllm": ["export", "{}", "--to=vllm"],
    "gguf": ["export", "{}", "--to=gguf", "-o={out}.gguf"],
    "gguf-lora": ["export", "{}", "--to=gguf-lora", "-o={out}.gguf"],
    "ollama": ["export", "{}", "--to=ollama", "-o={out}"],
    "merge": ["merge", "{}", "-o={out}"],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_adapter_is_refused_by_every_verb(run, tmp_path, capsys, monkeypatch, verb, damage):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("something was sent"))
    DAMAGE[damage](run / "adapter_model.safetensors")
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 4)
    from qpsft.model.folder import MODEL_DIR

    arguments = [word.format(run, data=data, out=out, merged=MODEL_DIR) for word in VERBS[verb]]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    words = said(capsys)
    assert str(run / "adapter_model.safetensors") in words and ("damaged" in words or "truncated" in words), words
    assert not out.exists() and not list(tmp_path.glob(".out*")), "something was half-written"


# ---- bases ----


@pytest.fixture
def poisoned(tmp_path) -> Path:
    folder = make_base(tmp_path / "poisoned")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BASES = {
    "evaluate": ["evaluate", "{}", "--data", "{data}", "--k=0"],
    "evaluate, 16 bits": ["evaluate", "{}", "--quantization=none", "--data", "{data}", "--k=0"],
    "chat": ["chat", "{}"],
    "train": ["train", "--model_name_or_path={}", "--dataset_name={data}", "--output_dir={out}", "--max_steps=1",
              "--prompt_format={{prompt}} "],
}  # fmt: skip


@pytest.mark.parametrize("verb", BASES)
def test_a_base_with_a_nan_is_refused_by_name(poisoned, tmp_path, capsys, verb):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "w3 w4", "completion": "w5"}\n' * 4)
    arguments = [word.format(poisoned, data=data, out=tmp_path / "out") for word in BASES[verb]]
    assert cli.main(arguments) == 2
    words = said(capsys)
    assert "model.layers.1.mlp.down_proj.weight" in words and "not finite" in words, words


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_value_that_is_none_is_found_wherever_it_is(tmp_path, name, dtype, value):
    folder = make_base(tmp_path / "base")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_finite(folder)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=f"{name} in .*model.safetensors has values that are not finite"):
        check_finite(folder)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("qpsft.model.fingerprint.VALUES", 100)
    folder = make_base(tmp_path / "base")
    check_finite(folder)
    tensors = load_file(folder / "model.safetensors")
    for row in (0, 63, 127):
        poisoned = tensors["lm_head.weight"].clone()
        poisoned[row, 0] = float("nan")
        save_file(tensors | {"lm_head.weight": poisoned}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match="lm_head.weight"):
            check_finite(folder)
