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
        self._measured: list[tuple[Tensor, Tensor]] = []
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Forgets what was not logged, and starts the clock."""
        self._parts, self._measured = [], []
        self._since = time.perf_counter()

    def add(self, part: dict[str, Tensor], tokens: Tensor) -> None:
        """Adds a micro-batch: its `loss_statistics`, with `kl_to_base` where it is known, and its number of tokens."""
        self._parts.append(part | {"tokens": tokens})

    def add_measured(self, kl_to_base: Tensor, num_items: Tensor) -> None:
        """Adds a measurement of the divergence from the base: its sum over tokens, and how many they are."""
        self._measured.append((kl_to_base, num_items))

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
        """Token means since the last call, `tokens_per_second` and `num_tokens`; empty if there was no micro-batch.

        `kl_to_base` is among them where it is known: the mean over the tokens of `base_kl`'s micro-batches, or of
        those it was measured on.
        """
        if not self._parts:
            return {}
        own = [torch.stack([part[name] for part in self._parts]).double().sum() for name in self._SUMS]
        own += [torch.stack([part["ratio_max"] for part in self._parts]).double().max(), *self._kl_to_base()]
        every = accelerator.gather(torch.stack(own).unsqueeze(0)).cpu()
        parts = [dict(zip((*self._SUMS, "ratio_max", "kl", "kl_items"), row, strict=True)) for row in every]
        tokens = int(sum(float(part["tokens"]) for part in parts))
        self.num_tokens += tokens
        seconds = time.perf_counter() - self._since
        self.restart()
        kl, kl_items = (sum(float(part[name]) for part in parts) for name in ("kl", "kl_items"))
        means = mean_statistics(parts) | ({"kl_to_base": kl / kl_items} if kl_items else {})
        return means | {"tokens_per_second": tokens / seconds, "num_tokens": self.num_tokens}

    def _kl_to_base(self) -> tuple[Tensor, Tensor]:
        """The sum of the divergence from the base over the tokens it is known of, and how many they are."""
        known = [(part["kl_to_base"], part["num_items"]) for part in self._parts if "kl_to_base" in part]
        zero = torch.zeros((), dtype=torch.float64, device=self._parts[0]["nll"].device)
        kl, num_items = zip((zero, zero), *known, *self._measured, strict=True)
        return torch.stack([x.double() for x in kl]).sum(), torch.stack([x.double() for x in num_items]).sum()
