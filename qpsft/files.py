"""Files and folders that are written whole or not at all, whatever ends the process that writes them; digests.

What is written has a hidden name beside its place until it is complete and on the disk; then it takes its name in one
step. No other module of qpsft renames or syncs. Folders that take minutes (a merge, an export) say in their hidden name
which process on which machine writes them, and those of dead processes are removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, get_args, get_origin

from safetensors import SafetensorError

from qpsft.errors import OutputError, QpsftError, one_line, shown

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
"""What network drives and FUSE answer that sync nothing, or no folders: it says nothing of what was written."""
_LONGEST_NAME = 64  # bytes, of what is kept of a file's name in hidden ones: theirs must fit where the file's does
_EXCHANGE = 2  # Linux's RENAME_EXCHANGE
_AT_FDCWD = -100


# --- one file ---


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file; text as UTF-8.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{_short(path.name)}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(finished: Path, place: Path) -> None:
    """Brings a finished file to the disk and gives it its name, over what was there. Raises OSError."""
    with finished.open("r+b") as file:
        sync(file)
    os.replace(finished, place)


def move(path: Path, place: Path) -> None:
    """Gives a file, over what was there, or a folder another name on the same disk. Raises OSError."""
    os.replace(path, place)


def sync(file: IO[bytes]) -> None:
    """Brings what was written to an open file to the disk."""
    file.flush()
    _fsync(file.fileno())


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_and_digest(folder: Path) -> dict[str, dict[str, Any]]:
    """Brings every file under a folder to the disk.

    Returns: name -> its `size` in bytes and its `sha256`. Raises: OSError.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b") as file:
            sync(file)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    _sync_folder(folder)
    return files


# --- several files in a folder that stays ---


@contextmanager
def system_errors() -> Iterator[None]:
    """An error of the system that safetensors met while it wrote, such as a full disk, is an OSError again."""
    try:
        yield
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


@contextmanager
def finished_files(folder: Path, *, first: str = "", last: str = "") -> Iterator[Path]:
    """Yields a new hidden folder; when the block ends without an exception, its files take their places in `folder`.

    Otherwise they are removed, and `folder` is what it was.

    Args:
        first, last: files that take their places before and after all others. Whoever is killed in between leaves a
            new `first` beside an old `last`, so a `last` that vouches for `first` must not vouch for an old one.

    Raises:
        OSError: a file cannot be written.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir()
    try:
        with system_errors():
            yield partial
        for path in sorted(partial.iterdir(), key=lambda path: (path.name != first, path.name == last, path.name)):
            with contextlib.suppress(PermissionError):  # of a drive that has no modes
                path.chmod(0o644)  # safetensors leaves 0600
            put_in_place(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- a folder that one process at a time may write into ---

LOCKS = ".qpsft"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder meanwhile; this process may ask for it again inside.

    Each has a file of its own there, `.qpsft/lock.<machine>.<process>.<start>`; those of dead processes of this machine
    are removed. Of two that come at the same moment both may be refused, but they are never both let in.

    Raises:
        OutputError: another process works there; or it cannot be written.
    """
    own = folder / LOCKS / f"lock.{process_mark()}"
    if own.exists():
        yield
        return
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}.", "Check the disk and its permissions."
        ) from error
    try:
        _refuse_company(own, folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
            own.parent.rmdir()  # where it holds nothing else


def _refuse_company(own: Path, folder: Path) -> None:
    """Raises OutputError where another lock is that of a process that is alive; removes those of dead ones."""
    for path in own.parent.glob("lock.*"):
        marked = re.fullmatch(rf"lock\.{re.escape(_machine())}\.(\d+)\.(\d+)", path.name)
        if marked is None or path == own:
            continue
        process = int(marked[1])
        if _is_alive(process, int(marked[2])):
            raise OutputError(
                f"Process {process} is writing into {folder} right now.",
                "Wait until it has ended, or choose another folder.",
            )
        path.unlink(missing_ok=True)


# --- a whole folder ---


@contextmanager
def finished_folder(
    output: Path,
    *,
    mark: str,
    overwrite: bool,
    sources: tuple[Path, ...] = (),
    written: Callable[[Path], Collection[str]] = os.listdir,
) -> Iterator[Path]:
    """Yields a new folder to write into; when the block ends without an exception it becomes `output`.

    Otherwise it is removed (also on Ctrl-C). An existing `output` stays as it is until then. Files must be synced.

    Args:
        mark: a file by which qpsft knows a folder that it wrote.
        overwrite: replace an `output` that holds a `mark`.
        sources: folders that must not be replaced.
        written: names of the files in such an `output` that qpsft wrote; it is not replaced where it holds others.

    Raises:
        OutputError: `output` exists, holds other files than qpsft's, is one of `sources`, is being written by another
            process, or its parent cannot be written; and for any OSError inside the block, such as a full disk.
    """
    output = Path(os.path.abspath(output.expanduser()))
    _check_output(output, mark, overwrite, sources, written)
    with hidden_folder(output, "merging") as temporary:
        yield temporary
        _sync_folder(temporary)
        _check_output(output, mark, overwrite, sources, written)  # what was put there meanwhile
        replace_folder(temporary, output)


@contextmanager
def work_folder(output: Path, *, overwrite: bool, source: Path) -> Iterator[Path]:
    """Yields a new folder, on the disk of the GGUF `output`, for what is made on the way to it; removed at the end.

    Raises:
        OutputError: `output` exists and `overwrite` is False or it is no GGUF, holds `source`, is being written by
            another process, or its parent cannot be written; and for any OSError inside the block, such as a full disk.
    """
    if _exists(output) and not overwrite:
        raise OutputError(f"{output} exists.", "Give --overwrite to replace it, or choose another with -o.")
    if output.is_file() and _first_bytes(output, 4) != b"GGUF":
        raise OutputError(
            f"{output} is not a GGUF, so qpsft did not write it, and --overwrite does not replace it.",
            "Choose another output with -o, or remove it yourself.",
        )
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise OutputError(f"{output} is, or holds, what is to be exported.", "Choose another output with -o.")
    with hidden_folder(output, "exporting") as folder:
        yield folder


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


@contextmanager
def hidden_folder(output: Path, purpose: str) -> Iterator[Path]:
    """Yields a new hidden folder beside `output`, removed at the end; what killed runs left there is removed first.

    Args:
        purpose: what is done to `output`, in one word; part of the folder's name.

    Raises:
        OutputError: another process is writing `output`; and for any OSError, inside the block too.
    """
    folder = output.with_name(f".{_short(output.name)}.{purpose}.{process_mark()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # which this process could not remove before
        folder.mkdir()
        try:
            _remove_left_overs(output, folder)
            with system_errors():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.",
            "Check the free space and the permissions there, or choose another output with -o.",
        ) from error


def replace_folder(finished: Path, place: Path) -> None:
    """Gives a finished folder its name, in one step where the system can, and removes what was there. Raises OSError.

    Where it cannot, the old folder is moved aside first; if the process is killed between the two steps, the next
    `hidden_folder` for this place brings it back.
    """
    if not place.exists() or not any(place.iterdir()):
        os.rename(finished, place)
    elif _exchange(finished, place):
        shutil.rmtree(finished, ignore_errors=True)  # what is left of the old one, the next run removes
    else:
        aside = place.with_name(f".{_short(place.name)}.replaced.{process_mark()}")
        os.rename(place, aside)
        os.rename(finished, place)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(place.parent)


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raises OutputError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free.",
            "Free some space, or choose an output on another disk with -o.",
        )


def process_mark() -> str:
    """Machine, process and its start: what the name of a hidden folder ends in."""
    import psutil

    return f"{_machine()}.{os.getpid()}.{int(psutil.Process().create_time())}"


def _machine() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:32]


def _short(name: str) -> str:
    """A file's name, or the beginning of a long one and a digest: what hidden names are made of."""
    beginning = os.fsencode(name)[: _LONGEST_NAME - 9]
    return (
        name if len(os.fsencode(name)) <= _LONGEST_NAME else f"{beginning.decode(errors='ignore')}-{digest(name)[:8]}"
    )


def _exists(output: Path) -> bool:
    """Whether a path exists. Raises OutputError where it cannot: a name that is too long for the file system."""
    try:
        return output.exists()
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}.", "Choose another output with -o."
        ) from error


def _check_output(
    output: Path,
    mark: str,
    overwrite: bool,
    sources: tuple[Path, ...],
    written: Callable[[Path], Collection[str]],
) -> None:
    if not _exists(output):
        return
    for source in sources:
        if output.resolve() == source.resolve():
            raise OutputError(f"{output} is what the result is made from.", "Choose another folder with -o.")
    if output.is_dir() and not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{output} exists.", "Give --overwrite to replace it, or choose another folder with -o.")
    if not (output / mark).is_file():
        raise OutputError(
            f"{output} holds no {mark}, so qpsft did not write it, and --overwrite does not replace it.",
            "Choose another folder with -o, or remove it yourself.",
        )
    if strangers := sorted(set(os.listdir(output)) - set(written(output))):
        raise OutputError(
            f"{output} holds {', '.join(strangers[:8])}{', …' if len(strangers) > 8 else ''}, which qpsft did not "
            "write there and --overwrite would remove.",
            "Move what you want to keep and remove the rest, or choose another folder with -o.",
        )


def _remove_left_overs(output: Path, own: Path) -> None:
    """Removes what dead processes of this machine left beside `output`, and `own` is not; brings back what one had
    moved aside.

    Raises:
        OutputError: a process that is alive is writing `output`.
    """
    hidden = re.compile(rf"\.{re.escape(_short(output.name))}\.([a-z]+)\.{re.escape(_machine())}\.(\d+)\.(\d+)")
    for sibling in sorted(output.parent.iterdir()):
        match = hidden.fullmatch(sibling.name)
        if match is None or sibling == own:
            continue
        purpose, process, created = match[1], int(match[2]), int(match[3])
        if _is_alive(process, created) and process != os.getpid():
            raise OutputError(
                f"Process {process} is writing {output} right now ({sibling.name}).",
                "Wait for it, or choose another output with -o.",
            )
        if purpose == "replaced" and not output.exists():
            os.rename(sibling, output)
        else:
            shutil.rmtree(sibling, ignore_errors=True)  # a converter that its parent left may still write there


def _is_alive(number: int, created: int) -> bool:
    import psutil

    try:
        process = psutil.Process(number)
        return process.status() != psutil.STATUS_ZOMBIE and abs(int(process.create_time()) - created) <= 2
    except psutil.NoSuchProcess:
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or its file system cannot."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0
    return False


def _sync_folder(folder: Path) -> None:
    """Brings the folder's own entries to the disk (its files must be synced already)."""
    if os.name == "nt":
        return  # Windows opens no folders
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written and not listed
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


# --- JSON files of others ---


def read_json(path: Path, kind: type[QpsftError], todo: str) -> Any:
    """What a JSON file holds. Raises `kind`, with its place and `todo`: it cannot be read, or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror or error}.", todo) from error
    except (ValueError, RecursionError) as error:  # also not UTF-8, or an integer of 5,000 digits
        raise kind(f"{path} is not valid JSON: {one_line(error)}.", todo) from error


def read_object(
    path: Path, kind: type[QpsftError], todo: str, types: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The object that a JSON file holds; the keys in `types` are of these types where they are there and not null.

    Args:
        types: key -> a type or several, such as `(int, list[int])`.

    Raises:
        `kind`, with the file and `todo`: it cannot be read, is no JSON object, or holds a value of another type.
    """
    content = read_json(path, kind, todo)
    if not isinstance(content, dict):
        raise kind(f"{path} is not a JSON object.", todo)
    for key, wanted in (types or {}).items():
        value = content.get(key)
        if value is not None and not _is_of(value, wanted):
            raise kind(f"{path} has {shown(value)} for {key}, which is of the wrong type.", todo)
    return content


def _is_of(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is of a type, of one of several, or a list of values of a type, `list[int]`."""
    if isinstance(wanted, tuple):
        return any(_is_of(value, one) for one in wanted)
    if get_origin(wanted) is list:
        return isinstance(value, list) and all(_is_of(each, *get_args(wanted)) for each in value)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))  # true is an int to Python


# --- digests ---


def digest(*parts: str | bytes) -> str:
    """SHA-256 of texts (as UTF-8) and bytes, one after the other, in hexadecimal."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.encode() if isinstance(part, str) else part)
    return sha256.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
