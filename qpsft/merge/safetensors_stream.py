"""Safetensors files read and written piece by piece, so that no tensor need be in memory as a whole.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; a JSON header
with dtype, shape and offsets of each tensor; then the tensors' bytes, one after the other. Files are read into small
buffers, not mapped: once read, the pages of a mapped file count as this process's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qpsft.errors import BaseModelError, ExportError
from qpsft.files import sync

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


class TensorFile:
    """A safetensors file opened for reading: `file[name]` is a `StoredTensor`, in the file's own order.

    Raises:
        BaseModelError: the file is missing, truncated, not safetensors, or holds a dtype that is not in `DTYPES`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise BaseModelError(f"{path} cannot be opened: {error.strerror}.", "Copy or download it again.") from error
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise self._broken(f"its header's length reads {length:,} in a file of {size:,} bytes")
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            tensors = [self._stored(name, entry, 8 + length) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(f"its header cannot be read: {error}") from error
        tensors.sort(key=lambda tensor: tensor.offset)
        end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
        if end != size:
            raise self._broken(f"it should have {end:,} bytes and has {size:,}")
        return {tensor.name: tensor for tensor in tensors}

    def _stored(self, name: str, entry: dict, start: int) -> StoredTensor:
        if entry["dtype"] not in DTYPES:
            raise BaseModelError(
                f"{self.path} stores {name} as {entry['dtype']}, which cannot be merged.",
                "Use the 16-bit model this one was made from.",
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has shape {shape} and {end - begin} bytes")
        return StoredTensor(self, name, dtype, shape, start + begin)

    def _broken(self, what: str) -> BaseModelError:
        return BaseModelError(
            f"{self.path} is truncated or not a safetensors file: {what}.",
            "Copy or download it again and compare its size or checksum with the source.",
        )

    def read_into(self, buffer: Tensor, offset: int) -> None:
        """Fills `buffer` (1-D uint8) with the file's bytes from `offset` on."""
        view = memoryview(buffer.numpy())
        self._file.seek(offset)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise self._broken(f"it ends at byte {offset + done:,}, in the middle of a tensor")
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says, and its values on demand.

    Attributes:
        offset: of its first byte in the file.
    """

    file: TensorFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor; without arguments the whole one in its own shape."""
        count = (self.numel if stop is None else stop) - start
        buffer = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        self.file.read_into(buffer, self.offset + start * self.dtype.itemsize)
        values = buffer.view(self.dtype)
        return values.view(self.shape) if stop is None else values

    def pieces(self, elements: int) -> Iterator[Tensor]:
        """The flattened tensor in pieces of at most `elements`."""
        for start in range(0, self.numel, elements):
            yield self.read(start, min(start + elements, self.numel))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name in the file, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes one safetensors file: the header at once, then the tensors in the order of `specs`, in any pieces."""

    def __init__(self, path: Path, specs: list[TensorSpec]):
        self.path = path
        self.header, offset = {"__metadata__": {"format": "pt"}}, 0
        for spec in specs:
            entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape)}
            self.header[spec.name] = entry | {"data_offsets": [offset, offset + spec.nbytes]}
            offset += spec.nbytes
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the first tensor's bytes are aligned
        self._left = offset
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, piece: Tensor) -> int:
        """Appends a contiguous piece of the current tensor; returns its bytes."""
        self._file.write(memoryview(piece.reshape(-1).view(torch.uint8).numpy()))
        self._left -= piece.nbytes
        return piece.nbytes

    def close(self) -> None:
        """Flushes the file to the disk. Raises ExportError if the tensors announced did not come in full."""
        sync(self._file)
        self._file.close()
        if self._left:
            raise ExportError(f"{self.path} is {self._left:,} bytes short of what its header says.", "Merge again.")

    def abandon(self) -> None:
        """Closes the unfinished file."""
        self._file.close()


def plan_shards(specs: Iterable[TensorSpec], largest: int) -> dict[str, list[TensorSpec]]:
    """Distributes tensors over files named as transformers names them, at most `largest` bytes each (or one tensor).

    Within a file, wider dtypes come first, so that every tensor's bytes are aligned.
    """
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    return {
        name: sorted(shard, key=lambda spec: -spec.dtype.itemsize) for name, shard in zip(names, shards, strict=True)
    }


def shard_index(shards: dict[str, list[TensorSpec]]) -> dict:
    """The content of `model.safetensors.index.json`."""
    specs = [spec for shard in shards.values() for spec in shard]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": dict(sorted((spec.name, file) for file, shard in shards.items() for spec in shard)),
    }
