"""report.html: a comparison on one self-contained page that opens from disk, with its figures as PNG beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from qpsft.compare.answer import answer, answer_rows
from qpsft.compare.figures import as_svg, figures
from qpsft.compare.results import Comparison
from qpsft.compare.tables import difference_rows, set_rows, table_rows, tuning_rows
from qpsft.compare.verdict import METHOD, limits, overlap_lines, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
PNG_DPI = 120


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes `report.html` and one PNG per figure into `folder`."""
    drawn = figures(comparison)
    for name, (_, figure) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=PNG_DPI)
    (folder / REPORT).write_text(report_page(comparison, drawn), encoding="utf-8")


def page_templates() -> jinja2.Environment:
    """The templates beside this file: `page.html.jinja`, which a page extends, and macros for its parts."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    templates.filters["svg"] = lambda figure: Markup(as_svg(figure))
    templates.filters["code"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    return templates


def report_page(comparison: Comparison, drawn: Mapping[str, tuple[str, Figure]]) -> str:
    """The page as text."""
    return (
        page_templates()
        .get_template("report.html.jinja")
        .render(
            title=f"qpsft compare: {comparison.name}",
            comparison=comparison,
            seeds=max(len(arm.runs) for arm in comparison.arms.values()),
            epochs=max(run["points"][-1]["epoch"] for arm in comparison.arms.values() for run in arm.runs.values()),
            answer=answer(comparison),
            answer_rows=answer_rows(comparison),
            limits=limits(comparison),
            verdict=verdict(comparison),
            results=table_rows(comparison),
            differences=difference_rows(comparison),
            method=METHOD,
            figures=drawn,
            sets=set_rows(comparison),
            tuning=tuning_rows(comparison, "validation score"),
            completions=_completions(comparison),
            rows=[["set", "rows"], *comparison.counts.items()],
            overlap=overlap_lines(comparison),
            settings=json.dumps(comparison.settings, indent=1, ensure_ascii=False),
        )
    )


def _completions(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """(set, what base and arms (first seed) wrote on one of its rows), for a few rows."""
    of_arms = [arm.runs[min(arm.runs)]["completions"] for arm in comparison.arms.values()]
    return [
        (name, [row, *(completions[name][index] for completions in of_arms if name in completions)])
        for name, shown in comparison.base_completions.items()
        for index, row in enumerate(shown)
    ]
