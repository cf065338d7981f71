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
from qpsft.evaluate.rows import as_rows, duplicates, encode, stop_ids_of
from qpsft.evaluate.verifiers import CHOICE, Verdict, Verifier, find_verifier, text_of, warn_if_nothing_parsed
from qpsft.model.adapter import has_adapter
from qpsft.model.generation import Completion, Completions, generate
from qpsft.recipe.arguments import DataArguments

MAX_NEW_TOKENS = 256
CAPPED_TOO_OFTEN = 0.5


@dataclass
class RowCompletions:
    """One row's completions.

    Attributes:
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
        metrics: name -> value with its 95 % bootstrap interval over rows; see docs/metrics.md.
        settings: verifier, k, temperature, max_new_tokens, seed.
        counts: `dropped` rows (nothing to evaluate within the model's length), `completions`, how many of them the
            verifier `parsed`, and with training rows `duplicate_rows` and `duplicate_prompts`.
        per_row: name -> one number per row, in the order of the rows: `accuracy` (0 or 1), `samples_right`, `nll` and
            `kl_text` (sums over the reference's tokens), `num_items` (these tokens). For paired comparisons.
        completions: the texts, one entry per row; empty for multiple choice and plain text.
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
    measuring = _Measuring(model, tokenizer, rows, name, limit, arguments or DataArguments(), Settings(**settings))
    result = measuring.result
    if train_rows is not None:
        result.counts |= duplicates(train_rows, measuring.all_rows.rows)
    measuring.references()
    if "text" not in measuring.rows.rows[0]:
        measuring.answers()
    result.seconds = time.perf_counter() - started
    return result


class _Measuring:
    """The measurements of one data set, each of which adds to `result`.

    `all_rows` are the rows before those without anything to evaluate were left out; `weights` the bootstrap's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Rows | Sequence[dict],
        name: str,
        limit: int | None,
        arguments: DataArguments,
        settings: Settings,
    ):
        rows = rows if isinstance(rows, Rows) else as_rows(rows, name, arguments)
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows.rows))))
        self.model, self.tokenizer, self.arguments, self.settings = model, tokenizer, arguments, settings
        self.all_rows = rows
        self.encoded = encode(rows, model, tokenizer, arguments)
        self.rows = rows.select(self.encoded.kept)
        count = len(self.rows.rows)
        self.weights = bootstrap_weights(count, settings.seed)
        self.measures_drift = settings.drift and has_adapter(model)
        self.result = Evaluation(
            name=rows.name,
            rows=count,
            metrics={},
            settings={"verifier": None, "seed": settings.seed},
            counts={"dropped": len(rows.rows) - count, "truncated": self.encoded.truncated},
            per_row={},
            completions=[],
            seconds=0.0,
        )

    def _add(self, metric: str, sums: Any, counts: Any = None) -> None:
        """A metric that is Σ sums / Σ counts over the rows; by default a mean over them."""
        sums = np.asarray(sums, dtype=float)
        counts = np.ones(self.result.rows) if counts is None else counts
        self.result.metrics[metric] = ratio(sums, counts, self.weights)

    def references(self) -> None:
        """Likelihood, entropy and drift along the references."""
        sums = row_sums(self.model, self.encoded.texts, against_base=self.measures_drift)
        tokens = sums["num_items"]
        for metric in ("nll", "mean_token_accuracy", "entropy"):
            self._add(metric, sums[metric], tokens)
        self.result.per_row |= {"nll": sums["nll"].tolist(), "num_items": tokens.tolist()}
        if self.measures_drift:
            self._add("kl_text", sums["kl"], tokens)
            self.result.per_row["kl_text"] = sums["kl"].tolist()

    def answers(self) -> None:
        """Accuracy: of the completions by a verifier, or of multiple choice by likelihood."""
        settings, rows, result = self.settings, self.rows, self.result
        result.settings["verifier"], check = find_verifier(settings.verifier, rows.rows, rows.name, rows.places)
        if check is None:
            if result.settings["verifier"] == CHOICE:
                self._choices()
            return
        result.settings |= {
            "k": settings.k, "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens
        }  # fmt: skip
        completions = generate(
            self.model,
            self.encoded.prompts,
            stop_ids=stop_ids_of(self.model, self.tokenizer, self.encoded.texts),
            samples=settings.k,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            batch_size=settings.batch_size,
            description=rows.name if settings.progress else None,
        )
        result.completions = self._judged(completions, check)
        self._accuracy()
        self._completions(completions)
        self._warn_of_capped(completions)
        if self.measures_drift and settings.k:
            self._drift_on_samples(completions)

    def _choices(self) -> None:
        """Multiple choice: the likeliest choice, written and ended as training would have it, is the answer."""
        rows = self.rows
        choices = [{"prompt": row["prompt"], "completion": choice} for row in rows.rows for choice in row["choices"]]
        encoded = encode(as_rows(choices, rows.name, self.arguments), self.model, self.tokenizer, self.arguments)
        if len(encoded.kept) < len(choices):
            raise DataError(f"{rows.name}: a choice does not fit the model's length.", "Shorten the prompts.")
        sums = row_sums(self.model, encoded.texts)
        right = {"accuracy": [], "accuracy_per_token": []}
        start = 0
        for row in rows.rows:
            here = slice(start, start := start + len(row["choices"]))
            answer = row["choices"].index(text_of(row["completion"]))
            right["accuracy"].append(float(sums["nll"][here].argmin() == answer))
            right["accuracy_per_token"].append(float((sums["nll"][here] / sums["num_items"][here]).argmin() == answer))
        for metric, hits in right.items():
            self.result.per_row[metric] = hits
            self._add(metric, hits)

    def _judged(self, completions: list[Completions], check: Verifier) -> list[RowCompletions]:
        """The completions as texts with their verdicts."""
        every = [one.token_ids for of_row in completions for one in (of_row.greedy, *of_row.samples)]
        texts = iter(self.tokenizer.batch_decode(every, skip_special_tokens=True))
        judged = []
        for row, place, of_row in zip(self.rows.rows, self.rows.places, completions, strict=True):
            own = [next(texts) for _ in range(1 + len(of_row.samples))]
            greedy, *samples = [(text, check(row, text)) for text in own]
            judged.append(RowCompletions(place, text_of(row["prompt"]), text_of(row["completion"]), greedy, samples))
        return judged

    def _accuracy(self) -> None:
        """Accuracy and pass@k of the verdicts; warns if hardly any completion holds an answer."""
        result = self.result
        verdicts = [[verdict for _, verdict in (row.greedy, *row.samples)] for row in result.completions]
        number = sum(map(len, verdicts))
        parsed = sum(verdict is not None for row in verdicts for verdict in row)
        result.counts |= {"completions": number, "parsed": parsed}
        warn_if_nothing_parsed(result.settings["verifier"], result.name, parsed, number)
        right = np.array([[verdict is True for verdict in row] for row in verdicts], dtype=float)
        result.per_row["accuracy"] = right[:, 0].tolist()
        self._add("accuracy", right[:, 0])
        samples = right.shape[1] - 1
        if samples:
            count = right[:, 1:].sum(1)
            result.per_row["samples_right"] = count.tolist()
            for k in sorted({2**power for power in range(samples.bit_length())} | {samples}):
                self._add(f"pass@{k}", pass_at_k(count, samples, k))

    def _completions(self, completions: list[Completions]) -> None:
        """Lengths of the completions and entropy along the samples."""
        self._lengths([of_row.greedy for of_row in completions], 1, "greedy_")
        drawn = [sample for of_row in completions for sample in of_row.samples]
        if drawn:
            samples = len(drawn) // len(completions)
            self._lengths(drawn, samples, "")
            tokens = _by_row([len(sample.token_ids) for sample in drawn], samples)
            self._add("sample_entropy", _by_row([sample.entropy for sample in drawn], samples), tokens)

    def _lengths(self, completions: list[Completion], copies: int, prefix: str) -> None:
        number = np.full(self.result.rows, copies)
        self._add(f"{prefix}length", _by_row([len(one.token_ids) for one in completions], copies), number)
        self._add(f"{prefix}length_capped", _by_row([not one.stopped for one in completions], copies), number)

    def _warn_of_capped(self, completions: list[Completions]) -> None:
        """Warns when many completions were cut off, by the length cap or by the end of the model's context."""
        result, context = self.result, self.encoded.length
        capped = [
            len(prompt) + len(completion.token_ids)
            for prompt, of_row in zip(self.encoded.prompts, completions, strict=True)
            for completion in (of_row.greedy, *of_row.samples)
            if not completion.stopped
        ]
        if len(capped) < CAPPED_TOO_OFTEN * result.counts["completions"]:
            return
        what = f"{result.name}: {len(capped)} of {result.counts['completions']} completions did not stop"
        if context is not None and 2 * sum(total >= context for total in capped) > len(capped):
            todo = f"before the model's context ended, at {context} tokens with the prompt. Shorten the prompts"
        else:
            todo = f"within {result.settings['max_new_tokens']} tokens. Raise --max_new_tokens"
        warnings.warn(f"{what} {todo}, or look whether the model ever stops.", stacklevel=4)

    def _drift_on_samples(self, completions: list[Completions]) -> None:
        """Divergence from the base over each prompt's first `drift_samples` samples."""
        prompts = self.encoded.prompts
        texts = [
            {"input_ids": prompt + sample.token_ids, "labels": [-100] * len(prompt) + sample.token_ids}
            for prompt, of_row in zip(prompts, completions, strict=True)
            for sample in of_row.samples[: self.settings.drift_samples]
        ]
        sums = row_sums(self.model, texts, against_base=True)
        copies = len(texts) // len(prompts)
        self._add("kl_samples", _by_row(sums["kl"], copies), _by_row(sums["num_items"], copies))


def _by_row(values: list[float], copies: int) -> np.ndarray:
    return np.array(values, dtype=float).reshape(-1, copies).sum(1)
