"""How soon `qpsft train` takes its first optimizer step, and what it holds by then: many rows, and one very long row.

    python benchmarks/many_rows.py --rows 20000 500000

Rows are chats of one question and one answer, 200 tokens by the base's tokenizer; the long row has --megabytes of text
and is cut at 128 tokens. Each run is a process of its own, watched from outside: seconds by the clock until the first
line of metrics.jsonl, processor seconds of it and its workers until its end, and resident memory of all of them
together at its peak (pages that they share count once for each). Beside it: how busy the machine was with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import RESULTS, Results, environment
from transformers import AutoTokenizer

from qpsft.model.folder import MODEL_DIR

TOKENS, LONG_ROW_TOKENS = 200, 128
WORDS = """the of people number station question answer train because water light seven morning river carry system small
window never yellow between nothing paper garden simple engine first travel music summer letter doctor""".split()
EVERY = 0.5
"""Seconds between two looks at the memory."""


def text(words: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


def chat(words: int, rng: random.Random) -> dict[str, list]:
    """A question of a third of the words, and an answer."""
    turns = (("user", text(words // 3, rng)), ("assistant", text(words - words // 3, rng)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def words_for(tokens: int, tokenizer: Any) -> int:
    """How many words a chat must have to be about so many tokens long."""
    rng = random.Random(1)

    def length(words: int) -> float:
        chats = [tokenizer.apply_chat_template(chat(words, rng)["messages"], tokenize=False) for _ in range(50)]
        return sum(map(len, tokenizer(chats, add_special_tokens=False)["input_ids"])) / len(chats)

    short, long = length(30), length(60)
    return round(30 + (tokens - short) * 30 / (long - short))


def write_rows(path: Path, rows: int, words: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            file.write(json.dumps(chat(words, rng)) + "\n")


def first_step(model: str, rows: Path, max_length: int, folder: Path) -> dict[str, Any]:
    """Trains one step, and measures it from outside."""
    command = [
        sys.executable, "-m", "qpsft", "train", f"--model_name_or_path={model}", f"--dataset_name={rows}",
        f"--output_dir={folder}", f"--max_length={max_length}", "--max_steps=1", "--logging_steps=1",
        "--per_device_train_batch_size=4", "--gradient_accumulation_steps=2",
    ]  # fmt: skip
    metrics, log = folder / "metrics.jsonl", folder.with_suffix(".log")
    before, busy, started = resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds(), time.perf_counter()
    seconds, peak, processes = None, 0, 0
    with log.open("w") as said:
        run = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while run.poll() is None:
            held = resident(psutil.Process(run.pid))
            peak, processes = max(peak, sum(held)), max(processes, len(held))
            if seconds is None and metrics.is_file() and metrics.stat().st_size:
                seconds = time.perf_counter() - started
            time.sleep(EVERY)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    elapsed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds_to_first_step": round(seconds or elapsed, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(peak / 1e6),
        "processes": processes,
        "busy_cores_of_others": round((busy_seconds() - busy - cpu) / elapsed, 2),
    }


def resident(process: psutil.Process) -> list[int]:
    """Bytes of a process and of those that it has started."""
    held = []
    try:
        for one in (process, *process.children(recursive=True)):
            held.append(one.memory_info().rss)
    except psutil.Error:  # it has just ended
        pass
    return held


def busy_seconds() -> float:
    """Processor seconds that this machine has worked, on all cores together."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000, 500_000], help="data sets of so many rows")
    parser.add_argument("--megabytes", type=int, default=50, help="of the long row; 0: none")
    parser.add_argument("--model", default="demo", help="the base")
    parser.add_argument("--folder", type=Path, help="where the rows are written (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS / "many_rows.json")
    arguments = parser.parse_args()
    results = Results(arguments.results, environment("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if arguments.model == "demo" else arguments.model)
    words = words_for(TOKENS, tokenizer)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="many-rows-") as temporary:
        place = Path(temporary)
        for rows in arguments.rows:
            write_rows(place / "rows.jsonl", rows, words)
            cell = first_step(arguments.model, place / "rows.jsonl", 1024, place / f"run{rows}")
            keep(results, f"{rows} rows of {TOKENS} tokens, {os.path.basename(arguments.model)}", cell)
        if arguments.megabytes:
            answer = "word " * (arguments.megabytes * 200_000)
            (place / "long.jsonl").write_text(json.dumps({"prompt": "?", "completion": answer}) + "\n")
            cell = first_step(arguments.model, place / "long.jsonl", LONG_ROW_TOKENS, place / "run-long")
            keep(results, f"one row of {arguments.megabytes} MB, {os.path.basename(arguments.model)}", cell)


def keep(results: Results, key: str, cell: dict[str, Any]) -> None:
    results.add(key, cell)
    print(f"{key}: {json.dumps(cell)}", flush=True)


if __name__ == "__main__":
    main()
