"""The demo: plain SFT and a method that keeps more, on the same rows of the embedded base, side by side."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpsft.data import built_in
from qpsft.data.tokenize import load_rows, tokenize_rows
from qpsft.demo.picture import bars, draw
from qpsft.errors import OutputError
from qpsft.evaluate.likelihood import text_statistics
from qpsft.files import finished_files
from qpsft.merge.merging import merge_adapter
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.environment import unusable_gpu
from qpsft.model.generation import greedy_completions
from qpsft.model.remote_code import code_is_off
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import Recipe, load_recipe
from qpsft.terminal import fill, text_table, wrap
from qpsft.train import outputs
from qpsft.train import run as runs

RECIPE = Path(__file__).with_name("recipe.yaml")
PICTURE = "demo.png"
IN_DOMAIN_ROWS = ROWS_PER_SET = 200

SETS = {
    "in_domain": "learnt: chains of four, as demonstrated",
    "set_b": "kept: other operations",
    "shorter_a": "kept: shorter chains",
    "any_order": "kept: any order (many right answers)",
    "styles": "kept: the other styles, on request",
}
BASE, SFT, KEEPING = "base", "plain SFT", "SFT + KL to the base"
ARMS = {SFT: ["--method=sft", "--base_kl=0"], KEEPING: []}
"""What is trained, in this order -> flags; without flags the recipe as it stands."""


@dataclass
class Measured:
    """What a model does on the test split.

    Attributes:
        accuracy: set -> share of greedy answers that are right.
        nll, entropy: on in-domain rows, nats per token.
        answers: set -> its answers, row by row.
    """

    accuracy: dict[str, float]
    nll: float
    entropy: float
    answers: dict[str, list[str]]

    @property
    def out_of_domain(self) -> float:
        """Mean accuracy over the sets of what the base could do before."""
        return sum(self.accuracy[name] for name in built_in.OUT_OF_DOMAIN) / len(built_in.OUT_OF_DOMAIN)


def run(output_dir: str, *, overwrite: bool = False, limit: int | None = None) -> dict[str, Measured]:
    """Trains the embedded base by each of `ARMS` and prints what was learnt and what was kept.

    Args:
        output_dir: where the adapter of the method that keeps more goes; plain SFT's goes to `output_dir`-sft.
        overwrite: replace an earlier demo there.
        limit: rows per test set, for quick checks.

    Returns:
        The base's measurements, and each arm's, by name.
    """
    kept, merged = Path(output_dir), Path(f"{output_dir}-merged")
    folders = {SFT: Path(f"{output_dir}-sft"), KEEPING: kept}
    more = _cpu_flags() + (["--overwrite"] if overwrite else [])
    recipes = {
        name: load_recipe(RECIPE, [f"--output_dir={folders[name]}", *flags, *more], PSFTConfig)
        for name, flags in ARMS.items()
    }
    with contextlib.ExitStack() as held:
        for folder in folders.values():
            held.enter_context(outputs.locked_output(folder))
        for place in (*folders.values(), merged):
            if not overwrite and (place.exists() if place == merged else outputs.holds_run(place)):
                raise OutputError(
                    f"{place} holds what an earlier demo wrote.",
                    "Give --overwrite to begin the demo anew, or another --output_dir.",
                )
        outputs.check_own_files(kept, {PICTURE})
        return _run(recipes, folders, merged, overwrite, limit)


def _run(
    recipes: dict[str, Recipe], folders: dict[str, Path], merged: Path, overwrite: bool, limit: int | None
) -> dict[str, Measured]:
    kept = folders[KEEPING]
    intro = (
        "The embedded base model knows nine operations on digit strings. It is about to learn longer chains of them "
        "from 1,024 noisy demonstrations (30 % contain a wrong step), on its 4-bit weights, twice: by plain SFT, and "
        "by SFT that is held near the base. Which of them still knows what the base knew?"
    )
    print(f"{fill(intro)}\n")
    with _threads():
        model, tokenizer = load_base("demo", verbose=False)
        print("measuring the base …", flush=True)
        measured = {BASE: measure(model, tokenizer, limit)}
        del model
        for name, recipe in recipes.items():
            print(f"{name}: training …", flush=True)
            summary = runs.train(recipe)
            print(f"{name}: measuring …", flush=True)
            measured[name] = measure(load_adapter(folders[name]), load_tokenizer("demo"), limit)
    scores = {name: (one.accuracy["in_domain"], one.out_of_domain) for name, one in measured.items()}
    outputs.record_files(kept, {PICTURE})
    with finished_files(kept) as partial:
        draw(scores, partial / PICTURE)
    print(f"\n{bars(scores)}\n\n{_table(measured)}\n\n{_samples(measured)}\n\n{summary}\n  {PICTURE}\n", flush=True)
    report = merge_adapter(kept, merged, overwrite=overwrite)
    print(f"{report.summary()}\n\n{_next(folders, merged)}")
    return measured


def _cpu_flags() -> list[str]:
    problem = unusable_gpu()
    if problem is None:
        return []
    warnings.warn(f"{problem.what} The demo is small enough for the CPU. {problem.todo}", stacklevel=3)
    return ["--use_cpu"]


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """One thread: matrix products this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_adapter(folder: Path) -> Any:
    """The embedded base with an adapter."""
    from peft import PeftModel

    base, _ = load_base("demo", verbose=False)
    with code_is_off():
        return PeftModel.from_pretrained(base, folder)


def test_sets(limit: int | None = None) -> dict[str, list[dict]]:
    """Name -> its rows of the test split."""
    return {
        "in_domain": built_in.in_domain("test", limit or IN_DOMAIN_ROWS),
        **built_in.out_of_domain("test", limit or ROWS_PER_SET),
    }


def measure(model: Any, tokenizer: Any, limit: int | None = None) -> Measured:
    """Greedy accuracy on every test set, NLL and entropy on the in-domain test rows."""
    accuracy, answers = {}, {}
    for name, rows in test_sets(limit).items():
        answers[name] = greedy_completions(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            max_new_tokens=built_in.ANSWER_TOKENS,
            batch_size=100,
            description=name,
        )
        accuracy[name] = sum(map(built_in.check, rows, answers[name])) / len(rows)
    recipe = load_recipe(RECIPE, [], PSFTConfig)
    rows = load_rows("demo-noisy", recipe.data, "test")
    tokenized = tokenize_rows(rows, tokenizer, recipe.data, recipe.trainer.max_length, show_progress=False)
    statistics = text_statistics(model, list(tokenized.dataset))
    return Measured(accuracy, statistics["nll"], statistics["entropy"], answers)


def _table(measured: dict[str, Measured]) -> str:
    """A row per test set, a column per model."""
    rows = [["right answers on the test split", BASE, "SFT", "SFT + KL"]]
    rows += [[text, *(f"{one.accuracy[name]:.1%}" for one in measured.values())] for name, text in SETS.items()]
    rows.append(["in-domain NLL, nats per token", *(f"{one.nll:.3f}" for one in measured.values())])
    rows.append(["in-domain entropy, nats per token", *(f"{one.entropy:.3f}" for one in measured.values())])
    return text_table(rows)


def _samples(measured: dict[str, Measured]) -> str:
    """What each model answers to the first problem of what is learnt, and to the first that the base could do."""
    rows = test_sets(len(measured[BASE].answers["in_domain"]))
    known = [index for index, row in enumerate(rows["shorter_a"]) if _is_right(row, measured[BASE], "shorter_a", index)]
    shown = [("in_domain", 0, "to learn"), ("shorter_a", known[0] if known else 0, "to keep")]
    blocks = []
    for name, index, what in shown:
        row = rows[name][index]
        blocks.append(wrap(f"{what}: {row['prompt'][-1]['content']}", "  "))
        for model, one in measured.items():
            verdict = "right" if _is_right(row, one, name, index) else "wrong"
            blocks.append(wrap(f"  {model} ({verdict}): {one.answers[name][index]}", " " * 4))
    return "\n".join(blocks)


def _is_right(row: dict, measured: Measured, name: str, index: int) -> bool:
    return built_in.check(row, measured.answers[name][index])


def _next(folders: dict[str, Path], merged: Path) -> str:
    kept = folders[KEEPING]
    commands = {
        f"qpsft chat {kept}": "ask it; with /both the base answers too",
        f"qpsft preview {kept}/recipe.yaml": "the rows it was trained on",
        f"qpsft verify {kept} {merged}": "prove again that the merge is the trained model",
        f"qpsft compare {kept}": "more methods, more seeds, with intervals",
        "qpsft train --help": "your own model and data",
    }
    return "\n".join(["also:", *(f"  {command}\n      {what}" for command, what in commands.items())])
