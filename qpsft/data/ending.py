"""The tokens that end an answer: what training supervises as its last token, whatever the tokenizer calls its eos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpsft.data.read import Records
from qpsft.data.shapes import to_rows
from qpsft.data.tokenize import IGNORED, tokenize_rows
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments


def end_of_turn(tokenizer: Any, arguments: DataArguments | None = None) -> set[int]:
    """Ids of the special tokens that end an answer as training writes it; none for a template that refuses a row.

    Args:
        tokenizer: with or without a chat template.
        arguments: `use_chat_template` and `prompt_format` are used.
    """
    arguments = arguments or DataArguments()
    try:
        rows = to_rows(Records("probe", "row", [1], [{"prompt": "?", "completion": "!"}]), arguments)
        (row,) = tokenize_rows(rows, tokenizer, arguments, None, show_progress=False).dataset
    except DataError:
        return set()
    return ending_tokens(row["labels"], tokenizer)


def ending_tokens(labels: Sequence[int], tokenizer: Any) -> set[int]:
    """Ids of the special tokens that a row's supervised tokens end with."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    ending = [label for label in labels if label != IGNORED][-2:]  # some templates end in a line break
    return {label for label in ending if label in special}
