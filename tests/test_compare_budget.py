"""`qpsft compare --budget`: what is chosen follows from measured times, or an error names the least that fits."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from comparing import RECIPE, FakeRuns, write_recipe

from qpsft import cli
from qpsft.compare import budget, compare, queue, report
from qpsft.compare.arms import DEFAULT_ARMS, find_arms
from qpsft.compare.budget import (
    Choice,
    Costs,
    Size,
    choose,
    estimate,
    format_duration,
    ladder,
    left_out,
    line,
    measuring_seconds,
)
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.data import ComparedData
from qpsft.compare.measure import Measurement
from qpsft.compare.options import CompareOptions, load_comparison, parse_duration
from qpsft.compare.run import Setting
from qpsft.compare.verdict import limits
from qpsft.data.shapes import Rows
from qpsft.errors import RecipeError, TrainingError

ARMS = find_arms(["sft", "sft_matched", "sft_blocks", "dft", "psft", "psft_visits"])
NAMES = tuple(arm.name for arm in ARMS)
FULL = Choice(NAMES, 5, 2)
COSTS = Costs(load=10, step=dict.fromkeys(NAMES, 1.0), measuring=5, row=0.1, spent=60)


def size(rates=0, jobs=1, train=1024):
    own = {arm.name: 0 if arm.rate_of else rates for arm in ARMS}
    return Size(train, 150, 50, lambda share: round(256 * share), lambda share: 4, own, jobs)


def test_the_estimate_by_hand():
    measuring = 5 + 0.1 * 200
    run = 10 + 256 + 4 * measuring
    assert estimate(FULL, COSTS, size()) == pytest.approx(60 + 1.15 * (10 + measuring + 30 * run))
    half = Choice(("sft", "psft"), 3, 2, rows=0.5, tests=0.5)
    assert measuring_seconds(replace(half, samples=False), COSTS, size()) == pytest.approx(5 + 0.1 * 75)
    run = 10 + 128 + 4 * 15
    assert estimate(half, COSTS, size(jobs=2)) == pytest.approx(60 + 1.15 * (10 + 15 + 6 * run) / 2)
    # tuned: 3 rates on 2 seeds, and the third seed at the rate chosen
    assert estimate(half, COSTS, size(rates=3)) == pytest.approx(60 + 1.15 * (10 + 15 + 2 * 7 * run))


def test_the_ladder_goes_from_all_to_the_least_and_every_step_is_shorter():
    choices = list(ladder(ARMS, FULL, 1024))
    assert choices[0] == FULL
    assert choices[-1] == Choice(("sft", "psft_visits"), 2, 1, rows=0.125, tests=0.25, samples=False)
    times = [estimate(choice, COSTS, size(rates=4)) for choice in choices]
    assert times == sorted(times, reverse=True)
    assert [choice.seeds for choice in choices] == [5] + [3] * (len(choices) - 2) + [2]  # two seeds are the last resort
    assert min(choice.rows * 1024 for choice in choices) == 128
    assert {choice.rows for choice in ladder(ARMS, FULL, 200)} == {1.0}  # few rows are not made fewer


def test_the_first_that_fits_is_chosen_and_what_is_left_out_is_said():
    assert choose(ARMS, FULL, COSTS, size(), 1e6)[0] == FULL
    assert left_out(FULL, FULL, size()) == []
    choices = list(ladder(ARMS, FULL, 1024))
    for choice in choices:
        seconds = estimate(choice, COSTS, size(rates=4))
        found, told = choose(ARMS, FULL, COSTS, size(rates=4), seconds)
        assert told == estimate(found, COSTS, size(rates=4)) <= seconds
        for name, larger in itertools.product(("rows", "arms", "tests", "samples", "seeds"), choices):
            larger = replace(found, **{name: getattr(larger, name)})  # nothing that was left out would have fitted
            if estimate(larger, COSTS, size(rates=4)) > told:
                assert estimate(larger, COSTS, size(rates=4)) > seconds
    assert left_out(FULL, choices[-1], size(rates=4)) == [
        "3 of 5 seeds",
        "1 of 2 seeds that rates are chosen on",
        "samples for pass@k and entropy",
        "arms sft_matched, sft_blocks, dft, psft",
        "training rows: 128 of 1,024 are used",
        "test rows: 25% of each set are used",
    ]


def own_rows(train=810, max_steps=-1, **options):
    """A recipe of 16 rows a step, the options of a comparison, and a setting of these rows, 100 and 90 set aside."""
    trainer = SimpleNamespace(
        train_batch_size=4, gradient_accumulation_steps=4, packing=False, max_steps=max_steps, use_cpu=True
    )
    texts = [{"prompt": f"{i}?", "completion": str(i)} for i in range(100)]
    aside = Rows("own", "prompt_completion", texts, [str(i) for i in range(100)], [])
    numbered = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(train)]})
    counts = {"train": train, "validation": 90, "in_domain": 100}
    data = ComparedData("own", numbered, aside.select(range(90)), aside, {}, "accuracy", counts=counts, key="all")
    how = Measurement(8, (1.0,), 32, 16, "auto", None)
    setting = Setting(None, None, {"use_cpu": True}, 1, "", data, how)
    return SimpleNamespace(trainer=trainer), CompareOptions(**options), setting


def test_a_run_is_measured_after_every_epoch_also_where_max_steps_ends_it():
    recipe, options, setting = own_rows()
    by_epochs = budget._size(recipe, options, ARMS, setting, 4.0)  # 51 steps each
    assert [(by_epochs.steps(share), by_epochs.measurements(share)) for share in (1, 0.5)] == [(204, 4), (104, 4)]
    recipe.trainer.max_steps = 500
    by_steps = budget._size(recipe, options, ARMS, setting, 4.0)
    assert [(by_steps.steps(share), by_steps.measurements(share)) for share in (1, 0.5)] == [(500, 10), (500, 20)]
    # fewer rows would save nothing there
    *_, least = ladder(ARMS, FULL, by_steps.cut_rows)
    assert by_epochs.cut_rows == 810 and least.rows == 1


@pytest.mark.parametrize(
    ("jobs", "cores", "use_cpu", "at_a_time"), [(1, 8, True, 1), (4, 8, True, 4), (4, 2, True, 2), (4, 8, False, 1)]
)
def test_more_jobs_than_cores_or_several_on_one_card_are_no_faster(monkeypatch, jobs, cores, use_cpu, at_a_time):
    monkeypatch.setattr(budget.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    recipe, options, setting = own_rows(jobs=jobs)
    recipe.trainer.use_cpu = use_cpu
    assert budget._size(recipe, options, ARMS, setting, 4.0).jobs == at_a_time


def test_rows_stay_where_only_measuring_is_slow():
    slow = replace(COSTS, step=dict.fromkeys([*NAMES, "sft_kl"], 0.001), measuring=60, spent=0)
    least = list(ladder(ARMS, FULL, 1024))[-1]
    found, _ = choose(ARMS, FULL, slow, size(), estimate(least, slow, size()) + 2)
    assert found == replace(least, rows=1.0, tune_seeds=2)  # without tuning, which costs nothing


def test_a_budget_that_nothing_fits_names_the_least_that_does():
    least = estimate(list(ladder(ARMS, FULL, 1024))[-1], COSTS, size())
    with pytest.raises(RecipeError, match="A budget of 90s is too short: the least .* sft and psft_visits") as caught:
        choose(ARMS, FULL, COSTS, size(), 90)
    assert f"--budget {format_duration(least)}" in caught.value.todo
    assert choose(ARMS, FULL, COSTS, size(), parse_duration(format_duration(least)))[0].seeds == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1m5s", 65)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45.2, "46s"), (120, "2m"), (159.3, "2m40s"), (599.5, "10m"), (601, "11m"), (3600, "1h"), (5400, "1h30m")],
)
def test_durations_are_written_rounded_up(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("text", ["30", "soon", "", "m", "3 days", "1..5h", "-5m"])
def test_what_is_no_time_is_refused_before_anything_is_read(tmp_path, capsys, text):
    assert cli.main(["compare", str(write_recipe(tmp_path)), f"--budget={text}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "it must be a time. Write it as 90s, 30m, 2h or 1h30m." in said
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("text", ["0m", "0s", "0.0h0m"])
def test_no_time_at_all_is_refused_before_anything_is_read(tmp_path, capsys, text):
    assert cli.main(["compare", str(write_recipe(tmp_path)), f"--budget={text}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"budget is {text}; it must be above 0." in said
    assert not (tmp_path / "comparison").exists()


def test_a_line_through_two_measurements():
    assert line([10, 20], [6.0, 8.0]) == pytest.approx((4.0, 0.2))
    assert line([10, 20], [6.0, 5.0]) == (5.0, 0.0)  # noise
    assert line([10, 20], [1.0, 3.0]) == pytest.approx((0.0, 0.2))  # no constant below 0
    assert line([10, 10], [1.0, 2.0]) == (0.0, 0.2)


class FakeClock:
    """A second further at each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_the_probe_takes_its_times_from_the_clock(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(budget, "measure", lambda model, tokenizer, data, how: measured.append((data, how)))
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    setting = make_setting(recipe, options, prepare(recipe))
    arms = find_arms(["sft", "sft_kl", "psft", "psft_visits"])
    specs = {arm.name: budget.RunSpec(arm.options(recipe.trainer), 1e-3, 3, 2.0) for arm in arms}
    clock = FakeClock()
    costs = budget.probe(specs, setting, 1, 0.0, clock)
    assert costs.step == {"sft": 1, "sft_kl": 1, "psft": 1, "psft_visits": 1}
    assert costs.load == 1 and costs.measuring + costs.row * 1 > 0
    # two for loading, four steps of three kinds, two for each measurement, one at the end
    assert costs.spent == clock.now == 2 + 3 * 4 + 2 * 2 + 1
    assert [len(data.in_domain.rows) for data, _ in measured] == [1, 1]  # of four


class FakeTrainer:
    """Takes as long for each step as `seconds` says."""

    model = SimpleNamespace(unload=lambda: None)

    def __init__(self, seconds, clock):
        self.seconds, self.clock = seconds, clock

    def add_callback(self, watch):
        self.watch = watch

    def rows_per_step(self):
        return 4

    def train(self):
        control = SimpleNamespace(should_training_stop=False)
        for seconds in self.seconds:
            self.clock.now += seconds
            self.watch.on_step_end(None, None, control)
            if control.should_training_stop:
                return


def test_every_kind_of_step_has_its_own_price(monkeypatch):
    def trainer(spec, setting, model, tokenizer, folder):
        timed.append(spec.method)
        own = {"nll": 2, "psft": 3, "dft": 2.5}[spec.method["loss_type"]] + ("base_kl" in spec.method)
        # replayed rows are long, and come in every second step
        return FakeTrainer([own + 8 * ("replay_share" in spec.method and step % 2) for step in range(64)], clock)

    timed, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(budget, "make_run_trainer", trainer)
    names = ["sft", "sft_kl", "sft_replay", "dft", "psft", "psft_visits", "psft_replay"]
    options = SimpleNamespace(
        base_kl=0, epsilon=0.28, target_kl=0.1, target_clip_fraction=None, num_iterations=1, reference_steps=8
    )
    specs = {arm.name: budget.RunSpec(arm.options(options), 1e-3, 3, 2.0) for arm in find_arms(names)}
    setting = Setting(None, None, {}, 1, "", None, None)
    step, _ = budget._time_steps(specs, setting, None, None, Path("unused"), lambda: clock.now)
    # a block of 8 mini-batches is scored in 7 of its steps: of 8 with one visit, of 32 with four
    assert step == {
        "sft": 2,
        "sft_kl": 3,
        "sft_replay": pytest.approx(2 + 8 * 3 / 5),  # of five steps, in which two of its rows are expected
        "dft": 2.5,
        "psft": pytest.approx(2 + 7 / 8),
        "psft_visits": pytest.approx(2 + 7 / 32),
        "psft_replay": pytest.approx(2 + 8 * 3 / 5 + 7 / 8),
    }
    assert len(timed) == 6  # what arms share is timed once


def prepare_fake(monkeypatch, costs):
    def probe(specs, setting, jobs, started, clock):
        asked.append(list(specs))
        return costs

    asked = []
    runs = FakeRuns(lambda spec: ([(0.5, 0.5), (0.6, 0.4)], 0.5) if spec.method else ([(0.0, 0.9)], 0.0))
    monkeypatch.setattr(budget, "probe", probe)
    monkeypatch.setattr(queue, "do_run", runs)
    monkeypatch.setattr(report, "write_report", lambda comparison, folder: None)
    return runs, asked


def test_the_last_arm_that_is_named_is_compared_with_sft_in_little_time():
    full = replace(FULL, arms=("psft", "sft", "sft_matched", "dft"))
    arms = find_arms(full.arms)
    assert list(ladder(arms, full, 1024))[-1].arms == ("sft", "dft")


def test_arms_are_left_out_one_at_a_time_and_before_the_third_seed():
    arms, few = find_arms(DEFAULT_ARMS), replace(size(train=128), rates=dict.fromkeys(DEFAULT_ARMS, 0))
    costs = replace(COSTS, step=dict.fromkeys(DEFAULT_ARMS, 1.0))
    full = Choice(DEFAULT_ARMS, 3, 2)
    cuts = list(ladder(arms, full, few.train))
    assert list(dict.fromkeys(choice.arms for choice in cuts)) == [
        ("sft", "psft_visits", "sft_kl", "psft_replay", "sft_replay"),
        ("sft", "sft_kl", "psft_replay", "sft_replay"),
        ("sft", "psft_replay", "sft_replay"),
        ("sft", "sft_replay"),
    ]
    for count in (5, 4, 3, 2):
        largest = next(choice for choice in cuts if len(choice.arms) == count)
        found, _ = choose(arms, full, costs, few, estimate(largest, costs, few))
        assert len(found.arms) == count and found.seeds == 3


def test_a_comparison_is_cut_to_its_budget(tmp_path, monkeypatch, capsys):
    text = RECIPE.replace("dataset_limit: 16", "dataset_limit: 512").replace("eval_rows: 4", "eval_rows: 16")
    recipe = write_recipe(tmp_path, text)
    runs, asked = prepare_fake(monkeypatch, Costs(0, dict.fromkeys([*NAMES, "sft_kl"], 1.0), 0, 0.5, 0))
    # a run of 512 rows takes 256 steps of a second, one of a quarter 64; a measurement half a second a row
    found = compare(recipe, seeds=5, budget="9m")
    assert asked == [["sft", "sft_kl", "psft_visits"]]  # the embedded base answers no prompts to be replayed
    labels = {spec.label for spec in runs.specs}
    assert labels == {"base"} | {f"{kind}-lr2e-3-seed{s}" for kind in ("nll", "nll-kl") for s in (3, 4, 5)}
    assert found.counts["train"] == 128 and found.counts["in_domain"] == 4
    out = " ".join(capsys.readouterr().out.split())
    assert "budget 9m: about 8m52s for sft, sft_kl, 3 seeds and 128 rows" in out
    assert limits(found)[0] == (
        "The budget left out: 2 of 5 seeds; arm psft_visits; training rows: 128 of 512 are used; "
        "test rows: 25% of each set are used."
    )
    record = json.loads((tmp_path / "comparison/comparison.json").read_text())
    assert record["limits"][0] == limits(found)[0]


def test_rows_that_are_set_aside_stay_when_training_rows_are_left_out(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(640)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.replace("demo-noisy\ndataset_limit: 16", "own.jsonl").replace("eval_rows: 4", "eval_rows: 200")
    recipe = write_recipe(tmp_path, text)
    prepare_fake(monkeypatch, Costs(0, dict.fromkeys(NAMES, 1.0), 0, 0, 0))
    full = compare(recipe, arms="sft,psft", seeds=2, budget="1h")
    half = compare(recipe, arms="sft,psft", seeds=2, budget="10m")
    assert full.left_out == [] and half.left_out == ["training rows: 260 of 519 are used"]
    assert full.counts | {"train": 260} == half.counts
    assert [full.counts[name] for name in ("train", "in_domain", "validation")] == [519, 64, 57]
    assert half.done == 5  # other rows, other runs, and the base with them


def test_left_out_rows_are_drawn_and_the_sets_do_not_mix():
    _, _, setting = own_rows()
    data = replace(setting.data, shortened={"truncated": 600, "dropped": 3, "max_length": 1})
    assert budget.cut_data(data, FULL) is data
    cut = budget.cut_data(data, replace(FULL, rows=0.25, tests=0.5))
    ids = [row[0] for row in cut.train["input_ids"]]
    assert len(ids) == len(set(ids)) == 203 and ids == sorted(ids) and ids[-1] > 700
    assert cut.counts == {"train": 203, "in_domain": 50, "validation": 45}
    assert len(cut.in_domain.rows) == 50 and int(cut.in_domain.places[-1]) > 80
    assert cut.shortened == {"truncated": 203, "dropped": 3, "max_length": 1}
    assert budget.cut_data(data, replace(FULL, rows=0.25, tests=0.5)).key == cut.key
    assert len({cut.key, data.key, budget.cut_data(data, replace(FULL, rows=0.5)).key}) == 3


def test_the_same_command_goes_on_with_the_same_runs(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    runs, asked = prepare_fake(monkeypatch, Costs(1, dict.fromkeys([*NAMES, "sft_kl"], 1.0), 1, 0, 5))
    compare(recipe, seeds=3, budget="1h")
    done = len(runs.specs)
    again = compare(recipe, seeds=3, budget="1h")
    assert len(asked) == 1 and len(runs.specs) == done and again.done == 0
    compare(recipe, ["--max_grad_norm=0.5"], seeds=3, budget="1h")
    assert len(asked) == 2  # another run, another probe


def test_when_the_time_is_up_the_whole_seeds_are_compared_and_the_same_command_does_the_rest(
    tmp_path, monkeypatch, capsys
):
    def slow(*arguments):
        now[0] += 100  # seconds, where none were foreseen
        return runs(*arguments)

    now = [time.monotonic()]
    recipe = write_recipe(tmp_path)
    runs, _ = prepare_fake(monkeypatch, Costs(0, dict.fromkeys(NAMES, 0.0), 0, 0, 0))
    with monkeypatch.context() as late:
        late.setattr(queue, "do_run", slow)
        late.setattr(queue, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
        with pytest.raises(TrainingError, match="The budget of 2m was up .* Repeat the same command"):
            compare(recipe, arms="sft,psft", seeds=4, budget="2m")
        assert len(runs.specs) == 2  # the base and a run, which are kept
        now[0] = time.monotonic()
        found = compare(recipe, arms="sft,psft", seeds=4, budget="7m")
    said = "2 of 4 seeds, as the time was up (the same command goes on with them)"
    assert found.left_out == [said] and f"left out: {said}" in " ".join(capsys.readouterr().out.split())
    assert {name: sorted(arm.runs) for name, arm in found.arms.items()} == {"sft": [3, 4], "psft": [3, 4]}
    assert found.settings["comparison"]["seeds"] == 2
    done = len(runs.specs)
    again = compare(recipe, arms="sft,psft", seeds=4, budget="7m")
    assert again.left_out == [] and sorted(again.arms["psft"].runs) == [3, 4, 5, 6]
    assert len(runs.specs) == 9 > done  # none was done twice


@pytest.mark.journey
def test_a_real_comparison_keeps_to_what_was_estimated(tmp_path, capsys):
    recipe = write_recipe(tmp_path, RECIPE.replace("num_train_epochs: 2", "num_train_epochs: 1"))
    started = time.perf_counter()
    found = compare(recipe, arms="sft,psft", seeds=2, budget="10m")
    took = time.perf_counter() - started
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: nothing" in out and "measured: a step takes sft " in out
    costs = Costs(**json.loads((tmp_path / "comparison/budget.json").read_text())["costs"])
    assert costs.step["sft"] > 0 and costs.measuring + costs.row > 0
    estimated = parse_duration(out.split("budget 10m: about ")[1].split()[0])
    assert took < 2 * estimated + 10 and estimated < 4 * took + 20
    assert sorted(found.arms) == ["psft", "sft"] and len(found.arms["sft"].runs) == 2
    with pytest.raises(RecipeError, match="A budget of 1s is too short"):
        compare(recipe, arms="sft,psft", seeds=2, budget="1s")
