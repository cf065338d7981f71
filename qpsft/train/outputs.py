"""The folder of a run: whether it can be written to, and what is written into it at the end.

A run that is to replace an earlier one is written beside it, in the folder `.qpsft/new` of its output_dir, as if it
were alone. When it is whole, its files take the earlier ones' places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpsft.data.chat_date import CHAT_DATE, keep_chat_date
from qpsft.errors import OutputError
from qpsft.files import finished_files, locked, move, write_atomically
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
from qpsft.psft.checkpoint import check_bytes, checkpoints, newest_complete_checkpoint, remove_folder
from qpsft.recipe.file import Recipe
from qpsft.recipe.sources import data_name
from qpsft.train.model_card import WRITTEN, model_card, resolved_recipe
from qpsft.train.plot import draw_training
from qpsft.train.progress import read_metrics
from qpsft.train.replay import MADE, ROWS
from qpsft.train.summary import RunSummary

METRICS = "metrics.jsonl"
RESOLVED = "recipe.yaml"
RUN_FOLDER = ".qpsft"
WRITTEN_FILES = f"{RUN_FOLDER}/files.json"
"""The record of a run: names of the files and checkpoints in its folder that are the run's, and may be replaced."""
VERIFY_PROMPTS = "verify_prompts.jsonl"
PLOT = "training.png"
NEW_RUN = f"{RUN_FOLDER}/new"
"""The folder, in that of an earlier run, of the run that is to replace it, until it is whole."""
WHOLE = f"{RUN_FOLDER}/whole"
"""In a new run's folder: it is whole, and these files of it are taking their places."""


def numbers_at(folder: Path, step: int) -> dict[str, float]:
    """The last log line up to a step; the first, if that comes later."""
    lines = [line for line in read_metrics(folder / METRICS) if "nll" in line]
    return ([line for line in lines if line["step"] <= step] or lines[:1])[-1]


@contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of it meanwhile. At the end it is removed if nothing is in it.

    Raises:
        OutputError: it is a file, cannot be written to, or another process writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir {folder} is a file.", "Choose a folder.")
    is_new = not folder.exists()
    _check_writable(folder)
    try:
        with locked(folder):
            yield
    finally:
        with contextlib.suppress(OSError):
            (folder / NEW_RUN).rmdir()  # of a run that was refused before it began
            (folder / RUN_FOLDER).rmdir()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".qpsft-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"output_dir {folder} cannot be written to: {error.strerror}.", "Choose another with --output_dir."
        ) from None


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """Makes sure the results can be written to `folder`, which exists; removes nothing.

    Returns:
        The run's own folder: `folder`, or `NEW_RUN` in it for a run that is to replace the one that is there.

    Raises:
        OutputError: it holds another run, or there is nothing to resume.
        TrainingError: the checkpoint to resume from is damaged.
    """
    new = folder / NEW_RUN
    if (new / WHOLE).is_file():  # whoever brought the files to their places was killed
        take_place(new, folder)
    if resume:
        place = new if (new / RECORD_FILE).is_file() else folder
        newest = newest_complete_checkpoint(place)
        if newest is None:
            kept = f" To continue the run that it was to replace, remove {new} first." if place == new else ""
            raise OutputError(
                f"output_dir {folder} holds no whole checkpoint to resume from.",
                f"Start the run anew with --overwrite.{kept}",
            )
        check_bytes(newest)
        return place
    if not holds_run(folder):
        return folder
    if not overwrite:
        raise OutputError(
            f"output_dir {folder} already holds a run.",
            "Give --resume to continue it, --overwrite to replace it, or another --output_dir.",
        )
    return new


def holds_run(folder: Path) -> bool:
    """Whether a run has written into a folder, to its end or not."""
    return (folder / ADAPTER_WEIGHTS).exists() or bool(read_metrics(folder / METRICS) or checkpoints(folder))


def check_own_files(folder: Path, names: Iterable[str]) -> None:
    """Makes sure that nothing of the user's is replaced: of the files to be written, those there are an earlier run's.

    Raises:
        OutputError: others are there (named); or the record of what the runs wrote cannot be read.
    """
    ours = files_of_runs(folder)
    theirs = [name for name in sorted(set(names) - ours) if os.path.lexists(folder / name)]
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
    return {*_names_in(path), *(path.name for path in checkpoints(folder))}


def _names_in(path: Path) -> set[str]:
    """The names in a list of what runs wrote. Raises OutputError where it cannot be read."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["files"]
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path}, the record of what runs wrote there, cannot be read.",
            "Move what you want to keep out of the folder and remove it, or choose another --output_dir.",
        ) from error
    return set(names)


def _is_name(name: Any) -> bool:
    """Whether it names something in the folder itself: a folder from somebody else must not name what lies outside."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\"} & set(name)


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
    return {METRICS, RECORD_FILE, CHAT_DATE, CARD, *replay}  # TRL writes a card beside each checkpoint


def files_at_end(recipe: Recipe, folder: Path, tokenizer) -> set[str]:
    """Names of what a run writes when it has trained; a tokenizer's depend on its kind, so it is saved to see them."""
    with tempfile.TemporaryDirectory() as trial:
        tokenizer.save_pretrained(trial)
        names = set(os.listdir(trial))
    own = {ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD, PLOT, VERIFY_PROMPTS, resolved_name(recipe, folder)}
    return names | own


def begin_run(recipe: Recipe, folder: Path, record: dict[str, Any], *, beside: bool) -> None:
    """Writes what a run begins with into its own folder: the list of its files, its base, the day it renders with.

    Args:
        record: `base_record` of the model.
        beside: `folder` is `NEW_RUN` in another run's. What a run left there that was cut off goes first, but for the
            base's answers, which can be used again.

    Raises:
        OutputError: the folder cannot be written.
    """
    if beside:
        for checkpoint in checkpoints(folder):
            remove_folder(checkpoint)
        for name in files_of_runs(folder) - {ROWS, MADE}:
            (folder / name).unlink(missing_ok=True)
    record_files(folder, files_at_start(recipe))
    write_record(record, folder / RECORD_FILE)
    keep_chat_date(recipe.data.chat_date, folder)


def write_outputs(
    recipe: Recipe, trainer, tokenizer, held_out, summary: RunSummary, folder: Path, tensors=None
) -> list[str]:
    """Writes the adapter folder: everything under a temporary name first, then renamed into place.

    Args:
        folder: the run's own, which is `summary.folder` unless it replaces an earlier run.
        tensors: the adapter's, of a sharded model.

    Returns: the names written. Raises: OutputError, also where a file of the user's lies in the place of one; what was
    in the folder before is then untouched.
    """
    output = summary.folder
    lines = read_metrics(folder / METRICS)
    try:
        with finished_files(folder, first=ADAPTER_WEIGHTS, last=RECORD_FILE) as partial:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, partial, tensors)
            # as the run began: it cannot be read off a sharded model, and the base's files may have changed since
            write_for_adapter(dataclasses.asdict(read_base_record(folder)), partial)
            tokenizer.save_pretrained(partial)
            draw_training(lines, partial / PLOT, f"{recipe.trainer.loss_type} on {data_name(recipe.data)}")
            options = resolved_name(recipe, output)
            (partial / options).write_text(resolved_recipe(recipe), encoding="utf-8")
            card = model_card(recipe, summary, model.peft_config[POLICY], options)
            (partial / CARD).write_text(card, encoding="utf-8")
            with (partial / VERIFY_PROMPTS).open("w", encoding="utf-8") as file:
                for row in held_out:
                    file.write(json.dumps(_verify_prompt(row, tokenizer), ensure_ascii=False) + "\n")
            names = sorted(path.name for path in partial.iterdir())
            check_own_files(output, names)  # what the user put there meanwhile
            record_files(folder, names)
        if folder != output:
            there = sorted(name for name in files_of_runs(folder) if os.path.lexists(folder / name))
            write_atomically(folder / WHOLE, json.dumps({"files": there}))
            take_place(folder, output)
    except OSError as error:
        raise OutputError(
            f"The adapter could not be written to {output}: {error.strerror or error}.",
            "Free some space, then give --resume: training itself is done and continues from its last checkpoint.",
        ) from error
    replayed = {name for name in (ROWS, MADE) if (output / name).is_file() and recipe.data.replay_share}
    return [*sorted({*names, *replayed}), METRICS]


def take_place(new: Path, folder: Path) -> None:
    """Puts the files of a whole new run into the places of an earlier run's, and removes what only that one had.

    The adapter goes first and its record last, so whoever is killed in between leaves a pair that no verb takes for
    one run's; the next run or `--resume` there finds `WHOLE`, and goes on. The recipe that the earlier run wrote stays
    where the new one wrote another: people edit it.

    Raises:
        OutputError: the folder cannot be written.
    """
    names, before = _names_in(new / WHOLE), files_of_runs(folder)
    record_files(folder, names)
    try:
        for name in sorted(names - {RECORD_FILE}, key=lambda name: (name != ADAPTER_WEIGHTS, name)):
            if os.path.lexists(new / name):
                if (folder / name).is_dir():
                    _remove(folder / name)
                move(new / name, folder / name)
        for name in before - names - {RESOLVED}:
            _remove(folder / name)
        if (new / RECORD_FILE).is_file():
            move(new / RECORD_FILE, folder / RECORD_FILE)
        for path in list(new.iterdir()):  # what loggers wrote
            if path.name != RUN_FOLDER and not os.path.lexists(folder / path.name):
                move(path, folder / path.name)
        (new / WHOLE).unlink(missing_ok=True)
        remove_folder(new)
    except OSError as error:
        raise OutputError(
            f"The run in {new} is whole, and its files could not be moved to {folder}: {error.strerror or error}.",
            "Check the disk and its permissions, then give --resume: it moves the rest.",
        ) from error


def _remove(path: Path) -> None:
    """A file, a folder, or a link and not what it leads to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def run_record(folder: Path) -> BaseRecord | None:
    """The base that the run in a folder began with; None where there is no run. Raises BaseModelError: broken."""
    return read_base_record(folder) if (folder / RECORD_FILE).is_file() else None


def resolved_name(recipe: Recipe, folder: Path) -> str:
    """`recipe.yaml`, unless there is one that the user wrote, or that this run was started with."""
    there = folder / RESOLVED
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
