"""How a run ended, and what usually comes next."""

from __future__ import annotations

import platform
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qpsft.psft.checkpoint import checkpoints
from qpsft.recipe.file import Recipe
from qpsft.terminal import wrap


@dataclass
class RunSummary:
    """How a run ended.

    Attributes:
        folder: the adapter folder.
        numbers: the last log line of the adapter that is written: nll and entropy (nats per token), clip_fraction,
            tokens_per_second, ….
        steps: optimizer steps trained.
        written: the step of the adapter that is written: the last, the best, or the guard's.
        seconds: wall time of training.
        peak_bytes: the most memory in use: on the CUDA device if there is one, else the process's.
        files: names of what was written.
        data: what training did not take as it stands in the source, as in `DataCounts.facts`.
        notes: what the guard and the evaluations found and did.
    """

    folder: Path
    numbers: dict[str, float]
    steps: int
    written: int
    seconds: float
    peak_bytes: int
    files: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        n = self.numbers
        where = "GPU" if torch.cuda.is_available() else "process"
        return (
            f"trained {self.steps} steps in {self.seconds:.0f} s\n"
            f"  nll            {n['nll']:.4f} nats per token ({self._which_line()})\n"
            f"  entropy        {n['entropy']:.4f} nats per token\n"
            f"  clip fraction  {n['clip_fraction']:.1%}\n"
            f"  tokens/s       {n['tokens_per_second']:,.0f}\n"
            f"  peak memory    {self.peak_bytes / 1e9:.2f} GB ({where})\n"
            + "".join(f"{wrap(note)}\n" for note in self.notes)
            + f"adapter: {self.folder}\n"
            + textwrap.fill(", ".join(self.files), 80, initial_indent="  ", subsequent_indent="  ")
        )

    def _which_line(self) -> str:
        return "last log line" if self.written == self.steps else f"log line of step {self.numbers['step']}"

    def next_commands(self, recipe: Recipe) -> str:
        """The commands that usually come next."""
        lines = ["next:", f"  qpsft merge {self.folder}"]
        lines.append(f"  qpsft evaluate {self.folder} --keep   (what it lost of its base's skills)")
        if checkpoints(self.folder) and self.written == self.steps:  # else the run would end there again
            longer = "--max_steps" if recipe.trainer.max_steps > 0 else "--num_train_epochs"
            lines.append(f"  qpsft train {self.folder} --resume {longer} N   (to train longer)")
        return "\n".join(lines)


def forget_earlier_peak() -> None:
    """Another run in this process, a comparison's for instance, does not count in this one's `peak_bytes`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The most memory in use so far: torch's on the GPU if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
