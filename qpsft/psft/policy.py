"""The model that is trained: loaded if it is a name, with a float32 adapter, and one kernel for all its forwards."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path

from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig
from qpsft.psft.forward import is_prompt_learning
from qpsft.psft.losses import LOSSES, TOP_ENTROPY
from qpsft.psft.reference import BasePolicy

REFUSED = {
    "phimoe": "its router draws random numbers in training, so two passes over the same weights differ, and PEFT puts "
    "no adapter on it"
}
"""Models that the trainer cannot train, by `model_type`, and why."""


def default_config(model: str | nn.Module) -> PSFTConfig:
    """The configuration of a trainer that was given none: SFTTrainer's convention, a folder named after the model."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return PSFTConfig(f"{Path(name).name}-PSFT")


def prepare_policy(
    model: str | PreTrainedModel | PeftModel,
    args: PSFTConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
) -> PreTrainedModel | PeftModel:
    """The model with its adapter: loaded from a name or path, and wrapped by `peft_config` if it has none yet.

    The trainable parameters of an adapter are float32, as PEFT made them or widened (exactly) from 16 bits.

    Raises:
        RecipeError: a model of `REFUSED`; an adapter on a model that has one; a chat template that needs new tokens in
            the embedding; packed rows for a model that would let them see each other.
    """
    if isinstance(model, str):
        model = _load(model, args, quantization_config)
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise RecipeError(
                "The model has an adapter already, and peft_config asks for another.",
                "Leave out peft_config to train the adapter it has, or pass the model without one.",
            )
        if args.chat_template_path and not args.chat_template_path.endswith((".jinja", ".j2")):
            raise RecipeError(
                f"chat_template_path {args.chat_template_path!r} names a tokenizer, whose added tokens would "
                "have to be trained in a 4-bit embedding.",
                "Give a .jinja file, or clone the template onto the model before it is quantized.",
            )
        model = get_peft_model(model, peft_config)
    for parameter in adapter_parameters(model):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    _refuse_by_name(model)
    _name_experts_for_trl(model)
    _keep_one_kernel(model)
    if args.packing or args.padding_free:
        _refuse_packing(model)
    return model


def check_loss(model: nn.Module, args: PSFTConfig) -> None:
    """Raises RecipeError where the loss needs what cannot be had of this model."""
    missing = BasePolicy.missing(model)
    if args.needs_base is not None and missing is not None:
        raise RecipeError(
            f"{args.needs_base} compares the policy with the base: {missing}.",
            "Train a LoRA adapter without trained biases, or leave out what needs the base.",
        )
    if TOP_ENTROPY in LOSSES[args.loss_type].needs and is_prompt_learning(model):
        raise RecipeError(f"loss_type {args.loss_type} is not supported with prompt learning.", "Train a LoRA adapter.")


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a PEFT model; none of a model without an adapter."""
    return [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []


@contextlib.contextmanager
def float32_adapter(model: nn.Module) -> Iterator[None]:
    """Keeps a trainer of TRL that is made inside from rounding the adapter of a quantized model to bfloat16.

    ```python
    with float32_adapter(model):
        trainer = GRPOTrainer(model=model, …)
    ```

    Only what requires gradients is rounded (trl 1.16), so nothing does for that long. A bfloat16 weight cannot take
    a small step: after 10 steps of GRPO at TRL's default rate of 1e-6, 0.7 % of the entries had moved; in float32 all.

    Args:
        model: a PEFT model. Its trainable parameters are the same afterwards, with the same values and dtypes.
    """
    trainable = adapter_parameters(model)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def noise_sources(model: nn.Module, args: PSFTConfig) -> dict[str, float]:
    """What makes two forwards of the same weights differ: name and size, where above 0."""
    adapters = model.active_adapters if isinstance(model, PeftModel) else []
    lora = max((getattr(model.peft_config[a], "lora_dropout", 0.0) or 0.0 for a in adapters), default=0.0)
    attention = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
    base = max((m.p for name, m in model.named_modules() if _is_base_dropout(name, m)), default=0.0)
    sources = {
        "lora_dropout": lora,
        "the base model's dropout": max(attention, base),
        "neftune_noise_alpha": args.neftune_noise_alpha or 0.0,
    }
    return {name: size for name, size in sources.items() if size > 0}


def warn_of_noise(model: nn.Module, args: PSFTConfig) -> None:
    """Warns, for PSFT, of what `noise_sources` finds."""
    if not args.takes_snapshots:
        return
    for name, size in noise_sources(model, args).items():
        warnings.warn(
            f"{name} is {size}: the two passes see different noise, so the ratio differs from 1 right after a "
            f"snapshot and the trust region clips noise. Set {name} to 0 for PSFT.",
            stacklevel=3,
        )


def _is_base_dropout(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and "lora_dropout" not in name


def _refuse_by_name(model: nn.Module) -> None:
    model_type = model.config.get_text_config().model_type
    if model_type in REFUSED:
        raise RecipeError(f"{model_type} models cannot be trained here: {REFUSED[model_type]}.", "Use another base.")


def _name_experts_for_trl(model: nn.Module) -> None:
    # TRL (1.16) looks for `num_experts` where a mixture's load is balanced; Granite's config has another name for it
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts


def _keep_one_kernel(model: nn.Module) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes' first forward in eval mode repacks the 4-bit weights in place for another
    # kernel: the base's bytes change, and evaluation and training compute different log-probabilities.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _refuse_packing(model: nn.Module) -> None:
    # Attention keeps packed rows apart by their positions; a convolution or a recurrence runs on into the next row.
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base._is_stateful or kinds & {"conv", "linear_attention"}:
        raise RecipeError(
            f"packing: a {config.model_type} model has layers that run on from one packed row into the next, so rows "
            "would see each other.",
            "Turn packing and padding_free off.",
        )


def _load(name: str, args: PSFTConfig, quantization_config: Any) -> PreTrainedModel:
    arguments = {"trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        arguments["device_map"] = None
    elif args.device.type not in ("cpu", "mps"):
        # TRL's own is "auto", which shares the model out over all cards that are visible
        arguments.setdefault("device_map", {"": args.device})
    return create_model_from_path(name, **arguments)
