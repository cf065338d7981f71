"""A memory plan, and its table for a terminal: at most 80 columns."""

from __future__ import annotations

import contextlib
import functools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from qpsft.plan.batch_sizes import RowLengths, smallest
from qpsft.plan.cards import GIB, USABLE, gib
from qpsft.plan.changes import Suggestion, changed, longest_that_fits, suggest
from qpsft.plan.planner import Planner
from qpsft.plan.shapes import find_shape, smaller_models
from qpsft.recipe.file import Recipe
from qpsft.terminal import wrap

COMMON_SIZES = (6, 8, 10, 12, 16, 24, 32, 48, 80)
_GROUPS = (
    ("all the time", ("quantized weights", "quantization constants", "unquantized weights", "policy adapter",
                      "reference adapter", "adapter in 16 bits", "optimizer state", "batch", "workspaces and rounding",
                      "DDP gradient buckets")),
    ("training pass", ("gradients", "saved activations", "layer working set", "dequantization buffers",
                       "LM-head tile")),
    ("at other times", ("scoring pass", "optimizer step")),
)  # fmt: skip


@dataclass
class MemoryPlan:
    """What a run needs, in bytes; `str(plan)` is the table.

    Attributes:
        model: the base's name; `setting` the rest of the run in words; `card` what it is planned for.
        parts: bytes of each part by name, in the table's order; not all of them are alive at once.
        labels: words beside a part's name.
        phases: bytes alive at the peak of each phase of a step.
        held_bytes: alive all the time.
        peak_bytes: the largest phase: what `torch.cuda.max_memory_allocated()` shows.
        margin_bytes: the CUDA context and fragmentation, which it does not show.
        gpu_bytes: what there is, or None.
        host_bytes: host memory for what would otherwise be on the device.
        disk_bytes: of "base", "adapter" (with checkpoints), "merge", "export" to an f16 GGUF (with the merged model),
            and "quantized": what a quantized GGUF needs beside that.
        merge_ram_bytes, verify_ram_bytes: of a merge, and of verifying it (on the GPU where there is one).
        export_ram_bytes: of an export to GGUF, apart from the merge before it.
        length: rows of so many tokens were planned.
        processes: of DDP; every number is one process's.
        complete: activations are among the parts; else all numbers are without them, so a run needs more.
        rows: their lengths, where not all were taken to have `length`.
        chosen: the batch sizes and gradient checkpointing that the plan chose, as options; None: as the recipe has it.
        notes: what the plan does not know.
    """

    model: str
    setting: str
    card: str
    parts: dict[str, int]
    labels: dict[str, str]
    phases: dict[str, int]
    held_bytes: int
    peak_bytes: int
    margin_bytes: int
    gpu_bytes: int | None
    host_bytes: int
    disk_bytes: dict[str, int]
    merge_ram_bytes: int
    verify_ram_bytes: int
    export_ram_bytes: int
    length: int
    processes: int
    complete: bool
    rows: RowLengths | None
    chosen: dict[str, Any] | None
    notes: list[str]
    _recipe: Recipe = field(repr=False)
    _planner: Planner = field(repr=False)

    @property
    def needed_bytes(self) -> int:
        """Of the card: `peak_bytes` and `margin_bytes`."""
        return self.peak_bytes + self.margin_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the card has that; None without a card, and when only `complete` numbers could tell."""
        if self.gpu_bytes is None or (self.needed_bytes <= self.gpu_bytes and not self.complete):
            return None
        return self.needed_bytes <= self.gpu_bytes

    @property
    def offloads(self) -> bool:
        """Whether activations go to host memory, or cannot because they are there already."""
        return self._recipe.trainer.activation_offloading or self._planner.device != "cuda"

    @functools.cached_property
    def saved_otherwise(self) -> dict[str, int]:
        """Bytes of the saved activations with checkpointing turned on or off, and with offloading to host memory."""
        if not self.complete:
            return {}
        args = self._recipe.trainer
        turned = not args.gradient_checkpointing
        others = {"with checkpointing" if turned else "without checkpointing": {"gradient_checkpointing": turned}}
        if self._planner.device == "cuda" and not args.activation_offloading:
            others["with offloading"] = {"activation_offloading": True}
        return {
            name: self._planner.measure(changed(self._recipe, options)).activations.training.saved
            for name, options in others.items()
        }

    @functools.cached_property
    def max_length(self) -> int | None:
        """The longest rows that fit with everything else as it is, up to the base's context; None: none, or not known.

        It is not known without a card, and without activations. Where the plan chooses the batch sizes, with the
        smallest.
        """
        return self._longest({})

    @functools.cached_property
    def max_length_offloaded(self) -> int | None:
        """The same with activation offloading; None also where it is on already, or cannot be."""
        return None if self.offloads else self._longest({"activation_offloading": True})

    def _longest(self, options: dict[str, Any]) -> int | None:
        if self.gpu_bytes is None or not self.complete:
            return None
        recipe = changed(self._recipe, options | (smallest(self._recipe) if self.chosen else {}))
        with self._trying() as needed:
            return longest_that_fits(recipe, needed, self.gpu_bytes, self._planner.context_length)

    @property
    def why_chosen(self) -> str:
        """What the plan chose, in a sentence."""
        sizes, rows = self.chosen, self.rows
        of = f"rows of {rows.mean:.0f} tokens on average, {rows.longest:,} at most" if rows else "full rows"
        limit, free = (self.card, "") if self._planner.device == "cuda" else ("memory", " free")
        return (
            f"{sizes['per_device_train_batch_size']} x {sizes['gradient_accumulation_steps']} rows a step, "
            f"gradient checkpointing {'on' if sizes['gradient_checkpointing'] else 'off'}: "
            f"the fastest for {of} by the plan, {gib(self.needed_bytes)} of {limit}'s {gib(self.gpu_bytes)} GiB{free}"
        )

    @functools.cached_property
    def suggestion(self) -> Suggestion | None:
        """The cheapest change that makes it fit, planned anew; None when it fits, or no such change is known."""
        return self.within(self.gpu_bytes) if self.fits is False and self.complete else None

    def within(self, limit: int) -> Suggestion | None:
        """The cheapest change after which the run needs at most `limit` bytes; None when no such change is known.

        A smaller model is preferred to rows of less than half the length that is asked for.
        """
        cuda, longest = self._planner.device == "cuda", self._planner.context_length
        with self._trying() as needed:
            change = suggest(self._recipe, needed, limit, cuda=cuda, longest=longest)
        options = dict(change.options) if change else {}
        length = options.pop("max_length", None)
        half = min(self._recipe.trainer.max_length, longest) / 2
        if change is not None and (length is None or length >= half):
            return change
        for name in smaller_models(self.model):
            planner = self._planner.for_base(self._recipe, find_shape(name))
            for others in [{}, options] if options else [{}]:
                need = planner.needed(changed(self._recipe, others))
                if need <= limit:
                    return Suggestion({"model_name_or_path": name} | others, need)
        return change

    @contextlib.contextmanager
    def _trying(self) -> Iterator[Callable[[Recipe], int]]:
        """What another recipe for the same base needs; on a terminal a bar counts them."""
        with tqdm(desc="planning", unit=" variants", disable=None, leave=False) as bar:

            def needed(recipe: Recipe) -> int:
                bar.update()
                return self._planner.needed(recipe)

            yield needed

    @staticmethod
    def usable(size: float) -> int:
        """Bytes of a card of `size` GB that can be used."""
        return int(size * GIB * USABLE)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = (
            "model", "setting", "card", "parts", "phases", "held_bytes", "peak_bytes", "margin_bytes", "needed_bytes",
            "gpu_bytes", "fits", "host_bytes", "disk_bytes", "merge_ram_bytes", "verify_ram_bytes", "export_ram_bytes",
            "length", "max_length", "max_length_offloaded", "processes", "complete", "saved_otherwise", "chosen",
            "notes",
        )  # fmt: skip
        suggestion = self.suggestion and {"options": self.suggestion.options, "needed_bytes": self.suggestion.needed}
        return {name: getattr(self, name) for name in names} | {"suggestion": suggestion}

    def __str__(self) -> str:
        return render(self)


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
        if plan.chosen:
            lines.append(f"chosen: {plan.why_chosen}")
        if plan.max_length:
            lines.append(_longest_rows(plan))
    if plan.host_bytes:
        lines.append(f"host memory in place of the card's: {gib(plan.host_bytes)} GiB")
    disk = plan.disk_bytes
    lines += [
        f"disk: base {gib(disk['base'])}, adapter and checkpoints {gib(disk['adapter'])}, merge {gib(disk['merge'])}, "
        f"f16 GGUF with it {gib(disk['export'])}, a quantized one up to {gib(disk['quantized'])} more GiB",
        f"RAM to merge: {gib(plan.merge_ram_bytes)}; to verify it, or GPU memory: {gib(plan.verify_ram_bytes)}; "
        f"to export GGUF: {gib(plan.export_ram_bytes)} GiB",
    ]
    return [wrap(line) for line in [*lines, *(f"note: {note}" for note in plan.notes)]]


def _longest_rows(plan: MemoryPlan) -> str:
    sizes = "with one row per micro-batch" if plan.chosen else f"as it is now, {plan.length:,}"
    longer = plan.max_length_offloaded
    more = f"; with --activation_offloading {longer:,}" if longer and longer > plan.max_length else ""
    return f"longest max_length that fits: {plan.max_length:,} ({sizes}){more}"


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
