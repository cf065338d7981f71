"""Adapters of every kind on small bases, and log-probabilities of live and merged models to compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qpsft.model.base import load_base
from qpsft.model.base_record import BaseRecord, read_base_record, source_of, write_base_record, write_for_adapter
from qpsft.model.folder import resolve_folder

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shake(model: nn.Module, size: float = 0.05) -> None:
    """Adds noise to everything that is trained, as training would have changed it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def save_peft_adapter(folder: Path, base: Path, *, load: dict[str, Any] | None = None, **config: Any) -> Path:
    """An adapter with noise in it, made and saved by plain PEFT, and the record of its base."""
    model, _ = load_base(base, verbose=False, **(load or {}))
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    shake(peft_model)
    peft_model.save_pretrained(folder)
    write_base_record(peft_model, folder)
    return folder


def whole_adapter(folder: Path) -> None:
    """The smallest files that are an adapter's, with a record that vouches for them."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    rounding = ("none", False, None, None, "float32", "float32", False, [], None)
    write_for_adapter(dataclasses.asdict(BaseRecord("0", "demo", None, "0" * 64, *rounding)), folder)


def vouch(folder: Path) -> None:
    """Writes the record anew for the adapter file that is there now, and for the base as it is now."""
    record = read_base_record(folder)
    base = source_of(resolve_folder(record.base_model_name_or_path))
    identity = {"weights_sha256": base.weights_sha256, "eos_token_ids": base.eos_token_ids}
    write_for_adapter(dataclasses.asdict(record) | identity, folder)


def tokens(vocabulary: int = 180) -> Tensor:
    return torch.randint(3, vocabulary, (4, 24), generator=torch.Generator().manual_seed(3))


def logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


def live_logprobs(adapter: Path, base: Path, ids: Tensor, **load: Any) -> tuple[Tensor, Tensor]:
    """(with the adapter, the base alone), from the live model: rounded base, PEFT's own forward."""
    model, _ = load_base(base, verbose=False, **load)
    alone = logprobs(model, ids)
    return logprobs(PeftModel.from_pretrained(model, adapter), ids), alone


def load_strictly(folder: Path) -> nn.Module:
    """Loads a merged folder as any user would; nothing may be missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
