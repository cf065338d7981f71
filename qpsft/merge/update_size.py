"""How large an adapter's update is beside the rounding step of 4 bits, layer by layer.

People re-quantize a merged model to run it. An update smaller than the rounding step moves few weights to another
4-bit code, and what moves none is gone. Three numbers a layer (W is what is merged onto, M = W + ΔW, Q rounds to 4 bits
and back):

- `update_to_step` = ‖ΔW‖ / ‖W0 − Q(W0)‖, W0 being the base's original weight;
- `codes_changed`: the share of weights whose code in Q(M) is another than in Q(W);
- `kept` = ⟨Q(M) − Q(W), ΔW⟩ / ‖ΔW‖²: how much of the update is still there after re-quantizing. 1 is all of it, 0 is
  none. It can lie around 1 with an update far below the step: rounding keeps small updates on average when W lies
  anywhere between the codes, as original weights do; weights that were rounded before lie *on* the codes, so a small
  update moves none of them.

The denominator of the first is not ‖M − Q(M)‖: for a W that lies on the codes that is ‖ΔW‖ itself when nothing is kept.
Block maxima are not rounded in turn here (double quantization); this moves all three by less than a percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpsft.merge.rounding import Rounding, dequantize, quantize


@dataclass(frozen=True)
class LayerUpdate:
    """One adapted weight. `shape` is (out, in), the norms are Frobenius norms, the rest is the module's docstring."""

    name: str
    shape: tuple[int, ...]
    update_norm: float
    weight_norm: float
    step_norm: float
    update_to_step: float
    codes_changed: float
    kept: float


class UpdateMeter:
    """Adds up one layer's numbers, piece by piece. Pieces start at multiples of the block size."""

    def __init__(self, rounding: Rounding):
        self.rounding = rounding
        self._update = self._weight = self._step = self._kept = 0.0
        self._changed = self._count = 0

    def add(self, before: Tensor, after: Tensor, codes: Tensor | None = None) -> None:
        """Adds a piece.

        Args:
            before, after: W and M, float32, shape (n,).
            codes: those of `before`, if it lies on them; ‖W0 − Q(W0)‖ is then not known here (see `add_step`).
        """
        grid = before
        if codes is None:
            codes, grid = self._round(before)
            error = before - grid
            self._step += float(torch.dot(error, error))
        update = after - before
        codes_after, grid_after = self._round(after)
        differing = torch.bitwise_xor(codes, codes_after).numpy()
        self._changed += int((differing > 15).sum()) + int(((differing & 15) != 0).sum())
        self._count += before.numel()
        self._update += float(torch.dot(update, update))
        self._weight += float(torch.dot(before, before))
        self._kept += float(torch.dot(grid_after - grid, update))

    def add_step(self, squared_error: float) -> None:
        """Adds Σ (W0 − Q(W0))² where it was found elsewhere."""
        self._step += squared_error

    def result(self, name: str, shape: tuple[int, ...]) -> LayerUpdate:
        update, step = math.sqrt(self._update), math.sqrt(self._step)
        return LayerUpdate(
            name=name,
            shape=shape,
            update_norm=update,
            weight_norm=math.sqrt(self._weight),
            step_norm=step,
            update_to_step=update / step if step else math.inf,
            codes_changed=self._changed / self._count,
            kept=self._kept / self._update if self._update else 1.0,
        )

    def _round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = quantize(values, self.rounding.kind, self.rounding.block_size)
        return codes, dequantize(codes, absmax, values.numel(), self.rounding, torch.float32)


def update_verdict(layers: list[LayerUpdate]) -> str:
    """One sentence on what re-quantizing the merged weights to 4 bits would leave of the update."""
    update = sum(layer.update_norm**2 for layer in layers)
    if not update:
        return "No matrix was changed by a low-rank update."
    weights = sum(math.prod(layer.shape) for layer in layers)
    kept = sum(layer.kept * layer.update_norm**2 for layer in layers) / update
    changed = sum(layer.codes_changed * math.prod(layer.shape) for layer in layers) / weights
    step_to_update = math.sqrt(sum(layer.step_norm**2 for layer in layers) / update)
    numbers = f"{changed:.1%} of the adapted weights would change their 4-bit code, {kept:.0%} of the update would stay"
    if kept < 0.5:
        return f"Re-quantizing to 4 bits would erase most of what was learnt ({numbers}): use 8 bits or more."
    if step_to_update > 2:
        return (
            f"Re-quantizing to 4 bits would bury what was learnt in errors {step_to_update:.0f} times its size "
            f"({numbers}): use 8 bits or more."
        )
    return f"Re-quantizing to 4 bits would keep most of what was learnt ({numbers})."
