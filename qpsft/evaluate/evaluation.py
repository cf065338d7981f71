"""What a model does on prompts with references: how likely they are, how often it is right, how far it has drifted.

    rows ── tokens ── likelihood of the references ── completions, or choices by likelihood ── drift on the samples

Every number is defined in docs/metrics.md.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qpsft.data.shapes import Rows
from qpsft.errors import DataError
from qpsft.evaluate.estimates import Estimate, bootstrap_weights, pass_at_k, ratio
from qpsft.evaluate.likelihood import row_sums
from qpsft.evaluate.rows import Encoded, as_rows, duplicates, encode, stop_ids_of
from qpsft.evaluate.verifiers import Verdict, Verifier, find_verifier, text_of, warn_if_nothing_parsed
from qpsft.model.adapter import has_adapter
from qpsft.model.generation import Completion, Completions, generate
from qpsft.recipe.arguments import DataArguments

MAX_NEW_TOKENS = 256
CAPPED_TOO_OFTEN = 0.5


@dataclass
class RowCompletions:
    """One row's completions.

    Attributes:
        place: where the row came from.
        prompt: the text of its prompt, or of the prompt's last message.
        reference: the text of its completion.
        greedy: the greedy completion, without special tokens, and its verdict.
        samples: the sampled ones and theirs.
    """

    place: str
    prompt: str
    reference: str
    greedy: tuple[str, Verdict]
    samples: list[tuple[str, Verdict]]


@dataclass
class Evaluation:
    """What was measured on one data set.

    Attributes:
        name: the data set.
        rows: rows evaluated.
        metrics: name -> value with its 95 % bootstrap interval over rows; see docs/metrics.md.
        settings: verifier, k, temperature, max_new_tokens, seed.
        counts: `dropped` rows (nothing to evaluate within the model's length), `completions`, how many of them the
            verifier `parsed`, and with training rows `duplicate_rows` and `duplicate_prompts`.
        per_row: name -> one number per row, in the order of the rows: `accuracy` (0 or 1), `samples_right`, `nll` and
            `kl_text` (sums over the reference's tokens), `num_items` (these tokens). For paired comparisons.
        completions: the texts, one entry per row; empty for multiple choice and plain text.
        seconds: wall time.
    """

    name: str
    rows: int
    metrics: dict[str, Estimate]
    settings: dict[str, Any]
    counts: dict[str, int]
    per_row: dict[str, list[float]] = field(repr=False)
    completions: list[RowCompletions] = field(repr=False)
    seconds: float

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric].value

    def to_dict(self, *, completions: bool = False) -> dict[str, Any]:
        """Plain lists and dicts for JSON; with every completion if asked for."""
        record = asdict(self)
        return record if completions else {name: value for name, value in record.items() if name != "completions"}


@dataclass(frozen=True)
class Settings:
    """How rows are evaluated.

    Attributes:
        k: completions sampled per prompt; pass@1, pass@2, pass@4, … and pass@k are estimated from them. 0: none.
        temperature: of the samples.
        max_new_tokens: a completion's length cap.
        verifier: one of `qpsft.evaluate.verifiers.NAMES`, or a function (row, text) -> True, False, or None for no
            answer.
        seed: of the samples and of the bootstrap.
        drift: measure the divergence from the base, where the model has an adapter to switch off.
        drift_samples: how many of the k samples of each prompt the divergence is measured on.
        batch_size: sequences decoded at once; None: as many as fit.
        progress: show a bar on a terminal.

    Raises:
        DataError: a value out of range.
    """

    k: int = 8
    temperature: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    verifier: str | Verifier = "auto"
    seed: int = 0
    drift: bool = True
    drift_samples: int = 1
    batch_size: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.k < 0 or self.max_new_tokens < 1:
            raise DataError(
                f"k is {self.k}, temperature {self.temperature} and max_new_tokens {self.max_new_tokens}.",
                "temperature must be above 0, k not negative and max_new_tokens at least 1.",
            )


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Rows | Sequence[dict],
    *,
    name: str = "rows",
    limit: int | None = None,
    train_rows: Sequence[dict] | None = None,
    arguments: DataArguments | None = None,
    **settings: Any,
) -> Evaluation:
    """Measures a model on prompts with references, or on plain texts (likelihood and drift only).

    Args:
        model: a causal LM, with or without an adapter; its modes and gradients are afterwards as they were.
        tokenizer: the model's.
        rows: {"prompt", "completion"} (strings or messages), {"messages"} (the last assistant turn is the reference)
            or {"text"}; what the verifier needs beside them (`task`, `choices`) in the same dicts.
        name: what to call them; `Rows` have their own name.
        limit: only the first N rows.
        train_rows: what the model was trained on, in the same shapes; exact duplicates are counted.
        arguments: `use_chat_template` and `prompt_format` as in training.
        **settings: of `Settings`: k, temperature, max_new_tokens, verifier, seed, drift, drift_samples, batch_size,
            progress.

    Returns:
        The `Evaluation`. The same rows, model and seed give the same numbers.

    Raises:
        DataError: rows without references, no such verifier, references that it cannot read, or a value out of range.
    """
    started = time.perf_counter()
    evaluated = _prepare(model, tokenizer, rows, name, limit, arguments or DataArguments(), Settings(**settings))
    result = _empty_result(evaluated, train_rows)
    _measure_references(result, evaluated)
    if "text" not in evaluated.rows.rows[0]:
        _measure_answers(result, evaluated)
    result.seconds = time.perf_counter() - started
    return result


@dataclass(frozen=True)
class _Evaluated:
    """What is evaluated, and how: the model and the rows that have something to evaluate, tokenized.

    `all_rows` are the rows before those without anything to evaluate were left out; `weights` the bootstrap's.
    """

    model: Any
    tokenizer: Any
    all_rows: Rows
    rows: Rows
    encoded: Encoded
    arguments: DataArguments
    settings: Settings
    weights: np.ndarray

    @property
    def drift(self) -> bool:
        """Whether the divergence from the base is measured."""
        return self.settings.drift and has_adapter(self.model)


def _prepare(
    model: Any,
    tokenizer: Any,
    rows: Rows | Sequence[dict],
    name: str,
    limit: int | None,
    arguments: DataArguments,
    settings: Settings,
) -> _Evaluated:
    rows = rows if isinstance(rows, Rows) else as_rows(rows, name, arguments)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows.rows))))
    encoded = encode(rows, model, tokenizer, arguments)
    kept = rows.select(encoded.kept)
    weights = bootstrap_weights(len(kept.rows), settings.seed)
    return _Evaluated(model, tokenizer, rows, kept, encoded, arguments, settings, weights)


def _empty_result(evaluated: _Evaluated, train_rows: Sequence[dict] | None) -> Evaluation:
    """A result with its counts, for the measurements to fill."""
    rows = evaluated.rows
    dropped = len(evaluated.all_rows.rows) - len(rows.rows)
    return Evaluation(
        name=rows.name,
        rows=len(rows.rows),
        metrics={},
        settings={"verifier": None, "seed": evaluated.settings.seed},
        counts={"dropped": dropped, "truncated": evaluated.encoded.truncated}
        | ({} if train_rows is None else duplicates(train_rows, evaluated.all_rows.rows)),
        per_row={},
        completions=[],
        seconds=0.0,
    )


def _measure_references(result: Evaluation, evaluated: _Evaluated) -> None:
    """Likelihood, entropy and drift along the references."""
    sums = row_sums(evaluated.model, evaluated.encoded.texts, against_base=evaluated.drift)
    tokens = sums["num_items"]
    for metric in ("nll", "mean_token_accuracy", "entropy"):
        result.metrics[metric] = ratio(sums[metric], tokens, evaluated.weights)
    result.per_row |= {"nll": sums["nll"].tolist(), "num_items": tokens.tolist()}
    if evaluated.drift:
        result.metrics["kl_text"] = ratio(sums["kl"], tokens, evaluated.weights)
        result.per_row["kl_text"] = sums["kl"].tolist()


def _measure_answers(result: Evaluation, evaluated: _Evaluated) -> None:
    """Accuracy: of the completions by a verifier, or of multiple choice by likelihood."""
    settings, rows = evaluated.settings, evaluated.rows
    result.settings["verifier"], check = find_verifier(settings.verifier, rows.rows, rows.name, rows.places)
    if check is None:
        _measure_choices(result, evaluated)
        return
    result.settings |= {
        "k": settings.k, "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens
    }  # fmt: skip
    completions = _complete(evaluated)
    result.completions = _judge(evaluated, completions, check)
    _measure_accuracy(result, evaluated.weights)
    _measure_completions(result, completions, evaluated.weights)
    _warn_of_capped(result, evaluated.encoded, completions)
    if evaluated.drift and settings.k:
        sums = _score_samples(evaluated, completions)
        result.metrics["kl_samples"] = ratio(sums["kl"], sums["num_items"], evaluated.weights)


def _measure_choices(result: Evaluation, evaluated: _Evaluated) -> None:
    """Multiple choice: the likeliest choice, written and ended as training would have it, is the answer."""
    rows, arguments = evaluated.rows, evaluated.arguments
    choices = [{"prompt": row["prompt"], "completion": choice} for row in rows.rows for choice in row["choices"]]
    encoded = encode(as_rows(choices, rows.name, arguments), evaluated.model, evaluated.tokenizer, arguments)
    if len(encoded.kept) < len(choices):
        raise DataError(f"{rows.name}: a choice does not fit the model's length.", "Shorten the prompts.")
    sums = row_sums(evaluated.model, encoded.texts)
    right = {"accuracy": [], "accuracy_per_token": []}
    start = 0
    for row in rows.rows:
        here = slice(start, start := start + len(row["choices"]))
        answer = row["choices"].index(text_of(row["completion"]))
        right["accuracy"].append(sums["nll"][here].argmin() == answer)
        right["accuracy_per_token"].append((sums["nll"][here] / sums["num_items"][here]).argmin() == answer)
    for metric, hits in right.items():
        result.per_row[metric] = np.array(hits, dtype=float).tolist()
        result.metrics[metric] = ratio(np.array(hits, dtype=float), np.ones(result.rows), evaluated.weights)


def _complete(evaluated: _Evaluated) -> list[Completions]:
    """The greedy completion and the samples of every prompt."""
    model, encoded, settings = evaluated.model, evaluated.encoded, evaluated.settings
    return generate(
        model,
        encoded.prompts,
        stop_ids=stop_ids_of(model, evaluated.tokenizer, encoded.texts),
        samples=settings.k,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        batch_size=settings.batch_size,
        description=evaluated.rows.name if settings.progress else None,
    )


def _judge(evaluated: _Evaluated, completions: list[Completions], check: Verifier) -> list[RowCompletions]:
    """The completions as texts with their verdicts."""
    rows = evaluated.rows
    every = [one.token_ids for of_row in completions for one in (of_row.greedy, *of_row.samples)]
    texts = iter(evaluated.tokenizer.batch_decode(every, skip_special_tokens=True))
    judged = []
    for row, place, of_row in zip(rows.rows, rows.places, completions, strict=True):
        own = [next(texts) for _ in range(1 + len(of_row.samples))]
        greedy, *samples = [(text, check(row, text)) for text in own]
        judged.append(RowCompletions(place, text_of(row["prompt"]), text_of(row["completion"]), greedy, samples))
    return judged


def _measure_accuracy(result: Evaluation, weights: np.ndarray) -> None:
    """Accuracy and pass@k of the verdicts; warns if hardly any completion holds an answer."""
    verdicts = [[verdict for _, verdict in (row.greedy, *row.samples)] for row in result.completions]
    number = sum(map(len, verdicts))
    parsed = sum(verdict is not None for row in verdicts for verdict in row)
    result.counts |= {"completions": number, "parsed": parsed}
    warn_if_nothing_parsed(result.settings["verifier"], result.name, parsed, number)
    ones = np.ones(result.rows)
    right = np.array([[verdict is True for verdict in row] for row in verdicts], dtype=float)
    result.per_row["accuracy"] = right[:, 0].tolist()
    result.metrics["accuracy"] = ratio(right[:, 0], ones, weights)
    samples = right.shape[1] - 1
    if samples:
        count = right[:, 1:].sum(1)
        result.per_row["samples_right"] = count.tolist()
        for k in sorted({2**power for power in range(samples.bit_length())} | {samples}):
            result.metrics[f"pass@{k}"] = ratio(pass_at_k(count, samples, k), ones, weights)


def _measure_completions(result: Evaluation, completions: list[Completions], weights: np.ndarray) -> None:
    """Lengths of the completions and entropy along the samples."""
    _measure_lengths(result, [of_row.greedy for of_row in completions], 1, "greedy_", weights)
    drawn = [sample for of_row in completions for sample in of_row.samples]
    if drawn:
        samples = len(drawn) // len(completions)
        _measure_lengths(result, drawn, samples, "", weights)
        tokens = _by_row([len(sample.token_ids) for sample in drawn], samples)
        entropy = _by_row([sample.entropy for sample in drawn], samples)
        result.metrics["sample_entropy"] = ratio(entropy, tokens, weights)


def _measure_lengths(
    result: Evaluation, completions: list[Completion], copies: int, prefix: str, weights: np.ndarray
) -> None:
    number = np.full(result.rows, copies)
    lengths = _by_row([len(completion.token_ids) for completion in completions], copies)
    capped = _by_row([not completion.stopped for completion in completions], copies)
    result.metrics[f"{prefix}length"] = ratio(lengths, number, weights)
    result.metrics[f"{prefix}length_capped"] = ratio(capped, number, weights)


def _by_row(values: list[float], copies: int) -> np.ndarray:
    return np.array(values, dtype=float).reshape(-1, copies).sum(1)


def _warn_of_capped(result: Evaluation, encoded: Encoded, completions: list[Completions]) -> None:
    """Warns when many completions were cut off, by the length cap or by the end of the model's context."""
    capped = [
        len(prompt) + len(completion.token_ids)
        for prompt, of_row in zip(encoded.prompts, completions, strict=True)
        for completion in (of_row.greedy, *of_row.samples)
        if not completion.stopped
    ]
    if len(capped) < CAPPED_TOO_OFTEN * result.counts["completions"]:
        return
    what = f"{result.name}: {len(capped)} of {result.counts['completions']} completions did not stop"
    if encoded.length is not None and 2 * sum(total >= encoded.length for total in capped) > len(capped):
        todo = f"before the model's context ended, at {encoded.length} tokens with the prompt. Shorten the prompts"
    else:
        todo = f"within {result.settings['max_new_tokens']} tokens. Raise --max_new_tokens"
    warnings.warn(f"{what} {todo}, or look whether the model ever stops.", stacklevel=4)


def _score_samples(evaluated: _Evaluated, completions: list[Completions]) -> dict[str, np.ndarray]:
    """Sums over each prompt's first `drift_samples` samples, scored under the policy and its base."""
    prompts = evaluated.encoded.prompts
    texts = [
        {"input_ids": prompt + sample.token_ids, "labels": [-100] * len(prompt) + sample.token_ids}
        for prompt, of_row in zip(prompts, completions, strict=True)
        for sample in of_row.samples[: evaluated.settings.drift_samples]
    ]
    sums = row_sums(evaluated.model, texts, against_base=True)
    return {name: _by_row(values, len(texts) // len(prompts)) for name, values in sums.items()}
