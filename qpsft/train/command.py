"""`qpsft train` and `qpsft preview`: a recipe and its flags from the command line."""

from __future__ import annotations

import argparse
import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from qpsft.errors import RecipeError
from qpsft.processes import is_main
from qpsft.recipe.flags import Parser
from qpsft.recipe.trainer_options import add_recipe_flags
from qpsft.terminal import quiet_libraries

TRAIN = "Train an adapter on your demonstrations: PSFT by default, plain SFT (nll) or DFT as baselines."
TRAIN_EXAMPLE = "qpsft train adapters/mine/recipe.yaml --max_steps 50 --output_dir runs/a"
PREVIEW = "Print rows as the model will see them, supervised tokens coloured, and what became of all rows."
PREVIEW_EXAMPLE = "qpsft preview adapters/mine/recipe.yaml --dataset_limit 100"
WIDTH = 80


def train(argv: Sequence[str]) -> int:
    """`qpsft train`."""
    quiet_libraries()
    if print_help("train", argv, TRAIN, TRAIN_EXAMPLE):
        return 0
    recipe = read_recipe(argv)
    from qpsft.train import run

    summary = run.train(recipe)
    if is_main():
        print(f"\n{summary}\n\n{summary.next_commands(recipe)}")
    return 0


def preview(argv: Sequence[str]) -> int:
    """`qpsft preview`."""
    quiet_libraries()
    if print_help("preview", argv, PREVIEW, PREVIEW_EXAMPLE):
        return 0
    recipe = read_recipe(argv)
    from qpsft.data.preview import render_rows
    from qpsft.data.tokenize import TokenizedRows
    from qpsft.model.continue_adapter import recipe_tokenizer, warn_past_context
    from qpsft.train.data import preview_blocks, read_training_data

    if not recipe.model.model_name_or_path:
        raise RecipeError("model_name_or_path is missing.", "The tokenizer comes with the model: name it.")
    tokenizer = recipe_tokenizer(recipe)
    shown = []

    def show(rows: TokenizedRows) -> None:
        """The first of many rows, before the others are counted."""
        print(render_rows(rows, tokenizer), end="\n\n", flush=True)
        shown.append(rows)

    data = read_training_data(recipe, tokenizer, show)
    print("\n".join(preview_blocks(data, recipe, tokenizer, are_shown=bool(shown))), end="")
    warn_past_context(recipe, data.longest)
    return 0


def read_recipe(argv: Sequence[str]):
    """The recipe that a command line names first, if any, with its flags."""
    from qpsft.recipe.file import load_recipe, read_recipe_file

    path = argv[0] if argv and not argv[0].startswith("-") else None
    if path:
        read_recipe_file(Path(path))  # a wrong path is told before transformers is imported, which takes seconds
    from qpsft.psft.config import PSFTConfig

    return load_recipe(path, argv[1:] if path else argv, PSFTConfig)


def print_help(verb: str, argv: Sequence[str], description: str, example: str) -> bool:
    """Prints the options of a recipe if --help or --help_all is asked for. Returns whether it was."""
    everything = "--help_all" in argv
    if not everything and not {"-h", "--help"} & set(argv):
        return False
    from qpsft.psft.config import PSFTConfig

    notes = ["A recipe may begin with `extends: other.yaml` and give only what differs."]
    if not everything:
        notes.append("--help_all lists every option of transformers' and TRL's trainers too.")
    parser = Parser(
        f"qpsft {verb}",
        "[RECIPE.yaml] [--any_option value …]",
        f"{textwrap.fill(description, WIDTH)}\n\n  {example}",
        epilog="\n".join(notes),
        add_help=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=6, width=WIDTH),
    )
    add_recipe_flags(parser, PSFTConfig, everything=everything)
    parser.print_help()
    return True
