"""The base model's tensors on disk, and what each of them is in the trained model: without loading the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qpsft.errors import BaseModelError, ExportError
from qpsft.merge.rounding import quant_state
from qpsft.merge.safetensors_stream import StoredTensor, TensorFile
from qpsft.model.base_record import BaseRecord
from qpsft.model.folder import weight_files
from qpsft.model.skeleton import LoadingRules, Part, build_skeleton, is_part, predicts_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the merged checkpoint, and where it comes from.

    Attributes:
        name: in the merged checkpoint, and in the base's (but see `open_base` on tied embeddings).
        stored: the tensor in the base's file.
        parameter: the parameter of the trained model that it is, or is a `part` of; None where transformers fuses or
            splits it otherwise while loading.
        fused_into: the parameter it then goes into. A tensor with neither is `carried`.
        shape: of the values; a quantized tensor is stored in another.
        rounded: the trained model holds it in 4 bits.
        transposed: stored as (in, out), the layer being a Conv1D; the trained model quantizes the transpose.
        state: what is stored beside a weight that is quantized on disk, by the ends of the names.
        part: where it lies in a parameter of three dimensions; None for any other.
    """

    name: str
    stored: StoredTensor
    parameter: str | None
    fused_into: str | None
    shape: tuple[int, ...]
    rounded: bool
    transposed: bool
    state: dict[str, StoredTensor] = field(default_factory=dict)
    part: Part | None = None

    @property
    def carried(self) -> bool:
        """Whether training did not load it, and it is copied: a vision tower's beside a language model that was trained
        alone, or that of a layer for multi-token prediction."""
        return self.parameter is None and self.fused_into is None


@dataclass
class BaseTensors:
    """A base model's folder, opened.

    Attributes:
        skeleton: the trained model's architecture on the meta device.
        tensors: in the order they lie on the disk.
        left_out: names in the folder that the trained model does not have.
        tied: names of parameters that are another parameter, by that parameter's.
    """

    folder: Path
    skeleton: PreTrainedModel
    tensors: list[BaseTensor]
    left_out: list[str]
    tied: dict[str, str]

    @property
    def predicts_ahead(self) -> bool:
        """Whether layers for multi-token prediction are among the tensors."""
        return any(t.carried and predicts_ahead(t.name, self.skeleton.config) for t in self.tensors)

    def dtype_of(self, parameter: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a model loaded in `dtype` holds a parameter: some architectures keep some in float32."""
        from transformers.core_model_loading import build_glob_alternation

        kept: set[str] = set()
        if dtype == torch.float16:
            kept |= set(self.skeleton._keep_in_fp32_modules or ())
        if dtype in (torch.float16, torch.bfloat16):
            kept |= set(self.skeleton._keep_in_fp32_modules_strict or ())
        if kept and build_glob_alternation(sorted(kept))[0].search(parameter):
            return torch.float32
        return dtype


@contextmanager
def open_base(folder: Path, record: BaseRecord | None) -> Iterator[BaseTensors]:
    """Opens a base model's folder that `qpsft.model.folder.check_folder` has passed.

    Args:
        record: how training rounded it; None if that does not matter (merging onto the original weights).

    Yields:
        The tensors. Of tied embeddings there is one, under the embedding's name, whatever the folder calls it.

    Raises:
        BaseModelError: a file is broken, or the weights are not those of the architecture in config.json.
        ExportError: a rounded weight is fused or split while loading, or tied weights differ.
    """
    files = [TensorFile(folder / name) for name in weight_files(folder)]
    try:
        stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
        yield _Mapping(folder, record, stored).result()
    finally:
        for file in files:
            file.close()


class _Mapping:
    """Works out `BaseTensors` from the stored tensors."""

    def __init__(self, folder: Path, record: BaseRecord | None, stored: dict[str, StoredTensor]):
        from transformers.pytorch_utils import Conv1D

        self.folder, self.record, self.stored = folder, record, stored
        self.skeleton = build_skeleton(folder)
        self.rules = LoadingRules(self.skeleton)
        self.parameters = self.rules.parameters
        modules = dict(self.skeleton.named_modules())
        self.conv1d = {name for name, module in modules.items() if isinstance(module, Conv1D)}
        linear = {name for name, module in modules.items() if type(module) is nn.Linear}
        quantizing = record is not None and record.quantization != "none"
        self.rounded = (linear | self.conv1d) - set(record.unquantized_modules) if quantizing else set()

    def result(self) -> BaseTensors:
        """All tensors, tied ones once, and whatever else is in the folder. Raises as `open_base`."""
        states = self._quantization_states()
        beside = {tensor.name for state in states.values() for tensor in state.values()}
        tensors, left_out, part = [], [], is_part(self.skeleton, self.folder)
        for name, stored in self.stored.items():
            if name in beside:
                continue
            tensor = self._tensor(stored, states.get(name, {}))
            if tensor is None and (part or predicts_ahead(name, self.skeleton.config)):
                state = states.get(name, {})
                shape = tuple(quant_state(state).shape) if state else stored.shape
                tensors.append(BaseTensor(name, stored, None, None, shape, bool(state), False, state))
            elif tensor is None:
                left_out.append(name)
            else:
                tensors.append(tensor)
        tied = dict(self.skeleton.all_tied_weights_keys)
        tensors = self._tie(tensors, tied)
        self._check_complete(tensors, tied)
        return BaseTensors(self.folder, self.skeleton, tensors, left_out, tied)

    def _quantization_states(self) -> dict[str, dict[str, StoredTensor]]:
        """What bitsandbytes stores beside a quantized weight, by the weight's name."""
        states: dict[str, dict[str, StoredTensor]] = {}
        for key, tensor in self.stored.items():
            module, dot, end = key.rpartition(".weight.")
            if dot:
                states.setdefault(f"{module}.weight", {})[end] = tensor
        return {name: state for name, state in states.items() if name in self.stored}

    def _tensor(self, stored: StoredTensor, state: dict[str, StoredTensor]) -> BaseTensor | None:
        """The tensor of the merged checkpoint that a stored one becomes; None where the trained model lacks it."""
        place = self.rules.parameter_of(stored.name)
        if place is None:
            return None
        parameter, conversion = place
        module, _, kind = parameter.rpartition(".")
        rounded = bool(state) or (module in self.rounded and kind == "weight")
        part = self.rules.part_of(stored.name, stored.shape, parameter, conversion)
        if part is not None and not rounded:
            return BaseTensor(stored.name, stored, parameter, None, stored.shape, False, False, part=part)
        if conversion is not None:
            if rounded:
                raise self._rounded_after_conversion(stored, parameter)
            return BaseTensor(stored.name, stored, None, parameter, stored.shape, False, False)
        transposed = module in self.conv1d
        shape = stored.shape
        if state:
            shape = tuple(quant_state(state).shape)
            shape = shape[::-1] if transposed else shape
        expected = tuple(self.parameters[parameter].shape)
        if shape != expected:
            raise BaseModelError(
                f"{stored.file.path} holds {stored.name} with shape {shape}; the architecture in config.json has "
                f"{expected} there.",
                "config.json and the weights belong to different models: download both again.",
            )
        return BaseTensor(stored.name, stored, parameter, None, shape, rounded, transposed, state)

    def _rounded_after_conversion(self, stored: StoredTensor, parameter: str) -> ExportError:
        return ExportError(
            f"transformers fuses or splits {stored.name} of {self.folder} while loading, and training rounded the "
            f"result ({parameter}) to {self.record.quantization}: that rounding cannot be repeated tensor by tensor.",
            "Merge onto the original weights, or load and save the base once with this transformers.",
        )

    def _tie(self, tensors: list[BaseTensor], tied: dict[str, str]) -> list[BaseTensor]:
        """Keeps one tensor of each tied pair, under the name of the one that the other is tied to."""
        by_parameter = {tensor.parameter: tensor for tensor in tensors}
        for target, source in tied.items():
            if target not in by_parameter:
                continue
            extra = by_parameter[target]
            position = tensors.index(extra)
            if source not in by_parameter:
                tensors[position] = BaseTensor(source, extra.stored, source, None, extra.shape, False, False)
                by_parameter[source] = tensors[position]
                continue
            if not same_values(extra.stored, by_parameter[source].stored):
                raise ExportError(
                    f"config.json of {self.folder} ties {target} to {source}, and the folder holds both, with "
                    "different values.",
                    "Set tie_word_embeddings to false in its config.json and train again, or remove the wrong one.",
                )
            del tensors[position]
        return tensors

    def _check_complete(self, tensors: list[BaseTensor], tied: dict[str, str]) -> None:
        if any(tensor.fused_into for tensor in tensors):
            return  # one stored tensor can become several parameters, and only loading tells which
        there = Counter()
        for tensor in tensors:
            there[tensor.parameter] += math.prod(tensor.shape)
        missing = {name for name, values in self.parameters.items() if there[name] < values.numel()} - set(tied)
        if missing:
            raise BaseModelError(
                f"{self.folder} lacks {len(missing)} of the model's {len(self.parameters)} tensors, such as "
                f"{min(missing)}.",
                "Copy or download its weights again.",
            )


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same shape and the same values."""
    if one.shape != other.shape:
        return False
    pieces = zip(one.pieces(1 << 20), other.pieces(1 << 20), strict=True)
    return all(torch.equal(first, second) for first, second in pieces)
