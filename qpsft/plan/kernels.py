"""What meta tensors do not show: a device's attention kernels, autocast's casts, and the memory inside kernels.

Sources: torch's docs on autocast's operator lists and `aten/src/ATen/native/transformers/cuda/` (`sdp_utils.cpp` for
the choice, `flash_attn/flash_api.cpp` and `attention_backward.cu` for the buffers), and
`bitsandbytes/backends/{cuda,default}/ops.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from qpsft.model.attention import HALF
from qpsft.model.hardware import hardware_for

STAND_IN = "planned_fused_attention"
"""An attention implementation that takes FlashAttention's memory: its package need not be here."""

# Operators of a decoder that autocast runs in 16 bits, and those that CUDA's runs in float32.
_LOWER = {"linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm", "einsum", "conv1d"}
_FLOAT32 = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "pow", "__pow__", "rsqrt", "exp", "log", "cumsum", "sum",
    "prod", "norm", "reciprocal", "softplus",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What a step would run on.

    Attributes:
        device: "cuda" or "cpu".
        capability: CUDA's (major, minor), or ROCm's architecture name.
        autocast: mixed precision's dtype, or None.
        fused_lora: the LoRA linears are `qpsft.model.lora_linear`'s, where autocast is on.
    """

    device: str
    capability: tuple[int, int] | str
    autocast: torch.dtype | None
    fused_lora: bool = False

    @functools.cached_property
    def flash_attention(self) -> bool:
        """Whether torch has such a kernel for it: by the card, and by what this torch says of itself if it has CUDA."""
        in_build = torch.version.cuda is None or torch.backends.cuda.is_flash_attention_available()
        return in_build and hardware_for(self.device, self.capability).flash_attention

    @property
    def is_rocm(self) -> bool:
        return isinstance(self.capability, str)


class AsOnTarget(TorchFunctionMode):
    """Runs Python code of a model on meta tensors with the kernels and the casts that `target` would choose.

    Args:
        target: the device.
        masked: attention gets a mask. Code that branches on values, which meta tensors lack, gets the answer that leads
            there: transformers asks whether a mask can be left out.
    """

    def __init__(self, target: Target, masked: bool):
        super().__init__()
        self._target, self._masked = target, masked
        self._casts: dict[int, Tensor] | None = {}
        self._casting = target.autocast is not None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__bool__" and args[0].is_meta:
            return not self._masked
        if name == "__contains__" and args[0].is_meta:
            return False  # a pad among the tokens
        if name == "scaled_dot_product_attention":
            return attention(func, self._target, *args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm") and args[0].dtype != torch.bfloat16:
            # the same products one by one, which `meta` knows for any dtype
            return torch.ops.transformers.grouped_mm_fallback(args[0], args[1], kwargs["offs"])
        if self._casting:
            if name in _LOWER:
                args = tuple(self._lower(arg) for arg in args)
                kwargs = {key: self._lower(value) for key, value in kwargs.items()}
            elif name in _FLOAT32 and self._target.device == "cuda":
                args = tuple(arg.float() if _is(arg, HALF) else arg for arg in args)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._lower(item) for item in value)
        if not _is(value, (torch.float32,)):
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(self._target.autocast)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self._target.autocast)
        return self._casts[id(value)]

    @contextlib.contextmanager
    def without_casts(self) -> Iterator[None]:
        """As inside `torch.autocast(…, enabled=False)`."""
        before, self._casting = self._casting, False
        try:
            yield
        finally:
            self._casting = before

    def forward_done(self) -> None:
        """Autocast ends: the casts of weights that it kept are freed. Recomputation keeps none beyond its layer's."""
        self._casts = None


def _is(value: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return isinstance(value, Tensor) and value.dtype in dtypes


def attention(
    original: Callable,
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel `F.scaled_dot_product_attention` would choose on `target`, on meta tensors.

    query, key, value: (batch, heads, sequence, head_dim). Masks are booleans or additive, broadcast over heads.
    """
    if target.autocast is not None:
        query, key, value = (tensor.to(target.autocast) for tensor in (query, key, value))
    head_dim, half = query.shape[-1], query.dtype in HALF
    if target.device == "cpu":
        if dropout_p > 0 or value.shape[-1] != head_dim:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    same_size = value.shape[-1] == head_dim  # not so in DeepSeek's latent attention
    if target.is_rocm and not target.flash_attention:  # ROCm's torch has its fused kernels for the same cards
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is None and half and target.flash_attention and head_dim <= 256 and same_size:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]  # only flash attention groups queries: see qpsft.model.attention
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    mask = None
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        mask = _additive(attn_mask, query.dtype)
        if length % 16:
            mask = torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]
        mask = mask.expand(*query.shape[:3], length)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _stand_in(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """torch's own flash kernel, for any model; a cap on the scores (Gemma 2's) happens inside and takes no memory."""
    kwargs.pop("softcap", None)
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(STAND_IN, _stand_in)
AttentionMaskInterface.register(STAND_IN, lambda *args, **kwargs: None)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(mask, dtype=dtype) if mask.dtype == torch.bool else mask


def kernel_workspace(func: Any, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Bytes that a kernel allocates and frees again, and how many of them are dequantized weights and constants."""
    name = func.name() if hasattr(func, "name") else ""
    if name == "bitsandbytes::gemm_4bit":
        # Few tokens have a fused kernel on CUDA; else the weight is dequantized for one product.
        inside = math.prod(args[2]) * args[0].element_size()
        if kwargs.get("absmax_8bit") is not None:
            inside += 2 * 4 * kwargs["absmax_8bit"].numel()
        return inside, inside
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        query, key = args[1], args[2]
        batch, heads, length, head_dim = query.shape
        rounded = math.ceil(length / 128) * 128
        inside = 4 * batch * heads * rounded * (math.ceil(head_dim / 32) * 32 + 1)
        if key.shape[1] != heads:
            inside += 2 * batch * heads * key.shape[2] * head_dim * key.element_size()
        return inside, 0
    if name == "aten::_scaled_dot_product_efficient_attention_backward":
        query = args[1]
        return 4 * query.numel() + 4 * math.prod(query.shape[:3]), 0
    return 0, 0


def dequantizes(func: Any) -> bool:
    """Whether an operator's output is a dequantized weight, or its constants."""
    return hasattr(func, "name") and func.name().startswith("bitsandbytes::dequantize")
