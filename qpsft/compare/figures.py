"""Figures of a comparison: curves over epochs, the frontier, clipping and tuning. Each line has a dash and a marker of
its own, so that the figures can be read in grey."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qpsft.compare.paired import Difference, mean_and_sd
from qpsft.compare.results import ArmResult, Comparison, Metric, describe_metric, tuning_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "sft": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "sft_matched": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "sft_blocks": {"color": "#56b4e9", "linestyle": ":", "marker": "D"},
    "dft": {"color": "#b0609a", "linestyle": "-.", "marker": "^"},
    "psft": {"color": "#d55e00", "linestyle": "-", "marker": "v"},
    "psft_visits": {"color": "#009e73", "linestyle": "-", "marker": "P", "linewidth": 2.2},
}
"""Colours that differ in hue and in lightness, a dash and a marker for each arm."""
BASE = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.2}
PANEL = (4.6, 3.3)
ENTRY_WIDTH = 1.35
"""Inches that a legend's entry takes: the longest arm name, its line and the gap behind it."""


def figures(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    """File name without ending -> (caption, figure), for what was measured."""
    drawn = {"curves": ("Over epochs, mean and standard deviation over seeds.", _curves(comparison))}
    if comparison.has_out_of_domain:
        drawn["frontier"] = (
            "In-domain against out of domain: a small mark per seed and epoch, the mean over seeds as a line from the "
            "base (cross) to the last epoch (large mark). Further up and to the right is better.",
            _frontier(comparison),
        )
    drawn["training"] = ("While training, mean over seeds.", _training(comparison))
    if any(arm.grid for arm in comparison.arms.values()):
        drawn["tuning"] = (
            "Validation score by learning rate; the chosen rate has a ring, a cross at the bottom: training diverged.",
            _tuning(comparison),
        )
    return drawn


def _new(panels: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in every[panels:]:
        unused.remove()
    for axes in every[:panels]:
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every[:panels]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    fitting = max(1, int(figure.get_figwidth() / ENTRY_WIDTH))
    columns = -(-len(labels) // -(-len(labels) // fitting))  # as even rows as the width allows
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _curves(comparison: Comparison) -> Figure:
    names = comparison.columns()
    figure, panels = _new(len(names))
    for axes, name in zip(panels, names, strict=True):
        metric = describe_metric(name, comparison.metric)
        for arm in comparison.arms.values():
            _curve(axes, arm, name, comparison.base.get(name))
        if name in comparison.base:
            axes.axhline(comparison.base[name], **BASE, label="base")
        _label(axes, metric)
    _legend(figure, panels[0])
    return figure


def _curve(axes: Axes, arm: ArmResult, name: str, at_start: float | None) -> None:
    by_epoch: dict[float, list[float]] = {} if at_start is None else {0.0: [at_start]}
    for run in arm.runs.values():
        for point in run["points"]:
            if name in point["metrics"]:
                by_epoch.setdefault(point["epoch"], []).append(point["metrics"][name])
    epochs = sorted(by_epoch)
    means, sds = zip(*(mean_and_sd(by_epoch[epoch]) for epoch in epochs), strict=True)
    style = {"linewidth": 1.6, "markersize": 5, "capsize": 2, "elinewidth": 0.8} | STYLES[arm.name]
    axes.errorbar(epochs, means, yerr=[sd or 0.0 for sd in sds], label=arm.name, **style)
    axes.set_xticks(epochs)


def _label(axes: Axes, metric: Metric) -> None:
    axes.set_title(metric.title, fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("share" if metric.unit == "share" else "nats per token")


def _frontier(comparison: Comparison) -> Figure:
    figure, (axes,) = _new(1)
    figure.set_size_inches(7.2, 5.4)
    sign_x, sign_y = comparison.sign("in_domain"), comparison.sign("out_of_domain")
    base = comparison.base["in_domain"], comparison.base["out_of_domain"]
    axes.plot(*base, marker="x", color="0.2", markersize=9, markeredgewidth=2, linestyle="none", label="base")
    for arm in comparison.arms.values():
        style = {"linewidth": 1.4} | STYLES[arm.name]
        every = list(comparison.points(arm.runs).values())
        for points in every:
            x, y = zip(*points, strict=True)
            axes.plot(
                [sign_x * value for value in x],
                [sign_y * value for value in y],
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                markersize=3.5,
                alpha=0.35,
            )
        epochs = min(len(points) for points in every)
        mean_x, mean_y = [base[0]], [base[1]]
        for epoch in range(epochs):
            mean_x.append(sign_x * mean_and_sd([points[epoch][0] for points in every])[0])
            mean_y.append(sign_y * mean_and_sd([points[epoch][1] for points in every])[0])
        axes.plot(mean_x, mean_y, **style, markersize=9, markevery=[epochs], label=arm.name)
    axes.set_xlabel(describe_metric("in_domain", comparison.metric).title)
    axes.set_ylabel(describe_metric("out_of_domain", comparison.metric).title)
    if sign_x < 0:
        axes.invert_xaxis()
    if sign_y < 0:
        axes.invert_yaxis()
    _legend(figure, axes)
    return figure


TRAINING_PANELS = (
    ("clip_fraction", "Clip fraction: tokens without gradient", "share of supervised tokens"),
    ("nll", "Training NLL", "nats per token"),
    ("approx_kl", "KL, reference against policy", "nats per token"),
)


def _training(comparison: Comparison) -> Figure:
    figure, panels = _new(len(TRAINING_PANELS))
    for axes, (name, title, unit) in zip(panels, TRAINING_PANELS, strict=True):
        for arm in comparison.arms.values():
            by_step: dict[int, list[float]] = {}
            for run in arm.runs.values():
                for line in run["log"]:
                    if name in line:
                        by_step.setdefault(line["step"], []).append(line[name])
            steps = sorted(by_step)
            style = {"linewidth": 1.4, "markersize": 3.5} | STYLES[arm.name]
            axes.plot(steps, [mean_and_sd(by_step[step])[0] for step in steps], label=arm.name, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        if name == "approx_kl":
            axes.set_yscale("symlog", linthresh=0.1)  # one token far from its reference outweighs all others
    _legend(figure, panels[0])
    return figure


def _tuning(comparison: Comparison) -> Figure:
    figure, (axes,) = _new(1)
    figure.set_size_inches(6.0, 4.2)
    for number, arm in enumerate(comparison.arms.values()):
        every = {float(rate): score for rate, score in tuning_table(arm).items()}
        table = {rate: score for rate, score in every.items() if score is not None}
        if not table:
            continue
        for rate in every.keys() - table.keys():  # one above the other, where several arms diverged
            style = {"color": STYLES[arm.name]["color"], "marker": "x", "transform": axes.get_xaxis_transform()}
            axes.plot([rate], [0.03 + 0.04 * number], **style, markersize=7, linestyle="none")
        axes.plot(list(table), list(table.values()), label=arm.name, **STYLES[arm.name])
        chosen = arm.learning_rate
        axes.plot(chosen, table[chosen], "o", markersize=13, markerfacecolor="none", markeredgecolor="0.3")
    axes.set_xscale("log")
    rates = sorted({float(rate) for arm in comparison.arms.values() for rate in tuning_table(arm)})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(describe_metric("validation", comparison.metric).title)
    _legend(figure, axes)
    return figure


def draw_gains(
    noise: Sequence[float], gains: Mapping[str, Sequence[Difference | None]], unit: str, scores: Mapping[str, Any]
) -> Figure:
    """The gain against the noise, and the scores it comes from.

    Args:
        noise: shares of wrong demonstrations, ascending.
        gains: what is compared -> its difference at each noise.
        unit: of the differences, for the axis.
        scores: title -> arm -> (mean, sd) at each noise.
    """
    figure, panels = _new(1 + len(scores))
    marks = [("#000000", "-", "o"), ("#d55e00", "--", "s"), ("#0072b2", ":", "^")]
    for (label, values), (color, line, marker) in zip(gains.items(), marks, strict=False):
        known = [(x, gain) for x, gain in zip(noise, values, strict=True) if gain is not None]
        panels[0].errorbar(
            [x for x, _ in known],
            [gain.mean for _, gain in known],
            yerr=[gain.half_width or 0.0 for _, gain in known],
            label=label,
            color=color,
            linestyle=line,
            marker=marker,
            capsize=3,
        )
    panels[0].axhline(0.0, **BASE)
    panels[0].set_title("Gain out of domain, 95 % intervals", fontsize=10)
    panels[0].set_ylabel(unit)
    panels[0].legend(fontsize=8, frameon=False)
    for axes, (title, arms) in zip(panels[1:], scores.items(), strict=True):
        for arm, values in arms.items():
            means, sds = zip(*values, strict=True)
            axes.errorbar(noise, means, yerr=[sd or 0.0 for sd in sds], label=arm, capsize=2, **STYLES[arm])
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    for axes in panels:
        axes.set_xlabel("share of wrong demonstrations")
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for HTML: no prologue, no metadata, no reference to anything outside."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(id(figure))}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
