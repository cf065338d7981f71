"""The rows of a comparison: to train on, to choose on (validation), to judge on (in-domain and out-of-domain)."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from qpsft.compare.options import CompareOptions
from qpsft.compare.results import is_accuracy
from qpsft.data import built_in
from qpsft.data.prompts import read_prompts
from qpsft.data.read import BUILT_IN, Records, read_records
from qpsft.data.shapes import Rows, read_rows
from qpsft.data.tokenize import tokenize_rows, writes_chat
from qpsft.errors import DataError, RecipeError
from qpsft.evaluate.rows import (
    INSTRUCTION_CHECKS,
    as_records,
    as_rows,
    duplicates,
    instruction_checks,
    with_references,
)
from qpsft.evaluate.verifiers import find_verifier
from qpsft.files import digest, write_atomically
from qpsft.model.folder import DEMO
from qpsft.model.generation import Completion, generate, stop_tokens
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.file import Recipe

BASE_SAMPLES, BASE_ANSWERS = "base_samples", "base_answers"
ANSWERED, REPLAYED = slice(0, None, 2), slice(1, None, 2)
"""Of the prompts that come with qpsft: those whose answers are measured, and those that arms may replay."""
SAMPLED_TEXTS = 128
SAMPLED_LENGTH = 192
SPLIT_SHARE = 0.1
OWN_SETS = ("train", "validation", "in_domain")


@dataclass
class ComparedData:
    """What every run of one data set trains and is evaluated on.

    Attributes:
        validation: rows that learning rates are chosen on.
        in_domain: test rows like the demonstrations.
        out_of_domain: test rows of other kinds, by set.
        metric: what is compared; as in `qpsft.compare.results.is_accuracy`.
        overlap: set -> `duplicate_rows` and `duplicate_prompts` that stand word for word among the training rows;
            `in_domain in validation` counts test rows among the validation rows.
        counts: rows by set.
        shortened: training rows that were `truncated` at max_length, and `dropped` because no token was supervised.
        key: hash of all rows and of the names of their sets.
    """

    name: str
    train: datasets.Dataset
    validation: Rows
    in_domain: Rows
    out_of_domain: dict[str, Rows]
    metric: str
    overlap: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    key: str = ""

    def sets(self) -> dict[str, Rows]:
        """Every evaluation set by name."""
        return {"validation": self.validation, "in_domain": self.in_domain, **self.out_of_domain}


def load_data(
    recipe: Recipe,
    options: CompareOptions,
    tokenizer: Any,
    *,
    noise: float | None = None,
    written: Mapping[str, list[dict]] | None = None,
) -> ComparedData:
    """Reads, splits and tokenizes the rows of a comparison.

    Args:
        noise: share of wrong demonstrations of a built-in set, instead of its own.
        written: what `base_written` returned, for those sets that `out_of_domain` names.

    Raises:
        DataError: as `load_rows`; too few rows to split. RecipeError: `noise` for other rows than the built-in ones,
            or a metric that a set cannot give.
    """
    name = recipe.data.dataset_name
    for option in ("dataset_mix", "streaming"):
        if getattr(recipe.data, option):
            raise RecipeError(
                f"qpsft compare cannot take {option}: its arms train on one source, read once.",
                f"Leave {option} out, or train each arm with `qpsft train` and measure it with `qpsft evaluate`.",
            )
    if not name:
        raise RecipeError("dataset_name is missing.", "Write `dataset_name: …` in the recipe or give --dataset_name.")
    kind = BUILT_IN.get(name)
    if noise is not None and kind is None:
        raise RecipeError(f"noise cannot be varied in {name}.", f"Use one of {', '.join(BUILT_IN)}.")
    if noise is None:
        records = read_records(name, recipe.data, recipe.data.dataset_train_split)
    else:
        made = built_in.demonstrations(kind, noise=noise)[: recipe.data.dataset_limit]
        records = as_records(made, f"{name}, {noise:.0%} wrong")
    test, validation, out_of_domain = _own_sets(kind, options)
    neutral = replace(recipe.data, dataset_columns=None, dataset_shape="auto", dataset_limit=None)
    if options.in_domain:
        test = _read(options.in_domain, recipe.data, neutral, options.eval_rows)
    if options.validation:
        validation = _read(options.validation, recipe.data, neutral, options.eval_rows)
    if test is None:
        records, test = _split_off(records, recipe.data, options.eval_rows, "in-domain test")
    if validation is None:
        records, validation = _split_off(records, recipe.data, options.eval_rows, "validation")
    rows = read_rows(records, recipe.data)
    if options.out_of_domain is not None:
        out_of_domain = {}
        for one in options.out_of_domain:
            label = _free_name(Path(one).stem, {*OWN_SETS, *out_of_domain})
            if one in (written or {}):
                out_of_domain[label] = as_rows(written[one][: options.out_of_domain_rows], one, neutral)
            elif one == INSTRUCTION_CHECKS:
                out_of_domain[label] = instruction_checks(options.out_of_domain_rows)
            else:
                out_of_domain[label] = _read(one, recipe.data, neutral, options.out_of_domain_rows)
    tokenized = tokenize_rows(rows, tokenizer, recipe.data, recipe.trainer.max_length)
    data = ComparedData(rows.name, tokenized.dataset, validation, test, out_of_domain, "")
    data.metric = _metric(options, data)
    data.counts = {"train": len(tokenized.dataset), **{label: len(one.rows) for label, one in data.sets().items()}}
    data.shortened = {
        "truncated": tokenized.counts.truncated,
        "dropped": sum(tokenized.counts.dropped.values()),
        "max_length": recipe.trainer.max_length,
    }
    data.overlap = {label: duplicates(rows.rows, one.rows) for label, one in data.sets().items()}
    data.overlap["in_domain in validation"] = duplicates(validation.rows, test.rows)
    data.key = _digest(
        [tokenized.dataset["input_ids"][:], tokenized.dataset["labels"][:]],
        *([label, one.rows] for label, one in data.sets().items()),
    )
    return data


def _own_sets(kind: str | None, options: CompareOptions) -> tuple[Rows | None, Rows | None, dict[str, Rows]]:
    """The built-in world's test and validation rows and its out-of-domain sets, for its own demonstrations."""
    if kind is None:
        return None, None, {}
    test = as_rows(built_in.in_domain("test", options.eval_rows), "in_domain")
    validation = as_rows(built_in.in_domain("validation", options.eval_rows), "validation")
    others = built_in.out_of_domain("test", options.out_of_domain_rows)
    return test, validation, {label: as_rows(rows, label) for label, rows in others.items()}


def _read(name: str, arguments: DataArguments, neutral: DataArguments, limit: int) -> Rows:
    """An evaluation set; the training rows' column names apply where it has such columns."""
    records = read_records(name, neutral, "test")
    columns = set(filter(None, (arguments.dataset_columns or {}).values()))
    alike = bool(columns) and columns <= set(records.columns)
    first = replace(_select(records, range(min(limit, len(records.records)))), name=Path(name).name)
    return with_references(first, arguments if alike else neutral)


def _split_off(records: Records, arguments: DataArguments, limit: int, what: str) -> tuple[Records, Rows]:
    """The records to train on, and rows to evaluate on, which keep the columns that verifiers need."""
    total = len(records.records)
    count = min(limit, int(total * SPLIT_SHARE))
    if not count:
        raise DataError(
            f"{records.name} has {total} rows, too few to set a tenth aside as {what} rows.",
            "Name a file with --in_domain and one with --validation.",
        )
    order = random.Random(f"qpsft compare: {what}").sample(range(total), total)
    aside = replace(_select(records, sorted(order[:count])), bad=[])  # these are reported with the rows to train on
    return _select(records, sorted(order[count:])), with_references(aside, arguments)


def _select(records: Records, indices: Sequence[int]) -> Records:
    return replace(
        records,
        numbers=[records.numbers[i] for i in indices],
        records=[records.records[i] for i in indices],
    )


def _free_name(name: str, taken: Container[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _metric(options: CompareOptions, data: ComparedData) -> str:
    """What to compare. Accuracy needs answers that can be checked: an exact match of free text says nothing."""
    if options.metric == "auto":
        inside = _is_checkable(data.in_domain, options.verifier)
        others = data.out_of_domain.values()
        outside = (
            all(_is_checkable(rows, set_verifier(options.verifier, rows)) for rows in others) if others else inside
        )
        return {(1, 1): "accuracy", (1, 0): "mixed", (0, 1): "nll_accuracy", (0, 0): "nll"}[inside, outside]
    sets = {"in_domain": data.in_domain} | {
        f"out_of_domain/{label}": rows for label, rows in data.out_of_domain.items()
    }
    plain = [name for name, rows in sets.items() if is_accuracy(name, options.metric) and "text" in rows.rows[0]]
    if plain:
        other = "nll" if "in_domain" in plain else "mixed"
        name = plain[0].rpartition("/")[2].replace("in_domain", "in-domain")
        raise RecipeError(f"{name} is plain text, which has no accuracy.", f"Use --metric {other}.")
    return options.metric


def _is_checkable(rows: Rows, verifier: str) -> bool:
    if "text" in rows.rows[0]:
        return False
    name, _ = find_verifier(verifier, rows.rows, rows.name, rows.places)
    return verifier != "auto" or name != "exact"


def set_verifier(asked: str, rows: Rows) -> str:
    """An out-of-domain set's verifier: the comparison's, unless the set has one of its own, or it can read none of the
    set's references."""
    if {"checks", "ids"} & rows.rows[0].keys():
        return "auto"
    if asked != "auto" and "text" not in rows.rows[0]:
        try:
            find_verifier(asked, rows.rows, rows.name, rows.places)
        except DataError:
            return "auto"
    return asked


def kept_by_default(recipe: Recipe, tokenizer: Any) -> list[str] | None:
    """What a comparison measures out of domain if nothing is named; None: what the built-in world has."""
    if recipe.data.dataset_name in BUILT_IN or recipe.model.model_name_or_path == DEMO:
        return None
    return [INSTRUCTION_CHECKS, BASE_ANSWERS] if answers_prompts(recipe, tokenizer) else [BASE_SAMPLES]


def answers_prompts(recipe: Recipe, tokenizer: Any) -> bool:
    """Whether the base can be asked the prompts that come with qpsft, which are questions to an assistant."""
    return recipe.model.model_name_or_path != DEMO and writes_chat(tokenizer, recipe.data)


def base_written(
    name: str, load: Callable[[], tuple[Any, Any]], path: Path, arguments: DataArguments | None = None
) -> list[dict]:
    """What the base itself writes, made once and kept in `path` (JSON lines).

    Args:
        name: `BASE_SAMPLES`, texts sampled at temperature 1; or `BASE_ANSWERS`, its likeliest answers to every second
            of the prompts that come with qpsft.
        load: returns the base and its tokenizer; called if `path` is not there yet.
        arguments: how prompts are written.

    Returns:
        Rows with `text`, and `cut_off` where the length cap ended it (the base never wrote an end there, so none is
        evaluated); or with `prompt`, `completion` and their `ids`.

    Raises:
        RecipeError: the base has no token that begins or ends a text. DataError: it has no chat template to be asked
            with, or has no answer.
    """
    if path.is_file():
        with contextlib.suppress(ValueError):  # half a line: made anew
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load()
    rows = (_answers if name == BASE_ANSWERS else _samples)(model, tokenizer, arguments or DataArguments())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _samples(model: Any, tokenizer: Any, arguments: DataArguments) -> list[dict]:
    start = _first_token(model, tokenizer)
    if start is None:
        raise RecipeError(
            f"{BASE_SAMPLES} needs a base with a token that begins or ends a text, to start from.",
            "Name a file of texts as --out_of_domain instead.",
        )
    written = _write(model, tokenizer, [[start]] * SAMPLED_TEXTS, greedy=False)
    return [{"text": text} | ({} if one.stopped else {"cut_off": True}) for text, one in written if text]


def _answers(model: Any, tokenizer: Any, arguments: DataArguments) -> list[dict]:
    prompts = read_prompts(None, tokenizer, arguments)[ANSWERED]
    written = _write(model, tokenizer, prompts.ids, greedy=True)
    return [
        {"prompt": prompt, "completion": text, "ids": [ids, one.token_ids]}
        for prompt, ids, (text, one) in zip(prompts.texts, prompts.ids, written, strict=True)
        if text
    ]


def _write(model: Any, tokenizer: Any, prompts: list[list[int]], *, greedy: bool) -> Iterator[tuple[str, Completion]]:
    """What a model writes behind prompts: the likeliest, or samples at temperature 1."""
    written = generate(
        model,
        prompts,
        stop_ids=stop_tokens(model, tokenizer),
        greedy=greedy,
        samples=0 if greedy else 1,
        max_new_tokens=SAMPLED_LENGTH,
        description="what the base writes",
    )
    completions = [one.greedy if greedy else one.samples[0] for one in written]
    texts = tokenizer.batch_decode([one.token_ids for one in completions], skip_special_tokens=True)
    return zip(map(str.strip, texts), completions, strict=True)


def _first_token(model: Any, tokenizer: Any) -> int | None:
    """What a text begins with. Qwen's tokenizers name no such token, their models' settings do (`<|endoftext|>`)."""
    settings = (model.generation_config, model.config.get_text_config(), model.config)
    named = [tokenizer.bos_token_id, *(getattr(one, "bos_token_id", None) for one in settings), tokenizer.eos_token_id]
    return next((token for token in named if token is not None), None)


def _digest(*parts: Any) -> str:
    return digest(*(json.dumps(part, sort_keys=True, ensure_ascii=False) for part in parts))[:16]
