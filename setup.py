"""Everything is in pyproject.toml. This only refuses an older Python in words.

With `-c constraints.txt` pip finds, before it looks at requires-python, that versions of matplotlib conflict.
"""

import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: qpsft needs Python 3.11 or newer; this is {sys.version.split()[0]}.")

setup()
