"""`qpsft evaluate`: likelihood, accuracy, pass@k, drift from the base, public benchmarks."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `qpsft evaluate --help` does not wait for torch."""
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpsft.evaluate.evaluation import evaluate

    return evaluate
