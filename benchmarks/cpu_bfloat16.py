"""Whether bfloat16 pays on this CPU: the time of a micro-batch, forward and backward, beside float32's.

    OMP_NUM_THREADS=1 python benchmarks/cpu_bfloat16.py

NF4 with LoRA of rank 8, by the process's own CPU clock, float32 and bfloat16 in turns, each with the LoRA layers that
training has: the embedded base, with rows of its size, and four layers of SmolLM2-135M's width.
`--model FOLDER` measures another base instead. What bfloat16 does to the ratio is in `noise_floor.py`.
Results: benchmarks/results/cpu_bfloat16.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lora_linear import policy
from machine import RESULTS, environment
from peft import LoraConfig, get_peft_model
from torch import nn

from qpsft.model.base import load_base
from qpsft.model.folder import DEMO
from qpsft.model.lora_linear import fused_lora_linears

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def loaded(name: str, dtype: str) -> nn.Module:
    """A base (a folder, a Hub id, the embedded one) with an adapter, in training mode, the adapter float32."""
    base, _ = load_base(name, dtype=dtype, device="cpu", verbose=False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def seconds(model: nn.Module, ids: torch.Tensor, autocast: torch.dtype | None) -> float:
    """CPU time of one micro-batch; the copies of the adapter are made before."""

    def micro_batch() -> None:
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    with fused_lora_linears(model):
        micro_batch()
        start = time.process_time()
        micro_batch()
        return time.process_time() - start


def compare(models: dict[str, nn.Module], rows: int, length: int, pairs: int) -> dict[str, Any]:
    ids = torch.randint(0, next(iter(models.values())).config.vocab_size, (rows, length))
    times = [{name: seconds(models[name], ids, dtype) for name, dtype in DTYPES.items()} for _ in range(pairs)]
    ratio = statistics.median(pair["bfloat16"] / pair["float32"] for pair in times)
    return {"rows": rows, "length": length, "bfloat16_over_float32_median": ratio, "seconds": times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--model", help="a folder or Hub id: 4 x 256 tokens of this base, and of no other")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_bfloat16.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "environment": environment("cpu"),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    if options.model:
        models = {dtype: loaded(options.model, dtype) for dtype in DTYPES}
        result[Path(options.model).name] = compare(models, 4, 256, options.pairs)
    else:
        models = {dtype: loaded(DEMO, dtype) for dtype in DTYPES}
        result["embedded base"] = compare(models, 16, 96, options.pairs)
        models = {dtype: policy(4, 8, dtype) for dtype in DTYPES}
        result["SmolLM2-135M's width, 4 layers"] = compare(models, 2, 256, options.pairs)
    for name, cell in result.items():
        if isinstance(cell, dict) and "seconds" in cell:
            print(f"{name}: bfloat16 / float32 {cell['bfloat16_over_float32_median']:.2f}")
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
