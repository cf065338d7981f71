"""`qpsft compare`: the same base and rows by several methods; what each learns and keeps."""

from qpsft.lazy import imported_on_use

__getattr__ = imported_on_use(__name__, {"compare": "qpsft.compare.comparison"})
