"""`qpsft plan`: the memory that a recipe needs, and what fits a card."""

from qpsft.lazy import imported_on_use

__getattr__ = imported_on_use(__name__, {"make_plan": "qpsft.plan.memory_plan"})
