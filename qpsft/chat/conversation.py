"""A conversation with a model, or with an adapter and the base under it: the turns, the prompts made of them, answers.

Both speakers, adapter and base, see the user's turns and their own earlier answers; where one gave no answer it sees
the other's, so that it can be asked in the middle of a conversation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from qpsft.data.ending import end_of_turn
from qpsft.data.tokenize import encode_prompt, writes_chat
from qpsft.errors import BaseModelError, DataError
from qpsft.model.adapter import adapter_off, has_adapter
from qpsft.model.generation import neutral_settings, stop_tokens
from qpsft.recipe.arguments import DataArguments

TUNED, BASE = "tuned", "base"
MAX_NEW_TOKENS = 512


@dataclass
class Turn:
    """What the user said, and what each speaker answered."""

    user: str
    answers: dict[str, str] = field(default_factory=dict)


class Turns:
    """The turns so far, and the prompt that the next answer is made from; whoever answers fills in the rest.

    Args:
        arguments: `use_chat_template` and `prompt_format` as in training.
        system: the system turn; it stays when older turns are left out.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn. The base's own generation settings, such as
            a repetition penalty or a top_k, are not used.
        top_p: draw among the likeliest tokens that make up this probability.
        max_new_tokens: an answer's length cap.
        seed: of the draws. The same turns and seed give the same answers; both speakers use the same seed.

    Attributes:
        turns: the user's turns with their answers.
        speakers: who answers.
        as_chat: prompts go through the chat template.
        limit: positions the model has; None if it has no limit.
        left_out: number of the oldest turns that did not fit into the last prompt.

    Raises:
        DataError: a system turn where there is no chat template.
    """

    speakers: tuple[str, ...] = (TUNED,)
    as_chat: bool
    limit: int | None

    def __init__(
        self,
        arguments: DataArguments | None = None,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
    ):
        self.arguments = arguments or DataArguments()
        if system is not None and not self.as_chat:
            raise DataError("A system turn needs a chat template, and prompts here are plain text.", "Leave it out.")
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.temperature, self.top_p, self.max_new_tokens, self.seed = temperature, top_p, max_new_tokens, seed
        self.left_out = 0
        self.turns: list[Turn] = []

    def encode(self, messages: list[dict]) -> list[int]:
        """The ids after which the model answers a conversation."""
        raise NotImplementedError

    def answer(self, speaker: str = TUNED, write: Callable[[str], None] | None = None) -> str:
        """The answer of one speaker to the last turn; it becomes part of the conversation.

        Args:
            speaker: one of `speakers`.
            write: is given the text piece by piece while it is made. What was made when Ctrl-C comes is kept as the
                answer.

        Raises:
            DataError: the last turn alone is longer than the model.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns, self.left_out = [], 0

    def say(self, text: str) -> None:
        """Adds a user's turn, for `answer`."""
        self.turns.append(Turn(text))

    def take_back(self) -> None:
        """Removes the last user's turn with its answers."""
        self.turns.pop()

    def _prompt(self, speaker: str) -> tuple[list[int], int]:
        """(token ids of the prompt, most tokens of the answer). The oldest turns are left out where they do not fit."""
        spare = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit // 4)
        for first in range(len(self.turns)):
            ids = self.encode(self._messages(speaker, first))
            if self.limit is None or len(ids) + spare <= self.limit or not self.as_chat:
                break
        if self.limit is None:
            self.left_out = 0
            return ids, self.max_new_tokens
        if len(ids) >= self.limit:
            raise DataError(
                f"This turn alone is {len(ids)} tokens long, and the model takes {self.limit}.", "Shorten it."
            )
        self.left_out = first
        return ids, min(self.max_new_tokens, self.limit - len(ids))

    def _messages(self, speaker: str, first: int) -> list[dict]:
        messages = list(self.system)
        for turn in self.turns[first:-1]:
            messages.append({"role": "user", "content": turn.user})
            answer = turn.answers.get(speaker, next(iter(turn.answers.values()), ""))
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.turns[-1].user}]


class Conversation(Turns):
    """A conversation with a transformers model.

    Args:
        model: a causal LM in eval mode, with or without an adapter: TUNED answers with it, BASE with it switched off.
        tokenizer: the one the adapter was trained with.
        arguments, options: as `Turns`.

    Raises:
        DataError: a system turn where there is no chat template, or one that the chat template refuses.
    """

    def __init__(self, model: Any, tokenizer: Any, arguments: DataArguments | None = None, **options: Any):
        self.model, self.tokenizer = model, tokenizer
        self.as_chat = writes_chat(tokenizer, arguments or DataArguments())
        super().__init__(arguments, **options)
        self.speakers = (BASE, TUNED) if has_adapter(model) else (TUNED,)
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.encode([*self.system, {"role": "user", "content": "?"}])
        # the base's settings, and the token that ended the answers in training
        self._stops = sorted(stop_tokens(model, tokenizer) | end_of_turn(tokenizer, self.arguments))

    def encode(self, messages: list[dict]) -> list[int]:
        return encode_prompt(messages, self.tokenizer, self.arguments)

    def answer(self, speaker: str = TUNED, write: Callable[[str], None] | None = None) -> str:
        """As `Turns.answer`. Raises BaseModelError too: the device's memory does not suffice."""
        ids, room = self._prompt(speaker)
        stream = _Stream(self.tokenizer, write)
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        device = self.model.device
        try:
            with (
                adapter_off(self.model) if speaker == BASE else contextlib.nullcontext(),
                neutral_settings(self.model),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                torch.manual_seed(self.seed + len(self.turns) - 1)
                inputs = torch.tensor([ids], device=device)
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    streamer=stream,
                    max_new_tokens=room,
                    use_cache=True,
                    eos_token_id=self._stops or None,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **(drawn if self.temperature else {"do_sample": False}),
                )
        except torch.OutOfMemoryError as error:
            raise BaseModelError(
                f"An answer to {len(ids)} tokens does not fit on {device}.", "Start anew, or ask for fewer new tokens."
            ) from error
        finally:
            self.turns[-1].answers[speaker] = stream.text
        return stream.text


class _Stream(BaseStreamer):
    """Passes new text on as soon as later tokens cannot change it; `text` is what the tokens so far decode to.

    (transformers' TextStreamer forgets what came before each line break, and with it a SentencePiece line's leading
    space.)
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None):
        self.tokenizer, self.write = tokenizer, write
        self.text = ""
        self._ids: list[int] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        # The bytes of one character may come in several tokens; an incomplete one decodes to U+FFFD.
        text = self._decoded().rstrip("\N{REPLACEMENT CHARACTER}")
        if text.startswith(self.text):
            self._hand_on(text)

    def end(self) -> None:
        self._hand_on(self._decoded())

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _hand_on(self, text: str) -> None:
        new = text[len(os.path.commonprefix([self.text, text])) :]
        self.text = text
        if new and self.write is not None:
            self.write(new)
