"""The shapes demonstrations come in, told by their columns and brought to one of three: see `Rows`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qpsft.data.bad_rows import BadRow, RowError, refuse
from qpsft.data.messages import parsed_json, read_messages, read_text, read_tools, trained_turns
from qpsft.data.read import Records
from qpsft.errors import DataError, boundary
from qpsft.recipe.arguments import DataArguments

SHAPES = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Each shape and the columns that make it."""

OPTIONAL = {
    "prompt_completion": ("system", "tools"),
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history", "tools"),
    "text": (),
}
"""Columns that are used where a row has them."""
COLUMNS = sorted({column for group in (SHAPES, OPTIONAL) for columns in group.values() for column in columns})
KNOWN = "prompt + completion, messages, conversations, instruction (+ input) + output, text"


@dataclass
class Rows:
    """Demonstrations in one shape.

    Attributes:
        name: the file or dataset, as the user wrote it.
        shape: the shape of the source, a key of `SHAPES`.
        rows: one dict per row: {"prompt": str | list[message], "completion": str | list[message]} (prompt_completion
            and alpaca), {"messages": list[message]} (messages and sharegpt), or {"text": str}; beside them "tools"
            where the row has some. Messages are as `qpsft.data.messages` describes.
        places: where each row came from, such as "data.jsonl, line 57".
        unused_columns: columns of the source that are in none of the rows.
        numbers: the line or row number of each row; counted from 1 if left out.
        bad: rows of the source that cannot be used.
    """

    name: str
    shape: str
    rows: list[dict]
    places: list[str]
    unused_columns: list[str]
    numbers: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers = self.numbers or list(range(1, len(self.rows) + 1))

    def select(self, indices: Sequence[int]) -> Rows:
        """The rows of these indices (from 0), in this order."""
        columns = {name: [getattr(self, name)[i] for i in indices] for name in ("rows", "places", "numbers")}
        return replace(self, **columns)

    @property
    def total(self) -> int:
        """Rows of the source, bad ones included."""
        return len(self.rows) + len(self.bad)


def to_rows(records: Records, arguments: DataArguments) -> Rows:
    """`read_rows`, but bad rows are an error unless `arguments.skip_bad_rows` is set.

    Raises:
        DataError: as `read_rows`; bad rows, or no other ones: the first five with their lines, and how many there are.
    """
    rows = read_rows(records, arguments)
    if not arguments.skip_bad_rows or not rows.rows:
        refuse(rows.bad, rows.name, rows.total)
    return rows


def read_rows(records: Records, arguments: DataArguments) -> Rows:
    """Tell the shape of `records` (non-empty) and bring every row to it; what cannot be goes into `Rows.bad`.

    Args:
        arguments: `dataset_shape`, `dataset_columns` and, for prompts beside a system text, `prompt_format` are used.

    Raises:
        DataError: columns that fit no shape or several, or a mapping to a column that is not there.
    """
    reader = RowReader(records, arguments)
    rows = Rows(records.name, reader.shape, [], [], [], bad=list(records.bad))
    for index, record in enumerate(records.records):
        where = records.where(index)
        try:
            row = reader.read(record, where)
        except RowError as error:
            rows.bad.append(BadRow(records.numbers[index], error))
            continue
        rows.rows.append(row)
        rows.places.append(where)
        rows.numbers.append(records.numbers[index])
    rows.unused_columns = [column for column in records.columns if column not in reader.columns]
    return rows


class RowReader:
    """Brings rows to one shape, which the first ones tell.

    Args:
        records: non-empty; all rows of the source, or its first ones.
        arguments: as in `read_rows`.
        columns: gives those of all rows, where `records` are the first ones; asked if a mapping names another.

    Attributes:
        shape: a key of `SHAPES`.
        columns: those of the source that are used.

    Raises:
        DataError: as `read_rows`.
    """

    def __init__(self, records: Records, arguments: DataArguments, columns: Callable[[], list[str]] | None = None):
        mapping = _check_mapping(arguments.dataset_columns or {}, records, columns)
        left_out = {column for column, yours in mapping.items() if yours is None}
        mapping = {column: yours for column, yours in mapping.items() if yours is not None}
        self.shape = _find_shape(arguments.dataset_shape, mapping, list(records.records[0]), records)
        known = [column for column in (*SHAPES[self.shape], *OPTIONAL[self.shape]) if column not in left_out]
        self._source = {column: mapping.get(column, column) for column in known}
        self._prompt_format = arguments.prompt_format
        self.columns = set(self._source.values())

    def read(self, record: dict, where: str) -> dict:
        """One of `Rows.rows`. Raises RowError if the row, which is at `where`, cannot be used."""
        with boundary(f"{where}: the row cannot be read", RowError, "Mend or delete the row."):
            try:
                return _read_row(self.shape, record, self._source, self._prompt_format, where)
            except RecursionError:
                raise RowError(f"{where}: its values are nested too deeply.", "Mend or delete the row.") from None


def split_answers(row: dict, place: str) -> list[tuple[dict, str]]:
    """One row per answer that is trained on, with all that precedes it as its prompt, and the place of each."""
    parts = list(_answers_of(row))
    if len(parts) == 1:
        return [(parts[0], place)]
    return [(part, f"{place}, answer {index} of {len(parts)}") for index, part in enumerate(parts, start=1)]


def _answers_of(row: dict) -> Iterator[dict]:
    if "messages" not in row and not isinstance(row.get("prompt"), list):
        yield row
        return
    prompt = row.get("prompt", [])
    messages = [*prompt, *row.get("messages", []), *row.get("completion", [])]
    trained = [turn for turn in trained_turns(messages) if turn >= len(prompt)]
    if not trained or trained[0] == 0:  # nothing to learn, or an answer without a question: tokenization says so
        yield row
        return
    tools = {"tools": row["tools"]} if "tools" in row else {}
    for turn in trained:
        yield {"prompt": messages[:turn], "completion": [messages[turn]], **tools}


def _listed(columns) -> str:
    return ", ".join(map(str, columns)) or "none"


def _check_mapping(
    mapping: dict, records: Records, all_columns: Callable[[], list[str]] | None
) -> dict[str, str | None]:
    """`dataset_columns` as it is, if it can be right. A column of None is not to be used."""
    columns = records.columns
    if all_columns is not None and any(yours is not None and yours not in columns for yours in mapping.values()):
        columns = all_columns()
    for known, yours in mapping.items():
        if known not in COLUMNS:
            near = difflib.get_close_matches(str(known), COLUMNS, n=1)
            raise DataError(
                f"dataset_columns names {known!r}, which is no column qpsft knows ({', '.join(COLUMNS)}).",
                f"Did you mean {near[0]}?" if near else "It maps known columns to yours: {prompt: question}.",
            )
        if yours is not None and yours not in columns:
            near = difflib.get_close_matches(str(yours), map(str, columns), n=1)
            raise DataError(
                f"dataset_columns maps {known} to {yours!r}, but no row of {records.name} has such a column; "
                f"there are {_listed(columns)}.",
                f"Did you mean {near[0]}?" if near else "Name one of these.",
            )
    return mapping


def _find_shape(asked: str, mapping: dict[str, str], columns: list[str], records: Records) -> str:
    have = set(mapping) | (set(columns) - set(mapping.values()))
    if asked != "auto":
        missing = [column for column in SHAPES[asked] if column not in have]
        if missing:
            raise DataError(
                f"dataset_shape {asked} needs {_listed(missing)}, but {records.where(0)} has {_listed(columns)}.",
                _mapping_example(SHAPES[asked], columns),
            )
        return asked
    # What the user mapped on purpose decides before what the file happens to carry beside it.
    for names in (set(mapping), have):
        fits = [shape for shape, needed in SHAPES.items() if names.issuperset(needed)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise DataError(
                f"{records.name}: its columns ({_listed(columns)}) fit several shapes: {', '.join(fits)}.",
                f"Say which with dataset_shape, for instance dataset_shape: {fits[0]}.",
            )
    raise DataError(
        f"{records.where(0)}: its columns ({_listed(columns)}) fit no shape qpsft knows: {KNOWN}.",
        _mapping_example(SHAPES["prompt_completion"], columns),
    )


def _mapping_example(needed: tuple[str, ...], columns: list[str]) -> str:
    yours = columns if len(columns) >= len(needed) else ("question", "answer")
    pairs = ", ".join(f"{known}: {column}" for known, column in zip(needed, yours, strict=False))
    return f"Say which column is which, for instance dataset_columns: {{{pairs}}}."


def _read_row(shape: str, record: dict, source: dict[str, str], prompt_format: str, where: str) -> dict:
    for column in SHAPES[shape]:
        if source[column] not in record:
            renamed = f" (mapped to {column})" if source[column] != column else ""
            raise RowError(
                f"{where}: the column {source[column]!r}{renamed} is missing; found {_listed(record)}.",
                "Mend or delete the row.",
            )
    row = {column: _as_list(record[yours]) for column, yours in source.items() if yours in record}
    if shape == "text":
        text = read_text(row["text"], "text", where)
        if not text.strip():
            raise RowError(f"{where}: the text is empty.", "Delete the row or fill it.")
        return {"text": text}
    system = _optional_text(row.get("system"), "system", where)
    tools = read_tools(row.get("tools"), where)
    tools = {"tools": tools} if tools else {}
    if shape in ("messages", "sharegpt"):
        column = SHAPES[shape][0]
        messages = read_messages(row[column], column, where)
        _require_assistant(messages, column, where)
        return {"messages": _with_system(system, messages, where), **tools}
    if shape == "alpaca":
        parts = [read_text(row["instruction"], "instruction", where), _optional_text(row.get("input"), "input", where)]
        prompt, completion = (
            "\n\n".join(part for part in parts if part.strip()),
            _answer(row["output"], "output", where),
        )
    else:
        prompt, completion = _prompt_completion(row["prompt"], row["completion"], where)
    earlier = _history(row.get("history"), prompt_format, where)
    if isinstance(prompt, str) and (system or earlier):
        prompt = [*earlier, _turn("user", prompt_format.replace("{prompt}", prompt))]
        completion = [_turn("assistant", completion)]
    if isinstance(prompt, list):
        prompt = _with_system(system, prompt, where)
    return {"prompt": prompt, "completion": completion, **tools}


def _as_list(value: Any) -> Any:
    """NumPy arrays, which pandas makes of lists, as lists; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _with_system(system: str, messages: list[dict], where: str) -> list[dict]:
    """`messages` after the column's system text, if there is one."""
    first = messages[0]
    if not system or first["role"] == "system" and first["content"].strip() == system.strip():
        return messages
    if first["role"] == "system":
        raise RowError(
            f"{where}: the column system says one thing and the conversation's system turn another.",
            "Keep one of them; dataset_columns: {system: null} leaves the column out.",
        )
    return [_turn("system", system), *messages]


def _history(value: Any, prompt_format: str, where: str) -> list[dict]:
    """Alpaca's earlier exchanges, [[question, answer], …], as messages. They are context, never trained on."""
    pairs = parsed_json(value, "history", where) if isinstance(value, str) and value.strip() else value
    if pairs is None or _is_nan(pairs) or pairs in ("", []):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise RowError(f"{where}: history must be a list of [question, answer] pairs.", "Mend or delete the row.")
    messages = []
    for question, answer in pairs:
        question, answer = read_text(question, "history", where), _answer(answer, "history", where)
        messages += [_turn("user", prompt_format.replace("{prompt}", question)), _turn("assistant", answer)]
    return messages


def _prompt_completion(prompt: Any, completion: Any, where: str) -> tuple[str, str] | tuple[list[dict], list[dict]]:
    """Both strings or both message lists; one string beside one list becomes a message."""
    if isinstance(prompt, list):
        prompt = read_messages(prompt, "prompt", where, is_context=True)
    else:
        prompt = read_text(prompt, "prompt", where)
    if not isinstance(completion, list):
        completion = _answer(completion, "completion", where)
        return prompt, completion if isinstance(prompt, str) else [_turn("assistant", completion)]
    completion = read_messages(completion, "completion", where)
    _require_assistant(completion, "completion", where)
    return [_turn("user", prompt)] if isinstance(prompt, str) else prompt, completion


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _optional_text(value: Any, column: str, where: str) -> str:
    """The text of a column that may be empty; "" for nothing but spaces."""
    text = "" if value is None or _is_nan(value) else read_text(value, column, where)
    return text if text.strip() else ""


def _answer(value: Any, column: str, where: str) -> str:
    text = read_text(value, column, where)
    if not text.strip():
        raise RowError(
            f"{where}: the {column} is empty, which would teach the model to stop at once.",
            "Delete the row or fill it.",
        )
    return text


def _require_assistant(messages: list[dict], column: str, where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError(
            f"{where}: {column} has no assistant turn to learn from; its roles are {_listed(roles)}.",
            "Add the answer, or name its role `assistant`.",
        )
