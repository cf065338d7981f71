"""An adapter and its merged model, made without the code under test: dequantize, add the delta, save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qpsft.export.command import write_export
from qpsft.export.options import ExportOptions
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.model.folder import resolve_folder
from qpsft.recipe.arguments import LoraArguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_adapter(
    folder: Path, base: str | Path = "demo", *, size: float = 0.02, quantization: str = "nf4", trained_in="auto", **lora
) -> Path:
    """A saved adapter whose B matrices are random, as large as `size` says; the same one every time."""
    model, tokenizer = load_base(base, quantization=quantization, dtype=trained_in, verbose=False)
    torch.manual_seed(0)
    peft_model = add_adapter(model, LoraArguments(lora_r=4, lora_alpha=8, **lora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(peft_model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def merge_by_hand(
    adapter: Path,
    output: Path,
    dtype: str = "float32",
    *,
    base: str | Path = "demo",
    quantization: str = "nf4",
    trained_in: str = "auto",
    scale: float = 2.0,
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> Path:
    """Merges the adapter onto the trained weights: `change` may first spoil the adapter's tensors."""
    rounded, tokenizer = load_base(base, quantization=quantization, dtype=trained_in, verbose=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    model = AutoModelForCausalLM.from_pretrained(resolve_folder(base), dtype=torch.float32)
    with torch.no_grad():
        for name, layer in quantized_linears(rounded).items():
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            model.get_submodule(name).weight.copy_(weight + scale * (b @ a))
    model.to(DTYPES[dtype]).save_pretrained(output)
    tokenizer.save_pretrained(output)
    if (resolve_folder(base) / "tokenizer.model").is_file():
        shutil.copy(resolve_folder(base) / "tokenizer.model", output)
    return output


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def export(to: str, source: Path, output: Path | None = None, **options: Any) -> Any:
    """What `qpsft export SOURCE --to TO` does. Returns its report."""
    return write_export(ExportOptions(source=source, to=to, output=output, **options))
