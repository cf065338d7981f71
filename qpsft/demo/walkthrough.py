"""The demo: PSFT on the embedded base, what it learned and what it kept."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qpsft.data import built_in
from qpsft.data.tokenize import load_rows, tokenize_rows
from qpsft.errors import OutputError
from qpsft.evaluate.likelihood import text_statistics
from qpsft.merge.merging import merge_adapter
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.environment import unusable_gpu
from qpsft.model.generation import greedy_completions
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.terminal import fill, wrap
from qpsft.train import run as runs

RECIPE = Path(__file__).with_name("recipe.yaml")
IN_DOMAIN_ROWS = 200
ROWS_PER_SET = 100
SAMPLES = 3
MAX_NEW_TOKENS = 56

SETS = {
    "in_domain": "in-domain: chains of four, as demonstrated",
    "set_b": "other operations",
    "shorter_a": "shorter chains",
    "any_order": "any order (many right answers)",
    "styles": "the other styles, on request",
}


@dataclass
class Measured:
    """What the model does on the test split: accuracy by set, likelihood on in-domain rows, a few completions."""

    accuracy: dict[str, float]
    nll: float
    entropy: float
    samples: list[str]

    @property
    def out_of_domain(self) -> float:
        """Mean accuracy over the out-of-domain sets."""
        return sum(self.accuracy[name] for name in built_in.OUT_OF_DOMAIN) / len(built_in.OUT_OF_DOMAIN)


def run(output_dir: str, *, overwrite: bool = False, limit: int | None = None) -> tuple[Measured, Measured]:
    """Trains the embedded base and prints it before and after.

    Args:
        output_dir: where the adapter goes.
        overwrite: replace an earlier demo there.
        limit: rows per test set, for quick checks.

    Returns:
        What was measured before and after training.
    """
    flags = ["--output_dir", output_dir, *(["--overwrite"] if overwrite else [])]
    if problem := unusable_gpu():
        warnings.warn(f"{problem.what} The demo is small enough for the CPU. {problem.todo}", stacklevel=2)
        flags.append("--use_cpu")
    recipe = load_recipe(RECIPE, flags, PSFTConfig)
    runs.check_output(Path(output_dir), resume=False, overwrite=overwrite)
    merged = Path(f"{output_dir}-merged")
    if merged.exists() and not overwrite:
        raise OutputError(f"{merged} exists already.", "Give --overwrite to replace it, or another --output_dir.")
    intro = (
        "The embedded base model knows nine operations on digit strings; it is about to learn longer chains of them "
        "from 1,024 noisy demonstrations (30 % contain a wrong step), by Proximal SFT on its 4-bit weights."
    )
    print(f"{fill(intro)}\n")
    with _threads():
        model, tokenizer = load_base("demo", verbose=False)
        print("measuring the base …", flush=True)
        before = measure(model, tokenizer, limit)
        del model
        print(f"training ({recipe.trainer.num_train_epochs:g} epochs) …", flush=True)
        summary = runs.train(recipe)
        print("measuring the result …", flush=True)
        model = _load_adapter(output_dir)
        after = measure(model, load_tokenizer("demo"), limit)
    print(f"\n{_table(before, after)}\n\n{_samples(before, after)}\n\n{summary}\n", flush=True)
    report = merge_adapter(output_dir, overwrite=overwrite)
    print(f"{report.summary()}\n\n{_next(summary.folder, merged)}")
    return before, after


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """One thread: matrix products this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _load_adapter(folder: str):
    from peft import PeftModel

    base, _ = load_base("demo", verbose=False)
    return PeftModel.from_pretrained(base, folder)


def measure(model, tokenizer, limit: int | None = None) -> Measured:
    """Greedy accuracy on every test set, NLL and entropy on the in-domain test rows."""
    sets = {
        "in_domain": built_in.in_domain("test", limit or IN_DOMAIN_ROWS),
        **built_in.out_of_domain("test", limit or ROWS_PER_SET),
    }
    accuracy, samples = {}, []
    for name, rows in sets.items():
        prompts = [row["prompt"] for row in rows]
        answers = greedy_completions(
            model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=100, description=name
        )
        accuracy[name] = sum(map(built_in.check, rows, answers)) / len(rows)
        if name == "in_domain":
            samples = answers[:SAMPLES]
    recipe = load_recipe(RECIPE, [], PSFTConfig)
    rows = load_rows("demo-noisy", recipe.data, "test")
    tokenized = tokenize_rows(rows, tokenizer, recipe.data, recipe.trainer.max_length, show_progress=False)
    statistics = text_statistics(model, list(tokenized.dataset))
    return Measured(accuracy, statistics["nll"], statistics["entropy"], samples)


def _table(before: Measured, after: Measured) -> str:
    rows = [(text, f"{before.accuracy[n]:.1%}", f"{after.accuracy[n]:.1%}") for n, text in SETS.items()]
    rows.insert(1, ("out of domain, mean of:", f"{before.out_of_domain:.1%}", f"{after.out_of_domain:.1%}"))
    rows[2:] = [(f"  {text}", *values) for text, *values in rows[2:]]
    rows.append(("in-domain NLL, nats per token", f"{before.nll:.3f}", f"{after.nll:.3f}"))
    rows.append(("in-domain entropy, nats per token", f"{before.entropy:.3f}", f"{after.entropy:.3f}"))
    lines = [f"{'on the test split':<45}{'before':>9}{'after':>9}", "─" * 63]
    return "\n".join(lines + [f"{name:<45}{old:>9}{new:>9}" for name, old, new in rows])


def _samples(before: Measured, after: Measured) -> str:
    blocks = []
    for row, old, new in zip(built_in.in_domain("test", SAMPLES), before.samples, after.samples, strict=True):
        marks = ["right" if built_in.check(row, text) else "wrong" for text in (old, new)]
        answers = [f"    before ({marks[0]}): {old}", f"    after  ({marks[1]}): {new}"]
        blocks += [f"  {row['prompt'][-1]['content']}", *(wrap(answer, " " * 6) for answer in answers)]
    return "three of the in-domain problems:\n" + "\n".join(blocks)


def _next(folder: Path, merged: Path) -> str:
    commands = {
        f"qpsft preview {folder}/recipe.yaml": "the rows it was trained on",
        f"qpsft train {folder}/recipe.yaml --loss_type nll --output_dir runs/sft": "the same with plain SFT",
        f"qpsft verify {folder} {merged}": "prove again that the merge is the trained model",
        "qpsft train --help": "your own model and data",
    }
    return "\n".join(["also:", *(f"  {command}\n      {what}" for command, what in commands.items())])
