"""The guard: an old skill is measured while a new one is learned, and the run ends before too much of it is gone.

    before the first step      the base's score on the guard's rows
    every `every` steps        the policy's; inside the limit, its weights are kept
    beyond the limit           stop | lower_lr: back to the kept weights, at half the rate | warn
    at the end                 the weights that are written are the last ones inside the limit

Training goes on to the bit as without the guard until it acts. What it knows is in every checkpoint, so a resumed run
decides alike.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from qpsft.errors import RecipeError, TrainingError
from qpsft.model.adapter import adapter_off
from qpsft.processes import from_main, is_main
from qpsft.psft.checkpoint import CheckpointedCallback
from qpsft.psft.reference import ReferencePolicy
from qpsft.psft.schedule import planned_steps
from qpsft.psft.sharding import fsdp_is_asked
from qpsft.psft.trainer import PSFTTrainer
from qpsft.terminal import wrap
from qpsft.train.guard_set import GuardSet, check_resumed

STATE, KEPT, OPTIMIZER = "guard.json", "guard_kept.safetensors", "guard_optimizer.pt"
MOST_HALVINGS = 4
"""After a sixteenth of the rate, the rate is not what loses the skill."""
TIME_SHARE = 0.1
"""Of the training time: a guard that takes more is said to be dear."""


@dataclass
class GuardState:
    """What the guard knows between two steps; JSON in checkpoints.

    Attributes:
        base: the base's score.
        checks: (step, score) of every measurement of the policy.
        kept: (step, score) of the last one inside the limit, whose weights are kept.
        halvings: steps at which the run went back to them, at half the rate.
        ended_outside: the last check was beyond the limit, and the run ended there.
    """

    base: float | None = None
    checks: list[tuple[int, float]] = field(default_factory=list)
    kept: tuple[int, float] | None = None
    halvings: list[int] = field(default_factory=list)
    ended_outside: bool = False


class Guard(CheckpointedCallback):
    """Measures an old skill in a run of `PSFTTrainer`, and acts when too much of it is lost.

    Args:
        guard_set: its rows, and its options.
        tokenizer: the model's.
        trained_before: the run goes on from an adapter, which may differ from the base already.

    Attributes:
        state: what has been measured and done.
    """

    def __init__(self, guard_set: GuardSet, tokenizer: Any, *, trained_before: bool = False):
        self.set, self.options = guard_set, guard_set.options
        self.state = GuardState()
        self._tokenizer, self._trained_before = tokenizer, trained_before
        self._kept: ReferencePolicy | None = None
        self._optimizer: bytes | None = None  # of the kept weights; what torch.save writes
        self._began = self._spent = 0.0
        self._first_step = 0
        self._time_is_checked = False

    # ---- before training ----

    def watch(self, trainer: PSFTTrainer, *, resumed: bool) -> None:
        """Joins a trainer and, unless the run is resumed, measures the base.

        Raises:
            RecipeError: options that cannot work with the trainer's. DataError: rows that guard nothing.
        """
        self._trainer = trainer
        self._check_options()
        trainer.add_callback(self)
        if not resumed:
            self._measure_base()

    def _check_options(self) -> None:
        args, options = self._trainer.args, self.options
        if fsdp_is_asked(args):
            raise RecipeError("guard is not supported with FSDP: answers are generated in one process.", "Use DDP.")
        steps = planned_steps(args, self._trainer.train_dataset, self._trainer.rows_per_step())
        if options.every > steps:
            raise RecipeError(
                f"guard: every is {options.every}, and the run has {steps} optimizer steps.",
                f"Lower it, to {max(1, steps // 10)} for ten checks.",
            )
        chosen = "load_best_model_at_end" if args.load_best_model_at_end else ""
        chosen = "save_strategy: best" if str(getattr(args.save_strategy, "value", "")) == "best" else chosen
        if chosen and options.action != "warn":
            raise RecipeError(
                f"{chosen} and a guard with action {options.action} both choose the adapter that is written.",
                "Leave one out, or set the guard's action to warn.",
            )

    def _measure_base(self) -> None:
        if self.options.metric == "kl":  # of the base from itself
            self.state.base = 0.0
            return
        with adapter_off(self._trainer.model):
            self.state.base = self._score(quietly=False)
        self.set.check_base(self.state.base)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.state.base is None:  # resumed from a checkpoint without a guard
            self._measure_base()
        if self.state.kept is None:
            untouched = state.global_step == 0 and not self._trained_before
            score = self.state.base if untouched else self._score()
            self._note(state, control, score)
            if self._is_outside(score) and self.options.action != "warn":
                raise TrainingError(
                    f"guard: {self._fell(score)} already before this run's first step.",
                    "Raise max_drop, or begin with another adapter.",
                )
            self._keep(state.global_step, score)
        self._began, self._first_step = time.perf_counter(), state.global_step

    # ---- while training ----

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.options.every == 0 or state.global_step >= state.max_steps:
            self._check(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.state.ended_outside:  # save_strategy: epoch
            control.should_save = False

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.state.checks[-1][0] != state.global_step:  # stopped early by another callback
            self._check(state, control, can_go_on=False)

    def _check(self, state: TrainerState, control: TrainerControl, *, can_go_on: bool = True) -> None:
        """Measures the policy and does what its score asks for."""
        started = time.perf_counter()
        score = self._score()
        seconds = time.perf_counter() - started
        self._note(state, control, score)
        self._check_time(state, seconds, before=started)
        self._spent += time.perf_counter() - started
        can_go_on = can_go_on and state.global_step < state.max_steps
        if not self._is_outside(score):
            self._keep(state.global_step, score)
        elif self.options.action == "warn":
            self._say(f"guard: {self._fell(score)} at step {state.global_step}.")
        elif self.options.action == "lower_lr" and can_go_on and len(self.state.halvings) < MOST_HALVINGS:
            self._go_back(state.global_step, score)
        else:
            self.state.ended_outside = True
            control.should_training_stop = control.should_log = True
            control.should_save = False  # a checkpoint is a place to go on from

    def _score(self, *, quietly: bool = True) -> float:
        """The score of the model as it is; measured in process 0."""

        def measure() -> float:
            with warnings.catch_warnings():
                if quietly:  # said once, of the base
                    warnings.simplefilter("ignore")
                return self.set.score(self._trainer.model, self._tokenizer)

        with self._trainer.measuring(), self._trainer.accelerator.autocast():
            return from_main(measure)

    def _note(self, state: TrainerState, control: TrainerControl, score: float) -> None:
        """Keeps a score, logs it and prints it."""
        base, limit = self.state.base, self.set.limit(self.state.base)
        self.state.checks.append((state.global_step, score))
        should_log = control.should_log
        with self._trainer.measuring():
            self._trainer.model.eval()  # a line of training's numbers would begin anew
            self._trainer.log({f"guard_{self.options.metric}": score, "guard_limit": limit})
        control.should_log = should_log
        self._say(
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  guard: {self.options.metric} "
            f"{score:.3f}  base {base:.3f}  limit {limit:.3f}"
        )

    def _keep(self, step: int, score: float) -> None:
        self.state.kept = (step, score)
        if self.options.action == "warn":
            return
        if self._kept is None:
            self._kept = ReferencePolicy(self._trainer.model)
        self._kept.snapshot()
        if self.options.action == "lower_lr":
            buffer = io.BytesIO()
            torch.save(self._trainer.optimizer.state_dict(), buffer)
            self._optimizer = buffer.getvalue()

    def _go_back(self, step: int, score: float) -> None:
        """The kept weights with their optimizer state, and half the learning rate from here on."""
        self._kept.restore()
        optimizer, scheduler = self._trainer.optimizer, self._trainer.lr_scheduler
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(torch.load(io.BytesIO(self._optimizer), map_location="cpu", weights_only=True))
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        firsts = getattr(scheduler, "base_lrs", rates)
        for group, rate, first in zip(optimizer.param_groups, rates, firsts, strict=True):
            group |= {"lr": rate / 2, "initial_lr": first}
        self._trainer.old_logprobs.renew()
        self.state.halvings.append(step)
        self._say(
            f"guard: {self._fell(score)} at step {step}. Going on from the adapter of step {self.state.kept[0]}, at "
            f"half the learning rate ({rates[0] / 2:.3g})."
        )

    def _check_time(self, state: TrainerState, seconds: float, before: float) -> None:
        """Once: warns of a guard that takes more than a tenth of the training time, and says what would do."""
        done = state.global_step - self._first_step
        if self._time_is_checked or not done or not is_main():
            return
        self._time_is_checked = True
        training = (before - self._began - self._spent) / done * state.max_steps
        share = seconds * -(-state.max_steps // self.options.every) / training
        if share <= TIME_SHARE:
            return
        rows, fitting = len(self.set.rows.rows), int(len(self.set.rows.rows) * TIME_SHARE / share)
        enough = fitting >= 1 / self.options.max_drop if self.options.metric == "accuracy" else fitting >= 1
        few = f"limit: {fitting} of its {rows} rows, or " if enough else ""
        every = -int(-self.options.every * share // TIME_SHARE)
        warnings.warn(
            f"guard: its checks take {share:.0%} as long as the training itself, {seconds:.2g} s each. With "
            f"{few}every: {every}, it would be a tenth.",
            stacklevel=2,
        )

    # ---- after training ----

    def finish(self) -> None:
        """Puts the kept weights back into the model if the run ended beyond the limit.

        Raises:
            TrainingError: the kept weights are those that the run began with.
        """
        if not self.state.ended_outside:
            return
        step, score = self.state.checks[-1]
        if self.state.kept[0] == 0:
            untrained = "the adapter that the run began with" if self._trained_before else "the untrained one"
            raise TrainingError(
                f"guard: {self._fell(score)} by step {step}, and no earlier adapter inside the limit is there but "
                f"{untrained}. Nothing was written.",
                f"Lower learning_rate, measure more often (every is {self.options.every}), or raise max_drop.",
            )
        self._kept.restore()

    @property
    def written_step(self) -> int | None:
        """The step of the kept weights, where `finish` puts them back; None where the run's last ones are written."""
        return self.state.kept[0] if self.state.ended_outside else None

    def summary(self) -> list[str]:
        """What happened, and what to do next: sentences for the run's summary and the model card."""
        base, (step, score) = self.state.base, self.state.checks[-1]
        lines = [
            f"guard: at step {at} back to the adapter of an earlier check, at half the learning rate"
            for at in self.state.halvings
        ]
        if self.state.ended_outside:
            kept_step, kept = self.state.kept
            return [
                *lines,
                f"guard: stopped at step {step}: {self._fell(score)}; written: the adapter of step {kept_step} "
                f"({kept:.3f})",
                "guard: to learn more and keep it, lower learning_rate, set replay_share or base_kl, or raise max_drop",
            ]
        outside = [at for at, value in self.state.checks if self._is_outside(value)]
        if self.options.action == "warn" and outside:
            lines.append(f"guard: beyond the limit at {len(outside)} of {len(self.state.checks)} checks")
        where = "beyond" if self._is_outside(score) else "inside"
        limit = self.set.limit(base)
        numbers = f"{base:.3f} (base) to {score:.3f} (step {step}), {where} the limit of {limit:.3f}"
        return [*lines, f"guard: {self.options.metric} on {self.options.data} went from {numbers}"]

    def _is_outside(self, score: float) -> bool:
        return self.set.is_outside(self.state.base, score)

    def _fell(self, score: float) -> str:
        moved = "fell" if self.options.metric == "accuracy" else "rose"
        return (
            f"{self.options.metric} on {self.options.data} {moved} from {self.state.base:.3f} to {score:.3f}, "
            f"more than {self.options.max_drop:g}"
        )

    def _say(self, line: str) -> None:
        if is_main():
            tqdm.write(wrap(line))

    # ---- checkpoints ----

    def save_to(self, folder: Path) -> None:
        record = {"set": self.set.identity(), "state": vars(self.state)}
        (folder / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if self._kept is not None:
            kept = {name: tensor.contiguous().cpu() for name, tensor in self._kept.state_dict().items()}
            save_file(kept, folder / KEPT)
        if self._optimizer is not None:
            (folder / OPTIMIZER).write_bytes(self._optimizer)

    def load_from(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            return
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        check_resumed(record["set"], self.set.identity(), str(folder))
        state = GuardState(**record["state"])
        state.checks, state.kept = [tuple(check) for check in state.checks], tuple(state.kept)
        wanted = {"warn": [], "stop": [KEPT], "lower_lr": [KEPT, OPTIMIZER]}[self.options.action]
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise TrainingError(
                f"{folder} has no {missing[0]}: it was made with another action of the guard.",
                "Resume with the action that the run began with.",
            )
        self.state = state
        if KEPT in wanted:
            self._kept = ReferencePolicy(self._trainer.model)
            self._kept.load_state_dict(load_file(folder / KEPT))
        if OPTIMIZER in wanted:
            self._optimizer = (folder / OPTIMIZER).read_bytes()
