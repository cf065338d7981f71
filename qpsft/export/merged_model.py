"""A merged model's folder as the conversion to GGUF and its checks use it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import ByteLevel

from qpsft.data.ending import end_of_turn
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import check_folder
from qpsft.model.remote_code import link_without_code
from qpsft.verify.exported import ExportedWeights, read_text_config
from qpsft.verify.text import all_stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSFORMERS_5 = "TokenizersBackend"
"""The class of every tokenizer that has none of its own."""


@dataclass
class MergedModel:
    """What a GGUF is made from and compared with.

    Attributes:
        folder: of safetensors.
        tokenizer: the folder's, its chat template without generation markers.
        stops: token ids that end a completion.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]

    @classmethod
    def load(cls, folder: Path) -> MergedModel:
        """Reads config and tokenizer. Raises BaseModelError when the folder does not hold a whole model."""
        check_folder(folder)
        tokenizer = load_tokenizer(folder)
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = without_generation_markers(tokenizer.chat_template)
        return cls(folder, tokenizer, all_stop_tokens(folder, tokenizer))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, of the text model where there are several."""
        return read_text_config(self.folder)

    @cached_property
    def weights(self) -> ExportedWeights:
        """The tensors, read one at a time."""
        return ExportedWeights(self.folder)

    @property
    def has_other_senses(self) -> bool:
        """Whether it also sees or hears."""
        return any(name in self.config for name in ("vision_config", "audio_config", "visual"))

    def further_stops(self) -> dict[str, int]:
        """The stop tokens that are not the tokenizer's own, by the names that GGUF has for two of them."""
        first = end_of_turn(self.tokenizer)
        others = sorted(self.stops - {self.tokenizer.eos_token_id}, key=lambda token: (token not in first, token))
        return dict(zip(("eot", "eom"), others, strict=False))

    def stop_texts(self) -> list[str]:
        """The stop tokens as text, by id."""
        return [str(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(self.stops)]


def count_weights(weights: ExportedWeights) -> int:
    """Number of values in all tensors."""
    return sum(torch.Size(weights.shape_of(name)).numel() for name in weights.names())


def stage(folder: Path, staged: Path) -> Path:
    """A folder of links to a merged model, with what llama.cpp's converter needs to read its tokenizer right.

    - Nothing that could run: the converter trusts the code of the folders it is given.
    - `{% generation %}` markers in the chat template, which only training reads, become `{% if true %}`: llama.cpp's
      template engines do not know them, and the text rendered is the same.
    - tokenizer_config.json gets `added_tokens_decoder`. The converter learns from there which pieces of a
      `tokenizer.model` are special, transformers 5 does not write it any more, and without it "<|user|>" would be
      plain text to llama.cpp.
    - It also gets back the class name of a byte-level tokenizer, by which the converter tells a Phi-4 from a Phi-3:
      transformers 5 writes the same name for all.
    """
    link_without_code(folder, staged)
    template = staged / "chat_template.jinja"
    if template.is_file():
        _replace(template, without_generation_markers(template.read_text(encoding="utf-8")))
    settings = staged / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if isinstance(content.get("chat_template"), str):
        content["chat_template"] = without_generation_markers(content["chat_template"])
    tokenizer = load_tokenizer(folder)
    content["added_tokens_decoder"] = {
        str(number): {"content": token.content, "special": token.special}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    if content.get("tokenizer_class") == TRANSFORMERS_5 and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        content["tokenizer_class"] = "GPT2Tokenizer"
    _replace(settings, json.dumps(content, ensure_ascii=False, indent=2))
    return staged


def _replace(link: Path, text: str) -> None:
    link.unlink(missing_ok=True)
    link.write_text(text, encoding="utf-8")


def without_generation_markers(template: str) -> str:
    """The template with its generation markers replaced by conditions that always hold; spacing marks stay."""
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)
