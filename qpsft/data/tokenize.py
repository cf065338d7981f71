"""Demonstrations -> token ids and labels, ready for the trainer: which tokens the model sees, which it learns.

Every row becomes one text and the character spans of it that are supervised; the text is tokenized once, and a token is
supervised when it overlaps a span. So masking goes by position: an end-of-sequence token that belongs to an answer is
supervised even if the same id pads the batch later.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import IO, Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from tqdm import tqdm

from qpsft.data.bad_rows import BadRow, RowError, first_lines, refuse
from qpsft.data.chat_date import dated_template
from qpsft.data.contents import Span
from qpsft.data.counts import DataCounts, counted
from qpsft.data.dialect import Dialect
from qpsft.data.messages import READ
from qpsft.data.read import Records, RowSource, no_rows, open_rows, read_records
from qpsft.data.render import limited, refused
from qpsft.data.shapes import RowReader, Rows, read_rows, split_answers, to_rows
from qpsft.data.special_tokens import SpecialTokenFinder
from qpsft.data.template import ChatRenderer, Rendered
from qpsft.errors import DataError, OutputError, boundary
from qpsft.recipe.arguments import DataArguments

__all__ = [
    "DataCounts",
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

IGNORED = -100
"""The label of a token that is not supervised."""
BAD = "cannot be used"
"""Why rows are dropped with `skip_bad_rows`."""
PERCENTILES = (50, 90, 99, 100)
ROWS_WORTH_A_BAR = 3000
LINE = 200
"""Bytes that a line of a text has, about."""
BATCH = 1000
"""Rows that are read, tokenized and put away together; fewer where they have more than `MOST_CHARACTERS`."""
MOST_CHARACTERS = 2**24
IN_MEMORY = 2**26
"""Bytes of tokens and labels beyond which they go to a file."""
LONG = 50_000
"""Characters beyond which only the start of a row is tokenized, where `max_length` needs no more."""


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


Items = Iterable[tuple[dict | RowError, str, int]]
"""One of `Rows.rows`, or why there is none; its place and its number."""
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
    worth_a_bar = source.size >= ROWS_WORTH_A_BAR * (1 if source.unit == "row" else LINE)
    with _bar(source, show_progress and worth_a_bar) as bar:
        items = _shaped(source, reader, seen, bar)
        made = _tokenize(source.name, reader.shape, items, tokenizer, arguments, max_length, first)
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


def _shaped(source: RowSource, reader: RowReader, seen: dict[str, None], bar: tqdm) -> Items:
    """The rows of a source in one shape; `seen` gets their columns, `bar` what has been read."""
    for number, record in source:
        place = source.where(number)
        row = record
        if not isinstance(record, RowError):
            seen |= dict.fromkeys(record)
            try:
                row = reader.read(record, place)
            except RowError as error:
                row = error
        yield row, place, number
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
    made = _tokenize(rows.name, rows.shape, chain(items, bad), tokenizer, arguments, max_length)
    made.counts.unused_columns[:0] = rows.unused_columns
    return made


def _tokenize(
    name: str,
    shape: str,
    items: Items,
    tokenizer: Any,
    arguments: DataArguments,
    max_length: int | None,
    first: First | None = None,
) -> TokenizedRows:
    """`tokenize_rows` of rows that come one by one."""
    encode = RowEncoder(tokenizer, arguments, max_length)
    kept = _Kept(DataCounts(max_length=max_length))
    bad: list[BadRow] = []
    read = made = 0
    for count, batch in enumerate(_batches(items)):
        if count == 1 and first is not None and kept.places:  # there are more than one
            first(TokenizedRows(name, shape, kept.first_rows(), kept.counts, kept.places))
        read += len(batch)
        rows = []
        for row, place, number in batch:
            if isinstance(row, RowError):
                bad.append(BadRow(number, _bare(row)))
                made += 1
            else:
                parts = split_answers(row, place) if arguments.split_turns else [(row, place)]
                rows += [(part, where, number) for part, where in parts]
        made += len(rows)
        for (_, place, number), encoded in zip(rows, encode.batch([row[:2] for row in rows]), strict=True):
            if isinstance(encoded, RowError):
                bad.append(BadRow(number, _bare(encoded)))
            else:
                kept.add(encoded, place)
    if not read or len(bad) == made or not arguments.skip_bad_rows:
        refuse(bad, name, made)
    counts = kept.counted(bad, name)
    counts.rows, counts.conversations = made, read if arguments.split_turns else None
    counts.unused_columns = encode.unused_keys()
    counts.stripped_reasoning, counts.shortened_schemas = encode.stripped, encode.shortened
    counts.special_tokens = encode.special_rows
    if not kept.places:
        raise _nothing_supervised(name, counts)
    encode.warn(name)
    return TokenizedRows(name, shape, kept.dataset(), counts, kept.places)


def _batches(items: Items) -> Iterator[list[tuple[dict | RowError, str, int]]]:
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += 0 if isinstance(item[0], RowError) else _characters(item[0])
        if len(batch) == BATCH or characters > MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(row: dict) -> int:
    """Characters of a row's texts, about."""
    texts = [row[column] for column in ("text", "prompt", "completion", "messages") if column in row]
    return sum(
        len(text) if isinstance(text, str) else sum(len(message.get("content") or "") for message in text)
        for text in texts
    )


def _bare(error: RowError) -> RowError:
    """The error without what it happened in: there may be as many as rows."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


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


def writes_chat(tokenizer: Any, arguments: DataArguments) -> bool:
    """Whether plain-string prompts go through the chat template. Raises DataError if they must and there is none."""
    if arguments.use_chat_template == "always" and not tokenizer.chat_template:
        raise DataError(
            "use_chat_template is always, but the tokenizer has no chat template.",
            "Use an instruct model's tokenizer, or use_chat_template: auto with a prompt_format.",
        )
    return bool(tokenizer.chat_template) and arguments.use_chat_template != "never"


def encode_prompt(messages: list[dict], tokenizer: Any, arguments: DataArguments) -> list[int]:
    """The ids after which a model answers, written as training writes prompts.

    Args:
        messages: a conversation that ends with a user's turn. Without a chat template only that turn counts: training
            has shown the model single prompts.
        arguments: `use_chat_template`, `prompt_format` and `chat_date` are used.

    Raises:
        DataError: the chat template refuses the conversation, or does not write it.
    """

    def written(content: str) -> str:
        return arguments.prompt_format.replace("{prompt}", content)

    if not writes_chat(tokenizer, arguments):
        text = written(messages[-1]["content"])
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        added = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
        return ids[:-1] if added else ids
    messages = [m | {"content": written(m["content"])} if m["role"] == "user" else m for m in messages]
    for dialect in (Dialect(), Dialect(parts=True)):
        text = _generation_prompt(dialect.write(messages), tokenizer, arguments)
        if messages[-1]["content"].strip() in text:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    raise DataError("The chat template does not write the prompt.", "Take a base model whose chat template does.")


def _generation_prompt(messages: list[dict], tokenizer: Any, arguments: DataArguments) -> str:
    try:
        with limited():
            return tokenizer.apply_chat_template(
                messages,
                chat_template=dated_template(tokenizer, None, arguments.chat_date),
                tokenize=False,
                add_generation_prompt=True,
            )
    except DataError:
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        raise refused("The prompt", error) from None


class NothingSupervised(DataError):
    """No row has a supervised token within the length limit."""


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    Attributes:
        ids, labels: int32, equally long; of a very long row only the first ones, more than `max_length`.
        shared: whether prompt and completion share a token.
        length: tokens of the whole row; of a very long one, about so many.
    """

    ids: np.ndarray
    labels: np.ndarray
    shared: bool
    length: int


@dataclass(frozen=True)
class _Text:
    """A row as text.

    Attributes:
        spans: the stretches that are supervised.
        is_plain: outside a chat: the tokenizer adds its special tokens.
        share: of the row's characters, those in `text`; below 1 for a very long row.
    """

    text: str
    spans: list[Span]
    is_plain: bool
    place: str
    share: float = 1.0


class RowEncoder:
    """Rows -> their ids and labels, by the tokenizer's rules and the user's choices.

    Args:
        max_length: tokens of a row that are used; None for all.

    Attributes:
        stripped: earlier answers so far whose reasoning the chat template has left out on purpose.
        shortened: rows so far whose tool schemas it has simplified.
        special_rows: rows so far whose own text holds a special token.
    """

    def __init__(self, tokenizer: Any, arguments: DataArguments, max_length: int | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token covers, which the labels need.",
                "Use a base model whose folder has a tokenizer.json.",
            )
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.max_length = max_length
        self.strings_as_chat = writes_chat(tokenizer, arguments)
        self.stripped = self.shortened = self.special_rows = 0
        self._first_special: tuple[str, str] | None = None
        self._special_tokens = SpecialTokenFinder(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self._chat: ChatRenderer | None = None
        self._keys: dict[str, str] = {}

    def __call__(self, row: dict, place: str) -> Encoded:
        """One of `Rows.rows` as tokens. Raises as `batch`, or RowError: the row cannot be used."""
        (encoded,) = self.batch([(row, place)])
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def batch(self, rows: Sequence[tuple[dict, str]]) -> list[Encoded | RowError]:
        """Some of `Rows.rows`, each with its place, as tokens, or why a row cannot be used.

        Raises:
            DataError: no row can be.
        """
        results: list[Any] = []
        for row, place in rows:
            try:
                with boundary(f"{place}: the row cannot be used", RowError, "Mend or delete the row."):
                    self._note(row, place)
                    results.append(self._shortened(self._text(row, place)))
            except RowError as error:
                results.append(error)
        for is_plain in (True, False):
            chosen = [i for i, one in enumerate(results) if isinstance(one, _Text) and one.is_plain == is_plain]
            if chosen:
                encoded = self._tokens([results[i].text for i in chosen], is_plain)
                for i, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                    try:
                        results[i] = self._labelled(results[i], ids, offsets)
                    except RowError as error:
                        results[i] = error
        return results

    def _tokens(self, texts: list[str], add_special_tokens: bool) -> Any:
        """Ids and offsets of texts; many at once on all cores."""
        before = os.environ.get("TOKENIZERS_PARALLELISM")  # what tokenizers look at for each call
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if len(texts) > 1 else before or "false"
        try:
            return self.tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before

    def _note(self, row: dict, place: str) -> None:
        """Takes note of special tokens in a row's text and of its messages' keys."""
        for column in ("prompt", "completion", "messages"):
            for message in row[column] if isinstance(row.get(column), list) else ():
                if len(message) > 2:
                    known = READ if message["role"] == "tool" else READ - {"name", "tool_call_id"}
                    self._keys |= {key: column for key in message.keys() - known}
        if special := self._special_tokens.first(row):
            if self.arguments.refuse_special_tokens:
                raise RowError(
                    f"{place}: its text holds {special}, which the tokenizer would read as a special token.",
                    "Write it another way, or leave refuse_special_tokens out.",
                )
            self.special_rows += 1
            self._first_special = self._first_special or (place, special)

    def _shortened(self, text: _Text) -> _Text:
        """A very long row without the characters that only tokens beyond `max_length` can stand for.

        Its start is tokenized until more than `max_length` tokens end far from where it was cut: words, and with them
        the tokens before them, do not depend on what follows so far behind.
        """
        if self.max_length is None or len(text.text) <= LONG:
            return text
        size = max(LONG, 16 * self.max_length)
        while size < len(text.text):
            start = text.text[:size]
            offsets = self._tokens([start], text.is_plain)["offset_mapping"][0]
            if sum(end <= size - LONG // 2 for _, end in offsets) > self.max_length + 2:
                spans = [(first, min(end, size)) for first, end in text.spans if first < size]
                return replace(text, text=start, spans=spans, share=size / len(text.text))
            size *= 4
        return text

    def warn(self, name: str) -> None:
        """Warns once of what rows of `name` say and the model will not see as it stands there."""
        if self._first_special:
            place, token = self._first_special
            warnings.warn(
                f"{name}: special tokens stand in the text of {counted(self.special_rows, 'row')}, first {token} in "
                f"{place.removeprefix(f'{name}, ')}. The model reads them as these tokens. --refuse_special_tokens "
                "refuses such rows.",
                stacklevel=3,
            )
        if self.stripped:
            warnings.warn(
                f"{name}: the chat template leaves out the reasoning of {counted(self.stripped, 'earlier answer')}. "
                "--split_turns makes one row of each answer and keeps it.",
                stacklevel=3,
            )
        if self.shortened:
            warnings.warn(
                f"{name}: the chat template shortens the tool schemas of {counted(self.shortened, 'row')}: parameters "
                "inside parameters are not all there, as when the model is used.",
                stacklevel=3,
            )

    def unused_keys(self) -> list[str]:
        """Keys of the rows' messages that neither qpsft nor the chat template reads, such as `messages.timestamp`."""
        unused = self._keys.items()
        return sorted(f"{column}.{key}" for key, column in unused if not self._chat or not self._chat.reads(key))

    def _text(self, row: dict, place: str) -> _Text:
        if "text" in row:
            return self._plain(row["text"], 0, place)
        tools = row.get("tools")
        if "messages" in row:
            return self._rendered(self._renderer(place).conversation(row["messages"], tools, place), place)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            prompt = self.arguments.prompt_format.replace("{prompt}", prompt)
            if not self.strings_as_chat:
                if tools:
                    raise RowError(
                        f"{place}: the row has tools, and plain text has no place for them.",
                        "Use a chat template that takes tools, or leave the column out: dataset_columns: "
                        "{tools: null}.",
                    )
                return self._plain(prompt + completion, len(prompt), place)
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        return self._rendered(self._renderer(place).completion(prompt, completion, tools, place), place)

    def _renderer(self, place: str) -> ChatRenderer:
        if not self._has_template:
            raise DataError(
                f"{place}: the row is made of messages, but the tokenizer has no chat template to write them with.",
                "Use an instruct model (or its tokenizer), or turn the rows into prompt and completion strings.",
            )
        if self._chat is None:
            self._chat = ChatRenderer(self.tokenizer, self.arguments.chat_date)
        return self._chat

    def _rendered(self, rendered: Rendered, place: str) -> _Text:
        if not self.arguments.split_turns:  # there, each answer's reasoning is in the row that ends with it
            self.stripped += rendered.stripped
        self.shortened += rendered.is_shortened
        return _Text(rendered.text, rendered.spans, False, place)

    def _plain(self, text: str, prompt_length: int, place: str) -> _Text:
        """Text outside a chat: the tokenizer's own special tokens around it, and one end-of-sequence token behind."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model would never learn to stop.",
                "Set eos_token in the base model's tokenizer_config.json.",
            )
        return _Text(text, [(prompt_length, len(text))], True, place)

    def _labelled(self, text: _Text, ids: list[int], offsets: list[Span]) -> Encoded:
        """A token is supervised when one of its characters is in a span. Raises RowError for a turn without a token."""
        ids = np.asarray(ids, dtype=np.int32)
        starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        shared = False
        for start, end in text.spans:
            inside = (ends > start) & (starts < end)
            supervised |= inside
            shared |= bool((inside & (starts < start)).any())
            if not text.is_plain and not inside.any():
                raise RowError(
                    f"{text.place}: an assistant turn that is to be trained on gives no token.",
                    "Mend or delete the row.",
                )
        if self.arguments.supervise_prompt:
            supervised[:] = True
        labels = np.where(supervised, ids, np.int32(IGNORED))
        if text.is_plain:
            ids, labels = self._ended(ids, labels)
        # Nothing comes before the first token to predict it from; in a packed batch the row before would.
        labels[:1] = IGNORED
        return Encoded(ids, labels, shared, round(len(ids) / text.share))

    def _ended(self, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plain text with one beginning-of-sequence token at most, and one end-of-sequence token behind."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if bos is not None and ids[:2].tolist() == [bos, bos]:
            ids, labels = ids[1:], labels[1:]
        if not len(ids) or ids[-1] != eos:
            ids, labels = np.append(ids, eos).astype(np.int32), np.append(labels, eos).astype(np.int32)
        labels[-1] = eos
        return ids, labels
