"""A base model's folder, looked at before anything is loaded from it: is it complete, safe, and a causal LM?

Everything here reads configuration files and safetensors headers only, so a broken folder costs milliseconds and one
sentence instead of a traceback from the middle of a load.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qpsft.errors import BaseModelError, ExportError, did_you_mean, one_line, shown
from qpsft.files import digest, read_object
from qpsft.model.remote_code import AUTO_MAP, code_refused

DEMO = "demo"
MODEL_DIR = Path(__file__).resolve().parents[1] / "demo" / "model"
"""The embedded base model, which `demo` names."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
"""The model card, as the Hub names it."""
MERGE_REPORT = "merge_report.json"
"""By which a folder that `qpsft merge` wrote is known."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

CONFIG_TYPES: dict[str, Any] = {
    "model_type": str, "quantization_config": dict, "auto_map": dict, "text_config": dict, "architectures": list[str],
    "attn_implementation": (str, dict), "eos_token_id": (int, list[int]),
}  # fmt: skip
"""Of the keys of config.json that are read here; transformers checks the others."""
MOST_MODULES = 2**16
_COUNTS = re.compile("layer|expert|head|block")
"""Keys of config.json that say how many modules are built."""
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_AGAIN = "Copy or download it again."

# What a Hub snapshot is made of. Anything else in a repository (pickles, GGUF files, ONNX, Llama's `original/` and
# Mistral's `consolidated.safetensors`, which repeat the weights) is not downloaded.
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHT_FILES = ["model*.safetensors"]

# Keys of config.json that say nothing about the weights' names, shapes or arithmetic.
VOLATILE_KEYS = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map", "_attn_implementation",
    "attn_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config",
}  # fmt: skip


def resolve_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    weights: bool = True,
    config_only: bool = False,
    remote_code: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a base model: the embedded one for `demo`, a folder as it is, a Hub id downloaded.

    The network is used only for a Hub id, and only for what is not in the Hub cache yet.

    Args:
        name_or_path: `demo`, a folder, or a Hub id (`name` or `owner/name`).
        revision: branch, tag or commit; Hub ids only.
        weights: download the safetensors too; without, configuration and tokenizer only.
        config_only: download config.json and nothing else.
        remote_code: download the repository's Python files too.
        local_files_only: never use the network.

    Raises:
        BaseModelError: no such folder (with the nearest names), or the Hub id cannot be had.
    """
    name = os.fspath(name_or_path)
    if name == DEMO:
        return MODEL_DIR
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise BaseModelError(f"{path} is a file; a base model is a folder.", _file_advice(path))
    if cannot_be_hub_id(name):
        raise BaseModelError(f"There is no base model folder {path}.", near_folders(path))
    patterns = [CONFIG] if config_only else _TOKENIZER_FILES + (_WEIGHT_FILES if weights else [])
    patterns += ["*.py"] if remote_code else []
    return hub_snapshot(name, patterns, revision=revision, local_files_only=local_files_only)


def cannot_be_hub_id(name: str) -> bool:
    """Whether a name can only be a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name.strip()


def _file_advice(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF is for running a model; train on the safetensors folder it was made from and export to GGUF after."
    return f"Give the folder, {path.parent}."


def near_folders(path: Path) -> str:
    """What may have been meant by a folder that is not there, as advice."""
    parent = path.parent
    if not parent.is_dir():
        return f"Its parent {parent} does not exist either; check the path."
    try:
        folders = sorted(child.name for child in parent.iterdir() if child.is_dir() and child.name[0] != ".")
    except PermissionError:
        return f"{parent} cannot be read; check its permissions."
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f"Check the path; {parent} holds {', '.join(folders[:8]) or 'no folders'}."


def hub_snapshot(
    name: str, patterns: list[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The files of a Hub model that match `patterns`, downloaded. Raises BaseModelError as `resolve_folder`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    near = near_folders(Path(name))
    near = f"{near} " if near.startswith("Did you mean") else ""
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except GatedRepoError as error:
        raise BaseModelError(
            f"The Hub model {name} is gated: its owner grants access to accounts.",
            f"Accept its conditions on https://huggingface.co/{name}, then run `hf auth login` here.",
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"The Hub model {name} has no revision {revision}.", "Check the branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"There is no folder and no public Hub model called {name}.",
            f"{near}Check the spelling; for a private model run `hf auth login` first.",
        ) from error
    except HFValidationError as error:
        raise BaseModelError(
            f"There is no folder {name}, and it cannot be a Hub id either: {one_line(error)}",
            "Give an existing folder, `owner/name` of a Hub model, or `demo`.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"There is no folder {name}, and the Hub model {name}{at} is not on this machine and cannot be reached: "
            f"{one_line(error.__cause__ or error)}",
            f"{near}Check the spelling and the connection, or on a machine that has one run `hf download {name}` and "
            "give the folder it prints.",
        ) from error
    except OSError as error:
        raise BaseModelError(
            f"Downloading the Hub model {name}{at} failed: {one_line(error)}",
            "Check the connection, the free disk space and the id, and run again; finished files are kept.",
        ) from error


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks that `folder` holds a complete causal LM in safetensors, and returns its config.json as a dict.

    Raises:
        BaseModelError: config.json missing or broken, not a causal LM, quantized otherwise than to bitsandbytes' 4
            bits, weights missing, as pickles only, or truncated; the message names the file.
    """
    config = check_config(folder, trust_remote_code=trust_remote_code)
    check_weights(folder)
    return config


def check_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """`check_folder` without the weights: config.json is a causal LM's that can be trained. Raises BaseModelError."""
    config = read_config(folder)
    _check_architecture(folder, config, trust_remote_code)
    check_stored_quantization(config.get("quantization_config"), str(folder / CONFIG))
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder` as a dict. Raises BaseModelError when it is missing, broken or an adapter's."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise BaseModelError(
                f"{folder} is a LoRA adapter, not a base model.",
                "Give its base model (base_model_name_or_path in its adapter_config.json), or merge the adapter first.",
            )
        raise BaseModelError(
            f"{folder} has no {CONFIG}, so it is not a model folder.",
            "A base model folder holds config.json, model.safetensors (or shards with an index) and tokenizer files.",
        )
    config = read_object(path, BaseModelError, _AGAIN, CONFIG_TYPES)
    for part in (config, config.get("text_config") or {}):
        for key, value in part.items():
            if isinstance(value, int) and _COUNTS.search(key) and not value <= MOST_MODULES:
                raise BaseModelError(f"{path} has {shown(value)} for {key}, more than any model has.", _AGAIN)
    return config


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's (True) or a model's. Raises ExportError when it is neither."""
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    if (folder / CONFIG).is_file():
        return False
    raise ExportError(
        f"{folder} is neither an adapter folder ({ADAPTER_CONFIG}) nor a merged model ({CONFIG}).",
        "Give the folder that qpsft train or qpsft merge wrote.",
    )


def _check_architecture(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if trust_remote_code and "AutoModelForCausalLM" in (config.get(AUTO_MAP) or {}):
        return
    if config.get(AUTO_MAP) and model_type not in CONFIG_MAPPING:
        raise code_refused(folder / CONFIG)
    attention = config.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention:
        raise BaseModelError(
            f"{folder / CONFIG} asks for the attention kernel {attention!r}, which is code from the Hub.",
            "Take attn_implementation out of it; a recipe's attn_implementation chooses one.",
        )
    if model_type not in CONFIG_MAPPING:
        raise BaseModelError(
            f"{folder / CONFIG} has model_type {model_type!r}, which this version of transformers does not know.",
            f"{did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}Else upgrade transformers.",
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BaseModelError(
            f"{folder / CONFIG} describes a {model_type!r} model, which is not a causal language model.",
            "qpsft trains models that predict the next token: Llama, Qwen, Mistral, Gemma, Phi and the like.",
        )


def check_stored_quantization(settings: Any, where: str) -> None:
    """Whether qpsft can train on weights that are stored quantized.

    Args:
        settings: `quantization_config` of a config.json; None: the weights are not quantized.
        where: what to call that config.json in an error.

    Raises:
        BaseModelError: they are, otherwise than to bitsandbytes' 4 bits.
    """
    if settings is None:
        return
    method = str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else "unknown"
    if method == "bitsandbytes" and not settings.get("load_in_8bit"):
        return
    kind = "in int8" if method == "bitsandbytes" else f"with {method}"
    raise BaseModelError(
        f"{where} says the weights are quantized {kind}; qpsft trains on 16- or 32-bit weights, which it quantizes "
        "itself, or on bitsandbytes' own 4 bits.",
        "Use the original model this one was made from (its model card names it).",
    )


def has_weights(folder: Path) -> bool:
    """Whether all weight files are there. A Hub id's configuration may be on this machine without them."""
    try:
        return all((folder / name).is_file() for name in weight_files(folder))
    except BaseModelError:
        return False


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a model is loaded from.

    Raises:
        BaseModelError: there are neither weights nor an index, or the index is broken.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index_path = folder / WEIGHTS_INDEX
    if not index_path.is_file():
        raise _no_weights(folder)
    return sorted(set(_weight_map(index_path).values()))


def _weight_map(index_path: Path) -> dict[str, str]:
    """The file of every tensor."""
    weight_map = read_object(index_path, BaseModelError, _AGAIN, {"weight_map": dict}).get("weight_map")
    if not weight_map:
        raise BaseModelError(f"{index_path} has no weight_map.", _AGAIN)
    for name, file in weight_map.items():
        if not (isinstance(file, str) and _SHARD.fullmatch(file)):
            raise BaseModelError(
                f"{index_path} places {shown(name)} in {shown(file)}, which is no safetensors file of that folder.",
                _AGAIN,
            )
    return weight_map


def check_weights(folder: Path) -> None:
    """Whether all weights of a model are there, in whole safetensors files; reads their headers.

    Raises:
        BaseModelError: a file is missing, cut off, a pickle, or does not hold what its index says.
    """
    index_path = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        tensor_shapes(folder / WEIGHTS)
        return
    shards = weight_files(folder)
    weight_map = _weight_map(index_path)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise BaseModelError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files its index names: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}.",
            "Copy or download them again.",
        )
    names = {shard: tensor_shapes(folder / shard) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in names[shard]]
    if absent:
        raise BaseModelError(
            f"{index_path} places {absent[0]} in {weight_map[absent[0]]}, which does not hold it"
            f"{f' ({len(absent)} tensors in all)' if len(absent) > 1 else ''}.",
            "The files come from different versions of the model: download all of them again.",
        )


def _no_weights(folder: Path) -> BaseModelError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return BaseModelError(
            f"{folder} holds its weights as pickle only ({', '.join(pickles[:3])}); loading a pickle can run any code, "
            "so qpsft reads safetensors only.",
            "If you trust the file, convert it once: "
            f"`AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER')`, and copy the "
            "tokenizer files.",
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return BaseModelError(f"{folder} holds only GGUF weights ({gguf[0]}).", _file_advice(folder / gguf[0]))
    return BaseModelError(
        f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}.",
        "Copy or download the weights; on the Hub, choose a model that has safetensors files.",
    )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by their names, from its header; no values are read.

    Raises:
        BaseModelError: it is cut off, not safetensors, or a git-lfs pointer; the file has not the length it announces.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        if not path.is_file():
            raise BaseModelError(f"There is no file {path}.", _AGAIN) from error
        size = path.stat().st_size
        with path.open("rb") as file:
            is_lfs_pointer = file.read(24).startswith(b"version https://git-lfs")
        if is_lfs_pointer:
            raise BaseModelError(
                f"{path} is a git-lfs pointer, not the weights.", "Run `git lfs pull` there."
            ) from error
        raise BaseModelError(
            f"{path} is truncated or not a safetensors file ({size:,} bytes; {one_line(error)}).",
            "Copy or download it again and compare its size or checksum with the source.",
        ) from error


def config_sha256(config: dict[str, Any]) -> str:
    """SHA-256 of what config.json says about names, shapes and arithmetic: without versions, dtypes and token ids."""

    def essential(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: essential(item) for key, item in value.items() if key not in VOLATILE_KEYS}
        return value

    return digest(json.dumps(essential(config), sort_keys=True))
