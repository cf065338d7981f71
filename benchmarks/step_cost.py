"""What a step of PSFT costs beside a step of trl.SFTTrainer, measured in one process, turn by turn.

    python benchmarks/step_cost.py --threads 1

Three trainers on their own copies of one NF4 base, with the same rows, adapter and settings (micro-batch 1 ×
accumulation 8, gradient checkpointing on), take turns after every optimizer step, so that other load on the machine
meets all of them alike:

    trl    trl.SFTTrainer as it is (its adapter is bfloat16: it rounds what PEFT made), loss_type nll
    nll    qpsft's trainer with plain SFT: what the float32 adapter, the logged numbers and the checks cost
    psft   qpsft's trainer with PSFT: the same, and the reference pass

A step is everything between the ends of two optimizer steps. The first block is not counted. PSFT's snapshot steps
need no reference pass, so its median, mostly of the other steps, is rather too high; `per block` compares whole blocks,
the same rows for both, and is the ratio over a run. Rows are random tokens of random lengths: the time does not
depend on which tokens they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 1.25


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps that count, a multiple of K x V")
    parser.add_argument("--model", default="demo", help="`demo` (the embedded base), a folder or a Hub id")
    parser.add_argument("--reference_steps", type=int, default=8, help="K")
    parser.add_argument("--num_iterations", type=int, default=1, help="V")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row; the shortest has a quarter")
    parser.add_argument("--micro_batch", type=int, default=1, help="rows per micro-batch")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches per optimizer step")
    parser.add_argument("--score_token_budget", type=int, default=None, help="as in PSFTConfig")
    parser.add_argument("--no_checkpointing", action="store_true", help="gradient checkpointing off")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's processor time, which other load on the machine does not lengthen (CPU runs only)",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


class Turns:
    """Lets several threads run one at a time, in a fixed order."""

    def __init__(self, names: list[str]):
        self.order = list(names)
        self.turn = 0
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.order[self.turn % len(self.order)] == name)

    def hand_over(self) -> None:
        with self.changed:
            self.turn += 1
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            following = self.order[(self.turn + 1) % len(self.order)]
            self.order.remove(name)
            self.turn = self.order.index(following) if self.order else 0
            self.changed.notify_all()


def turn_callback(name: str, turns: Turns, seconds: list[float], clock: Callable[[], float]) -> Any:
    """A TrainerCallback that ends the turn of `name` after every optimizer step and notes how long it took."""
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.wait(name)
            self.since = clock()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(clock() - self.since)
            turns.hand_over()
            turns.wait(name)
            self.since = clock()

    return Turn()


def random_rows(count: int, longest: int, vocabulary: int) -> Any:
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for _ in range(count):
        length = int(torch.randint(longest // 4, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * (length // 3) + ids[length // 3 :])
    return Dataset.from_dict(rows)


def make_trainers(args: argparse.Namespace, out: str, turns: Turns) -> tuple[dict[str, Any], dict[str, list[float]]]:
    import torch
    from peft import LoraConfig
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
    models = {name: load_base(args.model, quantization="nf4", verbose=False) for name in turns.order}
    dtype = models["trl"][0].dtype
    half = dict(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    configs = {  # all before the first trainer: making one resets accelerate's state
        name: SFTConfig(f"{out}/trl", **half, **shared)
        if name == "trl"
        else PSFTConfig(f"{out}/{name}", loss_type=name, **psft, **shared)
        for name in turns.order
    }
    rows_needed = shared["max_steps"] * args.micro_batch * args.accumulation
    seconds: dict[str, list[float]] = {name: [] for name in turns.order}
    trainers: dict[str, Any] = {}
    for name, (model, tokenizer) in models.items():
        trainers[name] = (SFTTrainer if name == "trl" else PSFTTrainer)(
            model,
            args=configs[name],
            train_dataset=random_rows(rows_needed, args.length, model.config.vocab_size),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[turn_callback(name, turns, seconds[name], clock_of(args))],
        )
    return trainers, seconds


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.clock == "cpu" else time.perf_counter


def timed(function: Callable, seconds: list[float], clock: Callable[[], float]) -> Callable:
    def inner(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(clock() - start)

    return inner


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the trainers in turns. Returns the numbers that are printed; times in seconds."""
    import torch

    turns = Turns(["trl", "nll", "psft"])
    failures: list[BaseException] = []
    scoring: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        trainers, seconds = make_trainers(args, out, turns)
        trainers["psft"]._score = timed(trainers["psft"]._score, scoring, clock_of(args))

        def run(name: str) -> None:
            if args.threads:
                torch.set_num_threads(args.threads)
            try:
                trainers[name].train()
            except BaseException as error:
                failures.append(error)
            finally:
                turns.leave(name)

        threads = [threading.Thread(target=run, args=(name,)) for name in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]

    block = args.reference_steps * args.num_iterations
    counted = {name: steps[block:] for name, steps in seconds.items()}
    median = {name: statistics.median(steps) for name, steps in counted.items()}
    blocks = {
        name: [sum(steps[i : i + block]) for i in range(0, len(steps) - block + 1, block)]
        for name, steps in counted.items()
    }
    per_block = {
        name: statistics.median(mine / trl for mine, trl in zip(blocks[name], blocks["trl"], strict=True))
        for name in ("nll", "psft")
    }
    first_block_passes = (args.reference_steps - 1) if len(scoring) else 0
    return {
        "median_step_seconds": median,
        "ratio": {name: median[name] / median["trl"] for name in ("nll", "psft")},
        "ratio_per_block": per_block,
        "psft_over_nll": median["psft"] / median["nll"],
        "reference_share": sum(scoring[first_block_passes:]) / sum(counted["psft"]),
        "steps": len(counted["psft"]),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def main() -> int:
    args = options()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    warnings.simplefilter("ignore")
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


if __name__ == "__main__":
    raise SystemExit(main())
