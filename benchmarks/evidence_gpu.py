"""The evidence at a larger scale: a base of 36 M parameters and 8,192 noisy demonstrations, on one CUDA device.

    python benchmarks/evidence_gpu.py                  at most 9 minutes; repeat it to go on where it stopped
    python benchmarks/evidence_gpu.py --device cpu --tiny      all of it at toy size, in half a minute

First a Llama is pretrained from the generator that made the embedded base, with its tokenizer, by embedded_base
(Muon, bfloat16, the last steps through the NF4 rounding); rows come from worker processes. Then the arms of the
comparison, several runs at a time because a small model leaves the device idle between kernels: learning rates are
chosen on validation rows with one seed, and then seed after seed is done, so that whatever is there is a whole
comparison. No run is begun that would not end in time, going by the longest so far and, before there is one, by
Scale.run_seconds; every run is kept: --output is all that the next call needs. Writes evidence_gpu.json and
summary.txt, with this scale beside the small one of evidence.py, and the comparison's own report. It needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpsft.terminal import quiet_libraries

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "evidence_gpu"
SMALL = HERE / "results" / "evidence" / "noisy" / "comparison.json"
ARMS = "sft,sft_matched,dft,psft,psft_visits"
MARGIN = 20.0
"""Seconds kept for writing the report."""


@dataclass(frozen=True)
class Scale:
    """Sizes of base, data and measurement."""

    hidden: int = 768
    layers: int = 6
    steps: int = 2000
    qat_steps: int = 400
    learning_rate: float = 2e-3
    qat_learning_rate: float = 5e-4
    pretraining_batch: int = 1024
    save_every: int = 200
    demonstrations: int = 8192
    batch: int = 64
    rank: int = 16
    rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3)
    epochs: int = 4
    reference_steps: int = 8
    eval_rows: int = 512
    out_of_domain_rows: int = 256
    sample_rows: int = 64
    k: int = 8
    max_new_tokens: int = 56
    run_seconds: float = 240.0  # of one run beside the others, guessed with room to spare; counts until one is done


TINY = Scale(
    hidden=64, layers=1, steps=12, qat_steps=4, pretraining_batch=8, save_every=5, demonstrations=16, batch=4, rank=2,
    rates=(1e-3,), epochs=1, reference_steps=2, eval_rows=4, out_of_domain_rows=2, sample_rows=2, k=2, max_new_tokens=6,
    run_seconds=20,
)  # fmt: skip


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see whether everything works")
    parser.add_argument("--seeds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that make pretraining rows (default: all cores but two)")
    return parser.parse_args(argv)


def make_base(options: argparse.Namespace, scale: Scale, deadline: float) -> Path:
    """The base's folder, pretrained if it is not there. Raises TimeUp after saving what is done so far."""
    import embedded_base as pretrain
    import torch

    from qpsft.compare.queue import TimeUp
    from qpsft.model.folder import MODEL_DIR

    folder = options.output / "base"
    if folder.is_dir():
        return folder
    workers = max(1, (os.cpu_count() or 1) - 2) if options.workers is None else options.workers
    flags = {
        "output": folder,
        "steps": scale.steps,
        "qat_steps": scale.qat_steps,
        "learning_rate": scale.learning_rate,
        "qat_learning_rate": scale.qat_learning_rate,
        "batch_size": scale.pretraining_batch,
        "hidden": scale.hidden,
        "layers": scale.layers,
        "rows": 0,
        "save_every": scale.save_every,
        "device": options.device,
        "workers": workers,
        "tokenizer": MODEL_DIR,
    }
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def saved() -> None:
        if time.monotonic() > deadline:
            raise TimeUp

    print(f"pretraining a base, rows from {workers} processes", flush=True)
    pretrain.make(pretrain.parser().parse_args(argv), saved)
    if options.device == "cuda":
        torch.cuda.empty_cache()  # the runs need the memory, in processes of their own
    return folder


def write_rows(folder: Path, scale: Scale) -> dict[str, Path]:
    """The rows of every set as JSON lines: set -> file."""
    from qpsft.data import built_in

    sets = {
        "noisy": built_in.demonstrations("noisy", scale.demonstrations),
        "validation": built_in.in_domain("validation", scale.eval_rows),
        "in_domain": built_in.in_domain("test", scale.eval_rows),
        **built_in.out_of_domain("test", scale.out_of_domain_rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in sets}


def load(options: argparse.Namespace, scale: Scale, base: Path, files: dict[str, Path]) -> tuple[Any, Any]:
    """The comparison's Recipe and CompareOptions."""
    import yaml

    from qpsft.compare.options import load_comparison
    from qpsft.data import built_in

    recipe = {
        "model_name_or_path": str(base.resolve()),
        "dataset_name": str(files["noisy"].resolve()),
        "max_length": 128,
        "lora_r": scale.rank,
        "lora_alpha": 2 * scale.rank,
        "learning_rate": scale.rates[0],
        "warmup_steps": 0,
        "num_train_epochs": scale.epochs,
        "per_device_train_batch_size": scale.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "reference_steps": scale.reference_steps,
        "logging_steps": 16,
        "save_strategy": "no",
        "use_cpu": options.device == "cpu",
        "seed": 0,
    }
    path = options.output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    compared = {
        "arms": ARMS,
        "tune": True,
        "tune_seeds": 1,
        "learning_rates": list(scale.rates),
        "in_domain": str(files["in_domain"]),
        "validation": str(files["validation"]),
        "out_of_domain": [str(files[name]) for name in built_in.OUT_OF_DOMAIN],
        "eval_rows": scale.eval_rows,
        "out_of_domain_rows": scale.out_of_domain_rows,
        "sample_rows": scale.sample_rows,
        "k": scale.k,
        "max_new_tokens": scale.max_new_tokens,
        "jobs": options.jobs,
    }
    return load_comparison(path, [f"--output_dir={options.output}"], compared)


def compare_until(deadline: float, recipe: Any, compared: Any, seeds: int, output: Path, run_seconds: float) -> Any:
    """The Comparison of as many seeds as the time allows, written after each; None if not even one is whole."""
    from qpsft.compare.arms import find_arms
    from qpsft.compare.comparison import gather, make_setting, run_arms, write
    from qpsft.compare.queue import RunQueue, TimeUp

    arms = find_arms(compared.arms)
    setting = make_setting(recipe, compared, output)
    comparison = None
    with RunQueue(setting, output / "results", compared.jobs, deadline, run_seconds) as runs:
        with contextlib.suppress(TimeUp):
            for count in range(1, seeds + 1):
                now = dataclasses.replace(compared, seeds=count)
                comparison = gather(run_arms(arms, recipe, now, runs), arms, recipe, now, runs)
                write(comparison, output)
                print(f"{count} of {seeds} seeds are done", flush=True)
    return comparison


def parameters(folder: Path) -> int:
    """How many parameters a base's safetensors hold."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def scale_record(name: str, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a comparison's JSON."""
    return {
        "name": name,
        "parameters": parameters(folder),
        "rows": record["rows"],
        "machines": record["settings"]["machines"],
        "base": record["base"],
        "arms": {
            arm: {"learning_rate": found["learning_rate"], **found["last_epoch"]}
            for arm, found in record["arms"].items()
            if arm in ARMS.split(",")
        },
        "differences": [
            one for one in record["differences"] if {one["treatment"], one["control"]} <= set(ARMS.split(","))
        ],
    }


def render(scales: list[dict[str, Any]]) -> str:
    """Both scales in one table, and the differences at equal in-domain accuracy."""
    from qpsft.compare.results import SHARE, describe_metric, format_value
    from qpsft.terminal import text_table

    names = [name for name in scales[-1]["arms"]["sft"] if name != "learning_rate"]
    metrics = [describe_metric(name) for name in names]
    header = ["base", "arm", "lr", "seeds", *(metric.short for metric in metrics)]
    rows = [header]
    for scale in scales:
        size = f"{scale['parameters'] / 1e6:.2g} M"
        base = [scale["base"].get(name) for name in names]
        shown = ["–" if v is None else format_value(v, m.unit) for v, m in zip(base, metrics, strict=True)]
        rows.append([size, "none", "–", "–", *shown])
        for arm, found in scale["arms"].items():
            cells = [_mean(found.get(name), metric.unit) for name, metric in zip(names, metrics, strict=True)]
            rows.append([size, arm, f"{found['learning_rate']:g}", str(found["in_domain"]["n"]), *cells])
    lines = [text_table(rows, left=2)]
    for scale in scales:
        lines += ["", f"{scale['parameters'] / 1e6:.2g} M: out of domain at equal in-domain accuracy, 95 % intervals"]
        for one in scale["differences"]:
            matched = one["matched_in_domain"]
            if one["same_runs"] or matched is None:
                continue
            half = "" if matched["half_width"] is None else f" ± {format_value(matched['half_width'], SHARE)}"
            at = format_value(matched["in_domain"], SHARE)
            lines.append(f"  {one['treatment']} − {one['control']}: {matched['mean']:+.3f}{half} at {at}")
    return "\n".join(lines)


def _mean(found: dict[str, float | None] | None, unit: str) -> str:
    from qpsft.compare.results import format_value

    if found is None:
        return "–"
    mean = format_value(found["mean"], unit)
    return mean if found["sd"] is None else f"{mean} ± {format_value(found['sd'], unit)}"


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = arguments(argv)
    quiet_libraries()  # before they are imported, here and in the worker processes
    import torch
    from machine import environment

    from qpsft.compare.queue import TimeUp
    from qpsft.model.folder import MODEL_DIR

    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no CUDA device here. --device cpu --tiny runs all of it at toy size.")
        return 2
    scale = TINY if options.tiny else Scale()
    deadline = started + 60 * options.minutes - MARGIN
    options.output.mkdir(parents=True, exist_ok=True)
    comparison = None
    with contextlib.suppress(TimeUp):
        base = make_base(options, scale, deadline)
        files = write_rows(options.output / "data", scale)
        print(f"base and rows after {time.monotonic() - started:.0f} s", flush=True)
        recipe, compared = load(options, scale, base, files)
        comparison = compare_until(deadline, recipe, compared, options.seeds, options.output, scale.run_seconds)
    seconds = round(time.monotonic() - started)
    if comparison is None:
        print(f"The time is up after {seconds} s; what is done is kept: repeat the command to go on.")
        if 60 * options.minutes - MARGIN <= scale.run_seconds:
            least = (scale.run_seconds + MARGIN) / 60
            print(f"The first run begins only where it may last {scale.run_seconds:g} s: --minutes above {least:.1f}.")
        return 0
    scales = [scale_record("large", base, comparison.to_dict())]
    if SMALL.is_file():
        scales.insert(0, scale_record("small", MODEL_DIR, json.loads(SMALL.read_text(encoding="utf-8"))))
    seeds = len(comparison.arms["sft"].runs)
    table = render(scales)
    record = {
        "driver": None,  # unless there is one
        **environment(options.device, ["benchmarks/evidence_gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "seconds": seconds,
        "scale": dataclasses.asdict(scale),
        "seeds": seeds,
        "scales": scales,
    }
    for name, text in (("evidence_gpu.json", json.dumps(record, indent=1)), ("summary.txt", table)):
        partial = options.output / f".{name}"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.rename(options.output / name)
    left = "" if seeds == options.seeds else "; repeat the command to go on"
    print(f"\n{table}\n\n{seeds} of {options.seeds} seeds in {options.output} after {seconds} s{left}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
