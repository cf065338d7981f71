"""Forks merges from a process that has imported everything, and kills each at a random moment.

    python merge_killer.py ADAPTER OUTPUT KILLS SEED

After every kill OUTPUT must be what it was before or the finished folder; prints one word a kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from qpsft.merge import merge_adapter


def digest(folder: Path) -> dict[str, bytes] | None:
    """The folder's files, without the times in its reports; None if it is not there."""
    if not folder.exists():
        return None
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("merge_report.json", "README.md")
    }


def merge(adapter: Path, output: Path, overwrite: bool, dtype: str) -> None:
    merge_adapter(adapter, output, overwrite=overwrite, dtype=dtype, no_verify=True)


def kill_some(adapter: Path, output: Path, kills: int, rng: random.Random, *, overwrite: bool) -> None:
    """Merges onto nothing, or over an earlier merge, and is killed each time."""
    merge(adapter, output.with_name("reference"), True, "bfloat16")
    finished = digest(output.with_name("reference"))
    if overwrite:
        merge(adapter, output, True, "float32")
    before = digest(output)
    started = time.perf_counter()
    merge(adapter, output.with_name("timed"), True, "bfloat16")
    duration = time.perf_counter() - started
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            merge(adapter, output, overwrite, "bfloat16")
            os._exit(0)
        time.sleep(rng.uniform(0, 2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = digest(output)
        left = [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}.")]
        if found == finished:
            print("finished")
            if overwrite:
                merge(adapter, output, True, "float32")
            else:
                output.rename(output.with_name(f"done-{time.time_ns()}"))
        elif found == before:
            print("left-over" if left else "before")
        else:
            sys.exit(f"{output} is neither the old state nor the finished folder: {sorted(found or [])}")
    merge(adapter, output, overwrite, "bfloat16")
    hidden = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
    if digest(output) != finished or hidden:
        sys.exit(f"after the kills, a merge leaves {hidden}")


def main() -> None:
    adapter, output, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its own lock is shared with the children: one killed holding it blocks all
    rng = random.Random(seed)
    kill_some(adapter, output, kills, rng, overwrite=False)
    kill_some(adapter, output, kills, rng, overwrite=True)


if __name__ == "__main__":
    main()
