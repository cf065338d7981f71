"""Several sources of rows in stated shares of every mini-batch: their rows as one data set, and the order they come in.

    mini-batch   0              1              2               size 4, shares 3/8 and 5/8
    first        1              2              1               1.5 rows each, rounded; what is missing is carried over
    second       3              2              3               2.5 rows each

Every source is an endless stream of permutations of its own rows; a mini-batch takes the next rows of each. How many is
rounded by largest remainder, and what a source got too little or too much is carried to the next mini-batch, so that
the shares of a run are those that were asked for. An epoch is one pass over the first source. Everything is a function
of the seed and the mini-batch's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import datasets
import pyarrow
import torch

from qpsft.data.tokenize import First, TokenizedRows, load_dataset
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.sources import mix_sources, replay_source, whole_shares

Permute = Callable[[torch.Generator], list[int]]

PASSES_KEPT = 3
"""Permutations that a stream remembers: it moves on, and a block spans few passes."""
SOURCE_SEEDS = 2**33
"""Distance between the seeds of two sources: more than there are seeds and passes."""
MIXING_SEEDS = 2**48
"""Where the seeds of the order inside mini-batches begin."""


class RowStream:
    """Rows 0 … n-1 in a new order for every pass, without end.

    Args:
        num_rows: n.
        seed: pass p is permuted by a generator of seed + p.
        permute: `f(generator) -> list of row indices`, one pass; default a uniform permutation.
    """

    def __init__(self, num_rows: int, seed: int, permute: Permute | None = None):
        self.num_rows = num_rows
        self.seed = seed
        self._permute = permute or (lambda generator: torch.randperm(num_rows, generator=generator).tolist())
        self._passes: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        """The row at this position of the stream, from 0."""
        data_pass, index = divmod(position, self.num_rows)
        if data_pass not in self._passes:
            if len(self._passes) >= PASSES_KEPT:
                self._passes.pop(min(self._passes))
            generator = torch.Generator().manual_seed(self.seed + data_pass)
            self._passes[data_pass] = self._permute(generator)
        return self._passes[data_pass][index]


class MiniBatches:
    """The mini-batches of one source: consecutive rows of its stream, so that every one is full.

    Args:
        num_rows, seed, permute: as in `RowStream`.
        size: rows of a mini-batch.
    """

    def __init__(self, num_rows: int, size: int, seed: int, permute: Permute | None = None):
        self.size = size
        self.per_epoch = -(-num_rows // size)
        self._stream = RowStream(num_rows, seed, permute)

    def rows(self, mini_batch: int) -> list[int]:
        """Row indices of a mini-batch (from 0), in order: `size` of them."""
        return [self._stream[position] for position in range(mini_batch * self.size, (mini_batch + 1) * self.size)]

    def unseen_share(self, mini_batches: int) -> float:
        """Share of the rows that are in none of the first `mini_batches`, in [0, 1)."""
        return max(0.0, 1.0 - mini_batches * self.size / self._stream.num_rows)


class MixedMiniBatches:
    """The mini-batches of several sources. Rows are numbered through, source after source.

    Args:
        num_rows: rows of each source.
        shares: of each source; they add up to 1.
        size: rows of a mini-batch.
        seed: of the orders of the sources, and of the order inside mini-batches.
        shuffle: False takes each source in its own order, and the sources one after the other.
    """

    def __init__(
        self, num_rows: Sequence[int], shares: Sequence[Fraction], size: int, seed: int, *, shuffle: bool = True
    ):
        self.num_rows, self.shares, self.size = list(num_rows), list(shares), size
        self._seed, self._shuffle = seed, shuffle
        self._firsts = [sum(self.num_rows[:source]) for source in range(len(self.num_rows))]
        self._streams = [
            RowStream(rows, seed + source * SOURCE_SEEDS, None if shuffle else lambda _, rows=rows: list(range(rows)))
            for source, rows in enumerate(self.num_rows)
        ]
        self._taken = [[0] * len(self.num_rows)]

    def taken(self, mini_batches: int) -> list[int]:
        """Rows of each source in the first `mini_batches` together; more than it has where it is repeated."""
        while len(self._taken) <= mini_batches:
            before = self._taken[-1]
            total = len(self._taken) * self.size
            owed = [share * total - rows for share, rows in zip(self.shares, before, strict=True)]
            self._taken.append([rows + new for rows, new in zip(before, apportioned(owed, self.size), strict=True)])
        return self._taken[mini_batches]

    def count(self, mini_batch: int) -> list[int]:
        """Rows of each source in one mini-batch."""
        before, after = self.taken(mini_batch), self.taken(mini_batch + 1)
        return [end - start for start, end in zip(before, after, strict=True)]

    @property
    def per_epoch(self) -> int:
        """Mini-batches in which the first source is gone through once."""
        count = max(1, int(self.num_rows[0] / (self.shares[0] * self.size)) - 1)
        while self.taken(count)[0] < self.num_rows[0]:
            count += 1
        return count

    def rows(self, mini_batch: int) -> list[int]:
        """Row indices of a mini-batch (from 0), in order: `size` of them."""
        before, after = self.taken(mini_batch), self.taken(mini_batch + 1)
        rows = [
            first + stream[position]
            for first, stream, start, end in zip(self._firsts, self._streams, before, after, strict=True)
            for position in range(start, end)
        ]
        if not self._shuffle:
            return rows
        generator = torch.Generator().manual_seed(self._seed + MIXING_SEEDS + mini_batch)
        return [rows[i] for i in torch.randperm(self.size, generator=generator).tolist()]

    def unseen_share(self, mini_batches: int) -> float:
        """Share of the first source's rows that are in none of the first `mini_batches`, in [0, 1)."""
        return max(0.0, 1.0 - self.taken(mini_batches)[0] / self.num_rows[0])


def apportioned(owed: Sequence[Fraction], seats: int) -> list[int]:
    """Whole numbers >= 0 near `owed` that add up to `seats`: the whole parts, then one each by largest remainder.

    Args:
        owed: add up to `seats`; one that got more before than its share may be a little below 0.
    """
    whole = [max(0, owed_one.numerator // owed_one.denominator) for owed_one in owed]
    while sum(whole) != seats:
        step = 1 if sum(whole) < seats else -1
        takers = [i for i in range(len(owed)) if step > 0 or whole[i] > 0]
        chosen = max(takers, key=lambda i: (step * (owed[i] - whole[i]), -i))
        whole[chosen] += step
    return whole


@dataclass(frozen=True)
class Part:
    """A source in a `MixedDataset`.

    Attributes:
        name: what messages call it.
        rows: tokenized, or raw: as they stand in the source, also as a list of dicts.
        share: of the rows of every mini-batch.
    """

    name: str
    rows: datasets.Dataset | list[dict]
    share: Fraction


class MixedDataset(datasets.Dataset):
    """The rows of several sources, one source behind the other; `PSFTTrainer` takes them in their shares.

    Attributes:
        parts: the sources.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        if all("input_ids" in getattr(part.rows, "column_names", ()) for part in parts):
            whole = datasets.concatenate_datasets([part.rows for part in parts])
            super().__init__(whole.data, whole.info, whole.split, whole._indices)
        else:  # texts and messages; the trainer makes tokens of each part
            super().__init__(pyarrow.table({"row": list(range(sum(len(part.rows) for part in parts)))}))

    def __iter__(self) -> Iterator[dict]:
        for part in self.parts:
            yield from part.rows

    def mini_batches(self, size: int, seed: int, *, shuffle: bool = True) -> MixedMiniBatches:
        """The order of the rows; arguments as in `MixedMiniBatches`."""
        shares = [part.share for part in self.parts]
        return MixedMiniBatches([len(part.rows) for part in self.parts], shares, size, seed, shuffle=shuffle)


def mixed(sources: Sequence[tuple[Any, float | None]]) -> MixedDataset:
    """Sources in stated shares, for `PSFTTrainer(train_dataset=mixed([(rows, 0.8), (others, 0.2)]))`.

    Args:
        sources: rows (a list of dicts or a `datasets.Dataset`; raw or tokenized, all alike) and share of each. One
            share may be None: it is the rest.

    Raises:
        RecipeError: shares that do not add up to 1.
    """
    shares = whole_shares([share for _, share in sources], "mixed")
    parts = zip(sources, shares, strict=True)
    return MixedDataset([Part(f"source {n}", rows, share) for n, ((rows, _), share) in enumerate(parts, start=1)])


def load_sources(
    arguments: DataArguments,
    tokenizer: Any,
    max_length: int | None,
    show_progress: bool = True,
    first: First | None = None,
) -> list[tuple[TokenizedRows, Fraction]]:
    """Reads and tokenizes every source that a recipe names: of `dataset_mix` or `dataset_name`, and `replay_dataset`.

    Args:
        arguments: of the recipe.
        tokenizer, max_length, show_progress: as in `qpsft.data.tokenize.tokenize_rows`.
        first: as in `load_dataset`, where there is one source.

    Returns:
        The rows and the share of each source, in the recipe's order, replay last. Where answers to prompts are to be
        replayed, they are missing, and the shares are those without them.

    Raises:
        RecipeError: as `mix_sources`. DataError: as `load_dataset`.
    """
    sources = mix_sources(arguments)
    data, shares = [source.data for source in sources], [source.share for source in sources]
    if (replayed := replay_source(arguments)) is not None:
        data, shares = [*data, replayed], with_replay(shares, arguments.replay_share)
    first = first if len(data) == 1 else None
    rows = [load_dataset(one, tokenizer, max_length, show_progress=show_progress, first=first) for one in data]
    return list(zip(rows, shares, strict=True))


def with_replay(shares: Sequence[Fraction], replay: float) -> list[Fraction]:
    """The shares of all sources when the first ones leave `replay` to one more."""
    last = Fraction(str(replay))
    return [*(share * (1 - last) for share in shares), last]
