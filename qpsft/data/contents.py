"""What a conversation says, and whether a rendered text says it too: nothing may be lost between a row and its tokens.

A message's parts are its content, its reasoning, and the names, keys and values of its tool calls. A part is there if
one of the ways to write it (as it is, or inside JSON) stands in the stretch of text that belongs to its turn. A stretch
that one part has taken counts for no other, so that the same words in another turn cannot hide a loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Span = tuple[int, int]
"""Start and end of a stretch of characters, the end not included."""

OPEN_THINKING, CLOSE_THINKING = "<think>", "</think>"
_OPEN_THINKING = re.compile(r"\s*<think>")
_SWITCH = re.compile(r"/(no_think|think)\b")
"""Switches that a template (SmolLM3) takes out of a system turn and obeys."""


@dataclass(frozen=True)
class Part:
    """One thing that a message says.

    Attributes:
        kind: content, reasoning, call (its name) or argument (a key or value); tool for what a schema must say (its
            name, its description, its parameters), schema for what stands deeper in it.
        text: what must be found.
        label: what to call it in an error.
        is_word: it must not stand inside a longer word: names, keys, numbers.
    """

    kind: str
    text: str
    label: str
    is_word: bool = False


@dataclass(frozen=True)
class Loss:
    """A part that is not in the text. `turn`: its message's index; None for tool schemas."""

    turn: int | None
    part: Part


def message_parts(message: dict) -> list[Part]:
    """All that a message says, in the order in which it is usually written."""
    parts = []
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content")
    if reasoning:
        parts.append(Part("reasoning", reasoning.strip(), "the reasoning"))
    if message["role"] == "assistant" and CLOSE_THINKING in content:
        thought, content = content.rsplit(CLOSE_THINKING, 1)
        thought = _OPEN_THINKING.sub("", thought, count=1).strip()
        if thought:
            parts.append(Part("reasoning", thought, f"the reasoning before {CLOSE_THINKING}"))
    if content := content.strip():
        parts.append(Part("content", content, "the content"))
    for call in message.get("tool_calls") or ():
        parts += _call_parts(call["function"])
    return parts


def without_reasoning(message: dict) -> dict:
    """The same message without what `message_parts` calls reasoning."""
    if message["role"] != "assistant":
        return message
    message = {key: value for key, value in message.items() if key != "reasoning_content"}
    if CLOSE_THINKING in (message.get("content") or ""):
        message["content"] = message["content"].rsplit(CLOSE_THINKING, 1)[1].lstrip("\n")
    return message


def _call_parts(function: dict) -> Iterator[Part]:
    name = function["name"]
    yield Part("call", name.strip(), f"the call to {name}", is_word=True)
    for key, value in function["arguments"].items():
        label = f"the argument {key} of the call to {name}"
        yield Part("argument", key.strip(), label, is_word=True)
        for leaf in _leaves(value):
            yield Part("argument", leaf.strip() if isinstance(leaf, str) else json.dumps(leaf), label, _is_word(leaf))


def _leaves(value: Any) -> Iterator[Any]:
    """The texts, numbers, truth values and keys in a JSON value; a null says nothing that could be lost."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _is_word(leaf: Any) -> bool:
    return not isinstance(leaf, str) or leaf.strip().isidentifier()


def tool_parts(tools: Sequence[dict]) -> list[Part]:
    """Names and descriptions of the tools and of their parameters."""
    parts = []
    for tool in tools:
        function = tool["function"]
        label = f"all of the tool {function['name']}"
        parts.append(Part("tool", function["name"].strip(), label, is_word=True))
        if isinstance(description := function.get("description"), str):
            parts.append(Part("tool", description.strip(), label))
        for depth, text, is_key in _parameters(function.get("parameters"), 0):
            parts.append(Part("schema" if depth else "tool", text.strip(), label, is_word=is_key))
    return parts


def _parameters(schema: Any, depth: int) -> Iterator[tuple[int, str, bool]]:
    """The parameters' names (True) and descriptions (False) in a JSON schema, and how deep they stand in it."""
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    for key, value in properties.items() if isinstance(properties, Mapping) else ():
        yield depth, key, True
        if isinstance(value, Mapping) and isinstance(value.get("description"), str):
            yield depth, value["description"], False
        yield from _parameters(value, depth + 1)
    yield from _parameters(schema.get("items"), depth + 1)


def find_losses(
    text: str, spans: Mapping[int, Sequence[Span]], messages: Sequence[dict], tools: Sequence[dict] | None
) -> list[Loss]:
    """What `messages` and `tools` say and `text` does not.

    Args:
        text: the rendered conversation.
        spans: turn -> where it stands, for the turns whose place is known, in order. Their parts must be inside; all
            others must stand outside, between the known turns that surround them (system turns and tools: anywhere
            outside, for some templates move them).
    """
    losses = []
    for turn, places in spans.items():
        region = "\0".join(text[start:end] for start, end in places)
        losses += [Loss(turn, part) for part in missing(message_parts(messages[turn]), region)]
    gaps = _gaps(text, spans)
    movable: list[tuple[int | None, Part]] = [(None, part) for part in tool_parts(tools or ())]
    for known, gap in gaps.items():
        inside: list[tuple[int | None, Part]] = []
        for turn in range(known + 1, len(messages)):
            if turn in spans:
                break
            target = movable if messages[turn]["role"] == "system" else inside
            target += [(turn, part) for part in message_parts(messages[turn])]
        losses += _missing_of(inside, gap)
    losses += _missing_of(movable, "\0".join(gaps.values())) if movable else []
    return sorted(losses, key=lambda loss: -1 if loss.turn is None else loss.turn)


def _gaps(text: str, spans: Mapping[int, Sequence[Span]]) -> dict[int, str]:
    """Known turn -> the text after it and before the next known one; -1 for what comes before the first.

    What stands in the middle of a turn (tools' results between an assistant's call and its answer) counts as after it.
    """
    gaps, last, end = {-1: ""}, -1, 0
    for turn, places in spans.items():
        gaps[last] += text[end : places[0][0]]
        gaps[turn] = "".join(text[a[1] : b[0]] + "\0" for a, b in pairwise(places))
        last, end = turn, places[-1][1]
    gaps[last] += text[end:]
    return gaps


def _missing_of(parts: Sequence[tuple[int | None, Part]], region: str) -> list[Loss]:
    lost = {id(part) for part in missing([part for _, part in parts], region)}
    return [Loss(turn, part) for turn, part in parts if id(part) in lost]


def missing(parts: Sequence[Part], region: str) -> list[Part]:
    """The parts that are not in `region`, each stretch of it counting for one part only; the longest choose first."""
    if len(parts) == 1 and parts[0].text in region and not parts[0].is_word:
        return []
    lost = []
    for part in sorted(parts, key=lambda part: -len(part.text)):
        if not part.text:
            continue
        place = _find(part, region)
        if place is None:
            lost.append(part)
        else:
            region = f"{region[: place[0]]}\0{region[place[1] :]}"
    return [part for part in parts if any(part is one for one in lost)]


def _find(part: Part, region: str) -> Span | None:
    for form in _forms(part.text):
        start = region.find(form)
        while part.is_word and start >= 0 and _is_inside_a_word(region, start, start + len(form)):
            start = region.find(form, start + 1)
        if start >= 0:
            return start, start + len(form)
    return None


def _is_inside_a_word(text: str, start: int, end: int) -> bool:
    around = text[start - 1 : start] + text[end : end + 1]
    return any(character.isalnum() or character == "_" for character in around)


def _forms(text: str) -> Iterator[str]:
    """The ways in which templates write a text: as it is, in JSON, in JSON inside JSON, without what they obey."""
    yield text
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    if escaped != text:
        yield escaped
        yield json.dumps(escaped, ensure_ascii=False)[1:-1]
    if not text.isascii():
        yield json.dumps(text)[1:-1]
    if text in ("true", "false"):
        yield text.capitalize()
    if _SWITCH.search(text):
        yield _SWITCH.sub("", text).strip()
