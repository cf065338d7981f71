"""A run that ran out of memory: what needs less, by its plan, and how it goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from qpsft.errors import TrainingError, one_line
from qpsft.plan.cards import gib
from qpsft.plan.result import MemoryPlan

LESS = 0.85
"""Of what was planned: a change that saves less would hardly help a run for which the plan was too low."""
SAME_STEPS = {"gradient_checkpointing", "tiled_mlp", "activation_offloading"}
"""Options that a resumed run may change: every step still sees the same rows, and the optimizer's state fits."""
# torch's allocators raise OutOfMemoryError on a GPU; others say it in the words of a RuntimeError
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def out_of_memory(error: RuntimeError, step: int, plan: MemoryPlan | None, checkpoint: Path | None) -> TrainingError:
    """What to tell the user.

    Args:
        step: the optimizer step it happened in, counted from 1.
        plan: of the run, if there is one.
        checkpoint: the newest whole one.
    """
    smaller = plan.within(int(LESS * plan.needed_bytes)) if plan is not None and plan.complete else None
    if smaller is None:
        advice = (
            "Lower max_length or per_device_train_batch_size; `qpsft plan` shows what takes how much, and "
            "docs/memory.md what to try in which order."
        )
    else:
        before, after = gib(plan.needed_bytes), gib(smaller.needed)
        advice = f"The plan counts {before} GiB for this run, and {after} GiB with {smaller.flags()}."
    options = set() if smaller is None else set(smaller.options)
    return TrainingError(
        f"Memory ran out at optimizer step {step}: {_first_words(error)}",
        f"{advice} {_how_it_goes_on(options, plan, checkpoint)}",
    )


def _first_words(error: RuntimeError) -> str:
    """What was asked for and what there is; torch's advice on its allocator is left out."""
    return one_line(error).partition(" Of the allocated memory")[0].rstrip(".") + "."


def _how_it_goes_on(options: set[str], plan: MemoryPlan | None, checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "No checkpoint had been saved yet: start again with --overwrite."
    if options and options <= SAME_STEPS:
        return f"Add --resume, and the run goes on from {checkpoint}."
    offloads = plan is not None and plan.offloads
    with_less = "" if offloads else "--activation_offloading true and "
    return (
        f"To go on from {checkpoint}, with the batches and the optimizer it was made with, give {with_less}--resume; "
        "with others start again with --overwrite."
    )
