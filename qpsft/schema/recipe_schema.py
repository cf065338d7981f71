"""The options' dataclasses -> JSON Schema (draft 2020-12). What it takes, `qpsft.recipe.flags.coerce` takes too."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any, Literal

from qpsft.compare.options import CompareOptions
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.arguments import DataArguments, GuardArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.file import EXTENDS
from qpsft.recipe.flags import members_of, option_types
from qpsft.recipe.sources import OWN, SHARED
from qpsft.recipe.trainer_options import NOT_OURS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NUMBER = {
    # YAML 1.1 reads 2e-4 as a text, YAML 1.2 as a number; qpsft takes both
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"}]
}
_TYPES = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: NUMBER,
    str: {"type": "string"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file: every option with its type, values, default and help; no other key."""
    properties = {EXTENDS: {"type": "string", "description": "Another recipe, whose options these replace."}}
    for options in (ModelArguments, DataArguments, LoraArguments, RunArguments, PSFTConfig):
        properties |= {name: part for name, part in properties_of(options).items() if name not in properties}
    properties["compare"] = {
        "anyOf": [mapping_of(properties_of(CompareOptions)), {"type": "null"}],
        "description": properties["compare"]["description"],
    }
    for name, entry in (("dataset_mix", source_schema(with_share=True)), ("replay_dataset", source_schema())):
        properties[name]["anyOf"] = [_with_entry(one, entry) for one in properties[name]["anyOf"]]
    properties["guard"] = {
        "anyOf": [mapping_of(properties_of(GuardArguments)), {"type": "null"}],
        "description": properties["guard"]["description"],
    }
    for name in [name for name in NOT_OURS if name in properties]:
        why, todo = NOT_OURS[name]
        properties[name] |= {"deprecated": True, "description": f"No effect in `qpsft train`: {why}. {todo}"}
    return {"$schema": DRAFT, "title": "Recipe of qpsft", **mapping_of(properties)}


def source_schema(*, with_share: bool = False) -> dict[str, Any]:
    """The schema of one source of `dataset_mix` or `replay_dataset`."""
    properties = {name: part for name, part in properties_of(DataArguments).items() if name in (*OWN, *SHARED)}
    if with_share:
        share = "Share of the rows of every mini-batch; one source may leave it out and is the rest."
        properties["share"] = {"anyOf": [NUMBER, {"type": "null"}], "description": share}
    return mapping_of(properties) | {"required": ["dataset_name"]}


def _with_entry(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A mapping, or a list of mappings, whose keys are those of a source; other schemas as they are."""
    kind = schema.get("type")
    return entry if kind == "object" else schema | {"items": entry} if kind == "array" else schema


def mapping_of(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping with these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def properties_of(options: type) -> dict[str, Any]:
    """Option name -> schema, of a dataclass's fields."""
    hints = option_types([options])
    return {field.name: _property(field, hints[field.name]) for field in dataclasses.fields(options) if field.init}


def _property(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    schema = dict(schema_of(hint))
    if choices := field.metadata.get("choices"):
        schema = {"enum": [*choices, *([None] if type(None) in members_of(hint) else [])]}
    help = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    if help:
        schema["description"] = help
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, (bool, int, float, str, list)):
        schema["default"] = default.value if isinstance(default, enum.Enum) else default
    return schema


def schema_of(hint: Any) -> dict[str, Any]:
    """The schema of a type annotation: what a recipe may write for it."""
    if hint is Any:
        return {}
    members = members_of(hint)
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        members = [member for member in members if member is not str]  # transformers': the text of a value
    schemas = [schema for member in members for schema in _of_one(member)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _of_one(kind: Any) -> list[dict[str, Any]]:
    """The same for a type that is no union; nothing for a class that no YAML value can be."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return [{"enum": list(typing.get_args(kind))}]
    if origin is list:  # also as one text, its parts separated by commas
        return [{"type": "array", "items": schema_of(*typing.get_args(kind) or (Any,))}, {"type": "string"}]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [{"enum": [choice.value for choice in kind]}]
    return [_TYPES[origin]] if origin in _TYPES else []
