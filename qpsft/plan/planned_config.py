"""The trainer's options of a run that is planned here and trained elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.training_args import OptimizerNames

from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig

ELSEWHERE = ("optim", "activation_offloading", "bf16", "fp16")


@dataclass
class PlannedConfig(PSFTConfig):
    """PSFTConfig without the checks of whether this machine can do it: the card that is planned for is another.

    Raises:
        RecipeError: as PSFTConfig; an optimizer that transformers does not know.
    """

    def __post_init__(self) -> None:
        wanted = {name: getattr(self, name) for name in ELSEWHERE}
        try:
            wanted["optim"] = OptimizerNames(wanted["optim"])
        except ValueError:
            raise RecipeError(
                f"optim {wanted['optim']!r} is not known.", "Use adamw_torch_fused, adamw_8bit, …."
            ) from None
        self.optim, self.activation_offloading, self.bf16, self.fp16 = "adamw_torch_fused", False, None, False
        super().__post_init__()
        for name, value in wanted.items():
            setattr(self, name, value)
