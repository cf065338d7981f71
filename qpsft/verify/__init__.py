"""`qpsft verify`: whether an exported model is the model that was trained."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `qpsft verify --help` does not wait for torch."""
    if name != "verify_export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpsft.verify.verification import verify_export

    return verify_export
