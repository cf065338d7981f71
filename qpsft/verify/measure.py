"""A causal LM's log-probabilities on given tokens, and the distance between two models' log-probabilities.

Everything is kept as float32 on the CPU, so that one model can be freed before the next one is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qpsft.model.generation import neutral_settings

LOGITS_BYTES = 256 * 2**20
"""At most, of the logits (rows, length, vocabulary) of one batch, in float32."""

KEPT_BYTES = 128 * 2**20
"""At most, of the distributions over the whole vocabulary that are kept for the KL divergence, in float32."""


@dataclass(frozen=True)
class Sequence:
    """A tokenized text.

    Attributes:
        ids: its tokens.
        written_from: index of the first token that the live model generated; `len(ids)` when it generated none.
    """

    ids: list[int]
    written_from: int


@dataclass
class Measurement:
    """A model's log-probabilities at all N positions of the sequences that have a next token, in order.

    Attributes:
        chosen: log-probability of the next token, nats (N,), float32.
        best: the likeliest next token (N,), int64.
        lead: log-probability of the likeliest minus that of the second (N,), float32.
        full: log-probabilities of the whole vocabulary at `kept_positions` (P, V), float32.
    """

    chosen: Tensor
    best: Tensor
    lead: Tensor
    full: Tensor


def kept_positions(total: int, vocabulary: int) -> Tensor:
    """The positions whose whole distribution is kept: evenly spaced, as many as `KEPT_BYTES` allow, (P,) int64."""
    count = max(1, min(total, KEPT_BYTES // (4 * vocabulary)))
    return torch.linspace(0, total - 1, count).round().long()


def measure(model: Any, sequences: list[Sequence], vocabulary: int, device: torch.device) -> Measurement:
    """Runs `model` over the sequences, in batches whose logits stay under `LOGITS_BYTES`.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not, in eval mode.
        sequences: each of at least two tokens.
        vocabulary: width of the logits, V.
        device: where it computes.
    """
    offsets = torch.tensor([0] + [len(sequence.ids) - 1 for sequence in sequences]).cumsum(0)
    total = int(offsets[-1])
    keep = kept_positions(total, vocabulary)
    place_in_full = torch.full((total,), -1)
    place_in_full[keep] = torch.arange(len(keep))
    out = Measurement(
        chosen=torch.empty(total),
        best=torch.empty(total, dtype=torch.int64),
        lead=torch.empty(total),
        full=torch.empty(len(keep), vocabulary),
    )
    with torch.inference_mode():
        for batch in _batches(sequences, vocabulary):
            logits = _forward(model, [sequences[index].ids for index in batch], device)
            for row, index in enumerate(batch):
                ids = torch.tensor(sequences[index].ids[1:], device=logits.device)
                span = slice(int(offsets[index]), int(offsets[index + 1]))
                logprobs = torch.log_softmax(logits[row, : len(ids)].float(), dim=-1)
                out.chosen[span] = logprobs.gather(1, ids[:, None]).squeeze(1).cpu()
                values, tokens = logprobs.topk(2, dim=-1)
                out.best[span] = tokens[:, 0].cpu()
                out.lead[span] = (values[:, 0] - values[:, 1]).cpu()
                wanted = place_in_full[span] >= 0
                out.full[place_in_full[span][wanted]] = logprobs[wanted.to(logprobs.device)].cpu()
    return out


def _batches(sequences: list[Sequence], vocabulary: int) -> list[list[int]]:
    """Indices of the sequences, the longest first, cut where a batch's padded logits would exceed the budget."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    batches: list[list[int]] = []
    for index in order:
        longest = len(sequences[batches[-1][0]].ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * longest * vocabulary * 4 <= LOGITS_BYTES:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _forward(model: Any, rows: list[list[int]], device: torch.device) -> Tensor:
    """Logits (rows, length, V). Padding is on the right, which a causal LM's tokens never see."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits


def continue_greedily(
    model: Any, prompts: list[list[int]], *, max_new_tokens: int, stop: set[int], pad: int
) -> list[list[int]]:
    """The greedy continuation of each prompt: at most `max_new_tokens` tokens, a stop token included."""
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    padded = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(tokens) for tokens in prompts], padding_value=pad, **padded)
    mask = pad_sequence([torch.ones(len(tokens), dtype=torch.int64) for tokens in prompts], **padded)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=sorted(stop) or None
    )
    with torch.inference_mode(), neutral_settings(model):
        written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    rows = []
    for tokens in written[:, ids.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))
        rows.append(tokens[:end])
    return rows


@dataclass(frozen=True)
class Distance:
    """How far a second model is from a first on the same sequences; log-probabilities and KL in nats.

    Attributes:
        max_abs, mean_abs: of |Δ log-probability| of the next token, over all positions.
        kl: mean of KL(first ‖ second) over the kept positions.
        top1: share of positions with the same likeliest token.
        greedy: share of the first model's greedy continuations up to where the second model's likeliest token differs.
        flips: positions where the likeliest token differs although in the first it leads by more than a near tie.
    """

    max_abs: float
    mean_abs: float
    kl: float
    top1: float
    greedy: float
    flips: int


def distance(first: Measurement, second: Measurement, sequences: list[Sequence], near_tie: float) -> Distance:
    """The distance between two measurements of the same sequences.

    Args:
        first, second: the measurements. A value in the second that is not finite makes the distance infinite.
        near_tie: lead of the likeliest token, in nats, up to which another likeliest token is no fault.
    """
    difference = (first.chosen - second.chosen).abs()
    if not bool(torch.isfinite(second.chosen).all()):
        return Distance(float("inf"), float("inf"), float("inf"), 0.0, 0.0, len(difference))
    same = first.best == second.best
    kl = 0.0
    for a, b in zip(first.full.split(256), second.full.split(256), strict=True):
        a, b = a.double(), b.double()
        # Σ p log(p/q) − p + q: the last two sum to zero, except for float32's rounding, which they cancel.
        kl += float((a.exp() * (a - b) - a.exp() + b.exp()).sum())
    return Distance(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        kl=kl / len(first.full),
        top1=float(same.float().mean()),
        greedy=_greedy_agreement(same, sequences),
        flips=int((~same & (first.lead > near_tie)).sum()),
    )


def _greedy_agreement(same: Tensor, sequences: list[Sequence]) -> float:
    """See `Distance.greedy`. Until the first difference, both models' continuations are the same tokens."""
    agreed = written = start = 0
    for sequence in sequences:
        end = start + len(sequence.ids) - 1
        own = same[start + sequence.written_from - 1 : end].tolist()
        agreed += next((place for place, equal in enumerate(own) if not equal), len(own))
        written += len(own)
        start = end
    return agreed / written if written else 1.0
