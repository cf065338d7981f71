"""Messages, tool calls and tool schemas as people write them (OpenAI, ShareGPT, others), brought to one form.

That form is OpenAI's: `role` is system, developer, user, assistant or tool; `content` is text; `reasoning_content` is
an assistant's reasoning; a tool call is {"type": "function", "function": {"name": …, "arguments": {…}}}, with its `id`
if it has one. `train: False` marks an assistant's turn that is context only. Other keys stay as they are: chat
templates may read them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qpsft.data.bad_rows import RowError

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys(("function_response", "function_result"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")
"""An assistant's turn whose content is the call, or a list of calls, as JSON."""
FLAGS = ("train", "training", "trainable", "loss", "loss_mask", "weight")
"""Keys of a message that say whether it is trained on."""
REASONING = ("reasoning_content", "reasoning", "thinking")
READ = {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "train"}
"""Keys of a message that have a meaning here or in the usual chat templates."""


def read_messages(value: Any, column: str, where: str, *, is_context: bool = False) -> list[dict]:
    """The messages of one row.

    Args:
        value: what stands in the column.
        column: its name, for errors.
        where: the row's place, for errors.
        is_context: none of them is trained on, so none may ask to be.

    Raises:
        RowError: no list of messages, an unknown role, an assistant's turn without anything to learn, a flag other than
            0 and 1, and whatever cannot be written as text or JSON.
    """
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        kind = "null" if value is None else type(value).__name__
        kind = "an empty list" if kind in ("list", "tuple", "ndarray") else kind
        raise RowError(
            f"{where}: {column} must be a list of messages, found {kind}.",
            'A message is {"role": "user", "content": "…"} (or "from" and "value").',
        )
    turns = enumerate(value, start=1)
    return [_message(message, f"{where}, {column}, turn {turn}", is_context) for turn, message in turns]


def read_tools(value: Any, where: str) -> list[dict]:
    """The tool schemas of one row, each as {"type": "function", "function": {"name": …}}; [] if there are none.

    Raises:
        RowError: no list of schemas, or one without a name.
    """
    if value is None or isinstance(value, str) and not value.strip():
        return []
    from_text = isinstance(value, str)
    value = parsed_json(value, "tools", where)
    if isinstance(value, Mapping):
        value = [value] if value else []
    if value is None or isinstance(value, (list, tuple, np.ndarray)) and not len(value):
        return []
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise RowError(f"{where}: tools must be a list of objects.", "Write them as OpenAI does.")
    return [_tool(tool, from_text, f"{where}, tools, number {number}") for number, tool in enumerate(value, start=1)]


def read_text(value: Any, column: str, where: str) -> str:
    """`value` if it is text that can be written. Raises RowError naming the column and what was there instead."""
    if isinstance(value, str):
        _check_characters(value, column, where)
        return value
    if value is None:
        raise RowError(f"{where}: {column} must be text, found null.", "Fill it or delete the row.")
    if isinstance(value, float) and math.isnan(value):
        raise RowError(f"{where}: {column} must be text, found NaN, an empty cell.", "Fill it or delete the row.")
    todo = "Write text." if isinstance(value, (Mapping, list)) else f'Write it as text: "{str(value)[:20]}".'
    raise RowError(f"{where}: {column} must be text, found {type(value).__name__} {str(value)[:40]}.", todo)


def trained_turns(messages: Sequence[dict]) -> list[int]:
    """The assistant's turns that are not marked as context."""
    turns = enumerate(messages)
    return [turn for turn, message in turns if message["role"] == "assistant" and message.get("train", True)]


def _message(message: Any, where: str, is_context: bool) -> dict:
    if isinstance(message, str) and message.lstrip().startswith("{"):
        message = parsed_json(message, "a message", where)
    if not isinstance(message, Mapping):
        raise RowError(f"{where}: a message must be an object, found {type(message).__name__}.", "Mend the row.")
    # Arrow fills the keys a message lacks with null.
    message = {key: value for key, value in message.items() if value is not None}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours not in message:
            message[ours] = message.pop(theirs)
    message["role"], is_call = _role(message, where)
    if is_call:
        message["function_call"] = message.pop("content", None)
    _read_flags(message, where, is_context)
    _read_reasoning(message, where)
    _read_calls(message, where)
    _read_content(message, where)
    return {key: message.pop(key) for key in ("role", "content") if key in message} | _read_rest(message, where)


def _role(message: dict, where: str) -> tuple[str, bool]:
    """The role by its one name, and whether it is that of a turn whose content is a call."""
    written = message.get("role")
    if not isinstance(written, str) or not written:
        keys = ", ".join(map(str, message)) or "none"
        raise RowError(f"{where}: the message has no role; found {keys}.", "Give it a role.")
    role = written.strip().lower()
    if role in CALL_ROLES:
        return "assistant", True
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {written!r}.", f"Known are {', '.join((*ROLES, *CALL_ROLES))}.")
    return ROLES[role], False


def _read_flags(message: dict, where: str, is_context: bool) -> None:
    """Replaces what says whether the turn is trained on by `train: False`, or by nothing."""
    flags = {key: message.pop(key) for key in FLAGS if key in message}
    for key, value in flags.items():
        if not isinstance(value, (bool, int, float, np.generic)) or value not in (0, 1):
            raise RowError(
                f"{where}: {key} is {str(value)[:40]}, and a turn is either trained on or not.",
                "Write 1 or true to train on it, 0 or false for context only.",
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowError(f"{where}: {' and '.join(flags)} contradict each other.", "Keep one of them.")
    trained = all(map(bool, flags.values()))
    if flags and trained and (is_context or message["role"] != "assistant"):
        turn = "the prompt" if is_context else f"the {message['role']}"
        raise RowError(
            f"{where}: {next(iter(flags))} asks to train on a turn of {turn}; qpsft trains on the assistant's turns of "
            "messages and completions.",
            "Leave it out, or write 0.",
        )
    if not trained and message["role"] == "assistant":
        message["train"] = False


def _read_reasoning(message: dict, where: str) -> None:
    written = {key: message.pop(key) for key in REASONING if key in message}
    texts = {read_text(value, key, where) for key, value in written.items()}
    texts = {text for text in texts if text.strip()}
    if len(texts) > 1:
        raise RowError(f"{where}: {' and '.join(written)} differ.", "Keep one of them.")
    if texts:
        message["reasoning_content"] = texts.pop()


def _read_calls(message: dict, where: str) -> None:
    calls = _listed(message.pop("tool_calls", None), where)
    older = _listed(message.pop("function_call", None), where)
    if calls and older:
        raise RowError(f"{where}: tool_calls stand beside the older function_call.", "Keep one of them.")
    if calls or older:
        message["tool_calls"] = [_tool_call(call, where) for call in calls or older]


def _read_content(message: dict, where: str) -> None:
    content, calls, role = message.get("content"), message.get("tool_calls"), message["role"]
    if isinstance(content, (list, tuple, np.ndarray)):
        content = _joined_parts(content, where)
    if content is None:
        if not calls and "reasoning_content" not in message:
            raise RowError(f"{where}: the {role} message has no content.", "Fill or delete it.")
        content = ""
    message["content"] = read_text(content, "content", where)
    is_trained = role == "assistant" and message.get("train", True)
    if is_trained and not calls and "reasoning_content" not in message and not content.strip():
        raise RowError(
            f"{where}: the assistant's turn is empty, which would teach the model to stop at once.",
            "Delete the row or fill the turn.",
        )


def _read_rest(message: dict, where: str) -> dict:
    """The other keys; without those that a chat template could not read, such as a date."""
    rest = {}
    for key, value in message.items():
        if key in READ:
            rest[key] = read_text(value, key, where) if key in ("name", "tool_call_id") else value
            continue
        with contextlib.suppress(RowError):
            rest[key] = _json_value(value, where)
    return rest


def _joined_parts(parts: Any, where: str) -> str:
    """OpenAI's content parts as one string; anything but text is refused."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"{where}: a content part of type {kind!r}; qpsft trains on text only.", "Remove it.")
    return "".join(part["text"] for part in parts)


def _listed(calls: Any, where: str) -> list:
    """Calls written as a list, as one object, or as JSON of these."""
    if isinstance(calls, str) and not calls.strip():
        return []
    calls = parsed_json(calls, "the tool call", where)
    if isinstance(calls, Mapping):
        return [calls] if calls else []
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple, np.ndarray)):
        raise RowError(f"{where}: tool_calls must be a list.", "Write it as OpenAI does.")
    return list(calls)


def _tool_call(call: Any, where: str) -> dict:
    if isinstance(call, str):
        call = parsed_json(call, "the tool call", where)
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where}: a tool call has no function name.", 'Write {"name": …, "arguments": {…}}.')
    if function is call:
        call = {key: call[key] for key in ("id", "type") if key in call}
        function = {key: value for key, value in function.items() if key not in call}
    arguments = function.get("arguments")
    arguments = function.get("parameters") if arguments is None else arguments  # as Llama 3.1 writes calls
    rest = {key: value for key, value in function.items() if key not in ("name", "arguments", "parameters")}
    function = {
        "name": read_text(function["name"], "the function's name", where),
        "arguments": _arguments(arguments, f"{where}, the call to {function['name']}"),
        **_json_values(rest, where),
    }
    rest = {key: value for key, value in call.items() if key not in ("type", "function")}
    return {"type": str(call.get("type") or "function"), "function": function, **_json_values(rest, where)}


def _arguments(value: Any, where: str) -> dict:
    """Arguments as an object: OpenAI writes them as JSON text, which most chat templates would encode twice."""
    if value is None or isinstance(value, str) and not value.strip():
        return {}
    from_text = isinstance(value, str)
    value = _json_value(parsed_json(value, "the arguments", where), where, keep_nulls=from_text)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(
            f"{where}: the arguments must be an object, found {type(value).__name__}.", 'Write {"name": value, …}.'
        )
    return value


def _tool(tool: Any, from_text: bool, where: str) -> dict:
    from_text = from_text or isinstance(tool, str)
    tool = _json_value(parsed_json(tool, "the tool", where), where, keep_nulls=from_text)
    if isinstance(tool, dict) and "function" not in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where}: a tool must be an object with a name.", "Write it as OpenAI does.")
    return {"type": "function", **tool}


def parsed_json(value: Any, what: str, where: str) -> Any:
    """JSON text as what it stands for; anything else as it is. Raises RowError for text that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        verb = "are" if what.endswith("s") else "is"
        raise RowError(f"{where}: {what} {verb} text, but not valid JSON.", "Mend or delete the row.") from None


def _json_values(values: Mapping, where: str) -> dict:
    return {str(key): _json_value(value, where) for key, value in values.items() if value is not None}


def _json_value(value: Any, where: str, keep_nulls: bool = False) -> Any:
    """What JSON can say of `value`. A field that is null does not exist: Arrow gives every row the fields of all rows.

    Args:
        keep_nulls: the value was written as JSON text, which Arrow does not fill in.

    Raises:
        RowError: a value that JSON has no way to write, such as a date or NaN.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        _check_characters(value, "a text", where)
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _json_value(value.tolist(), where, keep_nulls)
    if isinstance(value, (list, tuple)):
        if _is_arrow_map(value):
            return _json_value(dict(value), where, keep_nulls)
        return [_json_value(item, where, keep_nulls) for item in value]
    if isinstance(value, Mapping):
        items = {key: item for key, item in value.items() if item is not None or keep_nulls}
        for key in items:
            read_text(key, "a key", where)
        return {key: _json_value(item, where, keep_nulls) for key, item in items.items()}
    raise RowError(f"{where}: JSON has no way to write {type(value).__name__} {str(value)[:40]}.", "Write it as text.")


def _is_arrow_map(value: Any) -> bool:
    """Arrow hands maps over as lists of (key, value) tuples."""
    pairs = [item for item in value if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)]
    return bool(value) and len(pairs) == len(value)


def _check_characters(text: str, what: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where}: {what} holds \\u{ord(text[error.start]):04x}, half a surrogate pair.",
            "Delete the broken character: it stands for nothing.",
        ) from None
