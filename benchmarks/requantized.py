"""SmolLM2 from training to files of few bits: what each rounding leaves of the training.

    python benchmarks/requantized.py runs/smollm2       # trained there first if there is no adapter: 28 steps, SVAMP
    python benchmarks/requantized.py ADAPTER            # any adapter that qpsft trained

Every export goes the whole way from the adapter: merge, verify, convert, read back, run in llama.cpp (NF4: loaded again
in transformers). It measures itself (`qpsft/export/kept.py`): the KL divergence from the trained model, and what a
token of the held-out answers costs, beside the base's own. Writes `results/requantized.json`, format by format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from evidence_real_parts import load_part
from machine import RESULTS, environment

from qpsft import cli
from qpsft.export.command import write_export
from qpsft.export.options import ExportOptions
from qpsft.terminal import quiet_libraries

FORMATS = ("f16", "q8_0", "q4_k_m", "nf4")
MODEL = Path.home() / ".cache" / "qpsft-models" / "SmolLM2-135M-Instruct"
DATA = RESULTS.parents[2] / "shared" / "data"
ROWS = 350
"""Of SVAMP, 30 % of them wrong, as in evidence_real.py."""
TRAINING = {
    "per_device_train_batch_size": 8, "max_steps": 28, "learning_rate": 5e-4, "epsilon": 0.1, "reference_steps": 4,
    "num_iterations": 2, "sft_warmup_steps": 4, "held_out_rows": 16,
}  # fmt: skip


def train(adapter: Path) -> None:
    """A short PSFT of SmolLM2."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "svamp.jsonl"
        lines = [json.dumps(row) for row in load_part("svamp_noisy", DATA, (ROWS, 0, 1)).train]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        flags = [f"--{name}={value}" for name, value in TRAINING.items()]
        flags += [f"--model_name_or_path={MODEL}", f"--dataset_name={rows}", f"--output_dir={adapter}"]
        if cli.main(["train", *flags, "--report_to=none"]):
            raise SystemExit("The training failed.")


def export(adapter: Path, base: str | None, name: str, folder: Path) -> dict[str, Any]:
    """One format, the whole way, as its record."""
    to, outtype = ("nf4", None) if name == "nf4" else ("gguf", name)
    started = time.perf_counter()
    report = write_export(ExportOptions(adapter, to=to, outtype=outtype, output=str(folder / name), base=base))
    print(report.summary(), flush=True)
    off = report.distance if name == "nf4" else report.run.compared
    numbers = report.merge.verification["numbers"]
    found = {"bytes": report.bytes, "kl_merged": off.kl, "top1": off.top1, "verify": numbers["distance"]}
    if report.kept is not None:  # f16 rounds no more than the merge does
        found |= {"share": report.kept.share, **dataclasses.asdict(report.kept)}
    return found | {"seconds": time.perf_counter() - started}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", help="where its base is now")
    parser.add_argument("--formats", default=",".join(FORMATS), help="nf4 and types of GGUF (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULTS / "requantized.json")
    options = parser.parse_args(argv)
    quiet_libraries()
    if not options.adapter.exists():
        train(options.adapter)
    recipe = yaml.safe_load((options.adapter / "recipe.yaml").read_text(encoding="utf-8"))
    training = {name: recipe[name] for name in TRAINING}
    measured = json.loads(options.result.read_text())["measured"] if options.result.is_file() else {}
    for name in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = export(options.adapter, options.base, name, Path(folder))
        record = {"environment": environment("cpu"), "training": training, "measured": measured}
        options.result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
