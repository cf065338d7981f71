"""The rows of a run: read, a few held out, several sources mixed, and what is said of them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import datasets
import torch
from trl import pack_dataset

from qpsft.data.mix import MixedDataset, MixedMiniBatches, Part, load_sources, with_replay
from qpsft.data.preview import render_counts, render_preview
from qpsft.data.stream import StreamedRows
from qpsft.data.tokenize import First, TokenizedRows
from qpsft.processes import from_main
from qpsft.psft.config import PSFTConfig
from qpsft.psft.schedule import make_schedule, planned_steps
from qpsft.recipe.file import Recipe
from qpsft.train.replay import read_replay


@dataclass
class TrainingSource:
    """One source's rows.

    Attributes:
        rows: all that were read and can be trained on.
        share: of the rows of every mini-batch.
        kept: indices of those that are trained on.
    """

    rows: TokenizedRows
    share: Fraction
    kept: list[int]


@dataclass
class TrainingData:
    """What a run trains on.

    Attributes:
        sources: in the recipe's order; a single one unless `dataset_mix` or replay is given.
        held_out: rows of the first source that training never sees (`input_ids`, `labels`).
    """

    sources: list[TrainingSource]
    held_out: datasets.Dataset

    @cached_property
    def rows(self) -> datasets.Dataset:
        """The rows to train on: a `MixedDataset` of several sources."""
        parts = [Part(one.rows.name, one.rows.dataset.select(one.kept), one.share) for one in self.sources]
        return MixedDataset(parts) if len(parts) > 1 else parts[0].rows

    @property
    def places(self) -> list[str]:
        """Where each of `rows` came from."""
        return [one.rows.places[i] for one in self.sources for i in one.kept]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(one.rows.counts.longest for one in self.sources)

    def lines(self) -> list[str]:
        """What is trained on: for each source a line or two of at most 80 columns."""
        held_out = [len(self.held_out), *[0] * (len(self.sources) - 1)]
        return [data_line(one.rows, len(one.kept), count) for one, count in zip(self.sources, held_out, strict=True)]

    def facts(self) -> list[str]:
        """What training does not take as it stands in the sources, as in `DataCounts.facts`."""
        if len(self.sources) == 1:
            return self.sources[0].rows.counts.facts()
        return [f"{one.rows.name}: {fact}" for one in self.sources for fact in one.rows.counts.facts()]

    def with_replay(self, rows: TokenizedRows, share: float) -> TrainingData:
        """With one source more, to which the others leave `share` of every mini-batch."""
        *shares, replay = with_replay([one.share for one in self.sources], share)
        before = [TrainingSource(one.rows, own, one.kept) for one, own in zip(self.sources, shares, strict=True)]
        source = TrainingSource(rows, replay, list(range(len(rows.dataset))))
        return TrainingData([*before, source], self.held_out)


@dataclass
class StreamedData:
    """What a run with `streaming` trains on; has what `TrainingData` has."""

    rows: StreamedRows
    sources: tuple[TrainingSource, ...] = ()
    places: None = None

    @property
    def held_out(self) -> datasets.Dataset:
        return self.rows.sample.dataset.select(range(self.rows.held_out))

    @property
    def longest(self) -> int:
        return self.rows.sample.counts.longest

    def lines(self) -> list[str]:
        """What is trained on, as far as the first rows tell."""
        first = self.rows.sample
        line = data_line(first, len(first.dataset) - self.rows.held_out, self.rows.held_out)
        return [
            f"{line}\n      streamed: these are its first {first.counts.rows:,} rows; the others are read in training"
        ]

    def facts(self) -> list[str]:
        """What became of the rows that were read."""
        return [f"{self.rows.counts.rows:,} read from the stream", *self.rows.counts.facts()]


def read_training_data(recipe: Recipe, tokenizer: Any, first: First | None = None) -> TrainingData | StreamedData:
    """Reads a recipe's rows, in process 0, and holds out a few; sampled replay is not among them.

    With `streaming` every process opens the source, and only its first rows are read.

    Args:
        first: as in `qpsft.data.mix.load_sources`.

    Raises:
        DataError: as `qpsft.data.tokenize.load_dataset`. RecipeError: as `qpsft.recipe.sources.check_sources`.
    """
    if recipe.data.streaming:
        args, aside = recipe.trainer, recipe.run.held_out_rows
        return StreamedData(StreamedRows(recipe.data, tokenizer, args.max_length, seed=args.order_seed, held_out=aside))
    loaded = from_main(lambda: load_sources(recipe.data, tokenizer, recipe.trainer.max_length, first=first))
    first, _ = loaded[0]
    kept, aside = held_out_order(first, recipe.run.held_out_rows, recipe.trainer.seed)
    everything = [kept, *(list(range(len(rows.dataset))) for rows, _ in loaded[1:])]
    sources = [TrainingSource(rows, share, own) for (rows, share), own in zip(loaded, everything, strict=True)]
    return TrainingData(sources, first.dataset.select(aside))


def hold_out(rows: TokenizedRows, count: int, seed: int) -> tuple[Any, Any]:
    """Splits off `count` rows, a tenth at most, that training never sees. Returns (train, held out) datasets."""
    kept, held_out = held_out_order(rows, count, seed)
    return rows.dataset.select(kept), rows.dataset.select(held_out)


def held_out_order(rows: TokenizedRows, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows that `hold_out` keeps for training, and of those it sets aside."""
    count = min(count, len(rows.dataset) // 10)
    order = torch.randperm(len(rows.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def data_line(rows: TokenizedRows, trained: int, held_out: int) -> str:
    """What is trained on, in a line or two of at most 80 columns."""
    counts = rows.counts
    facts = [f"{trained:,} rows to train on", f"{held_out} held out"]
    facts += [f"{counts.supervised_tokens:,} supervised tokens", *counts.facts()]
    line = textwrap.fill(f"data: {rows.name} ({rows.shape}): {', '.join(facts)}", 80, subsequent_indent="      ")
    return "\n".join([line, *counts.bad_rows])


def preview_blocks(
    data: TrainingData | StreamedData, recipe: Recipe, tokenizer: Any, *, are_shown: bool = False
) -> list[str]:
    """What `qpsft preview` prints: of each source its first rows and its counts, then what the mix comes to.

    Args:
        are_shown: the first rows of the one source stand on the terminal already.
    """
    if isinstance(data, StreamedData):
        return [render_preview(data.rows.sample, tokenizer), f"{data.lines()[0].splitlines()[-1].strip()}\n"]
    shown = 3 if len(data.sources) == 1 else 2
    blocks = [render_preview(one.rows, tokenizer, shown) for one in data.sources if not are_shown]
    blocks += [render_counts(data.sources[0].rows)] if are_shown else []
    rows, args = data.rows, recipe.trainer
    if isinstance(rows, MixedDataset):
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        blocks.append("\n".join(mix_table(mix_use(packed(rows, args), args, size), size)) + "\n")
    if replay := read_replay(recipe, tokenizer):
        blocks.append(f"{replay.line}\n")
    return blocks


def packed(rows: MixedDataset, args: PSFTConfig) -> MixedDataset:
    """The rows as the trainer will have them: each source packed by itself, if the run packs."""
    if not args.packing:
        return rows
    parts = [replace(part, rows=pack_dataset(part.rows, args.max_length, args.packing_strategy)) for part in rows.parts]
    return MixedDataset(parts)


# ---- what a mix comes to ----


@dataclass(frozen=True)
class SourceUse:
    """What a run takes of one source of a mix.

    Attributes:
        rows: it has (packed rows, with packing).
        fewest, most: rows of it in a mini-batch.
        seen: how often each of its rows is trained on, on average, visits included.
        drawn: how often it is gone through, visits not included; above 1 its rows are repeated.
    """

    name: str
    share: Fraction
    rows: int
    fewest: int
    most: int
    seen: float
    drawn: float


def mix_use(rows: MixedDataset, args: PSFTConfig, mini_batch_size: int) -> list[SourceUse]:
    """What a run takes of each source, from the schedule it will follow.

    Args:
        rows: as the trainer has them (packed, with packing).
        args: of the run.
        mini_batch_size: rows of an optimizer step, all processes together.
    """
    total = planned_steps(args, rows, mini_batch_size)
    schedule = make_schedule(args, rows, mini_batch_size, total, check=False)
    order: MixedMiniBatches = schedule.mini_batches
    counts = [order.count(m) for m in range(schedule.reached())]
    visited = [counts[schedule.position(step).mini_batch] for step in range(total)]
    uses = []
    for source, part in enumerate(rows.parts):
        own, size = [count[source] for count in counts], len(part.rows)
        seen = sum(count[source] for count in visited) / size
        uses.append(SourceUse(part.name, part.share, size, min(own), max(own), seen, sum(own) / size))
    return uses


def mix_table(uses: list[SourceUse], mini_batch_size: int) -> list[str]:
    """The lines of a table: share, rows of a mini-batch, rows there are, and how often each is seen."""
    cells = [("source", "share", "rows a step", "rows", "each seen")]
    for use in uses:
        average = float(use.share * mini_batch_size)
        step = f"{use.most}" if use.fewest == use.most else f"{use.fewest} to {use.most}, {average:.3g} on average"
        cells.append((use.name, f"{float(use.share):.1%}", step, f"{use.rows:,}", f"{use.seen:.1f} times"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    title = f"mix: {mini_batch_size} rows a step; an epoch is one pass over {uses[0].name}"
    notes = [
        f"{use.name} has too few rows for its share: they are gone through {use.drawn:.1f} times."
        for use in uses[1:]
        if use.drawn > max(1.0, uses[0].drawn)
    ]
    return [title, *(f"  {line}" for line in [*table, *notes])]


def mix_facts(uses: list[SourceUse]) -> list[str]:
    """The same for the model card."""
    return [f"{float(use.share):.1%} {use.name} ({use.rows:,} rows, each seen {use.seen:.1f} times)" for use in uses]
