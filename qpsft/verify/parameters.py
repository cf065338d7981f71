"""An export's tensors by the parameters of the model they become, as transformers renames, fuses and splits them.

The experts of a mixture, for instance, lie on disk one by one, often under another name, and become one parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpsft.model.skeleton import LoadingRules, build_skeleton, is_part, predicts_ahead
from qpsft.verify.exported import ExportedWeights

_CONVERSION_ERRORS = (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError)
"""What a conversion raises when tensors are missing or have other shapes."""


@dataclass(frozen=True)
class _Source:
    """Stored tensors that become one parameter or, together, several.

    Attributes:
        tensors: names of the stored tensors, each with the converter's pattern that it matches.
        parameter: the first parameter that they become.
        pattern: of the conversion (`LoadingRules.parameter_of`); None for one tensor that is the parameter as it is.
    """

    tensors: list[tuple[str, str]]
    parameter: str
    pattern: str | None


class ExportedParameters:
    """The tensors of an export by parameter name, each read when it is asked for.

    Attributes:
        left_over: names of stored tensors that become no parameter.
    """

    def __init__(self, weights: ExportedWeights):
        self._weights = weights
        self._skeleton = build_skeleton(weights.folder)
        self._rules = LoadingRules(self._skeleton)
        self._sources: dict[str, _Source] = {}
        self._shapes: dict[str, list[int]] = {}
        self._tied: dict[str, str] = {}
        self.left_over: list[str] = []
        for source in self._group():
            self._place(source)
        self._tie()

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def shape_of(self, name: str) -> list[int]:
        """The parameter's shape."""
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """The parameter's dtype in the export; the export's most common one for a name it lacks."""
        source = self._sources.get(name)
        return self._weights.dtype_of(source.tensors[0][0] if source else name)

    def tensor(self, name: str) -> Tensor:
        """The parameter as float32 on the CPU. Raises BaseModelError when its bytes cannot be read."""
        source = self._sources[name]
        tensors = {stored: self._weights.tensor(stored) for stored, _ in source.tensors}
        return self._convert(source, tensors)[self._tied.get(name, name)]

    def _group(self) -> list[_Source]:
        """The stored tensors, put together as transformers does when it loads them."""
        from transformers.core_model_loading import dot_natural_key

        part = is_part(self._skeleton, self._weights.folder)  # the other parts' tensors are no parameters of ours
        groups: dict[str, _Source] = {}
        for stored in sorted(self._weights.names(), key=dot_natural_key):  # experts in the order of their numbers
            place = self._rules.parameter_of(stored)
            if place is not None:
                name, pattern = place
                groups.setdefault(name, _Source([], name, pattern)).tensors.append((stored, pattern or stored))
            elif not part and not predicts_ahead(stored, self._skeleton.config):
                self.left_over.append(stored)
        return list(groups.values())

    def _place(self, source: _Source) -> None:
        """Notes which parameters a group becomes, by converting tensors without memory."""
        shapes = {stored: self._weights.shape_of(stored) for stored, _ in source.tensors}
        empty = {stored: torch.empty(shape, device="meta") for stored, shape in shapes.items()}
        try:
            parameters = self._convert(source, empty)
        except _CONVERSION_ERRORS:
            return  # the parameters that it should have become are then missing from the export
        for name, tensor in parameters.items():
            self._sources[name], self._shapes[name] = source, list(tensor.shape)

    def _convert(self, source: _Source, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that a group's tensors become, by name."""
        if source.pattern is None:
            return {source.parameter: tensors[source.tensors[0][0]]}
        converter = self._rules.converter(source.pattern)
        for stored, pattern in source.tensors:
            converter.add_tensor(source.parameter, stored, pattern, tensors[stored])
        parameters = converter.convert(source.parameter, model=self._skeleton, config=self._skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}

    def _tie(self) -> None:
        """A tied parameter is stored once, under either name."""
        for target, origin in self._skeleton.all_tied_weights_keys.items():
            for name, other in ((target, origin), (origin, target)):
                if name not in self._sources and other in self._sources:
                    self._sources[name], self._shapes[name] = self._sources[other], self._shapes[other]
                    self._tied[name] = other
