"""A hidden folder beside an export's output for all that is not finished; removed whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpsft.errors import ExportError, OutputError
from qpsft.merging.finished_folder import hidden_folder


@contextmanager
def work_folder(output: Path, *, overwrite: bool, source: Path) -> Iterator[Path]:
    """Yields a new folder on the disk of `output`; folders that killed runs left there are removed first.

    Raises:
        OutputError: `output` exists and `overwrite` is False, holds `source`, is being written by another process,
            or its parent cannot be written; and for any OSError inside the block, such as a full disk.
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists.", "Give --overwrite to replace it, or choose another with -o.")
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise OutputError(f"{output} is, or holds, what is to be exported.", "Choose another output with -o.")
    with hidden_folder(output, "exporting") as folder:
        yield folder


def put_in_place(finished: Path, output: Path) -> None:
    """Brings a finished file to the disk and gives it its name, in one step."""
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(finished, output)


def is_adapter(source: Path) -> bool:
    """Whether a folder is an adapter's (True) or a model's. Raises ExportError when it is neither."""
    if (source / "adapter_config.json").is_file():
        return True
    if (source / "config.json").is_file():
        return False
    raise ExportError(
        f"{source} is neither an adapter folder (adapter_config.json) nor a merged model (config.json).",
        "Give the folder that qpsft train or qpsft merge wrote.",
    )
