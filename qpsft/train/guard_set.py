"""The rows of an old skill, and how well a model does on them: by the code of `qpsft evaluate`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from qpsft.data.shapes import Rows
from qpsft.errors import DataError, QpsftError, TrainingError
from qpsft.evaluate.evaluation import evaluate
from qpsft.evaluate.likelihood import row_sums
from qpsft.evaluate.rows import encode, load_evaluation_rows
from qpsft.evaluate.verifiers import NAMES, find_verifier
from qpsft.psft.checkpoint import rows_sha256
from qpsft.recipe.arguments import DataArguments, GuardArguments

WITHOUT_ACCURACY = "Set the guard's metric to nll or kl, which need no answers to check."
ROUNDING = 1e-9
"""A drop of exactly `max_drop` is inside the limit: .92 - .87 is above .05 by rounding."""


@dataclass(frozen=True)
class GuardSet:
    """Rows with references, and what is measured on them.

    Attributes:
        options: the guard's.
        rows: prompts with references, or plain texts.
        arguments: how prompts are written, as in training.
    """

    options: GuardArguments
    rows: Rows
    arguments: DataArguments

    def score(self, model: Any, tokenizer: Any) -> float:
        """The metric of a model: accuracy as a share, nll and kl as means over all supervised tokens, in nats.

        Args:
            model: a causal LM with its adapter on; for nll and accuracy also the base by itself, or with it off.
        """
        if self.options.metric == "accuracy":
            settings = {"verifier": self.options.verifier, "max_new_tokens": self.options.max_new_tokens}
            result = evaluate(model, tokenizer, self.rows, arguments=self.arguments, k=0, drift=False, **settings)
            return result["accuracy"]
        of_base = self.options.metric == "kl"
        sums = row_sums(model, encode(self.rows, model, tokenizer, self.arguments).texts, against_base=of_base)
        return float(sums["base_kl" if of_base else "nll"].sum() / sums["num_items"].sum())

    def drop(self, base: float, score: float) -> float:
        """How much of the base's skill is lost, in the metric's unit; negative where there is more of it."""
        return base - score if self.options.metric == "accuracy" else score - base

    def limit(self, base: float) -> float:
        """The worst score inside the limit."""
        return base - self.options.max_drop if self.options.metric == "accuracy" else base + self.options.max_drop

    def is_outside(self, base: float, score: float) -> bool:
        """Whether too much is lost; a score that is not a number is."""
        return not self.drop(base, score) <= self.options.max_drop + ROUNDING

    def check_base(self, base: float) -> None:
        """Refuses rows that guard nothing, and warns of too few for an accuracy.

        Raises:
            DataError: the base's accuracy could fall to 0 inside the limit, or its likelihood is no number.
        """
        data, options, count = self.options.data, self.options, len(self.rows.rows)
        if not math.isfinite(base):
            raise DataError(f"guard: the base's {options.metric} on {data} is {base}.", "Look at these rows.")
        if options.metric != "accuracy":
            return
        if base <= options.max_drop + ROUNDING:
            raise DataError(
                f"guard: the base answers {base:.1%} of {data} right, so there is no skill to guard "
                f"(max_drop is {options.max_drop:g}).",
                f"Use rows that the base can do, or another verifier ({', '.join(NAMES)}). {WITHOUT_ACCURACY}",
            )
        if count * options.max_drop < 1 - ROUNDING:
            warnings.warn(
                f"guard: {data} has {count} rows, so a single answer is an accuracy of {1 / count:.2g}, more than "
                f"max_drop, {options.max_drop:g}. Use at least {math.ceil(1 / options.max_drop - ROUNDING)} rows.",
                stacklevel=2,
            )

    def identity(self) -> dict[str, Any]:
        """What must be the same for two scores to be compared."""
        options = self.options
        settings = {name: getattr(options, name) for name in ("metric", "verifier", "max_new_tokens")}
        rows = [{"input_ids": row} for row in self.rows.rows]
        return settings | {"rows": len(rows), "rows_sha256": rows_sha256(rows, sample=len(rows))}


def load_guard_set(options: GuardArguments, trained: DataArguments) -> GuardSet:
    """Reads and checks the rows of a guard.

    Args:
        trained: of the run: how prompts are written, and the Hub options where the guard's data is the run's data set.

    Raises:
        DataError: as `load_evaluation_rows`; plain text, or references that no verifier reads, for an accuracy.
    """
    same = options.data == trained.dataset_name
    arguments = DataArguments(
        use_chat_template=trained.use_chat_template,
        prompt_format=trained.prompt_format,
        chat_date=trained.chat_date,
        dataset_columns=options.columns,
        dataset_limit=options.limit,
        dataset_config=trained.dataset_config if same else None,
        dataset_revision=trained.dataset_revision if same else None,
    )
    try:
        rows = load_evaluation_rows(options.data, arguments, trained.dataset_test_split)
        if options.metric == "accuracy":
            _check_answers(options, rows)
    except QpsftError as error:
        raise type(error)(f"guard: {error.what}", error.todo) from None
    return GuardSet(options, rows, arguments)


def _check_answers(options: GuardArguments, rows: Rows) -> None:
    if "text" in rows.rows[0]:
        raise DataError(f"{options.data} is plain text: it has no answers, so no accuracy.", WITHOUT_ACCURACY)
    try:
        find_verifier(options.verifier, rows.rows, rows.name, rows.places)
    except DataError as error:
        todo = f"Set the guard's verifier to one of {', '.join(NAMES)}. {WITHOUT_ACCURACY}"
        raise DataError(error.what, todo) from None


def check_resumed(saved: dict[str, Any], here: dict[str, Any], where: str) -> None:
    """Raises TrainingError when a run is resumed with a guard whose scores cannot be compared with those before."""
    for name, value in saved.items():
        if here.get(name) != value:
            raise TrainingError(
                f"{where} was made with a guard whose {name} is {value}, this run's is {here.get(name)}.",
                "Resume with the guard that the run began with; max_drop and every may change, the action "
                "only to warn, or from lower_lr to stop.",
            )
