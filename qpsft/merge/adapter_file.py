"""What an adapter's folder changes in its base: one `Change` for each parameter, its values left on disk.

PEFT itself says what a file means: its layers are put on the architecture without memory (torch's meta device), and
the ranks, the scales, the names and the shapes are read off them. Every tensor in the file must be used and every layer
must find its tensors; anything else is an error that names it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpsft.errors import BaseModelError, ExportError
from qpsft.merge.base_tensors import same_values
from qpsft.merge.safetensors_stream import StoredTensor, TensorFile
from qpsft.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_weights, read_adapter_config
from qpsft.model.folder import one_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · left @ right, W being (rows, columns). With `magnitude` (rows,), DoRA: the rows' norms.

    Attributes:
        transposed: the factors are stored as (r, rows) and (columns, r), as PEFT does for embeddings.
    """

    left: StoredTensor
    right: StoredTensor
    scale: float
    transposed: bool = False
    magnitude: StoredTensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left (rows, r), right (r, columns) times the scale), float32, on the CPU."""
        left, right = self.left.read().float(), self.right.read().float()
        if self.transposed:
            left, right = left.T.contiguous(), right.T.contiguous()
        return left, right * self.scale


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter: replaced, then a low-rank product added, then single rows replaced.

    Attributes:
        replacement: the whole parameter, trained (`modules_to_save`, biases).
        rows: trained rows of an embedding (`trainable_token_indices`): positions and values.
        shift: for a bias: values and the factor they are added with (`lora_bias`).
    """

    replacement: StoredTensor | None = None
    low_rank: LowRank | None = None
    rows: tuple[tuple[int, ...], StoredTensor] | None = None
    shift: tuple[StoredTensor, float] | None = None


@dataclass
class Adapter:
    """An adapter's folder, opened: PEFT's config and the changes by parameter name."""

    folder: Path
    config: LoraConfig
    file: TensorFile

    def changes(self, skeleton: PreTrainedModel, tied: dict[str, str]) -> dict[str, Change]:
        """The changes to the parameters of `skeleton`, into which PEFT's layers are put.

        Args:
            skeleton: the base model's architecture on the meta device.
            tied: names of parameters that are another parameter, by that parameter's.

        Raises:
            BaseModelError: the adapter is for another base: layers or shapes differ.
            ExportError: a tensor is unused, missing or not finite; the layer's kind cannot be merged; or the change
                would untie tied weights.
        """
        return _Reading(self, skeleton, tied).changes


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """Opens an adapter's folder. Raises as `read_adapter_config`, and for a missing or broken weights file."""
    config = read_adapter_config(folder)
    check_weights(folder)
    with TensorFile(folder / ADAPTER_WEIGHTS) as file:
        yield Adapter(folder, config, file)


class _Reading:
    """Collects the changes; every tensor of the file that is used is struck off `left`."""

    def __init__(self, adapter: Adapter, skeleton: PreTrainedModel, tied: dict[str, str]):
        self.adapter = adapter
        self.path = adapter.file.path
        self.shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self.left = dict(adapter.file.tensors)
        self.changes: dict[str, Change] = {}
        self.tied_rows: set[str] = set()
        self._check_finite()
        model = self._put_on(skeleton)
        for name, module in model.named_modules():
            self._layer(name.removeprefix(PREFIX), module)
        self._whole_parameters()
        self._wrapped(model)
        if self.left:
            raise ExportError(
                f"{len(self.left)} of the tensors in {self.path} belong to no layer of the base, such as "
                f"{min(self.left)}.",
                "The adapter is for another base, or for another version of transformers or peft: use those it was "
                "trained with.",
            )
        self._keep_tied(tied)

    def _check_finite(self) -> None:
        for tensor in self.left.values():
            if tensor.dtype.is_floating_point and not all(torch.isfinite(p).all() for p in tensor.pieces(1 << 20)):
                raise ExportError(
                    f"{tensor.name} in {self.path} has values that are not finite (NaN or infinity).",
                    "Training went wrong: use an earlier checkpoint, and train with a lower learning rate.",
                )

    def _put_on(self, skeleton: PreTrainedModel) -> nn.Module:
        from peft import get_peft_model

        config = copy.copy(self.adapter.config)
        config.init_lora_weights = False  # there are no values to initialise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return get_peft_model(skeleton, config, low_cpu_mem_usage=True)
            except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
                raise BaseModelError(
                    f"The adapter in {self.adapter.folder} does not fit the base, a {type(skeleton).__name__}: "
                    f"{one_line(error)}",
                    "Give the base it was trained on.",
                ) from error

    def _layer(self, name: str, module: nn.Module) -> None:
        from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(module, Linear):
            self._linear(name, module)
        elif isinstance(module, Embedding):
            self._embedding(name, module)
        elif isinstance(module, ParamWrapper):
            parameter = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            raise ExportError(
                f"The adapter changes {parameter} as a bare parameter (target_parameters), such as the experts of a "
                "mixture; qpsft does not merge those.",
                "Serve the adapter beside its base, or train without target_parameters.",
            )
        elif isinstance(module, LoraLayer):
            raise ExportError(
                f"The adapter changes {name}, a {type(module.get_base_layer()).__name__}, which qpsft does not merge.",
                "Adapt linear layers and embeddings only.",
            )
        elif isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter:
            self.tied_rows.add(f"{name}.weight")
        elif isinstance(module, TrainableTokensWrapper):
            delta = self._take(f"{name}.token_adapter.trainable_tokens_delta")
            positions = tuple(module.token_adapter.token_indices["default"])
            self._change(f"{name}.weight", rows=(positions, delta))

    def _linear(self, name: str, module: nn.Module) -> None:
        left = self._take(f"{name}.lora_B.weight", module.lora_B["default"].weight)
        right = self._take(f"{name}.lora_A.weight", module.lora_A["default"].weight)
        magnitude = self._take(f"{name}.lora_magnitude_vector") if module.lora_magnitude_vector else None
        scale = module.scaling["default"]
        self._change(f"{name}.weight", low_rank=LowRank(left, right, scale, magnitude=magnitude))
        if module.lora_bias["default"]:
            if f"{name}.bias" not in self.shapes:
                raise ExportError(
                    f"The adapter adds a bias to {name} (lora_bias), which has none in the base's architecture.",
                    "Train without lora_bias, or serve the adapter beside its base.",
                )
            self._change(f"{name}.bias", shift=(self._take(f"{name}.lora_B.bias"), scale))

    def _embedding(self, name: str, module: nn.Module) -> None:
        if module.lora_magnitude_vector:
            raise ExportError(
                f"The adapter puts DoRA on the embedding {name}, which qpsft does not merge.",
                "Use DoRA on linear layers only.",
            )
        left = self._take(f"{name}.lora_embedding_A", module.lora_embedding_A["default"])
        right = self._take(f"{name}.lora_embedding_B", module.lora_embedding_B["default"])
        low_rank = LowRank(left, right, module.scaling["default"], transposed=True)
        self._change(f"{name}.weight", low_rank=low_rank)

    def _whole_parameters(self) -> None:
        """What is left under a parameter's own name replaces it: copies of modules_to_save, biases, embeddings."""
        for key, tensor in list(self.left.items()):
            parameter = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if parameter not in self.shapes:
                continue
            if tensor.shape != self.shapes[parameter]:
                raise BaseModelError(
                    f"{key} in {self.path} has shape {tensor.shape}, and the base's {parameter} has "
                    f"{self.shapes[parameter]}.",
                    "The adapter is for another base, or the vocabulary was resized: give the base it was trained on.",
                )
            self._change(parameter, replacement=tensor)
            del self.left[key]

    def _wrapped(self, model: nn.Module) -> None:
        """Copies of modules_to_save are complete; a copy that is tied to another stands for both."""
        from peft.utils.other import ModulesToSaveWrapper

        first: dict[int, str] = {}
        absent = []
        for name, module in model.named_modules():
            if not isinstance(module, ModulesToSaveWrapper):
                continue
            for end, tensor in module.modules_to_save["default"].named_parameters():
                parameter = f"{name.removeprefix(PREFIX)}.{end}"
                if parameter in self.changes and self.changes[parameter].replacement is not None:
                    first.setdefault(id(tensor), parameter)
                else:
                    absent.append((parameter, id(tensor)))
        for parameter, identity in absent:
            if identity not in first:
                raise self._missing(PREFIX + parameter)
            self.changes[parameter] = self.changes[first[identity]]

    def _take(self, key: str, like: Tensor | None = None) -> StoredTensor:
        tensor = self.left.pop(PREFIX + key, None)
        if tensor is None:
            raise self._missing(PREFIX + key)
        if like is not None and tensor.shape != tuple(like.shape):
            raise BaseModelError(
                f"{tensor.name} in {self.path} has shape {tensor.shape}; on this base, with the rank in "
                f"{ADAPTER_CONFIG}, it would have {tuple(like.shape)}.",
                "The adapter is for another base: give the one it was trained on.",
            )
        return tensor

    def _missing(self, key: str) -> ExportError:
        return ExportError(
            f"{self.path} lacks {key}, which its {ADAPTER_CONFIG} calls for on this base.",
            "The adapter is for another base, or its file is incomplete: copy it again.",
        )

    def _change(self, parameter: str, **what) -> None:
        self.changes[parameter] = replace(self.changes.get(parameter, Change()), **what)

    def _keep_tied(self, tied: dict[str, str]) -> None:
        for target, source in tied.items():
            one, other = self.changes.pop(target, None), self.changes.get(source)
            if target in self.tied_rows:
                continue
            if one != other and not (one and other and _same_change(one, other)):
                only = target if one else source
                raise ExportError(
                    f"The base ties {target} to {source}, and the adapter changes {only} alone or each differently: "
                    "merged, they would be two matrices.",
                    "Train with PEFT's ensure_weight_tying, or leave embeddings and LM head out.",
                )


def _same_change(one: Change, other: Change) -> bool:
    if one.replacement and other.replacement and one.low_rank is other.low_rank is None and one.rows == other.rows:
        return same_values(one.replacement, other.replacement)
    if one.low_rank and other.low_rank and one.replacement is other.replacement is None and one.rows == other.rows:
        pairs = zip(one.low_rank.factors(), other.low_rank.factors(), strict=True)
        return all(torch.equal(first, second) for first, second in pairs)
    return False
