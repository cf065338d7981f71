"""What a chat template must be given: messages can say the same in several ways, and a template reads one of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpsft.data.bad_rows import RowError
from qpsft.data.contents import CLOSE_THINKING, OPEN_THINKING

PROBE = "qpsft"
USER_PROBE = {"role": "user", "content": "?"}
TOOLS_PROBE = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}]
DEVELOPER = re.compile(r"""['"]developer['"]""")


@dataclass(frozen=True)
class Dialect:
    """How a template wants to be given what can be said in several ways.

    Attributes:
        parts: content as [{"type": "text", "text": …}] (templates of vision models).
        inline_reasoning: reasoning inside the content, between <think> and </think> (DeepSeek-R1-Distill, SmolLM3).
        text_arguments: a call's arguments as JSON text, not as an object.
        null_content: no content beside a call, instead of an empty one.
        developer_as_system: it knows no role developer.
    """

    parts: bool = False
    inline_reasoning: bool = False
    text_arguments: bool = False
    null_content: bool = False
    developer_as_system: bool = False

    def write(self, messages: Sequence[dict]) -> list[dict]:
        """`messages` as the template wants them."""
        return [self._write(message) for message in messages]

    def _write(self, message: dict) -> dict:
        message = {key: value for key, value in message.items() if key != "train"}
        if self.developer_as_system and message["role"] == "developer":
            message["role"] = "system"
        if self.inline_reasoning and "reasoning_content" in message:
            message["content"] = with_thought(message.pop("reasoning_content"), message["content"])
        if "tool_calls" in message:
            if self.text_arguments:
                message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if self.null_content and not message["content"]:
                message["content"] = None
        if self.parts and message["content"] is not None:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


def with_thought(reasoning: str, content: str) -> str:
    """An answer as models with <think> write it."""
    return "{}\n{}\n{}\n\n{}".format(OPEN_THINKING, reasoning.strip("\n"), CLOSE_THINKING, content)


def _with_text_arguments(call: dict) -> dict:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


class DialectFinder:
    """Tries small conversations on a template.

    Args:
        source: the template.
        render: (messages, tools, **options) -> its text; RowError if it does not take them.
    """

    def __init__(self, source: str, render: Callable[..., str]):
        self.source = source
        self.render = render
        self.dialect = self._find()

    def _find(self) -> Dialect:
        """The first way of saying things that the template writes."""
        answer = {"role": "assistant", "content": PROBE}
        dialect = Dialect(developer_as_system=not DEVELOPER.search(self.source))
        if not self._writes([USER_PROBE, answer], PROBE, dialect):
            parts = replace(dialect, parts=True)
            dialect = parts if self._writes([USER_PROBE, answer], PROBE, parts) else dialect
        thought = {**answer, "reasoning_content": "a thought"}
        if OPEN_THINKING in self.source and not self._writes([USER_PROBE, thought], "a thought", dialect):
            inline = replace(dialect, inline_reasoning=True)
            dialect = inline if self._writes([USER_PROBE, thought], "a thought", inline) else dialect
        return self._with_calls(dialect)

    def _with_calls(self, dialect: Dialect) -> Dialect:
        ways = itertools.product((False, True), (False, True))
        tried = (replace(dialect, null_content=null, text_arguments=text) for null, text in ways)
        return next(filter(self._writes_calls, tried), dialect)

    def _writes_calls(self, dialect: Dialect) -> bool:
        """Whether a call is written whole: not its object as Python prints it, nor with an empty answer behind it."""
        function = {"name": "a_function", "arguments": {"a_key": "a_value"}}
        call = {"type": "function", "id": "abcdefgh1", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        head, _, tail = self._try(dialect.write([USER_PROBE, turn])).rpartition("a_value")
        if "a_function" not in head or "a_key" not in head or "'a_key'" in head:
            return False
        end = self._answer(dialect).rpartition(PROBE)[2]
        closed = not dialect.null_content or tail.endswith(end)
        return closed and (not end.strip() or tail.count(end.strip()) <= 1)

    def _writes(self, messages: list[dict], text: str, dialect: Dialect) -> bool:
        return text in self._try(dialect.write(messages))

    def _try(self, messages: list[dict], **options: Any) -> str:
        for tools in (None, TOOLS_PROBE):  # templates for tool use may want some
            with contextlib.suppress(RowError):
                return self.render(messages, tools, "", **options)
        return ""

    def _answer(self, dialect: Dialect) -> str:
        """A question and an answer as the template writes them; "" if it wants more than that."""
        return self._try(dialect.write([USER_PROBE, {"role": "assistant", "content": PROBE}]))

    def frame(self) -> tuple[str | None, str | None]:
        """What the template writes between the generation prompt and an answer, and behind the answer.

        Returns:
            None for the first: the generation prompt is not what an answer begins with. None for both: the template
            takes no conversation as small as the one tried.
        """
        text = self._answer(self.dialect)
        if PROBE not in text:
            return None, None
        prompt = self._try(self.dialect.write([USER_PROBE]), add_generation_prompt=True)
        head, _, end = text.rpartition(PROBE)
        return head[len(prompt) :] if head.startswith(prompt) else None, end
