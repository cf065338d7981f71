"""GRPO from adapters of SmolLM2-135M-Instruct, with SVAMP's answer as reward: which fine-tuning is the better start.

    python benchmarks/evidence_real.py --small ...     first: it measures the base, and samples its own answers
    OMP_NUM_THREADS=1 python benchmarks/rl_smollm2.py

Each start is trained as `evidence_real.py --small` does, on 350 rows of which 30 % are wrong; GRPO then goes on with
that adapter on questions that were in none of them, the reward being 1 for an answer that ends in the right number.
What is measured before and after is what that study measures. Each run is one JSON file in `results/evidence_real/rl`,
and its start's adapter is kept beside it, so a command that was cut off goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence_real
import rl_start
from evidence_real import Run
from evidence_real_parts import EQUATION_TOKENS, RIGHT, dense, svamp_row, svamp_split
from machine import environment

from qpsft.files import digest, write_atomically
from qpsft.terminal import text_table

PART = "svamp_noisy"
STARTS = ("sft", "sft_replay", "psft_visits")
COLUMNS = {
    "test/accuracy": "right", "test/nll": "NLL", "mt_bench/nll": "own answers, MT-bench: NLL", "user/nll": "users: NLL",
    "probe_words": "words",
}  # fmt: skip


def questions(data: Path, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """`{"prompt", "answer"}` of SVAMP's rows that were neither demonstrated nor held out."""
    train, validation, test = sizes
    rows = [svamp_row(row) for row in svamp_split(data)[train + validation : -test]]
    return [{"prompt": row["prompt"], "answer": row["completion"][0]["content"]} for row in rows]


def right(completions: list[list[dict]], answer: list[str], **other: Any) -> list[float]:
    """The reward: 1 for an answer that ends in the right number, else 0."""
    rows = [{"completion": [{"role": "assistant", "content": text}]} for text in answer]
    return [float(RIGHT(row, one[-1]["content"]) is True) for row, one in zip(rows, completions, strict=True)]


def trained_adapter(study: evidence_real.Study, run: Run, folder: Path) -> Path:
    """The start's adapter, trained as the study does if it is not there."""
    from qpsft.train.run import train

    if not (folder / "adapter_model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train(evidence_real.write_recipe(study, run, folder))
    return folder


def rl_run(study: evidence_real.Study, adapter: Path, plan: rl_start.Plan, rate: float, seed: int) -> dict[str, Any]:
    """One run of GRPO: `points` (before and after) and `log`, as `rl_start.watcher` has them."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    from qpsft import float32_adapter, load_base
    from qpsft.model.undisturbed import undisturbed

    model, tokenizer = load_base(study.model, dtype=study.dtype, device=study.device, verbose=False)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    measuring = AutoTokenizer.from_pretrained(study.model)  # of its own: the harness changes its tokenizer's padding

    def measure(is_end: bool) -> dict[str, float]:
        with undisturbed(model):
            return evidence_real.measure_model(study, PART, model, measuring, is_last=is_end)

    with tempfile.TemporaryDirectory() as folder, dense(model):
        with float32_adapter(model):
            trainer = GRPOTrainer(
                model=model,
                reward_funcs=right,
                args=rl_start.grpo_config(plan, rate, seed, model, Path(folder)),
                train_dataset=Dataset.from_list(questions(Path(study.data), study.rows[PART])),
                processing_class=tokenizer,
            )
        trainer.remove_callback(PrinterCallback)
        watch = rl_start.watcher(plan, measure, adapter.name)
        trainer.add_callback(watch)
        trainer.train()
    return {"points": watch.points, "log": watch.log}


def do_run(study: evidence_real.Study, start: str, plan: rl_start.Plan, options: argparse.Namespace, seed: int) -> Any:
    """Trains the start, goes on with GRPO, and keeps the record."""
    run = Run(PART, start, options.arm_rate, seed)
    settings = {"start": study.identity(run), "plan": dataclasses.asdict(plan), "rate": options.rate}
    folder = Path(study.output) / "rl"
    path = folder / f"{start}-seed{seed}-{digest(json.dumps(settings))[:10]}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        adapter = trained_adapter(study, run, folder / "adapters" / study.path(run).stem)
        outcome = rl_run(study, adapter, plan, options.rate, seed)
    record = {
        "start": start, "seed": seed, "settings": settings, **outcome,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(study.device, ("benchmarks/rl_smollm2.py", *sys.argv[1:])),
    }  # fmt: skip
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


def row_of(record: dict[str, Any]) -> list[str]:
    """A line of the table: each number before and after."""
    first, last = record["points"][0], record["points"][-1]
    rewards = [line["reward"] for line in record["log"]]
    moved = [f"{first[name]:.3f} → {last[name]:.3f}" for name in COLUMNS]
    entropy = f"{record['log'][0]['entropy']:.2f} → {record['log'][-1]['entropy']:.2f}"
    return [record["start"], str(record["seed"]), f"{sum(rewards) / len(rewards):.3f}", entropy, *moved]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--starts", default=",".join(STARTS), help="default: %(default)s")
    parser.add_argument("--arm_rate", type=float, default=5e-4, help="of the starts' training (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-4, help="of GRPO (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of GRPO (default: %(default)s)")
    # multiple-choice tasks and IFEval are left out: the study saw nothing lost in them
    options, study = evidence_real.small_study(parser, argv, "--ifeval=0", "--choices=0")
    if not study.answers.is_file():
        sys.exit("The base is not measured yet: python benchmarks/evidence_real.py --small")
    plan = rl_start.Plan(
        options.steps, prompts=4, generations=8, max_new_tokens=EQUATION_TOKENS, every=options.steps, test_rows=0, k=0
    )
    (Path(study.output) / "rl").mkdir(exist_ok=True)
    table = [["start", "seed", "mean reward", "entropy", *COLUMNS.values()]]
    for seed in range(options.seeds):
        for start in options.starts.split(","):
            table.append(row_of(do_run(study, start, plan, options, seed)))
            print(text_table([table[0], table[-1]]), flush=True)
    print(f"\n{text_table(table)}")


if __name__ == "__main__":
    main()
