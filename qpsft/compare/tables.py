"""The tables of a comparison's page: every metric, every pair, the sets one by one, the learning rates."""

from __future__ import annotations

from qpsft.compare.paired import Difference
from qpsft.compare.results import Comparison, describe_metric, format_mean, format_value, tuning_table


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


def set_rows(comparison: Comparison) -> list[list[str]]:
    """Scores out of domain, a column for each set; [] without sets."""
    sets = [name.partition("/")[2] for name in comparison.base if name.startswith("out_of_domain/")]
    sets = [name for name in sets if name in comparison.counts]  # the other names are a set's further metrics
    if not sets:
        return []
    unit = describe_metric("out_of_domain", comparison.metric).unit
    names = [f"out_of_domain/{name}" for name in sets]
    rows = [["out of domain, by set", *sets], ["base", *(format_value(comparison.base[name], unit) for name in names)]]
    return rows + [
        [arm.name, *(format_mean(arm.last(name), unit) for name in names)] for arm in comparison.arms.values()
    ]
