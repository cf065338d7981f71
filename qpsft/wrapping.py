"""Sentences in a terminal."""

import textwrap


def wrap(text: str, indent: str = "  ") -> str:
    """The text in lines of at most 80 columns, all but the first indented; names and paths stay whole."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
