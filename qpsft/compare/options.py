"""The options of `qpsft compare`: flags, or the mapping `compare:` of a recipe. Every other flag is the recipe's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpsft.compare.arms import DEFAULT_ARMS, find_arm
from qpsft.errors import RecipeError
from qpsft.recipe.file import Recipe, beside, load_recipe
from qpsft.recipe.flags import check_ranges, coerce, option, option_types, read_values

DEFAULT_EPOCHS = 4
NOTHING = "nothing"  # a flag's "none" is null, which is unset
RATE_FACTORS = (0.25, 0.5, 1.0, 2.0)
_DURATION = re.compile(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?")


def parse_duration(text: str) -> float:
    """Seconds of 90s, 30m, 2h or 1h30m.

    Raises:
        RecipeError: it is something else, or no time at all.
    """
    todo = "Write it as 90s, 30m, 2h or 1h30m."
    match = _DURATION.fullmatch(text.strip())
    parts = zip(match.groups(), (3600, 60, 1), strict=True) if match and any(match.groups()) else ()
    try:
        seconds = [float(part) * unit for part, unit in parts if part]
    except ValueError:  # a number with two points
        seconds = []
    if not seconds:
        raise RecipeError(f"budget is {text!r}; it must be a time.", todo)
    if sum(seconds) <= 0:
        raise RecipeError(f"budget is {text}; it must be above 0.", todo)
    return sum(seconds)


@dataclass
class CompareOptions:
    """How arms are compared."""

    arms: list[str] | None = option(
        None,
        f"Arms, separated by commas. Unset: {','.join(DEFAULT_ARMS)}; no replay without a chat template.",
    )
    seeds: int = option(5, "Runs per arm. Seed i of each arm has the same initial adapter and shuffled rows.", least=1)
    epochs: float | None = option(
        None,
        f"Epochs of every run. Unset: the recipe's num_train_epochs, or {DEFAULT_EPOCHS} if it has none.",
        above=0,
    )
    tune: bool = option(False, "Choose each arm's learning rate on the validation rows, from the same grid.")
    learning_rates: list[float] | None = option(
        None, "The grid. Unset: the recipe's learning_rate times 1/4, 1/2, 1 and 2.", above=0
    )
    tune_seeds: int = option(
        2, "Seeds the choice is made on; these runs count as runs of the chosen rate too.", least=1
    )
    arm_rates: dict | None = option(
        None,
        "Learning rates that are known already, such as {sft: 2e-3}; without --tune, others take the recipe's.",
        above=0,
    )
    in_domain: str | None = option(
        None, "Rows like the demonstrations: a file, Hub id or built-in set. Unset: a tenth of them, never trained on."
    )
    validation: str | None = option(
        None, "Other rows like them, to choose learning rates on. Unset: a tenth of the demonstrations."
    )
    out_of_domain: list[str] | None = option(
        None,
        "What the base could do before: any number of files or Hub ids; instruction_checks, prompts such as 'in "
        "exactly three bullet points', which a program checks; base_answers, the base's answers to general prompts; "
        "base_samples, text sampled from it; or nothing. Unset: the built-in world's sets for its demonstrations, else "
        "the first two of a base with a chat template, the third of another.",
    )
    eval_rows: int = option(200, "At most so many rows of the in-domain and of the validation set.", least=1)
    out_of_domain_rows: int = option(64, "At most so many rows of each out-of-domain set.", least=1)
    metric: Literal["auto", "accuracy", "nll", "mixed", "nll_accuracy"] = option(
        "auto", "What is compared: greedy accuracy by the verifier, nll, the references' negative log-likelihood, "
        "mixed: accuracy in-domain and nll out of domain, or nll_accuracy: the other way round. auto: accuracy where "
        "every answer can be checked; plain text and free answers have none."
    )  # fmt: skip
    verifier: str = option(
        "auto",
        "Whether a completion is right, as in qpsft evaluate. Out-of-domain sets whose references it cannot read get "
        "their own.",
    )
    k: int = option(8, "Completions sampled per prompt for pass@k; 0 draws no samples.", least=0)
    sample_rows: int = option(32, "Sample for so many in-domain rows.", least=1)
    temperatures: list[float] = option([1.0, 0.6], "Of the samples.", above=0)
    max_new_tokens: int = option(256, "Length cap of completions.", least=1)
    budget: str | None = option(
        None,
        "A time such as 30m or 2h: arms, seeds and rows are chosen to fit it, by a short timed probe on this machine. "
        "What is left out is said. Unset: everything asked for.",
        metavar="TIME",
    )
    jobs: int = option(1, "Runs at a time, each in a process of its own with one thread.", least=1)
    results_dir: str | None = option(
        None, "Where finished runs are kept and looked for. Unset: results/ in output_dir."
    )

    def __post_init__(self) -> None:
        for name in self.arm_rates or {}:
            find_arm(name)
        self.arm_rates = {  # YAML reads 2e-3 as a text
            name: coerce(rate, float, f"arm_rates: {name}") for name, rate in (self.arm_rates or {}).items()
        }
        check_ranges(self)
        if self.budget is not None:
            parse_duration(self.budget)
        if self.tune and self.tune_seeds > self.seeds:
            raise RecipeError(
                f"tune_seeds is {self.tune_seeds}, more than the {self.seeds} seeds.", "Lower it, or raise seeds."
            )


def load_comparison(
    path: str | Path, flags: Sequence[str], given: dict[str, Any] | None = None
) -> tuple[Recipe, CompareOptions]:
    """A recipe and the options of its comparison.

    Args:
        path: the recipe; its own `compare:` mapping is read, flags win over it.
        flags: the recipe's flags, without those of `CompareOptions`.
        given: the comparison's options from the command line or Python, as texts or values.

    Returns:
        (Recipe, CompareOptions). The recipe's `output_dir` is the comparison's: `comparison/` beside the recipe unless
        a flag says otherwise.

    Raises:
        RecipeError: as `load_recipe`; a comparison option that does not exist, is of another type, or out of range.
    """
    from qpsft.psft.config import PSFTConfig

    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not any(flag.partition("=")[0] in ("--output_dir", "--output-dir") for flag in flags):
        flags = [*flags, f"--output_dir={folder / 'comparison'}"]
    recipe = load_recipe(path, flags, PSFTConfig)
    written = recipe.run.compare or {}
    where = {name: f"{path}: compare: {name}" for name in written} | {name: f"--{name}" for name in given or {}}
    hints = option_types([CompareOptions])
    others = "`qpsft compare --help` lists the options."
    values = read_values(written | (given or {}), hints, where, others=others)
    if values.get("epochs") is None and "num_train_epochs" not in recipe.given:
        values["epochs"] = DEFAULT_EPOCHS
    options = CompareOptions(**values)
    options.in_domain = options.in_domain and beside(options.in_domain, folder)
    options.validation = options.validation and beside(options.validation, folder)
    if options.out_of_domain == [NOTHING]:
        options.out_of_domain = []
    if options.out_of_domain is not None:
        options.out_of_domain = [beside(name, folder) for name in options.out_of_domain]
    return recipe, options


def rate_grid(options: CompareOptions, recipe: Recipe) -> list[float]:
    """The learning rates to choose from, ascending."""
    own = recipe.trainer.learning_rate
    return sorted(set(options.learning_rates or [float(f"{own * factor:.6g}") for factor in RATE_FACTORS]))
