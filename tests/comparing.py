"""Comparisons without training: results made of given scores, and a stand-in for the runs themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpsft.compare.arms import ARMS, pairs
from qpsft.compare.results import ArmResult, Comparison
from qpsft.compare.run import RunSpec, Setting, keep_result

RECIPE = """\
model_name_or_path: demo
dataset_name: demo-noisy
dataset_limit: 16
max_length: 128
lora_r: 4
learning_rate: 2e-3
warmup_steps: 0
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
gradient_checkpointing: false
reference_steps: 2
seed: 3
compare: {eval_rows: 4, out_of_domain_rows: 2, sample_rows: 2, k: 2, max_new_tokens: 6, seeds: 2}
"""
Scores = Sequence[tuple[float, float]]
"""(in-domain, out of domain) after each epoch."""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def make_result(label: str, scores: Scores, validation: float = 0.5, **metrics: float) -> dict[str, Any]:
    """What a run leaves, with these scores after its epochs."""
    points = [
        {
            "epoch": float(epoch),
            "step": 4 * epoch,
            "metrics": {"in_domain": x, "out_of_domain": y, "sample_entropy": 0.3, "sample_kl": 0.1} | metrics,
        }
        for epoch, (x, y) in enumerate(scores, start=1)
    ]
    points[-1]["metrics"]["validation"] = validation
    return {
        "label": label,
        "points": points,
        "log": [{"step": 4, "nll": 1.0, "entropy": 0.4, "clip_fraction": 0.25, "approx_kl": 0.01}],
        "completions": {},
        "seconds": {"training": 1.0, "evaluation": 1.0},
        "versions": {"qpsft": "0"},
        "machine": "none",
    }


def make_comparison(
    arms: Mapping[str, Mapping[int, Scores]], *, metric: str = "accuracy", base: Mapping[str, float] | None = None
) -> Comparison:
    """A comparison with these scores, by arm and seed."""
    base = {"in_domain": 0.0, "out_of_domain": 0.9, "sample_entropy": 0.2, "sample_kl": 0.0} | dict(base or {})
    results = {
        name: {seed: make_result(f"{name}-seed{seed}", scores) for seed, scores in runs.items()}
        for name, runs in arms.items()
    }
    return Comparison(
        name="made up",
        metric=metric,
        base=base,
        base_completions={},
        arms={name: ArmResult(name, ARMS[name].what, 1e-3, True, runs) for name, runs in results.items()},
        pairs=pairs([ARMS[name] for name in arms], dict.fromkeys(arms, 1e-3)),
        overlap={},
        counts={"train": 16},
        settings={"versions": {"qpsft": "0"}},
    )


class FakeRuns:
    """In place of `do_run`: keeps results of scores that a function makes up, and counts.

    Args:
        scores: spec -> (scores after each epoch, validation score).
        stop_after: raise KeyboardInterrupt instead of the run after so many.
        diverges: spec -> whether training diverges after the first epoch.
    """

    def __init__(
        self,
        scores: Callable[[RunSpec], tuple[Scores, float]],
        stop_after: int | None = None,
        diverges: Callable[[RunSpec], bool] = lambda spec: False,
    ):
        self.scores = scores
        self.stop_after = stop_after
        self.diverges = diverges
        self.specs: list[RunSpec] = []

    def __call__(self, spec: RunSpec, setting: Setting, results: Path) -> dict[str, Any]:
        if self.stop_after is not None and len(self.specs) >= self.stop_after:
            raise KeyboardInterrupt
        self.specs.append(spec)
        scores, validation = self.scores(spec)
        result = make_result(spec.label, scores, validation) | {"identity": spec.identity(setting)}
        if spec.method and self.diverges(spec):
            del result["points"][1:]
            result["points"][0]["metrics"].pop("validation", None)
            result["diverged"] = {"step": 6, "error": "Training stopped at optimizer step 6: the loss is infinite."}
        keep_result(result, spec.folder(setting, results))
        return result
