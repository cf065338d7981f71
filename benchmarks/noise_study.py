"""When is PSFT worth it? The same comparison at several shares of wrong demonstrations, and the gain against them.

    python benchmarks/noise_study.py adapters/demo-noisy --noise 0,0.1,0.3,0.5 --tune --jobs 2

Takes a recipe on the built-in demonstrations, and every option of `qpsft compare` and of the recipe. Finished runs are
kept, as `qpsft compare` keeps them, so that the command may be killed and repeated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qpsft.compare.arms import find_arms
from qpsft.compare.options import CompareOptions, load_comparison
from qpsft.compare.paired import Difference, mean_and_sd
from qpsft.compare.results import Comparison, describe_metric, format_mean, format_value, is_accuracy, score_name
from qpsft.errors import OutputError, QpsftError, RecipeError
from qpsft.files import write_atomically
from qpsft.recipe.file import Recipe
from qpsft.recipe.flags import Parser, add_flags, option, option_types, parse_known, split_flags
from qpsft.terminal import fill, quiet_libraries, terminal_width, text_table

CONTROL = "sft"
ARMS = ("sft", "psft_visits")
SCORES = ("in_domain", "out_of_domain")
PAGE = """
{% extends "page.html.jinja" %}
{% from "macros.html.jinja" import table, bullets, picture %}
{% block body %}
<h1>{{ study.name }}: the gain against the noise</h1>
{% for treatment, figure in figures.items() %}
<h2>{{ treatment }} − {{ control }}</h2>
{{ picture("Mean over seeds.", figure) }}
{{ table(study.rows(treatment)) }}
{% endfor %}
{% for share, lines in verdicts.items() %}
<h2>{{ "%.0f" % (100 * share) }}% wrong demonstrations</h2>
{{ bullets(lines) }}
<p><a href="noise-{{ "%g" % share }}/{{ report }}">its own report</a></p>
{% endfor %}
<p>{{ method }}</p>
{% endblock %}
"""


@dataclass
class NoiseOptions:
    """What the study takes beside the options of `qpsft compare`."""

    noise: list[float] = option([0.0, 0.1, 0.3, 0.5], "shares of demonstrations with a wrong step, from 0 to 1")

    def __post_init__(self) -> None:
        if not self.noise or any(not 0 <= share <= 1 for share in self.noise):
            raise RecipeError(f"--noise is {self.noise}; shares are from 0 to 1.", "Such as --noise 0,0.1,0.3.")


@dataclass
class NoiseStudy:
    """Comparisons by their share of wrong demonstrations, ascending.

    Attributes:
        name: the built-in set.
        comparisons: share -> comparison of `CONTROL` with the same other arms.
    """

    name: str
    comparisons: dict[float, Comparison]

    @property
    def treatments(self) -> list[str]:
        """The arms compared with the control."""
        return [name for name in next(iter(self.comparisons.values())).arms if name != CONTROL]

    @property
    def metric(self) -> str:
        """What is compared, as in `Comparison`."""
        return next(iter(self.comparisons.values())).metric

    @property
    def score(self) -> str:
        """The in-domain score in a word."""
        return score_name("in_domain", self.metric)

    def gains(self, treatment: str) -> dict[str, list[Difference | None]]:
        """Out of domain at each share: treatment − control of an accuracy, control − treatment of an NLL.

        Returns:
            At equal in-domain score, and at the last epoch.
        """
        matched = [comparison.matched(treatment, CONTROL) for comparison in self.comparisons.values()]
        last = [
            (comparison.difference(treatment, CONTROL, "out_of_domain"), comparison.sign("out_of_domain"))
            for comparison in self.comparisons.values()
        ]
        return {
            f"at equal in-domain {self.score}": [None if pair is None else pair[1] for pair in matched],
            "at the last epoch": [difference and difference.signed(sign) for difference, sign in last],
        }

    def rows(self, treatment: str) -> list[list[str]]:
        """A table: a header, and one row per share."""
        rows = [["wrong rows", *(f"{arm} {name.replace('_', ' ')}" for name in SCORES for arm in (CONTROL, treatment))]]
        gains = self.gains(treatment)
        rows[0] += [f"gain {where}" for where in gains]
        for index, (share, comparison) in enumerate(self.comparisons.items()):
            units = {name: describe_metric(name, comparison.metric).unit for name in SCORES}
            cells = [
                format_mean(comparison.arms[arm].last(name), units[name])
                for name in SCORES
                for arm in (CONTROL, treatment)
            ]
            rows.append(
                [f"{share:.0%}", *cells, *(_gain(values[index], units["out_of_domain"]) for values in gains.values())]
            )
        return rows

    def figures(self) -> dict[str, Any]:
        """Treatment -> figure of its gain."""
        titles = {name: describe_metric(name, self.metric).title for name in SCORES}
        unit = "share" if is_accuracy("out_of_domain", self.metric) else "nats per token"
        drawn = {}
        for treatment in self.treatments:
            scores = {
                title: {
                    arm: [mean_and_sd(list(one.arms[arm].last(name).values())) for one in self.comparisons.values()]
                    for arm in (CONTROL, treatment)
                }
                for name, title in titles.items()
            }
            gains = self.gains(treatment)
            drawn[treatment] = draw_gains(list(self.comparisons), gains, f"{treatment} − {CONTROL}, {unit}", scores)
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """Shares, scores and gains, for JSON; the comparisons themselves have files of their own."""
        return {
            "name": self.name,
            "noise": list(self.comparisons),
            "learning_rates": [{n: arm.learning_rate for n, arm in c.arms.items()} for c in self.comparisons.values()],
            "gains": {
                treatment: {
                    where: [difference and asdict(difference) for difference in values]
                    for where, values in self.gains(treatment).items()
                }
                for treatment in self.treatments
            },
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None) -> str:
        """The tables as text, at most so many columns wide."""
        return "\n\n".join(text_table(self.rows(treatment), width) for treatment in self.treatments)


def _gain(difference: Difference | None, unit: str) -> str:
    if difference is None:
        return "–"
    mean = f"{'−' if difference.mean < 0 else '+'}{format_value(abs(difference.mean), unit)}"
    return mean if difference.half_width is None else f"{mean} ± {format_value(difference.half_width, unit)}"


def study_noise(recipe: Recipe, options: CompareOptions, noise: Sequence[float]) -> NoiseStudy:
    """Compares at each share of wrong rows, and writes `noise.json`, `report.html` and figures to `output_dir`.

    Each comparison has a folder and a report of its own; the runs of all are kept together.

    Args:
        noise: the shares, from 0 to 1.

    Raises:
        RecipeError: the demonstrations are not built in, or `sft` or an arm to compare with it is missing.
    """
    from qpsft.compare import comparison  # imports inside, so that --help does not wait for torch

    arms = [arm.name for arm in find_arms(options.arms or ARMS)]
    if CONTROL not in arms or len(arms) < 2:
        raise RecipeError(f"The noise study compares with {CONTROL}.", f"Give --arms {','.join(ARMS)}.")
    folder = comparison.prepare(recipe)
    results = options.results_dir or str(folder / "results")
    comparisons = {}
    for share in sorted(set(noise)):
        print(f"{share:.0%} wrong demonstrations", flush=True)
        one = replace(options, arms=arms, results_dir=results)
        comparisons[share] = comparison.compare_loaded(recipe, one, noise=share, folder=folder / f"noise-{share:g}")
    study = NoiseStudy(recipe.data.dataset_name, comparisons)
    write_study(study, folder)
    return study


def write_study(study: NoiseStudy, folder: Path) -> None:
    """Writes the study's record, page and figures. Raises OutputError if they cannot be written."""
    try:
        _write_study(study, folder)
    except OSError as error:
        raise OutputError(
            f"The study could not be written to {folder}: {error.strerror}.",
            "Run the same command again when it can be: all runs are kept.",
        ) from error


def _write_study(study: NoiseStudy, folder: Path) -> None:
    from qpsft.compare.report import PNG_DPI, REPORT, page_templates
    from qpsft.compare.verdict import METHOD, limits, verdict

    write_atomically(folder / "noise.json", json.dumps(study.to_dict(), indent=1) + "\n")
    figures = study.figures()
    for treatment, figure in figures.items():
        name = "noise.png" if len(figures) == 1 else f"noise-{treatment}.png"
        figure.savefig(folder / name, dpi=PNG_DPI)
    page = page_templates().from_string(PAGE).render(
        title=f"noise study: {study.name}", study=study, figures=figures, control=CONTROL, report=REPORT,
        verdicts={share: verdict(one) + limits(one) for share, one in study.comparisons.items()}, method=METHOD,
    )  # fmt: skip
    (folder / REPORT).write_text(page, encoding="utf-8")


def draw_gains(
    noise: Sequence[float], gains: Mapping[str, Sequence[Difference | None]], unit: str, scores: Mapping[str, Any]
) -> Any:
    """A figure of the gain against the noise, and of the scores it comes from.

    Args:
        noise: shares of wrong demonstrations, ascending.
        gains: what is compared -> its difference at each noise.
        unit: of the differences, for the axis.
        scores: title -> arm -> (mean, sd) at each noise.
    """
    from matplotlib.figure import Figure

    from qpsft.compare.figures import STYLES

    figure = Figure(figsize=(4.6 * (1 + len(scores)), 3.8), layout="constrained")
    panels = figure.subplots(1, 1 + len(scores))
    for (label, values), fmt in zip(gains.items(), ("k-o", "r--s", "b:^"), strict=False):
        known = [(x, gain) for x, gain in zip(noise, values, strict=True) if gain is not None]
        panels[0].errorbar(
            [x for x, _ in known],
            [gain.mean for _, gain in known],
            yerr=[gain.half_width or 0.0 for _, gain in known],
            fmt=fmt,
            label=label,
            capsize=3,
        )
    panels[0].axhline(0.0, color="0.45", linestyle=":")
    panels[0].set_title("Gain out of domain, 95 % intervals", fontsize=10)
    panels[0].set_ylabel(unit)
    for axes, (title, arms) in zip(panels[1:], scores.items(), strict=True):
        for arm, values in arms.items():
            means, sds = zip(*values, strict=True)
            axes.errorbar(noise, means, yerr=[sd or 0.0 for sd in sds], label=arm, capsize=2, **STYLES[arm])
        axes.set_title(title, fontsize=10)
    for axes in panels:
        axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("share of wrong demonstrations")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a mistake the user can mend."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except QpsftError as error:
        print(fill(f"error: {error}"), file=sys.stderr)
        return error.exit_code


def _run(argv: Sequence[str]) -> int:
    usage = "RECIPE [--noise SHARES] [--any_option_of_qpsft_compare_or_train value …]"
    parser = Parser("python benchmarks/noise_study.py", usage, __doc__.partition("\n")[0])
    study_options, rest = parse_known(parser, argv, NoiseOptions)
    compare_parser = Parser(parser.prog, usage, "", add_help=False)
    add_flags(compare_parser, CompareOptions)
    given, rest = split_flags(compare_parser, rest, option_types([CompareOptions]))
    if not rest or rest[0].startswith("-"):
        raise RecipeError("The noise study needs a recipe on the built-in demonstrations.", "Try adapters/demo-noisy.")
    quiet_libraries()
    recipe, options = load_comparison(rest[0], rest[1:], given)
    study = study_noise(recipe, options, study_options.noise)
    print(f"\n{study.render(terminal_width())}\n\nreport: {recipe.trainer.output_dir}/report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
