"""benchmarks/max_context.py and plan_accuracy.py: the search, trials with a faked card, the verdicts."""

from __future__ import annotations

import max_context
import plan_accuracy
import pytest
from machine import Budget, Results
from max_context import Trial
from real_shapes import build_model
from step_grid import Cell

from qpsft import PSFTConfig
from qpsft.model.base_record import stored_bytes

pytestmark = pytest.mark.bench

CELL = Cell("tiny", 1, 16, rows=2, rank=4, steps=4, warmup=1)


@pytest.fixture(scope="module")
def base():
    return build_model("tiny", "cpu")


@pytest.mark.parametrize("limit", [40, 64, 700, 2_048, 21_848, 78_475, 200_000])
def test_the_longest_length_is_found_in_few_trials(limit):
    def attempt(length):
        tried.append(length)
        # memory rises a little faster than the length; near the cap fragments make it fail early
        return Trial(length, None if length > limit else int(1000 + 10 * length + length**2 / 1e6), 1.0)

    tried: list[int] = []
    cap = 1000 + 10.5 * limit + limit**2 / 1e6
    found = max_context.longest(attempt, cap=cap, longest_allowed=131_072)
    best = min(limit, 131_072)
    assert found <= best and best - found <= max(64, 0.01 * best)
    assert len(tried) == len(set(tried)) <= 10


def test_a_trial_survives_running_out_of_memory(base, monkeypatch):
    """A faked card: the model's embedding fails on rows longer than it takes."""
    held = base.model.embed_tokens.register_forward_pre_hook(fail_beyond(40))
    try:
        trials = {n: max_context.attempt_length(base, n, 4, "cpu", {}, 0) for n in (32, 48)}
    finally:
        held.remove()
    assert trials[32].fits and trials[32].peak_bytes > stored_bytes(base)
    assert not trials[48].fits and trials[48].seconds > 0


def fail_beyond(longest):
    def hook(module, args):
        if args[0].shape[1] > longest:
            try:
                raise RuntimeError("CUDA error: out of memory")
            except RuntimeError as error:
                raise ValueError("the allocator's error in another's clothes") from error

    return hook


def test_an_error_that_is_not_memory_is_not_taken_for_it(base):
    with pytest.raises(TypeError):
        max_context.attempt_length(base, 16, 4, "cpu", {"no_such_option": 1}, 0)


def test_caps_are_searched_once_and_go_on_after_a_cut(tmp_path):
    calls: list[int] = []

    def attempt(length):
        calls.append(length)
        return Trial(length, None if length > limit["now"] else 10 * length, 100.0)

    def cap_of(gigabytes):
        assert warmed  # what libraries take is there before a cap is measured
        limit["now"] = int(gigabytes * 1000)
        return max_context.Cap(gigabytes * 10_000, 77)

    limit: dict[str, int] = {}
    warmed: list[bool] = []
    arguments = (attempt, cap_of, {"rank": 4}, 131_072, lambda: warmed.append(True))
    short = Budget(9, clock=lambda: 500.0 * len(calls))  # every trial takes long: the second no longer fits
    results = Results(tmp_path / "r.json", {"date": "monday"})
    assert not max_context.measure_caps([8.0, 12.0], results, short, *arguments)
    begun = len(calls)
    assert begun >= 1 and results.cells["8 GB"]["longest"] is None
    results = Results(tmp_path / "r.json", {"date": "tuesday"})
    assert max_context.measure_caps([8.0, 12.0], results, Budget(None), *arguments)
    assert len(calls) == len(set(calls)) and len(warmed) == 2  # once in each process
    assert {results.cells[f"{cap} GB"]["context_bytes"] for cap in (8, 12)} == {77}
    for cap in (8, 12):
        assert 0.98 * cap * 1000 <= results.cells[f"{cap} GB"]["longest"] <= cap * 1000
    done = len(calls)
    assert max_context.measure_caps([8.0, 12.0], results, Budget(None), *arguments)
    assert len(calls) == done and len(warmed) == 2
    text = max_context.table(results, [8.0, 12.0, 16.0])
    assert "21,848" in text and "OOM" in text and "not yet" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_cap_leaves_torch_what_the_context_does_not_take(monkeypatch):
    gib = max_context.GIB
    fake = {"mem_get_info": (70 * gib, 80 * gib), "memory_reserved": 8 * gib, "memory_allocated": 6 * gib}
    for name, value in fake.items():
        monkeypatch.setattr(max_context.torch.cuda, name, lambda value=value: value)
    fractions: list[float] = []
    monkeypatch.setattr(max_context.torch.cuda, "set_per_process_memory_fraction", fractions.append)
    assert max_context.set_cap(12) == (10 * gib, 2 * gib) and fractions == [10 / 80]
    assert max_context.set_cap(8) == (0.0, 2 * gib)  # the base alone fills it


def test_long_context_asks_only_for_options_that_exist():
    options, lacking = max_context.context_options()
    assert {*options, *lacking} == set(max_context.LONG_CONTEXT)
    PSFTConfig("unused", bf16=False, **{k: v for k, v in options.items() if k != "activation_offloading"})


# ---- plan ----


def test_a_plan_is_right_within_ten_percent_or_too_low_or_too_high():
    assert plan_accuracy.judge(109, 100, 1000) == plan_accuracy.judge(91, 100, 1000) == "ok"
    assert plan_accuracy.judge(111, 100, 1000) == "too high" and plan_accuracy.judge(89, 100, 1000) == "too low"
    assert plan_accuracy.judge(1200, None, 1000) == "ok"  # it said that this would not fit
    assert plan_accuracy.judge(800, None, 1000) == "too low"


def test_plans_are_held_against_real_training_once(tmp_path, monkeypatch, capsys):
    cells = plan_accuracy.grid(["tiny"], [16, 24], ["adamw_torch_fused"])
    assert [(cell.length, cell.checkpointing) for cell in cells] == [(16, True), (16, False), (24, True), (24, False)]
    results = Results(tmp_path / "r.json", {"date": "monday"})
    plans = {16: 10**6, 24: 10**12}
    assert plan_accuracy.run_grid(cells[1:3], results, Budget(None), 10.0**9, "cpu", lambda cell: plans[cell.length])
    measured, untried = (results.cells[cell.key] for cell in cells[1:3])
    assert measured["measured_bytes"] > 10**6 and measured["verdict"] == "too low"
    assert measured["relative_error"] == pytest.approx(10**6 / measured["measured_bytes"] - 1)
    assert not untried["tried"] and untried["measured_bytes"] is None and untried["verdict"] == "ok"
    shown = capsys.readouterr().out
    assert "not tried" in shown and all(len(line) <= 80 for line in shown.splitlines())
    assert plan_accuracy.summary([measured, untried]).startswith("1 of 2 cells within 10%")
    monkeypatch.setattr(plan_accuracy, "measure_cell", lambda *args: pytest.fail("measured again"))
    assert plan_accuracy.run_grid(cells[1:3], results, Budget(None), 10.0**9, "cpu", lambda cell: 0)


def test_the_plan_of_a_cell_is_within_the_bar_on_the_cpu():
    for cell in plan_accuracy.grid(["tiny"], [48], ["adamw_torch_fused"]):
        held = build_model(cell.shape, "cpu")
        kept = plan_accuracy.measure_cell(held, cell, plan_accuracy.planned_bytes(cell, "cpu"), 10.0**9, "cpu")
        assert abs(kept["relative_error"]) < 0.02, kept
