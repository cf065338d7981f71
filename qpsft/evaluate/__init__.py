"""`qpsft evaluate`: likelihood, accuracy, pass@k, drift from the base, public benchmarks."""

from qpsft.lazy import imported_on_use

__getattr__ = imported_on_use(__name__, {"evaluate": "qpsft.evaluate.evaluation"})
