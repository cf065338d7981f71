"""Runs one after another or several at a time, each kept as soon as it is done, with a bar and the time left."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qpsft.compare.run import RunSpec, Setting, do_run, read_result
from qpsft.errors import DivergedError, TrainingError
from qpsft.terminal import quiet_worker

Result = dict[str, Any]
STARTING = 30.0
"""Seconds that a process takes to start and load the base; they are not in a kept result's `seconds`."""


class TimeUp(Exception):
    """The deadline came before all runs were done. Runs that had been started are finished and kept."""


class RunQueue:
    """Does runs that have no result yet, `jobs` at a time, and shows progress.

    Args:
        deadline: a time of `time.monotonic()`: no run is started that would not end by then, if it took as long as the
            longest so far; then `do` raises TimeUp.
        run_seconds: the length of a run that is assumed until one has been done.

    Attributes:
        reused, done: how many results were kept from before, and how many runs were done.
    """

    def __init__(
        self, setting: Setting, results: Path, jobs: int, deadline: float = math.inf, run_seconds: float = 0.0
    ):
        self.setting = setting
        self.reused = 0
        self.done = 0
        self._results, self._jobs = results, jobs
        self._deadline, self._run_seconds = deadline, run_seconds
        self._longest = 0.0  # of the runs done now
        self._longest_kept = 0.0
        self._pool: ProcessPoolExecutor | None = None
        self._bar = tqdm(unit="run", disable=None, leave=False)
        self._cache: dict[str, Result] = {}

    def __enter__(self) -> RunQueue:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            if isinstance(error[1], KeyboardInterrupt):  # also of a signal that the workers have not had
                for worker in multiprocessing.active_children():
                    worker.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._bar.close()

    def expect(self, runs: int) -> None:
        """How many runs there will be, repeated ones included."""
        self._bar.reset(total=runs)

    def do(self, specs: Sequence[RunSpec], *, may_diverge: bool = False) -> dict[RunSpec, Result]:
        """The results of these runs: kept ones are read, the others are run. Specs that mean the same run share it.

        Args:
            may_diverge: results that say `diverged` are results too; False: they are errors.

        Raises:
            TimeUp: see `deadline`. QpsftError: a run fails.
        """
        by_key: dict[str, list[RunSpec]] = {}
        for spec in specs:
            by_key.setdefault(spec.key(self.setting), []).append(spec)
        missing = {}
        for key, same in by_key.items():
            result = self._cache.get(key) or self._kept_before(same[0])
            if result is None:
                missing[key] = same
            else:
                self._keep(key, same, result, may_diverge)
        if self.reused and missing and not self.done:
            tqdm.write(f"{self.reused} runs are reused, {len(missing)} to do next")
        for key, result in self._work({key: same[0] for key, same in missing.items()}):
            self.done += 1
            self._keep(key, missing[key], result, may_diverge)
            tqdm.write(_line(result))
        return {spec: self._cache[key] for key, same in by_key.items() for spec in same}

    def _kept_before(self, spec: RunSpec) -> Result | None:
        """The result that an earlier comparison left."""
        result = read_result(spec, self.setting, self._results)
        if result is not None:
            self.reused += 1
            if spec.method:
                self._longest_kept = max(self._longest_kept, sum(result["seconds"].values()))
        return result

    def _keep(self, key: str, same: list[RunSpec], result: Result, may_diverge: bool) -> None:
        if "diverged" in result and not may_diverge:
            raise DivergedError(
                f"{same[0].label} diverged, and its learning rate is compared: {result['diverged']['error']}",
                "Lower that rate (--learning_rate or --arm_rates), or leave it out of --learning_rates. To try this "
                f"run again, remove {same[0].folder(self.setting, self._results)}.",
                result["diverged"]["step"],
            )
        self._cache[key] = result
        self._bar.update(len(same))

    def _work(self, missing: dict[str, RunSpec]) -> Iterator[tuple[str, Result]]:
        """Does the runs, and yields each as soon as it is done."""
        if self._jobs > 1 and missing:
            yield from self._work_in_processes(missing)
            return
        for key, spec in missing.items():
            if not self._is_time_left():
                raise TimeUp
            started = time.perf_counter()
            result = do_run(spec, self.setting, self._results)
            self._note_time(spec, started)
            yield key, result

    def _work_in_processes(self, missing: dict[str, RunSpec]) -> Iterator[tuple[str, Result]]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a forked torch may hang
            self._pool = ProcessPoolExecutor(self._jobs, context, quiet_worker)
        waiting = list(missing.items())
        running: dict[Future, tuple[str, RunSpec, float]] = {}
        while waiting or running:
            while waiting and len(running) < self._jobs and self._is_time_left():
                key, spec = waiting.pop(0)
                future = self._pool.submit(do_run, spec, self.setting, self._results)
                running[future] = (key, spec, time.perf_counter())
            if not running:
                raise TimeUp
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                key, spec, started = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise TrainingError(
                        f"A worker process was killed during {spec.label}, perhaps for lack of memory.",
                        "Repeat with fewer --jobs; finished runs are kept.",
                    ) from error
                self._note_time(spec, started)
                yield key, result

    def _note_time(self, spec: RunSpec, started: float) -> None:
        if spec.method:  # the base is only measured: its time says nothing about the others
            self._longest = max(self._longest, time.perf_counter() - started)

    def _is_time_left(self) -> bool:
        if self._longest:
            expected = max(self._longest, self._longest_kept)
        else:
            expected = self._longest_kept + STARTING if self._longest_kept else self._run_seconds
        return time.monotonic() + expected < self._deadline


def _line(result: Result) -> str:
    """A run's label, scores and seconds."""
    metrics = result["points"][-1]["metrics"] if result["points"] else {}
    names = {"in_domain": "in", "out_of_domain": "out of domain"}
    scores = [f"{short} {metrics[name]:.3f}" for name, short in names.items() if name in metrics]
    if "diverged" in result:
        scores = [f"diverged at step {result['diverged']['step']}"]
    return f"{result['label']:<26} {' · '.join(scores)} · {sum(result['seconds'].values()):.0f} s"
