"""One measurement of a run: in-domain, out of domain, entropy, drift and pass@k. Training goes on as without it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from qpsft.compare.data import ComparedData, set_verifier
from qpsft.compare.results import is_accuracy
from qpsft.data.shapes import Rows
from qpsft.evaluate.evaluation import Evaluation, evaluate
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
    with warnings.catch_warnings():
        # In the middle of training many completions may not stop; those at the end are counted in the report.
        warnings.simplefilter("ignore")
        return _measure(model, tokenizer, data, measurement, is_last)


def _measure(model: Any, tokenizer: Any, data: ComparedData, measurement: Measurement, is_last: bool) -> dict[str, Any]:
    def evaluated(rows: Rows, **settings: Any) -> Evaluation:
        settings = {"k": 0, "verifier": measurement.verifier, **settings}
        limits = {"max_new_tokens": measurement.max_new_tokens, "arguments": measurement.arguments}
        return evaluate(model, tokenizer, rows, **limits, **settings)

    metrics: dict[str, float] = {}
    if is_last:
        metrics["validation"] = _score(evaluated(data.validation, drift=False), "validation", data.metric)
    in_domain = evaluated(data.in_domain)
    metrics |= _in_domain_metrics(in_domain, data.metric)
    others = {
        label: evaluated(rows, verifier=set_verifier(measurement.verifier, rows))
        for label, rows in data.out_of_domain.items()
    }
    metrics |= _out_of_domain_metrics(others, data.metric)
    samples = _sample(evaluated, data.in_domain, measurement)
    for temperature, sampled in samples.items():
        metrics |= _sample_metrics(sampled, temperature)
    shown = samples[1.0] if 1.0 in samples and "sample_entropy" in samples[1.0].metrics else in_domain
    completions = {"in_domain": _shown(shown, SHOWN)}
    completions |= {label: _shown(evaluation, SHOWN // 2) for label, evaluation in others.items()}
    return {
        "metrics": {name: rounded(value) for name, value in metrics.items()},
        "completions": {label: rows for label, rows in completions.items() if rows},
    }


def _in_domain_metrics(evaluation: Evaluation, metric: str) -> dict[str, float]:
    metrics = {"in_domain": _score(evaluation, "in_domain", metric)}
    metrics |= {f"in_domain_{name}": evaluation[name] for name in ("nll", "entropy")}
    return metrics | _drift(evaluation, "in_domain_kl") | _completed(evaluation)


def _out_of_domain_metrics(evaluations: Mapping[str, Evaluation], metric: str) -> dict[str, float]:
    """Each set's score, likelihood, entropy and drift, and their means over the sets."""
    by_set = {
        label: {
            "": _score(evaluation, "out_of_domain", metric),
            "_nll": evaluation["nll"],
            "_entropy": evaluation["entropy"],
            **_drift(evaluation, "_kl"),
        }
        for label, evaluation in evaluations.items()
    }
    metrics = {
        f"out_of_domain/{label}{suffix}": value for label, values in by_set.items() for suffix, value in values.items()
    }
    for suffix in next(iter(by_set.values()), {}):
        metrics[f"out_of_domain{suffix}"] = float(np.mean([values[suffix] for values in by_set.values()]))
    return metrics


def _sample(evaluated: Callable[..., Evaluation], rows: Rows, measurement: Measurement) -> dict[float, Evaluation]:
    """Temperature -> samples of the first in-domain rows; none where k is 0 or the rows are plain text."""
    few = rows.select(range(min(measurement.sample_rows, len(rows.rows))))
    if not measurement.k or "text" in few.rows[0]:
        return {}
    return {
        temperature: evaluated(few, k=measurement.k, temperature=temperature, drift=temperature == 1)
        for temperature in measurement.temperatures
    }


def _sample_metrics(evaluation: Evaluation, temperature: float) -> dict[str, float]:
    passed = {name: evaluation[name] for name in evaluation.metrics if name.startswith("pass@")}
    metrics = {f"{name}, T={temperature:g}": value for name, value in passed.items()}
    if temperature == 1 and "sample_entropy" in evaluation.metrics:
        metrics |= {"sample_entropy": evaluation["sample_entropy"], "sample_length": evaluation["length"]}
        metrics |= _drift(evaluation, "sample_kl", "kl_samples")
    return metrics


def rounded(value: float) -> float:
    """`DIGITS` significant digits: what is kept in a file."""
    return float(f"{value:.{DIGITS}g}")


def _score(evaluation: Evaluation, name: str, metric: str) -> float:
    return evaluation["accuracy" if is_accuracy(name, metric) else "nll"]


def _drift(evaluation: Evaluation, name: str, metric: str = "kl_text") -> dict[str, float]:
    return {name: evaluation[metric]} if metric in evaluation.metrics else {}


def _completed(evaluation: Evaluation) -> dict[str, float]:
    """Shares of the greedy completions that the length cap cut off, and that held an answer."""
    if "greedy_length_capped" not in evaluation.metrics:
        return {}
    parsed = evaluation.counts["parsed"] / evaluation.counts["completions"]
    return {"length_capped": evaluation["greedy_length_capped"], "parsed": parsed}


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
