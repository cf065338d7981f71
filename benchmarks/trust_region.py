"""What `target_kl`, `target_clip_fraction` and other ways to a smaller trust region keep.

    OMP_NUM_THREADS=1 python benchmarks/trust_region.py               the embedded base
    OMP_NUM_THREADS=1 python benchmarks/trust_region.py --smollm2     SmolLM2-135M-Instruct, short runs

On the embedded base `adapters/demo-noisy` (K = 8, 4 visits, one block of SFT, 252 steps, noisy demonstrations) with one
thing changed, and SFT; three seeds each. On SmolLM2, which `../shared/models/smollm2.py` makes, the noisy SVAMP rows of
`evidence_real_parts.py` (equations, 30 % of them wrong), K = 4, 2 visits, 28 steps; what is kept is the NLL of the
base's own greedy answers to MT-bench's first turns, measured by the guard. Finished runs are kept in
benchmarks/results/trust_region.json and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from evidence_real import MODEL
from evidence_real_parts import load_part, text_prompts, turns
from machine import RESULTS, Results, environment

from qpsft.demo.walkthrough import load_adapter, measure
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.generation import greedy_completions
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train import run as runs
from qpsft.train.progress import read_metrics

RECIPE = RESULTS.parents[1] / "adapters" / "demo-noisy"
VARIANTS = {
    "sft": ["--method=sft", "--sft_warmup_steps=0"],
    "psft_visits": [],
    "target_kl 0.03": ["--target_kl=0.03"],
    "target_kl 0.3": ["--target_kl=0.3"],
    "target_kl 3": ["--target_kl=3"],
    "target_clip_fraction 0.1": ["--target_clip_fraction=0.1"],
    "target_clip_fraction 0.3": ["--target_clip_fraction=0.3"],
    "epsilon 0.1": ["--epsilon=0.1"],
    "learning_rate 1e-3": ["--learning_rate=1e-3"],
    "base_kl 0.05": ["--base_kl=0.05"],
}
"""Name -> what is changed in the recipe."""


def measured(flags: list[str], seed: int) -> dict[str, Any]:
    """One run: what it learned and kept, and what its trust region did."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [f"--output_dir={folder}", f"--seed={seed}", "--use_cpu", *flags], PSFTConfig)
        runs.train(recipe)
        lines = [line for line in read_metrics(Path(folder) / runs.METRICS) if "nll" in line]
        after = measure(load_adapter(Path(folder)), load_tokenizer("demo"))
    later = lines[len(lines) // 2 :]
    return {
        "in_domain": round(after.accuracy["in_domain"], 4),
        "out_of_domain": round(after.out_of_domain, 4),
        "approx_kl": {line["step"]: round(line["approx_kl"], 4) for line in lines},
        "clip_fraction": round(statistics.mean(line["clip_fraction"] for line in later), 4),
        "blocks_ended_early": lines[-1].get("blocks_ended_early"),
        "epsilon": lines[-1].get("epsilon"),
    }


SHARED = RESULTS.parents[2] / "shared" / "data"
REAL_VARIANTS = {
    "sft": ["--method=sft", "--sft_warmup_steps=0"],
    "psft_visits": [],
    "target_kl 0.1": ["--target_kl=0.1"],
    "target_clip_fraction 0.1": ["--target_clip_fraction=0.1"],
    "epsilon 0.1": ["--epsilon=0.1"],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def own_answers(prompts: int, max_new_tokens: int = 48) -> list[dict[str, Any]]:
    """The base's greedy answers to the first turns of MT-bench, cut where they do not end."""
    model, tokenizer = load_base(str(MODEL), dtype="bfloat16", verbose=False)
    questions = text_prompts(SHARED, prompts)["mt_bench"]
    asked = [turns(question, "")["prompt"] for question in questions]
    answers = greedy_completions(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=8)
    return [turns(question, answer) for question, answer in zip(questions, answers, strict=True)]


def measured_on_smollm2(flags: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """One short run: NLL of the rows it trains on, and of the base's own answers, before and after."""
    rows, kept = folder / "svamp.jsonl", folder / "own_answers.jsonl"
    if not kept.is_file():
        write_rows(rows, load_part("svamp_noisy", SHARED, (350, 1, 1)).train)
        write_rows(kept, own_answers(24))
    options = {
        "model_name_or_path": MODEL,
        "dtype": "bfloat16",
        "dataset_name": rows,
        "output_dir": folder / "run",
        "lora_r": 16,
        "learning_rate": 5e-4,
        "warmup_steps": 0,
        "max_steps": 28,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "reference_steps": 4,
        "num_iterations": 2,
        "sft_warmup_steps": 4,
        "logging_steps": 4,
        "save_strategy": "no",
        "seed": seed,
        "guard": json.dumps({"data": str(kept), "metric": "nll", "max_drop": 9, "every": 14, "action": "warn"}),
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    recipe = load_recipe(None, [*given, "--use_cpu", "--overwrite", *flags], PSFTConfig)
    runs.train(recipe)
    lines = read_metrics(folder / "run" / runs.METRICS)
    trained = [line for line in lines if "nll" in line]
    guarded = [line for line in lines if "guard_nll" in line]
    return {
        "nll": [round(line["nll"], 4) for line in trained],
        "own_answers_nll": {line["step"]: round(line["guard_nll"], 4) for line in guarded},
        "approx_kl": {line["step"]: round(line["approx_kl"], 4) for line in trained},
        "kl_to_base": [line["kl_to_base"] for line in trained if "kl_to_base" in line][-1:],
        "clip_fraction": [round(line["clip_fraction"], 4) for line in trained],
        "blocks_ended_early": trained[-1].get("blocks_ended_early"),
        "epsilon": trained[-1].get("epsilon"),
    }


def study_smollm2(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in REAL_VARIANTS.items():
        key = f"SmolLM2, {name}, seed 0"
        if key not in results.cells:
            results.add(key, {"flags": flags, **measured_on_smollm2(flags, 0, folder)})
        cell = results.cells[key]
        print(f"{name:<26}nll {cell['nll'][-1]:.3f}  own answers {cell['own_answers_nll']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smollm2", action="store_true", help="short runs of SmolLM2-135M-Instruct instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/trust_region"), help="for SmolLM2's rows and runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "trust_region.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.results, environment("cpu"))
    if options.smollm2:
        study_smollm2(results, options.folder)
        return
    for seed in range(options.seeds):
        for name, flags in VARIANTS.items():
            key = f"{name}, seed {seed}"
            if key not in results.cells:
                results.add(key, {"flags": flags, **measured(flags, seed)})
    for name in VARIANTS:
        cells = [results.cells[f"{name}, seed {seed}"] for seed in range(options.seeds)]
        means = {key: statistics.mean(cell[key] for cell in cells) for key in ("in_domain", "out_of_domain")}
        print(f"{name:<26}in-domain {means['in_domain']:.3f}  out of domain {means['out_of_domain']:.3f}")


if __name__ == "__main__":
    main()
