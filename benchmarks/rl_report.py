"""What `rl_start.py` found: tables, paired differences in words, JSON and a figure."""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpsft.compare.arms import ARMS, pairs
from qpsft.compare.paired import Difference, mean_and_sd, paired_difference
from qpsft.compare.results import NATS, SHARE, format_mean, format_value
from qpsft.terminal import text_table

LAST_STEPS = 5
SMOOTHED = 5
PNG_DPI = 140


@dataclass(frozen=True)
class Number:
    """One number of a run: how it is called, its unit, and how it is read from a result."""

    title: str
    unit: str
    of: Callable[[Mapping[str, Any]], float]


def _at(place: int, name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: run["points"][place][name]


def _reward(steps: slice) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: math.fsum(line["reward"] for line in run["log"][steps]) / len(run["log"][steps])


def numbers(k: int) -> dict[str, Number]:
    """What is reported of a run: `start_…` before the first step, `end_…` after the last."""
    found = {}
    for place, when in ((0, "start"), (-1, "end")):
        found |= {
            f"{when}_pass@1": Number("right, T=1", SHARE, _at(place, "pass@1")),
            f"{when}_pass@{k}": Number(f"pass@{k}", SHARE, _at(place, f"pass@{k}")),
            f"{when}_entropy": Number("entropy", NATS, _at(place, "entropy")),
            f"{when}_in_domain": Number("greedy", SHARE, _at(place, "in_domain")),
            f"{when}_out_of_domain": Number("out of domain", SHARE, _at(place, "out_of_domain")),
        }
    found["mean_reward"] = Number("mean reward", SHARE, _reward(slice(None)))
    found["last_reward"] = Number(f"last {LAST_STEPS} steps", SHARE, _reward(slice(-LAST_STEPS, None)))
    return found


def _trained_at(by_rate: Mapping[float, Mapping[int, Mapping[str, Any]]]) -> float:
    """The learning rate that an arm's adapters were trained at."""
    return next(run["arm_learning_rate"] for runs in by_rate.values() for run in runs.values())


@dataclass
class Outcome:
    """The runs that are there.

    Attributes:
        plan: the fields of `rl_start.Plan`.
        runs: arm -> learning rate of GRPO -> seed -> result.
    """

    plan: dict[str, int]
    runs: dict[str, dict[float, dict[int, dict[str, Any]]]] = field(default_factory=dict)

    def add(self, arm: str, seed: int, rate: float, result: dict[str, Any]) -> None:
        self.runs.setdefault(arm, {}).setdefault(rate, {})[seed] = result

    @property
    def rates(self) -> list[float]:
        return sorted({rate for by_rate in self.runs.values() for rate in by_rate})

    @property
    def numbers(self) -> dict[str, Number]:
        return numbers(self.plan["k"])

    def values(self, arm: str, rate: float, name: str) -> dict[int, float]:
        """A number by seed."""
        return {seed: self.numbers[name].of(run) for seed, run in self.runs[arm].get(rate, {}).items()}

    def difference(self, treatment: str, control: str, rate: float, name: str) -> Difference | None:
        """Treatment − control, paired by seed, with its 95 % t interval."""
        return paired_difference(self.values(treatment, rate, name), self.values(control, rate, name))

    def pairs(self) -> list[tuple[str, str]]:
        """Every arm with `sft`, each PSFT arm with its matched control; not those that are the same runs."""
        starts = {
            arm: {seed: run["start"] for runs in by_rate.values() for seed, run in runs.items()}
            for arm, by_rate in self.runs.items()
        }
        rates = {arm: _trained_at(by_rate) for arm, by_rate in self.runs.items()}
        return [pair for pair in pairs([ARMS[arm] for arm in self.runs], rates) if starts[pair[0]] != starts[pair[1]]]

    def _table(self, names: list[str], rate: float) -> list[list[str]]:
        rows = [["", "lr", *(self.numbers[name].title for name in names)]]
        for arm, by_rate in self.runs.items():
            if rate in by_rate:
                own = _trained_at(by_rate)
                cells = [format_mean(self.values(arm, rate, name), self.numbers[name].unit) for name in names]
                rows.append([arm, f"{own:g}", *cells])
        return rows

    def _differences(self, names: list[str], rate: float) -> list[list[str]]:
        rows = [["treatment − control", *(self.numbers[name].title for name in names)]]
        for pair in self.pairs():
            found = [self.difference(*pair, rate, name) for name in names]
            cells = [_cell(one, self.numbers[name].unit) for one, name in zip(found, names, strict=True)]
            rows.append([" − ".join(pair), *cells])
        return rows

    def checked(self) -> list[str]:
        """Whether the adapters are those of the evidence: by their greedy accuracy on its test rows."""
        rate = self.rates[0]
        known = {
            run["start"]: (run["points"][0]["in_domain"], run["evidence_in_domain"])
            for by_rate in self.runs.values()
            for run in by_rate.get(rate, {}).values()
            if run["evidence_in_domain"] is not None
        }
        differ = [f"{name} ({here:.3f}, not {there:.3f})" for name, (here, there) in known.items() if here != there]
        if differ:
            return [f"· Adapters that are not as accurate as in the evidence: {', '.join(differ)}."]
        return [f"· {len(known)} adapters were checked: as accurate in-domain as in the evidence."] if known else []

    def words(self, rate: float) -> list[str]:
        """What follows from the intervals of the mean reward."""
        lines = []
        for treatment, control in self.pairs():
            found = self.difference(treatment, control, rate, "mean_reward")
            if found is None or found.half_width is None:
                continue
            if found.low > 0 or found.high < 0:
                kind = "better" if found.mean > 0 else "worse"
                text = f"{treatment} is the {kind} start: mean reward {_cell(found, SHARE)} against {control}."
            else:
                bound = format_value(max(abs(found.low), abs(found.high)), SHARE)
                text = f"{treatment} against {control}: no difference of mean reward is shown; it is below {bound}."
            lines.append(f"· lr {rate:g}: {text}")
        return lines

    def render(self) -> str:
        """Everything as text."""
        if not self.runs:
            return "no run is done yet"
        starts = [name for name in self.numbers if name.startswith("start_")]
        ends = ["mean_reward", "last_reward", *(name for name in self.numbers if name.startswith("end_"))]
        parts = [
            "the adapters, before RL (test rows; mean ± sd over seeds)",
            text_table(self._table(starts, self.rates[0])),
        ]
        for rate in self.rates:
            title = f"after {self.plan['steps']} steps of GRPO at lr {rate:g}"
            parts += ["", title, text_table(self._table(ends, rate))]
            if self.pairs():
                parts += ["", "paired differences, 95 % intervals", text_table(self._differences(ends, rate))]
        words = [*self.checked(), *(line for rate in self.rates for line in self.words(rate))]
        return "\n".join([*parts, "", *words]).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        every = [run for by_rate in self.runs.values() for runs in by_rate.values() for run in runs.values()]
        return {
            "command": " ".join(["python", *map(_short, sys.argv)]),
            "date": datetime.date.today().isoformat(),
            "machines": sorted({run["machine"] for run in every}),
            "versions": sorted({json.dumps(run["versions"], sort_keys=True) for run in every}),
            "plan": self.plan,
            "summary": {
                f"{rate:g}": {
                    arm: {name: _summary(self.values(arm, rate, name)) for name in self.numbers}
                    for arm in self.runs
                    if rate in self.runs[arm]
                }
                for rate in self.rates
            },
            "differences": {
                f"{rate:g}": [
                    {"treatment": treatment, "control": control}
                    | {name: _record(self.difference(treatment, control, rate, name)) for name in self.numbers}
                    for treatment, control in self.pairs()
                ]
                for rate in self.rates
            },
            "runs": {
                arm: {f"{rate:g}": runs for rate, runs in sorted(by_rate.items())} for arm, by_rate in self.runs.items()
            },
        }

    def figure(self) -> Any:
        """One row per learning rate: reward, pass@1, pass@k and entropy over steps; mean and a band of one sd."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from qpsft.compare.figures import STYLES

        k = self.plan["k"]
        columns = [
            ("reward", f"reward of the batch, mean of {SMOOTHED} steps"),
            ("pass@1", "right, T = 1 (test rows)"),
            (f"pass@{k}", f"pass@{k} (test rows)"),
            ("entropy", "entropy of its samples (test rows)"),
        ]
        figure = Figure(figsize=(4.2 * len(columns), 3.2 * len(self.rates) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(self.rates), len(columns), squeeze=False)
        for row, rate in zip(grid, self.rates, strict=True):
            for axes, (name, title) in zip(row, columns, strict=True):
                for arm, by_rate in self.runs.items():
                    if rate in by_rate:
                        _draw(axes, list(by_rate[rate].values()), name, arm, STYLES[arm])
                axes.set_title(f"{title}, lr {rate:g}", fontsize=9)
                axes.set_xlabel("GRPO step")
                axes.set_ylabel("nats per token" if name == "entropy" else "share")
                axes.grid(color="0.9", linewidth=0.7)
                axes.spines[["top", "right"]].set_visible(False)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
        return figure


def _draw(axes: Any, runs: list[Mapping[str, Any]], name: str, arm: str, style: dict[str, Any]) -> None:
    lines = [_smoothed(run["log"]) if name == "reward" else {p["step"]: p[name] for p in run["points"]} for run in runs]
    steps = sorted(set.intersection(*map(set, lines)))
    means, sds = zip(*(mean_and_sd([line[step] for line in lines]) for step in steps), strict=True)
    axes.plot(steps, means, label=arm, markersize=5, **({"linewidth": 1.6} | style))
    low, high = ([m + sign * (sd or 0.0) for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _smoothed(log: list[Mapping[str, float]]) -> dict[float, float]:
    """Mean reward of each `SMOOTHED` steps, at the middle of them."""
    groups = [log[i : i + SMOOTHED] for i in range(0, len(log), SMOOTHED)]
    return {
        (group[0]["step"] + group[-1]["step"]) / 2: math.fsum(line["reward"] for line in group) / len(group)
        for group in groups
    }


def _cell(found: Difference | None, unit: str) -> str:
    if found is None:
        return "–"
    mean = f"{'−' if found.mean < 0 else '+'}{format_value(abs(found.mean), unit)}"
    return mean if found.half_width is None else f"{mean} ± {format_value(found.half_width, unit)}"


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    mean, sd = mean_and_sd(list(values.values()))
    return {"mean": mean, "sd": sd, "n": len(values)}


def _record(found: Difference | None) -> dict[str, Any] | None:
    return found and {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _short(argument: str) -> str:
    """An argument of the command, paths in the repository as they are typed there."""
    root = Path(__file__).resolve().parents[1]
    path = Path(argument)
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) and path.exists() else argument


def write(outcome: Outcome, folder: Path) -> None:
    """rl_start.json, rl_start.png and summary.txt."""
    record = json.dumps(outcome.to_dict(), indent=1, ensure_ascii=False) + "\n"
    for name, text in (("rl_start.json", record), ("summary.txt", outcome.render() + "\n")):
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.rename(folder / name)
    outcome.figure().savefig(folder / "rl_start.png", dpi=PNG_DPI)
