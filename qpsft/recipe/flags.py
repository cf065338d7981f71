"""Strict reading of options: the declared type or an error that says what it must be, and no option without effect."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from qpsft.errors import RecipeError
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments

_ORDERED = (str, float, int, bool)

_ROWS = "qpsft tokenizes the rows itself"
# Options of trl.SFTConfig that PSFTTrainer takes from Python, but that `qpsft train` would leave without effect.
_NOT_OURS = {
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
_NO_EVALUATION = ("training has no evaluation set", "Run `qpsft evaluate` on the adapter.")


def refuse_without_effect(given: dict[str, Any], where: dict[str, str]) -> None:
    """Stops at options of the trainer's that a run from a recipe has no use for.

    Args:
        given: the options set, before or after `coerce`.
        where: what to call each in an error.

    Raises:
        RecipeError: with the option to use instead.
    """
    for name, value in given.items():
        on = str(value).lower() not in ("false", "no", "none")
        if name in _NOT_OURS and value is not None and (on or name != "shuffle_dataset"):
            why, todo = _NOT_OURS[name]
        elif name in ("eval_strategy", "do_eval", "eval_on_start") and on:
            why, todo = _NO_EVALUATION
        elif name == "push_to_hub" and on:
            why, todo = "training uploads nothing", "Run `qpsft push` on the adapter afterwards."
        elif name == "packing_strategy" and str(value) == "bfd_split":
            why, todo = "rows are cut at max_length before they are packed", "Leave it out, or raise max_length."
        elif name == "padding_free" and on and str(given.get("packing", "false")).lower() == "false":
            why, todo = "rows that are not packed are padded", "Set packing: true, or leave it out."
        else:
            continue
        raise RecipeError(f"{where[name]} has no effect in `qpsft train`: {why}.", todo)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the declared type of an option; texts (from flags, or YAML's 1e-4) are read as YAML and as they are.

    Args:
        hint: a type annotation: bool, int, float, str, an Enum, Literal, list, dict, and unions of these.
        where: what to call the option in an error.

    Raises:
        RecipeError: the value is of another type.
    """
    candidates = [value]
    if isinstance(value, str):
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = value
        read = None if value.lower() == "none" else read
        candidates = [value, read] if _accepts(hint, str) and not isinstance(read, (list, dict)) else [read, value]
    elif isinstance(value, list) and not _accepts(hint, list):
        value = " ".join(map(str, value))
    for candidate in candidates:
        try:
            return _conform(candidate, hint)
        except (TypeError, ValueError):
            continue
    if value is True and where.startswith("--"):
        raise RecipeError(f"{where} needs a value.", f"It must be {_describe(hint)}.")
    raise RecipeError(f"{where} is {value!r}; it must be {_describe(hint)}.")


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(member is kind or typing.get_origin(member) is kind for member in _members(hint))


def _conform(value: Any, hint: Any) -> Any:
    members = _members(hint)
    if len(members) > 1:
        # bool before int before float before str: the narrowest reading wins
        for member in sorted(members, key=lambda m: _ORDERED.index(m) if m in _ORDERED else -1)[::-1]:
            try:
                return _conform(value, member)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if hint is Any:
        return value
    if hint in (None, type(None)):
        if value is not None:
            raise ValueError
        return None
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if origin is list or hint is list:
        inner = (typing.get_args(hint) or (Any,))[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list):
            raise TypeError
        return [_conform(item, inner) for item in value]
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError
        return value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value).value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
        if math.isfinite(number) and number == int(number):
            return int(number)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        number = float(value)
        if math.isfinite(number):
            return number
    if hint is str and isinstance(value, str):
        return value
    if hint is str and type(value) is datetime.date:  # YAML's own reading of 2026-11-23
        return value.isoformat()
    raise ValueError


def _describe(hint: Any) -> str:
    names = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            names += [str(choice) for choice in typing.get_args(member)]
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            names += [str(choice.value) for choice in member]
        elif member is not type(None):
            word = {
                bool: "true or false",
                int: "a whole number",
                float: "a finite number",
                str: "a text",
                dict: "a mapping",
            }
            names.append(word.get(member, "a list" if typing.get_origin(member) is list else str(member)))
        else:
            names.append("none")
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


# The trainer's options that people set most; the others are as good as these in YAML, flags and Python.
COMMON_TRAINER_OPTIONS = (
    "output_dir", "num_train_epochs", "max_steps", "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "optim", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "packing", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "seed",
    "report_to", "bf16", "fp16", "use_cpu", "trust_remote_code",
)  # fmt: skip


def option_types(classes: Sequence[type]) -> dict[str, Any]:
    """Option name -> declared type, over dataclasses that share no name."""
    hints: dict[str, Any] = {}
    for cls in classes:
        types_of = typing.get_type_hints(cls)
        for option in dataclasses.fields(cls):
            if option.init:
                hints.setdefault(option.name, types_of[option.name])
    return hints


def option_help(trainer_class: type, *, everything: bool = False) -> str:
    """The options with their defaults and explanations, as `qpsft train --help` prints them.

    Args:
        everything: also the trainer's options that few people set.
    """
    sections = [
        ("run", RunArguments, None),
        ("base model", ModelArguments, None),
        ("data", DataArguments, None),
        ("adapter", LoraArguments, None),
        ("method", trainer_class, set(vars(trainer_class).get("__annotations__", ())) - set(COMMON_TRAINER_OPTIONS)),
        ("training", trainer_class, set(COMMON_TRAINER_OPTIONS)),
    ]
    if everything:
        shown = sections[-1][2] | sections[-2][2]
        names = {option.name for option in dataclasses.fields(trainer_class) if option.init} - shown
        sections.append(("everything else of transformers and TRL", trainer_class, names))
    lines = []
    for title, cls, names in sections:
        lines.append(f"{title}:")
        for option in dataclasses.fields(cls):
            if option.init and (names is None or option.name in names):
                lines += _explain(option)
        lines.append("")
    lines.append("A recipe may begin with `extends: other.yaml` and give only what differs.")
    if not everything:
        lines.append("--help_all lists every option of transformers' and TRL's trainers too.")
    return "\n".join(lines)


def _explain(option: dataclasses.Field) -> list[str]:
    default = None if option.default is dataclasses.MISSING else option.default
    shown = "unset" if default is None else str(default).lower() if isinstance(default, bool) else default
    text = str(option.metadata.get("help", "")).replace("%%", "%")
    wrapped = textwrap.wrap(f"{text} (default: {shown})", 74, break_on_hyphens=False)
    return [f"  --{option.name}", *(f"      {line}" for line in wrapped)]
