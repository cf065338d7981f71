"""Several rows laid end to end in one, each seeing itself only: no padding, and no contamination.

    input_ids      a a a a a b b b c c c c | d d d …        two packed rows of a batch
    position_ids   0 1 2 3 4 0 1 2 0 1 2 3 | 0 1 2 …
    labels         - a a a a - b b - c c c | - d d …        the first token of a piece has nothing before it

TRL packs (`trl.pack_dataset`, best fit decreasing: no row is cut) and, as FlashAttention wants it, lays the rows of a
batch end to end too. transformers makes the block-diagonal mask from the position ids, for SDPA, eager and flex
attention alike, but for a batch of B rows of L tokens so laid out it is B L x B L large. So without FlashAttention the
packed rows stay rows: the same blocks, B times fewer mask entries and attention products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpsft.errors import RecipeError
from qpsft.forward import policy_forward

TOKENS_CHECKED = 32
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class PackedRows(DataCollatorForLanguageModeling):
    """Collates packed rows as rows: `input_ids`, `labels`, `position_ids`, all (batch, sequence), and no mask.

    A pad, on the right, is a piece of one token that is not supervised.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]  # transformers looks for pieces only where there is none
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch


def keeps_rows(config: Any) -> bool:
    """Whether packed rows of a model with this `PretrainedConfig` may be the rows of a batch.

    False: FlashAttention, and linear-attention or convolution layers, take pieces only end to end, in one row.
    """
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ATTENTION_LAYERS)
    return "flash" not in str(config._attn_implementation) and layers <= ATTENTION_LAYERS


def packed_collator(collator: DataCollatorForLanguageModeling, config: Any) -> DataCollatorForLanguageModeling:
    """The collator for packed rows of a model with this config; `collator` is SFTTrainer's, for rows end to end."""
    if not keeps_rows(config):
        return collator
    return PackedRows(
        pad_token_id=collator.pad_token_id, return_position_ids=True, pad_to_multiple_of=collator.pad_to_multiple_of
    )


@torch.no_grad()
def check_packing(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], ids: list[int]) -> None:
    """Makes sure that a packed piece does not see the one before it, on this very model.

    Exchanges the first of two pieces for another. That must not change what the model says of the second; how much it
    changes when the two are one row tells what a leak would look like.

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
