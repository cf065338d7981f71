"""Rows as the model will see them, with what it learns marked, and the counts."""

from __future__ import annotations

import shutil
import sys
from itertools import groupby
from typing import Any

from qpsft.data.counts import DataCounts, counted
from qpsft.data.tokenize import IGNORED, TokenizedRows
from qpsft.terminal import takes_color, visible

GREEN, RESET = "\x1b[32m", "\x1b[0m"
MARKS = ("⟦", "⟧")


def render_preview(
    tokenized: TokenizedRows, tokenizer: Any, n: int = 3, color: bool | None = None, width: int | None = None
) -> str:
    """The first `n` rows, as `render_rows` shows them, and the table of counts."""
    return f"{render_rows(tokenized, tokenizer, n, color, width)}\n\n{render_counts(tokenized, width)}"


def render_counts(tokenized: TokenizedRows, width: int | None = None) -> str:
    """The table of counts, below a rule; `width` as in `render_rows`."""
    return "─" * (width or _width()) + f"\n{_table(tokenized)}\n"


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def render_rows(
    tokenized: TokenizedRows, tokenizer: Any, n: int = 3, color: bool | None = None, width: int | None = None
) -> str:
    """The first `n` rows decoded token by token, special tokens included.

    Args:
        tokenized: what `qpsft.data.tokenize.tokenize_rows` returned, or its first rows.
        tokenizer: the tokenizer that was used for it.
        n: how many rows to show.
        color: True shows supervised tokens in green, False between ⟦ and ⟧. None: colour on a terminal, unless the
            environment says NO_COLOR or TERM=dumb.
        width: length of the rules between rows, in characters; the terminal's if None. Rows are never shortened.
    """
    if color is None:
        color = takes_color(sys.stdout)
    width = width or _width()
    before, after = (GREEN, RESET) if color else MARKS
    blocks = [f"{before}Supervised tokens{after} look like this; all others are context."]
    for index in range(min(n, len(tokenized.dataset))):
        row = tokenized.dataset[index]
        supervised = sum(label != IGNORED for label in row["labels"])
        title = f"── {tokenized.places[index]}: {len(row['input_ids'])} tokens, {supervised} supervised "
        runs = _runs(tokenizer, row["input_ids"], row["labels"])
        body = "".join(f"{before}{text}{after}" if learned else text for learned, text in runs)
        blocks.append(f"{title.ljust(width, '─')}\n{body}")
    return "\n\n".join(blocks)


def _runs(tokenizer: Any, ids: list[int], labels: list[int]) -> list[tuple[bool, str]]:
    """Stretches of equally treated tokens: whether they are supervised, and their text."""
    runs, done, end = [], "", 0
    for learned, group in groupby(labels, key=lambda label: label != IGNORED):
        start, end = end, end + len(list(group))
        # Decoded with all that precedes it, or the first word would lose its space (SentencePiece); by itself only
        # where the cut falls inside a character.
        whole = _decode(tokenizer, ids[:end])
        text = whole[len(done) :] if whole.startswith(done) else _decode(tokenizer, ids[start:end])
        done = whole
        runs.append((learned, visible(text)))
    return runs


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _table(tokenized: TokenizedRows) -> str:
    counts: DataCounts = tokenized.counts
    limit = "no limit" if counts.max_length is None else f"max_length {counts.max_length}"
    share = counts.supervised_tokens / counts.tokens
    names = {50: "median", 100: "longest"}
    lengths = ", ".join(f"{names.get(p, f'{p} %')} {length:,}" for p, length in counts.length_percentiles.items())
    lines = [
        ("dataset", f"{tokenized.name} ({tokenized.shape})"),
        ("rows", f"{counts.rows:,}, of which {counts.kept:,} are trained on"),
        *(("dropped", f"{number:,} ({reason})") for reason, number in counts.dropped.items()),
        ("truncated", f"{counts.truncated:,} ({limit})"),
        ("tokens", f"{counts.tokens:,}"),
        ("supervised tokens", f"{counts.supervised_tokens:,} ({share:.1%})"),
        ("length in tokens, uncut", lengths),
    ]
    if counts.conversations is not None:
        lines.insert(1, ("conversations", f"{counts.conversations:,}; split_turns makes one row of each answer"))
    if counts.shared_tokens:
        what = "in which prompt and completion share a token: the prompt alone gives another context"
        lines.append(("shared tokens", f"{counts.shared_tokens:,} rows {what}"))
    if counts.stripped_reasoning:
        answers = counted(counts.stripped_reasoning, "earlier answer")
        lines.append(("reasoning not seen", f"of {answers}: the chat template leaves it out, --split_turns keeps it"))
    if counts.shortened_schemas:
        lines.append(("schemas shortened", f"of {counted(counts.shortened_schemas, 'row')}, by the chat template"))
    if counts.special_tokens:
        lines.append(("special tokens", f"in the text of {counted(counts.special_tokens, 'row')}"))
    if counts.unused_columns:
        lines.append(("columns not used", ", ".join(map(str, counts.unused_columns))))
    column = max(len(name) for name, _ in lines)
    table = "\n".join(f"{name.ljust(column)}  {value}" for name, value in lines)
    bad = ["", "Rows that cannot be used, the first of them:", *counts.bad_rows] if counts.bad_rows else []
    return visible("\n".join([table, *bad]))
