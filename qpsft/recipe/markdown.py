"""Names of files, models and columns in Markdown: they come from elsewhere, and must stay names there."""

import re

_MARKUP = re.compile(r"([`*|]|\](?=\()|\\(?![^!-/:-@\[-`{-~]))")  # a backslash before a letter is none to Markdown


def as_text(name: str) -> str:
    """On one line, and no markup or HTML."""
    line = one_line(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", line)


def as_code(name: str) -> str:
    """As code on one line, whatever backticks it holds."""
    line = one_line(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def one_line(text: str) -> str:
    """Without line ends and other control characters."""
    return "".join(char if char.isprintable() else " " for char in str(text))
