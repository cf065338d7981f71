"""The memory a recipe needs and what fits a card, from config.json alone: nothing is loaded.

The model is built on torch's `meta` device, quantized there by bitsandbytes and given its adapter by PEFT, so weights,
constants, adapter, gradients and optimizer state are counted exactly. A training and a scoring pass then run on it, and
every tensor's storage is counted as it comes and goes. On the CPU this agrees with real steps to 1 % (see
tests/test_plan.py); what is particular to CUDA (attention and LM-head kernels, the allocator) follows their sources.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers.trainer_utils import has_length

from qpsft.data.tokenize import row_lengths
from qpsft.errors import RecipeError, one_line
from qpsft.model.folder import DEMO, resolve_folder
from qpsft.model.hardware import pick_device
from qpsft.plan.after import after_training
from qpsft.plan.batch_sizes import RowLengths, fastest_that_fits
from qpsft.plan.cards import Card, gib, this_card
from qpsft.plan.changes import changed
from qpsft.plan.planner import Planner
from qpsft.plan.result import MemoryPlan
from qpsft.plan.shapes import Shape, find_shape, read_shape
from qpsft.processes import world_size
from qpsft.psft.sharding import fsdp_is_asked
from qpsft.recipe.file import Recipe
from qpsft.terminal import short_number

if TYPE_CHECKING:
    from datasets import Dataset


def make_plan(
    recipe: Recipe,
    *,
    config: Any = None,
    gpu_bytes: int | None = None,
    processes: int = 1,
    card: Card | None = None,
    device: str = "cuda",
    rows: RowLengths | None = None,
) -> MemoryPlan:
    """Plans a run without loading anything; where there is a limit, with the batch sizes that `auto` stands for.

    Args:
        recipe: of the run; data are not looked at. Its trainer's options are a PSFTConfig, or a
            `qpsft.plan.planned_config.PlannedConfig` where the card is not in this machine.
        config: of the base, as transformers' config or config.json's content; None: found by `model_name_or_path`.
        gpu_bytes: memory there is; None: that of `card`, or no verdict.
        processes: of DDP; the plan is one process's.
        card: for its memory, and for its compute capability, which decides dtype and kernels ((8, 0) if not given).
        device: "cuda", or "cpu" for a run in the computer's memory.
        rows: their lengths, if they are known; each is as long as `max_length` otherwise.

    Raises:
        BaseModelError: no such model, or not a causal language model.
        RecipeError: the base is missing, a number is not above 0, or PEFT refuses the adapter's options for this base.
    """
    name = recipe.model.model_name_or_path
    if not name and config is None:
        raise RecipeError("model_name_or_path is missing.", "Write `model_name_or_path: …` or give the flag.")
    for what, value in (("gpu_bytes", gpu_bytes), ("processes", processes), ("longest_row", rows and rows.longest)):
        if value is not None and value <= 0:
            raise RecipeError(f"{what} is {value}; it must be above 0.")
    if config is None:
        trust = recipe.trainer.trust_remote_code
        shape = find_shape(name, revision=recipe.model.model_revision, trust_remote_code=trust)
    else:
        shape = Shape(read_shape(config) if isinstance(config, dict) else config, "the config given")
    if rows is not None:
        length = min(rows.longest, recipe.trainer.max_length or rows.longest)
        recipe = changed(recipe, {"max_length": max(2, length)})
    capability = card.capability if card is not None else (8, 0)
    planner = Planner(recipe, shape, device=device, capability=capability, processes=processes)
    if gpu_bytes is None and card is not None:
        gpu_bytes = card.nbytes
    chosen = None
    if gpu_bytes is not None and recipe.trainer.automatic_batch and not fsdp_is_asked(recipe.trainer):
        chosen = _chosen(recipe, planner, gpu_bytes, rows or RowLengths(recipe.trainer.max_length))
    named = card.name if card is not None else f"{gib(gpu_bytes)} GiB" if gpu_bytes is not None else "no card"
    plan = _plan(changed(recipe, chosen or {}), planner, gpu_bytes, named)
    return dataclasses.replace(plan, chosen=chosen, rows=rows)


def _chosen(recipe: Recipe, planner: Planner, limit: int, rows: RowLengths) -> dict[str, Any] | None:
    """The batch sizes and gradient checkpointing for the limit; None where activations are not known."""
    if not planner.measure(recipe).activations.known:
        return None
    base = {"layers": planner.layers, "parameters": planner.weights.parameters, "device": planner.device}
    return fastest_that_fits(recipe, planner.needed, limit, rows, **base)


def _plan(recipe: Recipe, planner: Planner, gpu_bytes: int | None, card: str) -> MemoryPlan:
    measured, args = planner.measure(recipe), recipe.trainer
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
        rows=None,
        chosen=None,
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


def plan_run(recipe: Recipe, rows: Dataset) -> MemoryPlan | None:
    """Plans a run that is about to start on this machine, and warns when memory will not do. Never stops it.

    Args:
        recipe: of the run.
        rows: what it trains on, tokenized (`input_ids`), or a stream.

    Returns:
        The plan; None where there was no need for one (a CPU run much smaller than the memory) or no way.
    """
    args = recipe.trainer
    if fsdp_is_asked(args):  # the plan's numbers are those of DDP
        return None
    device = pick_device("cpu" if args.use_cpu else "auto").type
    available = psutil.virtual_memory().available
    needless = device == "cpu" and not args.automatic_batch and _small_beside(available, recipe)
    if device not in ("cuda", "cpu") or needless:
        return None
    try:
        if device == "cuda":
            plan = make_plan(recipe, card=this_card(), processes=world_size(), rows=_lengths(args, rows))
        else:
            free = available // world_size()
            plan = make_plan(recipe, gpu_bytes=free, device="cpu", processes=world_size(), rows=_lengths(args, rows))
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


def _lengths(args: Any, rows: Dataset) -> RowLengths | None:
    """None: of packed rows, which are full, and of a stream, which may have full ones."""
    if args.packing or not has_length(rows):
        return None
    lengths = row_lengths(rows)
    return RowLengths(max(lengths), sum(lengths) / len(lengths))


def _small_beside(available: int, recipe: Recipe) -> bool:
    """Whether the base's files are there and are less than an eighth of the memory."""
    name = recipe.model.model_name_or_path
    if name != DEMO and not Path(name).expanduser().is_dir():
        return False
    files = resolve_folder(name).glob("*.safetensors")
    return sum(file.stat().st_size for file in files) < available / 8
