"""Every GPU measurement of the project, in calls of nine minutes each; a call goes on where the last one stopped.

    python benchmarks/all_gpu.py --list                 what there is to do, and what is done
    python benchmarks/all_gpu.py --minutes 9            as much as fits; exit code 75: call it again, 0: all done
    python benchmarks/all_gpu.py --minutes 9 scale      one part

On the lent machine of this workplace (benchmarks/README.md has the whole call) what is under $OUT comes back, so the
results are copied there after every part. Bring them into benchmarks/results before the next call: the working tree
travels, and the next call goes on from them. Progress is kept in results/gpu_progress.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from machine import AGAIN, GOAL_MISSED, RESULTS

HERE = Path(__file__).resolve().parent
LEAST_MINUTES = 1.0
LEAST_8B = 3.0  # minutes: building the base may take two


@dataclass(frozen=True)
class Part:
    """A program of this folder with its arguments, which takes --minutes if `minutes` (most per call) is given.

    It is not begun with fewer than `least` minutes left.
    """

    name: str
    program: str
    arguments: tuple[str, ...] = ()
    minutes: float | None = None
    about: str = ""
    least: float = LEAST_MINUTES

    def command(self, minutes: float) -> list[str]:
        limit = ["--minutes", f"{minutes:.2f}"] if self.minutes else []
        return [sys.executable, str(HERE / self.program), *self.arguments, *limit]


GRID = ("--device", "cuda")
PARTS = (  # what the goals need first; a file that two parts share is continued, not measured twice
    Part("build", "real_shapes.py", ("llama-3.1-8b",), about="an 8B shape builds in under two minutes", least=LEAST_8B),
    Part("step_cost", "step_cost.py", (*GRID, "--cells", "1x512,2x1024"), 8.0, "8B: step cost, goals", least=LEAST_8B),
    Part("max_context", "max_context.py", (), 8.0, "8B: longest row at 8, 12, 16 and 24 GB", least=LEAST_8B),
    Part("profile", "step_cost.py", (*GRID, "--profile"), None, "8B: where the time of a step goes", least=LEAST_8B),
    Part("noise", "noise_floor.py", ("--json", str(RESULTS / "noise_floor_cuda.json")), about="noise of the ratio"),
    Part("plan", "plan_accuracy.py", (), 8.0, "qpsft plan against the memory really used", least=LEAST_8B),
    Part("step_cost_grid", "step_cost.py", GRID, 8.0, "8B: micro-batch x length", least=LEAST_8B),
    Part("scale", "scale.py", ("--device", "cuda"), 8.0, "time and memory by size, length, batch, rank, K"),
    Part("step_cost_1.5b", "step_cost.py", (*GRID, "--shape", "qwen2.5-1.5b"), 8.0, "1.5B: micro-batch x length"),
)


def read_progress(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_done(progress: dict[str, dict], name: str) -> bool:
    """Measured, whether the goals are reached or missed; 75 and errors are not done."""
    return progress.get(name, {}).get("exit_code") in (0, GOAL_MISSED)


def run_parts(
    parts: tuple[Part, ...], minutes: float, results: Path, out: Path | None, clock=time.monotonic, grace: float = 45
) -> int:
    """Runs what is not done, one part after the other. Returns 0 when all is done, else 75.

    Args:
        grace: seconds that a part may overrun its minutes before it is ended; its finished cells are kept.
    """
    results.mkdir(parents=True, exist_ok=True)
    path, end = results / "gpu_progress.json", clock() + 60 * minutes
    progress = read_progress(path)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with (results / "gpu_log.txt").open("a", encoding="utf-8") as log:
        for part in parts:
            left = (end - clock()) / 60
            if is_done(progress, part.name):
                continue
            if left < part.least:
                continue
            allowed = min(part.minutes or left, left)
            command = part.command(allowed)
            heading = f"== {part.name}: {' '.join(command[1:])}"
            print(heading, flush=True)
            print(heading, file=log, flush=True)
            started = clock()
            code = run_logged(command, log, environment, 60 * min(allowed + grace / 60, left))
            progress[part.name] = {
                "exit_code": code,
                "seconds": round(clock() - started, 1),
                "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            path.write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
            log.flush()
            if out is not None:
                copy_results(results, out)
    for part in parts:
        state = progress.get(part.name, {})
        words = {
            0: "done",
            GOAL_MISSED: "done; a goal is missed",
            AGAIN: "not finished",
            None: "not begun",
            -9: "out of time",
        }
        code = state.get("exit_code")
        print(f"{part.name:<16}{words.get(code, f'failed with exit code {code}')}")
    return 0 if all(is_done(progress, part.name) for part in parts) else AGAIN


def run_logged(command: list[str], log, environment: dict[str, str], seconds: float) -> int:
    """Runs a command with its output on the screen and in `log`; ended after `seconds`, with exit code -9."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    timer = threading.Timer(max(0.0, seconds), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        return process.wait()
    finally:
        timer.cancel()


def copy_results(results: Path, out: Path) -> None:
    """The newest eight files (no more come back), each whole."""
    files = sorted((file for file in results.iterdir() if file.is_file()), key=lambda file: -file.stat().st_mtime)
    for file in [file for file in files if file.suffix in (".json", ".png", ".txt")][:8]:
        shutil.copy2(file, out / file.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(part.name for part in PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing")
    args = parser.parse_args(arguments)
    unknown = set(args.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = tuple(part for part in PARTS if not args.parts or part.name in args.parts)
    if args.list:
        progress = read_progress(RESULTS / "gpu_progress.json")
        for part in parts:
            print(f"{part.name:<16}{'done' if is_done(progress, part.name) else 'open':<6}{part.about}")
        return 0
    out = os.environ.get("OUT")
    return run_parts(parts, args.minutes, RESULTS, Path(out) if out else None)


if __name__ == "__main__":
    sys.exit(main())
