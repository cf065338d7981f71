"""The base as a reference, and its log-probabilities of a run's rows: made once, kept, found again."""

import json
import re
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from small_runs import Recorder, largest_difference, make_lora, make_rows, make_trainer, off_by, policy, same
from test_reference import collate, direct_logprobs, ragged_batches, shake
from test_resume import contents
from test_trainer import window
from trl.trainer.utils import add_fused_lm_head

from qpsft.errors import RecipeError, TrainingError
from qpsft.model.base import load_base
from qpsft.psft.base_logprobs import FILE, BaseLogprobs
from qpsft.psft.reference import BasePolicy

KINDS = {
    "lora": {},
    "dora": dict(use_dora=True),
    "rslora": dict(use_rslora=True),
    "embedding": dict(modules_to_save=["embed_tokens"]),
    "norm": dict(modules_to_save=["norm"]),
    "head": dict(modules_to_save=["lm_head"]),
}


def adapted(base, **lora):
    torch.manual_seed(1)
    model, _ = load_base(base, verbose=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, make_lora(init_lora_weights=False, **lora))
    shake(model)
    return model


def by_row(batch, values):
    return [row[mask] for row, mask in zip(values, batch["labels"][:, 1:] != -100, strict=True)]


@pytest.mark.parametrize("budget", [None, 30, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_it_scores_as_the_model_without_an_adapter(base, kind, budget):
    plain, _ = load_base(base, verbose=False)
    model, batches = adapted(base, **KINDS[kind]), ragged_batches()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = BasePolicy(model).logprobs(batches, token_budget=budget)
    for batch, rows in zip(batches, scores, strict=True):
        for found, expected in zip(rows, by_row(batch, direct_logprobs(plain, batch)), strict=True):
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            now = model(**batch, fused_lm_head=True).log_probs
        assert (now - direct_logprobs(plain, batch)).abs().max() > 0.1  # the adapter is on again
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_hidden_states_and_head_are_the_base_s(base):
    model, batches = adapted(base, modules_to_save=["lm_head"]), ragged_batches()
    reference = BasePolicy(model)
    hidden, head = reference.hidden(batches, token_budget=40)
    for batch, states, rows in zip(batches, hidden, reference.logprobs(batches), strict=True):
        labels = batch["labels"][:, 1:]
        logprobs = head.logits(states).log_softmax(-1).gather(-1, labels[labels != -100].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logprobs, torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_the_adapter_is_on_again_after_an_exception(base):
    model, batch = adapted(base), ragged_batches()[0]
    with torch.no_grad():
        before = model(**batch, fused_lm_head=True).log_probs
        with pytest.raises(KeyError), BasePolicy(model).active():
            assert not torch.equal(model(**batch, fused_lm_head=True).log_probs, before)
            raise KeyError
        assert torch.equal(model(**batch, fused_lm_head=True).log_probs, before)


# ---- stm: the file ----

STM = dict(loss_type="stm", stm_threshold=80.0, max_steps=8, rows=make_rows(10, seed=3))
SAVING = dict(save_strategy="steps", save_steps=3, save_total_limit=None)


def scorings(monkeypatch):
    """Counts the rows that go through the base."""
    scored, logprobs = [], BasePolicy.logprobs

    def counting(self, batches, **settings):
        scored.append(sum(len(batch["labels"]) for batch in batches))
        return logprobs(self, batches, **settings)

    monkeypatch.setattr(BasePolicy, "logprobs", counting)
    return scored


def test_each_row_is_scored_once_and_its_tokens_are_chosen_by_the_base(base, tmp_path, monkeypatch):
    scored = scorings(monkeypatch)
    trainer, attached = make_trainer(base, tmp_path, **STM), []
    attach = BaseLogprobs.attach

    def spy(self, batches, rows):
        attach(self, batches, rows)
        attached.extend(
            (batch["labels"], batch["base_logprobs"], numbers) for batch, numbers in zip(batches, rows, strict=True)
        )

    monkeypatch.setattr(BaseLogprobs, "attach", spy)
    trainer.train()
    assert sum(scored) == 10 and len(attached) == 16  # 8 steps of 2 micro-batches, 3 visits of every row
    plain, _ = load_base(base, verbose=False)
    kept = []
    for labels, logprobs, numbers in attached:
        batch = collate(STM["rows"][numbers])
        assert torch.equal(labels, batch["labels"])
        torch.testing.assert_close(logprobs, direct_logprobs(plain, batch), rtol=1e-4, atol=1e-4)
        kept.append((logprobs[labels[:, 1:] != -100] >= -torch.tensor(80.0).log()).float())
    assert 0.02 < torch.cat(kept).mean() < 0.5  # the threshold decides something here
    assert load_file(tmp_path / FILE).keys() == {"labels", "logprobs", "ends"}


def test_it_is_sft_on_the_kept_tokens(base, tmp_path):
    def trained(name, **settings):
        trainer = make_trainer(base, tmp_path / name, **{**STM, "learning_rate": 1e-3, **settings})
        trainer.train()
        return policy(trainer.model)

    everything = trained("all", stm_threshold=1e9)
    assert same(everything, trained("sft", loss_type="nll"))
    assert not same(everything, trained("stm"))


@pytest.mark.parametrize("file", ["there", "gone", "another"])
def test_a_resumed_run_finds_the_file_or_scores_again(base, tmp_path, monkeypatch, file):
    whole = make_trainer(base, tmp_path / "whole", **STM, **SAVING)
    whole.train()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", cut / "checkpoint-3")
    assert not (cut / "checkpoint-3" / FILE).exists()  # it is named, not copied
    named = json.loads((cut / "checkpoint-3" / "psft_run.json").read_text())["base_logprobs_sha256"]
    assert named == whole.base_logprobs.sha256
    if file != "gone":
        content = (tmp_path / "whole" / FILE).read_bytes()
        (cut / FILE).write_bytes(content if file == "there" else content[:-1] + b"\x01")
    scored = scorings(monkeypatch)
    resumed = make_trainer(base, cut, **STM, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert bool(scored) == (file != "there") and resumed.base_logprobs.sha256 == named
    assert (cut / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert same(contents(cut / "checkpoint-8"), contents(tmp_path / "whole" / "checkpoint-8"))


def test_packed_rows_are_scored_as_they_are_packed(base, tmp_path):
    packed = dict(packing=True, max_length=48, rows=make_rows(40, seed=4), max_steps=3)
    trainer = make_trainer(base, tmp_path, **{**STM, **packed})
    trainer.train()
    assert len(trainer.train_dataset) < 40
    stored = load_file(tmp_path / FILE)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.train()
    (scores,) = BasePolicy(trainer.model).logprobs([batch])
    torch.testing.assert_close(stored["logprobs"][: stored["ends"][0]], scores[0], rtol=1e-4, atol=1e-4)


def test_a_base_that_finds_no_token_likely_is_said_before_the_first_step(base, tmp_path):
    trainer = make_trainer(base, tmp_path, **{**STM, "stm_threshold": 1.01})
    with pytest.raises(TrainingError, match=r"no supervised token a perplexity of stm_threshold = 1.01 or less; the l"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_in_another_order_are_noticed(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, **STM)
    own_rows = type(trainer)._own_rows
    monkeypatch.setattr(type(trainer), "_own_rows", lambda self, n: own_rows(self, n)[::-1])
    with pytest.raises(TrainingError, match="The rows of a micro-batch are not rows"):
        trainer.train()


@pytest.mark.parametrize(
    "settings, what",
    [
        (dict(lora=make_lora(bias="all")), "this adapter trains the base's own biases (bias: all)"),
        (dict(rows=make_rows(8).to_iterable_dataset(), max_steps=2), "it needs tokenized rows, of a known number"),
    ],
)
def test_what_stm_cannot_do_is_refused_by_name(base, tmp_path, settings, what):
    with pytest.raises(RecipeError, match=re.escape(what)):
        make_trainer(base, tmp_path, **{**STM, **settings})


def test_without_an_adapter_there_is_no_base(base, tmp_path):
    model, _ = load_base(base, quantization="none", dtype="float32", verbose=False)
    with pytest.raises(RecipeError, match="loss_type stm compares the policy with the base: the base is the model"):
        make_trainer(base, tmp_path, model=model, **STM)


# ---- eaft ----


def test_eaft_s_weight_is_the_entropy_of_the_policy_s_20_likeliest(base, tmp_path, monkeypatch):
    compared = []

    def loss_by_hand(step):
        total, count = 0.0, 0
        for batch in window(trainer, step):
            logits = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            top = logits.detach().topk(20, -1).values.softmax(-1)
            weight = -(top * top.log()).sum(-1) / torch.tensor(20.0).log()
            nll = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + (weight * nll)[labels != -100].sum()
            count += int((labels != -100).sum())
        return total / count

    def compare(step):
        compared.append(off_by(trainer.model, lambda: loss_by_hand(step)))

    settings = dict(loss_type="eaft", max_steps=3, max_grad_norm=0.0, callbacks=[Recorder(compare)])
    trainer = make_trainer(base, tmp_path, **settings)
    trainer.train()
    assert len(compared) == 3 and all(difference < 1e-5 for difference in compared)
    plain = make_trainer(base, tmp_path / "nll", loss_type="nll", max_steps=3, max_grad_norm=0.0)
    plain.train()
    assert largest_difference(policy(trainer.model), policy(plain.model)) > 1e-3
