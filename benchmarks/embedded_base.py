"""Make the embedded base: `python benchmarks/embedded_base.py` (qpsft/demo/README.md has the command and its log).

Two stretches of the same seeded loop: full-precision pretraining, then quantization-aware training, in which every
forward uses the weights as they will be shipped and loaded (bfloat16, then NF4 with double quantization for the linear
layers) while the gradient goes straight through to the float32 weights. Without the second one a model this small is
destroyed by the rounding.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import math
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_accuracy import print_table
from embedded_tokenizer import CONTEXT, make_demo_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qpsft.data import built_in
from qpsft.errors import OutputError, QpsftError
from qpsft.model.folder import MODEL_DIR

HIDDEN = 128
LAYERS = 3
ROWS_AT_A_TIME = 64
"""Batches made together and sorted by length, so that little of a batch is padding."""
PROMPT_WEIGHT = 0.1
"""What a prompt token counts for in the loss; a completion token counts 1."""
BLOCK_SIZE = 64
NOT_DECISIVE = ("output", "rows", "threads", "workers", "save_every")
"""Arguments that do not change what is made."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def new_model(tokenizer: Any, hidden: int = HIDDEN, layers: int = LAYERS) -> LlamaForCausalLM:
    """A Llama with random weights; every linear layer's input is a multiple of 64 wide."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Any, size: int, seed: int, workers: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(ids, weights)`, each (batch, sequence): token ids padded on the right, and what each counts for.

    Args:
        workers: processes that make rows ahead of time; 0: made here. The batches are the same ones.
    """
    shuffler = random.Random(f"batches:{seed}")
    make = partial(_make_chunk, tokenizer, size, seed)
    with contextlib.ExitStack() as stack:
        if workers:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))  # a forked torch may hang
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ahead = collections.deque(pool.submit(make, chunk) for chunk in range(2 * workers))
        for chunk in itertools.count():
            if workers:
                ahead.append(pool.submit(make, chunk + 2 * workers))
            parts = ahead.popleft().result() if workers else make(chunk)
            shuffler.shuffle(parts)
            for ids, weights in parts:
                yield torch.from_numpy(ids).long(), torch.from_numpy(weights)


def _make_chunk(tokenizer: Any, size: int, seed: int, chunk: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`ROWS_AT_A_TIME` batches, shortest rows first: ids (int16) and weights (float32)."""
    rows = list(built_in.pretraining_rows(size * ROWS_AT_A_TIME, seed=f"{seed}:{chunk}"))
    # Rendered by hand: the same as the chat template (tested), which is too slow for millions of rows.
    prompts = [f"<s><|user|>{row['prompt'][0]['content']}<|end|><|assistant|>" for row in rows]
    answers = [f"{row['completion'][0]['content']}<|end|>" for row in rows]
    pairs = list(zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    parts = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        ids = np.full((len(part), width), tokenizer.pad_token_id, dtype=np.int16)
        weights = np.zeros((len(part), width), dtype=np.float32)
        for i, (prompt, answer) in enumerate(part):
            end = len(prompt) + len(answer)
            ids[i, :end] = prompt + answer
            weights[i, : len(prompt)] = PROMPT_WEIGHT
            weights[i, len(prompt) : end] = 1.0
        parts.append((ids, weights))
    return parts


def losses(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean negative log-likelihood to train on, and the completion's alone to report; nats per token."""
    ids, weights = ids.to(model.device, non_blocking=True), weights.to(model.device, non_blocking=True)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weights = weights[:, 1:]
    completion = weights == 1.0
    return (nll * weights).sum() / weights.sum(), nll.detach()[completion].mean()


def as_shipped(name: str, weight: torch.Tensor, quantized: set[str]) -> torch.Tensor:
    """`weight` after the round trip to disk (bfloat16) and, for the layers in `quantized`, through NF4; float32."""
    import bitsandbytes.functional as bnb

    rounded = weight.bfloat16().float()
    if name not in quantized:
        return rounded
    data, state = bnb.quantize_4bit(rounded, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(data, state)


def quantized_weights(model: torch.nn.Module) -> set[str]:
    """Names of the weights bitsandbytes quantizes: every linear layer's but lm_head's."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@dataclass(frozen=True)
class Stretch:
    """One stretch of training: `steps` optimizer steps with a linear warm-up, then a cosine down to zero."""

    label: str
    steps: int
    learning_rate: float
    quantize: bool
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, …"""
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
        return self.learning_rate * min(step / self.warmup, 1.0) * decay


def train(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    stretch: Stretch,
    done: int = 0,
    optimizer_states: list[dict] | None = None,
    save: Callable[[int, list[dict]], None] | None = None,
    save_every: int = 500,
) -> None:
    """Train `model` in place from step `done` + 1 on; `save(step, optimizer_states)` every `save_every` steps.

    On CUDA the products are computed in bfloat16.
    """
    quantized = quantized_weights(model)
    matrices = [p for name, p in model.named_parameters() if name in quantized]
    others = [p for name, p in model.named_parameters() if name not in quantized]
    # Muon gets this model to the same loss in about a third of AdamW's steps.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    if optimizer_states is not None:
        for optimizer, state in zip(optimizers, optimizer_states, strict=True):
            optimizer.load_state_dict(state)
    started, window = time.time(), []
    for step in range(done + 1, stretch.steps + 1):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = stretch.rate(step)
        ids, weights = next(data)
        if stretch.quantize:
            exact = {name: p.data for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.data = as_shipped(name, exact[name], quantized)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            loss, completion = losses(model, ids, weights)
        loss.backward()
        if stretch.quantize:
            for name, p in model.named_parameters():
                p.data = exact[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        window = [*window[-99:], completion]  # not read yet: that would wait for the device
        if step % 100 == 0 or step == stretch.steps:
            mean, seconds = torch.stack(window).double().mean().item(), time.time() - started
            print(f"{stretch.label} step {step}/{stretch.steps} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
        if save is not None and step % save_every == 0:
            save(step, [optimizer.state_dict() for optimizer in optimizers])


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, generation_config and bfloat16 weights into `folder`."""
    import copy

    shipped = copy.deepcopy(model).bfloat16()
    shipped.generation_config.max_new_tokens = 64
    shipped.save_pretrained(folder)


def train_stretches(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    arguments: argparse.Namespace,
    state_path: Path,
    saved: Callable[[], None],
) -> None:
    """Trains `model` in place, full precision first, from where the state in `state_path` is, if there is one.

    Raises:
        OutputError: the state is of other arguments.
    """
    stretches = (
        Stretch("pretraining", arguments.steps, arguments.learning_rate, quantize=False),
        Stretch("quantization-aware", arguments.qat_steps, arguments.qat_learning_rate, quantize=True),
    )
    settings = {name: value for name, value in vars(arguments).items() if name not in NOT_DECISIVE}
    state = {"settings": settings, "stretch": 0, "step": 0, "model": model.state_dict(), "optimizers": None}
    if state_path.exists():
        state = torch.load(state_path, map_location=arguments.device)
        if state["settings"] != settings:
            raise OutputError(
                f"{state_path.parent} holds an unfinished model made with other options: {state['settings']}.",
                "Finish it with those, or delete the folder.",
            )
        model.load_state_dict(state["model"])
        for _ in range(sum(s.steps for s in stretches[: state["stretch"]]) + state["step"]):
            next(data)

    for index in range(state["stretch"], len(stretches)):

        def save(step: int, optimizers: list[dict], index: int = index) -> None:
            now = {"settings": settings, "stretch": index, "step": step, "model": model.state_dict()}
            torch.save({**now, "optimizers": optimizers}, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)
            saved()

        resumed = (state["step"], state["optimizers"]) if index == state["stretch"] else (0, None)
        train(model, data, stretches[index], *resumed, save=save, save_every=arguments.save_every)


def make(arguments: argparse.Namespace, saved: Callable[[], None] = lambda: None) -> None:
    """Tokenizer, both stretches, table; the finished folder replaces `arguments.output`.

    The work lies in a hidden folder beside the output until it is done; the same command goes on from there.

    Args:
        arguments: of `parser`.
        saved: called whenever the state is on disk; may raise to stop there.
    """
    output: Path = arguments.output
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write beside {output}: {error}.", "Choose another --output.") from error
    torch.manual_seed(arguments.seed)
    if arguments.tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copy(Path(arguments.tokenizer) / name, partial)
    else:
        make_demo_tokenizer(partial, arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(partial)
    model = new_model(tokenizer, arguments.hidden, arguments.layers).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} pieces", flush=True)
    with contextlib.closing(batches(tokenizer, arguments.batch_size, arguments.seed, arguments.workers)) as data:
        train_stretches(model, data, arguments, partial / "state.pt", saved)
    write_model(model, partial)
    if arguments.rows:
        print_table(partial, "validation", arguments.rows)
    (partial / "state.pt").unlink(missing_ok=True)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the embedded base model.")
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write (default: the package's)")
    parser.add_argument("--steps", type=int, default=3400, help="full-precision steps")
    parser.add_argument("--qat_steps", type=int, default=500, help="quantization-aware steps")
    parser.add_argument("--learning_rate", type=float, default=8e-3, help="peak of the full-precision steps")
    parser.add_argument("--qat_learning_rate", type=float, default=2e-3, help="peak of the quantization-aware steps")
    parser.add_argument("--batch_size", type=int, default=64, help="rows a step")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="hidden size")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers")
    parser.add_argument("--rows", type=int, default=512, help="rows a set for the final table; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use; 1 on a busy machine")
    parser.add_argument("--device", default="cpu", help="cuda computes in bfloat16")
    parser.add_argument("--workers", type=int, default=0, help="processes that make rows ahead of time")
    parser.add_argument("--save_every", type=int, default=500, help="steps between two saved states")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to take instead of making one")
    return parser


def main() -> int:
    """Parse the command line and make the model."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.time()
    try:
        make(arguments)
    except QpsftError as error:
        print(f"error: {error}")
        return error.exit_code
    print(f"made in {time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
