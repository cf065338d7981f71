"""KL(base || policy) of the supervised tokens' whole distributions: an anchor added to any loss, a number in the log.

    loss + base_kl * sum_t KL(π_base(. | y_<t) || π_θ(. | y_<t)) / N

`nll` with it is the papers' SFT-KL, `dft` with it ASFT (arXiv 2509.23753, whose code has this direction too). The
base's hidden states of a whole optimizer step are made before its first micro-batch, with the adapter off, without
gradients, in scoring's groups; those of the supervised tokens are kept until the step ends. The distributions
themselves exist a tile at a time.

Without `base_kl` the same number is measured now and then, for the log: on the training data it tells, better than any
other of the numbers that its authors tried, how much will be forgotten (RL's Razor, arXiv 2509.04259).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from qpsft.psft.forward import PolicyOutput, policy_forward
from qpsft.psft.lm_head import LMHead, kl_to_base
from qpsft.psft.reference import BasePolicy
from qpsft.psft.scoring import Batch, as_in_training, row_lengths, token_budget

BASE_HIDDEN = "base_hidden"
MICRO_BATCHES = 32
"""A measurement is two forwards without gradients, at most one in so many micro-batches: 2 % of the time or less."""


class BaseKL:
    """The divergence of the policy from the base.

    Args:
        model: as in `BasePolicy`; in training it is on its device.
        args: PSFTConfig.
    """

    def __init__(self, model: nn.Module, args: Any):
        self._model, self._args = model, args
        self._base: BasePolicy | None = None
        self._head: LMHead | None = None

    def hidden(self, batches: Sequence[Batch], step: int) -> list[Tensor]:
        """The base's hidden states of an optimizer step's micro-batches, each (supervised tokens, hidden size).

        Args:
            batches: micro-batches as for `qpsft.psft.scoring.passes`.
            step: optimizer steps before this one.
        """
        if self._base is None:
            self._base = BasePolicy(self._model)
        budget = token_budget(self._args, max(batch["input_ids"].numel() for batch in batches))
        with as_in_training(self._model, self._args.device, self._args.seed + step):
            hidden, self._head = self._base.hidden(batches, token_budget=budget)
        return hidden

    def total(self, outputs: PolicyOutput, base_hidden: Tensor) -> Tensor:
        """The sum of the divergence over a micro-batch's supervised tokens: scalar, nats, with gradient.

        Args:
            outputs: of the training forward, with hidden states.
            base_hidden: the base's, of the same micro-batch.
        """
        return kl_to_base(outputs.hidden, outputs.head, base_hidden, self._head)

    def measure(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The divergence on a micro-batch, without gradients, by a forward of each; training does not notice.

        Returns: the sum over its supervised tokens, nats, and how many they are; scalars.
        """
        (base_hidden,) = self.hidden([batch], step)
        with as_in_training(self._model, self._args.device, self._args.seed + step), torch.no_grad():
            inputs = send_to_device(dict(batch), base_hidden.device)
            right_padded = row_lengths(batch) is not None
            outputs = policy_forward(self._model, inputs, right_padded=right_padded, hidden=True, logprobs=False)
            total = self.total(outputs, base_hidden)
        return total, total.new_tensor(len(base_hidden))


def is_measured(step: int, *, logging_steps: int, max_steps: int, micro_batches: int) -> bool:
    """Whether `kl_to_base` is measured in an optimizer step: for log lines far enough apart, and in the last step.

    Args:
        step: counted from 1.
        micro_batches: of a step.
    """
    lines = math.ceil(MICRO_BATCHES / (logging_steps * micro_batches))
    return step == max_steps or step % (logging_steps * lines) == 0
