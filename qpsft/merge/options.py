"""The options of `qpsft merge` and of `merge_adapter`: each field is a flag and an argument, declared once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qpsft.errors import ExportError
from qpsft.recipe.arguments import BaseOptions
from qpsft.recipe.flags import option

Onto = Literal["trained", "original"]
OutputDtype = Literal["bfloat16", "float16", "float32"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class MergeOptions(BaseOptions):
    """What a merge takes. Once made, `adapter` and `output` are paths, and `max_shard_size` is in bytes.

    Raises:
        ExportError: a value that is not known, or a size that is none.
    """

    adapter: str = option(help="folder that qpsft train wrote")
    output: str | None = option(None, "folder to write (default: ADAPTER-merged)", short="-o", metavar="FOLDER")
    onto: Onto = option(
        "trained",
        "trained: the rounded weights training saw; the result is the trained model. original: the 16-bit weights on "
        "disk; often fine, never the same model",
    )
    dtype: OutputDtype = option("bfloat16", "of the weights written")
    max_shard_size: str = option("2GB", "size of one file; a larger tensor gets a file of its own", metavar="SIZE")
    overwrite: bool = option(False, "replace an earlier merge, which stays until the new one is complete")
    no_verify: bool = option(False, "do not compare the result with the live model")

    def __post_init__(self) -> None:
        if self.onto not in get_args(Onto):
            raise ExportError(f"onto {self.onto!r} is not known.", f"Use {' or '.join(get_args(Onto))}.")
        if self.dtype not in get_args(OutputDtype):
            raise ExportError(f"dtype {self.dtype!r} is not known.", f"Use {', '.join(get_args(OutputDtype))}.")
        self.max_shard_size = parse_size(self.max_shard_size)
        self.adapter = Path(os.path.abspath(Path(self.adapter).expanduser()))
        self.output = Path(self.output or f"{self.adapter}-merged")


def parse_size(size: str | int) -> int:
    """Bytes from a number or from text such as "2GB", "500MB" or "1GiB". Raises ExportError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ExportError(f"max_shard_size {size!r} is not a size.", "Write it as 2GB, 500MB or a number of bytes.")
    return count
