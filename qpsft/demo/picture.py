"""The demo's picture: what each model learnt and what it kept, as bars in the terminal and as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

BAR = 20
LEARNT, KEPT = "learnt: the new task", "kept: what it could do"

Scores = Mapping[str, tuple[float, float]]
"""Model -> (learnt, kept), shares of right answers."""


def bars(scores: Scores) -> str:
    """A line per model with two bars; 78 columns with names of up to 22 letters."""
    width = max(map(len, scores))
    lines = [f"{'':{width}}  {LEARNT:<{BAR + 8}}{KEPT}"]
    for name, pair in scores.items():
        lines.append(f"{name:{width}}  " + "  ".join(_bar(share) for share in pair).rstrip())
    return "\n".join(lines)


def _bar(share: float) -> str:
    """`███████▌             37 %`."""
    eighths = round(8 * BAR * share)
    full, rest = divmod(eighths, 8)
    drawn = "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")
    return f"{drawn:<{BAR}} {share:>4.0%} "


def draw(scores: Scores, path: Path) -> None:
    """Writes the same as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, color) in enumerate(((LEARNT, "tab:blue"), (KEPT, "tab:green"))):
        heights = [100 * pair[index] for pair in scores.values()]
        places = [place + 0.38 * index for place in range(len(scores))]
        drawn = axes.bar(places, heights, 0.36, label=label, color=color)
        axes.bar_label(drawn, fmt="%.0f %%", padding=2)
    axes.set_xticks([place + 0.19 for place in range(len(scores))], list(scores))
    axes.set(ylim=(0, 115), ylabel="right answers, %", title="qpsft demo: the same noisy rows, two ways to train")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    figure.savefig(path, dpi=110, format="png")
