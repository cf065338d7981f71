"""Python code that comes with a model's folder: it runs only where the user said so, and nobody is asked about it.

A config names such code under `auto_map`. transformers asks on standard input whether to run it where a loader says
nothing of `trust_remote_code`, and standard input may be a pipe with the user's own text. Our loaders always say it;
`code_is_off` answers for the loads that libraries make inside (PEFT reads a tokenizer for prompt tuning).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpsft.errors import BaseModelError

AUTO_MAP = "auto_map"
DATA_SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".tiktoken"}
"""Of the files of a model folder that only hold data; no Python files, no pickles."""


@contextmanager
def code_is_off() -> Iterator[None]:
    """Loads inside that say nothing of `trust_remote_code` refuse code with a ValueError instead of asking."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer; 0: does not ask
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def code_refused(config: Path) -> BaseModelError:
    """The error for a folder whose `config` needs Python code of its own."""
    return BaseModelError(
        f"{config} asks for Python code that comes with the model ({AUTO_MAP}), which is off.",
        "If you have read and trust that code, `qpsft train`, `preview`, `plan` and `compare` take "
        "--trust_remote_code; no other verb runs it. Else choose a model that transformers knows.",
    )


def names_code(config: Path) -> bool:
    """Whether a JSON file of a model folder names Python code."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content.get(AUTO_MAP))


def link_without_code(folder: Path, target: Path, *, weights: bool = True) -> None:
    """Makes `target`, a copy of a model folder for programs that trust what they load: data files only, no `auto_map`.

    What holds no `auto_map` is a link. Folders inside are left out.

    Args:
        weights: link the safetensors too.
    """
    target.mkdir()
    for path in folder.iterdir():
        if not path.is_file() or path.suffix not in DATA_SUFFIXES or (path.suffix == ".safetensors" and not weights):
            continue
        if path.suffix == ".json" and f'"{AUTO_MAP}"' in (text := _unescaped(path)):
            content = json.dumps(_without_code(json.loads(text)), ensure_ascii=False)
            (target / path.name).write_text(content, encoding="utf-8")
        else:
            (target / path.name).symlink_to(path.resolve())


def _unescaped(path: Path) -> str:
    """A JSON file's text in which every key reads as it is: "auto_map" may be spelt with escapes."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if "\\u" not in text or path.name == "tokenizer.json":  # a large file that names no code to transformers
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""  # a file that no library can read either


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key != AUTO_MAP}
    return [_without_code(item) for item in value] if isinstance(value, list) else value
