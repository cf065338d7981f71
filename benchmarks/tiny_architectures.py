"""Tiny random models of the architectures that people fine-tune: what `architectures.py` and the tests try."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 400
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
DELTANET = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
PER_LAYER = {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# llama.cpp does not read which layers of a Gemma 3 slide: all but every sixth
GEMMA3 = {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6}
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
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
QWEN3_5 = DELTA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                                       "mrope_section": [2, 1, 1], "mrope_interleaved": True}}  # fmt: skip
LFM2 = {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 32}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}

TEXT = {  # model_type: what of its config is not as in SIZES, and the layers that all-linear adapts
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
    "gemma2": (
        {"query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True},
        LLAMA,
    ),
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
    "scoring_func": "sigmoid",
}
GLM4_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
MLA = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
ROUTED = {"experts", "gate"}
SHARED = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {  # the same. Of most, PEFT adapts the experts and the router as bare parameters, and no other MLP
    "qwen3_moe": (EXPERTS | {"norm_topk_prob": True}, ATTENTION | ROUTED),
    "mixtral": (FOUR, ATTENTION | ROUTED),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 64}, ATTENTION | SHARED),
    "qwen3_next": (
        EXPERTS | DELTA | {"shared_expert_intermediate_size": 64},
        ATTENTION | ROUTED | {"in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
    ),
    "deepseek_v3": (DEEPSEEK, MLA | ROUTED),
    "glm4_moe": (GLM4_MOE, ATTENTION | ROUTED),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}, ATTENTION | ROUTED),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2, "moe_intermediate_size": 64},
        ATTENTION | ROUTED,
    ),
    "gpt_oss": (FOUR, ATTENTION),
    "lfm2_moe": (
        EXPERTS | {"tie_word_embeddings": True, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        LFM2,
    ),
}
MULTIMODAL = {  # as their Hub folders are: one config for text, vision and sound; qpsft trains the text part
    "gemma3": (GEMMA3, LLAMA),
    "gemma4": (GEMMA4_E4B | {"final_logit_softcapping": 2.0}, LLAMA | PER_LAYER),
    "gemma4_unified": (GEMMA4_12B, LLAMA),
    "qwen3_5": (QWEN3_5, LLAMA | DELTANET),
}
OTHERS: dict[str, tuple[dict[str, Any], None]] = {  # tried by `architectures.py`, and merged in the slow tests
    "gpt2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256, "intermediate_size": 256},
        None,
    ),
    "gpt_neox": ({}, None),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0}, None),
    "starcoder2": ({}, None),
    "stablelm": ({}, None),
    "glm4": ({"pad_token_id": 0}, None),
    "cohere2": (SLIDING | {"pad_token_id": 0, "tie_word_embeddings": True, "rotary_pct": 1.0}, None),
    "exaone4": ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, None),
    "ernie4_5": ({}, None),
    "hunyuan_v1_dense": ({}, None),
    "seed_oss": ({}, None),
    "nemotron": ({}, None),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, None),
    "phimoe": (FOUR, None),
    "dots1": (GLM4_MOE | SLIDING | {"n_shared_experts": 1, "num_key_value_heads": 4, "scoring_func": "sigmoid"}, None),
    "minimax_m2": (FOUR | {"rotary_dim": 16, "scoring_func": "sigmoid"}, None),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 64}, None),
    "jamba": ({"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
               "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "pad_token_id": 0}, None),
}  # fmt: skip
ARCHITECTURES = TEXT | MIXTURES | OTHERS | MULTIMODAL


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_bpe_tokenizer(folder: Path, texts: Iterable[str], size: int) -> None:
    """Writes a byte-level BPE tokenizer that splits texts as GPT-2's does, with ChatML as its chat template.

    Args:
        texts: what its merges are learnt from.
        size: its tokens at most.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["[gMASK]", "<|user|>", "<|observation|>"]  # that the converter asks of a GLM
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "vocab_size": size, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = CHATML
    whole.save_pretrained(folder)


def save_architecture(folder: Path, model_type: str, vocabulary: int = VOCABULARY) -> None:
    """Writes a random model, without a tokenizer."""
    torch.manual_seed(0)
    settings = SIZES | ARCHITECTURES[model_type][0] | {"vocab_size": vocabulary}
    computed = [name for name in settings if isinstance(getattr(CONFIG_MAPPING[model_type], name, None), property)]
    settings = {name: value for name, value in settings.items() if name not in computed}
    if "vocab_size_per_layer_input" in settings:
        settings["vocab_size_per_layer_input"] = vocabulary
    if model_type in MULTIMODAL:
        _save(AutoModelForImageTextToText.from_config(_multimodal(model_type, settings)), folder)
    else:
        _save(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)), folder)


def _multimodal(model_type: str, text: dict[str, Any]) -> PreTrainedConfig:
    """Of a model that also sees, as on the Hub: its language model is as small as the others."""
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16, "patch_size": 8}
    vision = size | {"intermediate_size": 128, "image_size": 32, "depth": 1, "num_heads": 4, "out_hidden_size": 64}
    names = ["image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id"]
    names += ["vision_start_token_id", "vision_end_token_id", "image_token_index", "boi_token_index", "eoi_token_index"]
    marks = {name: text["vocab_size"] - 1 - number for number, name in enumerate(names)}
    return CONFIG_MAPPING[model_type](
        text_config=text | {"tie_word_embeddings": True, "pad_token_id": 0},
        vision_config=vision,
        tie_word_embeddings=True,
        **marks,
        **({"audio_config": None} if model_type == "gemma4" else {}),
        **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}),
    )


def _save(model: PreTrainedModel, folder: Path) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
