"""The numbers of a cell of the step-cost grid out of its steps, and the goals they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from turns import Step

NLL_OVER_TRL = 1.03
PSFT_OVER_NLL = 1.15
VISITS_OVER_NLL = 1.05
PEAK_OVER_NLL = 1.01
SMALL_MICRO_BATCH = 2


@dataclass(frozen=True)
class Arm:
    """One way to train: which trainer, and for PSFT its K and V.

    Attributes:
        trainer: `trl` (trl.SFTTrainer), `nll` or `psft` (qpsft's).
    """

    trainer: str
    reference_steps: int = 8
    num_iterations: int = 1

    @property
    def is_psft(self) -> bool:
        return self.trainer == "psft"

    def bound(self) -> float:
        """1 + (K - 1)/K/3 + 3 %: a step is three forwards, the reference pass adds (K - 1)/K of one."""
        return 1 + (self.reference_steps - 1) / self.reference_steps / 3 + 0.03

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ARMS = {
    "trl": Arm("trl"),
    "nll": Arm("nll"),
    "psft K=2": Arm("psft", 2),
    "psft K=4": Arm("psft", 4),
    "psft K=8": Arm("psft", 8),
    "psft K=16": Arm("psft", 16),
    "psft K=8 V=4": Arm("psft", 8, 4),
}


def step_seconds(arm: Arm, steps: Sequence[Step]) -> float:
    """Seconds of an average step over whole blocks, from the median of each kind of step.

    A block has one snapshot step, K - 1 that are scored and K (V - 1) whose log-probabilities are known, so the number
    is that of whole blocks, however many steps were measured. A kind that did not occur among them (a snapshot comes
    once in K V steps) counts as a scored step less its reference pass.

    Args:
        steps: the arm's own, warm-up left out.

    Raises:
        ValueError: no scored step was measured.
    """
    if not arm.is_psft:
        return statistics.median(step.seconds for step in steps)
    k, v = arm.reference_steps, arm.num_iterations
    scored = [step for step in steps if step.kind == "scored"]
    if not scored and k > 1:
        raise ValueError("no scored step was measured")
    unscored = statistics.median(step.seconds - step.scoring for step in scored or steps)
    total = 0.0
    for kind, number in (("snapshot", 1), ("scored", k - 1), ("kept", k * (v - 1))):
        found = [step.seconds for step in steps if step.kind == kind]
        total += number * (statistics.median(found) if found else unscored)
    return total / (k * v)


def scoring_share(arm: Arm, steps: Sequence[Step]) -> float:
    """The reference pass's share of the time over whole blocks; 0 where there is none."""
    scored = [step.scoring for step in steps if step.kind == "scored"]
    if not arm.is_psft or not scored:
        return 0.0
    k, v = arm.reference_steps, arm.num_iterations
    return statistics.median(scored) * (k - 1) / (k * v) / step_seconds(arm, steps)


@dataclass(frozen=True)
class Goal:
    """A goal of issue 5, its measured value and its limit (ratios). `passed` is None where it was not measured."""

    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit

    def line(self) -> str:
        verdict = {True: "PASS", False: "FAIL", None: "not measured"}[self.passed]
        value = "" if self.value is None else f"{self.value:7.3f} <= {self.limit:.3f}"
        return f"  {self.name:<44}{value:<20}{verdict}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def goals(
    seconds: Mapping[str, float], peaks: Mapping[str, int], *, micro_batch: int, checkpointing: bool
) -> list[Goal]:
    """The goals of one cell.

    Args:
        seconds: by arm, of an average step; arms that were not run are missing.
        peaks: by arm, peak bytes of training alone.
        micro_batch, checkpointing: decide which bound K = 8 has.
    """

    def ratio(numbers: Mapping[str, float], mine: str, base: str) -> float | None:
        return numbers[mine] / numbers[base] if mine in numbers and base in numbers else None

    found = [Goal("qpsft nll / trl.SFTTrainer, time", ratio(seconds, "nll", "trl"), NLL_OVER_TRL)]
    for name, arm in ARMS.items():
        if not arm.is_psft:
            continue
        if arm.num_iterations > 1:
            limit = VISITS_OVER_NLL
        elif arm.reference_steps == 8 and checkpointing and micro_batch <= SMALL_MICRO_BATCH:
            limit = PSFT_OVER_NLL
        else:
            limit = arm.bound()
        found.append(Goal(f"{name} / nll, time", ratio(seconds, name, "nll"), limit))
    return [*found, Goal("psft K=8 / nll, peak memory", ratio(peaks, "psft K=8", "nll"), PEAK_OVER_NLL)]
