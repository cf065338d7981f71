"""All weights of the merged model: what each of them is made from, and the files they are written into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from qpsft.errors import ExportError
from qpsft.files import check_space
from qpsft.merge.adapter_file import Change
from qpsft.merge.base_tensors import BaseTensor, BaseTensors
from qpsft.merge.model_files import write_json
from qpsft.merge.rounding import Rounding
from qpsft.merge.safetensors_stream import ShardWriter, TensorSpec, plan_shards, shard_index
from qpsft.merge.tensor import MergedTensor
from qpsft.model.base_record import BaseRecord
from qpsft.model.skeleton import dtype_named

_SMALL_FILES = 50_000_000  # tokenizer, card, report: what the disk must have room for beside the weights


class MergedWeights:
    """The tensors to write, in the order they lie in the base's files.

    Args:
        base: the base's tensors.
        changes: the adapter's, by parameter name.
        record: how the live model rounds its base; None merges onto the original weights.
        dtype: to write.

    Attributes:
        specs: name, dtype and shape of each tensor.

    Raises:
        ExportError: the adapter changes a parameter that no single tensor in the base's folder is.
    """

    def __init__(self, base: BaseTensors, changes: dict[str, Change], record: BaseRecord | None, dtype: torch.dtype):
        self._base, self._changes = base, changes
        self._live_dtype = dtype_named(record.compute_dtype) if record else None
        self._rounding = _rounding(record)
        self._tensors = {tensor.name: tensor for tensor in base.tensors}
        self.specs = [TensorSpec(t.name, self._output_dtype(t, dtype), t.shape) for t in base.tensors]
        self._check_no_change_is_lost()

    @property
    def nbytes(self) -> int:
        """Of all weights written."""
        return sum(spec.nbytes for spec in self.specs)

    def write(self, folder: Path, shard_bytes: int, show_progress: bool) -> None:
        """Writes the shards, each at most `shard_bytes` large or one tensor, and their index.

        Raises:
            OutputError: the disk has not enough space.
            ExportError: a merged value is not finite.
        """
        shards = plan_shards(self.specs, shard_bytes)
        check_space(folder, self.nbytes + _SMALL_FILES, "The merged model")
        disable = None if show_progress else True
        with tqdm(total=self.nbytes, unit="B", unit_scale=True, desc="merging", disable=disable, leave=False) as bar:
            for file, specs in shards.items():
                writer = ShardWriter(folder / file, specs)
                try:
                    for spec in specs:
                        for piece in self._merged(spec):
                            bar.update(writer.write(piece))
                except BaseException:
                    writer.abandon()
                    raise
                writer.close()
        if len(shards) > 1:
            write_json(folder / "model.safetensors.index.json", shard_index(shards))

    def _merged(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        tensor = self._tensors[spec.name]
        plain_dtype = None
        if self._live_dtype and not tensor.carried:
            plain_dtype = self._base.dtype_of(tensor.parameter or tensor.fused_into, self._live_dtype)
        change = self._changes.get(tensor.parameter)
        return MergedTensor(tensor, change, rounding=self._rounding, plain_dtype=plain_dtype, dtype=spec.dtype).pieces()

    def _output_dtype(self, tensor: BaseTensor, dtype: torch.dtype) -> torch.dtype:
        if tensor.carried or (not tensor.stored.dtype.is_floating_point and not tensor.state):
            return tensor.stored.dtype
        return self._base.dtype_of(tensor.parameter or tensor.fused_into, dtype)

    def _check_no_change_is_lost(self) -> None:
        missing = set(self._changes) - {tensor.parameter for tensor in self._base.tensors}
        if missing:
            fused = any(tensor.fused_into for tensor in self._base.tensors)
            raise ExportError(
                f"The adapter changes {min(missing)}, and no single tensor in {self._base.folder} is that parameter"
                f"{': transformers fuses or splits it while loading' if fused else ''}.",
                "Load the base once with this version of transformers, save it, and give the new folder with --base; "
                "or serve the adapter beside its base.",
            )


def _rounding(record: BaseRecord | None) -> Rounding | None:
    if record is None or record.quantization == "none":
        return None
    return Rounding(
        kind=record.quantization,
        double_quant=record.double_quant,
        block_size=record.block_size,
        weights_dtype=dtype_named(record.weights_dtype),
        compute_dtype=dtype_named(record.compute_dtype),
        quantized_on=record.quantized_on or "cpu",
    )
