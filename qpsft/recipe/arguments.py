"""What a run is: argument dataclasses, read strictly from YAML and flags, one definition per option.

An option is declared once, as a dataclass field; its name is the YAML key, the flag (`--name value`) and the Python
argument, its metadata the help text. The trainer's own dataclass (`PSFTConfig`) is in a higher layer and is passed in
by the caller, so this module needs neither torch nor transformers.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qpsft.errors import RecipeError
from qpsft.recipe.flags import option, option_types, read_values
from qpsft.recipe.methods import METHODS

Quantization = Literal["nf4", "fp4", "none"]


@dataclass(kw_only=True)
class BaseOptions:
    """Where an adapter's base is, and how it was rounded if its record does not say: for verbs that use an adapter."""

    base: str | None = option(
        None, "the base's folder or Hub id, if it is no longer where the adapter says", metavar="MODEL"
    )
    quantization: Quantization | None = option(
        None, "how the base was loaded in training, for an adapter that PEFT, TRL, Unsloth or another tool trained"
    )
    double_quant: bool | None = option(
        None, "the same, bnb_4bit_use_double_quant (if unset: true)", metavar="{true,false}"
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "the same, bnb_4bit_compute_dtype (if unset: the base's 16-bit dtype)"
    )
    quantized_on: Literal["cpu", "cuda"] | None = option(None, "the same, where it was quantized (if unset: cuda)")


@dataclass(kw_only=True)
class LoadOptions(BaseOptions):
    """How a model, or an adapter on its base, is loaded and its prompts are written: for verbs that ask it."""

    quantization: Quantization | None = option(
        None,
        "of a model without adapter (default: nf4; none for a merged one), or how the base of an adapter that another "
        "tool trained was loaded in training",
    )
    device: str = option("auto", "cpu, cuda, …", metavar="NAME")
    use_chat_template: Literal["auto", "always", "never"] | None = option(
        None, "put plain-string prompts through the chat template (default: as in training)"
    )
    prompt_format: str | None = option(None, "text around a plain-string prompt (default: as in training)")


@dataclass
class ModelArguments:
    """The base model: what `qpsft.model.base.load_base` takes."""

    model_name_or_path: str | None = option(
        None, "Base model: a local folder, a Hub id, or `demo` for the embedded one. Names follow TRL's ModelConfig."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a base model from the Hub.")
    quantization: Quantization = option("nf4", "Storage of the base model's linear layers. nf4 is QLoRA's format.")
    double_quant: bool = option(True, "Quantize the quantization constants too: 0.37 bits per weight less.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Compute dtype. auto: bfloat16 on CUDA sm >= 80; on older cards float16, or float32 for models that "
        "overflow in it (Gemma 2 and newer, …); float32 on the CPU.",
    )
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …; transformers chooses if unset.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and not self.model_name_or_path.strip():
            raise RecipeError("model_name_or_path is empty.", "Give a local folder, a Hub id, or `demo`.")


@dataclass
class LoraArguments:
    """The adapter: what becomes a `peft.LoraConfig`. Names follow TRL's ModelConfig where it has one."""

    adapter_name_or_path: str | None = option(
        None,
        "Go on training this adapter, a folder or Hub id, from qpsft, TRL, Unsloth or PEFT. It brings its own rank, "
        "scale, targets and tokenizer; options beside it that say otherwise are refused.",
    )
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: float | None = option(
        None,
        "Scale of the adapter: its output is multiplied by alpha / r (alpha / sqrt(r) for rsLoRA). Unset: 2 x lora_r.",
    )
    lora_dropout: float = option(
        0.0, "Dropout on the adapter's input. 0, because dropout makes the ratio differ from 1 right after a snapshot."
    )
    lora_target_modules: str | list[str] = option(
        "all-linear",
        "Module names to adapt. all-linear: every linear layer of the language model but its LM head; of most mixtures "
        "the experts and the router in place of the other MLPs.",
    )
    lora_modules_to_save: list[str] | None = option(None, "Modules trained in full and saved with the adapter.")
    use_rslora: bool = option(False, "Rank-stabilised scaling: alpha / sqrt(r).")
    use_dora: bool = option(False, "Weight-decomposed LoRA: a trained magnitude per output feature.")

    def __post_init__(self) -> None:
        if self.adapter_name_or_path is not None and not self.adapter_name_or_path.strip():
            raise RecipeError("adapter_name_or_path is empty.", "Give a folder or a Hub id, or leave it out.")
        if self.lora_r <= 0:
            raise RecipeError(f"lora_r is {self.lora_r}; a rank must be at least 1.", "Usual values are 8 to 64.")
        if self.lora_r > 2**16:
            raise RecipeError(f"lora_r is {self.lora_r}; no layer has as many dimensions.", "Usual values are 8 to 64.")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_r  # a fixed number would double the scale when the rank alone is halved
        if not 0 < self.lora_alpha <= 1e6:
            raise RecipeError(
                f"lora_alpha is {self.lora_alpha}; it must be above 0 and at most 1e6.", "Usual: once or twice lora_r."
            )
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1).", "Leave it at 0 for PSFT.")


@dataclass
class DataArguments:
    """The demonstrations: what `qpsft.data.tokenize.load_dataset` takes."""

    dataset_name: str | None = option(
        None,
        "A .jsonl, .json, .csv or .parquet file, a Hub id, or one of the built-in sets demo-noisy and demo-clean.",
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset (GSM8K's `main`).")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    dataset_train_split: str = option("train", "Split of a Hub dataset to train on.")
    dataset_limit: int | None = option(None, "Use only the first N rows.")
    eval_dataset: str | None = option(
        None, "Rows to evaluate on while training, in the shape of the training rows: see eval_strategy and eval_steps."
    )
    dataset_test_split: str = option(
        "test", "Split of an eval_dataset or of a guard's data from the Hub or the built-in sets."
    )
    dataset_mix: list[dict] | None = option(
        None,
        "Several sources in stated shares of the rows of every mini-batch, instead of dataset_name. Written in YAML as "
        "a list of {dataset_name: …, share: 0.2, …}, each with its own dataset_config, dataset_train_split, "
        "dataset_columns and so on; one share may be left out and is the rest. An epoch is one pass over the first "
        "source; others are repeated where they are too small.",
    )
    streaming: bool = option(
        False,
        "Read rows while training, from a Hub dataset, .jsonl (also .gz) or .parquet, instead of all before. Needs "
        "max_steps and num_iterations 1; not with packing, dataset_mix or replay.",
    )
    streaming_buffer: int = option(
        1000, "Rows held in memory with streaming, out of which the next is drawn at random. 1: the source's order."
    )
    dataset_shape: Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text"] = option(
        "auto", "Shape of the rows; auto detects it from the columns."
    )
    dataset_columns: dict | None = option(
        None,
        "Mapping from a known column to yours, such as {prompt: question, completion: answer}; {system: null} leaves a "
        "column out.",
    )
    skip_bad_rows: bool = option(
        False, "Leave out rows that cannot be used and count them, instead of stopping at them."
    )
    split_turns: bool = option(
        False,
        "Make one row of each answer of a conversation, with all that precedes it as context. Keeps the reasoning that "
        "a chat template strips from earlier answers.",
    )
    refuse_special_tokens: bool = option(
        False, "Refuse rows whose text holds special tokens, such as <|im_end|>, instead of warning of them."
    )
    use_chat_template: Literal["auto", "always", "never"] = option(
        "auto",
        "Render plain-string prompt/completion and Alpaca rows through the chat template. auto: if there is one.",
    )
    prompt_format: str = option(
        "{prompt}",
        "Text around a plain-string prompt, such as 'Question: {prompt}\\nAnswer:\\n'. End it where a token ends, "
        "not in a space.",
    )
    supervise_prompt: bool = option(False, "Train on the prompt's tokens too (continued pretraining).")
    chat_date: str | None = option(
        None,
        "YYYY-MM-DD: the day for chat templates that print today's date (Llama 3.2, SmolLM3). Unset: the day the run "
        "starts, also when it is resumed later.",
    )

    replay_share: float | None = option(
        None,
        "Share of the rows of every mini-batch that keeps old skills: rows of replay_dataset, or the base's own "
        "answers to prompts, sampled once before training.",
    )
    replay_dataset: str | dict | None = option(
        None, "Rows to replay: a file or Hub id, or a mapping as in dataset_mix, without share."
    )
    replay_prompts: str | None = option(
        None,
        "Prompts whose answers by the base are replayed: a .txt file with one a line, or rows with a column `prompt`. "
        "Unset, without replay_dataset: about 100 short general ones of qpsft's own, for bases with a chat template.",
    )
    replay_samples: int = option(1, "Answers sampled per prompt, at temperature 1.")
    replay_max_new_tokens: int = option(
        256, "Tokens of a sampled answer at most; answers that do not end within them are dropped and counted."
    )

    def __post_init__(self) -> None:
        for name in ("streaming_buffer", "replay_samples", "replay_max_new_tokens"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
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

    method: str | None = option(
        None,
        "A published method by name; it sets the options of the method (docs/methods.md), and what is given beside it "
        f"wins. {', '.join(METHODS)}.",
        choices=list(METHODS),
        metavar="NAME",
    )
    resume: bool = option(False, "Continue the run in output_dir from its newest whole checkpoint.")
    overwrite: bool = option(False, "Replace the run that output_dir holds; your own files there stay.")
    held_out_rows: int = option(
        16, "Rows kept from training, at most a tenth of them, to verify merged and exported models on."
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop when metric_for_best_model (default: loss) has not got better in so many evaluations one after another.",
    )
    guard: dict | None = option(
        None,
        "An old skill that must not be lost, such as {data: old.jsonl, metric: accuracy, max_drop: 0.05, every: 50, "
        "action: stop}; docs/guard.md has every key.",
    )
    compare: dict | None = option(
        None, "Options of `qpsft compare` on this recipe, such as {in_domain: test.jsonl}; training ignores them."
    )

    def __post_init__(self) -> None:
        if self.held_out_rows < 0:
            raise RecipeError(f"held_out_rows is {self.held_out_rows}; it must not be negative.", "0 keeps none.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise RecipeError(
                f"early_stopping_patience is {self.early_stopping_patience}; it must be at least 1.",
                "Leave it out to train to the end.",
            )
        if self.resume and self.overwrite:
            raise RecipeError("resume and overwrite contradict each other.", "Give one of them.")


@dataclass
class GuardArguments:
    """The keys of `guard`: rows of an old skill, how it is measured, and what happens when too much of it is lost."""

    data: str | None = option(None, "Rows with references for what the base can do: a file, Hub id or built-in set.")
    metric: Literal["accuracy", "nll", "kl"] = option(
        "accuracy",
        "accuracy: greedy answers that a verifier finds right. nll: of the references, nats per token. kl: KL(base || "
        "policy) along the references, nats per token.",
    )
    max_drop: float = option(
        0.05, "How far accuracy may fall below the base's, or nll or kl rise above it; in the metric's unit."
    )
    every: int = option(50, "Measure every so many optimizer steps, and at the end.")
    action: Literal["stop", "lower_lr", "warn"] = option(
        "stop",
        "Beyond the limit: stop, and write the last adapter inside it; lower_lr, go on from that adapter at half the "
        "learning rate, a few times at most; or warn, and go on.",
    )
    limit: int | None = option(None, "Use only the first N rows.")
    columns: dict | None = option(None, "Mapping from a known column to the data's, as dataset_columns.")
    verifier: str = option("auto", "What makes an answer right, as in qpsft evaluate.")
    max_new_tokens: int = option(256, "Length cap of answers.")

    def __post_init__(self) -> None:
        if not self.data:
            raise RecipeError(
                "guard: data is missing.", "Name rows of a skill that must not be lost, such as old.jsonl."
            )
        if not self.max_drop > 0:
            raise RecipeError(f"guard: max_drop is {self.max_drop}; it must be above 0.", "Usual: 0.02 to 0.1.")
        for name in ("every", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"guard: {name} is {value}; it must be at least 1.")


def read_guard(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The mapping `guard` of a recipe, checked and complete.

    Args:
        where: what to call it in an error: its flag, or its file and key.

    Raises:
        RecipeError: a key is unknown, with the nearest right name, or a value is of another type or out of range.
    """
    hints = option_types([GuardArguments])
    places = {name: f"{where}: {name}" for name in given}
    others = f"Its keys are {', '.join(hints)}."
    return asdict(GuardArguments(**read_values(given, hints, places, others=others)))
