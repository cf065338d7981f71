"""The longest row that PSFT trains on a card of 8, 12, 16 or 24 GB: Llama-3.1-8B's shape, rank 32, batch 1.

    python benchmarks/max_context.py --minutes 9                    on any larger CUDA card; run it until it says done
    python benchmarks/max_context.py --caps 8,12                   some of the caps

A cap is set with torch.cuda.set_per_process_memory_fraction; what the CUDA context takes outside torch's allocator is
measured first, after a short trial that has loaded every library, and taken off, so `8 GB` means 8 GiB with everything.
A trial is real training, alone on the base: two optimizer steps of PSFTTrainer with K = 2 on rows of that length, so
one step right after a snapshot and one with a reference pass. Its peak memory tells where to look next; the search ends
when the longest row that fits and the shortest that does not are 1 % apart. Trials are kept in
benchmarks/results/max_context_DEVICE.json, so that the command may be cut off and repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import (
    AGAIN,
    GIB,
    RESULTS,
    Budget,
    Results,
    clean_up,
    describe,
    device_name,
    environment,
    memory_meter,
    slug,
)
from real_shapes import build_model, held_tensors, random_rows
from step_grid import make_trainer
from transformers import PreTrainedModel

from qpsft import PSFTConfig

PUBLISHED = {  # tokens, plain SFT with QLoRA, rank 32, batch 1, by card in GB; docs.unsloth.ai
    "Unsloth": {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475},
    "Hugging Face + FlashAttention 2": {8: None, 12: 932, 16: 2_551, 24: 5_789},
}
LONG_CONTEXT = {  # options of PSFTConfig for long rows; those that this version does not have are left out and named
    "gradient_checkpointing": True,
    "activation_offloading": True,
    "optim": "adamw_bnb_8bit",
    "tiled_mlp": True,
}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
STEP = 64
WARM_UP = 128  # tokens
TOLERANCE = 0.01
LEFT_BEHIND = 256 * 2**20  # bytes; cuBLAS keeps a workspace for each thread that has used it


@dataclass(frozen=True)
class Trial:
    """One attempt. `peak_bytes` None: it ran out of memory."""

    length: int
    peak_bytes: int | None
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes is not None


def longest(
    attempt: Callable[[int], Trial], *, cap: float, longest_allowed: int, known: list[Trial] = (), first: int = 2048
) -> int:
    """The longest length that fits, up to TOLERANCE (and STEP); 0 if STEP itself does not.

    Memory is close to linear in the length, so the next length is where the line through the two longest that fitted
    meets the cap, kept inside the bracket; without two, lengths double. Close to the end the bracket is halved.

    Args:
        attempt: runs a length.
        cap: bytes available.
        longest_allowed: never beyond this.
        known: trials done before, by this program's earlier runs.
        first: where to begin.
    """
    trials = {trial.length: trial for trial in known}
    while True:
        fitting = sorted(length for length, trial in trials.items() if trial.fits)
        low = fitting[-1] if fitting else 0
        high = min((length for length, trial in trials.items() if not trial.fits), default=None)
        if low >= longest_allowed or (high is not None and high - low <= max(STEP, TOLERANCE * low)):
            return low
        guess = _next_length([trials[length] for length in fitting], high, cap, first)
        guess = min(max(STEP, guess // STEP * STEP), longest_allowed)
        if guess in trials:  # rounding led back: the middle of the bracket, or one step on
            guess = (low + high) // 2 // STEP * STEP if high is not None else low + STEP
            if guess in trials:
                return low
        trials[guess] = attempt(guess)


def _next_length(fitting: list[Trial], high: int | None, cap: float, first: int) -> int:
    low = fitting[-1].length if fitting else 0
    if len(fitting) < 2:
        if high is None:
            return first if not fitting else 2 * low
        return (low + high) // 2 if fitting else high // 4
    one, two = fitting[-2:]
    slope = (two.peak_bytes - one.peak_bytes) / (two.length - one.length)
    reach = low + (cap - two.peak_bytes) / slope if slope > 0 else 2 * low
    if high is None:
        return int(min(max(reach * 0.98, low + STEP), 4 * low))  # the allocator's fragments need some of the cap
    if high <= 1.05 * low:
        return (low + high) // 2
    return int(min(max(reach, low + (high - low) / 8), 0.98 * high))


def context_options() -> tuple[dict[str, Any], list[str]]:
    """LONG_CONTEXT as far as this version of qpsft has it, and the names that it lacks."""
    known = {field.name for field in fields(PSFTConfig)}
    return (
        {name: value for name, value in LONG_CONTEXT.items() if name in known},
        [name for name in LONG_CONTEXT if name not in known],
    )


def train_once(base: PreTrainedModel, length: int, rank: int, device: str, more: dict[str, Any]) -> int:
    """Two optimizer steps of PSFT, K = 2, on one row each; returns the peak in bytes, base included."""
    with tempfile.TemporaryDirectory() as out:
        config = PSFTConfig(
            out,
            reference_steps=2,
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            max_length=length,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=base.dtype == torch.bfloat16,
            fp16=base.dtype == torch.float16,
            **more,
        )
        with memory_meter(device, held_tensors(base)) as meter:
            make_trainer(base, config, rank, random_rows(2, length, base.config.vocab_size), []).train()
            return meter.peak


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a library reports it as another error: cuBLAS's workspace, pinned host memory, bitsandbytes."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, torch.OutOfMemoryError) or any(word in str(chain) for word in words):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def attempt_length(
    base: PreTrainedModel, length: int, rank: int, device: str, more: dict[str, Any], held: int
) -> Trial:
    """A trial that survives running out of memory.

    Raises:
        RuntimeError: afterwards more than `held` and LEFT_BEHIND bytes stay allocated, so that no further trial in this
            process would be right.
    """
    start, peak = time.perf_counter(), None
    try:
        peak = train_once(base, length, rank, device, more)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    clean_up(device)
    if device == "cuda" and torch.cuda.memory_allocated() > held + LEFT_BEHIND:
        stuck = torch.cuda.memory_allocated() - held
        raise RuntimeError(f"{stuck / GIB:.2f} GiB are still allocated after a trial; run the command again")
    return Trial(length, peak, time.perf_counter() - start)


class Cap(NamedTuple):
    """Bytes that torch's allocator may take of a card (0: less than the base holds), and that the context takes."""

    available: float
    context: int


def set_cap(gigabytes: float) -> Cap:
    """Lets this process have a card of so many GiB, with everything that is loaded by now."""
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    available = gigabytes * GIB - context
    if available <= torch.cuda.memory_allocated():
        return Cap(0.0, context)
    torch.cuda.set_per_process_memory_fraction(min(1.0, available / total))
    return Cap(available, context)


def measure_caps(
    caps: list[float],
    results: Results,
    budget: Budget,
    attempt: Callable[[int], Trial],
    cap_of: Callable[[float], Cap],
    settings: dict[str, Any],
    longest_allowed: int,
    warm_up: Callable[[], Any],
) -> bool:
    """Searches every cap that `results` does not have yet. True when none is left.

    `warm_up` comes before the first cap: cuBLAS, Triton and the optimizer's kernels take memory once they are used.
    """

    class OutOfTime(Exception):
        pass

    known: list[Trial] = []
    warm = False
    for cap in caps:
        key = f"{cap:g} GB"
        cell = results.cells.get(key, {"cap_gb": cap, **settings, "trials": [], "longest": None})
        trials = [Trial(**trial) for trial in cell["trials"]]
        if cell["longest"] is not None:
            known += trials
            continue
        if not warm:
            warm_up()
            warm = True
        available, cell["context_bytes"] = cap_of(cap)

        def kept(length: int, cell=cell, key=key, trials=trials) -> Trial:
            slowest = max((trial.seconds / trial.length for trial in trials), default=0.0)
            if not budget.allows(1.5 * slowest * length):
                raise OutOfTime
            trial = attempt(length)
            trials.append(trial)
            cell["trials"].append(vars(trial))
            results.add(key, {**cell})
            peak = "out of memory" if not trial.fits else f"{trial.peak_bytes / GIB:.2f} GiB"
            print(f"  {key}: {length:>7,} tokens  {peak:>14}  {trial.seconds:6.1f} s", flush=True)
            return trial

        # what fitted a smaller card fits this one, and its peaks say where to begin
        smaller = [trial for trial in known if trial.fits and trial.peak_bytes <= available]
        try:
            cell["longest"] = (
                longest(kept, cap=available, longest_allowed=longest_allowed, known=[*trials, *smaller])
                if available
                else 0
            )
        except OutOfTime:
            return False
        results.add(key, {**cell, "available_bytes": available})
        known += trials
    return True


def table(results: Results, caps: list[float]) -> str:
    """Beside the published numbers."""
    lines = [f"{'':<34}" + "".join(f"{f'{cap:g} GB':>11}" for cap in caps)]
    mine = [results.cells.get(f"{cap:g} GB", {}).get("longest") for cap in caps]
    rows = {"qpsft, PSFT with its reference": mine}
    rows |= {name: [by_cap.get(int(cap)) or 0 for cap in caps] for name, by_cap in PUBLISHED.items()}
    for name, values in rows.items():
        shown = ["not yet" if value is None else "OOM" if value == 0 else f"{value:,}" for value in values]
        lines.append(f"{name:<34}" + "".join(f"{value:>11}" for value in shown))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="of real_shapes.py")
    parser.add_argument("--caps", default="8,12,16,24", help="GB (GiB), separated by commas")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--longest", type=int, default=131072, help="never beyond this length")
    parser.add_argument("--minutes", type=float, default=None, help="begin no trial that will not end within so many")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("max_context.py needs a CUDA card: a cap on a CPU's memory says nothing about one.", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    budget, found = Budget(args.minutes), environment("cuda")
    print(describe(found))
    options, lacking = context_options()
    if lacking:
        print(f"this version of qpsft has no {', '.join(lacking)}: left out")
    caps = [float(cap) for cap in args.caps.split(",")]
    results = Results(args.results / f"max_context_{slug(device_name('cuda'))}.json", found)
    base = build_model(args.shape, "cuda")
    clean_up("cuda")
    held = torch.cuda.memory_allocated()
    done = measure_caps(
        caps,
        results,
        budget,
        attempt=lambda length: attempt_length(base, length, args.rank, "cuda", options, held),
        cap_of=set_cap,
        warm_up=lambda: attempt_length(base, WARM_UP, args.rank, "cuda", options, held),
        settings={
            "shape": args.shape,
            "rank": args.rank,
            "options": options,
            "allocator": os.environ.get(ALLOCATOR),
        },
        longest_allowed=args.longest,
    )
    print(table(results, caps))
    return 0 if done else AGAIN


if __name__ == "__main__":
    if torch.cuda.is_available() and ALLOCATOR not in os.environ:
        # rows of another length leave gaps of another size; torch reads this when it is imported, so once more
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {ALLOCATOR: "expandable_segments:True"})
    sys.exit(main())
