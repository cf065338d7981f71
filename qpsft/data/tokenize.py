"""Demonstrations -> token ids and labels, ready for the trainer: which tokens the model sees, which it learns.

Every row becomes one text and the character spans of it that are supervised; the text is tokenized once, and a token is
supervised when it overlaps a span. So masking goes by position: an end-of-sequence token that belongs to an answer is
supervised even if the same id pads the batch later.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow
from tqdm import tqdm

from qpsft.data.bad_rows import BadRow, RowError, first_lines, refuse
from qpsft.data.chat_date import dated_template
from qpsft.data.contents import Span
from qpsft.data.counts import DataCounts, counted
from qpsft.data.dialect import Dialect
from qpsft.data.messages import READ
from qpsft.data.read import Records, read_records
from qpsft.data.render import limited, refused
from qpsft.data.shapes import Rows, read_rows, split_answers, to_rows
from qpsft.data.special_tokens import SpecialTokenFinder
from qpsft.data.template import ChatRenderer, Rendered
from qpsft.errors import DataError, boundary
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
) -> TokenizedRows:
    """Read and tokenize `arguments.dataset_name`: `read_records`, then `tokenize_records`.

    Args:
        split: split of a Hub or built-in set; `arguments.dataset_train_split` if None.
    """
    if not arguments.dataset_name:
        raise DataError(
            "dataset_name is missing: there is nothing to train on.", "Name a file, a Hub id or demo-noisy."
        )
    records = read_records(arguments.dataset_name, arguments, split or arguments.dataset_train_split)
    return tokenize_records(records, tokenizer, arguments, max_length, show_progress)


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
    encode = RowEncoder(tokenizer, arguments)
    conversations = rows.total if arguments.split_turns else None
    rows = split_answers(rows) if arguments.split_turns else rows
    kept = _Kept(DataCounts(rows=rows.total, conversations=conversations, max_length=max_length))
    bad = list(rows.bad)
    for row, place, number in _with_bar(rows, show_progress):
        try:
            kept.add(*encode(row, place), place)
        except RowError as error:
            bad.append(BadRow(number, error))
    if not arguments.skip_bad_rows or len(bad) == rows.total:
        refuse(bad, rows.name, rows.total)
    counts = kept.counted(bad, rows.name)
    counts.unused_columns = [*rows.unused_columns, *encode.unused_keys(rows.rows)]
    counts.stripped_reasoning, counts.shortened_schemas = encode.stripped, encode.shortened
    counts.special_tokens = encode.special_rows
    if not kept.places:
        raise _nothing_supervised(rows.name, counts)
    encode.warn(rows.name)
    return TokenizedRows(rows.name, rows.shape, kept.dataset(), counts, kept.places)


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
        kept.add(ids, labels, False, place)
    counts = kept.counted([], name)
    counts.dropped |= dropped
    return TokenizedRows(name, shape, kept.dataset(), counts, kept.places)


def _with_bar(rows: Rows, show_progress: bool) -> Iterator[tuple[dict, str, int]]:
    """Every row, its place and its number; with a bar on standard error if they are many."""
    return tqdm(
        zip(rows.rows, rows.places, rows.numbers, strict=True),
        total=len(rows.rows),
        desc=f"Tokenizing {rows.name}",
        unit=" rows",
        file=sys.stderr,
        disable=not show_progress or len(rows.rows) < ROWS_WORTH_A_BAR,
    )


class _Kept:
    """The rows to train on, cut at `max_length`, and the counts as they grow."""

    def __init__(self, counts: DataCounts):
        self.counts = counts
        self.places: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        self._dropped: Counter[str] = Counter()
        self._lengths: list[int] = []

    def add(self, ids: np.ndarray, labels: np.ndarray, shared: bool, place: str) -> None:
        """Takes one row in, or drops it if nothing in it is supervised."""
        self._lengths.append(len(ids))
        ids, labels, was_cut, reason = cut_row(ids, labels, self.counts.max_length)
        if reason:
            self._dropped[reason] += 1
            return
        self._columns["input_ids"].append(ids)
        self._columns["labels"].append(labels)
        self.places.append(place)
        self.counts.truncated += was_cut
        self.counts.tokens += len(ids)
        self.counts.supervised_tokens += int((labels != IGNORED).sum())
        self.counts.shared_tokens += shared

    def counted(self, bad: list[BadRow], name: str) -> DataCounts:
        """The counts, when all rows but the bad ones have been added."""
        lengths = sorted(self._lengths)
        percentiles = {p: lengths[math.ceil(p / 100 * len(lengths)) - 1] for p in PERCENTILES}
        self.counts.length_percentiles = percentiles
        self.counts.dropped = ({BAD: len(bad)} if bad else {}) | dict(self._dropped)
        self.counts.bad_rows = first_lines(bad, name)
        return self.counts

    def dataset(self) -> datasets.Dataset:
        """Columns of int32 arrays, one per row, in memory. `Dataset.from_dict` takes ten times as long to see that."""
        arrays = {}
        for name, rows in self._columns.items():
            ends = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
            arrays[name] = pyarrow.ListArray.from_arrays(ends, np.concatenate(rows))
        return datasets.Dataset(pyarrow.table(arrays))


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


class RowEncoder:
    """One row -> its ids and labels, by the tokenizer's rules and the user's choices.

    Attributes:
        stripped: earlier answers so far whose reasoning the chat template has left out on purpose.
        shortened: rows so far whose tool schemas it has simplified.
        special_rows: rows so far whose own text holds a special token.
    """

    def __init__(self, tokenizer: Any, arguments: DataArguments):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token covers, which the labels need.",
                "Use a base model whose folder has a tokenizer.json.",
            )
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.strings_as_chat = writes_chat(tokenizer, arguments)
        self.stripped = self.shortened = self.special_rows = 0
        self._first_special: tuple[str, str] | None = None
        self._special_tokens = SpecialTokenFinder(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self._chat: ChatRenderer | None = None

    def __call__(self, row: dict, place: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """One of `Rows.rows` -> ids, labels (int32, equally long), whether prompt and completion share a token.

        Raises:
            RowError: the row cannot be used. DataError: no row can be.
        """
        with boundary(f"{place}: the row cannot be used", RowError, "Mend or delete the row."):
            return self._encoded(row, place)

    def _encoded(self, row: dict, place: str) -> tuple[np.ndarray, np.ndarray, bool]:
        if special := self._special_tokens.first(row):
            if self.arguments.refuse_special_tokens:
                raise RowError(
                    f"{place}: its text holds {special}, which the tokenizer would read as a special token.",
                    "Write it another way, or leave refuse_special_tokens out.",
                )
            self.special_rows += 1
            self._first_special = self._first_special or (place, special)
        ids, labels, shared = self._encode(row, place)
        # Nothing comes before the first token to predict it from; in a packed batch the row before would.
        labels[:1] = IGNORED
        return ids, labels, shared

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

    def unused_keys(self, rows: Sequence[dict]) -> list[str]:
        """Keys of messages that neither qpsft nor the chat template reads, such as `messages.timestamp`."""
        keys = {}
        for row in rows:
            for column in ("prompt", "completion", "messages"):
                for message in row[column] if isinstance(row.get(column), list) else ():
                    if len(message) > 2:
                        known = READ if message["role"] == "tool" else READ - {"name", "tool_call_id"}
                        keys |= {key: column for key in message.keys() - known}
        return sorted(f"{column}.{key}" for key, column in keys.items() if not self._chat or not self._chat.reads(key))

    def _encode(self, row: dict, place: str) -> tuple[np.ndarray, np.ndarray, bool]:
        if "text" in row:
            return self._plain(row["text"], 0)
        tools = row.get("tools")
        if "messages" in row:
            return self._label_rendered(self._renderer(place).conversation(row["messages"], tools, place), place)
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
                return self._plain(prompt + completion, len(prompt))
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        return self._label_rendered(self._renderer(place).completion(prompt, completion, tools, place), place)

    def _renderer(self, place: str) -> ChatRenderer:
        if not self._has_template:
            raise DataError(
                f"{place}: the row is made of messages, but the tokenizer has no chat template to write them with.",
                "Use an instruct model (or its tokenizer), or turn the rows into prompt and completion strings.",
            )
        if self._chat is None:
            self._chat = ChatRenderer(self.tokenizer, self.arguments.chat_date)
        return self._chat

    def _label_rendered(self, rendered: Rendered, place: str) -> tuple[np.ndarray, np.ndarray, bool]:
        if not self.arguments.split_turns:  # there, each answer's reasoning is in the row that ends with it
            self.stripped += rendered.stripped
        self.shortened += rendered.is_shortened
        ids, labels, shared, empty = self._label(rendered.text, rendered.spans)
        if empty:
            raise RowError(
                f"{place}: an assistant turn that is to be trained on gives no token.", "Mend or delete the row."
            )
        return ids, labels, shared

    def _plain(self, text: str, prompt_length: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Text outside a chat: the tokenizer's own special tokens around it, and one end-of-sequence token behind."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if eos is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model would never learn to stop.",
                "Set eos_token in the base model's tokenizer_config.json.",
            )
        ids, labels, shared, _ = self._label(text, [(prompt_length, len(text))], add_special_tokens=True)
        if bos is not None and ids[:2].tolist() == [bos, bos]:
            ids, labels = ids[1:], labels[1:]
        if not len(ids) or ids[-1] != eos:
            ids, labels = np.append(ids, eos).astype(np.int32), np.append(labels, eos).astype(np.int32)
        labels[-1] = eos
        return ids, labels, shared

    def _label(
        self, text: str, spans: list[Span], add_special_tokens: bool = False
    ) -> tuple[np.ndarray, np.ndarray, bool, bool]:
        """Tokenize `text`; a token is supervised when one of its characters is in one of `spans`.

        Returns:
            ids, labels, whether a token lies across the start of a span, whether a span has no token.
        """
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        shared = empty = False
        for start, end in spans:
            inside = (ends > start) & (starts < end)
            supervised |= inside
            shared |= bool((inside & (starts < start)).any())
            empty |= not inside.any()
        if self.arguments.supervise_prompt:
            supervised[:] = True
        return ids, np.where(supervised, ids, np.int32(IGNORED)), shared, empty
