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
        self._deadline = deadline
        self._run_seconds = run_seconds
        self._longest = 0.0  # of the runs done now
        self._longest_kept = 0.0
        self._results = results
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._bar: tqdm | None = None
        self._seconds = 0.0
        self._trained = 0
        self._left = 0
        self._cache: dict[str, Result] = {}

    def __enter__(self) -> RunQueue:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._bar is not None:
            self._bar.close()

    def expect(self, runs: int) -> None:
        """How many runs there will be, repeated ones included."""
        self._left = runs
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(total=runs, unit="run", disable=None, leave=False)

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
        missing = []
        for key, same in by_key.items():
            result = self._cache.get(key)
            if result is None:
                result = read_result(same[0], self.setting, self._results)
                self.reused += result is not None
                if result is not None and same[0].method:
                    self._longest_kept = max(self._longest_kept, sum(result["seconds"].values()))
            if result is None:
                missing.append((key, same))
            else:
                self._keep(key, same, result, may_diverge)
        if self.reused and missing and not self.done:
            tqdm.write(f"{self.reused} runs are reused, {len(missing)} to do next")
        for key, same, result in self._work(missing):
            self.done += 1
            self._trained += bool(same[0].method)
            self._keep(key, same, result, may_diverge)
            tqdm.write(self._line(result))
        return {spec: self._cache[key] for key, same in by_key.items() for spec in same}

    def _keep(self, key: str, same: list[RunSpec], result: Result, may_diverge: bool) -> None:
        if "diverged" in result and not may_diverge:
            raise DivergedError(
                f"{same[0].label} diverged, and its learning rate is compared: {result['diverged']['error']}",
                "Lower that rate (--learning_rate or --arm_rates), or leave it out of --learning_rates. To try this "
                f"run again, remove {same[0].folder(self.setting, self._results)}.",
                result["diverged"]["step"],
            )
        self._cache[key] = result
        self._left -= len(same)  # counted here too: a disabled bar does not count
        self._bar.update(len(same))

    def _work(self, missing: list[tuple[str, list[RunSpec]]]) -> Iterator[tuple[str, list[RunSpec], Result]]:
        if self._jobs == 1:
            for key, same in missing:
                if not self._is_time_left():
                    raise TimeUp
                started = time.perf_counter()
                result = do_run(same[0], self.setting, self._results)
                if same[0].method:  # the base is only measured: its time says nothing about the others
                    self._seconds += time.perf_counter() - started
                    self._longest = max(self._longest, time.perf_counter() - started)
                yield key, same, result
            return
        if self._pool is None and missing:
            context = multiprocessing.get_context("spawn")  # a forked torch may hang
            self._pool = ProcessPoolExecutor(self._jobs, context, quiet_worker)
        waiting = list(missing)
        running: dict[Future, tuple[str, list[RunSpec], float]] = {}
        while waiting or running:
            while waiting and len(running) < self._jobs and self._is_time_left():
                key, same = waiting.pop(0)
                future = self._pool.submit(do_run, same[0], self.setting, self._results)
                running[future] = (key, same, time.perf_counter())
            if not running:
                raise TimeUp
            started = time.perf_counter()
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            self._seconds += time.perf_counter() - started
            for future in finished:
                key, same, begun = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise TrainingError(
                        f"A worker process was killed during {same[0].label}, perhaps for lack of memory.",
                        "Repeat with fewer --jobs; finished runs are kept.",
                    ) from error
                if same[0].method:
                    self._longest = max(self._longest, time.perf_counter() - begun)
                yield key, same, result

    def _is_time_left(self) -> bool:
        if self._longest:
            expected = max(self._longest, self._longest_kept)
        else:
            expected = self._longest_kept + STARTING if self._longest_kept else self._run_seconds
        return time.monotonic() + expected < self._deadline

    def _line(self, result: Result) -> str:
        metrics, seconds = result["points"][-1]["metrics"] if result["points"] else {}, result["seconds"]
        diverged = [f"diverged at step {result['diverged']['step']}"] if "diverged" in result else []
        scores = diverged or [
            f"{short} {metrics[name]:.3f}"
            for name, short in (("in_domain", "in"), ("out_of_domain", "out of domain"))
            if name in metrics
        ]
        left = self._left * self._seconds / max(1, self._trained)
        ahead = f" · about {_duration(left)} left" if self._trained else ""
        return f"{result['label']:<26} {' · '.join(scores)} · {sum(seconds.values()):.0f} s{ahead}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
