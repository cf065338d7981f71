"""Full fine-tuning of SmolLM2-135M-Instruct, as PSFT's paper trains, beside the LoRA runs of evidence_real.py.

    python benchmarks/evidence_real.py --small ...     first: it measures the base, and samples its own answers
    OMP_NUM_THREADS=1 python benchmarks/evidence_full.py

The rows, the sizes and what is measured are those of `evidence_real.py --small`, and its other flags are taken too; the
training is the loop of docs/psft_in_one_file.py on a model without adapter and rounding: float32 weights, bfloat16
products. Each run is one
JSON file in `results/evidence_real/full`, so a study that was cut off goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence_real
import torch
from evidence_real import ROWS_A_STEP, Run
from evidence_real_parts import load_part
from evidence_real_table import metrics_of
from machine import environment

from qpsft.files import digest, write_atomically
from qpsft.recipe.methods import REFERENCE_STEPS, VISITS
from qpsft.terminal import text_table

PART = "svamp_noisy"
RATES = (1e-5, 3e-5, 1e-4)
"""The first is the paper's."""
WITHOUT_CLIP = 1e9
ARMS = {
    "sft": {"epsilon": WITHOUT_CLIP, "num_iterations": 1},
    "psft": {"num_iterations": 1, "sft_warmup_steps": 0},
    "psft_visits": {"num_iterations": VISITS, "sft_warmup_steps": REFERENCE_STEPS},
}
COLUMNS = ("learnt", "text", "test/nll", "test/entropy", "mt_bench/nll", "user/nll", "probe_words")


def one_file() -> Any:
    """docs/psft_in_one_file.py as a module."""
    path = evidence_real.ROOT / "docs" / "psft_in_one_file.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def options_of(arm: str, steps: int) -> dict[str, Any]:
    """The method's options. Every arm gets the same number of steps: at most `steps`, in whole blocks with visits."""
    visited = REFERENCE_STEPS * VISITS
    blocks = max(1, (steps - REFERENCE_STEPS) // visited)
    steps = REFERENCE_STEPS + blocks * visited
    if arm == "sft":
        return ARMS[arm] | {"sft_warmup_steps": steps, "blocks": 0}
    return ARMS[arm] | {"blocks": steps // REFERENCE_STEPS if arm == "psft" else blocks}


def do_run(study: evidence_real.Study, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains, measures, and keeps the record."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = load_part(PART, Path(study.data), study.rows[PART])
    options = options_of(arm, max(study.epochs) * len(part.train) // ROWS_A_STEP)
    identity = study.identity(Run(PART)) | {"full": options, "rate": rate, "seed": seed}
    name = f"{PART}-{arm}-lr{rate:g}-seed{seed}-{digest(json.dumps(identity))[:10]}.json"
    path = Path(study.output) / "full" / name
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    method = one_file()
    options |= {"reference_steps": REFERENCE_STEPS, "mini_batch": ROWS_A_STEP, "output_dir": None}
    args = method.Args(learning_rate=rate, seed=seed, **options)
    tokenizer = AutoTokenizer.from_pretrained(study.model)
    model = AutoModelForCausalLM.from_pretrained(study.model, dtype=torch.float32)
    rows = [method.tokenize(tokenizer, row["prompt"], row["completion"]) for row in part.train]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        method.train(args, model.train(), rows)
    model = model.to(torch.bfloat16).eval()
    with contextlib.redirect_stdout(sys.stderr):
        metrics = evidence_real.measure_model(study, PART, model, tokenizer, is_last=True)
    taken = args.sft_warmup_steps + args.blocks * args.reference_steps * args.num_iterations
    record = {
        "label": path.stem, "identity": identity, "arm": arm, "rate": rate, "seed": seed, "steps": taken,
        "metrics": metrics, "seconds": round(time.perf_counter() - started, 1),
        "environment": environment("cpu", ("benchmarks/evidence_full.py", *sys.argv[1:])),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    options, study = evidence_real.small_study(parser, argv, "--device=cpu")
    base = study.read(Run(PART))
    if base is None:
        sys.exit("The base is not measured yet: python benchmarks/evidence_real.py --small")
    base = base["points"][0]["metrics"]
    table = [["arm", "rate", "seed", "steps", *COLUMNS]]
    for seed in range(options.seeds):
        for rate in map(float, options.rates.split(",")):
            for arm in options.arms.split(","):
                record = do_run(study, arm, rate, seed)
                shown = metrics_of(record, PART, base)
                numbers = [f"{shown[name]:.3g}" for name in COLUMNS]
                table.append([arm, f"{rate:g}", str(seed), str(record["steps"]), *numbers])
                print(text_table([table[0], table[-1]]), flush=True)
    print(f"\n{text_table(table)}")


if __name__ == "__main__":
    main()
