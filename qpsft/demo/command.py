"""`qpsft demo`: its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Train the embedded base model with PSFT on built-in noisy demonstrations, in NF4, without any download, and show "
    "what it learned and what it kept. One to two minutes on two cores."
)


@dataclass
class DemoOptions:
    """What `qpsft demo` takes."""

    output_dir: str = option("qpsft-demo", "where the adapter goes", metavar="FOLDER")
    overwrite: bool = option(False, "replace an earlier demo's adapter")


def demo(argv: Sequence[str]) -> int:
    """`qpsft demo`."""
    options = parse(Parser("qpsft demo", "[options]", DESCRIPTION), argv, DemoOptions)
    quiet_libraries()
    from qpsft.demo import walkthrough

    walkthrough.run(options.output_dir, overwrite=options.overwrite)
    return 0
