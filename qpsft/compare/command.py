"""`qpsft compare`: its flags beside those of the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from qpsft.compare.options import CompareOptions, load_comparison
from qpsft.errors import RecipeError
from qpsft.recipe.flags import Parser, add_flags, option_types, split_flags
from qpsft.terminal import quiet_libraries, terminal_width

DESCRIPTION = (
    "Train the same base on the same rows by several methods, with the same number of optimizer steps, and say which "
    "to take: what each learns in-domain and keeps out of domain, with intervals over seeds. Writes report.html, "
    "comparison.json and figures to output_dir. Finished runs are kept and reused. RECIPE is a recipe file or its "
    "folder; any option of qpsft train is a flag."
)


def compare(argv: Sequence[str]) -> int:
    """`qpsft compare`."""
    parser = Parser("qpsft compare", "RECIPE [options] [--any_option_of_qpsft_train value …]", DESCRIPTION)
    add_flags(parser, CompareOptions)
    given, rest = split_flags(parser, argv, option_types([CompareOptions]))
    if not rest or rest[0].startswith("-"):
        raise RecipeError("qpsft compare needs a recipe.", "Write it first: qpsft compare RECIPE --seeds 3")
    quiet_libraries()
    from qpsft.compare.comparison import compare_loaded
    from qpsft.compare.verdict import render

    recipe, options = load_comparison(rest[0], rest[1:], given)
    comparison = compare_loaded(recipe, options)
    print(f"\n{render(comparison, terminal_width())}\n\nreport: {recipe.trainer.output_dir}/report.html")
    return 0
