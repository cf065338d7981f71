"""Kills a verb at random moments, again and again, and types what it says next; forked from one warm process.

    python killer.py VERB FOLDER KILLS SEED

After every kill, whatever lies in the folder must be one run's, whole, or be refused by name; no command may end in a
traceback; and what is there in the end has the bytes of a run that was never killed. Prints a line with the counts.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from qpsft import cli
from qpsft.demo import walkthrough
from qpsft.errors import BaseModelError
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.psft.checkpoint import check_bytes, checkpoints, is_complete
from qpsft.train import outputs

FLAGS = [
    "train", "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=32", "--max_length=128",
    "--lora_r=2", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1",
    "--gradient_checkpointing=false", "--reference_steps=2", "--num_iterations=2", "--max_steps=6", "--save_steps=1",
    "--save_total_limit=2",
]  # fmt: skip
TIMED_OUT = 600


def attempt(arguments: list[str], seconds: float | None) -> tuple[int | None, str]:
    """Runs a verb in a fork, killed after so many seconds. Returns (exit code, None if killed; what it said)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)  # the converter it starts lives on, as after a kill
        for stream in (1, 2):
            os.dup2(write, stream)
        code = 99
        try:
            code = cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(iter(lambda: os.read(read, 65536), b"")), daemon=True)
    reader.start()
    ended = time.monotonic() + (TIMED_OUT if seconds is None else seconds)
    status = None
    while status is None and time.monotonic() < ended:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
        time.sleep(0.005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    reader.join(timeout=20)
    text = " ".join(b"".join(said).decode(errors="replace").split())
    if "Traceback" in text or (os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 2)):
        sys.exit(f"{arguments}: {status}: {text[-3000:]}")
    if seconds is None and not os.WIFEXITED(status):
        sys.exit(f"{arguments} did not end")
    return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else None), text


def must(arguments: list[str]) -> None:
    code, said = attempt(arguments, None)
    if code:
        sys.exit(f"{arguments} was refused: {said[-2000:]}")


class Verb:
    """What is killed, what it says to type after that, and what must be there.

    Attributes:
        first, again: the command, and the one that goes on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.first: list[str] = []
        self.again: list[str] = []

    def prepare(self) -> None:
        """Puts the earlier state there."""

    def check(self) -> str:
        """Exits where what a kill left is not whole; else says what it is."""
        return "held"

    def result(self) -> dict[str, bytes]:
        """What must be there in the end, without times."""
        raise NotImplementedError

    def clear(self) -> None:
        for path in self.folder.parent.glob(f"*{self.folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Train(Verb):
    """Onto nothing, or over an earlier run."""

    def __init__(self, folder: Path, over: bool):
        super().__init__(folder)
        self.over = over
        self.first = [*FLAGS, "--seed=3", f"--output_dir={folder}"]
        self.earlier = folder.with_name("earlier")
        if over and not self.earlier.exists():
            must([*FLAGS, "--seed=5", "--max_steps=1", f"--output_dir={self.earlier}"])

    def prepare(self) -> None:
        if self.over:
            shutil.copytree(self.earlier, self.folder)

    def command(self) -> list[str]:
        """By what lies there, as the messages say it."""
        new = self.folder / outputs.NEW_RUN
        begun = (new / "base_quantization.json").is_file()
        whole = [one for one in checkpoints(new if begun else self.folder) if is_complete(one)]
        if (whole and (begun or not self.over)) or (new / outputs.WHOLE).is_file():
            return [*self.first, "--resume"]
        return [*self.first, *(["--overwrite"] if outputs.holds_run(self.folder) else [])]

    def check(self) -> str:
        for place in (self.folder, self.folder / outputs.NEW_RUN):
            for one in checkpoints(place):
                if is_complete(one):
                    check_bytes(one)
        if not (self.folder / "adapter_model.safetensors").is_file():
            if self.over:
                sys.exit(f"{self.folder}: the earlier adapter is gone")
            return "no adapter yet"
        try:
            AdapterFolder(self.folder).base_folder()
        except BaseModelError as error:
            if "of another run" not in str(error):
                raise
            return "refused by name"
        return "one run's adapter"

    def result(self) -> dict[str, bytes]:
        names = ["adapter_model.safetensors", "checkpoint-6/adapter_model.safetensors", "checkpoint-6/scheduler.pt"]
        found = {name: (self.folder / name).read_bytes() for name in names}
        return found | {"names": " ".join(sorted(path.name for path in self.folder.iterdir())).encode()}


class Demo(Verb):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.first = ["demo", f"--output_dir={folder}"]
        recipe = walkthrough.RECIPE.read_text() + "\ndataset_limit: 32\nmax_steps: 2\n"
        walkthrough.RECIPE = folder.parent / "recipe-of-the-demo.yaml"
        walkthrough.RECIPE.write_text(recipe.replace("num_train_epochs: 4\n", ""))
        walkthrough.IN_DOMAIN_ROWS = walkthrough.ROWS_PER_SET = 2

    def command(self) -> list[str]:
        code, said = attempt(self.first, 0.0 if not self.folder.exists() else None)
        if code == 2:
            if "--resume" in said or "Give --overwrite" not in said:
                sys.exit(f"the demo says what it cannot do: {said}")
        return [*self.first, "--overwrite"]

    def result(self) -> dict[str, bytes]:
        merged = self.folder.with_name(f"{self.folder.name}-merged")
        return {
            "adapter": (self.folder / "adapter_model.safetensors").read_bytes(),
            "sft": (self.folder.with_name(f"{self.folder.name}-sft") / "adapter_model.safetensors").read_bytes(),
            "merged": (merged / "model.safetensors").read_bytes(),
            "names": " ".join(sorted(path.name for path in self.folder.iterdir())).encode(),
        }


class Compare(Verb):
    RECIPE = """\
model_name_or_path: demo
dataset_name: demo-noisy
dataset_limit: 16
max_length: 128
lora_r: 4
warmup_steps: 0
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
gradient_checkpointing: false
reference_steps: 2
compare: {arms: [sft, psft], eval_rows: 4, out_of_domain_rows: 2, sample_rows: 2, k: 2, max_new_tokens: 6, seeds: 2}
"""

    def __init__(self, folder: Path):
        super().__init__(folder)
        recipe = folder.parent / "recipe-to-compare.yaml"
        recipe.write_text(self.RECIPE)
        self.first = ["compare", str(recipe), f"--output_dir={folder}"]

    def command(self) -> list[str]:
        return self.first

    def result(self) -> dict[str, bytes]:
        content = json.loads((self.folder / "comparison.json").read_text())
        return {
            "verdict": json.dumps([content["verdict"], content["answer"]]).encode(),
            "names": " ".join(sorted(path.name for path in self.folder.iterdir())).encode(),
            "results": " ".join(sorted(path.name for path in (self.folder / "results").iterdir())).encode(),
        }


class Merge(Verb):
    """Over an earlier merge, which stays until the new one is whole."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        adapter = folder.with_name("adapter")
        if not adapter.exists():
            must([*FLAGS, "--seed=3", "--max_steps=1", f"--output_dir={adapter}"])
        self.first = ["merge", str(adapter), "-o", str(folder), "--no_verify", "--overwrite"]
        self.earlier: bytes | None = None

    def prepare(self) -> None:
        must([*self.first, "--dtype=float32"])
        self.earlier = (self.folder / "model.safetensors").read_bytes()

    def command(self) -> list[str]:
        return self.first

    def check(self) -> str:
        found = (self.folder / "model.safetensors").read_bytes()
        json.loads((self.folder / "merge_report.json").read_text())
        return "the earlier merge" if found == self.earlier else "the new merge"

    def result(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.suffix == ".safetensors"}


class Export(Verb):
    """To Ollama, over an earlier export."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        model = folder.with_name("model")
        adapter = folder.with_name("adapter")
        if not model.exists():
            must([*FLAGS, "--seed=3", "--max_steps=1", f"--output_dir={adapter}"])
            must(["merge", str(adapter), "-o", str(model), "--no_verify"])
        self.first = ["export", str(model), "--to=ollama", "-o", str(folder), "--no_run", "--overwrite"]

    def prepare(self) -> None:
        must([*self.first, "--outtype=f32"])
        self.earlier = (self.folder / "model.gguf").read_bytes()

    def command(self) -> list[str]:
        return self.first

    def check(self) -> str:
        names = sorted(os.listdir(self.folder))
        if names != ["Modelfile", "model.gguf"]:
            sys.exit(f"{self.folder} holds {names}")
        found = (self.folder / "model.gguf").read_bytes()
        return "the earlier export" if found == self.earlier else "the new export"

    def result(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


VERBS: dict[str, Callable[[Path], Verb]] = {
    "train": lambda folder: Train(folder, over=False),
    "train --overwrite": lambda folder: Train(folder, over=True),
    "demo": Demo,
    "compare": Compare,
    "merge": Merge,
    "export": Export,
}


def different(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """What is not the same, with short texts."""
    names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    return [f"{name}: {found.get(name, b'')[:600]!r}, not {wanted.get(name, b'')[:600]!r}" for name in names]


def kill_some(name: str, folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kills the verb so often, and compares what is there in the end, again and again."""
    verb = VERBS[name](folder)
    verb.clear() if name not in ("merge", "export") else None
    verb.prepare()
    started = time.monotonic()
    must(verb.command())
    duration = time.monotonic() - started
    wanted = verb.result()
    found: Counter[str] = Counter()
    while found["kills"] < kills:
        verb.clear()
        verb.prepare()
        done = False
        while not done:
            more = found["kills"] < kills
            code, said = attempt(verb.command(), rng.uniform(0, 1.2 * duration) if more else None)
            if code == 2:
                sys.exit(f"refused: {said[-2000:]}")
            done = code == 0
            found["finished" if done else "kills"] += 1
            if not done and (folder.exists() or name in ("merge", "export")):
                found[verb.check()] += 1
        if differing := different(verb.result(), wanted):
            sys.exit(f"{name}: another result than without a kill: {differing}")
    left = [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]
    if left:
        sys.exit(f"{name} left {left}")
    return found


def main() -> None:
    name, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its own lock is shared with the children: one killed holding it blocks all
    for module in ("train.run", "merge.merging", "verify.verification", "export.ollama", "compare.comparison"):
        importlib.import_module(f"qpsft.{module}")  # and nothing is computed, which would start threads
    found = kill_some(name, folder, kills, random.Random(seed))
    print(f"{name}: {found.pop('kills')} kills held; {json.dumps(found)}")


if __name__ == "__main__":
    main()
