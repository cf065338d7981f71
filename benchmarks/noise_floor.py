"""How far the ratio is from 1 when both passes see the same weights: the noise that PSFT's trust region lives with.

    python benchmarks/noise_floor.py --threads 1

The first step after a snapshot takes its own log-probabilities as the old ones, so there r = 1 exactly. Every later
step compares two passes: training, in small micro-batches with gradients, and scoring, in the largest batches that fit,
sorted by length, without. Here both are run as PSFTTrainer runs them (mode, mask, kernels, token budget, autocast), the
reference being the policy itself, and |r - 1| is measured over the supervised tokens; 0.28 is where a token is clipped.

An adapter with random A and B stands for one in training. The compute dtypes are those of the base and of autocast:
float32 and bfloat16 anywhere, float16 and bfloat16 under autocast (as with fp16: true and bf16: true) on CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` (the embedded base), a folder or a Hub id")
    parser.add_argument("--data", default="demo-noisy", help="as dataset_name in a recipe")
    parser.add_argument("--rows", type=int, default=64, help="rows of a window: one optimizer step's data")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--dtypes", nargs="+", default=None, help="float32, bfloat16, float16, each also with +autocast; default: all"
    )
    parser.add_argument("--score_token_budget", type=int, default=None, help="as in PSFTConfig; 0: as trained")
    parser.add_argument("--attn_implementation", default=None)
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers there too")
    return parser.parse_args(arguments)


def default_dtypes(device: str) -> list[str]:
    on_cpu = ["float32", "bfloat16", "bfloat16+autocast"]
    return on_cpu if device == "cpu" else ["float32", "bfloat16", "bfloat16+autocast", "float16+autocast"]


def make_model(args: argparse.Namespace, dtype: str) -> tuple[Any, Any]:
    """The 4-bit base in a compute dtype, with a random float32 adapter and TRL's LM head, in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    from qpsft import load_base

    torch.manual_seed(0)
    attention = args.attn_implementation
    model, tokenizer = load_base(args.model, dtype=dtype, attn_implementation=attention, verbose=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # an update of a plausible size; random B as large as A would be another model
                parameter.mul_(0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return model.train(), tokenizer


def windows(args: argparse.Namespace, tokenizer: Any, micro_batch: int, device: Any) -> list[list[dict]]:
    """`args.windows` optimizer steps' data as micro-batches, on the device."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from qpsft.data.tokenize import load_dataset
    from qpsft.recipe.arguments import DataArguments

    count = args.rows * args.windows
    data = DataArguments(dataset_name=args.data, dataset_limit=count)
    rows = load_dataset(data, tokenizer, args.max_length, show_progress=False).dataset
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    parts = [
        collate([rows[r] for r in range(start, min(start + micro_batch, len(rows)))])
        for start in range(0, len(rows), micro_batch)
    ]
    parts = [{key: tensor.to(device) for key, tensor in part.items()} for part in parts]
    each = args.rows // micro_batch
    return [parts[start : start + each] for start in range(0, len(parts), each)]


def ratios(
    args: argparse.Namespace, model: Any, tokenizer: Any, micro_batch: int, autocast: Any
) -> tuple[Any, int | None]:
    """|r - 1| of every supervised token, 1-dimensional; and the token budget of the first window's scoring."""
    import torch

    from qpsft import PSFTConfig
    from qpsft.psft.forward import policy_forward
    from qpsft.psft.reference import ReferencePolicy
    from qpsft.psft.scoring import as_in_training, token_budget

    device = model.get_input_embeddings().weight.device
    config = PSFTConfig("unused", bf16=False, report_to=[], score_token_budget=args.score_token_budget)
    reference = ReferencePolicy(model, fused_lm_head=True)
    found, budgets = [], []
    for batches in windows(args, tokenizer, micro_batch, device):
        budgets.append(token_budget(config, max(batch["input_ids"].numel() for batch in batches)))
        with autocast(), as_in_training(model, device, 0):
            scored = reference.score(batches, token_budget=budgets[-1])
        for batch, old in zip(batches, scored, strict=True):
            with autocast():
                outputs = policy_forward(model, batch, right_padded=True)
            new = outputs.log_probs.detach().float()
            found.append(((new - old).exp() - 1).abs()[outputs.label_mask])
    return torch.cat(found).cpu(), budgets[0]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per dtype and micro-batch size."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for name in args.dtypes or default_dtypes(device):
        dtype, _, cast = name.partition("+")

        def autocast(dtype: str = dtype, cast: str = cast) -> Any:
            return torch.autocast(device, getattr(torch, dtype)) if cast else contextlib.nullcontext()

        model, tokenizer = make_model(args, dtype)
        for micro_batch in args.micro_batches:
            values, budget = ratios(args, model, tokenizer, micro_batch, autocast)
            results.append(
                {
                    "dtype": name,
                    "micro_batch": micro_batch,
                    "token_budget": budget,
                    "tokens": values.numel(),
                    "max": values.max().item(),
                    "p99.9": values.double().quantile(0.999).item(),
                    "median": values.median().item(),
                }
            )
    return results


def main() -> int:
    import torch
    from machine import environment

    args = options()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(None):
        results = measure(args)
    print(f"{'|r - 1|':20} micro-batch  scored in      median       99.9 %          max")
    for r in results:
        numbers = f"{r['median']:12.1e} {r['p99.9']:12.1e} {r['max']:12.1e}"
        print(f"{r['dtype']:20} {r['micro_batch']:11} {str(r['token_budget'] or 'as trained'):>10} {numbers}")
    if args.json:
        record = {
            "results": results,
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            **environment("cuda" if torch.cuda.is_available() else "cpu", ["benchmarks/noise_floor.py", *sys.argv[1:]]),
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
