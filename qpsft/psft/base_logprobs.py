"""The base's log-probabilities of all supervised tokens of a run's rows: made once, before the first step, and kept.

They lie in one file of the run's folder, `base_logprobs.safetensors`, which is mapped into memory, not read into it. A
checkpoint names the file by its SHA-256. A resumed run takes the file it names; where that is gone, the rows are scored
again, in the same groups, so that a CPU gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from qpsft.data.tokenize import row_lengths
from qpsft.errors import OutputError, TrainingError
from qpsft.files import digest, write_atomically
from qpsft.processes import from_main, is_main
from qpsft.psft.losses import BASE_LOGPROBS
from qpsft.psft.reference import BasePolicy
from qpsft.psft.scoring import Batch, as_in_training, token_budget

FILE = "base_logprobs.safetensors"
AT_ONCE = 32  # micro-batches that are collated and scored together

Collate = Callable[[list[Mapping[str, Any]]], Batch]


class BaseLogprobs:
    """What the micro-batches of a run carry as `base_logprobs`.

    Args:
        model: as in `BasePolicy`; in training it is on its device.
        args: PSFTConfig; the file lies in its `output_dir`, which all processes see.

    Attributes:
        sha256: of the file; None before the rows have been scored.
    """

    def __init__(self, model: nn.Module, args: Any):
        self.sha256: str | None = None
        self._model, self._args = model, args
        self._path = Path(args.output_dir) / FILE
        self._file: dict[str, Tensor] = {}

    def resume(self, sha256: str) -> None:
        """Takes the file if it is there and has this digest."""
        if self._path.is_file() and digest(self._path.read_bytes()) == sha256:
            self._map(sha256)

    def score(self, dataset: Sequence[Mapping[str, Any]], collate: Collate) -> None:
        """Scores all rows under the base, each process its share of them, and writes the file.

        Args:
            dataset: tokenized rows, with `input_ids`.
            collate: makes a micro-batch of rows.

        Raises:
            OutputError: the file cannot be written.
            TrainingError: the base finds no token likely enough for `stm_threshold`.
        """
        size = self._args.train_batch_size
        lengths = row_lengths(dataset)
        order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        micro_batches = [order[i : i + size] for i in range(0, len(order), size)]
        scored = dict(gather_object(self._score(dataset, collate, self._share(micro_batches))))
        self._map(from_main(lambda: self._write(scored, len(lengths))))
        highest, threshold = float(self._file["logprobs"].max()), self._args.stm_threshold
        if highest < -math.log(threshold):
            raise TrainingError(
                f"The base gives no supervised token a perplexity of stm_threshold = {threshold:g} or less; the lowest "
                f"is {math.exp(-highest):.3g}. There is nothing to train on.",
                "Raise stm_threshold, or choose another loss_type.",
            )

    def _share(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """This process's micro-batches: as many in each process, for those of a sharded model step together."""
        world, last = self._args.world_size, len(micro_batches) - 1
        numbers = range(self._args.process_index, -(-len(micro_batches) // world) * world, world)
        return [micro_batches[min(number, last)] for number in numbers]

    def _score(
        self, dataset: Sequence[Mapping[str, Any]], collate: Collate, micro_batches: list[list[int]]
    ) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        base, scored = BasePolicy(self._model), []
        hidden = None if is_main() else True  # None: no bar where nobody watches
        with tqdm(total=len(micro_batches), desc="base", unit="batch", disable=hidden, leave=False) as bar:
            for start in range(0, len(micro_batches), AT_ONCE):
                window = micro_batches[start : start + AT_ONCE]
                batches = [collate([dataset[row] for row in rows]) for rows in window]
                budget = token_budget(self._args, max(batch["input_ids"].numel() for batch in batches))
                with as_in_training(self._model, self._args.device, self._args.seed):
                    logprobs = base.logprobs(batches, token_budget=budget)
                for rows, batch, values in zip(window, batches, logprobs, strict=True):
                    for row, labels, value in zip(rows, batch["labels"][:, 1:], values, strict=True):
                        scored.append((row, (labels[labels != -100].int().cpu(), value.cpu())))
                bar.update(len(window))
        return scored

    def _write(self, scored: dict[int, tuple[Tensor, Tensor]], rows: int) -> str:
        labels, logprobs = zip(*(scored[row] for row in range(rows)), strict=True)
        ends = torch.tensor([len(part) for part in labels]).cumsum(0)
        content = save({"labels": torch.cat(labels), "logprobs": torch.cat(logprobs), "ends": ends})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content)
        except OSError as error:
            raise OutputError(
                f"{self._path} cannot be written: {error.strerror}.", "Free some space, or choose another output_dir."
            ) from error
        return digest(content)

    def _map(self, sha256: str) -> None:
        self._file, self.sha256 = load_file(self._path), sha256

    def attach(self, batches: Sequence[dict[str, Any]], rows: Sequence[Sequence[int]]) -> None:
        """Gives every micro-batch its `base_logprobs`: (batch, sequence - 1), float32, 0 where the label is -100.

        Args:
            batches: micro-batches, with `labels` (batch, sequence).
            rows: for each the numbers of its rows in the data set, in the batch's order.

        Raises:
            TrainingError: a micro-batch holds other labels than these rows: something changed the order of the data.
        """
        for batch, numbers in zip(batches, rows, strict=True):
            spans = [slice(int(self._file["ends"][n - 1]) if n else 0, int(self._file["ends"][n])) for n in numbers]
            labels = batch["labels"][:, 1:]
            mask = labels != -100
            expected = torch.cat([self._file["labels"][span] for span in spans]).to(labels)
            if not torch.equal(labels[mask], expected):
                raise TrainingError(
                    f"The rows of a micro-batch are not rows {list(numbers)} of the data set, whose log-probabilities "
                    "under the base were to be attached.",
                    "Leave the sampler and the data loader as PSFTTrainer makes them.",
                )
            logprobs = torch.cat([self._file["logprobs"][span] for span in spans]).to(labels.device)
            batch[BASE_LOGPROBS] = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
