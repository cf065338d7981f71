"""A folder that is there finished or not at all, whatever kills the process that writes it.

Everything is written into a hidden sibling, whose name says which process on which machine it belongs to; when it is
complete it takes the final name in one step. A sibling whose process is dead is removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpsft.errors import ExportError, OutputError

MARK = "merge_report.json"  # a folder without it was not written here and is never replaced
_EXCHANGE = 2  # Linux's RENAME_EXCHANGE
_AT_FDCWD = -100


@contextmanager
def finished_folder(output: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields a new folder to write into; when the block ends without an exception it becomes `output`.

    Otherwise it is removed (also on Ctrl-C). An existing `output` stays as it is until then.

    Args:
        overwrite: replace an `output` that holds a `merge_report.json`.
        sources: folders that must not be replaced.

    Raises:
        OutputError: `output` exists, is one of `sources`, is being written by another process, or its parent cannot be
            written; and for any OSError inside the block, such as a full disk.
    """
    output = Path(os.path.abspath(output.expanduser()))
    _check_output(output, overwrite, sources)
    with hidden_folder(output, "merging") as temporary:
        yield temporary
        sync_folder(temporary)
        _put_in_place(temporary, output)  # after an exchange, `temporary` is the old folder


@contextmanager
def hidden_folder(output: Path, purpose: str) -> Iterator[Path]:
    """Yields a new hidden folder beside `output`, removed at the end; what killed runs left there is removed first.

    Args:
        purpose: what is done to `output`, in one word; part of the folder's name.

    Raises:
        OutputError: for any OSError, inside the block too, such as a full disk.
    """
    folder = output.parent / f".{output.name}.{purpose}.{process_mark()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(output)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.",
            "Check the free space and the permissions there, or choose another output with -o.",
        ) from error


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raises OutputError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free.",
            "Free some space, or choose an output on another disk with -o.",
        )


def sync_folder(folder: Path) -> None:
    """Brings the folder's own entries to the disk (its files must be synced already)."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a small file and brings it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_output(output: Path, overwrite: bool, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if output.resolve() == source.resolve():
            raise OutputError(f"{output} is an input of this merge.", "Choose another folder with -o.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{output} exists.", "Give --overwrite to replace it, or choose another folder with -o.")
    if not (output / MARK).is_file():
        raise OutputError(
            f"{output} holds no {MARK}: it is not a merged model of qpsft, so --overwrite does not replace it.",
            "Choose another folder with -o, or remove it yourself.",
        )


def process_mark() -> str:
    """Machine, process and its start: what the hidden sibling of an output ends in."""
    import psutil

    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    return f"{host}.{os.getpid()}.{int(psutil.Process().create_time())}"


def _is_alive(process: int, created: int) -> bool:
    import psutil

    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and abs(int(found.create_time()) - created) <= 2
    except psutil.NoSuchProcess:
        return False


def remove_left_overs(output: Path) -> None:
    """Removes what dead processes of this machine left beside `output`; brings back what one had moved aside.

    Raises:
        OutputError: a process that is alive is writing `output`.
    """
    host = process_mark().split(".")[0]
    left = re.compile(rf"\.{re.escape(output.name)}\.(merging|exporting|replaced)\.{re.escape(host)}\.(\d+)\.(\d+)")
    for sibling in sorted(output.parent.iterdir()):
        match = left.fullmatch(sibling.name)
        if match is None:
            continue
        kind, process, created = match[1], int(match[2]), int(match[3])
        if _is_alive(process, created) and process != os.getpid():
            raise OutputError(
                f"Process {process} is writing {output} right now ({sibling.name}).",
                "Wait for it, or choose another output with -o.",
            )
        if kind == "replaced" and not output.exists():
            sibling.rename(output)
        else:
            shutil.rmtree(sibling)


def _put_in_place(temporary: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        os.rename(temporary, output)
    elif not _exchange(temporary, output):
        aside = output.parent / temporary.name.replace(".merging.", ".replaced.")
        os.rename(output, aside)
        os.rename(temporary, output)
        shutil.rmtree(aside)
    sync_folder(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or its file system cannot."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0
    return False


# A hidden folder beside an export's output for all that is not finished; removed whatever happens.


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


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` under a temporary name, then renames, so that `path` is never half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
