"""The hand-over to PPO, run: TRL's PPO from the merged folders of SFT and PSFT adapters, in an environment of its own.

    python benchmarks/evidence.py noisy     first: each arm's learning rate comes from its comparison.json
    python benchmarks/ppo_start.py          two arms × 3 seeds

TRL 1.12 is the last release with PPO (`trl.experimental.ppo`) and qpsft needs a newer one, so the runs are programs of
a virtual environment that is made once, with the versions of constraints.txt else. What goes over is what
`qpsft merge` writes: a folder of safetensors, config, tokenizer and chat template. The prompts, the
reward and the test rows are those of rl_start.py, which does the same with GRPO; the adapters too, but for their
learning rate, which falls at the end as it does by default. Every run is kept, and never done again. See docs/rl.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import environment, make_environment

from qpsft.terminal import quiet_libraries

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "ppo_start"
ENVIRONMENT = Path.home() / ".cache" / "qpsft-ppo"
TRL = "1.12.0"
SMOOTHED = 5


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="sft,psft_visits", help="separated by commas (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=float, default=3e-5, help="of PPO (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=30, help="batches of prompts (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="prompts of a batch (default: %(default)s)")
    parser.add_argument("--test_rows", type=int, default=64, help="of each set (default: %(default)s)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="made if it is not there (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    return parser.parse_args(argv)


def make_ppo_environment(folder: Path) -> Path:
    """The Python of a virtual environment with TRL 1.12 and else the tested set."""
    tested = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in tested if not line.startswith("trl==")]
    return make_environment(folder, f"trl=={TRL}", "torch", constraints=others)


def write_rows(path: Path, test_rows: int) -> None:
    """Prompts to train on, and test rows of the task and of what the base could do, as JSON lines."""
    from rl_start import prompt_rows

    from qpsft.data import built_in

    sets = {"train": prompt_rows(), "in_domain": built_in.in_domain("test", test_rows)}
    sets |= built_in.out_of_domain("test", test_rows)
    lines = [
        json.dumps({"prompt": row["prompt"], "task": row["task"], "set": name}) + "\n"
        for name, rows in sets.items()
        for row in rows
    ]
    path.write_text("".join(lines), encoding="utf-8")


def merged_folders(options: argparse.Namespace) -> dict[str, dict[int, Path]]:
    """arm -> seed -> the merged folder of its adapter; what is not there is trained and merged."""
    import rl_start

    from qpsft.merge import merge_adapter

    flags = [f"--arms={options.arms}", f"--seeds={options.seeds}", f"--output={options.output}"]
    found = rl_start.arguments(flags)
    setting, specs = rl_start.load_evidence(found, rl_start.arm_rates(found))
    folders: dict[str, dict[int, Path]] = {}
    for arm, by_seed in specs.items():
        for seed, spec in by_seed.items():
            adapter = rl_start.trained_adapter(spec, setting, options.output)
            merged = options.output / "merged" / adapter.name
            if not merged.is_dir():
                print(f"{arm} seed {seed}: merging", flush=True)
                merged.parent.mkdir(exist_ok=True)
                merge_adapter(adapter, merged)
            folders.setdefault(arm, {})[seed] = merged
    return folders


def do_runs(options: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """arm -> seed -> what ppo_run.py wrote, with `seconds`; kept ones are read."""
    python = make_ppo_environment(options.environment)
    settings = {name: getattr(options, name) for name in ("learning_rate", "updates", "batch")}
    rows = options.output / "rows.jsonl"
    write_rows(rows, options.test_rows)
    from qpsft.data.built_in import ANSWER_TOKENS

    results: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, by_seed in merged_folders(options).items():
        for seed, folder in by_seed.items():
            told = "-".join(f"{value:g}" for value in settings.values())
            path = options.output / "results" / f"{folder.name}-ppo-{told}.json"
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                started, partial = time.perf_counter(), path.with_suffix(".partial")
                flags = [f"--{name}={value}" for name, value in settings.items()]
                command = [python, HERE / "ppo_run.py", folder, rows, partial, f"--seed={seed}", *flags]
                done = subprocess.run(
                    [*command, f"--max_new_tokens={ANSWER_TOKENS}"], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(f"PPO from {folder} failed:\n{done.stderr[-3000:]}")
                result = json.loads(partial.read_text()) | {"arm": arm, "seed": seed, "settings": settings}
                result |= {"seconds": round(time.perf_counter() - started, 1)}
                result |= {"environment": environment("cpu", ("benchmarks/ppo_start.py", *sys.argv[1:]))}
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                partial.unlink()
            results.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
            print(line_of(arm, seed, results[arm][seed]), flush=True)
    return results


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What the table shows of a run."""
    before, after = result["points"][0], result["points"][-1]
    rewards = [line["reward"] for line in result["log"]]
    return {
        "right before": before["right_sampled"],
        "mean reward": sum(rewards) / len(rewards),
        "right after": after["right_sampled"],
        "greedy": after["in_domain"],
        "out of domain before": before["out_of_domain"],
        "after": after["out_of_domain"],
    }


def line_of(arm: str, seed: int, result: Mapping[str, Any]) -> str:
    shown = " · ".join(f"{name} {value:.3f}" for name, value in numbers_of(result).items())
    return f"{arm:<12} seed {seed} · {shown} · {result['seconds']:.0f} s"


def report(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Means and standard deviations over seeds, and the arms' differences from the first, paired by seed."""
    from qpsft.compare.paired import mean_and_sd, paired_difference
    from qpsft.terminal import text_table

    numbers = {arm: {seed: numbers_of(one) for seed, one in runs.items()} for arm, runs in results.items()}
    names = list(next(iter(next(iter(numbers.values())).values())))
    rows = [["start", *names]]
    for arm, runs in numbers.items():
        pairs = [mean_and_sd([one[name] for one in runs.values()]) for name in names]
        rows.append([arm, *(f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}") for mean, sd in pairs)])
    first, *others = numbers
    for arm in others:
        sides = {name: [{s: one[name] for s, one in numbers[side].items()} for side in (arm, first)] for name in names}
        differences = [paired_difference(*sides[name]) for name in names]
        shown = [
            f"{one.mean:+.3f}" + ("" if one.half_width is None else f" ± {one.half_width:.3f}") for one in differences
        ]
        rows.append([f"{arm} − {first}", *shown])
    return text_table(rows)


def draw(results: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path) -> None:
    """The reward over the updates, smoothed: a thin line per seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (arm, runs) in enumerate(results.items()):
        lines = [smoothed([line["reward"] for line in one["log"]]) for one in runs.values()]
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=f"C{index}", linewidth=0.7, alpha=0.5)
        mean = [sum(at) / len(at) for at in zip(*lines, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color=f"C{index}", linewidth=2, label=arm)
    axes.set(xlabel="updates of PPO", ylabel=f"reward (mean of {SMOOTHED} updates)", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to four before it."""
    windows = [values[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    quiet_libraries()  # before they are imported
    import torch

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results = do_runs(options)
    table = report(results)
    print(f"\n{table}")
    (options.output / "summary.txt").write_text(table + "\n", encoding="utf-8")
    draw(results, options.output / "ppo_start.png")
    print(f"\n{options.output / 'summary.txt'}, ppo_start.png, results/")


if __name__ == "__main__":
    main()
