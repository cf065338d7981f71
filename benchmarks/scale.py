"""Step time and memory against model size, row length, micro-batch, rank and K, plain SFT beside PSFT.

    python benchmarks/scale.py --device cuda --minutes 9       real shapes around Qwen2.5-1.5B; run until it says done
    python benchmarks/scale.py --device cpu --threads 1        models of 0.2 to 7 M parameters, four minutes

One factor at a time is moved away from a centre. Times are measured in turns in one process (on a CPU: processor time,
which other work on the machine does not lengthen), memory in separate runs (on a CPU: every tensor, by torch's
dispatcher). Points are kept in benchmarks/results/scale_DEVICE.json, so the command may be cut off and repeated; the
plot is scale_DEVICE.png beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import AGAIN, RESULTS, Budget, Results, clean_up, describe, device_name, environment, slug
from real_shapes import build_model, llama_shape
from step_goals import ARMS, Arm
from step_grid import Cell, measure_times, peak_memory
from transformers import PreTrainedModel

from qpsft.model.base_record import parameter_count

SMALL = {
    f"h{hidden}-l{layers}": llama_shape(hidden, layers) for hidden, layers in ((64, 2), (128, 4), (192, 6), (256, 8))
}
TWO_ARMS = {name: ARMS[name] for name in ("nll", "psft K=8")}


@dataclass(frozen=True)
class Sweep:
    """A centre and the values of each factor; K's are measured together, at the centre."""

    shapes: list[str]
    shape: str
    lengths: list[int]
    length: int
    micro_batches: list[int]
    micro_batch: int
    ranks: list[int]
    rank: int
    reference_steps: list[int]
    rows: int
    steps: int
    warmup: int

    def cells(self) -> dict[str, list[Cell]]:
        """Factor -> cells, the centre among them; those of K are one cell."""

        def cell(**moved: Any) -> Cell:
            centre = {"shape": self.shape, "micro_batch": self.micro_batch, "length": self.length, "rank": self.rank}
            return Cell(**centre | moved, rows=self.rows, steps=self.steps, warmup=self.warmup)

        return {
            "shape": [cell(shape=shape) for shape in self.shapes],
            "length": [cell(length=length) for length in self.lengths],
            "micro_batch": [cell(micro_batch=size) for size in self.micro_batches],
            "rank": [cell(rank=rank) for rank in self.ranks],
            "reference_steps": [cell()],
        }

    def arms_of_k(self) -> dict[str, Arm]:
        return {"nll": ARMS["nll"]} | {f"psft K={k}": Arm("psft", k) for k in self.reference_steps}


SWEEPS = {
    "cpu": Sweep(
        shapes=list(SMALL),
        shape="h128-l4",
        lengths=[64, 128, 256, 512],
        length=128,
        micro_batches=[1, 2, 4],
        micro_batch=2,
        ranks=[4, 16, 64],
        rank=16,
        reference_steps=[1, 2, 4, 8, 16],
        rows=4,
        steps=10,
        warmup=1,
    ),
    "cuda": Sweep(
        shapes=["qwen2.5-0.5b", "qwen2.5-1.5b", "gemma-2-2b", "qwen2.5-7b", "llama-3.1-8b"],
        shape="qwen2.5-1.5b",
        lengths=[512, 1024, 2048, 4096, 8192],
        length=1024,
        micro_batches=[1, 2, 4, 8],
        micro_batch=2,
        ranks=[8, 16, 32, 64, 128],
        rank=16,
        reference_steps=[1, 2, 4, 8, 16],
        rows=8,
        steps=16,
        warmup=2,
    ),
}
PANELS = {
    "shape": ("Model size", "parameters, millions"),
    "length": ("Length of the rows", "tokens"),
    "micro_batch": ("Micro-batch", "rows"),
    "rank": ("Rank of the adapter", "rank"),
    "reference_steps": ("Steps between snapshots", "K"),
}


def measure_point(base: PreTrainedModel, cell: Cell, arms: dict[str, Arm], device: str) -> dict[str, Any]:
    """Step times and peak memory of one point; of the point of K's the times alone, memory does not depend on K."""
    clock = "wall" if device == "cuda" else "cpu"
    try:
        peaks, _ = peak_memory(base, cell, arms, device) if arms is TWO_ARMS else ({}, {})
        times = measure_times(base, cell, arms, device, clock)
    except torch.OutOfMemoryError:
        return {**cell.to_dict(), "out_of_memory": True}
    return {
        **cell.to_dict(),
        "parameters": parameter_count(base),
        "clock": clock,
        "tokens_per_step": cell.tokens_per_step,
        "step_seconds": {name: numbers["step_seconds"] for name, numbers in times.items()},
        "scoring_share": {name: numbers["scoring_share"] for name, numbers in times.items()},
        "peak_bytes": peaks,
    }


def run_sweep(sweep: Sweep, results: Results, budget: Budget, device: str) -> bool:
    """Measures the points that `results` does not have yet, as far as the budget goes. True when none is left."""
    points = [(factor, cell) for factor, cells in sweep.cells().items() for cell in cells]
    points.sort(key=lambda point: point[1].shape)  # stable: each model is built once
    slowest, shape, base = 0.0, None, None
    for factor, cell in points:
        key = f"{cell.key}{' K' if factor == 'reference_steps' else ''}"
        if key in results.cells:
            continue
        if not budget.allows(slowest):
            print(f"{budget.left:.0f} s are left; run the command again")
            return False
        start = time.perf_counter()
        if cell.shape != shape:
            base = None  # two models need not fit together
            clean_up(device)
            base, shape = build_model(SMALL.get(cell.shape, cell.shape), device), cell.shape
        point = measure_point(base, cell, sweep.arms_of_k() if factor == "reference_steps" else TWO_ARMS, device)
        clean_up(device)
        results.add(key, point)
        slowest = max(slowest, time.perf_counter() - start)
        print(f"{key}: {summary(point)}", flush=True)
    return True


def summary(point: dict[str, Any]) -> str:
    if point.get("out_of_memory"):
        return "out of memory"
    seconds, peaks = point["step_seconds"], point["peak_bytes"]
    text = f"nll {seconds['nll'] * 1000:.0f} ms, PSFT {seconds['psft K=8'] / seconds['nll']:.2f} x"
    if peaks:
        text += f"; {peaks['nll'] / 2**20:.1f} MiB, PSFT {peaks['psft K=8'] / peaks['nll']:.3f} x"
    return text


def draw(sweep: Sweep, results: Results, path: Path, title: str) -> None:
    """Five factors in columns; step time above, peak memory below. Lines differ in dash, marker and grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {
        "nll": {"color": "0.55", "linestyle": "--", "marker": "s", "label": "plain SFT (nll)"},
        "psft K=8": {"color": "0.0", "linestyle": "-", "marker": "o", "label": "PSFT, K = 8"},
    }
    figure = Figure(figsize=(17, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(PANELS), squeeze=False)
    for column, (factor, (heading, unit)) in enumerate(PANELS.items()):
        above, below = panels[0][column], panels[1][column]
        if factor == "reference_steps":
            _draw_k(above, sweep, results)
            below.remove()  # memory does not depend on K
        else:
            cells = [results.cells.get(cell.key, {}) for cell in sweep.cells()[factor]]
            points = [point for point in cells if "step_seconds" in point]
            xs = [point["parameters"] / 1e6 if factor == "shape" else point[factor] for point in points]
            for name, style in styles.items():
                above.plot(xs, [point["step_seconds"][name] for point in points], **style)
                below.plot(xs, [point["peak_bytes"][name] / 2**20 for point in points], **style)
            below.set(xlabel=unit, ylabel="peak memory, MiB")
            for axes in (above, below):
                axes.set_xscale("log", base=2)
                axes.set_xticks(xs, [f"{x:.2g}" if x < 10 else f"{x:,.0f}" for x in xs], minor=False)
                axes.minorticks_off()
        above.set(title=heading, xlabel=unit, ylabel="seconds per optimizer step")
        for axes in (above, below):
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=80, format="png")


def _draw_k(axes: Any, sweep: Sweep, results: Results) -> None:
    point = results.cells.get(f"{sweep.cells()['reference_steps'][0].key} K", {})
    if "step_seconds" in point:
        seconds, ks = point["step_seconds"], sweep.reference_steps
        axes.axhline(seconds["nll"], color="0.55", linestyle="--")
        axes.plot(ks, [seconds[f"psft K={k}"] for k in ks], color="0.0", marker="o")
        bounds = [seconds["nll"] * (1 + (k - 1) / k / 3) for k in ks]
        axes.plot(ks, bounds, color="0.3", linestyle=":", marker="x", label="nll + (K - 1)/K of a forward")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.legend(frameon=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SWEEPS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--minutes", type=float, default=None, help="begin no point that will not end within so many")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    found, sweep = environment(args.device), SWEEPS[args.device]
    print(describe(found))
    results = Results(args.results / f"scale_{slug(device_name(args.device))}.json", found)
    done = run_sweep(sweep, results, Budget(args.minutes), args.device)
    clock = "wall time" if args.device == "cuda" else "processor time"
    measured = results.content["runs"][-1] if results.content["runs"] else found
    title = (
        f"Step time and peak memory of PSFT and plain SFT\n{describe(measured)}\n"
        f"{sweep.rows} rows per optimizer step, gradient checkpointing, reference on the device; {clock}"
    )
    picture = results.path.with_suffix(".png")
    draw(sweep, results, picture, title)
    print(f"{results.path}\n{picture}")
    return 0 if done else AGAIN


if __name__ == "__main__":
    sys.exit(main())
