"""Which rows are scored together: never more memory than training takes, never other kernels than training's."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from live_bytes import peak_of_scoring, peak_of_training
from peft import get_peft_model
from small_runs import make_lora, make_rows, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qpsft.model.base import load_base
from qpsft.plan.live_bytes import LiveBytes
from qpsft.psft import reference, scoring
from qpsft.psft.forward import needs_mask, policy_forward
from qpsft.psft.old_logprobs import OldLogprobs
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.scoring import Row, groups, real_tokens, row_lengths, token_budget

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0)


def lora_model(dtype, checkpointing, hidden=128, intermediate=448, layers=4):
    """An unquantized Llama with a float32 adapter: what the base's rounding takes does not depend on the batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    add_fused_lm_head(model)
    model = get_peft_model(model, make_lora(r=8))
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model.train()


def one_row(length):
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def forward(model, batch):
    return policy_forward(model, batch, right_padded=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_scoring_two_micro_batches_takes_no_more_memory_than_training_on_one(monkeypatch, dtype, checkpointing):
    """With as many layers as models of 1B parameters have; four micro-batches would take more."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    model, batch = lora_model(dtype, checkpointing, layers=16), one_row(96)
    peak_of_training(forward, model, batch)  # autograd's own first allocations
    training = peak_of_training(forward, model, batch)
    reference = ReferencePolicy(model, fused_lm_head=True)
    assert peak_of_scoring(reference, [batch] * 8, 2 * 96) <= training
    assert (peak_of_scoring(reference, [batch] * 8, 4 * 96) > training) == checkpointing


def test_a_row_longer_than_the_budget_takes_less_memory_whole_than_training_did(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)  # the same in both passes
    model, batch = lora_model(torch.bfloat16, True), one_row(700)
    peak_of_training(forward, model, batch)
    training = peak_of_training(forward, model, batch)
    assert peak_of_scoring(ReferencePolicy(model, fused_lm_head=True), [batch], 16) < 0.9 * training


def test_the_default_budget_is_two_micro_batches_or_512_tokens():
    def budget(largest, **options):
        return token_budget(
            SimpleNamespace(**dict(score_token_budget=None, activation_offloading=False) | options), largest
        )

    assert (budget(1000), budget(1000, activation_offloading=True)) == (2000, 1000)
    assert (budget(100), budget(300), budget(100, activation_offloading=True)) == (512, 600, 100)
    assert (budget(1000, score_token_budget=7), budget(1000, score_token_budget=0)) == (7, None)


def test_scoring_happens_when_no_gradients_and_no_activations_are_alive(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, rows=make_rows(40, longest=80), max_steps=5, per_device_train_batch_size=4)
    live = LiveBytes()
    seen, during = [], []
    score = OldLogprobs.score

    def watched(self, batches, step):
        seen.append([name for name, p in trainer.model.named_parameters() if p.grad is not None])
        kept = sum(t.nbytes for batch in batches for t in batch.values())
        during.append(live.now - kept)
        return score(self, batches, step)

    monkeypatch.setattr(OldLogprobs, "score", watched)
    with live:
        trainer.train()
    assert len(seen) == 3 and not any(seen)
    adapter = trainer.reference.nbytes
    state = 3 * adapter  # the reference and AdamW's two moments
    assert all(state <= now < state + adapter for now in during), (state, during)
    assert live.peak > 3 * max(during)  # which activations would have raised


def test_lengths_of_rows_and_batches_that_must_stay_together():
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 7, 1)]
    batch = COLLATE(rows)
    assert row_lengths(batch) == [3, 7, 1] and real_tokens(batch) == 11
    without = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    assert row_lengths(without) == [7, 7, 7] and real_tokens(without) == 21
    assert row_lengths({**batch, "attention_mask": batch["attention_mask"].flip(1)}) is None  # padded on the left
    positions = torch.tensor([[0, 1, 2, 0, 0], [0, 1, 0, 1, 2], [0, 0, 0, 0, 0]])
    packed = {"input_ids": torch.ones_like(positions), "labels": positions, "position_ids": positions}
    assert row_lengths(packed) == [3, 5, 1] and real_tokens(packed) == 9
    for extra in ("pixel_values", "cu_seq_lens_q", "attention_mask"):
        assert row_lengths({**packed, extra: torch.ones(3)}) is None


@pytest.mark.parametrize("least", [1, 13, 65])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_groups_hold_every_row_once_by_length_within_the_budget_and_with_the_least_tokens(least, budget):
    rows = [
        Row(length, b, r)
        for b, lengths in enumerate([[3, 2], [20], [9, 9, 1], [1]])
        for r, length in enumerate(lengths)
    ]
    seen = []
    for group in groups(rows, budget, least):
        tokens = len(group) * group[-1].length
        assert list(group) == sorted(group) and tokens >= least
        assert tokens <= budget or len(set(group)) == 1 or tokens - group[-1].length < least
        seen += dict.fromkeys(group)
    assert seen == sorted(rows)
    assert list(groups([], budget, least)) == []


def test_rows_stay_among_the_tokens_of_their_micro_batch_s_kernels(base, monkeypatch):
    """Up to the limit micro-batches are scored as they are, larger ones in groups above it."""
    model = get_peft_model(load_base(base, verbose=False)[0], make_lora(init_lora_weights=False))
    rows = make_rows(7, seed=5)
    batches = [COLLATE([rows[i] for i in part]) for part in ((0, 1), (2,), (3, 4, 5), (6,))]
    plain = ReferencePolicy(model).score(batches, token_budget=60)
    shapes = []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    own = [tuple(batch["input_ids"].shape) for batch in batches]
    limit = sorted(rows * width for rows, width in own)[1]
    monkeypatch.setattr(reference, "fused_limit", lambda model: limit)
    small = [shape for shape in own if shape[0] * shape[1] <= limit]
    for budget in (60, 1):
        shapes.clear()
        kept = ReferencePolicy(model).score(batches, token_budget=budget)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(plain, kept, strict=True))
        assert len(small) == 2 and shapes[: len(small)] == small
        assert all(rows * width > limit for rows, width in shapes[len(small) :]) and len(shapes) > len(small)


def test_the_fused_limit_is_that_of_the_layer_with_the_highest(base):
    assert scoring.layer_fused_limit(lambda *shape: shape[2] <= 37, 1536, 0, torch.bfloat16, 64, 64) == 37
    assert scoring.layer_fused_limit(lambda *shape: False, 1536, 0, torch.bfloat16, 64, 64) == 0
    assert scoring.fused_limit(load_base(base, verbose=False)[0]) == 0  # on the CPU there is one kernel


CARDS = {
    "T4": ((40, 7, 5), torch.float16, 128),
    "RTX 3060": ((28, 8, 6), torch.bfloat16, 128),
    "RTX 4060": ((24, 8, 9), torch.bfloat16, 256),
    "RTX 4090": ((128, 8, 9), torch.bfloat16, 128),
    "A100": ((108, 8, 0), torch.bfloat16, 128),
    "RTX 5090": ((170, 12, 0), torch.bfloat16, 64),
}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (896, 896), (4864, 896), (896, 4864), (128, 896)]


@pytest.mark.parametrize("card", CARDS)
def test_the_thresholds_of_bitsandbytes_are_those_in_the_table(monkeypatch, card):
    """Its own heuristic, for cards that are not here; on a GPU the same function is asked."""
    if "bitsandbytes.backends.cuda.ops" not in sys.modules:
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    from bitsandbytes.backends.cuda import ops

    properties, dtype, largest = CARDS[card]
    monkeypatch.setattr(ops, "_gpu_dispatch_props", lambda device: properties)
    ops._gemm_4bit_use_custom_fn.cache_clear()
    limits = {
        scoring.layer_fused_limit(ops._gemm_4bit_use_custom_fn, ops._gemm_4bit_custom_max_m, 0, dtype, *shape)
        for shape in SHAPES
    }
    ops._gemm_4bit_use_custom_fn.cache_clear()
    assert max(limits) == largest
    source = Path(scoring.__file__).read_text(encoding="utf-8")
    assert f"{largest}" in source and card in source
    assert ops._gemm_4bit_custom_max_m == scoring.MAX_FUSED_TOKENS


@pytest.mark.parametrize("supervised", ["some", "none", "all"])
def test_the_shared_forward_is_trl_s_without_needless_work(base, supervised):
    """Values and gradients of TRL's head and of the masked attention, whatever is supervised."""
    model, _ = load_base(base, verbose=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, make_lora(init_lora_weights=False))
    batch = COLLATE(list(make_rows(4, seed=5)))
    if supervised != "some":
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        batch["labels"] = torch.full_like(batch["labels"], -100) if supervised == "none" else batch["labels"]
    seen = []
    handle = model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    mine = forward(model, batch)
    mine.log_probs.sum().backward()
    gradient, keys = policy_gradient(model), set(batch)
    theirs = model(**batch, use_cache=False, fused_lm_head=True)
    theirs.log_probs.sum().backward()
    assert seen[0] is None and seen[1] is not None and set(batch) == keys
    for name in ("log_probs", "entropy"):
        assert (mine[name] - theirs[name]).abs().max() < 1e-5
    assert torch.equal(mine.is_top1, theirs.is_top1) and torch.equal(mine.label_mask, theirs.label_mask)
    assert (gradient - policy_gradient(model)).abs().max() < 1e-5 * max(1.0, gradient.abs().max())
    assert (supervised == "none") == (gradient.abs().max() == 0)
    handle.remove()

    heads = []
    model.get_output_embeddings().register_forward_hook(lambda *args: heads.append(args))
    left = {key: value.flip(1) for key, value in batch.items()}  # padding on the left needs its mask
    kept = policy_forward(model, left, right_padded=False)
    expected = model(**left, use_cache=False, fused_lm_head=True)
    assert (kept.log_probs - expected.log_probs).abs().max() < 1e-5
    assert heads == []  # the full logits are never made


def policy_gradient(model):
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts) if parts else torch.zeros(1)


def test_models_that_see_ahead_or_balance_experts_keep_their_mask():
    def needs(**config):
        text = SimpleNamespace(**config)
        return needs_mask(SimpleNamespace(get_text_config=lambda: text))

    assert not needs() and not needs(is_causal=True, use_bidirectional_attention=None, output_router_logits=False)
    assert needs(is_causal=False) and needs(use_bidirectional_attention=True) and needs(output_router_logits=True)
