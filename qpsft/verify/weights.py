"""Every weight of an export against the live model's, one at a time.

Two questions are asked of each. Is it as close to the trained weight as rounding puts it? And where it was adapted:
is the adapter's update in it? The second is answered by projection. With W0 the base's weight, D = W − W0 the trained
update and X the export's weight,

    arrived = ⟨X − W0, D⟩ / ⟨D, D⟩

is 1 when the whole update is there, 0 when it was lost, 2 when it was added twice. Rounding errors are nearly
independent of D and average out over millions of weights. So an update far smaller than the dtype's rounding step,
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
"""Standard errors by which `arrived` may miss its expected value, beside `ARRIVED_NOISE`."""

ARRIVED_NOISE = 0.01

MOSTLY_UPDATE = 0.1
"""Where the export's difference from the base, without its part along the update, is larger than this share of the
update, it is another weight and not the update at another scale; then `arrived` says nothing."""


@dataclass(frozen=True)
class WeightError:
    """One weight of the export.

    Attributes:
        name: in the export.
        error: ‖X − W‖ / ‖W‖.
        rounding: the same for W rounded once.
        arrived: share of the update that the export holds; None where there is no update.
        expected: the same for W rounded once: 1, or less where rounding erases the update.
        standard_error: of `arrived` under rounding.
        update: ‖D‖ / ‖W‖; 0 where there is no update.
        other: ‖X − W0 − arrived · D‖ / ‖W‖, the part of the export's difference that is not along the update.
    """

    name: str
    error: float
    rounding: float
    arrived: float | None = None
    expected: float | None = None
    standard_error: float = 0.0
    update: float = 0.0
    other: float = 0.0

    @property
    def wrong(self) -> str | None:
        """What is wrong with it, as the subject and verb of a sentence; None when it is right."""
        if self._misses_the_update():
            if self.other <= SLACK * self.rounding + NOISE + MOSTLY_UPDATE * self.update:
                return f"{self.name} holds {self.arrived:.3g} times the adapter's update instead of {self.expected:.3g}"
            return f"{self.name} is another weight, {self.error / self.update:.3g} times the adapter's update away"
        if not self.error <= SLACK * self.rounding + NOISE:
            return f"{self.name} is off by {self.error:.2e} of its size where rounding explains {self.rounding:.2e}"
        return None

    def _misses_the_update(self) -> bool:
        if self.arrived is None:
            return False
        return abs(self.arrived - self.expected) > SIGMAS * self.standard_error + ARRIVED_NOISE


@dataclass
class WeightsComparison:
    """All weights: how many were compared, which are wrong, and how much of the update the export's dtype keeps.

    Attributes:
        absent: names of weights of the model that the export lacks.
        misshapen: sentences about those with another shape.
        left_over: names of tensors in the export that are no weight of the model.
        kept: mean share of the update that rounding to the export's dtype keeps; None without any update.
        least_kept, least_kept_name: the smallest such share, and the weight that has it.
    """

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
        """The same, ready for JSON."""
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
        error = _compare(name, weight, exported)
        result.compared += 1
        result.largest_error = max(result.largest_error, error.error)
        if error.wrong:
            result.wrong.append(error)
        if error.expected is not None:
            shares.append(error.expected)
            if error.expected < result.least_kept:
                result.least_kept, result.least_kept_name = error.expected, name
    result.kept = sum(shares) / len(shares) if shares else None
    return result


def _compare(name: str, weight: TrainedWeight, exported: ExportedParameters) -> WeightError:
    values = exported.tensor(name).to(weight.trained.device)
    rounded = weight.trained.to(exported.dtype_of(name)).float()
    size = float(weight.trained.norm()) or 1.0
    error, rounding = (float((x - weight.trained).norm()) for x in (values, rounded))
    unchanged = WeightError(name, error / size, rounding / size)
    if weight.trained is weight.base:
        return unchanged
    update = weight.trained - weight.base
    length = float(update.norm())
    if length <= NOISE * size:
        return unchanged
    arrived, expected = (float(((x - weight.base) * update).sum()) / length**2 for x in (values, rounded))
    return WeightError(
        name,
        error / size,
        rounding / size,
        arrived,
        expected,
        standard_error=max(rounding, NOISE * size) / values.numel() ** 0.5 / length,
        update=length / size,
        other=float((values - weight.base - arrived * update).norm()) / size,
    )
