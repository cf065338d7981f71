"""A run that runs out of memory says what needs less and how it goes on, and it does go on."""

import pytest
import torch
from planned_runs import LLAMA, planned, recipe_of

from qpsft import cli
from qpsft.plan import make_plan
from qpsft.plan.cards import gib
from qpsft.psft.trainer import PSFTTrainer
from qpsft.train.out_of_memory import LESS, SAME_STEPS, is_out_of_memory, out_of_memory

SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.8 GiB of which 1.1 GiB is free."
ERROR = torch.OutOfMemoryError(
    f"{SAYS} Of the allocated memory 5 GiB is … If reserved but unallocated memory is large …"
)
DEEP = LLAMA | {"num_hidden_layers": 16, "hidden_size": 512}
FLAGS = ["--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128"]
FLAGS += ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--max_steps=4", "--save_steps=2"]


def test_what_out_of_memory_looks_like():
    assert is_out_of_memory(ERROR)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_plan_says_what_needs_less():
    plan = planned("--max_length=2048", "--per_device_train_batch_size=4")
    smaller = plan.within(int(LESS * plan.needed_bytes))
    assert smaller.needed <= LESS * plan.needed_bytes and "per_device_train_batch_size" in smaller.options
    told = out_of_memory(ERROR, 7, plan, None)
    assert told.what == f"Memory ran out at optimizer step 7: {SAYS}"
    before, after = gib(plan.needed_bytes), gib(smaller.needed)
    assert f"The plan counts {before} GiB for this run, and {after} GiB with {smaller.flags()}." in told.todo
    assert told.todo.endswith("No checkpoint had been saved yet: start again with --overwrite.")


def test_a_checkpoint_goes_on_only_with_its_own_batches(tmp_path):
    saved = tmp_path / "checkpoint-100"
    plan = planned("--max_length=2048", "--per_device_train_batch_size=4")
    other_batches = out_of_memory(ERROR, 107, plan, saved).todo
    assert f"To go on from {saved}" in other_batches
    assert "give --activation_offloading true and --resume" in other_batches
    flags = ("--max_length=4096", "--per_device_train_batch_size=1", "--optim=paged_adamw_8bit")
    plan = make_plan(recipe_of(*flags, "--gradient_checkpointing=false"), config=DEEP)
    assert set(plan.within(int(LESS * plan.needed_bytes)).options) <= SAME_STEPS
    same_steps = out_of_memory(ERROR, 107, plan, saved).todo
    assert "GiB with --gradient_checkpointing true" in same_steps
    assert f"Add --resume, and the run goes on from {saved}." in same_steps
    unplanned = out_of_memory(ERROR, 107, None, saved).todo
    assert "`qpsft plan` shows what takes how much" in unplanned and "--resume" in unplanned


def test_a_run_that_ran_out_of_memory_is_no_traceback_and_goes_on(tmp_path, monkeypatch, capsys):
    compute_loss, calls = PSFTTrainer.compute_loss, []

    def out_of_memory_in_the_third_step(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if self.state.global_step == 2:
            raise ERROR
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PSFTTrainer, "compute_loss", out_of_memory_in_the_third_step)
    assert cli.main(["train", *FLAGS, f"--output_dir={tmp_path}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error: Memory ran out at optimizer step 3: CUDA out of memory." in said and "checkpoint-2" in said
    assert "Traceback" not in said
    monkeypatch.setattr(PSFTTrainer, "compute_loss", compute_loss)
    assert cli.main(["train", *FLAGS, f"--output_dir={tmp_path}", "--resume"]) == 0


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(PSFTTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli.main(["train", *FLAGS, f"--output_dir={tmp_path}"])
