"""The embedded base model: a tiny Llama, its tokenizer and the world of tasks it knows, all shipped in the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder of the shipped model, for `from_pretrained`."""
