"""The small files of a merged model's folder: config, tokenizer, generation config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.data.ending import end_of_turn
from qpsft.errors import BaseModelError
from qpsft.files import read_object, write_atomically
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import read_config
from qpsft.model.remote_code import names_code
from qpsft.verify.exported import read_text_config
from qpsft.verify.text import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"}
LFS_POINTER = b"version https://git-lfs"
UNWRITTEN = {"<image_soft_token>"}
"""Gemma 3's text models share the tokenizer of those that see, whose last token they have no embedding for."""
GENERATION_CONFIG = "generation_config.json"
# Vocabularies that a tokenizer saved by training does not repeat, and that llama.cpp converts from.
_SOURCES_OF_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What turns pictures, video and sound into a multimodal model's input."""


def write_config(base: Path, folder: Path, dtype: str, *, predicts_ahead: bool) -> None:
    """config.json: the base's, without quantization, with the merged dtype under transformers 5's key, `dtype`.

    Args:
        predicts_ahead: the merged weights have the layers for multi-token prediction; else config.json names none.
    """
    config = read_config(base)
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    _set_dtype(config, dtype)
    if not predicts_ahead:
        _name_no_layers_ahead(config)
    config["dtype"] = dtype
    write_json(folder / "config.json", config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if config.pop(key, None) is not None:
            config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, dtype)


def _name_no_layers_ahead(config: dict[str, Any]) -> None:
    """Sets their number to 0, under whatever name: num_nextn_predict_layers, mtp_num_hidden_layers, num_mtp_layers."""
    for key, value in config.items():
        if isinstance(value, dict):
            _name_no_layers_ahead(value)
        elif re.search("mtp|nextn", key) and key.endswith("layers") and isinstance(value, int):
            config[key] = 0


def copy_tokenizer(adapter: Path, base: Path, folder: Path) -> list[str]:
    """Copies tokenizer and chat template from the adapter's folder, if it has a tokenizer, else from the base's; and
    the base's generation config and its processors, unless they name Python code. What the adapter's folder lacks of a
    tokenizer comes from the base. generation_config.json names the end of turn that the chat template writes, also
    where the base's did not. Returns the names.

    Raises:
        BaseModelError: a file is a git-lfs pointer, there is no tokenizer in either folder, or it has tokens that the
            model has no embedding for.
    """
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    chosen = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    if not VOCABULARIES & set(chosen):
        chosen |= {name: base / name for name in VOCABULARIES if (base / name).is_file()}
    for name in (*_SOURCES_OF_TOKENIZERS, GENERATION_CONFIG, *PROCESSOR_FILES):
        if (base / name).is_file() and not (name in PROCESSOR_FILES and names_code(base / name)):
            chosen.setdefault(name, base / name)
    for name, path in chosen.items():
        content = path.read_bytes()
        if content.startswith(LFS_POINTER):
            raise BaseModelError(f"{path} is a git-lfs pointer, not the file.", "Run `git lfs pull` there.")
        write_atomically(folder / name, content)
    tokenizer = load_tokenizer(folder)
    _check_vocabulary(tokenizer, folder, source)
    if settings := settings_with_stops(folder, tokenizer):
        write_json(folder / GENERATION_CONFIG, settings)
    return sorted(chosen)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path) -> None:
    size = read_text_config(folder)["vocab_size"]
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= size and token not in UNWRITTEN]
    if beyond:
        raise BaseModelError(
            f"The tokenizer in {source} has {len(beyond)} tokens more than the model's vocabulary of {size}, such as "
            f"{beyond[0]!r}: the model has no embedding for them.",
            "Use the base's own tokenizer, or a base whose embeddings were made larger before training.",
        )


def settings_with_stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """A folder's generation_config.json, with the end of turn that the chat template writes; None where it names it."""
    named, ending = stop_tokens(folder, tokenizer), end_of_turn(tokenizer)
    if ending <= named:
        return None
    path = folder / GENERATION_CONFIG
    settings = read_object(path, BaseModelError, "Copy it again.") if path.is_file() else {}
    return settings | {"eos_token_id": sorted(named | ending)}


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON and brings it to the disk."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
