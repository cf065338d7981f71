"""How a step's rows are split into micro-batches, and whether layers are recomputed: the fastest way that fits.

The step has the same rows in every way, so the result is the same up to rounding. What differs is memory, which is
planned, and time, which is estimated here from a few rough speeds that only have to put the ways in order. Those of a
CPU follow benchmarks/results/micro_batches.json; those of a GPU are of an RTX 3090 on paper and not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qpsft.plan.changes import Needed, changed
from qpsft.recipe.file import Recipe


@dataclass(frozen=True)
class RowLengths:
    """Tokens of a data set's rows: at most and, if it is known, on average."""

    longest: int
    mean: float | None = None

    def padded(self, rows: int) -> float:
        """A row with its padding in a micro-batch of so many, as if lengths were spread evenly about the mean."""
        mean = self.longest if self.mean is None else self.mean
        return mean + (self.longest - mean) * (rows - 1) / (rows + 1)


@dataclass(frozen=True)
class Speed:
    """Of a kind of device.

    Attributes:
        layer: seconds for one layer in one pass that do not depend on the tokens: kernels are launched one by one.
        dequantized: weights per second.
        operations: of matrix products per second.
        share: of the memory that a run may be planned to need; the rest is for what the plan does not know.
    """

    layer: float
    dequantized: float
    operations: float
    share: float


SPEEDS = {"cuda": Speed(1e-3, 4e11, 5e13, 0.9), "cpu": Speed(1.5e-3, 1e9, 5e10, 0.5)}


def seconds_per_step(options: dict[str, Any], rows: RowLengths, *, layers: int, parameters: int, speed: Speed) -> float:
    """Estimate for the training passes of an optimizer step: forward and backward, and the forward once more.

    LoRA's backward takes about as long as its forward: the base's weights need no gradients.
    """
    micro_batch, count = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    tokens = micro_batch * rows.padded(micro_batch)
    one_pass = layers * speed.layer + parameters / speed.dequantized + tokens * 2 * parameters / speed.operations
    return (3 if options["gradient_checkpointing"] else 2) * count * one_pass


def splits(recipe: Recipe) -> list[dict[str, Any]]:
    """The ways to split a step's rows without remainder. Gradient checkpointing is as the recipe says, if it does."""
    args = recipe.trainer
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps
    names = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old name and its new one
    stated = {*names, *(f"{name}_kwargs" for name in names)} & set(recipe.given)
    return [
        {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": total // rows,
            "gradient_checkpointing": checkpointing,
        }
        for rows in range(1, total + 1)
        if total % rows == 0
        for checkpointing in ([args.gradient_checkpointing] if stated else [True, False])
    ]


def fastest_that_fits(
    recipe: Recipe, needed: Needed, limit: int, rows: RowLengths, *, layers: int, parameters: int, device: str
) -> dict[str, Any]:
    """The three options of the fastest split whose need leaves enough of the memory free; else of the smallest.

    Args:
        recipe: of the run, its rows as long as the longest.
        needed: bytes that a recipe needs.
        limit: bytes there are.
        rows: their lengths.
        layers, parameters: of the base.
        device: "cuda" or "cpu".
    """
    speed, ways = SPEEDS[device], splits(recipe)
    too_large: list[dict[str, Any]] = []
    ways.sort(key=lambda way: seconds_per_step(way, rows, layers=layers, parameters=parameters, speed=speed))
    for way in ways:
        if any(_takes_no_less(way, other) for other in too_large):
            continue
        if needed(changed(recipe, way)) <= speed.share * limit:
            return way
        too_large.append(way)
    return smallest(recipe)


def smallest(recipe: Recipe) -> dict[str, Any]:
    """The split that takes the least memory: one row at a time, recomputed unless the recipe says otherwise."""
    return splits(recipe)[0]


def _takes_no_less(way: dict[str, Any], than: dict[str, Any]) -> bool:
    """Whether a split takes at least another's memory: no fewer rows, and recomputed only if that one is."""
    rows, checkpointing = "per_device_train_batch_size", "gradient_checkpointing"
    return way[rows] >= than[rows] and way[checkpointing] <= than[checkpointing]
