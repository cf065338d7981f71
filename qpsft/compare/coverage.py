"""The share of the rows that an arm never sees: with several visits a run of the same length reaches fewer rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import datasets

from qpsft.psft.schedule import BlockSchedule
from qpsft.terminal import listed


def unseen_share(method: Mapping[str, Any], trainer: Any, epochs: float, rows: datasets.Dataset) -> float:
    """Share of the training rows that a run of this length never reaches, in [0, 1).

    Args:
        method: options of PSFTConfig that make the arm.
        trainer: the recipe's PSFTConfig; its batch size, `max_steps` and `packing` count.
        epochs: of the run.
        rows: tokenized. With packing, full rows of `max_length` tokens are assumed.
    """
    count, mini_batch = _row_count(trainer, rows), trainer.train_batch_size * trainer.gradient_accumulation_steps
    schedule = BlockSchedule(
        count,
        mini_batch,
        reference_steps=method.get("reference_steps", 1),
        num_iterations=method.get("num_iterations", 1),
        warmup_steps=method.get("sft_warmup_steps", 0),
        total_steps=run_steps(trainer, epochs, rows),
    )
    return schedule.unseen_share()


def run_steps(trainer: Any, epochs: float, rows: datasets.Dataset, share: float = 1.0) -> int:
    """Optimizer steps of a run on a share of the rows; arguments as of `unseen_share`."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    mini_batch = trainer.train_batch_size * trainer.gradient_accumulation_steps
    return math.ceil(epochs * math.ceil(share * _row_count(trainer, rows) / mini_batch))


def _row_count(trainer: Any, rows: datasets.Dataset) -> int:
    if not trainer.packing:
        return len(rows)
    return max(1, math.ceil(sum(map(len, rows["input_ids"])) / trainer.max_length))


def coverage_notes(unseen: Mapping[str, float], visits: Mapping[str, int], *, max_steps: int = -1) -> list[str]:
    """Sentences about arms that never see all rows; arms with the same share are in one.

    Args:
        unseen: arm -> `unseen_share`.
        visits: arm -> how often it visits a row.
        max_steps: the recipe's, which overrides epochs where it is above 0.
    """
    together: dict[tuple[float, int], list[str]] = {}
    for name, share in unseen.items():
        if share > 0:
            together.setdefault((share, visits[name]), []).append(name)
    notes = []
    for (share, times), names in together.items():
        why = f", since each is visited {times} times" if times > 1 else ""
        todo = "a larger --max_steps" if max_steps > 0 else f"--epochs {times}"
        notes.append(f"{listed(names)} saw {1 - share:.0%} of the rows{why}: {todo} shows them all.")
    return notes
