"""What test_processes.py runs in two processes: `torchrun --nproc_per_node 2 two_processes.py BASE OUT ROWS`.

Each process writes what it found to OUT/found_RANK.json; process 0 also what it trained.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import save_file
from small_runs import log_lines, make_lora, make_rows, make_trainer, policy, same
from test_loss_scaling import Overflowing, in_float16
from test_resume import contents
from torch.distributed.fsdp import FSDPModule
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpsft import cli, processes
from qpsft.errors import DataError, QpsftError
from qpsft.model import base
from qpsft.psft import sharding
from qpsft.psft.config import PSFTConfig

SETTINGS = dict(
    rows=make_rows(50),
    reference_steps=4,
    num_iterations=2,
    learning_rate=1e-3,
    adam_epsilon=1e-4,
    gradient_accumulation_steps=2,
    max_steps=10,
)
PACKED = {**SETTINGS, "packing": True, "max_length": 48, "reference_steps": 2, "max_steps": 4}
EARLY_ENDS = {**SETTINGS, "target_kl": 2e-5, "target_clip_fraction": 0.2, "epsilon": 0.01}
ANCHORED = {**SETTINGS, "base_kl": 0.5, "max_steps": 6}
STM = {**SETTINGS, "loss_type": "stm", "stm_threshold": 200.0, "max_steps": 6}
SAVING = dict(save_strategy="steps", save_steps=2, save_total_limit=None)
FLAGS = [
    "--max_length=32", "--lora_r=4", "--learning_rate=1e-3", "--adam_epsilon=1e-4", "--warmup_steps=0",
    "--reference_steps=2", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--max_steps=3",
    "--logging_steps=1", "--save_strategy=no", "--use_cpu=true",
]  # fmt: skip
SIX_STEPS = [*FLAGS, "--num_iterations=2", "--max_steps=6"]
STOP = 6  # in the second visit: its old log-probabilities are those each process kept


def refusal(**settings) -> str:
    try:
        make_trainer(BASE, OUT / "refused", **{**SETTINGS, **settings})
    except QpsftError as error:
        return str(error)
    return ""


def a_run_and_its_resumption() -> dict:
    trainer = make_trainer(BASE, OUT / "whole", **SETTINGS, **SAVING)
    trainer.train()
    ddp = trainer.model_wrapped
    if processes.is_main():
        save_file(policy(trainer.model), OUT / "policy.safetensors")
        shutil.copytree(OUT / "whole" / f"checkpoint-{STOP}", OUT / "cut" / f"checkpoint-{STOP}")
    dist.barrier()
    resumed = make_trainer(BASE, OUT / "cut", **SETTINGS, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    whole, cut = (contents(OUT / name / "checkpoint-10") for name in ("whole", "cut"))
    return {
        "wrapped": type(ddp).__name__,
        "find_unused_parameters": ddp.find_unused_parameters,
        "reference_shares_names": set(trainer.reference.state_dict()) == set(policy(trainer.model)),
        "tokens": trainer._statistics.num_tokens,
        "files": sorted(path.name for path in (OUT / "whole" / "checkpoint-10").iterdir()),
        "resumed_from": resumed._initial_global_step,
        "resumed_differs_in": [name for name in whole | cut if not same(whole.get(name), cut.get(name))],
    }


def the_command_line_resumed() -> bool:
    """Whether `--resume` from the middle of a block gives the bytes of the run that was never stopped."""
    files = [f"--model_name_or_path={BASE}", f"--dataset_name={ROWS}", f"--output_dir={OUT / 'cli'}"]
    flags = ["train", *SIX_STEPS, *files, "--save_strategy=steps", "--save_steps=3"]
    adapter = OUT / "cli" / "adapter_model.safetensors"
    assert cli.main(flags) == 0
    whole = adapter.read_bytes()
    dist.barrier()
    if processes.is_main():
        shutil.rmtree(OUT / "cli" / "checkpoint-6")
        adapter.unlink()
    dist.barrier()
    return cli.main([*flags, "--resume"]) == 0 and adapter.read_bytes() == whole


def sharded() -> dict:
    """The same run with the base and the adapter sharded by FSDP 2, as docs/accelerate/fsdp_qlora.yaml has it.

    accelerate takes gloo on the CPU for no device of FSDP's; told that it is another, it does.
    """
    os.environ |= fsdp_environment()
    init = PSFTConfig.__post_init__

    def post_init(self):
        init(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PSFTConfig.__post_init__ = post_init
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    refused = {"checkpoints": refusal()}
    os.environ |= fsdp_environment()
    refused["optimizer"] = refusal(optim="adamw_8bit")
    storage = base.storage_dtype
    base.storage_dtype = lambda compute_dtype: torch.uint8
    model, _ = base.load_base(BASE, verbose=False, dtype="bfloat16")
    base.storage_dtype = storage
    refused["storage"] = refusal(model=model, lora=make_lora())

    trainer = make_trainer(BASE, OUT / "fsdp", **SETTINGS, **SAVING)
    trainer.train()
    policy = sharding.whole_policy(trainer.model)
    layers = trainer.model.get_base_model().model.layers
    if processes.is_main():
        save_file(policy, OUT / "sharded_policy.safetensors")
        shutil.copytree(OUT / "fsdp" / f"checkpoint-{STOP}", OUT / "fsdp_cut" / f"checkpoint-{STOP}")
    dist.barrier()
    resumed = make_trainer(BASE, OUT / "fsdp_cut", **SETTINGS, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    in_bfloat16 = make_trainer(BASE, OUT / "bfloat16", bf16=True, **{**SETTINGS, "max_steps": 2})
    in_bfloat16.train()
    flags = [*FLAGS, f"--model_name_or_path={BASE}", f"--dataset_name={ROWS}", f"--output_dir={OUT / 'fsdp_cli'}"]
    return {
        "refused": refused,
        "reference_in_host_memory": trainer.reference.in_host_memory,
        "packed": a_run("sharded_packed", **PACKED),
        "rows_that_mix": rows_that_mix(),
        "layers_sharded": [isinstance(layer, FSDPModule) for layer in layers],
        "kinds": sorted({type(p).__name__ for p in trainer.model.parameters()}),
        "grad_norms": [line["grad_norm"] for line in log_lines(trainer)],
        "resumed_equal": same(sharding.whole_policy(resumed.model), policy),
        "fsdp_casts_to": str(in_bfloat16.model._get_fsdp_state()._mp_policy.param_dtype),
        "swap": what_setting_data_does(trainer),
        "command_line": cli.main(["train", *flags]),
    }


def what_setting_data_does(trainer) -> dict:
    """Why the reference of a sharded model takes the policy's place by its values."""
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(RANK))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trainer.reference.snapshot()
    old = trainer.reference.score([batch])[0]
    with torch.no_grad():
        for parameter in trainer.reference._policy.values():
            parameter.to_local().mul_(2)
    changed = trainer.model(**batch, fused_lm_head=True).log_probs.detach()
    scored = trainer.reference.score([batch])[0]
    back = trainer.model(**batch, fused_lm_head=True).log_probs.detach()
    for name, parameter in trainer.reference._policy.items():
        parameter.data = trainer.reference._copy[name]
    data_set = trainer.model(**batch, fused_lm_head=True).log_probs.detach()
    return {
        "policy_moved": (changed - old).abs().max().item(),
        "scored_is_the_snapshot_s": torch.equal(scored, old),
        "policy_is_back": torch.equal(back, changed),
        "setting_data_changed_nothing": torch.equal(data_set, changed),
    }


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file docs/accelerate/fsdp_qlora.yaml` puts into the environment about FSDP."""
    config = Path(__file__).resolve().parents[1] / "docs" / "accelerate" / "fsdp_qlora.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def a_run(name: str, **settings) -> str:
    trainer = make_trainer(BASE, OUT / name, **settings)
    trainer.train()
    trained = sharding.whole_policy(trainer.model) or policy(trainer.model)
    if processes.is_main():
        save_file(trained, OUT / f"{name}.safetensors")
    return type(trainer.model_wrapped).__name__


def rows_that_mix() -> str:
    """What is said of packed rows that see each other, before the first step."""
    trainer = make_trainer(BASE, OUT / "mixed", **PACKED)
    trainer.data_collator = DataCollatorForLanguageModeling(0)  # no position ids, so no blocks
    try:
        trainer.train()
    except QpsftError as error:
        return str(error)
    return ""


def an_overflow_in_one_process() -> dict:
    """Process 1's gradients overflow: both processes must repeat the step, or they drift apart or hang."""
    trained = []
    for overflows in ({}, {0: 1, 3: 2}):
        torch.manual_seed(0)
        trainer = make_trainer(BASE, OUT / "f16", trainer_class=Overflowing, **{**SETTINGS, "max_steps": 4})
        trainer.overflows = overflows if RANK == 1 else {}
        in_float16(trainer, autocast=False)
        trainer.train()
        trained.append((policy(trainer.model), trainer.accelerator.scaler.get_scale(), len(trainer.seen)))
        AcceleratorState._shared_state["_mixed_precision"] = "no"
    (smooth, scale, micro_batches), (rough, scale_after, more_micro_batches) = trained
    return {
        "equal": same(smooth, rough) and all(math.isfinite(t.abs().max()) for t in rough.values()),
        "halvings": math.log2(scale / scale_after),
        "micro_batches": [micro_batches, more_micro_batches],
    }


def what_is_done_once() -> dict:
    calls = []

    def make():
        calls.append(RANK)
        return {"rows": [1, 2, 3], "from": RANK}

    def fail():
        raise DataError("rows.jsonl, line 3: broken.", "Mend it.")

    try:
        processes.from_main(fail)
    except QpsftError as error:
        raised = [type(error).__name__, error.what, error.todo, error.exit_code]
    return {
        "value": processes.from_main(make),
        "calls": calls,
        "raised": raised,
    }


if __name__ == "__main__":
    BASE, OUT, ROWS = map(Path, sys.argv[1:])
    RANK = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found = {
        "run": a_run_and_its_resumption(),  # first: it starts the process group
        "packed": a_run("packed", **PACKED),
        "early_ends": a_run("early_ends", **EARLY_ENDS),
        "anchored": a_run("anchored", **ANCHORED),
        "stm": a_run("stm", **STM),
        "overflow": an_overflow_in_one_process(),
        "once": what_is_done_once(),
        "n_per_process": refusal(average_tokens_across_devices=False),
        "command_line_resumed": the_command_line_resumed(),
        "sharded": sharded(),  # last: it changes the environment
    }
    (OUT / f"found_{RANK}.json").write_text(json.dumps(found))
