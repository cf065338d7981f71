"""A GGUF opened, and how llama.cpp names and lays out each tensor of a merged model.

Names are mapped with gguf-py's own tables. The layouts are written here once more, not taken from the converter's code,
so that a mistake there shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpsft.errors import ExportError
from qpsft.verify.exported import ExportedWeights

ROTARY_NORMAL = {
    "llama", "granite", "granitemoe", "olmo", "minicpm", "deci", "arctic", "chameleon", "llada", "bailingmoe", "xverse",
    "baichuan", "internlm2", "smollm3",
}  # fmt: skip
"""Architectures whose rotary embedding pairs neighbouring rows in llama.cpp and halves in transformers."""

WRITTEN = ("general.architecture", "general.file_type", "general.quantization_version")
"""Metadata that whoever writes a GGUF anew gives himself."""

KNOWN = {"llama", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "granite", "olmo", "olmo2"}
"""Architectures whose tensors are laid out as `layout_of` says: what differs there is a mistake. Of others the run of
the file decides."""

EXPERT = re.compile(r"(.*experts)\.(\d+)\.(.+)")


class GgufFile:
    """A GGUF opened with a llama.cpp's own gguf-py.

    Attributes:
        architecture: llama.cpp's name of it.
    """

    def __init__(self, path: Path, gguf: ModuleType):
        self.path, self.gguf = path, gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ExportError(f"{path} cannot be read back as GGUF: {error}.", "Export again.") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = ""
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """A metadata value, None when the key is not there; `{arch}` in the key is the architecture."""
        field_ = self._reader.get_field(key.replace("{arch}", self.architecture))
        return None if field_ is None else field_.contents()

    def copy_metadata(self, writer: Any) -> None:
        """Gives a GGUFWriter this file's metadata, but for what it writes itself and the file's type."""
        array = self.gguf.GGUFValueType.ARRAY
        for field in self._reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in WRITTEN:
                inner = field.types[-1] if field.types[0] == array else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)

    def type_of(self, name: str) -> str:
        return self.tensors[name].tensor_type.name

    def shape_of(self, name: str) -> list[int]:
        """Shape in torch's order, the fastest dimension last."""
        return [int(size) for size in reversed(self.tensors[name].shape)]

    def values(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or rows of its first dimension, dequantized to float32, in torch's order of dimensions."""
        tensor = self.tensors[name]
        dense = self.gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        return torch.from_numpy(np.array(dense, dtype=np.float32)).reshape(-1, *self.shape_of(name)[1:])

    def name_map(self, blocks: int | None = None) -> Callable[[str], str | None]:
        """A function from a checkpoint's tensor name to the GGUF's; None for a name llama.cpp does not know.

        Args:
            blocks: number of layers; None is what the file says (an adapter's does not).
        """
        by_name = {name: arch for arch, name in self.gguf.MODEL_ARCH_NAMES.items()}
        blocks = int(self.value("{arch}.block_count") or 0) if blocks is None else blocks
        if self.architecture not in by_name:
            raise ExportError(f"gguf-py has no architecture {self.architecture!r}.", "Use another --llama_cpp.")
        names = self.gguf.get_tensor_name_map(by_name[self.architecture], blocks)
        return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays a tensor out, and the way back."""

    forward: Callable[[Tensor], Tensor] = lambda weight: weight
    back: Callable[[Tensor], Tensor] = lambda weight: weight


@dataclass(frozen=True)
class Source:
    """Where one GGUF tensor comes from: its name, the merged tensors it is made of (in order), and their layout."""

    name: str
    sources: list[str]
    layout: Layout


def sources_of(file: GgufFile, merged: ExportedWeights, config: dict[str, Any]) -> tuple[list[Source], list[str]]:
    """The merged folder's tensors and the GGUF tensors they must be in.

    Returns:
        (each GGUF tensor with what it is made of; names of merged tensors that have no name in llama.cpp).
    """
    mapped = file.name_map()
    stacks: dict[str, list[str]] = {}
    nameless = []
    tied = bool(config.get("tie_word_embeddings"))
    for name in merged.names():
        if name.endswith(("rotary_emb.inv_freq", "attn.masked_bias")):
            continue
        plain = re.sub(r"(^|\.)language_model\.", r"\1", name)  # of a model that also sees or hears
        expert = EXPERT.fullmatch(plain)
        target = mapped(f"{expert[1]}.{expert[3]}" if expert else plain)
        if target is None:
            nameless.append(name)
        elif not (target == "output.weight" and tied and target not in file.tensors):
            stacks.setdefault(target, []).append(name)
    sources = []
    for target, names in stacks.items():
        if EXPERT.fullmatch(names[0]):
            names.sort(key=lambda name: int(EXPERT.fullmatch(name)[2]))
        sources.append(Source(target, names, layout_of(file.architecture, names[0], config)))
    return sources, nameless


def layout_of(architecture: str, name: str, config: dict[str, Any]) -> Layout:
    """How a merged tensor of this name is laid out in a GGUF of this architecture."""
    heads = config.get("num_attention_heads")
    if architecture in ROTARY_NORMAL and (match := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
        count = heads if match[1] == "q" else config.get("num_key_value_heads") or heads
        return Layout(lambda weight: interleave_halves(weight, count), lambda weight: join_halves(weight, count))
    if architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
        return Layout(lambda weight: weight + 1, lambda weight: weight - 1)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return Layout(lambda weight: weight.T, lambda weight: weight.T)
    return Layout()


def interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (0, 1, …, d/2, d/2 + 1, …) of each head -> (0, d/2, 1, d/2 + 1, …), for `(heads · d, …)` tensors."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def join_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave_halves`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
