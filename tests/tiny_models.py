"""Random causal LMs of a few thousand parameters, saved as base model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qpsft.errors import BaseModelError
from qpsft.model.base import load_base

VOCABULARY = 200
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXTRA = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
}


def save_tiny_model(
    folder: Path, model_type: str = "llama", *, special: tuple[str, ...] = ("<s>", "</s>"), size: int = 180, **config
) -> Path:
    """A random model and a word-level tokenizer of `size` words; `special` tokens get ids 1, 2, …, and `w0` id 0."""
    torch.manual_seed(0)
    settings = SIZES | EXTRA.get(model_type, {}) | {"tie_word_embeddings": False} | config
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size=config.pop("max_shard_size", "1GB"))
    save_tokenizer(folder, special, size)
    return folder


def save_tokenizer(folder: Path, special: tuple[str, ...] = ("<s>", "</s>"), size: int = 180) -> None:
    words = ["w0", *special, *(f"w{i}" for i in range(1, size - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos = {"eos_token": "</s>"} if "</s>" in special else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **eos).save_pretrained(folder)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, **kwargs):
    return load_base(folder, device="cpu", verbose=False, **kwargs)


def refusal(folder, **kwargs) -> str:
    """The one paragraph `load_base` refuses `folder` with."""
    with pytest.raises(BaseModelError) as error:
        load(folder, **kwargs)
    assert error.value.what and error.value.todo and "\n" not in str(error.value)
    return str(error.value)
