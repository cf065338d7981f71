"""What a step of PSFT costs beside a step of trl.SFTTrainer, measured in one process, turn by turn.

    python benchmarks/step_cost.py --threads 1                         the embedded base on a CPU
    python benchmarks/step_cost.py --device cuda --minutes 9           the grid, on a model of a real shape
    python benchmarks/step_cost.py --device cuda --profile             where the time of a step goes

Without --device and --shape, three trainers on their own copies of one NF4 base, with the same rows, adapter and
settings (micro-batch 1 x accumulation 8, gradient checkpointing on), take turns after every optimizer step, so that
other load on the machine meets all of them alike:

    trl    trl.SFTTrainer as it is (its adapter is bfloat16: it rounds what PEFT made), loss_type nll
    nll    qpsft's trainer with plain SFT: what the float32 adapter, the logged numbers and the checks cost
    psft   qpsft's trainer with PSFT: the same, and the reference pass

A step is everything between the ends of two optimizer steps. The first block is not counted. PSFT's snapshot steps
need no reference pass, so its median, mostly of the other steps, is rather too high; `per block` compares whole blocks,
the same rows for both, and is the ratio over a run. Rows are random tokens of random lengths: the time does not
depend on which tokens they are.

The grid (step_grid.py) adds K = 2, 4, 8, 16, four visits, peak memory, and the goals as PASS or FAIL (step_goals.py).
Rows there have one length. It keeps each cell in benchmarks/results/step_cost_DEVICE.json as soon as it is measured,
and the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

FIRST_CELL = 120.0  # seconds that the first cell of a grid is thought to take on a GPU, before one is measured
LIMIT = 1.25
CELLS = "1x512,2x1024,8x2048,1x2048,8x512,4x1024,1x1024,2x512,2x2048,4x512,4x2048,8x1024"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps that count (default: 40; grid: 8)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--no_checkpointing", action="store_true", help="gradient checkpointing off")

    one = parser.add_argument_group("the three trainers")
    one.add_argument("--model", default="demo", help="`demo` (the embedded base), a folder or a Hub id")
    one.add_argument("--reference_steps", type=int, default=8, help="K; --steps is a multiple of K x V")
    one.add_argument("--num_iterations", type=int, default=1, help="V")
    one.add_argument("--length", type=int, default=128, help="tokens of the longest row; the shortest has a quarter")
    one.add_argument("--micro_batch", type=int, default=1, help="rows per micro-batch")
    one.add_argument("--accumulation", type=int, default=8, help="micro-batches per optimizer step")
    one.add_argument("--score_token_budget", type=int, default=None, help="as in PSFTConfig")
    one.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's processor time, which other load on the machine does not lengthen (CPU runs only)",
    )
    one.add_argument("--json", default=None, metavar="FILE", help="write the numbers there too")

    grid = parser.add_argument_group("the grid")
    grid.add_argument("--device", choices=["cuda", "cpu"], default=None, help="cuda: the grid on a GPU")
    grid.add_argument("--shape", default=None, help="of real_shapes.py (default with --device cuda: llama-3.1-8b)")
    grid.add_argument("--cells", default=CELLS, help="micro-batch x length, in this order (default: %(default)s)")
    grid.add_argument("--arms", default=None, help="of step_goals.py, separated by commas (default: all)")
    grid.add_argument("--rows", type=int, default=8, help="rows per optimizer step")
    grid.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    grid.add_argument("--rank", type=int, default=16, help="of the adapter, on all linear layers")
    grid.add_argument("--optim", default="adamw_torch_fused", help="as in TrainingArguments")
    grid.add_argument("--attn_implementation", default=None, help="as in transformers")
    grid.add_argument("--minutes", type=float, default=None, help="begin no cell that will not end within so many")
    grid.add_argument("--results", default=None, metavar="FOLDER", help="default: benchmarks/results")
    grid.add_argument("--profile", action="store_true", help="profile some steps of the first cell instead")
    return parser.parse_args(arguments)


def make_trainers(args: argparse.Namespace, out: str, clocks: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from real_shapes import random_rows
    from trl import SFTConfig, SFTTrainer

    from qpsft import PSFTConfig, PSFTTrainer, load_base

    skipped = args.reference_steps * args.num_iterations
    shared = dict(
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulation,
        gradient_checkpointing=not args.no_checkpointing,
        train_sampling_strategy="sequential",
        max_steps=args.steps + skipped,
        max_length=args.length,
        learning_rate=1e-4,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    psft = dict(
        lr_scheduler_type="linear",
        warmup_steps=0,
        reference_steps=args.reference_steps,
        num_iterations=args.num_iterations,
        block_order=True,
        score_token_budget=args.score_token_budget,
    )
    models = {name: load_base(args.model, quantization="nf4", verbose=False) for name in clocks}
    dtype = models["trl"][0].dtype
    half = dict(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    configs = {  # all before the first trainer: making one resets accelerate's state
        name: SFTConfig(f"{out}/trl", **half, **shared)
        if name == "trl"
        else PSFTConfig(f"{out}/{name}", loss_type=name, **psft, **shared)
        for name in clocks
    }
    rows_needed = shared["max_steps"] * args.micro_batch * args.accumulation
    trainers: dict[str, Any] = {}
    for name, (model, tokenizer) in models.items():
        trainers[name] = (SFTTrainer if name == "trl" else PSFTTrainer)(
            model,
            args=configs[name],
            train_dataset=random_rows(
                rows_needed, args.length, model.config.vocab_size, ragged=True, prompt_share=1 / 3
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clocks[name]],
        )
        clocks[name].watch(trainers[name])
    return trainers


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the three trainers in turns. Returns the numbers that are printed; times in seconds."""
    import torch
    from turns import StepClock, Turns, clock_of, train_in_turns

    names = ["trl", "nll", "psft"]
    turns = Turns(names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clocks = {name: StepClock(name, turns, clock_of(device, args.clock)) for name in names}
    with tempfile.TemporaryDirectory() as out:
        train_in_turns(make_trainers(args, out, clocks), turns, args.threads)

    block = args.reference_steps * args.num_iterations
    counted = {name: clock.steps[block:] for name, clock in clocks.items()}
    median = {name: statistics.median(step.seconds for step in steps) for name, steps in counted.items()}
    blocks = {
        name: [sum(s.seconds for s in steps[i : i + block]) for i in range(0, len(steps) - block + 1, block)]
        for name, steps in counted.items()
    }
    per_block = {
        name: statistics.median(mine / trl for mine, trl in zip(blocks[name], blocks["trl"], strict=True))
        for name in ("nll", "psft")
    }
    total = {name: sum(step.seconds for step in steps) for name, steps in counted.items()}
    return {
        "median_step_seconds": median,
        "ratio": {name: median[name] / median["trl"] for name in ("nll", "psft")},
        "ratio_per_block": per_block,
        "psft_over_nll": median["psft"] / median["nll"],
        "reference_share": sum(step.scoring for step in counted["psft"]) / total["psft"],
        "steps": len(counted["psft"]),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def three_trainers(args: argparse.Namespace) -> int:
    args.steps = 40 if args.steps is None else args.steps
    with contextlib.redirect_stdout(None):
        result = measure(args)
    for name, label in (("trl", "trl.SFTTrainer"), ("nll", "qpsft nll"), ("psft", "qpsft psft")):
        line = f"{label:15} median step {result['median_step_seconds'][name] * 1000:8.1f} ms"
        if name != "trl":
            line += f"   {result['ratio'][name]:5.2f} x trl   per block {result['ratio_per_block'][name]:5.2f} x"
        print(line)
    share, over_nll = result["reference_share"], result["psft_over_nll"]
    print(f"reference pass  {share:.0%} of PSFT's time; psft is {over_nll:.2f} x nll")
    settings = f"{args.clock} clock, K = {args.reference_steps}, V = {args.num_iterations}"
    print(f"{result['steps']} steps, {settings}, {result['machine']}, {result['device']}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["ratio"]["psft"] <= LIMIT else 1


def the_grid(args: argparse.Namespace) -> int:
    """Measures cells until the time is up. Returns 0, machine.AGAIN or machine.GOAL_MISSED."""
    from machine import AGAIN, GOAL_MISSED, RESULTS, Budget, Results, describe, device_name, environment, slug
    from real_shapes import SHAPES, build_model
    from step_goals import ARMS
    from step_grid import Cell, run_grid

    named = args.arms.split(",") if args.arms else list(ARMS)
    for kind, names, known in (("shape", [args.shape] if args.shape else [], SHAPES), ("arm", named, ARMS)):
        if wrong := [name for name in names if name not in known]:
            print(f"error: There is no {kind} {wrong[0]}. Use one of {', '.join(known)}.", file=sys.stderr)
            return 2
    budget = Budget(args.minutes)
    device, shape = args.device or "cpu", args.shape or "llama-3.1-8b"
    sizes = [tuple(map(int, cell.split("x"))) for cell in args.cells.split(",")]
    settings = dict(
        rows=args.rows,
        rank=args.rank,
        checkpointing=not args.no_checkpointing,
        optim=args.optim,
        attention=args.attn_implementation,
        steps=args.steps or 8,
        warmup=args.warmup,
    )
    cells = [Cell(shape, *size, **settings) for size in sizes]
    arms = {name: ARMS[name] for name in named}
    folder = Path(args.results or RESULTS)
    found = environment(device)
    print(describe(found))
    if args.profile:
        from profiling import profile_cell

        return profile_cell(cells[0], arms, folder / f"profile_{slug(device_name(device))}.json", found, device)
    results = Results(folder / f"step_cost_{slug(device_name(device))}.json", found)
    if all(cell.key in results.cells for cell in cells):
        done = True
    else:
        done = run_grid(
            build_model(shape, device, attn_implementation=args.attn_implementation),
            cells,
            arms,
            results,
            budget,
            device,
            # building took its part of the time; half of a call must always do, or it would never begin
            first_seconds=min(FIRST_CELL, 60 * args.minutes / 2) if args.minutes and device == "cuda" else 0.0,
        )
    goals = [goal for cell in cells for goal in results.cells.get(cell.key, {}).get("goals", [])]
    missed = sum(goal["passed"] is False for goal in goals)
    measured = sum(goal["passed"] is not None for goal in goals)
    print(f"{results.path}: {measured - missed} of {measured} measured goals passed")
    return AGAIN if not done else GOAL_MISSED if missed else 0


def main(arguments: list[str] | None = None) -> int:
    args = options(arguments)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        import torch

        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    return the_grid(args) if args.device == "cuda" or args.shape else three_trainers(args)


if __name__ == "__main__":
    sys.exit(main())
