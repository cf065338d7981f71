"""How much memory the tensors of a piece of code take at most, on any device: an allocator's peak, seen from torch."""

from __future__ import annotations

import torch

from qpsft.plan.live_bytes import LiveBytes


@torch.no_grad()
def peak_of_scoring(reference, batches, token_budget: int) -> int:
    """Bytes that `ReferencePolicy.score` takes at most."""
    with LiveBytes() as live:
        reference.score(batches, token_budget=token_budget)
    return live.peak


def peak_of_training(forward, model, batch) -> int:
    """Bytes that a forward and backward take at most, gradients included; leaves no gradients behind."""
    with LiveBytes() as live:
        (-forward(model, batch).log_probs.sum()).backward()
    model.zero_grad()
    return live.peak
