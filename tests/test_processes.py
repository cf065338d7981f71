"""Several processes under torchrun (gloo): invariant 4, resuming, the command line, and errors that end them all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from small_runs import largest_difference, make_rows, make_trainer, policy
from two_processes import ANCHORED, EARLY_ENDS, FLAGS, PACKED, SETTINGS, SIX_STEPS, STM, STOP

from qpsft import cli, processes
from qpsft.errors import RecipeError
from qpsft.psft.sharding import check_sharding
from qpsft.train.progress import read_metrics

pytestmark = pytest.mark.processes

HERE = Path(__file__).resolve().parent


def torchrun(*command):
    """Two processes. Returns (return code, stdout, stderr)."""
    return launch("torch.distributed.run", "--standalone", "--nproc_per_node=2", *command)


def launch(*command, timeout=600):
    """Runs a launcher, a module and its arguments. Returns (return code, stdout, stderr)."""
    launched = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = launched.communicate(timeout=timeout)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)  # its workers too
            launched.wait()
    return launched.returncode, stdout, stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of prompts and completions."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [" ".join(f"w{i}" for i in row if i > 2) for row in make_rows(40)["input_ids"]]
    path.write_text("".join(json.dumps({"prompt": "w5 w6 ", "completion": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def found(base, rows, tmp_path_factory):
    """What the two processes of two_processes.py found, and the folder they wrote to."""
    out = tmp_path_factory.mktemp("two")
    code, _, stderr = torchrun(HERE / "two_processes.py", base, out, rows)
    assert code == 0, stderr[-3000:]
    return [json.loads((out / f"found_{rank}.json").read_text()) for rank in (0, 1)], out


def test_invariant_4_two_processes_are_one_with_twice_the_accumulation(base, found, tmp_path):
    both, out = found
    trainer = make_trainer(base, tmp_path, **{**SETTINGS, "gradient_accumulation_steps": 4})
    start = policy(trainer.model)
    trainer.train()
    one, two = policy(trainer.model), load_file(out / "policy.safetensors")
    assert largest_difference(one, two) < 1e-5
    assert largest_difference(one, start) > 1e-3
    for rank in both:
        assert rank["run"]["tokens"] == trainer._statistics.num_tokens
        assert rank["run"]["wrapped"] == "DistributedDataParallel" and not rank["run"]["find_unused_parameters"]
        assert rank["run"]["reference_shares_names"]  # the reference is of the model inside the wrapper


def test_invariant_4_holds_for_packed_rows(base, found, tmp_path):
    both, out = found
    trainer = make_trainer(base, tmp_path, **{**PACKED, "gradient_accumulation_steps": 4})
    trainer.train()
    assert [rank["packed"] for rank in both] == ["DistributedDataParallel"] * 2
    assert largest_difference(policy(trainer.model), load_file(out / "packed.safetensors")) < 1e-5


@pytest.mark.parametrize(("name", "settings"), [("anchored", ANCHORED), ("stm", STM)])
def test_invariant_4_holds_for_losses_that_need_the_base(base, found, tmp_path, name, settings):
    both, out = found
    trainer = make_trainer(base, tmp_path, **{**settings, "gradient_accumulation_steps": 4})
    start = policy(trainer.model)
    trainer.train()
    assert largest_difference(policy(trainer.model), load_file(out / f"{name}.safetensors")) < 1e-5
    assert largest_difference(policy(trainer.model), start) > 1e-3


def test_invariant_4_holds_where_blocks_end_early(base, found, tmp_path):
    both, out = found
    trainer = make_trainer(base, tmp_path, **{**EARLY_ENDS, "gradient_accumulation_steps": 4})
    trainer.train()
    assert len(trainer._get_schedule().early_ends) > 1
    assert largest_difference(policy(trainer.model), load_file(out / "early_ends.safetensors")) < 1e-5


def test_two_processes_resume_in_mid_block_to_the_same_bytes(found):
    both, out = found
    scores = {f"psft_scores_{rank}.safetensors" for rank in (0, 1)}
    for rank in both:
        assert {*scores, "rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= set(rank["run"]["files"])
        assert rank["run"]["resumed_from"] == STOP
        assert rank["run"]["resumed_differs_in"] == []
        assert rank["command_line_resumed"]
    kept = [load_file(out / "cut" / f"checkpoint-{STOP}" / name) for name in sorted(scores)]
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 4 * 2  # K mini-batches of two micro-batches each
    assert not any(kept[0][name].shape == kept[1][name].shape and bool((kept[0][name] == kept[1][name]).all())
                   for name in kept[0])  # fmt: skip


def test_a_sharded_run_is_the_run_that_is_not(base, found, tmp_path):
    """FSDP 2 on a 4-bit base, by accelerate's configuration in docs/: invariants 4 and 6, snapshot and scoring."""
    both, out = found
    unsharded, sharded = (load_file(out / name) for name in ("policy.safetensors", "sharded_policy.safetensors"))
    assert largest_difference(unsharded, sharded) < 1e-6
    lines = [line for line in resume_lines(out / "whole") if "grad_norm" in line]
    for rank in both:
        assert rank["sharded"]["layers_sharded"] == [True, True] and rank["sharded"]["kinds"] == ["DTensor"]
        assert rank["sharded"]["grad_norms"] == pytest.approx([line["grad_norm"] for line in lines], rel=1e-4)
        assert rank["sharded"]["resumed_equal"]
        assert rank["sharded"]["fsdp_casts_to"] == "None"  # with bf16: packed weights are not numbers
        swap = rank["sharded"]["swap"]
        assert swap["policy_moved"] > 1e-3 and swap["scored_is_the_snapshot_s"] and swap["policy_is_back"]
        assert swap["setting_data_changed_nothing"]  # the other way to swap: no error, and no effect
        assert not rank["sharded"]["reference_in_host_memory"]


def test_a_sharded_run_on_packed_rows_is_the_run_that_is_not(found):
    both, out = found
    unsharded, sharded = (load_file(out / f"{name}.safetensors") for name in ("packed", "sharded_packed"))
    assert largest_difference(unsharded, sharded) < 1e-6
    for rank in both:
        assert rank["sharded"]["packed"].startswith("FSDP")
        assert "lets the rows packed together see each other" in rank["sharded"]["rows_that_mix"]


def resume_lines(folder):
    return json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]


def test_a_sharded_run_on_the_command_line_writes_an_ordinary_adapter(base, rows, found, tmp_path):
    both, out = found
    assert [rank["sharded"]["command_line"] for rank in both] == [0, 0]
    alone = [*FLAGS, "--gradient_accumulation_steps=2", f"--model_name_or_path={base}", f"--dataset_name={rows}"]
    assert cli.main(["train", *alone, f"--output_dir={tmp_path}"]) == 0
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, out / "fsdp_cli")]
    assert largest_difference(*adapters) < 1e-6
    record = json.loads((out / "fsdp_cli" / "base_quantization.json").read_text())
    assert (record["quantization"], record["quant_storage"]) == ("nf4", "float32")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (out / "fsdp_cli").iterdir()}
    assert cli.main(["merge", str(out / "fsdp_cli")]) == 0  # merged onto weights stored as uint8, and verified


def test_what_sharding_needs_is_checked_before_training(found):
    for rank in found[0]:
        refused = rank["sharded"]["refused"]
        assert "Set fsdp_state_dict_type: FULL_STATE_DICT" in refused["checkpoints"]
        assert "stored as uint8, the embedding is bfloat16. Load it with bnb_4bit_quant_storage=bfloat16" in re.sub(
            r"base_model\S+ is ", "", refused["storage"]
        )
        assert "optim adamw_8bit is not supported with FSDP" in refused["optimizer"]
        assert "Use adamw_torch_fused, the default." in refused["optimizer"]
    trainer = SimpleNamespace(is_deepspeed_enabled=True, is_fsdp_enabled=True, args=SimpleNamespace())
    with pytest.raises(RecipeError, match="DeepSpeed is not supported"):
        check_sharding(trainer)
    trainer.is_deepspeed_enabled = False
    plugin = SimpleNamespace(fsdp_version=1)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(RecipeError, match="FSDP 1 is not supported.* Set fsdp_version: 2"):
        check_sharding(trainer)
    plugin.fsdp_version, trainer.args.mixed_precision = 2, "fp16"
    with pytest.raises(RecipeError, match="FSDP with float16 is not supported"):
        check_sharding(trainer)
    plugin.state_dict_type, trainer.args.mixed_precision = "FULL_STATE_DICT", "no"
    for optimizer in ("adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix", "rmsprop_bnb"):
        trainer.args.optim = optimizer
        with pytest.raises(RecipeError, match=f"optim {optimizer} is not supported with FSDP"):
            check_sharding(trainer)


def test_an_overflow_in_one_process_repeats_the_step_in_both(found):
    for rank in found[0]:
        assert rank["overflow"] == {"equal": True, "halvings": 3, "micro_batches": [8, 8 + 3 * 2]}


def test_what_is_done_once(found):
    both, _ = found
    assert [rank["once"]["value"] for rank in both] == [{"rows": [1, 2, 3], "from": 0}] * 2
    assert [rank["once"]["calls"] for rank in both] == [[0], []]
    assert [rank["once"]["raised"] for rank in both] == [
        ["DataError", "rows.jsonl, line 3: broken.", "Mend it.", 2]
    ] * 2


def test_what_several_processes_cannot_do_is_refused(found):
    for rank in found[0]:
        assert "average_tokens_across_devices: false is not supported" in rank["n_per_process"]


def flags(base, rows, out, *more):
    return [
        "train", f"--model_name_or_path={base}", f"--dataset_name={rows}", f"--output_dir={out}", "--max_length=32",
        "--lora_r=4", "--learning_rate=1e-3", "--adam_epsilon=1e-4", "--warmup_steps=0", "--reference_steps=2",
        "--num_iterations=2", "--per_device_train_batch_size=2", "--max_steps=6", "--logging_steps=1", "--save_steps=3",
        "--save_total_limit=5", "--gradient_checkpointing=false", "--use_cpu=true", *more,
    ]  # fmt: skip


def test_the_command_line_in_two_processes(base, rows, found, tmp_path, capsys):
    """It speaks once, writes once, equals one process with twice the accumulation, and accelerate gives torchrun's.

    accelerate by its configuration in docs/, which starts two processes where there is no GPU too.
    """
    two, one, by_torchrun = tmp_path / "two", tmp_path / "one", found[1] / "cli"
    config = HERE.parent / "docs" / "accelerate" / "ddp.yaml"
    accelerate = ["accelerate.commands.launch", f"--config_file={config}", "--main_process_port=0", "-m", "qpsft"]
    train = ["train", *SIX_STEPS, f"--model_name_or_path={base}", f"--dataset_name={rows}"]
    code, stdout, stderr = launch(*accelerate, *train, f"--output_dir={two}")
    assert code == 0, stderr[-3000:]
    assert cli.main([*train, "--gradient_accumulation_steps=2", f"--output_dir={one}"]) == 0
    alone = capsys.readouterr().out
    for said in ("data: ", "base: ", "trained 6 steps", "next:", "--keep"):
        assert stdout.count(said) == alone.count(said) == 1, said
    assert stderr.count("warning: With num_iterations = 2") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    assert largest_difference(*adapters) < 1e-5
    lines = [[line for line in read_metrics(folder / "metrics.jsonl") if "nll" in line] for folder in (one, two)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(*lines, strict=True):
        for key in ("loss", "nll", "approx_kl", "grad_norm", "num_tokens"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    launched = [(folder / "adapter_model.safetensors").read_bytes() for folder in (two, by_torchrun)]
    assert launched[0] == launched[1]  # one process with these flags takes half the rows


FAILING = """
import os, sys
from qpsft.model import base
from qpsft import cli, errors
if os.environ["RANK"] == "1":
    def load_base(*arguments, **options):
        raise errors.BaseModelError("The disk of this process cannot be read.", "Look at it.")
    from qpsft.train import run
    run.load_base = load_base
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both_and_is_shown_once(base, rows, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    started = time.monotonic()
    code, _, stderr = torchrun(script, *flags(base, rows, tmp_path / "out"))
    assert code != 0 and time.monotonic() - started < 120  # process 0 was waiting for process 1
    assert stderr.count("process 1: error: The disk of this process cannot be read. Look at it.") == 1
    assert re.search(r"rank +: 1 .*\n *exitcode +: 2 ", stderr)


def test_a_mistake_that_both_meet_is_shown_once():
    code, stdout, stderr = torchrun("-m", "qpsft", "train", "nowhere.yaml")
    assert code != 0 and not stdout and stderr.count("There is no recipe nowhere.yaml") == 1, stderr[-3000:]
    assert "process 1: error" not in stderr


def test_who_prints_an_error(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    processes.print_error("error: x")
    assert capsys.readouterr().err == "error: x\n" and not slept
    monkeypatch.setenv("RANK", "1")
    processes.print_error("error: x")
    assert capsys.readouterr().err == "process 1: error: x\n" and slept == [processes.GRACE]


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.from_main(lambda: 3) == 3 and processes.is_main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not processes.is_main()
    assert processes.from_main(lambda: 3) == 3  # set for something else: there is no process group


def test_other_verbs_refuse_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["merge", "somewhere"]) == 2
    assert "qpsft merge works in one process, not in 2. Leave out torchrun." in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp_qlora", "FSDP")])
def test_accelerate_reads_the_configurations_in_docs(name, kind):
    """It raises on keys it does not know; what fsdp_qlora says is what the sharded run above ran with."""
    found = load_config_from_file(str(HERE.parent / "docs" / "accelerate" / f"{name}.yaml"))
    assert (found.distributed_type, found.num_processes, found.mixed_precision) == (kind, 2, "no")
    assert f"docs/accelerate/{name}.yaml" in (HERE.parent / "docs" / "several-gpus.md").read_text(encoding="utf-8")
