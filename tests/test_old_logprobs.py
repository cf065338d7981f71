"""The old log-probabilities of a block: recorded, scored or kept, and the same after a checkpoint."""

import pytest
import torch
from peft import get_peft_model
from small_runs import make_config, make_lora, make_rows, same
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qpsft.model.base import load_base
from qpsft.psft.old_logprobs import OldLogprobs
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.schedule import StepPosition


def policy_of(base):
    model, _ = load_base(base, verbose=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return get_peft_model(model, make_lora(init_lora_weights=False))


def window():
    """Two micro-batches, made anew as a data loader would."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    rows = list(make_rows(4))
    return [collate(rows[:2]), collate(rows[2:])]


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("visits", [1, 2])
def test_a_block(base, tmp_path, monkeypatch, visits):
    model = policy_of(base)
    old = OldLogprobs(model, make_config(tmp_path, num_iterations=visits))
    scored, score = [], ReferencePolicy.score
    monkeypatch.setattr(ReferencePolicy, "score", lambda *args, **more: scored.append(1) or score(*args, **more))
    assert old.reference is None and old.state_dict() == {"reference": None, "kept": {}}

    own = [torch.randn(len(batch["labels"]), batch["labels"].shape[1] - 1) for batch in window()]

    def attached(mini_batch, **where):
        batches = window()
        old.attach(batches, StepPosition(mini_batch, block=0, **where), step=mini_batch)
        return [old.resolve(batch["old_logprobs"], logprobs) for batch, logprobs in zip(batches, own, strict=True)]

    assert same(attached(5, is_snapshot=True), own) and not scored
    at_snapshot = old.reference.score(window())
    move(model)
    first = attached(6)
    assert len(scored) == 2 and all((a - b).abs().max() < 1e-5 for a, b in zip(first, at_snapshot, strict=True))
    if visits == 1:
        assert old.state_dict()["kept"] == {}
        return
    assert same(attached(5, visit=1), own) and same(attached(6, visit=1), first) and len(scored) == 2
    state = old.state_dict()
    assert sorted(state["kept"]) == [5, 6]

    resumed = OldLogprobs(model, make_config(tmp_path, num_iterations=visits))
    resumed.load_state_dict(state)
    assert same(resumed.state_dict(), state) and len(scored) == 2
    attached(7, is_snapshot=True)
    assert sorted(old.state_dict()["kept"]) == [7]  # what was kept is for one block
    assert not same(old.state_dict()["reference"], resumed.state_dict()["reference"])


def test_without_old_logprobs_there_is_nothing_to_resolve(base, tmp_path):
    assert OldLogprobs(policy_of(base), make_config(tmp_path)).resolve(None, torch.zeros(1, 2)) is None
