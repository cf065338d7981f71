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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantized_on", ["cpu", "cuda"])
def test_a_weight_quantized_inside_has_its_maxima_rounded_so(quantized_on, device):
    """`device` "cuda" takes the branch of a GPU, on CPU tensors."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    plain = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)[1].absmax
    own = functional.quantize_4bit
    with rounding_of(quantized_on, device):
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert functional.quantize_4bit is own
    kept = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(kept, round_maxima(plain, quantized_on))
    assert not torch.equal(kept, round_maxima(plain, "cuda" if quantized_on == "cpu" else "cpu"))
    assert state.nested and functional.dequantize_4bit(packed, state).shape == weight.shape


def test_the_cpu_s_own_rounding_is_bitsandbytes():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    _, expected = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    with rounding_of("cpu", "cuda"):
        _, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(state.absmax, expected.absmax) and torch.equal(state.offset, expected.offset)
    assert torch.equal(state.state2.absmax, expected.state2.absmax)


def test_the_order_of_summation_does_not_matter_on_a_gpu():
    """A mean that is summed in float32 depends on it, and an ulp moves maxima to the next code value."""
    maxima = torch.rand(1 << 16, generator=torch.Generator().manual_seed(3)) + 1e-3
    order = torch.randperm(len(maxima), generator=torch.Generator().manual_seed(4))
    orders = [maxima, maxima[order], maxima.flip(0), *(maxima.roll(k) for k in (1, 7, 1000))]
    means = {float(m.double().mean().float()) for m in orders}
    assert len(means) == 1
    assert round_maxima(maxima, "cuda").mean() == pytest.approx(float(maxima.mean()), rel=1e-3)
