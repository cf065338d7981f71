"""`--overwrite` replaces an earlier run, merge or export whole or not at all, and nothing that is not its own."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from merging import save_peft_adapter
from small_runs import make_base
from verbs import TRAIN, contents, said, train

from qpsft import cli
from qpsft.errors import BaseModelError, OutputError
from qpsft.export import ollama
from qpsft.export.options import ExportOptions
from qpsft.files import finished_folder, work_folder
from qpsft.merge import merge_adapter
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.train import outputs
from qpsft.train import run as runs
from qpsft.train.outputs import NEW_RUN, RUN_FOLDER, WRITTEN_FILES, take_place


class Killed(BaseException):
    """Ends a run as a kill would: nothing catches it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("overwrite") / "run"
    assert train(folder, *TRAIN, "--save_steps=1") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ---- what can be refused is refused before the earlier run is touched ----

BAD = {
    "a data file that is not there": ["--dataset_name=./nowhere.jsonl"],
    "a data file that is broken": ["--dataset_name={broken}"],
    "a data file without rows": ["--dataset_name={empty}"],
    "a chat template that is broken": ["--prompt_format={{nothing}}"],
    "unknown target modules": ["--lora_target_modules=nothing_of_it"],
    "a learning rate below zero": ["--learning_rate=-1"],
    "a learning rate that is no number": ["--learning_rate=high"],
    "a base that is not there": ["--model_name_or_path=./nowhere"],
    "a base that is an adapter": ["--model_name_or_path={run}"],
    "an adapter that is not there": ["--adapter_name_or_path=./nowhere"],
    "its own adapter": ["--adapter_name_or_path={run}"],
    "an unknown optimizer": ["--optim=unknown"],
    "an unknown loss": ["--loss_type=unknown"],
    "an unknown option": ["--no_such_option=1"],
    "a method and its contrary": ["--resume"],
    "a loss that needs more": ["--loss_type=stm", "--streaming", "--max_steps=1"],
    "a guard without rows": ["--guard={{data: ./nowhere.jsonl, max_drop: 0.1}}"],
    "an evaluation set that is not there": ["--eval_dataset=./nowhere.jsonl"],
    "packing of rows that are too long": ["--packing", "--max_length=2"],
    "a scheduler that is not known": ["--lr_scheduler_type=unknown"],
    "rows too long": ["--max_length=1"],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_option_leaves_the_earlier_run_as_it_was(run, tmp_path, capsys, kind):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "empty.jsonl").write_text("")
    places = {"broken": tmp_path / "broken.jsonl", "empty": tmp_path / "empty.jsonl", "run": run}
    before = contents(run)
    assert train(run, *TRAIN, "--overwrite", *(flag.format(**places) for flag in BAD[kind])) == 2, kind
    words = said(capsys)
    assert "error:" in words and "Traceback" not in words
    assert contents(run) == before and not (run / NEW_RUN).exists()


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("load_policy", MemoryError()),
        ("make_trainer", OSError(errno.ENOSPC, "No space left")),
        ("run_trainer", Killed()),
    ],
)
def test_whatever_fails_before_the_end_leaves_the_earlier_run_as_it_was(run, monkeypatch, stage, error):
    before = contents(run)

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(runs, stage, fails)
    if isinstance(error, OSError):
        assert train(run, *TRAIN, "--overwrite", "--seed=3") == 2
    else:
        with pytest.raises(type(error)):
            train(run, *TRAIN, "--overwrite", "--seed=3")
    after = {name: content for name, content in contents(run).items() if not name.startswith(NEW_RUN)}
    assert after == before
    AdapterFolder(run).base_folder()


def test_no_disk_for_the_new_adapter_leaves_the_earlier_one(run, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(run)
    monkeypatch.setattr(outputs, "draw_training", full)
    assert train(run, *TRAIN, "--overwrite", "--seed=3", "--save_steps=1") == 2
    assert "No space left" in said(capsys) and "--resume" not in contents(run)
    assert {name: content for name, content in contents(run).items() if not name.startswith(NEW_RUN)} == before
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "draw_training", lambda lines, path, title: path.touch())
    assert train(run, *TRAIN, "--resume", "--seed=3", "--save_steps=1") == 0
    after = contents(run)
    assert not any(name.startswith(NEW_RUN) for name in after) and after.keys() == before.keys()
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


# ---- cut off in the middle ----


def test_killed_at_every_move_it_goes_on_where_it_was(run, tmp_path, monkeypatch):
    """The new run is whole and its files are on their way: whatever is there is one run's, or refused by name."""
    (run / "added_tokens.json").write_text("of the earlier run")
    content = json.loads((run / WRITTEN_FILES).read_text())
    (run / WRITTEN_FILES).write_text(json.dumps({"files": [*content["files"], "added_tokens.json"]}))
    (run / "chat_date").write_text("2020-02-02\n")  # a name that every run has in its list, whether it writes it or not
    (run / "notes.txt").write_text("mine")
    (run / "recipe.yaml").write_text("# mine now\nseed: 3\n")
    earlier = contents(run)
    monkeypatch.setattr(outputs, "take_place", lambda new, folder: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(run, *TRAIN, "--overwrite", "--seed=3", "--max_steps=2", "--save_steps=2")
    monkeypatch.undo()
    assert {name: content for name, content in contents(run).items() if not name.startswith(NEW_RUN)} == earlier
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    take_place(whole / NEW_RUN, whole)
    wanted = contents(whole)
    AdapterFolder(whole).base_folder()
    assert "checkpoint-2/optimizer.pt" in wanted and "checkpoint-1/optimizer.pt" not in wanted
    assert wanted["notes.txt"] == b"mine" and not {"added_tokens.json", "chat_date"} & wanted.keys()
    assert wanted["recipe.yaml"] == earlier["recipe.yaml"] and "recipe.resolved.yaml" in wanted
    real, moves = outputs.move, len([path for path in (run / NEW_RUN).iterdir() if path.name != RUN_FOLDER])
    for stop in range(moves):
        folder, left = Path(shutil.copytree(run, tmp_path / f"cut-{stop}")), [stop]

        def stopping(path, place, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(path, place)

        monkeypatch.setattr(outputs, "move", stopping)
        with pytest.raises(Killed):
            take_place(folder / NEW_RUN, folder)
        monkeypatch.setattr(outputs, "move", real)
        adapter = (folder / "adapter_model.safetensors").read_bytes()
        if adapter == earlier["adapter_model.safetensors"]:
            AdapterFolder(folder).base_folder()
        else:
            with pytest.raises(BaseModelError, match="of another run"):
                AdapterFolder(folder).base_folder()
        with pytest.raises(OutputError, match="already holds a run"):  # whatever comes next there finishes it first
            outputs.check_output(folder, resume=False, overwrite=False)
        assert contents(folder) == wanted, stop


def test_resume_goes_on_with_the_run_that_was_to_replace(run, monkeypatch, capsys):
    earlier = contents(run)
    real = runs.PSFTTrainer._save_checkpoint

    def saved_and_killed(self, *args):
        real(self, *args)
        raise Killed

    monkeypatch.setattr(runs.PSFTTrainer, "_save_checkpoint", saved_and_killed)
    flags = [*TRAIN, "--seed=3", "--max_steps=2", "--save_steps=1"]
    with pytest.raises(Killed):
        train(run, *flags, "--overwrite")
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "draw_training", lambda lines, path, title: path.touch())
    assert (run / NEW_RUN / "checkpoint-1").is_dir()
    assert train(run, *flags, "--resume") == 0
    other = run.parent / "other"
    assert train(other, *flags) == 0
    for name in ("adapter_model.safetensors", "checkpoint-2/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes() != earlier.get(name)
    assert not (run / NEW_RUN).exists()


def test_a_new_run_without_a_checkpoint_says_how_to_have_either(run, monkeypatch, capsys):
    def killed(*args):
        raise Killed

    monkeypatch.setattr(runs, "run_trainer", killed)
    with pytest.raises(Killed):
        train(run, *TRAIN, "--overwrite")
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "draw_training", lambda lines, path, title: path.touch())
    capsys.readouterr()
    assert train(run, *TRAIN, "--resume") == 2
    words = said(capsys)
    assert "no whole checkpoint" in words and "--overwrite" in words and f"remove {run / NEW_RUN}" in words
    shutil.rmtree(run / NEW_RUN)
    assert train(run, *TRAIN, "--resume", "--max_steps=2", "--save_steps=2") == 0


# ---- merge, export, compare ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    return save_peft_adapter(folder / "adapter", make_base(folder / "base"))


STRANGERS = ("notes.txt", "model-00009-of-00009.safetensors", ".hidden", "more/letter.txt")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_merge_replaces_no_strangers_file(adapter, tmp_path, stranger):
    output = tmp_path / "merged"
    merge_adapter(adapter, output, no_verify=True)
    (output / stranger).parent.mkdir(exist_ok=True)
    (output / stranger).write_text("mine")
    before = contents(output)
    with pytest.raises(OutputError, match=f"holds {stranger.partition('/')[0]}, which qpsft did not write"):
        merge_adapter(adapter, output, no_verify=True, overwrite=True, dtype="float32")
    assert contents(output) == before and [path.name for path in tmp_path.iterdir()] == ["merged"]
    shutil.rmtree(output / stranger.partition("/")[0]) if "/" in stranger else (output / stranger).unlink()
    merge_adapter(adapter, output, no_verify=True, overwrite=True, dtype="float32")


@pytest.mark.parametrize("report", ["", "{}", "[]", '{"files": ["config.json"]}', '{"qpsft_version": "1", "files": 3}'])
def test_a_report_that_is_not_ours_makes_nothing_ours(adapter, tmp_path, report):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "merge_report.json").write_text(report)
    (output / "config.json").write_text("mine")
    before = contents(output)
    with pytest.raises(OutputError, match="holds config.json, merge_report.json, which qpsft did not write"):
        merge_adapter(adapter, output, no_verify=True, overwrite=True)
    assert contents(output) == before


def test_what_comes_into_a_merge_while_it_is_made_is_not_removed(tmp_path):
    def write(folder: Path) -> None:
        (folder / "merge_report.json").write_text("{}")

    for late in (False, True):
        arguments = dict(mark="merge_report.json", overwrite=True, written=lambda folder: ["merge_report.json"])
        if not late:
            with finished_folder(tmp_path / "out", **arguments) as folder:
                write(folder)
            continue
        with (
            pytest.raises(OutputError, match="holds late.txt"),
            finished_folder(tmp_path / "out", **arguments) as folder,
        ):
            write(folder)
            (tmp_path / "out" / "late.txt").write_text("mine")
    assert (tmp_path / "out" / "late.txt").read_text() == "mine" and os.listdir(tmp_path) == ["out"]


def made_gguf(options: ExportOptions):
    """What stands for the conversion, which is tested elsewhere: it writes a file."""
    options.output.write_bytes(b"GGUF new")
    check = type("Check", (), {"adds_bos": False})
    report = ollama.ExportReport(options.output, "f16", 8, check, None, None, stops=["</s>"])
    return report


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(ollama, "export_gguf", made_gguf)
    return make_base(tmp_path / "model")


def export(model: Path, output: Path, **options) -> None:
    ollama.export_ollama(ExportOptions(source=str(model), to="ollama", output=str(output), **options))


def test_an_ollama_folder_is_replaced_whole(model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(model, output)
    assert set(os.listdir(output)) == {"model.gguf", "Modelfile"}
    text = (output / "Modelfile").read_text()
    assert text.startswith("# Written by qpsft export.\nFROM ./model.gguf\n")
    with pytest.raises(OutputError, match="exists"):
        export(model, output)
    before = contents(output)
    monkeypatch.setattr(ollama, "modelfile", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        export(model, output, overwrite=True)
    assert contents(output) == before and {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    monkeypatch.undo()
    monkeypatch.setattr(ollama, "export_gguf", made_gguf)
    export(model, output, overwrite=True, num_ctx=7)
    assert "num_ctx 7" in (output / "Modelfile").read_text()


@pytest.mark.parametrize("name", ["notes.txt", "other.gguf"])
def test_an_ollama_folder_with_a_strangers_file_is_left_alone(model, tmp_path, name):
    output = tmp_path / "out"
    export(model, output)
    (output / name).write_text("mine")
    before = contents(output)
    with pytest.raises(OutputError, match=f"holds {name}, which qpsft did not write"):
        export(model, output, overwrite=True)
    assert contents(output) == before


def test_a_modelfile_of_the_users_is_left_alone(model, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "Modelfile").write_text("FROM ./model.gguf\n")
    with pytest.raises(OutputError, match="holds Modelfile, which qpsft did not write"):
        export(model, output, overwrite=True)
    (output / "Modelfile").unlink()
    (output / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no Modelfile"):
        export(model, output, overwrite=True)
    assert (output / "letter.txt").read_text() == "mine"


def test_a_file_that_is_no_gguf_is_not_replaced_by_one(tmp_path):
    letter = tmp_path / "letter.gguf"
    letter.write_text("dear")
    with pytest.raises(OutputError, match="is not a GGUF"), work_folder(letter, overwrite=True, source=tmp_path / "x"):
        pass
    assert letter.read_text() == "dear"
    letter.write_bytes(b"GGUF old")
    with work_folder(letter, overwrite=True, source=tmp_path / "x"):
        pass


@pytest.mark.parametrize("name", ["report.html", "comparison.json", "curves.png", "frontier.png"])
def test_a_comparison_replaces_no_file_of_the_users(tmp_path, capsys, name):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: demo\ndataset_name: demo-noisy\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert cli.main(["compare", str(tmp_path / "recipe.yaml"), f"--output_dir={tmp_path / 'out'}"]) == 2
    assert f"holds {name}, which no run of qpsft wrote" in said(capsys)
    assert (tmp_path / "out" / name).read_text() == "mine"
