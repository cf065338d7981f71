"""The first thing to run on a GPU: what works there, what is right, and what it costs, in at most nine minutes.

    python benchmarks/first_gpu.py                        every part that is not done yet
    python benchmarks/first_gpu.py rounding noise         some of them, again
    python benchmarks/first_gpu.py --list                 what there is to do, and what is done
    python benchmarks/first_gpu.py --cpu                  a rehearsal without a GPU; what needs one is skipped

Every part (first_gpu_parts.py) runs in a process of its own under a time limit of its own: one that fails, hangs or
kills its process stops no other. What it found is kept at once in benchmarks/results/first_gpu_DEVICE.json, with the
card, driver, versions and commit of that run, and the same command goes on with what is missing. On the lent machine of
this workplace the file is copied to $OUT too.

Exit code: 0, all is done and right; 1, a part failed or ran out of time; 3, all ran and something is not as it should
be; 75, the time was up: call it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("first_gpu_parts.py")
AGAIN, GOAL_MISSED = 75, 3
LEAST_SECONDS = 10.0
"""A part is not begun with less time left: importing torch and its friends takes that long."""
REHEARSAL = 3.0
"""Times a part's limit, where a CPU does in its place what a GPU does."""
TAIL = 30
MARKS = {"ok": "✓", "missed": "!", "skipped": "-", "failed": "✗", "timed out": "✗"}


@dataclass(frozen=True)
class Part:
    """A function of first_gpu_parts.py: its name, the seconds it may take, and the question it answers."""

    name: str
    limit: float
    question: str


PARTS = (  # what is wrong comes before what is slow
    Part("environment", 30, "card, driver, versions"),
    Part("doctor", 45, "qpsft doctor's lines"),
    Part("rounding", 30, "are weights rounded for CUDA the same on the CPU and on CUDA?"),
    Part("merges", 80, "train, merge in three dtypes, each proven to be the trained model"),
    Part("float16", 45, "float16 with an overflow that is forced: repeated, not skipped"),
    Part("noise", 70, "how far r is from 1 at a snapshot; with budget 0 exactly 0"),
    Part("resume", 60, "stopped and resumed: how far from never stopped?"),
    Part("packing", 50, "packed rows: no contamination, tokens per second"),
    Part("paged_optimizer", 40, "paged_adamw_8bit takes the steps of AdamW"),
    Part("offloading", 40, "activation_offloading gives the same run"),
    Part("no_compiler", 45, "without a C compiler training goes on"),
    Part("plan", 60, "qpsft plan against max_memory_allocated"),
    Part("step_cost_small", 60, "a step of PSFT, SFT and TRL, 0.5B"),
    Part("step_cost_large", 100, "the same, 7B"),
    Part("throughput_8b", 70, "tokens per second, Qwen3-8B in NF4"),
    Part("throughput_4b", 60, "tokens per second, Qwen3-4B in NF4"),
    Part("throughput_14b", 90, "tokens per second, Qwen3-14B in NF4"),
)


def run_part(part: Part, device: str, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own, ended with all its children after `seconds`.

    Returns: `status` ("ok", "missed", "skipped", "failed" or "timed out"), `seconds`, `limit`, and what the part
    found: `numbers`, `missed` (in words), `why` it was skipped; of a part that failed the last lines it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        command = [sys.executable, str(PROGRAM), part.name, "--device", device, "--answer", str(answer)]
        started = time.monotonic()
        own_group = os.name == "posix"  # so that its children can be ended with it
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=_environment(), start_new_session=own_group
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        found = {"seconds": round(time.monotonic() - started, 1), "limit": seconds}
        if code == 0 and answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8")) | found
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        return {"status": "timed out" if code is None else "failed", "exit_code": code, "said": said} | found


def _environment() -> dict[str, str]:
    """Of a part: this tree's qpsft, growing memory segments, and the attention that consumer cards have.

    Hopper and newer would prefer cuDNN's attention, and measure another kernel than theirs.
    """
    here = PROGRAM.parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _end(process: subprocess.Popen) -> None:
    """Ends a part that is still there, and what it started."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    elif process.poll() is None:
        process.kill()
    process.wait()


def run_parts(parts: tuple[Part, ...], device: str, minutes: float, record: Record) -> None:
    """Runs one part after the other while there is time, and keeps what each found."""
    end = time.monotonic() + 60 * minutes
    for part in parts:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            return
        limit = part.limit * (REHEARSAL if device == "cpu" else 1)
        found = run_part(part, device, min(limit, left))
        if found["status"] == "timed out" and left < limit:
            found["status"] = "not begun"  # it had less than its due: the next call begins it anew
        record.add(part.name, found)
        print(line(part, found), flush=True)


class Record:
    """`{"device", "runs": [environment, …], "parts": {name: what was found, "run": index into runs}}`, in one file.

    Args:
        folder: where first_gpu_DEVICE.json is, or will be once the part "environment" has named the device.
        device: "cuda" or "cpu".
        out: a second folder for a copy, or None.
    """

    def __init__(self, folder: Path, device: str, out: Path | None = None):
        self.folder, self.device, self.out = folder, device, out
        self.content: dict[str, Any] = {"device": device, "runs": [], "parts": {}}
        self._begun = False

    @property
    def path(self) -> Path:
        name = self.content["runs"][-1]["slug"] if self.content["runs"] else f"unknown-{self.device}"
        return self.folder / f"first_gpu_{name}.json"

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return self.content["parts"]

    def begin(self, environment: dict[str, Any]) -> None:
        """A run on a machine; what an earlier one found there is taken along."""
        self.content["runs"].append(environment)
        if self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            self.content = earlier | {"runs": [*earlier["runs"], environment]}

    def add(self, name: str, found: dict[str, Any]) -> None:
        self.parts[name] = {"run": len(self.content["runs"]) - 1, **found}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        if self.out is not None:
            shutil.copy2(self.path, self.out)


def is_done(found: dict[str, Any] | None) -> bool:
    return found is not None and found["status"] in ("ok", "missed", "skipped")


def line(part: Part, found: dict[str, Any]) -> str:
    """What a part found, in a few words; its numbers are in the file."""
    head = f"{MARKS.get(found['status'], ' ')} {part.name:<16}{found['seconds']:>5.0f} s  "
    words = {
        "ok": part.question,
        "missed": "; ".join(found.get("missed", [])),
        "skipped": found.get("why", ""),
        "timed out": f"not done after {found['limit']:.0f} s",
        "not begun": "the time of this call was up",
    }
    said = [text for text in found.get("said", []) if text.strip()]
    return head + words.get(found["status"], f"failed: {said[-1] if said else 'nothing was printed'}")


def exit_code(parts: tuple[Part, ...], record: Record) -> int:
    states = [record.parts.get(part.name, {"status": "not begun"})["status"] for part in parts]
    if "failed" in states or "timed out" in states:
        return 1
    return AGAIN if "not begun" in states else GOAL_MISSED if "missed" in states else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("parts", nargs="*", help=f"of {names} (default: what is missing)")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run what is done once more")
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing else")
    parser.add_argument("--results", type=Path, default=PROGRAM.parent / "results", metavar="FOLDER")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - {part.name for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    begun, device = time.monotonic(), "cpu" if args.cpu else "cuda"
    out = os.environ.get("OUT")
    record = Record(args.results, device, Path(out) if out else None)
    found = run_part(PARTS[0], device, PARTS[0].limit * REHEARSAL)
    print(line(PARTS[0], found), flush=True)
    if found["status"] != "ok":
        print("\n".join(found.get("said", [found.get("why", "")])), file=sys.stderr)
        return 2
    record.begin(found.pop("numbers"))
    chosen = tuple(part for part in PARTS[1:] if not args.parts or part.name in args.parts)
    if args.list:
        for part in chosen:
            print(f"{part.name:<18}{record.parts.get(part.name, {'status': 'open'})['status']:<10}{part.question}")
        return 0
    record.add(PARTS[0].name, found)
    left = tuple(p for p in chosen if args.again or p.name in args.parts or not is_done(record.parts.get(p.name)))
    run_parts(left, device, args.minutes - (time.monotonic() - begun) / 60, record)
    code = exit_code(chosen, record)
    print(f"{record.path}: {sum(is_done(record.parts.get(part.name)) for part in chosen)} of {len(chosen)} parts done")
    return code


if __name__ == "__main__":
    sys.exit(main())
