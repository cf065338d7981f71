"""Training that goes on from an adapter that exists: qpsft's own, or one that TRL, Unsloth or plain PEFT trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import BaseModelError, RecipeError
from qpsft.model.adapter import POLICY, adapted_layers, check_trained_biases, targeted_layers, train_copies_in_float32
from qpsft.model.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    find_adapter,
    has_own_tokenizer,
    read_adapter_config,
)
from qpsft.model.base import load_config, load_tokenizer
from qpsft.model.base_record import RECORD_FILE, base_record, read_base_record
from qpsft.model.folder import one_line, resolve_folder
from qpsft.recipe.file import Recipe

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAME_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options that an adapter brings along, and their names in PEFT's config."""
ROUNDING = ("quantization", "double_quant", "block_size")


def check_start(recipe: Recipe) -> None:
    """Checks what a recipe's `adapter_name_or_path` names, if anything, before anything else is loaded.

    Raises:
        BaseModelError, ExportError: as `continue_adapter`.
        RecipeError: a given option is not what the adapter has, or the results would replace it.
    """
    if not recipe.lora.adapter_name_or_path:
        return
    folder, output = find_adapter(recipe.lora.adapter_name_or_path), Path(recipe.trainer.output_dir)
    if output.resolve() in (folder.resolve(), folder.resolve().parent):  # the run's adapter, or a checkpoint's
        raise RecipeError(
            f"output_dir {output} holds the adapter that training is to go on from, {folder}.",
            "Choose another --output_dir, so that the start stays what it is.",
        )
    config, given = read_adapter_config(folder), recipe.given
    for name, own in SAME_OPTIONS.items():
        if name in given and given[name] != getattr(config, own):
            raise _another(folder, name, given[name], getattr(config, own))
    if "lora_modules_to_save" in given:
        asked, has = (sorted(names or []) for names in (given["lora_modules_to_save"], config.modules_to_save))
        if asked != has:
            raise _another(folder, "lora_modules_to_save", ", ".join(asked) or None, ", ".join(has) or None)


def continue_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Puts the trained adapter that a recipe's `adapter_name_or_path` names on `model`, to be trained further.

    Args:
        model: what `load_base` returned.
        recipe: `lora_dropout` is used too; all else is the adapter's own, and options that were given must say so.

    Returns:
        The PEFT model, its adapter called "default" whatever it was called before. Exactly the adapter's parameters
        require gradients, and all of them are float32, with the very values of the file (16-bit ones widened).

    Raises:
        BaseModelError: no such adapter; it is for another base, or on the LM head, or its file is incomplete.
        ExportError: not LoRA, or a kind of LoRA that could not be merged afterwards.
        RecipeError: `lora_target_modules` was given and is not what the adapter has.
    """
    from peft import get_peft_model

    folder, given = find_adapter(recipe.lora.adapter_name_or_path), recipe.given
    config = read_adapter_config(folder)
    _check_base(folder, config, model)
    check_trained_biases(model, config)
    asked = given.get("lora_target_modules")
    wanted = None if asked is None else set(targeted_layers(model, asked))
    config.init_lora_weights = True  # the values come from the file
    config.inference_mode = False
    config.lora_dropout = recipe.lora.lora_dropout
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(model, config)
            train_copies_in_float32(peft_model)  # before they are filled, or the base's dtype would round them
            loaded = peft_model.load_adapter(
                folder, POLICY, is_trainable=True, torch_device=str(model.device), key_mapping=renamed
            )
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        raise BaseModelError(
            f"The adapter in {folder} does not fit {model.qpsft_source.name}: {one_line(error)}",
            "Give the base it was trained on.",
        ) from error
    _check_complete(folder, peft_model, loaded)
    if wanted is not None and wanted != adapted_layers(peft_model):
        own = sorted({name.rpartition(".")[2] for name in adapted_layers(peft_model)})
        raise _another(folder, "lora_target_modules", asked, ", ".join(own))
    return peft_model


def _another(folder: Path, name: str, asked: Any, has: Any) -> RecipeError:
    return RecipeError(
        f"{name} is {asked}, and the adapter in {folder} that training is to go on from has {has}.",
        f"Leave {name} out: the adapter brings its own. For a new adapter leave adapter_name_or_path out.",
    )


def _check_base(folder: Path, config: LoraConfig, model: PreTrainedModel) -> None:
    """Another base is refused; another rounding of it, or one that cannot be told, is a warning."""
    source = model.qpsft_source
    if not (folder / RECORD_FILE).is_file():
        before = config.base_model_name_or_path
        if before and Path(before).name != Path(source.name).name and before != model.name_or_path:
            warnings.warn(
                f"The adapter in {folder} was trained on {before}, and this run has {source.name}: make sure that "
                "they are the same model.",
                stacklevel=3,
            )
        return
    record = read_base_record(folder)
    if record.config_sha256 != source.config_sha256:
        raise BaseModelError(
            f"The adapter in {folder} was trained on {record.base_model_name_or_path} (config hash "
            f"{record.config_sha256[:12]}…), and {source.name} is another model (config hash "
            f"{source.config_sha256[:12]}…).",
            "Set model_name_or_path to the base it was trained on.",
        )
    now = base_record(model)
    for name in ROUNDING:
        if now[name] != getattr(record, name):
            warnings.warn(
                f"The adapter in {folder} was trained on its base with {name} {getattr(record, name)}, and this run "
                f"has {now[name]}: training starts from another model than the one that was trained.",
                stacklevel=3,
            )
            return


def _check_complete(folder: Path, peft_model: PeftModel, loaded: Any) -> None:
    """Every tensor of the file has a place, every place its tensor, and the LM head is not adapted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrong = [("holds {}, which {} does not call for", name) for name in loaded.unexpected_keys]
    wrong += [("lacks {}, which {} calls for", name) for name in loaded.missing_keys]
    if wrong:
        words, name = wrong[0]
        raise BaseModelError(
            f"{folder / ADAPTER_WEIGHTS} {words.format(name, ADAPTER_CONFIG)} on {peft_model.qpsft_source.name}"
            f"{f' ({len(wrong)} such tensors)' if len(wrong) > 1 else ''}.",
            "The adapter is for another base, or its files do not belong together.",
        )
    if isinstance(peft_model.get_output_embeddings(), BaseTunerLayer):
        raise BaseModelError(
            f"The adapter in {folder} is on the LM head too. The log-probabilities are computed from its weight "
            "directly, so that part would not be trained.",
            "Train a new adapter without the LM head as a target.",
        )


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer a recipe trains with: that of the adapter it goes on from if it has its own, else the base's."""
    trust = recipe.trainer.trust_remote_code
    if recipe.lora.adapter_name_or_path:
        adapter = find_adapter(recipe.lora.adapter_name_or_path)
        if has_own_tokenizer(adapter):
            return load_tokenizer(adapter, trust_remote_code=trust)
    return load_tokenizer(
        recipe.model.model_name_or_path, revision=recipe.model.model_revision, trust_remote_code=trust
    )


def warn_past_context(recipe: Recipe, longest: int) -> None:
    """Warns where the longest row, in tokens, goes on past the base's context. Raises BaseModelError as `load_base`."""
    trust, name = recipe.trainer.trust_remote_code, recipe.model.model_name_or_path
    folder = resolve_folder(name, revision=recipe.model.model_revision, weights=False, remote_code=trust)
    context = getattr(load_config(folder, trust).get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        warnings.warn(
            f"The model's context ends at {context} tokens: rows of up to {longest} would train it on positions that "
            f"it has never seen. Set max_length: {context}.",
            stacklevel=2,
        )
