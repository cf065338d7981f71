"""What a model does: likelihood and entropy on given text, and greedy completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qpsft.errors import DataError

VOCABULARY_TILE = 2**25  # logits held at once: 32M floats, 128 MB


@torch.no_grad()
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
    totals = torch.zeros(3, dtype=torch.float64)
    count = 0
    was_training = model.training
    model.eval()
    try:
        for batch in _length_sorted(rows, batch_tokens):
            labels = batch.pop("labels").to(model.device)[:, 1:]
            logits = model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).logits[:, :-1]
            mask = labels != -100
            tile = max(1, VOCABULARY_TILE // logits.shape[-1])
            for some, label in zip(logits[mask].split(tile), labels[mask].split(tile), strict=True):
                logprobs = some.float().log_softmax(-1)
                totals[0] -= logprobs.gather(-1, label.unsqueeze(-1)).sum().item()
                totals[1] -= (logprobs.exp() * logprobs).sum().item()
                totals[2] += (logprobs.argmax(-1) == label).sum().item()
                count += len(label)
    finally:
        model.train(was_training)
    if not count:
        raise DataError("No token of the evaluated rows is supervised.", "Evaluate on rows with a completion.")
    nll, entropy, accuracy = (totals / count).tolist()
    return {"nll": nll, "entropy": entropy, "mean_token_accuracy": accuracy, "num_items": count}


def _length_sorted(rows: Sequence[dict], batch_tokens: int):
    """Batches of right-padded tensors `input_ids`, `attention_mask`, `labels`, shortest rows first."""
    group: list[dict] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if group and len(row["input_ids"]) * (len(group) + 1) > batch_tokens:
            yield _padded(group)
            group = []
        group.append(row)
    if group:
        yield _padded(group)


def _padded(rows: Sequence[dict]) -> dict[str, Tensor]:
    def pad(lists: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, lists)), batch_first=True, padding_value=value)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], -100),
    }


@torch.no_grad()
def greedy_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[dict]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    description: str | None = None,
) -> list[str]:
    """Greedy answers to chat prompts, in batches of similar length with the KV cache.

    Args:
        prompts: message lists, rendered with the tokenizer's chat template and its generation prompt.
        description: shown beside a progress bar on a terminal; None: no bar.

    Returns:
        One text per prompt, in the order given, without special tokens.
    """
    ids = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(ids), desc=description, disable=True if description is None else None, leave=False) as bar:
            for start in range(0, len(order), batch_size):
                group = order[start : start + batch_size]
                batch = tokenizer.pad({"input_ids": [ids[i] for i in group]}, padding_side="left", return_tensors="pt")
                output = model.generate(**batch.to(model.device), do_sample=False, max_new_tokens=max_new_tokens)
                new = output[:, batch["input_ids"].shape[1] :]
                for i, text in zip(group, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    answers[i] = text
                bar.update(len(group))
    finally:
        model.train(was_training)
    return answers
