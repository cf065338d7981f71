"""The invariants of the algorithm, on a 4-bit NF4 model with ragged rows (invariant 6, resuming: test_resume.py)."""

import copy

import pytest
import torch
from peft import LoraConfig
from small_runs import (
    Recorder,
    largest_difference,
    log_lines,
    make_lora,
    make_rows,
    make_trainer,
    off_by,
    policy,
    same,
)
from transformers import PreTrainedModel

from qpsft.model.base import quantized_linears
from qpsft.psft import trainer as trainer_module
from qpsft.psft.forward import policy_forward
from qpsft.psft.reference import ReferencePolicy


def window(trainer, step):
    """The micro-batches of optimizer step `step`, collated anew from the rows the schedule names."""
    rows = trainer._get_schedule().rows(step)
    size = trainer.args.per_device_train_batch_size
    parts = [trainer.train_dataset.select(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [trainer.data_collator([{k: r[k] for k in ("input_ids", "labels")} for r in part]) for part in parts]


def nll_by_hand(model, batches):
    """Mean NLL over the supervised tokens of all batches, from the full logits."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def test_invariant_1_right_after_a_snapshot_the_ratio_is_1_and_the_gradient_is_sft_s(base, tmp_path):
    compared = []

    def compare(step):
        batches = window(trainer, step)
        compared.append(off_by(trainer.model, lambda: nll_by_hand(trainer.model, batches)))

    trainer = make_trainer(
        base, tmp_path, reference_steps=3, max_steps=9, max_grad_norm=0.0, callbacks=[Recorder(compare)]
    )
    trainer.train()
    lines = log_lines(trainer)
    at_snapshot, later = [0, 3, 6], [1, 2, 4, 5, 7, 8]
    assert all(compared[step] < 1e-6 for step in at_snapshot), compared
    assert all(compared[step] > 1e-3 for step in later), compared  # elsewhere it is not SFT's
    for step in at_snapshot:
        assert (lines[step]["ratio_max"], lines[step]["approx_kl"], lines[step]["clip_fraction"]) == (1.0, 0.0, 0.0)
        assert lines[step]["loss"] == pytest.approx(-1.0, abs=1e-6)
    assert all(lines[step]["approx_kl"] > 1e-6 for step in later)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_invariant_1_the_scoring_pass_gives_the_training_forward_s_log_probabilities_bit_for_bit(
    base, tmp_path, checkpointing
):
    trainer = make_trainer(base, tmp_path, max_steps=4, gradient_checkpointing=checkpointing)
    trainer.train()
    trainer.model.train()
    batches = window(trainer, 2)
    trained = [policy_forward(trainer.model, batch, right_padded=True).log_probs for batch in batches]
    assert trained[0].requires_grad
    scored = ReferencePolicy(trainer.model, fused_lm_head=True).score(batches)
    assert same([t.detach() for t in trained], scored)
    trainer.model.eval()
    assert same(ReferencePolicy(trainer.model, fused_lm_head=True).score(batches), scored)


def test_invariant_2_clipped_and_masked_tokens_contribute_exactly_zero_gradient(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, max_steps=4, epsilon=0.2)
    trainer.train()  # the position is then one inside a block
    batch = window(trainer, 1)[0]
    captured = []

    def forward(model, inputs, **settings):
        outputs = policy_forward(model, inputs, **settings)
        outputs.log_probs.retain_grad()
        captured.append(outputs)
        return outputs

    monkeypatch.setattr(trainer_module, "policy_forward", forward)

    def gradient(old_logprobs):
        captured.clear()
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, {**batch, "old_logprobs": old_logprobs}, num_items_in_batch=10)
        loss.backward()
        return captured[0].log_probs.grad

    now = trainer.model(**batch, fused_lm_head=True).log_probs.detach()
    mask = batch["labels"][:, 1:] != -100
    assert mask.any() and not mask.all()

    assert torch.all(gradient(now - 0.19) == 0)  # every ratio is e^0.19 = 1.21 > 1.2
    assert all(torch.all(p.grad == 0) for p in trainer.model.parameters() if p.requires_grad)

    old = now.clone()
    clipped = mask & (torch.arange(mask.numel()).view_as(mask) % 2 == 0)
    free = mask & ~clipped
    old[clipped] -= 5.0
    old[free] += 0.5  # far below the lower clip of PPO, which must not act
    old[~mask] = float("nan")  # whatever stands there
    got = gradient(old)
    assert torch.all(got[clipped | ~mask] == 0)
    assert torch.allclose(got[free], torch.full_like(got[free], -torch.tensor(-0.5).exp() / 10), rtol=1e-5)
    assert any(torch.any(p.grad != 0) for p in trainer.model.parameters() if p.requires_grad)


# AdamW divides by the gradient's size, and so blows up the last bits of gradients near 0 into whole steps
WELL_CONDITIONED = dict(learning_rate=1e-3, adam_epsilon=1e-4)


def test_invariant_3_batch_1_times_8_is_batch_8_times_1(base, tmp_path):
    def run(batch, accumulation):
        trainer = make_trainer(
            base,
            tmp_path / str(batch),
            rows=make_rows(60),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            reference_steps=3,
            num_iterations=2,
            max_steps=10,
            **WELL_CONDITIONED,
        )
        start = policy(trainer.model)
        trainer.train()
        return start, policy(trainer.model), log_lines(trainer)

    start, ones, lines_ones = run(1, 8)
    _, eights, lines_eights = run(8, 1)
    assert largest_difference(ones, eights) < 1e-5
    assert largest_difference(ones, start) > 1e-3  # they did move
    assert sum(line["clip_fraction"] for line in lines_ones) > 1  # and the clip did act
    for one, eight in zip(lines_ones, lines_eights, strict=True):
        for key in ("loss", "nll", "entropy", "grad_norm", "approx_kl", "ratio_max", "num_tokens"):
            assert one[key] == pytest.approx(eight[key], rel=1e-4, abs=1e-6), key


def frozen(model):
    """Everything of the base that training must not touch: parameters, buffers, quantization constants."""
    state = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    state |= {n: b.clone() for n, b in model.named_buffers()}
    for name, module in quantized_linears(model).items():
        state[name] = copy.deepcopy(module.weight.quant_state.as_dict(packed=True))
    return state


def test_invariant_5_the_base_never_changes_and_the_reference_only_at_snapshots(base, tmp_path):
    references = []

    def remember(step):
        references.append(None if trainer.reference is None else copy.deepcopy(trainer.reference.state_dict()))

    trainer = make_trainer(
        base,
        tmp_path,
        eval_dataset=make_rows(3, seed=9),
        eval_strategy="steps",
        eval_steps=2,
        reference_steps=2,
        num_iterations=2,
        sft_warmup_steps=2,
        max_steps=12,
        callbacks=[Recorder(on_step=remember)],
    )
    before = frozen(trainer.model)
    weights = []
    trainer.add_callback(Recorder(on_gradients=lambda step: weights.append(policy(trainer.model))))
    trainer.train()
    assert same(frozen(trainer.model), before) and len(before) > 30
    assert references[:2] == [None, None]  # warm-up
    for step in range(2, 12):
        snapshot = {2: 2, 3: 2, 4: 2, 5: 2, 6: 6, 7: 6, 8: 6, 9: 6, 10: 10, 11: 10}[step]
        assert same(references[step], weights[snapshot]), step
        assert step == snapshot or not same(references[step], weights[step]), step

    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainable = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert optimized == trainable and trainable
    assert all("lora_" in name for name in policy(trainer.model))


def left_padded(trainer):
    def collate(examples):
        width = max(len(e["input_ids"]) for e in examples)
        padded = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in examples:
            gap = width - len(e["input_ids"])
            padded["input_ids"].append([0] * gap + list(e["input_ids"]))
            padded["attention_mask"].append([0] * gap + [1] * len(e["input_ids"]))
            padded["labels"].append([-100] * gap + list(e["labels"]))
        return {key: torch.tensor(value) for key, value in padded.items()}

    trainer.data_collator = collate


def test_invariant_7_checkpointing_scoring_batches_and_padding_do_not_change_the_result(base, tmp_path):
    def run(name, prepare=None, **settings):
        trainer = make_trainer(base, tmp_path / name, num_iterations=2, max_steps=6, **WELL_CONDITIONED, **settings)
        start = policy(trainer.model)
        if prepare:
            prepare(trainer)
        trainer.train()
        assert largest_difference(start, policy(trainer.model)) > 1e-3
        return policy(trainer.model)

    plain = run("plain", gradient_checkpointing=False)
    others = {
        "checkpointing": run("checkpointing", gradient_checkpointing=True),
        "reentrant": run(
            "reentrant", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        ),
        "scoring one row at a time": run("one", gradient_checkpointing=False, score_token_budget=1),
        "scoring all rows at once": run("all", gradient_checkpointing=False, score_token_budget=100_000),
        "longer padding": run("long", gradient_checkpointing=False, pad_to_multiple_of=16),
        "padding on the left": run("left", left_padded, gradient_checkpointing=False),
        "no padding": run("free", gradient_checkpointing=False, padding_free=True, max_length=None),
    }
    differences = {name: largest_difference(plain, other) for name, other in others.items()}
    assert all(difference < 1e-5 for difference in differences.values()), differences


def test_invariant_8_dropout_makes_the_ratio_differ_from_1_so_it_is_0_and_warned_of(base, tmp_path, recwarn):
    assert LoraConfig().lora_dropout == 0.0

    def ratios(name, dropout):
        # a learning rate that moves the last bits of small weights only: every deviation of the ratio is dropout's
        model_lora = make_lora(lora_dropout=dropout, init_lora_weights=False)
        trainer = make_trainer(base, tmp_path / name, lora=model_lora, learning_rate=1e-8, max_steps=3)
        trainer.train()
        return [line["ratio_max"] for line in log_lines(trainer)]

    recwarn.clear()
    assert all(ratio == pytest.approx(1.0, abs=2e-5) for ratio in ratios("none", 0.0))
    assert not [w for w in recwarn if "dropout" in str(w.message)]
    with pytest.warns(UserWarning, match="lora_dropout is 0.3.*ratio differs from 1.*Set lora_dropout to 0"):
        noisy = ratios("noisy", 0.3)
    assert noisy[1] > 1.05 and noisy[2] > 1.05


def test_parameters_are_counted_once_per_run_and_the_operations_are_transformers_s(base, tmp_path, monkeypatch):
    counts = []
    original = PreTrainedModel.num_parameters

    def num_parameters(model, *args, **kwargs):
        counts.append(original(model, *args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(PreTrainedModel, "num_parameters", num_parameters)
    trainer = make_trainer(base, tmp_path, max_steps=2)
    counts.clear()
    trainer.train()
    assert len(counts) == 1
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    assert trainer.floating_point_ops(inputs) == super(type(trainer), trainer).floating_point_ops(inputs) > 0
