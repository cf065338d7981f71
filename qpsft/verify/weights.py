"""Every weight of an export against the live model's, one at a time.

Two questions per weight. Is it where rounding the trained weight puts it? And if it was adapted: did the update
arrive? The second is asked by projection: with W0 the base's weight, D = W − W0 the trained update and X the export,

    arrived = ⟨X − W0, D⟩ / ⟨D, D⟩

is 1 when the whole update is there, 0 when it was lost, 2 when it was added twice. Rounding errors are nearly
independent of D and average out over millions of weights, so an update far smaller than the dtype's rounding step,
which no log-probability would show, is still seen to be there or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qpsft.verify.live import TrainedWeight, trained_weights
from qpsft.verify.parameters import ExportedParameters

if TYPE_CHECKING:
    from peft import PeftModel

SLACK = 2.0
"""An export rounded twice, or truncated, is up to twice as far from the trained weight as one rounded once."""

NOISE = 2e-6
"""Relative. The update is a float32 sum over the rank, which another order of summation changes by about 1e-7."""

SIGMAS = 6.0
ARRIVED_NOISE = 0.01

MOSTLY_UPDATE = 0.1
"""A weight that differs from the base by more than this share of the update in other directions holds something else
than the update at another scale, and how much of the update it holds means nothing."""


@dataclass(frozen=True)
class WeightError:
    """One weight of the export.

    Attributes:
        name: in the export.
        error: ‖X − W‖ / ‖W‖.
        rounding: the same for W rounded once.
        arrived: share of the update found in the export; None where there is no update.
        expected: the same for W rounded once: 1, or less where rounding erases the update.
        doubt: standard error of `arrived` under rounding.
        update: ‖D‖ / ‖W‖; 0 where there is no update.
        beside: ‖X − W0 − arrived · D‖ / ‖W‖, the part of the export's difference that is not the update, scaled.
    """

    name: str
    error: float
    rounding: float
    arrived: float | None = None
    expected: float | None = None
    doubt: float = 0.0
    update: float = 0.0
    beside: float = 0.0

    @property
    def wrong(self) -> str | None:
        """What is wrong with it, in words."""
        if self.arrived is not None and abs(self.arrived - self.expected) > SIGMAS * self.doubt + ARRIVED_NOISE:
            if self.beside <= SLACK * self.rounding + NOISE + MOSTLY_UPDATE * self.update:
                return f"{self.name} holds {self.arrived:.3g} times the adapter's update instead of {self.expected:.3g}"
            return f"{self.name} is another weight, {self.error / self.update:.3g} times the adapter's update away"
        if not self.error <= SLACK * self.rounding + NOISE:
            return f"{self.name} is off by {self.error:.2e} of its size where rounding explains {self.rounding:.2e}"
        return None


@dataclass
class WeightsComparison:
    """All weights: how many were compared, which are wrong, and how much of the update the export's dtype keeps."""

    compared: int = 0
    wrong: list[WeightError] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    kept: float | None = None
    least_kept: float = 1.0
    least_kept_name: str = ""
    largest_error: float = 0.0

    @property
    def first_wrong(self) -> str | None:
        """Name of the first weight that is misshapen, absent or wrong; None when all are right."""
        names = self.misshapen + self.absent + [item.name for item in self.wrong]
        return names[0] if names else None

    def reasons(self) -> list[str]:
        """Why the export is another model: a sentence for each kind of fault, with the first weight and how many."""
        reasons = []
        for names, what in (
            (self.absent, "is not in the export"),
            (self.left_over, "in the export is no weight of the model"),
            (self.misshapen, ""),
        ):
            if names:
                reasons.append(f"{names[0]} {what}".rstrip() + _more(len(names)))
        if self.wrong:
            reasons.append(self.wrong[0].wrong + _more(len(self.wrong)))
        return reasons

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "compared": self.compared,
            "wrong": [item.name for item in self.wrong],
            "largest_relative_error": self.largest_error,
            "update_kept": self.kept,
            "update_kept_least": None if self.kept is None else [self.least_kept_name, self.least_kept],
        }


def _more(count: int) -> str:
    return f" ({count} weights in all are so)" if count > 1 else ""


def compare_weights(model: PeftModel, exported: ExportedParameters) -> WeightsComparison:
    """Reads the export once, tensor by tensor.

    Args:
        model: the live model, not rounded yet.
        exported: the export.
    """
    result = WeightsComparison(left_over=sorted(exported.left_over))
    shares: list[float] = []
    for weight in trained_weights(model):
        name = weight.name
        if name not in exported:
            result.absent.append(name)
            continue
        if exported.shape_of(name) != list(weight.trained.shape):
            shapes = f"{exported.shape_of(name)} instead of {list(weight.trained.shape)}"
            result.misshapen.append(f"{name} has shape {shapes}")
            continue
        found = _compare(name, weight, exported)
        result.compared += 1
        result.largest_error = max(result.largest_error, found.error)
        if found.wrong:
            result.wrong.append(found)
        if found.expected is not None:
            shares.append(found.expected)
            if found.expected < result.least_kept:
                result.least_kept, result.least_kept_name = found.expected, name
    result.kept = sum(shares) / len(shares) if shares else None
    return result


def _compare(name: str, weight: TrainedWeight, exported: ExportedParameters) -> WeightError:
    found = exported.tensor(name).to(weight.trained.device)
    rounded = weight.trained.to(exported.dtype_of(name)).float()
    size = float(weight.trained.norm()) or 1.0
    error = float((found - weight.trained).norm())
    alone = float((rounded - weight.trained).norm())
    if weight.trained is weight.base:
        return WeightError(name, error / size, alone / size)
    update = weight.trained - weight.base
    length = float(update.norm())
    if length <= NOISE * size:
        return WeightError(name, error / size, alone / size)
    arrived, expected = (float(((x - weight.base) * update).sum()) / length**2 for x in (found, rounded))
    doubt = max(alone, NOISE * size) / found.numel() ** 0.5 / length
    beside = float((found - weight.base - arrived * update).norm())
    return WeightError(
        name, error / size, alone / size, arrived, expected, doubt, update=length / size, beside=beside / size
    )
