"""What is printed while a run trains, and the log lines that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from qpsft.errors import OutputError, boundary
from qpsft.files import write_atomically
from qpsft.recipe.flags import conforms
from qpsft.terminal import short_number


class ConsoleCallback(TrainerCallback):
    """A progress bar on a terminal, and one short line per log entry."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # disable=None: no bar where nobody watches, so that logs stay readable
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None, leave=False)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs: Any) -> None:
        if self._bar is None or not logs:
            return
        if "nll" in logs:
            tqdm.write(log_line(state.global_step, state.max_steps, logs))
        elif "eval_loss" in logs:
            tqdm.write(evaluation_line(state.global_step, state.max_steps, logs))

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def log_line(step: int, total: int, logs: dict[str, float]) -> str:
    """One log entry in at most 80 columns."""
    kl = logs["approx_kl"]
    return (
        f"step {step:>{len(str(total))}}/{total}  nll {logs['nll']:.3f}  entropy {logs['entropy']:.2f}  "
        f"clip {logs['clip_fraction']:4.0%}  kl {f'{kl:.2g}' if kl < 100 else short_number(kl)}  "
        f"{short_number(logs['tokens_per_second'])} tok/s"
    )


def evaluation_line(step: int, total: int, logs: dict[str, float]) -> str:
    """One evaluation in at most 80 columns."""
    return (
        f"step {step:>{len(str(total))}}/{total}  evaluation: nll {logs['eval_loss']:.3f}  "
        f"entropy {logs['eval_entropy']:.2f}  accuracy {logs['eval_mean_token_accuracy']:.1%}"
    )


class MetricsCallback(TrainerCallback):
    """Appends every log entry to `metrics.jsonl`; a resumed run drops the lines past its checkpoint first."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # also a run shorter than logging_steps ends with its numbers
            control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        if control.should_training_stop:  # so does one that an evaluation has stopped
            control.should_log = True

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            except OSError as error:
                raise OutputError(
                    f"{self.path} cannot be written: {error.strerror or error}.",
                    "Free some space, then give --resume to go on from the last checkpoint.",
                ) from error


def read_metrics(path: Path) -> list[dict]:
    """The entries of a `metrics.jsonl`; a last line that is not complete is left out.

    Raises:
        OutputError: another line is none of a run's log, or the file cannot be read; names the line.
    """
    if not path.is_file():
        return []
    todo = "Restore the file, or remove it: the adapter does not need it."
    with boundary(f"{path} cannot be read", OutputError, todo):
        *lines, unfinished = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate([*lines, unfinished] if unfinished.endswith(b"}") else lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not conforms(entry.get("step"), int):
            raise OutputError(f"{path}, line {number} is no entry of a run's log.", todo)
        entries.append(entry)
    return entries
