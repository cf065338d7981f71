"""The small files of a merged model's folder: config, tokenizer, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpsft.data.ending import end_of_turn
from qpsft.files import write_atomically
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import read_config, read_json
from qpsft.verify.text import stop_tokens

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
# Vocabularies that a tokenizer saved by training does not repeat, and that llama.cpp converts from.
_SOURCES_OF_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def write_config(base: Path, folder: Path, dtype: str) -> None:
    """config.json: the base's, without quantization, with the merged dtype under transformers 5's key, `dtype`."""
    config = read_config(base)
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    _set_dtype(config, dtype)
    config["dtype"] = dtype
    write_json(folder / "config.json", config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if config.pop(key, None) is not None:
            config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, dtype)


def copy_tokenizer(adapter: Path, base: Path, folder: Path) -> list[str]:
    """Copies tokenizer and chat template from the adapter's folder, if it has a tokenizer, else from the base's; and
    the base's generation config. Returns the names."""
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    chosen = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    for name in (*_SOURCES_OF_TOKENIZERS, GENERATION_CONFIG):
        if (base / name).is_file():
            chosen.setdefault(name, base / name)
    for name, path in chosen.items():
        write_atomically(folder / name, path.read_bytes())
    return sorted(chosen)


def name_stops(folder: Path) -> None:
    """Has generation_config.json name the end of turn that the chat template writes, where the base's did not."""
    tokenizer = load_tokenizer(folder)
    named = stop_tokens(folder, tokenizer)
    stops = named | end_of_turn(tokenizer)
    if stops != named:
        path = folder / GENERATION_CONFIG
        settings = read_json(path) if path.is_file() else {}
        write_json(path, settings | {"eos_token_id": sorted(stops)})


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON and brings it to the disk."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
