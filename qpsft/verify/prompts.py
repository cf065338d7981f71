"""The texts on which two models are compared: held-out rows of the training, a file, or a built-in set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import DataError, boundary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_FILE = "verify_prompts.jsonl"
LONGEST = 512
"""Tokens of a prompt at most; a longer one is cut there, never dropped."""

BUILT_IN = (
    "Write one sentence about the weather today.",
    "What is 17 + 25? Think step by step, then give the number.",
    "List three fruits that are red.",
    "Translate to French: The library opens at nine in the morning.",
    "Erkläre in einem Satz, warum der Himmel blau ist.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, there was a little girl named Lily. She had a",
    "The capital of Japan is",
    'Return JSON with the keys "name" and "age" for a person of your choice.',
    "Summarize: The meeting was moved from Tuesday to Thursday because two people were ill.",
    "¿Cuántos días tiene una semana?",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY",
    "今天天气怎么样？",
    "If all bloops are razzies and all razzies are lazzies, are all bloops lazzies?",
    "Rewrite politely: Give me the report now!",
    "Tom has 3 apples. He buys 4 more and gives 2 to Anna. How many apples does Tom have?",
)


@dataclass(frozen=True)
class Prompt:
    """A tokenized text.

    Attributes:
        ids: its tokens, at least one.
        prompt_length: how many of them the model is given; the rest is an answer known from the data.
    """

    ids: list[int]
    prompt_length: int


def read_prompts(
    prompts: str | Path | list[Any] | None, adapter: Path, tokenizer: PreTrainedTokenizerBase, limit: int, context: int
) -> tuple[list[Prompt], str]:
    """The prompts to compare on, and where they come from, in words.

    Args:
        prompts: a JSONL file, or a list; each line or item is a string, or an object with `text`, or with `input_ids`
            and optionally `prompt_length`. None: the adapter folder's own file, else the built-in set.
        tokenizer: the trained tokenizer; it makes tokens of texts.
        limit: how many prompts at most, evenly spread.
        context: how many tokens the model can take.

    Raises:
        DataError: file missing, a line that is not such an object, a token the tokenizer lacks, or no prompt at all.
    """
    if prompts is None:
        own = adapter / PROMPTS_FILE
        if own.is_file() and own.stat().st_size:
            rows, place = _read_lines(own), "held-out rows of the training"
        else:
            rows, place = list(_built_in(tokenizer)), "built-in texts"
    elif isinstance(prompts, list):
        rows, place = prompts, "given texts"
    else:
        rows, place = _read_lines(Path(prompts)), str(prompts)
    if not rows:
        raise DataError(f"There are no prompts in {place}.", "Give a file with at least one line.")
    step = max(1, len(rows) / limit)
    chosen = [int(number * step) for number in range(min(limit, len(rows)))]
    longest = min(LONGEST, context)
    return [_prompt(rows[index], f"{place}, row {index + 1}", tokenizer, longest) for index in chosen], place


def _read_lines(path: Path) -> list[Any]:
    with boundary(f"The prompts file {path} cannot be read", DataError, "Give a JSONL file."):
        lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with boundary(f"{path}, line {number} is not JSON", DataError, 'Write one object a line: {"text": "…"}.'):
                rows.append(json.loads(line))
    return rows


def _built_in(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    if tokenizer.chat_template is None:
        return list(BUILT_IN)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in BUILT_IN
    ]


def _prompt(row: Any, place: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> Prompt:
    wrong = DataError(f"{place} is not a prompt.", 'Write a string, {"text": "…"} or {"input_ids": […]}.')
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise wrong
    ids = row.get("input_ids")
    if ids is None:
        if not isinstance(row.get("text"), str):
            raise wrong
        # A chat template writes the special tokens itself.
        ids = tokenizer(row["text"], add_special_tokens=tokenizer.chat_template is None, verbose=False)["input_ids"]
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise wrong
    if not ids:
        raise DataError(f"{place} has no tokens.", "Leave it out.")
    size = len(tokenizer)
    if min(ids) < 0 or max(ids) >= size:
        raise DataError(f"{place} has a token beyond the tokenizer's {size}.", "It belongs to another tokenizer.")
    length = row.get("prompt_length", len(ids))
    if not isinstance(length, int) or not 1 <= length <= len(ids):
        raise DataError(f"{place} has prompt_length {length!r} of {len(ids)} tokens.", "Use 1 up to that number.")
    return Prompt(ids[:longest], min(length, longest))
