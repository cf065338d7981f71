"""Adapters on the experts of a mixture and on its router: every layout of the experts on disk, in memory, in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging import largest, live_logprobs, load_strictly, logprobs, save_peft_adapter, tokens, vouch
from safetensors.torch import load_file, save_file
from tiny_architectures import DEEPSEEK, EXPERTS, FOUR
from tiny_models import save_tiny_model

from qpsft.merge import merge_adapter
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.recipe.arguments import LoraArguments
from qpsft.verify import verify_export

STACKED = ["experts.gate_up_proj", "experts.down_proj"]

MIXTURES = {  # model type, its config, what is adapted
    "stored by expert, fused while loading": ("qwen3_moe", EXPERTS, {"target_parameters": STACKED}),
    "the router too": ("mixtral", FOUR, {"target_parameters": [*STACKED, "gate.weight"]}),
    "as PEFT resolves all-linear": ("deepseek_v3", DEEPSEEK, {"target_modules": "all-linear"}),
    "stored in one tensor": ("granitemoe", FOUR, {"target_parameters": STACKED}),
    "stored in one tensor as (in, out)": ("gpt_oss", FOUR, {"target_parameters": STACKED}),
    "one of the two": ("qwen3_moe", EXPERTS, {"target_parameters": STACKED[1:], "use_rslora": True}),
    "trained in full": ("qwen3_moe", EXPERTS, {"modules_to_save": ["experts"]}),
    "trained in full, one tensor": ("granitemoe", FOUR, {"modules_to_save": ["experts"]}),
}

SLOW = {"as PEFT resolves all-linear", "one of the two", "trained in full, one tensor"}


def merged_is_live(tmp_path: Path, base: Path, adapter: Path, **load) -> None:
    ids = tokens()
    live, alone = live_logprobs(adapter, base, ids, **load)
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", no_verify=True)
    assert largest(logprobs(load_strictly(tmp_path / "merged"), ids), live) < 1e-5 < 0.05 < largest(alone, live)


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in MIXTURES]
)
def test_the_merge_is_the_live_model(tmp_path, kind):
    model_type, config, adapted = MIXTURES[kind]
    base = save_tiny_model(tmp_path / "base", model_type, **config)
    adapter = save_peft_adapter(tmp_path / "adapter", base, **{"target_modules": ["q_proj", "o_proj"]} | adapted)
    merged_is_live(tmp_path, base, adapter)
    report = verify_export(adapter, tmp_path / "merged", max_prompts=2, max_new_tokens=4)
    assert report.same_model, report.summary()
    names = load_file(base / "model.safetensors").keys()
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == names


def test_in_pieces_smaller_than_an_expert(tmp_path, monkeypatch):
    monkeypatch.setattr("qpsft.merge.weights.PIECE", 640)
    base = save_tiny_model(tmp_path / "base", "gpt_oss", **FOUR)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=STACKED)
    merged_is_live(tmp_path, base, adapter)


def test_an_expert_that_misses_its_update_is_found(tmp_path):
    base = save_tiny_model(tmp_path / "base", "qwen3_moe", **EXPERTS)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=STACKED)
    merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16", no_verify=True)
    file, name = tmp_path / "merged" / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj.weight"
    original = load_file(base / "model.safetensors")[name].bfloat16()
    save_file(load_file(file) | {name: original}, file, metadata={"format": "pt"})
    report = verify_export(adapter, tmp_path / "merged", max_prompts=2, max_new_tokens=4)
    assert report.failing_layer == "model.layers.1.mlp.experts.gate_up_proj"


def test_as_transformers_4_had_the_experts(tmp_path):
    """A pair of matrices for every linear layer of each. The merge is W + B A, and PEFT's live model, which fuses."""
    base = save_tiny_model(tmp_path / "base", "qwen3_moe", **EXPERTS)
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file, generator = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(5)
    tensors, original = load_file(file), load_file(base / "model.safetensors")
    experts = [name.removesuffix(".weight") for name in original if ".experts." in name]
    for name in experts:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(64, 4, generator=generator) * 0.05
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    vouch(adapter)
    merged_is_live(tmp_path, base, adapter)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in experts:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert largest(merged[f"{name}.weight"], original[f"{name}.weight"] + 2 * b @ a) < 1e-6


def test_what_is_trained_of_a_mixture_is_said(tmp_path):
    base = save_tiny_model(tmp_path / "base", "deepseek_v3", **DEEPSEEK)
    model, _ = load_base(base, device="cpu", verbose=False)
    with pytest.warns(UserWarning, match=r"\(down_proj, gate.weight, gate_up_proj\)\. 6 linear layers .*mlp.down_proj"):
        add_adapter(model, LoraArguments(lora_r=4))
