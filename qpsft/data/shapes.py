"""The shapes demonstrations come in, found by their columns and brought to one of three: see `Rows`."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass

from qpsft.data.read import Records
from qpsft.errors import DataError
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
    "prompt_completion": ("tools",),
    "messages": ("tools",),
    "sharegpt": ("tools",),
    "alpaca": ("input",),
    "text": (),
}
COLUMNS = sorted({column for group in (SHAPES, OPTIONAL) for columns in group.values() for column in columns})
KNOWN = "prompt + completion, messages, conversations, instruction (+ input) + output, text"

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass
class Rows:
    """Demonstrations in one shape.

    Attributes:
        name: the file or dataset, as the user wrote it.
        shape: the shape found in the source, a key of `SHAPES`.
        rows: one dict per row: {"prompt": str | list[message], "completion": str | list[message]} (prompt_completion
            and alpaca), {"messages": list[message]} (messages and sharegpt), or {"text": str}; beside them "tools"
            where the row has some. A message has "role" (system, user, assistant, tool, …) and mostly "content".
        places: where each row came from, such as "data.jsonl, line 57".
        unused_columns: columns of the source that are in none of the rows.
    """

    name: str
    shape: str
    rows: list[dict]
    places: list[str]
    unused_columns: list[str]


def to_rows(records: Records, arguments: DataArguments) -> Rows:
    """Find the shape of `records` (non-empty) and bring every row to it.

    Raises:
        DataError: columns that fit no shape or several, a mapping to a column that is not there, a row that lacks a
            column, holds the wrong type or has an empty completion; names the file and line.
    """
    columns = list(records.records[0])
    mapping = _check_mapping(arguments.dataset_columns or {}, columns, records)
    shape = _find_shape(arguments.dataset_shape, mapping, columns, records)
    source = {column: mapping.get(column, column) for column in (*SHAPES[shape], *OPTIONAL[shape])}
    rows, places = [], []
    for index, record in enumerate(records.records):
        where = records.where(index)
        for column in SHAPES[shape]:
            if source[column] not in record:
                renamed = f" (mapped to {column})" if source[column] != column else ""
                raise DataError(
                    f"{where}: the column {source[column]!r}{renamed} is missing; found {_listed(record)}.",
                    "Mend or delete the row.",
                )
        rows.append(_normalise(shape, {c: record[s] for c, s in source.items() if s in record}, where))
        places.append(where)
    unused = [column for column in columns if column not in source.values()]
    return Rows(records.name, shape, rows, places, unused)


def _listed(columns) -> str:
    return ", ".join(map(str, columns)) or "none"


def _check_mapping(mapping: dict, columns: list[str], records: Records) -> dict[str, str]:
    for known, yours in mapping.items():
        if known not in COLUMNS:
            near = difflib.get_close_matches(str(known), COLUMNS, n=1)
            raise DataError(
                f"dataset_columns names {known!r}, which is no column qpsft knows ({', '.join(COLUMNS)}).",
                f"Did you mean {near[0]}?" if near else "It maps known columns to yours: {prompt: question}.",
            )
        if yours not in columns:
            near = difflib.get_close_matches(str(yours), columns, n=1)
            raise DataError(
                f"dataset_columns maps {known} to {yours!r}, but {records.where(0)} has no such column; "
                f"found {_listed(columns)}.",
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


def _normalise(shape: str, row: dict, where: str) -> dict:
    if shape == "text":
        text = _text(row["text"], "text", where)
        if not text.strip():
            raise DataError(f"{where}: the text is empty.", "Delete the row or fill it.")
        return {"text": text}
    if shape == "alpaca":
        given = row.get("input")
        parts = [_text(row["instruction"], "instruction", where)]
        parts += [_text(given, "input", where)] if given is not None else []
        prompt = "\n\n".join(part for part in parts if part.strip())
        return {"prompt": prompt, "completion": _answer(row["output"], "output", where)}
    tools = _tools(row.get("tools"), where)
    if shape == "prompt_completion":
        return {**_prompt_completion(row["prompt"], row["completion"], where), **tools}
    column = SHAPES[shape][0]
    messages = _messages(row[column], column, where)
    _require_assistant(messages, column, where)
    return {"messages": messages, **tools}


def _prompt_completion(prompt: object, completion: object, where: str) -> dict:
    """Both strings or both message lists; one string beside one list becomes a message."""
    prompt = _messages(prompt, "prompt", where) if isinstance(prompt, list) else _text(prompt, "prompt", where)
    if isinstance(completion, list):
        completion = _messages(completion, "completion", where)
        _require_assistant(completion, "completion", where)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    else:
        completion = _answer(completion, "completion", where)
        if isinstance(prompt, list):
            completion = [{"role": "assistant", "content": completion}]
    return {"prompt": prompt, "completion": completion}


def _answer(value: object, column: str, where: str) -> str:
    text = _text(value, column, where)
    if not text.strip():
        raise DataError(
            f"{where}: the {column} is empty, which would teach the model to stop at once.",
            "Delete the row or fill it.",
        )
    return text


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]}"
        raise DataError(f"{where}: {column} must be text, found {found}.", 'Write text: "42", not 42.')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} holds \\u{ord(value[error.start]):04x}, half a surrogate pair.",
            "Delete the broken character: it stands for nothing.",
        ) from None
    return value


def _require_assistant(messages: list[dict], column: str, where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(
            f"{where}: {column} has no assistant turn to learn from; its roles are {_listed(roles)}.",
            "Add the answer, or name its role `assistant`.",
        )


def _messages(value: object, column: str, where: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else "null" if value is None else type(value).__name__
        raise DataError(
            f"{where}: {column} must be a list of messages, found {found}.",
            'A message is {"role": "user", "content": "…"} (or "from" and "value").',
        )
    return [_message(message, f"{where}, {column}, turn {turn}") for turn, message in enumerate(value, start=1)]


def _message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message must be an object, found {type(message).__name__}.", "Mend the row.")
    # Arrow fills the keys a message lacks with null.
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise DataError(f"{where}: unknown speaker {speaker!r}.", f"Known are {', '.join(SHAREGPT_ROLES)}.")
        message["role"] = SHAREGPT_ROLES[speaker]
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"{where}: the message has no role; found {_listed(message)}.", "Give it a role.")
    if message.pop("weight", 1) == 0:
        raise DataError(
            f"{where}: weight 0 asks not to train on this turn, but qpsft trains on every assistant turn.",
            "Use prompt and completion to train on the last turn only.",
        )
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"], where)
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{where}: tool_calls must be a list.", "Write it as OpenAI does.")
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    elif "content" not in message:
        raise DataError(f"{where}: the {message['role']} message has no content.", "Fill or delete it.")
    if "content" in message:
        text = _text(message["content"], "content", where)
        if message["role"] == "assistant" and not calls and not text.strip():
            raise DataError(
                f"{where}: the assistant's turn is empty, which would teach the model to stop at once.",
                "Delete the row or fill the turn.",
            )
    return message


def _joined_parts(parts: list, where: str) -> str:
    """OpenAI's content parts as one string; anything but text is refused."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: a content part of type {kind!r}; qpsft trains on text only.", "Remove it.")
    return "".join(part["text"] for part in parts)


def _tool_call(call: object, where: str) -> dict:
    """Arguments as an object: OpenAI writes them as a JSON string, which most chat templates would encode twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where}: a tool call has no function name.", 'Write {"function": {"name": …, "arguments": …}}.'
        )
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        function = {**function, "arguments": json.loads(arguments)}
    except ValueError:
        raise DataError(
            f"{where}: the arguments of the call to {function['name']} are not valid JSON.", "Mend or delete the row."
        ) from None
    return {**call, "function": function} if "function" in call else function


def _tools(value: object, where: str) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: tools is a string, but not valid JSON.", "Mend or delete the row.") from None
    if not value:
        return {}
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools must be a list of objects.", "Write them as OpenAI does.")
    return {"tools": value}
