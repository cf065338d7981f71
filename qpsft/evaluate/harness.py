"""Public benchmarks by lm-evaluation-harness (extra `eval`), on a model that is loaded already."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from qpsft.errors import DataError
from qpsft.evaluate.estimates import TWO_SIDED_95, Estimate, bootstrap_weights, ratio
from qpsft.evaluate.task_data import BENCHMARKS, SPLITS, benchmark_of, copy_of_hub, local_rows

SAME_VALUE = 1e-9
NAMES_SHOWN = 5
FOR_GROUPS = (
    "A group's data come from the Hub or its cache on this machine. A single task takes a local copy: --tasks TASK "
    "--task_data TASK=FOLDER. `lm_eval ls tasks` lists them."
)


class UnreachableError(DataError):
    """Rows that are neither local nor to be had from the Hub; the library's exception is its cause."""


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_data: Mapping[str, Path] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    samples: bool = False,
    train_prompts: Set[str] = frozenset(),
) -> dict[str, dict[str, Any]]:
    """Evaluates `model` on tasks of lm-evaluation-harness.

    Args:
        model: a causal LM of transformers, with or without adapters; left in the mode it was in.
        tasks: the harness's names, groups included (`gsm8k`, `truthfulqa_mc1`, `ifeval`, `mmlu`, `arc_easy`, …).
        task_data: local copies by benchmark (a key of `task_data.BENCHMARKS`) or by task. A benchmark's own files are
            read for these; for any other task a folder that `datasets.load_dataset` takes in place of the Hub id.
        num_fewshot: worked examples in the prompt; None: as each task has it.
        apply_chat_template: put the prompts through the tokenizer's chat template.
        max_new_tokens: length cap of completions; None: as each task has it.
        seed: of the few-shot examples and the bootstrap.
        samples: keep the harness's record of every row under `samples`.
        train_prompts: texts the model was trained on; rows with a field that is one of them are counted.

    Returns:
        task -> {"metrics": {name: Estimate}, "rows": number of rows} and, as asked for, "samples" and
        "duplicate_prompts". A metric's name is the harness's (`acc`, `exact_match,strict-match`); its interval is a
        bootstrap over rows, as in `evaluate`, or ± 1.96 of the harness's standard errors where the metric is not a mean
        over rows.

    Raises:
        DataError: the harness is not installed, unknown tasks (with near matches), data that is neither local nor
            reachable, or a length cap beyond the model's length.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task_data = dict(task_data or {})
    names = check_tasks(tasks, task_data)
    manager = _manager(tuple(names))
    was_training = model.training
    try:
        with _quiet(), _without_surroundings():
            language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            with explained(names, task_data):
                sources = [_task(name, task_data, manager) for name in names]
                results = simple_evaluate(
                    language_model,
                    tasks=sources,
                    task_manager=manager,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    apply_chat_template=apply_chat_template,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    bootstrap_iters=1000,
                    gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
                )
    finally:
        model.train(was_training)
    return {name: _tidy(name, results, seed, samples, train_prompts) for name in results["results"]}


def check_tasks(tasks: Sequence[str], task_data: Mapping[str, Path]) -> list[str]:
    """The tasks to run, a benchmark with local data being all its tasks. Takes no model.

    Raises:
        DataError: the harness is not installed, it has no such task, or a group is given a local copy.
    """
    names = _expand(tasks, task_data)
    manager = _manager(tuple(names))
    _check_names(names, task_data, manager.all_tasks)
    for name in names:
        if name in task_data and _is_group(name, manager):
            raise DataError(f"--task_data {name}: {name} is a group of tasks, each with its own data.", FOR_GROUPS)
    return names


def read_rows(task: str, task_data: Mapping[str, Path]) -> None:
    """Reads a task's rows once, those of the Hub into its cache. Takes no model.

    Raises:
        DataError: they cannot be read; UnreachableError: from nowhere.
    """
    manager = _manager((task,))
    with _quiet(), explained([task], task_data):
        manager.load(_task(task, task_data, manager))


@functools.cache
def _manager(names: tuple[str, ...]) -> Any:
    """The harness's index of its tasks: of the folders that bear the names, where these hold them all.

    Groups and tags are looked up in the whole, for which it takes 12 s: their tasks may lie in any folder.
    """
    try:
        from lm_eval import tasks
    except ImportError as error:
        raise not_installed() from error
    folders = [
        folder
        for folder in Path(tasks.__file__).parent.iterdir()
        if folder.is_dir() and any(name == folder.name or name.startswith(f"{folder.name}_") for name in names)
    ]
    with _quiet():
        few = tasks.TaskManager(include_path=folders, include_defaults=False)
    return few if set(names) <= set(few.all_subtasks) else _whole_index()


@functools.cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


def not_installed() -> DataError:
    """The harness, or what IFEval needs beside it, cannot be imported."""
    return DataError(
        "Benchmarks run through lm-evaluation-harness, which is not installed.",
        "pip install '.[eval]' in qpsft's folder, or pip install 'lm-eval[ifeval]'.",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only the harness's errors; it logs its settings as warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_surroundings() -> Iterator[None]:
    """The harness asks pip for all that is installed, which takes a second, and git for the current folder's commit.

    Where that is no repository, git complains on the terminal.
    """
    from lm_eval import evaluator

    asks = {name: getattr(evaluator, name) for name in ("get_git_commit_hash", "add_env_info")}
    for name in asks:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, ask in asks.items():
            setattr(evaluator, name, ask)


def _expand(tasks: Sequence[str], task_data: Mapping[str, Path]) -> list[str]:
    """A benchmark with local data becomes its usual tasks, though the harness may have a group of that name."""
    names: list[str] = []
    for task in tasks:
        is_group = task in BENCHMARKS and task in task_data and task not in BENCHMARKS[task].tasks
        names += BENCHMARKS[task].tasks if is_group else [task]
    return list(dict.fromkeys(names))


def _check_names(names: Sequence[str], task_data: Mapping[str, Path], known: Sequence[str]) -> None:
    every = set(known)
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, known, n=NAMES_SHOWN)
            near += [other for other in sorted(known) if other.startswith(name) and other not in near]
            raise DataError(
                f"lm-evaluation-harness has no task {name!r}.",
                f"Did you mean {', '.join(near[:NAMES_SHOWN])}?" if near else "`lm_eval ls tasks` lists them all.",
            )
    wanted = {*names, *filter(None, map(benchmark_of, names))}
    for name in task_data:
        if name not in wanted:
            raise DataError(
                f"--task_data names {name}, but none of the tasks ({', '.join(names)}) uses it.",
                f"Add it to --tasks, or name one of these or a benchmark: {', '.join(BENCHMARKS)}.",
            )


def _task(name: str, task_data: Mapping[str, Path], manager: Any) -> Any:
    """What the harness takes: the task's name, or the same task with another source of its rows."""
    benchmark = benchmark_of(name)
    path = task_data.get(name) or task_data.get(benchmark or "")
    if path is None:
        return name

    def build(source: dict[str, Any]) -> Any:
        # A dict given to `TaskManager.load` would be a whole new task, not this one with another source.
        return manager._factory.build(manager.task_index[name], overrides=source, registry=manager.task_index)

    if benchmark is None or (path.is_dir() and BENCHMARKS[benchmark].is_one_file):
        with _copy_explained(name, path):
            return build(copy_of_hub(path))
    return build({"custom_dataset": local_rows(benchmark, path), "dataset_kwargs": {}})


@contextlib.contextmanager
def _copy_explained(name: str, path: Path) -> Iterator[None]:
    """Turns any exception that a user's copy of a data set causes into a DataError that names the copy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        split = isinstance(error, KeyError) and error.args and error.args[0] in SPLITS
        what = f"there is no split {error.args[0]!r}" if split else f"{type(error).__name__}: {error}"
        raise DataError(
            f"--task_data {name}: {path} is not this task's data: {' '.join(what.split())[:200]}.",
            "Give a folder with what the Hub's data set has: a file for each split, those of the worked examples "
            f"included ({', '.join(f'{split}.jsonl' for split in SPLITS)}), with the same columns.",
        ) from error


def _is_group(name: str, manager: Any) -> bool:
    return name in manager.all_groups or name in manager.all_tags


@contextlib.contextmanager
def explained(names: Sequence[str], task_data: Mapping[str, Path]) -> Iterator[None]:
    """Turns the libraries' exceptions about data they cannot read into DataErrors that say what to do."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ConnectionError, DatasetsError, FileNotFoundError) as error:
        raise unreachable(names, task_data, error) from error
    except ValueError as error:
        if not str(error).startswith(("BuilderConfig", "Couldn't find cache")):  # the cache has another configuration
            raise
        raise unreachable(names, task_data, error) from error
    except AssertionError as error:
        if "no documents available" in str(error):
            raise DataError(
                "The local rows are test rows only, and --num_fewshot needs worked examples.",
                "Give a folder like the Hub data set, with train.jsonl too, or leave --num_fewshot out.",
            ) from error
        if "max tokens to generate" not in str(error):
            raise
        raise DataError(str(error), "Give a smaller --max_new_tokens.") from error
    except LookupError as error:
        if "nltk" not in str(error).lower():
            raise
        raise DataError(
            "ifeval counts sentences with NLTK's data punkt_tab, which is not on this machine.",
            "Run `python -m nltk.downloader punkt_tab` where there is a network, and copy ~/nltk_data here.",
        ) from error


def unreachable(names: Sequence[str], task_data: Mapping[str, Path], error: BaseException) -> UnreachableError:
    """The error about tasks whose rows are nowhere: those without local data, and what to give instead."""
    missing = [name for name in names if name not in task_data and benchmark_of(name) not in task_data] or names
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    files = {name: benchmark.files for name, benchmark in BENCHMARKS.items()}
    groups = [name for name in missing if benchmark_of(name) is None and _is_group(name, _manager(tuple(names)))]
    single = dict.fromkeys(benchmark_of(name) or name for name in missing if name not in groups)
    todo = []
    if single:
        flag = f"--task_data {' '.join(f'{name}=PATH' for name in single)}"
        kinds = [f"{name} is {files.get(name, 'a folder like the Hub data set')}" for name in single]
        todo = [f"Give a local copy: {flag}. Of these, {'; '.join(kinds)}."]
    return UnreachableError(
        f"The data of {', '.join(missing)} could not be read from the Hub{offline}: "
        f"{' '.join(str(error).split())[:200].rstrip('.')}.",
        " ".join(todo + ([FOR_GROUPS] if groups else [])),
    )


def _tidy(name: str, results: Mapping[str, Any], seed: int, samples: bool, train_prompts: Set[str]) -> dict[str, Any]:
    """The harness's flat result, `{"acc,none": .5, "acc_stderr,none": .1, …}`, as estimates."""
    record = results["results"][name]
    by_row = results.get("samples", {}).get(name, [])
    metrics = {}
    for key, value in record.items():
        metric, separator, filtered = key.partition(",")
        if separator and not metric.endswith("_stderr") and isinstance(value, int | float):
            rows = [row[metric] for row in by_row if row["filter"] == filtered and metric in row]
            error = record.get(f"{metric}_stderr,{filtered}")
            metrics[metric if filtered == "none" else key] = _estimate(float(value), rows, error, seed)
    tidy = {"metrics": metrics, "rows": results.get("n-samples", {}).get(name, {}).get("effective")}
    if train_prompts:
        seen = {row["doc_id"] for row in by_row if any(text in train_prompts for text in _texts(row["doc"]))}
        tidy["duplicate_prompts"] = len(seen)
    return tidy | {"samples": by_row} if samples else tidy


def _texts(doc: Mapping[str, Any]) -> list[str]:
    return [value.strip() for value in doc.values() if isinstance(value, str)]


def _estimate(value: float, rows: list[Any], error: Any, seed: int) -> Estimate:
    if rows and all(isinstance(row, int | float | np.number) for row in rows):
        values = np.array(rows, dtype=float)
        if abs(values.mean() - value) < SAME_VALUE:
            return ratio(values, np.ones(len(values)), bootstrap_weights(len(values), seed))
    if isinstance(error, int | float):
        return Estimate(value, value - TWO_SIDED_95 * error, value + TWO_SIDED_95 * error)
    return Estimate(value)
