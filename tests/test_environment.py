"""What is said before a run: a GPU that would lie idle, a torchvision that does not import, no compiler for Triton."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import log_lines, make_base, make_config, make_trainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qpsft import cli
from qpsft.errors import MachineError
from qpsft.model import environment
from qpsft.model.environment import broken_torchvision, check_machine, nvidia_driver, unusable_gpu
from qpsft.processes import let_memory_segments_grow
from qpsft.psft.config import PSFTConfig

SMALL = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=32", "--max_steps=1",
    "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1",
]  # fmt: skip


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """Puts an `nvidia-smi` on PATH that reports a driver, or fails; and nothing else says that there is a card."""
    monkeypatch.setattr(environment, "PROC", tmp_path / "no_proc")
    monkeypatch.setattr(environment, "WSL_SMI", tmp_path / "no_wsl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def driver(version: str | None, cuda: str | None = None, init_says: str | None = None):
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir(exist_ok=True)
        smi.write_text(f"#!/bin/sh\n{f'echo {version}' if version else 'exit 9'}\n")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.version, "cuda", cuda)

        def init():
            if init_says:
                raise RuntimeError(init_says)

        monkeypatch.setattr(torch.cuda, "init", init)

    return driver


@pytest.mark.parametrize(
    ("driver", "cuda", "init_says", "why", "cure"),
    [
        ("580.82", None, None, "a build without CUDA", "pip install torch --index-url https://download.pytorch.org/whl/cu130"),
        ("535.104.05", None, None, "a build without CUDA", "https://download.pytorch.org/whl/cu126"),
        ("470.1", None, None, "a build without CUDA", "Update the driver to 580 or newer first"),
        ("535.104.05", "13.0", None, "CUDA 13.0 needs driver 580 or newer", "Update the driver. Or: `pip uninstall"),
        ("580.82", "13.0", "No CUDA GPUs are available", "No CUDA GPUs are available", "--gpus all"),
        ("580.82", "12.6", None, "it sees no device", "--gpus all"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_named_with_its_cure(nvidia, driver, cuda, init_says, why, cure):
    nvidia(driver, cuda, init_says)
    problem = unusable_gpu()
    assert f"an NVIDIA GPU (driver {driver})" in problem.what and why in problem.what
    assert cure in problem.todo and "use_cpu: true" in problem.todo
    with pytest.raises(MachineError, match="cannot use it"):
        check_machine(on_cpu=False)
    check_machine(on_cpu=True)


def test_no_gpu_a_hidden_gpu_and_a_gpu_in_use_are_no_mistake(nvidia, monkeypatch):
    nvidia(None)
    assert nvidia_driver() is None and unusable_gpu() is None
    nvidia("580.82")
    assert unusable_gpu() is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unusable_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert unusable_gpu() is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version: 12.3.0", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build", "550.54.14"),
        ("something else", ""),
    ],
)
def test_a_driver_without_its_tool_is_seen_too(nvidia, monkeypatch, tmp_path, text, version):
    nvidia(None)
    monkeypatch.setattr(environment, "PROC", tmp_path / "version")
    (tmp_path / "version").write_text(text)
    assert nvidia_driver() == version
    assert f"(driver {version or 'unknown'})" in unusable_gpu().what


def test_windows_has_a_library_of_the_driver(nvidia, monkeypatch):
    nvidia(None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(environment.ctypes.util, "find_library", {"nvcuda": "nvcuda.dll"}.get)
    assert nvidia_driver() == "" and "cu130" in unusable_gpu().todo


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_training_stops_before_it_runs_on_the_cpu_unasked(nvidia, monkeypatch, capsys, tmp_path, verb):
    nvidia("535.104.05")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dict(flag.removeprefix("--").split("=") for flag in SMALL)))
    assert cli.main([verb, str(recipe), f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "an NVIDIA GPU (driver 535.104.05)" in said and "cu126" in said and not (tmp_path / "out").exists()


def test_use_cpu_trains_on_the_cpu_and_the_recipe_of_the_run_says_so_only_if_asked(nvidia, capsys, tmp_path):
    assert cli.main(["train", *SMALL, f"--output_dir={tmp_path / 'without_gpu'}"]) == 0
    nvidia("535.104.05")
    assert cli.main(["train", *SMALL, f"--output_dir={tmp_path / 'asked'}", "--use_cpu"]) == 0
    resolved = [yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("without_gpu", "asked")]
    assert "use_cpu" not in resolved[0] and resolved[1]["use_cpu"] is True
    assert json.loads((tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_the_trainer_from_python_stops_too(nvidia, tmp_path):
    base = make_base(tmp_path / "base")
    make_trainer(base, tmp_path / "asked")
    nvidia("580.82")
    with pytest.raises(MachineError, match="an NVIDIA GPU"):
        make_trainer(base, tmp_path / "out", use_cpu=False)


def test_the_demo_runs_on_the_cpu_and_says_why(nvidia, monkeypatch, tmp_path):
    from qpsft.demo import walkthrough

    asked = []
    monkeypatch.setattr(walkthrough.outputs, "locked_output", lambda folder: sys.exit("enough"))
    monkeypatch.setattr(walkthrough, "load_recipe", lambda path, flags, kind: asked.append(flags))
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("error")
        walkthrough.run(str(tmp_path / "out"))
    nvidia("580.82")
    with pytest.warns(UserWarning, match="an NVIDIA GPU .*small enough for the CPU.*cu130"), pytest.raises(SystemExit):
        walkthrough.run(str(tmp_path / "out"))
    assert ["--use_cpu" in flags for flags in asked] == [False, False, True, True]


# ---- torchvision ----


@pytest.fixture
def torchvision(tmp_path):
    """A folder with a torchvision that was built for another torch."""
    folder = tmp_path / "packages"
    (folder / "torchvision").mkdir(parents=True)
    raising = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    (folder / "torchvision" / "__init__.py").write_text(raising)
    metadata = folder / "torchvision-0.23.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.23.0\nRequires-Dist: torch==2.8.0\n")
    return folder


def test_a_torchvision_that_does_not_import_is_named(torchvision, monkeypatch):
    assert broken_torchvision() is None
    monkeypatch.syspath_prepend(torchvision)
    problem = broken_torchvision()
    assert f"torchvision 0.23.0 does not import beside torch {torch.__version__}" in problem.what
    assert "nms does not exist" in problem.what and "pip uninstall torchvision" in problem.todo
    with pytest.raises(MachineError, match="torchvision"):
        check_machine(on_cpu=True)


@pytest.mark.processes
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "qpsft", "train", "--max_steps=1"],
        ["-c", "from qpsft import PSFTTrainer"],
    ],
)
def test_transformers_dying_of_it_is_explained(torchvision, command):
    path = os.pathsep.join([str(torchvision), str(Path(__file__).parents[1])])
    there = {**os.environ, "PYTHONPATH": path}
    died = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=there)
    said = " ".join(died.stderr.split())
    assert died.returncode == (1 if command[0] == "-c" else 2)
    assert "torchvision 0.23.0 does not import beside torch" in said and "`pip uninstall torchvision`" in said
    assert ("Traceback" in said) is (command[0] == "-c")


# ---- Triton ----


class NoCompiler:
    """A kernel of Triton where there is no C compiler."""

    def __getitem__(self, grid):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.fixture
def triton(monkeypatch):
    """The CPU counts as a device that TRL uses Triton on, with kernels that are given."""

    def installed(forward, backward):
        monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
        for module in (chunked_logprob, trl_utils):
            monkeypatch.setattr(module, "_use_triton", lambda device: chunked_logprob._TRITON_AVAILABLE)
        monkeypatch.setattr(chunked_logprob, "_forward_kernel", forward)
        monkeypatch.setattr(chunked_logprob, "_backward_kernel", backward)

    return installed


class InTorch:
    """A kernel that runs: TRL's own torch code in its place."""

    def __init__(self, fold):
        self.fold, self.calls = fold, 0

    def __getitem__(self, grid):
        self.calls += 1
        return self.fold


def test_without_a_compiler_training_goes_on_in_torch_and_says_so(triton, tmp_path):
    base = make_base(tmp_path / "base")
    expected = make_trainer(base, tmp_path / "usual", max_steps=2)
    expected.train()
    triton(NoCompiler(), NoCompiler())
    with pytest.warns(UserWarning, match=r"Triton cannot compile here \(Failed to find C compiler.*gcc python3-dev"):
        trainer = make_trainer(base, tmp_path / "out", max_steps=2)
    trainer.train()
    assert [line["nll"] for line in log_lines(trainer)] == [line["nll"] for line in log_lines(expected)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is said once
        environment.use_triton_where_it_runs(torch.device("cpu"))


def test_where_triton_runs_it_is_used(triton, tmp_path):
    forward = InTorch(chunked_logprob._forward_tile)
    backward = InTorch(chunked_logprob._backward_tile)
    triton(forward, backward)
    chunked_logprob.triton = type("triton", (), {"cdiv": staticmethod(lambda a, b: -(-a // b))})
    try:
        trainer = make_trainer(make_base(tmp_path / "base"), tmp_path / "out", max_steps=1)
        assert chunked_logprob._TRITON_AVAILABLE and forward.calls == backward.calls == 1  # the trial
        trainer.train()
        assert forward.calls > 1 and backward.calls > 1
    finally:
        del chunked_logprob.triton


# ---- the allocator ----


@pytest.mark.parametrize(
    ("platform", "given", "set_to"),
    [
        ("linux", {}, "expandable_segments:True"),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ("linux", {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
        ("win32", {}, None),
    ],
)
def test_segments_of_cuda_memory_may_grow_unless_the_user_says_otherwise(monkeypatch, platform, given, set_to):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    let_memory_segments_grow()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == set_to


def test_every_verb_sets_it_before_torch_is_imported():
    code = (
        "import os, sys\n"
        "from qpsft.cli import main\n"
        "class Watch:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name == 'torch': print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF')); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "main(['train', '--max_steps=1'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    told = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, env=environment)
    assert told.stdout.strip() == ("expandable_segments:True" if sys.platform == "linux" else "None"), told.stderr


def test_the_config_remembers_whether_the_cpu_was_asked_for(tmp_path):
    assert make_config(tmp_path, use_cpu=True).cpu_is_asked_for
    chosen = PSFTConfig(str(tmp_path), report_to=[])
    assert chosen.use_cpu is not torch.accelerator.is_available() and not chosen.cpu_is_asked_for
