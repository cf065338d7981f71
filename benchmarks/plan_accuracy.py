"""`qpsft plan` against the memory that training really takes: real shapes x lengths x checkpointing x optimizers.

    python benchmarks/plan_accuracy.py --minutes 9                  on a CUDA card; run it until it says done
    python benchmarks/plan_accuracy.py --shapes qwen2.5-0.5b        some of the grid

For each cell the plan is made from config.json alone; then PSFT trains three steps on rows of that length, and
torch.cuda.max_memory_allocated says what they took. The bar is 10 % either way. A cell that the plan puts beyond the
card is tried all the same, up to 1.3 times the card: running out of memory there is what the plan said.
Cells are kept in benchmarks/results/plan_accuracy_DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import AGAIN, GIB, GOAL_MISSED, RESULTS, Budget, Results, clean_up, describe, environment, slug
from real_shapes import SHAPES, build_model, config_of
from step_goals import ARMS
from step_grid import PEAK_STEPS, Cell, make_config, peak_memory
from transformers import PreTrainedModel

from qpsft.model.hardware import compute_dtype_for
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.file import Recipe

BAR = 0.10
ARM = {"psft K=8": ARMS["psft K=8"]}
WORTH_TRYING = 1.3
LENGTHS = "512,1024,2048,4096,8192"
OPTIMIZERS = "adamw_torch_fused,adamw_8bit"


def grid(shapes: list[str], lengths: list[int], optimizers: list[str]) -> list[Cell]:
    """Every combination, model by model, so that each is built once; short rows first."""
    return [
        Cell(shape, 1, length, rows=2, checkpointing=checkpointing, optim=optim)
        for shape, length, checkpointing, optim in itertools.product(shapes, lengths, (True, False), optimizers)
    ]


def planned_bytes(cell: Cell, device: str) -> int:
    """The plan's peak for a cell on this machine, from the shape's config alone."""
    from qpsft.plan import make_plan
    from qpsft.plan.cards import this_card

    card = this_card() if device == "cuda" else None
    dtype = compute_dtype_for(device)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_config("psft", ARM["psft K=8"], cell, dtype, out, PEAK_STEPS)
    lora = LoraArguments(lora_r=cell.rank, lora_alpha=2 * cell.rank)
    model = ModelArguments(attn_implementation=cell.attention)
    recipe = Recipe(None, {}, model, lora, DataArguments(), RunArguments(), trainer)
    return make_plan(recipe, config=config_of(cell.shape), card=card, device=device).peak_bytes


def judge(planned: int, measured: int | None, card: float) -> str:
    """`ok` within BAR of what was measured, else `too low` or `too high`; out of memory: what the plan should say.

    Args:
        planned: the plan's peak, bytes. measured: None: training ran out of memory. card: the card's bytes.
    """
    if measured is None:
        return "ok" if planned > card * (1 - BAR) else "too low"
    if abs(planned / measured - 1) <= BAR:
        return "ok"
    return "too low" if planned < measured else "too high"


def measure_cell(base: PreTrainedModel, cell: Cell, planned: int, card: float, device: str) -> dict[str, Any]:
    """Trains a cell and holds the plan against it."""
    start, measured, error = time.perf_counter(), None, None
    if planned <= WORTH_TRYING * card:
        try:
            measured = peak_memory(base, cell, ARM, device)[0]["psft K=8"]
        except torch.OutOfMemoryError:
            pass
        clean_up(device)
        error = None if measured is None else planned / measured - 1
    return {
        **cell.to_dict(),
        "planned_bytes": planned,
        "measured_bytes": measured,
        "relative_error": error,
        "tried": planned <= WORTH_TRYING * card,
        "verdict": judge(planned, measured, card),
        "cell_seconds": time.perf_counter() - start,
    }


def run_grid(
    cells: list[Cell], results: Results, budget: Budget, card: float, device: str, plan: Callable[[Cell], int]
) -> bool:
    """Measures the cells that `results` does not have yet, as far as the budget goes. True when none is left."""
    shape, base, slowest = None, None, 0.0
    for cell in cells:
        if cell.key in results.cells:
            continue
        if not budget.allows(slowest * 1.5):
            print(f"{budget.left:.0f} s are left; run the command again")
            return False
        start = time.perf_counter()
        if cell.shape != shape:
            base = None  # two models need not fit together
            clean_up(device)
            base, shape = build_model(cell.shape, device), cell.shape
        kept = measure_cell(base, cell, plan(cell), card, device)
        results.add(cell.key, kept)
        print(line(cell, kept), flush=True)
        slowest = max(slowest, time.perf_counter() - start)
    return True


def line(cell: Cell, kept: dict[str, Any]) -> str:
    measured, error = kept["measured_bytes"], kept["relative_error"]
    shown = "not tried" if not kept["tried"] else "out of memory" if measured is None else f"{measured / GIB:.2f} GiB"
    how = f"{'checkpointed' if cell.checkpointing else '':<13}{cell.optim.removeprefix('adamw_'):<12}"
    share = "" if error is None else f"{error:+.1%}"
    return (
        f"{cell.shape:<13}{cell.length:>5} {how}{kept['planned_bytes'] / GIB:>6.2f}{shown:>14}{share:>7} "
        f"{kept['verdict']}"
    )


def summary(cells: list[dict[str, Any]]) -> str:
    errors = [abs(cell["relative_error"]) for cell in cells if cell["relative_error"] is not None]
    ok = sum(cell["verdict"] == "ok" for cell in cells)
    text = f"{ok} of {len(cells)} cells within {BAR:.0%}"
    if errors:
        text += f"; error median {statistics.median(errors):.1%}, largest {max(errors):.1%}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(shape for shape in SHAPES if shape != "tiny"))
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--optimizers", default=OPTIMIZERS)
    parser.add_argument("--minutes", type=float, default=None, help="begin no cell that will not end within so many")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("plan_accuracy.py needs a CUDA card: the plan is of one.", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    budget, found = Budget(args.minutes), environment("cuda")
    print(describe(found))
    results = Results(args.results / f"plan_accuracy_{slug(found['device'])}.json", found)
    card = float(found["device_memory_bytes"])
    cells = grid(args.shapes.split(","), [int(n) for n in args.lengths.split(",")], args.optimizers.split(","))
    done = run_grid(cells, results, budget, card, "cuda", lambda cell: planned_bytes(cell, "cuda"))
    measured = [results.cells[cell.key] for cell in cells if cell.key in results.cells]
    print(summary(measured))
    return AGAIN if not done else 0 if all(cell["verdict"] == "ok" for cell in measured) else GOAL_MISSED


if __name__ == "__main__":
    sys.exit(main())
