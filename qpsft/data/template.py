"""Messages -> the chat template's text and the character spans of it the model should learn to write.

A template is a program that prints what it knows of a conversation and says nothing of the rest. So whatever a row says
is looked for in the text (`qpsft.data.contents`), and a row of which something would be lost is refused.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from qpsft.data.bad_rows import RowError
from qpsft.data.chat_date import with_date
from qpsft.data.contents import CLOSE_THINKING, OPEN_THINKING, Loss, Span, find_losses, message_parts, without_reasoning
from qpsft.errors import DataError

PROBE = "qpsft"
USER_PROBE = {"role": "user", "content": "?"}
TOOLS_PROBE = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}]
DEVELOPER = re.compile(r"""['"]developer['"]""")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template wrote.
        spans: the stretches the model learns to write, in order.
        stripped: earlier answers whose reasoning the template leaves out on purpose.
    """

    text: str
    spans: list[Span]
    stripped: int = 0


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
            message["content"] = _with_thought(message.pop("reasoning_content"), message["content"])
        if "tool_calls" in message:
            if self.text_arguments:
                message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if self.null_content and not message["content"]:
                message["content"] = None
        if self.parts and message["content"] is not None:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


def _with_thought(reasoning: str, content: str) -> str:
    return "{}\n{}\n{}\n\n{}".format(OPEN_THINKING, reasoning.strip("\n"), CLOSE_THINKING, content)


def _with_text_arguments(call: dict) -> dict:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


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

    def reads(self, key: str) -> bool:
        """Whether the templates used so far name a message's key `key`."""
        return any(key in template.source for template in self._templates.values())

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


def trained_turns(messages: list[dict]) -> list[int]:
    """The assistant's turns that are not marked as context."""
    turns = enumerate(messages)
    return [turn for turn, message in turns if message["role"] == "assistant" and message.get("train", True)]


class ChatTemplate:
    """One template of a tokenizer: its training version if there is one, and what it must be given.

    Attributes:
        source: the Jinja text that rows are rendered with.
        is_marked: it has generation markers that cover each answer up to its end.
        dialect: how it wants messages.
    """

    def __init__(self, tokenizer: Any, source: str, chat_date: str | None):
        self.tokenizer = tokenizer
        marked = _marked_template(tokenizer, source)
        self.is_marked = marked is not None
        self.source = with_date(marked or source, chat_date)
        self.dialect = self._find_dialect()
        self._check_end_of_turn()
        self._unwritten: dict[tuple, list[Loss]] = {}

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
        stripped = self._check_losses(losses, messages, tools, place)
        return Rendered(text, list(itertools.chain.from_iterable(spans.values())), stripped)

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
            content = _with_thought(answer["reasoning_content"], content)
        lead, end = self._frame()
        opens_thought = prompt.rstrip().endswith(OPEN_THINKING)
        if opens_thought != (CLOSE_THINKING in content):
            raise RowError(f"{place}: either the generation prompt or the answer begins a thought.")
        if opens_thought:
            lead, content = "", content.strip().removeprefix(OPEN_THINKING)
        if lead is None:
            raise RowError(f"{place}: an answer does not follow the generation prompt.")
        text = f"{prompt}{lead}{content.strip()}{end}"
        span = (len(prompt), len(text))
        losses = find_losses(text, {len(before): [span]}, messages, tools)
        if opens_thought:  # so the template knows reasoning, and leaves that of earlier answers out on purpose
            stripped = {loss.turn for loss in losses if loss.part.kind == "reasoning" and loss.turn != len(before)}
            losses = [loss for loss in losses if loss.turn not in stripped or loss.part.kind != "reasoning"]
        else:
            stripped = set()
        return Rendered(
            text, [span], len(stripped) + self._check_losses(losses, messages, tools, place, at_the_end=True)
        )

    # Spans

    def _spans_by_markers(
        self, messages: list[dict], tools: list[dict] | None, place: str
    ) -> tuple[str, dict[int, list[Span]]]:
        """The text, and assistant turn -> its marked stretches (mostly one)."""
        text, marked = self._render_marked(messages, tools, place)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) == len(turns):
            return text, {turn: [span] for turn, span in zip(turns, marked, strict=True)}
        starts = [0]
        for turn in turns[1:]:
            before = self._render_marked(messages[:turn], tools, place)[1]
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
        through = self._render(messages[: turn + 1], tools, place)
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
        common = common_prefix_length(opened_ids, encoded["input_ids"])
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
        at_the_end: bool = False,
    ) -> int:
        """How many earlier answers have lost their reasoning on purpose. Raises RowError for any other loss.

        Args:
            at_the_end: the last turn was put behind the generation prompt.
        """
        lost = [loss for loss in losses if not self._is_stripped(loss, messages, tools, place)]
        if lost or (lost := self._losses_of_kind(messages, tools, at_the_end)):
            raise _would_be_lost(lost, messages, place)
        return len({loss.turn for loss in losses})

    def _is_stripped(self, loss: Loss, messages: list[dict], tools: list[dict] | None, place: str) -> bool:
        """Whether it is the reasoning of an answer that the template writes as long as no other answer follows."""
        if loss.part.kind != "reasoning" or not any(m["role"] == "assistant" for m in messages[loss.turn + 1 :]):
            return False
        through = self._render(self.dialect.write(messages[: loss.turn + 1]), tools, place)
        return loss.part.text in through

    def _losses_of_kind(self, messages: list[dict], tools: list[dict] | None, at_the_end: bool) -> list[Loss]:
        """What the template never writes of a conversation made like this one, whatever its words.

        Short words may stand in the text by chance; so each kind of conversation (its roles, calls and tools) is
        rendered once with words that stand nowhere else.
        """
        kind = tuple(map(_kind, messages)), bool(tools), at_the_end
        if kind not in self._unwritten:
            self._unwritten[kind] = self._losses_of_made_up(
                messages[:-1] if at_the_end else messages, tools, at_the_end
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

    # What the template is

    def _find_dialect(self) -> Dialect:
        """Tries what can be written in several ways, and takes the first way that the template writes."""
        answer = {"role": "assistant", "content": PROBE}
        dialect = Dialect(developer_as_system=not DEVELOPER.search(self.source))
        if not self._writes([USER_PROBE, answer], [PROBE], dialect):
            parts = replace(dialect, parts=True)
            dialect = parts if self._writes([USER_PROBE, answer], [PROBE], parts) else dialect
        thought = {**answer, "reasoning_content": "a thought"}
        if OPEN_THINKING in self.source and not self._writes([USER_PROBE, thought], ["a thought"], dialect):
            inline = replace(dialect, inline_reasoning=True)
            dialect = inline if self._writes([USER_PROBE, thought], ["a thought"], inline) else dialect
        return self._with_calls(dialect)

    def _with_calls(self, dialect: Dialect) -> Dialect:
        function = {"name": "a_function", "arguments": {"a_key": "a_value"}}
        call = {"type": "function", "id": "abcdefgh1", "function": function}
        turns = [USER_PROBE, {"role": "assistant", "content": "", "tool_calls": [call]}]
        end = self._try_answer(dialect).rpartition(PROBE)[2]
        for null_content, text_arguments in itertools.product((False, True), (False, True)):
            way = replace(dialect, null_content=null_content, text_arguments=text_arguments)
            text = self._try(way.write(turns))
            call, _, tail = text.rpartition("a_value")
            if "a_function" not in call or "a_key" not in call:
                continue
            # Not an object as Python prints it, nor an empty answer behind the call, nor a call that is never closed.
            if (
                "'a_key'" not in call
                and tail.count(end.strip() or "\0") <= 1
                and (not null_content or tail.endswith(end))
            ):
                return way
        return dialect

    def _writes(self, messages: list[dict], texts: list[str], dialect: Dialect) -> bool:
        written = self._try(dialect.write(messages))
        return all(text in written for text in texts)

    def _try(self, messages: list[dict], **options: Any) -> str:
        for tools in (None, TOOLS_PROBE):  # templates for tool use may want some
            with contextlib.suppress(RowError):
                return self._render(messages, tools, "", **options)
        return ""

    def _try_answer(self, dialect: Dialect) -> str:
        """A question and an answer as the template writes them; "" if it wants more than that."""
        return self._try(dialect.write([USER_PROBE, {"role": "assistant", "content": PROBE}]))

    def _frame(self) -> tuple[str | None, str]:
        """What the template writes between the generation prompt and an answer (None: it writes another prompt), and
        behind the answer."""
        text = self._try_answer(self.dialect)
        prompt = self._try(self.dialect.write([USER_PROBE]), add_generation_prompt=True)
        head, _, end = text.rpartition(PROBE)
        return head[len(prompt) :] if head.startswith(prompt) else None, end

    def _check_end_of_turn(self) -> None:
        if self._try_answer(self.dialect).rstrip().endswith(PROBE):
            raise DataError(
                "The chat template writes nothing after an assistant turn, so the model would never learn to stop.",
                "Put {{ eos_token }} behind the assistant's content in the tokenizer's chat template.",
            )

    # Rendering

    def _render(self, messages: list[dict], tools: list[dict] | None, place: str, **options: Any) -> str:
        return _render_template(self.tokenizer, self.source, messages, tools, place, **options)[0][0]

    def _render_marked(self, messages: list[dict], tools: list[dict] | None, place: str) -> tuple[str, list[Span]]:
        # What apply_chat_template does, except that it returns token masks only: it looks tokens up at the characters
        # a span starts and ends with, and marks all that follows when a tokenizer trims spaces off its offsets.
        texts, spans = _render_template(
            self.tokenizer, self.source, messages, tools, place, return_assistant_tokens_mask=True
        )
        return texts[0], [(start, end) for start, end in spans[0] if end > start]


def _render_template(
    tokenizer: Any, source: str, messages: list[dict], tools: list[dict] | None, place: str, **options: Any
) -> tuple[list[str], list[list[Span]]]:
    try:
        return render_jinja_template(
            [messages], tools=tools or None, chat_template=source, **options, **tokenizer.special_tokens_map
        )
    except TemplateSyntaxError as error:
        raise DataError(
            f"The chat template is no valid Jinja: {error}.", "Mend the base model's chat_template.jinja."
        ) from None
    except Exception as error:  # a template is a program, and may fail in any way
        raise refused(place, error) from None


def _marked_template(tokenizer: Any, source: str) -> str | None:
    """A template with generation markers around each assistant turn up to its end, if there is one."""
    candidates = [source] if has_generation_markers(source) else []
    probed = copy.copy(tokenizer)
    probed.chat_template = source
    try:
        candidates.append(get_training_chat_template(probed))
    except Exception:  # TRL knows no training version of it, or it failed on one of TRL's probes
        pass
    return next((one for one in candidates if one is not None and _marks_end_of_turn(tokenizer, one)), None)


def _marks_end_of_turn(tokenizer: Any, source: str) -> bool:
    """Whether the markers hold more than the answer's words, that is, its end. Nothing follows the last turn in some
    templates, so another one comes behind it."""
    probe = [USER_PROBE, {"role": "assistant", "content": PROBE}, USER_PROBE]
    for dialect in (Dialect(), Dialect(parts=True)):
        try:
            texts, spans = _render_template(
                tokenizer, source, dialect.write(probe), None, "", return_assistant_tokens_mask=True
            )
        except RowError:
            continue
        marked = "".join(texts[0][start:end] for start, end in spans[0])
        if PROBE in marked:
            return bool(marked.rpartition(PROBE)[2].strip())
    return False


def _kind(message: dict) -> tuple:
    calls = tuple(bool(call["function"]["arguments"]) for call in message.get("tool_calls") or ())
    return message["role"], bool(message["content"].strip()), "reasoning_content" in message, calls


def _made_up(turn: int, message: dict) -> dict:
    """A message of the same kind, with words that stand nowhere else."""
    made_up = {**message, "content": f"qz{turn}q" if message["content"].strip() else ""}
    if "reasoning_content" in message:
        made_up["reasoning_content"] = f"qr{turn}q"
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
    todo = {
        "reasoning": "Leave it out, try --split_turns, or take a base model whose chat template has a place for it.",
        "content": "Leave that turn out, or take a base model whose chat template writes it.",
        "tool": "Leave the tools out, or take a base model whose chat template writes them.",
    }.get(losses[0].part.kind, "Take a base model whose chat template has tool calls.")
    return RowError(f"{place}: the chat template does not write {', '.join(labels[:3])}{more}.", todo)


def refused(place: str, error: Exception) -> RowError:
    """What to raise when a chat template does not take the conversation of `place`."""
    said = " ".join(str(error).split())
    said = said if said.endswith((".", "!", "?")) else f"{said}."
    if isinstance(error, UndefinedError):
        return RowError(
            f"{place}: the chat template fails on this conversation: {said}",
            "It wants something that the row lacks, such as a tool's description: add it, or take another base model.",
        )
    if not isinstance(error, TemplateError):
        return RowError(
            f"{place}: the chat template fails on this conversation: {type(error).__name__}: {said}",
            "It may not know a part of the row, such as a tool call: change the row, or take another base model.",
        )
    about_roles = any(word in said.lower() for word in ("role", "alternat", "system"))
    return RowError(
        f"{place}: the chat template refuses this conversation: {said}",
        "Check its roles and their order; some templates take no system turn."
        if about_roles
        else "It is the template's own limit: change the row, or take another base model.",
    )
