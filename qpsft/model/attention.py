"""Two things that transformers' SDPA attention lacks.

**Packed rows, piece by piece.** A row is made of several texts (pieces) that must not see each other. A block-diagonal
mask over a row of L tokens costs L x L products and bytes, most of them for blocks that are masked out, and keeps SDPA
from its causal kernels. One causal call per piece needs neither, gives a packed token the very kernel that its text
alone would get, and works without the FlashAttention package, which old cards (T4) and Windows do not have. It is an
attention implementation of transformers, `sdpa_by_piece`, which equals `sdpa` in all forwards that bring no
`seq_lengths`. A model has it while it is trained on packed rows.

**Repeated keys.** Most models have fewer key heads than query heads. Without a mask, transformers asks SDPA to group
the queries itself (`enable_gqa`). Not every fused kernel can do that: FlashAttention does from sm_80 on and in 16 bits,
where a build has it (those for Windows may not). Elsewhere (a T4; float32 anywhere) torch silently falls back to plain
products and a softmax, whose memory grows with the square of the length. With the keys repeated, as transformers does
beside a mask, its memory-efficient kernel serves. So torch is asked what it can do. See transformers' issue #48633 and
its pull request #45776.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of 16 bits."""

# --- packed rows, piece by piece ---

NAME = "sdpa_by_piece"
_without_mask = False


def fits(config: Any, max_length: int) -> bool:
    """Whether plain causal attention per piece is what a model with this config computes for rows of `max_length`."""
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    plain = layers <= {"full_attention", "sliding_attention"} and getattr(text, "attention_chunk_size", None) is None
    return config._attn_implementation in ("sdpa", NAME) and plain and (window is None or window >= max_length)


@contextlib.contextmanager
def attention_by_piece(causal_lm: nn.Module) -> Iterator[None]:
    """Inside the context the model attends by `sdpa_by_piece`, outside by its own implementation again."""
    before = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(NAME)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)


@contextlib.contextmanager
def no_mask() -> Iterator[None]:
    """Inside the context a model with `sdpa_by_piece` makes no mask; `seq_lengths` say which tokens see each other."""
    global _without_mask
    before, _without_mask = _without_mask, True
    try:
        yield
    finally:
        _without_mask = before


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _without_mask else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    seq_lengths: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`, piece by piece where there is no mask and `seq_lengths` are given.

    Args:
        query, key, value: (batch, heads, sequence, head size), as in transformers.
        seq_lengths: for every row the lengths of its pieces, in order; what is left of a row is padding.

    Returns: (batch, sequence, heads, head size), 0 in padding; and None.
    """
    if seq_lengths is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # split, not slices: the gradient of a slice is as large as what it was taken from, and a packed row has many
    rows = zip(query.split(1), key.split(1), value.split(1), seq_lengths, strict=True)
    return torch.cat([_row_attention(module, states, lengths, kwargs) for *states, lengths in rows]), None


def _row_attention(
    module: nn.Module, states: Sequence[Tensor], lengths: Sequence[int], kwargs: dict[str, Any]
) -> Tensor:
    """The output of one row, (1, sequence, heads, head size), from its query, key and value."""
    padding = states[0].shape[2] - sum(lengths)
    pieces = zip(*(t.split([*lengths, padding], dim=2) for t in states), strict=True)
    outputs = [sdpa_attention_forward(module, *next(pieces), None, **kwargs)[0] for _ in lengths]
    outputs.append(outputs[0].new_zeros(1, padding, *outputs[0].shape[2:]))
    return torch.cat(outputs, dim=1)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# --- repeated keys ---

_asked_by_transformers = sdpa_attention.use_gqa_in_sdpa


def repeat_keys_where_no_kernel_groups() -> None:
    """Makes transformers ask SDPA to group queries only where a fused kernel does, and repeat the keys elsewhere."""
    sdpa_attention.use_gqa_in_sdpa = _use_gqa


def _use_gqa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    return _asked_by_transformers(attention_mask, key, value) and kernel_groups(key, value)


def kernel_groups(key: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel of SDPA takes fewer key than query heads of this size and dtype (autocast's inside it).

    Args:
        key, value: (batch, key heads, sequence, head size); a key's and a value's size may differ.
    """
    if key.device.type != "cuda" or torch.version.hip:
        return True  # transformers' answer is left as it is
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else key.dtype
    return fused_grouping(key.device, dtype, key.shape[-1], value.shape[-1])


@functools.cache
def fused_grouping(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether torch has a fused kernel for training causal attention with two query heads to a key head.

    Args:
        size, value_size: of a key head and of a value head.
    """

    def states(heads: int, width: int) -> Tensor:
        return torch.empty(1, heads, 8, width, dtype=dtype, device=device, requires_grad=True)

    cuda = torch.backends.cuda
    asked = cuda.SDPAParams(states(2, size), states(1, size), states(1, value_size), None, 0.0, True, True)
    return cuda.can_use_flash_attention(asked) or cuda.can_use_efficient_attention(asked)
