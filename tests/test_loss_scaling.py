"""Float16 with loss scaling, on the CPU: real autocast, a real GradScaler; overflowing steps are repeated."""

import math
import shutil

import pytest
import torch
from peft import get_peft_model
from small_runs import (
    LOSS_SCALE as SCALE,
)
from small_runs import (
    Recorder,
    gradients,
    in_float16,
    largest_difference,
    log_lines,
    make_lora,
    make_trainer,
    policy,
    same,
)
from test_resume import contents

from qpsft import PSFTTrainer
from qpsft.errors import TrainingError
from qpsft.model.base import load_base
from qpsft.psft import float16, trainer
from qpsft.psft.reference import ReferencePolicy


class Overflowing(PSFTTrainer):
    """The gradients of chosen steps are infinite in the first so many attempts: `overflows` = {step: attempts}."""

    overflows: dict[int, int] = {}

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step
        self.seen = getattr(self, "seen", [])
        attempt, micro_batch = divmod(sum(s == step for s, _ in self.seen), self.args.gradient_accumulation_steps)
        self.seen.append((step, inputs["input_ids"].clone()))
        if micro_batch == 0 and attempt < self.overflows.get(step, 0):  # before several processes add up theirs
            [p for p in model.parameters() if p.requires_grad][-1].grad[0] = math.inf
        return loss


def run(base, out, overflows, init_scale=SCALE, autocast=False, **settings):
    torch.manual_seed(0)
    made = make_trainer(base, out, trainer_class=Overflowing, **settings)
    made.overflows = overflows
    return in_float16(made, init_scale, autocast)


PLANS = {
    "one visit": dict(),
    "visits and warm-up": dict(num_iterations=2, sft_warmup_steps=1, dataloader_num_workers=1),
    "nll": dict(loss_type="nll"),
}
# on and after snapshots, in the warm-up, in the second visit, the first and the last step, one and several on end
OVERFLOWS = {0: 1, 1: 2, 3: 1, 4: 3, 6: 1, 8: 2}


def state(made):
    optimizer = made.optimizer.optimizer.state_dict()["state"]
    return [policy(made.model), optimizer, made.lr_scheduler.state_dict(), made.old_logprobs.state_dict()]


def lines(made):
    other = ("tokens_per_second", "loss_scale")
    return [{k: v for k, v in line.items() if k not in other} for line in log_lines(made)]


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_with_overflows_equals_the_run_without(base, tmp_path, plan):
    settings = dict(max_steps=9, lr_scheduler_type="linear") | PLANS[plan]
    smooth = run(base, tmp_path, {}, SCALE / 2**10, **settings)  # the scale the other ends with
    smooth.train()
    rough = run(base, tmp_path, OVERFLOWS, **settings)
    rough.train()
    assert rough.state.global_step == 9
    assert rough.accelerator.scaler.get_scale() == smooth.accelerator.scaler.get_scale() == 1.0
    assert same(state(rough), state(smooth))
    assert lines(rough) == lines(smooth)
    assert [line["loss_scale"] for line in log_lines(rough)][:4] == [SCALE / 2, SCALE / 8, SCALE / 8, SCALE / 16]
    windows = {step: [ids for s, ids in smooth.seen if s == step] for step in range(9)}
    for step, window in windows.items():  # the same mini-batch in every attempt, and none was lost
        assert same([ids for s, ids in rough.seen if s == step], window * (OVERFLOWS.get(step, 0) + 1))


def test_what_the_repeat_prevents(base, tmp_path, monkeypatch):
    """Left to the GradScaler, the same overflows lose mini-batches, and with a fused optimizer unnoticed."""
    skipped = []
    settings = dict(max_steps=9, num_iterations=2)
    smooth = run(base, tmp_path, {}, **settings)
    smooth.train()
    monkeypatch.setattr(trainer, "repeat_until_finite", lambda trainer, model, norm, window, forget: norm)
    rough = run(base, tmp_path, OVERFLOWS, **settings)
    rough.add_callback(Recorder(on_step=lambda step: skipped.append(rough.accelerator.optimizer_step_was_skipped)))
    rough.train()
    assert largest_difference(policy(rough.model), policy(smooth.model)) > 1e-3
    assert skipped == [False] * 9


def test_a_run_with_overflows_resumes_to_the_same_bytes(base, tmp_path):
    stop = 4  # the next step has kept old log-probabilities, and overflows
    settings = dict(max_steps=9, num_iterations=2, save_strategy="steps", save_steps=stop, save_total_limit=None)
    whole = run(base, tmp_path / "whole", OVERFLOWS, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "cut" / f"checkpoint-{stop}")
    resumed = run(base, tmp_path / "cut", OVERFLOWS, 2.0**16, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.accelerator.scaler.get_scale() == 1.0  # the checkpoint's, not the one it was given
    wanted, got = contents(tmp_path / "whole" / "checkpoint-9"), contents(tmp_path / "cut" / "checkpoint-9")
    assert [name for name in wanted if not same(got.get(name), wanted[name])] == []


def test_real_overflows_in_float16(base, tmp_path):
    """A loss scale of 2^30 is too large for float16's gradients: the first step finds one that is not."""
    rough = run(base, tmp_path, {}, 2.0**30, autocast=True, max_steps=4)
    rough.train()
    found = rough.accelerator.scaler.get_scale()
    assert found < 2.0**25 and len([step for step, _ in rough.seen if step == 0]) > 2 * 5
    smooth = run(base, tmp_path, {}, found, autocast=True, max_steps=4)
    smooth.train()
    assert len(smooth.seen) == 4 * 2
    assert same(state(rough), state(smooth))


def test_a_model_that_always_overflows_is_named(base, tmp_path):
    made = run(base, tmp_path, {1: 100}, 2.0**16)
    with pytest.raises(TrainingError) as caught:
        made.train()
    assert "The gradients of optimizer step 2 overflow in float16, 21 times in a row" in caught.value.what
    assert "down to a loss scale of 0.0625 (llama, " in caught.value.what
    assert "Use dtype float32 (slower), a card with bfloat16" in caught.value.todo
    assert len([step for step, _ in made.seen if step == 1]) == 2 * (1 + float16.MOST_REPEATS)


def test_a_forward_pass_that_overflows_says_so(base, tmp_path):
    """Loss scaling cannot help there: no attempt is made."""
    made = run(base, tmp_path, {}, autocast=True)
    made.args.fp16 = True
    made.model.get_base_model().model.norm.weight.data.mul_(1e9)
    with pytest.raises(TrainingError, match="optimizer step 1 .* is NaN or infinite") as caught:
        made.train()
    assert "In float16, activations may overflow. Use dtype float32" in caught.value.todo


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_ratio_and_log_softmax_stay_float32_under_autocast(base, tmp_path, dtype):
    made = make_trainer(base, tmp_path, max_steps=4)
    made.train()  # so that B is not 0, and the position is inside a block
    batch = made.data_collator([{k: made.train_dataset[i][k] for k in ("input_ids", "labels")} for i in range(2)])
    products = []
    lora_a = next(m for name, m in made.model.named_modules() if name.endswith("q_proj.lora_A.default"))
    lora_a.register_forward_hook(lambda module, args, output: products.append(output.dtype))
    made.model.train()
    made.model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        (old,) = ReferencePolicy(made.model, fused_lm_head=True).score([batch], token_budget=1000)
        outputs = made.model(**batch, fused_lm_head=True)
        assert outputs.log_probs.dtype == outputs.entropy.dtype == old.dtype == torch.float32
        assert torch.equal(outputs.log_probs.detach(), old)  # invariant 1: right after a snapshot r = 1, bit for bit
        ratio = (outputs.log_probs - old).exp()
        loss = made.compute_loss(made.model, {**batch, "old_logprobs": old}, num_items_in_batch=10)
    assert ratio.dtype == loss.dtype == torch.float32
    loss.backward()
    assert set(products) == {dtype}  # autocast was on: the products are 16-bit
    got = gradients(made.model)
    assert all(g.dtype == torch.float32 for g in got.values()) and any(g.abs().max() > 0 for g in got.values())
    assert all(p.dtype == torch.float32 for p in policy(made.model).values())


def test_a_base_in_float16_keeps_its_adapter_in_float32(base, tmp_path):
    model, _ = load_base(base, dtype="float16", verbose=False)
    model = get_peft_model(model, make_lora())
    made = make_trainer(base, tmp_path, max_steps=1, loss_type="nll")
    made.model = made.model_wrapped = model
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    batch = made.data_collator([{k: made.train_dataset[i][k] for k in ("input_ids", "labels")} for i in range(2)])
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(input_ids=batch["input_ids"]).logits
    assert logits.dtype == torch.float16
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1))
    (-logprobs.mean() * SCALE).backward()
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients(model).values())
