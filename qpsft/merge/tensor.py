"""One tensor of the merged model, from the base's file and the adapter's, in pieces small enough for any memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qpsft.errors import ExportError
from qpsft.merge.adapter_file import Change
from qpsft.merge.base_tensors import BaseTensor
from qpsft.merge.rounding import (
    PIECE,
    PlainWeight,
    RoundedWeight,
    Rounding,
    StoredRoundedWeight,
    Weight,
)

Read = Callable[[int, int], Tensor]


class MergedTensor:
    """A tensor of the base and what the adapter changes in it; `pieces` yields the result.

    Args:
        tensor: the base's.
        change: the adapter's, or None.
        rounding: how the live model rounds; None merges onto the original weights.
        plain_dtype: what the live model holds this tensor in if it does not round it; None leaves it as stored.
        dtype: of the result.
    """

    def __init__(
        self,
        tensor: BaseTensor,
        change: Change | None,
        *,
        rounding: Rounding | None,
        plain_dtype: torch.dtype | None,
        dtype: torch.dtype,
    ):
        self.tensor, self.change, self.dtype = tensor, change or Change(), dtype
        self._rounding, self._plain_dtype = rounding, plain_dtype
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        self.rows, self.columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))

    def pieces(self) -> Iterator[Tensor]:
        """The values in `dtype`, flattened, in order.

        Raises:
            ExportError: a value is not finite, or too large for `dtype`.
        """
        if not self.tensor.stored.dtype.is_floating_point and not self.tensor.state:
            yield from self.tensor.stored.pieces(PIECE)
        elif (
            self.change == Change()
            and not self.tensor.rounded
            and self._plain_dtype in (None, self.dtype)
            and (self.tensor.stored.dtype == self.dtype)
        ):
            yield from self.tensor.stored.pieces(PIECE)
        elif self.tensor.transposed:
            values = torch.cat(list(self._computed()))
            yield values.view(self.rows, self.columns).T.contiguous().view(-1)
        else:
            yield from self._computed()

    def _computed(self) -> Iterator[Tensor]:
        weight = self._weight()
        low_rank = self.change.low_rank
        factors = low_rank.factors() if low_rank else None
        magnitude = low_rank.magnitude.read().float().view(-1) if low_rank and low_rank.magnitude else None
        rows = self._rows_per_piece()
        for first in range(0, self.rows, rows):
            last = min(first + rows, self.rows)
            start, stop = first * self.columns, last * self.columns
            values = weight.values(start, stop)
            if factors is not None:
                values = values + (factors[0][first:last] @ factors[1]).view(-1)
            if magnitude is not None:
                matrix = values.view(last - first, self.columns)
                matrix *= (magnitude[first:last] / torch.linalg.vector_norm(matrix, dim=1)).unsqueeze(1)
            self._change_values(values.view(last - first, self.columns), first)
            yield self._to_dtype(values)

    def _weight(self) -> Weight:
        tensor, rounding, replacement = self.tensor, self._rounding, self.change.replacement
        if replacement is not None:
            return PlainWeight(self._flat(replacement), None)
        if rounding is None or not tensor.rounded:
            return PlainWeight(self._flat(tensor.stored), self._plain_dtype)
        if tensor.state:
            return StoredRoundedWeight(tensor.stored, tensor.state, rounding.compute_dtype)
        return RoundedWeight(self._flat(tensor.stored), self.rows * self.columns, rounding)

    def _flat(self, stored) -> Read:
        """A function that reads a tensor by flat position. A transposed one is read as a whole and turned first."""
        if not self.tensor.transposed:
            return stored.read
        values = stored.read().T.contiguous().view(-1)
        return lambda start, stop: values[start:stop]

    def _rows_per_piece(self) -> int:
        """As many rows as `PIECE` weights have, but such that each piece starts with a block of the quantization.

        Blocks have an even number of weights, so a piece also starts with a byte of codes.
        """
        block = self._rounding.block_size if self._rounding else 0
        together = block // math.gcd(self.columns, block) if block else 1
        return max(PIECE // self.columns // together, 1) * together

    def _change_values(self, values: Tensor, first: int) -> None:
        """Writes trained rows into `values` (rows from `first` on, columns), and adds a bias's shift to it."""
        if self.change.rows is not None:
            positions, trained = self.change.rows
            for number, position in enumerate(positions):
                if first <= position < first + values.shape[0]:
                    values[position - first] = trained.read(number * self.columns, (number + 1) * self.columns)
        if self.change.shift is not None:
            shift, scale = self.change.shift
            values += shift.read().float() * scale

    def _to_dtype(self, values: Tensor) -> Tensor:
        least, greatest = torch.aminmax(values)
        largest = max(-float(least), float(greatest))
        if math.isnan(largest) or largest > torch.finfo(self.dtype).max:
            name = self.tensor.name
            if math.isfinite(largest):
                raise ExportError(
                    f"{name} has a value of {largest:.4g} after merging, too large for {self.dtype}.",
                    "Merge to bfloat16 or float32.",
                )
            raise ExportError(
                f"{name} has values that are not finite (NaN or infinity) after merging; the adapter's are finite.",
                f"The base in {self.tensor.stored.file.path} has them, or they overflow: use an undamaged copy.",
            )
        return values.to(self.dtype)
