"""One run, from a recipe to an adapter folder."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from qpsft.data.chat_date import find_chat_date, keep_chat_date
from qpsft.errors import OutputError, QpsftError, RecipeError
from qpsft.files import finished_files
from qpsft.model.adapter import POLICY, add_adapter, save_adapter
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_base, set_pad_token
from qpsft.model.base_record import RECORD_FILE, base_record, read_base_record, write_base_record
from qpsft.model.continue_adapter import check_start, continue_adapter, recipe_tokenizer, warn_past_context
from qpsft.model.environment import check_machine, use_triton_where_it_runs
from qpsft.plan.memory_plan import warn_if_short
from qpsft.processes import from_main, is_main
from qpsft.psft.checkpoint import checkpoints, newest_complete_checkpoint, remove_folder
from qpsft.psft.config import PSFTConfig
from qpsft.psft.sharding import whole_policy
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import GuardArguments
from qpsft.recipe.file import Recipe
from qpsft.recipe.sources import data_name
from qpsft.terminal import wrap
from qpsft.train.data import mix_facts, mix_table, mix_use, read_training_data
from qpsft.train.evaluation import (
    best_step,
    evaluation_set_line,
    evaluation_summary,
    load_evaluation_set,
    stop_early,
)
from qpsft.train.guard import Guard
from qpsft.train.guard_set import GuardSet, load_guard_set
from qpsft.train.model_card import WRITTEN, model_card, resolved_recipe
from qpsft.train.out_of_memory import is_out_of_memory, out_of_memory
from qpsft.train.plot import draw_training
from qpsft.train.progress import ConsoleCallback, MetricsCallback, read_metrics
from qpsft.train.replay import MADE, ROWS, read_replay, replay_rows

METRICS = "metrics.jsonl"
VERIFY_PROMPTS = "verify_prompts.jsonl"
ADAPTER = "adapter_model.safetensors"


@dataclass
class RunSummary:
    """How a run ended.

    Attributes:
        folder: the adapter folder.
        numbers: the last log line of the adapter that is written: nll and entropy (nats per token), clip_fraction,
            tokens_per_second, ….
        steps: optimizer steps trained.
        written: the step of the adapter that is written: the last, the best, or the guard's.
        seconds: wall time of training.
        peak_bytes: the most memory in use: on the CUDA device if there is one, else the process's.
        files: names of what was written.
        data: what training did not take as it stands in the source, as in `DataCounts.facts`.
        notes: what the guard and the evaluations found and did.
    """

    folder: Path
    numbers: dict[str, float]
    steps: int
    written: int
    seconds: float
    peak_bytes: int
    files: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        n = self.numbers
        where = "GPU" if torch.cuda.is_available() else "process"
        return (
            f"trained {self.steps} steps in {self.seconds:.0f} s\n"
            f"  nll            {n['nll']:.4f} nats per token ({self._which_line()})\n"
            f"  entropy        {n['entropy']:.4f} nats per token\n"
            f"  clip fraction  {n['clip_fraction']:.1%}\n"
            f"  tokens/s       {n['tokens_per_second']:,.0f}\n"
            f"  peak memory    {self.peak_bytes / 1e9:.2f} GB ({where})\n"
            + "".join(f"{wrap(note)}\n" for note in self.notes)
            + f"adapter: {self.folder}\n"
            + textwrap.fill(", ".join(self.files), 80, initial_indent="  ", subsequent_indent="  ")
        )

    def _which_line(self) -> str:
        return "last log line" if self.written == self.steps else f"log line of step {self.numbers['step']}"

    def next_commands(self, recipe: Recipe) -> str:
        """The commands that usually come next."""
        lines = ["next:", f"  qpsft merge {self.folder}"]
        if checkpoints(self.folder):
            longer = "--max_steps" if recipe.trainer.max_steps > 0 else "--num_train_epochs"
            lines.append(f"  qpsft train {self.folder} --resume {longer} N   (to train longer)")
        return "\n".join(lines)


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> RunSummary:
    """Trains an adapter as `recipe` says and writes it to the recipe's `output_dir`; in one process or several.

    Args:
        callbacks: beside the progress bar and `metrics.jsonl`, such as `qpsft.train.notebook.LivePlot()`.

    Raises:
        QpsftError: every mistake a user can make, before training starts wherever it can be seen before.
    """
    arguments: PSFTConfig = recipe.trainer
    for name, value in (
        ("model_name_or_path", recipe.model.model_name_or_path),
        ("dataset_name", recipe.data.dataset_name or recipe.data.dataset_mix),
    ):
        if not value:
            raise RecipeError(f"{name} is missing.", f"Write `{name}: …` in the recipe or give --{name}.")
    check_machine(on_cpu=arguments.cpu_is_asked_for)
    folder = Path(arguments.output_dir)
    check_start(recipe)
    from_main(lambda: check_output(folder, resume=recipe.run.resume, overwrite=recipe.run.overwrite))

    tokenizer = recipe_tokenizer(recipe)
    recipe.data.chat_date = from_main(
        lambda: find_chat_date(recipe.data.chat_date, tokenizer, folder, anew=not recipe.run.resume)
    )
    use_triton_where_it_runs(arguments.device)
    data = read_training_data(recipe, tokenizer)
    replay = from_main(lambda: read_replay(recipe, tokenizer))
    evaluated = from_main(lambda: load_evaluation_set(recipe, tokenizer))
    guarded = from_main(lambda: load_guarded(recipe))
    if is_main():
        print("\n".join([*data.lines(), *([replay.line] if replay else [])]), flush=True)
        if evaluated is not None:
            print(evaluation_set_line(evaluated), flush=True)
        warn_past_context(recipe, data.longest)
    plan = warn_if_short(recipe, data.rows) if is_main() else None
    _forget_earlier_peak()
    model, _ = load_base(
        recipe.model.model_name_or_path,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        dtype=recipe.model.dtype,
        device="cpu" if arguments.use_cpu else "auto",
        attn_implementation=recipe.model.attn_implementation,
        revision=recipe.model.model_revision,
        trust_remote_code=arguments.trust_remote_code,
        quantized_on=quantized_before(recipe, folder),
        verbose=is_main(),
    )
    set_pad_token(model, tokenizer)
    if replay is not None:
        answers = from_main(lambda: replay_rows(replay, model, tokenizer, folder))
        data = data.with_replay(answers, replay.share)
        if is_main():
            print(data.lines()[-1], flush=True)
        _forget_earlier_peak()
    torch.manual_seed(arguments.seed)
    model = continue_adapter(model, recipe) if recipe.lora.adapter_name_or_path else add_adapter(model, recipe.lora)
    if recipe.run.resume:
        check_same_base(folder, base_record(model))
    rows, eval_rows = data.rows, None if evaluated is None else evaluated.dataset
    trainer = make_trainer(model, tokenizer, arguments, rows, folder, callbacks, eval_rows)
    stop_early(trainer, recipe.run.early_stopping_patience)
    if not arguments.packing:
        trainer.row_places = data.places
    uses = mix_use(trainer.train_dataset, arguments, trainer.rows_per_step()) if len(data.sources) > 1 else []
    if is_main():
        mix = mix_table(uses, trainer.rows_per_step()) if uses else []
        for line in [*setup_lines(trainer, len(rows) if arguments.packing else 0), *mix]:
            print(line, flush=True)
    guard = None
    if guarded is not None:
        guard = Guard(guarded, tokenizer, trained_before=bool(recipe.lora.adapter_name_or_path))
        guard.watch(trainer, resumed=recipe.run.resume)
    if not recipe.run.resume:
        from_main(lambda: clear_output(folder))
    from_main(lambda: write_base_record(model, folder))
    from_main(lambda: keep_chat_date(recipe.data.chat_date, folder))
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=recipe.run.resume or None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        step = trainer.state.global_step + 1
        raise out_of_memory(error, step, plan, newest_complete_checkpoint(folder)) from error
    seconds = time.perf_counter() - started
    if guard is not None:
        guard.finish()
    steps = trainer.state.global_step
    written = next((step for step in (guard and guard.written_step, best_step(trainer)) if step is not None), steps)
    numbers = from_main(lambda: numbers_at(folder, written))
    summary = RunSummary(
        folder, numbers, steps, written, seconds, _peak_bytes(), data=[*mix_facts(uses), *data.facts()]
    )
    summary.notes = evaluation_summary(trainer, recipe.run.early_stopping_patience)
    summary.notes += guard.summary() if guard is not None else []
    tensors = whole_policy(trainer.model)
    summary.files = from_main(lambda: write_outputs(recipe, trainer, tokenizer, data.held_out, summary, tensors))
    return summary


def load_guarded(recipe: Recipe) -> GuardSet | None:
    """The rows of the recipe's guard; None without one."""
    return load_guard_set(GuardArguments(**recipe.run.guard), recipe.data) if recipe.run.guard else None


def numbers_at(folder: Path, step: int) -> dict[str, float]:
    """The last log line up to a step; the first, if that comes later."""
    lines = [line for line in read_metrics(folder / METRICS) if "nll" in line]
    return ([line for line in lines if line["step"] <= step] or lines[:1])[-1]


def setup_lines(trainer: PSFTTrainer, rows: int) -> list[str]:
    """How rows are packed and where the reference policy lies, if that is worth a line; at most 80 columns."""
    arguments, lines = trainer.args, []
    if arguments.packing:
        packed = trainer.train_dataset
        full = sum(map(len, packed["input_ids"])) / (len(packed) * arguments.max_length)
        lines.append(
            f"packing: {rows:,} rows in {len(packed):,} of {arguments.max_length:,} tokens, {full:.1%} full; "
            f"{trainer.rows_per_step()} packed rows a step"
        )
    return [textwrap.fill(line, 80, subsequent_indent="  ") for line in lines]


def quantized_before(recipe: Recipe, folder: Path) -> str | None:
    """The kind of device that rounded the base of a run to be resumed, or of an adapter to be trained further."""
    if recipe.run.resume and (folder / RECORD_FILE).is_file():
        return read_base_record(folder).quantized_on
    if recipe.lora.adapter_name_or_path:
        adapter = AdapterFolder.find(recipe.lora.adapter_name_or_path)
        return adapter.record.quantized_on if adapter.has_record else None
    return None


def check_same_base(folder: Path, record: dict[str, Any]) -> None:
    """Refuses to go on with a run on another base, or on one rounded otherwise. Raises RecipeError naming it."""
    if not (folder / RECORD_FILE).is_file():
        return
    before = dataclasses.asdict(read_base_record(folder))
    for name, value in before.items():
        if name != "qpsft_version" and record[name] != value:
            raise RecipeError(
                f"The run in {folder} has {name} = {value}, this one {record[name]}.",
                "Resume with the base and the quantization the run began with.",
            )


def make_trainer(
    model,
    tokenizer,
    arguments: PSFTConfig,
    train_rows,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    eval_rows=None,
) -> PSFTTrainer:
    """The trainer of a command-line run: tokenized rows, our own progress bar and `metrics.jsonl`."""
    arguments.disable_tqdm = True  # ConsoleCallback has the bar
    arguments.dataloader_pin_memory = torch.cuda.is_available()
    if not arguments.packing:  # the rows are labelled and cut already
        arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
    try:
        trainer = PSFTTrainer(
            model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=[ConsoleCallback(), MetricsCallback(folder / METRICS), *callbacks],
        )
    except QpsftError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise RecipeError(
            f"The trainer cannot be set up: {str(error).splitlines()[0]}", "Change the option the message names."
        ) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


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
    holds_run = (folder / ADAPTER).exists() or read_metrics(folder / METRICS) or checkpoints(folder)
    if holds_run and not overwrite:
        raise OutputError(
            f"output_dir {folder} already holds a run.",
            "Give --resume to continue it, --overwrite to replace it, or another --output_dir.",
        )


def clear_output(folder: Path) -> None:
    """Removes an earlier run's checkpoints and log; its adapter stays until the new one is there."""
    for checkpoint in checkpoints(folder):
        remove_folder(checkpoint)
    (folder / METRICS).unlink(missing_ok=True)


def write_outputs(recipe: Recipe, trainer, tokenizer, held_out, summary: RunSummary, tensors=None) -> list[str]:
    """Writes the adapter folder: everything under a temporary name first, then renamed into place.

    `tensors`: the adapter's, of a sharded model.

    Returns: the names written. Raises: OutputError; what was in the folder before is then untouched.
    """
    folder = summary.folder
    lines = read_metrics(folder / METRICS)
    try:
        with finished_files(folder) as partial:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, partial, tensors)
            tokenizer.save_pretrained(partial)
            draw_training(lines, partial / "training.png", f"{recipe.trainer.loss_type} on {data_name(recipe.data)}")
            options = resolved_name(recipe, folder)
            (partial / options).write_text(resolved_recipe(recipe), encoding="utf-8")
            card = model_card(recipe, summary, model.peft_config[POLICY], options)
            (partial / "README.md").write_text(card, encoding="utf-8")
            with (partial / VERIFY_PROMPTS).open("w", encoding="utf-8") as file:
                for row in held_out:
                    file.write(json.dumps(_verify_prompt(row, tokenizer), ensure_ascii=False) + "\n")
            names = sorted(path.name for path in partial.iterdir())
    except OSError as error:
        raise OutputError(
            f"The adapter could not be written to {folder}: {error.strerror or error}.",
            "Free some space, then give --resume: training itself is done and continues from its last checkpoint.",
        ) from error
    replayed = {name for name in (ROWS, MADE) if (folder / name).is_file() and recipe.data.replay_share}
    return [*sorted({*names, RECORD_FILE, *replayed}), METRICS]


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


def _forget_earlier_peak() -> None:
    """Another run in this process, a comparison's for instance, does not count in this one's `peak_bytes`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
