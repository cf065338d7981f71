"""The licences of the pinned packages (constraints.txt), as the installed ones state them: a table for reliability.md.

python docs/licences.py
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

PINNED = re.compile(r"^([\w.-]+)==", re.MULTILINE)
NAMES = {
    r"apache": "Apache-2.0",
    r"mpl|mozilla": "MPL-2.0",
    r"lgpl|lesser": "LGPL",
    r"(?<!l)gpl|gnu general": "GPL",
    r"bsd": "BSD",
    r"\bmit\b": "MIT",
    r"isc": "ISC",
    r"psf|python": "PSF",
    r"unlicense|public domain|cc0": "public domain",
    r"nvidia|proprietary": "NVIDIA's",
}
"""What a stated licence is called here, by the pattern that is found first in it: the main one stands first."""


def licence(package: str) -> str:
    """A package's licence in a word; "not installed" or "not stated" where nobody can tell."""
    try:
        facts = metadata(package)
    except PackageNotFoundError:
        return "not installed"
    classifiers = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or () if c.startswith("License")]
    stated = facts.get("License-Expression") or ", ".join(classifiers) or (facts.get("License") or "")[:60]
    found = [(match.start(), name) for sign, name in NAMES.items() if (match := re.search(sign, stated, re.IGNORECASE))]
    return min(found)[1] if found else stated or "not stated"


def main() -> None:
    pinned = PINNED.findall((Path(__file__).resolve().parents[1] / "constraints.txt").read_text(encoding="utf-8"))
    packages = defaultdict(list)
    for package in pinned:
        packages[licence(package)].append(package)
    print(f"| licence | packages, {len(pinned)} in all |\n| --- | --- |")
    for name, of_it in sorted(packages.items(), key=lambda item: -len(item[1])):
        print(f"| {name} | {len(of_it)}: {', '.join(of_it)} |")


if __name__ == "__main__":
    sys.exit(main())
