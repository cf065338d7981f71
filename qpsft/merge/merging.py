"""Adapter + base -> one dense model in safetensors, tensor by tensor, however large the model is.

    base on disk ──> round to 4 bits and back, as the live model does ──> + scale · B A ──> dtype ──> shard on disk
                     (onto "trained"; skipped for "original")            (float32)      (rounded once)

An adapter trained on 4-bit weights learned to correct *those* weights, so they are what it is merged onto; the result
is the model that was trained, and `qpsft.verify.verification` checks that it is before the folder appears.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from qpsft import __version__
from qpsft.errors import BaseModelError, ExportError, NotTheSameModelError
from qpsft.files import check_space, finished_folder, write_atomically
from qpsft.merge.adapter_file import Adapter, Change, open_adapter
from qpsft.merge.base_tensors import BaseTensor, BaseTensors, open_base
from qpsft.merge.model_files import card, copy_tokenizer, write_config, write_json
from qpsft.merge.rounding import Rounding
from qpsft.merge.safetensors_stream import ShardWriter, TensorSpec, plan_shards, shard_index
from qpsft.merge.tensor import MergedTensor
from qpsft.model.base_record import RECORD_FILE, BaseRecord, read_base_record
from qpsft.model.folder import MERGE_REPORT, check_folder, config_sha256, resolve_folder
from qpsft.model.hardware import DTYPES
from qpsft.model.skeleton import dtype_named
from qpsft.terminal import wrap

Onto = Literal["trained", "original"]
OutputDtype = Literal["bfloat16", "float16", "float32"]

_SMALL_FILES = 50_000_000  # tokenizer, card, report: what the disk must have room for beside the weights
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class MergeReport:
    """What was merged, where it is and how it was checked. `merge_report.json` holds the same.

    Attributes:
        rounding: how the live model rounds its base, in words.
        bytes: of the weights written.
        tensors: number written.
        low_rank: matrices that a low-rank update was added to.
        replaced: tensors changed otherwise (copies trained in full, biases, token rows).
        seconds: of the whole merge, `merge_seconds` without the verification.
        peak_rss: the process's largest resident memory so far, in bytes.
        left_out: tensors of the base's folder that its architecture does not use.
        verification: None if it was not run; else `same_model`, `numbers` and `summary` of `qpsft.verify.verification`.
    """

    qpsft_version: str
    adapter: str
    base: str
    base_revision: str | None
    output: str
    onto: str
    dtype: str
    rounding: str
    files: list[str]
    bytes: int
    tensors: int
    low_rank: int
    replaced: int
    seconds: float
    merge_seconds: float
    peak_rss: int
    left_out: list[str]
    verification: dict[str, Any] | None

    def summary(self) -> str:
        """What a person wants to know, in some ten lines."""
        lines = [
            f"merged {Path(self.adapter).name} onto the {self.onto} weights of {Path(self.base).name}",
            f"base in training: {self.rounding}",
            wrap(
                f"wrote {self.output}: {self.tensors} tensors, {self.bytes / 1e9:.3g} GB in {self.dtype}, "
                f"{len(self.files)} files; {self.merge_seconds:.1f} s, peak memory {self.peak_rss / 1e6:.0f} MB"
            ),
        ]
        if self.left_out:
            lines.append(
                wrap(f"left out {len(self.left_out)} tensors that the model does not use, such as {self.left_out[0]}")
            )
        lines += ["", self.verification["summary"] if self.verification else "verification: not run"]
        lines += ["", f"next: qpsft export {self.output} --to gguf", "      or load it with transformers or vLLM"]
        return "\n".join(lines)


def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    base: str | None = None,
    onto: Onto = "trained",
    dtype: OutputDtype = "bfloat16",
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    verify: bool = True,
    show_progress: bool = True,
) -> MergeReport:
    """Merges an adapter into its base model and writes a folder that any tool loads as a plain model.

    Neither model is loaded; pieces of a few MB go from disk to disk, on the CPU. (`verify` loads both, one after the
    other.)

    Args:
        adapter: the folder that training wrote.
        output: the folder to write; default: the adapter's name with "-merged", beside it.
        base: the base's folder or Hub id, if it is no longer where the adapter's record says.
        onto: "trained": the base's weights as training saw them, rounded and dequantized. "original": as they are on
            disk, which is never the model that was trained.
        dtype: of the weights written.
        max_shard_size: of one file, in bytes or as "2GB"; a larger tensor gets a file of its own.
        overwrite: replace `output` if it is an earlier merge. It stays until the new one is complete.
        verify: compare the result with the live model that was trained. Onto "trained", one that differs is removed;
            onto "original", how far it is off is reported. Needs the record that qpsft writes into adapter folders.
        show_progress: a progress bar.

    Raises:
        BaseModelError: adapter or base missing, broken, or not of each other.
        ExportError: something that cannot be merged, by name; or values that are not finite.
        OutputError: the output exists, or cannot be written; not enough disk.
        NotTheSameModelError: verification failed; nothing is left.
    """
    started = time.perf_counter()
    if onto not in get_args(Onto):
        raise ExportError(f"onto {onto!r} is not known.", f"Use {' or '.join(get_args(Onto))}.")
    if dtype not in get_args(OutputDtype):
        raise ExportError(f"dtype {dtype!r} is not known.", f"Use {', '.join(get_args(OutputDtype))}.")
    shard_bytes = parse_size(max_shard_size)
    adapter = Path(os.path.abspath(Path(adapter).expanduser()))
    output = adapter.with_name(f"{adapter.name}-merged") if output is None else Path(output)
    with open_adapter(adapter) as opened:
        record = _record(adapter, onto)
        name, folder = _find_base(opened, record, base)
        _check_same_base(adapter, record, folder, onto, named=base is not None)
        with (
            open_base(folder, record if onto == "trained" else None) as tensors,
            finished_folder(output, mark=MERGE_REPORT, overwrite=overwrite, sources=(adapter, folder)) as temporary,
        ):
            job = _Merge(tensors, opened.changes(tensors.skeleton, tensors.tied), record, onto, dtype)
            job.write(temporary, shard_bytes, show_progress)
            write_config(folder, temporary, dtype)
            copy_tokenizer(adapter, folder, temporary)
            report = MergeReport(
                qpsft_version=__version__,
                adapter=str(adapter),
                base=name,
                base_revision=record.revision if record else None,
                output=os.path.abspath(output),
                onto=onto,
                dtype=dtype,
                rounding=_in_words(record),
                files=[],
                bytes=sum(spec.nbytes for spec in job.specs),
                tensors=len(job.specs),
                low_rank=sum(change.low_rank is not None for change in job.changes.values()),
                replaced=sum(change.low_rank is None for change in job.changes.values()),
                seconds=0.0,
                merge_seconds=time.perf_counter() - started,
                peak_rss=_peak_rss(),
                left_out=tensors.left_out,
                verification=_verify(adapter, temporary, folder, onto, show_progress) if verify and record else None,
            )
            report.files = sorted([path.name for path in temporary.iterdir()] + ["README.md", MERGE_REPORT])
            report.seconds = time.perf_counter() - started
            write_atomically(temporary / "README.md", card(dataclasses.asdict(report)))
            write_json(temporary / MERGE_REPORT, dataclasses.asdict(report))
    return report


class _Merge:
    """The tensors to write."""

    def __init__(
        self, base: BaseTensors, changes: dict[str, Change], record: BaseRecord | None, onto: Onto, dtype: OutputDtype
    ):
        self.base, self.changes = base, changes
        self._trained = onto == "trained"
        self._live_dtype = dtype_named(record.compute_dtype) if record and self._trained else None
        self._rounding = _rounding(record)
        self._tensors = {tensor.name: tensor for tensor in base.tensors}
        self.specs = [
            TensorSpec(tensor.name, self._output_dtype(tensor, DTYPES[dtype]), tensor.shape) for tensor in base.tensors
        ]
        self._check_all_found()

    def _output_dtype(self, tensor: BaseTensor, dtype: torch.dtype) -> torch.dtype:
        if tensor.carried or (not tensor.stored.dtype.is_floating_point and not tensor.state):
            return tensor.stored.dtype
        return self.base.dtype_of(tensor.parameter or tensor.fused_into, dtype)

    def _check_all_found(self) -> None:
        missing = set(self.changes) - {tensor.parameter for tensor in self.base.tensors}
        if missing:
            name = min(missing)
            fused = any(tensor.fused_into for tensor in self.base.tensors)
            raise ExportError(
                f"The adapter changes {name}, and no single tensor in {self.base.folder} is that parameter"
                f"{': transformers fuses or splits it while loading' if fused else ''}.",
                "Load the base once with this version of transformers, save it, and give the new folder with --base; "
                "or serve the adapter beside its base.",
            )

    def write(self, folder: Path, shard_bytes: int, show_progress: bool) -> None:
        """Writes the shards and their index."""
        shards = plan_shards(self.specs, shard_bytes)
        total = sum(spec.nbytes for spec in self.specs)
        check_space(folder, total + _SMALL_FILES, "The merged model")
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="merging", disable=None if show_progress else True, leave=False
        ) as progress:
            for file, specs in shards.items():
                writer = ShardWriter(folder / file, specs)
                try:
                    for spec in specs:
                        for piece in self._merged(spec):
                            progress.update(writer.write(piece))
                except BaseException:
                    writer.abandon()
                    raise
                writer.close()
        if len(shards) > 1:
            write_json(folder / "model.safetensors.index.json", shard_index(shards))

    def _merged(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        tensor = self._tensors[spec.name]
        change = self.changes.get(tensor.parameter)
        plain = None
        if self._live_dtype and not tensor.carried:
            plain = self.base.dtype_of(tensor.parameter or tensor.fused_into, self._live_dtype)
        yield from MergedTensor(
            tensor,
            change,
            rounding=self._rounding if self._trained else None,
            plain_dtype=plain,
            dtype=spec.dtype,
        ).pieces()


def parse_size(size: str | int) -> int:
    """Bytes from a number or from text such as "2GB", "500MB" or "1GiB". Raises ExportError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
        count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ExportError(f"max_shard_size {size!r} is not a size.", "Write it as 2GB, 500MB or a number of bytes.")
    return count


def _record(adapter: Path, onto: Onto) -> BaseRecord | None:
    """The base's record; onto the original weights an adapter that other tools trained needs none."""
    if onto == "original" and not (adapter / RECORD_FILE).is_file():
        return None
    return read_base_record(adapter)


def _find_base(adapter: Adapter, record: BaseRecord | None, base: str | None) -> tuple[str, Path]:
    """(what to call the base, its folder)."""
    if base is not None:
        folder = resolve_folder(base)
        named = os.path.abspath(folder) if Path(base).expanduser().is_dir() else base
        return (record.base_model_name_or_path if record else named), folder
    name = record.base_model_name_or_path if record else adapter.config.base_model_name_or_path
    revision = record.revision if record else adapter.config.revision
    if not name:
        raise BaseModelError(f"The adapter in {adapter.folder} does not name its base.", "Give it with --base.")
    try:
        return name, resolve_folder(name, revision=revision)
    except BaseModelError as error:
        raise BaseModelError(
            f"The base that the adapter in {adapter.folder} was trained on cannot be had: {error.what}",
            f"Give its folder with --base. {error.todo}",
        ) from error


def _check_same_base(adapter: Path, record: BaseRecord | None, folder: Path, onto: Onto, *, named: bool) -> None:
    config = check_folder(folder)
    quantized = config.get("quantization_config") is not None
    if onto == "original" and quantized:
        raise ExportError(
            f"The base in {folder} is itself quantized: its original weights are not there.",
            "Merge onto the trained weights, or give the 16-bit model it was made from with --base.",
        )
    if record is None:
        return
    if config_sha256(config) != record.config_sha256:
        raise BaseModelError(
            f"The adapter in {adapter} was trained on {record.base_model_name_or_path} (configuration "
            f"{record.config_sha256[:12]}), and {folder} is another model (configuration "
            f"{config_sha256(config)[:12]}).",
            "Give the base it was trained on with --base." if named else "The base has changed since: restore it.",
        )
    if onto == "trained" and quantized != record.prequantized:
        kinds = {True: "quantized on disk", False: "not quantized on disk"}
        raise BaseModelError(
            f"The adapter in {adapter} was trained on a base that was {kinds[record.prequantized]}, and {folder} is "
            f"{kinds[quantized]}: its rounded weights can be others.",
            f"Give the base it was trained on ({record.base_model_name_or_path}) with --base.",
        )


def _rounding(record: BaseRecord | None) -> Rounding | None:
    if record is None or record.quantization == "none":
        return None
    return Rounding(
        kind=record.quantization,
        double_quant=record.double_quant,
        block_size=record.block_size or 0,
        weights_dtype=dtype_named(record.weights_dtype),
        compute_dtype=dtype_named(record.compute_dtype),
    )


def _in_words(record: BaseRecord | None) -> str:
    if record is None:
        return "no record of the rounding in training"
    if record.quantization == "none":
        return f"not quantized, {record.compute_dtype}"
    blocks = f" in blocks of {record.block_size}" if record.block_size else ""
    double = ", double quantization" if record.double_quant else ""
    return f"{record.quantization}{blocks}{double}, computed in {record.compute_dtype}"


def _verify(adapter: Path, merged: Path, base: Path, onto: Onto, show_progress: bool) -> dict[str, Any]:
    from qpsft.verify.verification import verify_export

    found = verify_export(adapter, merged, base=base, show_progress=show_progress)
    if onto == "trained" and not found.same_model:
        raise NotTheSameModelError(
            f"The merged model is not the model that was trained, and was removed.\n{found.summary()}",
            "Please report this. To look at the folder, merge with --no_verify and run qpsft verify on it.",
        )
    return {
        "same_model": found.same_model,
        "numbers": json.loads(json.dumps(found.numbers)),
        "summary": found.summary(on_purpose=onto == "original"),
    }


def _peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
