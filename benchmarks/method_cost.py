"""What a step of each method costs beside a step of plain SFT: time, turn by turn in one process, and peak memory.

    python benchmarks/method_cost.py --threads 1                    the embedded base on a CPU
    python benchmarks/method_cost.py --model Qwen/Qwen2.5-0.5B-Instruct --length 1024

All methods of `qpsft.recipe.methods` but replay, whose steps are PSFT's, on their own copies of one NF4 base, with the
same rows, adapter and settings. They take turns after every optimizer step, so that other load meets all of them
alike. What happens once (the base's scores for STM) is told apart. Memory is measured in a second, slower pass.
Results: benchmarks/results/method_cost.json; docs/methods.md quotes them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, Results, environment, memory_meter
from peft import LoraConfig
from real_shapes import random_rows
from transformers import TrainerCallback
from turns import StepClock, Turns, clock_of, train_in_turns

from qpsft import PSFTConfig, PSFTTrainer, load_base
from qpsft.recipe.methods import METHODS, method_options

COMPARED = [name for name in METHODS if not name.endswith("replay")]


def make_trainer(name: str, args: argparse.Namespace, out: str, steps: int, callback: TrainerCallback | None) -> Any:
    model, tokenizer = load_base(args.model, quantization="nf4", verbose=False)
    config = PSFTConfig(
        f"{out}/{name}",
        **method_options(name, {}) | {"sft_warmup_steps": 0},
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulation,
        train_sampling_strategy="sequential",
        max_steps=steps,
        max_length=args.length,
        learning_rate=1e-4,
        warmup_steps=0,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    count = steps * args.micro_batch * args.accumulation
    trainer = PSFTTrainer(
        model,
        args=config,
        train_dataset=random_rows(count, args.length, model.config.vocab_size, ragged=True, prompt_share=1 / 3),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback] if callback else [],
    )
    return trainer


def times(args: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Seconds of the counted steps, by method."""
    turns = Turns(COMPARED)
    clocks = {name: StepClock(name, turns, clock_of(device, args.clock)) for name in COMPARED}
    with tempfile.TemporaryDirectory() as out:
        trainers = {name: make_trainer(name, args, out, args.steps + args.skip, clocks[name]) for name in COMPARED}
        for name, trainer in trainers.items():
            clocks[name].watch(trainer)
        train_in_turns(trainers, turns, args.threads)
    return {name: [step.seconds for step in clock.steps[args.skip :]] for name, clock in clocks.items()}


def peak(name: str, args: argparse.Namespace, device: str) -> int:
    """Bytes that a short run has in memory at most, the base and the adapter included."""
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(name, args, out, 10, None)  # with 4 visits a block of 3 mini-batches: two are scored
        with memory_meter(device, [*trainer.model.parameters(), *trainer.model.buffers()]) as meter:
            trainer.train()
            return meter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` (the embedded base), a folder or a Hub id")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps that count: whole blocks of K = 8")
    parser.add_argument("--skip", type=int, default=8, help="steps before them")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row; the shortest has a quarter")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time (CPU runs only)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--results", type=Path, default=RESULTS / "method_cost.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = times(args, device)
    results = Results(args.results, environment(device))
    for name in COMPARED:
        ratios = [mine / sft for mine, sft in zip(seconds[name], seconds["sft"], strict=True)]
        cell = {
            "mean_seconds": statistics.mean(seconds[name]),
            "over_sft": statistics.mean(seconds[name]) / statistics.mean(seconds["sft"]),
            "over_sft_by_step": [round(ratio, 3) for ratio in ratios],
            "peak_bytes": peak(name, args, device),
        }
        results.add(f"{args.model} {name}", cell)
        print(f"{name:<14}{cell['over_sft']:6.2f} x SFT's time{cell['peak_bytes'] / 2**20:10.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
