"""The outcome of a comparison: every run's numbers, differences of paired seeds, and the table a person reads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qpsft.compare.paired import Difference, Point, matched_difference, mean_and_sd, paired_difference

SHARE, NATS = "share", "nats"


@dataclass(frozen=True)
class Metric:
    """How a number is called and shown: `unit` is SHARE (0 to 1) or NATS per token."""

    title: str
    short: str
    unit: str


def is_accuracy(name: str, metric: str) -> bool:
    """Whether a score (`in_domain`, `validation`, `out_of_domain…`) is an accuracy; else an NLL, where less is better.

    Args:
        metric: what is compared: "accuracy", "nll", "mixed" (accuracy in-domain and NLL out of domain), or the other
            way round "nll_accuracy".
    """
    return metric in ("accuracy", "nll_accuracy" if name.startswith("out_of_domain") else "mixed")


def score_name(name: str, metric: str) -> str:
    """ "accuracy" or "NLL": what a score is; arguments as of `is_accuracy`."""
    return "accuracy" if is_accuracy(name, metric) else "NLL"


def describe_metric(name: str, metric: str = "accuracy") -> Metric:
    """Title and unit of a name in `metrics` of a result.

    Args:
        metric: what is compared; as in `is_accuracy`.
    """
    score = SHARE if is_accuracy(name, metric) else NATS
    kind = score_name(name, metric)
    known = {
        "validation": Metric(f"Validation {kind}", "validation", score),
        "in_domain": Metric(f"In-domain {kind}", "in-domain", score),
        "out_of_domain": Metric(f"Out-of-domain {kind}, mean of the sets", "out of domain", score),
        "sample_entropy": Metric("Entropy along its own samples", "entropy", NATS),
        "sample_kl": Metric("Drift: KL(policy || base) on its own samples", "KL to base", NATS),
        "in_domain_nll": Metric("NLL of the in-domain references", "NLL", NATS),
        "in_domain_entropy": Metric("Entropy along the in-domain references", "entropy, refs", NATS),
        "in_domain_kl": Metric("Drift on the in-domain references", "KL, in-domain", NATS),
        "out_of_domain_nll": Metric("NLL of the out-of-domain references", "NLL, o.o.d.", NATS),
        "out_of_domain_entropy": Metric("Entropy along the out-of-domain references", "entropy, o.o.d.", NATS),
        "out_of_domain_kl": Metric("Drift: KL(policy || base) on out-of-domain text", "KL, o.o.d.", NATS),
        "length_capped": Metric("Greedy completions cut off at the length cap", "cut off", SHARE),
        "parsed": Metric("Greedy completions that hold an answer", "parsed", SHARE),
    }
    if name in known:
        return known[name]
    if name.startswith("pass@"):
        return Metric(f"In-domain {name}", name.replace("pass@1,", "right,"), SHARE)
    if name.startswith("out_of_domain/"):
        return Metric(f"Out-of-domain set {name.partition('/')[2]}", name.partition("/")[2], score)
    return Metric(name, name, NATS)


@dataclass
class ArmResult:
    """One arm.

    Attributes:
        name, what: as in `Arm`.
        learning_rate: chosen on validation rows, or given.
        has_own_rate: False: it takes another arm's.
        runs: seed -> result of the run at `learning_rate`.
        grid: learning rate -> seed -> result; of tuned arms, else empty.
        unseen_share: share of the training rows that its runs never reach.
    """

    name: str
    what: str
    learning_rate: float
    has_own_rate: bool
    runs: dict[int, dict[str, Any]] = field(repr=False)
    grid: dict[float, dict[int, dict[str, Any]]] = field(default_factory=dict, repr=False)
    unseen_share: float = 0.0

    def last(self, name: str) -> dict[int, float]:
        """A metric at the last epoch, by seed; empty if it was not measured."""
        values = {seed: run["points"][-1]["metrics"].get(name) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}


@dataclass
class Comparison:
    """Arms compared on one data set.

    Attributes:
        metric: what in_domain, validation and out_of_domain are; as in `describe_metric`.
        base: metrics of the base before training.
        arms: by name, in the order compared.
        pairs: (treatment, control), in the order reported.
        overlap, counts, shortened: as in `ComparedData`.
        settings: options of the comparison, base, adapter, training and measurement, versions and machines.
        reused: how many runs had been done before. done: how many were done now.
        left_out: what a budget left out of what was asked for.
    """

    name: str
    metric: str
    base: dict[str, float]
    base_completions: dict[str, list]
    arms: dict[str, ArmResult]
    pairs: list[tuple[str, str]]
    overlap: dict[str, dict[str, int]]
    counts: dict[str, int]
    settings: dict[str, Any]
    reused: int = 0
    done: int = 0
    shortened: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def sign(self, name: str) -> int:
        """1 where a higher score is better, -1 for a negative log-likelihood: of in_domain or out_of_domain."""
        return 1 if is_accuracy(name, self.metric) else -1

    @property
    def has_out_of_domain(self) -> bool:
        return "out_of_domain" in self.base

    def difference(self, treatment: str, control: str, name: str) -> Difference | None:
        """Treatment − control of a metric at the last epoch, paired by seed."""
        return paired_difference(self.arms[treatment].last(name), self.arms[control].last(name))

    def points(self, runs: Mapping[int, dict[str, Any]]) -> dict[int, list[Point]]:
        """Scores after each epoch by seed, as (in-domain, out of domain), higher is better."""
        names = ("in_domain", "out_of_domain")
        return {
            seed: [tuple(self.sign(name) * point["metrics"][name] for name in names) for point in run["points"]]
            for seed, run in runs.items()
        }

    def matched(self, treatment: str, control: str) -> tuple[float, Difference] | None:
        """Out of domain at equal in-domain score, over the epochs of the chosen learning rates: (level, difference)."""
        if not self.has_out_of_domain:
            return None
        return matched_difference(self.points(self.arms[treatment].runs), self.points(self.arms[control].runs))

    def is_learned(self, level: float) -> bool:
        """Whether an in-domain level (`matched`'s) is better than the base; else nothing is compared there."""
        return level > self.sign("in_domain") * self.base["in_domain"]

    def matched_over_rates(self, treatment: str, control: str) -> tuple[float, Difference] | None:
        """The same over epochs and learning rates, for arms that were tuned, on the seeds of the whole grid."""
        grids = [self.arms[arm].grid for arm in (treatment, control)]
        if not self.has_out_of_domain or not all(grids):
            return None
        return matched_difference(*map(self._grid_points, grids))

    def _grid_points(self, grid: Mapping[float, Mapping[int, dict[str, Any]]]) -> dict[int, list[Point]]:
        seeds = set.intersection(*(set(runs) for runs in grid.values()))
        by_rate = [self.points({seed: runs[seed] for seed in seeds}) for runs in grid.values()]
        return {seed: [point for points in by_rate for point in points[seed]] for seed in seeds}

    def same_runs(self, first: str, second: str) -> bool:
        """Whether two arms are the same runs, as a matched control is at an equal learning rate."""
        labels = [sorted(run["label"] for run in self.arms[arm].runs.values()) for arm in (first, second)]
        return labels[0] == labels[1]

    def columns(self) -> list[str]:
        """The metrics of the table, those that were measured."""
        passes = sorted((name for name in self.base if name.startswith("pass@")), key=_pass_order)
        largest = max((int(name[5:].partition(",")[0]) for name in passes), default=0)
        shown = [name for name in passes if name.startswith(f"pass@{largest},") or name == "pass@1, T=1"]
        shown = shown if is_accuracy("in_domain", self.metric) else []
        known = set(self.base)
        for arm in self.arms.values():
            known |= {name for run in arm.runs.values() for name in run["points"][-1]["metrics"]}
        wanted = ["in_domain", "out_of_domain", *shown, "sample_entropy", "sample_kl"]
        if "sample_kl" not in known:
            wanted += ["out_of_domain_entropy"]
        if self.metric != "accuracy" and "out_of_domain_kl" in known:
            wanted += ["out_of_domain_kl"]
        return [name for name in wanted if name in known]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: per seed and epoch, and the differences."""
        return {
            "name": self.name,
            "metric": self.metric,
            "settings": self.settings,
            "rows": self.counts,
            "training_rows_shortened": self.shortened,
            "overlap_with_training": self.overlap,
            "base": self.base,
            "arms": {
                name: {
                    "what": arm.what,
                    "learning_rate": arm.learning_rate,
                    "has_own_rate": arm.has_own_rate,
                    "unseen_share": arm.unseen_share,
                    "last_epoch": {metric: _summary(arm.last(metric)) for metric in self.columns()},
                    "tuning": tuning_table(arm),
                    "runs": {seed: _part(run, "label", "points", "log", "seconds") for seed, run in arm.runs.items()},
                    "grid": {
                        f"{rate:g}": {seed: _part(run, "points", "diverged") for seed, run in runs.items()}
                        for rate, runs in arm.grid.items()
                        if rate != arm.learning_rate
                    },
                }
                for name, arm in self.arms.items()
            },
            "differences": [self._pair_record(*pair) for pair in self.pairs],
        }

    def _pair_record(self, treatment: str, control: str) -> dict[str, Any]:
        def record(difference: Difference | None) -> dict | None:
            if difference is None:
                return None
            return asdict(difference) | {"low": difference.low, "high": difference.high}

        def matched_record(matched: tuple[float, Difference] | None) -> dict | None:
            if matched is None:
                return None
            level, difference = matched
            in_its_own_sign = difference.signed(self.sign("out_of_domain"))  # a lower NLL is a minus
            return {"in_domain": self.sign("in_domain") * level, **record(in_its_own_sign)}

        return {
            "treatment": treatment,
            "control": control,
            "same_runs": self.same_runs(treatment, control),
            "last_epoch": {name: record(self.difference(treatment, control, name)) for name in self.columns()},
            "matched_in_domain": matched_record(self.matched(treatment, control)),
            "matched_in_domain_over_rates": matched_record(self.matched_over_rates(treatment, control)),
        }


def _pass_order(name: str) -> tuple[float, int]:
    k, _, temperature = name[5:].partition(", T=")
    return -float(temperature), int(k)


def _summary(values: Mapping[int, float]) -> dict[str, float | None] | None:
    if not values:
        return None
    mean, sd = mean_and_sd(list(values.values()))
    return {"mean": mean, "sd": sd, "n": len(values)}


def _part(run: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: run[name] for name in names if name in run}


def tuning_table(arm: ArmResult) -> dict[str, float | None]:
    """Learning rate -> mean validation score at the last epoch, over the seeds of the whole grid; None: it diverged."""
    if not arm.grid:
        return {}
    seeds = set.intersection(*(set(runs) for runs in arm.grid.values()))
    means = {rate: statistics.fmean(validation_score(runs[s]) for s in seeds) for rate, runs in arm.grid.items()}
    return {f"{rate:g}": None if math.isnan(mean) else mean for rate, mean in means.items()}


def validation_score(run: Mapping[str, Any]) -> float:
    """A run's score on the validation rows; NaN if it diverged."""
    return math.nan if "diverged" in run else run["points"][-1]["metrics"]["validation"]


def format_value(value: float, unit: str) -> str:
    """.894 for a share, 0.412 for nats."""
    text = f"{value:.3f}"
    return text.removeprefix("0") if unit == SHARE else text


def format_mean(values: Mapping[int, float], unit: str) -> str:
    """mean ± sd over seeds; a dash if there is none."""
    if not values:
        return "–"
    mean, sd = mean_and_sd(list(values.values()))
    shown = format_value(mean, unit)
    return shown if sd is None else f"{shown} ± {format_value(sd, unit)}"
