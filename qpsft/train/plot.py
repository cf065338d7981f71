"""Plots of a run, drawn with matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """NLL, entropy, clip fraction and KL over optimizer steps.

    Args:
        lines: log lines, each with `step` and some of the four numbers (`metrics.jsonl`).
        title: printed above the plots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, heading, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color="0.1",
            linewidth=1.4,
            marker="." if len(points) < 60 else None,
        )
        axes.set(title=heading, xlabel="optimizer step", ylabel=unit)
        axes.title.set_fontsize(11)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        if name == "approx_kl" and any(value > 1 for _, value in points):
            axes.set_yscale("symlog", linthresh=0.01)  # the k3 estimate can be huge on a few tokens early in training
            axes.set_ylim(bottom=0)
        if name == "clip_fraction":
            axes.set_ylim(-0.02, max([0.1, *(value for _, value in points)]) * 1.1)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure
