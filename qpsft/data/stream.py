"""Rows that are read while training goes on: prepared one by one, by the same code and with the same checks.

    source    1 2 3 4 5 6 …                  read in its order, again and again
    buffer    [1 2 3] -> 2, [1 4 3] -> 3, …  `streaming_buffer` rows, of which a random one is next

The order is a function of the seed and the pass, so a resumed run, which skips the rows it has seen, goes on with the
same rows.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
from datasets.iterable_dataset import ExamplesIterable

from qpsft.data.bad_rows import BadRow, RowError
from qpsft.data.counts import DataCounts
from qpsft.data.read import Records, stream_records, stream_unit
from qpsft.data.shapes import RowReader, split_answers
from qpsft.data.tokenize import BAD, RowEncoder, TokenizedRows, cut_row, tokenize_records
from qpsft.errors import DataError
from qpsft.files import digest
from qpsft.recipe.arguments import DataArguments

LEAST_SAMPLE = 200
"""Rows at the start of a stream that are read and checked before training, at least."""


@dataclass(frozen=True)
class _Raw:
    """A row of the stream, before it becomes tokens."""

    row: dict
    place: str
    number: int


class StreamedRows(datasets.IterableDataset):
    """Tokenized rows (`input_ids`, `labels`) without end: the source again and again, each time in another order.

    Args:
        arguments: `dataset_name` and what goes with it; `streaming_buffer` is used.
        tokenizer, max_length: as in `qpsft.data.tokenize.tokenize_rows`.
        seed: of the order.
        held_out: that many rows at the source's start are left out, a tenth of the rows that are checked at most.

    Attributes:
        sample: the first rows of the source, checked and tokenized as a whole file is.
        counts: what became of the rows read so far.
        held_out: how many rows at the start are left out.

    Raises:
        DataError: as `stream_records` and `tokenize_records`, of the first rows; while it is read, of any row.
    """

    def __init__(
        self, arguments: DataArguments, tokenizer: Any, max_length: int | None, *, seed: int = 0, held_out: int = 0
    ):
        super().__init__(ExamplesIterable(lambda: iter(()), {}))
        self._arguments, self._tokenizer, self._max_length, self._seed = arguments, tokenizer, max_length, seed
        self._name = arguments.dataset_name
        self._unit = stream_unit(self._name)
        first = self._first_records(max(LEAST_SAMPLE, arguments.streaming_buffer, 10 * held_out))
        named = replace(first, name=f"the first {len(first.records):,} rows of {self._name}")
        self._reader = RowReader(named, arguments)
        self.sample: TokenizedRows = tokenize_records(first, tokenizer, arguments, max_length, show_progress=False)
        self.held_out = min(held_out, len(self.sample.dataset) // 10)
        self._aside = set(self.sample.places[: self.held_out])
        self.counts = DataCounts(max_length=max_length)
        self._said_again = False

    @property
    def column_names(self) -> list[str]:
        return ["input_ids", "labels"]

    @property
    def sha256(self) -> str:
        """A digest of what decides the rows and their order, but the seed; to tell a resumed run from another."""
        first = [[row["input_ids"], row["labels"]] for row in self.sample.dataset]
        return digest(f"{self._arguments.streaming_buffer} {self._arguments.dataset_limit} {first}")

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        self.counts = DataCounts(max_length=self._max_length, unused_columns=self.sample.counts.unused_columns)
        encoder = RowEncoder(self._tokenizer, self._arguments, self._max_length)
        data_pass = 0
        while True:
            before = self.counts.kept
            order = random.Random(f"{self._seed} {data_pass}")
            for raw in shuffled(self._rows(), self._arguments.streaming_buffer, order):
                yield from self._prepared(raw, encoder)
            if self.counts.kept == before:
                raise DataError(f"{self._name}: no row of it can be trained on.", "Look at it with `qpsft preview`.")
            if not self._said_again:
                self._said_again = True
                warnings.warn(f"{self._name} is at its end, and is gone through again in another order.", stacklevel=2)
            data_pass += 1

    def _first_records(self, count: int) -> Records:
        records = Records(self._name, self._unit, [], [])
        for number, record in stream_records(self._name, self._arguments):
            if len(records.records) + len(records.bad) == count:
                break
            if isinstance(record, RowError):
                records.bad.append(BadRow(number, record))
            else:
                records.records.append(record)
                records.numbers.append(number)
        if not records.records and not records.bad:
            raise DataError(
                f"{self._name} is empty: there is no row in it.", "Write one demonstration per line or row."
            )
        if not records.records:
            raise records.bad[0].error
        return records

    def _rows(self) -> Iterator[_Raw]:
        """One pass over the source in its order, without the rows held out; bad ones refused or counted."""
        for number, record in stream_records(self._name, self._arguments):
            place = f"{self._name}, {self._unit} {number}"
            try:
                row = self._reader.read(self._record(record, place), place)
            except RowError as error:
                self._bad(error)
                continue
            for part, where in split_answers(row, place) if self._arguments.split_turns else [(row, place)]:
                if where not in self._aside:
                    yield _Raw(part, where, number)

    @staticmethod
    def _record(record: Any, place: str) -> dict:
        if isinstance(record, RowError):
            raise record
        if not isinstance(record, dict):
            raise RowError(f"{place}: it is no row with named columns.", "Mend or delete it.")
        return record

    def _prepared(self, raw: _Raw, encoder: RowEncoder) -> Iterator[dict[str, list[int]]]:
        """The row as tokens, or nothing if it is dropped."""
        try:
            encoded = encoder(raw.row, raw.place)
        except RowError as error:
            self._bad(error)
            return
        ids, labels, was_cut, reason = cut_row(encoded.ids, encoded.labels, self._max_length)
        self.counts.rows += 1
        noted = encoder.noted
        self.counts.stripped_reasoning, self.counts.special_tokens = noted.stripped, noted.special_rows
        self.counts.shortened_schemas = noted.shortened
        if reason:
            self._drop(reason)
            return
        self.counts.truncated += was_cut
        self.counts.shared_tokens += encoded.shared
        yield {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def _bad(self, error: RowError) -> None:
        if not self._arguments.skip_bad_rows:
            raise error
        self.counts.rows += 1
        self._drop(BAD)

    def _drop(self, reason: str) -> None:
        self.counts.dropped = dict(Counter(self.counts.dropped) + Counter([reason]))


def shuffled(rows: Iterable[Any], size: int, order: random.Random) -> Iterator[Any]:
    """The rows in random order, as far as a buffer of `size` allows; 1 leaves them in their own."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        index = order.randrange(size)
        yield buffer[index]
        buffer[index] = row
    order.shuffle(buffer)
    yield from buffer
