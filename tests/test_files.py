"""Files and folders are written whole or not at all, and by one module only."""

import ast
import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from psutil import Process
from safetensors import SafetensorError

from qpsft.errors import OutputError
from qpsft.files import (
    _short,
    digest,
    finished_files,
    finished_folder,
    hidden_folder,
    process_mark,
    replace_folder,
    work_folder,
    write_atomically,
)

PACKAGE = Path(__file__).resolve().parents[1] / "qpsft"
OF_OS = {"replace", "rename", "renames", "fsync", "fdatasync", "link", "symlink"}
OF_PATH = {"rename", "hardlink_to"}


def moves_and_syncs(source: str) -> list[str]:
    """Calls that give a file another name or bring it to the disk: os's, shutil.move, and Path's.

    `x.replace(y)` with one argument is Path's (str's has two or three).
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        of_os = owner in ("os", "shutil") and name in OF_OS | {"move"}
        of_path = name in OF_PATH or (name == "replace" and len(node.args) == 1 and not node.keywords)
        if of_os or of_path:
            found.append(ast.unparse(node.func))
    return found


def test_no_other_module_renames_or_syncs():
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {path.relative_to(PACKAGE).as_posix(): moves_and_syncs(text) for path, text in sources.items()}
    assert {path for path, calls in found.items() if calls} == {"files.py"}


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ("os.replace(a, b)", ["os.replace"]),
        ("shutil.move(a, b)", ["shutil.move"]),
        ("path.rename(other)", ["path.rename"]),
        ("(folder / 'x').replace(other)", ["(folder / 'x').replace"]),
        ("os.fsync(file.fileno())", ["os.fsync"]),
        ("text.replace('a', 'b')", []),
        ("dataclasses.replace(recipe, trainer=trainer)", []),
        ("os.path.exists(a)", []),
    ],
)
def test_the_check_sees_them(source, calls):
    assert moves_and_syncs(source) == calls


def full(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync"])
def test_a_file_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch, fails):
    path = tmp_path / "file.json"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_atomically(path, b"\x00\n")
    assert path.read_bytes() == b"\x00\n" and os.listdir(tmp_path) == ["file.json"]
    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_bytes() == b"\x00\n" and os.listdir(tmp_path) == ["file.json"]


def test_several_files_come_together_or_not_at_all(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "one").write_text("old")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "of a killed run").write_text("")
    with pytest.raises(RuntimeError), finished_files(tmp_path) as partial:
        (partial / "one").write_text("new")
        raise RuntimeError
    assert (tmp_path / "one").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["kept", "one"]
    with finished_files(tmp_path) as partial:
        for name in ("one", "two"):
            (partial / name).write_text("new")
            (partial / name).chmod(0o600)
    assert sorted(os.listdir(tmp_path)) == ["kept", "one", "two"] and (tmp_path / "one").read_text() == "new"
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr("qpsft.files._exchange", lambda one, other: False)
    for text in ("old", "new"):
        (tmp_path / "finished").mkdir()
        (tmp_path / "finished" / text).touch()
        replace_folder(tmp_path / "finished", tmp_path / "place")
        assert os.listdir(tmp_path) == ["place"] and os.listdir(tmp_path / "place") == [text]


def test_a_digest_is_that_of_all_parts_together():
    assert (
        digest("abc") == digest(b"a", "b", b"c") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


CANNOT = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]


@contextmanager
def that_syncs_no(monkeypatch, what, number):
    """A drive that answers so to the sync of a folder, or of anything."""
    real = os.fsync

    def fsync(descriptor):
        if what == "anything" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        yield


@pytest.mark.parametrize("number", CANNOT)
@pytest.mark.parametrize("what", ["folders", "anything"])
def test_a_drive_that_cannot_sync_keeps_what_is_finished(tmp_path, monkeypatch, what, number):
    with that_syncs_no(monkeypatch, what, number):
        for text in ("old", "new"):
            with finished_folder(tmp_path / "out", mark="mark", overwrite=True) as folder:
                write_atomically(folder / "mark", text)
    assert (tmp_path / "out" / "mark").read_text() == "new" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_failed_is_an_error(tmp_path, monkeypatch, number):
    """It is said before the folder has its name: what it holds may not be on the disk."""
    with (
        that_syncs_no(monkeypatch, "folders", number),
        pytest.raises(OutputError, match=os.strerror(number)),
        finished_folder(tmp_path / "out", mark="mark", overwrite=True) as folder,
    ):
        write_atomically(folder / "mark", "new")
    assert os.listdir(tmp_path) == []


def test_an_old_folder_that_cannot_be_removed_does_not_take_the_new_one_along(tmp_path, monkeypatch):
    """As on NFS while a program holds one of its files open."""
    with finished_folder(tmp_path / "out", mark="mark", overwrite=True) as folder:
        write_atomically(folder / "mark", "old")
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty")))
        with finished_folder(tmp_path / "out", mark="mark", overwrite=True) as folder:
            write_atomically(folder / "mark", "new")
    assert (tmp_path / "out" / "mark").read_text() == "new"
    with finished_folder(tmp_path / "out", mark="mark", overwrite=True) as folder:
        write_atomically(folder / "mark", "newest")
    assert os.listdir(tmp_path) == ["out"], "what was left is gone with the next run"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 200, "n" * 64, "n" * 65])
def test_names_as_long_as_the_file_system_takes(tmp_path, name):
    with finished_folder(tmp_path / name, mark="mark", overwrite=False) as folder:
        assert len(os.fsencode(folder.name)) < 143, "too long for an encrypted home"
        write_atomically(folder / "mark", "new")
    assert os.listdir(tmp_path) == [name]
    write_atomically(tmp_path / name / name, "new")
    with work_folder(tmp_path / name / f"{name[:-5]}.gguf", overwrite=False, source=tmp_path / "source"):
        pass
    with pytest.raises(OutputError, match="is writing"):
        left = tmp_path / f".{_short(name)}.merging.{process_mark().split('.')[0]}.1.{int(Process(1).create_time())}"
        left.mkdir()
        with hidden_folder(tmp_path / name, "merging"):
            pass


def test_a_name_that_is_too_long_is_said(tmp_path):
    with (
        pytest.raises(OutputError, match="cannot be written: File name too long"),
        finished_folder(tmp_path / ("n" * 256), mark="mark", overwrite=False),
    ):
        pass
    assert os.listdir(tmp_path) == []


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"
"""What safetensors says where the disk is full; the system's error is in no other place."""


def test_a_full_disk_is_told_by_safetensors_too(tmp_path):
    with pytest.raises(OSError) as caught, finished_files(tmp_path):
        raise SafetensorError(FULL)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be written: No space left"), hidden_folder(tmp_path / "a", "merging"):
        raise SafetensorError(FULL)
    with pytest.raises(SafetensorError, match="header"), finished_files(tmp_path):
        raise SafetensorError("invalid header")  # of what was read: no matter of the disk
