"""Which device, what it can do, and which dtype it is good at.

What a kind of hardware can do is a pure function of its name (`hardware`), so that every card can be tested without
having it. Sources: bitsandbytes 0.50's installation guide (4-bit and 8-bit optimizers from sm 60, int8 from sm 75;
CPU, Intel, Apple), FlashAttention's README (Ampere and newer), `torch.cuda.get_arch_list` for the installed torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qpsft.errors import BaseModelError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODERN_AMD = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # CDNA 2 and RDNA 3, or newer: bfloat16 matrix units


@dataclass(frozen=True)
class Hardware:
    """What one device can do.

    Attributes:
        name: as people look it up: "sm_75", "gfx90a", "xpu", "mps", "cpu".
        compute_dtype: the fastest dtype that is sound there; see `pick_dtype`.
        loss_scaling: training in float16 works there, with a GradScaler.
        flash_attention: FlashAttention-2 has kernels for it; otherwise SDPA chooses among torch's own.
        quantizations: the storages bitsandbytes has kernels for.
        optimizers_8bit: bitsandbytes' 8-bit optimizers run there.
        optimizers_paged: they can also move their state to host memory when the card is full.
    """

    name: str
    compute_dtype: torch.dtype
    loss_scaling: bool
    flash_attention: bool
    quantizations: tuple[str, ...]
    optimizers_8bit: bool
    optimizers_paged: bool


def pick_dtype(backend: str, capability: tuple[int, int] | str | None = None) -> torch.dtype:
    """The compute dtype for a kind of hardware.

    Args:
        backend: "cuda", "rocm", "xpu", "mps" or "cpu".
        capability: CUDA's (major, minor); ROCm's architecture name such as "gfx90a". Ignored elsewhere.

    Returns:
        bfloat16 where it is fast: CUDA sm >= 80, AMD CDNA 2 (gfx90a) and RDNA 3 (gfx11) or newer, Intel GPUs;
        float16 on Volta, Turing (T4), Pascal's P100 and older AMD cards; float32 on the rest of Pascal and older,
        whose float16 arithmetic is 1/64 of float32's, on the CPU, and on Apple's MPS.
    """
    if backend == "cuda":
        if capability is None or isinstance(capability, str):
            raise ValueError(f"CUDA needs a (major, minor) capability, not {capability!r}")
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) or capability == (6, 0) else torch.float32
    if backend == "rocm":
        return torch.bfloat16 if str(capability).startswith(MODERN_AMD) else torch.float16
    if backend == "xpu":
        return torch.bfloat16
    return torch.float32


def hardware(backend: str, capability: tuple[int, int] | str | None = None) -> Hardware:
    """What a kind of hardware can do. Arguments as in `pick_dtype`.

    Raises:
        BaseModelError: a CUDA card older than bitsandbytes supports.
    """
    dtype = pick_dtype(backend, capability)
    four_bit = ("nf4", "fp4", "none")
    if backend == "cuda":
        name = f"sm_{capability[0]}{capability[1]}"
        if capability < (6, 0):
            raise BaseModelError(
                f"This card is {name}; bitsandbytes has kernels from sm_60 (Pascal) on.",
                "Use a newer card, or the CPU (use_cpu: true) for small models.",
            )
        quantizations = ("nf4", "fp4", "int8", "none") if capability >= (7, 5) else four_bit
        return Hardware(name, dtype, True, capability >= (8, 0), quantizations, True, True)
    if backend == "rocm":
        name = str(capability).split(":")[0]
        return Hardware(name, dtype, True, name.startswith(MODERN_AMD), (*four_bit, "int8"), True, True)
    if backend == "xpu":
        return Hardware("xpu", dtype, True, True, (*four_bit, "int8"), True, True)
    if backend == "mps":
        return Hardware("mps", dtype, True, False, four_bit, False, False)
    return Hardware(backend, dtype, False, False, (*four_bit, "int8"), backend == "cpu", False)


def hardware_for(device_type: str, capability: tuple[int, int] | str) -> Hardware:
    """As `hardware`, for torch's name of a device: "cuda" with an architecture's name as its capability is ROCm."""
    return hardware("rocm" if device_type == "cuda" and isinstance(capability, str) else device_type, capability)


def hardware_of(device: torch.device | str) -> Hardware:
    """What `device` can do, with the torch that is installed.

    Raises:
        BaseModelError: neither bitsandbytes nor this build of torch has kernels for the card.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return hardware(device.type)
    if torch.version.hip:
        found = hardware("rocm", torch.cuda.get_device_properties(device).gcnArchName)
    else:
        found = hardware("cuda", torch.cuda.get_device_capability(device))
    built_for = torch.cuda.get_arch_list()
    if built_for and not has_kernels(found.name, built_for):
        raise BaseModelError(
            f"torch {torch.__version__} was built for {', '.join(built_for)}; {device} is {found.name}.",
            "Install a build of torch for this card: https://pytorch.org/get-started/previous-versions lists them "
            "(cards before sm_75 need one for CUDA 12.6 or older). Or use the CPU (use_cpu: true) for small models.",
        )
    return found


def has_kernels(name: str, built_for: Sequence[str]) -> bool:
    """Whether code built for some architectures runs on the card `name` ("sm_89", "gfx90a").

    CUDA's machine code (`sm_`) runs on the same major version at the same or a higher minor one; `compute_` is
    compiled for newer cards when it is loaded. An AMD card needs its own. (`sm_90a`, with features of its own, counts
    as `sm_90`.)
    """
    if name.startswith("gfx"):
        return name in built_for
    card = int(name.removeprefix("sm_"))
    for architecture in built_for:
        if match := re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", architecture):
            kind, version = match[1], int(match[2])
            same_major = version // 10 == card // 10
            if version <= card and (same_major or kind == "compute"):
                return True
    return False


def check_quantization(quantization: str, found: Hardware) -> None:
    """Raises BaseModelError when bitsandbytes has no kernels for this storage on this hardware."""
    if quantization not in found.quantizations:
        raise BaseModelError(
            f"bitsandbytes has no kernels for {quantization} on {found.name}.",
            f"Use quantization {', '.join(found.quantizations)}.",
        )


def check_attention(implementation: str | None, found: Hardware, compute_dtype: torch.dtype) -> None:
    """Raises BaseModelError for a FlashAttention that has no kernels for this hardware or this dtype."""
    if implementation is None or not implementation.startswith("flash_attention"):
        return
    if not found.flash_attention:
        raise BaseModelError(
            f"{implementation} has no kernels for {found.name}.",
            "Leave attn_implementation out: sdpa takes the fastest kernel torch has for the card.",
        )
    if compute_dtype == torch.float32:
        raise BaseModelError(
            f"{implementation} has no kernels for float32.", "Use a 16-bit dtype, or leave attn_implementation out."
        )


def is_of_bitsandbytes(optimizer: str) -> bool:
    """Whether this optimizer (transformers' name) is one of bitsandbytes' own."""
    if optimizer.startswith(("paged_", "lion_", "ademamix")) or "_bnb" in optimizer:
        return True
    return "_8bit" in optimizer and not optimizer.startswith("adamw_torch")  # that one is torchao's


def check_optimizer(name: str, found: Hardware) -> None:
    """Raises RecipeError for one of bitsandbytes' optimizers (transformers' names) without kernels for this hardware.

    torch's fused AdamW, the default, runs on every kind of hardware here.
    """
    paged = name.startswith("paged_")
    if paged and not found.optimizers_paged:
        raise RecipeError(
            f"optim {name!r} pages to host memory, which bitsandbytes cannot do on {found.name}.",
            "Use adamw_torch_fused, the default.",
        )
    if is_of_bitsandbytes(name) and not found.optimizers_8bit:
        raise RecipeError(
            f"optim {name!r} is bitsandbytes', which has no optimizer kernels for {found.name}.",
            "Use adamw_torch_fused, the default.",
        )


def compute_dtype_for(device: torch.device | str, requested: str = "auto") -> torch.dtype:
    """The dtype matrix products are computed in on `device`.

    Args:
        device: where the model will be.
        requested: "auto" asks the hardware; "float32", "bfloat16" or "float16" is taken as it is.

    Raises:
        BaseModelError: another name; with "auto", also as `hardware_of`.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise BaseModelError(f"dtype {requested!r} is not known.", f"Use auto, {', '.join(DTYPES)}.")
        return DTYPES[requested]
    return hardware_of(device).compute_dtype


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
        rank, cards = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
        if rank is not None and int(rank) >= cards:
            raise BaseModelError(
                f"{int(os.environ.get('LOCAL_WORLD_SIZE', int(rank) + 1))} processes were started on a machine with "
                f"{cards} GPU(s).",
                f"Start {cards}: `torchrun --nproc_per_node {cards} …`.",
            )
        return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
