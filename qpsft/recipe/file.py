"""A recipe's YAML file: a flat mapping of options, strictly read, that may extend another recipe.

extends: recipe.yaml    # a file or folder, relative to this file; the options below replace its options
loss_type: nll
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qpsft.errors import RecipeError, boundary, one_line, shown
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, read_guard
from qpsft.recipe.flags import Parser, load_yaml, option_types, plain, read_flags, read_values
from qpsft.recipe.methods import method_options
from qpsft.recipe.secret import holds_secret
from qpsft.recipe.sources import check_sources
from qpsft.recipe.trainer_options import (
    COMMON_TRAINER_OPTIONS,
    add_recipe_flags,
    own_options,
    refuse_without_effect,
    settle_evaluation,
)

EXTENDS = "extends"
PATHS = (
    "dataset_name", "eval_dataset", "model_name_or_path", "adapter_name_or_path", "replay_dataset", "replay_prompts"
)  # fmt: skip
"""Options that may name a file."""


def read_recipe_file(path: Path, readers: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of a file, and what to call each in an error: its file and key.

    Args:
        path: the file, or a folder with a `recipe.yaml`.
        readers: files that extend this one.

    Raises:
        RecipeError: the file, or one it extends, is missing, not a mapping, gives a key twice, or extends itself.
    """
    content = read_yaml(path)
    where = {name: f"{path}: {name}" for name in content}
    parent = content.pop(EXTENDS, None)
    if parent is None:
        return content, where
    if not isinstance(parent, str) or not parent:
        raise RecipeError(f"{where[EXTENDS]} is {parent!r}.", "Give the path of one other recipe.")
    with boundary(f"{where[EXTENDS]} cannot be followed", RecipeError, "Give the path of one other recipe."):
        source = Path(os.path.normpath(_folder(path) / parent))
        readers = (*readers, _file(path).resolve())
        again = _file(source).resolve() in readers
    if again:
        raise RecipeError(f"{where[EXTENDS]}: {source} extends this recipe in turn.", "Take one of the two out.")
    inherited, inherited_where = read_recipe_file(source, readers)
    find_beside(inherited, source)
    return inherited | content, inherited_where | where


def find_beside(given: dict[str, Any], path: Path | None) -> None:
    """Makes relative paths that do not exist from the current folder relative to the recipe's, if they exist there."""
    if path is None:
        return
    for name in PATHS:
        given |= {name: beside(given[name], path)} if name in given else {}
    if isinstance(given.get("guard"), dict) and "data" in given["guard"]:
        given["guard"] = given["guard"] | {"data": beside(given["guard"]["data"], path)}
    mix = given.get("dataset_mix")
    for entry in [*(mix if isinstance(mix, list) else []), given.get("replay_dataset")]:
        if isinstance(entry, dict):
            find_beside(entry, path)


def beside(value: Any, path: Path) -> Any:
    """A relative path that exists beside the recipe and not from the current folder, made relative to the recipe's."""
    if isinstance(value, str) and not Path(value).exists() and (_folder(path) / value).exists():
        return os.path.normpath(_folder(path) / value)
    return value


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _file(path: Path) -> Path:
    return path / "recipe.yaml" if path.is_dir() and (path / "recipe.yaml").is_file() else path


def read_yaml(path: Path) -> dict[str, Any]:
    """The options that one file gives, whatever it extends; dates are texts. Raises as `read_recipe_file`."""
    with boundary(f"The recipe {shown(str(path))} cannot be read", RecipeError, "A recipe is a YAML file in UTF-8."):
        path = _file(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
            hint = f"Did you mean {path.with_name(near[0])}?" if near else "Check the path; recipes are YAML files."
            raise RecipeError(f"There is no recipe {path}.", hint) from None
    try:
        content = load_yaml(text, _StrictLoader)
    except Exception as error:  # also one that is nested deeper than Python can follow
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise RecipeError(f"{path}{line}: not valid YAML ({problem}).", "Write one `name: value` a line.") from None
    if content is None:
        raise RecipeError(f"The recipe {path} is empty.", "Give at least model_name_or_path and dataset_name.")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(
            f"The recipe {path} is a {type(content).__name__}, not a mapping of option names.",
            "Write one `name: value` a line, such as `learning_rate: 2e-4`.",
        )
    for name, value in content.items():
        try:
            content[name] = plain(value)
        except ValueError as error:
            raise RecipeError(
                f"{path}: {shown(name)} cannot be read: {error}.", "Values are texts, numbers, lists and mappings."
            ) from None
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would silently keep the last, and names the line of what
    Python cannot make, such as 9999-99-99."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            raise yaml.constructor.ConstructorError(None, None, one_line(error), node.start_mark) from None

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


@dataclass
class Recipe:
    """A run, resolved.

    Attributes:
        given: the options that YAML, flags and `method` set; flags win over YAML, both over the method.
        trainer: an instance of the trainer class handed to `load_recipe`.
    """

    path: Path | None
    given: dict[str, Any]
    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    run: RunArguments
    trainer: Any

    def values(self) -> dict[str, Any]:
        """The options that repeat the run: those of qpsft, the trainer's common ones, and all that were given."""
        values = {}
        for part in (self.model, self.data, self.lora):
            values |= dataclasses.asdict(part)
        if self.lora.adapter_name_or_path:  # the adapter brings its own values of options that are not given
            kept = {*self.given, "adapter_name_or_path", "lora_dropout"}
            values = {n: v for n, v in values.items() if n in kept or not hasattr(self.lora, n)}
        own = own_options(type(self.trainer)) | set(COMMON_TRAINER_OPTIONS) | set(self.given)
        for option in dataclasses.fields(self.trainer):
            if option.name in own:
                value = getattr(self.trainer, option.name)
                values[option.name] = value.value if isinstance(value, enum.Enum) else value
        return {name: value for name, value in values.items() if not holds_secret(name, value)}


def load_recipe(path: str | Path | None, flags: Sequence[str], trainer_class: type) -> Recipe:
    """Reads a YAML file and command-line flags into a `Recipe`.

    Args:
        path: YAML file with a flat mapping (`qpsft.recipe.file`), or None.
        flags: `--name value`, `--name=value`, `--name` (true), `--name a b` (a list).
        trainer_class: dataclass of the trainer's options (`PSFTConfig`).

    Raises:
        RecipeError: the file is missing or no mapping, an option is unknown (with the nearest right name), a value is
            of the wrong type or out of range.
    """
    path = None if path is None else Path(path)
    classes = (ModelArguments, LoraArguments, DataArguments, RunArguments, trainer_class)
    hints = option_types(classes)
    given, where = ({}, {}) if path is None else read_recipe_file(path)
    parser = Parser("qpsft train", "[RECIPE] [options]", "", add_help=False)
    add_recipe_flags(parser, trainer_class)
    from_flags = read_flags(parser, flags, hints)
    given, where = given | from_flags, where | {name: f"--{name}" for name in from_flags}
    _refuse_secrets(given, where)
    refuse_without_effect(given, where)
    likely = {*option_types(classes[:-1]), *own_options(trainer_class), *COMMON_TRAINER_OPTIONS}
    others = "`qpsft train --help_all` lists all options."
    given = read_values(given, hints, where, likely=likely, others=others)
    if given.get("guard") is not None:
        given["guard"] = read_guard(given["guard"], where["guard"])
    if given.get("method") is not None:
        given |= method_options(given["method"], given)
    _default_output_dir(given, path)
    find_beside(given, path)
    settle_evaluation(given, where, trainer_class)
    if given.get("dtype", "auto") != "auto" and not {"bf16", "fp16"} & set(given):
        # the trainer's mixed precision follows the base's compute dtype
        given |= {"bf16": given["dtype"] == "bfloat16", "fp16": given["dtype"] == "float16"}
    parts = [_build(cls, given, where) for cls in classes]
    check_sources(parts[2], parts[4])
    return Recipe(path, given, parts[0], parts[1], parts[2], parts[3], parts[4])


def _refuse_secrets(given: dict[str, Any], where: dict[str, str]) -> None:
    for name, value in given.items():
        if holds_secret(name, value):
            raise RecipeError(
                f"{where[name]} holds a secret (a token, key or password), and the options of a run are written into "
                "its recipe, which `qpsft push` uploads.",
                "Take it out. The Hub's token comes from `hf auth login` or $HF_TOKEN; loggers read their own "
                "environment variables.",
            )


def _default_output_dir(given: dict[str, Any], path: Path | None) -> None:
    if given.get("output_dir") is None:
        folder = "runs/qpsft" if path is None else path if path.is_dir() else path.parent
        given["output_dir"] = str(folder)


def _build(cls: type, given: dict[str, Any], where: dict[str, str]) -> Any:
    names = {option.name for option in dataclasses.fields(cls) if option.init}
    try:
        return cls(**{name: value for name, value in given.items() if name in names})
    except RecipeError:
        raise
    except Exception as error:  # transformers and torch refuse options in any way
        about = _blamed(str(error), {name: given[name] for name in where if name in names})
        start = where[about] if about else "The options do not fit together"
        raise RecipeError(f"{start}: {str(error).rstrip(' .')}", "Change or leave out that option.") from error


def _blamed(message: str, given: dict[str, Any]) -> str | None:
    """The option that a library's message names first, by its name or by its value; None if it names none."""
    places = {}
    for name, value in given.items():
        for word in (name, *([value] if isinstance(value, str) and value else [])):
            match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)
            if match:
                places[name] = min(places.get(name, len(message)), match.start())
    return min(places, key=places.get) if places else None
