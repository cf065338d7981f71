"""Several rows laid end to end in one, each seeing itself only: no padding, and no contamination.

    input_ids      a a a a a b b b c c c c | d d d …        two packed rows of a batch
    position_ids   0 1 2 3 4 0 1 2 0 1 2 3 | 0 1 2 …
    labels         - a a a a - b b - c c c | - d d …        the first token of a piece has nothing before it

TRL packs (`trl.pack_dataset`, best fit decreasing: no row is cut). How a piece is kept to itself depends on the model:
- SDPA: attention piece by piece (`qpsft.model.attention`);
- eager, flex attention, and SDPA with sliding windows shorter than a row: transformers' block-diagonal mask, which it
  makes from the position ids;
- FlashAttention, and layers other than attention (linear attention, convolutions): the rows of a batch end to end, as
  TRL's own collator lays them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpsft.errors import RecipeError
from qpsft.model.attention import fits
from qpsft.psft.forward import policy_forward

TOKENS_CHECKED = 32
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class PackedRows(DataCollatorForLanguageModeling):
    """Collates packed rows as rows: `input_ids`, `labels`, `position_ids`, all (batch, sequence), and no mask.

    A pad, on the right, has position 0 and is not supervised.

    Args:
        by_piece: add `seq_lengths`, for every row the lengths of its pieces, for `sdpa_by_piece`.
    """

    return_position_ids: bool = True
    by_piece: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]  # transformers looks for pieces only where there is none
        batch["labels"][batch["position_ids"] == 0] = -100
        if self.by_piece:
            batch["seq_lengths"] = tuple(tuple(e.get("seq_lengths") or [len(e["input_ids"])]) for e in examples)
        return batch


def packed_collator(
    collator: DataCollatorForLanguageModeling, config: Any, max_length: int, *, tensors_only: bool = False
) -> DataCollatorForLanguageModeling:
    """The collator for packed rows of a model.

    Args:
        collator: SFTTrainer's, which lays rows end to end.
        config: the model's `PretrainedConfig`.
        max_length: tokens of a packed row.
        tensors_only: for batches that accelerate takes apart: a stream for several processes.
    """
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ATTENTION_LAYERS)
    if "flash" in str(config._attn_implementation) or not layers <= ATTENTION_LAYERS:
        return collator
    by_piece = fits(config, max_length) and not tensors_only
    return PackedRows(collator.pad_token_id, pad_to_multiple_of=collator.pad_to_multiple_of, by_piece=by_piece)


@torch.no_grad()
def check_packing(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], ids: list[int]) -> None:
    """Makes sure that a packed piece does not see the one before it, on this very model.

    Exchanges the first of two pieces for another: that must not change the log-probabilities of the second. With both
    in one row it does, and that change is the scale.

    Args:
        model: with TRL's tiled LM head, on its device, in any mode.
        collate: makes a batch of packed rows.
        ids: at least four token ids of the data; up to 64 are used.

    Raises:
        RecipeError: the model mixes the pieces, or takes no position ids.
    """
    half = min(len(ids) // 2, TOKENS_CHECKED)
    first, second = ids[:half], ids[half : 2 * half]
    other = second if second != first else first[::-1]
    device = model.get_input_embeddings().weight.device

    def logprobs(start: list[int], lengths: list[int]) -> Tensor:
        row = {"input_ids": start + second, "labels": start + second, "seq_lengths": lengths}
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate([row]).items()}
        return policy_forward(model, batch, right_padded=True).log_probs[0, half : 2 * half - 1].float()

    def change(lengths: list[int]) -> float:
        return float((logprobs(first, lengths) - logprobs(other, lengths)).abs().max())

    way_out = "Set packing: false, or try attn_implementation: flash_attention_2."
    name = getattr(model.config, "model_type", type(model).__name__)
    with _eval_mode(model):
        try:
            packed, one_row = change([half, half]), change([2 * half])
        except TypeError as error:
            raise RecipeError(f"A {name} model does not take packed rows: {error}.", way_out) from error
    if not packed <= 0.05 * one_row:
        raise RecipeError(
            f"A {name} model with {model.config._attn_implementation} attention lets the rows packed together see "
            f"each other: log-probabilities move by {packed:.2g} nats with the row before.",
            way_out,
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would look like a leak
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
