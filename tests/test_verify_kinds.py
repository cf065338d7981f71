"""A correct merge of every kind of base and adapter passes verification, and one with a changed weight fails it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import edit_weights
from merging import ALL, load_strictly, save_peft_adapter
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from qpsft.errors import BaseModelError, NotTheSameModelError
from qpsft.merge import merge_adapter
from qpsft.model.base import load_base
from qpsft.verify import verify_export

PLAIN = {"quantization": "none"}
QKV = ["q_proj", "k_proj", "v_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIED = {"tie_word_embeddings": True}
FIRST = "model.layers.0."


def kind(changed: str, model: str = "llama", base: dict[str, Any] | None = None, **adapter: Any) -> tuple:
    """A base, an adapter on it (as `save_peft_adapter` takes it), and the weight that the negative control changes."""
    return model, base or {}, adapter, changed


KINDS = {
    "mixtral": kind(
        f"{FIRST}block_sparse_moe.experts.2.w3.weight",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        target_modules=ALL[:4],
    ),
    "mixtral's router": kind(
        f"{FIRST}block_sparse_moe.gate.weight",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        target_modules=ALL[:4],
        load=PLAIN,
    ),
    "qwen3 moe": kind(f"{FIRST}mlp.experts.1.down_proj.weight", "qwen3_moe", EXPERTS, target_modules=ALL[:4]),
    "token rows": kind("model.embed_tokens.weight", trainable_token_indices=[3, 5, 170]),
    "token rows, unquantized": kind("model.embed_tokens.weight", trainable_token_indices=[3, 5, 170], load=PLAIN),
    "token rows, tied": kind("model.embed_tokens.weight", base=TIED, trainable_token_indices=[3, 5, 170]),
    "token rows, scaled": kind("model.embed_tokens.weight", "gemma2", TIED, trainable_token_indices=[3, 5]),
    "gpt2": kind("transformer.h.0.attn.c_attn.weight", "gpt2", target_modules=GPT2),
    "gpt2, unquantized": kind(
        "transformer.h.0.mlp.c_fc.weight", "gpt2", target_modules=GPT2, fan_in_fan_out=True, load=PLAIN
    ),
    "gpt2, tied": kind("transformer.wte.weight", "gpt2", TIED, target_modules=GPT2),
    "gpt2, all biases": kind(
        "transformer.h.1.mlp.c_fc.bias", "gpt2", target_modules=GPT2, fan_in_fan_out=True, load=PLAIN, bias="all"
    ),
    "qwen2": kind(f"{FIRST}self_attn.q_proj.bias", "qwen2"),
    "qwen3": kind(f"{FIRST}self_attn.q_norm.weight", "qwen3", TIED),
    "gemma2": kind(f"{FIRST}post_feedforward_layernorm.weight", "gemma2", TIED),
    "odd rows": kind(
        f"{FIRST}mlp.down_proj.weight", base={"intermediate_size": 172, "hidden_size": 60, "head_dim": 14}
    ),
    "trained in bfloat16": kind(f"{FIRST}mlp.up_proj.weight", load={"dtype": "bfloat16"}),
    "fp4 in float16": kind(f"{FIRST}mlp.up_proj.weight", load={"quantization": "fp4", "dtype": "float16"}),
    "unquantized in bfloat16": kind(f"{FIRST}mlp.up_proj.weight", load=PLAIN | {"dtype": "bfloat16"}),
    "embedding": kind("model.embed_tokens.weight", target_modules=[*ALL, "embed_tokens"]),
    "head": kind("lm_head.weight", target_modules=[*ALL, "lm_head"]),
    "embedding and head in full": kind("lm_head.weight", modules_to_save=["embed_tokens", "lm_head"]),
    "norms in full": kind("model.norm.weight", modules_to_save=["input_layernorm", "model.norm"]),
    "tied in full": kind(
        "model.embed_tokens.weight",
        base=TIED,
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    ),
    "all biases": kind(f"{FIRST}self_attn.k_proj.bias", "qwen2", bias="all"),
    "adapted biases": kind(f"{FIRST}self_attn.k_proj.bias", "qwen2", load=PLAIN, bias="lora_only"),
    "lora_bias": kind(f"{FIRST}self_attn.k_proj.bias", "qwen2", lora_bias=True, target_modules=QKV),
    "lora_bias, unquantized": kind(
        f"{FIRST}self_attn.k_proj.bias", "qwen2", lora_bias=True, target_modules=QKV, load=PLAIN
    ),
    "rank patterns": kind(
        f"{FIRST}mlp.up_proj.weight",
        rank_pattern={"q_proj": 2, "1.mlp.up_proj": 7},
        alpha_pattern={"k_proj": 3},
        use_rslora=True,
    ),
    "DoRA": kind(f"{FIRST}mlp.up_proj.weight", use_dora=True),
    "DoRA, unquantized": kind(f"{FIRST}mlp.up_proj.weight", use_dora=True, load=PLAIN),
    "one layer": kind("model.layers.1.mlp.up_proj.weight", layers_to_transform=[0]),
}


def write_prompts(adapter: Path, count: int = 4, length: int = 12, prompt_length: int = 8) -> None:
    ids = torch.randint(3, 180, (count, length), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [json.dumps({"input_ids": row, "prompt_length": prompt_length}) for row in ids]
    (adapter / "verify_prompts.jsonl").write_text("\n".join(rows))


def merged_passes_and_changed_fails(adapter: Path, out: Path, dtype: str, changed: str) -> None:
    write_prompts(adapter)
    report = merge_adapter(adapter, out, dtype=dtype)
    assert report.verification["same_model"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[changed].view(-1)[1] += 0.5

    edit_weights(out, change)
    found = verify_export(adapter, out, max_prompts=2, max_new_tokens=4)
    assert not found.same_model and found.failing_layer is not None
    with pytest.raises(NotTheSameModelError):
        found.require_same()


@pytest.mark.parametrize(("name", "dtype"), list(zip(KINDS, itertools.cycle(["float32", "bfloat16"]), strict=False)))
def test_kinds(tmp_path, name, dtype):
    """Each kind in one dtype: how values are rounded is the same for all of them (tests/test_merge_weights.py)."""
    model, config, settings, changed = KINDS[name]
    base = save_tiny_model(tmp_path / "base", model, **config)
    adapter = save_peft_adapter(tmp_path / "adapter", base, **settings)
    merged_passes_and_changed_fails(adapter, tmp_path / "out", dtype, changed)


@pytest.mark.parametrize(
    ("saved_in", "trained_in", "quantization", "dtype"),
    [
        ("bfloat16", "float32", "nf4", "float32"),
        ("bfloat16", "float32", "fp4", "bfloat16"),
        ("float16", "bfloat16", "nf4", "bfloat16"),
        ("float16", "bfloat16", "fp4", "float32"),
    ],
)
def test_a_base_saved_quantized_in_another_dtype_than_it_is_trained_in(
    tmp_path, saved_in, trained_in, quantization, dtype
):
    plain = save_tiny_model(tmp_path / "plain")
    model, tokenizer = load_base(plain, quantization=quantization, dtype=saved_in, verbose=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "base", load={"dtype": trained_in})
    merged_passes_and_changed_fails(adapter, tmp_path / "out", dtype, f"{FIRST}mlp.down_proj.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_whose_4_bit_codes_are_stored_as_bfloat16(monkeypatch, tmp_path, dtype):
    """As FSDP needs them (bnb_4bit_quant_storage). They look like floating point numbers and are none."""
    plain = save_tiny_model(tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr("qpsft.model.base.storage_dtype", lambda compute_dtype: torch.bfloat16)
        model, tokenizer = load_base(plain, dtype="bfloat16", verbose=False)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    merged_passes_and_changed_fails(adapter, tmp_path / "out", dtype, f"{FIRST}mlp.down_proj.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_shards(tmp_path, dtype):
    whole = save_tiny_model(tmp_path / "whole")
    load_strictly(whole).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, tmp_path / "base" / name)
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "base")
    report = merge_adapter(adapter, tmp_path / "shards", dtype=dtype, max_shard_size="50KB")
    assert report.verification["same_model"] and len(report.files) > 8
    merged_passes_and_changed_fails(adapter, tmp_path / "out", dtype, f"{FIRST}mlp.down_proj.weight")


def test_every_wrong_expert_is_named(tmp_path):
    base = save_tiny_model(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=ALL[:4])
    merge_adapter(adapter, tmp_path / "out", dtype="float32", no_verify=True)
    first, second = (f"{FIRST}block_sparse_moe.experts.{number}.w2.weight" for number in (0, 3))

    def swap(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_weights(tmp_path / "out", swap)
    report = verify_export(adapter, tmp_path / "out", max_prompts=2)
    assert report.failing_layer == f"{FIRST}mlp.experts.down_proj" and len(report.numbers["weights"]["wrong"]) == 1
    edit_weights(tmp_path / "out", lambda tensors: tensors.pop(first))
    with pytest.raises(BaseModelError, match="The export in .*out cannot be loaded"):
        verify_export(adapter, tmp_path / "out", max_prompts=2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_row_that_is_lost_is_found(tmp_path, tied):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    adapter = save_peft_adapter(tmp_path / "adapter", base, trainable_token_indices=[3, 5, 170])
    merge_adapter(adapter, tmp_path / "out", dtype="bfloat16", no_verify=True)
    name = "model.embed_tokens.weight"
    original = load_file(base / "model.safetensors")[name][170].bfloat16()
    edit_weights(tmp_path / "out", lambda tensors: tensors[name][170].copy_(original))
    report = verify_export(adapter, tmp_path / "out", max_prompts=2)
    assert report.failing_layer == name and "times the adapter's update" in report.reasons[0]


def test_a_lost_lora_bias_is_found(tmp_path):
    base = save_tiny_model(tmp_path / "base", "qwen2")
    adapter = save_peft_adapter(tmp_path / "adapter", base, lora_bias=True, target_modules=QKV)
    write_prompts(adapter)
    merge_adapter(adapter, tmp_path / "out", dtype="float32", no_verify=True)
    name = f"{FIRST}self_attn.v_proj.bias"
    original = load_file(base / "model.safetensors")[name]
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({name: original}))
    report = verify_export(adapter, tmp_path / "out", max_prompts=2)
    assert report.failing_layer == name


def test_long_prompts_and_continuations_stay_within_the_context(tmp_path):
    base = save_tiny_model(tmp_path / "base", "gpt2", n_positions=16, max_position_embeddings=16)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=GPT2)
    merge_adapter(adapter, tmp_path / "out", dtype="float32", no_verify=True)
    write_prompts(adapter, 1, 40, 30)
    report = verify_export(adapter, tmp_path / "out", max_new_tokens=64)
    assert report.same_model, report.summary()
    assert 8 <= report.numbers["tokens"] <= 15  # 8 of the prompt and 1 to 8 of its continuation
