"""What goes to the terminal: its width, wrapped sentences, short numbers, and libraries kept quiet."""

import contextlib
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from qpsft.processes import is_main

# All but tab and line feed: a row or an answer must not be able to control the terminal it is shown on.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def wrap(text: str, indent: str = "  ") -> str:
    """The text in lines of at most 80 columns, all but the first indented; names and paths stay whole."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def visible(text: str) -> str:
    """Control characters other than tab and line feed as \\xNN."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def takes_color(stream: TextIO) -> bool:
    """Whether `stream` is a terminal and the environment says neither NO_COLOR nor TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def quiet_libraries() -> None:
    """Keeps libraries' notes off the terminal and prints qpsft's own warnings as one paragraph each.

    To be called before the libraries are imported. Only warnings that are raised in a module of qpsft are shown.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line per retry
    if not sys.stderr.isatty() or not is_main():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "transformers", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"qpsft(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if is_main():  # of several processes
        print(fill(f"warning: {message}"), file=sys.stderr)


@contextlib.contextmanager
def no_standard_input() -> Iterator[None]:
    """Standard input is empty inside: what a user pipes in is theirs, and no library may take it for an answer."""
    own, copy = sys.stdin, None
    with contextlib.suppress(OSError):  # a process may have none
        copy = os.dup(0)
    try:
        with open(os.devnull, encoding="utf-8") as nothing:
            sys.stdin = nothing
            if copy is not None:
                os.dup2(nothing.fileno(), 0)
            yield
    finally:
        sys.stdin = own
        if copy is not None:
            os.dup2(copy, 0)
            os.close(copy)


def fill(text: str) -> str:
    """Paragraphs, one a line of `text`, as wide as the terminal, at most 100 columns; paths and flags stay whole."""
    width = min(100, terminal_width())
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


def terminal_width() -> int:
    """Columns of the terminal; COLUMNS, or 80, if the output is none."""
    return shutil.get_terminal_size().columns


def quiet_worker() -> None:
    """`quiet_libraries` in a worker process, which has one thread and ends silently at Ctrl-C, and with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a process in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_libraries()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def short_number(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f}{unit}"
    return f"{number:.0f}"


def text_table(rows: Sequence[Sequence[str]], width: int | None = None, *, left: int = 1) -> str:
    """Rows of cells as aligned text, the first of them the header.

    Args:
        width: columns at most; cells that do not fit are wrapped. None: as wide as it is.
        left: so many columns stand to the left, the others to the right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for number, title in enumerate(rows[0]):
        is_left = number < left
        table.add_column(title, justify="left" if is_left else "right", no_wrap=is_left, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(width=width or 10_000, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
