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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qpsft import __version__
from qpsft.errors import ExportError, NotTheSameModelError
from qpsft.files import finished_folder, write_atomically
from qpsft.merge.adapter_file import Adapter, Change, open_adapter
from qpsft.merge.base_tensors import BaseTensors, open_base
from qpsft.merge.model_files import copy_tokenizer, write_config, write_json
from qpsft.merge.report import MergeReport, rounding_in_words
from qpsft.merge.weights import MergedWeights
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base_record import BaseRecord
from qpsft.model.folder import MERGE_REPORT, check_folder
from qpsft.model.hardware import DTYPES

Onto = Literal["trained", "original"]
OutputDtype = Literal["bfloat16", "float16", "float32"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class MergeOptions:
    """What `merge_adapter` takes, which explains each, checked: folders are paths, and the shards' size is in bytes."""

    adapter: str | os.PathLike
    output: str | os.PathLike | None
    base: str | None
    onto: Onto
    dtype: OutputDtype
    max_shard_size: str | int
    overwrite: bool
    verify: bool
    show_progress: bool

    def __post_init__(self) -> None:
        if self.onto not in get_args(Onto):
            raise ExportError(f"onto {self.onto!r} is not known.", f"Use {' or '.join(get_args(Onto))}.")
        if self.dtype not in get_args(OutputDtype):
            raise ExportError(f"dtype {self.dtype!r} is not known.", f"Use {', '.join(get_args(OutputDtype))}.")
        self.max_shard_size = parse_size(self.max_shard_size)
        self.adapter = Path(os.path.abspath(Path(self.adapter).expanduser()))
        name = f"{self.adapter.name}-merged"
        self.output = self.adapter.with_name(name) if self.output is None else Path(self.output)


@dataclass(frozen=True)
class _Base:
    """The base to merge onto: what to call it, its folder, and how it was rounded in training, if that is recorded."""

    name: str
    folder: Path
    record: BaseRecord | None


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
    options = MergeOptions(adapter, output, base, onto, dtype, max_shard_size, overwrite, verify, show_progress)
    with open_adapter(options.adapter) as opened:
        trained_on = _trained_base(opened, options)
        rounded_as = trained_on.record if options.onto == "trained" else None
        sources = (options.adapter, trained_on.folder)
        with (
            open_base(trained_on.folder, rounded_as) as tensors,
            finished_folder(options.output, mark=MERGE_REPORT, overwrite=options.overwrite, sources=sources) as folder,
        ):
            changes = opened.changes(tensors.skeleton, tensors.tied)
            weights = MergedWeights(tensors, changes, rounded_as, DTYPES[options.dtype])
            _write_model(weights, folder, trained_on, options)
            report = _report(options, trained_on, tensors, changes, weights)
            report.merge_seconds = time.perf_counter() - started
            if options.verify and trained_on.record:
                report.verification = _verify(folder, trained_on, options)
            report.seconds = time.perf_counter() - started
            _write_report(report, folder)
    return report


def _trained_base(adapter: Adapter, options: MergeOptions) -> _Base:
    """Finds the base and makes sure that it is the adapter's."""
    record = _record(adapter.folder, options.onto)
    folder = adapter.folder.base_folder(options.base, same_rounding=options.onto == "trained")
    _check_weights(folder, options.onto)
    return _Base(_base_name(adapter.folder, options.base), folder, record)


def _write_model(weights: MergedWeights, folder: Path, base: _Base, options: MergeOptions) -> None:
    """Writes all that makes the folder a model: weights, config, tokenizer."""
    weights.write(folder, options.max_shard_size, options.show_progress)
    write_config(base.folder, folder, options.dtype)
    copy_tokenizer(options.adapter, base.folder, folder)


def _verify(folder: Path, base: _Base, options: MergeOptions) -> dict[str, Any]:
    """Compares the merged model with the live one. Raises NotTheSameModelError where it may not differ and does."""
    from qpsft.verify.verification import verify_export

    result = verify_export(options.adapter, folder, base=base.folder, show_progress=options.show_progress)
    if options.onto == "trained" and not result.same_model:
        raise NotTheSameModelError(
            f"The merged model is not the model that was trained, and was removed.\n{result.summary()}",
            "Please report this. To look at the folder, merge with --no_verify and run qpsft verify on it.",
        )
    return {
        "same_model": result.same_model,
        "numbers": json.loads(json.dumps(result.numbers)),
        "summary": result.summary(on_purpose=options.onto == "original"),
    }


def _report(
    options: MergeOptions, base: _Base, tensors: BaseTensors, changes: dict[str, Change], weights: MergedWeights
) -> MergeReport:
    """The report, but for times, files and verification."""
    low_rank = sum(change.low_rank is not None for change in changes.values())
    return MergeReport(
        qpsft_version=__version__,
        adapter=str(options.adapter),
        base=base.name,
        base_revision=base.record.revision if base.record else None,
        output=os.path.abspath(options.output),
        onto=options.onto,
        dtype=options.dtype,
        rounding=rounding_in_words(base.record),
        bytes=weights.nbytes,
        tensors=len(weights.specs),
        low_rank=low_rank,
        replaced=len(changes) - low_rank,
        peak_rss=_peak_rss(),
        left_out=tensors.left_out,
    )


def _write_report(report: MergeReport, folder: Path) -> None:
    report.files = sorted([*(path.name for path in folder.iterdir()), "README.md", MERGE_REPORT])
    write_atomically(folder / "README.md", report.card())
    write_json(folder / MERGE_REPORT, dataclasses.asdict(report))


def _record(adapter: AdapterFolder, onto: Onto) -> BaseRecord | None:
    """The base's record; onto the original weights an adapter that other tools trained needs none."""
    return None if onto == "original" and not adapter.has_record else adapter.record


def _base_name(adapter: AdapterFolder, base: str | None) -> str:
    """What to call the base: as the record does, else as given, else as PEFT's config does."""
    if adapter.has_record:
        return adapter.record.base_model_name_or_path
    if base is None:
        return adapter.config.base_model_name_or_path
    return os.path.abspath(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base


def _check_weights(folder: Path, onto: Onto) -> None:
    """The base's weights are whole, and its original ones are there if they are to be merged onto."""
    config = check_folder(folder)
    if onto == "original" and config.get("quantization_config") is not None:
        raise ExportError(
            f"The base in {folder} is itself quantized: its original weights are not there.",
            "Merge onto the trained weights, or give the 16-bit model it was made from with --base.",
        )


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


def _peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
