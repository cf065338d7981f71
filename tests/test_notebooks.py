"""The Colab notebooks: they run end to end on the embedded base, say what their scripts say, and stay small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from transformers import TrainerControl, TrainerState

from qpsft.data.tokenize import load_rows
from qpsft.errors import QpsftError
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train.notebook import LivePlot

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAID = {  # what a reader must find in the outputs, and only a run that worked prints
    "01_quickstart": ("adapter_model.safetensors", "kl_samples", "among the training rows"),
    "02_sft_vs_psft": ("psft_visits", "psft_visits − sft, kept at equal in-domain score"),
    "03_merge_and_export": ("the same model", "FROM ", "vllm serve"),
    "04_grpo_from_psft": ("pass@8", "sample_entropy", "trained in {torch.float32}", "verifier: demo"),
}


PICTURES = {"01_quickstart": 1, "02_sft_vs_psft": 2, "03_merge_and_export": 0, "04_grpo_from_psft": 2}


def pictures(path: Path) -> int:
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def texts(path: Path) -> str:
    """Every printed output of a notebook."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(found)


@pytest.fixture
def surroundings(tmp_path):
    """The environment of a machine with this checkout installed: `qpsft` on the path, the smallest sizes."""
    command = tmp_path / "bin" / "qpsft"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qpsft "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "QPSFT_NOTEBOOK": "test",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.journey
@pytest.mark.parametrize("name", SAID)
def test_runs_end_to_end(name, tmp_path, surroundings):
    notebook = Path(shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path))
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", "--nbmake"]
    run = subprocess.run(
        [*command, "--nbmake-timeout=600", "--overwrite", str(notebook)],
        cwd=tmp_path, env=surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    for words in SAID[name]:
        assert words in texts(notebook)
    assert pictures(notebook) >= PICTURES[name]


@pytest.mark.journey
def test_a_failing_command_fails_the_notebook(tmp_path, surroundings):
    notebook = nbformat.read(ROOT / "notebooks" / "03_merge_and_export.ipynb", as_version=4)
    set_up = next(cell for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells = [set_up, nbformat.v4.new_code_cell("!qpsft preview nowhere.yaml")]
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--nbmake", "broken.ipynb"]
    assert subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True).returncode == 1


def cell_with(name: str, words: str) -> str:
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code" and words in cell.source)


def test_a_question_reaches_chat_as_it_is(tmp_path, monkeypatch, capsys):
    """Text of a row goes to no shell, which would expand it, or run it; and it is one turn."""
    (tmp_path / "qpsft").write_text('#!/bin/sh\necho "$@"\ncat\n', encoding="utf-8")
    (tmp_path / "qpsft").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    prompt = f'$2 off "a" `touch {tmp_path / "run"}`\n$(touch {tmp_path / "run"})'
    after = SimpleNamespace(completions=[SimpleNamespace(prompt=prompt)])
    exec(cell_with("01_quickstart", '"chat"'), {"after": after, "OUTPUT": "my run", "NEW_TOKENS": 5})
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["chat my run --temperature 0 --max_new_tokens 5", prompt.replace("\n", " ")]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shell_lines_are_given_parameters_only(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for line in [line for source in cells for line in source.splitlines() if line.startswith("!")]:
        assert re.sub(r'"\{[A-Z]+\}"', "", line).count("{") == 0, line


@pytest.mark.journey
@pytest.mark.parametrize("name", ["01_quickstart", "04_grpo_from_psft"])
@pytest.mark.parametrize("setting", ["gpu", "demo"])
def test_own_files_need_the_commented_lines_only(name, setting, tmp_path, monkeypatch):
    monkeypatch.setenv("QPSFT_NOTEBOOK", setting)
    monkeypatch.chdir(tmp_path)
    for file in ("train", "test"):
        Path(f"{file}.jsonl").write_text(json.dumps({"prompt": file, "completion": "b"}) + "\n", encoding="utf-8")
    names: dict = {}
    exec(re.sub(r"^# (?=OPTIONS|TEST)", "", cell_with(name, "TEST ="), flags=re.M), names)
    Path("recipe.yaml").write_text(yaml.safe_dump(names["OPTIONS"]), encoding="utf-8")
    data = load_recipe("recipe.yaml", [], PSFTConfig).data
    assert data.dataset_config is None and data.dataset_columns is None
    assert [load_rows(file, data).rows[0]["prompt"] for file in (data.dataset_name, names["TEST"])] == ["train", "test"]


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == sorted(SAID)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_says_what_its_script_says(path):
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(path.with_suffix(".py"))
    notebook = nbformat.read(path, as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_small_and_has_its_outputs(path):
    assert path.stat().st_size < 300_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells), "no stored outputs: see notebooks/README.md"
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    parameters = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    assert len(parameters) == 1 and pictures(path) >= PICTURES[path.stem]
    assert "colab.research.google.com" in "".join(notebook["cells"][0]["source"])
    assert str(Path.home()) not in path.read_text(encoding="utf-8") and "/tmp/" not in path.read_text(encoding="utf-8")


class Screen:
    """Stands in for IPython's display."""

    def __init__(self):
        self.images: list[bytes] = []

    def __call__(self, image, display_id=None):
        self.images.append(image.data)
        return self

    def update(self, image):
        self.images.append(image.data)


def log(plot: LivePlot, step: int, **numbers: float) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=True)
    plot.on_log(None, state, TrainerControl(), logs=numbers)


NUMBERS = {"nll": 1.0, "entropy": 0.5, "clip_fraction": 0.1, "approx_kl": 0.01}


def test_live_plot_draws_again_with_every_line(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("IPython.display.display", screen)
    plot = LivePlot(every=0)
    plot.on_train_begin(None, None, None)
    log(plot, 1, **NUMBERS)
    log(plot, 2, train_runtime=3.0)  # the last line of transformers has none of the four
    log(plot, 3, **NUMBERS | {"nll": 0.5})
    assert len(screen.images) == 2 and screen.images[0] != screen.images[1]
    assert all(image.startswith(b"\x89PNG") for image in screen.images)


def test_live_plot_draws_rarely_but_always_the_end(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("IPython.display.display", screen)
    plot = LivePlot(every=1000)
    plot.on_train_begin(None, None, None)
    for step in range(1, 4):
        log(plot, step, **NUMBERS)
    assert len(screen.images) == 1
    plot.on_train_end(None, None, None)
    assert len(screen.images) == 2


def test_live_plot_needs_ipython(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(QpsftError, match="IPython is not installed"):
        LivePlot()
