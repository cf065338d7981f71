"""`qpsft evaluate`: a model or an adapter, loaded once, on data sets and public benchmarks; a table and a JSON file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from qpsft import __version__
from qpsft.data import built_in
from qpsft.data.read import BUILT_IN
from qpsft.data.shapes import Rows
from qpsft.errors import DataError, OutputError
from qpsft.evaluate.estimates import Estimate
from qpsft.evaluate.evaluation import MAX_NEW_TOKENS, Evaluation, evaluate
from qpsft.evaluate.harness import check_tasks, run_tasks
from qpsft.evaluate.keep import BUILT_IN_ROWS, Gate, Kept, judge
from qpsft.evaluate.model import (
    base_name_of,
    describe_evaluated,
    is_adapter,
    load_evaluated,
    prompt_arguments,
    trained_options,
    usual_quantization,
)
from qpsft.evaluate.options import EvaluationOptions
from qpsft.evaluate.rows import as_rows, load_evaluation_rows
from qpsft.evaluate.task_data import parse_task_data, used_by
from qpsft.evaluate.verifiers import text_of
from qpsft.files import write_atomically
from qpsft.model.adapter import adapter_off
from qpsft.model.base import load_base
from qpsft.model.folder import DEMO, resolve_folder
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.sources import mix_sources
from qpsft.terminal import wrap

DEMO_IN_DOMAIN_ROWS = 200
SHOWN = (
    ("nll", "NLL of the reference, nats per token", ".3f"),
    ("mean_token_accuracy", "its tokens that are the most likely one", ".1%"),
    ("entropy", "entropy along the reference, nats per token", ".3f"),
    ("accuracy", "right, greedy", ".1%"),
    ("accuracy_per_token", "right, by likelihood per token", ".1%"),
    ("pass@1", "samples right (pass@1)", ".1%"),
    ("pass@k", "at least one of {k} samples right", ".1%"),
    ("sample_entropy", "entropy along the samples, nats per token", ".3f"),
    ("length", "length of a sample, tokens", ".1f"),
    ("length_capped", "samples cut off at {max_new_tokens} tokens", ".1%"),
    ("greedy_length_capped", "greedy completions cut off there", ".1%"),
    ("kl_samples", "KL from the base on samples, nats per token", ".3f"),
    ("kl_text", "KL from the base on the reference, nats per token", ".3f"),
)


@dataclass
class EvaluationReport:
    """An `Evaluation` per data set, the harness's results per task, and with --keep what was `kept`."""

    model: str
    evaluations: list[Evaluation]
    tasks: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    kept: Kept | None = None

    def to_dict(self, *, completions: bool = False) -> dict[str, Any]:
        """For JSON."""
        return {
            "qpsft_version": __version__,
            "model": self.model,
            "settings": self.settings,
            "data": {one.name: one.to_dict(completions=completions) for one in self.evaluations},
            "tasks": {
                name: {**task, "metrics": {metric: asdict(value) for metric, value in task["metrics"].items()}}
                for name, task in self.tasks.items()
            },
            "seconds": self.seconds,
        } | ({"keep": self.kept.to_dict()} if self.kept else {})

    def table(self) -> str:
        """For the terminal: a block per data set, one line per metric, each with its 95 % interval."""
        blocks = [_block(one) for one in self.evaluations]
        for name, task in self.tasks.items():
            lines = [_line(metric, estimate, ".4g") for metric, estimate in task["metrics"].items()]
            if "duplicate_prompts" in task:
                lines.insert(0, f"  {task['duplicate_prompts']} of its rows have a training row's prompt")
            rows = f" · {task['rows']} rows" if task["rows"] else ""
            blocks.append("\n".join([f"{name}{rows} (lm-evaluation-harness)", *lines]))
        if blocks:
            blocks.append("[…]: 95 % bootstrap interval over rows. docs/metrics.md defines every number.")
        return "\n\n".join([*blocks, *([self.kept.table()] if self.kept else [])])


def run_evaluation(options: EvaluationOptions) -> EvaluationReport:
    """Loads the model once and evaluates it on everything asked for.

    Raises:
        QpsftError: the model, the data or the tasks cannot be used; the JSON file cannot be written.
    """
    started = time.perf_counter()
    inputs = _read_inputs(options)
    gate = inputs.gate
    compares_whole = gate is not None and not is_adapter(options.model)
    base_scores = _scores_of_whole_base(gate, options) if compares_whole else None
    model, tokenizer = load_evaluated(
        options.model,
        base=None if compares_whole else options.base,
        quantization=options.quantization,
        dtype=options.dtype,
        device=options.device,
    )
    print(wrap(f"evaluating {options.model} · {describe_evaluated(model)}", "  "), flush=True)
    evaluations = [_evaluate(model, tokenizer, rows, inputs, options) for rows in inputs.sets]
    tasks = _run_tasks(model, tokenizer, inputs, options) if options.tasks else {}
    kept = _kept(gate, model, tokenizer, base_scores) if gate is not None else None
    seconds = time.perf_counter() - started
    report = EvaluationReport(options.model, evaluations, tasks, asdict(options), seconds, kept)
    if options.json is not None:
        write_json(Path(options.json), report.to_dict(completions=options.completions))
    return report


@dataclass
class _Inputs:
    """What is read and checked before the model is loaded.

    Attributes:
        train_rows: what the model was trained on, if it is known and here.
        task_data: benchmark -> its local copy.
        gate: of --keep.
    """

    arguments: DataArguments
    sets: list[Rows]
    train_rows: list[dict] | None
    task_data: dict[str, Path]
    gate: Gate | None


def _read_inputs(options: EvaluationOptions) -> _Inputs:
    folder = Path(options.model).expanduser()
    recipe = trained_options(folder)
    arguments = prompt_arguments(
        folder,
        use_chat_template=options.use_chat_template,
        prompt_format=options.prompt_format,
        dataset_config=options.dataset_config,
        dataset_columns=options.dataset_columns,
    )
    names = options.data or [name for name in [recipe.get("dataset_name")] if name in BUILT_IN and not options.keep]
    if not names and not options.tasks and not options.keep:
        raise DataError("There is nothing to evaluate on.", "Give --data FILE, --tasks NAME or --keep.")
    task_data = parse_task_data(options.task_data)
    gate = _prepare_gate(options, task_data) if options.keep else None
    of_tasks = {name: path for name, path in task_data.items() if gate is None or name not in gate.task_data}
    of_tasks |= used_by(options.tasks, task_data)
    if options.tasks:
        check_tasks(options.tasks, of_tasks)
    elif of_tasks:
        raise DataError(
            f"--task_data names {', '.join(of_tasks)}, which --keep does not ask.",
            f"Its skills are {', '.join(gate.skills)}.",
        )
    sets = list(_data_sets(names, arguments, options))
    train_rows = _train_rows(options, recipe, arguments) if names or options.tasks else None
    if options.json is not None:
        _check_writable(Path(options.json))
    return _Inputs(arguments, sets, train_rows, of_tasks, gate)


def _prepare_gate(options: EvaluationOptions, task_data: dict[str, Path]) -> Gate:
    base = base_name_of(options.model, options.base)
    if base is None:
        raise DataError(
            f"{options.model} is not an adapter's folder, so --keep has no base to compare it with.",
            "Check the path; of a whole model, give the one that it was tuned from: --base MODEL.",
        )
    if not is_adapter(options.model):  # one is measured before the other is loaded, which may take hours
        for name in (options.model, options.base):
            resolve_folder(name)
    return Gate.prepare(options, task_data, is_demo=base == DEMO)


def _scores_of_whole_base(gate: Gate, options: EvaluationOptions) -> dict[str, np.ndarray]:
    """The scores of `--base` for a model without adapter. It is loaded as the model is, and gone afterwards."""
    quantization = options.quantization or usual_quantization(Path(options.model).expanduser())
    model, tokenizer = load_base(
        options.base, quantization=quantization, dtype=options.dtype, device=options.device, verbose=False
    )
    return gate.scores(model, tokenizer, f"the base, {options.base}")


def _kept(gate: Gate, model: Any, tokenizer: Any, base_scores: dict[str, np.ndarray] | None) -> Kept:
    base = "its base"
    if base_scores is None:
        base = "its base (adapter off)"
        with adapter_off(model):
            base_scores = gate.scores(model, tokenizer, "the base (adapter off)")
    return judge(gate, base, base_scores, gate.scores(model, tokenizer, "the tuned model"))


def _evaluate(model: Any, tokenizer: Any, rows: Rows, inputs: _Inputs, options: EvaluationOptions) -> Evaluation:
    is_built_in = "task" in rows.rows[0]
    return evaluate(
        model,
        tokenizer,
        rows,
        limit=options.limit,
        train_rows=inputs.train_rows,
        arguments=inputs.arguments,
        k=options.k,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens or (built_in.ANSWER_TOKENS if is_built_in else MAX_NEW_TOKENS),
        verifier=options.verifier,
        seed=options.seed,
        drift=not options.no_drift,
        drift_samples=options.drift_samples,
        batch_size=options.batch_size,
        progress=True,
    )


def _run_tasks(model: Any, tokenizer: Any, inputs: _Inputs, options: EvaluationOptions) -> dict[str, dict[str, Any]]:
    return run_tasks(
        model,
        tokenizer,
        options.tasks,
        task_data=inputs.task_data,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size or 8,
        seed=options.seed,
        train_prompts={text_of(row["prompt"]).strip() for row in inputs.train_rows or () if "prompt" in row},
    )


def _data_sets(names: Sequence[str], arguments: DataArguments, options: EvaluationOptions) -> Iterator[Rows]:
    if any(name in BUILT_IN for name in names):
        split = options.split
        if split not in ("test", "validation"):
            raise DataError(f"The built-in sets have no split {split!r}.", "Use --split test or --split validation.")
        yield as_rows(built_in.in_domain(split, DEMO_IN_DOMAIN_ROWS), "in_domain")
        for name, rows in built_in.out_of_domain(split, BUILT_IN_ROWS).items():
            yield as_rows(rows, name)
    for name in names:
        if name not in BUILT_IN:
            yield load_evaluation_rows(name, arguments, options.split)


def _train_rows(options: EvaluationOptions, recipe: dict[str, Any], arguments: DataArguments) -> list[dict] | None:
    """The rows the adapter was trained on, from --train_data or where its recipe says; None if they are not there."""
    if options.train_data is not None:
        return load_evaluation_rows(
            options.train_data, replace(arguments, dataset_name=options.train_data), "train"
        ).rows
    known = {one.name for one in fields(DataArguments)}
    trained = DataArguments(**{name: value for name, value in recipe.items() if name in known})
    if not (trained.dataset_name or trained.dataset_mix):
        return None
    rows = []
    for source in mix_sources(trained):
        name = source.data.dataset_name
        if name not in BUILT_IN and not Path(name).expanduser().exists():
            print(f"note: the training rows ({name}) are not here, so duplicates are not counted; --train_data does.")
            continue
        rows += load_evaluation_rows(name, source.data, source.data.dataset_train_split).rows
    return rows or None


def _block(one: Evaluation) -> str:
    counts, settings = one.counts, one.settings
    head = [f"{one.name} · {one.rows} rows"]
    if counts["dropped"]:
        head.append(f"{counts['dropped']} dropped (longer than the model)")
    if counts["truncated"]:
        head.append(f"{counts['truncated']} references cut where the model's context ends")
    if settings["verifier"]:
        head.append(f"verifier {settings['verifier']}")
    if "parsed" in counts:
        head.append(f"{counts['parsed']} of {counts['completions']} completions parsed")
    if settings.get("k"):
        head.append(f"{settings['k']} samples at temperature {settings['temperature']:g}")
    lines = [wrap(" · ".join(head))]
    if "duplicate_rows" in counts:
        lines.append(
            f"  {counts['duplicate_rows']} of its rows are exact duplicates of training rows, "
            f"{counts['duplicate_prompts']} of its prompts"
        )
    for metric, label, style in SHOWN:
        name = f"pass@{settings.get('k')}" if metric == "pass@k" else metric
        if name in one.metrics and not (metric == "pass@k" and settings["k"] == 1):
            if metric == "accuracy" and "accuracy_per_token" in one.metrics:
                label = "right, by likelihood"
            lines.append(_line(label.format(**settings), one.metrics[name], style))
    return "\n".join(lines)


def _line(label: str, estimate: Estimate, style: str) -> str:
    interval = "" if estimate.low is None else f"  [{estimate.low:{style}}, {estimate.high:{style}}]"
    return f"  {label:<50}{estimate.value:>9{style}}{interval}"


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"{path} cannot be written.", "Give --json a file name in a folder that exists.")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        OutputError: it cannot be written; what was there before is then untouched.
    """
    try:
        write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.", "Check the disk.") from error
