"""A merged folder has all that the base's folder has: processors, layers for multi-token prediction, other towers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from merging import save_peft_adapter
from safetensors.torch import load_file, save_file
from test_architectures import save_base
from tiny_architectures import EXPERTS
from tiny_models import edit_config, save_tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from qpsft.merge import merge_adapter
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.verify import verify_export

WEIGHTS = "model.safetensors"


def add_layers_ahead(base: Path, prefix: str, **config) -> dict[str, torch.Tensor]:
    """Gives a base a layer for multi-token prediction, a changed copy of its last one, stored as `prefix`…."""
    tensors = load_file(base / WEIGHTS)
    last = "model.layers.1."
    ahead = {prefix + name.removeprefix(last): value + 1 for name, value in tensors.items() if name.startswith(last)}
    save_file(tensors | ahead, base / WEIGHTS, metadata={"format": "pt"})
    edit_config(base, **config)
    return ahead


KINDS = {
    "by their name": (
        "llama",
        {},
        "mtp.layers.0.",
        {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
    ),
    "as a further layer": ("llama", {}, "model.layers.2.", {"num_nextn_predict_layers": 1}),
    "of experts": ("qwen3_moe", EXPERTS, "model.layers.2.", {"num_nextn_predict_layers": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_for_multi_token_prediction_survive_with_their_config(tmp_path, kind):
    model_type, settings, prefix, config = KINDS[kind]
    base = save_tiny_model(tmp_path / "base", model_type, **settings)
    ahead = add_layers_ahead(base, prefix, **config)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    report = merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16", no_verify=True)
    assert verify_export(adapter, tmp_path / "merged", max_prompts=2, max_new_tokens=4).same_model
    assert report.left_out == []
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(torch.equal(merged[name], value) for name, value in ahead.items())
    assert config.items() <= json.loads((tmp_path / "merged" / "config.json").read_text()).items()


def test_without_their_tensors_the_config_names_none(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    edit_config(base, num_nextn_predict_layers=1, mtp_num_hidden_layers=2, text={"num_mtp_layers": 1})
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "merged", no_verify=True)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["mtp_num_hidden_layers"], config["text"]["num_mtp_layers"]) == (
        0, 0, 0,
    )  # fmt: skip
    assert config["num_hidden_layers"] == 2


def test_other_tensors_are_not_taken_for_such(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    add_layers_ahead(base, "model.layers.7.", num_nextn_predict_layers=1)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    report = merge_adapter(adapter, tmp_path / "merged", no_verify=True)
    assert len(report.left_out) == 9
    stray = {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}
    save_file(load_file(tmp_path / "merged" / WEIGHTS) | stray, tmp_path / "merged" / WEIGHTS)
    report = verify_export(adapter, tmp_path / "merged", max_prompts=1, max_new_tokens=0)
    assert "is no weight of the model" in report.summary()


def test_processors_come_from_the_base(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    contents = {
        "preprocessor_config.json": '{"image_processor_type": "PixtralImageProcessor"}',
        "processor_config.json": '{"processor_class": "PixtralProcessor"}',
        "video_preprocessor_config.json": '{"auto_map": {"AutoVideoProcessor": "code.Processor"}}',
    }
    for name, content in contents.items():
        (base / name).write_text(content)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    report = merge_adapter(adapter, tmp_path / "merged", no_verify=True)
    *data, code = contents
    assert all((tmp_path / "merged" / name).read_text() == contents[name] for name in data)
    assert not (tmp_path / "merged" / code).exists() and set(data) < set(report.files)


def test_a_vision_tower_that_is_quantized_on_disk(tmp_path):
    """Its codes would be nothing without their scales: it is stored as the values that they stand for."""
    plain = save_base(tmp_path / "plain", "gemma3")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForImageTextToText.from_pretrained(plain, quantization_config=settings)
    packed.save_pretrained(tmp_path / "base")
    for file in plain.glob("token*"):
        shutil.copy(file, tmp_path / "base")
    adapter = save_peft_adapter(
        tmp_path / "adapter", tmp_path / "base", target_modules=r".*language_model.*q_proj|model\.layers.*q_proj"
    )
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", no_verify=True)
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    towers = {
        name: module for name, module in packed.named_modules() if "vision" in name and hasattr(module, "quant_state")
    }
    assert towers
    for name, module in towers.items():
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert torch.equal(merged.get_submodule(name).weight.data, expected), name


def test_an_option_of_a_newer_peft(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_new_lora": None, "new_sizes": {}, "new_switch": False}))
    merge_adapter(adapter, tmp_path / "merged", no_verify=True)
    path.write_text(json.dumps(config | {"use_new_lora": True, "new_sizes": {"q_proj": 3}, "new_switch": False}))
    with pytest.warns(UserWarning, match=r"adapter_config\.json sets new_sizes, use_new_lora, which this version"):
        merge_adapter(adapter, tmp_path / "again", no_verify=True)
    with pytest.warns(UserWarning, match="sets new_sizes, use_new_lora, .* Upgrade peft"):
        AdapterFolder(adapter).base_folder()
