"""One measurement of a run: in-domain, out of domain, entropy, drift and pass@k. Training goes on as without it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from qpsft.compare.data import ComparedData, set_verifier
from qpsft.compare.results import is_accuracy
from qpsft.data.shapes import Rows
from qpsft.evaluate.evaluation import MAX_NEW_TOKENS, Evaluation, evaluate
from qpsft.evaluate.verifiers import TOKENS
from qpsft.model.undisturbed import undisturbed
from qpsft.recipe.arguments import DataArguments

SHOWN = 4
SHOWN_SAMPLES = 2
DIGITS = 6
"""Significant digits kept in results."""


@dataclass(frozen=True)
class Measurement:
    """How models are measured: `CompareOptions`' values, and the data arguments that decide how rows are written."""

    k: int
    temperatures: tuple[float, ...]
    sample_rows: int
    max_new_tokens: int
    verifier: str
    arguments: DataArguments


def measure(
    model: Any, tokenizer: Any, data: ComparedData, measurement: Measurement, *, is_last: bool = True
) -> dict[str, Any]:
    """Measures a policy on every set.

    Args:
        is_last: the run is at its end: also measure the validation rows, which learning rates are chosen on.

    Returns:
        `metrics`: name -> number (see `qpsft.compare.results.describe_metric`; accuracies and pass@k as shares, the
        others in nats per token), and `completions`: set -> a few rows with what the model wrote.
    """

    def evaluated(rows: Rows, **settings: Any) -> Evaluation:
        settings = {
            "k": 0, "verifier": measurement.verifier, "max_new_tokens": measurement.max_new_tokens, **settings
        }  # fmt: skip
        with warnings.catch_warnings():
            # In the middle of training many completions may not stop; those at the end are counted in the report.
            warnings.simplefilter("ignore")
            return evaluate(model, tokenizer, rows, arguments=measurement.arguments, **settings)

    metrics: dict[str, float] = {}
    if is_last:
        metrics["validation"] = _score(evaluated(data.validation, drift=False), "validation", data.metric)
    in_domain = evaluated(data.in_domain)
    others = {
        label: evaluated(
            rows, verifier=set_verifier(measurement.verifier, rows), max_new_tokens=_cap(rows, measurement)
        )
        for label, rows in data.out_of_domain.items()
    }
    metrics |= _in_domain_metrics(in_domain, data.metric) | _out_of_domain_metrics(others, data.metric)
    shown = in_domain
    few = data.in_domain.select(range(min(measurement.sample_rows, len(data.in_domain.rows))))
    if measurement.k and "text" not in few.rows[0]:
        for temperature in measurement.temperatures:
            samples = evaluated(few, k=measurement.k, temperature=temperature, drift=temperature == 1)
            metrics |= _sample_metrics(samples, temperature)
            shown = samples if temperature == 1 and "sample_entropy" in samples.metrics else shown
    completions = {"in_domain": _shown(shown, SHOWN)}
    completions |= {label: _shown(evaluation, SHOWN // 2) for label, evaluation in others.items()}
    return {
        "metrics": {name: rounded(value) for name, value in metrics.items()},
        "completions": {label: rows for label, rows in completions.items() if rows},
    }


def _cap(rows: Rows, measurement: Measurement) -> int:
    """Tokens of a completion at most: a cap for short in-domain answers would cut off what instructions ask for."""
    return max(measurement.max_new_tokens, MAX_NEW_TOKENS) if "checks" in rows.rows[0] else measurement.max_new_tokens


def _in_domain_metrics(evaluation: Evaluation, metric: str) -> dict[str, float]:
    named = {"nll": "in_domain_nll", "entropy": "in_domain_entropy", "kl_text": "in_domain_kl"}
    named["greedy_length_capped"] = "length_capped"
    metrics = {"in_domain": _score(evaluation, "in_domain", metric)} | _renamed(evaluation, named)
    if "length_capped" in metrics:
        metrics["parsed"] = evaluation.counts["parsed"] / evaluation.counts["completions"]
    return metrics


def _out_of_domain_metrics(evaluations: Mapping[str, Evaluation], metric: str) -> dict[str, float]:
    """Each set's score, likelihood, entropy and drift, and their means over the sets."""
    named = {"nll": "_nll", "entropy": "_entropy", "kl_text": "_kl"}
    by_set = {
        label: {"": _score(evaluation, "out_of_domain", metric)} | _renamed(evaluation, named)
        for label, evaluation in evaluations.items()
    }
    metrics = {
        f"out_of_domain/{label}{suffix}": value for label, values in by_set.items() for suffix, value in values.items()
    }
    for suffix in next(iter(by_set.values()), {}):
        metrics[f"out_of_domain{suffix}"] = float(np.mean([values[suffix] for values in by_set.values()]))
    return metrics


def _sample_metrics(evaluation: Evaluation, temperature: float) -> dict[str, float]:
    named = {name: f"{name}, T={temperature:g}" for name in evaluation.metrics if name.startswith("pass@")}
    if temperature == 1 and "sample_entropy" in evaluation.metrics:
        named |= {"sample_entropy": "sample_entropy", "length": "sample_length", "kl_samples": "sample_kl"}
    return _renamed(evaluation, named)


def _renamed(evaluation: Evaluation, names: Mapping[str, str]) -> dict[str, float]:
    """Values of those metrics that were measured, under other names."""
    return {new: evaluation[name] for name, new in names.items() if name in evaluation.metrics}


def rounded(value: float) -> float:
    """`DIGITS` significant digits: what is kept in a file."""
    return float(f"{value:.{DIGITS}g}")


def _score(evaluation: Evaluation, name: str, metric: str) -> float:
    if not is_accuracy(name, metric):
        return evaluation["nll"]
    return evaluation["mean_token_accuracy" if evaluation.settings["verifier"] == TOKENS else "accuracy"]


def _shown(evaluation: Evaluation, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row.prompt,
            "reference": row.reference,
            "greedy": [row.greedy[0], row.greedy[1] is True],
            "samples": [[text, verdict is True] for text, verdict in row.samples[:SHOWN_SAMPLES]],
        }
        for row in evaluation.completions[:rows]
    ]


class EpochEvaluation(TrainerCallback):
    """Measures the policy after every epoch and at the end of training, and shows the steps of the run.

    Attributes:
        points: one per measurement: `epoch`, `step` and `metrics`.
        completions: of the last one.
        seconds: wall time spent in measurements.
    """

    def __init__(self, tokenizer: Any, data: ComparedData, measurement: Measurement, description: str):
        self._inputs = (tokenizer, data, measurement)
        self._description = description
        self._bar: tqdm | None = None
        self.points: list[dict[str, Any]] = []
        self.completions: dict[str, list] = {}
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        # disable=None: no bar where nobody watches
        self._bar = tqdm(total=state.max_steps, desc=self._description, unit="step", disable=None, leave=False)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_epoch_end(self, args, state, control, model: Any = None, **kwargs: Any) -> None:
        if self.points and self.points[-1]["step"] == state.global_step:
            return
        started = time.perf_counter()
        with undisturbed(model):
            measured = measure(model, *self._inputs, is_last=state.global_step >= state.max_steps)
        metrics = measured["metrics"]
        self.points.append({"epoch": round(state.epoch, 4), "step": state.global_step, "metrics": metrics})
        self.completions = measured["completions"]
        self.seconds += time.perf_counter() - started

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._bar.close()
