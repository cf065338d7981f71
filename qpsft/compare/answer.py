"""What a comparison comes down to: one sentence to act on, and a table of four columns. Both follow from intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpsft.compare.arms import ARMS
from qpsft.compare.paired import Difference, interval, matched
from qpsft.compare.results import SHARE, ArmResult, Comparison, describe_metric, format_mean, format_value, score_name
from qpsft.terminal import listed

CONTROL = "sft"
SMALL = {SHARE: 0.05, "nats": 0.1}
"""An interval that holds 0 and reaches no further than this counts as "no difference"."""
LITTLE = 0.95
"""A method that loses more than this share of what `sft` loses keeps only a little more."""


@dataclass(frozen=True)
class Rival:
    """A method beside `sft`; differences are method − sft, higher is better.

    Attributes:
        learnt: in-domain at the last epoch.
        kept: out of domain at equal in-domain score; None if that was not measured, or there is no level to compare at.
        lost: the method's loss there against the base, divided by that of `sft`; None if `sft` loses nothing.
    """

    name: str
    learnt: Difference
    kept: Difference | None
    lost: float | None

    @property
    def is_better(self) -> bool:
        """Better in one of the two, and not shown to be worse in the other."""
        return _is_more(self.kept) and not _is_less(self.learnt) or _is_more(self.learnt) and not _is_less(self.kept)

    @property
    def is_worse(self) -> bool:
        """Worse in one of the two, and not shown to be better in the other."""
        return _is_less(self.kept) and not _is_more(self.learnt) or _is_less(self.learnt) and not _is_more(self.kept)

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The highest is the first choice: what is kept counts before what is learned."""
        kept = -1e9 if self.kept is None else self.kept.mean
        return _is_more(self.kept), kept, self.learnt.mean


def _is_more(difference: Difference | None) -> bool:
    return difference is not None and difference.low is not None and difference.low > 0


def _is_less(difference: Difference | None) -> bool:
    return difference is not None and difference.high is not None and difference.high < 0


def answer(comparison: Comparison) -> str:
    """One sentence on which method to take. Names stand in backquotes."""
    if CONTROL not in comparison.arms:
        return f"There is no `{CONTROL}` to compare with, so no method is recommended: add it to --arms."
    learned = [name for name, arm in comparison.arms.items() if _has_learned(comparison, arm)]
    if not learned:
        return _nothing_learned(comparison)
    rivals = [_rival(comparison, name) for name in learned if not comparison.same_runs(name, CONTROL)]
    if not rivals:
        alone = "no other method was run" if len(comparison.arms) == 1 else "no other method is shown to learn anything"
        return f"Take `{CONTROL}`: {alone}."
    if _seeds(comparison) == 1:
        return _one_seed(comparison, rivals)
    if CONTROL not in learned:
        return _control_not_shown(comparison, learned)
    return _advice(comparison, rivals) + _not_shown(comparison, learned)


def _advice(comparison: Comparison, rivals: Sequence[Rival]) -> str:
    """The sentence on methods that are all shown to learn, `sft` among them."""
    best = max(filter(lambda rival: rival.is_better, rivals), key=lambda rival: rival.rank, default=None)
    if best is not None:
        return _take(comparison, best, [rival for rival in rivals if rival.is_better and rival is not best])
    keepers = [rival for rival in rivals if _is_more(rival.kept)]  # which learn less, or they would be better
    if keepers:
        return _trade(comparison, max(keepers, key=lambda rival: rival.rank))
    learners = [rival for rival in rivals if _is_more(rival.learnt)]  # which keep less, or they would be better
    if learners:
        return _reverse_trade(comparison, max(learners, key=lambda rival: rival.learnt.mean))
    return _take_control(comparison, rivals)


def _seeds(comparison: Comparison) -> int:
    return min(len(arm.runs) for arm in comparison.arms.values())


def _has_learned(comparison: Comparison, arm: ArmResult) -> bool:
    """Better in-domain than the base at the last epoch: by the interval over seeds, or by one seed's score."""
    gain = interval(_gains(comparison, arm))
    return (gain.mean if gain.low is None else gain.low) > 0


def _gains(comparison: Comparison, arm: ArmResult) -> list[float]:
    """For each seed, the in-domain score at the last epoch minus the base's; higher is better."""
    sign, base = comparison.sign("in_domain"), comparison.base["in_domain"]
    return [sign * (value - base) for value in arm.last("in_domain").values()]


def _may_have_learned(comparison: Comparison, arm: ArmResult) -> bool:
    """Better than the base with every seed: where the interval does not show it, more seeds may."""
    return min(_gains(comparison, arm)) > 0


def _rival(comparison: Comparison, name: str) -> Rival:
    learnt = comparison.difference(name, CONTROL, "in_domain").signed(comparison.sign("in_domain"))
    matched_at = comparison.matched(name, CONTROL)
    if matched_at is None or not comparison.is_learned(matched_at[0]):
        return Rival(name, learnt, None, None)
    sides = [comparison.points(comparison.arms[arm].runs) for arm in (name, CONTROL)]
    levels = [matched(sides[0][seed], sides[1][seed]) for seed in sides[0].keys() & sides[1].keys()]
    base = comparison.sign("out_of_domain") * comparison.base["out_of_domain"]
    lost = [base - sum(level[side] for level in levels) / len(levels) for side in (1, 2)]
    return Rival(name, learnt, matched_at[1], lost[0] / lost[1] if lost[1] > 0 else None)


# ---- the sentences ----


def _take(comparison: Comparison, best: Rival, others: Sequence[Rival]) -> str:
    equal = [rival for rival in others if not _is_shown_better(comparison, best, rival)]
    for rival in equal:
        if rival.name == ARMS[best.name].control:  # without the loss that `best` adds to it, so the simpler one
            equal[equal.index(rival)], best = best, rival
            break
    seeds = f"{best.learnt.n} seeds"
    in_domain, kept = _unit(comparison, "in_domain"), _unit(comparison, "out_of_domain")
    if _is_more(best.kept):
        shown = f"{amount(best.kept, kept)} out of domain at equal in-domain {_score(comparison)}"
        says = f"it {_learns(best.learnt, in_domain)}, and {_keeps(best)} ({shown}, {seeds})"
    else:
        says = f"it learns more than `{CONTROL}` ({amount(best.learnt, in_domain)}, {seeds})"
        if best.kept is None:
            says += (
                "; what is kept was not compared" if comparison.has_out_of_domain else "; what is kept was not measured"
            )
        else:
            says += f" and is not told apart from it in what is kept ({amount(best.kept, kept)})"
    if names := [f"`{rival.name}`" for rival in equal]:
        says += f"; {listed(names)} {'is' if len(names) == 1 else 'are'} not told apart from it"
    return f"Take {_named(comparison, best.name)}: {says}."


def _is_shown_better(comparison: Comparison, best: Rival, other: Rival) -> bool:
    """Whether the interval between the two says that `best` keeps more, or learns more if nothing was kept."""
    if best.kept is None:
        difference = comparison.difference(best.name, other.name, "in_domain")
        return _is_more(difference.signed(comparison.sign("in_domain")))
    return _is_more(comparison.matched(best.name, other.name)[1])


def _learns(learnt: Difference, unit: str) -> str:
    if _is_more(learnt):
        return f"learns more than `{CONTROL}`"
    if max(abs(learnt.low), abs(learnt.high)) <= SMALL[unit]:
        return f"learns as much as `{CONTROL}`"
    return f"is not told apart from `{CONTROL}` in what it learns ({amount(learnt, unit)})"


def _keeps(rival: Rival) -> str:
    if rival.lost is None:
        return "keeps more"
    if rival.lost <= 0:
        return f"loses nothing of what `{CONTROL}` loses"
    if rival.lost > LITTLE:
        return "keeps a little more"
    return f"loses {rival.lost:.0%} of what `{CONTROL}` loses"


def _trade(comparison: Comparison, best: Rival) -> str:
    unit = _unit(comparison, "in_domain")
    return (
        f"Take `{CONTROL}` to learn the most, or {_named(comparison, best.name)} where keeping counts more: it "
        f"{_keeps(best)} at equal in-domain {_score(comparison)} "
        f"({amount(best.kept, _unit(comparison, 'out_of_domain'))} out of domain, {best.kept.n} seeds), but ends "
        f"{amount(best.learnt, unit).lstrip('−')} worse in-domain."
    )


def _reverse_trade(comparison: Comparison, best: Rival) -> str:
    return (
        f"Take {_named(comparison, best.name)} to learn the most, or `{CONTROL}` where keeping counts more: "
        f"`{best.name}` ends {amount(best.learnt, _unit(comparison, 'in_domain')).lstrip('+')} better in-domain, but "
        f"keeps less at equal in-domain {_score(comparison)} "
        f"({amount(best.kept, _unit(comparison, 'out_of_domain'))} out of domain, {best.learnt.n} seeds)."
    )


def _take_control(comparison: Comparison, rivals: Sequence[Rival]) -> str:
    seeds = f"{rivals[0].learnt.n} seeds"
    equal = [rival for rival in rivals if not rival.is_worse]
    worse = [f"`{rival.name}`" for rival in rivals if rival.is_worse]
    if not equal:
        every = (
            f"{listed(worse)} learn{'s' if len(worse) == 1 else ''} less or keep{'s' if len(worse) == 1 else ''} less"
        )
        return f"Take `{CONTROL}`: it leads, {every} ({seeds})."
    names = listed([f"`{rival.name}`" for rival in equal])
    name = "in_domain" if equal[0].kept is None else "out_of_domain"
    shown = [rival.learnt if name == "in_domain" else rival.kept for rival in equal]
    farthest = max(max(abs(one.low), abs(one.high)) for one in shown if one is not None)
    rest = f"; {listed(worse)} {'does' if len(worse) == 1 else 'do'} worse" if worse else ""
    what = "in what is learned" if name == "in_domain" else f"in what is kept at equal in-domain {_score(comparison)}"
    if farthest > SMALL[_unit(comparison, name)]:
        first = max(equal, key=lambda rival: rival.rank)
        most = amount(first.learnt if name == "in_domain" else first.kept, _unit(comparison, name))
        return (
            f"Take `{CONTROL}`, the simplest, or run more seeds: {seeds} do not tell {names} apart from it {what} "
            f"(the most: `{first.name}` {most}){rest}."
        )
    within = f"within {_number(farthest, _unit(comparison, name)).lstrip('+')}"
    return (
        f"Take `{CONTROL}`, the simplest: the comparison shows no difference to {names} {what} "
        f"({seeds}, {within}){rest}."
    )


def _one_seed(comparison: Comparison, rivals: Sequence[Rival]) -> str:
    best = max(rivals, key=lambda rival: rival.rank)
    if best.kept is None:
        shown = f"learned {amount(best.learnt, _unit(comparison, 'in_domain'))} in-domain"
    else:
        kept = amount(best.kept, _unit(comparison, "out_of_domain"))
        shown = f"kept {kept} out of domain at equal in-domain {_score(comparison)}"
    return (
        "Repeat this with --seeds 3 before you choose: one seed has no interval, so nothing is shown; here "
        f"`{best.name}` {shown} against `{CONTROL}`."
    )


def _nothing_learned(comparison: Comparison) -> str:
    best = _best_in_domain(comparison, comparison.arms)
    unsure = any(_may_have_learned(comparison, arm) for arm in comparison.arms.values())
    then = "run more seeds" if unsure else "train longer, on more rows or at another learning rate"
    return (
        "Take none of these yet: no method is shown to be better in-domain than the base "
        f"({_score(comparison)} {_reached(comparison, best)} with `{best}`, the base {_of_base(comparison)}); {then}."
    )


def _control_not_shown(comparison: Comparison, learned: Sequence[str]) -> str:
    if _may_have_learned(comparison, comparison.arms[CONTROL]):
        return (
            f"Run more seeds before you choose: {_seeds(comparison)} seeds do not show that `{CONTROL}` is better "
            f"in-domain than the base ({_score(comparison)} {_reached(comparison, CONTROL)}, the base "
            f"{_of_base(comparison)}), so nothing can be compared with it."
        )
    best = _best_in_domain(comparison, learned)
    return (
        f"Take {_named(comparison, best)}: it learns (in-domain {_score(comparison)} {_reached(comparison, best)}, the "
        f"base {_of_base(comparison)}), which `{CONTROL}` is not shown to do."
    )


def _best_in_domain(comparison: Comparison, names: Iterable[str]) -> str:
    return max(names, key=lambda name: interval(_gains(comparison, comparison.arms[name])).mean)


def _not_shown(comparison: Comparison, learned: Sequence[str]) -> str:
    """The methods that the advice leaves out; empty if there are none."""
    missing = [
        f"`{name}` ({_score(comparison)} {_reached(comparison, name)})"
        for name in comparison.arms
        if name not in learned and not comparison.same_runs(name, CONTROL)
    ]
    if not missing:
        return ""
    are = "is" if len(missing) == 1 else "are"
    return f" Left out, for {listed(missing)} {are} not shown to be better in-domain than the base."


def _reached(comparison: Comparison, name: str) -> str:
    return format_mean(comparison.arms[name].last("in_domain"), _unit(comparison, "in_domain"))


def _of_base(comparison: Comparison) -> str:
    return format_value(comparison.base["in_domain"], _unit(comparison, "in_domain"))


def _named(comparison: Comparison, name: str) -> str:
    """A method's name; of a control also what it is, for nobody asks for one by its name."""
    arm = comparison.arms[name]
    return f"`{name}` ({arm.what}, {arm.learning_rate:g})" if ARMS[name].rate_of else f"`{name}`"


def _unit(comparison: Comparison, name: str) -> str:
    return describe_metric(name, comparison.metric).unit


def _score(comparison: Comparison) -> str:
    return score_name("in_domain", comparison.metric)


def amount(difference: Difference, unit: str) -> str:
    """+14.5 ± 3.0 points of a share (hundredths), +0.145 ± 0.030 nats per token; no ± for one seed."""
    if difference.half_width is None:
        return _number(difference.mean, unit)
    value, _, word = _number(difference.mean, unit).partition(" ")
    return f"{value} ± {_number(difference.half_width, unit).partition(' ')[0].lstrip('+')} {word}"


def _number(value: float, unit: str) -> str:
    text = f"{100 * value:+.1f} points" if unit == SHARE else f"{value:+.3f} nats per token"
    return text.replace("-", "−")


# ---- the table ----


def answer_rows(comparison: Comparison) -> list[list[str]]:
    """A header, the base, one row per arm: method, learnt, kept, and its difference to `sft`.

    Scores are mean ± sd. The difference has half of its 95 % interval: what is kept at equal in-domain score, or what
    is learnt where nothing else was measured.
    """
    units = {name: _unit(comparison, name) for name in ("in_domain", "out_of_domain")}
    kinds = {name: score_name(name, comparison.metric) for name in units}
    has_kept = comparison.has_out_of_domain
    unit = "points" if units["out_of_domain" if has_kept else "in_domain"] == SHARE else "nats"
    last = f"{'keeps' if has_kept else 'learns'} more than {CONTROL}, {unit}"
    rows = [
        ["method", f"learnt: in-domain {kinds['in_domain']}", f"kept: out-of-domain {kinds['out_of_domain']}", last]
    ]
    base = [format_value(comparison.base[n], units[n]) if n in comparison.base else "–" for n in units]
    rows.append(["base", *base, "–"])
    for arm in comparison.arms.values():
        scores = [format_mean(arm.last(name), units[name]) for name in units]
        rows.append([arm.name, *scores, _against_control(comparison, arm.name)])
    return rows


def _against_control(comparison: Comparison, name: str) -> str:
    if CONTROL not in comparison.arms or comparison.same_runs(name, CONTROL):
        return "–"
    rival = _rival(comparison, name)
    kind = "out_of_domain" if comparison.has_out_of_domain else "in_domain"
    difference = rival.kept if comparison.has_out_of_domain else rival.learnt
    if difference is None:
        return "–"
    return amount(difference, _unit(comparison, kind)).removesuffix(" points").removesuffix(" nats per token")
