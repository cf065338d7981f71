"""Rows to evaluate on: prompts, references, and whether training has seen them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qpsft.data import built_in
from qpsft.data.ending import ending_tokens
from qpsft.data.messages import trained_turns
from qpsft.data.read import Records, read_records
from qpsft.data.shapes import Rows, to_rows
from qpsft.data.tokenize import IGNORED, NothingSupervised, tokenize_rows
from qpsft.errors import DataError
from qpsft.model.generation import stop_tokens
from qpsft.recipe.arguments import DataArguments

EXTRA = ("task", "choices", "checks", "ids", "cut_off")
"""Columns that training ignores: what verifiers need; `ids`, the tokens of prompt and answer as a model wrote them; and
`cut_off` for a text that the length cap ended."""
INSTRUCTION_CHECKS = "instruction_checks"
REFERENCES = ("completion", "output", "answer", "messages", "conversations", "text")


@dataclass
class Encoded:
    """Tokenized rows.

    Attributes:
        kept: indices of the rows that have something to evaluate within the model's length; the lists below are theirs.
        texts: `input_ids` and `labels` of prompt and reference; the reference's tokens are supervised.
        prompts: the tokens before the first supervised one.
        truncated: how many references of these rows go on beyond the model's length.
        length: the model's, in tokens; None if its config names none.
    """

    kept: list[int]
    texts: list[dict[str, list[int]]]
    prompts: list[list[int]]
    truncated: int
    length: int | None


def load_evaluation_rows(name: str, arguments: DataArguments, split: str = "test") -> Rows:
    """`qpsft.data.tokenize.load_rows` for rows with references, keeping the columns that verifiers need.

    Args:
        name: also `instruction_checks`.

    Raises:
        DataError: as `load_rows`, and for prompts without references.
    """
    if name == INSTRUCTION_CHECKS:
        return instruction_checks(arguments.dataset_limit)
    return with_references(read_records(name, arguments, split), arguments)


def instruction_checks(limit: int | None = None) -> Rows:
    """About fifty prompts with instructions that a program can check, written for qpsft, each with an answer."""
    path = Path(built_in.__file__).with_name(f"{INSTRUCTION_CHECKS}.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    return as_rows([json.loads(line) for line in lines[:limit]], INSTRUCTION_CHECKS)


def as_rows(rows: Sequence[dict], name: str, arguments: DataArguments | None = None) -> Rows:
    """The same for rows that are in memory already."""
    if not rows:
        raise DataError(f"{name}: there is no row to evaluate on.", "Give at least one.")
    return with_references(as_records(rows, name), arguments or DataArguments())


def as_records(rows: Sequence[dict], name: str) -> Records:
    """Rows in memory, as the records of a file."""
    return Records(name, "row", list(range(1, len(rows) + 1)), list(rows))


def with_references(records: Records, arguments: DataArguments) -> Rows:
    """`to_rows` for rows with references: conversations end in theirs, and the columns that verifiers need are kept.

    Raises:
        DataError: as `to_rows`, and for prompts without references.
    """
    columns = set(records.records[0]) | set(arguments.dataset_columns or {})
    if columns & {"prompt", "instruction", "question"} and not columns & set(REFERENCES):
        raise DataError(
            f"{records.name} has prompts but no references: its columns are {', '.join(map(str, records.records[0]))}.",
            "Add the right answers as a column `completion`, or say which column has them with "
            "--dataset_columns '{completion: …}'.",
        )
    rows = to_rows(records, arguments)
    record_of = dict(zip(records.numbers, records.records, strict=True))
    referenced = []
    for row, place, number in zip(rows.rows, rows.places, rows.numbers, strict=True):
        record = record_of[number]
        extra = {column: record[column] for column in EXTRA if record.get(column) is not None}
        referenced.append(_last_answer(row, place) | extra)
    return replace(rows, rows=referenced)


def _last_answer(row: dict, place: str) -> dict:
    """A conversation as prompt and completion: its last assistant turn that is trained on is the reference."""
    if "messages" not in row:
        return row
    messages = row["messages"]
    last = _answer_index(messages)
    if last == 0:
        raise DataError(f"{place}: the conversation starts with its answer.", "Begin with a system or user turn.")
    if last is None:
        raise DataError(
            f"{place}: every answer is marked as not trained on.", "Mark one as trained, or delete the row."
        )
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"prompt": messages[:last], "completion": [messages[last]], **tools}


def _answer_index(messages: list[dict]) -> int | None:
    return max(trained_turns(messages), default=None)


def encode(rows: Rows, model: Any, tokenizer: Any, arguments: DataArguments) -> Encoded:
    """Tokenizes rows as training does.

    Raises:
        DataError: as `tokenize_rows`; no reference begins within the model's length.
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if all("ids" in row for row in rows.rows):
        return _encoded_ids(rows, length)
    try:
        whole = replace(arguments, split_turns=False)
        tokenized = tokenize_rows(rows, tokenizer, whole, length, show_progress=False)
    except NothingSupervised:
        raise DataError(
            f"{rows.name}: no row's reference begins within the {length} tokens that the model reads.",
            "Shorten the prompts, or evaluate a model with a longer context.",
        ) from None
    index_of = {place: index for index, place in enumerate(rows.places)}
    texts = list(tokenized.dataset)
    for row, place in zip(texts, tokenized.places, strict=True):
        if rows.rows[index_of[place]].get("cut_off"):  # without the end token that tokenization added
            row |= {name: row[name][:-1] for name in ("input_ids", "labels")}
    starts = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in texts]
    return Encoded(
        [index_of[place] for place in tokenized.places],
        texts,
        [row["input_ids"][:start] for row, start in zip(texts, starts, strict=True)],
        tokenized.counts.truncated,
        length,
    )


def _encoded_ids(rows: Rows, length: int | None) -> Encoded:
    """Rows whose tokens are known, which another tokenization might not give again; without those that do not fit."""
    ids = [row["ids"] for row in rows.rows]
    kept = [i for i, (prompt, answer) in enumerate(ids) if length is None or len(prompt) + len(answer) <= length]
    if not kept:
        raise DataError(f"{rows.name}: no row fits the {length} tokens that the model reads.", "Shorten the prompts.")
    texts = [
        {"input_ids": [*prompt, *answer], "labels": [*[IGNORED] * len(prompt), *answer]}
        for prompt, answer in (ids[index] for index in kept)
    ]
    return Encoded(kept, texts, [list(ids[index][0]) for index in kept], 0, length)


def stop_ids_of(model: Any, tokenizer: Any, texts: Sequence[dict[str, list[int]]]) -> set[int]:
    """Tokens that end a completion: the model's, the tokenizer's, and the special token the references end with.

    The last is the chat template's end of turn, which training teaches whether or not the base's settings name it.
    """
    stops = stop_tokens(model, tokenizer)
    for row in texts[:1]:
        stops |= ending_tokens(row["labels"], tokenizer)
    return stops


def duplicates(train_rows: Sequence[dict], rows: Sequence[dict]) -> dict[str, int]:
    """How many of `rows` are word for word among `train_rows`.

    Args:
        train_rows, rows: rows of `Rows`; conversations count by their last answer.

    Returns:
        `duplicate_rows` (prompt and reference) and `duplicate_prompts` (the prompt alone, those rows included).
    """
    # a conversation that starts with its answer can be trained on, but has no prompt to compare
    asked = [row for row in train_rows if "messages" not in row or _answer_index(row["messages"])]
    seen = [_last_answer(row, "training") for row in asked]
    seen_rows, seen_prompts = {_key(row, True) for row in seen}, {_key(row, False) for row in seen}
    return {
        "duplicate_rows": sum(_key(row, True) in seen_rows for row in rows),
        "duplicate_prompts": sum(_key(row, False) in seen_prompts for row in rows),
    }


def _key(row: dict, with_answer: bool) -> str:
    """Prompt, or prompt and answer, spaces around them aside; one user message counts as its text."""
    if "text" in row:
        return row["text"].strip()
    return json.dumps([_plain(row["prompt"]), _plain(row["completion"]) if with_answer else None])


def _plain(turns: str | list[dict]) -> str:
    if isinstance(turns, str):
        return turns.strip()
    if len(turns) == 1:
        return (turns[0].get("content") or "").strip()
    return json.dumps([[turn["role"], turn.get("content")] for turn in turns])
