"""What `target_kl`, `target_clip_fraction` and other ways to a smaller trust region keep, on the embedded base.

    OMP_NUM_THREADS=1 python benchmarks/trust_region.py

`adapters/demo-noisy` (K = 8, 4 visits, one block of SFT, 252 steps, noisy demonstrations) with one thing changed, and
SFT; three seeds each. Finished runs are kept in benchmarks/results/trust_region.json and not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, Results, environment

from qpsft.demo.walkthrough import measure
from qpsft.model.base import load_base, load_tokenizer
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
}
"""Name -> what is changed in the recipe."""


def measured(flags: list[str], seed: int) -> dict[str, Any]:
    """One run: what it learned and kept, and what its trust region did."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [f"--output_dir={folder}", f"--seed={seed}", "--use_cpu", *flags], PSFTConfig)
        runs.train(recipe)
        lines = [line for line in read_metrics(Path(folder) / runs.METRICS) if "nll" in line]
        base, _ = load_base("demo", verbose=False)
        after = measure(PeftModel.from_pretrained(base, folder), load_tokenizer("demo"))
    later = lines[len(lines) // 2 :]
    return {
        "in_domain": round(after.accuracy["in_domain"], 4),
        "out_of_domain": round(after.out_of_domain, 4),
        "approx_kl": {line["step"]: round(line["approx_kl"], 4) for line in lines},
        "clip_fraction": round(statistics.mean(line["clip_fraction"] for line in later), 4),
        "blocks_ended_early": lines[-1].get("blocks_ended_early"),
        "epsilon": lines[-1].get("epsilon"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "trust_region.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.results, environment("cpu"))
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
