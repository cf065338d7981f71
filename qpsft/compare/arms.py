"""What is compared: each arm is a method.

Every arm starts from the same base, is offered the same rows, shuffled alike, and takes as many optimizer steps. Arms
with several visits go through the rows in another order, and may see fewer of them (`qpsft.compare.coverage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpsft.errors import RecipeError, did_you_mean
from qpsft.recipe.methods import METHODS, VISITS

METHOD_OPTIONS = frozenset(
    {"loss_type", "epsilon", "reference_steps", "num_iterations", "sft_warmup_steps", "block_order", "base_kl"}
    | {"target_kl", "target_clip_fraction", "replay_share"}
)
"""Options that belong to an arm; the other options of a recipe are the same for all arms."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: what users call it; one of `qpsft.recipe.methods.METHODS` where there is one.
        what: one line for tables.
        loss_type: of PSFTConfig.
        visits: whether it goes through each block several times, after one block of plain SFT.
        block_order: whether it takes PSFT's order of the rows though its loss needs none.
        keeps: what it adds to the loss against forgetting: `base_kl`, or `replay_share` of the rows.
        rate_of: arms whose learning rate it takes, the first that takes part; none: it has its own.
        control: the arm that differs from it in the loss alone.
    """

    name: str
    what: str
    loss_type: str
    visits: bool = False
    block_order: bool = False
    keeps: Mapping[str, float] = field(default_factory=dict)
    rate_of: tuple[str, ...] = ()
    control: str | None = None

    def options(self, trainer: Any, replay_share: float | None = None) -> dict[str, Any]:
        """The arm's options of PSFTConfig, all that its steps depend on and no other, and its `replay_share`.

        Args:
            trainer: the recipe's PSFTConfig. Its K, epsilon, targets, visits (`VISITS` where it has one only) and, if
                not 0, `base_kl` are the arms' that have such a thing.
            replay_share: the recipe's, if it has one: that of the arms with replay.
        """
        options: dict[str, Any] = {"loss_type": self.loss_type, **self.keeps}
        if "base_kl" in options:
            options["base_kl"] = trainer.base_kl or options["base_kl"]
        if "replay_share" in options:
            options["replay_share"] = replay_share or options["replay_share"]
        if self.loss_type == "psft":
            options["epsilon"] = trainer.epsilon
            targets = {name: getattr(trainer, name) for name in ("target_kl", "target_clip_fraction")}
            options |= {name: value for name, value in targets.items() if value is not None}
        if self.block_order:
            options["block_order"] = True
        if self.loss_type == "psft" or self.block_order:
            visits = trainer.num_iterations if trainer.num_iterations > 1 else VISITS
            options["reference_steps"] = trainer.reference_steps
            options["num_iterations"] = visits if self.visits else 1
            options["sft_warmup_steps"] = trainer.reference_steps if self.visits else 0
        return options


def _of_method(name: str) -> Arm:
    """A method of one visit, at its own learning rate."""
    options = METHODS[name].options
    keeps = {key: options[key] for key in ("base_kl", "replay_share") if key in options}
    return Arm(name, METHODS[name].what, options["loss_type"], keeps=keeps)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("sft", "plain SFT at its own learning rate", "nll"),
        Arm("sft_matched", "plain SFT at PSFT's learning rate", "nll", rate_of=("psft", "psft_visits")),
        Arm(
            "sft_blocks",
            "plain SFT at PSFT's learning rate, in its order of blocks and visits",
            "nll",
            visits=True,
            block_order=True,
            rate_of=("psft_visits", "psft"),
        ),
        _of_method("sft_kl"),
        _of_method("sft_replay"),
        _of_method("dft"),
        _of_method("asft"),
        _of_method("eaft"),
        _of_method("stm"),
        _of_method("trsft"),
        Arm("psft", "PSFT, one visit (the paper)", "psft", control="sft_matched"),
        Arm("psft_visits", "PSFT, several visits, one block of SFT first", "psft", visits=True, control="sft_blocks"),
        _of_method("psft_kl"),
        _of_method("psft_replay"),
    )
}
DEFAULT_ARMS = ("sft", "psft_visits", "sft_kl", "psft_replay", "sft_replay")
"""What a person chooses between to keep something (docs/evidence.md). A small budget keeps SFT and the last
(on a base that cannot answer prompts, `sft_kl`)."""


def find_arm(name: str) -> Arm:
    """The arm of this name. Raises RecipeError with the nearest one."""
    if name not in ARMS:
        raise RecipeError(f"There is no arm {name!r}.", f"{did_you_mean(name, ARMS)}Arms: {', '.join(ARMS)}.")
    return ARMS[name]


def find_arms(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the order of `ARMS`.

    Raises:
        RecipeError: no such arm, or an arm that takes another's learning rate without that other one.
    """
    wanted = {find_arm(name).name for name in names}
    if not wanted:
        raise RecipeError("There is no arm to compare.", f"Arms: {', '.join(ARMS)}.")
    chosen = [arm for name, arm in ARMS.items() if name in wanted]
    for arm in chosen:
        if arm.rate_of and rate_source(arm, chosen) is None:
            raise RecipeError(
                f"The arm {arm.name} takes the learning rate of {' or '.join(arm.rate_of)}, and none takes part.",
                f"Add {arm.rate_of[0]} to --arms.",
            )
    return chosen


def rate_source(arm: Arm, chosen: Sequence[Arm]) -> str | None:
    """The arm whose learning rate `arm` takes; itself if it has its own, None if that arm does not take part."""
    if not arm.rate_of:
        return arm.name
    names = {other.name for other in chosen}
    return next((name for name in arm.rate_of if name in names), None)


def pairs(chosen: Sequence[Arm], rates: Mapping[str, float]) -> list[tuple[str, str]]:
    """Which arms are compared with which: every arm with `sft`, and each PSFT arm with its matched control.

    Args:
        rates: arm -> learning rate. A control at another rate differs in more than the loss, so it is left out.
    """
    names = [arm.name for arm in chosen]
    compared = [(name, "sft") for name in names if name != "sft" and "sft" in names]
    controlled = [arm for arm in chosen if arm.control in names and rates[arm.name] == rates[arm.control]]
    return compared + [(arm.name, arm.control) for arm in controlled]
