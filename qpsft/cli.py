"""The command line: each verb is a function of its name in the `command.py` of its package."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from qpsft import __version__
from qpsft.errors import Interrupted, QpsftError, did_you_mean, shown
from qpsft.processes import (
    SIGNALS,
    is_main,
    let_memory_segments_grow,
    print_error,
    taken_signals,
    world_size,
)
from qpsft.terminal import fill, no_standard_input

INTERRUPTED = 128  # and the signal's number: 130 for Ctrl-C, as in shells
AFTER_INTERRUPT = {
    "train": "Nothing was begun; an earlier run goes on with --resume.",  # a run that was begun says it itself
    "demo": "Begin it again with --overwrite.",
    "compare": "Finished runs are kept: the same command goes on from here.",
}
READ_INPUT = ("chat",)
"""Verbs that read standard input, themselves; all others work without it, and so do their libraries."""

# verb -> its package, and what it does
VERBS = {
    "demo": ("demo", "train the embedded base model and show what it learned"),
    "doctor": ("doctor", "whether this machine can train, and the cure where it cannot"),
    "train": ("train", "train an adapter as a recipe says"),
    "preview": ("train", "show the rows as the model will see them"),
    "plan": ("plan", "the memory a recipe needs, and whether a card has it"),
    "evaluate": ("evaluate", "accuracy, pass@k, likelihood, drift; public benchmarks"),
    "compare": ("compare", "compare SFT and the methods that keep more, side by side"),
    "chat": ("chat", "talk to an adapter, its base, or both"),
    "schema": ("schema", "print the JSON Schema of recipes, for editors"),
    "merge": ("merge", "merge an adapter into its base: plain safetensors"),
    "verify": ("verify", "prove that an exported model is the trained one"),
    "export": ("export", "write a GGUF, an Ollama folder, or what vLLM needs"),
    "push": ("export", "upload an adapter or a merged model to the Hub"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a mistake the user can mend, 128 + its number for a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"qpsft {__version__}")
        return 0
    let_memory_segments_grow()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file too, lines of a run that is killed are there
    try:
        # A chat has nothing to clear away. Of several processes, the launcher's signals must end those that wait for
        # one that has failed.
        takes_signals = world_size() == 1 and argv[0] not in READ_INPUT
        with taken_signals(_interrupt, SIGNALS[1:]) if takes_signals else contextlib.nullcontext():
            return _run(argv[0], argv[1:])
    except SystemExit as stop:  # argparse has printed --help
        return stop.code
    except QpsftError as error:
        print_error(fill(f"error: {error}"))
        return error.exit_code
    except OSError as error:  # a path too long, a file without permission, a full disk
        name = f"{shown(os.fspath(error.filename))}: " if error.filename else ""
        print_error(fill(f"error: {name}{error.strerror or error}."))
        return 2
    except ImportError:  # transformers', where a package it uses does not import
        from qpsft.model.environment import broken_torchvision

        problem = broken_torchvision()
        if problem is None:
            raise
        print_error(fill(f"error: {problem}"))
        return problem.exit_code
    except KeyboardInterrupt as stop:
        if is_main():
            todo = (argv[0] == "train" and str(stop)) or AFTER_INTERRUPT.get(argv[0], "")
            print(fill(f"\nInterrupted. {todo}".rstrip()), file=sys.stderr)
        return INTERRUPTED + getattr(stop, "number", signal.SIGINT)


def _interrupt(number: int, frame: Any) -> None:
    """As Ctrl-C does: what was begun is cleared away."""
    raise Interrupted(number=number)


def _run(verb: str, argv: Sequence[str]) -> int:
    if verb not in VERBS:
        raise QpsftError(f"qpsft has no verb {verb!r}.", f"{did_you_mean(verb, VERBS)}Verbs: {', '.join(VERBS)}.")
    if verb != "train" and world_size() > 1:
        raise QpsftError(f"qpsft {verb} works in one process, not in {world_size()}.", "Leave out torchrun.")
    package, _ = VERBS[verb]
    with contextlib.nullcontext() if verb in READ_INPUT else no_standard_input():
        return getattr(importlib.import_module(f"qpsft.{package}.command"), verb)(argv)


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: qpsft VERB [options]\n\n"
        "Proximal Supervised Fine-Tuning (PSFT) on 4-bit base models with LoRA.\n\n"
        f"{verbs}\n\n"
        "`qpsft VERB --help` explains one. Start with `qpsft demo`."
    )
