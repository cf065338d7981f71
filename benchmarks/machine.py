"""What every benchmark needs: the machine described, results kept cell by cell, a time budget, and memory meters."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qpsft.plan.live_bytes import LiveBytes

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "triton")
GIB = 2**30
AGAIN, GOAL_MISSED = 75, 3
"""Exit codes: the time was up and the same command goes on from here; all is measured and a goal is missed."""


# ---- what was measured on ----


def processor_name() -> str:
    """The CPU's model name, such as `AMD EPYC 7B13`."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()}-core CPU"


def slug(name: str) -> str:
    """`name` as a part of a file's name: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Device, driver, versions, command and date: what a number needs beside it.

    Args:
        command: script and flags; None: those of this process.
    """
    found: dict[str, Any] = {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(_short_path, command or sys.argv)]),
        "versions": {name: _version(name) for name in PACKAGES},
        "qpsft_commit": _output(["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
            "cuda": torch.version.cuda,
            "device_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    return found


def describe(environment: dict[str, Any]) -> str:
    """One line for a title or a footer."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    if environment["device"].endswith("CPU"):
        threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
        return f"{environment['device']} ({environment['processor']}, {threads}); {versions}"
    return f"{environment['device']}{driver}; {versions}"


def make_environment(folder: Path, *requirements: str, constraints: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment with these packages, made where it is not there with the same ones.

    Args:
        folder: of the environment; what is there is replaced when it was made for other packages.
        requirements: as pip takes them.
        constraints: lines of a file for pip's `-c`.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made, wanted = folder / "made-for.txt", "\n".join(requirements) + "\n"
    if made.is_file() and made.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder}: {', '.join(requirements)}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    limits = folder / "constraints.txt"
    limits.write_text("\n".join(constraints) + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", limits, *requirements], check=True)
    made.write_text(wanted, encoding="utf-8")
    return python


def _short_path(argument: str) -> str:
    path, root = Path(argument), RESULTS.parents[1]
    return str(path.resolve().relative_to(root)) if path.is_file() and root in path.resolve().parents else argument


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# ---- results, cell by cell ----


class Results:
    """A JSON file of cells, written after each one, so that a run that was cut off goes on where it stopped.

    Args:
        path: the file; what is in it already is kept.
        environment: this run's `environment`; each cell names the run it comes from.

    Attributes:
        content: `{"runs": [environment, …], "cells": {key: {"run": index into runs, …}}}` and whatever is added.
    """

    def __init__(self, path: str | os.PathLike, environment: dict[str, Any]):
        self.path = Path(path)
        self.environment = environment
        self.content: dict[str, Any] = {"runs": [], "cells": {}}
        if self.path.is_file():
            self.content |= json.loads(self.path.read_text(encoding="utf-8"))
        self._run: int | None = None

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self.content["cells"]

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Keeps a cell, replacing one of the same key, and writes the file."""
        if self._run is None:
            self.content["runs"].append(self.environment)
            self._run = len(self.content["runs"]) - 1
        self.cells[key] = {"run": self._run, **cell}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.new")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


class Budget:
    """Wall-clock time that a command may take, so that it stops between two cells and not inside one.

    Args:
        minutes: None: no limit.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._start = clock()
        self._end = None if minutes is None else self._start + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; infinite without a limit."""
        return float("inf") if self._end is None else self._end - self._clock()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about `seconds` still fits."""
        return seconds <= self.left


# ---- memory ----


def clean_up(device: str) -> None:
    """Frees what no name holds any more; on a GPU the allocator's cache too."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class CudaMeter:
    """Device memory in bytes, as torch's allocator counts it, base model and all."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class HostMeter(LiveBytes):
    """The same for tensors in host memory.

    Args:
        held: tensors that exist already and count too, such as a model's.

    It sees what goes through torch's dispatcher in this thread (backward passes on the CPU included), not the
    scratch memory inside a kernel. It slows a step down: time and memory are measured in separate runs.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        for tensor in held:
            self._add(tensor.untyped_storage(), False)
        self.mark()

    def _add(self, storage: torch.UntypedStorage, dequantized: bool) -> None:
        if storage.device.type == "cpu":  # not the meta tensors of a skeleton
            super()._add(storage, dequantized)


@contextmanager
def memory_meter(device: str, held: Iterable[torch.Tensor] = ()) -> Iterator[CudaMeter | HostMeter]:
    """Measures the block's memory: `meter.peak`, in bytes."""
    if device == "cuda":
        yield CudaMeter()
        return
    with HostMeter(held) as meter:
        yield meter
