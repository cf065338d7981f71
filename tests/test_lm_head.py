"""The LM head in tiles: its logits are the model's, and the numbers made of them those of the full logits."""

import math

import pytest
import torch
from tiny_models import load, save_tiny_model

from qpsft.psft import lm_head
from qpsft.psft.forward import policy_forward
from qpsft.psft.lm_head import LMHead, top_entropy

HEADS = {
    "llama": {},
    "gemma2": dict(final_logit_softcapping=5.0),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0),
}
"""A plain head, one with a cap, and two with a factor."""


def head_of(folder, model_type, monkeypatch, **config):
    from trl.trainer.utils import add_fused_lm_head

    model, _ = load(save_tiny_model(folder, model_type, **config), quantization="none", dtype="float32")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) < torch.tensor([[4], [7]]), -100)
    outputs = policy_forward(model, {"input_ids": ids, "labels": labels}, right_padded=True, hidden=True)
    logits = model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100]
    return model, outputs, logits


@pytest.mark.parametrize("model_type", HEADS)
def test_the_logits_are_the_model_s(tmp_path, monkeypatch, model_type):
    _, outputs, logits = head_of(tmp_path, model_type, monkeypatch, **HEADS[model_type])
    assert outputs.hidden.shape == (8 + 5, 64) and outputs.hidden.requires_grad is False
    torch.testing.assert_close(outputs.head.logits(outputs.hidden), logits, rtol=1e-5, atol=1e-5)
    if HEADS[model_type]:  # it would be noticed if the factor or the cap were left out
        plain = LMHead(outputs.head.weight, outputs.head.bias).logits(outputs.hidden)
        assert (plain - logits).abs().max() > 0.1
    own = outputs.log_probs[outputs.label_mask]
    assert (own - outputs.head.logits(outputs.hidden).log_softmax(-1).max(-1).values).max() < 1e-5


@pytest.mark.parametrize("tile", [2**24, 700, 1])
def test_top_entropy_is_that_of_the_20_likeliest(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(lm_head, "TILE", tile)
    _, outputs, logits = head_of(tmp_path, "gemma2", monkeypatch, final_logit_softcapping=5.0)
    largest = logits.sort(-1, descending=True).values[:, :20].double()
    p = largest.softmax(-1)
    expected = -(p * p.log()).sum(-1)
    entropy = top_entropy(outputs.hidden, outputs.head)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert (entropy <= math.log(20) + 1e-6).all() and entropy.std() > 0.01
    assert len(list(outputs.head.tiles(len(logits)))) == math.ceil(13 / max(1, tile // logits.shape[-1]))
    full = logits.double().log_softmax(-1)
    assert (-(full.exp() * full).sum(-1) - expected).abs().min() > 0.1  # the whole entropy is another number


def test_no_supervised_token_gives_no_values(tmp_path):
    assert top_entropy(torch.zeros(0, 4), LMHead(torch.zeros(9, 4))).shape == (0,)


def test_a_vocabulary_of_less_than_20_tokens_is_taken_whole():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 4, dtype=torch.float64), LMHead(torch.randn(7, 4).double(), dtype=torch.float64)
    p = (hidden @ head.weight.T).softmax(-1)
    torch.testing.assert_close(top_entropy(hidden, head), -(p * p.log()).sum(-1))


def test_without_the_lm_head_only_hidden_states_come_back(tmp_path, monkeypatch):
    model, outputs, _ = head_of(tmp_path, "llama", monkeypatch)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) < torch.tensor([[4], [7]]), -100)
    inputs = {"input_ids": ids, "labels": labels}
    bare = policy_forward(model, inputs, right_padded=True, hidden=True, logprobs=False)
    assert bare.log_probs is None and torch.equal(bare.hidden, outputs.hidden)
    without = policy_forward(model, inputs, right_padded=True)
    assert without.hidden is None and torch.equal(without.log_probs, outputs.log_probs)
