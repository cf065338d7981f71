"""What an adapter changes in its base: one `Change` for each parameter, its values left on disk.

PEFT itself says what a file means: its layers are put on the architecture without memory (torch's meta device), and
the ranks, the scales and the names are read off them. `AdapterFolder.base_folder` has made sure before that the file
holds exactly the tensors of these layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpsft.errors import ExportError
from qpsft.merge.base_tensors import same_values
from qpsft.merge.safetensors_stream import StoredTensor, TensorFile
from qpsft.model.adapter import POLICY
from qpsft.model.adapter_folder import PREFIX, AdapterFolder
from qpsft.model.adapter_tensors import as_peft_loads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Loaded:
    """A tensor that is made of several stored ones, in memory."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · left @ right, W being (rows, columns). With `magnitude` (rows,), DoRA: the rows' norms.

    Attributes:
        left, right: B (rows, r) and A (r, columns), as stored.
        scale: alpha / r, or alpha / √r for rsLoRA.
        transposed: the factors are stored as (r, rows) and (columns, r), as PEFT does for embeddings.
        magnitude: DoRA's, or None.
        experts: W is (experts, rows, columns), and PEFT stores the factors of all experts in two matrices:
            (rows, r · experts), an expert's columns being `experts` apart, and (experts · r, columns). `transposed`,
            they are (experts · r, rows) and (columns, r · experts).
    """

    left: StoredTensor | _Loaded
    right: StoredTensor | _Loaded
    scale: float
    transposed: bool = False
    magnitude: StoredTensor | None = None
    experts: int = 1

    def factors(self, expert: int = 0) -> tuple[Tensor, Tensor]:
        """(left (rows, r), right (r, columns) times the scale) of one expert, float32, on the CPU."""
        left, right = self.left.read().float(), self.right.read().float()
        if self.experts > 1:
            a, b = (left, right) if self.transposed else (right, left)
            a = a.view(self.experts, -1, a.shape[1])[expert]
            b = b.view(b.shape[0], -1, self.experts)[:, :, expert]
            left, right = (a, b) if self.transposed else (b, a)
        if self.transposed:
            left, right = left.T.contiguous(), right.T.contiguous()
        return left, right * self.scale


@dataclass(frozen=True)
class Change:
    """How one parameter changes: it is replaced, then a low-rank product is added, then single rows are replaced.

    Attributes:
        replacement: the whole parameter, trained (`modules_to_save`, biases).
        low_rank: the product; None where the parameter has none.
        rows: trained rows of an embedding (`trainable_token_indices`): positions and values.
        shift: for a bias: values and the factor they are added with (`lora_bias`).
    """

    replacement: StoredTensor | None = None
    low_rank: LowRank | None = None
    rows: tuple[tuple[int, ...], StoredTensor] | None = None
    shift: tuple[StoredTensor, float] | None = None


def read_changes(
    adapter: AdapterFolder, file: TensorFile, skeleton: PreTrainedModel, tied: dict[str, str]
) -> dict[str, Change]:
    """An adapter's changes to the parameters of `skeleton`, into which PEFT's layers are put, by parameter name.

    Args:
        adapter: whose `check_base` has passed the base.
        file: its weights file.
        skeleton: the base model's architecture on the meta device.
        tied: names of parameters that are another parameter, by that parameter's.

    Raises:
        ExportError: a tensor is not finite; the layer's kind cannot be merged; or the change would untie tied weights.
    """
    return _Reading(adapter, file, skeleton, tied).changes


class _Reading:
    """Collects the changes, layer by layer, then the parameters that are stored whole."""

    def __init__(self, adapter: AdapterFolder, file: TensorFile, skeleton: PreTrainedModel, tied: dict[str, str]):
        self.file, self.adapter = file, adapter
        self.parameters = set(skeleton.state_dict())
        self.changes: dict[str, Change] = {}
        self.tied_rows: set[str] = set()
        self._check_finite()
        self.model = adapter.put_layers(skeleton)
        for name, module in self.model.named_modules():
            self._layer(name.removeprefix(PREFIX), module)
        self._whole_parameters()
        self._keep_tied(tied)

    def _check_finite(self) -> None:
        for tensor in self.file.tensors.values():
            if tensor.dtype.is_floating_point and not all(torch.isfinite(p).all() for p in tensor.pieces(1 << 20)):
                raise ExportError(
                    f"{tensor.name} in {self.file.path} has values that are not finite (NaN or infinity).",
                    "Training went wrong: use an earlier checkpoint, and train with a lower learning rate.",
                )

    def _layer(self, name: str, module: nn.Module) -> None:
        from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(module, Linear):
            self._linear(name, module)
        elif isinstance(module, Embedding):
            self._embedding(name, module)
        elif isinstance(module, ParamWrapper):
            self._parameter(name, module)
        elif isinstance(module, LoraLayer):
            raise ExportError(
                f"The adapter changes {name}, a {type(module.get_base_layer()).__name__}, which qpsft does not merge.",
                "Adapt linear layers and embeddings only.",
            )
        elif isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter:
            self.tied_rows.add(f"{name}.weight")
        elif isinstance(module, TrainableTokensWrapper):
            delta = self._stored(f"{name}.token_adapter.trainable_tokens_delta")
            positions = tuple(module.token_adapter.token_indices[POLICY])
            self._change(f"{name}.weight", rows=(positions, delta))

    def _linear(self, name: str, module: nn.Module) -> None:
        left, right = self._stored(f"{name}.lora_B.weight"), self._stored(f"{name}.lora_A.weight")
        magnitude = self._stored(f"{name}.lora_magnitude_vector") if module.lora_magnitude_vector else None
        scale = module.scaling[POLICY]
        self._change(f"{name}.weight", low_rank=LowRank(left, right, scale, magnitude=magnitude))
        if module.lora_bias[POLICY]:
            if f"{name}.bias" not in self.parameters:
                raise ExportError(
                    f"The adapter adds a bias to {name} (lora_bias), which has none in the base's architecture.",
                    "Train without lora_bias, or serve the adapter beside its base.",
                )
            self._change(f"{name}.bias", shift=(self._stored(f"{name}.lora_B.bias"), scale))

    def _parameter(self, name: str, module: nn.Module) -> None:
        """A bare parameter (`target_parameters`): the experts of a mixture, or its router."""
        from transformers.pytorch_utils import Conv1D

        a, b = self._stored(f"{name}.lora_A.weight"), self._stored(f"{name}.lora_B.weight")
        base_layer = module.get_base_layer()
        stored_as_in_out = len(getattr(base_layer, module.parameter_name).shape) == 3 and getattr(
            base_layer, "is_transposed", False
        )
        transposed = stored_as_in_out or isinstance(base_layer, Conv1D)
        left, right = (a, b) if transposed else (b, a)
        low_rank = LowRank(left, right, module.scaling[POLICY], transposed, experts=module.num_experts)
        self._change(f"{name.replace('.base_layer', '')}.{module.parameter_name}", low_rank=low_rank)

    def _embedding(self, name: str, module: nn.Module) -> None:
        if module.lora_magnitude_vector:
            raise ExportError(
                f"The adapter puts DoRA on the embedding {name}, which qpsft does not merge.",
                "Use DoRA on linear layers only.",
            )
        left, right = self._stored(f"{name}.lora_embedding_A"), self._stored(f"{name}.lora_embedding_B")
        low_rank = LowRank(left, right, module.scaling[POLICY], transposed=True)
        self._change(f"{name}.weight", low_rank=low_rank)

    def _whole_parameters(self) -> None:
        """A tensor under a parameter's own name replaces it: copies of modules_to_save, biases, embeddings."""
        for key, tensor in self.file.tensors.items():
            parameter = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if parameter in self.parameters:
                self._change(parameter, replacement=tensor)

    def _stored(self, name: str) -> StoredTensor | _Loaded:
        key = PREFIX + name
        return self.file.tensors[key] if key in self.file.tensors else _Loaded(self._as_loaded[key])

    @cached_property
    def _as_loaded(self) -> dict[str, Tensor]:
        """The adapter's tensors as PEFT loads them, in memory: an older transformers had each expert by itself."""
        values = {name: tensor.read() for name, tensor in self.file.tensors.items()}
        return as_peft_loads(values, self.model, self.file.path, self.adapter.path)

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
