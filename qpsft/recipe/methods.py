"""`method:` — published methods by name: each sets the options below and no other; a value given beside it wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpsft.errors import RecipeError, did_you_mean

VISITS = 4
REFERENCE_STEPS = 8  # the default of K
BLOCK = "one block"  # stands for `reference_steps`
BASE_KL = 0.05  # ASFT's authors', for all three
REPLAY_SHARE = 0.1


@dataclass(frozen=True)
class Method:
    """What it is in a line, and its options."""

    what: str
    options: Mapping[str, Any]


METHODS = {
    "psft": Method("PSFT, one visit, as in its paper", {"loss_type": "psft", "num_iterations": 1}),
    "psft_visits": Method(
        "PSFT, several visits to each block, one block of SFT first",
        {"loss_type": "psft", "num_iterations": VISITS, "sft_warmup_steps": BLOCK},
    ),
    "sft": Method("plain SFT", {"loss_type": "nll"}),
    "sft_kl": Method("SFT with the KL to the base", {"loss_type": "nll", "base_kl": BASE_KL}),
    "sft_replay": Method(
        "SFT, a tenth of the rows the base's own answers", {"loss_type": "nll", "replay_share": REPLAY_SHARE}
    ),
    "dft": Method("DFT", {"loss_type": "dft"}),
    "asft": Method("ASFT: DFT with the KL to the base", {"loss_type": "dft", "base_kl": BASE_KL}),
    "eaft": Method("EAFT: tokens the policy is sure of count less", {"loss_type": "eaft"}),
    "stm": Method("STM: only tokens the base finds likely", {"loss_type": "stm"}),
    "trsft": Method("TrSFT: unlikely tokens count less", {"loss_type": "trsft"}),
    "psft_kl": Method("PSFT with the KL to the base", {"loss_type": "psft", "num_iterations": 1, "base_kl": BASE_KL}),
    "psft_replay": Method(
        "PSFT, a tenth of the rows the base's own answers",
        {"loss_type": "psft", "num_iterations": 1, "replay_share": REPLAY_SHARE},
    ),
}
"""By name."""


def method_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a method sets beside those given.

    Raises:
        RecipeError: no such method, with the nearest name.
    """
    if name not in METHODS:
        raise RecipeError(
            f"There is no method {name!r}.", f"{did_you_mean(name, METHODS)}Methods: {', '.join(METHODS)}."
        )
    block = given.get("reference_steps", REFERENCE_STEPS)
    options = METHODS[name].options.items()
    return {key: block if value == BLOCK else value for key, value in options if key not in given}
