"""`qpsft verify`: whether an exported model is the model that was trained."""

from qpsft.lazy import imported_on_use

__getattr__ = imported_on_use(__name__, {"verify_export": "qpsft.verify.verification"})
