"""The losses, one function each, and the numbers logged beside them. Torch only; reads top to bottom like the papers.

Shapes, everywhere: `logprobs`, `old_logprobs` and `mask` are (batch, sequence - 1), aligned with the labels shifted by
one; log-probabilities are natural logarithms (nats). `mask` is True on supervised tokens. A loss is a scalar in nats
(NLL) or a dimensionless surrogate (PSFT), divided by `num_items`: the number of supervised tokens of the whole
optimizer step, over all micro-batches and processes, so that gradient accumulation does not change the result.

`LOSSES` names them, and says what each needs besides `logprobs` and `mask`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpsft.errors import TrainingError

EPSILON = 0.28  # the paper's epsilon_high
TOP = 20  # tokens of EAFT's entropy
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 stays finite in float32


class NotFiniteError(TrainingError):
    """A supervised token's log-probability is NaN or infinite. `rows`: the rows of the batch it happened in."""

    def __init__(self, name: str, rows: list[int]):
        self.name, self.rows = name, rows
        super().__init__(
            f"{name} has a NaN or infinite value on a supervised token in row(s) {rows} of the batch.",
            "Lower the learning rate, or look at these rows.",
        )


def _masked(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """`values` in at least float32 with masked positions set to 0, so that a masked -inf can do no harm.

    Raises:
        ValueError: `values` and `mask` differ in shape, or `mask` is not boolean.
    """
    if values.shape != mask.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, mask {tuple(mask.shape)}; they must be equal")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, not {mask.dtype}")
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    return values.masked_fill(~mask, 0.0)


def _checked(name: str, values: Tensor) -> Tensor:
    """`values`, masked already. Raises NotFiniteError. It waits for the device, so a micro-batch has one such check."""
    finite = torch.isfinite(values.detach())
    if not finite.all():
        raise NotFiniteError(name, torch.nonzero(~finite.flatten(1).all(dim=1)).flatten().tolist())
    return values


def _checked_pair(logprobs: Tensor, name: str, other: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`logprobs` and what is called `name`, a constant, both masked; one check for both. Raises NotFiniteError."""
    logprobs, other = _masked("logprobs", logprobs, mask), _masked(name, other.detach(), mask)
    try:
        _checked(name, logprobs.detach() - other)  # finite only where both are
    except NotFiniteError:
        _checked("logprobs", logprobs)
        raise
    return logprobs, other


def _per_item(total: Tensor, mask: Tensor, num_items: Tensor | int | None) -> Tensor:
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / count.clamp(min=1)  # a batch without supervised tokens is 0, not 0/0


def nll_loss(logprobs: Tensor, mask: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
    """Negative log-likelihood, plain SFT: -sum(mask * logprobs) / N.

    Returns: scalar, nats per supervised token. Args, raises: as `psft_loss`.
    """
    logprobs = _checked("logprobs", _masked("logprobs", logprobs, mask))
    return _per_item(-logprobs.sum(), mask, num_items)


def dft_loss(logprobs: Tensor, mask: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
    """Dynamic Fine-Tuning (arXiv 2508.05629, Eq. 9): each token's NLL weighted by its own probability, no gradient.

    Returns: scalar, nats. Args, raises: as `psft_loss`.
    """
    logprobs = _checked("logprobs", _masked("logprobs", logprobs, mask))
    probability = logprobs.detach().exp()
    return _per_item(-(probability * logprobs).sum(), mask, num_items)


def eaft_loss(
    logprobs: Tensor,
    top_entropy: Tensor,
    mask: Tensor,
    *,
    eaft_alpha: float = 1.0,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Entropy-Adaptive Fine-Tuning (arXiv 2601.02151): each token's NLL weighted by how unsure the policy is there.

    L = -sum_t mask_t * (H_t / ln 20)^alpha * logprobs_t / N, no gradient through the weight

    H_t is the entropy of the softmax over the 20 largest logits. A token that the policy is sure of counts next to
    nothing, whether it is the label or, a "confident conflict", contradicts it. (The authors' code divides by 3.0, the
    rounded ln 20.)

    Args:
        top_entropy: (batch, sequence - 1) float, H_t in nats, from 0 to ln 20; taken as a constant.
        eaft_alpha: alpha, 0 or more. 0 is `nll_loss`.

    Returns: scalar, nats. Other args, raises: as `psft_loss`.
    """
    logprobs, top_entropy = _checked_pair(logprobs, TOP_ENTROPY, top_entropy, mask)
    weight = (top_entropy / math.log(TOP)).clamp(min=0.0) ** eaft_alpha  # rounding may give -1e-8
    return _per_item(-(weight * logprobs).sum(), mask, num_items)


def trsft_loss(
    logprobs: Tensor, mask: Tensor, *, trsft_alpha: float = 0.1, num_items: Tensor | int | None = None
) -> Tensor:
    """Trust-Region SFT (TRAPO, arXiv 2512.17636): SFT for tokens of probability alpha and more, damped below.

    L = -sum_t mask_t * min(p_t / alpha, 1) * logprobs_t / N, no gradient through the weight

    so that a token's push on the logits is at most 1 and falls to 0 with p_t, where SFT's 1 / p_t grows without bound.
    The authors' code (Su-my/TRAPO, `clip_low`) writes p / max(sg p, alpha), which has the same gradient.

    Args:
        trsft_alpha: alpha, above 0 and up to 1. 1 is `dft_loss`; towards 0 it becomes `nll_loss`.

    Returns: scalar, nats. Other args, raises: as `psft_loss`.
    """
    logprobs = _checked("logprobs", _masked("logprobs", logprobs, mask))
    weight = (logprobs.detach().exp() / trsft_alpha).clamp(max=1.0)
    return _per_item(-(weight * logprobs).sum(), mask, num_items)


def stm_loss(
    logprobs: Tensor,
    base_logprobs: Tensor,
    mask: Tensor,
    *,
    stm_threshold: float = 2.5,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Selective Token Masking (arXiv 2501.14315): the NLL of the tokens that the base finds likely.

    L = -sum_t mask_t * [perplexity of y_t under the base <= threshold] * logprobs_t / N

    The perplexity of a token is 1 / probability, so 2.5 keeps tokens of base probability 0.4 and more. N counts all
    supervised tokens, as in every loss here. (The authors set the other labels to -100, so their mean is over the kept
    ones: a larger loss, by the same factor in every step but for chance, which AdamW takes out again.)

    Args:
        base_logprobs: (batch, sequence - 1) float, log-probabilities under the base; taken as a constant.
        stm_threshold: the largest perplexity of a token that is trained on. Above 1.

    Returns: scalar, nats. Other args, raises: as `psft_loss`.
    """
    logprobs, base_logprobs = _checked_pair(logprobs, BASE_LOGPROBS, base_logprobs, mask)
    kept = base_logprobs >= -math.log(stm_threshold)
    return _per_item(-logprobs.masked_fill(~kept, 0.0).sum(), mask, num_items)


def psft_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    epsilon: float = EPSILON,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Proximal SFT (arXiv 2508.17784): PPO's clipped surrogate with advantage +1 on every demonstrated token.

    L = -sum_t mask_t * min(r_t, clip(r_t, 1 - eps, 1 + eps)) / N,    r_t = exp(logprobs_t - old_logprobs_t)

    With a positive advantage the minimum makes the lower clip act nowhere, so what remains is min(r_t, 1 + eps): a
    token already (1 + eps) times as likely as at the last snapshot contributes no gradient. At r = 1 the gradient is
    that of `nll_loss`.

    Args:
        logprobs: (batch, sequence - 1) float, log-probabilities under the policy, with gradient.
        old_logprobs: (batch, sequence - 1) float, under the reference policy; taken as a constant.
        mask: (batch, sequence - 1) bool, True on supervised tokens.
        epsilon: upper end of the trust region, as a relative change of a token's probability. Above 0.
        num_items: N; None: the number of supervised tokens in `mask`.

    Returns:
        Scalar surrogate; -1 right after a snapshot. It is not a likelihood: read `nll` beside it.

    Raises:
        NotFiniteError: NaN or infinity at a supervised position, with the rows.
        ValueError: shapes differ, `mask` is not boolean, or `epsilon` is not above 0.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    logprobs, old_logprobs = _checked_pair(logprobs, OLD_LOGPROBS, old_logprobs, mask)
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = torch.clamp(ratio, max=1.0 + epsilon).masked_fill(~mask, 0.0)
    return _per_item(-surrogate.sum(), mask, num_items)


OLD_LOGPROBS = "old_logprobs"
BASE_LOGPROBS = "base_logprobs"
TOP_ENTROPY = "top_entropy"


@dataclass(frozen=True)
class Loss:
    """A loss and what it takes.

    Attributes:
        function: of `logprobs`, `mask`, `num_items` and, by name, what `needs` and `options` name.
        needs: what the trainer makes for it, micro-batch by micro-batch, each (batch, sequence - 1) float32:
            `OLD_LOGPROBS`, log-probabilities of the labels under the reference policy; `BASE_LOGPROBS`, those under the
            base; `TOP_ENTROPY`, entropy of the policy's softmax over its 20 largest logits, nats.
        options: of PSFTConfig.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __call__(
        self,
        logprobs: Tensor,
        mask: Tensor,
        made: Mapping[str, Any],
        args: Any,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The function's value.

        Args:
            made: what is needed, by name, and options that the trainer moves while it runs.
            args: the other options, as attributes.
        """
        options = {name: made.get(name, getattr(args, name)) for name in self.options}
        by_name = {name: made[name] for name in self.needs} | options
        return self.function(logprobs, mask=mask, num_items=num_items, **by_name)


LOSSES = {
    "psft": Loss(psft_loss, needs=(OLD_LOGPROBS,), options=("epsilon",)),
    "nll": Loss(nll_loss),
    "dft": Loss(dft_loss),
    "eaft": Loss(eaft_loss, needs=(TOP_ENTROPY,), options=("eaft_alpha",)),
    "trsft": Loss(trsft_loss, options=("trsft_alpha",)),
    "stm": Loss(stm_loss, needs=(BASE_LOGPROBS,), options=("stm_threshold",)),
}
"""By `loss_type`."""


SUMS = ("nll", "entropy", "mean_token_accuracy", "clip_fraction", "approx_kl")


@torch.no_grad()
def loss_statistics(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    *,
    epsilon: float = EPSILON,
    entropy: Tensor | None = None,
    is_top1: Tensor | None = None,
) -> dict[str, Tensor]:
    """The logged numbers of one micro-batch, as sums over its supervised tokens (see `mean_statistics`).

    Args:
        logprobs, old_logprobs, mask, epsilon: as in `psft_loss`; without `old_logprobs` the ratio is 1 everywhere.
        entropy: (batch, sequence - 1) float, nats, entropy of the policy's next-token distribution; None counts as 0.
        is_top1: (batch, sequence - 1) bool, whether the label is the most likely token; None counts as False.

    Returns:
        Scalars, float32, on the device of `logprobs`: `num_items` (supervised tokens); sums of `nll` (nats), `entropy`
        (nats), `mean_token_accuracy`, `clip_fraction` (r > 1 + epsilon: no gradient), `approx_kl` (k3 estimator,
        (r - 1) - log r, reference against policy, http://joschu.net/blog/kl-approx.html); and `ratio_max`.
    """
    logprobs = logprobs.masked_fill(~mask, 0.0)
    zero = logprobs.new_zeros(())
    log_ratio = zero.expand_as(logprobs)
    if old_logprobs is not None:
        log_ratio = _masked("logprobs", logprobs, mask) - _masked(OLD_LOGPROBS, old_logprobs.detach(), mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    return {
        "num_items": mask.sum(),
        "nll": -logprobs.sum(),
        "entropy": zero if entropy is None else entropy.masked_fill(~mask, 0.0).sum(),
        "mean_token_accuracy": zero if is_top1 is None else (is_top1.bool() & mask).sum(),
        "clip_fraction": ((ratio > 1.0 + epsilon) & mask).sum(),
        "approx_kl": (ratio - 1.0 - log_ratio).masked_fill(~mask, 0.0).sum(),
        "ratio_max": ratio.masked_fill(~mask, 0.0).max() if mask.numel() else zero,
    }


def mean_statistics(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Token means over several `loss_statistics` (micro-batches, processes); `ratio_max` is the maximum over them.

    Returns: floats; 0 everywhere when no token is supervised.
    """
    if not parts:
        return {}
    count = max(1, int(sum(float(part["num_items"]) for part in parts)))
    means = {name: sum(float(part[name]) for part in parts) / count for name in SUMS}
    return means | {"ratio_max": max(float(part["ratio_max"]) for part in parts)}
