"""report.html: a comparison on one self-contained page that opens from disk, with its figures as PNG beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.compare.figures import as_svg, figures
from qpsft.compare.results import Comparison, describe_metric, format_mean, format_value
from qpsft.compare.verdict import METHOD, difference_rows, overlap_lines, table_rows, tuning_rows, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
PNG_DPI = 120

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #8886; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; } .texts td { white-space: pre-wrap; text-align: left; overflow-wrap: anywhere; }
.texts th { text-align: left; }
figure { margin: 1rem 0; } figure div { background: #fff; padding: .5rem; border-radius: .4rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } figcaption { font-size: .9rem; }
.right::before { content: "right: "; font-weight: 600; } .wrong::before { content: "wrong: "; font-weight: 600; }
.wrong { opacity: .75; } code, pre { font-size: .85rem; } pre { overflow-x: auto; }
"""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes `report.html` and one PNG per figure into `folder`."""
    drawn = figures(comparison)
    for name, (_, figure) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=PNG_DPI)
    (folder / REPORT).write_text(report_page(comparison, drawn), encoding="utf-8")


def report_page(comparison: Comparison, drawn: Mapping[str, tuple[str, Figure]]) -> str:
    """The page as text."""
    seeds = max(len(arm.runs) for arm in comparison.arms.values())
    epochs = max(run["points"][-1]["epoch"] for arm in comparison.arms.values() for run in arm.runs.values())
    what = "".join(
        f"<li><b>{escape(arm.name)}</b>: {escape(arm.what)}, learning rate {arm.learning_rate:g}"
        f"{'' if arm.has_own_rate else ' (taken over)'}"
        f"{f' ({1 - arm.unseen_share:.0%} of the rows)' if arm.unseen_share else ''}</li>"
        for arm in comparison.arms.values()
    )
    parts = [
        f"<h1>{escape(comparison.name)}: {escape(', '.join(comparison.arms))}</h1>",
        f"<p>{seeds} seeds, {epochs:g} epochs. Every arm starts from the same base, is offered the same rows and takes "
        "as many optimizer steps.</p>",
        f"<ul>{what}</ul>",
        "<h2>Verdict</h2>",
        bullets(verdict(comparison)),
        "<h2>At the last epoch</h2>",
        table(table_rows(comparison)),
        "<h2>Differences</h2>",
        table(difference_rows(comparison)),
        f"<p>{escape(METHOD)}</p>",
        "<h2>Figures</h2>",
        *(picture(caption, figure) for caption, figure in drawn.values()),
        *_sets(comparison),
        *_tuning(comparison),
        "<h2>Completions</h2>",
        _completions(comparison),
        "<h2>Rows</h2>",
        table([["set", "rows"], *([name, str(count)] for name, count in comparison.counts.items())]),
        bullets(overlap_lines(comparison)),
        "<h2>Settings and versions</h2>",
        f"<pre>{escape(json.dumps(comparison.settings, indent=1, ensure_ascii=False))}</pre>",
    ]
    return page(f"qpsft compare: {comparison.name}", parts)


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML document of these parts."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bullets(lines: Sequence[str]) -> str:
    """A list, one item a line."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def picture(caption: str, figure: Figure) -> str:
    """A figure drawn into the page, on white in a dark browser too."""
    return f"<figure><div>{as_svg(figure)}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _sets(comparison: Comparison) -> list[str]:
    """Out of domain, set by set."""
    names = [
        name
        for name in comparison.base
        if name.startswith("out_of_domain/") and name.removeprefix("out_of_domain/") in comparison.counts
    ]
    if not names:
        return []
    unit = describe_metric("out_of_domain", comparison.metric).unit
    rows = [["out of domain, by set", *(name.partition("/")[2] for name in names)]]
    rows.append(["base", *(format_value(comparison.base[name], unit) for name in names)])
    rows += [[arm.name, *(format_mean(arm.last(name), unit) for name in names)] for arm in comparison.arms.values()]
    return ["<h2>Out of domain, set by set</h2>", table(rows)]


def _tuning(comparison: Comparison) -> list[str]:
    if not any(arm.grid for arm in comparison.arms.values()):
        return []
    rows = tuning_rows(comparison, "validation score")
    return ["<h2>Choice of the learning rate, on validation rows only</h2>", table(rows)]


def _completions(comparison: Comparison) -> str:
    """What base and arms (first seed) write on a few test rows, side by side."""
    columns = {"base": comparison.base_completions}
    for arm in comparison.arms.values():
        columns[arm.name] = arm.runs[min(arm.runs)]["completions"]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", *columns))
    rows = []
    for label, shown in comparison.base_completions.items():
        for index, row in enumerate(shown):
            written = [completions[label][index] for completions in columns.values() if label in completions]
            cells = "".join(f"<td>{_written(one)}</td>" for one in written)
            asked = f"{escape(label)}<br>{escape(row['prompt'])}<br><i>{escape(row['reference'])}</i>"
            rows.append(f"<tr><td>{asked}</td>{cells}</tr>")
    if not rows:
        return "<p>None: the sets are plain text.</p>"
    note = "<p>Prompt and reference, then greedy and sampled completions (temperature 1), first seed.</p>"
    return (
        f'{note}<div class="wide"><table class="texts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _written(row: Mapping[str, Any]) -> str:
    return "<br>".join(
        f'<span class="{"right" if is_right else "wrong"}">{escape(text)}</span>'
        for text, is_right in (row["greedy"], *row["samples"])
    )
