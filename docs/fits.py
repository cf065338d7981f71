"""The tables of README and docs/memory.md that say what fits which card, as `qpsft plan` counts it.

    python docs/fits.py                  plan every model for every card and renew the tables: most of an hour
    python docs/fits.py --table rank32   only that table, or `models`
    python docs/fits.py --print          only print them

A cell is the longest `max_length` that fits with one row per micro-batch and qpsft's defaults otherwise (NF4, rank 16
on all linear layers, gradient checkpointing, PSFT with its reference policy); none is longer than the model's context.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = {"models": HERE.parent / "README.md", "rank32": HERE / "memory.md"}
OFFLOADING = "--activation_offloading"
MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen3-4B-Instruct-2507",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "Qwen/Qwen2.5-7B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-8B",
    "google/gemma-3-12b-it",
    "Qwen/Qwen3-14B",
)
CARDS = {"8GB": "8 GB", "12GB": "12 GB", "T4": "T4 (15 GB)", "16GB": "16 GB", "24GB": "24 GB"}

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
OFFLOADED = (LLAMA, "Qwen/Qwen3-14B")
"""Shown with activation offloading too; planning it takes minutes a cell."""
SETTINGS = {
    "qpsft, defaults": (),
    "with `activation_offloading: true`": (OFFLOADING,),
}
PUBLISHED = {
    "Unsloth, plain SFT, published": (2972, 21848, 40724, 78475),
    "Hugging Face with FlashAttention-2, published there": (None, 932, 2551, 5789),
}
RANK_32_CARDS = ("8GB", "12GB", "16GB", "24GB")


def longest(model: str, card: str, *flags: str) -> int | None:
    """The longest rows that fit; None: not even the shortest."""
    from qpsft.plan import make_plan
    from qpsft.plan.cards import find_card
    from qpsft.plan.planned_config import PlannedConfig
    from qpsft.recipe.file import load_recipe

    flags = ("--model_name_or_path", model, "--per_device_train_batch_size", "1", *flags)
    return make_plan(load_recipe(None, flags, PlannedConfig), card=find_card(card)).max_length


def row(name: str, cells: Iterable[str]) -> str:
    line = f"| {name} | {' | '.join(cells)} |"
    print(line, file=sys.stderr, flush=True)
    return line


def cell(length: int | None) -> str:
    """None: it does not fit."""
    return "–" if length is None else f"{length:,}"


def header(columns: list[str]) -> list[str]:
    return ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]


def models_table() -> str:
    lines = header([*CARDS.values()])
    for model in MODELS:
        lines.append(row(model.partition("/")[2], [cell(longest(model, card)) for card in CARDS]))
    for model in OFFLOADED:
        name = f"{model.partition('/')[2]}, offloading"
        lines.append(row(name, [cell(longest(model, card, OFFLOADING)) for card in CARDS]))
    return "\n".join(lines)


def rank_32_table() -> str:
    lines = header([CARDS[card] for card in RANK_32_CARDS])
    for name, flags in SETTINGS.items():
        lengths = [longest(LLAMA, card, "--lora_r=32", *flags) for card in RANK_32_CARDS]
        lines.append(row(name, map(cell, lengths)))
    return "\n".join([*lines, *(row(name, map(cell, lengths)) for name, lengths in PUBLISHED.items())])


TABLES: dict[str, Callable[[], str]] = {"models": models_table, "rank32": rank_32_table}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), help="only this one")
    parser.add_argument("--print", action="store_true", help="leave the pages as they are")
    options = parser.parse_args()
    for name in [options.table] if options.table else TABLES:
        made = TABLES[name]()
        if options.print:
            print(made)
            continue
        place = re.compile(rf"(?<=<!-- {name}: made by docs/fits.py -->\n).*?(?=\n\n)", flags=re.S)
        page = PAGES[name]
        page.write_text(place.sub(lambda _, made=made: made, page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
