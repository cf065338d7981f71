"""The model of a run on the `meta` device: every module and shape as loading and PEFT would make them, no memory.

bitsandbytes' own quantizer runs on the meta weights, so what it would store (packed weights, constants, code tables) is
there with its exact shapes, and its kernels' outputs and dequantized weights have theirs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpsft.errors import BaseModelError, one_line
from qpsft.model.adapter import add_adapter
from qpsft.model.base import bitsandbytes_config, modules_to_skip
from qpsft.model.base_record import quantized_linears
from qpsft.model.folder import check_stored_quantization
from qpsft.model.tiled_mlp import tile_mlps
from qpsft.recipe.arguments import LoraArguments, ModelArguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class WeightBytes:
    """Exact bytes of a loaded model with its adapter, and how many tensors they are.

    Attributes:
        quantized: packed 4-bit weights.
        constants: what goes with them: absmax and its own constants, offsets, code tables.
        unquantized: every other frozen weight and buffer, shared ones once.
        trainable: shapes of the trained parameters (the adapter), all float32.
        sizes: bytes of each frozen tensor.
        parameters: number of the base's weights, quantized ones by the shape they stand for.
        largest: weights in the largest quantized layer.
        largest_tensor: weights in the largest tensor of all, mostly the embedding.
    """

    quantized: int
    constants: int
    unquantized: int
    trainable: list[torch.Size]
    sizes: list[int]
    parameters: int
    largest: int
    largest_tensor: int

    @property
    def adapter(self) -> int:
        """Bytes of the trained parameters, and of their gradients, and of a copy of them."""
        return 4 * sum(shape.numel() for shape in self.trainable)


def build_skeleton(
    config: PretrainedConfig,
    model: ModelArguments,
    lora: LoraArguments,
    dtype: torch.dtype,
    *,
    tiled_mlp: bool = False,
    trust_remote_code: bool = False,
) -> PeftModel:
    """The PEFT model that `load_base` and `add_adapter` would make, on the meta device.

    Args:
        config: of the base.
        model: quantization and attention implementation.
        lora: the adapter's options.
        dtype: compute dtype, and dtype of what is not quantized.
        tiled_mlp: run the MLPs of long rows in tiles.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        BaseModelError: transformers cannot build the model from its config; the adapter's options do not fit it.
        RecipeError: PEFT refuses them for this architecture.
    """
    base = _build_base(config, model, dtype, trust_remote_code)
    with torch.device("meta"):
        peft_model = add_adapter(base, lora)
    if tiled_mlp:
        tile_mlps(peft_model)
    return peft_model.train()


def _build_base(
    config: PretrainedConfig, model: ModelArguments, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    prequantized = getattr(config, "quantization_config", None)
    if prequantized is not None:
        del config.quantization_config
    kwargs = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    try:
        with torch.device("meta"), no_init_weights():
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
            base.tie_weights()  # left out with the initial values
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise BaseModelError(
            f"No causal language model can be built from this config.json ({config.model_type}): {one_line(error)}",
            "Check the config, or upgrade transformers.",
        ) from error
    if prequantized is not None or model.quantization != "none":
        _quantize(base, model, dtype, prequantized)
    _keep_in_float32(base, dtype)
    return base.requires_grad_(False)


def _quantize(base: PreTrainedModel, model: ModelArguments, dtype: torch.dtype, prequantized: Any) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    if prequantized is not None:
        settings = prequantized if isinstance(prequantized, dict) else prequantized.to_dict()
        check_stored_quantization(settings, "The base's config")
        quantization = BitsAndBytesConfig.from_dict(settings)
    else:
        skip = modules_to_skip(base)
        quantization = bitsandbytes_config(model.quantization, model.double_quant, dtype, skip)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=base, device_map=None)
    quantizer.postprocess_model(base)
    with _own_code_table():
        for layer in quantized_linears(base).values():
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(dtype)
            _round(layer, quantization, dtype)


@contextlib.contextmanager
def _own_code_table() -> Iterator[None]:
    """bitsandbytes keeps the table of its first quantization for all later ones: not one without values."""
    from bitsandbytes import functional

    before = dict(functional.name2qmap)
    functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    try:
        yield
    finally:
        functional.name2qmap.clear()
        functional.name2qmap.update(before)


def _round(layer: nn.Module, quantization: Any, dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = layer.weight
    values = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
    layer.compute_dtype, layer.compute_type_is_set = dtype, True
    weight.data, weight.quant_state = functional.quantize_4bit(
        values,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
        quant_storage=quantization.bnb_4bit_quant_storage,
    )
    if getattr(functional.name2qmap.get("dynamic"), "is_meta", False):  # kept for the next weight, a real one's too
        del functional.name2qmap["dynamic"]
    weight.bnb_quantized = True
    layer.quant_state = weight.quant_state


def _keep_in_float32(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """What loading keeps in float32 whatever the dtype asked for, by the architecture's own list."""
    patterns = base._get_dtype_plan(dtype)
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point() and any(pattern in name.split(".") for pattern in patterns):
            parameter.data = parameter.data.float()


def weight_bytes(peft_model: nn.Module) -> WeightBytes:
    """The exact bytes of a model that `build_skeleton` made, or of a loaded one with its adapter."""
    base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    layers = quantized_linears(base)
    packed = {id(layer.weight) for layer in layers.values()}
    constants = {id(tensor): tensor for layer in layers.values() for tensor in _constants(layer)}
    rest = [tensor for tensor in _frozen(peft_model) if id(tensor) not in packed]
    trainable = [parameter.shape for parameter in peft_model.parameters() if parameter.requires_grad]
    quantized_bytes = [layer.weight.nbytes for layer in layers.values()]
    constant_bytes = [tensor.nbytes for tensor in constants.values()]
    rest_bytes = [tensor.nbytes for tensor in rest]
    logical = [layer.out_features * layer.in_features for layer in layers.values()]
    return WeightBytes(
        quantized=sum(quantized_bytes),
        constants=sum(constant_bytes),
        unquantized=sum(rest_bytes),
        trainable=trainable,
        sizes=quantized_bytes + constant_bytes + rest_bytes,
        parameters=sum(logical) + sum(t.numel() for t in rest if isinstance(t, nn.Parameter)),
        largest=max(logical, default=0),
        largest_tensor=max([*logical, *(t.numel() for t in rest)]),
    )


def _frozen(model: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in model.parameters() if not parameter.requires_grad)
    yield from model.buffers()


def _constants(layer: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside a layer's packed weight; code tables that layers share are the same tensor."""
    state = layer.weight.quant_state
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors
