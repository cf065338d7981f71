"""Which device, what it can do, and the precision of a run on it.

What a kind of hardware can do is a pure function of its name (`hardware_for`), so that every card can be tested and
planned for without having it. Sources: bitsandbytes 0.50's installation guide (4 bits and 8-bit optimizers from sm 60;
CPU, Intel, Apple), FlashAttention's README (Ampere and newer), `torch.cuda.get_arch_list` for the installed torch.

The adapters, the ratio and the log-softmax are float32 always. What varies is the dtype of the base's matrix products:
with bfloat16 and float16 autocast is on, with float16 also loss scaling (`qpsft.psft.float16`). What a run asks of its
device is checked by one function, `check_run`. Training calls it as each thing becomes known: `load_base` for the
attention, PSFTConfig for optimizer and mixed precision, PSFTTrainer for the model; `qpsft plan` calls it once.
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
MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""transformers' names."""

MODERN_AMD = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # CDNA 2 and RDNA 3, or newer: bfloat16 matrix units

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
"""Model families whose activations or gradients leave float16's range (65,504), by the start of `model_type`, and who
says so: vLLM in `_FLOAT16_NOT_SUPPORTED_MODELS` (vllm/config/model.py), Unsloth in `FORCE_FLOAT32`
(unsloth/models/loader.py); Gemma 3 also in huggingface/transformers issue 36822."""

INSTEAD_OF_FLOAT16 = "Use dtype float32 (slower), a card with bfloat16 (CUDA sm_80 or newer), or another model."


# --- which device ---


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


# --- what it can do ---


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


def pick_dtype(device_type: str, capability: tuple[int, int] | str | None = None) -> torch.dtype:
    """The compute dtype for a kind of hardware. Arguments as in `hardware_for`.

    Returns:
        bfloat16 where it is fast: CUDA sm >= 80, AMD CDNA 2 (gfx90a) and RDNA 3 (gfx11) or newer, Intel GPUs;
        float16 on Volta, Turing (T4), Pascal's P100 and older AMD cards; float32 on the rest of Pascal and older,
        whose float16 arithmetic is 1/64 of float32's, on the CPU, and on Apple's MPS.
    """
    if device_type == "xpu":
        return torch.bfloat16
    if device_type != "cuda":
        return torch.float32
    if capability is None:
        raise ValueError("CUDA needs a compute capability (major, minor), and ROCm an architecture's name")
    if isinstance(capability, str):
        return torch.bfloat16 if capability.startswith(MODERN_AMD) else torch.float16
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) or capability == (6, 0) else torch.float32


def hardware_for(device_type: str, capability: tuple[int, int] | str | None = None) -> Hardware:
    """What a kind of hardware can do.

    Args:
        device_type: torch's name: "cuda" (ROCm too), "xpu", "mps" or "cpu".
        capability: CUDA's (major, minor), or ROCm's architecture name such as "gfx90a"; None elsewhere.

    Raises:
        BaseModelError: a CUDA card older than bitsandbytes supports.
    """
    dtype = pick_dtype(device_type, capability)
    if device_type == "xpu":
        return Hardware("xpu", dtype, True, True, True, True)
    if device_type == "mps":
        return Hardware("mps", dtype, True, False, False, False)
    if device_type != "cuda":
        return Hardware(device_type, dtype, False, False, device_type == "cpu", False)
    if isinstance(capability, str):
        name = capability.split(":")[0]
        return Hardware(name, dtype, True, name.startswith(MODERN_AMD), True, True)
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < (6, 0):
        raise BaseModelError(
            f"This card is {name}; bitsandbytes has kernels from sm_60 (Pascal) on.",
            "Use a newer card, or the CPU (use_cpu: true) for small models.",
        )
    return Hardware(name, dtype, True, capability >= (8, 0), True, True)


def hardware_of(device: torch.device | str) -> Hardware:
    """What `device` can do, with the torch that is installed.

    Raises:
        BaseModelError: neither bitsandbytes nor this build of torch has kernels for the card.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return hardware_for(device.type)
    if torch.version.hip:
        hardware = hardware_for("cuda", torch.cuda.get_device_properties(device).gcnArchName)
    else:
        hardware = hardware_for("cuda", torch.cuda.get_device_capability(device))
    built_for = torch.cuda.get_arch_list()
    if built_for and not has_kernels(hardware.name, built_for):
        raise BaseModelError(
            f"torch {torch.__version__} was built for {', '.join(built_for)}; {device} is {hardware.name}.",
            "Install a build of torch for this card: https://pytorch.org/get-started/previous-versions lists them "
            "(cards before sm_75 need one for CUDA 12.6 or older). Or use the CPU (use_cpu: true) for small models.",
        )
    return hardware


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


# --- in which precision ---


def compute_dtype_for(device: torch.device | str, requested: str = "auto") -> torch.dtype:
    """The dtype matrix products are computed in on `device`, whatever the model.

    Args:
        device: where the model will be.
        requested: "auto" asks the hardware; "float32", "bfloat16" or "float16" is taken as it is.

    Raises:
        BaseModelError: another name; with "auto", also as `hardware_of`.
    """
    return _named_dtype(requested) if requested != "auto" else hardware_of(device).compute_dtype


def base_dtype(hardware: Hardware, requested: str, config: Mapping[str, Any]) -> torch.dtype:
    """The compute dtype of a base model.

    Args:
        hardware: what it will be loaded on.
        requested: "auto", or the name of a dtype.
        config: its `config.json`.

    Returns:
        With "auto" the hardware's own; but float32 where that is float16 and the model is known to overflow in it.

    Raises:
        BaseModelError: a name that is not known, or float16 was asked for and the model overflows in it.
    """
    dtype = hardware.compute_dtype if requested == "auto" else _named_dtype(requested)
    if dtype != torch.float16 or overflowing_type(config) is None:
        return dtype
    if requested != "auto":
        raise BaseModelError(f"{_overflow(config)}.", INSTEAD_OF_FLOAT16)
    return torch.float32


def warn_if_slow(hardware: Hardware, requested: str, config: Mapping[str, Any]) -> None:
    """Warns where `base_dtype` leaves the hardware's own dtype because the model overflows in it."""
    if requested == "auto" and base_dtype(hardware, requested, config) != hardware.compute_dtype:
        warnings.warn(
            f"{_overflow(config)} and this card has no fast bfloat16: computing in float32, which is slower and takes "
            "more memory.",
            stacklevel=3,
        )


def overflowing_type(config: Mapping[str, Any]) -> str | None:
    """The `model_type` in a `config.json` (the text model's of a multimodal one) that is known to overflow, or None."""
    text = config.get("text_config") or {}
    for model_type in (config.get("model_type"), text.get("model_type")):
        if str(model_type).startswith(tuple(OVERFLOWS_IN_FLOAT16)):
            return model_type
    return None


def settle_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Makes the trainer's mixed precision fit the model, before the trainer is built, and checks the two.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        args: a PSFTConfig. Where bf16 and fp16 were left open, a base of `load_base` decides: its dtype is what the
            user asked for, or what the model can bear. Any other model is computed in the hardware's own dtype, but not
            in float16 when it is known to overflow in it.

    Raises:
        RecipeError: as `check_run`.
        BaseModelError: the model is in int8.
    """
    refuse_int8(model)
    config, dtype = model.config.to_dict(), model.get_input_embeddings().weight.dtype
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if args.automatic_precision:
        if hasattr(base, "qpsft_source"):
            args.mixed_precision = MIXED_PRECISION[dtype]
        if args.mixed_precision == "fp16" and overflowing_type(config) is not None:
            args.mixed_precision = "no"
        args.bf16, args.fp16 = args.mixed_precision == "bf16", args.mixed_precision == "fp16"
    check_run(args.hardware, mixed_precision=args.mixed_precision, dtype=dtype, config=config)
    is_card = args.hardware.name.startswith(("sm_", "gfx"))
    if args.mixed_precision == "bf16" and is_card and args.hardware.compute_dtype != torch.bfloat16:
        warnings.warn(
            f"bfloat16 is emulated on {args.hardware.name}, which is slow. Leave dtype, bf16 and fp16 out.",
            stacklevel=3,
        )


def _named_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BaseModelError(f"dtype {name!r} is not known.", f"Use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _overflow(config: Mapping[str, Any]) -> str:
    model_type = overflowing_type(config)
    source = next(who for start, who in OVERFLOWS_IN_FLOAT16.items() if model_type.startswith(start))
    return f"{model_type} models overflow in float16 (says {source})"


# --- can it do what a run asks of it ---


def check_run(
    hardware: Hardware,
    *,
    attention: str | None = None,
    optimizer: str | None = None,
    mixed_precision: str | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Makes sure that a device can do what a run asks of it. None: not asked for, or not known yet.

    Args:
        attention: transformers' `attn_implementation`.
        optimizer: transformers' name of it.
        mixed_precision: "no", "bf16" or "fp16".
        dtype: of the base's unquantized weights, which its matrix products are computed in without autocast.
        config: the base's `config.json`.

    Raises:
        BaseModelError: FlashAttention without kernels for the hardware or the dtype.
        RecipeError: one of bitsandbytes' optimizers without kernels for the hardware (torch's fused AdamW, the default,
            runs on all); float16 where there is no loss scaling, without it, or for a model that overflows in it.
    """
    _check_attention(hardware, attention, dtype)
    _check_optimizer(hardware, optimizer)
    _check_precision(hardware, mixed_precision, dtype, config or {})


def _check_attention(hardware: Hardware, attention: str | None, dtype: torch.dtype | None) -> None:
    if attention is None or not attention.startswith("flash_attention"):
        return
    if not hardware.flash_attention:
        raise BaseModelError(
            f"{attention} has no kernels for {hardware.name}.",
            "Leave attn_implementation out: sdpa takes the fastest kernel torch has for the card.",
        )
    if dtype == torch.float32:
        raise BaseModelError(
            f"{attention} has no kernels for float32.", "Use a 16-bit dtype, or leave attn_implementation out."
        )


def _check_optimizer(hardware: Hardware, optimizer: str | None) -> None:
    if optimizer is None:
        return
    if optimizer.startswith("paged_") and not hardware.optimizers_paged:
        raise RecipeError(
            f"optim {optimizer!r} pages to host memory, which bitsandbytes cannot do on {hardware.name}.",
            "Use adamw_torch_fused, the default.",
        )
    if is_of_bitsandbytes(optimizer) and not hardware.optimizers_8bit:
        raise RecipeError(
            f"optim {optimizer!r} is bitsandbytes', which has no optimizer kernels for {hardware.name}.",
            "Use adamw_torch_fused, the default.",
        )


def _check_precision(
    hardware: Hardware, mixed_precision: str | None, dtype: torch.dtype | None, config: Mapping[str, Any]
) -> None:
    if mixed_precision == "fp16" and not hardware.loss_scaling:
        raise RecipeError(
            f"fp16 needs loss scaling, which torch does not have on {hardware.name}.",
            "Use dtype float32 or bfloat16 there.",
        )
    if mixed_precision == "fp16" and overflowing_type(config) is not None:
        raise RecipeError(f"{_overflow(config)}.", INSTEAD_OF_FLOAT16)
    if dtype == torch.float16 and mixed_precision in ("no", "bf16"):
        raise RecipeError(
            "The base is in float16 and fp16 is off: without loss scaling small gradients become 0.",
            "Set fp16: true (on a GPU), or load the base in float32 or bfloat16.",
        )


def is_of_bitsandbytes(optimizer: str) -> bool:
    """Whether this optimizer (transformers' name) is one of bitsandbytes' own."""
    if optimizer.startswith(("paged_", "lion_", "ademamix")) or "_bnb" in optimizer:
        return True
    return "_8bit" in optimizer and not optimizer.startswith("adamw_torch")  # that one is torchao's
