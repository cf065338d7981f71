"""Which weights a base model's folder holds, as one number that tells two models apart; and whether all are finite."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qpsft.errors import BaseModelError, boundary
from qpsft.files import digest, read_object
from qpsft.model.folder import CONFIG, CONFIG_TYPES, check_weights, weight_files

PIECE, EVERY = 2**12, 2**20
"""Bytes: of tensors of more than `EVERY` bytes, so many are read at the start of every `EVERY`, and the last ones."""
GENERATION_CONFIG = "generation_config.json"
VALUES = 2**24
"""Of a tensor that are in memory at once, or a row of it if that has more."""
AGAIN = "Copy or download it again."


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the stored weights in a base model's folder: of every tensor its name, dtype, shape and a sample.

    The sample is of the bytes on the disk, so it does not depend on the dtype a model is loaded in: all of a tensor of
    up to 1 MiB; of a larger one 4 KiB at the start of every MiB, and its last 4 KiB. Files are read in pieces, about
    1/256 of a large model. How tensors are spread over files, their order and the files' names do not count. A change
    of a few values between the samples of a large tensor is not seen; training in full or merging changes all.

    Raises:
        BaseModelError: as `qpsft.model.folder.check_weights`; or a file cannot be read.
    """
    check_weights(folder)
    tensors: dict[str, str] = {}
    for name in weight_files(folder):
        with boundary(f"{folder / name} cannot be read", BaseModelError, AGAIN):
            tensors |= _tensor_digests(folder / name)
    return digest(json.dumps(sorted(tensors.items())))


def _tensor_digests(path: Path) -> dict[str, str]:
    """Of every tensor in a safetensors file, by its name."""
    digests = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            sha256 = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
            for start, size in _pieces(first, end):
                file.seek(start)
                sha256.update(file.read(size))
            digests[name] = sha256.hexdigest()
    return digests


def _pieces(first: int, end: int) -> list[tuple[int, int]]:
    """(start, bytes) of what is read of a tensor that lies from `first` to `end`."""
    if end - first <= EVERY:
        return [(first, end - first)]
    return [*((start, min(PIECE, end - start)) for start in range(first, end, EVERY)), (end - PIECE, PIECE)]


def check_finite(folder: Path) -> None:
    """Makes sure that all weights of a model are numbers; reads its files once, in pieces, some GB a second.

    They are read from the disk, because rounding to 4 bits on a GPU may turn a NaN into a number.

    Raises:
        BaseModelError: a value is NaN or infinite; names tensor and file. Or as `check_weights`.
    """
    for path in [folder / name for name in weight_files(folder)]:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                if f"{name}.absmax" in names:  # codes of 4 bits, in whatever dtype they are stored
                    continue
                if not all(_is_finite(piece) for piece in _values(file, name)):
                    raise BaseModelError(
                        f"{name} in {path} has values that are not finite (NaN or infinity).",
                        "The file is damaged, or its training went wrong: copy or download it again, or use another "
                        "model.",
                    )


def _is_finite(values: Tensor) -> bool:
    if values.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or not values.numel():
        return True
    low, high = values.aminmax()  # NaN wins in both
    return math.isfinite(low) and math.isfinite(high)


def _values(file: Any, name: str) -> Iterator[Tensor]:
    """A tensor of an opened safetensors file, some rows at a time."""
    shape = file.get_slice(name).get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    rows = max(1, VALUES * shape[0] // max(1, math.prod(shape)))
    for start in range(0, shape[0], rows):
        yield file.get_slice(name)[start : start + rows]


def eos_token_ids(folder: Path) -> list[int]:
    """The ids that end a text, as config.json and generation_config.json in a base model's folder say, in order.

    Raises:
        BaseModelError: one of the two is not valid JSON.
    """
    ids: list[Any] = []
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        content = read_object(path, BaseModelError, AGAIN, CONFIG_TYPES) if path.is_file() else {}
        for part in (content, content.get("text_config") or {}):
            value = part.get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
    return sorted({each for each in ids if isinstance(each, int)})
