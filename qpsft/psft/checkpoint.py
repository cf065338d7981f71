"""Checkpoints that are either whole or not used: a list of files with sizes and digests, written last."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from qpsft.data.mix import MixedDataset
from qpsft.errors import OutputError, TrainingError
from qpsft.files import digest, file_sha256, sync_and_digest, write_atomically

COMPLETE = "complete.json"
RUN = "psft_run.json"
REFERENCE = "psft_reference.safetensors"
SCORES = "psft_scores_{process}.safetensors"

# what torch.save says on a full disk: RuntimeErrors of its own, not an OSError
_TORCH_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream", "File too large", "No space left")


class CheckpointedCallback(TrainerCallback):
    """A callback with files of its own in every checkpoint, whole or not at all with the rest of it."""

    def save_to(self, folder: Path) -> None:
        """Writes its files; called in process 0."""
        raise NotImplementedError

    def load_from(self, folder: Path) -> None:
        """Reads them, where they are there; called in every process, before `on_train_begin`."""
        raise NotImplementedError


def mark_complete(folder: Path) -> None:
    """Declares a checkpoint whole: records every file with its size and SHA-256. Call when all files are written.

    All of them are on the disk before the mark is, so a mark vouches for them after a power cut too.
    """
    write_atomically(folder / COMPLETE, json.dumps({"files": sync_and_digest(folder)}, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether every file that `mark_complete` recorded is there with its size."""
    return _what_lacks(folder) is None


def _what_lacks(folder: Path) -> str | None:
    """Why a checkpoint is not whole, in words; None where it is. Nothing but the mark is read."""
    try:
        files = _marked(folder)
        lacking = [name for name, file in files.items() if not _has_size(folder / name, file["size"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{COMPLETE} is missing or damaged"
    return f"{lacking[0]} is missing or has another size" if lacking else None


def _marked(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def check_bytes(folder: Path) -> None:
    """Makes sure that a checkpoint's files are, byte for byte, those that were saved. Reads each once, in pieces.

    A checkpoint without a mark, of another trainer, passes.

    Raises:
        TrainingError: a file is missing or damaged; names it.
    """
    if not (folder / COMPLETE).is_file():
        return
    why = _what_lacks(folder)
    for name, file in {} if why else _marked(folder).items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            why = f"{name} cannot be read: {error.strerror or error}"
            break
        if found != file.get("sha256"):
            why = f"{name} has SHA-256 {found[:12]}…, and had another when it was saved"
            break
    if why:
        raise TrainingError(
            f"The checkpoint {folder} is damaged: {why}.",
            "Copy it again from where it is whole, or remove that folder, to resume from the one before it.",
        )


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The `checkpoint-N` folders of a run, newest first, whole or not."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint; warns about each newer one that is not."""
    for path in checkpoints(output_dir):
        why = _what_lacks(path)
        if why is None:
            return path
        warnings.warn(f"{path} is half-written ({why}); it is skipped.", stacklevel=2)
    return None


def remove_old(output_dir: Path, limit: int, keep: Collection[str]) -> None:
    """Leaves `limit` checkpoints of a run: half-written and half-removed ones go first, then the oldest.

    transformers sorts by time only, and the newest of all is one that was being removed when the process was killed.

    Args:
        keep: names of those that stay in any case.
    """
    there = sorted(checkpoints(output_dir), key=lambda path: (is_complete(path), path.stat().st_mtime))
    free = [path for path in there if path.name not in keep]
    for path in free[: max(0, len(there) - limit)]:
        remove_folder(path)


@contextmanager
def whole_or_removed(folder: Path) -> Iterator[None]:
    """A write that fails inside removes `folder` and becomes an OutputError; its neighbours stay as they are."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_WRITE_ERRORS):
            raise
        remove_folder(folder)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OutputError(
            f"The checkpoint {folder} could not be written: {reason}.",
            "The disk may be full: free some space or choose another output_dir. Earlier checkpoints are untouched; "
            "resume from the last one.",
        ) from error


def save_run(folder: Path, settings: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Saves the settings that fix which rows a step sees, and what a run knows after a step (JSON values)."""
    text = json.dumps({**progress, "settings": settings}, indent=1)
    (folder / RUN).write_text(text, encoding="utf-8")


def load_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The progress that `save_run` saved; empty for a checkpoint of another trainer.

    Raises:
        TrainingError: a setting differs, so that the kept log-probabilities would belong to other rows.
    """
    if not (folder / RUN).is_file():
        return {}
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    for name, saved in run["settings"].items():
        if settings.get(name) != saved:
            raise TrainingError(
                f"{folder} was made with {name} = {saved}, this run has {settings.get(name)}: steps see other rows.",
                "Resume with the settings the checkpoint was made with.",
            )
    return run


def batch_sizes(folder: Path) -> dict[str, Any]:
    """The micro-batch, the accumulation and gradient checkpointing that a checkpoint was made with, as options."""
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    sizes = {name: run["settings"][name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    return sizes | {"gradient_checkpointing": run["gradient_checkpointing"]}


def order_settings(args: Any, dataset: Any) -> dict[str, Any]:
    """What decides which rows a step sees. Args: PSFTConfig; tokenized rows, or a stream."""
    known, is_mix = has_length(dataset), isinstance(dataset, MixedDataset)
    return {
        "loss_type": args.loss_type,
        "rows": len(dataset) if known else None,
        "rows_sha256": rows_sha256(dataset) if known else getattr(dataset, "sha256", None),
        "processes": args.world_size,
        "per_device_train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "reference_steps": args.reference_steps,
        "num_iterations": args.visits,
        "target_kl": args.target_kl,
        "seed": args.order_seed,
        "train_sampling_strategy": str(args.train_sampling_strategy),
        "mix": [[len(part.rows), str(part.share)] for part in dataset.parts] if is_mix else None,
    }


def rows_sha256(rows: Sequence[Mapping[str, Any]], sample: int = 256) -> str:
    """A digest of tokenized rows: of `sample` of them at even distances, which is enough to tell two files apart."""
    numbers = sorted({round(i * (len(rows) - 1) / max(1, sample - 1)) for i in range(min(sample, len(rows)))})
    text = json.dumps([[rows[n].get("input_ids"), rows[n].get("labels")] for n in numbers])
    return digest(text)


def check_adapter(folder: Path, config: Any) -> None:
    """Compares a checkpoint's `adapter_config.json` with the adapter that is to go on.

    Raises:
        TrainingError: they differ in what decides the adapter's shape or scale; names the setting.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():  # an adapter of another name has a folder of its own, and PEFT checks its shapes
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in ("r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias"):
        here = getattr(config, name, None)
        before, now = (sorted(v) if isinstance(v, (list, set)) else v for v in (saved.get(name), here))
        if before != now:
            raise TrainingError(
                f"{folder} was made with {name} = {before}, this run has {now}.",
                "Resume with the adapter settings the checkpoint was made with.",
            )


def save_psft_state(folder: Path, state: Mapping[str, Any], process: int, *, with_reference: bool) -> None:
    """Saves what a run must remember in the middle of a block.

    Args:
        folder: the checkpoint's folder.
        state: of `OldLogprobs.state_dict`.
        process: rank of this process; each keeps the old log-probabilities of its own micro-batches.
        with_reference: whether this process writes the reference policy, which is the same in all.
    """
    if with_reference and state["reference"] is not None:
        tensors = {name: t.detach().contiguous().cpu() for name, t in state["reference"].items()}
        save_file(tensors, folder / REFERENCE)
    kept = {f"{m}.{i}": t.contiguous().cpu() for m, tensors in state["kept"].items() for i, t in enumerate(tensors)}
    save_file(kept, folder / SCORES.format(process=process))


def load_psft_state(folder: Path, process: int) -> dict[str, Any]:
    """Loads what `save_psft_state` saved, for `OldLogprobs.load_state_dict`.

    Raises:
        TrainingError: there is nothing of this process (another trainer made the checkpoint).
    """
    scores = folder / SCORES.format(process=process)
    if not scores.is_file():
        raise TrainingError(
            f"{folder} holds no old log-probabilities for process {process}.",
            "Resume from a checkpoint that qpsft made with loss_type psft.",
        )
    by_mini_batch: dict[int, dict[int, Tensor]] = {}
    for key, tensor in load_file(scores).items():
        mini_batch, micro_batch = map(int, key.split("."))
        by_mini_batch.setdefault(mini_batch, {})[micro_batch] = tensor
    reference = load_file(folder / REFERENCE) if (folder / REFERENCE).is_file() else None
    return {"reference": reference, "kept": {m: [t[i] for i in sorted(t)] for m, t in by_mini_batch.items()}}


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint folder; its completeness mark goes first, so that a cut-off removal leaves no doubt."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
