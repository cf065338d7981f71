"""Whether a completion is right: what each verifier reads out of a text, and which one suits a data set."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from qpsft.data import built_in
from qpsft.errors import DataError, did_you_mean

Verdict = bool | None
"""Right or wrong; None when the completion has no answer that the verifier can read (counted as wrong)."""
Verifier = Callable[[dict, str], Verdict]
"""(row, completion text) -> verdict. A row has `prompt` and `completion`, and other columns that a verifier needs."""

CHOICE = "choice"
"""Not a verifier of texts: the row's `choices` are compared by their likelihood."""
TOKENS = "tokens"
"""Nor this one: the share of the reference's tokens that are the model's likeliest, for texts that the base wrote."""
GSM8K_ANSWER = re.compile(r"####\s*([-+$]{0,2}[\d,]*\.?\d+)")
NUMBER = re.compile(r"(?:(?<![\w)])[-+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def text_of(answer: str | list[dict]) -> str:
    """The text of a prompt or completion: itself, or its last message's content."""
    return answer if isinstance(answer, str) else answer[-1].get("content") or ""


def exact(row: dict, text: str) -> Verdict:
    """The completion equals the reference, spaces around it ignored."""
    return text.strip() == text_of(row["completion"]).strip() if text.strip() else None


def last_number(row: dict, text: str) -> Verdict:
    """The last number in the completion is the last number in the reference."""
    return _same(_last_number(text), _last_number(text_of(row["completion"])))


def gsm8k(row: dict, text: str) -> Verdict:
    """The number behind the first `####` is the reference's, as GSM8K's authors grade."""
    return _same(_gsm8k_number(text), _gsm8k_number(text_of(row["completion"])))


def math_verify(row: dict, text: str) -> Verdict:
    """The completion's last mathematical expression equals the reference's, by the package math-verify."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise DataError("The verifier math_verify needs the package math-verify.", "pip install math-verify") from error
    # Its own time limit uses signals, which only the main thread may set.
    answer = parse(text, parsing_timeout=None)
    if not answer:
        return None
    return bool(verify(parse(text_of(row["completion"]), parsing_timeout=None), answer, timeout_seconds=None))


def demo(row: dict, text: str) -> Verdict:
    """`qpsft.data.built_in.check`, for rows of the built-in sets."""
    if "task" not in row:
        raise DataError("The verifier demo is for the built-in sets only.", "Choose another with --verifier.")
    right = built_in.check(row, text)
    return right if right or built_in.final_answer(text) is not None else None


def instructions(row: dict, text: str) -> Verdict:
    """The completion follows every instruction in the row's `checks`: a mapping of names in `CHECKS` to arguments."""
    _, thought, text = text.rpartition("</think>")
    if not thought and "<think>" in text:  # cut off before the answer
        return None
    text = text.strip()
    if not text:
        return None
    return all(CHECKS[name](text, wanted) for name, wanted in row["checks"].items() if wanted is not None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+[\"”'’)]*(?=\s|$)", text)) + (re.search(r"[.!?][\"”'’)]*$", text) is None)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _json(text: str) -> Any:
    """The value of a text that is JSON and nothing else, with or without a code fence around it; else None."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except ValueError:
        return None


def _has_keys(text: str, keys: list[str]) -> bool:
    value = _json(text)
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def _has_items(text: str, number: int) -> bool:
    value = _json(text)
    return isinstance(value, list) and len(value) == number


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "bullets": lambda text, number: len(re.findall(r"^\s*[-*•]\s+\S", text, re.MULTILINE)) == number,
    "numbered": lambda text, number: (
        re.findall(r"^\s*(\d+)[.)]\s+\S", text, re.MULTILINE) == [str(n) for n in range(1, number + 1)]
    ),
    "paragraphs": lambda text, number: len(re.split(r"\n\s*\n", text)) == number,
    "sentences": lambda text, number: _sentences(text) == number,
    "min_words": lambda text, number: len(_words(text)) >= number,
    "max_words": lambda text, number: len(_words(text)) <= number,
    "no_commas": lambda text, _: "," not in text,
    "no_digits": lambda text, _: not any(letter.isdigit() for letter in text),
    "lower_case": lambda text, _: text.islower(),
    "upper_case": lambda text, _: text.isupper(),
    "starts_with": lambda text, start: text.startswith(start),
    "ends_with": lambda text, end: text.endswith(end),
    "contains": lambda text, words: all(_has_word(text, word) for word in words),
    "avoids": lambda text, words: not any(_has_word(text, word) for word in words),
    "one_of": lambda text, answers: text.lower().rstrip(".!") in answers,
    "quoted": lambda text, _: len(text) > 2 and text[0] in '"“' and text[-1] in '"”',
    "json_keys": _has_keys,
    "json_items": _has_items,
    "placeholders": lambda text, number: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= number,
    "bold": lambda text, number: len(re.findall(r"\*\*[^*\n]+\*\*", text)) >= number,
}
"""Instructions that a program can check: (completion without spaces around it, argument) -> whether it is followed."""


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "last_number": last_number,
    "gsm8k": gsm8k,
    "math_verify": math_verify,
    "demo": demo,
    "instructions": instructions,
}
NAMES = ("auto", *VERIFIERS, CHOICE, TOKENS)


def find_verifier(
    name: str | Verifier, rows: Sequence[dict], source: str, places: Sequence[str] | None = None
) -> tuple[str, Verifier | None]:
    """A verifier's name and function; the function is None for multiple choice and for `tokens`.

    Args:
        name: one of `NAMES`, or a function. "auto": the demo's own check for its rows, multiple choice for rows with
            `choices`, instructions for rows with `checks`, tokens for rows with `ids`, `####` where every
            reference has one, else exact match.
        rows: the evaluated rows.
        source: what to call the rows in errors.
        places: where each came from; counted from 1 if left out.

    Raises:
        DataError: no such verifier, or it can read the answer of no reference.
    """
    if callable(name):
        return getattr(name, "__name__", "own"), name
    if name == "auto":
        name = _detect(rows)
    if name == CHOICE:
        _check_choices(rows, places or [f"{source}, row {number}" for number in range(1, len(rows) + 1)])
        return CHOICE, None
    if name == TOKENS:
        return TOKENS, None
    if name not in VERIFIERS:
        todo = f"{did_you_mean(name, NAMES)}Use one of {', '.join(NAMES)}."
        raise DataError(f"There is no verifier {name!r}.", todo)
    if name == "instructions":
        _check_checks(rows, places or [f"{source}, row {number}" for number in range(1, len(rows) + 1)])
    if name != "demo":  # the demo's check looks at the row's task, not at its reference
        _check_references(name, rows, source)
    return name, VERIFIERS[name]


def warn_if_nothing_parsed(name: str, source: str, parsed: int, completions: int) -> None:
    """Warns when a verifier could read no answer in any completion."""
    if completions and not parsed:
        warnings.warn(
            f"{source}: the verifier {name} parsed 0 of {completions} completions, so every accuracy is 0. Look at a "
            "few completions; perhaps another verifier fits, or the length cap cuts the answers off.",
            stacklevel=3,
        )


def _detect(rows: Sequence[dict]) -> str:
    if all("task" in row for row in rows):
        return "demo"
    if all("choices" in row for row in rows):
        return CHOICE
    if all("checks" in row for row in rows):
        return "instructions"
    if all("ids" in row for row in rows):
        return TOKENS
    if all(_gsm8k_number(text_of(row["completion"])) is not None for row in rows):
        return "gsm8k"
    return "exact"


def _check_references(name: str, rows: Sequence[dict], source: str) -> None:
    unusable = sum(VERIFIERS[name](row, text_of(row["completion"])) is None for row in rows)
    if unusable == len(rows):
        raise DataError(
            f"{source}: the verifier {name} finds no answer in any of the {len(rows)} references.",
            f"Choose another with --verifier: {', '.join(NAMES)}.",
        )
    if unusable:
        warnings.warn(
            f"{source}: the verifier {name} finds no answer in {unusable} of {len(rows)} references; completions of "
            "those rows count as wrong.",
            stacklevel=3,
        )


def _check_checks(rows: Sequence[dict], places: Sequence[str]) -> None:
    for row, place in zip(rows, places, strict=True):
        checks = row.get("checks")
        if not isinstance(checks, dict) or not checks:
            raise DataError(
                f"{place}: instructions need a column `checks`, a mapping such as {{no_commas: true}}.",
                "Add it, or choose another verifier.",
            )
        for name in checks.keys() - CHECKS.keys():
            raise DataError(
                f"{place}: there is no check {name!r}.", f"{did_you_mean(name, CHECKS)}Checks: {', '.join(CHECKS)}."
            )


def _check_choices(rows: Sequence[dict], places: Sequence[str]) -> None:
    for row, place in zip(rows, places, strict=True):
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(
                f"{place}: multiple choice needs a column `choices`, a list of two texts or more.",
                "Add it, or choose another verifier.",
            )
        if text_of(row["completion"]) not in choices:
            raise DataError(
                f"{place}: the completion is none of the row's choices.",
                "Write the right choice, word for word, as the completion.",
            )


def _same(answer: Decimal | None, wanted: Decimal | None) -> Verdict:
    if answer is None:
        return None
    return wanted is not None and answer == wanted


def _gsm8k_number(text: str) -> Decimal | None:
    match = GSM8K_ANSWER.search(text)
    return _number(match[1]) if match else None


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$,]", "", text))
    except InvalidOperation:
        return None
