"""Proximal Supervised Fine-Tuning (PSFT) on 4-bit base models with LoRA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpsft.base import load_base
    from qpsft.config import PSFTConfig
    from qpsft.losses import psft_loss
    from qpsft.policy import float32_adapter
    from qpsft.reference import ReferencePolicy
    from qpsft.trainer import PSFTTrainer

__version__ = "0.1.0"
__all__ = ["PSFTConfig", "PSFTTrainer", "ReferencePolicy", "float32_adapter", "load_base", "psft_loss"]

_HOME = {
    "PSFTConfig": "qpsft.config",
    "PSFTTrainer": "qpsft.trainer",
    "ReferencePolicy": "qpsft.reference",
    "float32_adapter": "qpsft.policy",
    "load_base": "qpsft.base",
    "psft_loss": "qpsft.losses",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import qpsft` and `qpsft --help` do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'qpsft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
