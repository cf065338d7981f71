"""One reader of options: dataclass fields become flags, and texts from flags and YAML become values of declared types.

A field is declared once: its name is the YAML key, the flag (`--name value`) and the Python argument; its metadata hold
the help text. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

from qpsft.errors import RecipeError, shown

Options = TypeVar("Options")

_FLAG = re.compile(r"--([\w-]+)(?:=(.*))?", re.DOTALL)
_SWITCH_VALUES = frozenset({"true", "false", "yes", "no", "on", "off", "none"})
_NARROWEST_LAST = (str, float, int, bool)
_METAVARS = {int: "N", float: "X", dict: "MAPPING"}
DEEPEST, MOST_PARTS, LARGEST = 20, 10_000, 2**63
"""Of an option's value: levels of nesting, values in all, and what its whole numbers are below."""
MOST_BRACKETS = 200
_BRACKETS = re.compile(r"[][{}]")
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", dict: "a mapping"}


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A dataclass field that `add_flags` understands.

    Args:
        default: the value if the option is not given; a list is copied. Without one, it is a positional argument.
        help: what the option is, for `--help`. The default is added to it.
        metadata: `metavar` and `choices` for `--help`; `short`, a flag of one letter beside the long one; `required`,
            which makes an option without default a flag that must be given; `least` and `above`, see `check_ranges`.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(options: Any) -> None:
    """Checks the numbers of an options dataclass, those in lists and mappings included.

    Raises:
        RecipeError: one is below its option's `least`, or not above its `above`.
    """
    for field in dataclasses.fields(options):
        value, (least, above) = getattr(options, field.name), map(field.metadata.get, ("least", "above"))
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in numbers:
            if least is not None and number is not None and not number >= least:
                raise RecipeError(f"{field.name} is {number}; it must be at least {least}.")
            if above is not None and number is not None and not number > above:
                raise RecipeError(f"{field.name} is {number}; it must be above {above}.")


def option_types(classes: Sequence[type]) -> dict[str, Any]:
    """Option name -> declared type, over dataclasses that share no name."""
    hints: dict[str, Any] = {}
    for cls in classes:
        types_of = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                hints.setdefault(field.name, types_of[field.name])
    return hints


# ---- flags ----


class Parser(argparse.ArgumentParser):
    """The command line of one verb. `--help` prints and exits, as in argparse; mistakes are RecipeErrors.

    Args:
        command: what is typed, such as "qpsft merge".
        usage: what follows it, such as "ADAPTER [options]".
        description: what the verb does.
        settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, usage: str, description: str, **settings: Any):
        settings = {"allow_abbrev": False, "exit_on_error": False, **settings}
        super().__init__(command, usage=f"{command} {usage}", description=description, **settings)

    def format_help(self) -> str:
        return re.sub(" +$", "", super().format_help(), flags=re.MULTILINE)  # behind flags without a value

    def error(self, message: str) -> typing.NoReturn:
        raise RecipeError(f"{self.prog}: {message}", f"`{self.prog} --help` explains it.")


def add_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    *classes: type,
    only: Collection[str] | None = None,
    shown: bool = True,
) -> None:
    """Adds every field of some dataclasses to a parser, or to a group of one. Values stay texts; see `read_flags`.

    Args:
        only: these fields and no others.
        shown: whether `--help` lists them.
    """
    for cls in classes:
        hints = option_types([cls])
        for field in dataclasses.fields(cls):
            if field.init and (only is None or field.name in only):
                _add_flag(parser, field, hints[field.name], shown)


def _add_flag(parser: Any, field: dataclasses.Field, hint: Any, shown: bool) -> None:
    settings: dict[str, Any] = {"help": _help_text(field) if shown else argparse.SUPPRESS}
    required = bool(field.metadata.get("required"))
    if _default_of(field) is dataclasses.MISSING and not required:
        parser.add_argument(field.name, metavar=field.name.upper(), **settings)
        return
    names = [f"--{field.name}"]
    if "short" in field.metadata:
        names.insert(0, field.metadata["short"])
    if _accepts(hint, list):
        settings["nargs"] = "*"
    elif _accepts(hint, bool) and not _is_switch(hint):
        settings |= {"nargs": "?", "const": True}
    parser.add_argument(*names, default=argparse.SUPPRESS, required=required, metavar=_metavar(field, hint), **settings)


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _help_text(field: dataclasses.Field) -> str:
    default = _default_of(field)
    text = str(field.metadata.get("help", "")).replace("%%", "%")  # transformers writes for argparse, we do not
    nothing = default in (None, "", [], dataclasses.MISSING) or default is False
    if not nothing and "(default" not in text:
        if isinstance(default, list):
            default = ",".join(map(str, default))
        text += f" (default: {'true' if default is True else default})"
    return text.replace("%", "%%")


def _metavar(field: dataclasses.Field, hint: Any) -> str:
    if field.metadata.get("metavar"):
        return field.metadata["metavar"]
    choices = field.metadata.get("choices") or _choices(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    if _is_switch(hint):
        return "{true,false}" if _default_of(field) is True else ""
    kinds = [kind for member in members_of(hint) for kind in (member, *typing.get_args(member))]
    return next((_METAVARS[kind] for kind in kinds if kind in _METAVARS), "TEXT")


def _is_switch(hint: Any) -> bool:
    """Whether an option is true or false and nothing else, so that its flag needs no value."""
    return {member for member in members_of(hint) if member is not type(None)} == {bool}


def split_flags(parser: Parser, argv: Sequence[str], hints: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a parser that stand on a command line, and the words that are left.

    Args:
        hints: option name -> declared type, of the parser's options.

    Returns:
        Name -> text, list of texts, or True for a flag without a value; and the other words, each flag written
        `--name` with underscores.

    Raises:
        RecipeError: a value or a positional argument is missing.
    """
    try:
        given, rest = parser.parse_known_args(_as_argparse_takes_it(argv, hints))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").rpartition("--")[2]
        if name not in hints or "expected" not in error.message:
            parser.error(str(error))
        raise RecipeError(f"--{name} needs a value.", f"It must be {describe(hints[name])}.") from None
    return {name: _value_of(words) for name, words in vars(given).items()}, rest


def _as_argparse_takes_it(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Flags with underscores in their names, switches with a value, values that begin with a dash joined to theirs."""
    words, result = list(argv), []
    while words:
        word = words.pop(0)
        flag = _FLAG.fullmatch(word)
        if flag is None:
            result.append(word)
            continue
        name, value = flag[1].replace("-", "_"), flag[2]
        following = words[0] if words else ""
        if value is None and name in hints and _is_switch(hints[name]):
            value = words.pop(0) if following.lower() in _SWITCH_VALUES else "true"
        elif value is None and re.match(r"-[^-].", following):  # -1e-4, but not -o
            value = words.pop(0)
        result.append(f"--{name}" if value is None else f"--{name}={value}")
    return result


def _value_of(words: Any) -> Any:
    """What argparse read: a text, True for a flag alone, or the words of a list."""
    if not isinstance(words, list):
        return words
    if len(words) > 1:
        return [part for word in words for part in word.split(",") if part]
    return words[0] if words else True


def read_flags(parser: Parser, argv: Sequence[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """`split_flags` of a command line that has nothing but the parser's options.

    Returns:
        Name -> text, list of texts, or True; flags that the parser does not know as well, for `read_values` to refuse.

    Raises:
        RecipeError: as `split_flags`, or a word belongs to no option.
    """
    given, rest = split_flags(parser, argv, hints)
    unknown = {flag[1]: flag[2] or True for flag in map(_FLAG.fullmatch, rest) if flag}
    if rest and not unknown:
        raise RecipeError(
            f"{rest[0]!r} belongs to no option.",
            "Flags are written --name value; those that are true or false need no value.",
        )
    return given | unknown


def parse(parser: Parser, argv: Sequence[str], options: type[Options]) -> Options:
    """Adds the fields of one dataclass to a parser and reads a command line into an instance of it.

    Raises:
        RecipeError: an unknown flag, with the nearest right name, or a value of another type.
    """
    add_flags(parser, options)
    return _made(parser, options, read_flags(parser, argv, option_types([options])))


def parse_known(parser: Parser, argv: Sequence[str], options: type[Options]) -> tuple[Options, list[str]]:
    """`parse` of a command line that has another reader's words too. Returns these, in their order, beside it."""
    add_flags(parser, options)
    given, rest = split_flags(parser, argv, option_types([options]))
    return _made(parser, options, given), rest


def _made(parser: Parser, options: type[Options], given: Mapping[str, Any]) -> Options:
    where = {name: f"--{name}" for name in given}
    others = f"`{parser.prog} --help` lists the options."
    return options(**read_values(given, option_types([options]), where, others=others))


# ---- values ----


class _Gone(NamedTuple):
    values: str
    """A pattern of the values that are gone; the others say what holds anyway and are taken. Empty: all of them."""
    why: str
    todo: str


_FROM_PYTHON = "Any PEFT config still comes in through Python: PSFTTrainer(peft_config=…)."
_GONE = {
    "reference": _Gone(
        "(?!snapshot$)",
        "PSFT's reference is always the snapshot; last_visit was measured to keep no more than plain SFT",
        "Leave it out.",
    ),
    "reference_placement": _Gone(
        "(?!auto$)", "on CUDA the reference copy always lies in pinned host memory", "Leave it out."
    ),
    "quantization": _Gone("int8$", "int8 is no longer supported", "Use nf4."),
    "lora_bias": _Gone("(?!none$)", "recipes no longer train biases", f"Leave it out. {_FROM_PYTHON}"),
    "init_lora_weights": _Gone(
        "(?i)(?!true$)",
        "adapters of recipes start with A random and B zero; PiSSA and OLoRA would change the base",
        f"Leave it out. {_FROM_PYTHON}",
    ),
    "noise": _Gone(
        "",
        "qpsft compare no longer repeats a comparison at several shares of wrong rows",
        "Use `python benchmarks/noise_study.py RECIPE --noise 0,0.1,0.3`.",
    ),
}
"""Options that earlier versions had."""


def read_values(
    given: Mapping[str, Any],
    hints: Mapping[str, Any],
    where: Mapping[str, str],
    *,
    others: str,
    likely: Collection[str] = (),
) -> dict[str, Any]:
    """Texts and YAML's values as values of the declared types.

    Args:
        given: option name -> text or value.
        hints: option name -> declared type.
        where: option name -> what to call it in an error: its flag, or its file and key.
        others: what to do about an unknown name that is near to none.
        likely: names to suggest before others.

    Raises:
        RecipeError: an option is unknown, with the nearest right name, or gone, with what to use instead; or a value
            is of another type.
    """
    values = {}
    for name, value in given.items():
        _refuse_if_gone(name, value, where[name], known=name in hints)
        if name in hints:
            values[name] = coerce(value, hints[name], where[name])
        elif name not in _GONE:
            raise RecipeError(f"{where[name]}: there is no such option.", _suggestion(name, hints, likely) or others)
    return values


def _refuse_if_gone(name: str, value: Any, where: str, *, known: bool) -> None:
    gone = _GONE.get(name)
    if gone and (gone.values or not known) and re.match(gone.values, str(value)):
        raise RecipeError(f"{where}: {gone.why}.", gone.todo)


def _suggestion(name: str, known: Collection[str], likely: Collection[str]) -> str:
    def nearness(other: str) -> float:
        return difflib.SequenceMatcher(None, other, str(name)).ratio() + 0.1 * (other in likely)

    near = sorted(difflib.get_close_matches(str(name), list(known), n=9, cutoff=0.6), key=nearness, reverse=True)
    return f"Did you mean {' or '.join(near[:3])}?" if near else ""


def load_yaml(text: str, loader: type = yaml.SafeLoader) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError, or whatever Python raises for values that it cannot make."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MOST_BRACKETS:  # PyYAML's time grows with the square of the depth
        raise yaml.YAMLError("it is nested too deeply")
    return yaml.load(text, Loader=loader)


def plain(value: Any, *, depth: int = 0, count: list[int] | None = None) -> Any:
    """A value from YAML, made of what options are made of: mappings, lists, texts, numbers, truth values and null.

    A date becomes its text. YAML knows much more: sets, bytes, points in time, lists that hold themselves.

    Raises:
        ValueError: it is, or holds, something else; or it has no end, or too many parts.
    """
    count = [0] if count is None else count
    count[0] += 1
    if depth > DEEPEST or count[0] > MOST_PARTS:
        raise ValueError("its values are nested too deeply" if depth > DEEPEST else "it has too many values")
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        if not -LARGEST < value < LARGEST:
            raise ValueError("it holds a whole number of more than 64 bits")
        return value
    if isinstance(value, str):
        if "\0" in value or not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("it holds a character that no text has")
        return value
    if type(value) is datetime.date:
        return value.isoformat()
    if isinstance(value, list):
        return [plain(item, depth=depth + 1, count=count) for item in value]
    if isinstance(value, dict):
        items = [(plain(key, depth=depth + 1), item) for key, item in value.items()]
        return {key: plain(item, depth=depth + 1, count=count) for key, item in items}
    raise ValueError(f"it holds a {type(value).__name__}; write it in quotes")


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the declared type of an option; texts (from flags, or YAML's 1e-4) are read as YAML and as they are.

    Args:
        hint: a type annotation: bool, int, float, str, an Enum, Literal, list, dict, and unions of these.
        where: what to call the option in an error.

    Raises:
        RecipeError: the value is of another type.
    """
    for candidate in _readings(value, hint):
        try:
            return _conform(plain(candidate), hint)
        except (TypeError, ValueError):
            continue
    if value is True and where.startswith("--"):
        raise RecipeError(f"{where} needs a value.", f"It must be {describe(hint)}.")
    if isinstance(value, list) and not _accepts(hint, list):
        value = " ".join(map(str, value))
    raise RecipeError(f"{where} is {shown(value)}; it must be {describe(hint)}.")


def _readings(value: Any, hint: Any) -> list[Any]:
    """What a value may mean, the likeliest first."""
    if not isinstance(value, str) or value in _choices(hint):
        return [value]
    try:
        read = None if value.lower() == "none" else load_yaml(value)
    except Exception:  # no YAML, or a date, number or nesting that Python does not make
        read = value
    return [value, read] if _accepts(hint, str) and not isinstance(read, (list, dict)) else [read, value]


def members_of(hint: Any) -> tuple:
    """The types of a union; a tuple of one for any other type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(member is kind or typing.get_origin(member) is kind for member in members_of(hint))


def _choices(hint: Any) -> tuple:
    """The values of a Literal, alone or in a union."""
    literals = [member for member in members_of(hint) if typing.get_origin(member) is Literal]
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


def _conform(value: Any, hint: Any) -> Any:
    """`value` as `hint` has it. Raises TypeError or ValueError if it is something else."""
    members = members_of(hint)
    # bool before int before float before str: the narrowest reading wins
    for member in sorted(members, key=lambda m: _NARROWEST_LAST.index(m) if m in _NARROWEST_LAST else -1)[::-1]:
        try:
            return _conform_to_one(value, member)
        except (TypeError, ValueError):
            continue
    raise ValueError


def _conform_to_one(value: Any, kind: Any) -> Any:
    """The same for a type that is no union."""
    origin = typing.get_origin(kind) or kind
    if kind is Any or (value is None and kind in (None, type(None))):
        return value
    if origin is Literal and value in typing.get_args(kind):
        return value
    if origin is list:
        return _list_of(value, *typing.get_args(kind) or (Any,))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value).value
    if kind in (int, float) and not isinstance(value, bool):
        return _number(value, kind)
    if origin in (bool, dict, str) and isinstance(value, origin):
        return value
    raise ValueError


def _list_of(value: Any, kind: Any) -> list:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list):
        raise TypeError
    return [_conform(item, kind) for item in value]


def _number(value: Any, kind: type) -> int | float:
    number = float(value)
    if not math.isfinite(number) or number != kind(number) or kind is int and not -LARGEST < number < LARGEST:
        raise ValueError
    return kind(number)


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type, as in `coerce`."""
    try:
        _conform(plain(value), hint)
    except (TypeError, ValueError):
        return False
    return True


def describe(hint: Any) -> str:
    """The values of a type in words: "nf4, fp4 or none"."""
    names = []
    for member in members_of(hint):
        if typing.get_origin(member) is Literal:
            names += [str(choice) for choice in typing.get_args(member)]
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            names += [str(choice.value) for choice in member]
        elif member is type(None):
            names.append("none")
        else:
            is_list = typing.get_origin(member) is list or member is list
            names.append("a list" if is_list else _IN_WORDS.get(typing.get_origin(member) or member, str(member)))
    names = list(dict.fromkeys(names))
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]
