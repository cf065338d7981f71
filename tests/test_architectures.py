"""Architectures people fine-tune, tiny and random: PSFT trains each in 4 bits, and the merge is the trained model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from small_runs import largest_difference, log_lines, make_config, make_rows
from tiny_models import SIZES, VOCABULARY, save_tiny_model, save_tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qpsft.errors import BaseModelError, RecipeError
from qpsft.merge import merge_adapter
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import LoraArguments

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
DELTANET = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
PER_LAYER = {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA3 = SLIDING | {"query_pre_attn_scalar": 16}
# Gemma 4: wider heads and keys used as values in full attention, per-layer embeddings, later layers with the keys and
# values of earlier ones
GEMMA4_12B = SLIDING | {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
GEMMA4_E4B = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": VOCABULARY,
}
QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LFM2 = {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 32}

TEXT = {  # model_type: what of its config is not as in tiny_models.SIZES, and the layers that all-linear adapts
    "llama": ({}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({"tie_word_embeddings": True}, LLAMA),
    "mistral": ({"sliding_window": 8}, LLAMA),
    "ministral3": ({"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, LLAMA),
    "smollm3": ({"no_rope_layers": [1, 0]}, LLAMA),
    "phi3": ({"pad_token_id": 0}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "olmo2": ({}, LLAMA),
    "olmo3": (SLIDING, LLAMA),
    "granite": ({"logits_scaling": 4.0, "embedding_multiplier": 2.0}, LLAMA),
    "gemma2": ({"query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 2.0}, LLAMA),
    "gemma3_text": (GEMMA3, LLAMA),
    "gemma4_text": (GEMMA4_E4B | {"final_logit_softcapping": 2.0}, LLAMA | PER_LAYER),
    "gemma4_unified_text": (GEMMA4_12B, LLAMA),
    "qwen3_5_text": (QWEN3_5, LLAMA | DELTANET),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, LFM2),
    # an MLP that adds the residual itself, and a mixture whose config names its experts otherwise than TRL expects
    "bloom": ({"n_layer": 2, "n_head": 4}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "mpt": ({"d_model": 64, "n_layers": 2, "n_heads": 4}, {"Wqkv", "out_proj", "up_proj", "down_proj"}),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
GLM4_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
MLA = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
ROUTED = {"experts", "gate"}
SHARED = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {  # the same. Of most, PEFT adapts the experts and the router as bare parameters, and no other MLP
    "qwen3_moe": (EXPERTS, ATTENTION | ROUTED),
    "mixtral": (FOUR, ATTENTION | ROUTED),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 64}, ATTENTION | SHARED),
    "qwen3_next": (
        EXPERTS | QWEN3_5 | {"shared_expert_intermediate_size": 64},
        ATTENTION | ROUTED | {"in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
    ),
    "deepseek_v3": (DEEPSEEK, MLA | ROUTED),
    "glm4_moe": (GLM4_MOE, ATTENTION | ROUTED),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION | ROUTED),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}, ATTENTION | ROUTED),
    "gpt_oss": (FOUR, ATTENTION),
    "lfm2_moe": (EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}, LFM2),
}
MULTIMODAL = {  # as their Hub folders are: one config for text, vision and sound; qpsft trains the text part
    "gemma3": (GEMMA3, LLAMA),
    "gemma4": (GEMMA4_E4B | {"final_logit_softcapping": 2.0}, LLAMA | PER_LAYER),
    "gemma4_unified": (GEMMA4_12B, LLAMA),
    "qwen3_5": (QWEN3_5, LLAMA | DELTANET),
}
# The default run takes the text part of a multimodal model with the whole, and merges what does not merge like a Llama.
TRAINED_SLOWLY = {"ministral3", "olmo3", "gemma3_text", "gemma4_text", "gemma4_unified_text", "qwen3_5_text"}
TRAINED_SLOWLY |= MIXTURES.keys() - {"qwen3_moe"}
MERGED_QUICKLY = {"lfm2", "phi3", "gemma3", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_moe", "deepseek_v3"}
ARCHITECTURES = TEXT | MIXTURES | MULTIMODAL


def save_multimodal(folder: Path, model_type: str) -> Path:
    """A folder such as the Hub has of a model that also sees: its language model is as small as the others."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16, "patch_size": 8}
    vision = size | {"intermediate_size": 128, "image_size": 32, "depth": 1, "num_heads": 4, "out_hidden_size": 64}
    names = ["image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id"]
    names += ["vision_start_token_id", "vision_end_token_id", "image_token_index", "boi_token_index", "eoi_token_index"]
    marks = {name: VOCABULARY - 1 - number for number, name in enumerate(names)}
    config = CONFIG_MAPPING[model_type](
        text_config=SIZES | MULTIMODAL[model_type][0] | {"tie_word_embeddings": True, "pad_token_id": 0},
        vision_config=vision,
        tie_word_embeddings=True,
        **marks,
        **({"audio_config": None} if model_type == "gemma4" else {}),
        **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}),
    )
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_base(folder: Path, model_type: str) -> Path:
    if model_type in MULTIMODAL:
        return save_multimodal(folder, model_type)
    return save_tiny_model(folder, model_type, **(TEXT | MIXTURES)[model_type][0])


def padded(rows, count: int) -> dict[str, Tensor]:
    """The first `count` rows as one batch, padded on the right."""

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [torch.tensor(row) for row in rows["input_ids"][:count]]
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad([torch.tensor(row) for row in rows["labels"][:count]], -100),
    }


def fused(model, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, fused_lm_head=True, use_cache=False).log_probs


def plain(model, batch: dict[str, Tensor], **options) -> Tensor:
    """The same from the model's own logits: all of its scaling and capping, transformers' way."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs = model(**inputs, **options).logits.float().log_softmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    return logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def gradients(trainer: PSFTTrainer, batch: dict[str, Tensor], checkpointing: bool) -> dict[str, Tensor]:
    model = trainer.model.get_base_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    trainer.model.zero_grad()
    fused(trainer.model, batch).sum().backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    return found


def kinds(quick: set[str]) -> list:
    """All model types; those that are not quick are marked slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.mark.parametrize("model_type", kinds(ARCHITECTURES.keys() - TRAINED_SLOWLY))
def test_psft_trains(tmp_path, model_type):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not in linear layers")  # the tiny embeddings weigh a lot
        base, tokenizer = load_base(save_base(tmp_path / "base", model_type), device="cpu", verbose=False)
    model = add_adapter(base, LoraArguments(lora_r=4, lora_alpha=8))
    adapted = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    _, expected = ARCHITECTURES[model_type]
    assert {name.removesuffix(".base_layer").rpartition(".")[2] for name in adapted} == expected
    linear = {name for name, module in adapted.items() if not isinstance(module, ParamWrapper)}
    assert linear <= {name.removesuffix(".base_layer") for name in quantized_linears(model.get_base_model())}

    rows = make_rows(12)
    batch = padded(rows, 3)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    settings = {"max_steps": 3, "reference_steps": 2, "learning_rate": 1e-2}
    trainer = PSFTTrainer(
        model, args=make_config(tmp_path / "out", **settings), train_dataset=rows, processing_class=tokenizer
    )
    model.train()
    trainer.train()

    lines = log_lines(trainer, "nll")
    assert lines[0]["ratio_max"] == lines[2]["ratio_max"] == 1.0 < 1.001 < lines[1]["ratio_max"]  # two snapshots
    still = [n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n and not p.abs().max() > 0]
    assert not still

    model.train()
    with torch.no_grad():
        together = fused(model, batch)
        assert together.abs().max() > 1
        assert apart(together, plain(model, batch, use_cache=False)) < 1e-5
        for row in (0, 1):  # neighbours and padding change nothing
            length = int(batch["attention_mask"][row].sum())
            alone = fused(model, {name: value[row : row + 1, :length] for name, value in batch.items()})
            assert apart(alone, together[row : row + 1, : length - 1]) < 1e-5
        assert apart(together, plain(model.eval(), batch, use_cache=True)) < 1e-5
    model.train()
    usual = gradients(trainer, batch, checkpointing=False)
    scale = max(float(gradient.abs().max()) for gradient in usual.values())
    assert largest_difference(usual, gradients(trainer, batch, checkpointing=True)) < 1e-5 * scale


@pytest.mark.parametrize("model_type", kinds(MERGED_QUICKLY))
@pytest.mark.filterwarnings("ignore:.*not in linear layers")
def test_the_merge_is_the_trained_model(tmp_path, model_type):
    base, tokenizer = load_base(save_base(tmp_path / "base", model_type), device="cpu", verbose=False)
    model = add_adapter(base, LoraArguments(lora_r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    adapter = save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(adapter)
    with (adapter / "verify_prompts.jsonl").open("w") as file:
        for ids in make_rows(4)["input_ids"]:
            file.write(json.dumps({"input_ids": ids, "prompt_length": 3}) + "\n")
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verification["same_model"]
    if model_type in MULTIMODAL:  # transformers loads it whole
        _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(info.values()), info
    if model_type == "qwen3_5":  # whose language model is loaded alone: the rest is carried along as it was
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", tmp_path / "merged"))
        seeing = [name for name in before if "visual" in name]
        assert seeing and all(torch.equal(after[name], before[name]) for name in seeing)


def test_a_model_that_cannot_be_trained_is_refused_by_name(tmp_path):
    folder = save_tiny_model(tmp_path / "base", "phimoe", num_local_experts=4, num_experts_per_tok=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not in linear layers")
        base, tokenizer = load_base(folder, device="cpu", verbose=False)
    model = add_adapter(base, LoraArguments(lora_r=4))
    with pytest.raises(RecipeError, match="phimoe models cannot be trained here: its router draws random numbers"):
        PSFTTrainer(model, args=make_config(tmp_path / "out"), train_dataset=make_rows(8), processing_class=tokenizer)


def test_a_vision_model_without_a_text_class_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    with pytest.raises(BaseModelError, match="'mistral3' model, which is not a causal language model"):
        load_base(tmp_path, device="cpu")


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2"])
def test_packed_rows_are_refused_where_they_would_see_each_other(tmp_path, model_type):
    base, tokenizer = load_base(save_base(tmp_path / "base", model_type), device="cpu", verbose=False)
    ids = torch.randint(3, 170, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(6), torch.arange(6)]).unsqueeze(0)
    packed = base(ids, position_ids=positions, use_cache=False).logits[:, 6:]
    assert apart(packed, base(ids[:, 6:], use_cache=False).logits) > 0.1
    model = add_adapter(base, LoraArguments(lora_r=4))
    with pytest.raises(RecipeError, match=f"a {model_type} model has layers that run on from one packed row"):
        PSFTTrainer(
            model,
            args=make_config(tmp_path / "out", packing=True, max_length=32),
            train_dataset=make_rows(8),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("width", [80, 96, 128, 172])
def test_a_width_that_bitsandbytes_misreads_is_refused(tmp_path, width):
    """Decided by its own kernel on this machine: the mean error of NF4 is about 0.09 standard deviations."""
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    misread = float((bnb.dequantize_4bit(codes, state) - weight).abs().mean()) > 0.1
    folder = save_tiny_model(tmp_path / "base", intermediate_size=width)
    if misread:
        with pytest.raises(BaseModelError, match=f"down_proj has {width} inputs, no multiple of the block size 64"):
            load_base(folder, device="cpu")
        load_base(folder, device="cpu", quantization="none", verbose=False)
    else:
        load_base(folder, device="cpu", verbose=False)
