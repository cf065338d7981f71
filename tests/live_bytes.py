"""How much memory the tensors of a piece of code take at most, on any device: an allocator's peak, seen from torch."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive; what kernels use for themselves is not seen.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive and storage._cdata not in given:
                    self._alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


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
