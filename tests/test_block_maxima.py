"""Block maxima of 4-bit weights, rounded as on the CPU and as on a GPU, on whatever machine."""

import pytest
import torch
from bitsandbytes import functional

from qpsft.model.block_maxima import nearest_codes, round_maxima, rounding_of


@pytest.fixture(scope="module")
def maxima():
    return torch.randn(8 * 256 + 40, generator=torch.Generator().manual_seed(0)).abs()


def test_the_code_value_is_the_nearest(maxima):
    values, code = maxima - maxima.mean(), functional.create_dynamic_map()
    numbers, largest = nearest_codes(values, code)
    assert numbers.dtype == torch.uint8 and numbers.shape == values.shape and largest.shape == (9,)
    scaled = values / largest.repeat_interleave(256)[: len(values)]
    distance = (scaled.unsqueeze(1) - code).abs()
    assert torch.equal(distance.gather(1, numbers.long().unsqueeze(1)).squeeze(1), distance.amin(1))


def test_the_cpu_kernel_takes_a_neighbour_now_and_then(maxima):
    """The fault this is for. Where it is gone, both roundings are one, and the record's field with it."""
    large = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1)).abs()
    values = large - large.mean()
    cpu = functional.quantize_blockwise(values, blocksize=256)[0]
    differing = (cpu != nearest_codes(values, functional.create_dynamic_map())[0]).double().mean()
    assert 1e-4 < differing < 1e-2


def test_zeros_are_zeros():
    numbers, largest = nearest_codes(torch.zeros(300), functional.create_dynamic_map())
    assert largest.tolist() == [0.0, 0.0] and not functional.create_dynamic_map()[numbers.long()].any()


@pytest.mark.parametrize("quantized_on", ["cpu", "cuda"])
def test_a_weight_quantized_inside_has_the_maxima_rounded_so(quantized_on):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    plain = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)[1].absmax
    own = functional.quantize_blockwise
    with rounding_of(quantized_on, "cpu"):
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert functional.quantize_blockwise is own
    kept = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(kept, round_maxima(plain, quantized_on))
    other = "cuda" if quantized_on == "cpu" else "cpu"
    assert not torch.equal(kept, round_maxima(plain, other))


def test_a_gpu_can_round_as_the_cpu_did(maxima):
    """The branch for a base that was rounded on the CPU and is loaded on a GPU, run here on CPU tensors."""
    with rounding_of("cpu", "cuda"):
        numbers, state = functional.quantize_blockwise(maxima, blocksize=256)
    expected, expected_state = functional.quantize_blockwise(maxima, blocksize=256)
    assert torch.equal(numbers, expected) and torch.equal(state.absmax, expected_state.absmax)
