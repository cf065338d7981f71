"""An adapter's folder as PEFT writes it: whether it is one, what its config says, its base, its tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qpsft.errors import BaseModelError, ExportError
from qpsft.model.base import load_tokenizer
from qpsft.model.base_record import BaseRecord, read_base_record
from qpsft.model.folder import (
    ADAPTER_CONFIG,
    PICKLE_SUFFIXES,
    cannot_be_hub_id,
    config_sha256,
    hub_snapshot,
    near_folders,
    one_line,
    read_config,
    resolve_folder,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
HUB_FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_quantization.json", "token*", "special_tokens_map.json", "*.jinja"]
"""What of a Hub repository belongs to an adapter."""

# Features of PEFT's LoRA whose forward is not W + a low-rank product, or that merging does not know.
_OTHER_FORWARDS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_INITS_THAT_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def check_adapter_folder(adapter: str | Path) -> Path:
    """The adapter's folder as a path. Raises BaseModelError when it is not a PEFT adapter's."""
    folder = Path(adapter).expanduser()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise BaseModelError(
                f"{folder} is not an adapter folder: it has no {name}.",
                "Give the folder that training wrote, with adapter_config.json and adapter_model.safetensors in it.",
            )
    try:
        json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BaseModelError(f"{folder / ADAPTER_CONFIG} is not valid JSON: {error}.", "Copy it again.") from error
    return folder


def find_adapter(name_or_path: str | Path) -> Path:
    """The local folder of an adapter given as a folder or a Hub id, which is downloaded.

    Raises:
        BaseModelError: no such folder; an adapter lies in a folder inside it (PEFT puts one that is not called
            "default" there); its weights are missing or a pickle; or the Hub id cannot be had.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        if cannot_be_hub_id(str(name_or_path)):
            raise BaseModelError(f"There is no adapter folder {folder}.", near_folders(folder))
        folder = hub_snapshot(str(name_or_path), HUB_FILES)
    inside = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")) if folder.is_dir() else []
    if inside and not (folder / ADAPTER_CONFIG).is_file():
        raise BaseModelError(
            f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter's folder.",
            f"Did you mean {' or '.join(map(str, inside[:3]))}?",
        )
    check_weights(folder)
    return folder


def check_weights(folder: Path) -> None:
    """Raises BaseModelError where an adapter's folder has a config, but no safetensors."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        raise BaseModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}"
            + (f"; it holds {pickles[0]}, and loading a pickle can run any code." if pickles else "."),
            "Copy the folder again, or save the adapter with safetensors.",
        )


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's config of an adapter's folder; keys that this version of PEFT does not know are left out.

    Raises:
        BaseModelError: not an adapter's folder.
        ExportError: not LoRA, or LoRA with a feature that cannot be merged.
    """
    from peft import PeftConfig

    if not (folder / ADAPTER_CONFIG).is_file():
        what = "does not exist" if not folder.exists() else "is a file" if folder.is_file() else None
        model = (folder / "config.json").is_file()
        raise BaseModelError(
            f"{folder} {what or f'has no {ADAPTER_CONFIG}'}, so it is not an adapter's folder.",
            "It is a whole model: there is nothing to merge." if model else "Give the folder that training wrote.",
        )
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{folder / ADAPTER_CONFIG} is not valid JSON: {error}.", "Copy it again.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise ExportError(f"{folder / ADAPTER_CONFIG} is for {kind}, and only LoRA can be merged.", "Train with LoRA.")
    for feature in _OTHER_FORWARDS:
        if content.get(feature):
            raise ExportError(
                f"{folder / ADAPTER_CONFIG} uses {feature}, which cannot be merged into the base's weights.",
                "Serve the adapter beside its base, or train without it.",
            )
    init = content.get("init_lora_weights")
    if init not in _INITS_THAT_LEAVE_THE_BASE:
        raise ExportError(
            f"{folder / ADAPTER_CONFIG} has init_lora_weights {init!r}: training started by taking a part out of the "
            "base's weights, and the file does not say which.",
            "Save it with PEFT's path_initial_model_for_weight_conversion, as the plain LoRA that it equals.",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:
            raise BaseModelError(
                f"{folder / ADAPTER_CONFIG} cannot be read by PEFT: {one_line(error)}",
                "Upgrade peft, or copy it again.",
            ) from error


def has_own_tokenizer(adapter: Path) -> bool:
    """Whether training saved its tokenizer with the adapter, as qpsft does; other trainers may leave the base's."""
    return any((adapter / name).is_file() for name in TOKENIZER_FILES)


def trained_tokenizer(adapter: Path, base_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer training used: the adapter's own, else the base's."""
    if not has_own_tokenizer(adapter):
        return load_tokenizer(base_folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise BaseModelError(
            f"The tokenizer in {adapter} cannot be loaded: {error}", "Copy the tokenizer's files there again."
        ) from error


def find_base(adapter: Path, base: str | Path | None) -> tuple[BaseRecord, Path]:
    """The adapter's record and the local folder of its base.

    Raises:
        BaseModelError: no record, no such base, or `base` is another model than the one the adapter was trained on.
    """
    record = read_base_record(adapter)
    name = record.base_model_name_or_path if base is None else base
    folder = resolve_folder(name, revision=record.revision if base is None else None)
    found = config_sha256(read_config(folder))
    if found != record.config_sha256:
        raise BaseModelError(
            f"The adapter in {adapter} was trained on {record.base_model_name_or_path} (config hash "
            f"{record.config_sha256[:12]}…), and {folder} is another model (config hash {found[:12]}…).",
            "Give the base it was trained on.",
        )
    return record, folder


def put_adapter(model: nn.Module, adapter: Path, base_folder: Path) -> PeftModel:
    """The adapter on its loaded base. Raises BaseModelError when it does not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise BaseModelError(
            f"The adapter in {adapter} cannot be put on {base_folder}: {str(error).strip().splitlines()[0]}",
            "Check that adapter_config.json and adapter_model.safetensors belong together and to this base.",
        ) from error
