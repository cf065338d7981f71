"""Sentences in a terminal."""

import os
import re
import textwrap
from typing import TextIO

# All but tab and line feed: a row or an answer must not be able to steer the terminal it is shown on.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def wrap(text: str, indent: str = "  ") -> str:
    """The text in lines of at most 80 columns, all but the first indented; names and paths stay whole."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def visible(text: str) -> str:
    """Control characters other than tab and line feed as \\xNN."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def takes_color(stream: TextIO) -> bool:
    """Whether `stream` is a terminal and the environment says neither NO_COLOR nor TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
