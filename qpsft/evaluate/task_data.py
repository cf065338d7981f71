"""Local copies of public benchmarks, in the form the tasks of lm-evaluation-harness expect from the Hub.

The tasks themselves (prompts, few-shot examples, metrics) stay the harness's own; only the source of their rows is
replaced, so that a local copy gives the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpsft.data.read import read_records
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

SPLITS = ("train", "validation", "dev", "test")
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(?:-\d+-of-\d+)?\.(?:jsonl|json|csv|parquet)")


@dataclass(frozen=True)
class LocalBenchmark:
    """A benchmark qpsft can read from plain files.

    Attributes:
        tasks: the harness's tasks on this data.
        read: path -> rows by split.
        files: what the path must be, for help and errors.
        is_one_file: whether `read` takes a file only, and a folder is a copy of the Hub's.
    """

    tasks: tuple[str, ...]
    read: Callable[[Path], dict[str, list[dict]]]
    files: str
    is_one_file: bool = False


def _read_gsm8k(path: Path) -> dict[str, list[dict]]:
    test = path / "test.jsonl" if path.is_dir() else path
    train = test.with_name("train.jsonl")
    if not train.exists():
        raise DataError(
            f"{train} is missing: the GSM8K tasks take their worked examples from the training split.",
            "Put train.jsonl beside test.jsonl (https://github.com/openai/grade-school-math).",
        )
    return {"train": _records(train, "question", "answer"), "test": _records(test, "question", "answer")}


def _read_truthfulqa(path: Path) -> dict[str, list[dict]]:
    path = path / "TruthfulQA.csv" if path.is_dir() else path
    rows = _records(path, "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    return {"validation": [_truthfulqa_row(row) for row in rows]}


def _truthfulqa_row(row: dict) -> dict:
    """MC1: the best answer against the incorrect ones; MC2: all correct ones against them; the correct ones first."""
    best, correct, incorrect = (
        [text.strip() for text in row[column].split(";") if text.strip()]
        for column in ("Best Answer", "Correct Answers", "Incorrect Answers")
    )
    return {
        "question": row["Question"].strip(),
        "best_answer": row["Best Answer"].strip(),
        "correct_answers": correct,
        "incorrect_answers": incorrect,
        "mc1_targets": _targets([row["Best Answer"].strip()] if best else [], incorrect),
        "mc2_targets": _targets(correct, incorrect),
    }


def _targets(right: list[str], wrong: list[str]) -> dict[str, list]:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


def _read_ifeval(path: Path) -> dict[str, list[dict]]:
    path = path / "input_data.jsonl" if path.is_dir() else path
    return {"train": _records(path, "key", "prompt", "instruction_id_list", "kwargs")}


def _reader_of_choices(question: str) -> Callable[[Path], dict[str, list[dict]]]:
    """A reader of one file of test rows: `{query, choices, gold}`, or the Hub's columns with the question's name."""

    def read(path: Path) -> dict[str, list[dict]]:
        rows = read_records(str(path), DataArguments()).records
        if "query" in rows[0]:
            rows = _records(path, "query", "choices", "gold")
            rows = [_choices_row(row, question, f"{path}, row {i + 1}") for i, row in enumerate(rows)]
        else:
            rows = _records(path, question, "choices", "answerKey")
        return {"train": [], "validation": [], "test": rows}

    return read


def _choices_row(row: dict, question: str, where: str) -> dict:
    """`{query, choices: [text, …], gold: index}` in the Hub's columns."""
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or gold not in range(len(choices)):
        raise DataError(
            f"{where}: choices must be a list of texts and gold the index of the right one.", "Mend that row."
        )
    return {
        question: row["query"].removeprefix("Question: "),
        "choices": {"text": choices, "label": [str(number) for number in range(len(choices))]},
        "answerKey": str(gold),
    }


def _records(path: Path, *columns: str) -> list[dict]:
    records = read_records(str(path), DataArguments())
    for index, row in enumerate(records.records):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"{records.where(index)} lacks {', '.join(missing)}; it has {', '.join(row)}.",
                "Give the benchmark's original file.",
            )
    return records.records


FILE_OR_FOLDER = "a file of rows with query, choices and gold, or a folder like the Hub data set"
BENCHMARKS = {
    "gsm8k": LocalBenchmark(
        ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot", "gsm8k_cot_llama", "gsm8k_cot_self_consistency"),
        _read_gsm8k,
        "a folder with train.jsonl and test.jsonl",
    ),
    "truthfulqa": LocalBenchmark(
        ("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"), _read_truthfulqa, "TruthfulQA.csv"
    ),
    "ifeval": LocalBenchmark(("ifeval",), _read_ifeval, "input_data.jsonl"),
    "arc_easy": LocalBenchmark(("arc_easy",), _reader_of_choices("question"), FILE_OR_FOLDER, True),
    "arc_challenge": LocalBenchmark(("arc_challenge",), _reader_of_choices("question"), FILE_OR_FOLDER, True),
    "openbookqa": LocalBenchmark(("openbookqa",), _reader_of_choices("question_stem"), FILE_OR_FOLDER, True),
}


def benchmark_of(task: str) -> str | None:
    """The key of `BENCHMARKS` whose data a task uses."""
    return next((name for name, benchmark in BENCHMARKS.items() if task in benchmark.tasks or task == name), None)


def used_by(tasks: Iterable[str], task_data: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the local copies that some tasks use, by task or by benchmark."""
    names = {name for task in tasks for name in (task, benchmark_of(task))}
    return {name: path for name, path in task_data.items() if name in names}


def parse_task_data(pairs: list[str]) -> dict[str, Path]:
    """`["gsm8k=PATH", …]` -> {name: path}.

    Raises:
        DataError: not NAME=PATH, or no such path.
    """
    paths = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        path = Path(text).expanduser()
        if not separator or not name or not text:
            raise DataError(f"--task_data {pair!r} is not NAME=PATH.", "For instance gsm8k=data/gsm8k.")
        if not path.exists():
            raise DataError(f"--task_data {name}: there is no {path}.", "Check the path.")
        paths[name] = path
    return paths


def local_rows(benchmark: str, path: Path) -> Callable[..., Any]:
    """A `custom_dataset` for the harness that reads `path`."""
    splits = BENCHMARKS[benchmark].read(path)

    def load(**unused: Any) -> Any:
        import datasets

        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    return load


def copy_of_hub(path: Path) -> dict[str, Any]:
    """What replaces a task's Hub id by a local folder.

    The task's configuration (`ARC-Easy`, `anatomy`) is kept if the folder is a clone of the Hub's, whose README
    declares it; a folder of plain files has no configurations.

    Raises:
        DataError: the path is a file.
    """
    import datasets

    if path.is_file():
        raise DataError(
            f"{path} is a file, and a copy of a Hub data set is a folder.",
            f"Put it there as one of {', '.join(f'{split}.jsonl' for split in SPLITS)}.",
        )
    source: dict[str, Any] = {"dataset_path": str(path)}
    if set(datasets.get_dataset_config_names(str(path))) != {"default"}:
        return source
    source["dataset_name"] = None
    files: dict[str, list[str]] = {}
    for file in sorted(path.iterdir()):
        if match := _SPLIT_FILE.fullmatch(file.name):
            files.setdefault(match[1], []).append(file.name)
    if "dev" in files:  # `datasets` takes a dev file for validation, but MMLU's tasks ask for a split dev
        files.setdefault("validation", files["dev"])
        source["dataset_kwargs"] = {"data_files": files}
    return source
