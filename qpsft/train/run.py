"""One run, from a recipe to an adapter folder: everything is checked and read, then set up, trained, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from qpsft.data.chat_date import find_chat_date
from qpsft.data.tokenize import TokenizedRows, row_lengths
from qpsft.errors import Interrupted, QpsftError, RecipeError
from qpsft.model.adapter import add_adapter
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_base, set_pad_token
from qpsft.model.base_record import IDENTITY, RECORD_FILE, base_record, write_record
from qpsft.model.continue_adapter import check_start, continue_adapter, recipe_tokenizer, warn_past_context
from qpsft.model.environment import check_machine, use_triton_where_it_runs
from qpsft.plan.memory_plan import plan_run
from qpsft.plan.result import MemoryPlan
from qpsft.processes import from_main, is_main
from qpsft.psft.checkpoint import batch_sizes, checkpoints, newest_complete_checkpoint
from qpsft.psft.config import PSFTConfig
from qpsft.psft.sharding import whole_policy
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import GuardArguments
from qpsft.recipe.file import Recipe
from qpsft.terminal import wrap
from qpsft.train.data import StreamedData, TrainingData, mix_facts, mix_table, mix_use, read_training_data
from qpsft.train.evaluation import best_step, evaluation_set_line, evaluation_summary, load_evaluation_set, stop_early
from qpsft.train.guard import Guard
from qpsft.train.guard_set import GuardSet, load_guard_set
from qpsft.train.interruption import SaveAtSignal, how_to_go_on
from qpsft.train.out_of_memory import is_out_of_memory, out_of_memory
from qpsft.train.outputs import (
    METRICS,
    begin_run,
    check_output,
    check_own_files,
    files_at_end,
    files_at_start,
    locked_output,
    numbers_at,
    record_files,
    run_record,
    write_outputs,
)
from qpsft.train.progress import ConsoleCallback, MetricsCallback
from qpsft.train.replay import MADE, ROWS, Replay, read_replay, replay_rows, share_answers
from qpsft.train.summary import RunSummary, forget_earlier_peak, peak_bytes


@dataclass
class Inputs:
    """What a run is made from, read and checked: nothing of it needs the model.

    Attributes:
        output: where the results go.
        folder: the run's own, as of `check_output`.
        replay: the base's own answers that are to be trained on too; None without.
        evaluated: rows to evaluate on while training; None without.
        guarded: the guard's rows; None without a guard.
        plan: of the memory the run will take; None in other processes than the first, or where there is none.
    """

    output: Path
    folder: Path
    tokenizer: Any
    data: TrainingData | StreamedData
    replay: Replay | None
    evaluated: TokenizedRows | None
    guarded: GuardSet | None
    plan: MemoryPlan | None


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> RunSummary:
    """Trains an adapter as `recipe` says and writes it to the recipe's `output_dir`; in one process or several.

    Args:
        callbacks: beside the progress bar and `metrics.jsonl`, such as `qpsft.train.notebook.LivePlot()`.

    Raises:
        QpsftError: every mistake a user can make, before training starts wherever it can be seen before.
    """
    arguments, output = recipe.trainer, recipe.trainer.output_dir
    with contextlib.ExitStack() as held:
        progress = Progress()
        try:
            return _train(recipe, callbacks, held, progress)
        except KeyboardInterrupt as stop:
            text = how_to_go_on(recipe, Path(output), Path(arguments.output_dir), begun=progress.begun)
            raise Interrupted(text, getattr(stop, "number", signal.SIGINT)) from None
        finally:
            arguments.output_dir = output


@dataclass
class Progress:
    """Whether a run has come so far that its folder holds something of it."""

    begun: bool = False


def _train(
    recipe: Recipe, callbacks: Sequence[TrainerCallback], held: contextlib.ExitStack, progress: Progress
) -> RunSummary:
    inputs = read_inputs(recipe, held)
    recipe.trainer.output_dir = str(inputs.folder)
    forget_earlier_peak()
    model = load_policy(recipe, inputs)
    trainer = make_trainer(
        model,
        inputs.tokenizer,
        recipe.trainer,
        inputs.data.rows,
        inputs.folder,
        callbacks,
        None if inputs.evaluated is None else inputs.evaluated.dataset,
    )
    stop_early(trainer, recipe.run.early_stopping_patience)
    if not recipe.trainer.packing:
        trainer.row_places = inputs.data.places
    uses = _sources_used(trainer, inputs.data)
    guard = None
    if inputs.guarded is not None:
        guard = Guard(inputs.guarded, inputs.tokenizer, trained_before=bool(recipe.lora.adapter_name_or_path))
        guard.watch(trainer, resumed=recipe.run.resume)
    if not recipe.run.resume:
        beside = inputs.folder != inputs.output
        from_main(lambda: begin_run(recipe, inputs.folder, base_record(model), beside=beside))
    elif run_record(inputs.folder) is None:
        from_main(lambda: write_record(base_record(model), inputs.folder / RECORD_FILE))
    progress.begun = True
    interruption = SaveAtSignal()
    trainer.add_callback(interruption)
    with interruption:
        seconds = run_trainer(trainer, recipe, inputs)
    if guard is not None:
        guard.finish()
    summary = summarize(trainer, recipe, inputs, guard, seconds, mix_facts(uses))
    tensors = whole_policy(trainer.model)
    held_out = inputs.data.held_out
    summary.files = from_main(
        lambda: write_outputs(recipe, trainer, inputs.tokenizer, held_out, summary, inputs.folder, tensors)
    )
    return summary


def read_inputs(recipe: Recipe, held: contextlib.ExitStack) -> Inputs:
    """Checks the recipe against the machine and its folder, reads all rows, and prints what they are.

    Args:
        held: gets the lock on the folder.

    Raises:
        QpsftError: what can be refused before the model is loaded.
    """
    arguments: PSFTConfig = recipe.trainer
    for name, value in (
        ("model_name_or_path", recipe.model.model_name_or_path),
        ("dataset_name", recipe.data.dataset_name or recipe.data.dataset_mix),
    ):
        if not value:
            raise RecipeError(f"{name} is missing.", f"Write `{name}: …` in the recipe or give --{name}.")
    check_machine(on_cpu=arguments.cpu_is_asked_for)
    output = Path(arguments.output_dir)
    check_start(recipe)
    from_main(lambda: held.enter_context(locked_output(output)) and None)
    folder = from_main(lambda: check_output(output, resume=recipe.run.resume, overwrite=recipe.run.overwrite))

    tokenizer = recipe_tokenizer(recipe)
    recipe.data.chat_date = from_main(
        lambda: find_chat_date(recipe.data.chat_date, tokenizer, folder, anew=not recipe.run.resume)
    )
    from_main(
        lambda: check_own_files(
            output,
            {path.name for path in checkpoints(output)}
            | files_at_start(recipe)
            | files_at_end(recipe, output, tokenizer),
        )
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
    plan = settle_batch(recipe, data.rows, folder)
    return Inputs(output, folder, tokenizer, data, replay, evaluated, guarded, plan)


def settle_batch(recipe: Recipe, rows: Any, folder: Path) -> MemoryPlan | None:
    """Plans the run in process 0, and gives every process the batch sizes that `auto` stands for.

    They are those that a run to be resumed began with, else the plan's choice; where there is no plan, 2 x 8.
    """
    args: PSFTConfig = recipe.trainer

    def take(sizes: dict[str, Any]) -> None:
        for name, value in sizes.items():
            if name not in recipe.given or recipe.given[name] == "auto":
                setattr(args, name, value)
        args.activation_checkpointing = args.gradient_checkpointing  # its new name, which transformers goes by

    if args.automatic_batch and recipe.run.resume:
        take(from_main(lambda: batch_sizes(newest_complete_checkpoint(folder))))
        args.automatic_batch = False
    plan = plan_run(recipe, rows) if is_main() else None
    take(from_main(lambda: plan.chosen if plan is not None and plan.chosen else {}))
    if plan is not None and plan.chosen:
        print(wrap(f"batches: {plan.why_chosen}"), flush=True)
    return plan


def load_guarded(recipe: Recipe) -> GuardSet | None:
    """The rows of the recipe's guard; None without one."""
    return load_guard_set(GuardArguments(**recipe.run.guard), recipe.data) if recipe.run.guard else None


def load_policy(recipe: Recipe, inputs: Inputs) -> Any:
    """The base with a new adapter or the one to go on with. Before there is one, the base's own answers are sampled."""
    model, _ = load_base(
        recipe.model.model_name_or_path,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        dtype=recipe.model.dtype,
        device="cpu" if recipe.trainer.use_cpu else "auto",
        attn_implementation=recipe.model.attn_implementation,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.trainer.trust_remote_code,
        quantized_on=quantized_before(recipe, inputs.folder),
        verbose=is_main(),
    )
    set_pad_token(model, inputs.tokenizer)
    if (replay := inputs.replay) is not None:
        from_main(lambda: record_files(inputs.folder, {ROWS, MADE}))
        from_main(lambda: share_answers(inputs.output, inputs.folder))
        answers = from_main(lambda: replay_rows(replay, model, inputs.tokenizer, inputs.folder))
        inputs.data = inputs.data.with_replay(answers, replay.share)
        if is_main():
            print(inputs.data.lines()[-1], flush=True)
        forget_earlier_peak()
    torch.manual_seed(recipe.trainer.seed)
    model = continue_adapter(model, recipe) if recipe.lora.adapter_name_or_path else add_adapter(model, recipe.lora)
    if recipe.run.resume:
        check_same_base(inputs.folder, base_record(model))
    return model


def quantized_before(recipe: Recipe, folder: Path) -> str | None:
    """The kind of device that rounded the base of a run to be resumed, or of an adapter to be trained further."""
    if recipe.run.resume and (began := run_record(folder)) is not None:
        return began.quantized_on
    if recipe.lora.adapter_name_or_path:
        adapter = AdapterFolder.find(recipe.lora.adapter_name_or_path)
        return adapter.record.quantized_on if adapter.has_record else None
    return None


def check_same_base(folder: Path, record: dict[str, Any]) -> None:
    """Refuses to go on with a run on another base, or on one rounded otherwise. Raises RecipeError naming it."""
    began = run_record(folder)
    if began is None:
        return
    for name, value in dataclasses.asdict(began).items():
        not_known = value is None and name in IDENTITY
        if name not in ("qpsft_version", "adapter_sha256") and not not_known and record[name] != value:
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


def _sources_used(trainer: PSFTTrainer, data: TrainingData | StreamedData) -> list:
    """How the run uses each of several sources; printed, with how rows are packed."""
    size = trainer.rows_per_step()
    uses = mix_use(trainer.train_dataset, trainer.args, size) if len(data.sources) > 1 else []
    if is_main():
        packing = [packing_line(trainer, len(data.rows))] if trainer.args.packing else []
        for line in [*packing, *(mix_table(uses, size) if uses else [])]:
            print(line, flush=True)
    return uses


def packing_line(trainer: PSFTTrainer, rows: int) -> str:
    """How rows are packed; at most 80 columns."""
    packed, length = trainer.train_dataset, trainer.args.max_length
    full = sum(row_lengths(packed)) / (len(packed) * length)
    line = f"packing: {rows:,} rows in {len(packed):,} of {length:,} tokens, {full:.1%} full; "
    return textwrap.fill(f"{line}{trainer.rows_per_step()} packed rows a step", 80, subsequent_indent="  ")


def run_trainer(trainer: PSFTTrainer, recipe: Recipe, inputs: Inputs) -> float:
    """Trains. Returns wall time in seconds. Raises TrainingError where memory runs out, with what the plan suggests."""
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=recipe.run.resume or None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        step = trainer.state.global_step + 1
        raise out_of_memory(error, step, inputs.plan, newest_complete_checkpoint(inputs.folder)) from error
    return time.perf_counter() - started


def summarize(
    trainer: PSFTTrainer, recipe: Recipe, inputs: Inputs, guard: Guard | None, seconds: float, facts: list[str]
) -> RunSummary:
    """How the run ended, before anything is written. `facts`: on what was trained, before those on the rows."""
    steps = trainer.state.global_step
    chosen = (guard.written_step if guard is not None else None, best_step(trainer), steps)
    written = next(step for step in chosen if step is not None)
    numbers = from_main(lambda: numbers_at(inputs.folder, written))
    data = [*facts, *inputs.data.facts()]
    summary = RunSummary(inputs.output, numbers, steps, written, seconds, peak_bytes(), data=data)
    summary.notes = evaluation_summary(trainer, recipe.run.early_stopping_patience)
    summary.notes += guard.summary() if guard is not None else []
    return summary
