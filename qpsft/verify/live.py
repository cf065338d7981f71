"""The trained model, live: the base rounded as in training, the adapter on it, all arithmetic in float32.

Float32 arithmetic over the weights that training used is what makes a sharp comparison possible: two models with the
same weights then agree to about 1e-5 nats, where bfloat16 arithmetic alone would make them differ by 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpsft.errors import ExportError
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_base
from qpsft.model.base_record import BaseRecord, quantized_linears
from qpsft.model.skeleton import dtype_named

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass
class LiveModel:
    """An adapter on its base.

    Attributes:
        model: the PEFT model, in eval mode, every unquantized weight float32.
        tokenizer: the one training used: the adapter folder's own, else the base's.
        record: how the base was rounded.
        base_folder: the base's local folder.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    record: BaseRecord
    base_folder: Path


@dataclass(frozen=True)
class TrainedWeight:
    """One tensor of the trained model under its name in a dense checkpoint, before and after training; float32."""

    name: str
    base: Tensor
    trained: Tensor


def load_live(
    adapter: str | Path, base: str | Path | None = None, *, quantized: bool = True, device: str = "auto"
) -> LiveModel:
    """Loads the adapter on its base, rounded as its record says.

    Args:
        adapter: the folder of a PEFT adapter with `base_quantization.json`.
        base: where the base is now; None is the place in the record.
        quantized: False puts the adapter on the base's original weights, which training never saw.
        device: as in `load_base`.

    Raises:
        BaseModelError: not an adapter folder, no record, another base, or an adapter that does not fit it.
    """
    opened = AdapterFolder(adapter)
    record, folder = opened.record, opened.base_folder(base, same_rounding=quantized)
    model, _ = load_base(
        folder,
        quantization=record.quantization if quantized and not record.prequantized else "none",
        double_quant=record.double_quant,
        # A quantized base has been rounded already; another one is rounded from `weights_dtype`.
        dtype=record.compute_dtype if record.prequantized else record.weights_dtype,
        device=device,
        verbose=False,
    )
    _compute_in_float32(model, dtype_named(record.compute_dtype))
    peft_model = opened.put_on(model).requires_grad_(False)
    return LiveModel(peft_model, opened.tokenizer(folder), record, folder)


def _compute_in_float32(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Float32 arithmetic over the weights that the live forward multiplies by, which have `compute_dtype`'s values."""
    loaded = model.dtype
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kept = parameter.dtype != loaded  # some architectures hold some weights in float32 whatever the dtype
            parameter.data = (parameter.data if kept else parameter.data.to(compute_dtype)).float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    for layer in quantized_linears(model).values():
        # The live forward dequantizes to its activations' dtype, whatever dtype the weight was quantized from.
        layer.weight.quant_state.dtype = compute_dtype
        layer.compute_dtype = torch.float32
        # bitsandbytes would dequantize to float32 here
        layer.forward = partial(_dense_forward, layer)


def _dense_forward(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, _dequantized(layer), layer.bias)


def _dequantized(layer: nn.Module) -> Tensor:
    """The weight of a quantized linear layer (out, in) or of any other layer as it is, as float32."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float()


def trained_weights(model: PeftModel) -> Iterator[TrainedWeight]:
    """Every weight of the trained model as a dense checkpoint would hold it, one at a time, shared ones once.

    Raises:
        ExportError: a kind of adapter layer whose weight cannot be told (named).
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.get_base_model().named_modules():
        if name.startswith(inside) if inside else False:
            continue
        if isinstance(module, LoraLayer):
            inside += (f"{name}.",)
            yield _stored(module.get_base_layer(), f"{name}.weight", *lora_weight(name, module))
            bias = getattr(module.get_base_layer(), "bias", None)
            if bias is not None:
                yield TrainedWeight(f"{name}.bias", bias.data.float(), _lora_bias(module))
        elif isinstance(module, TrainableTokensWrapper):
            inside += (f"{name}.",)
            layer = module.token_adapter
            for own, parameter in layer.base_layer.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    base = parameter.data.float()
                    changed = layer.get_merged_weights(layer.active_adapters).data if own == "weight" else base
                    yield TrainedWeight(f"{name}.{own}", base, changed)
        elif isinstance(module, ModulesToSaveWrapper):
            inside += (f"{name}.",)
            originals = dict(module.original_module.named_parameters())
            for own, parameter in module.modules_to_save[module.active_adapter].named_parameters():
                yield TrainedWeight(f"{name}.{own}", originals[own].data.float(), parameter.data.float())
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    dense = _dequantized(module) if own == "weight" else parameter.data.float()
                    yield _stored(module, f"{name}.{own}", dense, dense)


def _stored(layer: nn.Module, name: str, base: Tensor, trained: Tensor) -> TrainedWeight:
    """As a checkpoint holds it: transposed where a Conv1D, which is stored as (in, out), was quantized."""
    from transformers.pytorch_utils import Conv1D

    if getattr(layer, "source_cls", None) is Conv1D and trained.dim() == 2:
        same = trained is base
        base = base.T
        trained = base if same else trained.T
    return TrainedWeight(name, base, trained)


def _lora_bias(layer: Any) -> Tensor:
    """The trained bias of a LoRA layer, float32."""
    bias = layer.get_base_layer().bias.data.float()
    for adapter in layer.active_adapters:
        if layer.lora_bias.get(adapter):
            bias = bias + layer.lora_B[adapter].bias.data.float() * layer.scaling[adapter]
    return bias


def lora_weight(name: str, layer: Any) -> tuple[Tensor, Tensor]:
    """(base, trained) weight of a LoRA layer, float32, in the base layer's own orientation."""
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

    Weights over quantized layers are made anew in every forward, so the model stays as small as it was. There is no
    way back.

    Args:
        model: the live model.
        dtype_of: dtype of a tensor in the export, by its name in a dense checkpoint.
    """
    from peft.tuners.lora import LoraLayer

    quantized = {id(layer) for layer in quantized_linears(model).values()}
    inside: list[str] = []
    for name, module in model.get_base_model().named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, LoraLayer):
            inside.append(f"{name}.")
            layer = module.get_base_layer()
            if getattr(layer, "bias", None) is not None:
                layer.bias.data = _lora_bias(module).to(dtype_of(f"{name}.bias")).float()
            if id(layer) in quantized:
                module.forward = partial(_rounded_forward, name, module, dtype_of(f"{name}.weight"))
            else:
                rounded = lora_weight(name, module)[1].to(dtype_of(f"{name}.weight")).float()
                layer.weight = nn.Parameter(rounded, requires_grad=False)
                module.merged_adapters.extend(module.active_adapters)
        else:
            if id(module) in quantized:
                module.forward = partial(_rounded_forward, name, module, dtype_of(f"{name}.weight"))
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype_of(_dense_name(f"{name}.{own}"))).float()


def _rounded_forward(name: str, module: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    layer = module
    if hasattr(module, "get_base_layer"):
        layer = module.get_base_layer()
        weight = lora_weight(name, module)[1]
    else:
        weight = _dequantized(module)
    return F.linear(x, weight.to(dtype).float(), layer.bias)


def _dense_name(name: str) -> str:
    """A parameter's name in a dense checkpoint, without what PEFT puts around saved modules and trained rows."""
    head, wrapped, tail = name.partition(".modules_to_save.")
    if wrapped:
        return f"{head}.{tail.partition('.')[2]}"
    head, wrapped, _ = name.partition(".token_adapter.trainable_tokens_delta.")
    if wrapped:
        return f"{head}.weight"
    return name.replace(".token_adapter.base_layer.", ".").replace(".original_module.", ".")
