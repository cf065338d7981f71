"""An export's tensors by the parameters of the model they become, as transformers renames, fuses and splits them.

The experts of a mixture, for instance, lie on disk one by one, often under another name, and become one parameter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpsft.model.skeleton import build_skeleton, is_part
from qpsft.verify.exported import ExportedWeights

_BROKEN = (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError)
"""What a conversion raises when tensors are missing or have other shapes."""


@dataclass(frozen=True)
class _Source:
    """Stored tensors that become one parameter or, together, several.

    Attributes:
        names: of the stored tensors, each with the pattern of the converter that it matches.
        first: the parameter that transformers calls the conversion by.
        converter: how; None for one tensor that is the parameter as it is.
    """

    names: list[tuple[str, str]]
    first: str
    converter: Any


class ExportedParameters:
    """The tensors of an export by parameter name, each read when it is asked for.

    Attributes:
        left_over: names of stored tensors that become no parameter.
    """

    def __init__(self, weights: ExportedWeights):
        self._weights = weights
        self._skeleton = build_skeleton(weights.folder)
        self._parameters = self._skeleton.state_dict()
        self._sources: dict[str, _Source] = {}
        self._shapes: dict[str, list[int]] = {}
        self._tied: dict[str, str] = {}
        self.left_over: list[str] = []
        for source in self._group():
            self._place(source)
        for target, origin in self._skeleton.all_tied_weights_keys.items():
            for name, other in ((target, origin), (origin, target)):
                if name not in self._sources and other in self._sources:
                    self._sources[name], self._shapes[name] = self._sources[other], self._shapes[other]
                    self._tied[name] = other

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def shape_of(self, name: str) -> list[int]:
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """The parameter's dtype in the export; the export's most common one for a name it lacks."""
        source = self._sources.get(name)
        return self._weights.dtype_of(source.names[0][0] if source else name)

    def tensor(self, name: str) -> Tensor:
        """The parameter as float32 on the CPU. Raises BaseModelError when its bytes cannot be read."""
        source = self._sources[name]
        tensors = {stored: self._weights.tensor(stored) for stored, _ in source.names}
        return self._convert(source, tensors)[self._tied.get(name, name)]

    def _group(self) -> list[_Source]:
        """The stored tensors, put together as transformers does when it loads them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self._skeleton)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._skeleton.base_model_prefix
        part = is_part(self._skeleton, self._weights.folder)  # the others' tensors lie beside the language model's
        groups: dict[str, _Source] = {}
        for stored in sorted(self._weights.names(), key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._parameters)
            if name not in self._parameters and stored in self._parameters:
                name, pattern = rename_source_key(stored, [], [], prefix, self._parameters)
            if name not in self._parameters:
                if not part:
                    self.left_over.append(stored)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            groups.setdefault(name, _Source([], name, converter)).names.append((stored, pattern or stored))
        return list(groups.values())

    def _place(self, source: _Source) -> None:
        """Notes which parameters a group becomes: found by converting tensors without memory."""
        shapes = {stored: self._weights.shape_of(stored) for stored, _ in source.names}
        empty = {stored: torch.empty(shape, device="meta") for stored, shape in shapes.items()}
        try:
            made = self._convert(source, empty)
        except _BROKEN:
            return  # what it should have become is then missing from the export
        for name, tensor in made.items():
            self._sources[name], self._shapes[name] = source, list(tensor.shape)

    def _convert(self, source: _Source, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if source.converter is None:
            return {source.first: tensors[source.names[0][0]]}
        converter = copy.deepcopy(source.converter)
        for stored, pattern in source.names:
            converter.add_tensor(source.first, stored, pattern, tensors[stored])
        made = converter.convert(source.first, model=self._skeleton, config=self._skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
