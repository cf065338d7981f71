"""A run must change what it trains: else it would hand back the base as if it had learned something."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qpsft.errors import TrainingError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovementCheck(TrainerCallback):
    """Compares the trained weights at the end of `train()` with those at its beginning, bit for bit.

    The last step is checked before its checkpoint is written.

    Raises:
        TrainingError: no trained weight changed, on any process; tells whether every learning rate was 0.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._first_step, self._highest_rate = state.global_step, 0.0
        self._start = bit_sums(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        rates = (float(group["lr"]) for group in kwargs["optimizer"].param_groups)
        self._highest_rate = max(self._highest_rate, *rates)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= state.max_steps:
            self._check(args, state, kwargs["model"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # another callback stopped it; at the end of training the best weights may be back, which can be the first
        if control.should_training_stop and state.global_step < state.max_steps:
            self._check(args, state, kwargs["model"])

    def _check(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        steps = state.global_step - self._first_step
        moved = (bit_sums(model) != self._start).any().reshape(1)
        if steps == 0 or self.accelerator.gather(moved).any():
            return
        if self._highest_rate == 0:
            scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            which = "its optimizer step" if steps == 1 else f"all {steps:,} optimizer steps"
            raise TrainingError(
                f"The run has learned nothing: the learning rate of {which} was 0 (lr_scheduler_type {scheduler}).",
                "Train longer, or change warmup_steps, lr_scheduler_type or lr_scheduler_kwargs.",
            )
        raise TrainingError(
            f"The run has learned nothing: {steps:,} optimizer steps changed no trained weight.",
            f"If grad_norm in the log is 0, look at the rows (`qpsft preview`); else raise learning_rate, which is "
            f"{args.learning_rate:g}.",
        )


@torch.no_grad()
def bit_sums(model: nn.Module) -> Tensor:
    """The sum of each trainable parameter's bits, read as integers; of a sharded one, of this process's part.

    Returns: int64, one number per parameter. A single changed bit changes it, and it costs no copy of the weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    return torch.stack([p.view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in local])
