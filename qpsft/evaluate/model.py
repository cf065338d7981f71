"""Loads what `evaluate` and `chat` work on: an adapter on its base, rounded as in training, or a model by itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpsft.errors import BaseModelError
from qpsft.files import read_object
from qpsft.model.adapter_folder import ADAPTER_CONFIG, AdapterFolder
from qpsft.model.base import describe, load_base
from qpsft.model.base_record import is_packed, quantized_linears
from qpsft.model.folder import MERGE_REPORT
from qpsft.model.hardware import base_dtype, hardware_of
from qpsft.model.skeleton import dtype_named
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.file import read_yaml
from qpsft.recipe.flags import option_types, read_values

RECIPES = ("recipe.resolved.yaml", "recipe.yaml")
PROMPT_OPTIONS = ("use_chat_template", "prompt_format")


def load_evaluated(
    name: str,
    *,
    base: str | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[Any, Any]:
    """Loads an adapter on its base, rounded as in training, or a model by itself.

    Args:
        name: folder of an adapter, or what `load_base` takes.
        base: where an adapter's base is now, if it is no longer where its record says.
        quantization: of a model without adapter; None is nf4, and "none" for a merged model. An adapter's base is
            always rounded as its record says.
        dtype: of a model without adapter, as in `load_base`.
        device: as in `load_base`.

    Returns:
        (model in eval mode: the PEFT model of an adapter; tokenizer).

    Raises:
        BaseModelError: as `load_base` and `AdapterFolder.base_folder`, or an option does not go with `name`.
    """
    folder = Path(name).expanduser()
    if not is_adapter(name):
        if base is not None:
            raise BaseModelError(f"--base is given, but {folder} is not an adapter's folder.", "Leave --base out.")
        quantization = quantization or usual_quantization(folder)
        return load_base(name, quantization=quantization, dtype=dtype, device=device, verbose=False)
    adapter = AdapterFolder(folder)
    base_folder = adapter.base_folder(base)
    if quantization not in (None, adapter.record.quantization):
        raise BaseModelError(
            f"--quantization is {quantization}, and the base of {folder} is rounded as it was in training: "
            f"{adapter.record.quantization}.",
            "Leave --quantization out.",
        )
    model = adapter.load_base(base_folder, device=device)
    trained_in = adapter.record.compute_dtype
    here = dtype_here(trained_in, model.config.to_dict(), model.device)
    if here != dtype_named(trained_in):
        compute_in(model, here)
    return adapter.put_on(model), adapter.tokenizer(base_folder)


def usual_quantization(folder: Path) -> str:
    """Of a whole model where nobody says: nf4, and none for a merged one, which must be what was merged."""
    return "none" if is_merged(folder) else "nf4"


def dtype_here(trained: str, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The dtype to compute in: training's, unless that was bfloat16 and the card only emulates it, which is said.

    Args:
        trained: the compute dtype in the adapter's record.
        config: the base's `config.json`.
    """
    dtype = dtype_named(trained)
    if device.type != "cuda" or dtype != torch.bfloat16 or hardware_of(device).compute_dtype == dtype:
        return dtype
    here = base_dtype(hardware_of(device), "auto", config)
    warnings.warn(
        f"The adapter was trained in bfloat16, which {hardware_of(device).name} only emulates: computing in "
        f"{str(here).removeprefix('torch.')}, on the weights rounded as in training. Numbers differ by rounding.",
        stacklevel=2,
    )
    return here


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Has a loaded base compute in another dtype. Its 4-bit weights stay as they are; the others are converted."""
    loaded = model.dtype
    for tensor in (*model.parameters(), *model.buffers()):
        # Some architectures keep some weights in float32 whatever the dtype.
        if tensor.dtype == loaded and not is_packed(tensor):
            tensor.data = tensor.data.to(dtype)
    for layer in quantized_linears(model).values():
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype


def describe_evaluated(model: Any) -> str:
    """One line about what is evaluated."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return describe(base, base.device, base.dtype)


def is_merged(folder: Path) -> bool:
    """Whether `qpsft merge` wrote the folder."""
    return (folder / MERGE_REPORT).exists()


def is_adapter(name: str) -> bool:
    """Whether it is the folder of an adapter, and not of a whole model."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).exists()


def base_name_of(name: str, base: str | None) -> str | None:
    """What a model's base is called: `base` if it is given, else as the adapter says; None for a whole model."""
    if base is not None or not is_adapter(name):
        return base
    adapter = AdapterFolder(name)
    if adapter.has_record:
        return adapter.record.base_model_name_or_path
    return adapter.settings.get("base_model_name_or_path")


def trained_options(folder: Path) -> dict[str, Any]:
    """The options that an adapter was trained with, from the recipe in its folder; {} where there is none.

    A merged folder names its adapter, whose recipe is read then.

    Raises:
        RecipeError: the recipe cannot be read. BaseModelError: the report of the merge cannot.
    """
    for name in RECIPES:
        path = folder / name
        if path.is_file():
            return read_yaml(path)
    if is_merged(folder):
        adapter = read_object(folder / MERGE_REPORT, BaseModelError, "Merge again.", {"adapter": str}).get("adapter")
        if adapter and not is_merged(Path(adapter)):
            return trained_options(Path(adapter))
    return {}


def prompt_arguments(folder: Path, **given: Any) -> DataArguments:
    """Options for writing prompts: those of training, but for options given here that are not None."""
    trained = {name: value for name, value in trained_options(folder).items() if name in PROMPT_OPTIONS}
    where = {name: f"{name} in the recipe of {folder}" for name in trained}
    trained = read_values(trained, option_types([DataArguments]), where, others="")
    return DataArguments(**trained | {name: value for name, value in given.items() if value is not None})
