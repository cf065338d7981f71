"""What packing gains on GSM8K's lengths: real tokens per second, padded, grouped by length and packed, turn by turn.

    python benchmarks/packing.py --threads 1

Three PSFT trainers on their own copies of one NF4 base, with the same rows, adapter and settings, train one after the
other, round after round, in one process, so that other load on the machine meets all of them alike:

    padded     rows in random order, padded to the longest of their micro-batch
    grouped    train_sampling_strategy: group_by_length
    packed     packing: true, rows of --max_length tokens

Micro-batches hold as many rows in all three, so none takes more memory than --micro_batch x --max_length tokens do. A
rate counts real tokens only, over whole optimizer steps, the reference pass included; the first step of a round does
not count. The tokens are those of the base's tokenizer (--model), GSM8K's questions and answers as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
ARMS = {
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/stories260K"), help="a folder, a Hub id or `demo`")
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"), help="rows of question and answer")
    parser.add_argument("--rows", type=int, default=1000, help="rows of the data")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens a row is cut at, and of a packed row")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows per micro-batch, packed or not")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps a round, the first not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference_steps", type=int, default=8, help="K")
    parser.add_argument("--no_checkpointing", action="store_true", help="gradient checkpointing off")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's processor time, which other load on the machine does not lengthen (CPU runs only)",
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def load_rows(args: argparse.Namespace, tokenizer: Any) -> Any:
    from qpsft.data.tokenize import load_dataset
    from qpsft.recipe.arguments import DataArguments

    data = DataArguments(
        dataset_name=args.data,
        dataset_limit=args.rows,
        dataset_columns={"prompt": "question", "completion": "answer"},
        prompt_format="{prompt}\n",
    )
    return load_dataset(data, tokenizer, args.max_length, show_progress=False).dataset


def step_clock(clock: Callable[[], float]) -> Any:
    """A TrainerCallback with `seconds`: how long every optimizer step took, its reference pass included."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.seconds: list[float] = []
            self.since = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(clock() - self.since)
            self.since = clock()

    return StepClock()


def make_trainers(args: argparse.Namespace, out: str) -> dict[str, tuple[Any, Any]]:
    from peft import LoraConfig

    from qpsft import PSFTConfig, PSFTTrainer, load_base

    trainers = {}
    for name, arm in ARMS.items():
        model, tokenizer = load_base(args.model, quantization="nf4", verbose=False)
        clock = step_clock(time.process_time if args.clock == "cpu" else time.perf_counter)
        config = PSFTConfig(
            f"{out}/{name}",
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.accumulation,
            gradient_checkpointing=not args.no_checkpointing,
            reference_steps=args.reference_steps,
            max_length=args.max_length,
            max_steps=args.steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
            **arm,
        )
        trainer = PSFTTrainer(
            model,
            args=config,
            train_dataset=load_rows(args, tokenizer),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainers[name] = trainer, clock
    return trainers


def tokens_of(trainer: Any, step: int) -> tuple[int, int]:
    """Real tokens of an optimizer step, and those that its micro-batches hold with their padding."""
    lengths = [len(trainer.train_dataset[r]["input_ids"]) for r in trainer._get_schedule().rows(step)]
    size = trainer.args.per_device_train_batch_size
    held = sum(size * max(lengths[i : i + size]) for i in range(0, len(lengths), size))
    return sum(lengths), held


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds. Returns the numbers that are printed."""
    import torch
    from machine import environment

    if args.threads:
        torch.set_num_threads(args.threads)
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    padding, rows = {}, {}
    with tempfile.TemporaryDirectory() as out:
        trainers = make_trainers(args, out)
        lengths = sorted(len(ids) for ids in trainers["padded"][0].train_dataset["input_ids"])
        for _ in range(args.rounds):
            for name, (trainer, clock) in trainers.items():
                trainer.train()
                counts = [tokens_of(trainer, step) for step in range(1, args.steps)]
                rates[name].append(sum(real for real, _ in counts) / sum(clock.seconds[1:]))
                padding[name] = 1 - sum(real for real, _ in counts) / sum(held for _, held in counts)
                rows[name] = len(trainer.train_dataset)
    gains = {name: [a / b for a, b in zip(rates[name], rates["padded"], strict=True)] for name in ARMS}
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "over_padded": {name: statistics.median(values) for name, values in gains.items()},
        "over_padded_by_round": gains,
        "padding_share": padding,
        "rows": rows,
        "row_length": {p: lengths[round(p / 100 * (len(lengths) - 1))] for p in (1, 50, 90, 99, 100)},
        "settings": {key: _named(value) for key, value in vars(args).items() if key != "json"},
        "attention": trainers["packed"][0].model.config._attn_implementation,
        **environment("cuda" if torch.cuda.is_available() else "cpu", ["benchmarks/packing.py", *sys.argv[1:]]),
    }


def _named(value: Any) -> Any:
    """Paths as seen from the repository, which stands elsewhere on every machine."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return os.path.relpath(value, Path(__file__).resolve().parents[1]) if is_path else value


def main() -> int:
    args = options()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(None):
        result = measure(args)
    from machine import describe

    for name in ARMS:
        line = (
            f"{name:8} {result['tokens_per_second'][name]:10,.0f} real tokens/s   {result['over_padded'][name]:5.2f} x"
        )
        print(f"{line}   {result['padding_share'][name]:5.1%} padding   {result['rows'][name]:,} rows")
    print(f"row lengths by percentile: {result['row_length']}, {result['attention']} attention")
    print(f"{args.clock} clock, {describe(result)}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
