"""Memory of TRL's tiled LM head (`trl.kernels.chunked_logprob`), as it is on CUDA and on the CPU, on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE_COLUMNS

from qpsft.plan.kernels import Target

TILE_ROWS = chunked_logprob.TOKEN_CHUNK_SIZE


def logprobs(hidden: Tensor, head: nn.Module, target: Target, softcap: float | None) -> Tensor:
    """Log-probabilities as `qpsft.psft.forward.policy_forward` computes them, every token but the first supervised.

    Args:
        hidden: (batch, sequence, hidden) last hidden states, on the meta device.
        head: the LM head.
        target: the device.
        softcap: the architecture's `final_logit_softcapping`.

    Returns:
        (batch, sequence - 1) float32, with gradient where `hidden` has one.
    """
    hidden = hidden[:, :-1]
    shape = hidden.shape[:2]
    flat = _Supervised.apply(hidden)
    labels = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    on_cpu = target.device == "cpu"
    in_torch = {"HAS_SOFTCAP": softcap is not None} if on_cpu or _cuda_without_triton() else None
    return _TiledHead.apply(flat, head.weight, labels, target.autocast or flat.dtype, in_torch, on_cpu).view(shape)


def _cuda_without_triton() -> bool:
    """Whether torch has CUDA here and no Triton: Windows, no compiler. A card elsewhere is taken to have Triton."""
    return torch.version.cuda is not None and not chunked_logprob._TRITON_AVAILABLE


class _Supervised(torch.autograd.Function):
    """`hidden[mask]` with every token supervised: a copy, and in the backward a tensor it is scattered into."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(hidden.shape[0] * hidden.shape[1], hidden.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(ctx.shape)


class _TiledHead(torch.autograd.Function):
    """The allocations of `ChunkedLogProbFunction`, over one tile: the others use the same memory.

    Where Triton folds the tiles they need nothing else; elsewhere TRL's own torch code is run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        in_torch: dict | None,
        on_cpu: bool,
    ) -> Tensor:
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]
        tile = _tile(hidden, dtype)
        part = weight[:TILE_COLUMNS].to(dtype)
        if in_torch is not None:
            rows, columns = len(tile), len(part)
            chunked_logprob._forward_tile(
                tile[:, :columns], 0, labels[:rows], *(part[:rows] for part in statistics), 0, columns, 1.0, 1.0, 1.0,
                HAS_ENTROPY=True, HAS_LOG_SUM_SQ_PROBS=False, HAS_MEAN_LOGITS=False, HAS_IS_TOP1=True, BLOCK_SIZE=0,
                **in_torch,
            )  # fmt: skip
        log_z, logprobs, entropy = (torch.empty_like(statistics[0]) for _ in range(3))
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.dtype, ctx.in_torch, ctx.on_cpu = dtype, in_torch, on_cpu
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z, entropy = ctx.saved_tensors
        grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32)
        grad_weight = weight.new_empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = _tile(hidden, ctx.dtype)
        part = weight[:TILE_COLUMNS].to(ctx.dtype)
        if ctx.in_torch is not None:
            rows, columns = len(tile), len(part)
            chunked_logprob._backward_tile(
                tile[:, :columns], 0, labels[:rows], log_z[:rows], entropy[:rows], grad[:rows], log_z[:rows], 0,
                columns, 1.0, 1.0, 1.0, HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, BLOCK_SIZE=0, **ctx.in_torch,
            )  # fmt: skip
            if ctx.on_cpu:  # CUDA adds 16-bit products to a float32 sum without copies
                grad_hidden[:rows].addmm_(tile[:, :columns].float(), part.float())
        weight_grad = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), weight_grad, None, None, None, None


def _tile(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty(min(len(hidden), TILE_ROWS), TILE_COLUMNS, dtype=dtype)
