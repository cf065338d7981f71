"""What a run leaves on the disk, and what merging and exporting it take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qpsft.plan.optimizers import OptimizerBytes
from qpsft.plan.weights import WeightBytes

LIBRARIES = 500 * 10**6
"""Python and the libraries of a merge, resident; 451 MB measured (benchmarks/merge_memory.py)."""

CONVERTER = 400 * 10**6
"""llama.cpp's converter with its libraries. It streams: with a Llama of 0.9 GB it took 499 MB where the largest tensor
has 18M weights and 1,340 MB (f16) or 1,670 MB (bf16) where it has 164M, so up to 8 bytes a weight of that tensor."""

READ_BACK = 14
"""Bytes a weight of the largest tensor while the file is read back, mapped pages included: 22 were measured with 164M
weights, and comparing by rows then took it from 17.0 to 8.7 bytes for that tensor alone."""

QUANTIZED_GGUF = 1.07
"""Bytes a weight of the largest quantized type, q8_0, which is written while the f16 is still there."""


@dataclass(frozen=True)
class After:
    """Bytes on the disk and in host memory.

    Attributes:
        disk: the base's download, checkpoints, the merged model, what an export to f16 GGUF needs at once, and what
            one to a quantized type needs beside that.
        merge_ram: of a merge by itself.
        verify_ram: of its verification, on the GPU where there is one, else in host memory.
        export_ram: of an export to GGUF by itself.
    """

    disk: dict[str, int]
    merge_ram: int
    verify_ram: int
    export_ram: int


def after_training(args: Any, stored_bytes: int, weights: WeightBytes, optimizer: OptimizerBytes) -> After:
    """Args: the trainer's options; bytes per weight of the base's files; weights and optimizer of the run."""
    saved = weights.adapter + optimizer.device + optimizer.host
    if args.takes_snapshots:
        saved += weights.adapter
    kept = 0 if getattr(args.save_strategy, "value", args.save_strategy) == "no" else (args.save_total_limit or 1) + 1
    merged = 2 * weights.parameters
    disk = {
        "base": stored_bytes * weights.parameters,
        "adapter": weights.adapter + saved * kept,  # one more while the newest is written
        "merge": merged,
        "export": 2 * merged,  # a merged model and the file converted from it
        "quantized": round(QUANTIZED_GGUF * weights.parameters),
    }
    live = weights.quantized + weights.constants + 2 * weights.unquantized + weights.adapter
    export = LIBRARIES + max(CONVERTER + 8 * weights.largest_tensor, READ_BACK * weights.largest_tensor)
    return After(disk, LIBRARIES, live + 4 * weights.largest, export)
