"""The day that chat templates print as today's: one day for the whole of a run, however many days it takes.

Templates such as Llama 3.2's and SmolLM3's call `strftime_now`. Rows rendered after midnight are other rows: a run
could not be resumed on them, and a comparison would find none of its results again.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

from qpsft.errors import OutputError
from qpsft.files import write_atomically

CHAT_DATE = "chat_date"
"""File in a run's folder; written only for templates that print a date."""
ASKS = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
"""transformers hands templates no function but its own, so the calls are replaced by what they are to return."""


def today() -> str:
    """YYYY-MM-DD."""
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
