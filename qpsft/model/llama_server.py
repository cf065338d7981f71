"""A GGUF file run by llama.cpp: xllamacpp's server in a process of its own, spoken to over the loopback.

llama.cpp ends its whole process at a file it cannot take, so it does not run in ours.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch

from qpsft.errors import ExportError

INSTALL = "pip install '.[gguf]' in qpsft's folder"
LAST_LINES = 6
FAULT = re.compile(r"GGML_ASSERT|\berror\b|\bfailed\b|abort", re.IGNORECASE)
HEADER_BYTES = 64 * 2**20
"""What a GGUF begins with and its metadata are in; large vocabularies take 20 MB."""

SERVE = """
import sys
sys.path[:] = [path for path in sys.path if path]  # "" is the current folder, whose Python files are not ours
import json, os, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
settings = json.loads(sys.argv[2])
params.n_ctx, params.n_parallel, params.port = settings["context"], 1, 0
params.hostnames = ["127.0.0.1"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
params.warmup, params.ui, params.fit_params = False, False, False
if settings["exact"]:
    params.n_gpu_layers, params.swa_full = 0, True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()  # until whoever started this closes it, or dies
os._exit(0)
"""


def has_llama_cpp() -> bool:
    """Whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def has_chat_template(path: Path) -> bool:
    """Whether a GGUF names a chat template of its own; llama.cpp takes one for all where there is none."""
    with path.open("rb") as file:
        return b"tokenizer.chat_template" in file.read(HEADER_BYTES)


class LlamaServer:
    """A GGUF that llama.cpp has loaded. Close it, or use it in a `with`.

    Args:
        path: of the GGUF.
        context: tokens that fit; 0 is what the file says.
        exact: on the CPU, with keys and values in float32: what is left of the difference to another program is the
            file's.

    Raises:
        ExportError: xllamacpp is not installed, or llama.cpp cannot load the file; with the end of what it said.
    """

    def __init__(self, path: Path, *, context: int = 0, exact: bool = False):
        if not has_llama_cpp():
            raise ExportError("Running a GGUF needs llama.cpp (xllamacpp), which is not installed.", INSTALL)
        self.path = path
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        settings = {"context": context, "exact": exact, "threads": torch.get_num_threads()}
        command = [sys.executable, "-c", SERVE, str(path.resolve()), json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            errors="replace",
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            start_new_session=True,  # Ctrl-C ends an answer here, and not the server
        )
        try:
            self._address = self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> SplitResult:
        """Where it listens, once the file is loaded."""
        for line in self._process.stdout:
            if line.startswith("listening "):
                return urlsplit(line.split()[1])
        code = self._process.wait()
        raise ExportError(
            f"llama.cpp cannot load {self.path.name} (exit code {code}):\n{self._said()}",
            "Upgrade xllamacpp if this architecture is new; else export again.",
        )

    def _said(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return "\n".join([line for line in lines if FAULT.search(line)][-LAST_LINES:] or lines[-LAST_LINES:])

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()

    def tokenize(self, text: str, *, start: bool = False) -> list[int]:
        """The tokens of a text, special ones included where it writes them.

        Args:
            start: as llama.cpp begins a prompt: with a beginning-of-sequence token if the file asks for it.
        """
        return self._post("/tokenize", content=text, add_special=start, parse_special=True)["tokens"]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """A conversation as llama.cpp writes it with the file's chat template, the generation prompt at its end.

        Without the beginning-of-sequence token, where llama.cpp adds that itself to a prompt.
        """
        return self._post("/apply-template", messages=messages)["prompt"]

    def settings(self) -> dict[str, Any]:
        """What llama.cpp says of the model: `chat_template`, `default_generation_settings`, …"""
        return self._request("GET", "/props")

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """One completion, all options llama.cpp's own (`n_predict`, `n_probs`, `logit_bias`, …)."""
        return self._post("/completion", prompt=prompt, cache_prompt=True, **options)

    def stream(self, prompt: str | list[int], **options: Any) -> Iterator[dict[str, Any]]:
        """The same piece by piece; closing the iterator ends the completion."""
        body = {"prompt": prompt, "cache_prompt": True, "stream": True, **options}
        with self._answer("POST", "/completion", json.dumps(body)) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def _post(self, place: str, **body: Any) -> dict[str, Any]:
        return self._request("POST", place, json.dumps(body))

    def _request(self, method: str, place: str, body: str | None = None) -> dict[str, Any]:
        with self._answer(method, place, body) as answer:
            return json.loads(answer.read())

    @contextlib.contextmanager
    def _answer(self, method: str, place: str, body: str | None) -> Iterator[http.client.HTTPResponse]:
        """A connection for each request: the server ends one that was idle for seconds."""
        connection = http.client.HTTPConnection(self._address.hostname, self._address.port)
        try:
            connection.request(method, place, body and body.encode(), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                said = answer.read().decode(errors="replace")
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    said = json.loads(said)["error"]["message"]
                raise ExportError(f"llama.cpp refused {place} on {self.path.name}: {said}", "See what it says.")
            yield answer
        except (OSError, http.client.HTTPException) as error:
            said = self._said()
            raise ExportError(f"llama.cpp ended at {place} on {self.path.name}:\n{said}", "Export again.") from error
        finally:
            connection.close()
