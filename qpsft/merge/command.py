"""`qpsft merge`: its flags."""

from __future__ import annotations

from collections.abc import Sequence

from qpsft.merge.options import MergeOptions
from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Merge an adapter into its base model, tensor by tensor, and prove that the result is the model that was trained. "
    "CPU and a few hundred MB of memory suffice, whatever the model's size."
)


def merge(argv: Sequence[str]) -> int:
    """`qpsft merge`."""
    options = parse(Parser("qpsft merge", "ADAPTER [options]", DESCRIPTION), argv, MergeOptions)
    quiet_libraries()
    from qpsft.merge.merging import merge_with

    print(merge_with(options).summary())
    return 0
