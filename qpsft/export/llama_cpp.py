"""llama.cpp's own converters: the user's, or a copy that is downloaded once; each runs in a process of its own.

No wheel holds them. llama-cpp-python's source distribution on PyPI does, with the gguf-py they belong to. One version
is pinned by its SHA-256, and only the converters are unpacked from it.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

from tqdm.auto import tqdm

from qpsft.errors import ExportError
from qpsft.files import replace_folder

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SIZE = "77 MB"
URL = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    f"llama_cpp_python-{VERSION}.tar.gz"
)

CONVERTER = "convert_hf_to_gguf.py"
LORA_CONVERTER = "convert_lora_to_gguf.py"
INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
UNPACKED = (CONVERTER, LORA_CONVERTER, "LICENSE", "conversion/", "gguf-py/", "models/templates/")

CONVERT = """
import sys
sys.path[:] = [path for path in sys.path if path]  # "" is the current folder, whose Python files are not ours
import json, os, runpy
script, more = sys.argv[1], json.loads(sys.argv[2])
del sys.argv[:3]
sys.argv.insert(0, script)
sys.path.insert(0, os.path.dirname(script))
import gguf
write = gguf.SpecialVocab.add_to_gguf
def write_with_more(self, *arguments, **options):
    for kind, token in more.items():
        self.special_token_ids.setdefault(kind, token)
    return write(self, *arguments, **options)
gguf.SpecialVocab.add_to_gguf = write_with_more
runpy.run_path(script, run_name="__main__")
"""
"""Runs a converter that writes special tokens besides those it finds."""

DISK_FAULT = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Input/output error|\d+ requested and \d+ written"
)
"""How writing to a disk fails: numpy reports a write that ended short in its own words."""

NEEDED = {"sentencepiece": "sentencepiece", "yaml": "PyYAML", "tqdm": "tqdm", "numpy": "numpy"}
"""Modules the converters import that transformers does not bring along, and the packages they come from."""


def cache_folder() -> Path:
    """Where downloads are kept: $QPSFT_CACHE, else $XDG_CACHE_HOME/qpsft, else ~/.cache/qpsft."""
    own = os.environ.get("QPSFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qpsft"


def find_llama_cpp(path: str | Path | None = None) -> Path:
    """A folder with llama.cpp's converters and gguf-py.

    Args:
        path: a llama.cpp checkout; None is $LLAMA_CPP, else the copy in the cache folder, downloaded if need be.

    Raises:
        ExportError: the folder has no converters, or the copy cannot be had or is not the pinned one.
    """
    given = path or os.environ.get("LLAMA_CPP")
    if given:
        folder = Path(given).expanduser().resolve()
        missing = [name for name in (CONVERTER, "gguf-py/gguf/__init__.py") if not (folder / name).is_file()]
        if missing:
            raise ExportError(
                f"{folder} is no llama.cpp checkout: it has no {missing[0]}.",
                "Give the folder of a llama.cpp source tree, or leave --llama_cpp and $LLAMA_CPP out.",
            )
        return folder
    folder = cache_folder() / f"llama.cpp-{VERSION}"
    if not (folder / CONVERTER).is_file():
        _download_converters(folder)
    return folder


def _download_converters(folder: Path) -> None:
    """Downloads the pinned source distribution and unpacks the converters; the finished folder or none."""
    print(
        f"llama.cpp's converters are not here yet: the source of llama-cpp-python {VERSION} ({SIZE}, "
        f"once) is downloaded from PyPI, and they are kept in {folder}.",
        flush=True,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama.cpp-") as temporary:
            archive = _download(Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            _unpack(archive, unpacked)
            replace_folder(unpacked, folder)
    except OSError as error:
        raise ExportError(
            f"llama.cpp's converters cannot be put into {folder}: {error}.",
            "Free some space, or set $QPSFT_CACHE to a folder that can be written.",
        ) from error


def _download(folder: Path) -> Path:
    """The archive, whole and with its hash. pip would run its build requirements, which no hash pins, to read it."""
    archive, sha256 = folder / URL.rpartition("/")[2], hashlib.sha256()
    try:
        with urllib.request.urlopen(URL, timeout=60) as source, archive.open("wb") as file:
            while block := source.read(2**20):
                sha256.update(block)
                file.write(block)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise ExportError(
            f"The source of llama-cpp-python {VERSION} could not be downloaded from {URL}: "
            f"{getattr(error, 'reason', None) or error}.",
            "Check the connection, or get llama.cpp's source otherwise and give its folder with --llama_cpp.",
        ) from error
    if sha256.hexdigest() != SHA256:
        raise ExportError(
            f"The download of llama-cpp-python {VERSION} has SHA-256 {sha256.hexdigest()}, not {SHA256}.",
            "Do not use it. Get llama.cpp's source otherwise and give its folder with --llama_cpp.",
        )
    return archive


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(INSIDE)
            if member.name == name or not member.isfile() or not name.startswith(UNPACKED) or ".." in name:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)


def check_requirements() -> None:
    """Raises ExportError when a package that the converters import is not installed (named)."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ExportError(
            f"llama.cpp's converters need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed.",
            f"pip install {' '.join(missing)}",
        )


def load_gguf(llama_cpp: Path) -> ModuleType:
    """The gguf package of this llama.cpp, even where another version is installed or imported already."""
    path, loaded = sys.path[:], {name: sys.modules.pop(name) for name in list(sys.modules) if _is_gguf(name)}
    try:
        sys.path.insert(0, str(llama_cpp / "gguf-py"))
        module = importlib.import_module("gguf")
        importlib.import_module("gguf.quants")
        return module
    except ImportError as error:
        raise ExportError(
            f"gguf-py in {llama_cpp} cannot be imported: {error}.", "Install the package that this names."
        ) from error
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if _is_gguf(name)]:
            del sys.modules[name]
        sys.modules.update(loaded)


def _is_gguf(name: str) -> bool:
    return name == "gguf" or name.startswith("gguf.")


def run_converter(
    llama_cpp: Path,
    script: str,
    arguments: list[str],
    output: Path,
    *,
    expected: int,
    special: dict[str, int] | None = None,
) -> None:
    """Runs a converter in a process of its own, with its own gguf-py first on the path.

    Args:
        arguments: for it, the output excluded.
        special: ids of special tokens (`eot`, `eom`) to write where the converter itself finds none.
        expected: about how many bytes it will have, for the progress bar.

    Raises:
        ExportError: it failed; with the end of what it printed.
    """
    check_requirements()
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    path = [str(llama_cpp / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    code = ["-c", CONVERT, str(llama_cpp / script), json.dumps(special or {})]
    command = [sys.executable, *code, "--outfile", str(output), *arguments]
    code, said = run_process(command, environment, output, expected=expected)
    if code != 0 or not output.is_file():
        said = last_lines(said, 12)
        raise ExportError(f"llama.cpp's {script} failed (exit code {code}):\n{said}\n", _advice(said, code))


def run_process(command: list[str], environment: dict[str, str], output: Path, *, expected: int) -> tuple[int, str]:
    """Runs a command that writes `output`, with a progress bar over its size. Returns (exit code, what it printed).

    The process is killed when this one is interrupted. It reads nothing from standard input.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            with tqdm(total=expected, desc="writing GGUF", unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while process.poll() is None:
                    size = output.stat().st_size if output.exists() else 0
                    bar.update(min(size, expected) - bar.n)
                    time.sleep(0.05)
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(0)
        return process.returncode, log.read()


def last_lines(text: str, count: int) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def _advice(said: str, code: int) -> str:
    if code == -signal.SIGKILL:
        return "The system ended it, which it does when memory is short: free some, or use a machine with more."
    if "ModuleNotFoundError" in said or "ImportError" in said:
        return "Install the package that this names."
    if DISK_FAULT.search(said):
        return "The disk did not take all of it: free some space there, or choose an output on another disk with -o."
    if "BPE pre-tokenizer was not recognized" in said:
        return (
            "llama.cpp knows byte-level BPE tokenizers by a hash of known vocabularies, and this one is not among "
            "them. Use the merged safetensors folder, or a base whose tokenizer it knows."
        )
    if "not supported" in said:
        return "This llama.cpp does not know the architecture: try a newer one with --llama_cpp."
    return "Try a newer llama.cpp with --llama_cpp, or use the merged safetensors folder."


def went_wrong(path: Path, what: str) -> ExportError:
    """The error for a file that the converter wrote and that is not what it was made of."""
    return ExportError(
        f"The conversion to {path.name} went wrong: {what}.",
        "Try a newer llama.cpp with --llama_cpp, or use the merged safetensors folder.",
    )
