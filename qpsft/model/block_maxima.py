"""How bitsandbytes rounds the block maxima of a 4-bit weight to 8 bits (double quantization), here and on a GPU.

A 4-bit weight keeps one scale, its largest absolute value, for each block of 64 weights. Under double quantization
these scales, less their mean, are rounded too: each block of 256 of them is divided by its largest, and every quotient
becomes the number of a code value. bitsandbytes 0.50's CPU kernel takes a neighbour of the nearest code value for
about 0.1 % of them (`backends/cpu/ops.py`); its GPU kernels take the nearest. An adapter corrects the weights it was
trained on, so whoever loads or merges its base rounds as the device of the training did, whatever is at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    from bitsandbytes import functional

    offset = maxima.mean()
    quantize = functional.quantize_blockwise if quantized_on == "cpu" else _quantize_to_nearest
    numbers, state = quantize(maxima - offset, blocksize=BLOCK)
    return functional.dequantize_blockwise(numbers, state) + offset


@contextlib.contextmanager
def rounding_of(quantized_on: str, device: str) -> Iterator[None]:
    """Inside, bitsandbytes on `device` rounds block maxima as it does on `quantized_on` (types of torch devices)."""
    from bitsandbytes import functional

    own = functional.quantize_blockwise
    if quantized_on == "cpu" and device != "cpu":
        functional.quantize_blockwise = _quantize_on_the_cpu
    elif quantized_on != "cpu" and device == "cpu":
        functional.quantize_blockwise = _quantize_to_nearest
    try:
        yield
    finally:
        functional.quantize_blockwise = own


def _quantize_to_nearest(values: Tensor, *, blocksize: int):
    """`bitsandbytes.functional.quantize_blockwise` as on a GPU, for values on any device."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map().to(values.device)
    numbers, largest = nearest_codes(values, code, blocksize)
    return numbers, functional.QuantState(absmax=largest, code=code, blocksize=blocksize, dtype=values.dtype)


def _quantize_on_the_cpu(values: Tensor, *, blocksize: int):
    """`bitsandbytes.functional.quantize_blockwise` by its CPU kernel, for values on any device."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map()
    numbers, largest = torch.ops.bitsandbytes.quantize_blockwise.default(values.cpu(), code, blocksize)
    state = functional.QuantState(absmax=largest, code=code, blocksize=blocksize, dtype=values.dtype)
    state.to(values.device)
    return numbers.to(values.device), state
