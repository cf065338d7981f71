"""How bitsandbytes rounds the block maxima of a 4-bit weight to 8 bits (double quantization), here and on a GPU.

A 4-bit weight keeps one scale, its largest absolute value, for each block of 64 weights. Under double quantization
these scales, less their mean, are rounded too: each block of 256 of them is divided by its largest, and every quotient
becomes the number of a code value. bitsandbytes 0.50's CPU kernel takes a neighbour of the nearest code value for
about 0.1 % of them (`backends/cpu/ops.py`); its GPU kernels take the nearest. An adapter corrects the weights it was
trained on, so whoever loads or merges its base rounds as the device of the training did, whatever is at hand.

On a GPU the mean, too, depends on the order of summation, and an ulp there moves a few maxima to the next code value.
So `load_base` leaves the rounding of maxima on a GPU to this module, which sums in float64: the same bits everywhere.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 256
"""Block maxima that share a scale, as in `bitsandbytes.functional.quantize_4bit`."""


def nearest_codes(values: Tensor, code: Tensor, block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest code value, as the CUDA kernel of `bitsandbytes.functional.quantize_blockwise` does.

    The kernel (csrc/kernels.cu, `kQuantizeBlockwise`) multiplies by the reciprocal of the block's largest value and
    compares with the midpoints of neighbouring code values.

    Args:
        values: float, any shape, n elements.
        code: (256,) float32, ascending.

    Returns: numbers into `code`, uint8, of the shape of `values`; and the largest of each block, float32,
        (⌈n / block_size⌉,).
    """
    flat = values.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1.0 / largest.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
    midpoints = (code[1:] + code[:-1]) * 0.5
    numbers = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    return numbers.flatten()[: flat.numel()].view(values.shape), largest


def round_maxima(maxima: Tensor, quantized_on: str) -> Tensor:
    """Block maxima after their rounding to 8 bits and back.

    Args:
        maxima: (blocks,) float32, on the CPU.
        quantized_on: type of the torch device that rounded them in training, such as "cpu" or "cuda".
    """
    from bitsandbytes.functional import dequantize_blockwise

    numbers, offset, state = _rounded(maxima, quantized_on)
    return dequantize_blockwise(numbers, state) + offset


@contextlib.contextmanager
def rounding_of(quantized_on: str, device: str) -> Iterator[None]:
    """Inside, bitsandbytes on `device` rounds block maxima as on `quantized_on` (types of torch devices)."""
    from bitsandbytes import functional

    own = functional.quantize_4bit
    if (quantized_on, device) != ("cpu", "cpu"):
        functional.quantize_4bit = functools.partial(_quantize_4bit, own, quantized_on)
    try:
        yield
    finally:
        functional.quantize_4bit = own


def _rounded(maxima: Tensor, quantized_on: str):
    """The numbers of code values (uint8), the mean (float32) and bitsandbytes' state that turns numbers into values."""
    from bitsandbytes import functional

    if quantized_on == "cpu":
        offset = maxima.mean()
        numbers, state = functional.quantize_blockwise(maxima - offset, blocksize=BLOCK)
        return numbers, offset, state
    offset, code = maxima.double().mean().float(), functional.create_dynamic_map()
    numbers, largest = nearest_codes(maxima - offset, code)
    return numbers, offset, functional.QuantState(absmax=largest, code=code, blocksize=BLOCK, dtype=maxima.dtype)


def _quantize_4bit(own: Callable, quantized_on: str, weight: Tensor, *, compress_statistics: bool = False, **settings):
    """`bitsandbytes.functional.quantize_4bit`, the block maxima rounded as on `quantized_on`."""
    packed, state = own(weight, compress_statistics=False, **settings)
    if compress_statistics:
        numbers, offset, nested = _rounded(state.absmax.cpu(), quantized_on)
        nested.to(weight.device)
        state.absmax, state.offset, state.state2 = numbers.to(weight.device), offset.to(weight.device), nested
        state.nested = True
    return packed, state
