"""Figures of a comparison: curves over epochs and the frontier. Lines differ in dash and marker, to be read in grey."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qpsft.compare.paired import mean_and_sd
from qpsft.compare.results import SHARE, ArmResult, Comparison, describe_metric, score_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "sft": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "sft_matched": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "sft_blocks": {"color": "#56b4e9", "linestyle": ":", "marker": "D"},
    "sft_kl": {"color": "#e69f00", "linestyle": "--", "marker": "X"},
    "sft_replay": {"color": "#8c510a", "linestyle": ":", "marker": "8"},
    "dft": {"color": "#b0609a", "linestyle": "-.", "marker": "^"},
    "asft": {"color": "#7b3294", "linestyle": ":", "marker": "<"},
    "eaft": {"color": "#8c6d31", "linestyle": "-.", "marker": ">"},
    "stm": {"color": "#5b7f00", "linestyle": "--", "marker": "p"},
    "trsft": {"color": "#7f7f7f", "linestyle": "-.", "marker": "h"},
    "psft": {"color": "#d55e00", "linestyle": "-", "marker": "v"},
    "psft_visits": {"color": "#009e73", "linestyle": "-", "marker": "P", "linewidth": 2.2},
    "psft_kl": {"color": "#a63603", "linestyle": "--", "marker": "d"},
    "psft_replay": {"color": "#c51b7d", "linestyle": ":", "marker": "*"},
}
"""Colours that differ in hue and in lightness, a dash and a marker for each arm."""
BASE = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.2}
FIGURES = ("curves", "frontier")
PANEL = (4.6, 3.3)
"""Inches."""


def figures(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    """File name without ending -> (caption, figure), for what was measured."""
    curves, frontier = FIGURES
    drawn = {curves: ("Mean and standard deviation over seeds.", _curves(comparison))}
    if comparison.has_out_of_domain:
        drawn[frontier] = (
            "Kept against learnt: a small mark per seed and epoch, the mean over seeds as a line from the base (cross) "
            "to the last epoch (large mark). Further up and to the right is better.",
            _frontier(comparison),
        )
    return drawn


def _new(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of up to three panels in a row."""
    from matplotlib.figure import Figure

    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.5), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in every[panels:]:
        unused.remove()
    for axes in every[:panels]:
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every[:panels]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _curves(comparison: Comparison) -> Figure:
    names = comparison.columns()
    figure, panels = _new(len(names))
    for axes, name in zip(panels, names, strict=True):
        metric = describe_metric(name, comparison.metric)
        for arm in comparison.arms.values():
            _curve(axes, arm, name, comparison.base.get(name))
        if name in comparison.base:
            axes.axhline(comparison.base[name], **BASE, label="base")
        axes.set(xlabel="epoch", ylabel="share" if metric.unit == SHARE else "nats per token")
        axes.set_title(metric.title, fontsize=10)
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


def _frontier(comparison: Comparison) -> Figure:
    figure, (axes,) = _new(1)
    figure.set_size_inches(4.8, 4.4)  # read on a phone too
    signs = np.array([comparison.sign("in_domain"), comparison.sign("out_of_domain")])
    base = np.array([comparison.base["in_domain"], comparison.base["out_of_domain"]])
    axes.plot(*base, marker="x", color="0.2", markersize=9, markeredgewidth=2, linestyle="none", label="base")
    for arm in comparison.arms.values():
        style = {"linewidth": 1.4} | STYLES[arm.name]
        runs = [signs * np.array(points) for points in comparison.points(arm.runs).values()]
        axes.scatter(*np.concatenate(runs).T, marker=style["marker"], color=style["color"], s=12, alpha=0.35)
        epochs = min(map(len, runs))
        means = np.vstack([base, np.mean([run[:epochs] for run in runs], axis=0)])
        axes.plot(*means.T, **style, markersize=9, markevery=[epochs], label=arm.name)
    axes.set_xlabel(f"learnt: in-domain {score_name('in_domain', comparison.metric)}")
    axes.set_ylabel(f"kept: out-of-domain {score_name('out_of_domain', comparison.metric)}")
    axes.xaxis.set_inverted(signs[0] < 0)
    axes.yaxis.set_inverted(signs[1] < 0)
    axes.locator_params(axis="x", nbins=5)  # numbers as long as 0.0025 need the room
    _legend(figure, axes)
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
