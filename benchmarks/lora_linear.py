"""What the fused LoRA linear saves: operators and CPU time of one training micro-batch, PEFT's forward beside it.

    OMP_NUM_THREADS=1 python benchmarks/lora_linear.py

A random Llama of SmolLM2-135M's width in NF4, bfloat16 autocast, LoRA on all linear layers. Operators are counted
below autograd (forward and backward, without and with gradient checkpointing) and written by name. The times are of the
process's own CPU clock, PEFT's and ours in turns. Results: benchmarks/results/lora_linear.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, environment
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.folder import DEMO, resolve_folder
from qpsft.model.lora_linear import fused_lora_linears

VOCABULARY = 1024


class Operators(TorchDispatchMode):
    """Counts what reaches the device: views and shapes left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.counts[str(function.overloadpacket).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


def policy(layers: int, rank: int, dtype: str = "bfloat16") -> nn.Module:
    """The model, in training mode, its adapter float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(resolve_folder(DEMO)).save_pretrained(folder)  # a base has one; it is not used here
        base, _ = load_base(folder, dtype=dtype, device="cpu", verbose=False)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def micro_batch(model: nn.Module, ids: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def operators(model: nn.Module, ids: torch.Tensor, fused: bool) -> dict[str, Any]:
    """Of a micro-batch that is not its step's first, which also makes the 16-bit copies."""
    with fused_lora_linears(model) if fused else nullcontext():
        micro_batch(model, ids)
        with Operators() as mode:
            micro_batch(model, ids)
    return {"total": mode.counts.total(), "by_name": dict(mode.counts.most_common())}


def seconds(model: nn.Module, ids: torch.Tensor, fused: bool) -> float:
    with fused_lora_linears(model) if fused else nullcontext():
        micro_batch(model, ids)
        start = time.process_time()
        micro_batch(model, ids)
        return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "lora_linear.json")
    options = parser.parse_args()
    model = policy(options.layers, options.rank)
    ids = torch.randint(0, VOCABULARY, (options.rows, options.length))
    result: dict[str, Any] = {
        "environment": environment("cpu"),
        "setting": {k: v for k, v in vars(options).items() if k != "output"},
    }
    result["seconds_pairs_peft_fused"] = pairs = [
        [seconds(model, ids, fused) for fused in (False, True)] for _ in range(options.pairs)
    ]
    result["fused_over_peft_median"] = statistics.median(fused / by_peft for by_peft, fused in pairs)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        name = "with_checkpointing" if checkpointing else "without_checkpointing"
        counts = {key: operators(model, ids, fused) for key, fused in (("peft", False), ("fused", True))}
        result[f"operators_{name}"] = counts
        print(name, {key: value["total"] for key, value in counts.items()})
    print(f"CPU time, fused / PEFT: {result['fused_over_peft_median']:.3f}")
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
