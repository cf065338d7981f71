"""The folder of a run: whether it can be written to, and what is written into it at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpsft.data.chat_date import CHAT_DATE
from qpsft.errors import OutputError
from qpsft.files import finished_files, write_atomically
from qpsft.model.adapter import POLICY, save_adapter
from qpsft.model.base_record import (
    ADAPTER_WEIGHTS,
    RECORD_FILE,
    BaseRecord,
    read_base_record,
    write_for_adapter,
    write_record,
)
from qpsft.model.folder import ADAPTER_CONFIG, CARD
from qpsft.psft.checkpoint import checkpoints, newest_complete_checkpoint, remove_folder
from qpsft.recipe.file import Recipe
from qpsft.recipe.sources import data_name
from qpsft.train.model_card import WRITTEN, model_card, resolved_recipe
from qpsft.train.plot import draw_training
from qpsft.train.progress import read_metrics
from qpsft.train.replay import MADE, ROWS
from qpsft.train.summary import RunSummary

METRICS = "metrics.jsonl"
WRITTEN_FILES = ".qpsft/files.json"
"""The record of a run: names of the files and checkpoints in its folder that are the run's, and may be replaced."""
VERIFY_PROMPTS = "verify_prompts.jsonl"
PLOT = "training.png"
RUN_RECORD = ".base_quantization.run.json"
"""The base of a run that is to replace an earlier run's adapter, until it does: the folder's own record vouches for the
adapter that is there."""


def numbers_at(folder: Path, step: int) -> dict[str, float]:
    """The last log line up to a step; the first, if that comes later."""
    lines = [line for line in read_metrics(folder / METRICS) if "nll" in line]
    return ([line for line in lines if line["step"] <= step] or lines[:1])[-1]


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure the results can be written to `folder`; removes nothing.

    Raises:
        OutputError: it is a file, cannot be written to, or holds another run; or there is nothing to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir {folder} is a file.", "Choose a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".qpsft-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"output_dir {folder} cannot be written to: {error.strerror}.", "Choose another with --output_dir."
        ) from None
    if resume:
        if newest_complete_checkpoint(folder) is None:
            raise OutputError(
                f"output_dir {folder} holds no whole checkpoint to resume from.",
                "Start the run anew with --overwrite.",
            )
        return
    holds_run = (folder / ADAPTER_WEIGHTS).exists() or read_metrics(folder / METRICS) or checkpoints(folder)
    if holds_run and not overwrite:
        raise OutputError(
            f"output_dir {folder} already holds a run.",
            "Give --resume to continue it, --overwrite to replace it, or another --output_dir.",
        )


def check_own_files(folder: Path, names: Iterable[str]) -> None:
    """Makes sure that nothing of the user's is replaced: of the files to be written, those there are an earlier run's.

    Raises:
        OutputError: others are there (named); or the record of what the runs wrote cannot be read.
    """
    ours = files_of_runs(folder)
    theirs = [name for name in sorted({*names, *(path.name for path in checkpoints(folder))}) if name not in ours]
    theirs = [name for name in theirs if os.path.lexists(folder / name)]
    if theirs:
        raise OutputError(
            f"output_dir {folder} holds {', '.join(theirs[:8])}{', …' if len(theirs) > 8 else ''}, which no run of "
            "qpsft wrote there and this one would replace.",
            "Move or rename what you want to keep and remove the rest, or choose another --output_dir. --overwrite "
            f"replaces only what an earlier run wrote ({WRITTEN_FILES} lists it).",
        )


def files_of_runs(folder: Path) -> set[str]:
    """Names of what runs wrote into a folder, checkpoints included. Raises OutputError if the record is damaged."""
    path = folder / WRITTEN_FILES
    if not path.is_file():
        return set()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["files"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path}, the record of what runs wrote there, cannot be read.",
            "Move what you want to keep out of the folder and remove it, or choose another --output_dir.",
        ) from error
    return {*names, *(path.name for path in checkpoints(folder))}


def record_files(folder: Path, names: Iterable[str]) -> None:
    """Adds names to the record. To be called before the files are written. Raises OutputError."""
    content = json.dumps({"files": sorted({*files_of_runs(folder), *names})}, indent=1) + "\n"
    try:
        (folder / WRITTEN_FILES).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WRITTEN_FILES, content)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.", "Free some space.") from error


def files_at_start(recipe: Recipe) -> set[str]:
    """Names of what a run writes before and while it trains."""
    replay = {ROWS, MADE} if recipe.data.replay_share and recipe.data.replay_dataset is None else set()
    return {METRICS, RECORD_FILE, RUN_RECORD, CHAT_DATE, CARD, *replay}  # TRL writes a card beside each checkpoint


def files_at_end(recipe: Recipe, folder: Path, tokenizer) -> set[str]:
    """Names of what a run writes when it has trained; a tokenizer's depend on its kind, so it is saved to see them."""
    with tempfile.TemporaryDirectory() as trial:
        tokenizer.save_pretrained(trial)
        names = set(os.listdir(trial))
    own = {ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD, PLOT, VERIFY_PROMPTS, resolved_name(recipe, folder)}
    return names | own


def clear_output(folder: Path) -> None:
    """Removes an earlier run's checkpoints and log; its adapter and its record stay until the new ones are there."""
    for checkpoint in checkpoints(folder):
        remove_folder(checkpoint)
    (folder / METRICS).unlink(missing_ok=True)


def write_outputs(recipe: Recipe, trainer, tokenizer, held_out, summary: RunSummary, tensors=None) -> list[str]:
    """Writes the adapter folder: everything under a temporary name first, then renamed into place.

    `tensors`: the adapter's, of a sharded model.

    Returns: the names written. Raises: OutputError, also where a file of the user's lies in the place of one; what was
    in the folder before is then untouched.
    """
    folder = summary.folder
    lines = read_metrics(folder / METRICS)
    try:
        with finished_files(folder, first=ADAPTER_WEIGHTS, last=RECORD_FILE) as partial:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, partial, tensors)
            # as the run began: it cannot be read off a sharded model, and the base's files may have changed since
            write_for_adapter(dataclasses.asdict(run_record(folder)), partial)
            tokenizer.save_pretrained(partial)
            draw_training(lines, partial / PLOT, f"{recipe.trainer.loss_type} on {data_name(recipe.data)}")
            options = resolved_name(recipe, folder)
            (partial / options).write_text(resolved_recipe(recipe), encoding="utf-8")
            card = model_card(recipe, summary, model.peft_config[POLICY], options)
            (partial / CARD).write_text(card, encoding="utf-8")
            with (partial / VERIFY_PROMPTS).open("w", encoding="utf-8") as file:
                for row in held_out:
                    file.write(json.dumps(_verify_prompt(row, tokenizer), ensure_ascii=False) + "\n")
            names = sorted(path.name for path in partial.iterdir())
            check_own_files(folder, names)  # what the user put there meanwhile
            record_files(folder, names)
        (folder / RUN_RECORD).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The adapter could not be written to {folder}: {error.strerror or error}.",
            "Free some space, then give --resume: training itself is done and continues from its last checkpoint.",
        ) from error
    replayed = {name for name in (ROWS, MADE) if (folder / name).is_file() and recipe.data.replay_share}
    return [*sorted({*names, *replayed}), METRICS]


def keep_run_record(record: dict[str, Any], folder: Path) -> None:
    """Keeps the base that a run begins with, for its adapter and for `--resume`. Raises OutputError."""
    name = RUN_RECORD if (folder / ADAPTER_WEIGHTS).exists() else RECORD_FILE
    write_record(record, folder / name)
    if name == RECORD_FILE:
        (folder / RUN_RECORD).unlink(missing_ok=True)


def run_record(folder: Path) -> BaseRecord | None:
    """The base that the run in a folder began with; None where there is no run. Raises BaseModelError: broken."""
    for name in (RUN_RECORD, RECORD_FILE):
        if (folder / name).is_file():
            return read_base_record(folder, name)
    return None


def resolved_name(recipe: Recipe, folder: Path) -> str:
    """`recipe.yaml`, unless there is one that the user wrote, or that this run was started with."""
    there = folder / "recipe.yaml"
    if not there.exists():
        return there.name
    started_with = recipe.path / "recipe.yaml" if recipe.path is not None and recipe.path.is_dir() else recipe.path
    own = started_with is not None and started_with.exists() and there.samefile(started_with)
    by_hand = not there.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN)
    return "recipe.resolved.yaml" if own or by_hand else there.name


def _verify_prompt(row: dict, tokenizer) -> dict:
    supervised = [i for i, label in enumerate(row["labels"]) if label != -100]
    return {
        "text": tokenizer.decode(row["input_ids"]),
        "input_ids": row["input_ids"],
        "prompt_length": supervised[0] if supervised else len(row["input_ids"]),
    }
