"""What TRL's tiled LM head does not give, from the hidden states before it: never more logits at once than a tile has.

TRL's head gives the log-probability of each label and the entropy of the whole distribution. Here are the entropy over
the 20 likeliest tokens, for EAFT, and the divergence from the base's distribution.
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

TILE = 2**24
"""Logits at once: 16M floats, 64 MB in float32; 130 tokens of a vocabulary of 128,000."""


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
