"""When is PSFT worth it? The same comparison at several shares of wrong demonstrations, and the gain against them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qpsft.compare.arms import NOISE_ARMS, find_arms
from qpsft.compare.comparison import compare_loaded, prepare
from qpsft.compare.figures import draw_gains
from qpsft.compare.options import CompareOptions
from qpsft.compare.paired import Difference, mean_and_sd
from qpsft.compare.report import PNG_DPI, REPORT, bullets, page, picture, table
from qpsft.compare.results import Comparison, describe_metric, folded, format_mean, format_value, is_accuracy
from qpsft.compare.verdict import METHOD, verdict
from qpsft.errors import OutputError, RecipeError
from qpsft.files import write_atomically
from qpsft.recipe.file import Recipe

CONTROL = "sft"
SCORES = ("in_domain", "out_of_domain")


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
        return "accuracy" if is_accuracy("in_domain", self.metric) else "NLL"

    def gains(self, treatment: str) -> dict[str, list[Difference | None]]:
        """Out of domain at each share: treatment − control of an accuracy, control − treatment of an NLL.

        Returns:
            At equal in-domain score, and at the last epoch.
        """
        matched = [found.matched(treatment, CONTROL) for found in self.comparisons.values()]
        last = [
            (found.difference(treatment, CONTROL, "out_of_domain"), found.sign("out_of_domain"))
            for found in self.comparisons.values()
        ]
        return {
            f"at equal in-domain {self.score}": [None if found is None else found[1] for found in matched],
            "at the last epoch": [found and found.signed(sign) for found, sign in last],
        }

    def rows(self, treatment: str) -> list[list[str]]:
        """A table: a header, and one row per share."""
        rows = [["wrong rows", *(f"{arm} {name.replace('_', ' ')}" for name in SCORES for arm in (CONTROL, treatment))]]
        gains = self.gains(treatment)
        rows[0] += [f"gain {where}" for where in gains]
        for index, (share, found) in enumerate(self.comparisons.items()):
            units = {name: describe_metric(name, found.metric).unit for name in SCORES}
            cells = [
                format_mean(found.arms[arm].last(name), units[name]) for name in SCORES for arm in (CONTROL, treatment)
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
                    arm: [mean_and_sd(list(found.arms[arm].last(name).values())) for found in self.comparisons.values()]
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
                    where: [found and asdict(found) for found in values]
                    for where, values in self.gains(treatment).items()
                }
                for treatment in self.treatments
            },
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None) -> str:
        """The tables as text, folded to so many columns."""
        return "\n\n".join("\n".join(folded(self.rows(treatment), width)) for treatment in self.treatments)


def _gain(found: Difference | None, unit: str) -> str:
    if found is None:
        return "–"
    mean = f"{'−' if found.mean < 0 else '+'}{format_value(abs(found.mean), unit)}"
    return mean if found.half_width is None else f"{mean} ± {format_value(found.half_width, unit)}"


def study_noise(recipe: Recipe, options: CompareOptions) -> NoiseStudy:
    """Compares at each share of `options.noise`, and writes `noise.json`, `report.html` and figures to `output_dir`.

    Each comparison has a folder and a report of its own; the runs of all are kept together.

    Raises:
        RecipeError: the demonstrations are not built in, or `sft` or an arm to compare with it is missing.
    """
    arms = [arm.name for arm in find_arms(options.arms or NOISE_ARMS)]
    if CONTROL not in arms or len(arms) < 2:
        raise RecipeError(f"The noise study compares with {CONTROL}.", f"Give --arms {','.join(NOISE_ARMS)}.")
    folder = prepare(recipe)
    results = options.results_dir or str(folder / "results")
    comparisons = {}
    for share in sorted(set(options.noise)):
        print(f"{share:.0%} wrong demonstrations", flush=True)
        one = replace(options, noise=None, arms=arms, results_dir=results)
        comparisons[share] = compare_loaded(recipe, one, noise=share, folder=folder / f"noise-{share:g}")
    study = NoiseStudy(recipe.data.dataset_name, comparisons)
    write_study(study, folder)
    return study


def write_study(study: NoiseStudy, folder: Path) -> None:
    """Writes the study's record, page and figures. Raises OutputError if they cannot be written."""
    try:
        _write_study(study, folder)
    except OSError as error:
        raise OutputError(
            f"The study could not be written to {folder}: {error.strerror}.", "Mend it and repeat: the runs are kept."
        ) from error


def _write_study(study: NoiseStudy, folder: Path) -> None:
    write_atomically(folder / "noise.json", json.dumps(study.to_dict(), indent=1) + "\n")
    parts = [f"<h1>{study.name}: the gain against the noise</h1>"]
    for treatment, figure in study.figures().items():
        name = "noise.png" if len(study.treatments) == 1 else f"noise-{treatment}.png"
        figure.savefig(folder / name, dpi=PNG_DPI)
        parts += [
            f"<h2>{treatment} − {CONTROL}</h2>",
            picture("Mean over seeds.", figure),
            table(study.rows(treatment)),
        ]
    for share, found in study.comparisons.items():
        link = f'<p><a href="noise-{share:g}/{REPORT}">its own report</a></p>'
        parts += [f"<h2>{share:.0%} wrong demonstrations</h2>", bullets(verdict(found)), link]
    parts.append(f"<p>{METHOD}</p>")
    (folder / REPORT).write_text(page(f"qpsft compare --noise: {study.name}", parts), encoding="utf-8")
