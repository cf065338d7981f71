"""What libraries say that a user can do nothing about, kept off the terminal. Called before they are imported."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings

from qpsft.processes import is_main


def quiet_libraries() -> None:
    """Libraries' notes that a user can do nothing about stay out of the way; our own warnings are one clear line."""
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


def fill(text: str) -> str:
    """A paragraph as wide as the terminal, at most 100 columns; paths and flags stay whole."""
    return textwrap.fill(text, min(100, terminal_width()), break_long_words=False, break_on_hyphens=False)


def terminal_width() -> int:
    """Columns; 80 where nobody watches, unless COLUMNS says otherwise."""
    return shutil.get_terminal_size().columns


def quiet_worker() -> None:
    """The same in a process that works beside others, with one thread; Ctrl-C ends it without a word."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a process in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_libraries()
