"""What an adapter's folder must know about the base it was trained on: `base_quantization.json`.

An adapter trained on rounded weights corrects *those* weights, so merging must round the checkpoint the same way:
cast each tensor to `weights_dtype`, quantize with `quantization`, `block_size`, `double_quant` and `quant_storage`,
dequantize. That gives the trained base's bytes again, and its dequantized weights, exactly. It also says which weights
those are, and which adapter file the record belongs to; `qpsft.model.adapter_folder` compares both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qpsft import __version__
from qpsft.errors import BaseModelError, OutputError, shown
from qpsft.files import file_sha256, read_object, write_atomically
from qpsft.model.fingerprint import eos_token_ids, weights_sha256
from qpsft.model.folder import config_sha256, has_weights, read_config, resolve_folder
from qpsft.recipe.flags import conforms, describe, option_types

RECORD_FILE = "base_quantization.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IDENTITY = ("weights_sha256", "eos_token_ids")
"""Entries that say which base it is and that older records lack; None is then "not known"."""


@dataclass(frozen=True)
class BaseSource:
    """Where a base model came from. `load_base` leaves it on the model as `model.qpsft_source`."""

    name: str
    revision: str | None
    config_sha256: str
    prequantized: bool
    quantized_on: str | None = None  # None: where its weights are
    weights_sha256: str | None = None  # None: its weights are not on this machine
    eos_token_ids: list[int] | None = None


@dataclass(frozen=True)
class BaseRecord:
    """The base of an adapter: where it came from and how its weights were rounded.

    Attributes:
        qpsft_version: version that wrote the record.
        base_model_name_or_path: `demo`, a Hub id, or an absolute folder.
        revision: the Hub commit, if known.
        config_sha256: `qpsft.model.folder.config_sha256` of the base's config.json.
        quantization: "nf4", "fp4" or "none".
        double_quant: whether the quantization constants are quantized too.
        block_size: weights per quantization constant (nf4, fp4), else None.
        quant_storage: dtype the packed weights are stored in, such as "uint8"; None if not quantized.
        compute_dtype: dtype of the matrix products and of all unquantized weights, such as "bfloat16".
        weights_dtype: dtype the checkpoint's tensors were cast to before they were quantized.
        prequantized: the base was quantized on disk; its own bytes are the trained ones.
        unquantized_modules: names of linear modules that were not quantized (the LM head).
        quantized_on: type of the torch device that quantized it, such as "cpu" or "cuda", which round block maxima
            differently (`qpsft.model.block_maxima`); None where nothing was quantized while loading.
        weights_sha256: `qpsft.model.fingerprint.weights_sha256` of the base; None in records older than it, and of
            weights that were not in safetensors files.
        eos_token_ids: `qpsft.model.fingerprint.eos_token_ids` of the base; None in older records.
        adapter_sha256: SHA-256 of the adapter_model.safetensors that the record lies beside; None in older records.
        assumed: None in a record that the training wrote. Else the adapter's owner stated it, but for these entries
            (`qpsft.model.stated_record`).
    """

    qpsft_version: str
    base_model_name_or_path: str
    revision: str | None
    config_sha256: str
    quantization: str
    double_quant: bool
    block_size: int | None
    quant_storage: str | None
    compute_dtype: str
    weights_dtype: str
    prequantized: bool
    unquantized_modules: list[str]
    quantized_on: str | None
    weights_sha256: str | None = None
    eos_token_ids: list[int] | None = None
    adapter_sha256: str | None = None
    assumed: list[str] | None = None


def rounding_in_words(record: BaseRecord | None) -> str:
    """How a base was rounded in training, such as "nf4 in blocks of 64, double quantization, computed in bfloat16"."""
    if record is None:
        return "no record of the rounding in training"
    stated = ""
    if record.assumed is not None:
        assumed = ", ".join(f"{name} {getattr(record, name)}" for name in record.assumed)
        stated = f" (stated by its owner{f'; assumed: {assumed}' if assumed else ''})"
    if record.quantization == "none":
        return f"not quantized, {record.compute_dtype}{stated}"
    blocks = f" in blocks of {record.block_size}" if record.block_size else ""
    double = ", double quantization" if record.double_quant else ""
    return f"{record.quantization}{blocks}{double}, computed in {record.compute_dtype}{stated}"


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The bitsandbytes linear layers of `model` by name; with adapters, the base layers under them."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ == "Params4bit" and isinstance(module, nn.Linear)
    }


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a parameter holds packed 4-bit codes. They may be stored as a floating point dtype, as FSDP needs it."""
    return getattr(tensor, "quant_state", None) is not None


def refuse_int8(model: nn.Module) -> None:
    """Raises BaseModelError for a model with layers in bitsandbytes' int8, however it was loaded."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Int8Params":
            raise BaseModelError(
                f"{name} is in int8, and qpsft trains on 4-bit (nf4, fp4), 16-bit and 32-bit bases.",
                "Load the base with qpsft.load_base, or with load_in_4bit=True.",
            )


def check_read_back(model: nn.Module) -> None:
    """Makes sure that bitsandbytes reads 4-bit weights back as it stored them.

    Its CPU kernel (0.50.2) works row by row. Where the width is a multiple of 16 but not of the block size, a row ends
    within a block, and the kernel silently takes another block's scale: errors as large as the weights.

    Raises:
        BaseModelError: it does not, naming the layer.
    """
    import bitsandbytes

    widths = set()
    for name, module in quantized_linears(model).items():
        state = module.weight.quant_state
        if state.shape[-1] % state.blocksize == 0 or state.shape[-1] in widths:
            continue
        widths.add(state.shape[-1])
        in_one_row = copy.copy(state)
        in_one_row.shape = (1, state.shape.numel())
        read, expected = (bitsandbytes.functional.dequantize_4bit(module.weight, each) for each in (state, in_one_row))
        if not torch.equal(read.flatten(), expected.flatten()):
            raise BaseModelError(
                f"{name} has {state.shape[-1]} inputs, no multiple of the block size {state.blocksize}, and "
                f"bitsandbytes {bitsandbytes.__version__} reads such a weight back wrongly on this CPU.",
                "Use quantization none, or a GPU.",
            )


def parameter_count(model: nn.Module) -> int:
    """Number of the base's weights, shared ones once, 4-bit ones by the shape they stand for."""
    return sum(logical_shape(parameter).numel() for name, parameter in model.named_parameters() if _is_base(name))


def _is_base(name: str) -> bool:
    """Whether a module or tensor is the base's own, by its name: neither an adapter's nor a copy trained in full."""
    return ".lora_" not in name and ".modules_to_save." not in name


def logical_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter's values; a 4-bit weight is stored in another."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights, buffers and quantization constants of the base, whatever adapter is on it."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    total = sum(tensor.nbytes for name, tensor in tensors if _is_base(name))
    for module in quantized_linears(model).values():
        state = module.weight.quant_state
        for part in (state, state.state2):
            total += part.absmax.nbytes if part is not None else 0
    return total


def base_record(model: nn.Module, name_or_path: str | None = None) -> dict:
    """The settings of the base under `model`, read off the live weights, as `BaseRecord`'s dict.

    Args:
        model: what `load_base` or `add_adapter` returned, or any transformers causal LM, PEFT-wrapped or not.
        name_or_path: where it came from, for a model that `load_base` did not load and whose `name_or_path` is wrong.

    Raises:
        BaseModelError: the source's config.json is not on this machine, or the base is in int8.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = getattr(base, "qpsft_source", None)
    if source is None or name_or_path is not None:
        name = name_or_path or base.name_or_path
        source = source_of(resolve_folder(name, weights=False, local_files_only=True), name)
    return dataclasses.asdict(record_of(source, **_settings(base, source)))


def record_of(source: BaseSource, **settings: object) -> BaseRecord:
    """The record of a base.

    Args:
        settings: the fields that say how it was rounded.
    """
    return BaseRecord(
        qpsft_version=__version__,
        base_model_name_or_path=source.name,
        revision=source.revision,
        config_sha256=source.config_sha256,
        prequantized=source.prequantized,
        weights_sha256=source.weights_sha256,
        eos_token_ids=source.eos_token_ids,
        **settings,
    )


def _settings(base: nn.Module, source: BaseSource) -> dict:
    """Quantization settings, read off the weights themselves."""
    refuse_int8(base)
    linears = quantized_linears(base)
    quantized = {id(module) for module in linears.values()}
    settings = {
        "quantization": "none",
        "double_quant": False,
        "block_size": None,
        "quant_storage": None,
        "compute_dtype": _name(base.dtype),
        "weights_dtype": _name(base.dtype),
        "quantized_on": None,
        "unquantized_modules": [
            _base_name(name)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in quantized and _is_base(name)
        ],
    }
    if not linears:
        return settings
    first = next(iter(linears.values()))
    state = first.weight.quant_state
    return settings | {
        "quantization": state.quant_type,
        "double_quant": state.nested,
        "block_size": state.blocksize,
        "quant_storage": _name(first.weight.dtype),
        "compute_dtype": _name(first.compute_dtype or base.dtype),
        "weights_dtype": _name(state.dtype),
        "quantized_on": None if source.prequantized else source.quantized_on or first.weight.device.type,
    }


def _base_name(name: str) -> str:
    """A module's name in the plain base model, without what PEFT put around it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def source_of(folder: Path, name: str | None = None) -> BaseSource:
    """What a base model's folder says of itself; `name` is what to call it instead of its path.

    Its weights are read in pieces (`qpsft.model.fingerprint`), where they are on this machine.

    Raises:
        BaseModelError: a file is broken.
    """
    config = read_config(folder)
    return BaseSource(
        name=name or str(folder),
        revision=commit_of(folder),
        config_sha256=config_sha256(config),
        prequantized=config.get("quantization_config") is not None,
        weights_sha256=weights_sha256(folder) if has_weights(folder) else None,
        eos_token_ids=eos_token_ids(folder),
    )


def commit_of(folder: Path) -> str | None:
    """The Hub commit of a folder in the Hub cache, which lies in …/snapshots/<commit>; None for any other."""
    return folder.name if folder.parent.name == "snapshots" else None


def write_base_record(model: nn.Module, folder: str | os.PathLike, name_or_path: str | None = None) -> Path:
    """Writes `base_record(model, name_or_path)` as `base_quantization.json` into an adapter's folder, atomically.

    The record vouches for the adapter file that is there: write the adapter first.

    Raises:
        OutputError: the folder cannot be written.
    """
    return write_for_adapter(base_record(model, name_or_path), Path(folder))


def write_for_adapter(record: dict, folder: Path) -> Path:
    """Writes `BaseRecord`'s dict into an adapter's folder, atomically, with the digest of the adapter file there.

    Raises:
        OutputError: the folder cannot be written.
    """
    path, weights = folder / RECORD_FILE, folder / ADAPTER_WEIGHTS
    try:
        adapter_sha256 = file_sha256(weights) if weights.is_file() else None
    except OSError as error:
        raise OutputError(f"{weights} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    write_record(record | {"adapter_sha256": adapter_sha256}, path)
    return path


def write_record(record: dict, path: Path) -> None:
    """Writes `BaseRecord`'s dict to a file as it is, atomically. Raises OutputError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}.", "Check the disk and its permissions."
        ) from error


def read_base_record(folder: str | os.PathLike, name: str = RECORD_FILE) -> BaseRecord:
    """The record in an adapter's folder, or in another file there.

    Raises:
        BaseModelError: it is missing, not JSON, lacks a key, holds no digest where one belongs, or says int8; the
            message names the file.
    """
    path = Path(folder) / name
    advice = (
        "It says how the base was rounded in training. Copy it from the folder the training wrote. Of an adapter that "
        "another tool trained, say it: --quantization nf4 --double_quant true --compute_dtype bfloat16, or whatever "
        "its BitsAndBytesConfig had. Or merge onto the original weights instead."
    )
    if not path.exists():
        raise BaseModelError(f"The adapter folder {folder} has no {RECORD_FILE}.", advice)
    content = read_object(path, BaseModelError, advice)
    names = [field.name for field in dataclasses.fields(BaseRecord)]
    later = {"quantized_on", "adapter_sha256", "assumed", *IDENTITY}
    missing = [name for name in names if name not in content and name not in later]
    if missing:
        raise BaseModelError(f"{path} lacks {', '.join(missing)}.", advice)
    for key in ("weights_sha256", "adapter_sha256"):
        value = content.setdefault(key, None)
        if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
            raise BaseModelError(f"{path} has {value!r} for {key}, which is no SHA-256.", advice)
    content = {"eos_token_ids": None, "assumed": None} | content
    for name, hint in option_types([BaseRecord]).items():
        if name in content and not conforms(content[name], hint):
            raise BaseModelError(f"{path} has {shown(content[name])} for {name}; it must be {describe(hint)}.", advice)
    if unknown := set(content["assumed"] or ()) - {*names}:
        raise BaseModelError(f"{path} has {shown(min(unknown))} under assumed, which is no entry of it.", advice)
    if content["quantization"] == "int8":
        raise BaseModelError(
            f"{path} says that the base was in int8, and qpsft works with bases in 4 bits or unquantized ones.",
            "Load the adapter with PEFT beside the base it was trained on, or train again with quantization: nf4.",
        )
    if "quantized_on" not in content:
        content["quantized_on"] = _assumed_device(path, content)
    return BaseRecord(**{name: content[name] for name in names})


def state_quantized_on(folder: str | os.PathLike, quantized_on: str | None) -> None:
    """Writes into an adapter's record where its base was quantized, if the record does not say; None does nothing.

    Raises:
        BaseModelError: there is no record, or it says something else.
        OutputError: the folder cannot be written.
    """
    if quantized_on is None:
        return
    path = Path(folder) / RECORD_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the assumption that this replaces
        record = read_base_record(folder)
    stated = read_object(path, BaseModelError, "Copy it again.").get("quantized_on")
    if stated == quantized_on:
        return
    if stated is not None or record.quantized_on is None:
        where = f"on {stated}" if stated else "on disk, before training, or not at all"
        raise BaseModelError(f"--quantized_on {quantized_on}: {path} says it was {where}.", "Leave the flag out.")
    write_record(dataclasses.asdict(dataclasses.replace(record, quantized_on=quantized_on)), path)


def _assumed_device(path: Path, content: dict) -> str | None:
    """Where a base was quantized, for a record older than `quantized_on`: GPUs compute in 16 bits, the CPU in 32."""
    if content["quantization"] == "none" or content["prequantized"]:
        return None
    device = "cpu" if content["compute_dtype"] == "float32" else "cuda"
    if content["double_quant"]:
        warnings.warn(
            f"{path} does not say where the base was quantized. Assumed, from its compute dtype "
            f"{content['compute_dtype']}: {device}. Give --quantized_on cpu or cuda if it was elsewhere.",
            stacklevel=3,
        )
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
