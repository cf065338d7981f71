"""A model's architecture without its memory (torch's meta device), as config.json describes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qpsft.errors import BaseModelError
from qpsft.model.folder import one_line, read_config
from qpsft.model.hardware import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_skeleton(folder: Path) -> PreTrainedModel:
    """The architecture that config.json describes, unquantized, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise BaseModelError(
            f"{folder / 'config.json'} cannot be read by transformers: {one_line(error)}", "Download it again."
        ) from error


def is_part(skeleton: PreTrainedModel, folder: Path) -> bool:
    """Whether `skeleton` is one part of the model in `folder`: its language model, alone."""
    return skeleton.config.model_type != read_config(folder).get("model_type")


def dtype_named(name: str) -> torch.dtype:
    """A recorded dtype. Raises BaseModelError for a name that no weights have."""
    if name not in DTYPES:
        raise BaseModelError(
            f"The record names the dtype {name!r}, which is not known.", f"Known: {', '.join(DTYPES)}."
        )
    return DTYPES[name]
