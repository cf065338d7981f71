"""Grouped queries: asked of SDPA where a fused kernel takes them, repeated keys elsewhere, and the same numbers."""

import pytest
import torch
from small_runs import make_base, make_rows, make_trainer
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import sdpa_attention

from qpsft.model import attention
from qpsft.model.base import load_base

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def transformers_as_it_comes(monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", attention._asked_by_transformers)
    attention.fused_grouping.cache_clear()
    yield
    attention.fused_grouping.cache_clear()


def on_a_card(monkeypatch, flash=lambda asked: False, efficient=lambda asked: False, hip=None):
    """A key of shape (1, 2, 8, 16) that says it lies on a CUDA card, and what torch says of its kernels there."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", flash)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", efficient)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kwargs: empty(*shape, **kwargs))

    class Key(torch.Tensor):
        device = torch.device("cuda:0")

    return lambda dtype: torch.zeros(1, 2, 8, 16, dtype=dtype).as_subclass(Key)


@pytest.mark.parametrize(
    ("flash", "efficient", "grouped"), [(True, False, True), (False, True, True), (False, False, False)]
)
@pytest.mark.parametrize(
    ("dtype", "autocast", "computed"), [(F16, None, F16), (BF16, None, BF16), (F32, None, F32), (F32, BF16, BF16)]
)
def test_torch_is_asked_whether_a_fused_kernel_does(monkeypatch, flash, efficient, grouped, dtype, autocast, computed):
    """sm_80 or not, on Windows or not: what a build of torch has for a card is known to torch alone."""
    asked = []

    def answer(yes):
        return lambda question: asked.append(question) or yes

    key = on_a_card(monkeypatch, answer(flash), answer(efficient))(dtype)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocast)
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key)  # what is mended; if this fails, transformers has mended it
    attention.repeat_keys_where_no_kernel_groups()
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is grouped
    assert not sdpa_attention.use_gqa_in_sdpa(torch.ones(1, 1, 8, 8), key, key)
    for question in asked:
        assert question.enable_gqa and question.is_causal and question.attn_mask is None
        assert question.query.requires_grad and question.value.requires_grad
        assert question.query.dtype == question.key.dtype == computed
        assert question.query.shape[1] == 2 * question.key.shape[1] and question.key.shape[-1] == 16
    before = len(asked)
    attention.kernel_groups(key, key)
    assert before == len(asked) > 0  # once for a size, not in every layer of every step


def test_other_devices_keep_what_transformers_says(monkeypatch):
    attention.repeat_keys_where_no_kernel_groups()
    assert sdpa_attention.use_gqa_in_sdpa(None, torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))
    key = on_a_card(monkeypatch, hip="6.4")(F32)
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key)


def test_loading_a_base_and_making_a_trainer_see_to_it(tmp_path):
    base = make_base(tmp_path / "base")
    load_base(base, device="cpu")
    assert sdpa_attention.use_gqa_in_sdpa is attention._use_gqa
    sdpa_attention.use_gqa_in_sdpa = attention._asked_by_transformers
    make_trainer(base, tmp_path / "out", rows=make_rows(4))
    assert sdpa_attention.use_gqa_in_sdpa is attention._use_gqa


def test_repeated_keys_give_the_same_numbers(tmp_path, monkeypatch):
    model, _ = load_base(make_base(tmp_path / "base"), device="cpu")
    tokens, asked = torch.arange(3, 23).unsqueeze(0), []

    def watched(*args, enable_gqa=False, **kwargs):
        asked.append((enable_gqa, args[1].shape[1]))
        return scaled_dot_product_attention(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    grouped = model(tokens).logits
    monkeypatch.setattr(attention, "kernel_groups", lambda key, value: False)
    repeated = model(tokens).logits
    assert asked == [(True, 2)] * 2 + [(False, 4)] * 2
    assert torch.allclose(grouped, repeated, atol=1e-5, rtol=0)
