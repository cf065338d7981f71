"""reference: last_visit. Each row's old log-probabilities are the policy's at that row's own last visit."""

import pytest
import torch
from small_runs import largest_difference, log_lines, make_base, make_rows, make_trainer, policy, same

import qpsft.psft.trainer
from qpsft.errors import RecipeError

ROWS, STEPS_PER_EPOCH = 12, 3  # mini-batches of 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def trainer_of(base, out, **changes):
    settings = dict(rows=make_rows(ROWS), reference="last_visit", max_steps=3 * STEPS_PER_EPOCH)
    return make_trainer(base, out, **{**settings, **changes})


def test_old_logprobs_are_those_of_the_row_s_last_visit(base, tmp_path, monkeypatch):
    seen, real = [], qpsft.psft.trainer.psft_loss

    def spy(logprobs, old_logprobs, mask, **kwargs):
        seen.append((logprobs.detach().clone(), old_logprobs.clone(), mask))
        return real(logprobs, old_logprobs, mask, **kwargs)

    monkeypatch.setattr(qpsft.psft.trainer, "psft_loss", spy)
    trainer = trainer_of(base, tmp_path)
    trainer.train()
    schedule, last, visits = trainer._get_schedule(), {}, 0
    for step in range(3 * STEPS_PER_EPOCH):
        rows = schedule.rows(step)
        for micro_batch in range(2):
            logprobs, old, mask = seen[step * 2 + micro_batch]
            for i, row in enumerate(rows[micro_batch * 2 : micro_batch * 2 + 2]):
                here, before = logprobs[i][mask[i]], old[i][mask[i]]
                assert torch.equal(before, last.get(row, here))
                visits += row in last
                last[row] = here
    assert visits == 2 * ROWS  # epochs two and three


def test_the_first_epoch_is_sft_and_the_second_is_not(base, tmp_path):
    runs = {}
    for name, settings in {"last_visit": {}, "nll": dict(loss_type="nll", reference="snapshot")}.items():
        for epochs in (1, 2):
            trainer = trainer_of(base, tmp_path / name, max_steps=epochs * STEPS_PER_EPOCH, **settings)
            trainer.train()
            runs[name, epochs] = policy(trainer.model)
            if name == "last_visit" and epochs == 2:
                lines = log_lines(trainer)
    assert largest_difference(runs["last_visit", 1], runs["nll", 1]) < 1e-5
    assert largest_difference(runs["last_visit", 2], runs["nll", 2]) > 1e-3
    assert [line["ratio_max"] for line in lines[:STEPS_PER_EPOCH]] == [1.0] * STEPS_PER_EPOCH
    assert all(line["clip_fraction"] > 0 for line in lines[STEPS_PER_EPOCH:])


def test_it_costs_no_forward_and_no_second_set_of_parameters(base, tmp_path):
    trainer = trainer_of(base, tmp_path, gradient_checkpointing=False)
    calls, inner = [], trainer.model.get_base_model().model
    inner.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 * 3 * STEPS_PER_EPOCH and trainer.reference is None


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(base, tmp_path, stop):
    settings = dict(save_strategy="steps", save_steps=1, save_total_limit=None)
    whole = trainer_of(base, tmp_path / "a", **settings)
    whole.train()
    resumed = trainer_of(base, tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert same(policy(whole.model), policy(resumed.model))


def test_what_it_cannot_do_is_refused(base, tmp_path):
    with pytest.raises(RecipeError, match="snapshot or last_visit"):
        trainer_of(base, tmp_path, reference="last_step")
    with pytest.raises(RecipeError, match="not packed"):
        trainer_of(base, tmp_path, packing=True)
