"""Verifiers, pass@k and intervals: right, wrong, nothing found; and against brute force."""

import warnings
from itertools import combinations

import numpy as np
import pytest

from qpsft.data import built_in
from qpsft.errors import DataError
from qpsft.evaluate.estimates import RESAMPLES, bootstrap_weights, pass_at_k, ratio
from qpsft.evaluate.verifiers import VERIFIERS, find_verifier, warn_if_nothing_parsed


def row(reference, prompt="?", **extra):
    return {"prompt": prompt, "completion": reference, **extra}


@pytest.mark.parametrize(
    ("verifier", "reference", "text", "verdict"),
    [
        ("exact", "Paris", " Paris\n", True),
        ("exact", "Paris", "paris", False),
        ("exact", "Paris", "  ", None),
        ("last_number", "It is 1,200.50 dollars", "so 7 and then $1200.5.", True),
        ("last_number", "3", "3 or 4", False),
        ("last_number", "3", "three", None),
        ("last_number", "-3", "it is -3.0", True),
        ("last_number", "20", "between 10-20", True),
        ("last_number", "0.5", "$.50", True),
        ("gsm8k", "#### 2.5", "#### 2.50", True),
        ("gsm8k", "a <<1+1=2>>\n#### 1,234", "b\n#### 1234", True),
        ("gsm8k", "#### 5", "The answer is 5", None),
        ("gsm8k", "#### 5", "#### 5\nQuestion: next\n#### 6", True),
        ("gsm8k", "#### 5", "#### $-5", False),
        ("gsm8k", "#### 18", "#### 18.", True),
    ],
)
def test_verdicts(verifier, reference, text, verdict):
    assert VERIFIERS[verifier](row(reference), text) is verdict
    messages = row([{"role": "assistant", "content": reference}], [{"role": "user", "content": "?"}])
    assert VERIFIERS[verifier](messages, text) is verdict


def test_math_verify_knows_equal_expressions():
    pytest.importorskip("math_verify")
    check = VERIFIERS["math_verify"]
    assert check(row("$\\frac{1}{2}$"), "so it is $0.5$") is True
    assert check(row("$\\frac{1}{2}$"), "so it is $0.6$") is False
    assert check(row("$\\frac{1}{2}$"), "no idea") is None


def test_the_demo_check_tells_wrong_from_unreadable():
    one = built_in.in_domain("test", 1)[0]
    right = one["completion"][0]["content"]
    assert VERIFIERS["demo"](one, right) is True
    assert VERIFIERS["demo"](one, "1234 -> 4321") is False
    assert VERIFIERS["demo"](one, "hello") is None


def test_the_verifier_is_found_from_the_rows():
    assert find_verifier("auto", built_in.in_domain("test", 2), "x")[0] == "demo"
    assert find_verifier("auto", [row("a\n#### 3"), row("b\n#### 4")], "x")[0] == "gsm8k"
    assert find_verifier("auto", [row("a\n#### 3"), row("four")], "x")[0] == "exact"
    assert find_verifier("auto", [row("b", choices=["a", "b"])], "x") == ("choice", None)
    own = find_verifier(lambda row, text: True, [row("a")], "x")[1]
    assert own({}, "") is True


def test_verifiers_that_cannot_work_are_refused():
    with pytest.raises(DataError, match="Did you mean gsm8k"):
        find_verifier("gsm8", [row("1")], "x")
    with pytest.raises(DataError, match="x: the verifier gsm8k finds no answer in any of the 2 references"):
        find_verifier("gsm8k", [row("1"), row("2")], "x")
    with pytest.warns(UserWarning, match="no answer in 1 of 2 references"):
        find_verifier("last_number", [row("1"), row("two")], "x")
    with pytest.raises(DataError, match="row 1: multiple choice needs a column `choices`"):
        find_verifier("choice", [row("b")], "x")
    with pytest.raises(DataError, match="row 2: the completion is none of the row's choices"):
        find_verifier("choice", [row("b", choices=["a", "b"]), row("c", choices=["a", "b"])], "x")
    with pytest.raises(DataError, match="^a.jsonl, line 9: the completion is none"):
        find_verifier("choice", [row("c", choices=["a", "b"])], "x", ["a.jsonl, line 9"])
    with pytest.raises(DataError, match="for the built-in sets only"):
        find_verifier("demo", [row("b")], "x")[1](row("b"), "b")


def test_a_verifier_that_never_matches_warns():
    with pytest.warns(UserWarning, match="parsed 0 of 40 completions"):
        warn_if_nothing_parsed("gsm8k", "x", 0, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_nothing_parsed("gsm8k", "x", 1, 40)


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (5, 1), (5, 3), (5, 5), (8, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, k):
    for right in range(samples + 1):
        outcomes = [i < right for i in range(samples)]
        subsets = list(combinations(outcomes, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(np.array([right]), samples, k)[0] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="k must be"):
        pass_at_k(np.array([0]), samples, samples + 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered, trials, rows = 0, 300, 80
    for trial in range(trials):
        tokens = generator.integers(5, 20, rows).astype(float)
        sums = tokens * generator.normal(2.0, 0.5, rows)
        estimate = ratio(sums, tokens, bootstrap_weights(rows, trial))
        assert estimate.value == pytest.approx(sums.sum() / tokens.sum())
        assert estimate.low < estimate.value < estimate.high
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.90 <= covered / trials <= 0.985


def test_resamples_draw_rows_with_replacement_and_repeat_with_the_seed():
    weights = bootstrap_weights(50, 3)
    assert weights.shape == (RESAMPLES, 50) and (weights.sum(1) == 50).all() and weights.max() > 2
    assert (weights == bootstrap_weights(50, 3)).all() and (weights != bootstrap_weights(50, 4)).any()
