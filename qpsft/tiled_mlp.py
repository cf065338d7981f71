"""The MLP of every layer, run in tiles of tokens, so that its wide intermediate never exists for a whole long row.

    x (batch, sequence, hidden) -> tiles of 2,048 tokens -> MLP, one tile at a time -> joined again

The MLP takes every token for itself, so this is exact up to float rounding, gradients included. In training each tile
is recomputed in the backward (`torch.utils.checkpoint`), which under gradient checkpointing costs nothing more: the
layer's own recomputation stops before the tiles, which are computed when their gradient comes. The idea is TiledMLP of
Arctic Long Sequence Training (arXiv 2506.13996), which DeepSpeed implements for its own trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NAMES = ("mlp", "feed_forward", "ffn")
ROUTERS = ("gate", "router", "experts")
TILE = 2048  # tokens; fewer make slow products, and other kernels (qpsft.kernels). Each tile dequantizes the weights


def is_tiled(row: int) -> bool:
    """Whether rows of that many tokens are run in tiles: from two tiles on."""
    return row >= 2 * TILE


def tile_mlps(model: nn.Module) -> list[str]:
    """Makes the MLPs of a model run long rows in tiles. Idempotent.

    Args:
        model: a transformers model, with or without an adapter in it. Mixtures of experts are left as they are: each
            expert sees a part of the tokens already.

    Returns: the names of the MLPs; [] when there is none that can be tiled.
    """
    tiled = []
    for name, module in model.named_modules():
        is_mlp = name.rpartition(".")[2] in NAMES and any(isinstance(m, nn.Linear) for m in module.modules())
        if not is_mlp or any(hasattr(module, router) for router in ROUTERS):
            continue
        if not isinstance(module.forward, functools.partial):
            module.forward = functools.partial(_in_tiles, module.forward)
        tiled.append(name)
    return tiled


def _in_tiles(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dim() < 3 or not is_tiled(x.shape[-2]):
        return forward(x)
    tokens = x[..., 0].numel()
    parts = x.reshape(1, tokens, x.shape[-1]).chunk(-(-tokens // TILE), dim=1)
    if torch.is_grad_enabled():
        outputs = [checkpoint(forward, part, use_reentrant=False) for part in parts]
    else:
        outputs = [forward(part) for part in parts]
    return torch.cat(outputs, dim=1).view(x.shape)
