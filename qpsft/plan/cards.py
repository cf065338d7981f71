"""Graphics cards: how much memory, and which kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qpsft.errors import RecipeError

GIB = 2**30
USABLE = 0.98
"""Of a card's nominal memory; the driver keeps the rest. An RTX 3060 of 12 GiB shows 11.76, a T4 of 15 shows 14.7."""

CONTEXT = 500 * 2**20
"""Allowance for the CUDA context with its libraries, which torch's own count does not show."""

# Name without spaces: (GiB, compute capability). None: sold with several sizes. Some server cards show less than
# their name says, because of ECC.
_CARDS: dict[str, tuple[float | None, tuple[int, int]]] = {
    "gtx1070": (8, (6, 1)), "gtx1080": (8, (6, 1)), "gtx1080ti": (11, (6, 1)), "gtx1660": (6, (7, 5)),
    "rtx2060": (None, (7, 5)), "rtx2070": (8, (7, 5)), "rtx2080": (8, (7, 5)), "rtx2080ti": (11, (7, 5)),
    "rtx3060": (None, (8, 6)), "rtx3060ti": (8, (8, 6)), "rtx3070": (8, (8, 6)), "rtx3070ti": (8, (8, 6)),
    "rtx3080": (None, (8, 6)), "rtx3080ti": (12, (8, 6)), "rtx3090": (24, (8, 6)), "rtx3090ti": (24, (8, 6)),
    "rtx4060": (8, (8, 9)), "rtx4060ti": (None, (8, 9)), "rtx4070": (12, (8, 9)), "rtx4070super": (12, (8, 9)),
    "rtx4070ti": (12, (8, 9)), "rtx4070tisuper": (16, (8, 9)), "rtx4080": (16, (8, 9)),
    "rtx4080super": (16, (8, 9)), "rtx4090": (24, (8, 9)), "rtx5060": (8, (12, 0)), "rtx5060ti": (None, (12, 0)),
    "rtx5070": (12, (12, 0)), "rtx5070ti": (16, (12, 0)), "rtx5080": (16, (12, 0)), "rtx5090": (32, (12, 0)),
    "t4": (15, (7, 5)), "p100": (16, (6, 0)), "v100": (None, (7, 0)), "l4": (22.5, (8, 9)), "a10": (22.5, (8, 6)),
    "a10g": (22.5, (8, 6)), "a100": (None, (8, 0)), "l40s": (45, (8, 9)), "h100": (80, (9, 0)),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A CUDA device, or a ROCm one, which torch calls "cuda" too.

    Attributes:
        name: for people.
        nbytes: memory that can be used, other processes' left out.
        capability: CUDA's (major, minor), (8, 0) if not known; ROCm's architecture name such as "gfx90a".
    """

    name: str
    nbytes: int
    capability: tuple[int, int] | str = (8, 0)


def find_card(text: str) -> Card:
    """A card from `auto` (the machine's), a size (`12GB`), a name (`RTX 4090`, `T4`), or both (`RTX 3060 12GB`).

    Sizes are in GiB, as cards are sold, and `USABLE` of them counts.

    Raises:
        RecipeError: the text cannot be read, the card is not known or sold with several sizes, or there is none here.
    """
    if text.strip().lower() == "auto":
        return this_card()
    match = re.fullmatch(
        r"\s*(?P<name>.*?)\s*(?:(?<![\w.])(?P<size>-?\d+(?:\.\d+)?)\s*(?P<unit>gib|gb|g|mib|mb))?\s*", text.lower()
    )
    if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", text):
        return _sized(text, float(text), "gb")
    name, size, unit = match["name"], match["size"], match["unit"]
    if not name and size is not None:
        return _sized(text, float(size), unit)
    known = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name)
    if re.fullmatch(r"\d{4}(ti)?(super)?", known):
        known = ("gtx" if known.startswith("1") else "rtx") + known
    if known not in _CARDS:
        raise RecipeError(f"--gpu {text!r} is not known.", "Give its memory, such as 12GB, or auto for this machine's.")
    nominal, capability = _CARDS[known]
    if size is not None:
        return Card(text.strip(), _sized(text, float(size), unit).nbytes, capability)
    if nominal is None:
        raise RecipeError(
            f"--gpu {text!r} is sold with several sizes.", f"Add its memory, such as '{text.strip()} 12GB'."
        )
    return Card(text.strip(), int(nominal * GIB * USABLE), capability)


def _sized(text: str, size: float, unit: str) -> Card:
    gib = size / 1024 if unit.startswith("m") else size
    if not 0 < gib <= 4096:
        raise RecipeError(f"--gpu {text!r} is {gib:g} GB; no card has that.", "Give its memory in GB, such as 12GB.")
    return Card(f"{gib:g} GB", int(gib * GIB * USABLE))


def this_card() -> Card:
    """The CUDA or ROCm device of this process. Raises RecipeError when there is none."""
    if not torch.cuda.is_available():
        raise RecipeError(
            f"--gpu auto: torch {torch.__version__} sees no CUDA device here.", "Give its memory, such as --gpu 12GB."
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    own = CONTEXT + torch.cuda.memory_reserved()
    others = max(0, total - free - own)
    # ROCm's major and minor, (10, 3) of a gfx1030, would read like a newer card of CUDA's
    capability = properties.gcnArchName if torch.version.hip else (properties.major, properties.minor)
    return Card(properties.name, total - others, capability)


def gib(nbytes: float) -> str:
    """1610612736 as 1.50, and less than a tenth with one more digit."""
    size = nbytes / GIB
    return f"{size:.3f}" if 0 < size < 0.1 else f"{size:.2f}"
