"""`qpsft plan`: its flags beside those of the recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.flags import Parser, option, parse_known
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Plan the memory of a training run from the model's config.json alone: every part, the peak, whether it fits a "
    "card, the cheapest change that makes it fit, and the longest rows that do. Nothing is loaded or downloaded but "
    "config.json. RECIPE is a recipe file or its folder; any option of qpsft train is a flag."
)


@dataclass
class PlanOptions:
    """What `qpsft plan` takes beside a recipe's options."""

    gpu: str | None = option(
        None, "12GB, 'RTX 4090', T4, or auto: this machine's (default: auto if there is one)", metavar="CARD"
    )
    processes: int = option(1, "of DDP; the plan is one process's")
    longest_row: int | None = option(None, "tokens of the longest row, as qpsft train says them (default: max_length)")
    mean_row: float | None = option(None, "tokens of a row on average, which the choice of batch sizes goes by")
    json: bool = option(False, "print the plan as JSON, in bytes")


def plan(argv: Sequence[str]) -> int:
    """`qpsft plan`."""
    parser = Parser("qpsft plan", "[RECIPE] [options] [--any_option_of_qpsft_train value …]", DESCRIPTION)
    options, flags = parse_known(parser, argv, PlanOptions)
    quiet_libraries()
    import torch

    from qpsft.plan.batch_sizes import RowLengths
    from qpsft.plan.cards import find_card
    from qpsft.plan.memory_plan import make_plan
    from qpsft.plan.planned_config import PlannedConfig
    from qpsft.recipe.file import load_recipe

    path = flags.pop(0) if flags and not flags[0].startswith("-") else None
    recipe = load_recipe(path, flags, PlannedConfig)
    gpu = "auto" if options.gpu is None and torch.cuda.is_available() else options.gpu
    longest = options.longest_row or recipe.trainer.max_length
    rows = RowLengths(longest, options.mean_row) if options.longest_row or options.mean_row else None
    card = None if gpu is None else find_card(gpu)
    planned = make_plan(recipe, card=card, processes=options.processes, rows=rows)
    print(json.dumps(planned.to_dict(), indent=1) if options.json else planned)
    return 0
