"""The verdict on an export: how far it is from the live model, how far it may be, and why it is another model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpsft.errors import NotTheSameModelError
from qpsft.terminal import wrap
from qpsft.verify.measure import Distance

SLACK = 2.0
"""Another order of the same roundings (twice rounded, truncated) may double the error; KL grows with its square."""

NOISE_LOGPROB = 1e-3
NOISE_MEAN = 1e-4
NOISE_KL = 1e-8
"""Nats. What float32 arithmetic in another order does; measured on the demo base and on stories260K: 3e-5, 3e-6 and
1e-11. Thirty times that, because errors grow with depth and with the log-probabilities' size."""

NAMES = {"max_abs": "max |Δ log-prob|", "mean_abs": "mean |Δ log-prob|", "kl": "KL(live ‖ export)"}
"""What people read for the attributes of `Distance` that have a bound."""


@dataclass(frozen=True)
class Bounds:
    """How far an export may be from the live model, in nats; attributes as in `Distance`."""

    max_abs: float
    mean_abs: float
    kl: float

    @classmethod
    def from_rounding(cls, rounding: Distance) -> Bounds:
        """`SLACK` times what rounding alone does, plus the noise of float32 arithmetic.

        Args:
            rounding: from the live model to its own weights, rounded once to the export's dtype.
        """
        return cls(
            max_abs=SLACK * rounding.max_abs + NOISE_LOGPROB,
            mean_abs=SLACK * rounding.mean_abs + NOISE_MEAN,
            kl=SLACK**2 * rounding.kl + NOISE_KL,
        )

    def exceeded_by(self, measured: Distance) -> list[str]:
        """What is out of bounds, a sentence each; empty when nothing is."""
        over = []
        for key, name in NAMES.items():
            value, bound = getattr(measured, key), getattr(self, key)
            if value > bound:
                over.append(f"{name} {value:.3g} nats, over {bound:.3g}")
        if measured.flips:
            over.append(f"{measured.flips} likeliest tokens differ that were no near ties")
        return over


@dataclass
class VerifyReport:
    """The verdict on an export.

    Attributes:
        base: which base the live model was loaded on, in words.
        dtype: the export's dtype, such as "bfloat16".
        numbers: everything measured, ready for JSON; log-probabilities and KL in nats.
        reasons: why it is another model; empty when it is the same.
        failing_layer: the first weight that is not the trained one, if the fault is in the weights.
        notes: what the user should know though it is the same model.
    """

    adapter: Path
    exported: Path
    dtype: str
    prompts: str
    base: str
    numbers: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    failing_layer: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def same_model(self) -> bool:
        """The verdict: there is no reason against it."""
        return not self.reasons

    def require_same(self) -> None:
        """Raises NotTheSameModelError with the reasons when it is another model."""
        if self.reasons:
            raise NotTheSameModelError(
                f"{self.exported} is not the model that was trained in {self.adapter}: {'; '.join(self.reasons)}.",
                "Merge again with qpsft merge. If the result is the same, please report it.",
            )

    def summary(self, *, on_purpose: bool = False, with_base: bool = True) -> str:
        """A few lines for a terminal.

        Args:
            on_purpose: it was merged onto the original weights, so it is expected to be another model.
            with_base: name the base, which may be a folder of this machine.
        """
        verdict, mark = "the same model" if self.same_model else "NOT the same model", "✗"
        if on_purpose and not self.same_model:
            verdict, mark = "as expected: merged onto the original weights, which is never the trained model", "-"
        lines = [wrap(f"verify: {verdict} ({self.dtype}, {self.numbers['prompts']} prompts: {self.prompts})")]
        lines += self._table() if "distance" in self.numbers else []
        lines += [f"  {self.numbers['weights']['compared']} weights compared"]
        lines += [wrap(f"  base: {self.base}", "    ")] if with_base else []
        lines += [wrap(f"  {mark} {reason}", "    ") for reason in self.reasons]
        lines += [wrap(f"  note: {note}", "    ") for note in self.notes]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """The distances of the export and of rounding alone, and the bounds."""
        measured, rounding, bound = (self.numbers[key] for key in ("distance", "rounding_only", "bounds"))
        lines = [f"  {'':20}{'export':>11}{'rounding':>11}{'bound':>11}"]
        for key, name in NAMES.items():
            lines.append(f"  {name:20}{measured[key]:11.2g}{rounding[key]:11.2g}{bound[key]:11.2g}")
        for key, name in {"top1": "top-1 agreement", "greedy": "greedy continuation"}.items():
            lines.append(f"  {name:20}{measured[key]:11.2%}{rounding[key]:11.2%}")
        return lines
