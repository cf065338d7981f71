"""Which device, what it can do, and which dtype it is good at.

What a kind of hardware can do is a pure function of its name (`hardware`), so that every card can be tested without
having it. Sources: bitsandbytes 0.50's installation guide (4 bits and 8-bit optimizers from sm 60; CPU,
Intel, Apple), FlashAttention's README (Ampere and newer), `torch.cuda.get_arch_list` for the installed torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpsft.errors import BaseModelError, RecipeError
from qpsft.model.base_record import refuse_int8

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
        optimizers_8bit: bitsandbytes' 8-bit optimizers run there.
        optimizers_paged: they can also move their state to host memory when the card is full.
    """

    name: str
    compute_dtype: torch.dtype
    loss_scaling: bool
    flash_attention: bool
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
    if backend == "cuda":
        name = f"sm_{capability[0]}{capability[1]}"
        if capability < (6, 0):
            raise BaseModelError(
                f"This card is {name}; bitsandbytes has kernels from sm_60 (Pascal) on.",
                "Use a newer card, or the CPU (use_cpu: true) for small models.",
            )
        return Hardware(name, dtype, True, capability >= (8, 0), True, True)
    if backend == "rocm":
        name = str(capability).split(":")[0]
        return Hardware(name, dtype, True, name.startswith(MODERN_AMD), True, True)
    if backend == "xpu":
        return Hardware("xpu", dtype, True, True, True, True)
    if backend == "mps":
        return Hardware("mps", dtype, True, False, False, False)
    return Hardware(backend, dtype, False, False, backend == "cpu", False)


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


def free_device_bytes(device: torch.device) -> int | None:
    """Memory that a CUDA device has left, what torch holds in reserve included; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def default_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """CUDA's default stream inside; nothing elsewhere.

    bitsandbytes (0.50) rounds weights on that stream whatever the current one is, so what it reads must be made there.
    """
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


# Which dtype a run computes in, where hardware, model and the user's wish meet.
#
# The adapters, the ratio and the log-softmax are float32 always. What varies is the dtype of the base's matrix
# products: with bfloat16 and float16 autocast is on, with float16 also loss scaling (`qpsft.psft.float16`).

# Model families whose activations or gradients leave float16's range (65,504), by the start of `model_type`, and who
# found it. vLLM: `_FLOAT16_NOT_SUPPORTED_MODELS` in vllm/config/model.py; Unsloth: `FORCE_FLOAT32` in
# unsloth/models/loader.py; Gemma 3 also huggingface/transformers issue 36822.
OVERFLOWS_IN_FLOAT16 = {
    "gemma2": "vLLM",
    "gemma3": "vLLM and Unsloth",
    "gemma4": "Unsloth",
    "glm4": "vLLM and Unsloth",
    "gpt_oss": "Unsloth",
    "plamo2": "vLLM",
    "qwen3_5": "Unsloth",
    "qwen3_moe": "Unsloth",
}
OPTIONS = "Use dtype float32 (slower), a card with bfloat16 (CUDA sm_80 or newer), or another model."


def overflowing_type(config: Mapping[str, Any]) -> str | None:
    """The `model_type` in a `config.json` (the text model's of a multimodal one) that is known to overflow, or None."""
    text = config.get("text_config") or {}
    for model_type in (config.get("model_type"), text.get("model_type")):
        if str(model_type).startswith(tuple(OVERFLOWS_IN_FLOAT16)):
            return model_type
    return None


def base_dtype(device: torch.device, requested: str, config: Mapping[str, Any]) -> torch.dtype:
    """The compute dtype of a base model on `device`.

    Args:
        requested: "auto", or the name of a dtype.
        config: its `config.json`.

    Returns:
        `compute_dtype_for` the device; float32, with a warning, where that is float16 by itself and the model is known
        to overflow in it.

    Raises:
        BaseModelError: float16 was asked for by name and the model overflows in it; as `compute_dtype_for`.
    """
    dtype = compute_dtype_for(device, requested)
    model_type = overflowing_type(config)
    if dtype != torch.float16 or model_type is None:
        return dtype
    what = f"{model_type} models overflow in float16 ({_found_by(model_type)})"
    if requested != "auto":
        raise BaseModelError(f"{what}.", OPTIONS)
    warnings.warn(
        f"{what} and this card has no fast bfloat16: computing in float32, which is slower and takes more memory.",
        stacklevel=3,
    )
    return torch.float32


def check_mixed_precision(mixed: torch.dtype | None, base: torch.dtype, overflowing: str | None) -> None:
    """Whether a run may be in this precision.

    Args:
        mixed: autocast's dtype; None: no autocast.
        base: the dtype of the base's unquantized weights.
        overflowing: what `overflowing_type` says of the model.

    Raises:
        RecipeError: as `settle_precision`.
    """
    if mixed == torch.float16 and overflowing is not None:
        raise RecipeError(f"{overflowing} models overflow in float16 ({_found_by(overflowing)}).", OPTIONS)
    if base == torch.float16 and mixed != torch.float16:
        raise RecipeError(
            "The base is in float16 and fp16 is off: without loss scaling small gradients become 0.",
            "Set fp16: true (on a GPU), or load the base in float32 or bfloat16.",
        )


def settle_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Makes the trainer's mixed precision fit the model, before the trainer is built.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        args: a PSFTConfig; bf16 and fp16 are turned off where they were chosen by hardware alone and the model
            overflows in float16.

    Raises:
        RecipeError: fp16 was asked for and the model overflows in it, or the model computes in float16 without the loss
            scaling that keeps small gradients from becoming 0.
        BaseModelError: the model is in int8.
    """
    refuse_int8(model)
    model_type = overflowing_type(model.config.to_dict())
    if args.mixed_precision == "fp16" and model_type is not None and args.automatic_precision:
        args.fp16, args.mixed_precision = False, "no"
    mixed = torch.float16 if args.mixed_precision == "fp16" else None
    check_mixed_precision(mixed, model.get_input_embeddings().weight.dtype, model_type)
    if args.mixed_precision == "bf16" and args.device.type == "cuda":
        found = hardware_of(args.device)
        if found.compute_dtype != torch.bfloat16:
            warnings.warn(
                f"bfloat16 is emulated on {found.name}, which is slow. Leave dtype, bf16 and fp16 out.", stacklevel=3
            )


def _found_by(model_type: str) -> str:
    return "found by " + next(who for start, who in OVERFLOWS_IN_FLOAT16.items() if model_type.startswith(start))
