"""Counts the bytes of the tensors that are alive, on any device; on `meta` nothing is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

MIB = 2**20


def cuda_block(nbytes: int) -> int:
    """Bytes that torch's CUDA allocator counts for a tensor of `nbytes`.

    Blocks are multiples of 512 bytes. From 10 MiB on a tensor gets a segment of its own, a multiple of 2 MiB, of which
    a remainder of up to 1 MiB is not split off. (`c10/cuda/CUDACachingAllocator.cpp`: kMinBlockSize, kMinLargeAlloc,
    kRoundLarge, kSmallSize.)
    """
    if nbytes >= 10 * MIB:
        segment = -(-nbytes // (2 * MIB)) * 2 * MIB
        if segment - nbytes <= MIB:
            return segment
    return -(-nbytes // 512) * 512


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside the context, until they are freed.

    Args:
        workspace: given an operator and its arguments, the bytes that its kernel allocates and frees again, which no
            output shows, and the part of them that is dequantized weights.
        block: given a storage's size, what the allocator counts for it.
        is_dequantization: whether an operator's outputs are dequantized weights or constants, counted apart too.

    Attributes:
        now, peak: bytes alive; the most since the last `mark`.
        dequantized_at_peak: of `peak`, bytes of dequantized weights, those inside kernels included.
    """

    def __init__(
        self,
        workspace: Callable[[Any, tuple, dict], tuple[int, int]] = lambda func, args, kwargs: (0, 0),
        block: Callable[[int], int] = int,
        is_dequantization: Callable[[Any], bool] = lambda func: False,
    ):
        super().__init__()
        self.now = self.peak = self.dequantized_at_peak = 0
        self._workspace, self._block, self._is_dequantization = workspace, block, is_dequantization
        self._dequantized = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            if tensor.untyped_storage() not in self._known:
                self._known[tensor.untyped_storage()] = 0  # made before: a weight, an input
        result = func(*args, **kwargs)
        dequantized = self._is_dequantization(func)
        for tensor in _tensors((result,)):
            self._add(tensor.untyped_storage(), dequantized)
        inside, dequantized_inside = self._workspace(func, args, kwargs)
        self._note(inside, dequantized_inside)
        return result

    def _add(self, storage: torch.UntypedStorage, dequantized: bool) -> None:
        if storage in self._known:
            return
        size = self._block(storage.nbytes())
        self._known[storage] = size
        self.now += size
        self._dequantized += size if dequantized else 0
        weakref.finalize(storage, self._free, size, dequantized).atexit = False

    def _free(self, size: int, dequantized: bool) -> None:
        self.now -= size
        self._dequantized -= size if dequantized else 0

    def _note(self, inside: int, dequantized: int) -> None:
        if self.now + inside > self.peak:
            self.peak = self.now + inside
            self.dequantized_at_peak = self._dequantized + dequantized

    def mark(self) -> None:
        """Starts a new peak."""
        self.peak, self.dequantized_at_peak = self.now, self._dequantized


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
