"""The section of a model card that says what the model kept of its base."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from qpsft import __version__
from qpsft.evaluate.keep import BUILT_IN_SKILLS, Kept
from qpsft.files import write_atomically
from qpsft.model.folder import CARD
from qpsft.recipe.markdown import as_text

BEGIN, END = "<!-- qpsft evaluate --keep: begin -->", "<!-- qpsft evaluate --keep: end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def update_card(folder: Path, kept: Kept) -> Path | None:
    """Writes the section into the model card of a folder: over the one that is there, else at the end.

    Nothing else in the card changes.

    Returns:
        The card; None where the folder has none.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read or written; it is then what it was.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    card = path.read_bytes().decode()
    new = section(kept)
    if _SECTION.search(card):
        card = _SECTION.sub(lambda _: new, card, count=1)
    else:
        card += f"{'' if card.endswith(chr(10)) else chr(10)}\n{new}\n"
    write_atomically(path, card)
    return path


def section(kept: Kept) -> str:
    """The section in Markdown, between its marks."""
    header, *rows = kept.cells()
    lines = [_row(map(as_text, cells)) for cells in (header, *rows)]
    lines.insert(1, _row(["---"] * len(header)))
    notes = "".join(f"\n- {as_text(note)}" for note in kept.said())
    return f"""{BEGIN}
## What it kept

{as_text(kept.sentence())}

{chr(10).join(lines)}

The same questions to this model and to {as_text(kept.base)}. LOST: the score fell by more than {kept.max_drop:g}.
KEPT: the whole 95 % interval of the paired difference is inside that. UNSURE: the rows are too few for either.
{notes}{notes and chr(10)}
Measured by `qpsft evaluate --keep`: {_versions(kept)}.
{END}"""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions(kept: Kept) -> str:
    harness = "" if set(kept.skills) <= set(BUILT_IN_SKILLS) else f", lm-evaluation-harness {version('lm-eval')}"
    return f"qpsft {__version__}{harness}"
