"""What of this machine must be right before a run begins: a GPU that torch can use, torchvision, Triton's compiler."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from qpsft.errors import MachineError

# torch 2.12 and 2.13 come in these builds for CUDA, each with the oldest driver it runs on (pytorch issue 178665 and
# CUDA's release notes). The older one has no kernels for cards from the RTX 50 series on.
BUILDS = ((580, "cu130"), (525, "cu126"))
OLDEST_DRIVER = {"12": 525, "13": 580}
INDEX = "https://download.pytorch.org/whl/"
PROC, WSL_SMI = Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/nvidia-smi")
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every card, on purpose."""


def check_machine(*, on_cpu: bool) -> None:
    """What takes a moment and is better known before a run than inside it.

    Args:
        on_cpu: the run was asked to be on the CPU.

    Raises:
        MachineError: a torchvision that does not import, or an NVIDIA GPU that the run would leave idle.
    """
    problem = broken_torchvision() or (None if on_cpu else unusable_gpu())
    if problem is not None:
        raise problem


# ---- a GPU that torch cannot use ----


def nvidia_driver() -> str | None:
    """The version of this machine's NVIDIA driver, "" if it does not say; None without a driver or a card."""
    asked = (ask() for ask in (_version_by_smi, _version_by_kernel, _version_by_windows))
    return next((version for version in asked if version is not None), None)


def _version_by_smi() -> str | None:
    smi = shutil.which("nvidia-smi") or (str(WSL_SMI) if WSL_SMI.is_file() else None)
    if smi is None:
        return None
    try:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(asked.stdout.split()), None) if asked.returncode == 0 else None


def _version_by_kernel() -> str | None:
    if not PROC.is_file():
        return None
    stated = re.search(r"\s(\d{3}\.[\d.]+)\s", PROC.read_text(errors="replace"))
    return stated[1] if stated else ""


def _version_by_windows() -> str | None:
    return "" if sys.platform == "win32" and ctypes.util.find_library("nvcuda") else None


def unusable_gpu() -> MachineError | None:
    """Why torch cannot use the NVIDIA GPU that this machine has, and the cure; None where there is nothing to mend."""
    if torch.accelerator.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return None
    driver = nvidia_driver()
    if driver is None:
        return None
    here = f"This machine has an NVIDIA GPU (driver {driver or 'unknown'}), and torch {torch.__version__} cannot use it"
    on_cpu = "To train on the CPU all the same, set use_cpu: true."
    if torch.version.cuda is None:
        return MachineError(f"{here}: it is a build without CUDA.", f"{_build_for(driver)} {on_cpu}")
    needed = OLDEST_DRIVER.get(torch.version.cuda.split(".")[0], 0)
    if driver and _major(driver) < needed:
        reason = f"CUDA {torch.version.cuda} needs driver {needed} or newer"
        return MachineError(f"{here}: {reason}.", f"Update the driver. Or: {_build_for(driver)} {on_cpu}")
    return MachineError(
        f"{here}: {_cuda_says()}.",
        f"See whether `nvidia-smi` works; a container needs its GPUs (docker run --gpus all). {on_cpu}",
    )


def _cuda_says() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "it sees no device"


def _major(driver: str) -> int:
    return int(driver.split(".")[0])


def _build_for(driver: str) -> str:
    """How to get the newest build that a driver runs; the newest of all where its version is not known."""
    for least, build in BUILDS:
        if not driver or _major(driver) >= least:
            return f"`pip uninstall torch`, then `pip install torch --index-url {INDEX}{build}`."
    return f"Update the driver to {BUILDS[0][0]} or newer first: no build of torch is for so old a one."


# ---- torchvision ----


def broken_torchvision() -> MachineError | None:
    """Names a torchvision that does not import. transformers imports it wherever it is installed, and dies with it."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch: RuntimeError, OSError, ImportError, AttributeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return MachineError(
            f"torchvision {_version('torchvision')} does not import beside torch {torch.__version__} ({reason}), and "
            "transformers needs it to wherever it is installed.",
            "It was built for another torch. qpsft does not use it: `pip uninstall torchvision`, or install the one "
            "for this torch, from the same index.",
        )
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


# ---- Triton ----


def triton_problem(device: torch.device) -> str | None:
    """Why TRL's LM-head kernel, which Triton compiles when it is first run, does not run on `device`; None if it does.

    Compiling takes a C compiler and Python's headers. None too where TRL would not use Triton.
    """
    from trl.kernels import chunked_logprob

    if not chunked_logprob._use_triton(device):
        return None
    hidden = torch.zeros(2, 16, device=device, requires_grad=True)
    weight, targets = torch.zeros(32, 16, device=device), torch.zeros(2, dtype=torch.long, device=device)
    arguments = (hidden, weight, None, targets, 1.0, 32, None, 1.0, ("log_probs", "entropy", "is_top1"))
    try:
        with torch.autocast(device.type, enabled=False):
            chunked_logprob.ChunkedLogProbFunction.apply(*arguments)[0].sum().backward()
    except Exception as error:  # whatever a compiler, a linker or a driver says
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def use_triton_where_it_runs(device: torch.device) -> None:
    """Has TRL compute the LM head in plain torch where its Triton kernels do not run, and warns once."""
    problem = triton_problem(device)
    if problem is None:
        return
    from trl.kernels import chunked_logprob

    chunked_logprob._TRITON_AVAILABLE = False  # TRL's only switch; its other Triton kernels are not those of SFT
    warnings.warn(
        f"Triton cannot compile here ({problem}): the LM head runs in plain torch, slower and with more memory. "
        "Install a C compiler and Python's headers, such as `apt install gcc python3-dev`.",
        stacklevel=2,
    )
