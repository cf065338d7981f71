"""What the reference pass costs when rows are scored in other batches than now, in shares of an optimizer step.

    python benchmarks/scoring_groups.py --threads 1 --clock cpu --json benchmarks/results/scoring_groups.json

A PSFT trainer (NF4, K = 8, one visit, gradient checkpointing) trains on ragged rows. At every step that needs old
log-probabilities, the same window is scored once by each of these, one after the other, in an order that rotates from
step to step, so that other load on the machine meets all of them alike:

    sorted    rows sorted by length, in batches of at most two micro-batches' tokens or 512: PSFTTrainer's own
    two       two micro-batches at a time, in the order they come, padded to the longer one
    one       micro-batch by micro-batch, as they are trained

What another costs more than `sorted` is given in shares of an average optimizer step, over whole blocks (a snapshot
step scores nothing). Models: stories260K and a random Llama of 6.2M parameters with the same tokenizer, on GSM8K (345
tokens a row at the median); the embedded base on the rows of `qpsft demo` (short ones).

results/scoring_groups.json was made when PSFTTrainer's own way was another, `memory` there: rows sorted by length, in
batches as large as training's activations allow by a table of bytes per token. It was not faster than `sorted`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

SHARED = Path(__file__).resolve().parents[2] / "shared"
LIMIT = 0.03
"""A share of an optimizer step that simpler scoring may cost."""
K = 8
OWN = "sorted"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(SHARED / "models/stories260K"), help="the small model's folder")
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"), help="rows of question and answer")
    parser.add_argument("--models", default="small,llama,demo", help="which of them (default: %(default)s)")
    parser.add_argument("--cells", default="1x8,2x8", help="micro-batch x accumulation (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks that are measured, of K = 8 steps each")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens a row is cut at")
    parser.add_argument("--hidden", type=int, default=256, help="of the random Llama; it has 8 layers")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's processor time")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers there too")
    return parser.parse_args(arguments)


def make_llama(folder: Path, tokenizer: str, hidden: int) -> Path:
    """A random Llama of 8 layers with the vocabulary of `tokenizer`, saved in `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    saved = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,  # NF4 rounds in blocks of 64
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(saved),
        max_position_embeddings=2048,
        bos_token_id=saved.bos_token_id,
        eos_token_id=saved.eos_token_id,
        pad_token_id=saved.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    saved.save_pretrained(folder)
    return folder


def load_rows(args: argparse.Namespace, model: str, tokenizer: Any, count: int) -> Any:
    from qpsft.data.tokenize import load_dataset
    from qpsft.recipe.arguments import DataArguments

    gsm8k = dict(
        dataset_name=args.data,
        dataset_columns={"prompt": "question", "completion": "answer"},
        prompt_format="{prompt}\n",
    )
    data = DataArguments(dataset_limit=count, **({"dataset_name": "demo-noisy"} if model == "demo" else gsm8k))
    return load_dataset(data, tokenizer, args.max_length, show_progress=False).dataset


def merged(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Micro-batches as one, padded on the right to the widest."""
    import torch
    from torch.nn.functional import pad

    width = max(batch["labels"].shape[1] for batch in batches)
    empty = {"labels": -100, "input_ids": 0, "attention_mask": 0}
    return {
        key: torch.cat([pad(batch[key], (0, width - batch[key].shape[1]), value=value) for batch in batches])
        for key, value in empty.items()
    }


def two_at_a_time(score: Callable, batches: Sequence[dict[str, Any]]) -> list[Any]:
    """`score` of micro-batches in pairs, given back micro-batch by micro-batch."""
    pairs = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    results = []
    for pair, scores in zip(pairs, score([merged(pair) for pair in pairs]), strict=True):
        for batch in pair:
            rows, width = batch["labels"].shape
            results.append(scores[:rows, : width - 1])
            scores = scores[rows:]
    return results


class ScoredInTurn:
    """Scores every window in each way, times it, and gives back what PSFTTrainer's own way gave.

    Attributes:
        seconds: by way, of every window so far.
        differences: by way, the largest distance in nats from the trainer's own log-probabilities.
    """

    def __init__(self, own: Callable, clock: Callable[[], float]):
        self._clock = clock
        self._ways = {
            OWN: own,
            "two": lambda old_logprobs, batches, step: two_at_a_time(partial(one, old_logprobs, step=step), batches),
            "one": one,
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self._ways}
        self.differences = dict.fromkeys(self._ways, 0.0)

    def score(self, old_logprobs: Any, batches: Sequence[dict[str, Any]], step: int) -> list[Any]:
        """In place of `OldLogprobs.score`."""
        names = list(self._ways)
        first = len(self.seconds[OWN]) % len(names)
        scores = {}
        for name in names[first:] + names[:first]:
            start = self._clock()
            scores[name] = self._ways[name](old_logprobs, batches, step)
            self.seconds[name].append(self._clock() - start)
        for name, here in scores.items():
            distances = [(a - b).abs().max().item() for a, b in zip(here, scores[OWN], strict=True)]
            self.differences[name] = max(self.differences[name], *distances)
        return scores[OWN]


def one(old_logprobs: Any, batches: Sequence[dict[str, Any]], step: int) -> list[Any]:
    """Scores micro-batch by micro-batch, as OldLogprobs would with `score_token_budget` 0."""
    from qpsft.psft.scoring import as_in_training

    model = old_logprobs.reference.model
    with as_in_training(model, model.device, step):
        return old_logprobs.reference.score(batches)


def measure_cell(args: argparse.Namespace, model: str, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """One model and one shape of the window. Shares are of an optimizer step as PSFTTrainer takes it."""
    import torch
    from peft import LoraConfig
    from turns import StepClock, clock_of

    from qpsft import PSFTConfig, PSFTTrainer, load_base
    from qpsft.psft.old_logprobs import OldLogprobs

    clock = clock_of("cuda" if torch.cuda.is_available() else "cpu", args.clock)
    steps = StepClock("psft", None, clock)
    total = K * (args.blocks + 1)  # the first block warms up
    base, tokenizer = load_base(model, quantization="nf4", verbose=False)
    parameters = sum(weights_of(p) for p in base.parameters())
    with tempfile.TemporaryDirectory() as out:
        config = PSFTConfig(
            out,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            reference_steps=K,
            max_steps=total,
            max_length=args.max_length,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PSFTTrainer(
            base,
            args=config,
            train_dataset=load_rows(args, model, tokenizer, total * micro_batch * accumulation),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[steps],
        )
        turns = ScoredInTurn(OldLogprobs.score, clock)
        with mock.patch.object(OldLogprobs, "score", lambda *args: turns.score(*args)):
            trainer.train()
    scored_per_block = K - 1
    spent = {name: seconds[scored_per_block:] for name, seconds in turns.seconds.items()}
    blocks = []
    for block in range(args.blocks):
        mine = slice(block * scored_per_block, (block + 1) * scored_per_block)
        scored = {name: sum(seconds[mine]) for name, seconds in spent.items()}
        whole = sum(step.seconds for step in steps.steps[K * (block + 1) : K * (block + 2)])
        blocks.append({"step": (whole - sum(scored.values()) + scored[OWN]) / K, "scored": scored})
    extra = {
        name: [(block["scored"][name] - block["scored"][OWN]) / (K * block["step"]) for block in blocks]
        for name in spent
    }
    return {
        "parameters": parameters,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "step_seconds": statistics.median(block["step"] for block in blocks),
        "scoring_share": {
            name: statistics.median(block["scored"][name] / (K * block["step"]) for block in blocks) for name in spent
        },
        "costs_more": {name: statistics.median(values) for name, values in extra.items()},
        "costs_more_by_block": extra,
        "largest_difference_nats": turns.differences,
    }


def weights_of(parameter: Any) -> int:
    """Weights that a parameter stands for: of a packed 4-bit one, those that were packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per model and cell."""
    cells = [tuple(map(int, cell.split("x"))) for cell in args.cells.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "small": lambda: args.tokenizer,
            "llama": lambda: str(make_llama(Path(folder), args.tokenizer, args.hidden)),
            "demo": lambda: "demo",
        }
        for name in args.models.split(","):
            model = models[name]()
            for micro_batch, accumulation in cells:
                results.append(measure_cell(args, model, micro_batch, accumulation) | {"model": name})
                print(line(results[-1]), file=sys.stderr, flush=True)
    return results


def line(result: dict[str, Any]) -> str:
    costs = "   ".join(
        f"{name} {share:+.1%} ({min(by_block):+.1%} to {max(by_block):+.1%})"
        for name, share in result["costs_more"].items()
        if name != OWN and (by_block := result["costs_more_by_block"][name])
    )
    return (
        f"{result['model']}, {result['parameters'] / 1e6:.2f}M parameters, "
        f"{result['micro_batch']} x {result['accumulation']}: a step {result['step_seconds']:.2f} s, "
        f"scoring {result['scoring_share'][OWN]:.1%} of it\n  {costs}"
    )


def main(arguments: list[str] | None = None) -> int:
    args = options(arguments)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        import torch

        torch.set_num_threads(args.threads)
    import torch
    from machine import describe, environment

    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(None):
        results = measure(args)
    record = {
        "results": results,
        "limit": LIMIT,
        "settings": {key: _named(value) for key, value in vars(args).items() if key != "json"},
        **environment("cuda" if torch.cuda.is_available() else "cpu", ["benchmarks/scoring_groups.py", *sys.argv[1:]]),
    }
    print("\n".join(map(line, results)))
    print(f"{args.clock} clock, {describe(record)}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _named(value: Any) -> Any:
    """Paths as seen from the repository, which stands elsewhere on every machine."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return os.path.relpath(value, Path(__file__).resolve().parents[1]) if is_path else value


if __name__ == "__main__":
    raise SystemExit(main())
