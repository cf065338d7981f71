"""`qpsft export` and `qpsft push`: their flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpsft.export.options import ExportOptions, PushOptions
from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries

EXPORT = (
    "Bring an adapter, or a merged model, to where models run, and check what was written against the trained model. "
    "An adapter is merged first, into a temporary folder."
)
PUSH = "Upload a folder to the Hugging Face Hub, card included. Never checkpoints or data rows."


def export(argv: Sequence[str]) -> int:
    """`qpsft export`."""
    options = parse(Parser("qpsft export", "SOURCE --to FORMAT [options]", EXPORT), argv, ExportOptions)
    quiet_libraries()

    print(write_export(options).summary())
    return 0


def write_export(options: ExportOptions) -> Any:
    """Writes the format asked for. Returns that format's report."""
    from qpsft.export.gguf import export_gguf
    from qpsft.export.gguf_lora import export_gguf_lora
    from qpsft.export.nf4 import export_nf4
    from qpsft.export.ollama import export_ollama
    from qpsft.export.vllm import export_vllm
    from qpsft.model.stated_record import state_record

    state_record(options.source, options)
    formats = {
        "gguf": export_gguf,
        "gguf-lora": export_gguf_lora,
        "ollama": export_ollama,
        "vllm": export_vllm,
        "nf4": export_nf4,
    }
    return formats[options.to](options)


def push(argv: Sequence[str]) -> int:
    """`qpsft push`."""
    options = parse(Parser("qpsft push", "FOLDER OWNER/NAME [options]", PUSH), argv, PushOptions)
    quiet_libraries()
    from qpsft.export.push import push as push_folder

    print(push_folder(options.folder, options.repo_id, private=options.private, dry_run=options.dry_run).summary())
    return 0
