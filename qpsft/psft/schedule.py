"""Which rows each optimizer step sees, and when the reference policy is renewed.

    step:      0 … W-1 | W …                                            | …
    phase:     warm-up | block 0: K mini-batches, gone through V times  | block 1 …
                       ^ snapshot                                       ^ snapshot

A *mini-batch* is one optimizer step's data: `mini_batch_size` consecutive rows of an endless stream of permutations of
the data (so every mini-batch is full, also at an epoch's end), or rows of several sources (`qpsft.data.mix`). A *block*
is K = `reference_steps` consecutive mini-batches, visited V = `num_iterations` times, from the second visit on in a new
order. Everything is a function of the seed, the step, and the steps at which a block ended early (`target_kl`; without
it there are none).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import has_length

from qpsft.data.mix import MiniBatches, MixedDataset, MixedMiniBatches, Permute
from qpsft.errors import RecipeError

MIXED_STRATEGIES = ("random", "sequential")


@dataclass(frozen=True)
class StepPosition:
    """Where an optimizer step stands in the schedule."""

    mini_batch: int  # index into the stream of mini-batches
    block: int | None  # None during SFT warm-up
    visit: int = 0  # 0 … V-1
    is_snapshot: bool = False  # the reference policy is renewed just before this step

    @property
    def is_warmup(self) -> bool:
        return self.block is None


@dataclass(frozen=True)
class _Start:
    """From here on blocks follow each other regularly."""

    step: int
    mini_batch: int
    block: int


@dataclass(frozen=True)
class _Block:
    """A step's block: its number, its first mini-batch, how many it has, and its steps before this one."""

    number: int
    mini_batch: int
    length: int
    offset: int


class BlockSchedule:
    """The order of mini-batches over a run.

    Args:
        num_rows: rows in the data set.
        mini_batch_size: rows per optimizer step (micro-batch × accumulation × processes).
        reference_steps: K.
        num_iterations: V.
        warmup_steps: W, optimizer steps of plain SFT before the first snapshot.
        total_steps: optimizer steps of the run. The last block takes what is left: it is shortened to as many
            mini-batches as can still be visited V times.
        seed: seed of the permutations.
        permute: `f(generator) -> list of row indices`, one pass over the data; default a uniform permutation.
        mini_batches: the stream of mini-batches, where it is not one source's; `permute` then has no effect.
    """

    def __init__(
        self,
        num_rows: int,
        mini_batch_size: int,
        *,
        reference_steps: int = 8,
        num_iterations: int = 1,
        warmup_steps: int = 0,
        total_steps: int,
        seed: int = 0,
        permute: Permute | None = None,
        mini_batches: MiniBatches | MixedMiniBatches | None = None,
    ):
        self.num_rows = num_rows
        self.mini_batch_size = mini_batch_size
        self.reference_steps = reference_steps
        self.num_iterations = num_iterations
        self.warmup_steps = min(warmup_steps, total_steps)
        self.total_steps = total_steps
        self.seed = seed
        self.mini_batches = mini_batches or MiniBatches(num_rows, mini_batch_size, seed, permute)
        self._starts = [_Start(self.warmup_steps, self.warmup_steps, 0)]

    @property
    def early_ends(self) -> list[int]:
        """The steps at which a block began because the one before it had ended early."""
        return [start.step for start in self._starts[1:]]

    def end_block(self, step: int) -> bool:
        """Ends the block of step - 1: `step` begins the next, on mini-batches not yet seen.

        Called for later and later steps. Returns: False in the warm-up, and where the block ends there anyway.
        """
        if step <= self.warmup_steps:
            return False
        block = self._block(step - 1)
        done = block.offset + 1
        early = done < block.length * self.num_iterations
        if early:
            self._starts.append(_Start(step, block.mini_batch + min(done, block.length), block.number + 1))
        return early

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that transformers counts as one epoch."""
        return self.mini_batches.per_epoch

    def position(self, step: int) -> StepPosition:
        """The position of optimizer step `step` (0-based)."""
        if step < self.warmup_steps:
            return StepPosition(mini_batch=step, block=None)
        block = self._block(step)
        visit, index = divmod(block.offset, block.length)
        return StepPosition(
            mini_batch=block.mini_batch + self._order(block.number, visit, block.length)[index],
            block=block.number,
            visit=visit,
            is_snapshot=block.offset == 0,
        )

    def _block(self, step: int) -> _Block:
        start = next(start for start in reversed(self._starts) if start.step <= step)
        full = self.reference_steps * self.num_iterations
        blocks, offset = divmod(step - start.step, full)
        left = self.total_steps - start.step - blocks * full
        length = max(1, min(self.reference_steps, math.ceil(left / self.num_iterations)))
        return _Block(start.block + blocks, start.mini_batch + blocks * self.reference_steps, length, offset)

    def _order(self, block: int, visit: int, length: int) -> list[int]:
        if visit == 0:
            return list(range(length))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block) * 1_009 + visit)
        return torch.randperm(length, generator=generator).tolist()

    def rows(self, step: int) -> list[int]:
        """The data set's row indices of optimizer step `step`, in order: `mini_batch_size` of them."""
        return self.mini_batches.rows(self.position(step).mini_batch)

    def unseen_share(self) -> float:
        """Share of the rows that the run never reaches, in [0, 1); of a mix, of the first source's."""
        return self.mini_batches.unseen_share(self.reached())

    def reached(self) -> int:
        """Mini-batches of the stream that the run takes."""
        return max((self.position(step).mini_batch for step in range(self.total_steps)), default=-1) + 1

    def check(self, *, takes_snapshots: bool) -> None:
        """Warns of a block longer than the run, and of rows that are never reached.

        Args:
            takes_snapshots: the loss needs a reference policy; False: only the order of the rows is used.

        Raises:
            RecipeError: the SFT warm-up takes the whole run.
        """
        left = self.total_steps - self.warmup_steps
        if takes_snapshots and left <= 0:
            raise RecipeError(
                f"sft_warmup_steps takes all {self.total_steps} optimizer steps, so PSFT never begins.",
                "Lower sft_warmup_steps, or use loss_type nll.",
            )
        block = self.reference_steps * self.num_iterations
        if takes_snapshots and block > left:
            warmup = " after the SFT warm-up" if self.warmup_steps else ""
            visits = f", gone through {self.num_iterations} times" if self.num_iterations > 1 else ""
            warnings.warn(
                f"The run has fewer optimizer steps than one block of PSFT, {left}{warmup} and {block}: the reference "
                f"policy is never renewed. A block takes "
                f"{self.reference_steps * self.mini_batch_size:,} rows{visits}, reference_steps x "
                f"{self.mini_batch_size:,} rows a step. Train longer (num_train_epochs), or lower reference_steps.",
                stacklevel=2,
            )
        unseen = self.unseen_share() if self.num_iterations > 1 else 0.0
        if unseen > 0:
            warnings.warn(
                f"With num_iterations = {self.num_iterations}, {self.total_steps} optimizer steps never reach "
                f"{unseen:.0%} of the rows; num_train_epochs = {self.num_iterations} would cover them all.",
                stacklevel=2,
            )


def row_order(strategy: str, dataset: Any, mini_batch_size: int) -> Permute | None:
    """`BlockSchedule`'s `permute` for transformers' `train_sampling_strategy`; None for `random`.

    Args:
        dataset: tokenized rows; a column `input_ids` where they are grouped by length.

    Raises:
        RecipeError: a strategy that blocks cannot take.
    """
    if strategy == "random":
        return None
    if strategy == "sequential":
        return lambda generator: list(range(len(dataset)))
    if strategy == "group_by_length":
        lengths = [len(ids) for ids in dataset["input_ids"]]
        return lambda generator: get_length_grouped_indices(lengths, mini_batch_size, generator=generator)
    raise RecipeError(
        f"train_sampling_strategy {strategy!r} cannot be combined with blocks.",
        "Use random, sequential or group_by_length.",
    )


def steps_per_epoch(dataset: Any, mini_batch_size: int) -> int:
    """Optimizer steps of an epoch: one pass over the rows, or over the first source of a `MixedDataset`."""
    if isinstance(dataset, MixedDataset):
        return dataset.mini_batches(mini_batch_size, seed=0).per_epoch
    return math.ceil(len(dataset) / mini_batch_size)


def planned_steps(args: Any, dataset: Any, mini_batch_size: int) -> int:
    """Optimizer steps of a run, before it begins. Args: as in `make_schedule`; a stream needs `max_steps`."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch(dataset, mini_batch_size))


def make_schedule(
    args: Any, dataset: Any, mini_batch_size: int, total_steps: int, *, check: bool = True
) -> BlockSchedule:
    """The schedule of a run.

    Args:
        args: PSFTConfig.
        dataset: tokenized rows, of a `MixedDataset` in its shares, or a stream: its rows come in their own order, and
            the schedule tells the phases.
        mini_batch_size, total_steps: as in `BlockSchedule`.
        check: False leaves the warnings of `BlockSchedule.check` out.

    Raises:
        RecipeError: as `BlockSchedule.check` and `row_order`.
    """
    strategy = str(args.train_sampling_strategy)
    mixed = None
    if isinstance(dataset, MixedDataset):
        if strategy not in MIXED_STRATEGIES:
            raise RecipeError(f"train_sampling_strategy {strategy!r} cannot mix sources.", "Use random or sequential.")
        mixed = dataset.mini_batches(mini_batch_size, args.order_seed, shuffle=strategy == "random")
    schedule = BlockSchedule(
        len(dataset) if has_length(dataset) else mini_batch_size,
        mini_batch_size,
        reference_steps=args.reference_steps,
        num_iterations=args.visits,
        warmup_steps=args.sft_warmup_steps_of(total_steps),
        total_steps=total_steps,
        seed=args.order_seed,
        permute=None if mixed else row_order(strategy, dataset, mini_batch_size),
        mini_batches=mixed,
    )
    if check:
        schedule.check(takes_snapshots=args.takes_snapshots)
    return schedule


class BlockSampler(Sampler[int]):
    """Yields one epoch's row indices in the order of a `BlockSchedule`.

    Args:
        schedule: called when iteration starts, since the number of steps is known only then.
        per_epoch, mini_batch_size: mini-batches of an epoch, and rows of each, as in the schedule.
        step: returns the optimizer steps done so far; the epoch they lie in is yielded from its beginning
            (transformers itself skips what a resumed run has done).
    """

    def __init__(
        self, schedule: Callable[[], BlockSchedule], per_epoch: int, mini_batch_size: int, step: Callable[[], int]
    ):
        self._schedule = schedule
        self._step = step
        self._length = per_epoch * mini_batch_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        schedule = self._schedule()
        first = self._step() // schedule.steps_per_epoch * schedule.steps_per_epoch
        for step in range(first, first + schedule.steps_per_epoch):
            yield from schedule.rows(step)
