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
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
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


def predicts_ahead(stored: str, config: PretrainedConfig) -> bool:
    """Whether a stored tensor belongs to the layers for multi-token prediction (MTP), which transformers does not load.

    They draft tokens in vLLM and llama.cpp. They are called `mtp`, or are numbered as further layers of the model.
    """
    if re.search(r"(^|\.)mtp", stored):
        return True
    text = config.get_text_config().to_dict()
    layer = re.search(r"(^|\.)layers\.(\d+)\.", stored)
    first = text.get("num_hidden_layers")
    return bool(layer and first and first <= int(layer[2]) < first + (text.get("num_nextn_predict_layers") or 0))


@dataclass(frozen=True)
class Part:
    """Where in a parameter that holds a matrix for each expert a stored tensor lies.

    Attributes:
        expert: whose matrix it is in; None: it is in those of all experts, which lie in one tensor.
        first_row: of the matrix's rows.
        turned: the parameter's matrices are the transposes of those that are stored.
    """

    expert: int | None = None
    first_row: int = 0
    turned: bool = False


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

    def part_of(self, stored: str, shape: tuple[int, ...], parameter: str, pattern: str | None) -> Part | None:
        """Where in a parameter of three dimensions (experts, rows, columns) a stored tensor lies.

        Args:
            stored: its name.
            shape: its shape.
            parameter, pattern: what `parameter_of` returned for it.

        Returns:
            None where the parameter has other dimensions, or is made by other steps than stacking the experts, joining
            their rows and transposing all.
        """
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        expected = tuple(self.parameters[parameter].shape)
        if len(expected) != 3:
            return None
        if pattern is None:
            return Part() if shape == expected else None
        converter = self._by_pattern[pattern]
        steps, expert, first_row, turned = list(converter.operations), None, 0, False
        if steps and type(steps[0]) is MergeModulelist and steps[0].dim == 0:
            expert = self._expert(stored, pattern)
            del steps[0]
        if steps and type(steps[0]) is Concatenate and steps[0].dim == 1:
            first_row = converter.source_patterns.index(pattern) * shape[-2]
            del steps[0]
        if steps and type(steps[0]) is Transpose and {steps[0].dim0, steps[0].dim1} == {1, 2}:
            turned = not steps.pop(0).check_dims or shape != expected
        experts, rows, columns = expected if not turned else (expected[0], expected[2], expected[1])
        own = (shape[0] if expert is None else experts, *shape[-2:])
        fits = own[0] == experts and first_row + own[1] <= rows and own[2] == columns
        return Part(expert, first_row, turned) if fits and not steps and len(converter.target_patterns) == 1 else None

    def _expert(self, stored: str, pattern: str) -> int:
        """The number that stands for the pattern's `*` in a stored tensor's name."""
        from transformers.core_model_loading import apply_renamings

        before, after = pattern.split("*.")
        return int(re.search(rf"{before}(\d+)\.{after}", apply_renamings(stored, self._renamings))[1])

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
