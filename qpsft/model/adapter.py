"""The LoRA adapter on a base model: built by PEFT, trained in float32, saved so that plain PEFT loads the trained model.

                    ┌────────── W (out, in), frozen, 4-bit ──────────┐
    x (…, in) ──────┤                                                 + ── y (…, out)
                    └─ A (r, in) ── B (out, r) ── · alpha / r ───────┘

What the initialisations do in PEFT 0.21, found by training each for 5 steps, saving with `save_pretrained` and loading
with `PeftModel.from_pretrained` on a freshly loaded base (stories260K; largest difference in log-probability):

| init_lora_weights | base not quantized | nf4, int8 |
| --- | --- | --- |
| true, gaussian | base untouched, loads equal | the same |
| pissa, olora | base := W − B0·A0; loads equal only on the same machine, because loading takes W apart again, and not at all with `low_cpu_mem_usage` | pissa: PEFT refuses. olora: the residual is rounded again, so training starts 3.7 nats away from the base |
| pissa_niter_N | the same, but by a random SVD: loads 8 nats off | PEFT refuses |

So on a quantized base only the first row is accepted, and `save_adapter` writes the others as the plain LoRA of rank
2r that they are equal to: W − B0·A0 + B·A = W + [B, −B0]·[A; A0]. In float32 the loaded model is the trained one (KL
below 1e-7); on a 16-bit base W − B0·A0 is rounded, which costs as much as computing in 16 bits does (KL 6e-4 and 4e-4).
"""  # noqa: E501

from __future__ import annotations

import copy
import difflib
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpsft.errors import BaseModelError, OutputError, RecipeError
from qpsft.model.base_record import quantized_linears, write_base_record
from qpsft.model.folder import one_line
from qpsft.recipe.arguments import LoraArguments

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
POLICY = "default"


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether an initialisation takes B0·A0 out of the base's weights (so that `disable_adapter()` is not the base)."""
    return (
        isinstance(init_lora_weights, str) and re.fullmatch(r"olora|pissa(_niter_\d+)?", init_lora_weights) is not None
    )


def add_adapter(model: PreTrainedModel, lora: LoraArguments) -> PeftModel:
    """Puts a LoRA adapter named "default" on `model`.

    Args:
        model: what `load_base` returned.
        lora: the adapter's options.

    Returns:
        The PEFT model. Exactly the adapter's parameters (A (r, in), B (out, r), DoRA magnitudes (out,), copies of
        `lora_modules_to_save`) require gradients, and all of them are float32. Copies of `lora_modules_to_save` on a
        16-bit base cast their input up and their output back.

    Raises:
        BaseModelError: a target or module name that the model does not have (with those it has), the LM head as a
            target, a quantized layer to be trained in full, or an initialisation that does not work on this base.
        RecipeError: PEFT refuses the options for this architecture, as `out_proj` of a Mamba.
    """
    from peft import get_peft_model

    config = lora_config(model, lora)
    kinds = sorted({name.rpartition(".")[2] for name in linear_names(model)})  # before PEFT's own are among them
    with torch.random.fork_rng(enabled=str(lora.init_lora_weights).startswith("pissa_niter")):
        if str(lora.init_lora_weights).startswith("pissa_niter"):
            # Its SVD is random, and a resumed run must take the same B0·A0 out of the base.
            torch.manual_seed(0)
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(
                f"PEFT puts no adapter with these options on a {model.config.model_type} model: {one_line(error)}",
                f"Give other lora_target_modules; its linear layers are {', '.join(kinds)}.",
            ) from error
    train_copies_in_float32(peft_model)
    if changes_base(lora.init_lora_weights):
        peft_model.qpsft_initial_adapter = keep_initial_adapter(peft_model)
    return peft_model


def lora_config(model: PreTrainedModel, lora: LoraArguments) -> LoraConfig:
    """The `peft.LoraConfig` for `lora`, checked against the modules `model` really has. Raises as `add_adapter`."""
    from peft import LoraConfig

    # Copies of the lists, because PEFT writes into them.
    targets, excluded, names = _targets(model, copy.copy(lora.lora_target_modules))
    _check_initialisation(model, lora, names)
    check_dtypes(model, lora.lora_bias)
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
    return name == target or name.endswith(f".{target}")


def _suffixes(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _unknown_target(target: str, names: list[str]) -> BaseModelError:
    suffixes = _suffixes(names)
    near = difflib.get_close_matches(target, suffixes, n=1, cutoff=0.6)
    return BaseModelError(
        f"lora_target_modules: no layer of this model is called {target!r}.",
        f"{f'Did you mean {near[0]!r}? ' if near else ''}Its linear layers are {', '.join(suffixes)}.",
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
            suffixes = sorted({full.rpartition(".")[2] for full, module in model.named_modules() if _is_leaf(module)})
            near = difflib.get_close_matches(name, suffixes, n=1, cutoff=0.6)
            raise BaseModelError(
                f"lora_modules_to_save: no module of this model is called {name!r}.",
                f"{f'Did you mean {near[0]!r}? ' if near else ''}Its modules are {', '.join(suffixes)}.",
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


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None


def _check_initialisation(model: PreTrainedModel, lora: LoraArguments, targets: list[str]) -> None:
    init = lora.init_lora_weights
    if init is True or init == "gaussian":
        return
    if not changes_base(init):
        raise BaseModelError(
            f"init_lora_weights {init!r} is not supported.",
            "Use true, gaussian, olora, pissa or pissa_niter_N (N iterations); all of them start at the base model.",
        )
    if quantized_linears(model):
        raise BaseModelError(
            f"init_lora_weights {init} takes a part out of the base's weights, and what is left of a quantized weight "
            "would be rounded again: training would start from another model than the base, and an adapter could not "
            "be carried back to it.",
            "Use init_lora_weights true, or quantization none.",
        )
    width, name = min((min(model.get_submodule(name).weight.shape), name) for name in targets)
    if lora.lora_r > width:
        raise BaseModelError(
            f"init_lora_weights {init} needs a rank of at most the smallest layer's width: {name} has {width}, "
            f"and lora_r is {lora.lora_r}.",
            f"Use lora_r {width} or less, or init_lora_weights true.",
        )


def check_dtypes(model: PreTrainedModel, lora_bias: str) -> None:
    """Raises BaseModelError where this base's dtype cannot carry such an adapter."""
    if lora_bias != "none" and model.dtype != torch.float32:
        raise BaseModelError(
            f"lora_bias {lora_bias} trains the base's own biases, which are {model.dtype} here and cannot take "
            "the small steps of a trust region.",
            "Use lora_bias none, or dtype float32.",
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


def keep_initial_adapter(peft_model: PeftModel) -> dict[str, Tensor]:
    """A0 and B0 of the adapter as it is now, cloned to the CPU, by their names in an adapter file.

    `add_adapter` keeps them on the model (`qpsft_initial_adapter`) where the base was changed by them.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, adapter_name=POLICY)
    return {name: t.detach().cpu().clone() for name, t in state.items() if "lora_A" in name or "lora_B" in name}


def save_adapter(
    peft_model: PeftModel, folder: str | os.PathLike, whole_policy: dict[str, Tensor] | None = None
) -> Path:
    """Writes the adapter in PEFT's format, with `base_quantization.json`, as the model that was trained.

    `PeftModel.from_pretrained(base, folder)` gives that model again, `base` being loaded the same way. A PiSSA or
    OLoRA adapter is written as the plain LoRA of twice its rank that it is equal to on the untouched base.

    Args:
        whole_policy: of a sharded model, its gathered parameters (`qpsft.psft.sharding.whole_policy`). The record
            cannot be read off such a model and is not written.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    initial = getattr(peft_model, "qpsft_initial_adapter", None)
    try:
        if initial is None:
            peft_model.save_pretrained(folder, selected_adapters=[POLICY], state_dict=whole_policy)
        else:
            _save_as_plain_lora(peft_model, folder, initial, whole_policy)
    except OSError as error:
        raise OutputError(f"The adapter cannot be written to {folder}: {error}.", "Check the disk space.") from error
    if whole_policy is None:
        write_base_record(peft_model, folder)
    return folder


def _save_as_plain_lora(peft_model: PeftModel, folder: Path, initial: dict[str, Tensor], whole_policy) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in get_peft_model_state_dict(peft_model, whole_policy, POLICY).items():
        tensor = tensor.detach().cpu()
        if "lora_A" in name:
            tensor = torch.cat([tensor, initial[name]], dim=0)
        elif "lora_B" in name:
            tensor = torch.cat([tensor, -initial[name]], dim=1)
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # tied weights come twice
    config = copy.deepcopy(peft_model.peft_config[POLICY])
    config.init_lora_weights = True
    config.inference_mode = True
    # The factor alpha / r (alpha / sqrt(r) for rsLoRA) must stay what it was.
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.r *= 2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
