"""Which rows are scored together: as many as take no more memory than training does, on training's kernels.

The reference pass runs when no activations and no gradients are alive, so it can take larger batches than training,
where the GPU is busier. How large follows from what a token costs either pass, in bytes, with hidden size h,
intermediate size i and L layers. Measured with `tests/live_bytes.py` on Llama layers with LoRA in float32 on all linear
layers, the largest sum of live tensors:

| compute dtype | training, checkpointing on | off | scoring |
| --- | --- | --- | --- |
| 16 bits | 2 hL + 51 h + 14 i | L (37 h + 10 i) | 13 h + 12 i |
| 32 bits | 4 hL + 27 h + 25 i | L (26 h + 16 i) | 18 h + 16 i |

and in both passes the tile of TRL's LM head, (tokens up to 4,096) x 32,768 logits. A row longer than the budget is run
alone and whole: its training forward has the same tensors and keeps more of them, so it has been the peak already.
(Scoring such a row in chunks of sequence would take *more*: the keys and values of all layers would have to be kept.)
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qpsft.model.base_record import quantized_linears
from qpsft.model.tiled_mlp import TILE, is_tiled

Batch = Mapping[str, Any]
ROW_KEYS = {"input_ids", "attention_mask", "labels", "position_ids", "seq_lengths"}
HEAD_TILE = (4096, 32768)  # tokens x vocabulary, trl.kernels.chunked_logprob and trl.trainer.utils
COSTS = {  # bytes per token in a layer: (of h, of i), the table above
    16: {"recomputed": (51, 14), "kept": (37, 10), "scored": (13, 12)},
    32: {"recomputed": (27, 25), "kept": (26, 16), "scored": (18, 16)},
}
MARGIN = 0.8  # by `qpsft plan`, 0.9 and 0.85 made scoring the peak of Qwen2.5-0.5B at 2 x 1,024 and 1 x 2,048 tokens
LEAST_BYTES = 64 * 2**20  # small models: less than this is not worth smaller batches


def default_token_budget(
    largest: int,
    config: Any,
    *,
    bits: int,
    checkpointing: bool,
    offloading: bool = False,
    tiled: bool = False,
    spare_bytes: int = 0,
) -> int:
    """Tokens that can be scored at once in the memory that training takes for its largest micro-batch.

    Args:
        largest: tokens of that micro-batch, padding included.
        config: the model's `PretrainedConfig`.
        bits: of the compute dtype, 16 or 32.
        checkpointing, offloading: gradient checkpointing; its activations are in host memory.
        tiled: the micro-batch's rows are so long that their MLPs run in tiles (`qpsft.model.tiled_mlp`).
        spare_bytes: what training holds besides and scoring does not: gradients.

    Returns: at least `largest`, and at least what fits into 64 MiB.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    intermediate = max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate  # one for each layer
    size, (tile_tokens, tile_vocabulary) = bits // 8, HEAD_TILE

    def layer(what: str, tokens: int, mlp_tokens: int) -> int:
        of_hidden, of_intermediate = COSTS[bits][what]
        return of_hidden * hidden * tokens + of_intermediate * intermediate * mlp_tokens

    def head(tokens: int) -> int:  # its tile, and its input three times: as it is, normed, and of supervised tokens
        return size * (min(tokens, tile_tokens) * tile_vocabulary + 3 * hidden * tokens)

    if checkpointing:
        kept = 0 if offloading else size * hidden * layers * largest
        training = kept + max(layer("recomputed", largest, TILE if tiled else largest), head(largest))
    else:
        training = (1 if offloading else layers) * layer("kept", largest, 0 if tiled else largest) + head(largest)
    limit = max(LEAST_BYTES, MARGIN * (training + spare_bytes))
    per_token = layer("scored", 1, 1)
    if max(per_token, head(1)) * tile_tokens > limit:  # beyond its tile the head takes no more
        per_token = max(per_token, head(1))
    return max(largest, int(limit / per_token))


def token_budget(args: Any, model: nn.Module, batches: Sequence[Batch], spare_bytes: int) -> int | None:
    """`args.score_token_budget` (None for 0: no regrouping), or what training on these micro-batches leaves room for.

    Args:
        args: PSFTConfig.
        spare_bytes: as in `default_token_budget`.
    """
    if args.score_token_budget is not None:
        return args.score_token_budget or None
    return default_token_budget(
        max(batch["input_ids"].numel() for batch in batches),
        model.config,
        bits=16 if model.get_input_embeddings().weight.element_size() == 2 else 32,
        checkpointing=args.gradient_checkpointing,
        offloading=args.activation_offloading,
        tiled=args.tiled_mlp and is_tiled(max(batch["input_ids"].shape[1] for batch in batches)),
        spare_bytes=spare_bytes,
    )


@contextlib.contextmanager
def as_in_training(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Scores inside see the model in training's mode: another may choose other kernels.

    Dropout draws from a stream of its own, `seed`: from training's, a resumed run would differ.
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

    That takes `input_ids` and `labels`, (batch, sequence), and `attention_mask` or, for packed rows, `position_ids`
    with or without `seq_lengths`; anything else (images, rows laid end to end) belongs to the batch, and so does
    padding on the left.
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


class Row(NamedTuple):
    """A row of one of several batches."""

    length: int
    batch: int
    row: int


def groups(
    batches: Sequence[Batch], lengths: Sequence[list[int]], token_budget: int, limits: list[int]
) -> Iterator[list[Row]]:
    """Rows of several batches to be run together, sorted by length.

    Args:
        batches: the micro-batches as they are trained on.
        lengths: `row_lengths` of each.
        token_budget: padded tokens of a group; one row at least.
        limits: of `fused_limits`: a row stays among as many tokens as its micro-batch's kernels take. Where too few
            are left for that, the last row is repeated.

    Yields: rows in ascending length; a repeated row stands several times.
    """
    by_kernels: dict[tuple[int, int | None], list[Row]] = {}
    for b, (batch, of_batch) in enumerate(zip(batches, lengths, strict=True)):
        bounds = same_kernels(batch["input_ids"].numel(), limits)
        by_kernels.setdefault(bounds, []).extend(Row(length, b, r) for r, length in enumerate(of_batch))
    for (least, most), rows in by_kernels.items():
        budget = token_budget if most is None else min(token_budget, most)
        group: list[Row] = []
        for row in sorted(rows):  # ascending lengths: the newest row sets the padded width
            if group and row.length * (len(group) + 1) > max(budget, least):
                yield _filled(group, least)
                group = []
            group.append(row)
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


# Which of bitsandbytes' matrix products a number of tokens gets: scoring and training must get the same ones.
#
# On CUDA, `bitsandbytes.backends.cuda.ops` (0.50) multiplies by a 4-bit weight (N, K) in one of two ways, chosen by the
# number of tokens M of the batch, the card, N and K: few tokens in one fused kernel, many by dequantizing the weight
# and calling cuBLAS. The two add up in another order, and round differently. Its own heuristic gives, as the largest M
# of the fused kernel over the linear layers of Llama-3.1-8B and Qwen2.5-0.5B:
#
# | card | T4 | RTX 3060 | RTX 4060 | RTX 4090 | A100 | RTX 5090 |
# | --- | --- | --- | --- | --- | --- | --- |
# | M | 128 | 128 | 256 | 128 | 128 | 64 |
#
# and never more than 1,536 (small layers on an A100). On the CPU there is one way (dequantize, then `F.linear`). So
# most micro-batches lie above every threshold, and so do the larger scoring batches; only the smallest need care.

MAX_FUSED_TOKENS = 1536


def fused_limits(model: nn.Module) -> list[int]:
    """The thresholds of a model on its device: M <= limit is a fused kernel, M > limit is not; ascending, distinct.

    Returns: one number for each that some 4-bit layer has; [] where all batches get the same kernel.
    """
    shapes = set()
    for module in quantized_linears(model).values():
        weight = module.weight
        state = getattr(weight, "quant_state", None)
        if weight.device.type == "cuda" and state is not None:
            dtype = getattr(module, "compute_dtype", None) or state.dtype
            shapes.add((weight.device.index or 0, dtype, *state.shape))
    if not shapes:
        return []
    from bitsandbytes.backends.cuda import ops

    is_fused = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    most = getattr(ops, "_gemm_4bit_custom_max_m", MAX_FUSED_TOKENS)
    if is_fused is None:  # another version: above this none is fused in any that is known
        return [most]
    return sorted({fused_limit(is_fused, most, *shape) for shape in shapes} - {0})


def fused_limit(is_fused, most: int, device: int, dtype: torch.dtype, rows: int, columns: int) -> int:
    """The largest number of tokens up to `most` for which `is_fused(device, dtype, tokens, rows, columns)`; 0: none."""
    return next((tokens for tokens in range(most, 0, -1) if is_fused(device, dtype, tokens, rows, columns)), 0)


def same_kernels(tokens: int, limits: list[int]) -> tuple[int, int | None]:
    """The smallest and the largest (None: any) number of tokens that get the kernels that `tokens` get."""
    i = bisect_left(limits, tokens)
    return (limits[i - 1] + 1 if i else 1), (limits[i] if i < len(limits) else None)
