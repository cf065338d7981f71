"""Strict reading of one option's value: the declared type or an error that says what it must be."""

from __future__ import annotations

import enum
import math
import types
import typing
from typing import Any, Literal

import yaml

from qpsft.errors import RecipeError

_ORDERED = (str, float, int, bool)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the declared type of an option; texts (from flags, or YAML's 1e-4) are read as YAML and as they are.

    Args:
        hint: a type annotation: bool, int, float, str, an Enum, Literal, list, dict, and unions of these.
        where: what to call the option in an error.

    Raises:
        RecipeError: the value is of another type.
    """
    candidates = [value]
    if isinstance(value, str):
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = value
        read = None if value.lower() == "none" else read
        candidates = [value, read] if _accepts(hint, str) and not isinstance(read, (list, dict)) else [read, value]
    elif isinstance(value, list) and not _accepts(hint, list):
        value = " ".join(map(str, value))
    for candidate in candidates:
        try:
            return _conform(candidate, hint)
        except (TypeError, ValueError):
            continue
    raise RecipeError(f"{where} is {value!r}; it must be {_describe(hint)}.")


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(member is kind or typing.get_origin(member) is kind for member in _members(hint))


def _conform(value: Any, hint: Any) -> Any:
    members = _members(hint)
    if len(members) > 1:
        # bool before int before float before str: the narrowest reading wins
        for member in sorted(members, key=lambda m: _ORDERED.index(m) if m in _ORDERED else -1)[::-1]:
            try:
                return _conform(value, member)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if hint is Any:
        return value
    if hint in (None, type(None)):
        if value is not None:
            raise ValueError
        return None
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if origin is list or hint is list:
        inner = (typing.get_args(hint) or (Any,))[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list):
            raise TypeError
        return [_conform(item, inner) for item in value]
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError
        return value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value).value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
        if number == int(number):
            return int(number)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise ValueError


def _describe(hint: Any) -> str:
    names = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            names += [str(choice) for choice in typing.get_args(member)]
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            names += [str(choice.value) for choice in member]
        elif member is not type(None):
            word = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
            names.append(word.get(member, "a list" if typing.get_origin(member) is list else str(member)))
        else:
            names.append("none")
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]
