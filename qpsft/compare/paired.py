"""Statistics of paired runs: the same seeds on both sides, t intervals, and what is kept at equal in-domain score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
"""(in-domain score, out-of-domain score) of one checkpoint; higher is better for both."""

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """A mean with its 95 % t interval over seeds.

    Attributes:
        mean: of the values.
        half_width: of the interval; None with fewer than two values.
        n: how many values.
    """

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    def signed(self, sign: int) -> Difference:
        """The same with its sign kept (1) or turned (-1), between a score's own sign and "higher is better"."""
        return Difference(sign * self.mean, self.half_width, self.n)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; beyond 30 degrees of freedom to 0.001."""
    return T_975[degrees - 1] if degrees <= len(T_975) else 1.95996 + 2.372 / degrees + 2.82 / degrees**2


def interval(values: Sequence[float]) -> Difference:
    """mean ± t_{0.975, n-1} · sd / √n."""
    mean, sd = mean_and_sd(values)
    half = None if sd is None else t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return Difference(mean, half, len(values))


def paired_difference(treatment: Mapping[int, float], control: Mapping[int, float]) -> Difference | None:
    """Mean of treatment − control over the seeds that both have, with its interval; None if they share none."""
    seeds = sorted(treatment.keys() & control.keys())
    return interval([treatment[seed] - control[seed] for seed in seeds]) if seeds else None


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both scores, by ascending in-domain score."""
    best: list[Point] = []
    for point in sorted(set(points), key=lambda p: (-p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def kept_at(points: Sequence[Point], level: float) -> float | None:
    """The out-of-domain score on the frontier of `points` at an in-domain score of `level`.

    Between two points of the frontier it is interpolated linearly; below the lowest it is that point's (which reaches
    more than the level). None above the highest: the level is not reached.
    """
    line = frontier(points)
    if level > line[-1][0]:
        return None
    if level <= line[0][0]:
        return line[0][1]
    for (left_x, left_y), (right_x, right_y) in zip(line, line[1:], strict=False):
        if level <= right_x:
            return left_y + (right_y - left_y) * (level - left_x) / (right_x - left_x)
    return None


def matched(treatment: Sequence[Point], control: Sequence[Point]) -> tuple[float, float, float]:
    """Both sides at equal in-domain score: (level, treatment's out-of-domain score there, control's).

    The level is the highest that both reach: the lower of their two best in-domain scores.
    """
    level = min(max(x for x, _ in treatment), max(x for x, _ in control))
    return level, kept_at(treatment, level), kept_at(control, level)


def matched_difference(
    treatment: Mapping[int, Sequence[Point]], control: Mapping[int, Sequence[Point]]
) -> tuple[float, Difference] | None:
    """`matched` per seed: the mean level, and the difference out of domain with its interval over the seeds of both."""
    seeds = sorted(treatment.keys() & control.keys())
    if not seeds:
        return None
    pairs = [matched(treatment[seed], control[seed]) for seed in seeds]
    return mean_and_sd([level for level, _, _ in pairs])[0], interval([kept - lost for _, kept, lost in pairs])
