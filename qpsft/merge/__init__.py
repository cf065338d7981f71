"""`qpsft merge`: an adapter and its base become plain safetensors, proven to be the trained model."""

from qpsft.lazy import imported_on_use

__getattr__ = imported_on_use(__name__, {"merge_adapter": "qpsft.merge.merging"})
