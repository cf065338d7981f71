"""The live model: the base rounded as in training, the trained adapter on it, and all arithmetic in float32.

The weights are those of training; only the arithmetic is finer. Two models with the same weights then agree to about
1e-5 nats, where bfloat16 arithmetic alone would make them differ by 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpsft.errors import ExportError
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base_record import is_packed, quantized_linears
from qpsft.model.skeleton import dtype_named

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass
class LiveModel:
    """An adapter on its base.

    Attributes:
        model: the PEFT model, in eval mode, every unquantized weight float32.
        base: which base it is, in words.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base_folder: Path
    base: str


@dataclass(frozen=True)
class TrainedWeight:
    """One tensor of the trained model, before and after training.

    Attributes:
        name: of the tensor in a checkpoint of the merged model.
        base: float32, as training began.
        trained: float32, the same shape. It is the very same object as `base` where training did not change it.
    """

    name: str
    base: Tensor
    trained: Tensor


def load_live(
    adapter: str | Path | AdapterFolder, base: str | Path | None = None, *, device: str = "auto"
) -> LiveModel:
    """Loads the adapter on its base, rounded as its record says.

    Args:
        adapter: the folder of a PEFT adapter with `base_quantization.json`, or that folder opened.
        base: where the base is now; None is the place in the record.
        device: as in `load_base`.

    Raises:
        BaseModelError: not an adapter's folder, no record, another base, or tensors that do not fit it.
    """
    opened = adapter if isinstance(adapter, AdapterFolder) else AdapterFolder(adapter)
    folder = opened.base_folder(base)
    model = opened.load_base(folder, device=device)
    _compute_in_float32(model, dtype_named(opened.record.compute_dtype))
    peft_model = opened.put_on(model).requires_grad_(False)
    base_used = opened.base_in_words(folder, model.qpsft_source)
    return LiveModel(peft_model, opened.tokenizer(folder), folder, base_used)


def _compute_in_float32(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Makes the arithmetic float32 and leaves the weights the values that training multiplied by.

    Those are values of `compute_dtype`: training held unquantized weights in it, and bitsandbytes dequantizes to it.
    """
    loaded = model.dtype
    for parameter in model.parameters():
        if _has_plain_values(parameter):
            kept = parameter.dtype != loaded  # some architectures keep some weights in float32 whatever the dtype
            parameter.data = (parameter.data if kept else parameter.data.to(compute_dtype)).float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    for layer in quantized_linears(model).values():
        # In training, bitsandbytes dequantizes to the activations' dtype, whatever dtype the weight was quantized from;
        # with float32 activations its own forward would dequantize to float32.
        layer.weight.quant_state.dtype = compute_dtype
        layer.compute_dtype = torch.float32
        layer.forward = partial(_dense_forward, layer)


def _has_plain_values(parameter: nn.Parameter) -> bool:
    """Whether it holds floating point numbers."""
    return parameter.is_floating_point() and not is_packed(parameter)


def _dense_forward(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, _dequantized(layer), layer.bias)


def _dequantized(layer: nn.Module) -> Tensor:
    """A layer's weight as float32: of a quantized linear layer (out, in) dequantized, of any other as it is."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float()


def trained_weights(model: PeftModel) -> Iterator[TrainedWeight]:
    """Every weight of the trained model as a merged checkpoint would hold it, one at a time, shared ones once.

    Raises:
        ExportError: a kind of adapter layer whose trained weight cannot be computed (named).
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    shared: set[int] = set()
    for name, module in _modules(model, (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)):
        if isinstance(module, ParamWrapper):
            yield from _with_adapted_parameters(name, module, shared)
        elif isinstance(module, LoraLayer):
            yield from _adapted(name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            yield from _trained_in_full(name, module)
        elif isinstance(module, TrainableTokensWrapper):
            yield from _with_trained_rows(name, module, shared)
        else:
            yield from _untouched(name, module, shared)


def _modules(model: PeftModel, closed: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The base's modules by name, without what is inside modules of the `closed` types."""
    inside: tuple[str, ...] = ()
    for name, module in model.get_base_model().named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, closed):
            inside += (f"{name}.",)
        yield name, module


def _adapted(name: str, module: Any) -> Iterator[TrainedWeight]:
    """Weight and bias of a layer with LoRA."""
    layer = module.get_base_layer()
    yield _as_stored(layer, f"{name}.weight", *lora_weight(name, module))
    if getattr(layer, "bias", None) is not None:
        yield TrainedWeight(f"{name}.bias", layer.bias.data.float(), _lora_bias(module))


def _with_adapted_parameters(name: str, module: Any, shared: set[int]) -> Iterator[TrainedWeight]:
    """The parameters of a module, such as a mixture's experts, of which some are adapted (`target_parameters`)."""
    wrappers = {wrapper.parameter_name: wrapper for wrapper in _wrappers(module)}
    for own, parameter in _not_yet(module.get_base_layer().named_parameters(), shared):
        base = parameter.data.float()
        yield TrainedWeight(f"{name}.{own}", base, _adapted_parameter(wrappers[own]) if own in wrappers else base)


def _wrappers(module: Any) -> list[Any]:
    """PEFT's `ParamWrapper`s around a module, one for each adapted parameter, the outermost first."""
    from peft.tuners.lora.layer import ParamWrapper

    return [module, *_wrappers(module.base_layer)] if isinstance(module, ParamWrapper) else []


def _adapted_parameter(wrapper: Any) -> Tensor:
    """The trained values of a wrapper's parameter, float32."""
    deltas = [wrapper.get_delta_weight(adapter) for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
    return sum(deltas, wrapper.get_param().data.float())


def _trained_in_full(name: str, module: Any) -> Iterator[TrainedWeight]:
    """A module in `modules_to_save`: PEFT trained a copy of it."""
    originals = dict(module.original_module.named_parameters())
    for own, parameter in module.modules_to_save[module.active_adapter].named_parameters():
        yield TrainedWeight(f"{name}.{own}", originals[own].data.float(), parameter.data.float())


def _with_trained_rows(name: str, module: Any, shared: set[int]) -> Iterator[TrainedWeight]:
    """An embedding or LM head with `trainable_token_indices`."""
    layer = module.token_adapter
    for own, parameter in _not_yet(layer.base_layer.named_parameters(), shared):
        base = parameter.data.float()
        trained = layer.get_merged_weights(layer.active_adapters).data if own == "weight" else base
        yield TrainedWeight(f"{name}.{own}", base, trained)


def _untouched(name: str, module: nn.Module, shared: set[int]) -> Iterator[TrainedWeight]:
    """A module's own parameters, which the adapter leaves alone."""
    for own, parameter in _not_yet(module.named_parameters(recurse=False), shared):
        values = _dequantized(module) if own == "weight" else parameter.data.float()
        yield _as_stored(module, f"{name}.{own}", values, values)


def _not_yet(parameters: Iterable[tuple[str, nn.Parameter]], shared: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that did not come before under another name, such as an LM head tied to the embedding."""
    for name, parameter in parameters:
        if id(parameter) not in shared:
            shared.add(id(parameter))
            yield name, parameter


def _as_stored(layer: nn.Module, name: str, base: Tensor, trained: Tensor) -> TrainedWeight:
    """As a checkpoint holds it: a Conv1D is stored as (in, out), and quantized as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    if getattr(layer, "source_cls", None) is Conv1D and trained.dim() == 2:
        unchanged = trained is base
        base = base.T
        trained = base if unchanged else trained.T
    return TrainedWeight(name, base, trained)


def _lora_bias(layer: Any) -> Tensor:
    """The trained bias of a LoRA layer, float32."""
    bias = layer.get_base_layer().bias.data.float()
    for adapter in layer.active_adapters:
        if layer.lora_bias.get(adapter):
            bias = bias + layer.lora_B[adapter].bias.data.float() * layer.scaling[adapter]
    return bias


def lora_weight(name: str, layer: Any) -> tuple[Tensor, Tensor]:
    """(base, trained) weight of a LoRA layer, float32, in the base layer's own orientation.

    Raises:
        ExportError: it is not a linear layer or an embedding.
    """
    from peft.tuners.lora import Embedding, Linear

    base_layer = layer.get_base_layer()
    if not isinstance(layer, Linear | Embedding) and not isinstance(base_layer, nn.Linear):
        raise ExportError(
            f"{name} is adapted as a {type(layer).__name__}, whose merged weight qpsft cannot compute.",
            "Use the adapter as it is, on its base.",
        )
    base = _dequantized(base_layer)
    trained = base.clone()
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A and adapter not in getattr(layer, "lora_embedding_A", {}):
            continue
        trained += layer.get_delta_weight(adapter).float()
        if adapter in layer.lora_magnitude_vector:
            # DoRA (arXiv 2402.09353, Eq. 5): every output's row keeps its direction and takes a learnt length.
            magnitude = layer.lora_magnitude_vector[adapter].weight.float().flatten()
            if getattr(layer, "fan_in_fan_out", False) or isinstance(layer, Embedding):
                trained *= (magnitude / trained.norm(dim=0)).unsqueeze(0)
            else:
                trained *= (magnitude / trained.norm(dim=1)).unsqueeze(1)
    return base, trained


def round_weights(model: PeftModel, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Makes the live model the one a faultless export is: each weight rounded once to its dtype in the export.

    A weight over a quantized layer is computed anew in every forward, so the model stays as small as it was. There is
    no way back.

    Args:
        model: the live model.
        dtype_of: dtype of a tensor in the export, by its name in a merged checkpoint.
    """
    from peft.tuners.lora import LoraLayer

    quantized = {id(layer) for layer in quantized_linears(model).values()}
    for name, module in _modules(model, (LoraLayer,)):
        for wrapper in _wrappers(module):
            wrapper.get_param().data = _adapted_parameter(wrapper)
            wrapper.merged_adapters.extend(wrapper.active_adapters)
        if _wrappers(module):
            for own, parameter in module.get_base_layer().named_parameters():
                parameter.data = parameter.data.to(dtype_of(f"{name}.{own}")).float()
            continue
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if id(layer) in quantized:
            module.forward = partial(_rounded_forward, name, module, dtype_of(f"{name}.weight"))
        if isinstance(module, LoraLayer):
            _round_adapted(name, module, dtype_of, merge=id(layer) not in quantized)
        else:
            _round_own(name, module, dtype_of)


def _round_adapted(name: str, module: Any, dtype_of: Callable[[str], torch.dtype], *, merge: bool) -> None:
    """Rounds the bias of a layer with LoRA; with `merge` also its trained weight, which replaces the base layer's."""
    layer = module.get_base_layer()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = _lora_bias(module).to(dtype_of(f"{name}.bias")).float()
    if merge:
        rounded = lora_weight(name, module)[1].to(dtype_of(f"{name}.weight")).float()
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        module.merged_adapters.extend(module.active_adapters)


def _round_own(name: str, module: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Rounds a module's own parameters, but for quantized ones, which its new forward rounds."""
    for own, parameter in module.named_parameters(recurse=False):
        if _has_plain_values(parameter):
            parameter.data = parameter.data.to(dtype_of(_merged_name(f"{name}.{own}"))).float()


def _rounded_forward(name: str, module: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    layer = module
    if hasattr(module, "get_base_layer"):
        layer = module.get_base_layer()
        weight = lora_weight(name, module)[1]
    else:
        weight = _dequantized(module)
    return F.linear(x, weight.to(dtype).float(), layer.bias)


def _merged_name(name: str) -> str:
    """A parameter's name in a merged checkpoint, without what PEFT puts around saved modules and trained rows."""
    head, wrapped, tail = name.partition(".modules_to_save.")
    if wrapped:
        return f"{head}.{tail.partition('.')[2]}"
    head, wrapped, _ = name.partition(".token_adapter.trainable_tokens_delta.")
    if wrapped:
        return f"{head}.weight"
    return name.replace(".token_adapter.base_layer.", ".").replace(".original_module.", ".")
