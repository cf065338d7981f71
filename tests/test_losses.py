"""The losses: hand-computed values, gradients, invariants, and extreme inputs."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qpsft.psft.config import PSFTConfig
from qpsft.psft.losses import (
    LOSSES,
    NotFiniteError,
    dft_loss,
    eaft_loss,
    loss_statistics,
    mean_statistics,
    nll_loss,
    psft_loss,
    stm_loss,
    trsft_loss,
)


def loss_of(name, logprobs, old, mask, num_items=None, **options):
    """A loss as the trainer calls it; where it needs more than `old`, that is made of `old` too."""
    defaults = dict(epsilon=0.28, eaft_alpha=1.0, trsft_alpha=0.1, stm_threshold=2.5)
    # with base log-probabilities of half of `old`, some tokens are kept by the threshold and some are not
    made = {"old_logprobs": old, "base_logprobs": old / 2, "top_entropy": old.exp().clamp(max=1) * math.log(20)}
    return LOSSES[name](logprobs, mask, made, SimpleNamespace(**{**defaults, **options}), num_items)


def tensors(*rows):
    return tuple(torch.tensor(row, dtype=torch.float64) for row in rows)


def test_hand_computed_values():
    logprobs, old = tensors([[math.log(0.5), math.log(0.2), math.log(0.9)]], [[math.log(0.25), math.log(0.25), 0.0]])
    mask = torch.tensor([[True, True, False]])
    # ratios 2.0 (clipped to 1.28) and 0.8 (the lower clip does nothing)
    assert psft_loss(logprobs, old, mask).item() == pytest.approx(-(1.28 + 0.8) / 2, rel=1e-12)
    assert psft_loss(logprobs, old, mask, epsilon=2.0).item() == pytest.approx(-(2.0 + 0.8) / 2, rel=1e-12)
    assert psft_loss(logprobs, old, mask, num_items=8).item() == pytest.approx(-(1.28 + 0.8) / 8, rel=1e-12)
    assert nll_loss(logprobs, mask).item() == pytest.approx((math.log(2) + math.log(5)) / 2, rel=1e-12)
    assert dft_loss(logprobs, mask).item() == pytest.approx((0.5 * math.log(2) + 0.2 * math.log(5)) / 2, rel=1e-12)


def test_hand_computed_values_of_the_weighted_losses():
    (logprobs,) = tensors([[math.log(0.5), math.log(0.02), math.log(0.9)]])
    mask = torch.tensor([[True, True, False]])
    (entropy,) = tensors([[math.log(2), math.log(20), 1.0]])
    half, fiftieth = math.log(2), math.log(50)
    unsure = math.log(2) / math.log(20)
    assert eaft_loss(logprobs, entropy, mask).item() == pytest.approx((unsure * half + fiftieth) / 2, rel=1e-12)
    squared = eaft_loss(logprobs, entropy, mask, eaft_alpha=2.0)
    assert squared.item() == pytest.approx((unsure**2 * half + fiftieth) / 2, rel=1e-12)
    # 0.5 is above 0.1: weight 1; 0.02 is a fifth of it
    assert trsft_loss(logprobs, mask).item() == pytest.approx((half + 0.2 * fiftieth) / 2, rel=1e-12)
    assert trsft_loss(logprobs, mask, trsft_alpha=0.01).item() == pytest.approx((half + fiftieth) / 2, rel=1e-12)
    (base,) = tensors([[math.log(0.39), math.log(0.41), math.log(0.9)]])
    # the mean is over all supervised tokens, those that are not trained on included
    assert stm_loss(logprobs, base, mask).item() == pytest.approx(fiftieth / 2, rel=1e-12)
    assert stm_loss(logprobs, base, mask, stm_threshold=3.0).item() == pytest.approx((half + fiftieth) / 2, rel=1e-12)
    assert stm_loss(logprobs, base, mask, num_items=8).item() == pytest.approx(fiftieth / 8, rel=1e-12)


def test_the_ends_of_the_options_are_other_losses():
    torch.manual_seed(5)
    logprobs, mask = torch.randn(3, 7, dtype=torch.float64) - 3, torch.rand(3, 7) > 0.3
    logprobs = logprobs.clamp(max=0.0)
    entropy, base = torch.rand(3, 7, dtype=torch.float64) * 3, torch.randn(3, 7, dtype=torch.float64) - 3
    nll, dft = nll_loss(logprobs, mask).item(), dft_loss(logprobs, mask).item()
    assert eaft_loss(logprobs, entropy, mask, eaft_alpha=0.0).item() == pytest.approx(nll, rel=1e-12)
    assert trsft_loss(logprobs, mask, trsft_alpha=1.0).item() == pytest.approx(dft, rel=1e-12)
    assert trsft_loss(logprobs, mask, trsft_alpha=1e-9).item() == pytest.approx(nll, rel=1e-12)
    assert stm_loss(logprobs, base, mask, stm_threshold=1e9).item() == pytest.approx(nll, rel=1e-12)
    for other in (
        eaft_loss(logprobs, entropy, mask),
        trsft_loss(logprobs, mask),
        stm_loss(logprobs, base, mask),
    ):
        assert abs(other.item() - nll) > 0.05 and abs(other.item() - dft) > 0.05


def test_trsft_has_the_gradient_of_the_authors_code():
    """Su-my/TRAPO, `clip_low`: p / clamp(sg p, min=0.1), to be maximized."""
    torch.manual_seed(6)
    ours = (torch.randn(3, 7, dtype=torch.float64) - 2).clamp(max=-0.01).requires_grad_()
    theirs, mask = ours.detach().clone().requires_grad_(), torch.ones(3, 7, dtype=torch.bool)
    trsft_loss(ours, mask).backward()
    (-(theirs.exp() / theirs.detach().exp().clamp(min=0.1)).mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)


def test_eaft_s_weight_is_0_where_rounding_makes_an_entropy_negative():
    logprobs, mask = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[True]])
    eaft_loss(logprobs, torch.tensor([[-1e-8]]), mask, eaft_alpha=0.5).backward()
    assert logprobs.grad.item() == 0.0


def test_it_is_ppo_s_two_term_surrogate_with_advantage_one():
    torch.manual_seed(0)
    logprobs = torch.randn(4, 9, dtype=torch.float64) - 2
    old = logprobs + 0.5 * torch.randn(4, 9, dtype=torch.float64)
    mask = torch.rand(4, 9) > 0.3
    ratio = (logprobs - old).exp()
    ppo = torch.minimum(ratio, ratio.clamp(1 - 0.28, 1 + 0.28))[mask].mean()
    assert psft_loss(logprobs, old, mask).item() == pytest.approx(-ppo.item(), rel=1e-12)
    assert ((ratio > 1.28) & mask).any() and ((ratio < 0.72) & mask).any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    torch.manual_seed(1)
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    old = torch.randn(2, 4, dtype=torch.float64) - 2
    logprobs = (old + torch.tensor([[0.1, 0.0, -0.5, 1.0], [-1.0, 0.2, 0.3, 0.6]])).requires_grad_()
    probability = logprobs.detach().exp()
    weights = {  # constants: differentiate with them held fixed
        "dft": probability,
        "eaft": old.exp().clamp(max=1),
        "trsft": (probability / 0.1).clamp(max=1),
    }
    if name in weights:
        weight = weights[name]

        def loss(x):
            return -(weight * x)[mask].sum() / mask.sum()
    else:

        def loss(x):
            return loss_of(name, x, old, mask)

    loss_of(name, logprobs, old, mask).backward()
    step = 1e-6
    for index in range(logprobs.numel()):
        delta = torch.zeros(8, dtype=torch.float64)
        delta[index] = step
        delta = delta.view(2, 4)
        with torch.no_grad():
            expected = (loss(logprobs + delta) - loss(logprobs - delta)) / (2 * step)
        assert logprobs.grad.flatten()[index].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["eaft", "stm"])
def test_no_gradient_reaches_what_a_loss_needs(name):
    logprobs, needed = (torch.tensor([[-0.5, -2.0]], requires_grad=True) for _ in range(2))
    LOSSES[name].function(logprobs, needed, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert needed.grad is None and logprobs.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_declares_all_that_its_function_takes(name):
    loss = LOSSES[name]
    taken = [*inspect.signature(loss.function).parameters]
    assert sorted(taken) == sorted(["logprobs", "mask", "num_items", *loss.needs, *loss.options])
    assert set(loss.options) <= set(PSFTConfig.__dataclass_fields__)


def test_options_and_needs_reach_the_function():
    logprobs, old, mask = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]])
    assert loss_of("psft", logprobs, old, mask, epsilon=0.5).item() == -1.5
    assert loss_of("psft", logprobs, logprobs, mask, epsilon=0.5).item() == -1.0
    assert loss_of("nll", logprobs, old, mask, num_items=4).item() == 0.25


def test_right_after_a_snapshot_the_gradient_is_sft_s_in_float32():
    torch.manual_seed(2)
    base = torch.randn(3, 50) * 3 - 3
    mask = torch.rand(3, 50) > 0.4
    psft, nll = base.clone().requires_grad_(), base.clone().requires_grad_()
    loss = psft_loss(psft, base.clone(), mask)
    loss.backward()
    nll_loss(nll, mask).backward()
    assert loss.item() == -1.0
    torch.testing.assert_close(psft.grad, nll.grad, rtol=1e-6, atol=0)


def test_clipped_and_masked_tokens_have_exactly_zero_gradient():
    old = torch.full((1, 4), -3.0)
    logprobs = torch.tensor([[-3.0, -2.0, -2.7, -9.0]], requires_grad=True)  # ratios 1, 2.7, 1.35, 0.002
    mask = torch.tensor([[True, True, True, True]])
    psft_loss(logprobs, old, mask).backward()
    assert logprobs.grad[0, 1].item() == 0.0 and logprobs.grad[0, 2].item() == 0.0
    assert logprobs.grad[0, 0].item() == -0.25 and logprobs.grad[0, 3].item() < 0.0
    for name in LOSSES:
        x = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        loss_of(name, x, torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]])).backward()
        assert x.grad[0, 1].item() == 0.0 and x.grad[0, 0].item() != 0.0


def test_no_gradient_reaches_the_old_logprobs():
    old = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    logprobs = torch.tensor([[-1.1, -2.2]], requires_grad=True)
    psft_loss(logprobs, old, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert old.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_num_items_add_up_to_the_whole(name):
    torch.manual_seed(3)
    logprobs = torch.randn(8, 12, dtype=torch.float64) - 2
    old = logprobs + 0.3 * torch.randn(8, 12, dtype=torch.float64)
    mask = torch.rand(8, 12) > torch.linspace(0.1, 0.9, 8)[:, None]  # ragged: row lengths differ
    whole = loss_of(name, logprobs, old, mask)
    parts = sum(
        loss_of(name, logprobs[i : i + 1], old[i : i + 1], mask[i : i + 1], num_items=mask.sum()) for i in range(8)
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_not_finite_names_the_row(name):
    logprobs = torch.full((4, 3), -1.0)
    mask = torch.ones(4, 3, dtype=torch.bool)
    for bad in (math.nan, -math.inf, math.inf):
        broken = logprobs.clone()
        broken[2, 1] = bad
        with pytest.raises(NotFiniteError, match=r"\[2\]") as caught:
            loss_of(name, broken, logprobs, mask)
        assert caught.value.rows == [2]
    for needed in LOSSES[name].needs:
        broken = logprobs.clone()
        broken[0, 0] = math.nan
        with pytest.raises(NotFiniteError, match=rf"{needed} .*\[0\]"):
            LOSSES[name].function(logprobs, broken, mask)


def test_wrong_arguments_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="epsilon"):
        psft_loss(x, x, mask, epsilon=0.0)
    with pytest.raises(ValueError, match="shape"):
        psft_loss(x, torch.zeros(1, 3), mask)
    with pytest.raises(ValueError, match="boolean"):
        nll_loss(x, mask.long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x = torch.tensor([[-1.0, -2.0]], dtype=dtype)
    for name in LOSSES:
        assert loss_of(name, x, x, torch.ones(1, 2, dtype=torch.bool)).dtype == torch.float32


logprob = st.one_of(st.floats(-1e4, 0.0, width=32), st.sampled_from([-1e4, -50.0, 0.0]))


@st.composite
def cases(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    size = rows * columns
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    values = [
        torch.tensor(draw(st.lists(logprob, min_size=size, max_size=size)), dtype=torch.float32) for _ in range(2)
    ]
    masked_value = draw(st.sampled_from([-math.inf, math.nan, 0.0]))
    logprobs, old = (torch.where(mask, value, masked_value).view(rows, columns) for value in values)
    return logprobs, old, mask.view(rows, columns)


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(list(LOSSES)))
def test_any_shape_mask_and_extreme_logprobs_give_finite_losses_and_gradients(case, name):
    logprobs, old, mask = case
    leaf = logprobs.clone().requires_grad_()
    loss = loss_of(name, leaf, old, mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()
    assert (leaf.grad[~mask] == 0).all()
    if not mask.any():
        assert loss.item() == 0.0
    if name == "psft":
        assert -1.28 - 1e-6 <= loss.item() <= 0.0
        ratio = (logprobs - old).clamp(-20, 20).exp()
        assert (leaf.grad[mask & (ratio > 1.29)] == 0).all()
    statistics = mean_statistics([loss_statistics(logprobs, old, mask)])
    assert all(math.isfinite(value) for value in statistics.values())
    assert 0.0 <= statistics["clip_fraction"] <= 1.0 and statistics["approx_kl"] >= -1e-5


def test_statistics_by_hand():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2), -math.inf]])
    old = torch.tensor([[math.log(0.25), math.log(0.25), -math.inf]])
    mask = torch.tensor([[True, True, False]])
    part = loss_statistics(
        logprobs,
        old,
        mask,
        entropy=torch.tensor([[0.5, 1.5, 9.0]]),
        is_top1=torch.tensor([[True, False, True]]),
    )
    means = mean_statistics([part])
    assert means["nll"] == pytest.approx((math.log(2) + math.log(5)) / 2, rel=1e-6)
    assert means["entropy"] == pytest.approx(1.0)
    assert means["mean_token_accuracy"] == 0.5
    assert means["clip_fraction"] == 0.5
    assert means["ratio_max"] == pytest.approx(2.0)
    k3 = ((2 - 1 - math.log(2)) + (0.8 - 1 - math.log(0.8))) / 2
    assert means["approx_kl"] == pytest.approx(k3, rel=1e-5)


def test_statistics_are_token_means_over_uneven_micro_batches():
    torch.manual_seed(4)
    logprobs, old = torch.randn(6, 5) - 2, torch.randn(6, 5) - 2
    mask = torch.rand(6, 5) > 0.5
    whole = mean_statistics([loss_statistics(logprobs, old, mask)])
    parts = mean_statistics([loss_statistics(logprobs[i:j], old[i:j], mask[i:j]) for i, j in [(0, 1), (1, 6)]])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert mean_statistics([]) == {}


def test_without_old_logprobs_the_ratio_is_one():
    means = mean_statistics([loss_statistics(torch.full((2, 3), -1.0), None, torch.ones(2, 3, dtype=torch.bool))])
    assert (means["ratio_max"], means["clip_fraction"], means["approx_kl"]) == (1.0, 0.0, 0.0)


def test_a_micro_batch_is_checked_once_for_all_that_is_not_finite():
    """Each check waits for the GPU to finish what it has been given."""

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    logprobs, mask = -torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    for name in LOSSES:
        with Waits() as waits:
            loss_of(name, logprobs, logprobs - 0.1, mask, num_items=torch.tensor(10))
            loss_statistics(logprobs, logprobs - 0.1, mask)
        assert waits.count == 1, name
