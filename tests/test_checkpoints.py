"""Checkpoints are whole or not used; a loss that is not finite stops the run and leaves the last good one."""

import errno
import hashlib
import json
import os
import resource
import shutil
import warnings

import pytest
import torch
from small_runs import Recorder, make_rows, make_trainer, policy, same
from test_resume import trainer_of

from qpsft.errors import OutputError, TrainingError
from qpsft.psft import checkpoint


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A run of 4 steps with a checkpoint at 2 and 4, and its final policy."""
    out = tmp_path_factory.mktemp("saved")
    trainer = trainer_of(base, out, num_iterations=2, max_steps=4, save_steps=2)
    trainer.train()
    return out, policy(trainer.model)


def damage(folder, how):
    if how == "no mark":
        (folder / "complete.json").unlink()
    elif how == "half a mark":
        mark = folder / "complete.json"
        mark.write_text(mark.read_text()[:40])
    elif how == "a mark of another kind":
        (folder / "complete.json").write_text("[]")
    elif how == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
    else:
        (folder / how).unlink()


DAMAGES = [
    "no mark",
    "half a mark",
    "a mark of another kind",
    "truncated",
    "optimizer.pt",
    "psft_reference.safetensors",
    "psft_scores_0.safetensors",
    "rng_state.pth",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_half_written_checkpoint_is_skipped_with_a_warning(saved, tmp_path, how):
    out = shutil.copytree(saved[0], tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest_complete_checkpoint(out).name == "checkpoint-4"
    damage(out / "checkpoint-4", how)
    with pytest.warns(UserWarning, match="checkpoint-4 is half-written.*skipped"):
        assert checkpoint.newest_complete_checkpoint(out).name == "checkpoint-2"


def test_training_resumes_from_the_newest_whole_one_and_repairs_the_other(base, saved, tmp_path):
    out = shutil.copytree(saved[0], tmp_path / "run")
    damage(out / "checkpoint-4", "truncated")
    trainer = trainer_of(base, out, num_iterations=2, max_steps=4, save_steps=2)
    with pytest.warns(UserWarning, match="half-written"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2
    assert same(policy(trainer.model), saved[1])
    assert checkpoint.is_complete(out / "checkpoint-4")


def test_without_a_whole_checkpoint_there_is_nothing_to_resume_from(base, saved, tmp_path):
    out = shutil.copytree(saved[0], tmp_path / "run")
    for step in (2, 4):
        damage(out / f"checkpoint-{step}", "no mark")
    trainer = trainer_of(base, out, max_steps=4)
    with pytest.warns(UserWarning, match="half-written"), pytest.raises(TrainingError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_plain_sft_trainer_is_refused_by_name(base, saved, tmp_path):
    out = shutil.copytree(saved[0], tmp_path / "run")
    for name in ("psft_run.json", "psft_scores_0.safetensors", "psft_reference.safetensors", "complete.json"):
        (out / "checkpoint-4" / name).unlink()
    trainer = trainer_of(base, out, max_steps=6)
    with pytest.raises(TrainingError, match="holds no old log-probabilities.*Resume from a checkpoint that qpsft made"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))


def test_old_checkpoints_go_only_when_the_new_one_is_whole(base, tmp_path):
    trainer = trainer_of(base, tmp_path, max_steps=5, save_total_limit=2)
    there = []
    mark = checkpoint.mark_complete

    def watching(folder):
        there.append(sorted(p.name for p in tmp_path.glob("checkpoint-*")))
        mark(folder)

    checkpoint.mark_complete, restore = watching, mark
    try:
        trainer.train()
    finally:
        checkpoint.mark_complete = restore
    assert there[3] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert trainer.args.save_total_limit == 2


def test_what_a_kill_left_of_old_checkpoints_goes_when_the_run_goes_on(base, saved, tmp_path):
    """Half-removed ones go before whole ones, though the removal has made them the newest by time."""
    out = shutil.copytree(saved[0], tmp_path / "run")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-1")
    (out / "checkpoint-1" / "complete.json").unlink()
    checkpoint.remove_old(out, 2, keep={"checkpoint-4"})
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-3")  # whole: the kill came before its removal
    trainer = trainer_of(base, out, num_iterations=2, max_steps=4, save_steps=2, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)  # nothing is left to do, so nothing is saved
    assert len(checkpoint.checkpoints(out)) == 2 and checkpoint.newest_complete_checkpoint(out).name == "checkpoint-4"
    assert same(policy(trainer.model), saved[1])


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_only_the_earlier_checkpoint_is_left(out, before):
    assert listing(out / "checkpoint-2") == before and checkpoint.is_complete(out / "checkpoint-2")
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-2"]
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("largest", ["adapter_model.safetensors", "optimizer.pt", "psft_reference.safetensors", None])
def test_a_full_disk_while_saving_leaves_earlier_checkpoints_untouched(base, saved, tmp_path, monkeypatch, largest):
    """The kernel itself refuses to write a file beyond a limit; None: any small text file fails."""
    out = shutil.copytree(saved[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoint-4")
    before = listing(out / "checkpoint-2")
    trainer = trainer_of(base, out, num_iterations=2, max_steps=4, save_steps=2)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest is None:

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint, "write_atomically", full)
    else:
        size = (out / "checkpoint-2" / largest).stat().st_size
        function = {"optimizer.pt": "_save_optimizer_and_scheduler", "psft_reference.safetensors": None}.get(
            largest, "save_model"
        )
        owner = trainer if function else checkpoint
        original = getattr(owner, function or "save_psft_state")

        def limited(*args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, old[1]))
            try:
                return original(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)

        monkeypatch.setattr(owner, function or "save_psft_state", limited)
    with pytest.raises(OutputError, match=r"checkpoint-4 could not be written: .*disk may be full.*untouched"):
        trainer.train(resume_from_checkpoint=True)
    assert_only_the_earlier_checkpoint_is_left(out, before)
    assert trainer.args.save_total_limit is None

    monkeypatch.undo()  # space was freed
    again = trainer_of(base, out, num_iterations=2, max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert same(policy(again.model), saved[1])


def test_other_errors_while_saving_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA error"), checkpoint.whole_or_removed(tmp_path / "checkpoint-1"):
        raise RuntimeError("CUDA error: device-side assert triggered")


def poison(trainer, at, value):
    """Sets one adapter weight after optimizer step `at` (counted from 0)."""

    def set_weight(step):
        if step == at:
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad)[0, 0] = value

    trainer.add_callback(Recorder(on_step=set_weight))


@pytest.mark.parametrize("loss_type", ["psft", "nll"])
def test_a_loss_that_is_nan_stops_the_run_with_step_and_rows(base, tmp_path, loss_type):
    trainer = make_trainer(
        base, tmp_path, rows=make_rows(24), max_steps=6, save_strategy="steps", save_steps=2, loss_type=loss_type
    )
    poison(trainer, at=2, value=float("nan"))
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    rows = sorted(trainer._get_schedule().rows(3))
    message = str(caught.value)
    assert f"stopped at optimizer step 4 on training rows {', '.join(map(str, rows))}: " in message
    assert "is NaN or infinite" in message and "Lower the learning rate" in message
    assert f"last good checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpoint.is_complete(tmp_path / "checkpoint-2")


def test_rows_that_spoil_a_run_are_named_by_their_lines(base, tmp_path):
    trainer = make_trainer(base, tmp_path, rows=make_rows(24), max_steps=2)
    trainer.row_places = [f"data.jsonl, line {2 * number + 1}" for number in range(24)]
    poison(trainer, at=0, value=float("nan"))
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    lines = "; ".join(f"data.jsonl, line {2 * row + 1}" for row in sorted(trainer._get_schedule().rows(1)))
    assert f"step 2 on training rows {lines}: " in str(caught.value)
    assert "look at these rows. " in str(caught.value)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    base, tmp_path, max_grad_norm, factor
):
    trainer = make_trainer(base, tmp_path, max_steps=4, max_grad_norm=max_grad_norm, gradient_checkpointing=False)
    parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * factor if trainer.state.global_step == 2 else gradient)
    kept = []
    trainer.add_callback(Recorder(on_step=lambda step: kept.append(policy(trainer.model))))
    with pytest.raises(TrainingError, match=r"step 3 on training rows .*: the gradient is NaN or infinite.*No check"):
        trainer.train()
    assert len(kept) == 2 and same(policy(trainer.model), kept[-1])


def test_a_mark_records_every_file_with_its_size_and_digest(saved):
    folder = saved[0] / "checkpoint-4"
    files = json.loads((folder / "complete.json").read_text())["files"]
    there = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
        if p.name != "complete.json"
    }
    assert files == there and "optimizer.pt" in there
