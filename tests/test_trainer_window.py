"""Which forwards are made, what the log says, and that nll and dft are TRL's."""

import math

import pytest
import torch
from accelerate import Accelerator
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
)
from trl import SFTConfig, SFTTrainer

from qpsft.model.base import load_base
from qpsft.psft import metrics
from qpsft.psft.metrics import RunStatistics
from qpsft.psft.reference import ReferencePolicy


def collated(trainer, rows):
    return trainer.data_collator([{k: trainer.train_dataset[r][k] for k in ("input_ids", "labels")} for r in rows])


def scored_forwards(trainer, monkeypatch):
    """Records (step, [(rows, width) of each forward], token budget) of every scoring pass."""
    passes, shapes, modes = [], [], []
    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((tuple(kwargs["input_ids"].shape), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args: modes.append(all(m.training for m in trainer.model.modules()))
    )
    score = ReferencePolicy.score

    def recording(self, batches, *, token_budget=None):
        before = len(shapes)
        result = score(self, batches, token_budget=token_budget)
        passes.append((trainer.state.global_step, [shape for shape, _ in shapes[before:]], token_budget))
        return result

    monkeypatch.setattr(ReferencePolicy, "score", recording)
    return passes, shapes, modes


def test_with_k_4_and_2_visits_only_three_mini_batches_of_a_block_are_scored(base, tmp_path, monkeypatch):
    trainer = make_trainer(
        base,
        tmp_path,
        rows=make_rows(40),
        reference_steps=4,
        num_iterations=2,
        sft_warmup_steps=2,
        max_steps=18,
        gradient_checkpointing=False,
        score_token_budget=30,
    )
    passes, shapes, training = scored_forwards(trainer, monkeypatch)
    trainer.train()
    # warm-up 0 1 | snapshot 2, scored 3 4 5, visited again 6..9 | snapshot 10, scored 11 12 13, visited again 14..17
    assert [step for step, _, _ in passes] == [3, 4, 5, 11, 12, 13]
    for step, forwards, budget in passes:
        lengths = [len(trainer.train_dataset[r]["input_ids"]) for r in trainer._get_schedule().rows(step)]
        assert budget == 30
        assert sum(rows for rows, _ in forwards) == len(lengths) == 4
        assert all(rows * width <= 30 or rows == 1 for rows, width in forwards)
        assert max(width for _, width in forwards) == max(lengths)
    assert all(training) and len(training) == len(shapes)  # in one mode, and so on the same kernels
    with_gradient = [shape for shape, enabled in shapes if enabled]
    assert len(with_gradient) == 18 * 2  # one training forward a micro-batch, and nothing else
    assert len(shapes) - len(with_gradient) == sum(len(forwards) for _, forwards, _ in passes)


def test_a_budget_of_0_scores_the_micro_batches_as_they_are_trained(base, tmp_path, monkeypatch):
    """At equal weights the ratio is then 1 to the bit; a learning rate of nearly 0 keeps them equal."""
    trainer = make_trainer(base, tmp_path, learning_rate=1e-30, score_token_budget=0, max_steps=6)
    passes, _, _ = scored_forwards(trainer, monkeypatch)
    trainer.train()
    for step, forwards, budget in passes:
        rows = trainer._get_schedule().rows(step)
        assert budget is None
        assert forwards == [tuple(collated(trainer, rows[i : i + 2])["input_ids"].shape) for i in (0, 2)]
    assert [(line["ratio_max"], line["approx_kl"]) for line in log_lines(trainer)] == [(1.0, 0.0)] * 6


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_baselines_score_nothing_and_can_take_psft_s_order(base, tmp_path, monkeypatch, loss_type):
    def order(name, **settings):
        trainer = make_trainer(base, tmp_path / name, num_iterations=2, max_steps=6, **settings)
        passes, _, _ = scored_forwards(trainer, monkeypatch)
        trainer.train()
        assert bool(passes) == (settings["loss_type"] == "psft")
        return [trainer._get_schedule().rows(step) for step in range(6)]

    psft = order("psft", loss_type="psft")
    assert order("blocks", loss_type=loss_type, block_order=True) == psft
    assert order("plain", loss_type=loss_type) != psft


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_baselines_are_trl_s(base, tmp_path, loss_type):
    shared = dict(
        loss_type=loss_type,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_steps=10,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=7,
    )

    def model():
        torch.manual_seed(1)
        loaded, tokenizer = load_base(base, verbose=False)
        return get_peft_model(loaded, make_lora()), tokenizer

    trls, tokenizer = model()
    start = policy(trls)
    trl = SFTTrainer(
        trls, args=SFTConfig(str(tmp_path / "trl"), **shared), train_dataset=make_rows(24), processing_class=tokenizer
    )
    with torch.no_grad():
        for name, p in trls.named_parameters():
            if p.requires_grad:
                assert p.dtype == torch.bfloat16  # what TRL does to a quantized model's adapter
                p.data = start[name].clone()
    trl.train()

    mine = make_trainer(base, tmp_path / "qpsft", model=model()[0], **shared)
    mine.train()
    losses = [line["loss"] for line in log_lines(trl)], [line["loss"] for line in log_lines(mine)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 10
    assert [line["grad_norm"] for line in log_lines(trl)] == pytest.approx(
        [line["grad_norm"] for line in log_lines(mine)], rel=1e-5
    )
    assert largest_difference(policy(trls), policy(mine.model)) < 1e-6
    assert largest_difference(policy(trls), start) > 1e-3
    for mine_line, trl_line in zip(log_lines(mine), log_lines(trl), strict=True):
        assert mine_line["num_tokens"] == trl_line["num_tokens"]
    if loss_type == "nll":
        assert losses[1] == pytest.approx([line["nll"] for line in log_lines(mine)], rel=1e-5)


def test_log_lines_carry_the_numbers_of_the_steps_since_the_last_line(base, tmp_path):
    """Recomputed from the full logits of a second model; two steps a line, as one mean over their tokens."""
    second = get_peft_model(load_base(base, verbose=False)[0], make_lora())
    tokens, norms, snapshot = [], [], {}

    @torch.no_grad()
    def logprobs_under(weights, batch):
        second.load_state_dict(weights, strict=False)
        logits = second(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.float().log_softmax(-1)

    def compute(step):
        now = policy(trainer.model)
        if step in (0, 3):
            snapshot.update(now)
        norms.append(math.sqrt(sum(g.double().square().sum() for g in gradients(trainer.model).values())))
        batch = collated(trainer, trainer._get_schedule().rows(step))
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        new, old = logprobs_under(now, batch), logprobs_under(dict(snapshot), batch)
        chosen = labels.clamp(min=0).unsqueeze(-1)
        logp, old_logp = new.gather(-1, chosen)[mask].squeeze(-1), old.gather(-1, chosen)[mask].squeeze(-1)
        ratio = (logp - old_logp).exp()
        tokens.append(
            {
                "loss": -torch.clamp(ratio, max=1.05),
                "nll": -logp,
                "entropy": -(new.exp() * new).sum(-1)[mask],
                "mean_token_accuracy": (new.argmax(-1) == labels)[mask].float(),
                "clip_fraction": (ratio > 1.05).float(),
                "approx_kl": ratio - 1 - ratio.log(),
                "ratio": ratio,
            }
        )

    trainer = make_trainer(
        base, tmp_path, max_steps=6, logging_steps=2, max_grad_norm=0.0, callbacks=[Recorder(compute)]
    )
    trainer.train()
    lines = log_lines(trainer)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for i, line in enumerate(lines):
        both = tokens[2 * i : 2 * i + 2]
        for key in ("nll", "entropy", "mean_token_accuracy", "clip_fraction", "approx_kl"):
            assert line[key] == pytest.approx(torch.cat([part[key] for part in both]).mean().item(), rel=1e-5, abs=1e-6)
        assert line["ratio_max"] == pytest.approx(torch.cat([part["ratio"] for part in both]).max().item(), rel=1e-5)
        assert line["loss"] == pytest.approx(sum(part["loss"].mean().item() for part in both) / 2, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norms[2 * i + 1], rel=1e-5)
        assert line["tokens_per_second"] > 0 and line["learning_rate"] == 5e-3
    assert len({line["nll"] for line in lines}) == 3 and lines[1]["clip_fraction"] > 0


def test_tokens_per_second_leaves_out_what_is_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    run = RunStatistics()
    part = {name: torch.tensor(2.0) for name in ("num_items", "ratio_max", *metrics.SUMS)}
    run.add(part, torch.tensor(30))
    now[0] += 4.0
    with run.paused():  # an evaluation
        now[0] += 1000.0
    run.add(part, torch.tensor(20))
    now[0] += 1.0
    assert run.tokens_so_far(Accelerator(cpu=True)) == 50
    read = run.read(Accelerator(cpu=True))
    assert read["tokens_per_second"] == 10.0 and read["num_tokens"] == 50
    assert read["nll"] == 1.0 and read["ratio_max"] == 2.0
    assert run.read(Accelerator(cpu=True)) == {}
    assert run.tokens_so_far(Accelerator(cpu=True)) == 50


def test_a_real_model_on_real_rows(stories, gsm8k, tmp_path):
    """stories260K in NF4 learns GSM8K's answers; kept and scored log-probabilities are the snapshot's."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(gsm8k / "train.jsonl"), split="train[:48]")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"})
    model, tokenizer = load_base(stories, verbose=False)
    args = make_config(
        tmp_path, reference_steps=4, num_iterations=2, max_steps=16, learning_rate=2e-3, epsilon=0.28, max_length=160
    )
    trainer = make_trainer_on(model, tokenizer, args, rows)
    second = get_peft_model(load_base(stories, verbose=False)[0], make_lora())
    weights, checked = {}, []

    def check(step):
        if step in (0, 8):
            weights.update(policy(trainer.model))
            return
        second.load_state_dict(weights, strict=False)
        batch = collated(trainer, trainer._get_schedule().rows(step)[:2])
        kept = trainer.old_logprobs.state_dict()["kept"][trainer._position.mini_batch][0]
        with torch.no_grad():
            logits = second(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        checked.append((kept - expected.masked_fill(labels == -100, 0.0)).abs().max().item())

    trainer.add_callback(Recorder(check))
    trainer.train()
    assert len(checked) == 14 and max(checked) < 2e-5  # of values around -5
    lines = log_lines(trainer)
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.1
    assert max(line["clip_fraction"] for line in lines) > 0.01


def make_trainer_on(model, tokenizer, args, rows):
    from qpsft import PSFTTrainer

    return PSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=make_lora())
