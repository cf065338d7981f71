"""What a comparison says of each pair of arms, in words that follow from its intervals, and what limits it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from qpsft.compare.answer import SMALL, amount, answer, answer_rows
from qpsft.compare.coverage import coverage_notes
from qpsft.compare.paired import Difference, mean_and_sd
from qpsft.compare.results import Comparison, describe_metric, format_value, score_name
from qpsft.terminal import text_table

METHOD = (
    "± behind a mean is the standard deviation over seeds; ± behind a difference is half its 95 % t interval over "
    "seeds, paired: at each seed both sides have the same initial adapter, are offered the same rows, shuffled alike, "
    "and take as many optimizer steps; arms with several visits go through them in another order. Intervals hold for "
    "these test rows and are not corrected for the number of comparisons. "
    "Equal in-domain score: at each seed the level is the highest that both sides reach in any epoch. Each side's "
    "out-of-domain score there is read from its frontier, the epochs that none of its other epochs beats in both "
    "scores, joined by straight lines; a side that never was below the level counts with its best epoch."
)


@dataclass(frozen=True)
class Claim:
    """The words for one quantity: what the treatment does if it is higher, if it is lower, and what is equal."""

    more: str
    less: str
    same: str


KEEPS = Claim("keeps more out of domain than", "keeps less out of domain than", "out of domain")
LEARNS = Claim("is better in-domain than", "is worse in-domain than", "in-domain")


def judge(treatment: str, control: str, difference: Difference, claim: Claim, unit: str, where: str) -> str:
    """One sentence about treatment − control.

    "A keeps more out of domain than B: +14.5 ± 3.0 points …" when the interval lies above 0, "… less …" when below.
    When it holds 0: "A and B: no difference out of domain larger than 4.2 points …", its farther end, if that is a
    small one, else "A and B are not told apart out of domain: +10.7 ± 27.3 points …".

    Args:
        difference: in shares or nats, higher meaning `claim.more`.
        unit: SHARE (printed in points, hundredths) or NATS.
        where: under which condition, such as "at the last epoch".
    """
    if difference.half_width is None:
        return (
            f"{treatment} against {control}: {amount(difference, unit)} {claim.same} {where}; one seed, so no interval."
        )
    shown = f"{amount(difference, unit)} {where} ({difference.n} seeds)."
    if difference.low > 0:
        return f"{treatment} {claim.more} {control}: {shown}"
    if difference.high < 0:
        return f"{treatment} {claim.less} {control}: {shown}"
    widest = max(abs(difference.low), abs(difference.high))
    if widest > SMALL[unit]:
        return f"{treatment} and {control} are not told apart {claim.same}: {shown}"
    bound = amount(Difference(widest, None, difference.n), unit).lstrip("+")
    seeds = f"({difference.n} seeds)"
    return f"{treatment} and {control}: no difference {claim.same} larger than {bound} {where} {seeds}."


def verdict(comparison: Comparison) -> list[str]:
    """Sentences on what is learned and kept, for each pair of the comparison."""
    lines = []
    for treatment, control in comparison.pairs:
        if comparison.same_runs(treatment, control):
            lines.append(f"{treatment} and {control} are the same runs here: one method at one learning rate.")
        else:
            lines += _pair_verdict(comparison, treatment, control)
    return lines


def limits(comparison: Comparison) -> list[str]:
    """Sentences on what limits the comparison: rows not seen or cut, learning rates, completions without an answer."""
    notes = (_coverage_notes, _shortened_notes, _rate_notes, _completion_notes)
    left_out = [f"The budget left out: {'; '.join(comparison.left_out)}."] if comparison.left_out else []
    return left_out + [line for note in notes for line in note(comparison)]


def _pair_verdict(comparison: Comparison, treatment: str, control: str) -> list[str]:
    score, sign = describe_metric("in_domain", comparison.metric), comparison.sign("in_domain")
    lines = []
    matched = comparison.matched(treatment, control)
    if matched is not None:
        level, difference = matched
        kind = score_name("in_domain", comparison.metric)
        if not comparison.is_learned(level):
            lines.append(
                f"{treatment} against {control}: one of them never gets better in-domain than the base, so there is no "
                "level to compare at."
            )
        else:
            where = f"at equal in-domain {kind} of {format_value(sign * level, score.unit)}"
            kept = describe_metric("out_of_domain", comparison.metric)
            lines.append(judge(treatment, control, difference, KEEPS, kept.unit, where))
    in_domain = comparison.difference(treatment, control, "in_domain")
    if in_domain is not None:
        lines.append(judge(treatment, control, in_domain.signed(sign), LEARNS, score.unit, _LAST))
    return lines


_LAST = "at the last epoch"
MANY = 0.25
"""A note is written when at least this share of the completions was cut off."""


def _coverage_notes(comparison: Comparison) -> list[str]:
    """Arms that never saw all rows."""
    methods = comparison.settings.get("methods", {})
    unseen = {name: arm.unseen_share for name, arm in comparison.arms.items()}
    visits = {name: methods.get(name, {}).get("num_iterations", 1) for name in unseen}
    max_steps = comparison.settings.get("training", {}).get("max_steps", -1)
    return coverage_notes(unseen, visits, max_steps=max_steps)


def _shortened_notes(comparison: Comparison) -> list[str]:
    """Training rows that max_length cut, or left no supervised token of."""
    cut, dropped = (comparison.shortened.get(name, 0) for name in ("truncated", "dropped"))
    limit = comparison.shortened.get("max_length")
    notes = []
    if cut:
        rows = comparison.counts["train"]
        notes.append(f"{cut} of {rows} training rows were cut at {limit} tokens (max_length).")
    if dropped:
        notes.append(f"{dropped} training rows had no supervised token within {limit} tokens and were left out.")
    return notes


def _rate_notes(comparison: Comparison) -> list[str]:
    """Learning rates at which training diverged, and arms whose chosen rate lies at an end of the grid."""
    notes = []
    for arm in comparison.arms.values():
        rates = sorted(arm.grid)
        for rate in rates:
            steps = [run["diverged"]["step"] for run in arm.grid[rate].values() if "diverged" in run]
            if steps:
                notes.append(
                    f"{arm.name}: training diverged at learning rate {rate:g} ({len(steps)} of {len(arm.grid[rate])} "
                    f"seeds, at optimizer step {', '.join(map(str, sorted(set(steps))))}), so it counts as the worst."
                )
        if len(rates) > 1 and arm.learning_rate in (rates[0], rates[-1]):
            end = "lowest" if arm.learning_rate == rates[0] else "highest"
            notes.append(
                f"{arm.name}: the chosen learning rate {arm.learning_rate:g} is the {end} of the grid; a better one "
                "may lie beyond it."
            )
    return notes


def _completion_notes(comparison: Comparison) -> list[str]:
    """Arms whose greedy completions do not end, or hold no answer, so that their accuracy says little."""
    notes = []
    if score_name("in_domain", comparison.metric) == "NLL":
        return notes
    for arm in comparison.arms.values():
        capped, parsed = (list(arm.last(name).values()) for name in ("length_capped", "parsed"))
        if capped and mean_and_sd(capped)[0] >= MANY:
            notes.append(
                f"{arm.name}: {mean_and_sd(capped)[0]:.0%} of its greedy in-domain completions were cut off at the "
                "length cap; raise --max_new_tokens."
            )
        if parsed and mean_and_sd(parsed)[0] == 0:
            notes.append(f"{arm.name}: the verifier found no answer in any greedy in-domain completion.")
    return notes


def overlap_lines(comparison: Comparison) -> list[str]:
    """What stands word for word in two sets that should be apart; one reassuring line if nothing does."""
    lines = []
    for name, counts in comparison.overlap.items():
        where = "the validation rows" if " in validation" in name else "the training rows"
        if counts["duplicate_prompts"]:
            lines.append(
                f"{name.removesuffix(' in validation')}: {counts['duplicate_prompts']} prompts "
                f"({counts['duplicate_rows']} with the same answer) also stand in {where}."
            )
    return lines or ["No test row stands among the training or validation rows."]


def render(comparison: Comparison, width: int | None = None) -> str:
    """The comparison as text: the answer, the table of four columns, and how many notes the page has.

    Args:
        width: columns of the terminal; None: a table of any width.
    """
    wide = min(width or 110, 110)
    sentence = textwrap.fill(answer(comparison), wide, break_on_hyphens=False)
    notes = len(limits(comparison))
    counted = (
        f"\n\n{notes} note{'s' if notes > 1 else ''} on what limits this comparison: in the report." if notes else ""
    )
    return f"{sentence}\n\n{text_table(answer_rows(comparison), width)}{counted}"
