"""Messages -> the chat template's text and the character spans of it the model should learn to write.

A template is a program that prints what it knows of a conversation and says nothing of the rest. So whatever a row says
is looked for in the text (`qpsft.data.contents`), and a row of which something would be lost is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qpsft.data.bad_rows import RowError
from qpsft.data.chat_date import with_date
from qpsft.data.contents import CLOSE_THINKING, OPEN_THINKING, Loss, Span, find_losses, message_parts, without_reasoning
from qpsft.data.dialect import DialectFinder, with_thought
from qpsft.data.messages import trained_turns
from qpsft.data.render import marked_template, render, render_marked
from qpsft.errors import DataError


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template wrote.
        spans: the stretches the model learns to write, in order.
        losses: what the template leaves out on purpose: the reasoning of earlier answers, the depths of tool schemas.
    """

    text: str
    spans: list[Span]
    losses: list[Loss]

    @property
    def stripped(self) -> int:
        """How many earlier answers have no reasoning in the text."""
        return len({loss.turn for loss in self.losses if loss.part.kind == "reasoning"})

    @property
    def is_shortened(self) -> bool:
        """Whether the template simplifies tool schemas."""
        return any(loss.part.kind == "schema" for loss in self.losses)


class ChatRenderer:
    """Renders conversations through a tokenizer's chat template and finds the answers in them.

    Where TRL has a training version of the template, that one is used: it keeps the reasoning of every answer. The
    spans come from a template's `{% generation %}` markers if they cover the end of a turn, else from rendering the
    conversation up to each answer, with and without it.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat_date: YYYY-MM-DD, the day a template is to take for today's; None for today.

    Raises:
        DataError: the template is no valid Jinja, or writes nothing after an assistant turn, so that nothing would
            teach the model to stop.
    """

    def __init__(self, tokenizer: Any, chat_date: str | None = None):
        self.tokenizer = tokenizer
        self.chat_date = chat_date
        self._templates: dict[str, ChatTemplate] = {}

    def conversation(self, messages: list[dict], tools: list[dict] | None, place: str) -> Rendered:
        """The rendered conversation, and a span per assistant turn that is trained on: what it says and its end."""
        return self._template(tools).render(messages, trained_turns(messages), tools, place)

    def completion(self, prompt: list[dict], completion: list[dict], tools: list[dict] | None, place: str) -> Rendered:
        """The rendered prompt and completion; supervised is what follows the generation prompt.

        A completion of several turns has one span per assistant turn of it that is trained on.
        """
        messages = [*prompt, *completion]
        trained = [turn for turn in trained_turns(messages) if turn >= len(prompt)]
        template = self._template(tools)
        return template.render(messages, trained, tools, place, to_the_end=len(completion) == 1)

    @property
    def sources(self) -> set[str]:
        """The templates used so far."""
        return {template.source for template in self._templates.values()}

    def _template(self, tools: list[dict] | None) -> ChatTemplate:
        """The tokenizer's template; of several, the one for tool use if the row has tools, as when a model answers."""
        named = self.tokenizer.chat_template
        if isinstance(named, dict):
            name = "tool_use" if tools and "tool_use" in named else "default"
            if name not in named:
                raise DataError(
                    f"The tokenizer has several chat templates ({', '.join(named)}) and none is the default.",
                    "Name one `default` in the base model's tokenizer_config.json.",
                )
            source = named[name]
        else:
            source = named
        if source not in self._templates:
            self._templates[source] = ChatTemplate(self.tokenizer, source, self.chat_date)
        return self._templates[source]


def reads(sources: Iterable[str], key: str) -> bool:
    """Whether one of these templates seems to read a message's key `key`."""
    # Most templates read the name of a tool, few that of a speaker.
    pattern = rf"\b(message|msg|m)(\.|\[['\"]|\.get\(['\"]){key}\b" if key == "name" else re.escape(key)
    return any(re.search(pattern, source) for source in sources)


class ChatTemplate:
    """One template of a tokenizer: its training version if there is one, and what it must be given.

    Attributes:
        source: the Jinja text that rows are rendered with.
        is_marked: it has generation markers that cover each answer up to its end.
        dialect: how it wants messages.
    """

    def __init__(self, tokenizer: Any, source: str, chat_date: str | None):
        self.tokenizer = tokenizer
        marked = marked_template(tokenizer, source)
        self.is_marked = marked is not None
        self.source = with_date(marked or source, chat_date)
        finder = DialectFinder(self.source, self._render)
        self.dialect = finder.dialect
        self._before_answer, self._after_answer = finder.frame()
        self._unwritten: dict[tuple, list[Loss]] = {}
        if self._after_answer is not None and not self._after_answer.strip():
            raise DataError(
                "The chat template writes nothing after an assistant turn, so the model would never learn to stop.",
                "Put {{ eos_token }} behind the assistant's content in the tokenizer's chat template.",
            )

    def render(
        self,
        messages: list[dict],
        trained: list[int],
        tools: list[dict] | None,
        place: str,
        *,
        to_the_end: bool = False,
    ) -> Rendered:
        """The conversation as text, with all that it says.

        Args:
            messages: as `qpsft.data.messages` describes.
            trained: the turns to learn, in order.
            tools: tool schemas, or None.
            place: the row's, for errors.
            to_the_end: the last turn is the one to learn, and with it all that the template writes behind it.

        Raises:
            RowError: the template refuses the conversation, would lose something of it, or does not say where a turn
                to learn begins.
        """
        try:
            return self._render_conversation(messages, trained, tools, place, to_the_end)
        except RowError as error:
            if trained != [len(messages) - 1]:
                raise
            with contextlib.suppress(RowError):
                return self._render_prompt(messages, tools, place)
            raise error from None

    def _render_conversation(
        self, messages: list[dict], trained: list[int], tools: list[dict] | None, place: str, to_the_end: bool
    ) -> Rendered:
        """All turns as the template writes them together."""
        written = self.dialect.write(messages)
        by_markers = self.is_marked and not to_the_end
        if by_markers:
            text, spans = self._spans_by_markers(written, tools, place)
            spans = {turn: spans[turn] for turn in trained}
        else:
            text = self._render(written, tools, place)
            try:
                spans = self._spans_by_prefix(written, trained, text, tools, place, to_the_end)
            except NotAPrefixError:  # perhaps because something of the earlier turns is gone, which says more
                self._check_losses(find_losses(text, {}, messages, tools), messages, tools, place)
                raise
        losses = find_losses(text, spans, messages, tools)
        if losses and not by_markers:
            # What a turn says may begin in the generation prompt (an opening <think>): look behind the header too.
            turns = {
                turn: self._with_header(span, written[:turn], text, tools, place) for turn, (span,) in spans.items()
            }
            losses = find_losses(text, turns, messages, tools)
        self._check_losses(losses, messages, tools, place)
        return Rendered(text, list(itertools.chain.from_iterable(spans.values())), losses)

    def _render_prompt(self, messages: list[dict], tools: list[dict] | None, place: str) -> Rendered:
        """The generation prompt, then the last turn as a model would write it, and its end.

        For templates that write a conversation's past otherwise than its present: Mistral's put the system turn before
        the last question only, DeepSeek-R1-Distill's strip the reasoning of every answer.
        """
        *before, answer = self.dialect.write(messages)
        prompt = self._render(before, tools, place, add_generation_prompt=True)
        content = answer["content"]
        if not isinstance(content, str) or "tool_calls" in answer:
            raise RowError(f"{place}: the last turn holds more than text.")
        if "reasoning_content" in answer:
            content = with_thought(answer["reasoning_content"], content)
        lead, end = self._before_answer, self._after_answer
        opens_thought = prompt.rstrip().endswith(OPEN_THINKING)
        if opens_thought != (CLOSE_THINKING in content):
            raise RowError(f"{place}: either the generation prompt or the answer begins a thought.")
        if opens_thought:
            lead, content = "", content.strip().removeprefix(OPEN_THINKING)
        if lead is None or end is None:
            raise RowError(f"{place}: an answer does not follow the generation prompt.")
        text = f"{prompt}{lead}{content.strip()}{end}"
        span = (len(prompt), len(text))
        losses = find_losses(text, {len(before): [span]}, messages, tools)
        self._check_losses(losses, messages, tools, place, behind_prompt=True, knows_reasoning=opens_thought)
        return Rendered(text, [span], losses)

    # Spans

    def _spans_by_markers(
        self, messages: list[dict], tools: list[dict] | None, place: str
    ) -> tuple[str, dict[int, list[Span]]]:
        """The text, and assistant turn -> its marked stretches (mostly one)."""
        text, marked = render_marked(self.tokenizer, self.source, messages, tools, place)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) == len(turns):
            return text, {turn: [span] for turn, span in zip(turns, marked, strict=True)}
        starts = [0]
        for turn in turns[1:]:
            before = render_marked(self.tokenizer, self.source, messages[:turn], tools, place)[1]
            starts.append(len(os.path.commonprefix([before, marked])))
        spans = {
            turn: marked[i:j] for turn, (i, j) in zip(turns, itertools.pairwise([*starts, len(marked)]), strict=True)
        }
        if not all(spans.values()):
            raise RowError(
                f"{place}: the chat template's generation markers cover {len(marked)} stretches, which are not those "
                f"of the {len(turns)} assistant turns of this row.",
                "Check the markers in the template, or take them out.",
            )
        return text, spans

    def _spans_by_prefix(
        self,
        messages: list[dict],
        trained: list[int],
        text: str,
        tools: list[dict] | None,
        place: str,
        to_the_end: bool,
    ) -> dict[int, list[Span]]:
        """Turn to learn -> where it stands, from what the template writes up to it."""
        if to_the_end and trained:
            return {trained[0]: [(self._start_after(messages[:-1], text, tools, place), len(text))]}
        try:
            return {turn: [self._span(messages, turn, text, tools, place)] for turn in trained}
        except NotAPrefixError:
            # Templates that strip the reasoning of earlier answers write the same text if it was never there.
            last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
            shorter = [*map(without_reasoning, messages[:last]), *messages[last:]]
            if shorter == messages or self._render(shorter, tools, place) != text:
                raise
            return {turn: [self._span(shorter, turn, text, tools, place)] for turn in trained}

    def _span(self, messages: list[dict], turn: int, text: str, tools: list[dict] | None, place: str) -> Span:
        before = messages[:turn]
        start = self._start_after(before, text, tools, place)
        through = text if turn + 1 == len(messages) else self._render(messages[: turn + 1], tools, place)
        if text.startswith(through):
            return start, len(through)
        # Some templates write an empty thought into the last turn only. The turn's end is the same with and without it.
        closed = len(self._render(before, tools, place))
        last, inner = through[closed:], text[closed:]
        common = len(os.path.commonprefix([last, inner]))
        for skipped in range(common, len(last)):
            if inner.startswith(last[skipped:], common):
                return min(start, closed + common), closed + common + len(last) - skipped
        raise _not_a_prefix(place, turn + 1)

    def _start_after(self, before: list[dict], text: str, tools: list[dict] | None, place: str) -> int:
        """Where in `text` the turn after `before` starts, its header (the generation prompt) not included."""
        if not before:
            raise RowError(
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
        common = len(os.path.commonprefix([opened_ids, encoded["input_ids"]]))
        start = encoded["offset_mapping"][common][0] if common < len(encoded["input_ids"]) else len(text)
        return max(start, len(closed))

    # Losses

    def _with_header(
        self, span: Span, before: list[dict], text: str, tools: list[dict] | None, place: str
    ) -> list[Span]:
        """A turn's stretch with its header."""
        closed = self._render(before, tools, place)
        return [(len(closed), span[1]) if text.startswith(closed) else span]

    def _check_losses(
        self,
        losses: list[Loss],
        messages: list[dict],
        tools: list[dict] | None,
        place: str,
        *,
        behind_prompt: bool = False,
        knows_reasoning: bool = False,
    ) -> None:
        """Raises RowError for a loss that is not one on purpose.

        Args:
            behind_prompt: the last turn was put behind the generation prompt.
            knows_reasoning: the template begins answers with reasoning, so it leaves out that of earlier ones on
                purpose.
        """
        lost = [loss for loss in losses if not self._is_on_purpose(loss, messages, tools, knows_reasoning)]
        if lost or (lost := self._losses_of_kind(messages, tools, behind_prompt)):
            raise _would_be_lost(lost, messages, place)

    def _is_on_purpose(self, loss: Loss, messages: list[dict], tools: list[dict] | None, knows_reasoning: bool) -> bool:
        """Whether it is the depth of a schema, or the reasoning of an answer that would be written if none followed."""
        if loss.part.kind != "reasoning":
            return loss.part.kind == "schema"
        if not any(message["role"] == "assistant" for message in messages[loss.turn + 1 :]):
            return False
        return knows_reasoning or self._writes_reasoning(messages[: loss.turn + 1], tools)

    def _writes_reasoning(self, messages: list[dict], tools: list[dict] | None) -> bool:
        """Whether the reasoning of a last turn made like this one is in the text."""
        last = len(messages) - 1
        try:
            text = self._render(self.dialect.write([*messages[:-1], _made_up(last, messages[-1])]), tools, "")
        except RowError:
            return False
        return f"qr{last}q" in text

    def _losses_of_kind(self, messages: list[dict], tools: list[dict] | None, behind_prompt: bool) -> list[Loss]:
        """What the template never writes of a conversation made like this one, whatever its words.

        Short words may stand in the text by chance; so each kind of conversation (its roles, calls and tools) is
        rendered once with words that stand nowhere else.
        """
        kind = tuple(map(_kind, messages)), bool(tools), behind_prompt
        if kind not in self._unwritten:
            self._unwritten[kind] = self._losses_of_made_up(
                messages[:-1] if behind_prompt else messages, tools, behind_prompt
            )
        return self._unwritten[kind]

    def _losses_of_made_up(self, messages: list[dict], tools: list[dict] | None, add_prompt: bool) -> list[Loss]:
        made_up = [_made_up(turn, message) for turn, message in enumerate(messages)]
        try:
            text = self._render(self.dialect.write(made_up), tools, "", add_generation_prompt=add_prompt)
        except RowError:  # it wants something of the words themselves; the row's own text has been looked at
            return []
        parts = [(turn, part) for turn, message in enumerate(made_up) for part in message_parts(message)]
        return [Loss(turn, part) for turn, part in parts if part.kind != "reasoning" and part.text not in text]

    def _render(self, messages: list[dict], tools: list[dict] | None, place: str, **options: Any) -> str:
        return render(self.tokenizer, self.source, messages, tools, place, **options)


def _kind(message: dict) -> tuple:
    calls = tuple(bool(call["function"]["arguments"]) for call in message.get("tool_calls") or ())
    content = message["content"]
    return message["role"], bool(content.strip()), CLOSE_THINKING in content, "reasoning_content" in message, calls


def _made_up(turn: int, message: dict) -> dict:
    """A message of the same kind, with words that stand nowhere else."""
    made_up = {**message, "content": f"qz{turn}q" if message["content"].strip() else ""}
    if "reasoning_content" in message:
        made_up["reasoning_content"] = f"qr{turn}q"
    elif message["role"] == "assistant" and CLOSE_THINKING in message["content"]:
        made_up["content"] = with_thought(f"qr{turn}q", made_up["content"])
    if "tool_calls" in message:
        made_up["tool_calls"] = [_made_up_call(f"{turn}x{i}q", call) for i, call in enumerate(message["tool_calls"])]
    return made_up


def _made_up_call(number: str, call: dict) -> dict:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    function = {"name": f"qn{number}", "arguments": {f"qk{number}": f"qv{number}"} if arguments else {}}
    # Kimi's templates write the id, which holds the name, and not the name.
    ids = {"id": call["id"].replace(name, function["name"])} if isinstance(call.get("id"), str) else {}
    return {**call, **ids, "function": {**call["function"], **function}}


class NotAPrefixError(RowError):
    """A template writes earlier turns differently when more follow."""


def _not_a_prefix(place: str, turns: int) -> NotAPrefixError:
    return NotAPrefixError(
        f"{place}: the chat template writes the first {turns} turns differently when more turns follow (some templates "
        "strip earlier reasoning), so what the model would have written cannot be told from the rest.",
        "Give --split_turns for one row per answer, or put {% generation %} markers into the template.",
    )


def _would_be_lost(losses: Sequence[Loss], messages: list[dict], place: str) -> RowError:
    """What to raise when the template does not write all that a row says."""
    calls = {loss.turn for loss in losses if loss.part.kind == "call"}
    losses = [loss for loss in losses if not (loss.part.kind == "argument" and loss.turn in calls)]
    losses.sort(key=lambda loss: loss.turn is None)  # calls say more than the tools they call
    labels = []
    for loss in losses:
        turn = "" if loss.turn is None else f" in turn {loss.turn + 1} ({messages[loss.turn]['role']})"
        labels.append(f"{loss.part.label}{turn}")
    labels = list(dict.fromkeys(labels))
    more = f", and {len(labels) - 3} more" if len(labels) > 3 else ""
    split = ", try --split_turns" if len(trained_turns(messages)) > 1 else ""
    todo = {
        "reasoning": f"Leave it out{split}, or take a base model whose chat template has a place for it.",
        "content": "Leave that turn out, or take a base model whose chat template writes it.",
        "tool": "Leave the tools out, or take a base model whose chat template writes them.",
    }.get(losses[0].part.kind, "Take a base model whose chat template has tool calls.")
    return RowError(f"{place}: the chat template does not write {', '.join(labels[:3])}{more}.", todo)
