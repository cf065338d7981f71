"""The table and the plot of evidence_real.py, from the records that it kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence_real import ARMS, CONTROLS, Run, Study, by_of, chosen_rates
from evidence_real_parts import TEXTS, kept

from qpsft.compare.paired import Difference, Point, matched, matched_difference, mean_and_sd
from qpsft.files import write_atomically
from qpsft.terminal import fill, text_table

Records = dict[Run, dict[str, Any]]
COLUMNS = {
    "learnt": "learnt", "kept": "kept", "text": "own text", "ifeval": "IFEval", "truthfulqa_mc1": "TQA 1",
    "truthfulqa_mc2": "TQA 2", "arc_easy": "ARC-e", "openbookqa": "OBQA", "probe_words": "words",
    "probe_right": "right", "mt_bench/nll": "NLL MT", "user/nll": "NLL user", "mt_bench/kl": "KL MT",
    "user/kl": "KL user", "test/nll": "test NLL", "test/entropy": "entropy",
}  # fmt: skip
"""Metric -> heading."""
OVER_EPOCHS = ("learnt", "kept", "text", "probe_words", "test/entropy", "mt_bench/kl", "user/kl")
COMPARED = {"kept": "kept", "text": "own text"}
LEGEND = (
    "learnt: test answers right (GSM8K: −NLL of the references). kept: mean over IFEval, TruthfulQA 1 and 2, "
    "ARC-easy, OpenBookQA, the base's own text (MT-bench, users) and the words of the probe, each relative to the "
    "base. own text: likelihood of a token of it, relative. words, right: the test questions asked for full sentences. "
    "Mean ± standard deviation over seeds, at the end of a run."
)


def gather(study: Study, part: str, options: argparse.Namespace) -> Records:
    """The records that are there, of these arms at these rates, by any seed."""
    runs = (
        Run(part, arm, rate, seed) for arm in options.arms for rate in options.rates for seed in range(options.seeds)
    )
    found = {run: study.read(run) for run in runs}
    return {run: record for run, record in found.items() if record is not None}


def metrics_of(point: Mapping[str, Any], part: str, base: Mapping[str, float]) -> dict[str, float]:
    """A point's metrics, with `learnt` (more is better), and `kept` and `text` relative to the base's."""
    metrics = {f"{name}/kl": 0.0 for name in TEXTS} | point["metrics"]  # the base has no distance from itself
    relative = kept(metrics, base)
    learnt = -metrics["test/nll"] if by_of(part) == "nll" else metrics["test/accuracy"]
    return metrics | {"learnt": learnt} | {name: relative[name] for name in COMPARED if name in relative}


def points_of(
    records: Iterable[tuple[Run, dict]], part: str, base: Mapping[str, float], name: str
) -> dict[int, list[Point]]:
    """seed -> (learnt, `name`) after every measured epoch of every run given."""
    found: dict[int, list[Point]] = {}
    for run, record in records:
        measured = [metrics_of(point, part, base) for point in record["points"]]
        line = [(one["learnt"], one[name]) for one in measured if name in one]
        if line:
            found.setdefault(run.seed, []).extend(line)
    return found


def of_arm(records: Records, arm: str, rate: float | None = None) -> list[tuple[Run, dict]]:
    """An arm's runs, at one rate or at all."""
    return [(run, one) for run, one in records.items() if run.arm == arm and rate in (None, run.rate)]


def ends_of(records: Records, arm: str, rate: float, part: str, base: Mapping[str, float]) -> list[dict[str, float]]:
    """`metrics_of` the end of each of an arm's runs that did not diverge."""
    runs = [one for _, one in of_arm(records, arm, rate) if one["points"] and "diverged" not in one]
    return [metrics_of(one["points"][-1], part, base) for one in runs]


def arm_rows(records: Records, rates: Mapping[str, float], part: str, base: dict[str, float]) -> list[list[str]]:
    """A header, the base, and each arm at its rate: means over seeds at the end."""
    before = metrics_of({"metrics": base}, part, base)
    shown = [name for name in COLUMNS if name in before]
    rows = [["arm", "rate", "seeds", *(COLUMNS[name] for name in shown)]]
    rows.append(["base", "", "", *(f"{before[name]:.3g}" for name in shown)])
    for arm, rate in rates.items():
        ends = ends_of(records, arm, rate, part, base)
        rows.append([arm, f"{rate:g}", str(len(ends)), *(_mean_sd(ends, name) for name in shown)])
    return rows


def epoch_rows(records: Records, rates: Mapping[str, float], part: str, base: dict[str, float]) -> list[list[str]]:
    """A header, and each arm at its rate after each measured epoch."""
    rows = [["arm", "epoch", *(COLUMNS[name] for name in OVER_EPOCHS)]]
    for arm, rate in rates.items():
        points = [point for _, one in of_arm(records, arm, rate) for point in one["points"]]
        for epoch in sorted({round(point["epoch"]) for point in points}):
            here = [metrics_of(point, part, base) for point in points if round(point["epoch"]) == epoch]
            rows.append([arm, str(epoch), *(_mean_sd(here, name) for name in OVER_EPOCHS)])
    return rows


def compared(records: Records, rates: Mapping[str, float], part: str, base: dict[str, float]) -> list[dict[str, Any]]:
    """What each arm keeps more than `sft`, and PSFT more than its control, at equal in-domain score, paired by seed.

    `frontier` is over all epochs and rates, and `chosen` over the epochs at the chosen rates. A comparison at a level
    that is not above the base's has learnt nothing, and is left out.
    """
    pairs = [(arm, "sft") for arm in rates if arm != "sft"]
    pairs += [(arm, control) for arm, control in CONTROLS.items() if {arm, control} <= set(rates)]
    least = metrics_of({"metrics": base}, part, base)["learnt"]
    found = []
    for arm, control in pairs:
        for name in COMPARED:
            for over in ("frontier", "chosen"):
                if control not in rates or over == "frontier" and ARMS[control].rate_of:  # it has one rate
                    continue
                sides = [
                    points_of(of_arm(records, one, rates[one] if over == "chosen" else None), part, base, name)
                    for one in (arm, control)
                ]
                matched = matched_difference(*sides)
                if matched is not None and matched[0] > least:
                    level, difference = matched
                    found.append(
                        {"arm": arm, "control": control, "of": name, "over": over, "learnt": level}
                        | {"difference": asdict(difference)}
                    )
    return found


def equal_rows(records: Records, part: str, base: dict[str, float]) -> list[list[str]]:
    """A header, and for each arm and rate the own text that it keeps beyond `sft` where right answers are as likely.

    Means over seeds, at the end. `sft` is read between its rates and the base, as `qpsft.compare.paired.matched` does.
    """
    points: dict[tuple[str, float], Point] = {}
    for arm, rate in dict.fromkeys((run.arm, run.rate) for run in records):
        if ends := ends_of(records, arm, rate, part, base):
            points[arm, rate] = -_mean([end["test/nll"] for end in ends]), _mean([end["text"] for end in ends])
    sft = [point for (arm, _), point in points.items() if arm == "sft"]
    rows = [["more kept where right answers are as likely", "rate", "test NLL", "own text", "more than sft"]]
    for (arm, rate), point in points.items():
        if sft and arm != "sft":
            _, own, control = matched([point], [*sft, (-base["test/nll"], 1.0)])
            rows.append([arm, f"{rate:g}", f"{-point[0]:.3f}", f"{point[1]:.3f}", f"{own - control:+.3f}"])
    return rows


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["more kept at equal in-domain score", "of", "over", "at", "difference", "seeds"]]
    for one in comparisons:
        difference = Difference(**one["difference"])
        half = "" if difference.half_width is None else f" ± {difference.half_width:.3f}"
        rows.append(
            [f"{one['arm']} − {one['control']}", COMPARED[one["of"]], one["over"], f"{one['learnt']:.3f}"]
            + [f"{difference.mean:+.3f}{half}", str(difference.n)]
        )  # fmt: skip
    return rows


def _mean_sd(measured: Sequence[Mapping[str, float]], name: str) -> str:
    values = [one[name] for one in measured if name in one]
    if not values:
        return "–"
    mean, sd = mean_and_sd(values)
    return f"{mean:.3g}" if sd is None else f"{mean:.3g} ± {sd:.2g}"


def draw(parts: Mapping[str, tuple[Records, Mapping[str, float], dict[str, float]]], path: Path) -> None:
    """Kept against learnt: a panel per part and kind of kept; a small mark per measurement of any rate, a line per arm.

    Args:
        parts: part -> its records, chosen rates and the base's metrics.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(parts), 9), layout="constrained")
    panels = figure.subplots(len(COMPARED), len(parts), squeeze=False)
    for column, (part, (records, rates, base)) in enumerate(parts.items()):
        for axes, (name, title) in zip(panels[:, column], COMPARED.items(), strict=True):
            for index, (arm, rate) in enumerate(rates.items()):
                look = {"color": colormaps["tab20"](index % 20), "marker": "osD^vP*Xd<>ph8"[index % 14]}
                every = [xy for line in points_of(of_arm(records, arm), part, base, name).values() for xy in line]
                chosen = list(points_of(of_arm(records, arm, rate), part, base, name).values())
                if not chosen:
                    continue
                axes.scatter(*zip(*every, strict=True), **look, s=10, alpha=0.4)
                means = [[_mean(axis) for axis in zip(*after, strict=True)] for after in zip(*chosen, strict=False)]
                axes.plot(*zip(*means, strict=True), **look, markersize=7, label=arm)
            before = metrics_of({"metrics": base}, part, base)
            if name in before:
                axes.plot(before["learnt"], before[name], "kx", markersize=9, label="base")
            axes.set(title=part, xlabel="learnt: −NLL" if by_of(part) == "nll" else "learnt: right", ylabel=title)
    panels[0, -1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=140)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(study: Study, options: argparse.Namespace) -> None:
    """Prints the tables of what is done, and writes `summary.txt`, `summary.json` and `kept.png` to `--tables`."""
    texts, drawn, summary = [], {}, {}
    for part in options.parts:
        record = study.read(Run(part))
        records = gather(study, part, options) if record else {}
        if not records:
            texts.append(f"{part}: nothing is done yet.")
            continue
        base = record["points"][0]["metrics"]
        rates = chosen_rates(part, options.arms, records)
        drawn[part] = records, rates, base
        comparisons = compared(records, rates, part, base)
        tables = (
            arm_rows(records, rates, part, base),
            comparison_rows(comparisons),
            equal_rows(records, part, base),
            epoch_rows(records, rates, part, base),
        )
        texts.append("\n\n".join([f"== {part} ==", *map(text_table, tables)]))
        summary[part] = {
            "base": base,
            "rates": rates,
            "runs": [run_record(study, run, metrics_of(one["points"][-1], part, base)) for run, one in records.items()],
            "compared": comparisons,
            "environment": record["environment"],
        }
    text = "\n\n".join([*texts, fill(LEGEND)])
    print(text)
    if drawn:
        folder = Path(options.tables or study.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "summary.txt", text + "\n")
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        draw(drawn, folder / "kept.png")
        print(f"\n{folder / 'summary.txt'}, summary.json, kept.png")


def run_record(study: Study, run: Run, end: Mapping[str, float]) -> dict[str, Any]:
    """A run in the summary: what it was, its record's name, and its metrics at the end."""
    return asdict(run) | {"record": study.path(run).name, "end": dict(end)}
