"""Errors a user can act on: what happened, where (file, line, row, key), what to do."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any


class QpsftError(Exception):
    """A mistake or a condition the user can change. The command line prints it without a traceback and exits with 2.

    Args:
        what: what happened and where, one sentence or two, with the file, line, row or key it is about.
        todo: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, todo: str = ""):
        self.what = what if what.endswith((".", "!", "?", "…")) else f"{what}."
        self.todo = todo
        super().__init__(f"{self.what} {todo}".strip())

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.todo), self.__dict__


class RecipeError(QpsftError, ValueError):
    """An option or a recipe file is wrong: unknown key, wrong type, value out of range."""


class MachineError(QpsftError):
    """This machine, or the Python packages on it, cannot run what was asked for."""


class DataError(QpsftError, ValueError):
    """Training or evaluation rows are missing, broken or of an unknown shape."""


class BaseModelError(QpsftError):
    """The base model, its tokenizer or an adapter cannot be loaded as asked."""


class OutputError(QpsftError):
    """Results cannot be written where they should go."""


class TrainingError(QpsftError):
    """Training cannot start or go on: nothing to supervise, a loss that is not finite, a changed adapter."""


class DivergedError(TrainingError):
    """The loss or the gradient is NaN or infinite.

    Attributes:
        step: the optimizer step, counted from 1.
    """

    def __init__(self, what: str, todo: str = "", step: int = 0):
        super().__init__(what, todo)
        self.step = step


class ExportError(QpsftError):
    """A merge, a conversion or an upload cannot be done, or what it wrote is not right."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or another signal has ended what was done. Its text, which may be empty, says how to go on.

    Attributes:
        number: of the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT):
        super().__init__(text)
        self.number = number


class NotTheSameModelError(QpsftError):
    """An exported model is not the model that was trained."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "Did you mean NAME? " with the nearest known name, for an error's advice; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]}? " if near else ""


def one_line(error: BaseException, length: int = 300) -> str:
    """An error's message on one line, shortened to `length` characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length].rstrip() + " …"


def shown(value: Any, length: int = 80) -> str:
    """A value as Python writes it, for an error: of any size and depth, in `length` characters at most."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = length
    try:
        text = writer.repr(value)
    except ValueError:  # an integer of 5,000 digits has no text
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= length else text[:length] + "…"


@contextlib.contextmanager
def boundary(what: str, kind: type[QpsftError], todo: str = "") -> Iterator[None]:
    """Around all that reads one thing from outside: whatever goes wrong inside is that thing's fault, and says so.

    Libraries fail on a broken file in any way they like; nobody can list them all. Our own errors pass as they are.

    Args:
        what: what cannot be done and with which file, such as "config.json cannot be read".
        kind, todo: of the error that is raised.
    """
    try:
        yield
    except QpsftError:
        raise
    except Exception as error:
        said = one_line(error)
        if not isinstance(error, OSError | ValueError) and type(error).__name__ not in said:
            said = f"{type(error).__name__}: {said}"
        raise kind(f"{what}: {said}", todo) from error
