"""Demonstrations -> token ids and labels, ready for the trainer, and the counts of what became of them."""

from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from tqdm import tqdm

from qpsft.data.bad_rows import BadRow, RowError, first_lines, refuse
from qpsft.data.counts import DataCounts
from qpsft.data.encode import IGNORED, Encoded, RowEncoder, encode_prompt, writes_chat
from qpsft.data.read import Records, RowSource, no_rows, open_rows, read_records
from qpsft.data.shapes import RowReader, Rows, read_rows, to_rows
from qpsft.data.workers import Made, Preparation, Row, Workers
from qpsft.errors import DataError, OutputError
from qpsft.recipe.arguments import DataArguments

__all__ = [
    "DataCounts",
    "IGNORED",
    "RowEncoder",
    "Rows",
    "TokenizedRows",
    "cut_row",
    "encode_prompt",
    "load_dataset",
    "load_rows",
    "tokenize_records",
    "tokenize_rows",
    "tokenized_rows",
    "writes_chat",
]

BAD = "cannot be used"
"""Why rows are dropped with `skip_bad_rows`."""
PERCENTILES = (50, 90, 99, 100)
ROWS_WORTH_A_BAR = 3000
ROWS_WORTH_WORKERS = 40_000
"""They take longer than processes to start."""
LINE = 200
"""Bytes that a line of a text has, about."""
BATCH = 1000
"""Rows that are read, tokenized and put away together; fewer where they have more than `MOST_CHARACTERS`."""
MOST_CHARACTERS = 2**24
IN_MEMORY = 2**26
"""Bytes of tokens and labels beyond which they go to a file."""


@dataclass
class TokenizedRows:
    """A tokenized dataset.

    Attributes:
        name: the file or dataset, as the user wrote it.
        shape: the shape its rows had.
        dataset: one row per kept demonstration, in the source's order: `input_ids` (list of int, unpadded) and
            `labels` (as long; the token's own id where it is supervised, else -100). SFTTrainer takes it as it is.
        counts: what became of the rows.
        places: where each kept row came from, such as "data.jsonl, line 57".
    """

    name: str
    shape: str
    dataset: datasets.Dataset
    counts: DataCounts
    places: list[str]


First = Callable[[TokenizedRows], None]


def load_rows(name: str, arguments: DataArguments, split: str = "train") -> Rows:
    """Read `name` (a local file, a Hub id, demo-noisy or demo-clean) and bring its rows to one shape.

    Raises:
        DataError: see `qpsft.data.read.read_records` and `qpsft.data.shapes.to_rows`.
    """
    return to_rows(read_records(name, arguments, split), arguments)


def load_dataset(
    arguments: DataArguments,
    tokenizer: Any,
    max_length: int | None,
    split: str | None = None,
    show_progress: bool = True,
    first: First | None = None,
) -> TokenizedRows:
    """Read and tokenize `arguments.dataset_name`, a few rows at a time: never all of its text is in memory.

    Args:
        split: split of a Hub or built-in set; `arguments.dataset_train_split` if None.
        first: called with the first rows before the others are read, if they are many.

    Raises:
        DataError: as `qpsft.data.read.read_records` and `tokenize_records`.
    """
    if not arguments.dataset_name:
        raise DataError(
            "dataset_name is missing: there is nothing to train on.", "Name a file, a Hub id or demo-noisy."
        )
    source = open_rows(arguments.dataset_name, arguments, split or arguments.dataset_train_split)
    reader = RowReader(_with_a_record(source), arguments, lambda: _columns(source))
    seen: dict[str, None] = {}
    rows = source.size if source.unit == "row" else source.size // LINE
    rows = min(rows, arguments.dataset_limit or rows)
    with _bar(source, show_progress and rows >= ROWS_WORTH_A_BAR) as bar:
        prepare = Preparation(RowEncoder(tokenizer, arguments, max_length), reader, arguments.split_turns)
        items = _placed(source, seen, bar)
        made = _tokenize(source.name, reader.shape, items, prepare, rows, first)
    made.counts.unused_columns[:0] = [column for column in seen if column not in reader.columns]
    return made


def _with_a_record(source: RowSource) -> Records:
    """The rows up to the first that is one. Raises DataError where there is none."""
    records = Records(source.name, source.unit, [], [])
    for number, row in source:
        if isinstance(row, dict):
            return Records(source.name, source.unit, [number], [row])
        records.bad.append(BadRow(number, row))
    raise no_rows(source.name, records.bad)


def _columns(source: RowSource) -> list[str]:
    """Every column of any row, in the order in which they first appear."""
    return list(dict.fromkeys(column for _, row in source if isinstance(row, dict) for column in row))


def _placed(source: RowSource, seen: dict[str, None], bar: tqdm) -> Iterator[Row]:
    """The rows of a source with their places; `seen` gets their columns, `bar` what has been read."""
    for number, record in source:
        if not isinstance(record, RowError):
            seen |= dict.fromkeys(record)
        yield record, source.where(number), number
        bar.update(source.done - bar.n)


def _bar(source: RowSource, is_shown: bool) -> tqdm:
    """A bar on standard error over what a source has: rows, or bytes of a text."""
    unit, scale = (" rows", False) if source.unit == "row" else ("B", True)
    description = f"Tokenizing {source.name}"
    return tqdm(total=source.size, desc=description, unit=unit, unit_scale=scale, file=sys.stderr, disable=not is_shown)


def tokenize_records(
    records: Records, tokenizer: Any, arguments: DataArguments, max_length: int | None, show_progress: bool = True
) -> TokenizedRows:
    """Raw rows, of a file or of `qpsft.data.read.as_records`, to tokens and labels.

    Raises:
        DataError: as `read_rows` and `tokenize_rows`; rows that either of them cannot use are reported together.
    """
    return tokenize_rows(read_rows(records, arguments), tokenizer, arguments, max_length, show_progress)


def tokenize_rows(
    rows: Rows, tokenizer: Any, arguments: DataArguments, max_length: int | None, show_progress: bool = True
) -> TokenizedRows:
    """Tokenize every row, label its supervised tokens and cut it at `max_length`, keeping the start.

    Args:
        rows: what `read_rows` or `to_rows` returned.
        tokenizer: a fast tokenizer (one with a tokenizer.json), with a chat template if `rows` has messages.
        arguments: `use_chat_template`, `prompt_format`, `supervise_prompt`, `chat_date`, `skip_bad_rows`,
            `split_turns` and `refuse_special_tokens` are used.
        max_length: tokens a row may have; None for no limit.
        show_progress: show a bar on standard error when there are more than a few thousand rows.

    Raises:
        DataError: rows of which the chat template would lose something, or which it refuses (the first five and how
            many there are), unless `skip_bad_rows` is set; messages without a chat template; no supervised token in
            any row.
    """
    items = zip(rows.rows, rows.places, rows.numbers, strict=True)
    is_shown = show_progress and len(rows.rows) >= ROWS_WORTH_A_BAR
    items = tqdm(
        items, total=len(rows.rows), desc=f"Tokenizing {rows.name}", unit=" rows", file=sys.stderr, disable=not is_shown
    )
    bad = ((row.error, "", row.number) for row in rows.bad)
    prepare = Preparation(RowEncoder(tokenizer, arguments, max_length), None, arguments.split_turns)
    made = _tokenize(rows.name, rows.shape, chain(items, bad), prepare, len(rows.rows))
    made.counts.unused_columns[:0] = rows.unused_columns
    return made


def _tokenize(
    name: str, shape: str, items: Iterable[Row], prepare: Preparation, rows: int, first: First | None = None
) -> TokenizedRows:
    """The tokens of rows that come one by one.

    Args:
        prepare: what becomes of them.
        rows: how many there are, about.
        first: as in `load_dataset`.
    """
    encoder = prepare.encoder
    kept = _Kept(DataCounts(max_length=encoder.max_length))
    bad: list[BadRow] = []
    read = made = 0

    def counted(batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
        nonlocal read
        for batch in batches:
            read += len(batch)
            yield batch

    def keep(results: list[Made]) -> None:
        nonlocal made
        made += len(results)
        for encoded, place, number in results:
            if isinstance(encoded, RowError):
                bad.append(BadRow(number, encoded))
            else:
                kept.add(encoded, place)

    batches = counted(_batches(items))
    keep(prepare(next(batches, [])))
    if (second := next(batches, None)) is not None:
        if first is not None and kept.places:
            first(TokenizedRows(name, shape, kept.first_rows(), kept.counts, kept.places))
        with Workers(prepare, None if rows >= ROWS_WORTH_WORKERS else 0) as workers:
            for results in workers.map(chain([second], batches)):
                keep(results)
    if not read or len(bad) == made or not encoder.arguments.skip_bad_rows:
        refuse(bad, name, made)
    counts, noted = kept.counted(bad, name), encoder.noted
    counts.rows, counts.conversations = made, read if prepare.split_turns else None
    counts.unused_columns = encoder.unused_keys()
    counts.stripped_reasoning, counts.shortened_schemas = noted.stripped, noted.shortened
    counts.special_tokens = noted.special_rows
    if not kept.places:
        raise _nothing_supervised(name, counts)
    encoder.warn(name)
    return TokenizedRows(name, shape, kept.dataset(), counts, kept.places)


def _batches(items: Iterable[Row]) -> Iterator[list[Row]]:
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += _characters(item[0])
        if len(batch) == BATCH or characters > MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    """Characters of the texts in a row, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_characters, value))


def tokenized_rows(
    name: str, shape: str, rows: Sequence[tuple[np.ndarray, np.ndarray, str]], dropped: Mapping[str, int]
) -> TokenizedRows:
    """Rows that are tokens already.

    Args:
        rows: ids, labels (int32, equally long) and place of each; some of its tokens are supervised.
        dropped: why other rows were left out, with counts.
    """
    kept = _Kept(DataCounts(rows=len(rows) + sum(dropped.values())))
    for ids, labels, place in rows:
        kept.add(Encoded(ids, labels, False, len(ids)), place)
    counts = kept.counted([], name)
    counts.dropped |= dropped
    return TokenizedRows(name, shape, kept.dataset(), counts, kept.places)


class _Kept:
    """The rows to train on, cut at `max_length`, and the counts as they grow. Many tokens go to a file."""

    def __init__(self, counts: DataCounts):
        self.counts = counts
        self.places: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        self._dropped: Counter[str] = Counter()
        self._lengths: list[int] = []
        self._table = _GrowingTable()

    def add(self, encoded: Encoded, place: str) -> None:
        """Takes one row in, or drops it if nothing in it is supervised."""
        self._lengths.append(encoded.length)
        ids, labels, was_cut, reason = cut_row(encoded.ids, encoded.labels, self.counts.max_length)
        if reason:
            self._dropped[reason] += 1
            return
        self._columns["input_ids"].append(ids)
        self._columns["labels"].append(labels)
        self.places.append(place)
        self.counts.truncated += was_cut
        self.counts.tokens += len(ids)
        self.counts.supervised_tokens += int((labels != IGNORED).sum())
        self.counts.shared_tokens += encoded.shared
        if len(self._columns["labels"]) == BATCH:
            self._put_away()

    def counted(self, bad: list[BadRow], name: str) -> DataCounts:
        """The counts, when all rows but the bad ones have been added."""
        lengths = sorted(self._lengths)
        percentiles = {p: lengths[math.ceil(p / 100 * len(lengths)) - 1] for p in PERCENTILES}
        self.counts.length_percentiles = percentiles
        self.counts.dropped = ({BAD: len(bad)} if bad else {}) | dict(self._dropped)
        self.counts.bad_rows = first_lines(bad, name)
        return self.counts

    def first_rows(self) -> datasets.Dataset:
        """A few, while others are to come."""
        self._put_away()
        return self._table.first_rows()

    def dataset(self) -> datasets.Dataset:
        """All rows; none can be added any more."""
        self._put_away()
        return self._table.dataset()

    def _put_away(self) -> None:
        """Columns of int32 arrays, one per row. `Dataset.from_dict` takes ten times as long to see that."""
        if not self._columns["labels"]:
            return
        arrays = {}
        for name, rows in self._columns.items():
            ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
            arrays[name] = pyarrow.ListArray.from_arrays(ends, np.concatenate(rows))
            rows.clear()
        self._table.add(pyarrow.record_batch(arrays))


def row_lengths(rows: datasets.Dataset | Mapping[str, Sequence]) -> list[int]:
    """Tokens of each tokenized row; of a data set from Arrow's offsets, so that no token becomes a Python object."""
    if not isinstance(rows, datasets.Dataset):
        return [len(ids) for ids in rows["input_ids"]]
    lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
    return (lengths if rows._indices is None else lengths.take(rows._indices.column(0))).to_pylist()


class _GrowingTable:
    """An Arrow table that is in memory while it is small, and in a file without a name once it is large.

    The file lies in the folder for temporary files ($TMPDIR); the system removes it with the last table that reads it.
    """

    def __init__(self) -> None:
        self._batches: list[pyarrow.RecordBatch] = []
        self._start: pyarrow.RecordBatch | None = None
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._writer: pyarrow.ipc.RecordBatchFileWriter | None = None

    def add(self, batch: pyarrow.RecordBatch) -> None:
        if self._start is None:
            self._start = batch.slice(0, 10)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes < IN_MEMORY:
            return
        try:
            if self._writer is None:
                self._file = tempfile.NamedTemporaryFile(prefix="qpsft-rows-", suffix=".arrow")  # noqa: SIM115
                self._writer = pyarrow.ipc.new_file(self._file, batch.schema)
            for one in self._batches:
                self._writer.write_batch(one)
        except OSError as error:
            raise OutputError(
                f"The rows' tokens cannot be written to {tempfile.gettempdir()}: {error.strerror or error}.",
                "Free some space there, or set TMPDIR to a folder on another disk.",
            ) from error
        self._batches = []

    def first_rows(self) -> datasets.Dataset:
        return datasets.Dataset(pyarrow.Table.from_batches([self._start]))

    def dataset(self) -> datasets.Dataset:
        if self._writer is None:
            return datasets.Dataset(pyarrow.Table.from_batches(self._batches).combine_chunks())
        self._writer.close()
        self._file.flush()
        table = pyarrow.ipc.open_file(pyarrow.memory_map(self._file.name)).read_all()
        self._file.close()
        # Without a fingerprint, datasets would read it all to make one.
        return datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint())


def cut_row(ids: np.ndarray, labels: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray, bool, str]:
    """The first `limit` tokens, their labels, whether others were cut off, and why to drop the row or ""."""
    was_cut = limit is not None and len(ids) > limit
    ids, labels = ids[:limit], labels[:limit]
    reason = ""
    if not (labels != IGNORED).any():
        reason = f"no supervised token within max_length={limit}" if was_cut else "no supervised token"
    return ids, labels, was_cut, reason


def _nothing_supervised(name: str, counts: DataCounts) -> NothingSupervised:
    reasons = ", ".join(f"{reason}: {n} rows" for reason, n in counts.dropped.items())
    return NothingSupervised(
        f"{name}: not one supervised token is left to train on ({reasons}; half of the rows are longer than "
        f"{counts.length_percentiles[50] - 1} tokens).",
        "Raise max_length, or shorten the prompts."
        if any("max_length" in reason for reason in counts.dropped)
        else "Mark at least one assistant turn as trained.",
    )


class NothingSupervised(DataError):
    """No row has a supervised token within the length limit."""
