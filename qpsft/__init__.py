"""Proximal Supervised Fine-Tuning (PSFT) on 4-bit base models with LoRA."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    sys.stderr.write(f"error: qpsft needs Python 3.11 or newer; this is {sys.version.split()[0]}.\n")
    raise SystemExit(2)

from typing import TYPE_CHECKING, Any

from qpsft.lazy import imported_on_use

if TYPE_CHECKING:
    from qpsft.model.base import load_base
    from qpsft.psft.config import PSFTConfig
    from qpsft.psft.losses import psft_loss
    from qpsft.psft.policy import float32_adapter
    from qpsft.psft.reference import ReferencePolicy
    from qpsft.psft.trainer import PSFTTrainer

__version__ = "0.1.0"
__all__ = ["PSFTConfig", "PSFTTrainer", "ReferencePolicy", "float32_adapter", "load_base", "psft_loss"]

_HOME = {
    "PSFTConfig": "qpsft.psft.config",
    "PSFTTrainer": "qpsft.psft.trainer",
    "ReferencePolicy": "qpsft.psft.reference",
    "float32_adapter": "qpsft.psft.policy",
    "load_base": "qpsft.model.base",
    "psft_loss": "qpsft.psft.losses",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import qpsft` and `qpsft --help` do not wait for torch."""
    try:
        return imported_on_use("qpsft", _HOME)(name)
    except ImportError as error:
        from qpsft.model.environment import broken_torchvision

        problem = broken_torchvision()
        raise error if problem is None else problem from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
