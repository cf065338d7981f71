"""Which rows are scored together: never more memory than training takes, never other kernels than training's."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from live_bytes import peak_of_scoring, peak_of_training
from peft import get_peft_model
from small_runs import make_base, make_lora, make_rows, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qpsft.model.base import load_base
from qpsft.plan.live_bytes import LiveBytes
from qpsft.psft import reference, scoring
from qpsft.psft.forward import needs_mask, policy_forward
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.scoring import default_token_budget, groups, real_tokens, row_lengths

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


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


@pytest.mark.parametrize(
    "dtype,checkpointing,head_tile",
    [
        (torch.bfloat16, True, 64),
        (torch.bfloat16, False, 64),
        (torch.float32, True, 64),
        (torch.float32, False, 64),
        (torch.bfloat16, True, 4096),  # the LM head's tile is the peak
        (torch.float32, False, 4096),
    ],
)
def test_scoring_takes_no_more_memory_than_training_and_nearly_as_much(monkeypatch, dtype, checkpointing, head_tile):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", head_tile)
    monkeypatch.setattr(scoring, "HEAD_TILE", (4096, head_tile))
    monkeypatch.setattr(scoring, "LEAST_BYTES", 0)
    model, batch = lora_model(dtype, checkpointing), one_row(96)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    budget = default_token_budget(
        96, model.config, bits=torch.finfo(dtype).bits, checkpointing=checkpointing, spare_bytes=gradients
    )
    peak_of_training(forward, model, batch)  # autograd's own first allocations
    training = peak_of_training(forward, model, batch)
    reference = ReferencePolicy(model, fused_lm_head=True)
    window = [batch] * (2 * budget // 96 + 4)
    assert 0.4 * training < peak_of_scoring(reference, window, budget) <= training
    assert peak_of_scoring(reference, window, 2 * budget + 96) > training  # the budget is not needlessly small


def test_a_row_longer_than_the_budget_takes_less_memory_whole_than_training_did(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)  # the same in both passes
    model, batch = lora_model(torch.bfloat16, True), one_row(700)
    peak_of_training(forward, model, batch)
    training = peak_of_training(forward, model, batch)
    assert peak_of_scoring(ReferencePolicy(model, fused_lm_head=True), [batch], 16) < 0.9 * training


def test_the_default_budget_follows_what_training_holds():
    llama_8b = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    settings = dict(bits=16, checkpointing=True)
    plain = default_token_budget(512, llama_8b, **settings)
    assert 2 * 512 < plain < 4 * 512
    assert default_token_budget(1024, llama_8b, **settings) == pytest.approx(2 * plain, rel=0.01)
    gradients = 168 * 2**20  # rank 16 on all linear layers, in float32
    assert default_token_budget(512, llama_8b, spare_bytes=gradients, **settings) - plain == pytest.approx(
        0.8 * gradients / (13 * 4096 + 12 * 14336), abs=1
    )
    assert default_token_budget(512, llama_8b, bits=16, checkpointing=False) > 20 * 512
    assert default_token_budget(512, llama_8b, offloading=True, **settings) < plain
    tiled = default_token_budget(16_384, llama_8b, tiled=True, **settings)
    assert 16_384 < tiled < default_token_budget(16_384, llama_8b, **settings)
    small = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=5)
    assert default_token_budget(512, small, **settings) == 64 * 2**20 // (2 * (32768 + 3 * 64))
    assert default_token_budget(5000, small, **settings) >= 5000  # one micro-batch at least


def test_scoring_happens_when_no_gradients_and_no_activations_are_alive(base, tmp_path):
    trainer = make_trainer(base, tmp_path, rows=make_rows(40, longest=80), max_steps=5, per_device_train_batch_size=4)
    live = LiveBytes()
    seen, during = [], []
    score = trainer._score

    def watched(batches):
        seen.append([name for name, p in trainer.model.named_parameters() if p.grad is not None])
        kept = sum(t.nbytes for batch in batches for t in batch.values())
        during.append(live.now - kept)
        return score(batches)

    trainer._score = watched
    with live:
        trainer.train()
    assert len(seen) == 3 and not any(seen)
    state = 3 * trainer.policy_bytes  # the reference and AdamW's two moments
    assert all(state <= now < state + trainer.policy_bytes for now in during), (state, during)
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


@pytest.mark.parametrize("limits", [[], [12], [7, 64], [100]])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_groups_hold_every_row_once_within_the_budget_and_on_its_own_batch_s_kernels(limits, budget):
    lengths = [[3, 2], [20], [9, 9, 1], [1]]
    batches = [{"input_ids": torch.zeros(len(of_batch), max(of_batch))} for of_batch in lengths]
    seen = []
    for group in groups(batches, lengths, budget, limits):
        assert list(group) == sorted(group)
        tokens = len(group) * group[-1].length
        for row in group:
            least, most = scoring.same_kernels(batches[row.batch]["input_ids"].numel(), limits)
            assert least <= tokens and (most is None or tokens <= most)
        assert tokens <= budget or len(set(group)) == 1 or tokens - group[-1].length < least
        seen += dict.fromkeys(group)
    assert sorted(seen) == sorted(scoring.Row(n, b, r) for b, of in enumerate(lengths) for r, n in enumerate(of))


def test_scores_do_not_depend_on_the_kernels_thresholds(base, monkeypatch):
    model = get_peft_model(load_base(base, verbose=False)[0], make_lora(init_lora_weights=False))
    rows = make_rows(7, seed=5)
    batches = [COLLATE([rows[i] for i in part]) for part in ((0, 1), (2,), (3, 4, 5), (6,))]
    plain = ReferencePolicy(model).score(batches, token_budget=60)
    shapes = []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(reference, "fused_limits", lambda model: [16, 30])
    kept = ReferencePolicy(model).score(batches, token_budget=60)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(plain, kept, strict=True))
    own = [batch["input_ids"].numel() for batch in batches]
    assert {scoring.same_kernels(n, [16, 30]) for n in shapes} == {scoring.same_kernels(n, [16, 30]) for n in own}


def test_bounds_of_the_same_kernels():
    assert scoring.same_kernels(50, []) == (1, None)
    bounds = {tokens: scoring.same_kernels(tokens, [8, 128]) for tokens in (1, 8, 9, 128, 129, 5000)}
    assert bounds == {1: (1, 8), 8: (1, 8), 9: (9, 128), 128: (9, 128), 129: (129, None), 5000: (129, None)}
    assert scoring.fused_limit(lambda *shape: shape[2] <= 37, 1536, 0, torch.bfloat16, 64, 64) == 37
    assert scoring.fused_limit(lambda *shape: False, 1536, 0, torch.bfloat16, 64, 64) == 0


def test_on_the_cpu_there_is_one_kernel(base):
    assert scoring.fused_limits(load_base(base, verbose=False)[0]) == []


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
        scoring.fused_limit(ops._gemm_4bit_use_custom_fn, ops._gemm_4bit_custom_max_m, 0, dtype, *shape)
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
