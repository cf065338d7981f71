"""Runs of a few steps: they learn something, or they are an error and leave no adapter behind."""

import json
import warnings

import pytest
import torch
from conftest import shared_path
from safetensors.torch import load_file
from small_runs import Recorder, log_lines, make_trainer

from qpsft import cli
from qpsft.errors import TrainingError
from qpsft.psft.config import PSFTConfig

ROWS = [{"prompt": f"What is {i}+{i}?", "completion": f"{i}+{i} is {2 * i}."} for i in range(16)]
"""`../shared/cases/data/W_16rows.jsonl` is of this kind."""


def write_recipe(folder, **options) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"model_name_or_path": "demo", "dataset_name": "rows.jsonl", "learning_rate": 2e-4} | options
    (folder / "recipe.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    return str(folder / "recipe.yaml")


def moved(folder) -> bool:
    tensors = load_file(folder / "adapter_model.safetensors")
    return any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_the_shortest_run_moves(tmp_path, capsys):
    assert cli.main(["train", write_recipe(tmp_path)]) == 0
    assert moved(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warmup_steps = 10 is shortened to 0") == 1
    assert "fewer optimizer steps than one block of PSFT, 3 and 8" in said and "takes 128 rows" in said


def test_the_case_moves(tmp_path):
    recipe = shared_path("cases/data/W_recipe.yaml")
    assert cli.main(["train", str(recipe), f"--output_dir={tmp_path}"]) == 0
    assert moved(tmp_path)


@pytest.mark.parametrize(
    ("given", "steps", "wanted"),
    [(10, 1, 0), (10, 9, 0), (10, 50, 5), (10, 99, 9), (3, 30, 3), (0, 5, 0), (0.5, 40, 4), (0.05, 40, 2)],
)
def test_the_warm_up_is_at_most_a_tenth_of_the_run(tmp_path, given, steps, wanted):
    args = PSFTConfig(str(tmp_path), warmup_steps=given, use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert args.get_warmup_steps(steps) == wanted


def test_a_warm_up_that_fits_is_not_spoken_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert PSFTConfig(str(tmp_path), use_cpu=True).get_warmup_steps(100) == 10
        assert PSFTConfig(str(tmp_path), warmup_steps=0.1, use_cpu=True).get_warmup_steps(55) == 5


def test_the_rates_of_a_short_run(base, tmp_path):
    trainer = make_trainer(base, tmp_path, warmup_steps=10, max_steps=20, gradient_accumulation_steps=1)
    with pytest.warns(UserWarning, match="warmup_steps = 10 is shortened to 2, a tenth of the run's 20 optimizer"):
        trainer.train()
    fall = [5e-3 * (1 - step / 6) for step in range(6)]
    assert rates_of(trainer) == pytest.approx([0, 2.5e-3] + [5e-3] * 12 + fall)


def rates_of(trainer):
    return [line["learning_rate"] for line in log_lines(trainer)]


@pytest.mark.parametrize(
    ("options", "share_of_the_rate"),
    [
        (dict(max_steps=10), [1] * 7 + [1, 2 / 3, 1 / 3]),
        (dict(max_steps=1), [1]),
        (dict(max_steps=4, lr_scheduler_kwargs=dict(num_decay_steps=2)), [1, 1, 1, 0.5]),
        (dict(max_steps=4, lr_scheduler_kwargs='{"num_decay_steps": 4, "min_lr_ratio": 0.5}'), [1, 0.875, 0.75, 0.625]),
        (dict(max_steps=4, lr_scheduler_type="constant_with_warmup"), [1] * 4),
    ],
)
def test_the_rate_falls_over_the_end_of_a_run(base, tmp_path, options, share_of_the_rate):
    trainer = make_trainer(base, tmp_path, warmup_steps=0, gradient_accumulation_steps=1, **options)
    trainer.train()
    assert rates_of(trainer) == pytest.approx([5e-3 * share for share in share_of_the_rate])


NO_RATE = dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=dict(num_decay_steps=0, num_stable_steps=0))


def test_a_run_of_steps_at_rate_0_is_an_error(tmp_path, capsys):
    assert cli.main(["train", write_recipe(tmp_path, save_steps=3, **NO_RATE)]) == 2
    assert "learning rate of all 3 optimizer steps was 0" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_that_moves_nothing_is_an_error(base, tmp_path):
    trainer = make_trainer(base, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)

    def no_gradient(step):
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    trainer.add_callback(Recorder(on_gradients=no_gradient))
    with pytest.raises(TrainingError, match="2 optimizer steps changed no trained weight"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_stopped_before_its_rate_rises_is_an_error(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=20, warmup_steps=2)

    def stop(step):
        trainer.control.should_training_stop = True

    trainer.add_callback(Recorder(on_step=stop))
    with pytest.raises(TrainingError, match="learning rate of its optimizer step was 0"):
        trainer.train()


def test_one_changed_bit_is_a_move(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=1)

    def least_change(step):
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        with torch.no_grad():
            weight.view(torch.int32)[0, 0] ^= 1

    trainer.add_callback(Recorder(on_gradients=least_change))
    trainer.train()


def test_a_finished_run_that_is_resumed_takes_no_step_and_is_no_error(base, tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=2)
    make_trainer(base, tmp_path, **settings).train()
    make_trainer(base, tmp_path, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(reference_steps=8), "fewer optimizer steps than one block of PSFT, 6 and 8: .* takes 32 rows,"),
        (
            dict(num_iterations=4, num_train_epochs=4),
            "one block of PSFT, 6 and 12: .* takes 12 rows, gone through 4 times",
        ),
        (
            dict(reference_steps=4, sft_warmup_steps=4),
            "one block of PSFT, 2 after the SFT warm-up and 4: .* takes 16 rows",
        ),
    ],
)
def test_fewer_steps_than_a_block_are_said_with_the_rows_it_takes(base, tmp_path, settings, wanted):
    trainer = make_trainer(base, tmp_path, **settings)
    with pytest.warns(UserWarning, match=wanted):
        trainer.train()
