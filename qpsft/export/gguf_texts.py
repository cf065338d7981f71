"""Five hundred texts on which a GGUF's tokenizer must agree with the Hugging Face one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from qpsft.verify.text import CONVERSATIONS, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT = 500

_TEXTS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""`sentences` in many languages, `code`, `numbers` and `spaces`."""


def varied_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """`COUNT` different texts: languages, code, digits, spaces, emoji, special tokens, conversations, mixtures of them.

    The same for the same tokenizer; the empty text is not among them.
    """
    own = [text for kind in _TEXTS.values() for text in kind]
    generator = random.Random(0)
    pieces = [*own, *(word for text in _TEXTS["sentences"] for word in text.split())]
    unique = dict.fromkeys(text for text in [*own, *_special(tokenizer), *_conversations(tokenizer)] if text)
    while len(unique) < COUNT:
        parts = generator.choices(pieces, k=generator.randint(1, 4))
        unique[generator.choice(("", " ", "\n", ", ")).join(parts) or "x"] = None
    return list(unique)[:COUNT]


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens inside text. A space after one is left out: some tokenizers strip it, and templates write none."""
    tokens = list(tokenizer.all_special_tokens)[:12]
    return [text for token in tokens for text in (token, f"a{token}b", f"Hello{token}World", f"{token}{tokens[0]}")]


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokenizer.chat_template is None:
        return []
    texts = [render(tokenizer, talk, opened=opened) for talk in CONVERSATIONS for opened in (False, True)]
    return [text for text in texts if text is not None]
