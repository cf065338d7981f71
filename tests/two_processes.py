"""What test_processes.py runs in two processes: `torchrun --nproc_per_node 2 two_processes.py BASE OUT`.

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
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from small_runs import make_rows, make_trainer, policy, same
from test_loss_scaling import Overflowing, in_float16
from test_resume import contents

from qpsft import processes
from qpsft.errors import DataError, QpsftError

SETTINGS = dict(
    rows=make_rows(50),
    reference_steps=4,
    num_iterations=2,
    learning_rate=1e-3,
    adam_epsilon=1e-4,
    gradient_accumulation_steps=2,
    max_steps=10,
)
SAVING = dict(save_strategy="steps", save_steps=1, save_total_limit=None)
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
        "says": [processes.first_to_say("the same"), processes.first_to_say(f"of process {RANK}")],
    }


if __name__ == "__main__":
    BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
    RANK = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found = {
        "run": a_run_and_its_resumption(),  # first: it starts the process group
        "overflow": an_overflow_in_one_process(),
        "once": what_is_done_once(),
        "last_visit": refusal(reference="last_visit", num_iterations=1),
        "n_per_process": refusal(average_tokens_across_devices=False),
    }
    (OUT / f"found_{RANK}.json").write_text(json.dumps(found))
