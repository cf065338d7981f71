"""The built-in evidence: what SFT, DFT and PSFT learn and keep on noisy and clean demonstrations, by the noise, and
beside SFT that is held near the base.

    python benchmarks/evidence.py                    all parts, two runs at a time
    python benchmarks/evidence.py noisy clean        some of them

Every run is kept in benchmarks/results/evidence/results as soon as it is done and never done again, so the command may
be killed at any time and repeated. Learning rates are chosen on validation rows. Each part writes comparison.json,
report.html, figures and summary.txt (the noise study noise.json) into a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

from qpsft.terminal import quiet_libraries

HERE = Path(__file__).resolve().parent
SHELF = HERE.parent / "adapters"
OUTPUT = HERE / "results" / "evidence"
ARMS = "sft,sft_matched,sft_blocks,dft,psft,psft_visits"
TUNED = {"arms": ARMS, "tune": True, "tune_seeds": 2, "seeds": 5}
PARTS = {
    "noisy": (SHELF / "demo-noisy", TUNED),
    "clean": (SHELF / "demo-clean", TUNED),
    "noise": (SHELF / "demo-noisy", {"tune": True, "tune_seeds": 1, "seeds": 5}),
    "stories": (
        HERE / "recipes" / "stories260k_gsm8k.yaml",
        {"arms": "sft,dft,psft,psft_visits", "seeds": 3},  # one rate for all, so that sft is sft_matched
    ),
    "anchored": (
        SHELF / "demo-noisy",
        {"arms": "sft,sft_kl,dft,psft_visits", "tune": True, "tune_seeds": 1, "learning_rates": [1e-3, 2e-3]}
        | {"seeds": 3, "k": 0},
    ),
}
CONSTANT_RATE = ["--lr_scheduler_type=constant_with_warmup"]
FLAGS = {**dict.fromkeys(("noisy", "clean", "noise", "stories"), CONSTANT_RATE), "anchored": ["--base_kl=0.3"]}
"""The first four have the rate of the time of their committed results; the default falls to 0 now, as in the fifth."""
NOISE = (0.0, 0.1, 0.3, 0.5)
"""Shares of wrong demonstrations in the part `noise`."""
RUNS = {"noisy": 66, "clean": 66, "noise": 67, "stories": 13, "anchored": 17}
"""At most, each, beside those of the parts before."""
SECONDS = {"noisy": 60, "clean": 60, "noise": 60, "stories": 110, "anchored": 60}
"""Of one run on an idle core of the machine in results/evidence/*/comparison.json."""


class Tee:
    """Writes to several files."""

    def __init__(self, *files: TextIO):
        self._files = files

    def write(self, text: str) -> None:
        for file in self._files:
            file.write(text)

    def flush(self) -> None:
        for file in self._files:
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    parts = options.parts or list(PARTS)
    quiet_libraries()  # before they are imported, here and in the worker processes
    options.output.mkdir(parents=True, exist_ok=True)
    minutes = sum(RUNS[part] * SECONDS[part] for part in parts) / options.jobs / 60
    kept = len(list((options.output / "results").glob("*/result.json")))
    with (options.output / "log.txt").open("a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(Tee(sys.stdout, log)):
            runs = f"at most {sum(RUNS[part] for part in parts)} runs, {kept} runs of all parts are kept"
            print(f"{', '.join(parts)}: {runs}; from nothing about {minutes:.0f} minutes on {options.jobs} idle cores")
            try:
                for part in parts:
                    do_part(part, options.output, options.jobs)
            except KeyboardInterrupt:
                sys.exit("Interrupted. Finished runs are kept: the same command goes on from here.")


def do_part(part: str, output: Path, jobs: int) -> None:
    """Does what is left of a part, and writes its outcome."""
    from noise_study import study_noise

    from qpsft.compare.comparison import compare_loaded
    from qpsft.compare.options import load_comparison
    from qpsft.compare.verdict import limits, render, verdict

    recipe, given = PARTS[part]
    if part == "stories" and not (HERE.parents[1] / "shared").is_dir():
        print("stories: left out, ../shared with stories260K and GSM8K is not here")
        return
    print(f"\n== {part}", flush=True)
    # relative: the records hold it, and nobody needs the maker's folders
    common = {"results_dir": os.path.relpath(output / "results"), "jobs": str(jobs)}
    flags = [f"--output_dir={os.path.relpath(output / part)}", *FLAGS[part]]
    loaded, options = load_comparison(recipe, flags, given | common)
    if part == "noise":
        summary = str(study_noise(loaded, options, NOISE))
    else:
        comparison = compare_loaded(loaded, options)
        summary = "\n".join([render(comparison), "", *verdict(comparison), *limits(comparison)])
    (output / part / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}", flush=True)


if __name__ == "__main__":
    main()
