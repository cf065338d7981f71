"""KL(base || policy): value and gradient against full logits, in training and in the log, and what it leaves alone."""

import re
import shutil

import pytest
import torch
from peft import get_peft_model
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
from test_base_policy import adapted
from test_reference import ragged_batches
from test_resume import contents
from test_trainer import window
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qpsft.errors import RecipeError
from qpsft.model.base import load_base
from qpsft.plan.live_bytes import LiveBytes
from qpsft.psft import lm_head
from qpsft.psft.base_kl import BaseKL, is_measured
from qpsft.psft.forward import policy_forward
from qpsft.psft.lm_head import LMHead, kl_to_base
from qpsft.psft.reference import BasePolicy

# ---- the number and its gradient, in tiles ----


def heads(scale=1.0, softcap=None, bias=True):
    torch.manual_seed(3)
    options = dict(scale=scale, softcap=softcap, dtype=torch.float64)
    tensors = [torch.randn(31, 6, dtype=torch.float64) for _ in range(2)]
    biases = [torch.randn(31, dtype=torch.float64) if bias else None for _ in range(2)]
    return [LMHead(weight, b, **options) for weight, b in zip(tensors, biases, strict=True)]


def full_kl(hidden, head, base_hidden, base_head):
    """The same from full logits, in plain torch."""

    def logprobs(states, head):
        logits = states @ head.weight.T + (0 if head.bias is None else head.bias)
        logits = logits * head.scale
        return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)).log_softmax(-1)

    ours, theirs = logprobs(hidden, head), logprobs(base_hidden, base_head)
    return (theirs.exp() * (theirs - ours)).sum()


@pytest.mark.parametrize("tile", [2**23, 100, 1])
@pytest.mark.parametrize("options", [{}, dict(scale=0.3), dict(softcap=2.0), dict(scale=0.5, softcap=3.0, bias=False)])
def test_value_and_gradients_are_those_of_full_logits(monkeypatch, options, tile):
    monkeypatch.setattr(lm_head, "TILE", tile)
    head, base_head = heads(**options)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    base_hidden = torch.randn(11, 6, dtype=torch.float64)
    trained = [hidden, head.weight.requires_grad_()] + ([] if head.bias is None else [head.bias.requires_grad_()])
    total = kl_to_base(hidden, head, base_hidden, base_head)
    expected = full_kl(hidden, head, base_hidden, base_head)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12) and expected > 1
    mine = torch.autograd.grad(2.5 * total, trained)
    theirs = torch.autograd.grad(2.5 * expected, trained)
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_the_finite_difference_s():
    head, base_head = heads(scale=0.7, softcap=4.0)
    hidden, base_hidden = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda h, w, b: kl_to_base(h, LMHead(w, b, 0.7, 4.0, torch.float64), base_hidden, base_head),
        (hidden.requires_grad_(), head.weight.requires_grad_(), head.bias.requires_grad_()),
    )


def test_it_is_0_on_the_base_itself_and_the_direction_is_base_against_policy():
    head, base_head = heads()
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    same_policy = kl_to_base(hidden, head, hidden.detach(), head)
    assert same_policy.item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(same_policy, hidden)
    assert gradient.abs().max() < 1e-12
    other = kl_to_base(hidden, base_head, hidden.detach(), head)
    back = kl_to_base(hidden, head, hidden.detach(), base_head)
    assert abs(other.item() - back.item()) > 0.1
    assert kl_to_base(hidden[:0], head, hidden[:0], head).item() == 0.0


def test_no_tensor_holds_the_logits_of_more_than_a_tile(monkeypatch):
    """Neither in the forward nor in what is kept for the backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(lm_head, "TILE", 31 * 4)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    head, base_head = heads()
    hidden = torch.randn(400, 6, dtype=torch.float64, requires_grad=True)
    with Largest() as largest:
        kl_to_base(hidden, head, torch.randn(400, 6, dtype=torch.float64), base_head).backward()
    assert largest.elements == 400 * 6  # the hidden states themselves; all logits would be 400 * 31


# ---- in training ----


def loss_by_hand(trainer, plain, batches, weigh, beta):
    """(Weighted) NLL + beta KL over a window, from full logits of the policy and of a model without an adapter."""
    total, count, kl = 0.0, 0, 0.0
    for batch in batches:
        inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
        mask = labels != -100
        logprobs = trainer.model(**inputs).logits[:, :-1].float().log_softmax(-1)[mask]
        with torch.no_grad():
            base = plain(**inputs).logits[:, :-1].float().log_softmax(-1)[mask]
        picked = logprobs.gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
        total, count = total - (weigh(picked.detach()) * picked).sum(), count + len(picked)
        kl = kl + (base.exp() * (base - logprobs)).sum()
    return (total + beta * kl) / count, kl.item() / count


@pytest.mark.parametrize("loss_type", ["nll", "dft"])  # SFT-KL and ASFT
def test_loss_and_gradient_in_training_are_those_by_hand(base, tmp_path, loss_type):
    plain, _ = load_base(base, verbose=False)
    compared, kls = [], []

    def compare(step):
        weigh = {"nll": torch.ones_like, "dft": torch.exp}[loss_type]
        loss, kl = loss_by_hand(trainer, plain, window(trainer, step), weigh, 0.5)
        compared.append(off_by(trainer.model, lambda: loss))
        kls.append((loss.item(), kl))

    settings = dict(loss_type=loss_type, base_kl=0.5, max_steps=5, max_grad_norm=0.0, learning_rate=2e-2)
    trainer = make_trainer(base, tmp_path, callbacks=[Recorder(compare)], **settings)
    trainer.train()
    assert len(compared) == 5 and all(difference < 1e-4 for difference in compared), compared
    lines = log_lines(trainer)
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in kls], rel=1e-4)
    assert [line["kl_to_base"] for line in lines] == pytest.approx([kl for _, kl in kls], rel=1e-3, abs=1e-6)
    assert kls[0][1] == pytest.approx(0.0, abs=1e-6) and kls[-1][1] > 0.01  # a fresh adapter is the base


def test_it_holds_the_policy_near_the_base(base, tmp_path):
    def drift(name, **settings):
        trainer = make_trainer(base, tmp_path / name, max_steps=24, loss_type="nll", learning_rate=1e-2, **settings)
        trainer.train()
        return log_lines(trainer)[-1]["kl_to_base"]

    free, held, tight = drift("free"), drift("held", base_kl=1.0), drift("tight", base_kl=50.0)
    assert tight < 0.1 * held and held < 0.9 * free, (free, held, tight)


@pytest.mark.parametrize(
    "kind",
    [
        dict(gradient_checkpointing=True),
        dict(lora=make_lora(use_dora=True)),
        dict(lora=make_lora(modules_to_save=["lm_head"])),
        dict(packing=True, max_length=48, rows=make_rows(40, seed=4)),
        dict(score_token_budget=0),
    ],
)
def test_it_trains_in_every_setting(base, tmp_path, kind):
    trainer = make_trainer(base, tmp_path, **{**dict(base_kl=0.5, max_steps=4, num_iterations=2), **kind})
    start = policy(trainer.model)
    trainer.train()
    lines = log_lines(trainer)
    assert lines[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-5) and lines[-1]["kl_to_base"] > 1e-3
    assert largest_difference(start, policy(trainer.model)) > 1e-3


def test_accumulation_does_not_change_it(base, tmp_path):
    def trained(name, size, accumulation):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        settings = dict(loss_type="nll", base_kl=1.0, max_steps=5, learning_rate=1e-3, adam_epsilon=1e-4)
        trainer = make_trainer(base, tmp_path / name, **sizes, **settings)
        trainer.train()
        return policy(trainer.model)

    assert largest_difference(trained("one", 1, 4), trained("four", 4, 1)) < 1e-5


@pytest.mark.parametrize("loss_type", ["psft", "nll"])
def test_it_resumes_to_the_byte_in_mid_block_too(base, tmp_path, loss_type):
    saving = dict(save_strategy="steps", save_steps=4, save_total_limit=None)
    settings = dict(loss_type=loss_type, base_kl=0.3, num_iterations=2, max_steps=8, **saving)
    whole = make_trainer(base, tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    resumed = make_trainer(base, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(contents(tmp_path / "cut" / "checkpoint-8"), contents(tmp_path / "whole" / "checkpoint-8"))


def test_without_an_adapter_it_is_refused(base, tmp_path):
    model, _ = load_base(base, quantization="none", dtype="float32", verbose=False)
    with pytest.raises(RecipeError, match=re.escape("base_kl 0.5 compares the policy with the base")):
        make_trainer(base, tmp_path, model=model, base_kl=0.5)


# ---- in the log ----


def test_lines_far_enough_apart_and_the_last_step_are_measured():
    def steps(**settings):
        return [step for step in range(1, 101) if is_measured(step, max_steps=100, **settings)]

    assert steps(logging_steps=10, micro_batches=8) == [*range(10, 101, 10)]  # 80 micro-batches a line
    assert steps(logging_steps=10, micro_batches=1) == [40, 80, 100]
    assert steps(logging_steps=1, micro_batches=16) == [*range(2, 101, 2)]
    assert steps(logging_steps=500, micro_batches=1) == [100]


def test_the_measured_number_is_that_of_full_logits_and_leaves_the_model_alone(base, tmp_path):
    plain, _ = load_base(base, verbose=False)
    trainer = make_trainer(base, tmp_path)
    model, batch = adapted(base), ragged_batches()[1]
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(11)
    expected_draw = torch.rand(1)
    torch.manual_seed(11)
    total, count = BaseKL(model, trainer.args).measure(batch, step=0)
    assert torch.equal(torch.rand(1), expected_draw)  # nothing of training's random stream was used
    inputs, mask = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"][:, 1:] != -100
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits[:, :-1].float().log_softmax(-1)[mask] for m in (model, plain))
    assert total.item() == pytest.approx((theirs.exp() * (theirs - ours)).sum().item(), rel=1e-4)
    assert count.item() == mask.sum().item() and not total.requires_grad
    assert same(before, dict(model.named_parameters()))


@pytest.mark.parametrize("loss_type", ["psft", "stm"])
def test_measuring_changes_no_bit_of_a_run(base, tmp_path, monkeypatch, loss_type):
    def trained(name):
        settings = dict(loss_type=loss_type, stm_threshold=80.0, num_iterations=2, max_steps=8)
        trainer = make_trainer(base, tmp_path / name, lora=make_lora(lora_dropout=0.1), **settings)
        trainer.train()
        return policy(trainer.model), [line for line in log_lines(trainer) if "kl_to_base" in line]

    with pytest.warns(UserWarning) if loss_type == "psft" else nothing():
        monkeypatch.setattr("qpsft.psft.trainer.is_measured", lambda step, **settings: True)
        measured, lines = trained("measured")
        monkeypatch.setattr("qpsft.psft.trainer.is_measured", lambda step, **settings: False)
        plain, none = trained("plain")
    assert same(measured, plain) and (len(lines), len(none)) == (8, 0)
    assert lines[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-5) and lines[-1]["kl_to_base"] > 0.01


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_full_fine_tuning_has_no_base_to_measure(base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = make_trainer(base, tmp_path, model=model, loss_type="nll", max_steps=1)
    trainer.train()
    assert "kl_to_base" not in log_lines(trainer)[-1]


def test_a_training_step_takes_hardly_more_memory_than_sft_s(monkeypatch):
    monkeypatch.setattr(lm_head, "TILE", 2**20)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=32_000,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, make_lora()).train()
    ids = torch.randint(3, 32_000, (1, 256))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def peak(with_kl):
        model.zero_grad()
        with LiveBytes() as live:
            if with_kl:
                (base_hidden,), base_head = BasePolicy(model).hidden([batch])
            outputs = policy_forward(model, batch, right_padded=True, hidden=with_kl)
            loss = -outputs.log_probs.sum()
            if with_kl:
                loss = loss + kl_to_base(outputs.hidden, outputs.head, base_hidden, base_head)
            loss.backward()
        return live.peak

    assert peak(True) < 1.05 * peak(False)


def test_its_memory_is_that_of_a_few_tiles(monkeypatch):
    torch.manual_seed(0)
    head, base_head = (LMHead(torch.randn(32_000, 8)) for _ in range(2))
    hidden, base_hidden = torch.randn(256, 8, requires_grad=True), torch.randn(256, 8)

    def peak(tile):
        monkeypatch.setattr(lm_head, "TILE", tile)
        with LiveBytes() as live:
            kl_to_base(hidden, head, base_hidden, base_head).backward()
        return live.peak

    assert peak(2**20) < 6 * 4 * 2**20 < 3 * 4 * 256 * 32_000 < peak(2**30)
