"""Adapter + base -> one dense model in safetensors, tensor by tensor, however large the model is.

    base on disk ──> round to 4 bits and back, as the live model does ──> + scale · B A ──> dtype ──> shard on disk
                     (onto "trained"; skipped for "original")            (float32)      (rounded once)

An adapter trained on 4-bit weights learned to correct *those* weights, so they are what it is merged onto; the result
is the model that was trained, and `qpsft.verify.verification` checks that it is before the folder appears.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from qpsft import __version__
from qpsft.errors import ExportError, NotTheSameModelError
from qpsft.files import finished_folder
from qpsft.merge.adapter_file import read_changes
from qpsft.merge.base_tensors import open_base
from qpsft.merge.model_files import copy_tokenizer, write_config
from qpsft.merge.options import MergeOptions, Onto
from qpsft.merge.report import MergeReport, files_of_merge
from qpsft.merge.safetensors_stream import TensorFile
from qpsft.merge.weights import MergedWeights
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base_record import BaseRecord, BaseSource, rounding_in_words
from qpsft.model.folder import MERGE_REPORT, check_folder
from qpsft.model.hardware import DTYPES
from qpsft.model.stated_record import state_record


def merge_adapter(adapter: str | os.PathLike, output: str | os.PathLike | None = None, **options: Any) -> MergeReport:
    """Merges an adapter into its base model and writes a folder that any tool loads as a plain model.

    Neither model is loaded; pieces of a few MB go from disk to disk, on the CPU. (The verification loads both, one
    after the other. Onto "trained", a result that differs is removed; onto "original", how far it is off is reported.)

    Args:
        adapter: the folder that training wrote.
        output: the folder to write; default: the adapter's name with "-merged", beside it.
        options: the others of `MergeOptions`.

    Raises:
        BaseModelError: adapter or base missing, broken, or not of each other.
        ExportError: something that cannot be merged, by name; or values that are not finite.
        OutputError: the output exists, or cannot be written; not enough disk.
        NotTheSameModelError: verification failed; nothing is left.
    """
    return merge_with(MergeOptions(adapter=adapter, output=output, **options))


def merge_with(options: MergeOptions) -> MergeReport:
    """`merge_adapter`, its options made."""
    started = time.perf_counter()
    adapter = AdapterFolder(options.adapter)
    adapter.mergeable_config()
    state_record(options.adapter, options)
    onto_trained = options.onto == "trained"
    # onto the original weights, an adapter that another tool trained needs no record of the rounding
    record = adapter.record if onto_trained or adapter.has_record else None
    base = adapter.base_folder(options.base, same_rounding=onto_trained)
    source = adapter.source_of(base)
    _check_weights(base, options.onto)
    rounded_as = record if onto_trained else None
    with (
        TensorFile(adapter.weights_file) as file,
        open_base(base, rounded_as) as tensors,
        finished_folder(
            options.output,
            mark=MERGE_REPORT,
            overwrite=options.overwrite,
            sources=(options.adapter, base),
            written=files_of_merge,
        ) as folder,
    ):
        changes = read_changes(adapter, file, tensors.skeleton, tensors.tied)
        weights = MergedWeights(tensors, changes, rounded_as, DTYPES[options.dtype])
        weights.write(folder, options.max_shard_size)
        write_config(base, folder, options.dtype, predicts_ahead=tensors.predicts_ahead)
        copy_tokenizer(options.adapter, base, folder)
        low_rank = [change.low_rank.experts for change in changes.values() if change.low_rank is not None]
        report = MergeReport(
            qpsft_version=__version__,
            adapter=str(options.adapter),
            base=_base_name(adapter, options.base),
            base_revision=_revision(record, source, options.base),
            base_folder=os.path.abspath(base),
            base_weights_sha256=source.weights_sha256,
            base_used=adapter.base_in_words(base, source),
            output=os.path.abspath(options.output),
            onto=options.onto,
            dtype=options.dtype,
            rounding=rounding_in_words(record),
            bytes=weights.nbytes,
            tensors=len(weights.specs),
            low_rank=sum(low_rank),
            replaced=len(changes) - len(low_rank),
            peak_rss=_peak_rss(),
            left_out=tensors.left_out,
            merge_seconds=time.perf_counter() - started,
        )
        if record and not options.no_verify:
            report.verification = _verify(folder, base, options, adapter)
        report.seconds = time.perf_counter() - started
        report.write(folder)
    return report


def _verify(folder: Path, base: Path, options: MergeOptions, adapter: AdapterFolder) -> dict[str, Any]:
    """Compares the merged model with the live one. Raises NotTheSameModelError where it may not differ and does."""
    from qpsft.verify.options import VerifyOptions
    from qpsft.verify.verification import compare_with_live

    result = compare_with_live(VerifyOptions(options.adapter, folder, base=base), adapter)
    if options.onto == "trained" and not result.same_model:
        raise NotTheSameModelError(
            f"The merged model is not the model that was trained, and was removed.\n{result.summary()}",
            "Please report this. To look at the folder, merge with --no_verify and run qpsft verify on it.",
        )
    return {
        "same_model": result.same_model,
        "numbers": json.loads(json.dumps(result.numbers)),
        "summary": result.summary(on_purpose=options.onto == "original", with_base=False),
    }


def _base_name(adapter: AdapterFolder, base: str | None) -> str:
    """What to call the base: as the record does, else as given, else as PEFT's config does."""
    if adapter.has_record:
        return adapter.record.base_model_name_or_path
    if base is None:
        return adapter.config.base_model_name_or_path
    return os.path.abspath(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base


def _revision(record: BaseRecord | None, source: BaseSource, given: str | None) -> str | None:
    """The Hub commit of the base that was used, if known; of a base in its recorded place, the record's."""
    return source.revision or (record.revision if record and given is None else None)


def _check_weights(folder: Path, onto: Onto) -> None:
    """The base's weights are whole, and its original ones are there if they are to be merged onto."""
    config = check_folder(folder)
    if onto == "original" and config.get("quantization_config") is not None:
        raise ExportError(
            f"The base in {folder} is itself quantized: its original weights are not there.",
            "Merge onto the trained weights, or give the 16-bit model it was made from with --base.",
        )


def _peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
