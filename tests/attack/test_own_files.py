"""A user's own files in the folder of a run are never replaced: only what a run wrote there, by its record, is."""

import json
import shutil
from pathlib import Path

import pytest

from qpsft import cli
from qpsft.errors import OutputError
from qpsft.train import outputs
from qpsft.train.outputs import WRITTEN_FILES, check_own_files, record_files

FLAGS = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=32", "--max_length=128", "--lora_r=2",
    "--max_steps=1", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--save_strategy=no",
    "--gradient_checkpointing=false", "--loss_type=nll",
]  # fmt: skip
OWN = ("README.md", "tokenizer.json", "tokenizer_config.json", "training.png", "chat_template.jinja", "metrics.jsonl",
       "adapter_config.json", "adapter_model.safetensors", "base_quantization.json", "verify_prompts.jsonl",
       "chat_date")  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(folder: Path, *flags: str) -> int:
    return cli.main(["train", *FLAGS, f"--output_dir={folder}", *flags])


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "a"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(folder: Path, capsys, *flags: str) -> str:
    """What a run into the folder is refused with; the folder is then what it was."""
    before = contents(folder)
    capsys.readouterr()
    assert train(folder, *flags) == 2
    assert contents(folder) == before
    return said(capsys)


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", OWN)
def test_no_file_of_the_users_is_replaced(tmp_path, capsys, name, flags):
    (tmp_path / name).write_text("mine")
    words = refused(tmp_path, capsys, *flags)
    assert f"{name}, which no run of qpsft wrote" in words or (not flags and "already holds a run" in words)


def test_all_of_them_are_named_with_what_to_do(tmp_path, capsys):
    for name in ("README.md", "tokenizer.json", "training.png"):
        (tmp_path / name).write_text("mine")
    words = refused(tmp_path, capsys)
    assert "holds README.md, tokenizer.json, training.png, which no run of qpsft wrote there" in words
    assert "choose another --output_dir" in words


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_links_and_folders_are_files_of_the_users_too(tmp_path, capsys, kind):
    folder, notes = tmp_path / "run", tmp_path / "notes.md"
    folder.mkdir()
    if kind == "folder":
        (folder / "README.md").mkdir()
    else:
        (folder / "README.md").symlink_to(notes)
    if kind == "link":
        notes.write_text("mine")
    assert "README.md" in refused(folder, capsys)
    assert notes.exists() == (kind == "link")


def test_another_trainers_checkpoints_are_not_removed(tmp_path, capsys):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_text("mine")
    assert "checkpoint-7" in refused(tmp_path, capsys, "--overwrite")


def test_a_recipes_folder_with_other_files_is_trained_into_and_they_stay(tmp_path):
    mine = {"notes.txt": b"mine", "rows.csv": b"a,b\n", "LICENSE": b"mine", "recipe.yaml": b"seed: 3\n"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), *FLAGS]) == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in mine} == mine and "recipe.resolved.yaml" in after
    assert not set(mine) & set(json.loads(after[WRITTEN_FILES])["files"])


def test_what_a_run_wrote_is_replaced_by_overwrite(run, capsys):
    before = contents(run)
    assert set(before) - {WRITTEN_FILES} <= set(json.loads(before[WRITTEN_FILES])["files"])
    assert "already holds a run" in refused(run, capsys)
    assert train(run, "--overwrite", "--seed=5") == 0
    after = contents(run)
    assert after.keys() == before.keys()
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_a_file_of_the_users_beside_a_run_stays_at_overwrite(run, capsys):
    """A file that the earlier run did not write: the tokenizer of a chat model brings one more."""
    names = json.loads((run / WRITTEN_FILES).read_text())["files"]
    (run / WRITTEN_FILES).write_text(json.dumps({"files": [name for name in names if name != "training.png"]}))
    assert "holds training.png, which no run" in refused(run, capsys, "--overwrite")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"files": 3}', b'{"files": [1]}', b"\xff\xfe", b"null", b'{"files": ["../notes.txt"]}',
     b'{"files": [".."]}', b'{"files": ["/etc/hostname"]}', b'{"files": ["a/../../x"]}'],
)  # fmt: skip
def test_a_damaged_record_makes_nothing_ours(run, capsys, content):
    (run / WRITTEN_FILES).write_bytes(content)
    assert "cannot be read" in refused(run, capsys, "--overwrite")


def test_a_run_that_was_cut_off_is_begun_anew(run):
    """The record is written before the first step, so what a killed run left is known as its own."""
    folder = run.parent / "cut"
    folder.mkdir()
    record_files(folder, ["metrics.jsonl", "base_quantization.json", "README.md"])
    for name in ("metrics.jsonl", "base_quantization.json", "README.md"):
        shutil.copy(run / name, folder)
    assert train(folder, "--overwrite") == 0


def test_a_file_that_appears_while_it_trains_is_not_replaced(tmp_path, monkeypatch, capsys):
    real = outputs.draw_training

    def meanwhile(*args, **options):
        (tmp_path / "a" / "training.png").write_text("mine")
        real(*args, **options)

    monkeypatch.setattr(outputs, "draw_training", meanwhile)
    assert train(tmp_path / "a", "--save_strategy=steps", "--save_steps=1") == 2
    words = said(capsys)
    assert "holds training.png" in words and (tmp_path / "a" / "training.png").read_text() == "mine"
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(outputs, "draw_training", real)
    (tmp_path / "a" / "training.png").unlink()
    assert train(tmp_path / "a", "--save_strategy=steps", "--save_steps=1", "--resume") == 0


def test_the_record_grows_and_never_shrinks(tmp_path):
    record_files(tmp_path, ["b"])
    record_files(tmp_path, ["a"])
    assert json.loads((tmp_path / WRITTEN_FILES).read_text()) == {"files": ["a", "b"]}
    for name in "abc":
        (tmp_path / name).write_text("x")
    check_own_files(tmp_path, ["a", "b"])
    with pytest.raises(OutputError, match="holds c, which no run"):
        check_own_files(tmp_path, ["a", "c"])
