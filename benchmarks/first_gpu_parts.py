"""The parts of first_gpu.py: each a function of the device that returns numbers, and what is not as it should be.

    python benchmarks/first_gpu_parts.py PART --device cuda --answer FILE         one part, as first_gpu.py runs it

They use what the other programs here measure with, on less. On "cpu" everything is smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NEAREST = 0.9999
"""Share of double-quantized block maxima that CUDA gives the nearest code (bitsandbytes 0.50: all that were tried)."""
SAME_RUN = 0.01
"""Nats per token between two runs that differ in rounding alone, after a few steps."""


class NeedsGpu(Exception):
    """A part that the CPU cannot rehearse; says why."""


@dataclass
class Found:
    """What a part found.

    Attributes:
        numbers: what goes into the file.
        missed: what is not as it should be, in words.
    """

    numbers: dict[str, Any]
    missed: list[str] = field(default_factory=list)


# ---- the machine ----


def environment(device: str) -> Found:
    """Card, driver, versions, commit. Fails without a card unless the CPU was asked for."""
    import machine

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device here. To rehearse without one: --cpu")
    found = machine.environment(device, ["benchmarks/first_gpu.py"])
    return Found(found | {"slug": machine.slug(machine.device_name(device))})


def doctor(device: str) -> Found:
    from qpsft.doctor.report import examine, to_dict

    found = to_dict(examine())
    wrong = [f"{check['name']}: {check['seen']}" for check in found["checks"] if check["status"] == "fail"]
    return Found(found, wrong)


# ---- is it right? ----


def rounding(device: str) -> Found:
    """NF4 with double quantization of the same weights on the CPU and on the device.

    As `load_base` rounds for this device, the bits must be the same; and what bitsandbytes' own kernel does there is
    held against the nearest code of every block maximum.
    """
    rows, columns = (256, 512) if device == "cpu" else (4096, 4096)
    numbers, missed = {}, []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        here, there = (quantized(weight.to(place), quantized_on=device) for place in ("cpu", device))
        own = quantized(weight.to(device))
        name = str(dtype).removeprefix("torch.")
        numbers[name] = {
            "weights": weight.numel(),
            "codes_that_differ": _differ(here["codes"], there["codes"]),
            "maxima_that_differ": _differ(here["maxima"], there["maxima"]),
            "largest_difference": float((here["values"] - there["values"]).abs().max() / here["values"].abs().max()),
            "nearest_by_its_own_kernel": own["nearest"],
        }
        if not all(torch.equal(here[part], there[part]) for part in ("codes", "maxima", "values")):
            missed.append(f"{name}: rounded for {device}, the weights on the CPU and on {device} are not the same")
        if device != "cpu" and own["nearest"] < NEAREST:
            missed.append(f"{name}: bitsandbytes misses the nearest code of {1 - own['nearest']:.2%} of the maxima")
    return Found(numbers, missed)


def quantized(weight: torch.Tensor, quantized_on: str | None = None) -> dict[str, Any]:
    """A weight in NF4, on the CPU again.

    Args:
        quantized_on: round as `load_base` does for a base that was quantized on this type of device; None: as
            bitsandbytes itself does on the weight's device.

    Returns: the `codes`, the `maxima` (8-bit codes of the blocks' largest values), the `values` that are read back
        (float32), and which share of the maxima have the `nearest` code.
    """
    from bitsandbytes import functional

    from qpsft.model.block_maxima import nearest_codes, rounding_of

    place = weight.device.type
    with contextlib.nullcontext() if quantized_on is None else rounding_of(quantized_on, place):
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    largest = weight.float().reshape(-1, 64).abs().amax(1) - state.offset
    nearest, _ = nearest_codes(largest.cpu(), state.state2.code.float().cpu())
    return {
        "codes": codes.cpu(),
        "maxima": state.absmax.cpu(),
        "values": functional.dequantize_4bit(codes, state).float().cpu(),
        "nearest": 1 - _differ(nearest, state.absmax.cpu()),
    }


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.flatten() != other.flatten()).double().mean())


def merges(device: str) -> Found:
    """A short run of the demo, merged in every dtype: is each the trained model?"""
    from qpsft.errors import QpsftError
    from qpsft.merge import merge_adapter

    numbers, missed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "adapter"
        numbers["training"] = train(trained, device, steps=4 if device == "cpu" else 64)
        for dtype in ("bfloat16", "float16", "float32"):
            try:
                report = merge_adapter(trained, Path(folder) / dtype, dtype=dtype)
                numbers[dtype] = report.verification
            except QpsftError as error:
                numbers[dtype] = {"same_model": False, "error": str(error)}
                missed.append(f"the merge in {dtype} is refused: {error.what}")
    return Found(numbers, missed)


def float16(device: str) -> Found:
    """Float16 from a loss scale that is far too large: the steps that overflow are repeated, and none is lost."""
    steps, scale = (2, 2.0**24) if device == "cpu" else (8, 2.0**30)
    flags = [] if device == "cpu" else ["--dtype=float16", "--fp16"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(Path(folder), device, steps, *flags)
        if device == "cpu":
            in_float16(trainer)
        trainer.accelerator.scaler._init_scale = scale
        trainer.train()
    finite = all(bool(p.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad)
    after = trainer.accelerator.scaler.get_scale()
    lines = [line for line in trainer.state.log_history if "nll" in line]
    numbers = {
        "first_scale": scale,
        "last_scale": after,
        "steps": trainer.state.global_step,
        "nll": [line["nll"] for line in lines],
        "finite": finite,
    }
    missed = [] if after < scale else ["no step overflowed, so nothing was tried"]
    missed += [] if trainer.state.global_step == steps and finite else ["steps were lost, or the adapter is not finite"]
    return Found(numbers, missed)


def in_float16(trainer: Any) -> None:
    """Gives a trainer on the CPU what accelerate gives one on a GPU: float16 autocast and a GradScaler."""
    from accelerate.utils import AutocastKwargs

    accelerator = trainer.accelerator
    accelerator.autocast_handler = AutocastKwargs(enabled=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


def noise(device: str) -> Found:
    """|r - 1| under equal weights, by dtype and micro-batch; scored as it is trained it must be exactly 0."""
    import noise_floor

    small = ["--rows", "16", "--windows", "1", "--micro_batches", "1", "8"]
    small += ["--dtypes", "float32", "bfloat16"] if device == "cpu" else []
    numbers = {
        "batched": noise_floor.measure(noise_floor.options(small)),
        "as_trained": noise_floor.measure(noise_floor.options([*small, "--score_token_budget", "0"])),
    }
    missed = [f"{one['dtype']}, micro-batch {one['micro_batch']}: r is off by {one['max']:.1e} with budget 0"
              for one in numbers["as_trained"] if one["max"] != 0]  # fmt: skip
    return Found(numbers, missed)


def resume(device: str) -> Found:
    """A run, and the same run gone on from its first half's checkpoint. On the CPU the bytes are the same."""
    from safetensors.torch import load_file

    half = 2 if device == "cpu" else 16
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
        saving = ["--save_strategy=steps", f"--save_steps={half}"]
        train(whole, device, 2 * half, *saving)
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / f"checkpoint-{2 * half}")
        train(resumed, device, 2 * half, *saving, "--resume")
        one, other = (load_file(path / "adapter_model.safetensors") for path in (whole, resumed))
    numbers = {
        "largest_difference": max(float((one[name] - other[name]).abs().max()) for name in one),
        "largest_weight": max(float(tensor.abs().max()) for tensor in one.values()),
    }
    off = numbers["largest_difference"] / numbers["largest_weight"]
    allowed = 0.0 if device == "cpu" else 0.01
    return Found(numbers, [f"resumed it is off by {off:.1%} of the largest weight"] if off > allowed else [])


def packing(device: str) -> Found:
    """Packed rows beside padded ones: the check for contamination runs before training, and stops it."""
    steps = 2 if device == "cpu" else 24
    with tempfile.TemporaryDirectory() as folder:
        padded = train(Path(folder) / "padded", device, steps)
        packed = train(Path(folder) / "packed", device, steps, "--packing", "--max_length=512",
                       "--per_device_train_batch_size=4")  # fmt: skip
    return Found({"padded": padded, "packed": packed})


def paged_optimizer(device: str) -> Found:
    return _same_run(device, "--optim=paged_adamw_8bit", tolerance=5 * SAME_RUN)


def offloading(device: str) -> Found:
    return _same_run(device, "--activation_offloading", "--gradient_checkpointing", tolerance=SAME_RUN)


def _same_run(device: str, *flags: str, tolerance: float) -> Found:
    """Two short runs, plain and with an option that must not change them. `tolerance`: of the last nll, in nats."""
    if device == "cpu":
        raise NeedsGpu(f"{flags[0]} needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        plain = train(Path(folder) / "plain", device, 24)
        other = train(Path(folder) / "other", device, 24, *flags)
    off = abs(plain["nll"] - other["nll"])
    missed = [] if off <= tolerance else [f"with {flags[0]} the nll is off by {off:.3f} nats per token"]
    return Found({"plain": plain, "other": other}, missed)


def no_compiler(device: str) -> Found:
    """`qpsft train` where no C compiler is found and no kernel is in Triton's cache."""
    from qpsft.demo.walkthrough import RECIPE

    with tempfile.TemporaryDirectory() as folder:
        nowhere = {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "TRITON_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, "-m", "qpsft", "train", str(RECIPE), f"--output_dir={folder}/out", "--max_steps=2"]
        command += _flags(device)
        done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    numbers = {"exit_code": done.returncode, "said": done.stderr.splitlines()[-10:]}
    missed = [] if done.returncode == 0 else [f"training ended with exit code {done.returncode}: {said[-200:]}"]
    if device == "cuda" and "Triton cannot compile" not in said:
        missed.append("Triton compiled without a compiler, or nothing was said")
    return Found(numbers, missed)


# ---- what does it cost? ----


def plan(device: str) -> Found:
    """The plan's peak against the memory that three steps take."""
    import plan_accuracy
    from real_shapes import build_model
    from step_grid import Cell

    shape, lengths = ("tiny", (64,)) if device == "cpu" else ("qwen2.5-0.5b", (1024, 4096))
    base = build_model(shape, device)
    card = float("inf") if device == "cpu" else float(torch.cuda.get_device_properties(0).total_memory)
    numbers, missed = {}, []
    for length in lengths:
        for checkpointing in (True, False):
            cell = Cell(shape, 1, length, rows=2, checkpointing=checkpointing)
            planned = plan_accuracy.planned_bytes(cell, device)
            kept = plan_accuracy.measure_cell(base, cell, planned, card, device)
            numbers[cell.key] = kept
            if kept["verdict"] != "ok":
                missed.append(f"{cell.key}: the plan is {kept['verdict']}")
    return Found(numbers, missed)


def step_cost_small(device: str) -> Found:
    return _step_cost(device, "qwen2.5-0.5b", micro_batch=2, length=1024, rows=8)


def step_cost_large(device: str) -> Found:
    return _step_cost(device, "qwen2.5-7b", micro_batch=1, length=1024, rows=4)


def _step_cost(device: str, shape: str, **size: int) -> Found:
    """One cell of step_cost.py's grid with three arms, its goals included."""
    from real_shapes import build_model
    from step_goals import ARMS
    from step_grid import Cell, measure_cell

    shape, size = ("tiny", {"micro_batch": 1, "length": 32, "rows": 2}) if device == "cpu" else (shape, size)
    cell = Cell(shape, **size, steps=5, warmup=1)
    arms = {name: ARMS[name] for name in ("trl", "nll", "psft K=8")}
    numbers = measure_cell(build_model(shape, device), cell, arms, device)
    missed = [f"{goal['name']} is {goal['value']:.2f}, the goal {goal['limit']:.2f}"
              for goal in numbers.get("goals", []) if goal["passed"] is False and device != "cpu"]  # fmt: skip
    return Found(numbers, missed)


def throughput_4b(device: str) -> Found:
    return _throughput(device, "Qwen/Qwen3-4B")


def throughput_8b(device: str) -> Found:
    return _throughput(device, "Qwen/Qwen3-8B")


def throughput_14b(device: str) -> Found:
    return _throughput(device, "Qwen/Qwen3-14B")


def _throughput(device: str, name: str) -> Found:
    """Tokens per second of PSFT and of plain SFT, rows of 2,048 tokens; fewer rows at once where they do not fit."""
    from real_shapes import build_model, llama_shape
    from step_goals import ARMS
    from step_grid import Cell, clean_up, measure_times

    from qpsft.plan.shapes import known_shapes

    small = device == "cpu"
    base = build_model(llama_shape(64, 1, vocab_size=256) if small else known_shapes()[name.lower()]["config"], device)
    arms, tried = {arm: ARMS[arm] for arm in ("nll", "psft K=8")}, []
    for micro_batch in (2,) if small else (4, 2, 1):
        cell = Cell(name, micro_batch, 64 if small else 2048, rows=max(4, micro_batch), steps=3, warmup=1)
        try:
            numbers = measure_times(base, cell, arms, device)
        except torch.OutOfMemoryError:
            tried.append(micro_batch)
            clean_up(device)
            continue
        return Found({**cell.to_dict(), "arms": numbers, "out_of_memory_with": tried})
    return Found({"out_of_memory_with": tried}, [f"{name} does not fit with one row of 2,048 tokens"])


# ---- small runs of the demo ----


def _flags(device: str) -> list[str]:
    small = ["--dataset_limit=64", "--per_device_train_batch_size=4", "--use_cpu"] if device == "cpu" else []
    short = ["--sft_warmup_steps=0", "--reference_steps=4", "--num_iterations=2"]  # a block of 8 steps, not of 32
    return ["--report_to=none", "--logging_steps=1", *short, *small]


def demo_recipe(folder: Path, device: str, steps: int, *flags: str) -> Any:
    from qpsft.demo.walkthrough import RECIPE
    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.file import load_recipe

    return load_recipe(RECIPE, [f"--output_dir={folder}", f"--max_steps={steps}", *_flags(device), *flags], PSFTConfig)


def train(folder: Path, device: str, steps: int, *flags: str) -> dict[str, float]:
    """The demo's recipe for a few steps, as `qpsft train` runs it: how it ended."""
    from qpsft.train import run

    summary = run.train(demo_recipe(folder, device, steps, *flags))
    named = {name: summary.numbers[name] for name in ("step", "nll", "tokens_per_second")}
    return {**named, "seconds": summary.seconds, "peak_bytes": summary.peak_bytes}


def demo_trainer(folder: Path, device: str, steps: int, *flags: str) -> Any:
    """The trainer of such a run, before it begins."""
    from qpsft.data.tokenize import load_dataset
    from qpsft.model.adapter import add_adapter
    from qpsft.model.base import load_base
    from qpsft.train.run import make_trainer

    recipe = demo_recipe(folder, device, steps, *flags)
    model, tokenizer = load_base("demo", dtype=recipe.model.dtype, device=device, verbose=False)
    rows = load_dataset(recipe.data, tokenizer, recipe.trainer.max_length).dataset
    return make_trainer(add_adapter(model, recipe.lora), tokenizer, recipe.trainer, rows, folder)


PARTS: dict[str, Callable[[str], Found]] = {
    part.__name__: part
    for part in (
        environment, doctor, rounding, merges, float16, noise, resume, packing, paged_optimizer, offloading,
        no_compiler, plan, step_cost_small, step_cost_large, throughput_8b, throughput_4b, throughput_14b,
    )
}  # fmt: skip


def answer(part: str, device: str) -> dict[str, Any]:
    """What a part found, as first_gpu.py keeps it."""
    try:
        found = PARTS[part](device)
    except NeedsGpu as needed:
        return {"status": "skipped", "why": str(needed)}
    return {"status": "missed" if found.missed else "ok", "missed": found.missed, "numbers": found.numbers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--answer", type=Path, default=None, metavar="FILE", help="where it goes; default: printed")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    text = json.dumps(answer(args.part, args.device), indent=1, ensure_ascii=False, default=str)
    print(text) if args.answer is None else args.answer.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
