"""A trust region that answers to what the policy did in it: blocks that end early, and an epsilon that moves.

The clip alone bounds nothing: it stops the gradient of tokens that rose, but Adam's momentum and the weights that
tokens share go on moving them, and tokens that fell are not clipped. PPO's practice knows two answers, both optional:

`target_kl`             a block ends, and the reference is renewed, after a step whose mean KL passed it
`target_clip_fraction`  epsilon grows where more tokens are clipped in a block than this, and shrinks where fewer are
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qpsft.errors import RecipeError

FAR = 1.0
"""Nats per token, above which the mean KL of a log line is warned of: a token at the region's edge has 0.03."""
FAR_ENTROPY = 2.0
"""Nats per token by which a log line's mean entropy may be above the first one's: seven times as many likely tokens."""
LARGEST_CHANGE = 1.5
"""Of epsilon from one block to the next, as a factor."""
LARGEST_DISTANCE = 4.0
"""Of epsilon from the one given, as a factor."""


class TrustRegion:
    """Epsilon, and whether the policy has left the region.

    Args:
        epsilon, target_kl, target_clip_fraction: of PSFTConfig.

    Attributes:
        epsilon: of the block under way.
        kl: mean `approx_kl` of the last step, nats per token.
        blocks_ended: blocks that ended early so far.
    """

    def __init__(self, epsilon: float, target_kl: float | None = None, target_clip_fraction: float | None = None):
        self.epsilon = self._given = epsilon
        self._target_kl, self._target_clip_fraction = target_kl, target_clip_fraction
        self.kl, self.blocks_ended = 0.0, 0
        self._tokens, self._clipped = 0.0, 0.0  # of the block
        self._step: list[Tensor] = []
        self._warned = self._warned_of_entropy = False
        self._first_entropy: float | None = None

    @property
    def moves(self) -> bool:
        """Whether there is anything to decide between steps."""
        return self._target_kl is not None or self._target_clip_fraction is not None

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's `loss_statistics`."""
        if self.moves:
            sums = [part[name].double() for name in ("num_items", "approx_kl", "clip_fraction")]
            self._step.append(torch.stack(sums))

    def forget_step(self) -> None:
        """The step's micro-batches will come again."""
        self._step = []

    def end_step(self, accelerator: Accelerator) -> None:
        """Takes in the step's numbers of all processes: each must call it. A second call changes nothing."""
        if self._step:
            own = torch.stack(self._step).sum(0, keepdim=True)
            tokens, kl, clipped = accelerator.gather(own).sum(0).tolist()
            self._step, self.kl = [], kl / max(1, tokens)
            self._tokens += tokens
            self._clipped += clipped

    @property
    def is_left(self) -> bool:
        """Whether the last step's mean KL passed `target_kl`."""
        return self._target_kl is not None and self.kl > self._target_kl

    def begin_block(self) -> None:
        """Moves epsilon by the clip fraction of the block that ended: by its square root, within bounds."""
        if self._target_clip_fraction is not None and self._tokens:
            wanted = math.sqrt(self._clipped / self._tokens / self._target_clip_fraction)
            change = min(max(wanted, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
            least, most = self._given / LARGEST_DISTANCE, self._given * LARGEST_DISTANCE
            self.epsilon = min(max(self.epsilon * change, least), most)
        self._tokens = self._clipped = self.kl = 0.0

    def numbers(self) -> dict[str, float]:
        """What a log line says of it: what can change."""
        numbers = {}
        if self._target_kl is not None:
            numbers["blocks_ended_early"] = self.blocks_ended
        if self._target_clip_fraction is not None:
            numbers["epsilon"] = self.epsilon
        return numbers

    def warn_if_far(self, kl: float, entropy: float) -> None:
        """Warns, once a run each, of a log line's mean `approx_kl` that is out of any trust region, and of an `entropy`
        far above that of the first line."""
        self._first_entropy = entropy if self._first_entropy is None else self._first_entropy
        if entropy > self._first_entropy + FAR_ENTROPY and not self._warned_of_entropy:
            self._warned_of_entropy = True
            warnings.warn(
                f"entropy has risen from {self._first_entropy:.2f} to {entropy:.2f} nats per token: the model's "
                "answers are turning into noise. Lower learning_rate, or stop and go back to an earlier checkpoint.",
                stacklevel=2,
            )
        if kl > FAR and not self._warned:
            self._warned = True
            warnings.warn(
                f"approx_kl is {kl:,.1f} nats per token, out of any trust region: a token at the edge of this one has "
                f"{self.epsilon - math.log1p(self.epsilon):.2f}. The clip keeps little then: lower "
                "learning_rate or reference_steps.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, float]:
        """After `end_step`."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("epsilon", "kl", "blocks_ended", "_tokens", "_clipped")


def check_targets(target_kl: float | None, target_clip_fraction: float | None, loss_type: str, snapshots: bool) -> None:
    """Raises RecipeError for targets that are no numbers to aim at, or that the loss cannot use."""
    for name, value, most in (("target_kl", target_kl, math.inf), ("target_clip_fraction", target_clip_fraction, 1)):
        if value is None:
            continue
        if not 0 < value < most:
            limits = "between 0 and 1" if most == 1 else "above 0"
            raise RecipeError(f"{name} is {value}; it must be {limits}.", "Leave it out to have none.")
        if not snapshots:
            raise RecipeError(
                f"{name} has no effect with loss_type {loss_type}, which has no reference policy.",
                "Leave it out.",
            )
