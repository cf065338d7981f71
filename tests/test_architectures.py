"""Architectures people fine-tune, tiny and random: PSFT trains each in 4 bits, and the merge is the trained model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import architectures
import pytest
import torch
from bitsandbytes import functional as bnb
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from small_runs import largest_difference, log_lines, make_config, make_rows
from tiny_architectures import ARCHITECTURES, MIXTURES, MULTIMODAL, OTHERS, save_architecture
from tiny_models import save_tiny_model, save_tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qpsft.errors import BaseModelError, RecipeError
from qpsft.merge import merge_adapter
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import LoraArguments

# The default run takes the text part of a multimodal model with the whole, and merges what does not merge like a Llama.
TRAINED_SLOWLY = {"ministral3", "olmo3", "gemma3_text", "gemma4_text", "gemma4_unified_text", "qwen3_5_text"}
TRAINED_SLOWLY |= MIXTURES.keys() - {"qwen3_moe"}
NAMED = [name for name in ARCHITECTURES if name not in OTHERS]
MERGED_QUICKLY = {"lfm2", "phi3", "gemma3", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_moe", "deepseek_v3"}


def save_base(folder: Path, model_type: str) -> Path:
    save_architecture(folder, model_type)
    save_tokenizer(folder)
    return folder


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


def kinds(quick: set[str], names: Iterable[str] = ARCHITECTURES) -> list:
    """Model types; those that are not quick are marked slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", kinds(set(NAMED) - TRAINED_SLOWLY, NAMED))
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


def test_the_page_is_what_the_program_found():
    record = json.loads(architectures.RECORD.read_text(encoding="utf-8"))
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(record)
    assert record["found"].keys() <= ARCHITECTURES.keys()
    refused = architectures.page({"versions": {}, "found": {"llama": {"train": "yes", "merge": "no: of a reason"}}})
    assert "| `llama` | yes | no (1) | – | – | – | – |" in refused and "1. of a reason" in refused
