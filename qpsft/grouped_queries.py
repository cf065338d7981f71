"""Attention with fewer key heads than query heads, where torch has no fused kernel for it.

Without a mask, transformers asks SDPA to group the queries itself (`enable_gqa`). Of torch's CUDA kernels only
FlashAttention and cuDNN do, from sm_80 on and in 16 bits; elsewhere (a T4; float32 anywhere) torch silently falls back
to plain products and a softmax, whose memory grows with the square of the length. With the keys repeated, as
transformers does beside a mask, its memory-efficient kernel serves. See transformers' issue #48633 and its pull
request #45776.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention

HALF = (torch.bfloat16, torch.float16)
_asked_by_transformers = sdpa_attention.use_gqa_in_sdpa


def repeat_keys_where_no_kernel_groups() -> None:
    """Makes transformers ask SDPA to group queries only where a fused kernel does, and repeat the keys elsewhere."""
    sdpa_attention.use_gqa_in_sdpa = _use_gqa


def _use_gqa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    return _asked_by_transformers(attention_mask, key, value) and kernel_groups(key)


def kernel_groups(key: Tensor) -> bool:
    """Whether SDPA's kernel for a key's device and dtype (autocast's inside it) takes fewer key than query heads."""
    if key.device.type != "cuda" or torch.version.hip:
        return True  # transformers' answer is left as it is
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else key.dtype
    return dtype in HALF and torch.cuda.get_device_capability(key.device) >= (8, 0)
