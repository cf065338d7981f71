"""target_kl and target_clip_fraction: blocks that end early, an epsilon that moves, and the warning of a KL far off."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_runs import largest_difference, log_lines, make_config, make_rows, make_trainer, policy, same
from test_resume import contents

from qpsft.errors import RecipeError
from qpsft.psft.trust_region import TrustRegion

VISITS = dict(num_iterations=2, rows=make_rows(10), max_steps=12, learning_rate=1e-3)


def part(tokens, kl=0.0, clipped=0.0):
    return {
        name: torch.tensor(float(v)) for name, v in dict(num_items=tokens, approx_kl=kl, clip_fraction=clipped).items()
    }


def region_after(*parts, epsilon=0.2, **targets):
    region = TrustRegion(epsilon, **targets)
    for each in parts:
        region.add(each)
    region.end_step(Accelerator(cpu=True))
    return region


def test_the_region_is_left_when_the_step_s_mean_kl_passes_the_target():
    micro_batches = part(3, kl=0.3), part(1, kl=0.5)  # 0.8 over four tokens
    assert region_after(*micro_batches, target_kl=0.19).is_left
    assert not region_after(*micro_batches, target_kl=0.21).is_left
    assert not region_after(*micro_batches).is_left


def test_a_step_is_taken_in_once_and_a_repeated_one_does_not_count_twice():
    region = TrustRegion(0.2, target_kl=1.0)
    region.add(part(1, kl=50))
    region.forget_step()
    region.add(part(2, kl=4))
    for _ in range(2):
        region.end_step(Accelerator(cpu=True))
        assert region.kl == 2


@pytest.mark.parametrize(
    ("clipped", "epsilon"),
    [(10, 0.2), (40, 0.3), (14.4, 0.24), (6.4, 0.16), (0, 0.2 / 1.5)],  # of 100 tokens, the target being a tenth
)
def test_epsilon_follows_the_clip_fraction_of_the_block(clipped, epsilon):
    region = region_after(part(60, clipped=clipped), part(40), target_clip_fraction=0.1)
    assert region.epsilon == 0.2
    region.begin_block()
    assert region.epsilon == pytest.approx(epsilon)


def test_epsilon_stays_within_four_times_of_what_was_given():
    for clipped, limit in ((100, 0.8), (0, 0.05)):
        region = TrustRegion(0.2, target_clip_fraction=0.1)
        for _ in range(9):
            region.add(part(100, clipped=clipped))
            region.end_step(Accelerator(cpu=True))
            region.begin_block()
        assert region.epsilon == pytest.approx(limit)


def test_with_a_target_that_every_step_passes_psft_is_sft(base, tmp_path):
    runs = {}
    for name, settings in (
        ("sft", dict(loss_type="nll")),
        ("psft", {}),
        ("target", dict(target_kl=1e-12)),
        ("far target", dict(target_kl=1e9)),
    ):
        trainer = make_trainer(base, tmp_path / name, **settings, rows=make_rows(10), max_steps=9)
        trainer.train()
        runs[name] = policy(trainer.model)
        ends = trainer._get_schedule().early_ends
        # a snapshot's own step has a KL of exactly 0, so a block lasts two steps
        assert ends == ([2, 4, 6, 8] if name == "target" else [])
        assert log_lines(trainer)[-1].get("blocks_ended_early") == {"target": 4, "far target": 0}.get(name)
    assert same(runs["far target"], runs["psft"])
    to_sft = {name: largest_difference(runs[name], runs["sft"]) for name in ("psft", "target")}
    assert to_sft["target"] < to_sft["psft"]


def test_each_step_trains_the_rows_of_the_schedule_as_it_is_after_an_early_end(base, tmp_path):
    rows, trained = VISITS["rows"], []
    trainer = make_trainer(base, tmp_path, **VISITS, target_kl=1e-12)
    begin = trainer._begin_step

    def compute_loss(model, inputs, **kwargs):
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        trained[-1] += [ids[mask].tolist() for ids, mask in pairs]
        return type(trainer).compute_loss(trainer, model, inputs, **kwargs)

    trainer._begin_step = lambda: (trained.append([]), begin())
    trainer.compute_loss = compute_loss
    trainer.train()
    schedule = trainer._get_schedule()
    assert len(schedule.early_ends) > 2
    assert trained == [[rows[i]["input_ids"] for i in schedule.rows(step)] for step in range(12)]
    # the last block is of one mini-batch, which is visited twice
    assert [schedule.position(step).mini_batch for step in range(12)] == [*range(11), 10]


MOVING = {**VISITS, "target_kl": 3e-5, "target_clip_fraction": 0.2, "epsilon": 0.01, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def never_stopped(base, tmp_path_factory):
    """A run with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("never_stopped")
    whole = make_trainer(base, out, **MOVING, save_steps=1, save_total_limit=None)
    whole.train()
    return whole


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_resumed_it_equals_the_run_that_never_stopped(base, never_stopped, tmp_path, stop):
    whole, there = never_stopped, Path(never_stopped.args.output_dir)
    ends = whole._get_schedule().early_ends
    assert 1 <= len(ends) < 6  # some blocks end early, some do not
    shutil.copytree(there / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    cut = make_trainer(base, tmp_path, **MOVING, save_steps=12)
    cut.train(resume_from_checkpoint=True)
    assert cut._get_schedule().early_ends == ends
    got, wanted = (contents(folder / "checkpoint-12") for folder in (tmp_path, there))
    assert [name for name in wanted if not same(got.get(name), wanted[name])] == []
    assert [line["epsilon"] for line in log_lines(cut)] == [line["epsilon"] for line in log_lines(whole)]
    assert len({line["epsilon"] for line in log_lines(whole)}) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(target_kl=0.0), "target_kl is 0.0; it must be above 0"),
        (dict(target_clip_fraction=1.0), "target_clip_fraction is 1.0; it must be between 0 and 1"),
        (dict(target_kl=0.1, loss_type="dft"), "target_kl has no effect with loss_type dft, which has no reference"),
    ],
)
def test_targets_that_cannot_work_are_refused(tmp_path, settings, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        make_config(tmp_path, **settings)


def test_a_kl_out_of_any_region_is_warned_of_once_while_training(base, tmp_path):
    trainer = make_trainer(base, tmp_path, learning_rate=0.2, max_steps=6)
    with pytest.warns(UserWarning, match="out of any trust region") as said:
        trainer.train()
    assert sum("out of any trust region" in str(warning.message) for warning in said) == 1
    assert sum(line["approx_kl"] > 1 for line in log_lines(trainer)) > 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*out of any trust region")
        make_trainer(base, tmp_path, learning_rate=1e-3, max_steps=3).train()
