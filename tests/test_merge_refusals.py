"""What cannot be merged is refused in a sentence that names it, and nothing is left behind."""

from __future__ import annotations

import json

import pytest
import torch
from merging import ALL, load_strictly, save_peft_adapter, vouch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save_tiny_model

from qpsft.errors import BaseModelError, ExportError, NotTheSameModelError, QpsftError
from qpsft.merge import merge_adapter
from qpsft.merge.options import parse_size
from qpsft.model.base import load_base


@pytest.fixture
def base(tmp_path):
    return save_tiny_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return save_peft_adapter(tmp_path / "adapter", base)


def refused(kind, match, adapter, **options):
    with pytest.raises(kind, match=match) as caught:
        merge_adapter(adapter, **{"no_verify": True} | options)
    assert isinstance(caught.value, QpsftError) and caught.value.todo
    assert [path.name for path in adapter.parent.iterdir() if "merg" in path.name] == []
    return caught.value


def edit_adapter(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    vouch(adapter)


def edit_adapter_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_not_an_adapter(tmp_path, base, adapter):
    refused(BaseModelError, "nowhere does not exist, so it is not an adapter's folder", tmp_path / "nowhere")
    assert "whole model" in refused(BaseModelError, "base has no adapter_config.json", base).todo
    refused(BaseModelError, "config.json is a file", base / "config.json")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text('{"peft_type": "LO')
    refused(BaseModelError, "cut/adapter_config.json is not valid JSON", tmp_path / "cut")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(BaseModelError, r"has no adapter_model.safetensors; it holds adapter_model.bin", adapter)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is not known"),
        ({"onto": "base"}, "onto 'base' is not known"),
        ({"max_shard_size": "2 parsecs"}, "max_shard_size '2 parsecs' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size 0 is not a size"),
    ],
)
def test_unknown_options(adapter, options, match):
    refused(ExportError, match, adapter, **options)


def test_sizes():
    sizes = {"2GB": 2 * 10**9, "1.5 gb": 1_500_000_000, "500MB": 5 * 10**8, "1GiB": 2**30, "12": 12, 77: 77}
    assert {text: parse_size(text) for text in sizes} == sizes


def test_another_base(tmp_path, adapter):
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=3)
    error = refused(BaseModelError, "and .*other is another model", adapter, base=str(other))
    assert str(tmp_path / "base") in error.what and str(other) in error.what


def test_a_base_that_changed(base, adapter):
    edit_config(base, rope_theta=5.0)
    refused(BaseModelError, "is another model", adapter)


def test_another_shape(tmp_path, base, adapter):
    """The same configuration, but the file's matrices do not fit it."""
    edit_adapter(adapter, lambda t: t.update({k: v[:, :32].contiguous() for k, v in t.items() if "k_proj.lora_A" in k}))
    error = refused(BaseModelError, r"has shape \(4, 32\); on .*base, .* it would have \(4, 64\)", adapter)
    assert "layers.0.self_attn.k_proj.lora_A.weight" in error.what


def test_without_a_record(adapter):
    (adapter / "base_quantization.json").unlink()
    error = refused(BaseModelError, "has no base_quantization.json", adapter)
    assert "original weights" in error.todo


def test_a_base_that_is_gone(base, adapter):
    base.rename(base.with_name("moved"))
    error = refused(BaseModelError, "that the adapter in .*adapter was trained on cannot be had", adapter)
    assert "--base" in error.todo
    merge_adapter(adapter, base=str(base.with_name("moved")), no_verify=True)


def test_a_base_on_the_hub_without_network(monkeypatch, adapter):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(BaseModelError, "not on this machine and cannot be reached", adapter, base="nobody/no-model")
    assert "hf download nobody/no-model" in error.todo


def test_a_missing_shard(tmp_path, base):
    load_strictly(base).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).rename(tmp_path / "shards" / name)
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "shards")
    lost = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(BaseModelError, f"lacks 1 of .* weight files its index names: {lost.name}", adapter)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_truncated_file(base, adapter, which, keep):
    path = base / "model.safetensors" if which == "base" else adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    error = refused(BaseModelError, "truncated or not a safetensors file", adapter)
    assert str(path) in error.what


@pytest.mark.parametrize("change", [b"\xff" * 8, b"\x00" * 8, (10**6).to_bytes(8, "little"), b"12345678{]"])
def test_a_corrupt_header(adapter, change):
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[: len(change)] = change
    path.write_bytes(content)
    refused(BaseModelError, f"{path} is truncated or not a safetensors file", adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(adapter, value):
    edit_adapter(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(value))
    refused(ExportError, r"base_model\.model\..* has values that are not finite", adapter)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"],
)
def test_an_unused_tensor(adapter, key):
    edit_adapter(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 64)}))
    refused(BaseModelError, f"holds {key}, which adapter_config.json does not call for", adapter)


def test_a_missing_tensor(adapter):
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    edit_adapter(adapter, lambda tensors: tensors.pop(key))
    refused(BaseModelError, f"lacks {key}", adapter)


def test_a_module_the_base_does_not_have(adapter):
    edit_adapter_config(adapter, target_modules=["query_key_value"])
    refused(BaseModelError, "does not fit the base, a LlamaForCausalLM: .*query_key_value", adapter)
    edit_adapter_config(adapter, target_modules=ALL[:3])
    refused(BaseModelError, r"which adapter_config.json does not call for .* \(16 of its 28 tensors are", adapter)


def test_a_resized_vocabulary(adapter):
    key = "base_model.model.model.embed_tokens.weight"
    edit_adapter(adapter, lambda tensors: tensors.update({key: torch.zeros(203, 64)}))
    error = refused(BaseModelError, rf"{key} in .* has shape \(203, 64\); .* would have \(200, 64\)", adapter)
    assert "the vocabulary was resized" in error.todo


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "is for IA3, and only LoRA can be merged"),
        ({"alora_invocation_tokens": [3]}, "uses alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
    ],
)
def test_other_methods(adapter, change, match):
    edit_adapter_config(adapter, **change)
    refused(ExportError, match, adapter)


def test_a_real_adapter_of_another_method(tmp_path, base):
    model, _ = load_base(base, quantization="none", verbose=False)
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM", **targets)).save_pretrained(tmp_path / "adapter")
    refused(ExportError, "is for IA3", tmp_path / "adapter")


def test_dora_on_an_embedding(tmp_path, base):
    targets = ["q_proj", "embed_tokens"]
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=targets, use_dora=True)
    refused(ExportError, "puts DoRA on the embedding model.embed_tokens", adapter)


def test_a_bias_for_a_layer_without_one(tmp_path, base):
    adapter = save_peft_adapter(tmp_path / "adapter", base, lora_bias=True)
    refused(ExportError, r"adds a bias to model.layers.0.self_attn.q_proj \(lora_bias\), which has none", adapter)


def test_the_original_weights_of_a_base_quantized_on_disk(tmp_path, base):
    model, tokenizer = load_base(base, verbose=False)
    model.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    adapter = save_peft_adapter(tmp_path / "adapter", tmp_path / "rounded")
    refused(ExportError, "its original weights are not there", adapter, onto="original")
    refused(BaseModelError, "quantized on disk, and .* is not quantized on disk", adapter, base=str(base))
    merge_adapter(adapter, base=str(base), onto="original", no_verify=True)


def test_tied_weights_that_differ_on_disk(base, adapter):
    edit_config(base, tie_word_embeddings=True)
    record = json.loads((adapter / "base_quantization.json").read_text())
    from qpsft.model.folder import config_sha256, read_config

    record["config_sha256"] = config_sha256(read_config(base))
    (adapter / "base_quantization.json").write_text(json.dumps(record))
    refused(ExportError, "ties lm_head.weight to model.embed_tokens.weight, and the folder holds both", adapter)


def test_a_wrong_merge_is_found_and_removed(monkeypatch, adapter):
    monkeypatch.setattr(
        "qpsft.merge.adapter_file.LowRank.factors", lambda self, expert: (self.left.read(), self.right.read() * 3)
    )
    error = refused(NotTheSameModelError, "merged model is not the model that was trained", adapter, no_verify=False)
    assert error.exit_code == 1 and "q_proj" in str(error)


def test_lora_config_is_only_read(adapter):
    """Unknown keys of a newer peft are not an error: they are what peft makes of them."""
    edit_adapter_config(adapter, some_future_option=None)
    before = (adapter / "adapter_config.json").read_text()
    merge_adapter(adapter, no_verify=True)
    assert (adapter / "adapter_config.json").read_text() == before and LoraConfig.from_pretrained(adapter).r == 4
