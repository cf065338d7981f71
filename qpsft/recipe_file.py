"""A recipe's YAML file: a flat mapping of options, strictly read, that may begin with another recipe's.

extends: recipe.yaml    # a file or folder, looked up beside this file; what follows replaces its options
loss_type: nll
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from qpsft.errors import RecipeError

EXTENDS = "extends"


def read_recipe_file(path: Path, readers: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of a file, and for each where it stands, as errors call it.

    Args:
        path: the file, or a folder with a `recipe.yaml`.
        readers: files that extend this one.

    Raises:
        RecipeError: the file, or one it extends, is missing, not a mapping, gives a key twice, or extends itself.
    """
    content = _read_yaml(path)
    where = {name: f"{path}: {name}" for name in content}
    parent = content.pop(EXTENDS, None)
    if parent is None:
        return content, where
    if not isinstance(parent, str) or not parent:
        raise RecipeError(f"{where[EXTENDS]} is {parent!r}.", "Give the path of one other recipe.")
    source = Path(os.path.normpath(_folder(path) / parent))
    readers = (*readers, _file(path).resolve())
    if _file(source).resolve() in readers:
        raise RecipeError(f"{where[EXTENDS]}: {source} extends this recipe in turn.", "Take one of the two out.")
    inherited, inherited_where = read_recipe_file(source, readers)
    find_beside(inherited, source)
    return inherited | content, inherited_where | where


def find_beside(given: dict[str, Any], path: Path | None) -> None:
    """Relative paths among the options are looked up from where the command runs, then beside the recipe."""
    if path is None:
        return
    for name in ("dataset_name", "model_name_or_path", "adapter_name_or_path"):
        value = given.get(name)
        if isinstance(value, str) and not Path(value).exists() and (_folder(path) / value).exists():
            given[name] = os.path.normpath(_folder(path) / value)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _file(path: Path) -> Path:
    return path / "recipe.yaml" if path.is_dir() and (path / "recipe.yaml").is_file() else path


def _read_yaml(path: Path) -> dict[str, Any]:
    path = _file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        hint = f"Did you mean {path.with_name(near[0])}?" if near else "Check the path; recipes are YAML files."
        raise RecipeError(f"There is no recipe {path}.", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.", "A recipe is a YAML file in UTF-8.") from None
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}).", "Write one `name: value` a line."
        ) from None
    if content is None:
        raise RecipeError(f"The recipe {path} is empty.", "Give at least model_name_or_path and dataset_name.")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(
            f"The recipe {path} is a {type(content).__name__}, not a mapping of option names.",
            "Write one `name: value` a line, such as `learning_rate: 2e-4`.",
        )
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.parent.is_dir() else []
