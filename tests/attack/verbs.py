"""Short runs of the verbs, and damage done to files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from qpsft import cli

TRAIN = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=32", "--max_length=128", "--lora_r=2",
    "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--gradient_checkpointing=false",
    "--reference_steps=2", "--num_iterations=2", "--max_steps=1",
]  # fmt: skip


def train(folder: Path, *flags: str) -> int:
    return cli.main(["train", *flags, f"--output_dir={folder}"])


def said(capsys: Any) -> str:
    """What went to standard error, on one line."""
    return " ".join(capsys.readouterr().err.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, rng: random.Random) -> None:
    """Changes one bit of the last three quarters of a file: of a safetensors file mostly in its values."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) // 4, len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def half(path: Path) -> None:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
