"""Several trainers in one process that take turns after every optimizer step.

Other load on the machine, its clocks and its temperature then meet all of them alike, which comparing one whole run
after another does not give.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

Clock = Callable[[], float]


@dataclass(frozen=True)
class Step:
    """One optimizer step: everything between the ends of two.

    Attributes:
        seconds: of the whole step.
        scoring: seconds of it in the reference pass.
        kind: `snapshot` (the reference is renewed and nothing scored), `scored`, `kept` (a later visit: the old
            log-probabilities are known), or `plain` (not PSFT).
    """

    seconds: float
    scoring: float
    kind: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clock_of(device: str, kind: str = "wall") -> Clock:
    """A clock in seconds. On a GPU it waits for the work in flight first; `cpu` is the process's own time."""
    if kind == "cpu":
        return time.process_time
    if device != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


class Turns:
    """Lets several threads run one at a time, in a fixed order."""

    def __init__(self, names: list[str]):
        self.order = list(names)
        self.turn = 0
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.order[self.turn % len(self.order)] == name)

    def hand_over(self) -> None:
        with self.changed:
            self.turn += 1
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            following = self.order[(self.turn + 1) % len(self.order)]
            self.order.remove(name)
            self.turn = self.order.index(following) if self.order else 0
            self.changed.notify_all()


class StepClock(TrainerCallback):
    """Ends the turn of `name` after every optimizer step and notes the step.

    Args:
        name: whose.
        turns: None: the trainer runs alone.
        clock: seconds.

    Attributes:
        steps: what was measured.
    """

    def __init__(self, name: str, turns: Turns | None, clock: Clock):
        self.name, self.turns, self.clock = name, turns, clock
        self.steps: list[Step] = []
        self._trainer: Trainer | None = None
        self._scoring: list[float] = []

    def watch(self, trainer: Trainer) -> None:
        """Has the reference pass of a PSFTTrainer timed too, when it trains."""
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self._trainer is not None and getattr(args, "takes_snapshots", False):
            self._time_scoring(self._trainer.old_logprobs)
        self._since = self.clock()

    def _time_scoring(self, old_logprobs: Any) -> None:
        score = old_logprobs.score

        def timed(*args: Any) -> Any:
            start = self.clock()
            try:
                return score(*args)
            finally:
                self._scoring.append(self.clock() - start)

        old_logprobs.score = timed

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(Step(self.clock() - self._since, sum(self._scoring), self._kind()))
        self._scoring.clear()
        if self.turns:
            self.turns.hand_over()
            self.turns.wait(self.name)
        self._since = self.clock()

    def _kind(self) -> str:
        position = getattr(self._trainer, "_position", None)
        if position is None or not self._trainer.args.takes_snapshots:
            return "plain"
        return "snapshot" if position.is_snapshot else "scored" if self._scoring else "kept"


def train_in_turns(trainers: dict[str, Trainer], turns: Turns, threads: int | None = None) -> None:
    """Runs every trainer in a thread of its own, one at a time, its setup too. Raises what the first of them raised."""
    failures: list[BaseException] = []

    def run(name: str) -> None:
        if threads:
            torch.set_num_threads(threads)
        turns.wait(name)
        try:
            trainers[name].train()
        except BaseException as error:
            failures.append(error)
        finally:
            turns.leave(name)

    started = [threading.Thread(target=run, args=(name,)) for name in trainers]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if failures:
        raise failures[0]
