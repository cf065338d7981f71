"""A plan on a terminal: at most 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from qpsft.plan.cards import GIB
from qpsft.terminal import wrap

if TYPE_CHECKING:
    from qpsft.plan.memory_plan import MemoryPlan

COMMON_SIZES = (6, 8, 10, 12, 16, 24, 32, 48, 80)
_GROUPS = (
    ("all the time", ("quantized weights", "quantization constants", "unquantized weights", "policy adapter",
                      "reference adapter", "optimizer state", "batch", "workspaces and rounding",
                      "DDP gradient buckets")),
    ("training pass", ("gradients", "saved activations", "layer working set", "dequantization buffers",
                       "LM-head tile")),
    ("at other times", ("scoring pass", "optimizer step")),
)  # fmt: skip


def gib(nbytes: float) -> str:
    """1610612736 as 1.50, and less than a tenth with one more digit."""
    size = nbytes / GIB
    return f"{size:.3f}" if 0 < size < 0.1 else f"{size:.2f}"


def render(plan: MemoryPlan) -> str:
    """The table, the verdict, and what to do."""
    lines = [textwrap.shorten(f"memory plan: {plan.model}", 80, placeholder=" …")]
    lines += [wrap(plan.setting, "  "), ""]
    lines.append(f"{'':58}     GiB")
    for title, names in _GROUPS:
        lines.append(title)
        present = [name for name in names if name in plan.parts]
        for name in present:
            lines.append(_row(f"  {name}{plan.labels.get(name, '')}", plan.parts[name]))
            if name == "saved activations":
                lines += [_row(f"    ({other})", size) for other, size in plan.saved_otherwise.items()]
    lines.append("peak of each phase")
    for name, size in plan.phases.items():
        lines.append(_row(f"  {name}{' (the peak)' if size == plan.peak_bytes else ''}", size))
    lines += [
        _row("beside torch: CUDA context", plan.parts["CUDA context"]),
        _row("              fragmentation", plan.parts["fragmentation margin"]),
        _row(_needed_by(plan), plan.needed_bytes),
        "",
        *_verdict(plan),
    ]
    return "\n".join(lines)


def _needed_by(plan: MemoryPlan) -> str:
    each = " by each process" if plan.processes > 1 else ""
    return f"needed{each}" + ("" if plan.complete else ", without activations")


def _row(label: str, nbytes: int) -> str:
    return f"{label:<58}{gib(nbytes):>8}"


def _verdict(plan: MemoryPlan) -> list[str]:
    lines = []
    if not plan.complete:
        lines.append(_without_activations(plan))
    elif plan.gpu_bytes is None:
        sizes = [size for size in COMMON_SIZES if plan.needed_bytes <= plan.usable(size)]
        lines.append(f"fits cards of {sizes[0]} GB and more" if sizes else f"fits no card of {COMMON_SIZES[-1]} GB")
        lines.append("  --gpu 12GB, 'RTX 3090' or auto also tells what to change, and how long rows can be")
    else:
        spare = plan.gpu_bytes - plan.needed_bytes
        card = f"{plan.card} ({gib(plan.gpu_bytes)} GiB usable)"
        if plan.fits:
            lines.append(f"fits {card}: {gib(spare)} to spare")
        else:
            lines += [f"does not fit {card}: {gib(-spare)} short", *_advice(plan)]
        if plan.max_length:
            lines.append(f"longest max_length that fits: {plan.max_length:,} (as it is now, {plan.length:,})")
    if plan.host_bytes:
        lines.append(f"host memory for the card's sake: {gib(plan.host_bytes)} GiB")
    disk = plan.disk_bytes
    lines += [
        f"disk: base {gib(disk['base'])}, adapter and checkpoints {gib(disk['adapter'])}, merge {gib(disk['merge'])}, "
        f"f16 GGUF with it {gib(disk['export'])}, a quantized one up to {gib(disk['quantized'])} more GiB",
        f"RAM to merge: {gib(plan.merge_ram_bytes)}; to verify it, or GPU memory: {gib(plan.verify_ram_bytes)}; "
        f"to export GGUF: {gib(plan.export_ram_bytes)} GiB",
    ]
    return [wrap(line) for line in [*lines, *(f"note: {note}" for note in plan.notes)]]


def _without_activations(plan: MemoryPlan) -> str:
    if plan.gpu_bytes is None:
        return "which cards it fits is not known: activations come on top"
    card, spare = f"{plan.card} ({gib(plan.gpu_bytes)} GiB usable)", plan.gpu_bytes - plan.needed_bytes
    if spare < 0:
        return f"does not fit {card}: {gib(-spare)} short, and activations come on top"
    return f"whether it fits {card} is not known: {gib(spare)} are left for activations"


def _advice(plan: MemoryPlan) -> list[str]:
    if plan.suggestion is None:
        return [f"  no change of options makes it fit; the weights alone are {gib(plan.held_bytes)} GiB"]
    return [f"  what makes it fit ({gib(plan.suggestion.needed)} GiB):", f"    {plan.suggestion.flags()}"]
