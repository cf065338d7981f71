"""One row -> token ids and labels: which tokens the model sees, which it learns.

Every row becomes one text and the character spans of it that are supervised; the text is tokenized once, and a token is
supervised when it overlaps a span. So masking goes by position: an end-of-sequence token that belongs to an answer is
supervised even if the same id pads the batch later.

Nothing here imports torch: worker processes (`qpsft.data.workers`) are to start quickly and to be small.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from qpsft.data.bad_rows import RowError
from qpsft.data.chat_date import dated_template
from qpsft.data.contents import Span
from qpsft.data.counts import counted
from qpsft.data.dialect import Dialect
from qpsft.data.messages import READ
from qpsft.data.render import limited, refused
from qpsft.data.special_tokens import SpecialTokenFinder
from qpsft.data.template import ChatRenderer, Rendered, reads
from qpsft.errors import DataError, boundary
from qpsft.recipe.arguments import DataArguments

IGNORED = -100
"""The label of a token that is not supervised."""
LONG = 50_000
"""Characters beyond which only the start of a row is tokenized, where `max_length` needs no more."""


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


@dataclass
class Noted:
    """What an encoder has noted of its rows.

    Attributes:
        stripped: earlier answers whose reasoning the chat template has left out on purpose.
        shortened: rows whose tool schemas it has simplified.
        special_rows: rows whose own text holds a special token.
        first_special: place and token of the first of them.
        keys: keys of the rows' messages that have no meaning here -> the column they stand in.
        templates: the chat templates that rows were written with.
    """

    stripped: int = 0
    shortened: int = 0
    special_rows: int = 0
    first_special: tuple[str, str] | None = None
    keys: dict[str, str] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)

    def add(self, later: Noted) -> None:
        """Takes in what was noted of the rows that follow."""
        self.stripped += later.stripped
        self.shortened += later.shortened
        self.special_rows += later.special_rows
        self.first_special = self.first_special or later.first_special
        self.keys |= later.keys
        self.templates |= later.templates


class RowEncoder:
    """Rows -> their ids and labels, by the tokenizer's rules and the user's choices.

    Args:
        max_length: tokens of a row that are used; None for all.

    Attributes:
        noted: of the rows so far.
        on_all_cores: many rows are tokenized at once on all cores.
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
        self.noted = Noted()
        self.on_all_cores = True
        self._special_tokens = SpecialTokenFinder(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self._chat: ChatRenderer | None = None

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
        if self._chat is not None:
            self.noted.templates |= self._chat.sources
        return results

    def _tokens(self, texts: list[str], add_special_tokens: bool) -> Any:
        """Ids and offsets of texts."""
        before = os.environ.get("TOKENIZERS_PARALLELISM")  # what tokenizers look at for each call
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if self.on_all_cores and len(texts) > 1 else before or "false"
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
                    self.noted.keys |= {key: column for key in message.keys() - known}
        if special := self._special_tokens.first(row):
            if self.arguments.refuse_special_tokens:
                raise RowError(
                    f"{place}: its text holds {special}, which the tokenizer would read as a special token.",
                    "Write it another way, or leave refuse_special_tokens out.",
                )
            self.noted.special_rows += 1
            self.noted.first_special = self.noted.first_special or (place, special)

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
        noted = self.noted
        if noted.first_special:
            place, token = noted.first_special
            warnings.warn(
                f"{name}: special tokens stand in the text of {counted(noted.special_rows, 'row')}, first {token} in "
                f"{place.removeprefix(f'{name}, ')}. The model reads them as these tokens. --refuse_special_tokens "
                "refuses such rows.",
                stacklevel=3,
            )
        if noted.stripped:
            warnings.warn(
                f"{name}: the chat template leaves out the reasoning of {counted(noted.stripped, 'earlier answer')}. "
                "--split_turns makes one row of each answer and keeps it.",
                stacklevel=3,
            )
        if noted.shortened:
            warnings.warn(
                f"{name}: the chat template shortens the tool schemas of {counted(noted.shortened, 'row')}: parameters "
                "inside parameters are not all there, as when the model is used.",
                stacklevel=3,
            )

    def unused_keys(self) -> list[str]:
        """Keys of the rows' messages that neither qpsft nor the chat template reads, such as `messages.timestamp`."""
        templates = self.noted.templates
        return sorted(f"{column}.{key}" for key, column in self.noted.keys.items() if not reads(templates, key))

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
            self.noted.stripped += rendered.stripped
        self.noted.shortened += rendered.is_shortened
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
        starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
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
