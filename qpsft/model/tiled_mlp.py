"""The MLP of every layer, run in tiles of tokens, so that its wide intermediate never exists for a whole long row.

    x (batch, sequence, hidden) -> tiles of 2,048 tokens -> MLP, one tile at a time -> joined again

An MLP treats every token alone, so this is exact up to float rounding, gradients included. In training a tile is
computed again in the backward pass, when its gradient comes. Under (non-reentrant) gradient checkpointing the MLP is
recomputed only there: x is saved before the tiles are run, and the recomputation of a layer stops once all that was
saved is there again. (`torch.utils.checkpoint` around every tile would compute the MLP three times instead of twice.)
The idea is TiledMLP of Arctic Long Sequence Training (arXiv 2506.13996), which DeepSpeed has for its own engine.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import TrainerCallback

NAMES = ("mlp", "feed_forward", "ffn")
ROUTERS = ("gate", "router", "experts")
TILE = 2048
"""Tokens. Each tile dequantizes the weights anew, and with fewer tokens the products are slow or take other kernels
(`qpsft.psft.scoring`)."""


def is_tiled(row: int) -> bool:
    """Whether rows of that many tokens are run in tiles: from two tiles on."""
    return row >= 2 * TILE


def tile_mlps(model: nn.Module) -> list[str]:
    """Makes the MLPs of a model run long rows in tiles. Idempotent.

    Args:
        model: a transformers model, with or without an adapter in it. Mixtures of experts are left as they are: each
            expert sees a part of the tokens already. So are MLPs that take more than x (BLOOM's and MPT's add the
            residual themselves).

    Returns: the names of the MLPs; [] when there is none that can be tiled.
    """
    tiled = []
    for name, module in model.named_modules():
        is_mlp = name.rpartition(".")[2] in NAMES and any(isinstance(m, nn.Linear) for m in module.modules())
        if not is_mlp or any(hasattr(module, router) for router in ROUTERS):
            continue
        if not isinstance(module.forward, functools.partial):
            if len(inspect.signature(module.forward).parameters) != 1:
                continue
            module.forward = functools.partial(_in_tiles, module, module.forward)
        tiled.append(name)
    return tiled


class TileMlpsAgain(TrainerCallback):
    """Tiles what has been given another forward since: Liger gives every MLP one when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        tile_mlps(model)


def _in_tiles(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dim() < 3 or not is_tiled(x.shape[-2]):
        return forward(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return _joined(forward, x)
    saved = _Saved.apply(x, x.new_empty(0, requires_grad=True))
    return _Tiles.apply(forward, saved.grad_fn, x, *trained)


def _autocast_now(kind: str) -> Callable[[], contextlib.AbstractContextManager]:
    """The current autocast of a device type, to be entered again; the meta device, where plans are made, has none."""
    if kind == "meta":
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return functools.partial(torch.autocast, device_type=kind, enabled=enabled, dtype=dtype)


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    tokens = x[..., 0].numel()
    return x.reshape(1, tokens, x.shape[-1]).chunk(-(-tokens // TILE), dim=1)


def _joined(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(tile) for tile in _tiles(x)], dim=1).view(x.shape)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Saved(torch.autograd.Function):
    """Keeps x for `_Tiles`. It is a node of its own, because a node saves its tensors only after its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, always_in_graph: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return always_in_graph.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class _Tiles(torch.autograd.Function):
    """The MLP tile by tile, forward without a graph, backward with one tile's graph at a time."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], saved: Any, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.mlp, ctx.saved, ctx.trained = forward, saved, trained
        ctx.autocast = _autocast_now(x.device.type)
        ctx.random = torch.get_rng_state(), get_device_states(x)  # dropout must draw the same again
        return _joined(forward, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (x,) = ctx.saved.saved_tensors
        x_gradients = []
        totals = [torch.zeros_like(p) if p.requires_grad else None for p in ctx.trained]
        cpu_state, (devices, states) = ctx.random
        kind = x.device.type
        # TRL's activation offloading is active here too, and would move every tile to the host and back
        no_hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
        with no_hooks, torch.random.fork_rng(devices, device_type=kind), torch.enable_grad(), ctx.autocast():
            torch.set_rng_state(cpu_state)
            set_device_states(devices, states, device_type=kind)
            for tile, output_gradient in zip(_tiles(x.detach()), _tiles(gradient), strict=True):
                tile = tile.detach().requires_grad_()
                inputs = (tile, *ctx.trained)
                tile_gradient, *others = torch.autograd.grad(ctx.mlp(tile), inputs, output_gradient, allow_unused=True)
                x_gradients.append(tile_gradient)
                for total, part in zip(totals, others, strict=True):
                    if part is not None:
                        total.add_(part)
        return None, None, torch.cat(x_gradients, dim=1).view(x.shape), *totals
