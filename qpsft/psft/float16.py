"""Float16 training: an optimizer step whose gradients overflow is repeated at once, with a smaller loss scale.

`torch.amp.GradScaler` would skip such a step, and the Trainer counts a skipped step like any other. For PSFT that is
wrong: the block moves on although the policy has not changed, the mini-batch is lost from the visit, and the step after
a skipped snapshot step is scored for nothing. With fused AdamW, the default optimizer, the skip is not even reported:
the kernel does it, and accelerate's `optimizer_step_was_skipped` stays False (huggingface/accelerate issue 4242).

So no step is skipped. When the gradient norm is not finite, the scale is halved before the optimizer runs, and the same
micro-batches run again from the same weights, with the same old log-probabilities. `global_step` then counts steps that
were taken, and what follows from it (blocks, visits, snapshots, the sampler, the learning rate, checkpoints) is as in
float32. A repeat costs what the skipped step would have cost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qpsft.errors import DivergedError
from qpsft.model.hardware import INSTEAD_OF_FLOAT16

MOST_REPEATS = 20
"""From GradScaler's first scale, 65536, twenty halvings lead to 1/16: below 1, scaling is not what overflows."""


def repeat_until_finite(
    trainer: Trainer,
    model: nn.Module,
    norm: Tensor | float,
    window: tuple[list[dict[str, Any]], Tensor | int],
    forget: Callable[[], None],
) -> Tensor | float:
    """Repeats the optimizer step's forward and backward passes until the unscaled gradients are finite.

    Args:
        trainer: its accelerator has a GradScaler, which has unscaled the gradients already.
        model: the model as the trainer wrapped it; every process repeats together, as the norm is the same in all.
        norm: the norm of the unscaled gradients, before clipping.
        window: the step's micro-batches, as `get_batch_samples` returned them, and N.
        forget: called before each repeat, to drop what the failed attempt left in the statistics.

    Returns:
        The norm of the gradients that the optimizer will get, before clipping.

    Raises:
        DivergedError: the gradients overflowed `MOST_REPEATS` + 1 times in a row.
    """
    scaler = trainer.accelerator.scaler
    batches, num_items = window
    for _ in range(MOST_REPEATS):
        if torch.isfinite(torch.as_tensor(norm)):
            return norm
        scaler.update()  # it has seen the infinite gradients: the scale is halved
        forget()
        model.zero_grad()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)  # as the Trainer does
            with nullcontext() if last else trainer.accelerator.no_sync(model=model):
                trainer.training_step(model, batch, num_items)
        limit = trainer.args.max_grad_norm or float("inf")
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), limit)
    if torch.isfinite(torch.as_tensor(norm)):
        return norm
    raise DivergedError(
        f"The gradients of optimizer step {trainer.state.global_step + 1} overflow in float16, "
        f"{MOST_REPEATS + 1} times in a row, down to a loss scale of {scaler.get_scale():g} ({_name(trainer.model)}).",
        f"This model does not train in float16. {INSTEAD_OF_FLOAT16}",
        trainer.state.global_step + 1,
    )


def _name(model: nn.Module) -> str:
    config = model.config
    return f"{config.model_type}, {config._name_or_path}" if config._name_or_path else config.model_type
