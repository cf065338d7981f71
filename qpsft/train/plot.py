"""Plots of a run, drawn with matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OLD, NEW = "tab:red", "tab:blue"
SKILLS = {
    "guard_accuracy": "accuracy on the guard's rows",
    "guard_nll": "nll of the guard's rows, nats",
    "guard_kl": "KL from the base, guard's rows, nats",
}
EVALUATED = {"nll": "eval_loss", "entropy": "eval_entropy"}
"""A panel's number on the evaluation rows."""
PANELS = (
    ("nll", "Negative log-likelihood", "nats per token"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("clip_fraction", "Clip fraction: tokens without gradient", "share of supervised tokens"),
    ("approx_kl", "KL, reference against policy", "nats per token"),
)


def draw_training(lines: Sequence[dict], path: Path, title: str = "") -> None:
    """Writes `training_figure` as a PNG to `path`."""
    training_figure(lines, title).savefig(path, dpi=110, format="png")


def training_figure(lines: Sequence[dict], title: str = "") -> Figure:
    """NLL, entropy, clip fraction and KL over optimizer steps; with a guard, the old skill beside the new one too.

    Args:
        lines: of `metrics.jsonl`, each with `step` and some of the numbers.
        title: printed above the plots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    guarded = any("guard_limit" in line for line in lines)
    figure = Figure(figsize=(10, 9.5 if guarded else 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3 if guarded else 2, 2)
    for index, (name, heading, unit) in enumerate(PANELS):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        points = _points(lines, name)
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color="0.1",
            linewidth=1.4,
            marker="." if len(points) < 60 else None,
        )
        evaluated = _points(lines, EVALUATED[name]) if name in EVALUATED else []
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), color=NEW, linewidth=1.4, marker=".", label="evaluation rows")
            axes.legend(frameon=False, fontsize=9)
        _dress(axes, heading, unit)
        if name == "approx_kl" and any(value > 1 for _, value in points):
            axes.set_yscale("symlog", linthresh=0.01)  # the k3 estimate can be huge on a few tokens early in training
            axes.set_ylim(bottom=0)
        if name == "clip_fraction":
            axes.set_ylim(-0.02, max([0.1, *(value for _, value in points)]) * 1.1)
    if guarded:
        _draw_skills(figure.add_subplot(grid[2, :]), lines)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def _draw_skills(axes: Axes, lines: Sequence[dict]) -> None:
    """The old skill and its limit on the left axis, the new one on the right: its NLL, on evaluation rows if any."""
    name = next(name for name in SKILLS if _points(lines, name))
    old, limit = _points(lines, name), _points(lines, "guard_limit")
    drawn = axes.plot(*zip(*old, strict=True), color=OLD, linewidth=1.6, marker="o", markersize=4, label="old skill")
    drawn += axes.plot(*zip(*limit, strict=True), color=OLD, linewidth=1.2, linestyle="--", label="its limit")
    _dress(axes, "Old skill and new skill", SKILLS[name])
    axes.yaxis.label.set_color(OLD)
    new = _points(lines, "eval_loss") or _points(lines, "nll")
    right = axes.twinx()
    drawn += right.plot(*zip(*new, strict=True), color=NEW, linewidth=1.4, marker=".", label="new skill")
    right.set_ylabel("nll of the evaluation rows, nats" if _points(lines, "eval_loss") else "nll in training, nats")
    right.yaxis.label.set_color(NEW)
    axes.legend(handles=drawn, frameon=False, fontsize=9, loc="best")


def _points(lines: Sequence[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _dress(axes: Axes, heading: str, unit: str) -> None:
    axes.set(title=heading, xlabel="optimizer step", ylabel=unit)
    axes.title.set_fontsize(11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
