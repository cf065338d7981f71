"""`qpsft merge`: its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qpsft.recipe.arguments import QUANTIZED_ON, QuantizedOn
from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Merge an adapter into its base model, tensor by tensor, and prove that the result is the model that was trained. "
    "CPU and a few hundred MB of memory suffice, whatever the model's size."
)


@dataclass
class MergeOptions:
    """What `qpsft merge` takes."""

    adapter: str = option(help="folder that qpsft train wrote")
    base: str | None = option(
        None, "the base's folder or Hub id, if it is no longer where the adapter says", metavar="MODEL"
    )
    output: str | None = option(None, "folder to write (default: ADAPTER-merged)", short="-o", metavar="FOLDER")
    onto: Literal["trained", "original"] = option(
        "trained",
        "trained: the rounded weights training saw; the result is the trained model. original: the 16-bit weights on "
        "disk; often fine, never the same model",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of the weights written")
    max_shard_size: str = option("2GB", "size of one file", metavar="SIZE")
    overwrite: bool = option(False, "replace an earlier merge")
    no_verify: bool = option(False, "do not compare the result with the live model")
    quantized_on: QuantizedOn | None = option(None, QUANTIZED_ON)


def merge(argv: Sequence[str]) -> int:
    """`qpsft merge`."""
    options = parse(Parser("qpsft merge", "ADAPTER [options]", DESCRIPTION), argv, MergeOptions)
    quiet_libraries()
    from qpsft.merge.merging import merge_adapter
    from qpsft.model.base_record import state_quantized_on

    state_quantized_on(options.adapter, options.quantized_on)
    report = merge_adapter(
        options.adapter,
        options.output,
        base=options.base,
        onto=options.onto,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        verify=not options.no_verify,
    )
    print(report.summary())
    return 0
