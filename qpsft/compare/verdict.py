"""What a comparison says, in words that follow from its intervals, and the table they are read from."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from qpsft.compare.coverage import coverage_notes
from qpsft.compare.paired import Difference, mean_and_sd
from qpsft.compare.results import (
    NATS,
    SHARE,
    Comparison,
    describe_metric,
    format_mean,
    format_value,
    tuning_table,
)
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


SMALL = {SHARE: 0.05, NATS: 0.1}
"""A difference up to this size is reported as "no difference larger than"."""


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
    scale, digits, word = (100, 1, "points") if unit == SHARE else (1, 3, "nats per token")
    mean = f"{scale * difference.mean:+.{digits}f}".replace("-", "−")
    if difference.half_width is None:
        return f"{treatment} against {control}: {mean} {word} {claim.same} {where}; one seed, so no interval."
    half = f"{scale * difference.half_width:.{digits}f}"
    seeds = f"({difference.n} seeds)"
    if difference.low > 0:
        return f"{treatment} {claim.more} {control}: {mean} ± {half} {word} {where} {seeds}."
    if difference.high < 0:
        return f"{treatment} {claim.less} {control}: {mean} ± {half} {word} {where} {seeds}."
    widest = max(abs(difference.low), abs(difference.high))
    if widest > SMALL[unit]:
        return f"{treatment} and {control} are not told apart {claim.same}: {mean} ± {half} {word} {where} {seeds}."
    bound = f"{scale * widest:.{digits}f}"
    return f"{treatment} and {control}: no difference {claim.same} larger than {bound} {word} {where} {seeds}."


def verdict(comparison: Comparison) -> list[str]:
    """Sentences on what is learned and kept, for each pair of the comparison, and on what limits the comparison."""
    lines = []
    for treatment, control in comparison.pairs:
        if comparison.same_runs(treatment, control):
            lines.append(f"{treatment} and {control} are the same runs here: one method at one learning rate.")
        else:
            lines += _pair_verdict(comparison, treatment, control)
    for notes in (_coverage_notes, _shortened_notes, _rate_notes, _completion_notes):
        lines += notes(comparison)
    return lines


def _pair_verdict(comparison: Comparison, treatment: str, control: str) -> list[str]:
    score, sign = describe_metric("in_domain", comparison.metric), comparison.sign("in_domain")
    lines = []
    matched = comparison.matched(treatment, control)
    if matched is not None:
        level, difference = matched
        kind = "accuracy" if score.unit == SHARE else "NLL"
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
    if comparison.metric == "nll":
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


def table_rows(comparison: Comparison) -> list[list[str]]:
    """The arms at the last epoch: a header, the base, one row per arm, mean ± sd."""
    columns = comparison.columns()
    metrics = [describe_metric(name, comparison.metric) for name in columns]
    rows = [["at the last epoch", "lr", *(metric.short for metric in metrics)]]
    base = [comparison.base.get(name) for name in columns]
    rows.append(
        ["base", "–"]
        + ["–" if value is None else format_value(value, m.unit) for value, m in zip(base, metrics, strict=True)]
    )
    for arm in comparison.arms.values():
        values = [format_mean(arm.last(name), metric.unit) for name, metric in zip(columns, metrics, strict=True)]
        rows.append([arm.name, f"{arm.learning_rate:g}", *values])
    return rows


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """Paired differences: a header and one row per pair, mean ± half of the 95 % interval."""
    columns = comparison.columns()
    rows = [
        ["treatment − control", "at equal in-domain", *(describe_metric(n, comparison.metric).short for n in columns)]
    ]
    for treatment, control in comparison.pairs:
        if comparison.same_runs(treatment, control):
            rows.append([f"{treatment} − {control}", "same runs", *("–" for _ in columns)])
            continue
        cells = [
            _difference_cell(
                comparison.difference(treatment, control, name), describe_metric(name, comparison.metric).unit
            )
            for name in columns
        ]
        rows.append([f"{treatment} − {control}", _matched_cell(comparison, treatment, control), *cells])
    return rows


def tuning_rows(comparison: Comparison, title: str) -> list[list[str]]:
    """Validation scores of the tuned arms: a header with the grid, and one row per arm; [] where none was tuned."""
    tuned = {name: tuning_table(arm) for name, arm in comparison.arms.items() if arm.grid}
    if not tuned:
        return []
    unit = describe_metric("validation", comparison.metric).unit
    rows = [[title, *next(iter(tuned.values()))]]
    for name, scores in tuned.items():
        rows.append([name, *("diverged" if s is None else format_value(s, unit) for s in scores.values())])
    return rows


def _matched_cell(comparison: Comparison, treatment: str, control: str) -> str:
    matched = comparison.matched(treatment, control)
    if matched is None or not comparison.is_learned(matched[0]):
        return "–"
    level, difference = matched
    kept = describe_metric("out_of_domain", comparison.metric)
    shown = _difference_cell(difference.signed(comparison.sign("out_of_domain")), kept.unit)
    unit = describe_metric("in_domain", comparison.metric).unit
    return f"{shown} @ {format_value(comparison.sign('in_domain') * level, unit)}"


def _difference_cell(difference: Difference | None, unit: str) -> str:
    if difference is None:
        return "–"
    sign = "−" if difference.mean < 0 else "+"
    mean = f"{sign}{format_value(abs(difference.mean), unit)}"
    return mean if difference.half_width is None else f"{mean} ± {format_value(difference.half_width, unit)}"


def render(comparison: Comparison, width: int | None = None) -> str:
    """The comparison as text: table, differences, verdict, and what the numbers mean.

    Args:
        width: columns of the terminal; None: tables of any width.
    """
    kind = describe_metric("validation", comparison.metric).title
    tuning = tuning_rows(comparison, f"{kind} by learning rate")
    tables = [table_rows(comparison), difference_rows(comparison), tuning]
    parts = [f"{text_table(rows, width)}\n" for rows in tables if rows]
    for line in [*verdict(comparison), *overlap_lines(comparison), METHOD]:
        wide = min(width or 110, 110)
        parts += textwrap.wrap(line, wide, initial_indent="· ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(parts)
