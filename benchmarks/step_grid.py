"""The step-cost grid: every arm of `step_goals.ARMS` on one base of a real shape, by micro-batch and length.

A cell is measured in two passes. Alone: each arm of PEAK_ARMS trains three steps by itself, for its peak memory (beside
the others it would be theirs too), and the noise of the ratio is read. In turns: all arms share one base
(`real_shapes.sharing_base`: frozen, never written) with an adapter, an optimizer and a reference each, and take turns
after every optimizer step.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import Budget, Results, clean_up, memory_meter
from peft import LoraConfig
from real_shapes import held_tensors, plain_tokenizer, random_rows, sharing_base
from step_goals import Arm, goals, scoring_share, step_seconds
from transformers import PreTrainedModel, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer
from turns import StepClock, Turns, clock_of, train_in_turns

from qpsft import PSFTConfig, PSFTTrainer
from qpsft.psft.forward import policy_forward

PEAK_ARMS = ("trl", "nll", "psft K=8")
PEAK_STEPS = 3  # snapshot, scored, snapshot: K = 2 there, since memory does not depend on K


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid trains on.

    Attributes:
        micro_batch: rows of a micro-batch; length: tokens of every row.
        rows: rows of an optimizer step; accumulation is rows / micro_batch.
        attention: the base's attn_implementation; None: transformers' choice.
        steps, warmup: optimizer steps that count, and those before them.
    """

    shape: str
    micro_batch: int
    length: int
    rows: int = 8
    rank: int = 16
    checkpointing: bool = True
    optim: str = "adamw_torch_fused"
    attention: str | None = None
    steps: int = 8
    warmup: int = 2

    @property
    def key(self) -> str:
        options = "" if self.checkpointing else " no-checkpointing"
        options += "" if self.optim == "adamw_torch_fused" else f" {self.optim}"
        options += "" if self.attention is None else f" {self.attention}"
        return f"{self.shape} {self.micro_batch}x{self.length} rows={self.rows} r={self.rank}{options}"

    @property
    def accumulation(self) -> int:
        return max(1, self.rows // self.micro_batch)

    @property
    def tokens_per_step(self) -> int:
        return self.accumulation * self.micro_batch * self.length

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_config(name: str, arm: Arm, cell: Cell, dtype: torch.dtype, out: str, max_steps: int) -> SFTConfig:
    shared: dict[str, Any] = dict(
        per_device_train_batch_size=cell.micro_batch,
        gradient_accumulation_steps=cell.accumulation,
        gradient_checkpointing=cell.checkpointing,
        optim=cell.optim,
        train_sampling_strategy="sequential",
        max_steps=max_steps,
        max_length=cell.length,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    folder = str(Path(out) / name.replace(" ", "-"))
    if arm.trainer == "trl":
        return SFTConfig(folder, **shared)
    if arm.is_psft:
        shared |= dict(reference_steps=arm.reference_steps, num_iterations=arm.num_iterations)
    return PSFTConfig(folder, loss_type=arm.trainer, **shared)


def make_trainer(base: PreTrainedModel, config: SFTConfig, rank: int, rows: Any, callbacks: list) -> Trainer:
    trainer_class = PSFTTrainer if isinstance(config, PSFTConfig) else SFTTrainer
    trainer = trainer_class(
        sharing_base(base),
        args=config,
        train_dataset=rows,
        processing_class=plain_tokenizer(base.config.vocab_size),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- alone: peak memory, and the noise of the ratio ----


def peak_memory(
    base: PreTrainedModel, cell: Cell, arms: dict[str, Arm], device: str
) -> tuple[dict[str, int | None], dict]:
    """Peak bytes of each arm training by itself, base model included, and `ratio_noise` of PSFT.

    None for an arm that runs out of memory.
    """
    peaks, noise = {}, {}
    rows = random_rows(PEAK_STEPS * cell.accumulation * cell.micro_batch, cell.length, base.config.vocab_size)
    for name, arm in arms.items():
        arm = replace(arm, reference_steps=2, num_iterations=1)
        try:
            peaks[name], found = _alone(base, cell, name, arm, rows, device, noise=not noise)
            noise = noise or found
        except torch.OutOfMemoryError:
            peaks[name] = None
        clean_up(device)
    return peaks, noise


def _alone(
    base: PreTrainedModel, cell: Cell, name: str, arm: Arm, rows: Any, device: str, *, noise: bool
) -> tuple[int, dict]:
    """One arm's peak, and with `noise` the ratio's. Its trainer is gone after."""
    with tempfile.TemporaryDirectory() as out:
        config = make_config(name, arm, cell, base.dtype, out, PEAK_STEPS)
        with memory_meter(device, held_tensors(base)) as meter:
            trainer = make_trainer(base, config, cell.rank, rows, [])
            trainer.train()
            peak = meter.peak
        return peak, ratio_noise(trainer) if noise and arm.is_psft else {}


def ratio_noise(trainer: PSFTTrainer) -> dict[str, float]:
    """|r - 1| right after a snapshot, between the scoring pass (batched larger) and the training forward.

    Both compute the same numbers; what is left is the rounding of their kernels, and no trust region can be finer.
    """
    size, device = trainer.args.train_batch_size, trainer.args.device
    rows = [trainer.train_dataset[i] for i in range(size * trainer.args.gradient_accumulation_steps)]
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    trainer.model.train()
    trainer.reference.snapshot()
    distances = []
    for batch, old in zip(batches, trainer.old_logprobs.score(batches, 0), strict=True):
        with trainer.compute_loss_context_manager():
            outputs = policy_forward(trainer.model, batch, right_padded=True)
        distances.append(((outputs.log_probs.detach().float() - old).exp() - 1).abs()[outputs.label_mask])
    distance = torch.cat(distances)
    above = distance.topk(distance.numel() // 1000 + 1).values
    return {"max": float(above[0]), "p999": float(above[-1]), "tokens": distance.numel()}


# ---- in turns: time ----


def measure_times(
    base: PreTrainedModel, cell: Cell, arms: dict[str, Arm], device: str, kind: str = "wall"
) -> dict[str, Any]:
    """Seconds (of a `kind` of clock) and tokens per second of every arm, over whole blocks, and their steps."""
    total = cell.warmup + cell.steps
    rows = random_rows(total * cell.accumulation * cell.micro_batch, cell.length, base.config.vocab_size)
    turns, clock = Turns(list(arms)), clock_of(device, kind)
    with tempfile.TemporaryDirectory() as out:
        configs = {  # all before the first trainer: making one resets accelerate's state
            name: make_config(name, arm, cell, base.dtype, out, total) for name, arm in arms.items()
        }
        clocks = {name: StepClock(name, turns, clock) for name in arms}
        trainers = {}
        for name in arms:
            trainers[name] = make_trainer(base, configs[name], cell.rank, rows, [clocks[name]])
            clocks[name].watch(trainers[name])
        train_in_turns(trainers, turns, torch.get_num_threads())
    measured = {}
    for name, arm in arms.items():
        steps = clocks[name].steps[cell.warmup :]
        seconds = step_seconds(arm, steps)
        measured[name] = {
            **arm.to_dict(),
            "step_seconds": seconds,
            "tokens_per_second": cell.tokens_per_step / seconds,
            "scoring_share": scoring_share(arm, steps),
            "steps": [step.to_dict() for step in steps],
        }
    return measured


def measure_cell(base: PreTrainedModel, cell: Cell, arms: dict[str, Arm], device: str) -> dict[str, Any]:
    """One cell of the grid, as it is kept.

    `out_of_memory` is True where it does not fit, and names the arms that do not where others do: those take no turns.
    """
    start = time.perf_counter()
    try:
        alone = {name: arm for name, arm in arms.items() if name in PEAK_ARMS}
        peaks, noise = peak_memory(base, cell, alone, device)
        short = [name for name, peak in peaks.items() if peak is None]
        arms = {name: arm for name, arm in arms.items() if name not in short}
        if not arms:
            return {**cell.to_dict(), "out_of_memory": True, "cell_seconds": time.perf_counter() - start}
        peaks = {name: peak for name, peak in peaks.items() if peak is not None}
        measured = measure_times(base, cell, arms, device)
    except torch.OutOfMemoryError:
        return {**cell.to_dict(), "out_of_memory": True, "cell_seconds": time.perf_counter() - start}
    finally:
        clean_up(device)
    seconds = {name: numbers["step_seconds"] for name, numbers in measured.items()}
    held = goals(seconds, peaks, micro_batch=cell.micro_batch, checkpointing=cell.checkpointing)
    return {
        **cell.to_dict(),
        "tokens_per_step": cell.tokens_per_step,
        "arms": measured,
        "peak_bytes": peaks,
        "ratio_noise": noise,
        **({"out_of_memory": short} if short else {}),
        "goals": [goal.to_dict() for goal in held],
        "cell_seconds": time.perf_counter() - start,
    }


def run_grid(
    base: PreTrainedModel,
    cells: list[Cell],
    arms: dict[str, Arm],
    results: Results,
    budget: Budget,
    device: str,
    first_seconds: float = 0.0,
) -> bool:
    """Measures the cells that `results` does not have yet, as far as the budget goes. True when none is left.

    `first_seconds` is what a cell is thought to take while none has been measured.
    """
    seconds_per_token = max((_seconds_per_token(cell) for cell in results.cells.values()), default=0.0)
    for cell in cells:
        if cell.key in results.cells:
            known = results.cells[cell.key]
            print(f"{cell.key}: kept from {results.content['runs'][known['run']]['date']}")
            continue
        expected = seconds_per_token * cell.tokens_per_step * (cell.steps + cell.warmup) or first_seconds
        if not budget.allows(1.2 * expected):
            print(f"{cell.key}: about {expected:.0f} s, {max(0.0, budget.left):.0f} s are left; run the command again")
            return False
        measured = measure_cell(base, cell, arms, device)
        results.add(cell.key, measured)
        print(report(cell, measured), flush=True)
        seconds_per_token = max(seconds_per_token, _seconds_per_token(measured))
    return True


def _seconds_per_token(measured: dict[str, Any]) -> float:
    """What a cell took, by tokens of one arm."""
    tokens = measured["rows"] * measured["length"] * (measured["steps"] + measured["warmup"])
    return measured["cell_seconds"] / tokens


def report(cell: Cell, measured: dict[str, Any]) -> str:
    """The cell's table and goals, within 80 columns."""
    short = measured.get("out_of_memory", [])
    if short is True:
        return f"{cell.key}: out of memory"
    lines = [cell.key, f"  {'':<16}{'ms/step':>10}{'tokens/s':>11}{'x nll':>8}{'scoring':>9}{'peak GiB':>10}"]
    nll = measured["arms"].get("nll", {}).get("step_seconds", math.nan)
    for name, numbers in measured["arms"].items():
        peak = measured["peak_bytes"].get(name)
        lines.append(
            f"  {name:<16}{numbers['step_seconds'] * 1000:>10.1f}{numbers['tokens_per_second']:>11,.0f}"
            f"{numbers['step_seconds'] / nll:>8.3f}{numbers['scoring_share']:>9.1%}"
            + ("" if peak is None else f"{peak / 2**30:>10.3f}")
        )
    lines += [f"  {name:<16}out of memory" for name in short]
    if measured["ratio_noise"]:
        noise = measured["ratio_noise"]
        lines.append(f"  |r - 1| at a snapshot: max {noise['max']:.1e}, 99.9 % below {noise['p999']:.1e}")
    seconds = {name: numbers["step_seconds"] for name, numbers in measured["arms"].items()}
    held = goals(seconds, measured["peak_bytes"], micro_batch=cell.micro_batch, checkpointing=cell.checkpointing)
    return "\n".join([*lines, *(goal.line() for goal in held)])
