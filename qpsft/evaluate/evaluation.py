"""What a model does on prompts with references: how likely they are, how often it is right, how far it has drifted.

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
from qpsft.evaluate.likelihood import has_adapter, row_sums, text_statistics
from qpsft.evaluate.rows import Encoded, as_rows, duplicates, encode, stop_ids_of
from qpsft.evaluate.verifiers import Verdict, Verifier, find_verifier, text_of, warn_if_nothing_parsed
from qpsft.model.generation import Completion, Completions, generate, greedy_completions
from qpsft.recipe.arguments import DataArguments

__all__ = ["Evaluation", "RowCompletions", "evaluate", "greedy_completions", "text_statistics"]

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


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Rows | Sequence[dict],
    *,
    name: str = "rows",
    k: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    verifier: str | Verifier = "auto",
    seed: int = 0,
    limit: int | None = None,
    drift: bool = True,
    drift_samples: int = 1,
    train_rows: Sequence[dict] | None = None,
    arguments: DataArguments | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures a model on prompts with references, or on plain texts (likelihood and drift only).

    Args:
        model: a causal LM, with or without an adapter; left as it was found, modes and gradients included.
        tokenizer: the model's.
        rows: {"prompt", "completion"} (strings or messages), {"messages"} (the last assistant turn is the reference)
            or {"text"}; what the verifier needs beside them (`task`, `choices`) in the same dicts.
        name: what to call them; `Rows` have their own name.
        k: completions sampled per prompt; pass@1, pass@2, pass@4, … and pass@k are estimated from them. 0: none.
        temperature: of the samples.
        max_new_tokens: a completion's length cap.
        verifier: one of `qpsft.evaluate.verifiers.NAMES`, or a function (row, text) -> True, False, or None for no
            answer.
        seed: of the samples and of the bootstrap.
        limit: only the first N rows.
        drift: measure the divergence from the base, where the model has an adapter to switch off.
        drift_samples: how many of the k samples of each prompt the divergence is measured on.
        train_rows: what the model was trained on, in the same shapes; exact duplicates are counted.
        arguments: `use_chat_template` and `prompt_format` as in training.
        batch_size: sequences decoded at once; None: as many as fit.
        progress: show a bar on a terminal.

    Returns:
        The `Evaluation`. The same rows, model and seed give the same numbers.

    Raises:
        DataError: rows without references, no such verifier, or references that it cannot read.
    """
    started = time.perf_counter()
    arguments = arguments or DataArguments()
    rows = rows if isinstance(rows, Rows) else as_rows(rows, name, arguments)
    if limit is not None:
        rows = Rows(rows.name, rows.shape, rows.rows[:limit], rows.places[:limit], rows.unused_columns)
    if temperature <= 0 or k < 0 or max_new_tokens < 1:
        raise DataError("temperature must be above 0, k not negative and max_new_tokens at least 1.", "Mend them.")
    encoded = encode(rows, model, tokenizer, arguments)
    kept = Rows(rows.name, rows.shape, *([of[i] for i in encoded.kept] for of in (rows.rows, rows.places)), [])
    drift = drift and has_adapter(model)
    found = Evaluation(
        name=rows.name,
        rows=len(kept.rows),
        metrics={},
        settings={"verifier": None, "seed": seed},
        counts={"dropped": len(rows.rows) - len(kept.rows), "truncated": encoded.truncated},
        per_row={},
        completions=[],
        seconds=0.0,
    )
    if train_rows is not None:
        found.counts |= duplicates(train_rows, rows.rows)
    weights = bootstrap_weights(found.rows, seed)
    _measure_text(found, model, encoded, weights, drift)
    if "text" not in kept.rows[0]:
        found.settings["verifier"], check = find_verifier(verifier, kept.rows, rows.name)
        if check is None:
            _measure_choices(found, model, tokenizer, kept, arguments, weights)
        else:
            found.settings |= {"k": k, "temperature": temperature, "max_new_tokens": max_new_tokens}
            written = generate(
                model,
                encoded.prompts,
                stop_ids=stop_ids_of(model, tokenizer, encoded.texts),
                samples=k,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_size=batch_size,
                description=rows.name if progress else None,
            )
            found.completions = _verify(kept, written, tokenizer, check)
            _measure_completions(found, written, weights)
            _warn_of_capped(found, encoded, written)
            if drift and k:
                sums = _score_samples(model, encoded.prompts, written, drift_samples)
                found.metrics["kl_samples"] = ratio(sums["kl"], sums["num_items"], weights)
    found.seconds = time.perf_counter() - started
    return found


def _measure_text(found: Evaluation, model: Any, encoded: Encoded, weights: np.ndarray, drift: bool) -> None:
    """Likelihood, entropy and drift along the references."""
    sums = row_sums(model, encoded.texts, against_base=drift)
    tokens = sums["num_items"]
    for metric in ("nll", "mean_token_accuracy", "entropy"):
        found.metrics[metric] = ratio(sums[metric], tokens, weights)
    found.per_row |= {"nll": sums["nll"].tolist(), "num_items": tokens.tolist()}
    if drift:
        found.metrics["kl_text"] = ratio(sums["kl"], tokens, weights)
        found.per_row["kl_text"] = sums["kl"].tolist()


def _measure_choices(
    found: Evaluation, model: Any, tokenizer: Any, rows: Rows, arguments: DataArguments, weights: np.ndarray
) -> None:
    """Multiple choice: the likeliest choice, written and ended as training would have it, is the answer."""
    options = [
        ({"prompt": row["prompt"], "completion": choice}, f"{place}, choice {number}")
        for row, place in zip(rows.rows, rows.places, strict=True)
        for number, choice in enumerate(row["choices"], start=1)
    ]
    every = Rows(rows.name, rows.shape, *map(list, zip(*options, strict=True)), [])
    every = as_rows(every.rows, rows.name, arguments)
    encoded = encode(every, model, tokenizer, arguments)
    if len(encoded.kept) < len(options):
        raise DataError(f"{rows.name}: a choice does not fit the model's length.", "Shorten the prompts.")
    sums = row_sums(model, encoded.texts)
    right = {"accuracy": [], "accuracy_per_token": []}
    start = 0
    for row in rows.rows:
        here = slice(start, start := start + len(row["choices"]))
        answer = row["choices"].index(text_of(row["completion"]))
        right["accuracy"].append(sums["nll"][here].argmin() == answer)
        right["accuracy_per_token"].append((sums["nll"][here] / sums["num_items"][here]).argmin() == answer)
    for metric, hits in right.items():
        found.per_row[metric] = np.array(hits, dtype=float).tolist()
        found.metrics[metric] = ratio(np.array(hits, dtype=float), np.ones(found.rows), weights)


def _verify(rows: Rows, written: list[Completions], tokenizer: Any, check: Verifier) -> list[RowCompletions]:
    texts = iter(
        tokenizer.batch_decode(
            [completion.token_ids for one in written for completion in (one.greedy, *one.samples)],
            skip_special_tokens=True,
        )
    )
    found = []
    for row, place, one in zip(rows.rows, rows.places, written, strict=True):
        own = [next(texts) for _ in range(1 + len(one.samples))]
        verdicts = [check(row, text) for text in own]
        greedy, *samples = zip(own, verdicts, strict=True)
        found.append(RowCompletions(place, text_of(row["prompt"]), text_of(row["completion"]), greedy, samples))
    return found


def _measure_completions(found: Evaluation, written: list[Completions], weights: np.ndarray) -> None:
    """Accuracy, pass@k, lengths and entropy of the completions, and warnings about them."""
    verdicts = [[verdict for _, verdict in (row.greedy, *row.samples)] for row in found.completions]
    completions = [len(row) for row in verdicts]
    parsed = sum(verdict is not None for row in verdicts for verdict in row)
    found.counts |= {"completions": sum(completions), "parsed": parsed}
    warn_if_nothing_parsed(found.settings["verifier"], found.name, parsed, sum(completions))
    ones = np.ones(found.rows)
    right = np.array([[verdict is True for verdict in row] for row in verdicts], dtype=float)
    found.per_row["accuracy"] = right[:, 0].tolist()
    found.metrics["accuracy"] = ratio(right[:, 0], ones, weights)
    samples = right.shape[1] - 1
    if samples:
        count = right[:, 1:].sum(1)
        found.per_row["samples_right"] = count.tolist()
        for k in sorted({2**power for power in range(samples.bit_length())} | {samples}):
            found.metrics[f"pass@{k}"] = ratio(pass_at_k(count, samples, k), ones, weights)
    _measure_lengths(found, [one.greedy for one in written], 1, "greedy_", weights)
    if samples:
        drawn = [sample for one in written for sample in one.samples]
        _measure_lengths(found, drawn, samples, "", weights)
        tokens = _by_row([len(sample.token_ids) for sample in drawn], samples)
        found.metrics["sample_entropy"] = ratio(_by_row([sample.entropy for sample in drawn], samples), tokens, weights)


def _warn_of_capped(found: Evaluation, encoded: Encoded, written: list[Completions]) -> None:
    """Says so when many completions were cut off, by the length cap or by the end of the model's context."""
    capped = [
        len(prompt) + len(completion.token_ids)
        for prompt, one in zip(encoded.prompts, written, strict=True)
        for completion in (one.greedy, *one.samples)
        if not completion.stopped
    ]
    if len(capped) < CAPPED_TOO_OFTEN * found.counts["completions"]:
        return
    said = f"{found.name}: {len(capped)} of {found.counts['completions']} completions did not stop"
    if encoded.length is not None and 2 * sum(total >= encoded.length for total in capped) > len(capped):
        todo = f"before the model's context ended, at {encoded.length} tokens with the prompt. Shorten the prompts"
    else:
        todo = f"within {found.settings['max_new_tokens']} tokens. Raise --max_new_tokens"
    warnings.warn(f"{said} {todo}, or look whether the model ever stops.", stacklevel=3)


def _measure_lengths(
    found: Evaluation, completions: list[Completion], copies: int, prefix: str, weights: np.ndarray
) -> None:
    number = np.full(found.rows, copies)
    lengths = _by_row([len(completion.token_ids) for completion in completions], copies)
    capped = _by_row([not completion.stopped for completion in completions], copies)
    found.metrics[f"{prefix}length"] = ratio(lengths, number, weights)
    found.metrics[f"{prefix}length_capped"] = ratio(capped, number, weights)


def _by_row(values: list[float], copies: int) -> np.ndarray:
    return np.array(values, dtype=float).reshape(-1, copies).sum(1)


def _score_samples(
    model: Any, prompts: list[list[int]], written: list[Completions], each: int
) -> dict[str, np.ndarray]:
    """Sums over each prompt's first `each` samples, scored under the policy and its base."""
    texts = [
        {"input_ids": prompt + sample.token_ids, "labels": [-100] * len(prompt) + sample.token_ids}
        for prompt, one in zip(prompts, written, strict=True)
        for sample in one.samples[:each]
    ]
    sums = row_sums(model, texts, against_base=True)
    return {name: _by_row(values, len(texts) // len(prompts)) for name, values in sums.items()}
