"""`--budget 30m`: the arms, seeds and rows that fit the time on this machine, from a short timed probe.

a few steps of each kind of arm, two small measurements ── seconds of a comparison ── the first choice that fits
(this base, these rows, this machine)                      (`estimate`)               (`ladder`, from all to the least)
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qpsft.compare.answer import CONTROL
from qpsft.compare.arms import Arm, rate_source
from qpsft.compare.coverage import run_steps
from qpsft.compare.data import ComparedData
from qpsft.compare.measure import Measurement, measure
from qpsft.compare.options import CompareOptions, parse_duration, rate_grid
from qpsft.compare.run import RunSpec, Setting, fitting_threads, load_setting, make_run_trainer
from qpsft.errors import RecipeError
from qpsft.files import digest, write_atomically
from qpsft.recipe.file import Recipe
from qpsft.terminal import fill

PROBE = "budget.json"
PROBE_FORMAT = 2
"""Goes up when the same probe gives other numbers than before, so that older ones are not reused."""
PROBE_STEPS, PROBE_SECONDS = 4, 3.0
"""A kind of arm trains for at least so many steps and so long."""
MOST_PROBE_STEPS = 64
PROBE_REPLAYED = 2
"""Replayed rows that the timed steps hold at least, as far as `MOST_PROBE_STEPS` allow: they may be longer."""
PROBE_SHARES = (1 / 16, 1 / 8)
"""Of each set's rows, in the two timed measurements: two give a line, a constant time and a time for every row."""
LEAST_ROWS = 128
ENOUGH_SEEDS, LEAST_SEEDS = 3, 2
MARGIN = 1.15


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        load: of loading the base, which every run does.
        step: arm -> of one optimizer step.
        measuring: of one measurement, whatever it measures; row: of each test row and each sample more.
        spent: of reading the rows and of the probe itself.
    """

    load: float
    step: dict[str, float]
    measuring: float
    row: float
    spent: float


@dataclass(frozen=True)
class Choice:
    """What is compared: `rows` is the share of the training rows, `tests` that of every set that is measured; `samples`
    whether completions are sampled for pass@k and entropy, which the answer does not need.
    """

    arms: tuple[str, ...]
    seeds: int
    tune_seeds: int
    rows: float = 1.0
    tests: float = 1.0
    samples: bool = True


@dataclass(frozen=True)
class Size:
    """What the time depends on beside `Costs`.

    Attributes:
        train: training rows. tests: test rows of all sets together. samples: completions that are sampled.
        steps: share of the training rows -> optimizer steps of a run.
        measurements: share of the training rows -> measurements of a run.
        rates: arm -> learning rates to try; 0 without tuning, and for an arm that takes another arm's rate.
        jobs: time of all runs one after another / time of them with --jobs.
    """

    train: int
    tests: int
    samples: int
    steps: Callable[[float], int]
    measurements: Callable[[float], int]
    rates: Mapping[str, int]
    jobs: int

    @property
    def cut_rows(self) -> int:
        """Training rows to cut from; 0 where `max_steps` sets the length of a run, as fewer rows then save no time."""
        return self.train if self.steps(0.5) < self.steps(1.0) else 0


def format_duration(seconds: float) -> str:
    """Such as 90s, 2m40s, 30m or 1h30m: rounded up, to whole minutes above ten."""
    if seconds < 120:
        return f"{math.ceil(seconds)}s"
    whole = math.ceil(seconds) if seconds <= 600 else 60 * math.ceil(seconds / 60)
    parts = {"h": whole // 3600, "m": whole // 60 % 60, "s": whole % 60}
    return "".join(f"{part}{unit}" for unit, part in parts.items() if part)


def measuring_seconds(choice: Choice, costs: Costs, size: Size) -> float:
    """Seconds of one measurement."""
    return costs.measuring + costs.row * choice.tests * (size.tests + size.samples * choice.samples)


def estimate(choice: Choice, costs: Costs, size: Size) -> float:
    """Seconds that a comparison takes from its start, with `MARGIN` on what is not measured but foreseen."""
    measuring = measuring_seconds(choice, costs, size)
    total = costs.load + measuring  # of the base
    for arm in choice.arms:
        own_rate = choice.seeds if not size.rates[arm] else max(0, choice.seeds - choice.tune_seeds)
        runs = own_rate + size.rates[arm] * choice.tune_seeds
        training = size.steps(choice.rows) * costs.step[arm]
        total += runs * (costs.load + training + size.measurements(choice.rows) * measuring)
    return costs.spent + MARGIN * total / size.jobs


def ladder(arms: Sequence[Arm], full: Choice, train: int) -> Iterator[Choice]:
    """Choices from all that was asked for to the least that can still say something, each cutting one thing more.

    Args:
        arms: that were asked for. train: training rows, 0 where fewer would save nothing.
    """
    choice = full
    yield choice

    def cut(**changes: Any) -> Iterator[Choice]:
        nonlocal choice
        if (smaller := replace(choice, **changes)) != choice:
            choice = smaller
            yield choice

    controls = {arm.name for arm in arms if arm.rate_of}
    names = full.arms
    methods = [name for name in names if name not in controls]
    two = {CONTROL if CONTROL in names else methods[0], methods[-1]}
    yield from cut(seeds=min(full.seeds, ENOUGH_SEEDS), tune_seeds=min(full.tune_seeds, ENOUGH_SEEDS))
    yield from cut(samples=False)
    yield from cut(tests=0.5)
    yield from cut(arms=tuple(methods))
    yield from cut(tests=0.25)
    if train >= 2 * LEAST_ROWS:
        yield from cut(rows=0.5)
    for name in methods:
        if name not in two:
            yield from cut(arms=tuple(other for other in choice.arms if other != name))
    while choice.rows * train >= 2 * LEAST_ROWS:
        yield from cut(rows=choice.rows / 2)
    yield from cut(tune_seeds=1)
    yield from cut(seeds=min(full.seeds, LEAST_SEEDS))  # last: an interval over two seeds can show next to nothing


def choose(arms: Sequence[Arm], full: Choice, costs: Costs, size: Size, budget: float) -> tuple[Choice, float]:
    """The first choice of the ladder that fits `budget` seconds, filled up with what fits as well, and its estimate.

    Raises:
        RecipeError: even the least does not fit; it says what the least takes.
    """
    cuts: list[Choice] = []
    for choice in ladder(arms, full, size.cut_rows):
        seconds = estimate(choice, costs, size)
        if seconds <= budget:
            return _filled(choice, cuts, costs, size, budget)
        cuts.append(choice)
    least = format_duration(seconds)
    rows = _share(size.train, choice.rows)
    raise RecipeError(
        f"A budget of {format_duration(budget)} is too short: the least that says something, "
        f"{' and '.join(choice.arms)} with {choice.seeds} seeds on {rows:,} rows, takes about {least} on this machine.",
        f"Give --budget {least}, fewer --epochs, or a smaller base.",
    )


def _filled(choice: Choice, cuts: Sequence[Choice], costs: Costs, size: Size, budget: float) -> tuple[Choice, float]:
    """The choice without those cuts, the last first, that gained too little: of rows, where only measuring is slow."""
    for earlier in reversed(cuts):
        for name in ("rows", "arms", "tests", "samples", "tune_seeds", "seeds"):
            larger = replace(choice, **{name: getattr(earlier, name)})
            if larger.tune_seeds <= larger.seeds and estimate(larger, costs, size) <= budget:
                choice = larger
    return choice, estimate(choice, costs, size)


def left_out(full: Choice, choice: Choice, size: Size) -> list[str]:
    """What a choice leaves out of all that was asked for, a line each."""
    lines = []
    if choice.seeds < full.seeds:
        lines.append(f"{full.seeds - choice.seeds} of {full.seeds} seeds")
    if choice.tune_seeds < full.tune_seeds and any(size.rates.values()):
        lines.append(f"{full.tune_seeds - choice.tune_seeds} of {full.tune_seeds} seeds that rates are chosen on")
    if full.samples and not choice.samples and size.samples:
        lines.append("samples for pass@k and entropy")
    if arms := [arm for arm in full.arms if arm not in choice.arms]:
        lines.append(f"{'arm' if len(arms) == 1 else 'arms'} {', '.join(arms)}")
    if choice.rows < full.rows:
        lines.append(f"training rows: {_share(size.train, choice.rows):,} of {size.train:,} are used")
    if choice.tests < full.tests:
        lines.append(f"test rows: {choice.tests:.0%} of each set are used")
    return lines


# ---- applied to a comparison ----


@dataclass
class Fitted:
    """What `fit` made of a comparison: the arms, options and setting to compare with, and `left_out` in words."""

    arms: list[Arm]
    options: CompareOptions
    setting: Setting
    left_out: list[str]


def fit(
    recipe: Recipe,
    options: CompareOptions,
    arms: list[Arm],
    setting: Setting,
    folder: Path,
    started: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Fitted:
    """Cuts a comparison to its budget and says so.

    Args:
        setting: made with all that was asked for.
        folder: where the probe's result is kept, so that the same command goes on with the same runs.
        started: when the comparison began, by `clock`.

    Raises:
        RecipeError: nothing fits.
    """
    budget = parse_duration(options.budget)
    epochs = options.epochs or recipe.trainer.num_train_epochs
    methods = {arm.name: arm.options(recipe.trainer, recipe.data.replay_share) for arm in arms}
    specs = {
        name: RunSpec(method, recipe.trainer.learning_rate, recipe.trainer.seed, epochs)
        for name, method in methods.items()
    }
    keys = {name: spec.key(setting) for name, spec in specs.items()}
    key = digest(json.dumps([PROBE_FORMAT, keys, options.jobs]))[:16]
    costs = _kept_costs(folder / PROBE, key)
    if costs is None:
        costs = probe(specs, setting, options.jobs, started, clock)
        write_atomically(folder / PROBE, json.dumps({"key": key, "costs": asdict(costs)}, indent=1) + "\n")
    size = _size(recipe, options, arms, setting, epochs)
    full = Choice(tuple(dict.fromkeys(options.arms)), options.seeds, options.tune_seeds)
    choice, seconds = choose(arms, full, costs, size, budget)
    lines = left_out(full, choice, size)
    steps = ", ".join(f"{name} {costs.step[name]:.2g} s" for name in choice.arms)
    measuring = measuring_seconds(choice, costs, size)
    what = f"{', '.join(choice.arms)}, {choice.seeds} seeds and {_share(size.train, choice.rows):,} rows"
    measured = f"measured: a step takes {steps}, a measurement {measuring:.2g} s"
    print(fill(f"budget {options.budget}: about {format_duration(seconds)} for {what} ({measured})"), flush=True)
    print(fill(f"left out: {'; '.join(lines) or 'nothing'}"), flush=True)
    fitted = replace(
        options,
        arms=list(choice.arms),
        seeds=choice.seeds,
        tune_seeds=choice.tune_seeds,
        sample_rows=_share(options.sample_rows, choice.tests),
        k=options.k if choice.samples else 0,
    )
    measurement = replace(setting.measurement, sample_rows=fitted.sample_rows, k=fitted.k)
    setting = replace(setting, data=cut_data(setting.data, choice), measurement=measurement)
    return Fitted([arm for arm in arms if arm.name in choice.arms], fitted, setting, lines)


def cut_data(data: ComparedData, choice: Choice) -> ComparedData:
    """The rows that a choice leaves. Rows that were set aside stay so: fewer rows to train on are no fewer to test on.

    `overlap`, and the rows `dropped`, are those of all rows.
    """
    if choice.rows == choice.tests == 1:
        return data
    train = data.train.select(_drawn(len(data.train), choice.rows))
    sets = {label: rows.select(_drawn(len(rows.rows), choice.tests)) for label, rows in data.sets().items()}
    counts = {"train": len(train), **{label: len(rows.rows) for label, rows in sets.items()}}
    limit = data.shortened.get("max_length")
    long = sum(len(ids) == limit for ids in train["input_ids"]) if data.shortened.get("truncated") else 0
    return replace(
        data,
        train=train,
        validation=sets.pop("validation"),
        in_domain=sets.pop("in_domain"),
        out_of_domain=sets,
        counts=counts,
        shortened=data.shortened | {"truncated": min(long, data.shortened.get("truncated", 0))},
        key=digest(json.dumps([data.key, choice.rows, choice.tests]))[:16],
    )


def _drawn(rows: int, share: float) -> list[int]:
    """Indices of this share of the rows, in their order: drawn, as a file may be sorted, and the same at each call."""
    return sorted(random.Random("qpsft compare: budget").sample(range(rows), _share(rows, share)))


def _share(rows: int, share: float) -> int:
    return max(1, math.ceil(rows * share))


def _size(recipe: Recipe, options: CompareOptions, arms: Sequence[Arm], setting: Setting, epochs: float) -> Size:
    rows, trainer = setting.data.train, recipe.trainer
    by_epochs = copy.copy(trainer)
    by_epochs.max_steps = -1

    @functools.cache  # packed rows are counted anew at each call
    def steps(share: float) -> int:
        return run_steps(trainer, epochs, rows, share)

    @functools.cache
    def measurements(share: float) -> int:
        """One at the end of every epoch, and at the run's end."""
        return math.ceil(epochs if trainer.max_steps <= 0 else steps(share) / run_steps(by_epochs, 1, rows, share))

    rates = len(rate_grid(options, recipe)) if options.tune else 0
    known = options.arm_rates or {}
    return Size(
        train=len(rows),
        tests=_test_rows(setting.data),
        samples=_samples(setting.data, setting.measurement),
        steps=steps,
        measurements=measurements,
        rates={arm.name: rates if rate_source(arm, arms) == arm.name and arm.name not in known else 0 for arm in arms},
        jobs=_together(options.jobs, on_cpu=trainer.use_cpu),
    )


def _together(jobs: int, *, on_cpu: bool) -> int:
    """How many times faster `jobs` runs at a time are than one after another; the probe timed one alone.

    On the CPU each of several has one thread, so a core gains one. A graphics card is shared: no gain is counted on.
    """
    if not on_cpu:
        return 1
    return min(jobs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _test_rows(data: ComparedData) -> int:
    return sum(len(rows.rows) for rows in data.sets().values())


def _samples(data: ComparedData, measurement: Measurement) -> int:
    return min(measurement.sample_rows, len(data.in_domain.rows)) * measurement.k * len(measurement.temperatures)


def _kept_costs(path: Path, key: str) -> Costs | None:
    """The costs that an earlier call measured for the same runs."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Costs(**kept["costs"]) if kept.get("key") == key else None


# ---- the probe ----


def probe(
    specs: Mapping[str, RunSpec],
    setting: Setting,
    jobs: int,
    started: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Times the loading of the base, a few optimizer steps of each kind of arm, and two small measurements.

    Args:
        specs: arm -> one of its runs. What several of them share is timed once.
        jobs: with several, a run has one thread.
        started: when the comparison began, by `clock`.
    """
    threads = torch.get_num_threads()
    if jobs > 1:
        torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="qpsft-budget-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of a few steps is no real one
            return _probe(specs, setting, Path(folder), started, clock)
    finally:
        torch.set_num_threads(threads)


def _probe(
    specs: Mapping[str, RunSpec], setting: Setting, folder: Path, started: float, clock: Callable[[], float]
) -> Costs:
    before = clock()
    model, tokenizer = load_setting(setting)
    load = clock() - before
    with fitting_threads(model):
        step, trained = _time_steps(specs, setting, model, tokenizer, folder, clock)
        measuring, row = _time_measurements(setting, trained, tokenizer, clock)
    return Costs(load, step, measuring, row, clock() - started)


def _time_steps(
    specs: Mapping[str, RunSpec],
    setting: Setting,
    model: Any,
    tokenizer: Any,
    folder: Path,
    clock: Callable[[], float],
) -> tuple[dict[str, float], Any]:
    """Arm -> seconds of a step; and the model that was trained last, with its adapter."""
    short = replace(setting, options=setting.options | {"max_steps": MOST_PROBE_STEPS})
    seconds: dict[str, float] = {}
    step = {}
    trained = None
    for name, spec in specs.items():
        step[name] = 0.0
        for method, share in step_kinds(spec.method):
            kind = json.dumps(method, sort_keys=True)
            if kind not in seconds:
                if trained is not None:
                    model = trained.unload()
                trainer = make_run_trainer(replace(spec, method=method), short, model, tokenizer, folder / name)
                replayed = method.get("replay_share", 0) * trainer.rows_per_step()
                watch = _StepClock(clock, math.ceil(PROBE_REPLAYED / replayed) if replayed else 0)
                trainer.add_callback(watch)
                trainer.train()
                trained = trainer.model
                seconds[kind] = watch.seconds()
            step[name] += share * seconds[kind]
    return step, trained


def step_kinds(method: Mapping[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """Methods to time instead of an arm's, and the share of its steps that is as long as each one's.

    Of the K x V steps of a block, PSFT scores the rows of K - 1 under the reference; the others cost what SFT's do.
    """
    kept = {key: value for key, value in method.items() if key in ("base_kl", "replay_share")}
    if method["loss_type"] != "psft":
        return [(kept | {"loss_type": method["loss_type"]}, 1.0)]
    block = method["reference_steps"]
    scored = (block - 1) / (block * method["num_iterations"])
    # in a block as long as the probe every step but the first, which is not timed, scores
    scoring = {"loss_type": "psft", "reference_steps": MOST_PROBE_STEPS, "num_iterations": 1}
    kinds = [(kept | {"loss_type": "nll"}, 1 - scored), (kept | scoring, scored)]
    return [(one, share) for one, share in kinds if share]


def _time_measurements(setting: Setting, model: Any, tokenizer: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a measurement: (constant, for each test row)."""
    sizes, times = [], []
    for share in PROBE_SHARES:
        part = replace(
            setting.data,
            validation=_part(setting.data.validation, share),
            in_domain=_part(setting.data.in_domain, share),
            out_of_domain={label: _part(rows, share) for label, rows in setting.data.out_of_domain.items()},
        )
        sampled = replace(setting.measurement, sample_rows=_share(setting.measurement.sample_rows, share))
        sizes.append(_test_rows(part) + _samples(part, sampled))
        before = clock()
        measure(model, tokenizer, part, sampled)
        times.append(clock() - before)
    return line(sizes, times)


def _part(rows: Any, share: float) -> Any:
    return rows.select(range(_share(len(rows.rows), share)))


def line(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """(constant, seconds a row) through two measurements, neither below 0; of equal sizes all is counted by the row."""
    (few, many), (short, long) = sizes, times
    if many == few:
        return 0.0, max(times) / many
    row = max(0.0, (long - short) / (many - few))
    return max(0.0, long - row * many), row


class _StepClock(TrainerCallback):
    """Notes when each optimizer step ends, and ends training when that has been long enough.

    Args:
        least: so many steps are timed at least.
    """

    def __init__(self, clock: Callable[[], float], least: int = 0):
        self._clock = clock
        self._least = max(PROBE_STEPS, 1 + least)
        self._ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(self._clock())
        if len(self._ends) >= self._least and self._ends[-1] - self._ends[0] >= PROBE_SECONDS:
            control.should_training_stop = True

    def seconds(self) -> float:
        """Of a step: the mean, as few long steps may take most of the time, without the first, in which libraries warm
        up."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
