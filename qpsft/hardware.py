"""Which device, and which dtype it is good at."""

from __future__ import annotations

import os

import torch

from qpsft.errors import BaseModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(backend: str, capability: tuple[int, int] | str | None = None) -> torch.dtype:
    """The compute dtype for a kind of hardware; a pure function, so every card can be tested without having it.

    Args:
        backend: "cuda", "rocm", "xpu", "mps" or "cpu".
        capability: CUDA's (major, minor); ROCm's architecture name such as "gfx90a". Ignored elsewhere.

    Returns:
        bfloat16 where it is fast: CUDA sm >= 80, AMD CDNA 2 (gfx90a) and RDNA 3 (gfx11) or newer, Intel GPUs;
        float16 on Volta, Turing (T4), Pascal's P100 and older AMD cards; float32 on the rest of Pascal and older,
        whose float16 arithmetic is 1/64 of float32's, on the CPU, and on Apple's MPS (no loss scaling there).
    """
    if backend == "cuda":
        if capability is None or isinstance(capability, str):
            raise ValueError(f"CUDA needs a (major, minor) capability, not {capability!r}")
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) or capability == (6, 0) else torch.float32
    if backend == "rocm":
        name = str(capability).split(":")[0]
        modern = name.startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
        return torch.bfloat16 if modern else torch.float16
    if backend == "xpu":
        return torch.bfloat16
    return torch.float32


def compute_dtype_for(device: torch.device | str, requested: str = "auto") -> torch.dtype:
    """The dtype matrix products are computed in on `device`.

    Args:
        device: where the model will be.
        requested: "auto" asks `pick_dtype`; "float32", "bfloat16" or "float16" is taken as it is.

    Raises:
        BaseModelError: another name.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise BaseModelError(f"dtype {requested!r} is not known.", f"Use auto, {', '.join(DTYPES)}.")
        return DTYPES[requested]
    device = torch.device(device)
    if device.type != "cuda":
        return pick_dtype(device.type)
    if torch.version.hip:
        return pick_dtype("rocm", torch.cuda.get_device_properties(device).gcnArchName)
    return pick_dtype("cuda", torch.cuda.get_device_capability(device))


def pick_device(device: torch.device | str = "auto") -> torch.device:
    """The device of this process. "auto": its CUDA (or ROCm) card, by LOCAL_RANK under torchrun; else XPU, MPS, CPU.

    Raises:
        BaseModelError: the device is not there.
    """
    if str(device) != "auto":
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise BaseModelError(
                f"There is no device {str(device)!r}.", "Use auto, cpu, cuda, cuda:N or mps."
            ) from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise BaseModelError(
                f"Device {device} was asked for and torch {torch.__version__} sees {torch.cuda.device_count()} such.",
                "Use device auto, or install a CUDA build of torch and its driver.",
            )
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
