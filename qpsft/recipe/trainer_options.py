"""The trainer's options in a recipe: which are common, which would have no effect, and how `--help` lists them all."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from qpsft.errors import RecipeError
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.flags import add_flags

# The options that people set most; the others are as good as these in YAML, flags and Python.
COMMON_TRAINER_OPTIONS = (
    "output_dir", "num_train_epochs", "max_steps", "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "optim", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "packing", "logging_steps", "eval_strategy", "eval_steps", "metric_for_best_model",
    "load_best_model_at_end", "save_strategy", "save_steps", "save_total_limit", "seed", "report_to", "bf16", "fp16",
    "use_cpu", "trust_remote_code",
)  # fmt: skip


def own_options(trainer_class: type) -> set[str]:
    """The options that qpsft's own trainer class declares, without those of transformers and TRL."""
    ours = [cls for cls in trainer_class.__mro__ if cls.__module__.partition(".")[0] == "qpsft"]
    return {name for cls in ours for name in inspect.get_annotations(cls)}


def add_recipe_flags(parser: argparse.ArgumentParser, trainer_class: type, *, everything: bool = False) -> None:
    """Adds every option of a recipe to a parser, in sections.

    Args:
        trainer_class: dataclass of the trainer's options (`PSFTConfig`).
        everything: whether `--help` lists the trainer's options that few people set too.
    """
    common = set(COMMON_TRAINER_OPTIONS)
    own = own_options(trainer_class) - common
    rest = {field.name for field in dataclasses.fields(trainer_class)} - own - common
    add_flags(parser.add_argument_group("run"), RunArguments)
    add_flags(parser.add_argument_group("base model"), ModelArguments)
    add_flags(parser.add_argument_group("data"), DataArguments)
    add_flags(parser.add_argument_group("adapter"), LoraArguments)
    add_flags(parser.add_argument_group("method"), trainer_class, only=own)
    add_flags(parser.add_argument_group("training"), trainer_class, only=common)
    title = "everything else of transformers and TRL"
    add_flags(parser.add_argument_group(title), trainer_class, only=rest, shown=everything)


_ROWS = "qpsft tokenizes the rows itself"
# Options of trl.SFTConfig that PSFTTrainer takes from Python, but that change nothing in `qpsft train`, and why.
NOT_OURS = {
    "completion_only_loss": (_ROWS, "Set supervise_prompt instead."),
    "assistant_only_loss": (_ROWS, "Set supervise_prompt instead."),
    "truncation_mode": (_ROWS, "Set max_length; the end of longer rows is cut."),
    "dataset_text_field": (_ROWS, "Set dataset_shape or dataset_columns instead."),
    "formatting": (_ROWS, "Set dataset_shape, dataset_columns or prompt_format instead."),
    "dataset_kwargs": (_ROWS, "Set dataset_shape or dataset_columns instead."),
    "dataset_num_proc": (_ROWS, "Leave it out."),
    "chat_template_path": (_ROWS, "Put the template into the base model's folder, as chat_template.jinja."),
    "eos_token": (_ROWS, "Set it in the base model's tokenizer_config.json."),
    "pad_token": ("padding is masked, whatever token fills it", "Leave it out."),
    "shuffle_dataset": ("every epoch has an order of its own already", "Set data_seed for another one."),
    "model_init_kwargs": ("qpsft loads the base itself", "Set dtype, quantization or attn_implementation instead."),
    "resume_from_checkpoint": ("runs continue from their newest whole checkpoint", "Give resume instead."),
}
NEED_EVALUATION = (
    "eval_dataset", "eval_steps", "eval_on_start", "eval_delay", "do_eval", "metric_for_best_model",
    "load_best_model_at_end", "early_stopping_patience",
)  # fmt: skip
BEST_METRICS = {"loss": "loss", "nll": "loss", "mean_token_accuracy": "mean_token_accuracy"}
"""What evaluations log and the best model can be chosen by, and transformers' name for it."""


def refuse_without_effect(given: dict[str, Any], where: dict[str, str]) -> None:
    """Refuses options of the trainer that would change nothing in a run from a recipe; `settle_evaluation` its own.

    Args:
        given: option name -> value, before or after it is read as its declared type.
        where: option name -> what to call it in an error.

    Raises:
        RecipeError: there is such an option; says what to use instead.
    """
    for name, value in given.items():
        on = _is_on(value)
        if name in NOT_OURS and value is not None and (on or name != "shuffle_dataset"):
            why, todo = NOT_OURS[name]
        elif name == "push_to_hub" and on:
            why, todo = "training uploads nothing", "Run `qpsft push` on the adapter afterwards."
        elif name == "packing_strategy" and str(value) == "bfd_split":
            why, todo = "rows are cut at max_length before they are packed", "Leave it out, or raise max_length."
        elif name == "padding_free" and on and str(given.get("packing", "false")).lower() == "false":
            why, todo = "rows that are not packed are padded", "Set packing: true, or leave it out."
        else:
            continue
        raise RecipeError(f"{where[name]} has no effect in `qpsft train`: {why}.", todo)


def _is_on(value: Any) -> bool:
    return str(value).lower() not in ("", "false", "no", "none", "0", "0.0")


def settle_evaluation(given: dict[str, Any], where: dict[str, str], trainer_class: type) -> None:
    """Checks the options of evaluation while training against each other, and adds those that they imply.

    Args:
        given: option name -> value; gets `per_device_eval_batch_size`, and `metric_for_best_model` for early stopping.
        where: option name -> what to call it in an error.
        trainer_class: dataclass of the trainer's options.

    Raises:
        RecipeError: an option that would have no effect, or a metric that evaluations do not have.
    """
    if not _is_on(given.get("eval_strategy", "no")):
        wanted = [name for name in NEED_EVALUATION if name in given and _is_on(given[name])]
        wanted += ["save_strategy"] if given.get("save_strategy") == "best" else []
        if wanted:
            raise RecipeError(
                f"{where[wanted[0]]} has no effect without eval_strategy.",
                "Set eval_strategy: steps and eval_steps: N, or eval_strategy: epoch.",
            )
        return
    if not given.get("eval_dataset"):
        raise RecipeError(f"{where['eval_strategy']}: there is no evaluation set.", "Name one: eval_dataset: FILE.")
    if given.get("early_stopping_patience") is not None and given.get("metric_for_best_model") is None:
        given["metric_for_best_model"] = "loss"
    metric = given.get("metric_for_best_model")
    if metric is not None:
        name = BEST_METRICS.get(metric.removeprefix("eval_"))
        if name is None:
            raise RecipeError(
                f"{where['metric_for_best_model']} is {metric!r}, which evaluations do not choose by.",
                f"Use one of {', '.join(BEST_METRICS)}.",
            )
        given["metric_for_best_model"] = name
    # transformers' default of 8 rows would be more than many cards train on at once
    train_batch = given.get("per_device_train_batch_size", trainer_class.per_device_train_batch_size)
    given.setdefault("per_device_eval_batch_size", train_batch)
