"""The options of `qpsft verify` and of `verify_export`: each field is a flag and an argument, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qpsft.recipe.arguments import BaseOptions
from qpsft.recipe.flags import check_ranges, option


@dataclass
class VerifyOptions(BaseOptions):
    """What a verification takes. Once made, `adapter` and `exported` are paths."""

    adapter: str = option(help="folder that qpsft train wrote")
    exported: str = option(help="folder of the merged model")
    prompts: str | None = option(None, "prompts to compare on (default: the adapter's held-out rows)", metavar="FILE")
    max_prompts: int = option(16, "at most so many prompts", least=1)
    max_new_tokens: int = option(64, "of a greedy answer, at most half the model's context; 0: none", least=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        self.adapter, self.exported = Path(self.adapter).expanduser(), Path(self.exported).expanduser()
