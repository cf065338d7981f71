"""Rounds a GGUF to a smaller type, with llama.cpp's own kernels out of xllamacpp's library.

llama.cpp's mixtures (`q4_k_m` and the like) give some tensors more bits than others; which, is written here once more:
the wheel holds the kernels but not the tool. Tables of importance (imatrix) are not used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from qpsft.export.gguf_file import GgufFile
from qpsft.export.options import QUANTIZED

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""Instead of types in blocks of 256, where a row is no multiple of that."""

NOT_ROUNDED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv|time_mix_|"
    r"indexer\.[kq]_proj|attn_rel_b|position_embd|token_types"
)
"""Matrices that llama.cpp does not round: small ones, and those on which all others depend."""

VALUES_AT_ONCE = 2**20
"""Values that one thread rounds in one call."""

ATTENTION_V = re.compile(r"attn_(v|qkv|kv_b)\.weight")


@cache
def kernel() -> Any | None:
    """ggml_quantize_chunk of xllamacpp's library; None where that is not installed or does not export it (Windows)."""
    found = importlib.util.find_spec("xllamacpp.xllamacpp") if importlib.util.find_spec("xllamacpp") else None
    try:
        quantize = ctypes.CDLL(found.origin).ggml_quantize_chunk if found else None
    except (OSError, AttributeError):
        return None
    if quantize is not None:
        # (type, source, target, start, rows, columns, importance) -> bytes written
        quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        quantize.restype = ctypes.c_size_t
    return quantize


def quantize_gguf(source: Path, target: Path, outtype: str, gguf: ModuleType) -> None:
    """Writes `target`, which is `source` (of 16 or 32 bits) rounded to a type of `QUANTIZED`.

    Raises:
        OSError: it cannot be written.
    """
    file = GgufFile(source, gguf)
    writer = gguf.GGUFWriter(target, file.architecture)
    file.copy_metadata(writer)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in choose_types(file, outtype).items()}
    for name, tensor in file.tensors.items():
        if name in kinds:
            shape = gguf.quants.quant_shape_to_byte_shape(file.shape_of(name), kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), kinds[name])
        else:
            writer.add_tensor_info(name, tensor.data.shape, tensor.data.dtype, tensor.n_bytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bar = {"desc": f"rounding to {outtype}", "unit": "tensor", "disable": None, "leave": False}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, tensor in tqdm(file.tensors.items(), **bar):
            writer.write_tensor_data(_rounded(file, name, kinds[name], pool) if name in kinds else tensor.data)
    writer.close()


def _rounded(file: GgufFile, name: str, kind: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tensor in the new type, as rows of bytes."""
    tensor, quants, columns = file.tensors[name], file.gguf.quants, file.shape_of(name)[-1]
    shape = quants.quant_shape_to_byte_shape(file.shape_of(name), kind)
    stored = tensor.data.reshape(math.prod(shape[:-1]), -1)
    made = np.empty((len(stored), shape[-1]), dtype=np.uint8)
    step = max(1, VALUES_AT_ONCE // columns)

    def round_rows(start: int) -> None:
        dense = quants.dequantize(stored[start : start + step], tensor.tensor_type)
        dense = np.ascontiguousarray(dense, dtype=np.float32)
        kernel()(int(kind), dense.ctypes.data, made[start:].ctypes.data, 0, len(dense), columns, None)

    list(pool.map(round_rows, range(0, len(stored), step)))
    return made.reshape(shape)


def choose_types(file: GgufFile, outtype: str) -> dict[str, str]:
    """The type of every tensor that is rounded, by name: llama.cpp's choice for the mixture `outtype`."""
    layers = int(file.value("{arch}.block_count") or 0)
    heads, groups = (np.max(file.value(f"{{arch}}.attention.head_count{end}") or 1) for end in ("", "_kv"))
    tied = "output.weight" not in file.tensors
    outputs = {"output.weight", *(["token_embd.weight", "per_layer_token_embd.weight"] if tied else [])}
    types = {}
    for name in file.tensors:
        shape = file.shape_of(name)
        if len(shape) < 2 or not name.endswith(".weight") or NOT_ROUNDED.search(name):
            continue
        layer = re.match(r"blk\.(\d+)\.", name)
        kind = "Q6_K" if name in outputs else _in_a_layer(
            name, int(layer[1]) if layer else 0, layers, outtype, shared=heads >= 4 * groups,
            eight=file.value("{arch}.expert_count") == 8,
        )  # fmt: skip
        while shape[-1] % file.gguf.GGML_QUANT_SIZES[file.gguf.GGMLQuantizationType[kind]][0]:
            kind = FALLBACK.get(kind, "F16")
        if kind != "F16":  # rows that are no multiple of 32 stay as they are
            types[name] = kind
    return types


def _in_a_layer(name: str, layer: int, layers: int, outtype: str, *, shared: bool, eight: bool) -> str:
    """The type of one matrix before its width is looked at.

    Args:
        shared: at least four heads share their keys and values, so these matrices are small.
        eight: a mixture of eight experts, beside which attention is small.
    """
    base, early = QUANTIZED[outtype], layer < layers // 8
    more = early or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if ATTENTION_V.search(name):
        if eight:
            return "Q8_0"
        better = {
            "q2_k": "Q4_K" if shared else "Q3_K", "q3_k_m": "Q5_K" if layer < 2 else "Q4_K", "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < 4 else base, "q4_k_m": "Q6_K" if more else base,
            "q5_k_m": "Q6_K" if more else base, "iq4_nl": "Q5_K" if shared else base,
            "iq4_xs": "Q5_K" if shared else base,
        }  # fmt: skip
    elif "ffn_down" in name:
        better = {
            "q2_k": "Q3_K", "q3_k_m": "Q5_K" if layer < layers // 16 else "Q4_K", "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if early else base, "q4_k_m": "Q6_K" if more else base,
            "q5_k_m": "Q6_K" if more else base, "iq4_nl": "Q5_K" if early else base,
            "iq4_xs": "Q5_K" if early else base,
        }  # fmt: skip
    elif "attn_output" in name:
        if eight and base in ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS") and outtype != "q3_k_l":
            return "Q5_K"
        better = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
    elif "attn_k.weight" in name and eight:
        return "Q8_0"
    else:
        better = {}
    return better.get(outtype, base)
