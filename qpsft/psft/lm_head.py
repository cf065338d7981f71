"""What TRL's tiled LM head does not give, from the hidden states before it: never more logits at once than a tile has.

TRL's head gives the log-probability of each label and the entropy of the whole distribution. Here are the entropy over
the 20 likeliest tokens, for EAFT, and the divergence from the base's distribution, for `base_kl` and `kl_to_base`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qpsft.psft.losses import TOP

TILE = 2**23
"""Logits at once: 8M floats, 32 MiB in float32; 65 tokens of a vocabulary of 128,000."""


@dataclass(frozen=True)
class LMHead:
    """The LM head of a causal LM: its tensors, and how it makes logits, as TRL's tiled head does.

    Attributes:
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        scale: the logits' factor.
        softcap: c of c tanh(logits / c), after the factor; None: none.
        dtype: what the product is computed in.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, causal_lm: nn.Module, hidden: Tensor) -> LMHead:
        """The head of a model, to be called inside its forward: autocast decides the dtype there.

        Args:
            causal_lm: without PEFT's or another wrapper. A sharded head is gathered: every process must call it.
            hidden: the hidden states it will be applied to.
        """
        head = causal_lm.get_output_embeddings()
        config = causal_lm.config.get_text_config()
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        return cls(
            _whole(head.weight),
            _whole(head.bias),
            scale=logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            dtype=torch.get_autocast_dtype(device) if autocast else hidden.dtype,
        )

    def cast(self) -> LMHead:
        """The same with its tensors in `dtype`, so that they are not cast for every tile."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return dataclasses.replace(self, weight=self.weight.to(self.dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden size) -> (tokens, vocabulary), in float32 at least."""
        head = self.cast()
        logits = nn.functional.linear(hidden.to(self.dtype), head.weight, head.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of logits by what the product of weight and hidden state gave."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)

    def tiles(self, tokens: int) -> Iterator[slice]:
        """Slices that cut so many tokens into tiles of at most `TILE` logits, one token at least."""
        size = max(1, TILE // len(self.weight))
        return (slice(start, start + size) for start in range(0, tokens, size))


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def logit_scale(config: Any) -> float:
    """The factor between a model's LM head and its logits. Args: its text config. TRL's tiled head has it inside."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


@torch.no_grad()
def top_entropy(hidden: Tensor, head: LMHead) -> Tensor:
    """Entropy of the softmax over the 20 largest logits of each token (arXiv 2601.02151).

    Args:
        hidden: (tokens, hidden size).

    Returns: (tokens,) float32 at least, nats, from 0 to ln 20; without gradient.
    """
    head = head.cast()
    values = [hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    for tile in head.tiles(len(hidden)):
        logits = head.logits(hidden[tile])
        logprobs = logits.topk(min(TOP, logits.shape[-1]), dim=-1).values.log_softmax(-1)
        values.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(values)


def kl_to_base(hidden: Tensor, head: LMHead, base_hidden: Tensor, base_head: LMHead) -> Tensor:
    """Sum over tokens of KL(base || policy) = sum_v base(v) (log base(v) - log policy(v)), over the whole vocabulary.

    Args:
        hidden: (tokens, hidden size), of the policy. Where it needs a gradient, that is made in the forward already,
            tile by tile, so that the backward has no logits to make again.
        head: the policy's.
        base_hidden: (tokens, hidden size), of the base on the same tokens; a constant.
        base_head: the base's.

    Returns: scalar, float32 at least, nats; with gradient to `hidden` and the policy's head.
    """
    return _KLToBase.apply(hidden, head.weight, head.bias, head, base_hidden, base_head)


class _KLToBase(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LMHead,
        base_hidden: Tensor,
        base_head: LMHead,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        inputs = (hidden, weight, bias)
        needed = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip(inputs, needed, strict=True)]
        head, base_head = head.cast(), base_head.cast()
        total = hidden.new_zeros((), dtype=dtype)
        for tile in head.tiles(len(hidden)):
            logits = head.logits(hidden[tile])
            kl, of_product = _kl_of_tile(logits, base_head.logits(base_hidden[tile]), head if any(needed) else None)
            del logits
            total += kl
            if of_product is not None:
                _add_gradients(grads, of_product.to(head.dtype), hidden[tile], tile, head)
            del of_product  # before the next tile is made
        ctx.grads, ctx.dtypes = grads, [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        return (*(None if grad is None else (grad * of_total).to(dtype) for grad, dtype in pairs), None, None, None)


def _kl_of_tile(logits: Tensor, base_logits: Tensor, head: LMHead | None) -> tuple[Tensor, Tensor | None]:
    """Sum of KL(base || policy), and its gradient by what the policy's head multiplies to; (tokens, vocabulary) all.

    Args:
        head: the policy's; None: no gradient is needed.
    """
    logprobs, base_logprobs = logits.log_softmax(-1), base_logits.log_softmax(-1)
    base_probs = base_logprobs.exp()
    kl = base_logprobs.sub_(logprobs).mul_(base_probs).sum()
    return kl, None if head is None else logprobs.exp_().sub_(base_probs).mul_(head.slope(logits))


def _add_gradients(grads: list[Tensor | None], of_product: Tensor, hidden: Tensor, tile: slice, head: LMHead) -> None:
    """Adds a tile's gradients. Args: `grads` of hidden states, weight, bias; `of_product` (tokens, vocabulary)."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[tile] = of_product @ head.weight
    if of_weight is not None:
        of_weight += of_product.t() @ hidden.to(head.dtype)
    if of_bias is not None:
        of_bias += of_product.sum(0, dtype=of_bias.dtype)
