"""Python 3.11 or newer: older ones are refused in a line, and README's install resolves on every newer one."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
VERSIONS = [(3, minor) for minor in range(6, 16)]


@functools.cache
def interpreter(version: tuple[int, int]) -> str | None:
    """A Python of this version on this machine: on PATH, or one of pyenv's."""
    named = f"python{version[0]}.{version[1]}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(named), *sorted(pyenv.glob(f"{version[0]}.{version[1]}.*/bin/python"))]
    for candidate in filter(None, candidates):
        asked = subprocess.run([candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True)
        if asked.stdout.decode().strip() == str(version):
            return str(candidate)
    return None


def run(version: tuple[int, int], *arguments: str) -> subprocess.CompletedProcess:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version[0]}.{version[1]} here")
    return subprocess.run([python, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v < OLDEST])
def test_an_older_python_is_refused_in_one_line(version):
    refused = run(version, "-m", "qpsft", "--version")
    assert refused.returncode == 2 and not refused.stdout
    assert re.fullmatch(r"error: qpsft needs Python 3\.11 or newer; this is 3\.\d+\.\d+\.\n", refused.stderr)


def test_the_same_oldest_version_stands_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == f">={OLDEST[0]}.{OLDEST[1]}"
    assert project["tool"]["ruff"]["target-version"] == f"py{OLDEST[0]}{OLDEST[1]}"
    assert f"Python {OLDEST[0]}.{OLDEST[1]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert sys.version_info >= OLDEST


@pytest.mark.slow
@pytest.mark.parametrize("version", [v for v in VERSIONS if v >= (3, 10)])
def test_the_install_resolves_on_every_version_claimed(version):
    """Whatever is installed for that Python is left out of account, and nothing is installed."""
    install = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "-q", "-c", "constraints.txt", "."]
    resolved = run(version, *install)
    said = resolved.stdout + resolved.stderr
    assert (resolved.returncode == 0) is (version >= OLDEST), said
    assert version >= OLDEST or "error: qpsft needs Python 3.11 or newer; this is 3.10" in said
