"""Packed rows see themselves only: the same log-probabilities and gradients as alone, in both passes."""

import contextlib
import itertools

import pytest
import torch
from peft import get_peft_model
from small_runs import (
    Recorder,
    gradients,
    largest_difference,
    log_lines,
    make_config,
    make_lora,
    make_rows,
    make_trainer,
    policy,
    same,
)
from tiny_models import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qpsft.errors import RecipeError
from qpsft.model import attention as attention_module
from qpsft.model.attention import attention_by_piece, fits
from qpsft.model.base import load_base
from qpsft.psft.forward import policy_forward
from qpsft.psft.packing import PackedRows, check_packing, packed_collator
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.scoring import real_tokens

BY_MASK = PackedRows(pad_token_id=0)
BY_PIECE = PackedRows(pad_token_id=0, by_piece=True)
END_TO_END = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
ALONE = DataCollatorForLanguageModeling(pad_token_id=0)


def adapted(folder, attention=None, checkpointing=False):
    """A 4-bit model whose adapter has an effect, with TRL's tiled LM head, in training mode."""
    torch.manual_seed(1)
    model, _ = load_base(folder, verbose=False, attn_implementation=attention)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, make_lora(init_lora_weights=False, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def pack(rows, *sizes):
    """Packed rows, as `trl.pack_dataset` makes them, of so many rows each."""
    packed, start = [], 0
    for size in sizes:
        part = rows[start : start + size]
        start += size
        packed.append(
            {
                "input_ids": sum(part["input_ids"], []),
                "labels": sum(part["labels"], []),
                "seq_lengths": [len(ids) for ids in part["input_ids"]],
            }
        )
    return packed


def alone(model, rows):
    """The log-probabilities of every row by itself, in the places they have in packed rows laid end to end."""
    parts = []
    for row in rows:
        batch = ALONE([row])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float().log_softmax(-1)
        labels = batch["labels"][0, 1:]
        picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0.0)
        parts += [picked.new_zeros(1), picked]
    return torch.cat(parts)[1:]


def end_to_end(logprobs, packed):
    """(batch, sequence - 1) scores of packed rows in the places of `alone`."""
    parts = []
    for row, examples in zip(logprobs, packed, strict=True):
        parts += [row.new_zeros(1), row[: len(examples["input_ids"]) - 1]]
    return torch.cat(parts)[1:]


def fully_supervised(count):
    rows = make_rows(count, seed=5)
    return rows.map(lambda row: {"labels": list(row["input_ids"])})


MODELS = [
    ("llama", "sdpa", BY_PIECE, {}),
    ("llama", "sdpa", BY_MASK, {}),
    ("llama", "eager", BY_MASK, {}),
    ("qwen2", "sdpa", BY_PIECE, {}),
    ("gpt_neox", "sdpa", BY_PIECE, {}),
    ("opt", "sdpa", BY_PIECE, {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    ("gemma2", "eager", BY_MASK, {"sliding_window": 6}),
    ("gemma3_text", "sdpa", BY_MASK, {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma3_text", "sdpa", BY_PIECE, {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
    ("mistral", "sdpa", BY_MASK, {"sliding_window": 6}),
]


def attending(model, collator):
    return attention_by_piece(model.get_base_model()) if collator.by_piece else contextlib.nullcontext()


@pytest.mark.parametrize("model_type,attention,collator,settings", MODELS)
def test_packed_rows_have_the_log_probabilities_of_rows_alone_in_both_passes(
    tmp_path, model_type, attention, collator, settings
):
    """Every token supervised, also those right behind a boundary; sliding windows shorter than the rows."""
    save_tiny_model(tmp_path, model_type, **settings)
    model = adapted(tmp_path, attention, checkpointing=True)
    assert fits(model.config, 64) == collator.by_piece or (model_type, attention) == ("llama", "sdpa")
    rows = fully_supervised(7)
    packed = pack(rows, 3, 1, 3)
    with torch.no_grad():
        expected = alone(model, rows)
    assert (expected != 0).sum() == sum(len(ids) - 1 for ids in rows["input_ids"])

    batch = collator(packed)
    reference = ReferencePolicy(model, fused_lm_head=True)
    with attending(model, collator):
        trained = policy_forward(model, batch, right_padded=True).log_probs
        scored = reference.score([batch], token_budget=10_000)[0]
        one_by_one = [row[0] for row in reference.score([collator([row]) for row in packed], token_budget=1)]
        trained.sum().backward()  # recomputes
    assert trained.requires_grad and model.config._attn_implementation == attention
    for logprobs in (trained.detach(), scored, one_by_one):
        assert (end_to_end(logprobs, packed) - expected).abs().max() < 1e-5

    # the control: what a broken mask looks like
    broken = {**ALONE([{k: row[k] for k in ("input_ids", "labels")} for row in packed]), "labels": batch["labels"]}
    with torch.no_grad():
        contaminated = policy_forward(model, broken, right_padded=True).log_probs
    assert (end_to_end(contaminated, packed) - expected).abs().max() > 1e-2


def test_piece_by_piece_no_product_and_no_mask_is_larger_than_a_piece(base, monkeypatch):
    model, rows, shapes = adapted(base), fully_supervised(5), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **kwargs):
        shapes.append((query.shape[0], query.shape[2], key.shape[2], attn_mask is None and kwargs["is_causal"]))
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    batch = BY_PIECE(pack(rows, 3, 2))
    with attending(model, BY_PIECE), torch.no_grad():
        policy_forward(model, batch, right_padded=True)
        by_piece = list(shapes)
        shapes.clear()
        model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]))  # any other forward
    lengths = [len(ids) for ids in rows["input_ids"]]
    assert by_piece == [(1, n, n, True) for n in lengths] * 2  # two layers
    assert shapes == [(*batch["input_ids"].shape, batch["input_ids"].shape[1], True)] * 2


class Written(TorchDispatchMode):
    """Bytes that operators write to new tensors."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.total += out.nbytes
        return out


def test_the_gradient_of_a_piece_is_no_larger_than_the_piece():
    """The same bits as with slices, whose backward writes a tensor as large as the row for every piece."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups, lengths = True, 2, [[5] * 24, [7] * 17]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, heads, 128, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2)]

    def by_slices(module, query, key, value, mask, seq_lengths):
        rows = []
        for row, pieces in enumerate(seq_lengths):
            ends = list(itertools.accumulate(pieces))
            inside = [slice(end - n, end) for n, end in zip(pieces, ends, strict=True)]
            parts = [[t[row : row + 1, :, piece] for t in (query, key, value)] for piece in inside]
            outputs = [sdpa_attention_forward(module, *part, None)[0] for part in parts]
            rows.append(torch.cat([*outputs, outputs[0].new_zeros(1, 128 - ends[-1], 4, 16)], dim=1))
        return torch.cat(rows), None

    def run(function):
        output = function(module, *states, None, lengths)[0]
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        with Written() as written:
            gradients = torch.autograd.grad((output * weights).sum(), states)
        return [output.detach(), *gradients], written.total

    (split, few), (sliced, many) = run(attention_module._attention), run(by_slices)
    assert all(torch.equal(one, other) for one, other in zip(split, sliced, strict=True))
    assert few < many / 10


def test_laid_end_to_end_they_are_the_same_too(base):
    """FlashAttention's layout, here under SDPA."""
    model, rows = adapted(base), fully_supervised(5)
    packed = pack(rows, 3, 2)
    batch = END_TO_END(packed)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in packed))
    with torch.no_grad():
        scored = ReferencePolicy(model, fused_lm_head=True).score([batch], token_budget=10_000)[0][0]
        assert (scored - alone(model, rows)).abs().max() < 1e-5


@pytest.mark.parametrize("collator", [BY_PIECE, BY_MASK], ids=["piece", "mask"])
def test_the_gradient_of_packed_rows_is_that_of_rows_alone(base, collator):
    model, rows = adapted(base, checkpointing=True), make_rows(6, seed=3)
    with attending(model, collator):
        (-policy_forward(model, collator(pack(rows, 4, 2)), right_padded=True).log_probs.sum()).backward()
    together = gradients(model)
    model.zero_grad()
    for row in rows:
        (-policy_forward(model, ALONE([row]), right_padded=True).log_probs.sum()).backward()
    assert largest_difference(together, gradients(model)) < 1e-5 * max(g.abs().max() for g in together.values())


def test_the_collator_keeps_rows_and_supervises_no_first_token():
    rows = fully_supervised(3)
    batch = BY_PIECE(pack(rows, 2, 1))
    first, second, third = (len(ids) for ids in rows["input_ids"])
    width = max(first + second, third)
    assert set(batch) == {"input_ids", "labels", "position_ids", "seq_lengths"}
    assert set(BY_MASK(pack(rows, 2, 1))) == {"input_ids", "labels", "position_ids"}
    assert batch["seq_lengths"] == ((first, second), (third,))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, width)
    assert batch["position_ids"][0, : first + second].tolist() == [*range(first), *range(second)]
    assert batch["labels"][0, 0] == batch["labels"][0, first] == batch["labels"][1, 0] == -100
    assert (batch["labels"] != -100).sum() == first + second + third - 3
    assert (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()
    assert real_tokens(batch) == real_tokens(BY_MASK(pack(rows, 2, 1))) == first + second + third


def test_how_a_model_takes_packed_rows(base):
    config = load_base(base, verbose=False)[0].config

    def by_piece():
        collator = packed_collator(END_TO_END, config, 64)
        return collator.by_piece if isinstance(collator, PackedRows) else "end to end"

    assert by_piece() is True
    config.sliding_window = 63
    assert by_piece() is False
    config.sliding_window = 64
    assert by_piece() is True
    config._attn_implementation_internal = "eager"
    assert by_piece() is False
    for attention in ("flash_attention_2", "kernels-community/flash-attn3"):
        config._attn_implementation_internal = attention
        assert by_piece() == "end to end"
    config._attn_implementation_internal = "sdpa"
    config.layer_types = ["full_attention", "linear_attention"]
    assert by_piece() == "end to end"
    config.layer_types = ["full_attention", "chunked_attention"]
    assert by_piece() is False


def test_a_model_that_mixes_packed_rows_is_refused(tmp_path, base):
    ids = make_rows(1, longest=30)["input_ids"][0] * 3
    check_packing(adapted(base), BY_MASK, ids)
    check_packing(adapted(base), END_TO_END, ids)
    with pytest.raises(RecipeError, match="A llama model with sdpa attention lets the rows packed together see each"):
        check_packing(adapted(base), ALONE, ids)  # no position ids, so no blocks
    # OPT makes its mask without the position ids, but can attend by piece
    save_tiny_model(tmp_path, "opt", ffn_dim=128, word_embed_proj_dim=64)
    opt = adapted(tmp_path)
    with pytest.raises(RecipeError, match="A opt model .*packing: false"):
        check_packing(opt, BY_MASK, ids)
    with attending(opt, BY_PIECE):
        check_packing(opt, BY_PIECE, ids)


def run(base, out, **settings):
    settings = dict(packing=True, max_length=48, rows=make_rows(60), num_iterations=2, max_steps=12) | settings
    return make_trainer(base, out, reference_steps=2, **settings)


def test_a_run_on_packed_rows(base, tmp_path):
    """The loss is a mean over the step's supervised tokens, the scores are the snapshot's, the schedule counts rows."""
    counted = []

    def check(step):
        rows = [trainer.train_dataset[r] for r in trainer._get_schedule().rows(step)]
        pieces = [n for row in rows for n in row["seq_lengths"]]
        tokens.append(sum(pieces))
        for i, old in enumerate(trainer.old_logprobs.state_dict()["kept"].get(trainer._position.mini_batch, [])):
            with trainer.reference.active():
                batch = BY_PIECE(rows[2 * i : 2 * i + 2])
                counted.append((old - policy_forward(trainer.model, batch, right_padded=True).log_probs).abs().max())

    tokens = []
    trainer = run(base, tmp_path, callbacks=[Recorder(check)])
    packed = len(trainer.train_dataset)
    assert 60 / 6 < packed < 60 / 2 and trainer.rows_per_step() == 4
    trainer.train()
    lines = log_lines(trainer)
    assert [line["ratio_max"] == 1 for line in lines] == [step % 4 == 0 for step in range(12)]
    assert [line["loss"] == pytest.approx(-1, abs=1e-6) for line in lines] == [step % 4 == 0 for step in range(12)]
    assert [line["num_tokens"] for line in lines] == torch.tensor(tokens).cumsum(0).tolist()
    assert len(counted) == 24 and max(counted) < 1e-5
    seen = {row for step in range(12) for row in trainer._get_schedule().rows(step)}
    assert trainer.model.config._attn_implementation == "sdpa"  # again
    assert trainer._get_schedule().num_rows == packed and seen <= set(range(packed))
    assert lines[-1]["nll"] < lines[0]["nll"]


def test_packed_and_padded_rows_train_the_same_policy(base, tmp_path):
    """One mini-batch of all rows, packed or not, is the same step."""
    rows = make_rows(12)

    def train(name, **settings):
        shared = dict(reference_steps=3, max_steps=6, learning_rate=1e-3, adam_epsilon=1e-4, rows=rows)
        trainer = make_trainer(base, tmp_path / name, gradient_accumulation_steps=1, **shared, **settings)
        trainer.train()
        return policy(trainer.model), len(trainer.train_dataset)

    padded, _ = train("padded", per_device_train_batch_size=12)
    for length in (40, 96):
        count = len(run(base, tmp_path, rows=rows, max_length=length).train_dataset)
        packed, rows_packed = train(str(length), packing=True, max_length=length, per_device_train_batch_size=count)
        assert rows_packed == count < 12
        assert largest_difference(packed, padded) < 1e-5


def test_packed_rows_are_evaluated_alike_and_streamed_too(base, tmp_path):
    def loss(packing):
        settings = dict(packing=packing, eval_dataset=make_rows(9, seed=4), per_device_eval_batch_size=100)
        trainer = run(base, tmp_path, lora=make_lora(init_lora_weights=False), **settings)
        return trainer.evaluate()["eval_loss"]

    assert loss(True) == pytest.approx(loss(False), abs=1e-6)
    trainer = run(base, tmp_path, rows=make_rows(30).to_iterable_dataset(), num_iterations=1, max_steps=3)
    trainer.train()
    assert [line["ratio_max"] == 1 for line in log_lines(trainer)] == [True, False, True]
    config = trainer.model.config
    assert trainer.data_collator.by_piece
    assert not packed_collator(END_TO_END, config, 48, tensors_only=True).by_piece


@pytest.mark.parametrize("stop", [3, 6])
def test_a_packed_run_resumes_to_the_same_bytes(base, tmp_path, stop):
    through = run(base, tmp_path / "through", max_steps=8)
    through.train()
    first = run(base, tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=stop)
    first.add_callback(Recorder(on_step=lambda step: setattr(first.control, "should_training_stop", step + 1 >= stop)))
    first.train()
    second = run(base, tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=stop)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    assert same(policy(second.model), policy(through.model))


def test_what_packing_cannot_do_is_said_before_training(base, tmp_path):
    with pytest.raises(RecipeError, match="packing_strategy wrapped cuts rows in two and lets them see each other"):
        make_config(tmp_path, packing=True, packing_strategy="wrapped")
    with pytest.raises(RecipeError, match="packing needs max_length"):
        make_config(tmp_path, packing=True, max_length=None)
    save_tiny_model(tmp_path / "opt", "opt", ffn_dim=128, word_embed_proj_dim=64)
    model, _ = load_base(tmp_path / "opt", verbose=False, attn_implementation="eager")
    trainer = run(base, tmp_path, model=model, lora=make_lora(target_modules="all-linear"))
    with pytest.raises(RecipeError, match="A opt model with eager attention lets the rows packed together see each"):
        trainer.train()
