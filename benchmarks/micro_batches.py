"""What the micro-batch costs on a CPU: the time of an optimizer step of 16 rows, split in other ways.

    OMP_NUM_THREADS=1 python benchmarks/micro_batches.py

PSFT in NF4 with float32 compute and LoRA of rank 8, by the process's own CPU clock; all splits in turns, each round on
the same rows: the embedded base on its noisy demonstrations, and four layers of SmolLM2-135M's width on random rows of
40 to 360 tokens. `qpsft train` chooses by these numbers (qpsft/plan/batch_sizes.py).
Results: benchmarks/results/micro_batches.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lora_linear import VOCABULARY, policy
from machine import RESULTS, environment
from packing import step_clock
from peft import LoraConfig

from qpsft import PSFTConfig, PSFTTrainer, load_base
from qpsft.data.tokenize import load_dataset
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import DEMO, resolve_folder
from qpsft.recipe.arguments import DataArguments

ROWS = 16
SPLITS = [(1, True), (2, True), (4, True), (8, True), (16, True), (2, False), (16, False)]
AS_BEFORE = "2 rows, checkpointing"


def embedded(count: int) -> tuple[Any, Any, Dataset]:
    model, tokenizer = load_base(DEMO, device="cpu", verbose=False)
    data = DataArguments(dataset_name="demo-noisy", dataset_limit=count)
    return model, tokenizer, load_dataset(data, tokenizer, 128, show_progress=False).dataset


def wide(count: int) -> tuple[Any, Any, Dataset]:
    tokenizer = load_tokenizer(resolve_folder(DEMO))
    torch.manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in torch.randint(40, 360, (count,)).tolist()]
    return policy(4, 8, "float32").unload(), tokenizer, Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_trainers(make: Any, steps: int, out: str) -> dict[str, tuple[Any, Any]]:
    trainers = {}
    for rows, checkpointing in SPLITS:
        model, tokenizer, dataset = make(ROWS * steps)
        clock = step_clock(time.process_time)
        name = f"{rows} rows, {'' if checkpointing else 'no '}checkpointing"
        config = PSFTConfig(
            f"{out}/{name}",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=ROWS // rows,
            gradient_checkpointing=checkpointing,
            reference_steps=4,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = {"args": config, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": [clock]}
        trainers[name] = PSFTTrainer(model, peft_config=lora, **settings), clock
    return trainers


def compare(make: Any, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, the first of each round left out, and each split's time over that of 2 x 8."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as out:
        trainers = make_trainers(make, steps, out)
        for _ in range(rounds):
            for name, (trainer, clock) in trainers.items():
                trainer.train()
                seconds.setdefault(name, []).append(statistics.mean(clock.seconds[1:]))
        lengths = [len(ids) for ids in next(iter(trainers.values()))[0].train_dataset["input_ids"]]
    over = {name: [a / b for a, b in zip(times, seconds[AS_BEFORE], strict=True)] for name, times in seconds.items()}
    return {
        "row_length": {"mean": statistics.mean(lengths), "longest": max(lengths)},
        "over_2x8_median": {name: statistics.median(ratios) for name, ratios in over.items()},
        "over_2x8_by_round": over,
        "seconds_per_step": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "micro_batches.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"environment": environment("cpu")}
    for name, make in (("embedded base", embedded), ("SmolLM2-135M's width, 4 layers", wide)):
        with contextlib.redirect_stdout(None):
            result[name] = compare(make, options.steps, options.rounds)
        for split, ratio in result[name]["over_2x8_median"].items():
            print(f"{name}: {split:26} {ratio:.2f} of 2 x 8", flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
