"""The rounding of weights to 4 bits and back, as the live model does it, on tensors that stay on disk.

"The weights training saw" are what the live forward multiplies by: bitsandbytes dequantizes a 4-bit weight to the
dtype of the activations, code · absmax rounded once to the compute dtype, and so does `RoundedWeight`, on the CPU of
any machine. Block maxima are rounded as on the device of the training (`qpsft.model.block_maxima`). A GPU does the same
arithmetic for each weight. Only the mean of the block maxima, which double quantization subtracts, is summed in another
order there, and can differ in its last bit.

Quantization here gives bitsandbytes' CPU results bit for bit in a tenth of the time: its `bucketize` takes 100 ns a
weight, fifteen vectorized comparisons take 8 ns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qpsft.merge.safetensors_stream import StoredTensor
from qpsft.model.block_maxima import round_maxima

PIECE = 1 << 19  # weights worked on at a time: a few MB of temporaries, and small enough for the CPU's caches


@dataclass(frozen=True)
class Rounding:
    """How the live model rounds a weight.

    Attributes:
        kind: "nf4" or "fp4".
        double_quant: the block maxima are rounded too.
        block_size: weights per block maximum.
        weights_dtype: what the checkpoint's values are cast to before they are quantized.
        compute_dtype: what they are dequantized to.
        quantized_on: type of the torch device that quantized them; it decides how block maxima are rounded.
    """

    kind: str
    double_quant: bool
    block_size: int
    weights_dtype: torch.dtype
    compute_dtype: torch.dtype
    quantized_on: str = "cpu"


class Weight(Protocol):
    """A weight (rows, columns) whose values come on demand, by flat position."""

    def values(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`, float32, shape (stop − start,)."""
        ...


@functools.cache
def _bounds(kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The 15 values halfway between neighbouring code values, and code numbers by rank (None if sorted already)."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type(kind, device="cpu")
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    return bounds.numpy(), None if kind == "nf4" else order.to(torch.uint8).numpy()


def quantize(values: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Rounds to 4 bits, as `bitsandbytes.functional.quantize_4bit` without double quantization.

    Args:
        values: float32, shape (n,).
        kind: "nf4" or "fp4".
        block_size: weights per scale; the last block may be shorter.

    Returns:
        (codes, two to a byte, first in the high half: uint8, shape (⌈n/2⌉,); block maxima: float32, shape (blocks,)).
    """
    bounds, order = _bounds(kind)
    whole = values.numel() - values.numel() % block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(1) if whole else values.new_zeros(0)
    scaled = torch.zeros(values.numel() + values.numel() % 2)
    torch.mul(blocks, (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), out=scaled[:whole].view(-1, block_size))
    if whole < values.numel():
        last = values[whole:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        torch.div(values[whole:], last, out=scaled[whole : values.numel()])
    numbers = scaled.numpy()
    codes = np.zeros(numbers.size, dtype=np.uint8)
    above = np.empty(numbers.size, dtype=np.bool_)
    for bound in bounds:
        np.greater(numbers, bound, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    if order is not None:
        codes = order[codes]
    return torch.from_numpy((codes[::2] << 4) | codes[1::2]), absmax


def dequantize(codes: Tensor, absmax: Tensor, count: int, rounding: Rounding, dtype: torch.dtype) -> Tensor:
    """The first `count` values that codes and block maxima stand for: rounded to `dtype`, then float32."""
    even = count + count % 2  # an odd count would take bitsandbytes' slow path
    values = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, rounding.block_size, rounding.kind, (even,), dtype
    )
    return values.view(-1)[:count].float()


class PlainWeight:
    """A weight that the live model does not round, in `dtype`; None: as it is stored."""

    def __init__(self, read: Callable[[int, int], Tensor], dtype: torch.dtype | None):
        self._read = read
        self._dtype = dtype

    def values(self, start: int, stop: int) -> Tensor:
        values = self._read(start, stop)
        return (values if self._dtype is None else values.to(self._dtype)).float()


class RoundedWeight:
    """A weight that the live model rounds to 4 bits when it loads it. Holds half a byte a weight."""

    def __init__(self, read: Callable[[int, int], Tensor], numel: int, rounding: Rounding):
        self.rounding = rounding
        codes, absmax = [], []
        step = _whole_blocks(PIECE, rounding.block_size)
        for start in range(0, numel, step):
            values = read(start, min(start + step, numel)).to(rounding.weights_dtype).float()
            piece = quantize(values, rounding.kind, rounding.block_size)
            codes.append(piece[0])
            absmax.append(piece[1])
        self._codes = torch.cat(codes)
        self._absmax = torch.cat(absmax)
        if rounding.double_quant:
            self._absmax = round_maxima(self._absmax, rounding.quantized_on)

    def values(self, start: int, stop: int) -> Tensor:
        block = self.rounding.block_size
        absmax = self._absmax[start // block : -(-stop // block)]
        codes = self._codes[start // 2 : (stop + 1) // 2]
        return dequantize(codes, absmax, stop - start, self.rounding, self.rounding.compute_dtype)


class StoredRoundedWeight(RoundedWeight):
    """A weight that is on disk in bitsandbytes' 4-bit format already, with its state beside it."""

    def __init__(self, stored: StoredTensor, state: dict[str, StoredTensor], compute_dtype: torch.dtype):
        parts = quant_state(state)
        self.rounding = Rounding(parts.quant_type, parts.nested, parts.blocksize, parts.dtype, compute_dtype)
        self._codes = stored.read().view(-1).view(torch.uint8)
        self._absmax = parts.absmax.float()
        if parts.nested:
            from bitsandbytes.functional import dequantize_blockwise

            self._absmax = dequantize_blockwise(parts.absmax, parts.state2) + parts.offset


def quant_state(state: dict[str, StoredTensor]):
    """bitsandbytes' `QuantState` from the tensors beside a 4-bit weight, by the ends of their names."""
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict({name: stored.read() for name, stored in state.items()}, device=torch.device("cpu"))


def _whole_blocks(elements: int, block: int) -> int:
    return max(elements - elements % (2 * block), 2 * block)
