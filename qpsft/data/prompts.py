"""Prompts without answers: of a file, or the general ones that come with qpsft, for replay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qpsft.data.bad_rows import BadRow, RowError, refuse
from qpsft.data.messages import read_messages, read_text
from qpsft.data.read import Records, read_records
from qpsft.data.tokenize import encode_prompt, writes_chat
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

SHIPPED = Path(__file__).with_name("replay_prompts.txt")
"""About a hundred short general prompts, one a line, written for qpsft."""
COLUMN = "prompt"


@dataclass
class Prompts:
    """Prompts, ready to be answered.

    Attributes:
        name: their file or dataset, or "the prompts that come with qpsft".
        texts: as the user wrote them: texts, or lists of messages.
        ids: the token ids after which a model answers.
        places: where each came from.
    """

    name: str
    texts: list[str | list[dict]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __getitem__(self, part: slice) -> Prompts:
        """Some of them."""
        return Prompts(self.name, self.texts[part], self.ids[part], self.places[part])


def read_prompts(name: str | None, tokenizer: Any, arguments: DataArguments) -> Prompts:
    """Reads prompts and writes them with the chat template, or as they stand for a base without one.

    Args:
        name: a .txt file with a prompt a line; another file, built-in set or Hub id with a column `prompt` (a text, or
            messages that end with a user's turn); None for the prompts that come with qpsft.
        arguments: of the recipe: `use_chat_template` and `chat_date` are used, and `skip_bad_rows`.

    Raises:
        DataError: nothing of that name, no such column, prompts that cannot be used, or no chat template for those that
            come with qpsft.
    """
    chat = writes_chat(tokenizer, arguments)
    if name is None and not chat:
        raise DataError(
            "The replay prompts that come with qpsft are questions to an assistant, and this base has no chat template "
            "to ask them with (or use_chat_template is never).",
            "Give replay_prompts: texts as this base knows their beginnings, or rows as replay_dataset.",
        )
    records = _records(name, arguments)
    prompts = Prompts("the prompts that come with qpsft" if name is None else records.name)
    own, bad = replace(arguments, prompt_format="{prompt}"), list(records.bad)
    for index, record in enumerate(records.records):
        place = records.where(index)
        try:
            text = _read_prompt(record, place, chat)
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            ids = encode_prompt(messages, tokenizer, own)
        except RowError as error:
            bad.append(BadRow(records.numbers[index], error))
            continue
        prompts.texts.append(text)
        prompts.ids.append(ids)
        prompts.places.append(place)
    if not arguments.skip_bad_rows or not prompts.ids:
        refuse(bad, records.name, len(records.records) + len(records.bad))
    return prompts


def _records(name: str | None, arguments: DataArguments) -> Records:
    path = SHIPPED if name is None else Path(name).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        records = read_records(name, DataArguments(dataset_name=name))
        if COLUMN not in records.columns:
            raise DataError(
                f"{records.name} has no column `{COLUMN}`; there are {', '.join(map(str, records.columns))}.",
                "Name the column with the prompts so, or write them into a .txt file, one a line.",
            )
        return records
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read: {error}.", "It must be text in UTF-8, a prompt a line.") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"{name} is empty: there is no prompt in it.", "Write one prompt a line.")
    return Records(str(name), "line", [n for n, _ in numbered], [{COLUMN: text} for _, text in numbered])


def _read_prompt(record: dict, place: str, chat: bool) -> str | list[dict]:
    """A text, or messages. Raises RowError."""
    value = record.get(COLUMN)
    if not isinstance(value, list):
        text = read_text(value, COLUMN, place)
        if not text.strip():
            raise RowError(f"{place}: the prompt is empty.", "Delete it or fill it.")
        return text
    messages = read_messages(value, COLUMN, place, is_context=True)
    if messages[-1]["role"] != "user":
        raise RowError(f"{place}: the prompt ends with the turn of {messages[-1]['role']}.", "End it with the user's.")
    if not chat and len(messages) > 1:
        raise RowError(f"{place}: a prompt of several turns needs a chat template.", "Write it as one text.")
    return messages
