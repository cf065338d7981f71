"""Completions of prompts: one greedy and several sampled ones each, decoded together from one cache of the prompt.

Sampling inverts the cumulative distribution at one uniform number per token, which depends on (seed, row, sample,
position) alone. So a sample's tokens do not depend on the rows it is decoded with, on how many samples are drawn or on
the length cap, except where two runs of the model round a probability differently.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from qpsft.model.hardware import free_device_bytes

CPU_BUDGET = 2**30
"""Bytes for the caches and distributions of one batch on the CPU; on CUDA a third of what torch can still have."""
MOST_SEQUENCES = 1024
CACHE_ROOM = 32
"""Tokens that a grown cache has room for beyond what it needs now."""
COMPACT_SHARE = 0.15
"""Once this share of a batch's sequences has ended, they are taken out of the cache: they cost time, and so does the
copy without them."""


@dataclass
class Completion:
    """What the model wrote.

    Attributes:
        token_ids: the new tokens, the stop token included.
        stopped: whether it ended with a stop token; else the length cap cut it off.
        entropy: sum over its tokens of the entropy of the model's next-token distribution (temperature 1), nats.
    """

    token_ids: list[int]
    stopped: bool
    entropy: float


@dataclass
class Completions:
    """The completions of one prompt: `greedy` if it was asked for, and the samples in their order."""

    greedy: Completion | None = None
    samples: list[Completion] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Iterable[int],
    greedy: bool = True,
    samples: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    description: str | None = None,
) -> list[Completions]:
    """Greedy and sampled completions with the KV cache, prompts of similar length together.

    Args:
        model: a causal LM of transformers, with or without adapters; left in the mode it was in.
        prompts: token ids, none empty.
        stop_ids: a completion ends behind any of these.
        samples: how many completions to sample per prompt.
        temperature: divides the logits of the sampled ones; above 0.
        max_new_tokens: length cap. A prompt that comes so near to the model's last position that fewer tokens fit
            gets fewer, one at least.
        batch_size: sequences decoded at once; None: as many as the memory holds (`CPU_BUDGET`, `MOST_SEQUENCES`).
        description: shown beside a progress bar on a terminal; None: no bar.

    Returns:
        One `Completions` per prompt, in the order given.
    """
    copies = int(greedy) + samples
    completed = [Completions() for _ in prompts]
    if not copies:
        return completed
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    last_position = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    stops = torch.tensor(sorted(set(stop_ids)), device=model.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(order), desc=description, disable=None if description else True, leave=False) as bar:
            while order:
                longest = len(prompts[order[-1]])
                room = max_new_tokens if last_position is None else max(1, min(max_new_tokens, last_position - longest))
                size = batch_size or _fitting_sequences(model, longest + room)
                group = order[-max(1, size // copies) :]  # longest first, so that too little memory shows at once
                del order[-len(group) :]
                uniforms = _uniforms(group, seed, greedy, samples, room).to(model.device)
                parts = uniforms.split(max(1, size)) if size < copies else [uniforms]  # then the group is one prompt
                own_prompts = [prompts[i] for i in group]
                completions = [c for part in parts for c in _decode(model, own_prompts, part, stops, temperature)]
                for index, i in enumerate(group):
                    own = completions[index * copies : (index + 1) * copies]
                    completed[i] = Completions(own[0] if greedy else None, own[int(greedy) :])
                bar.update(len(group))
    finally:
        model.train(was_training)
    return completed


def _uniforms(rows: list[int], seed: int, greedy: bool, samples: int, length: int) -> Tensor:
    """(rows * copies, length) float64 in [0, 1); NaN for a greedy copy, which comes first of its row's."""
    table = np.full((len(rows), int(greedy) + samples, length), np.nan)
    for place, row in enumerate(rows):
        for sample in range(samples):
            table[place, int(greedy) + sample] = np.random.default_rng([seed, row, sample]).random(length)
    return torch.from_numpy(table).flatten(0, 1)


def _fitting_sequences(model: Any, length: int) -> int:
    """How many sequences of `length` tokens to decode at once."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * length
    distributions = 24 * config.vocab_size  # logits, log-probabilities, probabilities and their float64 sums
    free = free_device_bytes(model.device)
    budget = CPU_BUDGET if free is None else free // 3
    # Appending a token to a cache copies it: twice its size for a moment.
    return max(1, min(MOST_SEQUENCES, budget // (2 * cache + distributions)))


def _decode(
    model: Any, prompts: list[list[int]], uniforms: Tensor, stops: Tensor, temperature: float
) -> list[Completion]:
    """Completions of each prompt, `len(uniforms) // len(prompts)` copies each, row by row."""
    device, (rows, length) = model.device, uniforms.shape
    copies = rows // len(prompts)
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts], device=device)
    extra = _accepted(model, "logits_to_keep")
    takes_positions = bool(_accepted(model, "position_ids"))
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]

    def forward(tokens: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        where = {"position_ids": positions} if takes_positions else {}
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **where,
            **dict.fromkeys(extra, 1),
        )
        return output.logits[:, -1].float()

    tokens = torch.zeros((rows, length), dtype=torch.long, device=device)
    lengths = torch.full((rows,), length, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    entropies = torch.zeros(rows, dtype=torch.float64, device=device)

    logits = forward(ids)
    copied = torch.arange(len(prompts), device=device).repeat_interleave(copies)
    cache.reorder_cache(copied)
    logits, mask = logits[copied], mask[copied]
    live = torch.arange(rows, device=device)  # which row each row of the batch is
    for step in range(length):
        logprobs = logits.log_softmax(-1)
        new = _choose(logits, logprobs, uniforms[live, step], temperature)
        open_rows = live[~stopped[live]]
        tokens[live, step] = new
        entropies[open_rows] += torch.special.entr(logprobs.exp()).sum(-1)[~stopped[live]].double()
        ended = torch.isin(new, stops) & ~stopped[live]
        lengths[live[ended]] = step + 1
        stopped[live[ended]] = True
        still = ~stopped[live]
        left = int(still.sum())
        if not left or step == length - 1:
            break
        if left <= (1 - COMPACT_SHARE) * len(live):
            kept = still.nonzero().squeeze(-1)
            cache.reorder_cache(kept)
            live, new, mask = live[kept], new[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        logits = forward(new.unsqueeze(-1))
    written, ends = tokens.tolist(), lengths.tolist()
    return [
        Completion(written[i][: ends[i]], was_stopped, entropy)
        for i, (was_stopped, entropy) in enumerate(zip(stopped.tolist(), entropies.tolist(), strict=True))
    ]


class _RoomyLayer(DynamicLayer):
    """A layer's cache with room for more tokens. transformers' DynamicLayer copies the whole cache for each token."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        old = self.get_seq_length()
        if not old:
            return super().update(key_states, value_states, *args, **kwargs)
        new = old + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            self._buffers = tuple(self._with_room(states, new + CACHE_ROOM) for states in (self.keys, self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _with_room(states: Tensor, length: int) -> Tensor:
        buffer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
        buffer[..., : states.shape[-2], :] = states
        return buffer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._buffers is None:
            super().reorder_cache(beam_idx)
            return
        length = self.get_seq_length()
        self._buffers = tuple(buffer.index_select(0, beam_idx) for buffer in self._buffers)
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)


def _choose(logits: Tensor, logprobs: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """The next tokens (rows,): where `uniforms` is NaN the most likely one, else a sample.

    That is the first token up to which the probabilities add up to more than the uniform number.
    """
    best = logits.argmax(-1)
    greedy = uniforms.isnan()
    probabilities = logprobs.exp() if temperature == 1 else (logits / temperature).softmax(-1)
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    at = uniforms.nan_to_num().unsqueeze(-1) * sums[:, -1:]
    sampled = torch.searchsorted(sums, at, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, best, sampled)


def _accepted(model: Any, name: str) -> list[str]:
    """[name] if the model's forward takes it, else []."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [name] if name in inspect.signature(base.forward).parameters else []


def greedy_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[dict] | str],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    description: str | None = None,
) -> list[str]:
    """Greedy answers to prompts.

    Args:
        prompts: message lists, rendered with the tokenizer's chat template and its generation prompt; or texts, which
            are tokenized as they are.
        batch_size, description: as in `generate`.

    Returns:
        One text per prompt, in the order given, without special tokens.
    """
    ids = [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    written = generate(
        model,
        ids,
        stop_ids=stop_tokens(model, tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    return tokenizer.batch_decode([one.greedy.token_ids for one in written], skip_special_tokens=True)


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a completion by the model's generation settings and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return stops - {None}


@contextlib.contextmanager
def neutral_settings(model: Any) -> Iterator[None]:
    """transformers' own `generate` without the model's generation settings, which fill in whatever a call leaves open.

    A repetition penalty there changes even greedy answers. What the settings say of stop tokens goes too: see
    `stop_tokens`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
