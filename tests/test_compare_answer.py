"""The sentence that a comparison opens with follows from its intervals, and the table of four columns beside it."""

from __future__ import annotations

import json

import pytest
from comparing import FakeRuns, make_comparison, write_recipe

from qpsft.compare import compare, queue
from qpsft.compare.answer import answer, answer_rows
from qpsft.compare.verdict import render


def arm(kept: float, learnt: float = 0.9, spread: float = 0.02, seeds: int = 3):
    """Scores that end at (learnt, kept), with kept spread over the seeds."""
    return {s: [(learnt / 2, 0.8), (learnt, kept + spread * (s - (seeds - 1) / 2))] for s in range(seeds)}


SFT = arm(0.3)


def say(arms=None, **settings) -> str:
    return answer(make_comparison({"sft": SFT} | (arms or {}), **settings))


def test_what_keeps_more_and_learns_as_much_is_to_be_taken():
    # the base has .9, so sft loses .6 and psft .2 of it
    assert say({"psft": arm(0.7)}) == (
        "Take `psft`: it learns as much as `sft`, and loses 33% of what `sft` loses "
        "(+40.0 ± 0.0 points out of domain at equal in-domain accuracy, 3 seeds)."
    )
    assert "and loses nothing of what `sft` loses" in say({"psft": arm(0.91)})
    assert "learns as much as `sft`, and keeps a little more (+0.1 ± 0.0 points" in say({"psft": arm(0.301)})


def test_the_share_lost_is_read_at_equal_in_domain_score():
    # psft ends at .45 in-domain: at that level sft still has .8, so it loses .1 of the base's .9 and psft .05
    said = say({"psft": {s: [(0.45, 0.85)] for s in range(3)}}, base={"in_domain": 0.0})
    assert "loses 50% of what `sft` loses at equal in-domain accuracy" in said


def test_no_difference_is_sft_the_simplest():
    said = say({"psft": arm(0.31, spread=0.03), "dft": arm(0.3)})
    half = 4.303 * 0.01 / 3**0.5  # of psft: seed by seed 0.01 - 0.01, 0.01, 0.01 + 0.01
    assert said == (
        "Take `sft`, the simplest: the comparison shows no difference to `psft` and `dft` in what is kept at equal "
        f"in-domain accuracy (3 seeds, within {100 * (0.01 + half):.1f} points)."
    )


def test_wide_intervals_are_no_proof_of_equality():
    said = say({"psft": arm(0.4, spread=0.3), "dft": arm(0.31, spread=0.1)})
    half = 4.303 * 0.28 / 3**0.5  # of psft: seed by seed 0.1 - 0.28, 0.1, 0.1 + 0.28
    assert said == (
        "Take `sft`, the simplest, or run more seeds: 3 seeds do not tell `psft` and `dft` apart from it in what is "
        f"kept at equal in-domain accuracy (the most: `psft` +10.0 ± {100 * half:.1f} points)."
    )


def test_the_control_that_leads_is_to_be_taken():
    assert say({"psft": arm(0.2)}) == "Take `sft`: it leads, `psft` learns less or keeps less (3 seeds)."
    assert say({"psft": arm(0.3, learnt=0.5)}).startswith("Take `sft`: it leads, `psft`")
    said = say({"dft": arm(0.32, spread=0.2), "psft": arm(0.2)})
    assert "do not tell `dft` apart from it" in said and said.endswith("; `psft` does worse.")


def test_a_control_that_does_as_well_as_the_method_is_to_be_taken_instead():
    arms = {"sft_matched": arm(0.68), "psft": arm(0.7, spread=0.1)}
    said = say(arms)
    assert said.startswith("Take `sft_matched` (plain SFT at PSFT's learning rate, 0.001): it learns as much as `sft`")
    assert said.endswith("; `psft` is not told apart from it.")
    assert say(arms | {"sft_matched": arm(0.5)}).startswith("Take `psft`: ")


def test_the_best_of_several_and_those_not_told_apart_from_it():
    said = say({"dft": arm(0.5), "eaft": arm(0.72, spread=0.1), "psft": arm(0.75)})
    assert said.startswith("Take `psft`: ") and said.endswith("; `eaft` is not told apart from it.")


def test_one_seed_has_no_interval():
    said = answer(make_comparison({"sft": arm(0.3, seeds=1), "psft": arm(0.7, seeds=1)}))
    assert said == (
        "Repeat this with --seeds 3 before you choose: one seed has no interval, so nothing is shown; here `psft` kept "
        "+40.0 points out of domain at equal in-domain accuracy against `sft`."
    )


def test_what_learned_nothing_is_not_recommended():
    still = {s: [(0.0, 0.9)] for s in range(3)}
    assert say({"psft": still}) == "Take `sft`: no other method is shown to learn anything."
    noise = {s: [(0.03 + 0.1 * (s - 1), 0.9)] for s in range(3)}  # the interval holds the base's score
    assert say({"psft": noise}) == "Take `sft`: no other method is shown to learn anything."
    said = answer(make_comparison({"sft": still, "psft": still}))
    assert said.startswith("Take none of these yet: no method is shown to be better in-domain than the base (accuracy")
    said = answer(make_comparison({"sft": still, "psft": arm(0.5)}))
    assert said.startswith("Take `psft`: it learns (in-domain accuracy .900 ± .000, the base .000), which `sft` is not")


def test_what_keeps_more_but_learns_less_is_a_choice():
    said = say({"psft": {s: [(0.45, 0.87), (0.6, 0.85)] for s in range(3)}})
    assert said.startswith("Take `sft` to learn the most, or `psft` where keeping counts more: it loses ")
    assert said.endswith("but ends 30.0 ± 0.0 points worse in-domain.")


def test_what_learns_more_but_keeps_less_is_a_choice_too():
    rows = {s: [(0.9, 0.2 + 0.01 * s), (0.95, 0.15)] for s in range(3)}
    said = say({"dft": rows, "psft": arm(0.3)})
    assert said.startswith(
        "Take `dft` to learn the most, or `sft` where keeping counts more: `dft` ends 5.0 ± 0.0 points better "
        "in-domain, but keeps less at equal in-domain accuracy (−9.0 ± "
    )
    assert said.endswith(" points out of domain, 3 seeds).")


def test_few_seeds_that_spread_are_no_proof_that_nothing_was_learnt():
    spread = {s: [(0.6 + 0.3 * s, 0.5)] for s in range(2)}  # t = 12.7: the interval holds the base's 0
    close = {s: [(0.1 + 0.001 * s, 0.2)] for s in range(2)}
    assert answer(make_comparison({"sft": spread, "dft": close})) == (
        "Run more seeds before you choose: 2 seeds do not show that `sft` is better in-domain than the base (accuracy "
        ".750 ± .212, the base .000), so nothing can be compared with it."
    )
    unsure = answer(make_comparison({"sft": spread, "dft": spread}))
    assert unsure.startswith("Take none of these yet") and unsure.endswith("; run more seeds.")
    fine = arm(0.3, seeds=2)
    assert answer(make_comparison({"sft": fine, "psft": arm(0.3, seeds=2), "dft": spread})).endswith(
        " Left out, for `dft` (accuracy .750 ± .212) is not shown to be better in-domain than the base."
    )


def test_one_seed_shows_nothing_even_where_sft_learned_nothing():
    said = answer(make_comparison({"sft": {0: [(0.0, 0.9)]}, "dft": {0: [(0.01, 0.1)]}}))
    assert said.startswith("Repeat this with --seeds 3") and "`dft` learned +1.0 points in-domain" in said


def test_a_wide_interval_in_domain_is_no_equality():
    unsure = {s: [(0.85 + 0.1 * (s - 1), 0.7)] for s in range(3)}
    half = 100 * 4.303 * 0.1 / 3**0.5
    assert f"not told apart from `sft` in what it learns (−5.0 ± {half:.1f} points), and loses" in say({"psft": unsure})


def test_without_what_is_kept_it_speaks_of_learning():
    def only_learnt(*ends):
        return {s: [(end, 0.0)] for s, end in enumerate(ends)}

    comparison = make_comparison({"sft": only_learnt(0.5, 0.51, 0.52), "psft": only_learnt(0.7, 0.71, 0.73)})
    for one in comparison.arms.values():
        for run in one.runs.values():
            del run["points"][0]["metrics"]["out_of_domain"]
    del comparison.base["out_of_domain"]
    assert answer(comparison).startswith("Take `psft`: it learns more than `sft` (+20.3 ± ")
    assert answer(comparison).endswith("3 seeds); what is kept was not measured.")
    rows = answer_rows(comparison)
    assert rows[0][3] == "learns more than sft, points" and rows[1][2] == "–" and rows[3][3].startswith("+20.3 ± ")


def test_a_likelihood_is_better_when_it_is_lower():
    lower = {"sft": {s: [(1.0, 3.0 + s / 50)] for s in range(3)}, "psft": {s: [(1.0, 2.0)] for s in range(3)}}
    comparison = make_comparison(lower, metric="nll", base={"in_domain": 2.0, "out_of_domain": 1.5})
    assert answer(comparison).startswith(
        "Take `psft`: it learns as much as `sft`, and loses 33% of what `sft` loses (+1.0"
    )
    assert answer_rows(comparison)[0] == [
        "method", "learnt: in-domain NLL", "kept: out-of-domain NLL", "keeps more than sft, nats",
    ]  # fmt: skip


def test_without_sft_there_is_no_advice():
    assert "add it to --arms" in answer(make_comparison({"psft": SFT}))
    assert say() == "Take `sft`: no other method was run."


def test_the_table_has_four_columns():
    rows = answer_rows(make_comparison({"sft": SFT, "psft": arm(0.7)}))
    assert rows[0][0] == "method" and rows[0][3] == "keeps more than sft, points"
    assert rows[1:] == [
        ["base", ".000", ".900", "–"],
        ["sft", ".900 ± .000", ".300 ± .020", "–"],
        ["psft", ".900 ± .000", ".700 ± .020", "+40.0 ± 0.0"],
    ]


def test_the_terminal_gets_the_sentence_and_the_table_only():
    comparison = make_comparison({"sft": SFT, "psft": arm(0.7)})
    text = render(comparison, 80)
    assert " ".join(text.split()).startswith(answer(comparison))
    assert len(text.splitlines()) < 12 and max(map(len, text.splitlines())) <= 80
    comparison.shortened = {"truncated": 12, "dropped": 0, "max_length": 256}
    assert render(comparison, 80).endswith("1 note on what limits this comparison: in the report.")


@pytest.mark.parametrize("arms", ["sft,psft", "sft,sft_kl,dft,asft,eaft,stm,trsft,psft,psft_kl"])
def test_every_method_has_a_page_and_the_record_says_what_the_page_says(tmp_path, monkeypatch, arms):
    def scores(spec):
        kept = 0.6 if spec.method.get("loss_type") == "psft" else 0.2
        return [(0.5, 0.7), (0.9, kept + spec.seed / 100)] if spec.method else [(0.0, 0.9)], 0.5

    monkeypatch.setattr(queue, "do_run", FakeRuns(scores))
    found = compare(write_recipe(tmp_path), arms=arms)
    record = json.loads((tmp_path / "comparison/comparison.json").read_text())
    assert record["answer"] == answer(found) and record["answer"].startswith("Take `psft`")
    assert len(record["verdict"]) == 2 * (len(found.arms) - 1) and record["limits"] == []
    page = (tmp_path / "comparison/report.html").read_text()
    body = page[page.index("<body>") :]
    first, _, rest = body.partition("</h1>")
    assert first.strip().startswith("<body>\n<h1>Take <code>psft</code>: it learns as much as <code>sft</code>")
    shown, _, folded = rest.partition("<details>")
    assert shown.index("<svg") < shown.index("<table") and shown.count("<th>") == 4
    assert record["verdict"][0] not in shown and record["verdict"][0] in folded
