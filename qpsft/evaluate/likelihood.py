"""Given text under a model and under its base: likelihood, entropy, divergence, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpsft.errors import DataError
from qpsft.model.adapter import adapter_off

VOCABULARY_TILE = 2**25  # logits in float32 at once: 32M floats, 128 MB
LOGITS_AT_ONCE = 2**28  # logits of one forward


def text_statistics(model: Any, rows: Sequence[dict], *, batch_tokens: int = 8192) -> dict[str, float]:
    """Likelihood of given text under a model, over its supervised tokens.

    Args:
        model: a causal LM, with or without adapters; left in the mode it was in.
        rows: each with `input_ids` and `labels` (lists of int; -100: not supervised), unpadded.
        batch_tokens: tokens per forward, padding included (one row at least).

    Returns:
        `nll` and `entropy` of the model's next-token distribution (nats per supervised token), `mean_token_accuracy`
        (share of them that are the most likely token), and `num_items` (how many they are).

    Raises:
        DataError: no token is supervised.
    """
    sums = row_sums(model, rows, batch_tokens=batch_tokens)
    count = int(sums["num_items"].sum())
    if not count:
        raise DataError("No token of the evaluated rows is supervised.", "Evaluate on rows with a completion.")
    means = {name: float(sums[name].sum() / count) for name in ("nll", "entropy", "mean_token_accuracy")}
    return means | {"num_items": count}


@torch.no_grad()
def row_sums(
    model: Any, rows: Sequence[dict], *, against_base: bool = False, batch_tokens: int = 8192
) -> dict[str, np.ndarray]:
    """Sums over the supervised tokens of each row.

    Args:
        model: a causal LM, left in the mode it was in.
        rows: each with `input_ids` and `labels` (lists of int; -100: not supervised), unpadded.
        against_base: also compute the divergence from the base under the adapter, by a second forward without it.
        batch_tokens: tokens per forward, padding included (one row at least); fewer for a large vocabulary.

    Returns:
        Arrays (rows,), float64, in the order of `rows`: `nll` and `entropy` (nats), `mean_token_accuracy` (hits),
        `num_items` (supervised tokens), and with `against_base` of the whole next-token distributions, nats: `kl`,
        KL(policy || base), and `base_kl`, KL(base || policy).
    """
    names = ("nll", "entropy", "mean_token_accuracy", "num_items", *(("kl", "base_kl") if against_base else ()))
    sums = {name: np.zeros(len(rows)) for name in names}
    budget = min(batch_tokens, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    try:
        for indices, batch in _length_sorted(rows, budget):
            labels = batch.pop("labels").to(model.device)[:, 1:]
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = labels != -100
            # counted from the end: prompt tuning puts tokens of its own before the row
            logits = model(**inputs, use_cache=False).logits[:, -1 - labels.shape[1] : -1][mask]
            base_logits = None
            if against_base:
                with adapter_off(model):
                    base_logits = model(**inputs, use_cache=False).logits[:, :-1][mask]
            per_token = _token_values(logits, base_logits, labels[mask])
            row_of_token = mask.nonzero()[:, 0].cpu().numpy()
            for name, values in per_token.items():
                sums[name][indices] = np.bincount(row_of_token, values.double().cpu().numpy(), len(indices))
    finally:
        model.train(was_training)
    return sums


def _token_values(logits: Tensor, base_logits: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """Values (tokens,) for each supervised token, from logits (tokens, vocabulary)."""
    tile = max(1, VOCABULARY_TILE // logits.shape[-1])
    parts: dict[str, list[Tensor]] = {"nll": [], "entropy": [], "mean_token_accuracy": [], "num_items": []}
    if base_logits is not None:
        parts |= {"kl": [], "base_kl": []}
    for start in range(0, len(labels), tile):
        label = labels[start : start + tile]
        logprobs = logits[start : start + tile].float().log_softmax(-1)
        probs = logprobs.exp()
        parts["nll"].append(-logprobs.gather(-1, label.unsqueeze(-1)).squeeze(-1))
        parts["entropy"].append(torch.special.entr(probs).sum(-1))
        parts["mean_token_accuracy"].append(logprobs.argmax(-1) == label)
        parts["num_items"].append(torch.ones_like(label))
        if base_logits is not None:
            base_logprobs = base_logits[start : start + tile].float().log_softmax(-1)
            parts["kl"].append((probs * (logprobs - base_logprobs)).sum(-1))
            parts["base_kl"].append((base_logprobs.exp() * (base_logprobs - logprobs)).sum(-1))
    return {name: torch.cat(values) if values else logits.new_zeros(0) for name, values in parts.items()}


def _length_sorted(rows: Sequence[dict], batch_tokens: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Indices of rows and their right-padded tensors `input_ids`, `attention_mask`, `labels`, shortest rows first."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"])):
        if group and len(rows[index]["input_ids"]) * (len(group) + 1) > batch_tokens:
            yield group, _padded([rows[i] for i in group])
            group = []
        group.append(index)
    if group:
        yield group, _padded([rows[i] for i in group])


def _padded(rows: Sequence[dict]) -> dict[str, Tensor]:
    def pad(lists: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, lists)), batch_first=True, padding_value=value)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], -100),
    }
