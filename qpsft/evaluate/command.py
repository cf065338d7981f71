"""`qpsft evaluate`: its flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qpsft.errors import RecipeError
from qpsft.evaluate.options import EvaluationOptions
from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries, wrap

if TYPE_CHECKING:
    from qpsft.evaluate.keep import Kept

DESCRIPTION = (
    "Measure an adapter on its 4-bit base, or a model: likelihood of references, accuracy and pass@k of completions, "
    "entropy, and drift from the base; and public benchmarks by lm-evaluation-harness. Prints a table with 95 % "
    "intervals; docs/metrics.md defines every number. With --keep, the gate before publishing, the base and the tuned "
    "model answer the same questions; a skill is LOST if its score fell by more than --max_drop, KEPT if the whole "
    "95 % interval of the difference is inside that, else UNSURE (too few rows). Exit code 1: something is LOST."
)


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        """A missing model mostly stands behind a flag that takes all words up to the next one."""
        if "required: MODEL" in message:
            raise RecipeError(
                f"{self.prog}: {message}.",
                f"Put the model first: {self.prog} MODEL --keep. Words behind --keep, --data or --tasks are theirs.",
            )
        super().error(message)


def evaluate(argv: Sequence[str]) -> int:
    """`qpsft evaluate`. Returns 1 if --keep finds a skill lost, else 0."""
    options = parse(_Parser("qpsft evaluate", "MODEL [options]", DESCRIPTION), argv, EvaluationOptions)
    quiet_libraries()
    from qpsft.evaluate.run import run_evaluation
    from qpsft.model.stated_record import state_record

    state_record(options.model, options)
    report = run_evaluation(options)
    print(f"\n{report.table()}")
    if options.json is not None:
        print(f"\nwritten: {options.json}")
    if report.kept is None:
        return 0
    print(_update_card(options.model, report.kept))
    return int(report.kept.is_lost)


def _update_card(model: str, kept: Kept) -> str:
    """Puts what was kept into the model card. Returns a line about it; a card that cannot be written is no error."""
    from qpsft.evaluate.kept_card import update_card
    from qpsft.model.folder import CARD

    folder = Path(model).expanduser()
    try:
        card = update_card(folder, kept)
    except (OSError, UnicodeDecodeError) as error:
        return wrap(f"note: {folder / CARD} could not be updated: {getattr(error, 'strerror', None) or error}.")
    return f"\nwritten: {card} (What it kept)" if card else f"\nnote: there is no {folder / CARD} to write this into."
