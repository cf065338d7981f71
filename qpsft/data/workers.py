"""Batches of rows become tokens; of many rows in worker processes on all cores, with the same result in the same order.

    this process   reads rows, pickles a batch ──► worker 1   shape, chat template, tokens, labels
                   keeps what comes back      ◄── worker 2   …

A worker is a Python of its own that gets batches through its standard input and ends with it. So nothing is forked that
has threads, and nobody's script is run again, on any system and in a notebook. Whatever goes wrong between two
processes, this one makes the batch itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qpsft.data.bad_rows import RowError
from qpsft.data.encode import Encoded, Noted, RowEncoder
from qpsft.data.shapes import RowReader, split_answers
from qpsft.errors import DataError

Row = tuple[dict | RowError, str, int]
"""A row, or why it is none; its place and its number."""
Made = tuple[Encoded | RowError, str, int]
"""The same as tokens."""

MOST_WORKERS = 8
SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4096"}
"""A tokenizer frees thousands of small blocks with every row; with room for them it takes a quarter less time."""
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qpsft.data import workers; workers.serve()"


@dataclass
class Preparation:
    """What becomes of rows as they stand in a source.

    Attributes:
        encoder: takes notes of what it sees.
        reader: None: the rows have their shape already.
        split_turns: one row of each answer.
    """

    encoder: RowEncoder
    reader: RowReader | None
    split_turns: bool

    def __call__(self, batch: Iterable[Row]) -> list[Made]:
        """Raises DataError: no row can be used."""
        made: list[Made] = []
        rows: list[tuple[dict, str, int]] = []
        for row, place, number in batch:
            try:
                if isinstance(row, RowError):
                    raise row
                shaped = row if self.reader is None else self.reader.read(row, place)
                parts = split_answers(shaped, place) if self.split_turns else [(shaped, place)]
                rows += [(part, where, number) for part, where in parts]
            except RowError as error:
                made.append((_bare(error), place, number))
        encoded = self.encoder.batch([(row, place) for row, place, _ in rows])
        made += [(_bare(one), place, number) for one, (_, place, number) in zip(encoded, rows, strict=True)]
        return made


def _bare(made: Encoded | RowError) -> Encoded | RowError:
    """An error without what it happened in: there may be as many as rows."""
    if isinstance(made, RowError):
        made.__context__ = made.__cause__ = None
        return made.with_traceback(None)
    return made


class Workers:
    """Worker processes, as many as there are cores, up to eight; they end with the `with` block.

    Args:
        preparation: what they do; goes to them as it is now.
        count: how many; none for one core, where all is done in this process.
    """

    def __init__(self, preparation: Preparation, count: int | None = None):
        self._preparation = preparation
        count = min(_cores(), MOST_WORKERS) if count is None else count
        try:
            start = pickle.dumps(preparation)
            self._workers = [_Worker(start) for _ in range(count if count > 1 else 0)]
        except Exception:  # a tokenizer that cannot be pickled, a system without processes
            self._workers = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(max(1, len(self._workers)))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    def map(self, batches: Iterable[list[Row]]) -> Iterator[list[Made]]:
        """What becomes of each batch, in their order; the preparation's encoder has noted what theirs have.

        Raises:
            DataError: as `Preparation`, or as `batches`, when all before it has been given out.
        """
        waiting: deque[tuple[list[Row], Future]] = deque()
        batches, failed = iter(batches), None
        while True:
            try:
                batch = next(batches, None)
            except DataError as error:
                batch, failed = None, error
            if batch is None:
                break
            if not self._workers:
                yield self._preparation(batch)
                continue
            waiting.append((batch, self._threads.submit(self._make, batch)))
            if len(waiting) > len(self._workers):  # each has one, and another is ready
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())
        if failed is not None:
            raise failed

    def _make(self, batch: list[Row]) -> tuple[list[Made] | DataError, Noted] | None:
        worker = self._free.get()
        try:
            return worker.make(batch)
        except Exception:  # it has ended, or the batch cannot be pickled
            return None
        finally:
            self._free.put(worker)

    def _result(self, batch: list[Row], future: Future) -> list[Made]:
        result = future.result()
        if result is None:
            return self._preparation(batch)
        made, noted = result
        if isinstance(made, DataError):
            raise made
        self._preparation.encoder.noted.add(noted)
        return made


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """One worker process, as its starter sees it."""

    def __init__(self, start: bytes):
        self._start = start
        command = [sys.executable, "-I", "-c", START, json.dumps(sys.path)]  # -I: nothing of the current folder
        # A session of its own: Ctrl-C is for the process that started it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**SETTINGS, **os.environ},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def make(self, batch: list[Row]) -> tuple[list[Made] | DataError, Noted] | None:
        """What it made and noted; None for an error that is none of ours. Raises whatever goes wrong with it."""
        rows = pickle.dumps(batch)
        if self._start:
            self._process.stdin.write(self._start)
            self._start = b""
        self._process.stdin.write(rows)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):  # bytes that it did not take
                pipe.close()


def serve() -> None:
    """What a worker does: takes a `Preparation`, then batches, until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints to standard error
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        prepare: Preparation = pickle.load(source)
        prepare.encoder.on_all_cores = False
        while True:
            batch = pickle.load(source)
            prepare.encoder.noted = Noted()
            try:
                answer = prepare(batch), prepare.encoder.noted
            except DataError as error:
                answer = error, prepare.encoder.noted
            except Exception:
                answer = None
            pickle.dump(answer, answers)
            answers.flush()
    os._exit(0)
