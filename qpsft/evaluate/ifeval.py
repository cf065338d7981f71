"""IFEval: prompts with instructions that a program can check, answered greedily, judged by the harness's checker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qpsft.evaluate.harness import explained, not_installed
from qpsft.evaluate.task_data import BENCHMARKS
from qpsft.model.generation import greedy_completions

HUB_ID = "google/IFEval"  # the harness's
MAX_NEW_TOKENS = 1280  # the harness's
NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""Instructions whose check needs NLTK's data punkt_tab."""


def ifeval_rows(path: Path | None, limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """IFEval's rows. Where NLTK's punkt_tab is not here and cannot be downloaded, those that are checked without it.

    Args:
        path: its file or folder; None: from the Hub.
        limit: only the first so many of these rows.

    Returns:
        (rows, how many are left out for want of punkt_tab).

    Raises:
        DataError: the harness is not installed, or the rows can neither be read nor downloaded.
    """
    _checker()  # which downloads punkt_tab if it can
    if path is not None:
        rows = BENCHMARKS["ifeval"].read(path)["train"]
    else:
        import datasets

        with explained(["ifeval"], {}):
            rows = list(datasets.load_dataset(HUB_ID, split="train"))
    checkable = rows if _has_punkt() else [row for row in rows if not NEEDS_PUNKT & set(row["instruction_id_list"])]
    return checkable[:limit], len(rows) - len(checkable)


def follow_instructions(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    description: str | None = None,
) -> list[dict[str, Any]]:
    """Answers each prompt greedily and has it checked.

    Args:
        tokenizer: prompts go through its chat template if it has one.
        max_new_tokens, batch_size, description: as in `qpsft.model.generation.generate`.

    Returns:
        The harness's verdicts of each row: `prompt_level_strict_acc` (bool), `inst_level_strict_acc` (a bool per
        instruction) and the same with `loose`.
    """
    check = _checker()
    has_template = getattr(tokenizer, "chat_template", None) is not None
    texts = [row["prompt"] for row in rows]
    written = greedy_completions(
        model,
        tokenizer,
        [[{"role": "user", "content": text}] for text in texts] if has_template else texts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    return [check(row, [text]) for row, text in zip(rows, written, strict=True)]


def _checker() -> Callable[[dict, list[str]], dict[str, Any]]:
    """The harness's own, which guesses languages the same way every time."""
    said = io.StringIO()  # NLTK's downloader prints what it does
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval.utils import process_results
    except ImportError as error:
        raise not_installed() from error
    DetectorFactory.seed = 0
    return process_results


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
