"""Messages -> the chat template's text and the character spans of it the model should learn to write."""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from qpsft.errors import DataError, OutputError
from qpsft.files import write_atomically

Span = tuple[int, int]
"""Start and end of a stretch of characters, the end not included."""

PROBE = "qpsft"


class ChatRenderer:
    """Renders conversations through a tokenizer's chat template and finds the assistant's spans in them.

    The spans of `conversation` come from the template's `{% generation %}` markers if they cover the end-of-turn token,
    else from TRL's training version of the template if it knows it, else from rendering the conversation up to each
    assistant turn with and without it.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat_date: YYYY-MM-DD, the day a template is to take for today's; None for today.

    Raises:
        DataError: the template writes nothing after an assistant turn, so nothing would teach the model to stop.
    """

    def __init__(self, tokenizer: Any, chat_date: str | None = None):
        self.tokenizer = tokenizer
        self.chat_date = chat_date
        self.marked_template = _marked_template(tokenizer)
        self._check_end_of_turn()

    def conversation(self, messages: list[dict], tools: list[dict] | None, place: str) -> tuple[str, list[Span]]:
        """The rendered conversation and one span per assistant turn: its content and its end-of-turn token."""
        if self.marked_template is None:
            return self._spans_by_prefix(messages, tools, place)
        text, spans = self._render_marked(messages, tools, place)
        if not spans:
            raise DataError(
                f"{place}: the chat template's generation markers cover no assistant turn of this row.",
                "Check the markers in the template, or take them out.",
            )
        return text, spans

    def completion(
        self, prompt: list[dict], completion: list[dict], tools: list[dict] | None, place: str
    ) -> tuple[str, list[Span]]:
        """The rendered prompt and completion, and the completion's span: all that follows the generation prompt.

        A completion that also holds turns of others (a tool's results) has one span per assistant turn of it.
        """
        messages = prompt + completion
        if any(message["role"] != "assistant" for message in completion):
            text, spans = self.conversation(messages, tools, place)
            answered = any(message["role"] == "assistant" for message in prompt)
            return text, spans[len(self.conversation(prompt, tools, place)[1]) if answered else 0 :]
        text = self._render(messages, tools, place)
        return text, [(self._start_after(prompt, text, tools, place), len(text))]

    def _spans_by_prefix(self, messages: list[dict], tools: list[dict] | None, place: str) -> tuple[str, list[Span]]:
        text = self._render(messages, tools, place)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                through = self._render(messages[: turn + 1], tools, place)
                if not text.startswith(through):
                    raise _not_a_prefix(place, turn + 1)
                spans.append((self._start_after(messages[:turn], text, tools, place), len(through)))
        return text, spans

    def _start_after(self, before: list[dict], text: str, tools: list[dict] | None, place: str) -> int:
        """Where in `text` the turn after `before` starts, its header (the generation prompt) not included."""
        if not before:
            raise DataError(
                f"{place}: the conversation starts with an assistant turn, and the chat template has no generation "
                "markers to find it by.",
                "Begin with a system or user turn.",
            )
        opened = self._render(before, tools, place, add_generation_prompt=True)
        if text.startswith(opened):
            return len(opened)
        # The generation prompt may hold more than the finished turn does (an opening <think>). The turn then starts at
        # the first token that differs; but all before the header must be the same.
        closed = self._render(before, tools, place)
        if not text.startswith(closed):
            raise _not_a_prefix(place, len(before))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        opened_ids = self.tokenizer(opened, add_special_tokens=False, verbose=False)["input_ids"]
        common = common_prefix_length(opened_ids, encoded["input_ids"])
        start = encoded["offset_mapping"][common][0] if common < len(encoded["input_ids"]) else len(text)
        return max(start, len(closed))

    def _render(self, messages: list[dict], tools: list[dict] | None, place: str, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=dated_template(self.tokenizer, tools, self.chat_date),
                tokenize=False,
                **options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise refused(place, error) from None

    def _render_marked(self, messages: list[dict], tools: list[dict] | None, place: str) -> tuple[str, list[Span]]:
        # What apply_chat_template does, except that it returns token masks only: it looks tokens up at the characters
        # a span starts and ends with, and marks all that follows when a tokenizer trims spaces off its offsets.
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=with_date(self.marked_template, self.chat_date),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise refused(place, error) from None
        return texts[0], spans[0]

    def _check_end_of_turn(self) -> None:
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.tokenizer.apply_chat_template(probe, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            return  # A template this particular does not tell; a row it refuses will name itself.
        if text.rstrip().endswith(PROBE):
            raise DataError(
                "The chat template writes nothing after an assistant turn, so the model would never learn to stop.",
                "Put {{ eos_token }} behind the assistant's content in the tokenizer's chat template.",
            )


def _marked_template(tokenizer: Any) -> str | None:
    """A template with generation markers around each assistant turn up to its end-of-turn token, if there is one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own is None:
        return None
    candidates = [own] if has_generation_markers(own) else []
    try:
        candidates.append(get_training_chat_template(tokenizer))
    except (ValueError, TemplateError):
        pass  # TRL knows no training version of this template.
    for template in candidates:
        if template is not None and is_chat_template_stop_token_trained(tokenizer, template):
            return template
    return None


def _not_a_prefix(place: str, turns: int) -> DataError:
    return DataError(
        f"{place}: the chat template writes the first {turns} turns differently when more turns follow (some templates "
        "strip earlier reasoning), so what the model would have written cannot be told from the rest.",
        "Split the row into one prompt and completion per answer, or put {% generation %} markers into the template.",
    )


def refused(place: str, error: Exception) -> DataError:
    """What to raise when a chat template does not take the conversation of `place`."""
    return DataError(
        f"{place}: the chat template refuses this conversation: {error}.",
        "Check its roles and their order; some templates take no system turn.",
    )


# The day that chat templates print as today's: one day for the whole of a run, however many days it takes.
#
# Templates such as Llama 3.2's and SmolLM3's call `strftime_now`. Rows rendered after midnight are other rows: a run
# could not be resumed on them, and a comparison would find none of its results again.

CHAT_DATE = "chat_date"
"""File in a run's folder; written only for templates that print a date."""
ASKS = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
"""transformers hands templates no function but its own, so the calls are replaced by what they are to return."""


def today() -> str:
    return date.today().isoformat()


def with_date(template: str, chat_date: str | None) -> str:
    """A chat template that takes `chat_date` (YYYY-MM-DD) for today; None leaves it as it is."""
    if chat_date is None:
        return template
    day = datetime.fromisoformat(chat_date)
    return ASKS.sub(lambda call: repr(day.strftime(call["format"])), template)


def dated_template(tokenizer: Any, tools: list[dict] | None, chat_date: str | None) -> str | None:
    """What to give `apply_chat_template` as its template: None, its own choice, if no day is set."""
    return None if chat_date is None else with_date(tokenizer.get_chat_template(tools=tools), chat_date)


def prints_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks what day it is."""
    template = tokenizer.chat_template or ""
    return any(map(ASKS.search, template.values() if isinstance(template, dict) else [template]))


def find_chat_date(chat_date: str | None, tokenizer: Any, folder: Path, *, anew: bool = False) -> str | None:
    """The day a run's rows are rendered with: the recipe's, that of the run's first start, or today.

    Args:
        chat_date: the recipe's.
        folder: of the run.
        anew: do not look for an earlier start.

    Returns:
        YYYY-MM-DD; None if neither the recipe nor the template names a date.
    """
    if chat_date is not None or not prints_date(tokenizer):
        return chat_date
    path = folder / CHAT_DATE
    if not anew and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    return today()


def keep_chat_date(chat_date: str | None, folder: Path) -> None:
    """Writes the day into the run's folder, for the next start. Raises OutputError if it cannot be written."""
    path = folder / CHAT_DATE
    try:
        if chat_date is None:
            path.unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, chat_date + "\n")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.", "Free some space, or choose another folder."
        ) from error
