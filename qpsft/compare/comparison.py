"""Methods from the same start with as many steps each: which runs that takes, and what comes out.

    base ── tuning runs ── learning rate of each arm ── runs of all arms ── Comparison ── table, verdict, report
            (rates × tune_seeds)   (validation rows only)   (arms × seeds)

Every run's result is kept as soon as it is there (`qpsft.compare.run`); the same run is not done twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from qpsft.compare.arms import ARMS, DEFAULT_ARMS, Arm, find_arms, pairs, rate_source
from qpsft.compare.budget import fit
from qpsft.compare.coverage import coverage_notes, unseen_share
from qpsft.compare.data import (
    BASE_ANSWERS,
    BASE_SAMPLES,
    REPLAYED,
    answers_prompts,
    base_written,
    kept_by_default,
    load_data,
)
from qpsft.compare.figures import FIGURES
from qpsft.compare.measure import Measurement
from qpsft.compare.options import CompareOptions, load_comparison, parse_duration, rate_grid
from qpsft.compare.queue import RunQueue, TimeUp
from qpsft.compare.report import REPORT
from qpsft.compare.results import ArmResult, Comparison, is_accuracy, validation_score
from qpsft.compare.run import RunSpec, Setting, base_key, decisive_options, load_setting
from qpsft.data.chat_date import find_chat_date, keep_chat_date
from qpsft.data.tokenize import load_dataset
from qpsft.errors import DivergedError, OutputError, RecipeError, TrainingError
from qpsft.evaluate.rows import INSTRUCTION_CHECKS
from qpsft.files import finished_files, locked
from qpsft.model.base import load_tokenizer
from qpsft.model.environment import check_machine
from qpsft.recipe.file import Recipe
from qpsft.recipe.methods import REPLAY_SHARE
from qpsft.recipe.sources import replay_source
from qpsft.terminal import fill
from qpsft.train.outputs import check_own_files, record_files
from qpsft.train.replay import read_replay, replay_rows

RECORD = "comparison.json"
WRITTEN = (RECORD, REPORT, *(f"{name}.png" for name in FIGURES))
"""Files that a comparison replaces where an earlier one wrote them, and never where somebody else did."""
Specs = dict[float, dict[int, RunSpec]]
"""Learning rate -> seed -> run, of one arm."""


def compare(recipe: str | Path, flags: Sequence[str] = (), **options: Any) -> Comparison:
    """Compares arms as a recipe says and writes `comparison.json`, `report.html` and figures to its `output_dir`.

    ```python
    comparison = compare("adapters/mine", in_domain="test.jsonl", out_of_domain=["old_skills.jsonl"], seeds=3)
    print(comparison.difference("psft", "sft", "out_of_domain"))
    ```

    Args:
        recipe: a recipe file or its folder. Its loss_type, visits and blocks are the arms'; everything else is shared.
        flags: options of the recipe, as on the command line.
        **options: of `CompareOptions`.

    Raises:
        QpsftError: a mistake in the recipe, the options or the rows; a run that fails.
    """
    return compare_loaded(*load_comparison(recipe, flags, options))


def compare_loaded(
    recipe: Recipe, options: CompareOptions, *, noise: float | None = None, folder: Path | None = None
) -> Comparison:
    """`compare` with the recipe read.

    Args:
        noise: replaces the built-in demonstrations' own share of wrong rows.
        folder: replaces the recipe's `output_dir`.
    """
    find_arms(options.arms or DEFAULT_ARMS)  # a wrong name is said before the base is looked at
    folder = prepare(recipe, folder)
    options = replace(options, arms=options.arms or default_arms(recipe))
    _make_folder(results_folder(options, folder), "results_dir")
    started = time.perf_counter()
    with locked(folder), locked(results_folder(options, folder)):
        check_own_files(folder, WRITTEN)
        comparison = _compare(recipe, options, folder, noise, started)
        write(comparison, folder)
    return comparison


def _compare(recipe: Recipe, options: CompareOptions, folder: Path, noise: float | None, started: float) -> Comparison:
    """The runs and what comes out. `started`: of `time.perf_counter()`, where the budget begins."""
    arms = find_arms(options.arms)
    setting = make_setting(recipe, options, folder, noise)
    left_out: list[str] = []
    deadline = math.inf
    if options.budget is not None:
        deadline = time.monotonic() + parse_duration(options.budget) - (time.perf_counter() - started)
        fitted = fit(recipe, options, arms, setting, folder, started)
        arms, options, setting, left_out = fitted.arms, fitted.options, fitted.setting, fitted.left_out
    with RunQueue(setting, results_folder(options, folder), options.jobs, deadline) as runs:
        results, done = _run_in_time(arms, recipe, options, runs)
    if done.seeds < options.seeds:
        late = f"{options.seeds - done.seeds} of {options.seeds} seeds, as the time was up"
        left_out = [*left_out, f"{late} (the same command goes on with them)"]
        print(fill(f"left out: {left_out[-1]}"), flush=True)
    comparison = gather(results, arms, recipe, done, runs)
    comparison.left_out = left_out
    return comparison


def _run_in_time(
    arms: Sequence[Arm], recipe: Recipe, options: CompareOptions, runs: RunQueue
) -> tuple[RunResults, CompareOptions]:
    """The results of those seeds that every arm has by the queue's deadline, and the options with so many seeds.

    Raises:
        TrainingError: there is no such seed.
    """
    for seeds in range(options.seeds, 0, -1):
        fewer = replace(options, seeds=seeds, tune_seeds=min(options.tune_seeds, seeds))
        with contextlib.suppress(TimeUp):  # after the first time nothing is run, only what was done is gathered
            return run_arms(arms, recipe, fewer, runs), fewer
    raise TrainingError(
        f"The budget of {options.budget} was up before every method had a run.",
        "Repeat the same command: finished runs are kept, and it goes on with the others.",
    )


def default_arms(recipe: Recipe) -> list[str]:
    """`DEFAULT_ARMS`; without those that replay where neither the recipe nor the base has anything to replay."""
    own = recipe.data.replay_prompts is not None or recipe.data.replay_dataset is not None
    if own or answers_prompts(recipe, _tokenizer(recipe)):
        return list(DEFAULT_ARMS)
    arms = [name for name in DEFAULT_ARMS if "replay_share" not in ARMS[name].keeps]
    print(fill(f"arms: {', '.join(arms)} (replay needs a base with a chat template, or replay_prompts)"), flush=True)
    return arms


def _tokenizer(recipe: Recipe) -> Any:
    model = recipe.model
    return load_tokenizer(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=recipe.trainer.trust_remote_code
    )


def prepare(recipe: Recipe, folder: Path | None = None) -> Path:
    """Makes the output folder.

    Raises:
        OutputError: it cannot be written to. RecipeError: the recipe names no base, starts from an adapter, or resumes.
    """
    if recipe.run.resume:
        raise RecipeError("A comparison needs no --resume: finished runs are kept and reused.", "Leave it out.")
    if not recipe.model.model_name_or_path:
        raise RecipeError("model_name_or_path is missing.", "Write `model_name_or_path: …` in the recipe.")
    if recipe.lora.adapter_name_or_path:
        raise RecipeError(
            "adapter_name_or_path: a comparison's methods start from the bare base.",
            "Leave it out.",
        )
    check_machine(on_cpu=recipe.trainer.cpu_is_asked_for)
    folder = folder or Path(recipe.trainer.output_dir)
    _make_folder(folder, "output_dir")
    return folder


def _make_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{option} {folder} cannot be written to: {error.strerror}.", f"Choose another with --{option}."
        ) from None


def results_folder(options: CompareOptions, folder: Path) -> Path:
    """Where the runs' results are kept."""
    return Path(options.results_dir) if options.results_dir else folder / "results"


def make_setting(recipe: Recipe, options: CompareOptions, folder: Path, noise: float | None = None) -> Setting:
    """What all runs share: the base, the rows, the options of training and of measurement."""
    model, tokenizer = recipe.model, _tokenizer(recipe)
    results = results_folder(options, folder)
    recipe.data.chat_date = find_chat_date(recipe.data.chat_date, tokenizer, results)
    keep_chat_date(recipe.data.chat_date, results)
    measurement = Measurement(
        k=options.k,
        temperatures=tuple(options.temperatures),
        sample_rows=options.sample_rows,
        max_new_tokens=options.max_new_tokens,
        verifier=options.verifier,
        arguments=recipe.data,
    )
    key = base_key(model.model_name_or_path, model.model_revision)
    steps = recipe.trainer.logging_steps
    setting = Setting(model, recipe.lora, decisive_options(recipe), steps, key, None, measurement)
    if options.out_of_domain is None:
        options.out_of_domain = kept_by_default(recipe, tokenizer)
        _tell_default(options.out_of_domain)
    written = {
        name: base_written(
            name, lambda: load_setting(setting), folder / f"{name}-{setting.rounded_key}.jsonl", recipe.data
        )
        for name in (BASE_SAMPLES, BASE_ANSWERS)
        if name in (options.out_of_domain or ())
    }
    setting.data = load_data(recipe, options, tokenizer, noise=noise, written=written)
    if any("replay_share" in ARMS[name].keeps for name in options.arms or ()):
        part = REPLAYED if BASE_ANSWERS in written else slice(None)
        setting.replay = load_replay(recipe, tokenizer, lambda: load_setting(setting), folder, part)
    return setting


def _tell_default(names: list[str] | None) -> None:
    """Says what is measured out of domain though nobody named it."""
    if names is not None:
        what = {
            INSTRUCTION_CHECKS: "instructions that a program checks",
            BASE_ANSWERS: "the base's own answers to general prompts",
            BASE_SAMPLES: "text sampled from the base",
        }
        named = " and ".join(what[name] for name in names)
        print(fill(f"kept: measured on {named} (--out_of_domain FILE … for your own, or nothing)"), flush=True)


def load_replay(
    recipe: Recipe,
    tokenizer: Any,
    load: Callable[[], tuple[Any, Any]],
    folder: Path,
    part: slice = slice(None),
) -> datasets.Dataset:
    """The rows that arms with replay train on too: of `replay_dataset`, or the base's own answers, kept in `folder`.

    Args:
        load: returns the base, without an adapter, and its tokenizer.
        part: which of the prompts that come with qpsft it answers; the others' answers are measured.
    """
    data = replace(recipe.data, replay_share=recipe.data.replay_share or REPLAY_SHARE)
    if (source := replay_source(data)) is not None:
        return load_dataset(source, tokenizer, recipe.trainer.max_length).dataset
    replay = read_replay(replace(recipe, data=data), tokenizer)
    if data.replay_prompts is None:
        replay = replace(replay, prompts=replay.prompts[part])
    return replay_rows(replay, load()[0], tokenizer, folder).dataset


@dataclass
class RunResults:
    """The results of a comparison's runs.

    Attributes:
        base: of the base, which is only measured.
        rates: arm -> the learning rate it is compared at.
        unseen: arm -> share of the training rows that its runs never reach.
        runs: arm -> learning rate -> seed -> result.
    """

    base: dict[str, Any]
    rates: dict[str, float]
    unseen: dict[str, float]
    runs: dict[str, dict[float, dict[int, dict[str, Any]]]] = field(default_factory=dict)


def run_arms(arms: Sequence[Arm], recipe: Recipe, options: CompareOptions, runs: RunQueue) -> RunResults:
    """Runs the base, the tuning grid, then every arm at its learning rate on every seed; kept results are reused."""
    seeds = range(recipe.trainer.seed, recipe.trainer.seed + options.seeds)
    epochs = options.epochs or recipe.trainer.num_train_epochs
    methods = {arm.name: arm.options(recipe.trainer, recipe.data.replay_share) for arm in arms}
    rows = runs.setting.data.train
    unseen = {name: unseen_share(method, recipe.trainer, epochs, rows) for name, method in methods.items()}
    visits = {name: method.get("num_iterations", 1) for name, method in methods.items()}
    for note in coverage_notes(unseen, visits, max_steps=recipe.trainer.max_steps):
        warnings.warn(note, stacklevel=1)  # blamed on this module: terminal.py shows the warnings of qpsft only

    def specs(arm: Arm, rate: float, seeds: Sequence[int]) -> dict[int, RunSpec]:
        return {seed: RunSpec(methods[arm.name], rate, seed, epochs) for seed in seeds}

    known_rates = options.arm_rates or {}
    tuned = [arm for arm in arms if options.tune and rate_source(arm, arms) == arm.name and arm.name not in known_rates]
    tuning = {
        arm.name: {rate: specs(arm, rate, seeds[: options.tune_seeds]) for rate in rate_grid(options, recipe)}
        for arm in tuned
    }
    base = RunSpec({})
    first = [spec for grid in tuning.values() for at_rate in grid.values() for spec in at_rate.values()]
    later = max(0, len(seeds) - options.tune_seeds) * len(tuned) + (len(arms) - len(tuned)) * len(seeds)
    runs.expect(1 + len(first) + later)
    done = runs.do([base, *first], may_diverge=True)
    rates = _rates(arms, recipe, options, tuning, done, runs.setting.data.metric)
    last = {arm.name: specs(arm, rates[arm.name], seeds) for arm in arms}
    needed = [last[arm.name][seed] for seed in seeds for arm in arms]  # whole seeds, should the time be up
    # Asked for again, a run of another arm's grid that diverged, as it was allowed to there, is an error.
    done |= runs.do([spec for spec in needed if spec not in done or "diverged" in done[spec]])
    results = RunResults(done[base], rates, unseen)
    for arm, at_rate in last.items():
        by_rate = dict(tuning.get(arm, {}))
        by_rate[rates[arm]] = by_rate.get(rates[arm], {}) | at_rate
        results.runs[arm] = {rate: {seed: done[s] for seed, s in by_seed.items()} for rate, by_seed in by_rate.items()}
    return results


def _rates(
    arms: Sequence[Arm],
    recipe: Recipe,
    options: CompareOptions,
    tuning: dict[str, Specs],
    done: dict[RunSpec, dict[str, Any]],
    metric: str,
) -> dict[str, float]:
    """Arm -> its learning rate: chosen on the validation rows, given, the recipe's, or that of the arm it follows.

    Raises:
        DivergedError: an arm diverged at every rate of the grid.
    """
    sign = 1 if is_accuracy("validation", metric) else -1
    rates = {arm.name: (options.arm_rates or {}).get(arm.name, recipe.trainer.learning_rate) for arm in arms}
    for name, by_rate in tuning.items():
        scores = {rate: [validation_score(done[s]) for s in at_rate.values()] for rate, at_rate in by_rate.items()}
        rates[name] = choose_rate(scores, sign)
        diverged = [done[s]["diverged"] for s in by_rate[rates[name]].values() if "diverged" in done[s]]
        if diverged:  # the best rate did, so all of them
            raise DivergedError(
                f"{name} diverged at every learning rate of the grid ({', '.join(f'{rate:g}' for rate in by_rate)}); "
                f"at the lowest: {diverged[0]['error']}",
                "Give lower ones with --learning_rates. If the lowest should work, look at the rows named.",
                diverged[0]["step"],
            )
    return {arm.name: rates[rate_source(arm, arms)] for arm in arms}


def choose_rate(scores: dict[float, list[float]], sign: int) -> float:
    """The learning rate with the best mean validation score; of equal ones the lowest.

    Args:
        scores: learning rate -> validation scores at the last epoch, by seed; NaN where training diverged. A rate with
            a score that is not finite is worse than any other.
        sign: 1 if a higher score is better, else -1.
    """

    def rank(rate: float) -> float:
        mean = sign * sum(scores[rate]) / len(scores[rate])
        return mean if math.isfinite(mean) else -math.inf

    return max(sorted(scores), key=rank)


def gather(
    results: RunResults, arms: Sequence[Arm], recipe: Recipe, options: CompareOptions, runs: RunQueue
) -> Comparison:
    """The runs' results as a `Comparison`."""
    setting = runs.setting
    trained = [r for by_rate in results.runs.values() for by_seed in by_rate.values() for r in by_seed.values()]
    every = [results.base, *trained]
    return Comparison(
        name=setting.data.name,
        metric=setting.data.metric,
        base=results.base["points"][0]["metrics"],
        base_completions=results.base["completions"],
        arms={
            arm.name: ArmResult(
                arm.name,
                arm.what,
                results.rates[arm.name],
                rate_source(arm, arms) == arm.name,
                results.runs[arm.name][results.rates[arm.name]],
                results.runs[arm.name] if len(results.runs[arm.name]) > 1 else {},
                round(results.unseen[arm.name], 4),
            )
            for arm in arms
        },
        pairs=pairs(arms, results.rates),
        overlap=setting.data.overlap,
        counts=setting.data.counts,
        shortened=setting.data.shortened,
        settings={
            "comparison": asdict(options),
            "methods": {arm.name: arm.options(recipe.trainer, recipe.data.replay_share) for arm in arms},
            "base": asdict(setting.model) | {"weights": setting.base_key},
            "adapter": asdict(setting.lora),
            "training": setting.options,
            "versions": _distinct(result["versions"] for result in every),
            "machines": sorted({result["machine"] for result in every}),
        },
        reused=runs.reused,
        done=runs.done,
    )


def _distinct(versions: Iterator[dict[str, str]]) -> dict[str, str]:
    """Package -> its version, or all versions that some run was done with."""
    versions_of: dict[str, set[str]] = {}
    for one in versions:
        for name, version in one.items():
            versions_of.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(values)) for name, values in versions_of.items()}


def write(comparison: Comparison, folder: Path) -> None:
    """Writes the record, the page and its figures.

    Raises:
        OutputError: they cannot be written.
    """
    from qpsft.compare.answer import answer
    from qpsft.compare.report import write_report
    from qpsft.compare.verdict import limits, verdict

    said = {"answer": answer(comparison), "verdict": verdict(comparison), "limits": limits(comparison)}
    try:
        record_files(folder, WRITTEN)
        with finished_files(folder) as partial:
            text = json.dumps(said | comparison.to_dict(), indent=1, ensure_ascii=False)
            (partial / RECORD).write_text(text + "\n", encoding="utf-8")
            write_report(comparison, partial)
    except OSError as error:
        raise OutputError(
            f"The report could not be written to {folder}: {error.strerror}.",
            "Run the same command again when it can be: all runs are kept.",
        ) from error
