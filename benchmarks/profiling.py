"""Where the time of a step goes: torch.profiler's events summed by kind of work.

Every kernel (on a CPU: every operator's own time) is counted under the innermost enclosing operator or range that says
what it is for. What the device did not do anything in is Python, launching and waiting.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from machine import Results, clean_up
from real_shapes import build_model, random_rows
from step_goals import Arm
from step_grid import Cell, make_config, make_trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from turns import clock_of

REST = "norms, rotary, activations, casts"
IDLE = "Python, launches, waiting"
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("4-bit weights: dequantized, fused products", ("dequantize", "gemv_4bit", "gemm_4bit")),
    ("attention", ("scaled_dot_product", "flash", "fmha", "sdpa", "efficient_attention")),
    ("copies between host and device", ("memcpy htod", "memcpy dtoh", "pin_memory")),
    (
        "matrix products of base and adapter",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "gemm", "cutlass", "nvjet", "xmma"),
    ),
    (IDLE, ("dataloader", "matmul4bit")),
]
ENCLOSING: list[tuple[str, tuple[str, ...]]] = [  # made of the same products and sums as everything else
    ("LM head and log-probabilities", ("chunkedlogprob", "log_softmax")),
    ("optimizer and clipping", ("optimizer.step", "optimizer.zero_grad", "clip_grad", "foreach_norm")),
]
AUTOGRAD_NODE = re.compile(r"autograd::|\w+backward\d*$")


def kind_of(names: Sequence[str]) -> str:
    """The kind of a kernel from the names around it, innermost first: its own, its operator's, that one's caller's …

    Names of autograd nodes say nothing: with gradient checkpointing a layer is computed again inside the node that
    first needs it. What lies in such nodes alone is Python's time.
    """
    names = [name.lower() for name in names]
    for kind, words in ENCLOSING:
        if any(word in name for name in names for word in words):
            return kind
    names = [name for name in names if not AUTOGRAD_NODE.match(name)]
    for name in names:
        for kind, words in KINDS:
            if any(word in name for word in words):
                return kind
    return REST if names else IDLE


def seconds_by_kind(events: Iterable[Any], wall_seconds: float, device: str) -> dict[str, float]:
    """Sums a profile's `events()` by kind.

    Args:
        wall_seconds: the profiled steps' duration; what the kinds do not add up to is IDLE.
        device: "cuda": kernels count; "cpu": the operators' own time.

    Returns:
        Seconds by kind, the largest first, IDLE last.
    """
    sums: dict[str, float] = defaultdict(float)
    on_device = attributed = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:  # a range's mirror on the device lasts as long as the kernels under it
                on_device += event.time_range.elapsed_us() * 1e-6
            continue
        if device != "cuda":
            if event.name.startswith("ProfilerStep"):
                continue
            sums[kind_of(_names(event))] += event.self_cpu_time_total * 1e-6
            continue
        for kernel in event.kernels:
            sums[kind_of([kernel.name, *_names(event)])] += kernel.duration * 1e-6
            attributed += kernel.duration * 1e-6
    if on_device > attributed:  # kernels that no operator launched
        sums[REST] += on_device - attributed
    sums.pop(IDLE, None)  # it is what is left
    ordered = dict(sorted(sums.items(), key=lambda item: -item[1]))
    return ordered | {IDLE: max(0.0, wall_seconds - sum(ordered.values()))}


def _names(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


class ProfiledSteps(TrainerCallback):
    """Profiles a trainer's optimizer steps `first` … `last` (counted from 0), and times them.

    Attributes:
        profile: torch's profile, once the last step is over; seconds: those steps' duration.
    """

    def __init__(self, first: int, last: int, clock: Callable[[], float], device: str):
        self.first, self.last, self.clock = first, last, clock
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        self.profile = profile(activities=activities)
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_at(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last + 1:
            self.seconds = self.clock() - self._since
            self.profile.stop()
        self._start_at(state.global_step)

    def _start_at(self, step: int) -> None:
        if step == self.first:
            self.profile.start()
            self._since = self.clock()


def table(seconds: dict[str, float], steps: int) -> str:
    """Milliseconds per step and share, by kind."""
    total = sum(seconds.values())
    lines = [f"  {kind:<44}{1000 * s / steps:>10.1f} ms{s / total:>8.1%}" for kind, s in seconds.items()]
    return "\n".join([*lines, f"  {'sum':<44}{1000 * total / steps:>10.1f} ms"])


def top_kernels(profiled: profile, device: str, count: int = 15) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that took longest: name, calls, milliseconds."""
    rows = []
    for average in profiled.key_averages():
        if device == "cuda" and average.is_user_annotation:
            continue
        microseconds = average.self_device_time_total if device == "cuda" else average.self_cpu_time_total
        rows.append({"name": average.key[:120], "calls": average.count, "ms": microseconds / 1000})
    return sorted(rows, key=lambda row: -row["ms"])[:count]


def profile_cell(cell: Cell, arms: dict[str, Arm], path: Path, found: dict[str, Any], device: str) -> int:
    """Profiles three steps of plain SFT and three scored ones of PSFT; prints the tables and keeps them in `path`."""
    results, base = Results(path, found), build_model(cell.shape, device, attn_implementation=cell.attention)
    first, last = 2, 4
    rows = random_rows((last + 1) * cell.accumulation * cell.micro_batch, cell.length, base.config.vocab_size)
    for name in (name for name in ("trl", "nll", "psft K=8") if name in arms):
        steps = ProfiledSteps(first, last, clock_of(device), device)
        with tempfile.TemporaryDirectory() as out:
            config = make_config(name, arms[name], cell, base.dtype, out, last + 1)
            make_trainer(base, config, cell.rank, rows, [steps]).train()
        seconds = seconds_by_kind(steps.profile.events(), steps.seconds, device)
        kept = {**cell.to_dict(), "steps": last - first + 1, "seconds_by_kind": seconds}
        results.add(f"{cell.key} {name}", kept | {"top": top_kernels(steps.profile, device)})
        print(f"{cell.key}: {name}\n{table(seconds, last - first + 1)}", flush=True)
        clean_up(device)
    return 0
