"""The batches of the reference pass: rows sorted by length, more at a time than training takes, on training's kernels.

Scoring keeps no activations, so a batch of it can hold more tokens than a micro-batch without taking more memory: the
forward of two micro-batches without gradients stays below what training keeps for one, from about 1B parameters on, and
above it by less than 64 MiB for smaller models (`qpsft plan` for seven bases; tests/test_plan_verdicts.py holds some of
them). Sorted by length, rows need little padding. What simpler ways cost is in benchmarks/results/scoring_groups.json.

Log-probabilities of two passes can be compared only if both ran the same kernels. `as_in_training` and `fused_limit`
see to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qpsft.model.base_record import quantized_linears

Batch = Mapping[str, Any]
ROW_KEYS = {"input_ids", "attention_mask", "labels", "position_ids", "seq_lengths"}
LEAST_TOKENS = 512
"""Fewer tokens leave the processor waiting: of short rows, more than two micro-batches are scored together."""


def token_budget(args: Any, largest: int) -> int | None:
    """Tokens, padding included, that are scored at once; None: each micro-batch as it is.

    Args:
        args: PSFTConfig. Its `score_token_budget`, if given (0 stands for None here); else twice the tokens of the
            largest micro-batch and at least `LEAST_TOKENS`; with activation offloading, where training keeps next to
            nothing on the device, those of one.
        largest: tokens of the step's largest micro-batch, padding included.
    """
    if args.score_token_budget is not None:
        return args.score_token_budget or None
    return largest if args.activation_offloading else max(LEAST_TOKENS, 2 * largest)


@contextlib.contextmanager
def as_in_training(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Scores inside see the model in training mode: another mode may choose other kernels.

    Dropout draws from a random stream of its own, `seed`. From training's, a resumed run would draw other numbers.
    """
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def row_lengths(batch: Batch) -> list[int] | None:
    """Real tokens of every row, or None when rows cannot be taken out of their batch.

    They can where it has `input_ids` and `labels`, (batch, sequence), and `attention_mask` or, for packed rows,
    `position_ids` with or without `seq_lengths`. They cannot where it has anything else (images, rows laid end to end)
    or pads on the left.
    """
    if set(batch) - ROW_KEYS or {"attention_mask", "position_ids"} <= set(batch):
        return None
    rows, width = batch["input_ids"].shape
    if "seq_lengths" in batch:
        return [sum(lengths) for lengths in batch["seq_lengths"]]
    if "position_ids" in batch:
        # a pad has position 0, and so may the last real token have: it is then a piece of one, never supervised
        inside = batch["position_ids"].cpu() != 0
        return (width - inside.flip(1).int().argmax(1)).where(inside.any(1), torch.tensor(1)).tolist()
    if "attention_mask" not in batch:
        return [width] * rows
    mask = batch["attention_mask"].cpu().bool()
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(width) < lengths.unsqueeze(1)):
        return None
    return lengths.clamp(min=1).tolist()


def real_tokens(batch: Batch) -> Tensor:
    """Number of tokens of a batch that are no padding, a scalar on its device."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    if "seq_lengths" in batch:
        return torch.tensor(sum(map(sum, batch["seq_lengths"])), device=batch["input_ids"].device)
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None or positions.shape != ids.shape:
        return torch.tensor(ids.numel(), device=ids.device)
    # as in `row_lengths`, without bringing them to the host
    last = torch.arange(1, ids.shape[1] + 1, device=ids.device) * (positions != 0)
    return last.amax(1).clamp(min=1).sum()


class Row(NamedTuple):
    """A row of one of several batches."""

    length: int
    batch: int
    row: int


def groups(rows: Iterable[Row], token_budget: int, least: int = 1) -> Iterator[list[Row]]:
    """Rows to be run together, sorted by length.

    Args:
        rows: of several micro-batches.
        token_budget: most tokens of a group, padding included; one row at least.
        least: fewest tokens of a group. Where the rows have fewer, the last one is repeated.

    Yields: rows in ascending length.
    """
    group: list[Row] = []
    for row in sorted(rows):  # the newest row is the longest: it sets the padded width
        if group and row.length * (len(group) + 1) > max(token_budget, least):
            yield _filled(group, least)
            group = []
        group.append(row)
    if group:
        yield _filled(group, least)


def _filled(group: list[Row], least: int) -> list[Row]:
    missing = max(0, -(-least // group[-1].length) - len(group))
    return group + [group[-1]] * missing


def gather(batches: Sequence[Batch], group: Sequence[Row]) -> dict[str, Any]:
    """The rows of a group as one batch, padded on the right to the longest, with the keys their batches have."""
    width = max(row.length for row in group)
    first = batches[group[0].batch]
    keys = ["input_ids", "labels", *({"position_ids"} & set(first))]
    gathered = {key: first[key].new_full((len(group), width), -100 if key == "labels" else 0) for key in keys}
    for i, (length, b, r) in enumerate(group):
        for key, rows in gathered.items():
            rows[i, :length] = batches[b][key][r, :length]
    if "seq_lengths" in first:
        gathered["seq_lengths"] = tuple(batches[b]["seq_lengths"][r] for _, b, r in group)
    if "position_ids" not in gathered:
        lengths = torch.tensor([row.length for row in group], device=first["input_ids"].device)
        gathered["attention_mask"] = (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)).long()
    return gathered


class Pass(NamedTuple):
    """One forward of scoring.

    Attributes:
        batch: as the model takes it.
        right_padded: every pad of the batch stands right of its row's real tokens.
        rows: where the rows of `batch` come from, in order. A row may come twice, to fill the batch.
    """

    batch: Batch
    right_padded: bool
    rows: list[Row]


def passes(
    batches: Sequence[Batch], *, token_budget: int | None, fused_limit: int = 0, sharded: bool = False
) -> Iterator[Pass]:
    """The forwards that score all rows of some batches: sorted by length, in groups of at most `token_budget` tokens.

    Args:
        batches: each with `input_ids`, `labels` (-100: not supervised) and `attention_mask` or, for packed rows,
            `position_ids`, all (batch, sequence). Run as they are: batches with anything else in them (images, rows
            end to end), with padding on the left or so small that the GPU has another kernel for them, and all
            batches of a sharded model, whose processes must make equally many forwards.
        token_budget: padding included; one row at least. None: each batch is run as it is.
        fused_limit: see `fused_limit`.
    """
    grouped: list[Row] = []
    for b, batch in enumerate(batches):
        lengths = row_lengths(batch)
        few_tokens = batch["input_ids"].numel() <= fused_limit
        if token_budget is None or sharded or lengths is None or few_tokens:
            rows, width = batch["input_ids"].shape
            yield Pass(batch, lengths is not None, [Row(width, b, r) for r in range(rows)])
        else:
            grouped += [Row(length, b, r) for r, length in enumerate(lengths)]
    for group in groups(grouped, token_budget or 0, least=fused_limit + 1):
        yield Pass(gather(batches, group), True, group)


MAX_FUSED_TOKENS = 1536


def fused_limit(model: nn.Module) -> int:
    """The most tokens of a batch that some 4-bit layer multiplies in bitsandbytes' fused kernel; 0 where none does.

    On CUDA, `bitsandbytes.backends.cuda.ops` (0.50) multiplies by a 4-bit weight (N, K) in one of two ways, chosen by
    the number of tokens M of the batch, the card, N and K: few tokens in one fused kernel, many by dequantizing the
    weight and calling cuBLAS. The two add up in another order, and round differently. Its own heuristic gives, as the
    largest M of the fused kernel over the linear layers of Llama-3.1-8B and Qwen2.5-0.5B:

    | card | T4 | RTX 3060 | RTX 4060 | RTX 4090 | A100 | RTX 5090 |
    | --- | --- | --- | --- | --- | --- | --- |
    | M | 128 | 128 | 256 | 128 | 128 | 64 |

    and never more than 1,536 (small layers on an A100). On the CPU there is one way (dequantize, then `F.linear`). So
    micro-batches up to the limit are scored as they are trained, and the rows of larger ones in groups above it.
    """
    shapes = set()
    for module in quantized_linears(model).values():
        weight = module.weight
        state = getattr(weight, "quant_state", None)
        if weight.device.type == "cuda" and state is not None:
            dtype = getattr(module, "compute_dtype", None) or state.dtype
            shapes.add((weight.device.index or 0, dtype, *state.shape))
    if not shapes:
        return 0
    from bitsandbytes.backends.cuda import ops

    is_fused = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    most = getattr(ops, "_gemm_4bit_custom_max_m", MAX_FUSED_TOKENS)
    if is_fused is None:  # another version: above this none is fused in any that is known
        return most
    return max(layer_fused_limit(is_fused, most, *shape) for shape in shapes)


def layer_fused_limit(is_fused, most: int, device: int, dtype: torch.dtype, rows: int, columns: int) -> int:
    """The largest number of tokens up to `most` for which `is_fused(device, dtype, tokens, rows, columns)`; 0: none."""
    return next((tokens for tokens in range(most, 0, -1) if is_fused(device, dtype, tokens, rows, columns)), 0)
