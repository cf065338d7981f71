"""What to change when a run does not fit: the cheapest first, each tried by planning it anew."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qpsft.recipe.file import Recipe

Needed = Callable[[Recipe], int]
STEP = 64
"""Lengths are tried in multiples of so many tokens."""


@dataclass(frozen=True)
class Suggestion:
    """Options that make a run fit, and what it then needs in bytes."""

    options: dict[str, Any]
    needed: int

    def flags(self) -> str:
        """As on the command line."""
        return " ".join(
            f"--{name} {str(value).lower() if value is True else value}" for name, value in self.options.items()
        )


def changed(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """The recipe with other options of the trainer's; the original stays as it is."""
    trainer = copy.copy(recipe.trainer)
    for name, value in options.items():
        setattr(trainer, name, value)
    return dataclasses.replace(recipe, trainer=trainer)


def suggest(recipe: Recipe, needed: Needed, limit: int, *, cuda: bool, longest: int) -> Suggestion | None:
    """The cheapest change after which `needed(recipe)` is at most `limit`: what costs nothing in the result first.

    One change alone, then several, then these and shorter rows.

    Args:
        recipe: one that does not fit.
        needed: bytes that a recipe needs.
        limit: bytes there are.
        cuda: on a CUDA device, where state can be moved to host memory.
        longest: the base's context length.
    """
    all_changes: dict[str, Any] = {}
    steps = list(_changes(recipe, cuda))
    for options in steps:
        need = needed(changed(recipe, options))
        if need <= limit:
            return Suggestion(options, need)
    for options in steps:
        all_changes |= options
        need = needed(changed(recipe, all_changes))
        if need <= limit:
            return Suggestion(dict(all_changes), need)
    length = longest_that_fits(changed(recipe, all_changes), needed, limit, min(recipe.trainer.max_length, longest))
    if length is None:
        return None
    options = all_changes | {"max_length": length}
    return Suggestion(options, needed(changed(recipe, options)))


def _changes(recipe: Recipe, cuda: bool) -> Iterator[dict[str, Any]]:
    """Single changes: those that leave the result as it is up to rounding first, by what they cost in time."""
    args = recipe.trainer
    rows = args.per_device_train_batch_size
    if rows > 1:
        yield {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows * args.gradient_accumulation_steps,
        }
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if not args.tiled_mlp:
        yield {"tiled_mlp": True}
    if cuda and not args.activation_offloading:
        yield {"activation_offloading": True}
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.startswith("adamw_torch") and cuda:
        yield {"optim": "adamw_8bit"}
    if "adamw" in optim and "paged" not in optim and cuda:
        yield {"optim": "paged_adamw_8bit"}


def longest_that_fits(recipe: Recipe, needed: Needed, limit: int, longest: int) -> int | None:
    """The largest max_length, to 3 % or `STEP` tokens, up to `longest`; None when not even `STEP` tokens fit.

    From the recipe's own length by doubling or halving, then where a straight line crosses the limit: planning very
    long rows takes long itself.
    """
    needs: dict[int, int] = {}
    length = min(recipe.trainer.max_length, longest)
    while True:
        needs[length] = needed(changed(recipe, {"max_length": length}))
        low = max((n for n in needs if needs[n] <= limit), default=None)
        high = min((n for n in needs if needs[n] > limit), default=None)
        if high is None:
            if low == longest:
                return longest
            length = min(2 * low, longest)
        elif low is None:
            if high <= STEP:
                return None
            length = max(STEP, high // 2)
        elif high - low <= max(STEP, low // 32):
            return low
        else:
            guess = low + (high - low) * (limit - needs[low]) / (needs[high] - needs[low])
            inside = int(min(max(guess, low + 0.1 * (high - low)), high - 0.1 * (high - low)))
            rounded = inside // STEP * STEP
            length = rounded if low < rounded < high else inside
