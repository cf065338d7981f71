"""The options of `qpsft chat`: each field is a flag, declared once."""

from __future__ import annotations

from dataclasses import dataclass

from qpsft.errors import DataError
from qpsft.recipe.arguments import LoadOptions
from qpsft.recipe.flags import check_ranges, option


@dataclass
class ChatOptions(LoadOptions):
    """The model to talk to, and how it answers.

    Raises:
        RecipeError: a value is out of range. DataError: it has no effect.
    """

    model: str = option(help="folder of an adapter or of a model, a GGUF file, a Hub id, or demo")
    system: str | None = option(None, "a system turn before the conversation")
    temperature: float = option(0.0, "(default: 0, the likeliest token)", metavar="T", least=0)
    top_p: float | None = option(None, "draw among tokens of this total (default: 1, all)", metavar="P", above=0)
    max_new_tokens: int = option(512, "length cap of an answer", least=1)
    seed: int | None = option(None, "of the drawn tokens (default: 0)", least=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.top_p is not None and self.top_p > 1:
            raise DataError(f"top_p is {self.top_p}; it must be at most 1.", "1 leaves no token out.")
        given = [f"--{name}" for name in ("top_p", "seed") if getattr(self, name) is not None]
        if self.temperature == 0 and given:
            raise DataError(
                f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect at temperature 0, where no "
                "token is drawn.",
                "Give --temperature as well, such as 0.7.",
            )
