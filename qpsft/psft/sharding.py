"""Parameters sharded over several cards by FSDP2, so that a 4-bit base too large for one card's training fits on two.

FSDP2 (`fully_shard`, through accelerate) turns every parameter into a DTensor, of which each process holds a part.
What that changes for Proximal SFT (tests/two_processes.py tests each):

- The reference takes the policy's place by its *values*. Setting a DTensor's `.data` raises no error and changes
  nothing, since FSDP gathers from a buffer of its own: every ratio would be 1.
- A forward gathers weights from all processes, so all must make equally many: the reference pass takes the
  micro-batches as they are, instead of regrouping rows by length.
- FSDP's own mixed precision would cast the packed 4-bit weights like numbers, and reduce gradients in 16 bits. It is
  turned off: autocast does what it does on one card, and the adapter is float32.
- accelerate does not shard 4-bit weights that are stored as uint8: it warns once, and every card holds them whole.
  Stored as a float dtype, which are the same bytes under another name, they are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qpsft.errors import RecipeError
from qpsft.model.base import fsdp_is_on
from qpsft.model.hardware import is_of_bitsandbytes
from qpsft.psft.losses import LOSSES, TOP_ENTROPY

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def fsdp_is_asked(args: TrainingArguments) -> bool:
    """Whether a run with these options will be sharded: by its own `fsdp`, or by `accelerate launch`."""
    return bool(args.fsdp) or fsdp_is_on()


def check_sharding(trainer: Trainer) -> None:
    """Looks at a trainer before it shards its model, and turns FSDP's own mixed precision off.

    Raises:
        RecipeError: DeepSpeed, FSDP 1, FSDP with float16, checkpoints in shards, bitsandbytes' optimizers, `base_kl`
            or EAFT, or with 4-bit weights whose storage differs from the other frozen weights' dtype.
    """
    if trainer.is_deepspeed_enabled:
        raise RecipeError("DeepSpeed is not supported.", "Use torchrun (DDP), or accelerate's FSDP 2 for a large base.")
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP 1 is not supported: it flattens parameters, and the adapter is float32 beside a 16-bit base.",
            "Set fsdp_version: 2 in accelerate's configuration.",
        )
    if trainer.args.mixed_precision == "fp16":
        raise RecipeError("FSDP with float16 is not supported.", "Use cards with bfloat16, or dtype float32.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise RecipeError(
            "FSDP with checkpoints in shards is not supported: ours hold whole adapters.",
            "Set fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration.",
        )
    optimizer = getattr(trainer.args.optim, "value", trainer.args.optim)
    if is_of_bitsandbytes(optimizer):
        raise RecipeError(
            f"optim {optimizer} is not supported with FSDP: bitsandbytes' optimizers cannot step sharded parameters.",
            "Use adamw_torch_fused, the default.",
        )
    if trainer.args.base_kl or TOP_ENTROPY in LOSSES[trainer.args.loss_type].needs:
        what = f"base_kl {trainer.args.base_kl:g}" if trainer.args.base_kl else f"loss_type {trainer.args.loss_type}"
        raise RecipeError(
            f"{what} is not supported with FSDP: it needs the LM head after the forward, when FSDP has taken it apart.",
            "Use several cards without FSDP, or one of the other losses.",
        )
    frozen = trainer.model.get_input_embeddings().weight.dtype
    for name, parameter in trainer.model.named_parameters():
        if type(parameter).__name__ == "Params4bit" and parameter.dtype != frozen:
            raise RecipeError(
                f"FSDP needs 4-bit weights stored in the dtype of the other frozen weights: {name} is stored as "
                f"{_name(parameter.dtype)}, the embedding is {_name(frozen)}.",
                f"Load it with bnb_4bit_quant_storage={_name(frozen)}; qpsft's load_base does under accelerate launch.",
            )
    plugin.mixed_precision_policy = None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def exchanged(policy: Mapping[str, Tensor], copy: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, sharded parameters hold their copy's values and the copy theirs; outside, their own, bit for bit."""
    _exchange(policy, copy)
    try:
        yield
    finally:
        _exchange(policy, copy)


@torch.no_grad()
def _exchange(policy: Mapping[str, Tensor], copy: Mapping[str, Tensor]) -> None:
    for name, parameter in policy.items():
        mine, other = parameter.to_local(), copy[name].to_local()
        kept = mine.clone()
        mine.copy_(other)
        other.copy_(kept)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; others as they are. Every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` sharded as `like` is, if that is. Every process must call it with the same values."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def whole_policy(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained parameters of a sharded model, gathered; None if it is not sharded. Every process must call it."""
    if not is_sharded(model):
        return None
    return {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
