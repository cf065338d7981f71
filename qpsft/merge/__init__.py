"""`qpsft merge`: an adapter and its base become plain safetensors, proven to be the trained model."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `qpsft merge --help` does not wait for torch."""
    if name != "merge_adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpsft.merge.merging import merge_adapter

    return merge_adapter
