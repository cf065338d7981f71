"""`qpsft demo`: its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Train the embedded base model on built-in noisy demonstrations, in NF4, without any download: by plain SFT and by "
    "SFT that is held near the base. Show what each learnt and what it kept, as bars and in demo.png. Two to three "
    "minutes on two cores."
)


@dataclass
class DemoOptions:
    """What `qpsft demo` takes."""

    output_dir: str = option(
        "qpsft-demo", "where the adapter that keeps more goes; plain SFT's goes to FOLDER-sft", metavar="FOLDER"
    )
    overwrite: bool = option(False, "replace an earlier demo's folders")


def demo(argv: Sequence[str]) -> int:
    """`qpsft demo`."""
    options = parse(Parser("qpsft demo", "[options]", DESCRIPTION), argv, DemoOptions)
    quiet_libraries()
    from qpsft.demo import walkthrough

    walkthrough.run(options.output_dir, overwrite=options.overwrite)
    return 0
