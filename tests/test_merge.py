"""The merged model is the live one: 4-bit base, adapter, PEFT's forward; for every kind of adapter and base."""

from __future__ import annotations

import pytest
import torch
from merging import ALL, largest, live_logprobs, load_strictly, logprobs, save_peft_adapter, shake, tokens
from peft import LoraConfig, get_peft_model
from tiny_models import save_tiny_model

from qpsft.errors import ExportError
from qpsft.merge import merge_adapter
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import write_base_record
from qpsft.recipe.arguments import LoraArguments

NO_QUANTIZATION = {"quantization": "none"}
QKV = ["q_proj", "k_proj", "v_proj"]


def merged_is_live(tmp_path, base, adapter, *, load=None, vocabulary=180, tolerance=1e-5):
    ids = tokens(vocabulary)
    live, alone = live_logprobs(adapter, base, ids, **(load or {}))
    report = merge_adapter(adapter, dtype="float32", no_verify=True)
    merged = load_strictly(tmp_path / "adapter-merged")
    assert largest(logprobs(merged, ids), live) < tolerance
    assert largest(alone, live) > 0.05, "the adapter does nothing, so the comparison says nothing"
    return report, merged


@pytest.mark.parametrize(
    "load",
    [{}, {"quantization": "fp4"}, {"double_quant": False}, NO_QUANTIZATION],
    ids=["nf4", "fp4", "single", "none"],
)
def test_roundings(tmp_path, load):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, load=load)
    merged_is_live(tmp_path, base, adapter, load=load)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"intermediate_size": 172, "hidden_size": 60, "head_dim": 14}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma2", {"tie_word_embeddings": True}),
    ],
)
def test_architectures(tmp_path, model_type, config):
    """Rows that do not fill whole blocks, biases, norms on the heads, scaled embeddings."""
    base = save_tiny_model(tmp_path / "base", model_type, **config)
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    _, merged = merged_is_live(tmp_path, base, adapter)
    tied = config.get("tie_word_embeddings", False)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("load", [{}, NO_QUANTIZATION], ids=["nf4", "none"])
def test_layers_stored_transposed(tmp_path, load):
    """GPT-2's Conv1D holds (in, out), and bitsandbytes rounds the transpose."""
    base = save_tiny_model(tmp_path / "base", "gpt2")
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": not load}
    config["fan_in_fan_out"] = load == NO_QUANTIZATION
    adapter = save_peft_adapter(tmp_path / "adapter", base, load=load, **config)
    merged_is_live(tmp_path, base, adapter, load=load)


ADAPTERS = {
    "two modules only": {"target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"target_modules": r".*layers\.1\..*\.(up|down)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 1}},
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.3},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "head": {"target_modules": [*ALL, "lm_head"]},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms in full": {"modules_to_save": ["input_layernorm", "model.norm"]},
    "token rows": {"trainable_token_indices": [3, 5, 170]},
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(tmp_path, config):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, **config)
    merged_is_live(tmp_path, base, adapter)


BIASES = {
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": QKV},
}


@pytest.mark.parametrize("config", BIASES.values(), ids=BIASES)
def test_biases(tmp_path, config):
    base = save_tiny_model(tmp_path / "base", "qwen2")
    adapter = save_peft_adapter(tmp_path / "adapter", base, load=NO_QUANTIZATION, **config)
    merged_is_live(tmp_path, base, adapter, load=NO_QUANTIZATION)


TIED = {
    "in full": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "token rows": {"trainable_token_indices": [3, 5, 170]},
}


@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_tied_embeddings_that_are_trained_stay_tied(tmp_path, config):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_peft_adapter(tmp_path / "adapter", base, **config)
    _, merged = merged_is_live(tmp_path, base, adapter)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": [*QKV, "embed_tokens"]},
    ],
)
def test_an_adapter_that_would_untie_them_is_refused(tmp_path, config):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_peft_adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(ExportError, match=r"ties lm_head.weight to model.embed_tokens.weight, and the adapter changes"):
        merge_adapter(adapter, no_verify=True)
    assert not (tmp_path / "adapter-merged").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_take_from_the_base(tmp_path, init):
    """As PEFT saves them they are refused by name; as the plain LoRA that PEFT converts them to, they are merged."""
    base = save_tiny_model(tmp_path / "base")
    model, _ = load_base(base, quantization="none", verbose=False)
    alone = logprobs(model, tokens())
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**settings, init_lora_weights=init))
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path / "initial")
    peft_model.peft_config["default"].init_lora_weights = init
    shake(peft_model)
    trained = logprobs(peft_model, tokens())
    write_base_record(peft_model, tmp_path / "adapter")
    peft_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=f"{init!r}: training started by taking .* Save it with PEFT's path_initial"):
        merge_adapter(tmp_path / "adapter", no_verify=True)
    peft_model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merge_adapter(tmp_path / "adapter", dtype="float32", no_verify=True)
    assert largest(logprobs(load_strictly(tmp_path / "adapter-merged"), tokens()), trained) < 1e-5
    assert largest(trained, alone) > 0.05


def test_in_shards(tmp_path):
    base = save_tiny_model(tmp_path / "whole")
    load_strictly(base).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 3
    save_tiny_model(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).rename(tmp_path / "base" / name)
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "base")
    merged_is_live(tmp_path, tmp_path / "base", adapter)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_base_that_is_quantized_on_disk(tmp_path, quantization, double_quant):
    plain = save_tiny_model(tmp_path / "plain")
    model, tokenizer = load_base(plain, quantization=quantization, double_quant=double_quant, verbose=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "base")
    report, merged = merged_is_live(tmp_path, tmp_path / "base", adapter)
    assert getattr(merged.config, "quantization_config", None) is None


def test_the_real_model(tmp_path, stories):
    """Pretrained weights, 15 steps of training: the adapter's update is of a real size."""
    torch.manual_seed(0)
    model, tokenizer = load_base(stories, verbose=False)
    peft_model = add_adapter(model, LoraArguments(lora_r=8, lora_alpha=16)).train()
    ids = torch.tensor(
        [tokenizer("Lily and the red ball. They went to the park and played with a big dog.")["input_ids"]]
    )
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(15):
        peft_model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(peft_model, tmp_path / "adapter")
    text = "One day, Lily went to the park with her mom. She saw a big dog and a red ball. The dog was happy to play."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    live, alone = live_logprobs(tmp_path / "adapter", stories, ids)
    report = merge_adapter(tmp_path / "adapter", dtype="float32", no_verify=True)
    merged = load_strictly(tmp_path / "adapter-merged")
    found = logprobs(merged, ids)
    label = ids[:, 1:, None]
    assert largest(found[:, :-1].gather(-1, label), live[:, :-1].gather(-1, label)) < 1e-5
    assert largest(found, alone) > 0.05
    live, found = live.double().log_softmax(-1), found.double().log_softmax(-1)
    assert (live.exp() * (live - found)).sum(-1).max() < 1e-10
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert report.low_rank == 35
