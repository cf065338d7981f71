"""What a run is: argument dataclasses, read strictly from YAML and flags, one definition per option.

An option is declared once, as a dataclass field; its name is the YAML key, the flag (`--name value`) and the Python
argument, its metadata the help text. The trainer's own dataclass (`PSFTConfig`) lives a floor higher and is handed in
by the caller, so this module needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import enum
import re
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qpsft.errors import RecipeError
from qpsft.options import coerce, refuse_without_effect
from qpsft.recipe_file import find_beside, read_recipe_file

Quantization = Literal["nf4", "fp4", "int8", "none"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The base model: what `qpsft.base.load_base` takes."""

    model_name_or_path: str | None = _option(
        None, "Base model: a local folder, a Hub id, or `demo` for the embedded one. Names follow TRL's ModelConfig."
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of a base model from the Hub.")
    quantization: Quantization = _option("nf4", "Storage of the base model's linear layers. nf4 is QLoRA's format.")
    double_quant: bool = _option(True, "Quantize the quantization constants too: 0.37 bits per weight less.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Compute dtype. auto: bfloat16 on CUDA sm >= 80; on older cards float16, or float32 for models that "
        "overflow in it (Gemma 2 and newer, …); float32 on the CPU.",
    )
    attn_implementation: str | None = _option(None, "sdpa, eager, flash_attention_2, …; transformers chooses if unset.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and not self.model_name_or_path.strip():
            raise RecipeError("model_name_or_path is empty.", "Give a local folder, a Hub id, or `demo`.")


@dataclass
class LoraArguments:
    """The adapter: what becomes a `peft.LoraConfig`. Names follow TRL's ModelConfig where it has one."""

    adapter_name_or_path: str | None = _option(
        None,
        "Go on training this adapter, a folder or Hub id, from qpsft, TRL, Unsloth or PEFT. It brings its own rank, "
        "scale, targets and tokenizer; options beside it that say otherwise are refused.",
    )
    lora_r: int = _option(16, "Rank of the adapter.")
    lora_alpha: float | None = _option(
        None,
        "Scale of the adapter: its output is multiplied by alpha / r (alpha / sqrt(r) for rsLoRA). Unset: 2 x lora_r.",
    )
    lora_dropout: float = _option(
        0.0, "Dropout on the adapter's input. 0, because dropout makes the ratio differ from 1 right after a snapshot."
    )
    lora_target_modules: str | list[str] = _option(
        "all-linear", "Module names to adapt. all-linear: every linear layer of the language model but its LM head."
    )
    lora_modules_to_save: list[str] | None = _option(None, "Modules trained in full and saved with the adapter.")
    lora_bias: Literal["none", "all", "lora_only"] = _option("none", "Which biases are trained.")
    use_rslora: bool = _option(False, "Rank-stabilised scaling: alpha / sqrt(r).")
    use_dora: bool = _option(False, "Weight-decomposed LoRA: a trained magnitude per output feature.")
    init_lora_weights: bool | str = _option(
        True, "true (A random, B zero), gaussian, or with quantization: none also pissa, pissa_niter_4 and olora."
    )

    def __post_init__(self) -> None:
        if self.adapter_name_or_path is not None and not self.adapter_name_or_path.strip():
            raise RecipeError("adapter_name_or_path is empty.", "Give a folder or a Hub id, or leave it out.")
        if self.lora_r <= 0:
            raise RecipeError(f"lora_r is {self.lora_r}; a rank must be at least 1.", "Usual values are 8 to 64.")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_r  # a fixed number would double the scale when the rank alone is halved
        if self.lora_alpha <= 0:
            raise RecipeError(f"lora_alpha is {self.lora_alpha}; it must be above 0.", "Usual: once or twice lora_r.")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1).", "Leave it at 0 for PSFT.")


@dataclass
class DataArguments:
    """The demonstrations: what `qpsft.data.load_dataset` takes."""

    dataset_name: str | None = _option(
        None,
        "A .jsonl, .json, .csv or .parquet file, a Hub id, or one of the built-in sets demo-noisy and demo-clean.",
    )
    dataset_config: str | None = _option(None, "Configuration of a Hub dataset (GSM8K's `main`).")
    dataset_revision: str | None = _option(None, "Branch, tag or commit of a Hub dataset.")
    dataset_train_split: str = _option("train", "Split of a Hub dataset to train on.")
    dataset_limit: int | None = _option(None, "Use only the first N rows.")
    dataset_shape: Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text"] = _option(
        "auto", "Shape of the rows; auto detects it from the columns."
    )
    dataset_columns: dict | None = _option(
        None, "Mapping from a known column to yours, such as {prompt: question, completion: answer}."
    )
    use_chat_template: Literal["auto", "always", "never"] = _option(
        "auto",
        "Render plain-string prompt/completion and Alpaca rows through the chat template. auto: if there is one.",
    )
    prompt_format: str = _option(
        "{prompt}",
        "Text around a plain-string prompt, such as 'Question: {prompt}\\nAnswer:\\n'. End it where a token ends, "
        "not in a space.",
    )
    supervise_prompt: bool = _option(False, "Train on the prompt's tokens too (continued pretraining).")
    chat_date: str | None = _option(
        None,
        "YYYY-MM-DD: the day for chat templates that print today's date (Llama 3.2, SmolLM3). Unset: the day the run "
        "starts, also when it is resumed later.",
    )

    def __post_init__(self) -> None:
        if self.dataset_limit is not None and self.dataset_limit <= 0:
            raise RecipeError(
                f"dataset_limit is {self.dataset_limit}; it must be at least 1.", "Leave it out for all rows."
            )
        if "{prompt}" not in self.prompt_format:
            raise RecipeError(f"prompt_format {self.prompt_format!r} lacks {{prompt}}.", "Put {prompt} where it goes.")
        if self.chat_date is not None:
            try:
                datetime.date.fromisoformat(self.chat_date)
            except ValueError:
                raise RecipeError(
                    f"chat_date is {self.chat_date!r}, which is no day.", "Write it as 2026-11-23, or leave it out."
                ) from None


@dataclass
class RunArguments:
    """What happens around training."""

    resume: bool = _option(False, "Continue the run in output_dir from its newest whole checkpoint.")
    overwrite: bool = _option(False, "Replace the run that output_dir holds.")
    held_out_rows: int = _option(
        16, "Rows kept from training, at most a tenth of them, to verify merged and exported models on."
    )
    compare: dict | None = _option(
        None, "Options of `qpsft compare` on this recipe, such as {in_domain: test.jsonl}; training ignores them."
    )

    def __post_init__(self) -> None:
        if self.held_out_rows < 0:
            raise RecipeError(f"held_out_rows is {self.held_out_rows}; it must not be negative.", "0 keeps none.")
        if self.resume and self.overwrite:
            raise RecipeError("resume and overwrite contradict each other.", "Give one of them.")


# The trainer's options that people set most; the others are as good as these in YAML, flags and Python.
COMMON_TRAINER_OPTIONS = (
    "output_dir", "num_train_epochs", "max_steps", "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "optim", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "packing", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "seed",
    "report_to", "bf16", "fp16", "use_cpu", "trust_remote_code",
)  # fmt: skip


@dataclass
class Recipe:
    """A run, resolved.

    Attributes:
        path: the YAML file, if there was one.
        given: the options that YAML and flags set, flags winning.
        trainer: an instance of the trainer class handed to `load_recipe`.
    """

    path: Path | None
    given: dict[str, Any]
    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    run: RunArguments
    trainer: Any

    def values(self) -> dict[str, Any]:
        """The resolved options, those of the trainer that are common, its own or given; enough to repeat the run."""
        values = {}
        for part in (self.model, self.data, self.lora):
            values |= dataclasses.asdict(part)
        if self.lora.adapter_name_or_path:  # which brings along what is not given here
            kept = {*self.given, "adapter_name_or_path", "lora_dropout"}
            values = {n: v for n, v in values.items() if n in kept or not hasattr(self.lora, n)}
        own = set(getattr(type(self.trainer), "__annotations__", ())) | set(COMMON_TRAINER_OPTIONS) | set(self.given)
        for option in dataclasses.fields(self.trainer):
            if option.name in own:
                value = getattr(self.trainer, option.name)
                values[option.name] = value.value if isinstance(value, enum.Enum) else value
        return values


def load_recipe(path: str | Path | None, flags: Sequence[str], trainer_class: type) -> Recipe:
    """Reads a YAML file and command-line flags into a `Recipe`.

    Args:
        path: YAML file with a flat mapping (`qpsft.recipe_file`), or None.
        flags: `--name value`, `--name=value`, `--name` (true), `--name a b` (a list).
        trainer_class: dataclass of the trainer's options (`PSFTConfig`).

    Raises:
        RecipeError: the file is missing or no mapping, an option is unknown (with the nearest right name), a value is
            of the wrong type or out of range.
    """
    path = None if path is None else Path(path)
    classes = (ModelArguments, LoraArguments, DataArguments, RunArguments, trainer_class)
    hints = option_types(classes)
    given, where = ({}, {}) if path is None else read_recipe_file(path)
    for name, text in _read_flags(flags).items():
        given[name], where[name] = text, f"--{name}"
    refuse_without_effect(given, where)
    for name in given:
        if name not in hints:
            likely = {*option_types(classes[:-1]), *trainer_class.__annotations__, *COMMON_TRAINER_OPTIONS}
            raise RecipeError(f"{where[name]}: there is no such option.", _suggestion(name, hints, likely))
        given[name] = coerce(given[name], hints[name], where[name])
    _default_output_dir(given, path)
    find_beside(given, path)
    if given.get("dtype", "auto") != "auto" and not {"bf16", "fp16"} & set(given):
        # the trainer's mixed precision follows the base's compute dtype
        given |= {"bf16": given["dtype"] == "bfloat16", "fp16": given["dtype"] == "float16"}
    parts = [_build(cls, given, where) for cls in classes]
    return Recipe(path, given, parts[0], parts[1], parts[2], parts[3], parts[4])


def option_types(classes: Sequence[type]) -> dict[str, Any]:
    """Option name -> declared type, over dataclasses that share no name."""
    hints: dict[str, Any] = {}
    for cls in classes:
        types_of = typing.get_type_hints(cls)
        for option in dataclasses.fields(cls):
            if option.init:
                hints.setdefault(option.name, types_of[option.name])
    return hints


def _read_flags(flags: Sequence[str]) -> dict[str, str | list[str] | bool]:
    read: dict[str, str | list[str]] = {}
    name = None
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            name = name.replace("-", "_")
            read[name] = value if equals else []
            if equals:
                name = None
        elif name is None:
            raise RecipeError(f"{flag!r} belongs to no option.", "Flags are written --name value.")
        else:
            read[name] = [*read[name], flag]
    return {n: v if isinstance(v, str) else True if not v else v[0] if len(v) == 1 else v for n, v in read.items()}


def _suggestion(name: str, known: typing.Iterable[str], likely: set[str]) -> str:
    def nearness(option: str) -> float:
        return difflib.SequenceMatcher(None, option, name).ratio() + 0.1 * (option in likely)

    near = sorted(difflib.get_close_matches(name, list(known), n=9, cutoff=0.6), key=nearness, reverse=True)
    return f"Did you mean {' or '.join(near[:3])}?" if near else "`qpsft train --help_all` lists all options."


def _default_output_dir(given: dict[str, Any], path: Path | None) -> None:
    if given.get("output_dir") is None:
        folder = "runs/qpsft" if path is None else path if path.is_dir() else path.parent
        given["output_dir"] = str(folder)


def _build(cls: type, given: dict[str, Any], where: dict[str, str]) -> Any:
    names = {option.name for option in dataclasses.fields(cls) if option.init}
    try:
        return cls(**{name: value for name, value in given.items() if name in names})
    except RecipeError:
        raise
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        about = _blamed(str(error), {name: given[name] for name in where if name in names})
        start = where[about] if about else "The options do not fit together"
        raise RecipeError(f"{start}: {str(error).rstrip(' .')}", "Change or leave out that option.") from error


def _blamed(message: str, given: dict[str, Any]) -> str | None:
    """The option that a library's message names, or whose value it names first."""
    places = {}
    for name, value in given.items():
        for word in (name, *([value] if isinstance(value, str) and value else [])):
            found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)
            if found:
                places[name] = min(places.get(name, len(message)), found.start())
    return min(places, key=places.get) if places else None


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
