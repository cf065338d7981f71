"""Training that continues a trained adapter: qpsft's own, or one that TRL, Unsloth or plain PEFT trained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import BaseModelError, RecipeError, one_line
from qpsft.model.adapter import POLICY, adapted_layers, check_trained_biases, targeted_layers, train_copies_in_float32
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.adapter_tensors import check_tensors
from qpsft.model.base import load_tokenizer
from qpsft.model.base_record import base_record
from qpsft.model.folder import resolve_folder
from qpsft.model.remote_code import code_is_off
from qpsft.model.skeleton import load_config
from qpsft.recipe.file import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAME_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options that a continued adapter decides, and their names in PEFT's config."""
ROUNDING = ("quantization", "double_quant", "block_size")
"""Entries of the base's record that say how it is rounded."""


def check_start(recipe: Recipe) -> None:
    """Checks the adapter that a recipe's `adapter_name_or_path` names, if any, before anything else is loaded.

    Raises:
        BaseModelError, ExportError: as `continue_adapter`.
        RecipeError: a given option is not what the adapter has, or the results would replace it.
    """
    if not recipe.lora.adapter_name_or_path:
        return
    adapter, output = AdapterFolder.find(recipe.lora.adapter_name_or_path), Path(recipe.trainer.output_dir)
    folder = adapter.path
    if output.resolve() in (folder.resolve(), folder.resolve().parent):  # the run's adapter, or a checkpoint's
        raise RecipeError(
            f"output_dir {output} holds the adapter that training is to continue, {folder}.",
            "Choose another --output_dir, so that this adapter is kept.",
        )
    config, given = adapter.mergeable_config(), recipe.given
    for name, own in SAME_OPTIONS.items():
        if name in given and given[name] != getattr(config, own):
            raise _other_option(folder, name, given[name], getattr(config, own))
    if "lora_modules_to_save" in given:
        asked, has = (sorted(names or []) for names in (given["lora_modules_to_save"], config.modules_to_save))
        if asked != has:
            raise _other_option(folder, "lora_modules_to_save", ", ".join(asked) or None, ", ".join(has) or None)
    base, trust = _base_folder(recipe), recipe.trainer.trust_remote_code
    adapter.check_base(base, same_rounding=False, weights=False, trust_remote_code=trust)


def continue_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Puts the trained adapter that a recipe's `adapter_name_or_path` names on `model`, to be trained further.

    Args:
        recipe: its `lora_dropout` is used; all other LoRA options are the adapter's own, and where one is given it
            must have the same value.

    Returns:
        The PEFT model, its adapter called "default" whatever it was called before. Exactly the adapter's parameters
        require gradients, and all of them are float32, with the very values of the file (16-bit ones widened).

    Raises:
        BaseModelError: no such adapter; it is for another base, or on the LM head; a tensor in its file is missing,
            unknown or of another shape.
        ExportError: not LoRA, or a kind of LoRA that could not be merged afterwards.
        RecipeError: `lora_target_modules` was given and is not what the adapter has.
    """
    adapter = AdapterFolder.find(recipe.lora.adapter_name_or_path)
    config = adapter.mergeable_config()
    adapter.check_identity(_base_folder(recipe), same_rounding=False)
    _warn_of_doubtful_base(adapter, model)
    check_trained_biases(model, config)
    asked = recipe.given.get("lora_target_modules")
    wanted = None if asked is None else set(targeted_layers(model, asked))
    peft_model = _with_values(adapter, model, recipe.lora.lora_dropout)
    _refuse_adapted_head(adapter, peft_model)
    if wanted is not None and wanted != adapted_layers(peft_model):
        own = sorted({name.rpartition(".")[2] for name in adapted_layers(peft_model)})
        raise _other_option(adapter.path, "lora_target_modules", asked, ", ".join(own))
    return peft_model


def _with_values(adapter: AdapterFolder, model: PreTrainedModel, dropout: float) -> PeftModel:
    """The PEFT model with the adapter's values. Raises BaseModelError when they do not fit."""
    from peft import get_peft_model

    config = copy.copy(adapter.config)
    config.init_lora_weights = True  # the values come from the file
    config.inference_mode = False
    config.lora_dropout = dropout
    try:
        with warnings.catch_warnings(), code_is_off():
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(model, config)
            train_copies_in_float32(peft_model)  # before they are filled, or the base's dtype would round them
            check_tensors(adapter.weights_file, adapter.shapes, peft_model, model.qpsft_source.name)
            peft_model.load_adapter(adapter.path, POLICY, is_trainable=True, torch_device=str(model.device))
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        raise BaseModelError(
            f"The adapter in {adapter.path} does not fit {model.qpsft_source.name}: {one_line(error)}",
            "Give the base it was trained on.",
        ) from error
    return peft_model


def _other_option(folder: Path, name: str, asked: Any, has: Any) -> RecipeError:
    return RecipeError(
        f"{name} is {asked}, and the adapter in {folder} that training is to continue has {has}.",
        f"Leave {name} out: the adapter brings its own. For a new adapter leave adapter_name_or_path out.",
    )


def _warn_of_doubtful_base(adapter: AdapterFolder, model: PreTrainedModel) -> None:
    """Warns where the adapter was trained on another rounding of the base, or names another base and has no record."""
    source = model.qpsft_source
    if not adapter.has_record:
        before = adapter.config.base_model_name_or_path
        if before and Path(before).name != Path(source.name).name and before != model.name_or_path:
            warnings.warn(
                f"The adapter in {adapter.path} was trained on {before}, and this run has {source.name}: make sure "
                "that they are the same model.",
                stacklevel=3,
            )
        return
    record, now = adapter.record, base_record(model)
    for name in ROUNDING:
        if now[name] != getattr(record, name):
            warnings.warn(
                f"The adapter in {adapter.path} was trained on its base with {name} {getattr(record, name)}, and this "
                f"run has {now[name]}: training starts from another model than the one that was trained.",
                stacklevel=3,
            )
            return


def _refuse_adapted_head(adapter: AdapterFolder, peft_model: PeftModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(peft_model.get_output_embeddings(), BaseTunerLayer):
        raise BaseModelError(
            f"The adapter in {adapter.path} is on the LM head too. The log-probabilities are computed from its weight "
            "directly, so that part would not be trained.",
            "Train a new adapter without the LM head as a target.",
        )


def _base_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's base, which may hold its configuration and tokenizer only."""
    name, trust = recipe.model.model_name_or_path, recipe.trainer.trust_remote_code
    return resolve_folder(name, revision=recipe.model.model_revision, weights=False, remote_code=trust)


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe trains with: that of the adapter it continues if it has one, else the base's."""
    trust = recipe.trainer.trust_remote_code
    if recipe.lora.adapter_name_or_path:
        adapter = AdapterFolder.find(recipe.lora.adapter_name_or_path)
        if adapter.has_tokenizer:
            return load_tokenizer(adapter.path, trust_remote_code=trust)
    return load_tokenizer(
        recipe.model.model_name_or_path, revision=recipe.model.model_revision, trust_remote_code=trust
    )


def warn_past_context(recipe: Recipe, longest: int) -> None:
    """Warns where the longest row, in tokens, is longer than the base's context.

    Raises:
        BaseModelError: the base's configuration cannot be had or read.
    """
    config = load_config(_base_folder(recipe), recipe.trainer.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        warnings.warn(
            f"The model's context ends at {context} tokens: rows of up to {longest} tokens would train it on positions "
            f"that it has never seen. Set max_length: {context}.",
            stacklevel=2,
        )
