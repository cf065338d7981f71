"""Another reference: each row's own last visit, recorded from the training forward itself.

The policy of a row's last visit is π_old for that row: no snapshot, no second set of parameters, no extra forward. A
row seen for the first time has no last visit, so its ratio is 1 and its gradient SFT's: the first epoch is the warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LastVisit:
    """The log-probabilities of every row at its last visit, in host memory: 4 bytes per token of the data set.

    Rows are padded on the right, as SFTTrainer's collator does.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def attach(self, batches: Sequence[dict[str, Tensor]], rows: Sequence[int]) -> None:
        """Gives each micro-batch its `old_logprobs` (batch, sequence - 1), `seen` (batch,) and `row_numbers`.

        Args:
            batches: the step's micro-batches.
            rows: the data set's row numbers, in the order of the micro-batches.
        """
        start = 0
        for batch in batches:
            numbers = list(rows[start : start + len(batch["labels"])])
            start += len(numbers)
            old = torch.zeros(len(numbers), batch["labels"].shape[1] - 1)
            for i, number in enumerate(numbers):
                if number in self.rows:
                    kept = self.rows[number][: old.shape[1]]  # padded as its batch was, which may have been wider
                    old[i, : len(kept)] = kept
            device = batch["labels"].device
            batch["old_logprobs"] = old.to(device)
            batch["seen"] = torch.tensor([number in self.rows for number in numbers], device=device)
            batch["row_numbers"] = numbers

    def visit(self, logprobs: Tensor, old_logprobs: Tensor, seen: Tensor, rows: Sequence[int]) -> Tensor:
        """Records a micro-batch's log-probabilities and returns the old ones: its own where a row is new.

        Args:
            logprobs: (batch, sequence - 1) float32, under the policy, no gradient.
            old_logprobs, seen, rows: as `attach` gave them.
        """
        old = torch.where(seen.unsqueeze(1), old_logprobs, logprobs)
        for number, row in zip(rows, logprobs.cpu(), strict=True):
            self.rows[number] = row.clone()
        return old

    def state_dict(self) -> dict[int, list[Tensor]]:
        """Row number -> [log-probabilities], for `resume.save_psft_state`."""
        return {number: [row] for number, row in self.rows.items()}

    def load_state_dict(self, state: dict[int, list[Tensor]]) -> None:
        """Restores `state_dict()`."""
        self.rows = {number: row for number, (row,) in state.items()}
