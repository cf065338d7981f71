"""Paired intervals, the frontier and the verdict's words, against numbers worked out by hand."""

import math

import pytest
from comparing import make_comparison

from qpsft.compare.paired import (
    Difference,
    frontier,
    interval,
    kept_at,
    matched,
    matched_difference,
    mean_and_sd,
    paired_difference,
    t_quantile,
)
from qpsft.compare.report import report_page
from qpsft.compare.results import format_mean
from qpsft.compare.tables import difference_rows, table_rows
from qpsft.compare.verdict import KEEPS, judge, limits, overlap_lines, render, verdict
from qpsft.terminal import text_table


def test_mean_and_standard_deviation_by_hand():
    assert mean_and_sd([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    assert mean_and_sd([4.0]) == (4.0, None)


def test_paired_interval_by_hand():
    # differences .1, .2, .3: mean .2, sd .1, t(2) = 4.303, half width 4.303 · .1 / √3 = .2484
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.9}, {0: 0.4, 1: 0.4, 2: 0.6})
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(0.24843, abs=1e-4)
    assert (found.low, found.high) == (pytest.approx(-0.04843, abs=1e-4), pytest.approx(0.44843, abs=1e-4))


def test_pairing_is_by_seed_and_takes_only_shared_ones():
    found = paired_difference({7: 1.0, 1: 0.5, 2: 9.0}, {1: 0.4, 7: 0.7})
    assert (found.mean, found.n) == (pytest.approx(0.2), 2)
    assert found.half_width == pytest.approx(12.706 * (0.1 * math.sqrt(2)) / math.sqrt(2), rel=1e-3)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    assert paired_difference({1: 1.0}, {1: 0.5}) == Difference(0.5, None, 1)


@pytest.mark.parametrize(("degrees", "known"), [(1, 12.706), (4, 2.776), (30, 2.042), (60, 2.0003), (10_000, 1.9602)])
def test_t_quantiles(degrees, known):
    assert t_quantile(degrees) == pytest.approx(known, abs=1e-3)


def test_the_frontier_leaves_out_what_is_beaten_in_both():
    points = [(0.2, 0.8), (0.5, 0.6), (0.4, 0.5), (0.9, 0.1), (0.9, 0.2), (0.1, 0.8)]
    assert frontier(points) == [(0.2, 0.8), (0.5, 0.6), (0.9, 0.2)]
    assert frontier([(0.1, 0.1)]) == [(0.1, 0.1)]


def test_kept_at_a_level():
    points = [(0.2, 0.8), (0.6, 0.4)]
    assert kept_at(points, 0.3) == pytest.approx(0.7)  # a quarter of the way down
    assert kept_at(points, 0.6) == pytest.approx(0.4)
    assert kept_at(points, 0.1) == 0.8  # a checkpoint that reaches more than the level
    assert kept_at(points, 0.61) is None


def test_matched_takes_the_highest_level_both_reach():
    level, kept, lost = matched([(0.4, 0.7), (0.8, 0.5)], [(0.5, 0.6), (1.0, 0.1)])
    assert level == 0.8
    assert kept == pytest.approx(0.5)
    assert lost == pytest.approx(0.6 - 0.5 * 0.3 / 0.5)
    # the sides change places, and the sign with them
    assert matched([(0.5, 0.6), (1.0, 0.1)], [(0.4, 0.7), (0.8, 0.5)]) == (0.8, lost, kept)


def test_matched_difference_pairs_seeds():
    treatment = {0: [(0.8, 0.5)], 1: [(0.6, 0.5)], 5: [(0.1, 0.1)]}
    control = {1: [(0.9, 0.2)], 0: [(0.9, 0.1)]}
    level, found = matched_difference(treatment, control)
    assert level == pytest.approx(0.7)
    assert found == interval([0.5 - 0.1, 0.5 - 0.2])


def words(mean: float, half: float | None, unit: str = "share") -> str:
    return judge("psft", "sft", Difference(mean, half, 5), KEEPS, unit, "at equal in-domain accuracy of .87")


def test_the_verdict_follows_from_the_interval():
    assert words(0.145, 0.03) == (
        "psft keeps more out of domain than sft: +14.5 ± 3.0 points at equal in-domain accuracy of .87 (5 seeds)."
    )
    assert words(-0.145, 0.03).startswith("psft keeps less out of domain than sft: −14.5 ± 3.0 points")
    assert words(0.01, 0.032).startswith("psft and sft: no difference out of domain larger than 4.2 points")
    assert words(-0.01, 0.032).startswith("psft and sft: no difference out of domain larger than 4.2 points")
    assert words(0.2, None).endswith("one seed, so no interval.")
    assert "+0.145 ± 0.030 nats per token" in words(0.145, 0.03, "nats")


BETTER = {"sft": {s: [(0.5, 0.5), (0.9, 0.1 + s / 50)] for s in range(3)}}
BETTER |= {"psft": {s: [(0.5, 0.8), (0.9, 0.4 + s / 60)] for s in range(3)}}


def test_verdict_of_a_comparison():
    lines = verdict(make_comparison(BETTER))
    assert lines[0].startswith("psft keeps more out of domain than sft: +29.7 ± ")
    assert "at equal in-domain accuracy of .900" in lines[0]
    assert lines[1].startswith("psft and sft: no difference in-domain larger than 0.0 points at the last epoch")
    swapped = {"sft": BETTER["psft"], "psft": BETTER["sft"]}
    assert verdict(make_comparison(swapped))[0].startswith("psft keeps less out of domain than sft: −29.7 ± ")


def test_a_wide_interval_is_no_claim_of_equality():
    assert words(0.107, 0.273).startswith("psft and sft are not told apart out of domain: +10.7 ± 27.3 points at equal")
    assert "are not told apart" in words(0.02, 0.11, "nats") and "larger than 0.090" in words(0.02, 0.07, "nats")
    scattered = {"sft": {0: [(0.9, 0.1)], 1: [(0.9, 0.5)]}, "psft": {0: [(0.9, 0.6)], 1: [(0.9, 0.3)]}}
    said = verdict(make_comparison(scattered))[0]
    assert said.startswith("psft and sft are not told apart out of domain: +15.0 ± 444.7 points")


def test_tables_fit_the_terminal():
    comparison = make_comparison(BETTER)
    for width in (60, 80, 120):
        assert max(map(len, render(comparison, width).splitlines())) <= width
    rows = [["title", "a [b]"], ["first", "x" * 30]]
    assert text_table(rows).splitlines() == [f"title  {'a [b]':>30}", f"first  {'x' * 30}"]
    assert "".join(line[7:].strip() for line in text_table(rows, 20).splitlines()[1:]) == "x" * 30


def test_rows_that_were_cut_are_told():
    comparison = make_comparison(BETTER)
    assert limits(comparison) == []
    comparison.shortened = {"truncated": 12, "dropped": 3, "max_length": 256}
    assert limits(comparison) == [
        "12 of 16 training rows were cut at 256 tokens (max_length).",
        "3 training rows had no supervised token within 256 tokens and were left out.",
    ]
    assert comparison.to_dict()["training_rows_shortened"]["truncated"] == 12


def test_an_arm_that_learned_nothing_is_not_matched():
    never = {"sft": BETTER["sft"], "psft": {s: [(0.0, 0.9)] for s in range(3)}}
    comparison = make_comparison(never)
    assert "never gets better in-domain than the base" in verdict(comparison)[0]
    assert "keeps more" not in " ".join(verdict(comparison))
    assert difference_rows(comparison)[1][:2] == ["psft − sft", "–"]


def test_a_likelihood_is_better_when_it_is_lower():
    lower = {"sft": {s: [(1.0, 3.0 + s / 50)] for s in range(3)}, "psft": {s: [(1.1, 2.0)] for s in range(3)}}
    lines = verdict(make_comparison(lower, metric="nll", base={"in_domain": 2.0}))
    assert lines[0].startswith("psft keeps more out of domain than sft: +1.020 ± ")
    assert "at equal in-domain NLL of 1.100" in lines[0]
    assert lines[1].startswith("psft is worse in-domain than sft: −0.100 ± 0.000 nats per token")


def test_accuracy_inside_and_likelihood_outside_keep_their_units_and_signs():
    scores = {"sft": {s: [(0.9, 3.0 + s / 50)] for s in range(3)}, "psft": {s: [(0.9, 2.0)] for s in range(3)}}
    comparison = make_comparison(scores, metric="mixed", base={"out_of_domain": 1.5})
    lines = verdict(comparison)
    assert lines[0].startswith("psft keeps more out of domain than sft: +1.020 ± ") and "nats per token" in lines[0]
    assert "at equal in-domain accuracy of .900" in lines[0]
    assert lines[1].startswith("psft and sft: no difference in-domain larger than 0.0 points")
    assert (comparison.sign("in_domain"), comparison.sign("out_of_domain")) == (1, -1)
    assert table_rows(comparison)[2][2:4] == [".900 ± .000", "3.020 ± 0.020"]
    recorded = comparison.to_dict()["differences"][0]  # both with the sign of the score itself
    assert recorded["matched_in_domain"]["mean"] == recorded["last_epoch"]["out_of_domain"]["mean"] < 0
    assert recorded["matched_in_domain"]["low"] < recorded["matched_in_domain"]["high"] < 0
    matched, kept = difference_rows(comparison)[1][1], difference_rows(comparison)[1][3]
    assert matched.startswith("−1.020 ± ") and matched.endswith(" @ .900") and kept.startswith("−1.020 ± ")


def test_matched_controls_that_are_the_same_runs_say_so():
    comparison = make_comparison({"sft": BETTER["sft"], "sft_matched": BETTER["sft"], "psft": BETTER["psft"]})
    comparison.arms["sft_matched"].runs = comparison.arms["sft"].runs
    assert verdict(comparison)[0] == "sft_matched and sft are the same runs here: one method at one learning rate."


def test_the_table_has_means_and_deviations():
    rows = table_rows(make_comparison(BETTER))
    assert rows[0][:4] == ["at the last epoch", "lr", "in-domain", "out of domain"]
    assert rows[1][:4] == ["base", "–", ".000", ".900"]
    assert rows[2][:4] == ["sft", "0.001", ".900 ± .000", ".120 ± .020"]
    assert format_mean({0: 0.5}, "share") == ".500"
    assert format_mean({}, "share") == "–"


def test_completions_that_say_nothing_are_told():
    comparison = make_comparison(BETTER)
    assert not limits(comparison)
    for run in comparison.arms["sft"].runs.values():
        run["points"][-1]["metrics"] |= {"length_capped": 0.5, "parsed": 0.0}
    notes = " ".join(limits(comparison))
    assert "sft: 50% of its greedy in-domain completions were cut off" in notes
    assert "sft: the verifier found no answer" in notes and "psft: the verifier" not in notes


def test_overlap_is_told():
    comparison = make_comparison(BETTER)
    assert overlap_lines(comparison) == ["No test row stands among the training or validation rows."]
    comparison.overlap = {
        "in_domain": {"duplicate_rows": 2, "duplicate_prompts": 3},
        "old": {"duplicate_rows": 0, "duplicate_prompts": 0},
    }
    (line,) = overlap_lines(comparison)
    assert line == "in_domain: 3 prompts (2 with the same answer) also stand in the training rows."
    assert line in report_page(comparison, {})


def test_a_comparison_of_likelihoods_has_no_accuracies():
    comparison = make_comparison(BETTER, metric="nll")
    for run in comparison.arms["sft"].runs.values():
        run["points"][-1]["metrics"] |= {"pass@1, T=1": 0.0, "length_capped": 1.0, "parsed": 0.0}
    comparison.base["pass@1, T=1"] = 0.0
    assert comparison.columns() == ["in_domain", "out_of_domain", "sample_entropy", "sample_kl"]
    assert not limits(comparison)
    comparison.metric = "accuracy"
    assert "pass@1, T=1" in comparison.columns() and "completions" in " ".join(limits(comparison))
