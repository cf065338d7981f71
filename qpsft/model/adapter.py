"""The LoRA adapter on a base model: built by PEFT, trained in float32, saved so that plain PEFT can load it.

                    ┌────────── W (out, in), frozen, 4-bit ──────────┐
    x (…, in) ──────┤                                                 + ── y (…, out)
                    └─ A (r, in) ── B (out, r) ── · alpha / r ───────┘

A starts random and B zero, so training starts at the base model. PEFT's initialisations that change the base's weights
(PiSSA, OLoRA) are no options of a recipe: what is left of a 4-bit weight would be rounded again, and training would
start from another model (with OLoRA 3.7 nats away, measured on stories260K).
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpsft.errors import BaseModelError, OutputError, RecipeError, did_you_mean, one_line
from qpsft.model.base_record import quantized_linears, write_base_record
from qpsft.recipe.arguments import LoraArguments

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
POLICY = "default"


def add_adapter(model: PreTrainedModel, lora: LoraArguments) -> PeftModel:
    """Puts a LoRA adapter named "default" on `model`.

    Returns:
        The PEFT model. Exactly the adapter's parameters (A (r, in), B (out, r), DoRA magnitudes (out,), copies of
        `lora_modules_to_save`) require gradients, and all of them are float32. Copies of `lora_modules_to_save` on a
        16-bit base cast their input up and their output back.

    Raises:
        BaseModelError: a target or module name that the model does not have (with those it has), the LM head as a
            target, or a quantized layer to be trained in full.
        RecipeError: PEFT refuses the options for this architecture, as `out_proj` of a Mamba.
    """
    from peft import get_peft_model

    config = lora_config(model, lora)
    kinds = _suffixes(linear_names(model))  # before PEFT adds its own
    targeted = targeted_layers(model, lora.lora_target_modules)
    try:
        with warnings.catch_warnings():
            # PEFT sets patterns for a mixture's experts, follows them, and says that it did not
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"PEFT puts no adapter with these options on a {model.config.model_type} model: {one_line(error)}",
            f"Give other lora_target_modules; its linear layers are {', '.join(kinds)}.",
        ) from error
    train_copies_in_float32(peft_model)
    _say_what_a_mixture_trains(peft_model, targeted)
    return peft_model


def _say_what_a_mixture_trains(peft_model: PeftModel, targeted: list[str]) -> None:
    """Of some mixtures PEFT adapts the experts and the router, which are no linear layers, and no other MLP."""
    parameters = peft_model.peft_config[POLICY].target_parameters
    if not parameters:
        return
    left_out = sorted(set(targeted) - adapted_layers(peft_model))
    others = f" {len(left_out)} linear layers are left out, such as {left_out[0]}." if left_out else ""
    warnings.warn(
        f"PEFT adapts the experts of this {peft_model.config.model_type} as whole parameters "
        f"({', '.join(sorted(parameters))}).{others} qpsft merge takes such an adapter; vLLM and llama.cpp do not "
        "serve it beside its base. To leave the experts out, name other layers in lora_target_modules, such as q_proj.",
        stacklevel=3,
    )


def lora_config(model: PreTrainedModel, lora: LoraArguments) -> LoraConfig:
    """The `peft.LoraConfig` for `lora`, checked against the modules `model` really has. Raises as `add_adapter`."""
    from peft import LoraConfig

    # Copies of the lists, because PEFT writes into them.
    targets, excluded, names = _targets(model, copy.copy(lora.lora_target_modules))
    saved = _modules_to_save(model, lora.lora_modules_to_save or [], names)
    alpha = lora.lora_alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=list(lora.lora_modules_to_save or []) or None,
        ensure_weight_tying=_is_tied(model) and bool(saved & _embeddings(model)),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers an adapter may go on: all but the LM head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _targets(model: PreTrainedModel, targets: str | list[str]) -> tuple[str | list[str], str | None, list[str]]:
    """What to give PEFT as target_modules and exclude_modules, and the full names of the layers that it will adapt."""
    linear = linear_names(model)
    if targets == ALL_LINEAR:
        text = _text_prefix(model)
        inside = [name for name in linear if name.startswith(text)]
        return targets, None if inside == linear else rf"(?!{re.escape(text)}).*", inside
    if isinstance(targets, str) and any(_ends_with(name, targets) for name, _ in model.named_modules()):
        targets = [targets]  # one plain name, which PEFT would read as a regex for the full name
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise BaseModelError(
                f"lora_target_modules {targets!r} is not a valid regular expression: {error}.",
                "Give all-linear, a list of names, or a regex for full module names.",
            ) from error
        matched = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    else:
        for target in targets:
            if not any(_ends_with(name, target) for name, _ in model.named_modules()):
                raise _unknown_target(target, linear)
        matched = [name for name, _ in model.named_modules() if any(_ends_with(name, target) for target in targets)]
    if not matched:
        raise _unknown_target(str(targets), linear)
    _refuse_head(model, matched)
    other = [name for name in matched if name not in set(linear)]
    if other:
        raise BaseModelError(
            f"lora_target_modules matches {other[0]}, which is a {type(model.get_submodule(other[0])).__name__}, not "
            "a linear layer.",
            f"The linear layers are {', '.join(_suffixes(linear))}; to train embeddings or norms in full, name them in "
            "lora_modules_to_save.",
        )
    return targets, None, matched


def _text_prefix(model: PreTrainedModel) -> str:
    """What the names in the language model start with. Text never reaches a multimodal model's other layers."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def targeted_layers(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Full names of the layers that `lora_target_modules` means. Raises BaseModelError as `add_adapter`."""
    return _targets(model, copy.copy(targets))[-1]


def adapted_layers(peft_model: PeftModel) -> set[str]:
    """Full names, in the base model, of the layers that have LoRA."""
    from peft.tuners.lora import LoraLayer

    modules = peft_model.get_base_model().named_modules()
    return {name for name, module in modules if isinstance(module, LoraLayer)}


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _suffixes(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _unknown_target(target: str, names: list[str]) -> BaseModelError:
    suffixes = _suffixes(names)
    return BaseModelError(
        f"lora_target_modules: no layer of this model is called {target!r}.",
        f"{did_you_mean(target, suffixes)}Its linear layers are {', '.join(suffixes)}.",
    )


def _refuse_head(model: PreTrainedModel, names: list[str]) -> None:
    head = model.get_output_embeddings()
    for name in names:
        if model.get_submodule(name) is head:
            raise BaseModelError(
                f"lora_target_modules names the LM head ({name}). The log-probabilities are computed from its weight "
                "directly, so an adapter on it would never be trained.",
                "Leave it out, or train it in full with lora_modules_to_save.",
            )


def _embeddings(model: PreTrainedModel) -> set[nn.Module]:
    return {model.get_input_embeddings(), model.get_output_embeddings()}


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _modules_to_save(model: PreTrainedModel, wanted: list[str], targets: list[str]) -> set[nn.Module]:
    """The modules PEFT will copy and train in full for these names; it matches the end of the full name."""
    quantized = set(quantized_linears(model).values())
    saved = set()
    for name in wanted:
        matched = {full: module for full, module in model.named_modules() if full.endswith(name)}
        if not matched or not name:
            suffixes = _suffixes(
                [full.rpartition(".")[0] for full, _ in model.named_parameters(remove_duplicate=False)]
            )
            raise BaseModelError(
                f"lora_modules_to_save: no module of this model is called {name!r}.",
                f"{did_you_mean(name, suffixes)}Its modules are {', '.join(suffixes)}.",
            )
        for full, module in matched.items():
            if not quantized.isdisjoint(module.modules()):
                raise BaseModelError(
                    f"lora_modules_to_save: {full} is quantized, and a quantized weight cannot be trained in full.",
                    "Leave it to LoRA, or load the base with quantization none.",
                )
            if any(target == full or target.startswith(f"{full}.") for target in targets):
                raise BaseModelError(
                    f"{full} is both in lora_modules_to_save and a target of LoRA.",
                    "List the other layers by name in lora_target_modules.",
                )
            saved.add(module)
    return saved


def check_trained_biases(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raises BaseModelError where an adapter trains the base's own biases and the base is not float32."""
    if config.bias != "none" and model.dtype != torch.float32:
        raise BaseModelError(
            f"The adapter trains the base's own biases (bias: {config.bias}), which are {model.dtype} here and cannot "
            "take the small steps of a trust region.",
            "Use dtype float32, or an adapter without trained biases.",
        )


def train_copies_in_float32(peft_model: PeftModel) -> None:
    """Makes copies for `modules_to_save`, which have the base's dtype, float32; PEFT casts only LoRA's own weights."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in list(peft_model.modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        original = next(wrapper.original_module.parameters()).dtype
        if original == torch.float32:
            continue
        for module in wrapper.modules_to_save.values():
            module.float()
            module.register_forward_pre_hook(_inputs_to_float32)
            module.register_forward_hook(partial(_output_to, dtype=original))


def _inputs_to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _output_to(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` is a base with a LoRA adapter on it, which can be switched off."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in model.modules())


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as the base does: without LoRA or DoRA, with the base's own `modules_to_save`.

    PEFT's `disable_adapter()` sets `requires_grad` too, to True for all adapters at its end; a sharded layer that is
    gathered for the first time inside would never be trained. Here only the layers' flags change.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapter(
    peft_model: PeftModel, folder: str | os.PathLike, whole_policy: dict[str, Tensor] | None = None
) -> Path:
    """Writes the adapter in PEFT's format, with `base_quantization.json`, as the model that was trained.

    `PeftModel.from_pretrained(base, folder)` gives that model again, `base` being loaded the same way.

    Args:
        whole_policy: of a sharded model, its gathered parameters (`qpsft.psft.sharding.whole_policy`). The record
            cannot be read off such a model and is not written.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        peft_model.save_pretrained(folder, selected_adapters=[POLICY], state_dict=whole_policy)
    except OSError as error:
        raise OutputError(f"The adapter cannot be written to {folder}: {error}.", "Check the disk space.") from error
    if whole_policy is None:
        write_base_record(peft_model, folder)
    return folder
