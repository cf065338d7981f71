"""A chat template as the program it is: run on messages, in its training version if TRL has one; what it says when it
fails."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template

from qpsft.data.bad_rows import RowError
from qpsft.data.contents import Span
from qpsft.data.dialect import PROBE, USER_PROBE, Dialect
from qpsft.errors import DataError

resource = None
if Path("/proc/self/statm").exists():
    with contextlib.suppress(ImportError):
        import resource

SECONDS = 10
"""What a chat template may take of the processor for one conversation; usual ones take a thousandth of a second."""
ROOM = 2**31
LOOK_FOR_A_LOOP = "Look for a loop in the base model's chat_template.jinja, or take another base model."
PAGE = 4096 if resource is None else resource.getpagesize()


def render(
    tokenizer: Any, source: str, messages: list[dict], tools: list[dict] | None, place: str, **options: Any
) -> str:
    """What the template `source` writes.

    Args:
        tokenizer: whose special tokens the template may write.
        messages: in the template's dialect.
        tools: schemas; none and [] are the same.
        place: the row's, for errors.
        options: of `render_jinja_template`.

    Raises:
        RowError: the template refuses the conversation or fails on it. DataError: it is no valid Jinja.
    """
    return _run(tokenizer, source, messages, tools, place, **options)[0][0]


def render_marked(
    tokenizer: Any, source: str, messages: list[dict], tools: list[dict] | None, place: str
) -> tuple[str, list[Span]]:
    """The same, and the stretches that the template's generation markers cover."""
    # What apply_chat_template does, except that it returns token masks only: it looks tokens up at the characters a
    # span starts and ends with, and marks all that follows when a tokenizer trims spaces off its offsets.
    texts, spans = _run(tokenizer, source, messages, tools, place, return_assistant_tokens_mask=True)
    return texts[0], [(start, end) for start, end in spans[0] if end > start]


def _run(
    tokenizer: Any, source: str, messages: list[dict], tools: list[dict] | None, place: str, **options: Any
) -> tuple[list[str], list[list[Span]]]:
    try:
        with limited(place):
            texts, spans = render_jinja_template(
                [messages], tools=tools or None, chat_template=source, **options, **tokenizer.special_tokens_map
            )
            texts[0].encode()  # half a surrogate pair is no text to a tokenizer
            return texts, spans
    except TemplateSyntaxError as error:
        raise DataError(
            f"The chat template is no valid Jinja: {error}.", "Mend the base model's chat_template.jinja."
        ) from None
    except DataError:
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        raise refused(place, error) from None


@contextmanager
def limited(place: str = "") -> Iterator[None]:
    """Around what a chat template computes: it may take `SECONDS` of the processor and `ROOM` more memory.

    A template is a program. One that never ends, or writes texts that no memory holds, ends here; where the system
    cannot count (Windows), or in another thread than the first, it runs without limits.

    Raises:
        DataError: it took too long, or too much.
    """
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    memory = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:  # faster than Path and psutil, and it is asked for every row
        most = int(file.read().split()[0]) * PAGE + ROOM
    handler = signal.signal(signal.SIGVTALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (most if memory[0] < 0 else min(most, memory[0]), memory[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except _TooLongError:
        raise DataError(
            f"The chat template does not end: it was stopped after {SECONDS} seconds.", LOOK_FOR_A_LOOP
        ) from None
    except MemoryError:  # not for every probe and row again: each may need many seconds to come so far
        raise DataError(
            f"The chat template takes more than {ROOM >> 30} GiB for {place or 'a question of a few words'}.",
            LOOK_FOR_A_LOOP,
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


class _TooLongError(BaseException):
    """No Exception: libraries that catch those must not go on."""


def _too_long(*_: Any) -> None:
    raise _TooLongError


def marked_template(tokenizer: Any, source: str) -> str | None:
    """A template with generation markers around each assistant turn up to its end, if there is one."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # imports torch

    candidates = [source] if has_generation_markers(source) else []
    probed = copy.copy(tokenizer)
    probed.chat_template = source
    try:
        with limited():
            candidates.append(get_training_chat_template(probed))
    except DataError:
        raise
    except Exception:  # TRL knows no training version of it, or it failed on one of TRL's probes
        pass
    return next((one for one in candidates if one is not None and _marks_end_of_turn(tokenizer, one)), None)


def _marks_end_of_turn(tokenizer: Any, source: str) -> bool:
    """Whether the markers hold more than the answer's words, that is, its end. Nothing follows the last turn in some
    templates, so another one comes behind it."""
    probe = [USER_PROBE, {"role": "assistant", "content": PROBE}, USER_PROBE]
    for dialect in (Dialect(), Dialect(parts=True)):
        try:
            text, spans = render_marked(tokenizer, source, dialect.write(probe), None, "")
        except RowError:
            continue
        marked = "".join(text[start:end] for start, end in spans)
        if PROBE in marked:
            return bool(marked.rpartition(PROBE)[2].strip())
    return False


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
