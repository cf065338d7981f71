"""The table of README that says what fits which card, as `qpsft plan` counts it.

    python docs/fits.py            plan every model for every card (some 20 minutes) and renew the table
    python docs/fits.py --print    only print it

A cell is the longest `max_length` that fits with one row per micro-batch and qpsft's defaults otherwise (NF4, rank 16
on all linear layers, gradient checkpointing, PSFT with its reference policy); none is longer than the model's context.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
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
TABLE = re.compile(r"(?<=<!-- made by docs/fits.py -->\n).*?(?=\n\n)", flags=re.S)


def longest(model: str, card: str) -> int | None:
    """The longest rows that fit; None: not even the shortest."""
    from qpsft import PSFTConfig
    from qpsft.plan import make_plan
    from qpsft.plan.cards import find_card
    from qpsft.recipe.file import load_recipe

    flags = ["--model_name_or_path", model, "--per_device_train_batch_size", "1"]
    return make_plan(load_recipe(None, flags, PSFTConfig), card=find_card(card)).max_length


def cell(length: int | None) -> str:
    return "–" if length is None else f"{length:,}"


def table() -> str:
    lines = ["| | " + " | ".join(CARDS.values()) + " |", "| --- |" + " ---: |" * len(CARDS)]
    for model in MODELS:
        cells = [cell(longest(model, card)) for card in CARDS]
        lines.append(f"| {model.partition('/')[2]} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="leave README as it is")
    only_print = parser.parse_args().print
    made = table()
    if only_print:
        print(made)
    else:
        README.write_text(TABLE.sub(lambda _: made, README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
