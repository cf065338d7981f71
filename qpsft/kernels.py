"""Which of bitsandbytes' matrix products a number of tokens gets: scoring and training must get the same ones.

On CUDA, `bitsandbytes.backends.cuda.ops` (0.50) multiplies by a 4-bit weight (N, K) in one of two ways, chosen by the
number of tokens M of the batch, the card, N and K: few tokens in one fused kernel, many by dequantizing the weight and
calling cuBLAS. The two add up in another order, and round differently. Its own heuristic gives, as the largest M of the
fused kernel over the linear layers of Llama-3.1-8B and Qwen2.5-0.5B:

| card | T4 | RTX 3060 | RTX 4060 | RTX 4090 | A100 | RTX 5090 |
| --- | --- | --- | --- | --- | --- | --- |
| M | 128 | 128 | 256 | 128 | 128 | 64 |

and never more than 1,536 (small layers on an A100). On the CPU there is one way (dequantize, then `F.linear`). So most
micro-batches lie above every threshold, and so do the larger scoring batches; only the smallest need care.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import nn

from qpsft.base_record import quantized_linears

MAX_FUSED_TOKENS = 1536


def fused_limits(model: nn.Module) -> list[int]:
    """The thresholds of a model on its device: M <= limit is a fused kernel, M > limit is not; ascending, distinct.

    Returns: one number for each that some 4-bit layer has; [] where all batches get the same kernel.
    """
    shapes = set()
    for module in quantized_linears(model).values():
        weight = module.weight
        state = getattr(weight, "quant_state", None)
        if weight.device.type == "cuda" and state is not None:
            dtype = getattr(module, "compute_dtype", None) or state.dtype
            shapes.add((weight.device.index or 0, dtype, *state.shape))
    if not shapes:
        return []
    from bitsandbytes.backends.cuda import ops

    is_fused = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    most = getattr(ops, "_gemm_4bit_custom_max_m", MAX_FUSED_TOKENS)
    if is_fused is None:  # another version: above this none is fused in any that is known
        return [most]
    return sorted({fused_limit(is_fused, most, *shape) for shape in shapes} - {0})


def fused_limit(is_fused, most: int, device: int, dtype: torch.dtype, rows: int, columns: int) -> int:
    """The largest number of tokens up to `most` for which `is_fused(device, dtype, tokens, rows, columns)`; 0: none."""
    return next((tokens for tokens in range(most, 0, -1) if is_fused(device, dtype, tokens, rows, columns)), 0)


def same_kernels(tokens: int, limits: list[int]) -> tuple[int, int | None]:
    """The smallest and the largest (None: any) number of tokens that get the kernels that `tokens` get."""
    i = bisect_left(limits, tokens)
    return (limits[i - 1] + 1 if i else 1), (limits[i] if i < len(limits) else None)
