"""How much of the training is left in a model that was rounded again after it: PSFT's updates are small.

Two numbers, each beside the base's own (the adapter switched off): the KL divergence from the trained model, and what
held-out answers of the training cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qpsft.model.adapter import adapter_off
from qpsft.verify.live import load_live
from qpsft.verify.measure import Measurement, Sequence, distance, measure

ENOUGH = 0.9
"""Share of the training that has to be left for the rounding to be called harmless."""


@dataclass(frozen=True)
class TrainingKept:
    """What is left of a training, on the same tokens.

    Attributes:
        kl_base, kl_exported: mean KL(trained ‖ base) and KL(trained ‖ exported) of the next token, nats.
        nll_base, nll_trained, nll_exported: mean negative log-likelihood of the held-out answers' tokens, nats; None
            where the adapter's folder holds none.
    """

    kl_base: float
    kl_exported: float
    nll_base: float | None = None
    nll_trained: float | None = None
    nll_exported: float | None = None

    @property
    def share(self) -> float:
        """Of the training, 0 to 1: of what it gained on held-out answers where it gained, else of the KL it moved the
        model."""
        left = 1 - self.kl_exported / self.kl_base if self.kl_base else 1.0
        if self.nll_base is not None and self.nll_base > self.nll_trained:
            left = (self.nll_base - self.nll_exported) / (self.nll_base - self.nll_trained)
        return min(max(left, 0.0), 1.0)

    def summary(self) -> str:
        """One sentence."""
        text = f"{self.share:.0%} of the training is left: "
        if self.nll_base is not None:
            text += (
                f"a token of held-out answers costs {self.nll_exported:.3f} nats (trained {self.nll_trained:.3f}, base "
                f"{self.nll_base:.3f}); "
            )
        return text + f"KL from the trained model {self.kl_exported:.1e} nats (base {self.kl_base:.1e})"


def training_kept(
    adapter: Path,
    base: str | None,
    sequences: list[Sequence],
    trained: Measurement,
    kl: float,
    chosen: Mapping[int, float],
) -> TrainingKept:
    """Compares an exported model with the trained one and with its base.

    Args:
        adapter: its folder.
        base: where its base is now; None is the place in its record.
        sequences: `written_from` is where a held-out answer begins.
        trained: the trained model's log-probabilities on them.
        kl: mean KL(trained ‖ exported), nats.
        chosen: the exported model's log-probabilities of the sequences' own tokens, by position among all.
    """
    live = load_live(adapter, base)
    with adapter_off(live.model):
        off = measure(live.model, sequences, trained.full.shape[1], live.model.device)
    kl_base = distance(trained, off, sequences, 0.0).kl
    answers, start = set(), 0
    for sequence in sequences:
        end = start + len(sequence.ids) - 1
        answers |= set(range(start + sequence.written_from - 1, end))
        start = end
    places = sorted(answers & set(chosen))
    if not places:
        return TrainingKept(kl_base, kl)
    cost = [-float(model.chosen[places].mean()) for model in (off, trained)]
    return TrainingKept(kl_base, kl, *cost, -float(torch.tensor([chosen[place] for place in places]).mean()))
