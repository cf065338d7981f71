"""Collects the logged numbers of `losses.loss_statistics` between two log lines, over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from qpsft.psft.losses import SUMS, mean_statistics


class RunStatistics:
    """Sums on the device, so that training never waits for a number; read once per log line.

    Attributes:
        num_tokens: tokens in the log lines since the run began, padding excluded, all processes.
    """

    _SUMS = ("num_items", "tokens", *SUMS)

    def __init__(self) -> None:
        self.num_tokens = 0
        self._parts: list[dict[str, Tensor]] = []
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Forgets what was not logged, and starts the clock."""
        self._parts = []
        self._since = time.perf_counter()

    def add(self, part: dict[str, Tensor], tokens: Tensor) -> None:
        """Adds a micro-batch: its `loss_statistics` and its number of tokens."""
        self._parts.append(part | {"tokens": tokens})

    def forget(self, count: int) -> None:
        """Drops the last `count` micro-batches: they will come again."""
        del self._parts[len(self._parts) - count :]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count in `tokens_per_second`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def tokens_so_far(self, accelerator: Accelerator) -> int:
        """`num_tokens` and the tokens since the last log line. Every process must call it."""
        own = sum((part["tokens"] for part in self._parts), torch.zeros((), device=accelerator.device))
        return self.num_tokens + int(accelerator.gather(own.reshape(1).long()).sum())

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Token means since the last call, `tokens_per_second` and `num_tokens`; empty if there was no micro-batch."""
        if not self._parts:
            return {}
        own = [torch.stack([part[name] for part in self._parts]).double().sum() for name in self._SUMS]
        own.append(torch.stack([part["ratio_max"] for part in self._parts]).double().max())
        every = accelerator.gather(torch.stack(own).unsqueeze(0)).cpu()
        parts = [dict(zip((*self._SUMS, "ratio_max"), row, strict=True)) for row in every]
        tokens = int(sum(float(part["tokens"]) for part in parts))
        self.num_tokens += tokens
        seconds = time.perf_counter() - self._since
        self.restart()
        return mean_statistics(parts) | {"tokens_per_second": tokens / seconds, "num_tokens": self.num_tokens}
