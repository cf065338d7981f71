"""Special tokens that stand in a row's own text, where they become those tokens: an answer that ends too early, a turn
that nobody said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MARKUP = re.compile(r"</?(think|tool|tool_call|tool_calls|tool_response|tools|arg_key|arg_value)>")
"""What models write inside an answer; some tokenizers have a token for it."""


class SpecialTokenFinder:
    """Finds special tokens in texts.

    These are the tokenizer's special tokens, and the other added ones that its chat template writes (DeepSeek's
    <｜User｜>); not the marks of reasoning and tool calls, which belong in answers.

    Args:
        tokenizer: the tokenizer that the rows are for.
    """

    def __init__(self, tokenizer: Any):
        template = tokenizer.chat_template or ""
        template = "\n".join(template.values()) if isinstance(template, dict) else template
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        tokens = set(tokenizer.all_special_tokens)
        tokens |= {token.content for token in added if token.special or token.content in template}
        tokens = {token for token in tokens if len(token.strip()) > 2 and not MARKUP.fullmatch(token)}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""

    def first(self, row: dict) -> str | None:
        """The first special token in one of `Rows.rows`; None if there is none.

        The beginning-of-sequence token at a plain text's start and the end-of-sequence token at its end are no
        accident: they take the place of those that tokenization would put there.
        """
        if self._pattern is None:
            return None
        texts = list(_texts(row))
        if "text" in row or isinstance(row.get("prompt"), str):
            texts[0] = texts[0].removeprefix(self._bos)
            texts[-1] = texts[-1].removesuffix(self._eos)
        for text in texts:
            if match := self._pattern.search(text):
                return match[0]
        return None


def _texts(row: dict) -> Iterator[str]:
    """All text of a row, in order."""
    for name in ("text", "prompt", "completion", "messages"):
        value = row.get(name)
        if isinstance(value, str):
            yield value
        for message in value if isinstance(value, list) else ():
            yield from (message[key] for key in ("content", "reasoning_content", "name") if message.get(key))
            if "tool_calls" in message:
                yield from _strings([call["function"] for call in message["tool_calls"]])
    if "tools" in row:
        yield from _strings(row["tools"])


def _strings(value: Any) -> Iterator[str]:
    """The strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
