"""One measurement of a run: in-domain, out of domain, entropy, drift and pass@k. Training does not notice it."""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from qpsft.compare.data import ComparedData, set_verifier
from qpsft.compare.results import is_accuracy
from qpsft.evaluate.evaluation import Evaluation, evaluate
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
    model: Any, tokenizer: Any, data: ComparedData, how: Measurement, *, is_last: bool = True
) -> dict[str, Any]:
    """Every number of one moment of a run.

    Args:
        is_last: the run is at its end: also measure the validation rows, which learning rates are chosen on.

    Returns:
        `metrics`: name -> number (see `qpsft.compare.results.describe_metric`; accuracies and pass@k as shares, the
        others in nats per token), and `completions`: set -> a few rows with what the model wrote.
    """
    with warnings.catch_warnings():
        # A policy on its way may ramble; what is cut off or unreadable at the end is in the report.
        warnings.simplefilter("ignore")
        return _measure(model, tokenizer, data, how, is_last)


def _measure(model: Any, tokenizer: Any, data: ComparedData, how: Measurement, is_last: bool) -> dict[str, Any]:
    common = {"max_new_tokens": how.max_new_tokens, "verifier": how.verifier, "arguments": how.arguments}
    metrics: dict[str, float] = {}
    completions = {}
    if is_last:
        found = evaluate(model, tokenizer, data.validation, k=0, drift=False, **common)
        metrics["validation"] = _score(found, "validation", data.metric)
    found = evaluate(model, tokenizer, data.in_domain, k=0, **common)
    metrics |= {"in_domain": _score(found, "in_domain", data.metric)}
    metrics |= {f"in_domain_{name}": found[name] for name in ("nll", "entropy")}
    metrics |= _drift(found, "in_domain_kl")
    metrics |= _completed(found)
    others = []
    for label, rows in data.out_of_domain.items():
        one = evaluate(model, tokenizer, rows, k=0, **common | {"verifier": set_verifier(how.verifier, rows)})
        numbers = {"": _score(one, "out_of_domain", data.metric), "_nll": one["nll"], "_entropy": one["entropy"]}
        numbers |= _drift(one, "_kl")
        others.append(numbers)
        metrics |= {f"out_of_domain/{label}{suffix}": value for suffix, value in numbers.items()}
        completions[label] = _shown(one, SHOWN // 2)
    for suffix in others[0] if others else ():
        metrics[f"out_of_domain{suffix}"] = float(np.mean([numbers[suffix] for numbers in others]))
    few = replace(
        data.in_domain,
        rows=data.in_domain.rows[: how.sample_rows],
        places=data.in_domain.places[: how.sample_rows],
    )
    for temperature in how.temperatures if how.k and "text" not in few.rows[0] else ():
        at_one = temperature == 1
        one = evaluate(model, tokenizer, few, k=how.k, temperature=temperature, drift=at_one, **common)
        passed = {name: one[name] for name in one.metrics if name.startswith("pass@")}
        metrics |= {f"{name}, T={temperature:g}": value for name, value in passed.items()}
        if at_one and "sample_entropy" in one.metrics:
            metrics |= {"sample_entropy": one["sample_entropy"], "sample_length": one["length"]}
            metrics |= _drift(one, "sample_kl", "kl_samples")
            found = one
    completions = {"in_domain": _shown(found, SHOWN)} | completions
    return {
        "metrics": {name: rounded(value) for name, value in metrics.items()},
        "completions": {label: rows for label, rows in completions.items() if rows},
    }


def rounded(value: float) -> float:
    """`DIGITS` significant digits: what is kept in a file."""
    return float(f"{value:.{DIGITS}g}")


def _score(found: Evaluation, name: str, metric: str) -> float:
    return found["accuracy" if is_accuracy(name, metric) else "nll"]


def _drift(found: Evaluation, name: str, metric: str = "kl_text") -> dict[str, float]:
    return {name: found[metric]} if metric in found.metrics else {}


def _completed(found: Evaluation) -> dict[str, float]:
    """Shares of the greedy completions that the length cap cut off, and that held an answer."""
    if "greedy_length_capped" not in found.metrics:
        return {}
    parsed = found.counts["parsed"] / found.counts["completions"]
    return {"length_capped": found["greedy_length_capped"], "parsed": parsed}


def _shown(found: Evaluation, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row.prompt,
            "reference": row.reference,
            "greedy": [row.greedy[0], row.greedy[1] is True],
            "samples": [[text, verdict is True] for text, verdict in row.samples[:SHOWN_SAMPLES]],
        }
        for row in found.completions[:rows]
    ]


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside: random states, modes and gradient switches are afterwards as they were."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    python, numbers = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


class EpochEvaluation(TrainerCallback):
    """Measures the policy after every epoch and at the end of training, and shows the steps of the run.

    Attributes:
        points: one per measurement: `epoch`, `step` and `metrics`.
        completions: of the last one.
        seconds: wall time spent in measurements.
    """

    def __init__(self, tokenizer: Any, data: ComparedData, how: Measurement, description: str):
        self._how = (tokenizer, data, how)
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
            found = measure(model, *self._how, is_last=state.global_step >= state.max_steps)
        self.points.append({"epoch": round(state.epoch, 4), "step": state.global_step, "metrics": found["metrics"]})
        self.completions = found["completions"]
        self.seconds += time.perf_counter() - started

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._bar.close()
