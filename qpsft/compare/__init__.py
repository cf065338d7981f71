"""`qpsft compare`: the same base and rows by several methods; what each learns and keeps."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `qpsft compare --help` does not wait for torch."""
    if name != "compare":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpsft.compare.comparison import compare

    return compare
