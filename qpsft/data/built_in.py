"""The embedded base's world: operations on four-digit strings, asked for in plain words and answered in several styles.

One problem is a chain of operations and the digits it starts from. A problem belongs to exactly one of train,
validation and test, whatever the seed and whatever asks for it, because its split is a hash of its text. Pretraining
sees train problems with chains of one to three operations; chains of four are left for fine-tuning.

Every row is `{"prompt": [user message], "completion": [assistant message], "task": {...}}`; `check(row, text)` says
whether a generated completion is right for it. Standard library only, so importing this costs nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from functools import partial

from qpsft.errors import DataError

OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "rotate": lambda s: s[1:] + s[0],
    "swap halves": lambda s: s[2:] + s[:2],
    "add one": lambda s: "".join(str((int(c) + 1) % 10) for c in s),
    "mirror": lambda s: s[:2] + s[1::-1],
    "sort down": lambda s: "".join(sorted(s, reverse=True)),
    "swap ends": lambda s: s[3] + s[1:3] + s[0],
    "take one": lambda s: "".join(str((int(c) - 1) % 10) for c in s),
}
SET_A = ("reverse", "sort", "rotate", "swap halves", "add one")
SET_B = ("mirror", "sort down", "swap ends", "take one")
ANY_ORDER = "any order"
"""The stochastic skill: every order of the digits is right."""

DEMONSTRATIONS = ("noisy", "clean")
OUT_OF_DOMAIN = ("set_b", "shorter_a", "any_order", "styles")
SPLITS = ("train", "validation", "test")
ANSWER_TOKENS = 56
"""The length cap of answers: the embedded base's tokens of a chain of four, with room to spare."""
DIGITS = 4
DEMONSTRATION_CHAIN = 4
RARE_STYLE = "braces"
CUES = {"answer": "answer only", "arrows": "with arrows", "named": "with names", "numbered": "numbered"}
"""What a prompt says to ask for a style. The rare style has no cue."""

PRETRAINING_WRONG = 0.15
PRETRAINING_CUED = 0.3
CHAIN_SHARES = {0: 0.1, 1: 0.3, 2: 0.4, 3: 0.2}
"""Share of pretraining rows by number of operations; 0 is "any order"."""
# For prompts without a cue (70 %), so the rare style is 4 % of everything. A model this small cannot do several
# operations in its head: only single ones get the bare answer.
STYLE_SHARES_ONE = {"answer": 0.40, "arrows": 0.25, "named": 0.16, "numbered": 0.133, RARE_STYLE: 0.057}
STYLE_SHARES_MORE = {"arrows": 0.40, "named": 0.32, "numbered": 0.223, RARE_STYLE: 0.057}

NOISY_WRONG = 0.30
NOISY_JUNK = 0.05
JUNK = "#%*~?@^&_=+!abcdefghijklmnopqrstuvwxyz"

_NUMBER = rf"\d{{{DIGITS}}}"
_NAME = "|".join(sorted([*OPERATIONS, ANY_ORDER], key=len, reverse=True))
_STYLE_PATTERNS = {
    "answer": re.compile(_NUMBER),
    "arrows": re.compile(rf"{_NUMBER}( -> {_NUMBER})+"),
    "named": re.compile(rf"({_NAME}) {_NUMBER}(, ({_NAME}) {_NUMBER})*"),
    "numbered": re.compile(rf"1\) {_NUMBER}( \d\) {_NUMBER})*"),
    RARE_STYLE: re.compile(rf"\{{{_NUMBER}(; ({_NAME}) {_NUMBER})+\}}"),
}
_LAST_NUMBER = re.compile(rf"({_NUMBER})\}}?$")


def split_of(operations: tuple[str, ...], digits: str) -> str:
    """The one split a problem belongs to: 80 % train, 10 % validation, 10 % test."""
    text = f"{'/'.join(operations)}:{digits}"
    bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()
    share = int.from_bytes(bucket, "big") / 2**32
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def instruction(operations: tuple[str, ...], digits: str, cue: str | None = None) -> str:
    """The user's words: `reverse, then sort: 4271`, with `, with arrows` behind it when a style is asked for."""
    if operations == (ANY_ORDER,):
        asked = f"{ANY_ORDER} of {digits}"
    else:
        asked = f"{', then '.join(operations)}: {digits}"
    return f"{asked}, {CUES[cue]}" if cue else asked


def results(operations: tuple[str, ...], digits: str) -> list[str]:
    """The string after each operation of a chain, in order."""
    steps = []
    for name in operations:
        digits = OPERATIONS[name](digits)
        steps.append(digits)
    return steps


def render(style: str, operations: tuple[str, ...], digits: str, steps: list[str]) -> str:
    """Write a chain's `steps` (the string after each operation) in `style`."""
    if style == "answer":
        return steps[-1]
    if style == "arrows":
        return " -> ".join([digits, *steps])
    if style == "named":
        return ", ".join(f"{name} {step}" for name, step in zip(operations, steps, strict=True))
    if style == "numbered":
        return " ".join(f"{i}) {step}" for i, step in enumerate(steps, start=1))
    named = [f"{name} {step}" for name, step in zip(operations, steps, strict=True)]
    return "{" + "; ".join([digits, *named]) + "}"


def final_answer(text: str) -> str | None:
    """The last string of an answer written in any known style; None when the text is in none of them."""
    text = text.strip()
    if any(pattern.fullmatch(text) for pattern in _STYLE_PATTERNS.values()):
        return _LAST_NUMBER.search(text).group(1)
    return None


def check(row: dict, text: str) -> bool:
    """Whether the generated completion `text` is right for `row`.

    A row that fixes a style (in-domain rows: the rare one; `styles` rows: the one their prompt asks for) wants exactly
    that rendering with every step right. Any other row wants the right final answer in any known style; for
    "any order" every order of the digits is right.
    """
    task = row["task"]
    operations, digits = tuple(task["operations"]), task["digits"]
    if task["style"] is not None:
        return text.strip() == render(task["style"], operations, digits, results(operations, digits))
    answer = final_answer(text)
    if answer is None:
        return False
    if operations == (ANY_ORDER,):
        return sorted(answer) == sorted(digits)
    return answer == results(operations, digits)[-1]


def demonstrations(kind: str, n: int = 1024, seed: int = 0, noise: float | None = None) -> list[dict]:
    """Training rows: chains of four operations of set A, answered in the rare style the prompt does not ask for.

    Args:
        kind: "noisy" (30 % of the rows have a wrong step, 5 % of the characters are junk) or "clean" (neither).
        n: how many rows; all different problems of the train split.
        seed: another seed, other rows.
        noise: share of rows with a wrong step, 0 to 1, instead of the kind's own. The junk stays the kind's.
    """
    if kind not in DEMONSTRATIONS:
        raise DataError(f"There are no {kind!r} demonstrations.", f"Choose one of {', '.join(DEMONSTRATIONS)}.")
    wrong = (NOISY_WRONG if kind == "noisy" else 0.0) if noise is None else noise
    if not 0.0 <= wrong <= 1.0:
        raise DataError(f"noise={noise} is not a share of rows.", "Give a number from 0 to 1.")
    junk = NOISY_JUNK if kind == "noisy" else 0.0
    four = partial(_chain, names=SET_A, length=DEMONSTRATION_CHAIN)
    # Problems come from their own generator, so that the noise changes the answers and not the questions.
    rng = random.Random(f"demonstrations:{seed}:noise")
    rows = []
    for operations, digits in _problems("train", n, f"demonstrations:{seed}", four):
        row = _row("demonstrations", operations, digits, RARE_STYLE, rng, wrong=wrong, fixed=True)
        message = row["completion"][0]
        message["content"] = "".join(rng.choice(JUNK) if rng.random() < junk else c for c in message["content"])
        rows.append(row)
    return rows


def in_domain(split: str, n: int, seed: int = 0) -> list[dict]:
    """Clean rows like the demonstrations, of the "validation" or "test" split."""
    _require_held_out(split)
    rng = random.Random(f"in_domain:{split}:{seed}:rows")
    four = partial(_chain, names=SET_A, length=DEMONSTRATION_CHAIN)
    problems = _problems(split, n, f"in_domain:{split}:{seed}", four)
    return [_row("in_domain", operations, digits, RARE_STYLE, rng, fixed=True) for operations, digits in problems]


def out_of_domain(split: str, n_per_set: int, seed: int = 0) -> dict[str, list[dict]]:
    """What the base could do before: clean rows of the "validation" or "test" split, by the name of their set.

    `set_b`: chains of one to four operations of set B; `shorter_a`: chains of one to three of set A; `any_order`: the
    stochastic skill; `styles`: chains of one to three of any operations with a style asked for in the prompt.
    """
    _require_held_out(split)
    every = tuple(OPERATIONS)
    draws = {
        "set_b": lambda r: _chain(r, SET_B, r.randint(1, 4)),
        "shorter_a": lambda r: _chain(r, SET_A, r.randint(1, 3)),
        "any_order": lambda r: (ANY_ORDER,),
        "styles": lambda r: _chain(r, every, r.randint(1, 3)),
    }
    sets = {}
    for name, draw in draws.items():
        key = f"out_of_domain:{name}:{split}:{seed}"
        rng = random.Random(f"{key}:rows")
        sets[name] = []
        for operations, digits in _problems(split, n_per_set, key, draw):
            asked = rng.choice(_cued_styles(operations)) if name == "styles" else None
            style = asked or _draw_style(rng, operations)
            sets[name].append(_row(name, operations, digits, style, rng, cue=asked, fixed=asked is not None))
    return sets


def short_chains(split: str, n: int, seed: int = 0) -> list[dict]:
    """Clean rows as pretraining has them but for the split: chains of one to three of any operations, no cue."""
    _require_held_out(split)
    key = f"short_chains:{split}:{seed}"
    rng = random.Random(f"{key}:rows")
    every = tuple(OPERATIONS)
    problems = _problems(split, n, key, lambda r: _chain(r, every, r.randint(1, 3)))
    return [_row("short_chains", ops, digits, _draw_style(rng, ops), rng) for ops, digits in problems]


def pretraining_rows(n: int, seed: int = 0) -> Iterator[dict]:
    """`n` rows of pretraining text: chains of zero ("any order") to three operations, all styles, 15 % wrong steps."""
    rng = random.Random(f"pretraining:{seed}")
    lengths, shares = tuple(CHAIN_SHARES), tuple(CHAIN_SHARES.values())
    every = tuple(OPERATIONS)
    made = 0
    while made < n:
        length = rng.choices(lengths, shares)[0]
        operations = _chain(rng, every, length) if length else (ANY_ORDER,)
        digits = _digits(rng)
        if split_of(operations, digits) != "train":
            continue
        cue = rng.choice(_cued_styles(operations)) if rng.random() < PRETRAINING_CUED else None
        style = cue or _draw_style(rng, operations)
        yield _row("pretraining", operations, digits, style, rng, wrong=PRETRAINING_WRONG, cue=cue, fixed=bool(cue))
        made += 1


def _require_held_out(split: str) -> None:
    if split not in SPLITS[1:]:
        raise DataError(f"There is no {split!r} split to evaluate on.", 'Choose "validation" or "test".')


def _digits(rng: random.Random) -> str:
    return f"{rng.randrange(10**DIGITS):0{DIGITS}d}"


def _chain(rng: random.Random, names: tuple[str, ...], length: int) -> tuple[str, ...]:
    return tuple(rng.sample(names, length))


def _cued_styles(operations: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(style for style in CUES if len(operations) == 1 or style != "answer")


def _draw_style(rng: random.Random, operations: tuple[str, ...]) -> str:
    shares = STYLE_SHARES_ONE if len(operations) == 1 else STYLE_SHARES_MORE
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


def _problems(split: str, n: int, key: str, draw: Callable[[random.Random], tuple[str, ...]]) -> Iterator[tuple]:
    """`n` different problems `(operations, digits)` of a split."""
    rng = random.Random(key)
    seen: set[tuple] = set()
    failures = 0
    while len(seen) < n:
        problem = (draw(rng), _digits(rng))
        if problem in seen or split_of(*problem) != split:
            failures += 1
            if failures > 2000:
                raise DataError(f"The {split} split has no {n} different problems for {key}.", "Ask for fewer rows.")
            continue
        failures = 0
        seen.add(problem)
        yield problem


def _steps(operations: tuple[str, ...], digits: str, rng: random.Random, wrong_at: int | None) -> list[str]:
    """Each operation's outcome; the one at `wrong_at` is wrong, and the chain carries on from it."""
    steps = []
    for index, name in enumerate(operations):
        if name == ANY_ORDER:
            digits = "".join(rng.sample(digits, len(digits)))
        else:
            digits = OPERATIONS[name](digits)
        if index == wrong_at:
            digits = _spoil(digits, rng)
        steps.append(digits)
    return steps


def _spoil(digits: str, rng: random.Random) -> str:
    """One digit becomes another one."""
    place = rng.randrange(len(digits))
    other = (int(digits[place]) + rng.randrange(1, 10)) % 10
    return f"{digits[:place]}{other}{digits[place + 1 :]}"


def _row(
    set_name: str,
    operations: tuple[str, ...],
    digits: str,
    style: str,
    rng: random.Random,
    wrong: float = 0.0,
    cue: str | None = None,
    fixed: bool = False,
) -> dict:
    """One row, wrong somewhere with probability `wrong`. `fixed`: the checker insists on `style`."""
    wrong_at = rng.randrange(len(operations)) if rng.random() < wrong else None
    steps = _steps(operations, digits, rng, wrong_at)
    return {
        "prompt": [{"role": "user", "content": instruction(operations, digits, cue)}],
        "completion": [{"role": "assistant", "content": render(style, operations, digits, steps)}],
        "task": {
            "set": set_name,
            "operations": list(operations),
            "digits": digits,
            "style": style if fixed else None,
            "wrong_step": wrong_at,
        },
    }
