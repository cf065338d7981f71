"""Several processes, one run (torchrun or `accelerate launch`, gloo or NCCL): what is done and printed once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qpsft.errors import QpsftError

T = TypeVar("T")

GRACE = 30.0
"""Seconds that process 0 and the launcher have to end this process too, on a busy machine; idle, it takes one."""


def let_memory_segments_grow() -> None:
    """Has torch's CUDA allocator grow its segments instead of leaving holes between them; Linux only.

    To be called before torch is imported. The user's own setting wins. The name is the old one: torch 2.9 reads the
    new one, PYTORCH_ALLOC_CONF, and ignores this option in it (pytorch issue 183387).
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Those that ask a process to end."""


@contextmanager
def taken_signals(handler: Callable[[int, Any], None], which: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Has `handler` called at these signals inside. Those that are ignored (nohup, a shell's background) stay so.

    Does nothing in another thread than the main one, which gets no signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.getsignal(one) for one in which}
        before = {one: was for one, was in before.items() if was not in (signal.SIG_IGN, None)}
    for one in before:
        signal.signal(one, handler)
    try:
        yield
    finally:
        for one, was in before.items():
            signal.signal(one, was)


def world_size() -> int:
    """Processes of this run, from the launcher's environment: known before torch is imported."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def from_main(make: Callable[[], T]) -> T:
    """Calls `make` in process 0 and gives its result to every process. Every process must call this, in the same order.

    The others wait until process 0 is done, at most `ddp_timeout` seconds (1,800 unless set otherwise). The result is
    pickled.

    Raises:
        QpsftError: `make` raised one in process 0; it is then raised in every process, so that all end alike.
    """
    if world_size() == 1:
        return make()
    import torch.distributed

    if not torch.distributed.is_initialized():  # no launcher: the variable was set for something else
        return make()
    result, error = None, None
    if is_main():
        try:
            result = make()
        except QpsftError as caught:
            error = caught
    box = [result, error and (type(error).__mro__, error.what, error.todo)]
    torch.distributed.broadcast_object_list(box, src=0)
    if is_main():
        if error is not None:
            raise error
        return result
    if box[1] is not None:
        kinds, what, todo = box[1]
        raise next(kind for kind in kinds if kind.__module__ == QpsftError.__module__)(what, todo)
    return box[0]


def print_error(text: str) -> None:
    """Prints an error on standard error, once for all processes that meet it.

    Process 0 prints at once. Another one waits: if process 0 has met the error too, the launcher ends this process
    meanwhile; if not, nobody else can say it.
    """
    if not is_main():
        time.sleep(GRACE)
        text = f"process {os.environ['RANK']}: {text}"
    print(text, file=sys.stderr, flush=True)
