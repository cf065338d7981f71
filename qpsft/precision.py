"""Which dtype a run computes in, where hardware, model and the user's wish meet.

The adapters, the ratio and the log-softmax are float32 always. What varies is the dtype of the base's matrix products:
with bfloat16 and float16 autocast is on, with float16 also loss scaling (`qpsft.loss_scaling`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpsft.errors import BaseModelError, RecipeError
from qpsft.hardware import compute_dtype_for, hardware_of

if TYPE_CHECKING:
    from qpsft.config import PSFTConfig

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


def settle_precision(model: nn.Module, args: PSFTConfig) -> None:
    """Makes the trainer's mixed precision fit the model, before the trainer is built.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        args: bf16 and fp16 are turned off where they were chosen by hardware alone and the model overflows in float16.

    Raises:
        RecipeError: fp16 was asked for and the model overflows in it, or the model computes in float16 without the loss
            scaling that keeps small gradients from becoming 0.
    """
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
