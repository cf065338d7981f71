"""An adapter alone as GGUF, for `llama-cli --lora` and Ollama's ADAPTER.

llama.cpp multiplies B·A by `adapter.lora.alpha / rank`, with one alpha for all layers, while PEFT has alpha / √rank
(rsLoRA) and alphas of single layers. What differs is multiplied into B before llama.cpp's converter sees it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpsft.errors import ExportError
from qpsft.export.gguf_check import rounding_error
from qpsft.export.gguf_file import GgufFile, layout_of
from qpsft.export.llama_cpp import LORA_CONVERTER, find_llama_cpp, load_gguf, run_converter, went_wrong
from qpsft.export.options import ExportOptions
from qpsft.files import check_space, put_in_place, work_folder
from qpsft.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from qpsft.model.remote_code import link_without_code
from qpsft.terminal import wrap
from qpsft.verify.exported import read_text_config

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass
class LoraExportReport:
    """A LoRA GGUF that was written.

    Attributes:
        layers: how many layers it adapts, each read back and equal to the adapter's.
    """

    path: Path
    outtype: str
    bytes: int
    layers: int

    def summary(self) -> str:
        """A few lines for a terminal."""
        note = (
            "note: on a base that is rounded otherwise than in training (any GGUF of it) this is not the model that "
            "was trained; the merged GGUF (--to gguf) is"
        )
        wrote = f"wrote {self.path}: {self.bytes / 1e6:,.2f} MB, {self.outtype}"
        return "\n".join([wrote, f"read back: {self.layers} layers", wrap(note)])


def export_gguf_lora(options: ExportOptions) -> LoraExportReport:
    """Writes an adapter as a LoRA GGUF and reads it back.

    Raises:
        BaseModelError: not an adapter, or not this base's.
        ExportError: something a LoRA GGUF cannot hold (named), the converter failed, or the file holds other values.
        OutputError: the output exists or cannot be written.
    """
    adapter, output = AdapterFolder(options.source), options.output
    config = _config_without_what_gguf_lacks(adapter)
    base_folder = adapter.base_folder(options.base, same_rounding=False)
    with work_folder(output, overwrite=options.overwrite, source=adapter.path) as work:
        size = adapter.weights_file.stat().st_size
        check_space(output.parent, 3 * size + 1e6, "The export")
        tools = find_llama_cpp(options.llama_cpp)
        tensors = _with_llama_cpp_scale(load_file(adapter.weights_file), config)
        staged = work / "adapter"
        staged.mkdir()
        save_file(tensors, staged / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copy(adapter.path / ADAPTER_CONFIG, staged)
        made = work / "lora.gguf"
        base = work / "base"
        link_without_code(base_folder, base, weights=False)  # the converter trusts the code of a base
        arguments = [str(staged), "--base", str(base), "--outtype", options.outtype]
        run_converter(tools, LORA_CONVERTER, arguments, made, expected=size)
        layers = _check(made, tensors, config, base_folder, load_gguf(tools))
        report = LoraExportReport(output, options.outtype, made.stat().st_size, layers)
        put_in_place(made, output)
    return report


def _config_without_what_gguf_lacks(adapter: AdapterFolder) -> LoraConfig:
    """The adapter's config. Raises ExportError for what llama.cpp's LoRA cannot hold."""
    config = adapter.mergeable_config()
    beyond = adapter.beyond_low_rank()
    if beyond:
        raise ExportError(
            f"The adapter in {adapter.path} has {beyond[0]}, which a LoRA GGUF cannot hold.",
            "Use --to gguf, which merges it.",
        )
    return config


def _with_llama_cpp_scale(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The adapter's tensors, with B such that llama.cpp's `lora_alpha / rank` times it is PEFT's update."""
    from peft.utils.other import get_pattern_key

    result = dict(tensors)
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ExportError(f"{name} in the adapter is neither a LoRA A nor a B.", "Use --to gguf, which merges it.")
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} in the adapter has values that are not finite.", "Train it again.")
        if match[2] == "B":
            rank = tensor.shape[1]
            pattern = config.alpha_pattern or {}
            alpha = pattern.get(get_pattern_key(pattern, match[1]), config.lora_alpha)
            factor = (alpha / rank**0.5 if config.use_rslora else alpha / rank) / (config.lora_alpha / rank)
            result[name] = (tensor.float() * factor).contiguous() if factor != 1 else tensor
    return result


def _check(path: Path, tensors: dict[str, Tensor], config: LoraConfig, base: Path, gguf: ModuleType) -> int:
    """Reads the file back. Returns how many layers it adapts."""
    model = read_text_config(base)
    file = GgufFile(path, gguf)
    names = file.name_map(int(model["num_hidden_layers"]))
    alpha = file.value("adapter.lora.alpha")
    if alpha is None or abs(alpha - config.lora_alpha) > 1e-6 * abs(config.lora_alpha):
        raise went_wrong(path, f"its alpha is {alpha}, not {config.lora_alpha}")
    seen = set()
    for name, tensor in tensors.items():
        layer, part = NAME.fullmatch(name).groups()
        target = names(f"{layer}.weight")
        if target is None or f"{target}.lora_{part.lower()}" not in file.tensors:
            raise went_wrong(path, f"it lacks {name}")
        target = f"{target}.lora_{part.lower()}"
        seen.add(target)
        expected = tensor.float()
        if part == "B":
            expected = layout_of(file.architecture, f"{layer}.weight", model).forward(expected)
        stored = file.values(target)
        if stored.shape != expected.shape or not rounding_error([(stored, expected)], file.type_of(target))[1]:
            raise went_wrong(path, f"{target} does not hold {name}")
    if rest := sorted(set(file.tensors) - seen):
        raise went_wrong(path, f"{rest[0]} in it comes from no tensor of the adapter")
    return len(seen) // 2
