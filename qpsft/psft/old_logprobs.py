"""The old log-probabilities of a block, log π_old(y_t) of its supervised tokens: made once, kept until the block ends.

optimizer step               where they come from
right after a snapshot       its own training forward records them: the policy is the reference, the ratio is 1
another one, first visit     scored under the reference before the first micro-batch
later visits                 kept from the first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qpsft.psft.losses import OLD_LOGPROBS
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.schedule import StepPosition
from qpsft.psft.scoring import as_in_training, token_budget


@dataclass(frozen=True)
class Recorded:
    """Stands for the old log-probabilities of a micro-batch whose training forward will give them."""

    mini_batch: int
    micro_batch: int


class OldLogprobs:
    """What the micro-batches of a run carry as `old_logprobs`.

    Args:
        model: the policy, with TRL's fused LM head; in training it is on its device, and sharded if it will be.
        args: PSFTConfig. With one visit nothing is kept: no mini-batch comes twice.

    Attributes:
        reference: the reference policy; None before the first snapshot.
    """

    def __init__(self, model: nn.Module, args: Any):
        self.reference: ReferencePolicy | None = None
        self._model, self._args = model, args
        self._kept: dict[int, list[Tensor | None]] = {}  # by mini-batch, one tensor per micro-batch

    def attach(self, batches: Sequence[dict[str, Any]], position: StepPosition, step: int) -> None:
        """Gives every micro-batch of an optimizer step its `old_logprobs`: a tensor, or what `resolve` makes one of.

        Renews the reference where the step is a snapshot's.

        Args:
            batches: micro-batches of tensors (batch, sequence), as for `ReferencePolicy.score`.
            position: of the step; not in the SFT warm-up.
            step: optimizer steps before this one.
        """
        if self.reference is None:
            self.reference = ReferencePolicy(self._model, fused_lm_head=True)
        if position.is_snapshot:
            self.reference.snapshot()
            self._kept.clear()
            old_logprobs = [Recorded(position.mini_batch, i) for i in range(len(batches))]
            self._keep(position.mini_batch, [None] * len(batches))
        elif position.mini_batch in self._kept:
            old_logprobs = self._kept[position.mini_batch]
        else:
            old_logprobs = self.score(batches, step)
            self._keep(position.mini_batch, old_logprobs)
        for batch, old in zip(batches, old_logprobs, strict=True):
            batch[OLD_LOGPROBS] = old

    def score(self, batches: Sequence[dict[str, Any]], step: int) -> list[Tensor]:
        """The log-probabilities of an optimizer step's micro-batches under the reference, in training mode."""
        budget = token_budget(self._args, max(batch["input_ids"].numel() for batch in batches))
        with as_in_training(self._model, self._args.device, self._args.seed + step):
            return self.reference.score(batches, token_budget=budget)

    def _keep(self, mini_batch: int, old_logprobs: list[Tensor | None]) -> None:
        if self._args.visits > 1:
            self._kept[mini_batch] = old_logprobs

    def resolve(self, attached: Tensor | Recorded | None, logprobs: Tensor) -> Tensor | None:
        """The old log-probabilities of a micro-batch, once its training forward has run.

        Args:
            attached: what `attach` gave it; None where it gave nothing.
            logprobs: (batch, sequence - 1), of the training forward.
        """
        if not isinstance(attached, Recorded):
            return attached
        own = logprobs.detach().float()
        if attached.mini_batch in self._kept:
            self._kept[attached.mini_batch][attached.micro_batch] = own
        return own

    def renew(self) -> None:
        """Reference := the policy as it is now, in mid-block: for a policy that was set to other weights."""
        if self.reference is not None:
            self.reference.snapshot()
            self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """`reference` (None before the first snapshot) and `kept`, for a checkpoint between two optimizer steps.

        Of a sharded model the reference is gathered: every process must call it.
        """
        return {"reference": self.reference and self.reference.state_dict(), "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`. Raises TrainingError when the reference does not fit the policy."""
        if state["reference"] is not None:
            self.reference = ReferencePolicy(self._model, fused_lm_head=True)
            self.reference.load_state_dict(state["reference"])
        device = self._args.device
        self._kept = {mini: [tensor.to(device) for tensor in tensors] for mini, tensors in state["kept"].items()}
