"""Evaluation while a run trains, on rows of its own: their tokens, early stopping, and which step was the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from qpsft.data.tokenize import TokenizedRows, load_dataset
from qpsft.errors import DataError
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.file import Recipe
from qpsft.terminal import wrap


def load_evaluation_set(recipe: Recipe, tokenizer: Any) -> TokenizedRows | None:
    """The rows of `eval_dataset`, prepared as the training rows are; None if there are none.

    Raises:
        DataError: as `load_dataset`, beginning with `eval_dataset`.
    """
    name = recipe.data.eval_dataset
    if not name:
        return None
    same = name == recipe.data.dataset_name
    arguments = replace(
        recipe.data,
        dataset_name=name,
        dataset_limit=None,
        dataset_mix=None,
        streaming=False,
        dataset_config=recipe.data.dataset_config if same else None,
        dataset_revision=recipe.data.dataset_revision if same else None,
    )
    try:
        return load_dataset(arguments, tokenizer, recipe.trainer.max_length, recipe.data.dataset_test_split)
    except DataError as error:
        raise type(error)(f"eval_dataset: {error.what}", error.todo) from None


def evaluation_set_line(rows: TokenizedRows) -> str:
    """What is evaluated on while training, in a line or two of at most 80 columns."""
    facts = [f"{len(rows.dataset):,} rows", f"{rows.counts.supervised_tokens:,} supervised tokens"]
    line = wrap(f"eval: {rows.name} ({rows.shape}): {', '.join([*facts, *rows.counts.facts()])}", " " * 6)
    return "\n".join([line, *rows.counts.bad_rows])


def stop_early(trainer: PSFTTrainer, patience: int | None) -> None:
    """Has a trainer stop once `metric_for_best_model` has not got better in `patience` evaluations in a row."""
    if patience is not None:
        trainer.args.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        trainer.add_callback(EarlyStoppingCallback(patience))


def best_step(trainer: PSFTTrainer) -> int | None:
    """The step whose weights `load_best_model_at_end` has put back; None where the last ones are there."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return None if best is None else int(Path(best).name.rpartition("-")[2])


def evaluation_summary(trainer: PSFTTrainer, patience: int | None) -> list[str]:
    """What evaluations decided: sentences for the run's summary and the model card."""
    state, metric, lines = trainer.state, trainer.args.metric_for_best_model, []
    name = {"loss": "nll"}.get(metric, metric)
    counts = [one.early_stopping_patience_counter for one in early_stoppings(trainer)]
    if patience is not None and max(counts) >= patience and state.global_step < state.max_steps:
        lines.append(f"stopped early at step {state.global_step}: no better {name} in {patience} evaluations")
    if (best := best_step(trainer)) is not None:
        lines.append(f"written: the best adapter, of step {best}, evaluation {name} {state.best_metric:.4f}")
    return lines


def early_stoppings(trainer: PSFTTrainer) -> list[EarlyStoppingCallback]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
