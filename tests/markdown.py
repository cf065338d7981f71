"""Markdown as the documentation tests read it: code blocks and their marks, commands, links, headings.

A fenced block is run by tests/test_readme.py unless an HTML comment stands right before its fence:

    <!-- test: needs the Hub -->      (or a GPU, Ollama, …) its commands are only read: verb, flags and paths
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"(?:<!-- test: (?P<mark>[^\n]*?) -->\n\s*?)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```",
    flags=re.M | re.S,
)
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text without the fence's indent, and its mark (empty: none)."""

    language: str
    text: str
    mark: str


def documents() -> list[Path]:
    """Everything that people read, notebooks included."""
    globs = (
        "*.md", "docs/*.md", "adapters/*/README.md", "adapters/README.md", "benchmarks/*.md", "qpsft/*/README.md",
        "notebooks/*.md", "notebooks/*.ipynb",
    )  # fmt: skip
    return sorted(path for pattern in globs for path in ROOT.glob(pattern))


def text_of(path: Path) -> str:
    """A document's markdown; of a notebook, its markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(source) for source in cells)


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of these languages; of all if none is given."""
    found = []
    for match in FENCE.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines()]
        found.append(Block(match["language"], "\n".join(lines) + "\n", match["mark"] or ""))
    return [block for block in found if not languages or block.language in languages]


def without_blocks(text: str) -> str:
    return FENCE.sub("", text)


def command_lines(block: str) -> list[str]:
    """The command lines of a shell block, joined where they continue, without prompts and comments."""
    lines = block.replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in stripped if line]


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line, without the variables set for it; `&&`, `|` and `;` stand between them."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [command for command in found if command]


def qpsft_commands(text: str) -> Iterator[list[str]]:
    """Every `qpsft VERB …` of a document: in fenced blocks, whatever their language, and in code inside a line."""
    for block in blocks(text):
        for line in command_lines(block.text):
            if re.match(r"(?:\S+=\S+ )*qpsft [a-z]|.*[&|;] *qpsft [a-z]", line):
                # an explanation may stand behind the command, two spaces away
                yield from (command for command in commands(line.split("  ")[0]) if command[0] == "qpsft")
    for code in re.findall(r"(?<!`)`(qpsft [a-z][^`\n]*)`(?!`)", without_blocks(text)):
        yield from (command for command in commands(code) if command[0] == "qpsft")


def links(text: str) -> list[str]:
    """Link and image targets outside code."""
    prose = re.sub(r"`[^`\n]*`(?!\])", "", without_blocks(text))
    return LINK.findall(prose)


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_blocks(text), flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (slug if n == 0 else f"{slug}-{n}") not in found)
        found.add(slug if number == 0 else f"{slug}-{number}")
    return found


def section(text: str, heading: str) -> str:
    """The text below a heading (given with its #), up to the next heading of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{level}}} ", text[start:], flags=re.M)
    return text[start : start + end.start()] if end else text[start:]


def code_names(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))
