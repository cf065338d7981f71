"""Two processes in one folder, and signals: a folder in use is closed, and what is asked to end saves first."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from planted import ROOT
from verbs import TRAIN, contents, said, train

from qpsft import cli
from qpsft.demo import walkthrough
from qpsft.errors import Interrupted, OutputError
from qpsft.files import locked, process_mark, work_folder
from qpsft.train import run as runs
from qpsft.train.progress import read_metrics

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# ---- locks ----


def lock_of(folder: Path, process: int, created: int) -> Path:
    machine = process_mark().rsplit(".", 2)[0]
    path = folder / ".qpsft" / f"lock.{machine}.{process}.{created}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def other():
    """Another process, and when it began."""
    import psutil

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield process.pid, int(psutil.Process(process.pid).create_time())
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_and_one_of_the_dead_is_not(tmp_path, other):
    process, created = other
    lock = lock_of(tmp_path, process, created)
    with pytest.raises(OutputError, match=f"Process {process} is writing into"), locked(tmp_path):
        pass
    assert lock.exists() and len(list(lock.parent.iterdir())) == 1
    lock.unlink()
    for stale in ((process, created - 1000), (2**22 - 3, created)):  # the number is another process's now; nobody's
        path = lock_of(tmp_path, *stale)
        with locked(tmp_path), locked(tmp_path):
            assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_another_machines_lock_says_nothing_here(tmp_path):
    path = tmp_path / ".qpsft" / "lock.elsewhere.1.1"
    path.parent.mkdir()
    path.touch()
    with locked(tmp_path):
        pass
    assert path.exists()


@pytest.mark.processes
def test_of_many_at_the_same_moment_never_two_are_let_in(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from qpsft.errors import OutputError\nfrom qpsft.files import locked\n"
        "folder, start, inside = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[1]) / 'inside'\n"
        "time.sleep(max(0, start - time.time()))\n"
        "for _ in range(40):\n"
        "    try:\n"
        "        with locked(folder):\n"
        "            inside.mkdir()\n"  # fails where somebody is inside
        "            time.sleep(0.002)\n"
        "            inside.rmdir()\n"
        "            print('in')\n"
        "    except OutputError:\n"
        "        time.sleep(0.001)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(time.time() + 2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    several = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in several]
    assert [process.returncode for process in several] == [0] * 4
    assert sum(text.count("in") for text in said) > 10


RECIPE = "model_name_or_path: demo\ndataset_name: demo-noisy\n"
VERBS = {
    "train": ["train", *TRAIN, "--output_dir={}"],
    "train, overwrite": ["train", *TRAIN, "--overwrite", "--output_dir={}"],
    "train, resume": ["train", *TRAIN, "--resume", "--output_dir={}"],
    "demo": ["demo", "--output_dir={}"],
    "demo, overwrite": ["demo", "--overwrite", "--output_dir={}"],
    "compare": ["compare", "{recipe}", "--output_dir={}"],
    "compare, results elsewhere": ["compare", "{recipe}", "--output_dir={}-other", "--results_dir={}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_writes_into_a_folder_in_use(tmp_path, capsys, other, verb):
    folder, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    lock = lock_of(folder, *other)
    (folder / "metrics.jsonl").write_text('{"step": 1, "nll": 1.0}\n')
    before = contents(folder)
    assert cli.main([word.format(folder, recipe=recipe) for word in VERBS[verb]]) == 2
    assert f"Process {other[0]} is writing into {folder} right now" in said(capsys)
    assert contents(folder) == before and lock.exists()


@pytest.mark.parametrize("purpose", ["merging", "exporting", "replaced"])
def test_an_output_in_use_is_refused_and_what_the_dead_left_goes(tmp_path, other, purpose):
    machine = process_mark().rsplit(".", 2)[0]
    in_use = tmp_path / f".out.gguf.{purpose}.{machine}.{other[0]}.{other[1]}"
    in_use.mkdir()
    with (
        pytest.raises(OutputError, match=f"Process {other[0]} is writing"),
        work_folder(tmp_path / "out.gguf", overwrite=False, source=tmp_path / "model"),
    ):
        pass
    assert list(tmp_path.iterdir()) == [in_use]
    in_use.rmdir()
    (tmp_path / f".out.gguf.exporting.{machine}.{other[0]}.{other[1] - 1000}").mkdir()
    with work_folder(tmp_path / "out.gguf", overwrite=False, source=tmp_path / "model") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_the_demo_says_what_to_type_after_a_kill(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "demo"
    (tmp_path / "demo-sft").mkdir()
    (tmp_path / "demo-sft" / "metrics.jsonl").write_text('{"step": 1, "nll": 1.0}\n')
    before = contents(tmp_path)
    assert cli.main(["demo", f"--output_dir={folder}"]) == 2
    words = said(capsys)
    assert "demo-sft holds what an earlier demo wrote" in words and "--resume" not in words
    assert "Give --overwrite to begin the demo anew" in words and contents(tmp_path) == before
    begun = []
    monkeypatch.setattr(walkthrough, "_run", lambda *arguments: begun.append(arguments))
    assert cli.main(["demo", f"--output_dir={folder}", "--overwrite"]) == 0 and begun


# ---- signals ----


def signal_at(monkeypatch, step: int, number: int, times: int = 1) -> None:
    """Sends this process a signal while it computes a step, counted from 1."""
    real = runs.PSFTTrainer.training_step

    def sending(self, *arguments):
        if self.state.global_step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(self, *arguments)

    monkeypatch.setattr(runs.PSFTTrainer, "training_step", sending)


@pytest.fixture(autouse=True)
def hanging_up_ends():
    """As in a shell, also where the tests themselves run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "run"
    assert train(folder, *TRAIN, "--max_steps=4", "--save_steps=100") == 0
    return folder


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_at_the_end_of_the_step_and_says_how_to_go_on(
    tmp_path, monkeypatch, capsys, uninterrupted, number
):
    folder, flags = tmp_path / "run", [*TRAIN, "--max_steps=4", "--save_steps=100"]
    before = [signal.getsignal(one) for one in SIGNALS]
    signal_at(monkeypatch, 2, number)
    assert train(folder, *flags) == 128 + number
    words = said(capsys)
    assert "Stopping: this step is finished and saved first" in words and "Traceback" not in words
    assert f"{folder / 'checkpoint-2'} is saved: the same command with --resume goes on from there" in words
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert not (folder / "adapter_model.safetensors").exists() and not list((folder / ".qpsft").glob("lock.*"))
    if number != signal.SIGTERM:
        return
    monkeypatch.undo()
    monkeypatch.setattr("qpsft.train.outputs.draw_training", lambda lines, path, title: path.touch())
    assert train(folder, *flags, "--resume") == 0
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_the_last_step_is_followed_by_the_end(tmp_path, monkeypatch):
    signal_at(monkeypatch, 1, signal.SIGTERM)
    assert train(tmp_path / "run", *TRAIN) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 1, signal.SIGHUP)
        assert train(tmp_path / "run", *TRAIN, "--max_steps=2") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "overwrite"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)]
)
def test_before_the_first_step_nothing_was_saved_and_that_is_said(
    tmp_path, monkeypatch, capsys, uninterrupted, number, overwrite
):
    folder = tmp_path / "run"
    if overwrite:
        shutil.copytree(uninterrupted, folder)
    before = contents(folder)
    monkeypatch.setattr(runs, "load_policy", lambda *arguments: os.kill(os.getpid(), number))
    assert train(folder, *TRAIN, *(["--overwrite"] if overwrite else [])) == 128 + number
    words = said(capsys)
    assert "No checkpoint had been saved: the same command begins anew" in words
    assert contents(folder) == before and folder.exists() == overwrite


def test_an_overwrite_goes_on_with_resume_in_its_place(tmp_path, monkeypatch, capsys, uninterrupted):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    signal_at(monkeypatch, 1, signal.SIGTERM)
    flags = [*TRAIN, "--max_steps=4", "--save_steps=100"]
    assert train(folder, *flags, "--overwrite") == 143
    assert "checkpoint-1 is saved: the same command with --resume in place of --overwrite" in said(capsys)


def test_in_python_it_is_a_keyboard_interrupt(tmp_path, monkeypatch):
    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.file import load_recipe

    signal_at(monkeypatch, 1, signal.SIGINT)
    recipe = load_recipe(None, [*TRAIN, "--max_steps=2", f"--output_dir={tmp_path / 'run'}"], PSFTConfig)
    with pytest.raises(KeyboardInterrupt) as stopped:
        runs.train(recipe)
    assert isinstance(stopped.value, Interrupted) and "checkpoint-1 is saved" in str(stopped.value)
    assert recipe.trainer.output_dir == str(tmp_path / "run")


def test_in_another_thread_training_works_without_signals(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path / "run", *TRAIN)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.processes
def test_a_second_signal_ends_at_once_and_no_line_is_lost(tmp_path):
    """The log goes to a file, where Python would keep 8 KB back."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qpsft import cli\nfrom qpsft.train import run\n"
        "real = run.PSFTTrainer.training_step\n"
        "def step(self, *arguments):\n"
        "    if self.state.global_step == 1:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('still here', flush=True)\n"
        "    return real(self, *arguments)\n"
        "run.PSFTTrainer.training_step = step\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-c", code, "train", *TRAIN, "--max_steps=3", "--logging_steps=1"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, f"--output_dir={folder}"],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == -signal.SIGINT, done.stderr[-2000:]
    assert "A second Ctrl-C ends at once" in done.stderr and "still here" not in log.read_text()
    assert "step 1/3  nll" in log.read_text() and [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [
        1
    ]
    assert not list(folder.glob("checkpoint-*"))


def test_other_verbs_clear_away_what_they_began_when_they_are_asked_to_end(tmp_path, monkeypatch, capsys):
    from qpsft.merge import merging

    def asked(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(merging, "read_changes", asked)
    assert cli.main(["merge", str(ROOT / "adapters" / "demo-psft"), "-o", str(tmp_path / "out")]) == 143
    assert list(tmp_path.iterdir()) == [] and "Interrupted" in said(capsys)
