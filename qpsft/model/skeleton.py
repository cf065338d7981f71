"""A base model known from its files alone: its architecture without memory, and what each stored tensor becomes in it.

Merging and verification never load a base to learn its names and shapes. transformers builds the architecture on
torch's meta device, where a tensor has a shape and a dtype and no values, and transformers' own rules say which stored
tensor becomes which parameter:

    model.layers.0.mlp.experts.0.up_proj.weight  ─┐
    model.layers.0.mlp.experts.1.up_proj.weight  ─┴─ converted together ──> model.layers.0.mlp.experts.gate_up_proj
    model.layers.0.mlp.gate.weight               ─── as it is ────────────> model.layers.0.mlp.gate.weight
    mtp.layers.0.mlp.gate.weight                 ─── unknown

So what is said here about a tensor is what loading it would do.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpsft.errors import BaseModelError, boundary
from qpsft.model.folder import read_config
from qpsft.model.hardware import DTYPES
from qpsft.model.remote_code import code_is_off

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_skeleton(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture that config.json describes, unquantized, on the meta device.

    Args:
        folder: a base model's; only its config.json is read.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        BaseModelError: transformers cannot build a causal LM from that config.json.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with _reading_config(folder), torch.device("meta"), code_is_off():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """config.json of a folder as transformers reads it. Raises BaseModelError when it cannot."""
    from transformers import AutoConfig

    with _reading_config(folder), code_is_off():
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _reading_config(folder: Path) -> AbstractContextManager[None]:
    return boundary(f"{folder / 'config.json'} cannot be read by transformers", BaseModelError, "Download it again.")


def is_part(skeleton: PreTrainedModel, folder: Path) -> bool:
    """Whether `skeleton` is only one part of the model in `folder`: the language model beside a vision tower."""
    return skeleton.config.model_type != read_config(folder).get("model_type")


class LoadingRules:
    """transformers' rules for loading a checkpoint: which parameter each stored tensor becomes.

    Attributes:
        parameters: the model's parameters and stored buffers by name, on the meta device, tied ones under each name.
    """

    def __init__(self, skeleton: PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(skeleton)
        self.parameters = skeleton.state_dict()
        self._prefix = skeleton.base_model_prefix
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def parameter_of(self, stored: str) -> tuple[str, str | None] | None:
        """The parameter that a stored tensor becomes, and how.

        Returns:
            (parameter's name, None) for a tensor that is the parameter as it is. (name, pattern) for one that is
            converted, together with all others of the same name, by `converter(pattern)`: fused, or split into several
            parameters of which this is the first. None where the model has no such parameter.
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self.parameters)
        if name not in self.parameters and stored in self.parameters:  # a folder that already has the new names
            name, pattern = rename_source_key(stored, [], [], self._prefix, self.parameters)
        return (name, pattern) if name in self.parameters else None

    def converter(self, pattern: str) -> Any:
        """A new transformers `WeightConverter` for a pattern that `parameter_of` gave; it collects tensors."""
        return copy.deepcopy(self._by_pattern[pattern])


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a record names. Raises BaseModelError for a name that no weights have."""
    if name not in DTYPES:
        raise BaseModelError(
            f"The record names the dtype {name!r}, which is not known.", f"Known: {', '.join(DTYPES)}."
        )
    return DTYPES[name]
