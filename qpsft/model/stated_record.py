"""A record for an adapter that another tool trained: what its owner says of the base's rounding, and what is assumed.

PEFT, TRL, Unsloth, Axolotl and LLaMA-Factory save an adapter without the settings of its 4-bit base. The owner knows
them: they are those of the training's `BitsAndBytesConfig`. A base that is quantized on disk (`…-bnb-4bit`) holds most
of them itself. Once written, such a record serves like that of a training, and names what was assumed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from qpsft.errors import BaseModelError
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import modules_to_skip
from qpsft.model.base_record import (
    RECORD_FILE,
    BaseRecord,
    record_of,
    rounding_in_words,
    state_quantized_on,
    write_for_adapter,
)
from qpsft.model.folder import ADAPTER_CONFIG, check_folder, read_config, weight_files
from qpsft.model.skeleton import LoadingRules, build_skeleton
from qpsft.recipe.arguments import BaseOptions
from qpsft.terminal import wrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAGS = ("quantization", "double_quant", "compute_dtype", "quantized_on")
BLOCK_SIZE = 64
"""Weights per block maximum: bitsandbytes' default, which transformers does not change."""
_STATE = ".weight.quant_state."


def state_record(adapter: str | os.PathLike, options: BaseOptions) -> None:
    """Writes into an adapter's folder how its base was rounded, where its record does not say, and prints what it is.

    Args:
        adapter: what a verb was given. Nothing is done for anything but an adapter's folder.
        options: the verb's. Of a base that is quantized on disk nothing need be stated.

    Raises:
        BaseModelError: an option contradicts the record or the base, is for no adapter, or does not say enough.
        OutputError: the folder cannot be written.
    """
    folder = Path(adapter).expanduser()
    stated = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    if not (folder / ADAPTER_CONFIG).is_file():
        _refuse_without_adapter(folder, stated)
        return
    opened = AdapterFolder(folder)
    if not opened.has_record:
        record = _make(opened, options.base, stated)
    elif stated and opened.record.assumed is not None:
        earlier = {name: getattr(opened.record, name) for name in FLAGS if name not in opened.record.assumed}
        record = _make(opened, options.base, earlier | stated)
    else:
        state_quantized_on(folder, stated.pop("quantized_on", None))
        _check_agreement(folder, opened.record, stated)
        return
    if record is not None:
        write_for_adapter(dataclasses.asdict(record), folder)
        print(wrap(f"wrote {folder / RECORD_FILE}: the base was {rounding_in_words(record)}"), file=sys.stderr)


def _refuse_without_adapter(folder: Path, stated: dict[str, Any]) -> None:
    unfit = [f"--{name}" for name in stated if name != "quantization"]
    if unfit:
        raise BaseModelError(f"{' and '.join(unfit)}: {folder} is not an adapter's folder.", "Leave it out.")


def _check_agreement(folder: Path, record: BaseRecord, stated: dict[str, Any]) -> None:
    for name, value in stated.items():
        if value != getattr(record, name):
            raise BaseModelError(
                f"--{name} {_flag(value)}: {folder / RECORD_FILE} says {_flag(getattr(record, name))}.",
                "Leave the flag out.",
            )


def _flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _make(adapter: AdapterFolder, given_base: str | None, stated: dict[str, Any]) -> BaseRecord | None:
    """The record of what was stated; None where nothing was, of a base that is not quantized on disk."""
    if not stated and not _is_quantized(adapter.base_folder(given_base, weights=False)):
        return None
    base = adapter.base_folder(given_base)
    config, skeleton = check_folder(base), build_skeleton(base)
    if _is_quantized(base):
        settings, rounded, free = _from_disk(base, config, skeleton)
        words = f"a base that is quantized on disk, as {base} is"
    else:
        settings, rounded, free = _from_flags(adapter, config, skeleton, stated)
        words = f"--quantization {settings['quantization']}"
    for name, value in stated.items():
        if name not in free and value != settings[name]:
            raise BaseModelError(f"--{name} {_flag(value)} does not go with {words}.", "Leave it out.")
    settings |= {name: value for name, value in stated.items() if name in free}
    settings.setdefault("weights_dtype", settings["compute_dtype"])
    name = given_base or adapter.base_name
    is_folder = Path(name).expanduser().is_dir()
    source = dataclasses.replace(adapter.source_of(base), name=str(base.resolve()) if is_folder else name)
    linear = (name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear))
    return record_of(
        source,
        unquantized_modules=[name for name in linear if name not in rounded],
        assumed=[name for name in free if name not in stated],
        **settings,
    )


def _is_quantized(base: Path) -> bool:
    return read_config(base).get("quantization_config") is not None


def _from_flags(
    adapter: AdapterFolder, config: dict[str, Any], skeleton: PreTrainedModel, stated: dict[str, Any]
) -> tuple[dict[str, Any], set[str], list[str]]:
    """Of a base in 16 or 32 bits: (settings where nothing else is stated, names of rounded layers, what is free)."""
    if "quantization" not in stated:
        raise BaseModelError(
            f"{' and '.join(f'--{name}' for name in stated)}: the adapter in {adapter.path} has no {RECORD_FILE}, and "
            "its base is not quantized on disk.",
            "Say how the base was loaded in training too: --quantization nf4, fp4 or none.",
        )
    dtype = config.get("dtype") or config.get("torch_dtype")
    settings = {"compute_dtype": dtype if dtype in ("bfloat16", "float16") else "bfloat16"}
    if stated["quantization"] == "none":
        settings |= {"quantization": "none", "double_quant": False, "block_size": None, "quant_storage": None}
        return settings | {"quantized_on": None}, set(), ["compute_dtype"]
    linear = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    settings |= {"quantization": stated["quantization"], "double_quant": True, "quantized_on": "cuda"}
    settings |= {"block_size": BLOCK_SIZE, "quant_storage": "uint8"}
    return settings, linear - set(modules_to_skip(skeleton)), ["double_quant", "compute_dtype", "quantized_on"]


def _from_disk(
    base: Path, config: dict[str, Any], skeleton: PreTrainedModel
) -> tuple[dict[str, Any], set[str], list[str]]:
    """The same of a base that bitsandbytes has quantized: its tensors say how."""
    rules, rounded, state = LoadingRules(skeleton), set(), None
    for name in weight_files(base):
        with safe_open(base / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                module, found, _ = key.partition(_STATE)
                if found:
                    place = rules.parameter_of(f"{module}.weight")
                    rounded |= {place[0].removesuffix(".weight")} if place else set()
                    state = state or json.loads(bytes(file.get_tensor(key).tolist()))
    if state is None:
        raise BaseModelError(
            f"config.json in {base} says that the weights are quantized, and none of them is.", "Download it again."
        )
    own = config["quantization_config"]
    settings = {
        "quantization": state["quant_type"],
        "double_quant": "nested_blocksize" in state,
        "block_size": state["blocksize"],
        "quant_storage": own.get("bnb_4bit_quant_storage") or "uint8",
        "compute_dtype": own.get("bnb_4bit_compute_dtype") or state["dtype"],
        "weights_dtype": state["dtype"],
        "quantized_on": None,
    }
    return settings, rounded, ["compute_dtype"]
