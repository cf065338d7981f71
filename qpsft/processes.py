"""Several processes, one run: what is done, said and decided once (torchrun or `accelerate launch`, gloo or NCCL)."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from qpsft.errors import QpsftError

T = TypeVar("T")


def let_memory_segments_grow() -> None:
    """Has torch's CUDA allocator grow its segments instead of leaving holes between them; Linux only.

    To be called before torch is imported. The user's own setting wins. The name is the old one: torch 2.9 reads the
    new one, PYTORCH_ALLOC_CONF, and ignores this option in it (pytorch issue 183387).
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def world_size() -> int:
    """Processes of this run, from the launcher's environment: known before torch is imported."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is process 0, the one that speaks and writes."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def from_main(make: Callable[[], T]) -> T:
    """Calls `make` in process 0 and gives its result to every process. Every process must call this, in the same order.

    So the others wait until process 0 is done. Results are pickled. They wait `ddp_timeout` seconds at most (1,800
    unless set otherwise).

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


def first_to_say(text: str) -> bool:
    """Whether no other process of this run has asked to say `text`: an error that all meet is shown by one.

    A key in the launcher's store decides, not a collective operation: the others may be anywhere, or gone.
    """
    if world_size() == 1 or "MASTER_PORT" not in os.environ:
        return True
    from torch.distributed import DistError, TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"qpsft/said/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        address = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        return store.add(key, 1) == 1
    except (DistError, ValueError):  # nobody answers: better twice than not at all
        return True


def say_once(text: str) -> None:
    """Prints `text` on standard error, unless another process has."""
    if first_to_say(text):
        print(text, file=sys.stderr, flush=True)
