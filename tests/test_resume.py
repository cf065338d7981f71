"""Invariant 6: a run stopped at any step and resumed gives the same bytes as one that never stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import log_lines, make_lora, make_rows, make_trainer, policy, same
from transformers import TrainerCallback

from qpsft.errors import TrainingError
from qpsft.psft import checkpoint

# 10 rows in mini-batches of 4: three steps an epoch. Steps from 0:
#   V=2, W=2: 0 1 warm-up | 2..7 a block (3 mini-batches, twice) | 8..11 a block (2 mini-batches, twice)
#   V=1, W=0: 0..2 | 3..5 | 6..8 | 9..11
PLANS = {"visits": dict(num_iterations=2, sft_warmup_steps=2), "one visit": {}}
STOPS = {
    "visits": [1, 2, 3, 5, 6, 7, 8, 10],  # warm-up; before and after a snapshot; epoch's end; second visit; next block
    "one visit": [1, 3, 4, 6, 11],
}


def trainer_of(base, out, **changes):
    settings = dict(rows=make_rows(10), max_steps=12, save_strategy="steps", save_steps=1, save_total_limit=None)
    settings |= dict(learning_rate=1e-3, epsilon=0.2)  # most tokens stay unclipped: old log-probabilities matter
    return make_trainer(base, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """By plan: the folder of a run that was never stopped, with a checkpoint at every step."""
    done = {}

    def run(plan):
        if plan not in done:
            out = tmp_path_factory.mktemp("uninterrupted")
            trainer_of(base, out, **PLANS[plan]).train()
            done[plan] = out
        return done[plan]

    return run


def contents(checkpoint):
    """What a checkpoint holds, by file: raw bytes of the tensors' files, objects of the rest; no clock readings."""
    found = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = file.read_bytes()
        elif file.name in ("optimizer.pt", "scheduler.pt"):
            found[file.name] = torch.load(file, weights_only=True)
    for file in checkpoint.glob("rng_state*.pth"):  # one per process
        state = torch.load(file, weights_only=False)
        parts = {"cpu": state["cpu"], "python": state["python"], "numpy": [str(part) for part in state["numpy"]]}
        found[file.name] = parts
    return found


def lines_of(trainer):
    clocks = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    return [{k: v for k, v in line.items() if k not in clocks} for line in log_lines(trainer)]


@pytest.mark.parametrize("plan,stop", [(plan, stop) for plan in PLANS for stop in STOPS[plan]])
def test_invariant_6_resumed_at_any_step_it_equals_the_uninterrupted_run(base, uninterrupted, tmp_path, plan, stop):
    whole = uninterrupted(plan)
    shutil.copytree(whole / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    resumed = trainer_of(base, tmp_path, save_steps=12, **PLANS[plan])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12 and resumed._initial_global_step == stop
    got, wanted = contents(tmp_path / "checkpoint-12"), contents(whole / "checkpoint-12")
    assert "adapter_model.safetensors" in got and "psft_reference.safetensors" in got and "optimizer.pt" in got
    assert [name for name in wanted if not same(got.get(name), wanted[name])] == []
    assert got.keys() == wanted.keys()


def test_saving_does_not_disturb_a_run_and_the_checks_can_tell_runs_apart(base, uninterrupted, tmp_path):
    quiet = trainer_of(base, tmp_path, save_strategy="no", **PLANS["visits"])
    quiet.train()
    quiet.save_model(tmp_path / "end")
    saved = contents(uninterrupted("visits") / "checkpoint-12")
    assert (tmp_path / "end" / "adapter_model.safetensors").read_bytes() == saved["adapter_model.safetensors"]
    for earlier in range(1, 12):
        other = contents(uninterrupted("visits") / f"checkpoint-{earlier}")
        assert not same(other["optimizer.pt"], saved["optimizer.pt"])
        assert other["adapter_model.safetensors"] != saved["adapter_model.safetensors"]


def test_a_checkpoint_in_mid_block_holds_the_reference_and_the_block_s_scores(uninterrupted):
    whole = uninterrupted("visits")
    assert not (whole / "checkpoint-2" / "psft_reference.safetensors").exists()  # warm-up: no snapshot yet
    assert checkpoint.load_psft_state(whole / "checkpoint-2", 0) == {"reference": None, "kept": {}}
    kept = checkpoint.load_psft_state(whole / "checkpoint-4", 0)["kept"]
    assert sorted(kept) == [2, 3] and all(len(micro_batches) == 2 for micro_batches in kept.values())
    kept = checkpoint.load_psft_state(whole / "checkpoint-7", 0)["kept"]
    assert sorted(kept) == [2, 3, 4]
    names = {(whole / f"checkpoint-{step}" / "psft_reference.safetensors").read_bytes() for step in range(3, 9)}
    assert len(names) == 1  # one block, one reference
    assert (whole / "checkpoint-9" / "psft_reference.safetensors").read_bytes() not in names


class StopAt(TrainerCallback):
    """Raises once the checkpoint of `step` is written, as a cut-off run does; or right before it is."""

    def __init__(self, step, before_saving=False):
        self.step, self.before_saving = step, before_saving

    def on_step_end(self, args, state, control, **kwargs):
        if self.before_saving and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if not self.before_saving and state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_stopped_between_checkpoints_goes_back_to_the_last_one(base, uninterrupted, tmp_path):
    settings = dict(save_steps=3, logging_steps=4, **PLANS["visits"])
    with pytest.raises(KeyboardInterrupt):
        trainer_of(base, tmp_path, callbacks=[StopAt(8, before_saving=True)], **settings).train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-3"]
    resumed = trainer_of(base, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = contents(uninterrupted("visits") / "checkpoint-12")
    assert same(contents(tmp_path / "checkpoint-12"), whole)


def test_the_log_and_its_token_count_go_on_where_they_were(base, tmp_path):
    """Also when the checkpoint lies between two log lines."""
    whole = trainer_of(base, tmp_path / "whole", save_strategy="no", logging_steps=4)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(base, tmp_path / "cut", logging_steps=4, callbacks=[StopAt(6)]).train()
    resumed = trainer_of(base, tmp_path / "cut", logging_steps=4)
    resumed.train(resume_from_checkpoint=True)
    wanted, got = lines_of(whole), lines_of(resumed)
    assert [line["step"] for line in got] == [4, 8, 12]
    assert [line["num_tokens"] for line in got] == [line["num_tokens"] for line in wanted]
    rows = make_rows(10)
    plan = [whole._get_schedule().rows(step) for step in range(12)]
    assert got[-1]["num_tokens"] == sum(len(rows[row]["input_ids"]) for step in plan for row in step)
    assert got[0] == wanted[0] and got[2] == wanted[2]  # the line in between covers the steps since the checkpoint


@pytest.mark.parametrize("stop", [1, 4])  # the next step scores; the next step has kept scores
def test_dropout_draws_the_same_numbers_after_resuming(base, tmp_path, stop):
    lora = make_lora(lora_dropout=0.2, init_lora_weights=False)  # (B = 0 would hide what dropout does to the reference)
    settings = dict(lora=lora, num_iterations=2, max_steps=6)
    with pytest.warns(UserWarning, match="lora_dropout"):
        whole = trainer_of(base, tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "cut" / f"checkpoint-{stop}")
    resumed = trainer_of(base, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(policy(resumed.model), policy(whole.model))


@pytest.mark.parametrize("loss_type", ["nll", "dft", "eaft", "trsft"])
def test_the_baselines_resume_too(base, tmp_path, loss_type):
    settings = dict(loss_type=loss_type, block_order=True, num_iterations=2, max_steps=6)
    whole = trainer_of(base, tmp_path / "whole", **settings)
    whole.train()
    assert not list((tmp_path / "whole").rglob("psft_reference*"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    resumed = trainer_of(base, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(contents(tmp_path / "cut" / "checkpoint-6"), contents(tmp_path / "whole" / "checkpoint-6"))


@pytest.mark.parametrize(
    "changes,what",
    [
        (dict(gradient_accumulation_steps=1), "gradient_accumulation_steps = 2, this run has 1"),
        (dict(num_iterations=3), "num_iterations = 2, this run has 3"),
        (dict(reference_steps=4), "reference_steps = 3, this run has 4"),
        (dict(seed=8), "seed = 7, this run has 8"),
        (dict(rows=make_rows(11)), "rows = 10, this run has 11"),
        (dict(loss_type="nll", block_order=True), "loss_type = psft, this run has nll"),
    ],
)
def test_settings_that_change_which_rows_a_step_sees_are_refused(base, uninterrupted, changes, what):
    """Kept log-probabilities would silently belong to other rows."""
    checkpoint = uninterrupted("visits") / "checkpoint-5"
    trainer = trainer_of(base, checkpoint.parent / "other", **{**PLANS["visits"], **changes})
    with pytest.raises(TrainingError, match=re.escape(what)):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_run_may_be_made_longer(base, tmp_path):
    constant = dict(lr_scheduler_type="constant_with_warmup")
    trainer_of(base, tmp_path / "whole", **constant).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "checkpoint-7")
    longer = trainer_of(base, tmp_path, max_steps=15, **constant)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 15
    whole = contents(tmp_path / "whole" / "checkpoint-12")
    assert contents(tmp_path / "checkpoint-12")["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path[:0] = sys.argv[4:]
torch.set_num_threads(1)
from transformers import TrainerCallback
from small_runs import make_rows, make_trainer

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

make_trainer(
    Path(sys.argv[1]), Path(sys.argv[2]), rows=make_rows(10), max_steps=12, num_iterations=2, sft_warmup_steps=2,
    learning_rate=1e-3, epsilon=0.2, save_strategy="steps", save_steps=2, callbacks=[Kill()],
).train(resume_from_checkpoint=int(sys.argv[3]) < 0)
"""


@pytest.mark.processes
def test_kill_9_and_a_new_process_give_the_same_bytes(base, uninterrupted, tmp_path):
    here = Path(__file__).resolve().parent
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(kill_at):
        command = [sys.executable, str(script), str(base), str(tmp_path / "out"), str(kill_at), str(here)]
        done = subprocess.run(
            [*command, str(here.parent)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr[-3000:]

    code, _ = run(kill_at=7)
    assert code == -signal.SIGKILL
    assert checkpoint.checkpoints(tmp_path / "out")[0].name == "checkpoint-6"  # mid-block, in the second visit
    code, stderr = run(kill_at=-1)
    assert code == 0, stderr
    got = contents(tmp_path / "out" / "checkpoint-12")
    assert same(got, contents(uninterrupted("visits") / "checkpoint-12"))
