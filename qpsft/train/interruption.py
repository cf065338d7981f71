"""Ctrl-C and its like while a run trains: the step is finished, a checkpoint is saved, and then the run ends."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qpsft.errors import Interrupted
from qpsft.processes import SIGNALS, is_main, taken_signals, world_size
from qpsft.psft.checkpoint import newest_complete_checkpoint
from qpsft.recipe.file import Recipe
from qpsft.train.outputs import holds_run


class SaveAtSignal(TrainerCallback):
    """In a `with` block around training: the first SIGINT, SIGTERM or SIGHUP has the next step's end saved.

    A second one ends the process at once. Where several processes train, they agree on the step; a launcher passes
    signals on, so there the second one is the launcher's to answer. A run's last step, or one after which it stops
    anyway, is followed by the run's end as without a signal.

    Raises:
        Interrupted: from training, after the checkpoint is whole.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_saving = False

    def __enter__(self) -> SaveAtSignal:
        self._taken = taken_signals(self._note)
        self._taken.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._taken.__exit__(*error)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            return
        self._signal = number
        if world_size() == 1:
            for one in SIGNALS:
                if signal.getsignal(one) == self._note:
                    signal.signal(one, signal.SIG_DFL)
        if is_main():
            print(
                "\nStopping: this step is finished and saved first. A second Ctrl-C ends at once.",
                file=sys.stderr,
                flush=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends_anyway = state.global_step >= state.max_steps or control.should_training_stop
        if self._agreed(args) and not ends_anyway:
            control.should_save = self._is_saving = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_saving:
            raise Interrupted(number=self._signal or signal.SIGINT)

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any process has had a signal."""
        if world_size() == 1 or not torch.distributed.is_initialized():
            return self._signal is not None
        any_signal = torch.tensor(int(self._signal is not None), device=args.device)
        torch.distributed.all_reduce(any_signal, torch.distributed.ReduceOp.MAX)
        return bool(any_signal)


def how_to_go_on(recipe: Recipe, output: Path, folder: Path, *, begun: bool) -> str:
    """What a run that was interrupted leaves, and the flag that goes on from there.

    Args:
        output: where its results were to go.
        folder: its own, as of `qpsft.train.outputs.check_output`.
        begun: it had begun to train.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_complete_checkpoint(folder) if begun or recipe.run.resume else None
    if newest is not None:
        flags = "--resume in place of --overwrite" if recipe.run.overwrite else "--resume"
        return f"{newest} is saved: the same command with {flags} goes on from there."
    if begun and holds_run(output):
        return "No checkpoint had been saved: the same command with --overwrite begins anew."
    return "No checkpoint had been saved: the same command begins anew."
