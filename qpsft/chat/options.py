"""The options of `qpsft chat`: each field is a flag, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpsft.errors import DataError
from qpsft.recipe.arguments import QUANTIZED_ON, Quantization, QuantizedOn
from qpsft.recipe.flags import option


@dataclass
class ChatOptions:
    """Whom to talk to, and how it answers.

    Raises:
        DataError: a value is out of range or has no effect.
    """

    model: str = option(help="folder of an adapter or of a model, a Hub id, or demo")
    base: str | None = option(
        None, "the base's folder or Hub id, if it is no longer where the adapter says", metavar="MODEL"
    )
    system: str | None = option(None, "a system turn before the conversation")
    temperature: float = option(0.0, "(default: 0, the likeliest token)", metavar="T")
    top_p: float | None = option(None, "draw among tokens of this total (default: 1, all)", metavar="P")
    max_new_tokens: int = option(512, "length cap of an answer")
    seed: int | None = option(None, "of the drawn tokens (default: 0)")
    use_chat_template: Literal["auto", "always", "never"] | None = option(None, "(default: as in training)")
    prompt_format: str | None = option(None, "text around a prompt (default: as in training)")
    quantization: Quantization | None = option(None, "of a model without adapter (default: nf4; none for a merged one)")
    quantized_on: QuantizedOn | None = option(None, QUANTIZED_ON)
    device: str = option("auto", "cpu, cuda, …", metavar="NAME")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DataError(
                f"--temperature is {self.temperature}; it must not be negative.", "0 takes the likeliest token."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(f"--top_p is {self.top_p}; it must be above 0 and at most 1.", "1 leaves no token out.")
        if self.max_new_tokens < 1:
            raise DataError(f"--max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise DataError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1.")
        given = [f"--{name}" for name in ("top_p", "seed") if getattr(self, name) is not None]
        if self.temperature == 0 and given:
            raise DataError(
                f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect at temperature 0, where no "
                "token is drawn.",
                "Give --temperature as well, such as 0.7.",
            )
