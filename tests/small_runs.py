"""Small runs on the CPU: a random 4-bit Llama, ragged tokenized rows, and trainers on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from qpsft.model.base import load_base
from qpsft.psft.trainer import PSFTConfig, PSFTTrainer

VOCABULARY = 128
LOSS_SCALE = 2.0**10
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder: Path, seed: int = 0) -> Path:
    """A random Llama (2 layers, hidden 64, grouped queries) and its tokenizer, saved in `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.1,  # sharper than transformers' 0.02, so that a few steps move the probabilities
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, longest: int = 20) -> Dataset:
    """Tokenized rows of unequal length, with prompts of unequal length that are not supervised."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for _ in range(count):
        length = number(5, longest + 1)
        prompt = number(1, length - 2)
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(rows)


def make_config(out: Path, **changes: Any) -> PSFTConfig:
    """The settings of a small run: 2 rows × 2 micro-batches, K = 3, every step logged, nothing saved."""
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        reference_steps=3,
        epsilon=0.05,
        learning_rate=5e-3,
        warmup_steps=0,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    return PSFTConfig(str(out), **{**settings, **changes})


def make_lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
    return LoraConfig(**{**settings, **changes})


def make_trainer(
    base: Path,
    out: Path,
    *,
    model: PreTrainedModel | None = None,
    rows: Dataset | None = None,
    lora: LoraConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    eval_dataset: Dataset | None = None,
    data_collator: Any = None,
    trainer_class: type[PSFTTrainer] = PSFTTrainer,
    **settings: Any,
) -> PSFTTrainer:
    """A trainer on the 4-bit `base` (or on `model`, which brings its own adapter unless `lora` is given)."""
    loaded, tokenizer = load_base(base, verbose=False)
    if model is None:
        model, lora = loaded, lora or make_lora()
    return trainer_class(
        model,
        args=make_config(out, **settings),
        train_dataset=make_rows(24) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=callbacks,
        data_collator=data_collator,
    )


def policy(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def same(one: Any, other: Any) -> bool:
    """Equality bit for bit, through dicts and lists (optimizer states)."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def log_lines(trainer: PSFTTrainer, key: str = "loss") -> list[dict[str, float]]:
    """The log lines that carry `key`."""
    return [line for line in trainer.state.log_history if key in line]


class Recorder(TrainerCallback):
    """Calls `on_gradients(step)` before every optimizer step and `on_step(step)` after it; steps count from 0."""

    def __init__(self, on_gradients=None, on_step=None):
        self.on_gradients, self.on_step = on_gradients, on_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.on_gradients:
            self.on_gradients(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.on_step:
            self.on_step(state.global_step - 1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def off_by(model: nn.Module, make_loss: Callable[[], Tensor]) -> float:
    """How far a model's gradients are from those of another loss, as a share of the largest; they are left in place."""
    mine = gradients(model)
    model.zero_grad()
    make_loss().backward()
    by_hand = gradients(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = mine[name]
    return largest_difference(mine, by_hand) / max(g.abs().max() for g in by_hand.values()).item()


def in_float16(trainer: PSFTTrainer, init_scale: float = LOSS_SCALE, autocast: bool = True) -> PSFTTrainer:
    """Gives a trainer on the CPU what accelerate gives one on a GPU: float16 autocast and a GradScaler.

    Without autocast, another loss scale changes no bit of a float32 gradient: scales are powers of two.
    """
    accelerator = trainer.accelerator
    accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return trainer
