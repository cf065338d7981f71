"""The LoRA adapter on a base model: built by PEFT, in float32, with names and initialisations checked first."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from torch import nn

from qpsft.errors import BaseModelError
from qpsft.recipe import LoraArguments

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def add_adapter(model: PreTrainedModel, lora: LoraArguments) -> PeftModel:
    """Puts a float32 LoRA adapter named "default" on `model`; only its parameters require gradients."""
    from peft import get_peft_model

    config = lora_config(model, lora)
    return get_peft_model(model, config)


def lora_config(model: PreTrainedModel, lora: LoraArguments) -> LoraConfig:
    """The `peft.LoraConfig` for `lora`, checked against the modules `model` really has."""
    from peft import LoraConfig

    _check_targets(model, lora.lora_target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        modules_to_save=lora.lora_modules_to_save,
        bias=lora.lora_bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
    )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers an adapter may go on: all but the LM head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    if targets == ALL_LINEAR:
        return
    names = linear_names(model)
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise _unknown_target(targets, names)
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _unknown_target(target, names)


def _unknown_target(target: str, names: list[str]) -> BaseModelError:
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(target, suffixes, n=1, cutoff=0.6)
    return BaseModelError(
        f"lora_target_modules: no linear layer of this model is called {target!r}.",
        f"{f'Did you mean {near[0]!r}? ' if near else ''}Its linear layers are {', '.join(suffixes)}.",
    )
