"""The memory a recipe needs and what fits a card, from config.json alone: nothing is loaded.

The model is built on torch's `meta` device, quantized there by bitsandbytes and given its adapter by PEFT, so weights,
constants, adapter, gradients and optimizer state are counted exactly. A training and a scoring pass then run on it, and
every tensor's storage is counted as it comes and goes. On the CPU this agrees with real steps to 1 % (see
tests/test_plan.py); what is particular to CUDA (attention and LM-head kernels, the allocator) follows their sources.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from qpsft.errors import RecipeError
from qpsft.model.folder import DEMO, one_line, resolve_folder
from qpsft.model.hardware import pick_device
from qpsft.plan.after import after_training
from qpsft.plan.cards import CONTEXT, GIB, USABLE, Card, this_card
from qpsft.plan.changes import Suggestion, changed, longest_that_fits, suggest
from qpsft.plan.planner import Measured, Planner
from qpsft.plan.shapes import Shape, find_shape, read_shape, smaller_models
from qpsft.plan.table import gib, render
from qpsft.processes import world_size
from qpsft.psft.sharding import fsdp_is_asked
from qpsft.recipe.file import Recipe
from qpsft.terminal import short_number

if TYPE_CHECKING:
    from datasets import Dataset


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
        host_bytes: host memory used for the device's sake.
        disk_bytes: of "base", "adapter" (with checkpoints), "merge", "export" to an f16 GGUF (with the merged model),
            and "quantized": what a quantized GGUF needs beside that.
        merge_ram_bytes, verify_ram_bytes: of a merge, and of verifying it (on the GPU where there is one).
        export_ram_bytes: of an export to GGUF, apart from the merge before it.
        length: rows of so many tokens were planned.
        processes: of DDP; every number is one process's.
        complete: activations are among the parts; else all numbers are without them, so a run needs more.
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
            name: self._measure(changed(self._recipe, options)).activations.training.saved
            for name, options in others.items()
        }

    @functools.cached_property
    def max_length(self) -> int | None:
        """The longest rows that fit with everything else as it is, up to the base's context; None: none, or not known.

        It is not known without a card, and without activations.
        """
        if self.gpu_bytes is None or not self.complete:
            return None
        with self._trying() as needed:
            return longest_that_fits(self._recipe, needed, self.gpu_bytes, self._planner.context_length)

    @functools.cached_property
    def suggestion(self) -> Suggestion | None:
        """The cheapest change that makes it fit, planned anew; None when it fits, none was found, or none is known.

        Before rows shorter than half of what is asked for comes a smaller model, where one is known that fits.
        """
        if self.fits is not False or not self.complete:
            return None
        cuda, longest = self._planner.device == "cuda", self._planner.context_length
        with self._trying() as needed:
            found = suggest(self._recipe, needed, self.gpu_bytes, cuda=cuda, longest=longest)
        options = dict(found.options) if found else {}
        length = options.pop("max_length", None)
        half = min(self._recipe.trainer.max_length, longest) / 2
        if found is not None and (length is None or length >= half):
            return found
        for name in smaller_models(self.model):
            planner = self._planner.of_another(self._recipe, find_shape(name))
            for others in [{}, options] if options else [{}]:
                need = _needed(planner.measure(changed(self._recipe, others), self._free))
                if need <= self.gpu_bytes:
                    return Suggestion({"model_name_or_path": name} | others, need)
        return found

    @contextlib.contextmanager
    def _trying(self) -> Iterator[Callable[[Recipe], int]]:
        """What another recipe for the same base needs; on a terminal a bar counts them."""
        with tqdm(desc="planning", unit=" variants", disable=None, leave=False) as bar:

            def needed(recipe: Recipe) -> int:
                bar.update()
                return _needed(self._measure(recipe))

            yield needed

    def _measure(self, recipe: Recipe) -> Measured:
        return self._planner.measure(recipe, self._free)

    @property
    def _free(self) -> int | None:
        return _free_bytes(self.gpu_bytes)

    @staticmethod
    def usable(size: float) -> int:
        """Bytes of a card of `size` GB that can be used."""
        return int(size * GIB * USABLE)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = (
            "model", "setting", "card", "parts", "phases", "held_bytes", "peak_bytes", "margin_bytes", "needed_bytes",
            "gpu_bytes", "fits", "host_bytes", "disk_bytes", "merge_ram_bytes", "verify_ram_bytes", "export_ram_bytes",
            "length", "max_length", "processes", "complete", "saved_otherwise", "notes",
        )  # fmt: skip
        suggestion = self.suggestion and {"options": self.suggestion.options, "needed_bytes": self.suggestion.needed}
        return {name: getattr(self, name) for name in names} | {"suggestion": suggestion}

    def __str__(self) -> str:
        return render(self)


def _needed(measured: Measured) -> int:
    return measured.memory.peak + measured.memory.margin


def _free_bytes(gpu_bytes: int | None) -> int | None:
    """What a card has before anything is loaded."""
    return None if gpu_bytes is None else gpu_bytes - CONTEXT


def make_plan(
    recipe: Recipe,
    *,
    config: Any = None,
    gpu_bytes: int | None = None,
    processes: int = 1,
    card: Card | None = None,
    device: str = "cuda",
    longest_row: int | None = None,
) -> MemoryPlan:
    """Plans a run without loading anything.

    Args:
        recipe: of the run; data are not looked at. Its trainer's options are a PSFTConfig, or a
            `qpsft.plan.planned_config.PlannedConfig` where the card is not in this machine.
        config: of the base, as transformers' config or config.json's content; None: found by `model_name_or_path`.
        gpu_bytes: memory there is; None: that of `card`, or no verdict.
        processes: of DDP; the plan is one process's.
        card: for its memory, and for its compute capability, which decides dtype and kernels ((8, 0) if not given).
        device: "cuda", or "cpu" for a run in the computer's memory.
        longest_row: tokens in the longest row, if it is known; rows are as long as `max_length` otherwise.

    Raises:
        BaseModelError: no such model, or not a causal language model.
        RecipeError: the base is missing, a number is not above 0, or PEFT refuses the adapter's options for this base.
    """
    name = recipe.model.model_name_or_path
    if not name and config is None:
        raise RecipeError("model_name_or_path is missing.", "Write `model_name_or_path: …` or give the flag.")
    for what, value in (("gpu_bytes", gpu_bytes), ("processes", processes), ("longest_row", longest_row)):
        if value is not None and value <= 0:
            raise RecipeError(f"{what} is {value}; it must be above 0.")
    if config is None:
        trust = recipe.trainer.trust_remote_code
        shape = find_shape(name, revision=recipe.model.model_revision, trust_remote_code=trust)
    else:
        shape = Shape(read_shape(config) if isinstance(config, dict) else config, "the config given")
    if longest_row is not None:
        length = min(longest_row, recipe.trainer.max_length or longest_row)
        recipe = changed(recipe, {"max_length": max(2, length)})
    capability = card.capability if card is not None else (8, 0)
    planner = Planner(recipe, shape, device=device, capability=capability, processes=processes)
    if gpu_bytes is None and card is not None:
        gpu_bytes = card.nbytes
    named = card.name if card is not None else f"{gib(gpu_bytes)} GiB" if gpu_bytes is not None else "no card"
    return _plan(recipe, planner, gpu_bytes, named)


def _plan(recipe: Recipe, planner: Planner, gpu_bytes: int | None, card: str) -> MemoryPlan:
    measured, args = planner.measure(recipe, _free_bytes(gpu_bytes)), recipe.trainer
    memory, training = measured.memory, measured.activations.training
    stored = getattr(planner.shape.config, "dtype", None) or torch.bfloat16
    after = after_training(args, stored.itemsize, planner.weights, measured.optimizer)
    labels = {
        "quantized weights": f", {recipe.model.quantization}",
        "saved activations": _offloaded(training.offloaded) or _recomputed(args),
        "optimizer state": f", {getattr(args.optim, 'value', args.optim)}",
        "scoring pass": _batch(measured.activations.score_batch),
    }
    return MemoryPlan(
        model=str(recipe.model.model_name_or_path or planner.shape.config.model_type),
        setting=_setting(recipe, planner),
        card=card,
        parts=memory.parts,
        labels=labels,
        phases=memory.phases,
        held_bytes=memory.held,
        peak_bytes=memory.peak,
        margin_bytes=memory.margin,
        gpu_bytes=gpu_bytes,
        host_bytes=memory.host,
        disk_bytes=after.disk,
        merge_ram_bytes=after.merge_ram,
        verify_ram_bytes=after.verify_ram,
        export_ram_bytes=after.export_ram,
        length=args.max_length,
        processes=planner.processes,
        complete=measured.activations.known,
        notes=measured.notes,
        _recipe=recipe,
        _planner=planner,
    )


def _setting(recipe: Recipe, planner: Planner) -> str:
    args, dtype = recipe.trainer, str(planner.dtype).removeprefix("torch.")
    kind = recipe.model.quantization + (", not double-quantized" if not recipe.model.double_quant else "")
    return (
        f"{_short(planner.weights.parameters)} parameters (shape from {planner.shape.source}), {kind}, {dtype}; "
        f"rank {planner.lora.lora_r}, {_short(planner.weights.adapter / 4)} trained; "
        f"{args.per_device_train_batch_size} x {args.max_length:,} tokens per micro-batch"
        + ("" if planner.processes == 1 else f", on each of {planner.processes} processes")
    )


def _short(weights: float) -> str:
    return short_number(weights).replace("G", "B").replace("k", "K")


def _recomputed(args: Any) -> str:
    return ", checkpointed" if args.gradient_checkpointing else ", no checkpointing"


def _offloaded(nbytes: int) -> str:
    return f", {gib(nbytes)} more on the host" if nbytes else ""


def _batch(batch: Any) -> str:
    return "" if batch is None else f", {batch.rows} x {batch.length:,} tokens"


def warn_if_short(recipe: Recipe, rows: Dataset) -> MemoryPlan | None:
    """Plans a run that is about to start on this machine, and warns when memory will not do. Never stops it.

    Args:
        recipe: of the run.
        rows: what it trains on, tokenized (`input_ids`).

    Returns:
        The plan; None where there was no need for one (a CPU run much smaller than the memory) or no way.
    """
    args = recipe.trainer
    if fsdp_is_asked(args):  # the plan's numbers are those of DDP
        return None
    device = pick_device("cpu" if args.use_cpu else "auto").type
    available = psutil.virtual_memory().available
    if device not in ("cuda", "cpu") or (device == "cpu" and _small_beside(available, recipe)):
        return None
    longest_row = None if args.packing else max(len(ids) for ids in rows["input_ids"])
    try:
        if device == "cuda":
            plan = make_plan(recipe, card=this_card(), processes=world_size(), longest_row=longest_row)
        else:
            plan = make_plan(recipe, gpu_bytes=available, device="cpu", longest_row=longest_row)
    except Exception as error:  # the planner's own mistakes too: training must go on
        warnings.warn(f"There is no memory plan for this run. {one_line(error)}", stacklevel=2)
        return None
    if plan.fits is None:
        warnings.warn(f"There is no whole plan for this run: {plan.notes[0]}.", stacklevel=2)
    if plan.fits is False:
        there_is = f"{plan.card} has {gib(plan.gpu_bytes)}" if device == "cuda" else f"{gib(available)} are free"
        todo = "No option changes that." if plan.complete else "Activations come on top."
        todo = f"What would: {plan.suggestion.flags()}." if plan.suggestion else todo
        warnings.warn(
            f"This run needs about {gib(plan.needed_bytes)} GiB and {there_is}, so it will probably run out of memory. "
            f"{todo} `qpsft plan` shows the parts.",
            stacklevel=2,
        )
    return plan


def _small_beside(available: int, recipe: Recipe) -> bool:
    """Whether the base's files are there and are less than an eighth of the memory."""
    name = recipe.model.model_name_or_path
    if name != DEMO and not Path(name).expanduser().is_dir():
        return False
    files = resolve_folder(name).glob("*.safetensors")
    return sum(file.stat().st_size for file in files) < available / 8
