"""Draws the figures of README and docs/: what methods keep, the clip's effect on one token, a real run of each failure.

    python docs/figures.py                     all of them: five short runs on the embedded base, two minutes
    python docs/figures.py clip                one of them
    python docs/figures.py --runs /tmp/runs    keep the runs there, and draw from those that are there already

A run is `qpsft train adapters/demo-noisy` with the flags of RUNS and STEPS, on one thread; `good` is the recipe's own.
Nothing is drawn from a formula: the clip's curves come out of qpsft.psft.losses by autograd, the others out of
metrics.jsonl. `guard` is the recipe of docs/guard.md with its guard, and with one that only warns: two runs of a few
minutes. `kept` is read from the committed record KEPT, and takes a second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qpsft.terminal import quiet_libraries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "adapters" / "demo-noisy"
STEPS = 104  # one block of SFT warm-up, then three blocks of 8 mini-batches with 4 visits
BLOCK, WARMUP = 32, 8
RUNS = {
    "good": [],
    "learning_rate": ["--learning_rate=3e-2"],
    "k1": ["--reference_steps=1", "--num_iterations=1", "--sft_warmup_steps=0"],
    "epsilon": ["--epsilon=0.005"],
    "dropout": ["--lora_dropout=0.1"],
}
FIGURES = ["clip", "kept", *RUNS, "guard"]
TITLES = {
    "learning_rate": "learning rate 3e-2",
    "k1": "K = 1, one visit",
    "epsilon": "ε = 0.005",
    "dropout": "LoRA dropout 0.1",
}
"""Legend of each failure's line."""

PANELS = {
    "loss": ("loss, what is minimized", "surrogate, no unit"),
    "nll": ("nll", "nats per token"),
    "entropy": ("entropy", "nats per token"),
    "mean_token_accuracy": ("mean_token_accuracy", "share of tokens"),
    "clip_fraction": ("clip_fraction", "share of tokens"),
    "approx_kl": ("approx_kl", "nats per token"),
    "ratio_max": ("ratio_max", "ratio, no unit"),
    "grad_norm": ("grad_norm", "L2 norm"),
}
SHOWN = {
    "learning_rate": ("nll", "mean_token_accuracy", "clip_fraction"),
    "k1": ("loss", "clip_fraction", "approx_kl"),
    "epsilon": ("loss", "clip_fraction", "nll"),
    "dropout": ("clip_fraction", "approx_kl", "ratio_max"),
}
GOOD = {"color": "0.6", "linewidth": 1.4, "label": "good: the recipe as it is"}
BAD = {"color": "#a03000", "linewidth": 1.6}
SINCE = 16
"""Steps of a block that the figure of the dropout shows."""
GUARD = HERE / "guard.md"
GUARDED = {"stop": [], "warn": ["--guard={data: old.jsonl, every: 4, max_new_tokens: 56, action: warn}"]}
KEPT = HERE.parent / "benchmarks" / "results" / "evidence_real" / "summary.json"
KEPT_RATES = KEPT.parent / "rates" / "summary.json"
KEPT_PART = "svamp_noisy"
KEPT_ARMS = {
    "sft": "plain SFT",
    "sft_kl": "SFT + KL to the base",
    "sft_replay": "SFT + replay",
    "stm": "STM",
    "psft_visits": "PSFT with visits",
    "psft_replay": "PSFT + replay",
    "psft": "PSFT",
    "psft_kl": "PSFT + KL to the base",
    "dft": "DFT",
    "asft": "ASFT",
    "eaft": "EAFT",
    "trsft": "TrSFT",
}
"""The arms that README's picture shows, and what it calls them."""
DPI = 120
COLOURS = 64


# ---- the clip ----


def token_curve(loss_type: str, ratios: Sequence[float], old_probability: float) -> tuple[list, list]:
    """One token's loss and its push on the token's log-probability, −∂L/∂log π, at each ratio.

    Args:
        loss_type: of `qpsft.psft.losses.LOSSES`.
        ratios: the token's probability over its old one.
        old_probability: the token's, under the reference policy.
    """
    import torch

    from qpsft.psft.losses import EPSILON, LOSSES, OLD_LOGPROBS

    values, pushes = [], []
    options = SimpleNamespace(epsilon=EPSILON)
    mask = torch.ones(1, 1, dtype=torch.bool)
    old_logprobs = torch.full((1, 1), math.log(old_probability), dtype=torch.float64)
    for ratio in ratios:
        logprobs = (old_logprobs + math.log(ratio)).requires_grad_()
        value = LOSSES[loss_type](logprobs, mask, {OLD_LOGPROBS: old_logprobs}, options, 1)
        value.backward()
        values.append(value.item())
        pushes.append(-logprobs.grad.item())
    return values, pushes


def draw_clip(path: Path) -> None:
    """The three losses of one token, and their gradients, against its ratio."""
    from qpsft.psft.losses import EPSILON

    old_probability = 0.4
    ratios = [0.3 + 0.005 * i for i in range(341)]
    curves = {
        "PSFT": ("psft", {"color": "black", "linewidth": 2.4}),
        "SFT, nats": ("nll", {"color": "#0072b2", "linewidth": 1.7, "linestyle": "--"}),
        "DFT, nats": ("dft", {"color": "#a0508a", "linewidth": 1.9, "linestyle": ":"}),
    }
    figure, (left, right) = new_figure(2, width=4.6, height=3.5)
    for name, (loss_type, style) in curves.items():
        values, pushes = token_curve(loss_type, ratios, old_probability)
        left.plot(ratios, values, label=name, **style)
        # the push jumps to 0 at the clip: no line may join the two sides
        cut = next((i for i, push in enumerate(pushes) if push == 0.0), len(ratios))
        right.plot(ratios[:cut], pushes[:cut], **style)
        right.plot(ratios[cut:], pushes[cut:], **style)
    ratio = "ratio r = π / π_old"
    left.set(title=f"loss of one token, π_old = {old_probability}", xlabel=ratio, ylabel="loss L", ylim=(-1.5, 2.6))
    right.set(title="what it does to the token's log-probability", xlabel=ratio, ylabel="push, −∂L / ∂ log π")
    right.set_ylim(-0.1, 1.6)
    for axes in (left, right):
        for x, text in ((1 - EPSILON, "1 − ε"), (1.0, "1"), (1 + EPSILON, "1 + ε")):
            axes.axvline(x, color="0.8", linewidth=0.8, zorder=0)
            axes.annotate(text, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -9),
                          textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
    right.annotate("clipped: no gradient", (1.62, 0.0), xytext=(0, 6), textcoords="offset points", ha="center",
                   fontsize=9)  # fmt: skip
    left.legend(loc="center right", bbox_to_anchor=(1.0, 0.27), frameon=False, fontsize=9)
    save(figure, path)


# ---- what was learnt and kept ----


def kept_points(record: Path) -> tuple[float, dict[str, dict[float, list[tuple[float, float]]]]]:
    """What the base knew of the new task; for each arm and learning rate (learnt, kept) of every seed, at the end.

    Learnt: likelihood of a token of the right answers to test questions. Kept: likelihood of a token of the base's own
    answers to other prompts, relative to the base's.
    """
    part = json.loads(record.read_text(encoding="utf-8"))[KEPT_PART]
    points: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in part["runs"]:
        point = math.exp(-run["end"]["test/nll"]), run["end"]["text"]
        points.setdefault(run["arm"], {}).setdefault(run["rate"], []).append(point)
    return math.exp(-part["base"]["test/nll"]), points


def draw_kept(record: Path, rates: Path, path: Path) -> None:
    """Kept against learnt: a large mark for each method's mean at one rate, a small one per seed, the base as a cross.

    Args:
        record: the arms at one rate.
        rates: some of them at several, each a line over its rates.
    """
    from qpsft.compare.figures import STYLES

    base, points = kept_points(record)
    figure, (axes,) = new_figure(1, width=7.0, height=4.6)
    axes.plot(base, 1.0, "kx", markersize=10)
    axes.annotate("the base", (base, 1.0), xytext=(9, -4), textcoords="offset points", fontsize=9, color="0.3")
    for arm, tried in kept_points(rates)[1].items():
        line = [seeds[0] for _, seeds in sorted(tried.items())]
        axes.plot(*zip(*line, strict=True), color=STYLES[arm]["color"], linewidth=1, marker=".", alpha=0.7)
    for arm, label in KEPT_ARMS.items():
        (seeds,) = points[arm].values()
        style = {"color": STYLES[arm]["color"], "marker": STYLES[arm]["marker"], "linestyle": "none"}
        mean = [sum(axis) / len(axis) for axis in zip(*seeds, strict=True)]
        axes.plot(*zip(*seeds, strict=True), markersize=4, alpha=0.5, **style)
        axes.plot(*mean, markersize=10, label=f"{label} ({len(seeds)})", **style)
    axes.legend(loc="lower center", frameon=False, fontsize=9, title="(seeds)", title_fontsize=8)
    axes.set_xlabel("learnt: likelihood of a token of the right answers")
    axes.set_ylabel("kept: likelihood of its own texts")
    axes.set_title("SmolLM2-135M-Instruct, equations of which 30 % are wrong; lines: other rates", fontsize=10)
    save(figure, path)


# ---- the runs ----


def log_of(name: str, folder: Path, *, steps: int = STEPS, flags: Sequence[str] = ()) -> list[dict]:
    """The log lines of a run, which is done unless `folder` holds it already."""
    from qpsft import cli
    from qpsft.train.progress import read_metrics

    metrics = folder / name / "metrics.jsonl"
    if not metrics.exists():
        # a constant rate, so that no change of the rate is seen in the curves
        fixed = ["--logging_steps=1", "--lr_scheduler_type=constant_with_warmup"]
        command = ["train", str(RECIPE), f"--max_steps={steps}", *fixed, *RUNS[name], *flags]
        print("$ qpsft", *command, flush=True)
        if cli.main([*command, f"--output_dir={folder / name}", "--overwrite"]) != 0:
            raise SystemExit(f"the run {name} failed")
    return [line for line in read_metrics(metrics) if "nll" in line]


def draw_good(lines: Sequence[dict], path: Path) -> None:
    """Six numbers of the good run."""
    figure, panels = new_figure(6, legend=True)
    for axes, name in zip(panels, ("loss", "nll", "entropy", "clip_fraction", "approx_kl", "ratio_max"), strict=True):
        plot(axes, name, lines, color="0.1", linewidth=1.3, label="good: the recipe as it is")
    finish(figure, panels, path, snapshots=snapshots(lines))


def draw_failure(name: str, good: Sequence[dict], bad: Sequence[dict], path: Path) -> None:
    """The numbers that tell a failure, beside the good run's."""
    figure, panels = new_figure(3, legend=True)
    if name == "dropout":
        # the noise is seen best before the policy has moved, and where no token's ratio is extreme: not in the first
        # block, in which a base that finds the demonstrations absurd learns their style
        first, second = snapshots(good)[1:3]
        good, bad = ([mean_of(lines, first + i, second + i) for i in range(SINCE)] for lines in (good, bad))
    for axes, metric in zip(panels, SHOWN[name], strict=True):
        plot(axes, metric, good, **GOOD)
        plot(axes, metric, bad, label=TITLES[name], **BAD)
        if name == "dropout":
            axes.set_xlabel("steps since the snapshot")
            for line in axes.get_lines():
                line.set_marker(".")
    finish(figure, panels, path, snapshots=[] if name == "dropout" else snapshots(good))


def guarded_run(name: str, folder: Path, flags: Sequence[str] = ()) -> list[dict]:
    """All log lines of a run of GUARDED: the recipe and the old rows are those of docs/guard.md."""
    from qpsft import cli
    from qpsft.train.progress import read_metrics

    if not (folder / name / "metrics.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = GUARD.read_text(encoding="utf-8")
        (folder / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        with contextlib.chdir(folder):
            exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})  # writes old.jsonl
            if cli.main(["train", "recipe.yaml", *GUARDED[name], f"--output_dir={name}", *flags]) != 0:
                raise SystemExit(f"the run {name} failed")
    return read_metrics(folder / name / "metrics.jsonl")


def draw_guard(stopped: Sequence[dict], unstopped: Sequence[dict], path: Path) -> None:
    """Old and new skill of a run that the guard ended, and as they would have gone on."""
    figure, panels = new_figure(2, width=4.6, height=3.1, legend=True)
    written = [line for line in stopped if "guard_limit" in line][-2]["step"]
    for axes, name, title in (
        (panels[0], "guard_accuracy", "old skill: accuracy on old.jsonl"),
        (panels[1], "eval_loss", "new skill: nll of the test rows, nats per token"),
    ):
        for lines, style in ((unstopped, GOOD | {"label": "without the guard"}), (stopped, BAD | {"label": "with it"})):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), marker=".", **style)
        axes.axvline(written, color="0.3", linewidth=1, linestyle=":", label="the adapter that is written")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
    limit = next(line["guard_limit"] for line in stopped if "guard_limit" in line)
    panels[0].axhline(limit, color="0.3", linewidth=1, linestyle="--", label="limit: 0.05 below the base")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def snapshots(lines: Sequence[dict]) -> list[int]:
    """The steps right after a snapshot (step numbers from 1), as the recipe has them."""
    return list(range(WARMUP + 1, lines[-1]["step"] + 1, BLOCK))


def mean_of(lines: Sequence[dict], *steps: int) -> dict[str, float]:
    """Means of the numbers over some steps; `step` counts from the first snapshot of the recipe."""
    chosen = [line for line in lines if line["step"] in steps]
    means = {name: sum(line[name] for line in chosen) / len(chosen) for name in PANELS}
    return means | {"step": (steps[0] - WARMUP - 1) % BLOCK}


def plot(axes: Axes, name: str, lines: Sequence[dict], **style: Any) -> None:
    if name == "loss":
        lines = [line for line in lines if line["loss"] < 0]  # not of the warm-up, where it is the NLL
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], **style)
    title, unit = PANELS[name]
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    if name == "ratio_max":
        axes.set_yscale("log")
    if name == "approx_kl":
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=-0.003)


def finish(figure: Figure, panels: Sequence[Axes], path: Path, *, snapshots: Sequence[int]) -> None:
    """Thin lines at the snapshots, one legend below all panels, and the file."""
    for axes in panels:
        for number, step in enumerate(snapshots):
            label = "right after a snapshot" if number == 0 else None
            axes.axvline(step, color="0.8", linewidth=0.9, linestyle=(0, (4, 2)), zorder=0, label=label)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def new_figure(count: int, *, width: float = 3.3, height: float = 2.6, legend: bool = False) -> tuple[Figure, list]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    size = (width * columns, height * rows + (0.3 if legend else 0.0))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.margins(x=0.02)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of few colours, which is a third of the bytes."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder, and use those that are there")
    parser.add_argument("--output", type=Path, default=HERE / "img", help="default: docs/img")
    options = parser.parse_args()
    wanted = options.figures or FIGURES
    unknown = set(wanted) - {*FIGURES}
    if unknown:
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    quiet_libraries()
    import torch

    torch.set_num_threads(1)
    if "clip" in wanted:
        draw_clip(options.output / "clip.png")
    if "kept" in wanted:
        draw_kept(KEPT, KEPT_RATES, options.output / "kept.png")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        for name in wanted:
            if name == "good":
                draw_good(log_of("good", folder), options.output / "good.png")
            elif name == "guard":
                draw_guard(*(guarded_run(run, folder / "guard") for run in GUARDED), options.output / "guard.png")
            elif name not in ("clip", "kept"):
                draw_failure(name, log_of("good", folder), log_of(name, folder), options.output / f"{name}.png")


if __name__ == "__main__":
    main()
