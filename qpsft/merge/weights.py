"""All weights of the merged model: what each is made from, in pieces small enough for any memory, and their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qpsft.errors import ExportError
from qpsft.files import check_space
from qpsft.merge.adapter_file import Change
from qpsft.merge.base_tensors import BaseTensor, BaseTensors
from qpsft.merge.model_files import write_json
from qpsft.merge.rounding import PIECE, PlainWeight, RoundedWeight, Rounding, StoredRoundedWeight, Weight
from qpsft.merge.safetensors_stream import ShardWriter, StoredTensor, TensorSpec, plan_shards, shard_index
from qpsft.model.base_record import BaseRecord
from qpsft.model.skeleton import Part, dtype_named

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

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Writes the shards, each at most `shard_bytes` large or one tensor, and their index.

        Raises:
            OutputError: the disk has not enough space.
            ExportError: a merged value is not finite.
        """
        shards = plan_shards(self.specs, shard_bytes)
        check_space(folder, self.nbytes + _SMALL_FILES, "The merged model")
        with tqdm(total=self.nbytes, unit="B", unit_scale=True, desc="merging", disable=None, leave=False) as bar:
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
        if not tensor.state and (tensor.carried or not tensor.stored.dtype.is_floating_point):
            return tensor.stored.dtype
        if tensor.carried:
            return dtype
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


class MergedTensor:
    """A tensor of the base and what the adapter changes in it; `pieces` yields the result.

    Args:
        tensor: the base's.
        change: the adapter's, or None.
        rounding: how the live model rounds; None merges onto the original weights.
        plain_dtype: what the live model holds this tensor in if it does not round it; None leaves it as stored.
        dtype: of the result.
    """

    def __init__(
        self,
        tensor: BaseTensor,
        change: Change | None,
        *,
        rounding: Rounding | None,
        plain_dtype: torch.dtype | None,
        dtype: torch.dtype,
    ):
        self.tensor, self.change, self.dtype = tensor, change or Change(), dtype
        self._rounding, self._plain_dtype = rounding, plain_dtype
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        self.rows, self.columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        self.experts: Iterable[int] = (0,)  # whose matrices lie in it, one after the other
        if tensor.part is not None:
            self.rows, self.columns = shape[-2:]
            self.experts = range(shape[0]) if tensor.part.expert is None else (tensor.part.expert,)

    def pieces(self) -> Iterator[Tensor]:
        """The values in `dtype`, flattened, in order.

        Raises:
            ExportError: a value is not finite, or too large for `dtype`.
        """
        if not self.tensor.stored.dtype.is_floating_point and not self.tensor.state:
            yield from self.tensor.stored.pieces(PIECE)
        elif (
            self.change == Change()
            and not self.tensor.rounded
            and self._plain_dtype in (None, self.dtype)
            and (self.tensor.stored.dtype == self.dtype)
        ):
            yield from self.tensor.stored.pieces(PIECE)
        elif self.tensor.transposed:
            values = torch.cat(list(self._computed()))
            yield values.view(self.rows, self.columns).T.contiguous().view(-1)
        else:
            yield from self._computed()

    def _computed(self) -> Iterator[Tensor]:
        weight = self._weight()
        low_rank = self.change.low_rank
        magnitude = low_rank.magnitude.read().float().view(-1) if low_rank and low_rank.magnitude else None
        rows = self._rows_per_piece()
        for place, expert in enumerate(self.experts):
            factors = self._factors(expert)
            for first in range(0, self.rows, rows):
                last = min(first + rows, self.rows)
                start, stop = ((place * self.rows + row) * self.columns for row in (first, last))
                values = weight.values(start, stop)
                if factors is not None:
                    values = values + (factors[0][first:last] @ factors[1]).view(-1)
                if magnitude is not None:
                    matrix = values.view(last - first, self.columns)
                    matrix *= (magnitude[first:last] / torch.linalg.vector_norm(matrix, dim=1)).unsqueeze(1)
                self._change_values(values.view(last - first, self.columns), first)
                yield self._to_dtype(values)

    def _factors(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """The low-rank update (rows, r) @ (r, columns) of an expert's matrix, or of the only one."""
        if self.change.low_rank is None:
            return None
        left, right = self.change.low_rank.factors(expert)
        part = self.tensor.part or Part()
        if part.turned:
            left, right = right.T, left.T
        return left[part.first_row : part.first_row + self.rows], right

    def _weight(self) -> Weight:
        tensor, rounding, replacement = self.tensor, self._rounding, self.change.replacement
        if replacement is not None:
            return PlainWeight(self._own_part(replacement), None)
        if rounding is None or not tensor.rounded:
            return PlainWeight(self._flat(tensor.stored), self._plain_dtype)
        if tensor.state:
            return StoredRoundedWeight(tensor.stored, tensor.state, rounding.compute_dtype)
        return RoundedWeight(self._flat(tensor.stored), self.rows * self.columns, rounding)

    def _flat(self, stored: StoredTensor) -> Callable[[int, int], Tensor]:
        """A function that reads a tensor by flat position. A transposed one is read as a whole and turned first."""
        if not self.tensor.transposed:
            return stored.read
        values = stored.read().T.contiguous().view(-1)
        return lambda start, stop: values[start:stop]

    def _own_part(self, parameter: StoredTensor) -> Callable[[int, int], Tensor]:
        """A function that reads by flat position what this tensor holds of a whole parameter."""
        part = self.tensor.part
        if part in (None, Part()):
            return self._flat(parameter)
        size = math.prod(parameter.shape[1:])
        matrices = [parameter.read(n * size, (n + 1) * size).view(parameter.shape[1:]) for n in self.experts]
        matrices = [matrix.T if part.turned else matrix for matrix in matrices]
        values = torch.cat([matrix[part.first_row : part.first_row + self.rows].reshape(-1) for matrix in matrices])
        return lambda start, stop: values[start:stop]

    def _rows_per_piece(self) -> int:
        """As many rows as `PIECE` weights have, but such that each piece starts with a block of the quantization.

        Blocks have an even number of weights, so a piece also starts with a byte of codes.
        """
        block = self._rounding.block_size if self._rounding else 0
        together = block // math.gcd(self.columns, block) if block else 1
        return max(PIECE // self.columns // together, 1) * together

    def _change_values(self, values: Tensor, first: int) -> None:
        """Writes trained rows into `values` (rows from `first` on, columns), and adds a bias's shift to it."""
        if self.change.rows is not None:
            positions, trained = self.change.rows
            for number, position in enumerate(positions):
                if first <= position < first + values.shape[0]:
                    values[position - first] = trained.read(number * self.columns, (number + 1) * self.columns)
        if self.change.shift is not None:
            shift, scale = self.change.shift
            values += shift.read().float() * scale

    def _to_dtype(self, values: Tensor) -> Tensor:
        least, greatest = torch.aminmax(values)
        largest = max(-float(least), float(greatest))
        if math.isnan(largest) or largest > torch.finfo(self.dtype).max:
            name = self.tensor.name
            if math.isfinite(largest):
                raise ExportError(
                    f"{name} has a value of {largest:.4g} after merging, too large for {self.dtype}.",
                    "Merge to bfloat16 or float32.",
                )
            raise ExportError(
                f"{name} has values that are not finite (NaN or infinity) after merging; the adapter's are finite.",
                f"The base in {self.tensor.stored.file.path} has them, or they overflow: use an undamaged copy.",
            )
        return values.to(self.dtype)
