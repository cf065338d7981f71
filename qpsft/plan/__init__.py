"""`qpsft plan`: the memory that a recipe needs, and what fits a card."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `qpsft plan --help` does not wait for torch."""
    if name != "make_plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpsft.plan.memory_plan import make_plan

    return make_plan
