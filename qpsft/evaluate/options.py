"""The options of `qpsft evaluate`: each field is a flag, declared once."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any

from qpsft.errors import DataError


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationOptions:
    """What `qpsft evaluate` was asked for."""

    model: str = field(metadata={"help": "folder of an adapter or of a model, a Hub id, or demo"})
    data: list[str] = _option(
        [], "data sets with references: files, Hub ids, or demo-noisy for the built-in test sets", "DATA"
    )
    tasks: list[str] = _option(
        [], "public benchmarks by lm-evaluation-harness: gsm8k truthfulqa_mc1 ifeval mmlu arc_easy …", "TASK"
    )
    task_data: list[str] = _option([], "local copies of benchmarks: gsm8k=FOLDER truthfulqa=FILE …", "NAME=PATH")
    limit: int | None = _option(None, "only the first N rows of each data set and task", "N")
    seed: int = _option(0, "of the samples and the bootstrap", "N")
    k: int = _option(8, "completions sampled per prompt, for pass@k; 0: greedy only", "N")
    temperature: float = _option(1.0, "of the samples", "T")
    max_new_tokens: int | None = _option(
        None, "length cap of completions (256, the built-in sets 56; tasks have their own)", "N"
    )
    verifier: str = _option("auto", "auto, exact, last_number, gsm8k, math_verify, choice or demo", "NAME")
    no_drift: bool = _option(False, "do not measure the divergence from the base")
    drift_samples: int = _option(1, "samples per prompt the divergence is measured on", "N")
    batch_size: int | None = _option(None, "sequences at once (as many as fit; 8 for tasks)", "N")
    split: str = _option("test", "split of Hub data sets and of the built-in sets", "NAME")
    train_data: str | None = _option(
        None, "what it was trained on, to count duplicates (default: what the adapter's recipe names)", "DATA"
    )
    dataset_config: str | None = _option(None, "configuration of Hub data sets", "NAME")
    dataset_columns: dict | None = _option(None, "such as '{prompt: question, completion: answer}'")
    use_chat_template: str | None = _option(None, "auto, always or never (default: as in training)", "WHEN")
    prompt_format: str | None = _option(None, "text around a plain-string prompt (default: as in training)", "TEXT")
    num_fewshot: int | None = _option(None, "worked examples in a task's prompt (default: as the task has it)", "N")
    apply_chat_template: bool = _option(False, "put the tasks' prompts through the chat template")
    base: str | None = _option(None, "the adapter's base, if it is no longer where it was", "MODEL")
    quantization: str | None = _option(
        None, "nf4, fp4 or none for a model without adapter (nf4; none for a merged one)", "KIND"
    )
    dtype: str = _option("auto", "compute dtype of a model without adapter", "NAME")
    device: str = _option("auto", "cpu, cuda, …", "NAME")
    json: str | None = _option(None, "write all numbers to this file", "FILE")
    completions: bool = _option(False, "and every completion with its verdict")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("k", 0), ("max_new_tokens", 1), ("drift_samples", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"--{name} is {value}; it must be at least {least}.")
        if not 0 < self.temperature < math.inf:
            raise DataError(
                f"--temperature is {self.temperature}; it must be above 0 and finite.", "Greedy is always measured."
            )
        if self.seed < 0:
            raise DataError(f"--seed is {self.seed}; it must not be negative.")
        if self.use_chat_template not in (None, "auto", "always", "never"):
            raise DataError(f"--use_chat_template is {self.use_chat_template!r}.", "Use auto, always or never.")
        if not self.data and self.train_data and not self.tasks:
            raise DataError("--train_data is given without --data.", "Name what to evaluate on.")
        if self.task_data and not self.tasks:
            raise DataError("--task_data is given without --tasks.", "Name the tasks, such as --tasks gsm8k.")


def parse_options(argv: Sequence[str], program: str, description: str) -> EvaluationOptions:
    """Reads the flags; prints help and exits where argparse does.

    Raises:
        DataError: a value out of range.
    """
    parser = argparse.ArgumentParser(program, description=description)
    hints = typing.get_type_hints(EvaluationOptions)
    for one in fields(EvaluationOptions):
        if one.default is MISSING and one.default_factory is MISSING:
            parser.add_argument(one.name, help=one.metadata["help"])
            continue
        kind = hints[one.name]
        if isinstance(kind, UnionType):
            kind = next(part for part in kind.__args__ if part is not type(None))
        settings: dict[str, Any] = {"help": one.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            settings["action"] = "store_true"
        elif kind is dict:
            settings |= {"type": _mapping, "metavar": "MAPPING"}
        elif typing.get_origin(kind) is list:
            settings |= {"nargs": "+", "metavar": one.metadata["metavar"]}
        else:
            settings |= {"type": kind, "metavar": one.metadata["metavar"]}
        parser.add_argument(f"--{one.name}", **settings)
    given = vars(parser.parse_args(argv))
    if "tasks" in given:
        given["tasks"] = [name for text in given["tasks"] for name in text.split(",") if name]
    return EvaluationOptions(**given)


def _mapping(text: str) -> dict:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a mapping like '{prompt: question, completion: answer}'")
    return value
