"""One training micro-batch and one scoring batch, run on the meta device with the code that would really run.

transformers' model, PEFT's layers, bitsandbytes' autograd function and torch's checkpointing are the real ones; what
meta tensors cannot show is in `qpsft.plan.kernels` and `qpsft.plan.lm_head`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from qpsft.model.lora_linear import fused_lora_linears
from qpsft.plan.kernels import AsOnTarget, Target, dequantizes, kernel_workspace
from qpsft.plan.live_bytes import LiveBytes, cuda_block
from qpsft.plan.lm_head import logprobs
from qpsft.psft.lm_head import LMHead, kl_to_base, logit_scale

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        rows, length: the shape of `input_ids`.
        masked: attention gets a mask: packed rows that are not attended to piece by piece, and few models' all rows.
    """

    rows: int
    length: int
    masked: bool


@dataclass(frozen=True)
class TrainingBytes:
    """Device memory of a training micro-batch beside the weights and the gradients, which are allocated already.

    Attributes:
        saved: for the backward, alive when the forward pass through the layers is done.
        casts: of weights, which autocast keeps until the forward is done.
        forward: the most during that pass, above `saved` and `casts`.
        head_forward: the most in the LM head's forward, above the same.
        head_backward: the most in the LM head's backward, above `saved`.
        layers_backward: the most in the layers' backward, above `saved`.
        dequantized: of `layers_backward`, dequantized weights.
        offloaded: in host memory instead.
        copies: 16-bit copies of the adapter, which fused LoRA layers keep from step to step; in none of the others.
    """

    saved: int
    casts: int
    forward: int
    head_forward: int
    head_backward: int
    layers_backward: int
    dequantized: int
    offloaded: int
    copies: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        forward = self.casts + max(self.forward, self.head_forward)
        return self.saved + max(forward, self.head_backward, self.layers_backward)


def training_bytes(
    model: PeftModel,
    batch: Batch,
    target: Target,
    *,
    checkpointing: int | None,
    offloading: bool,
    base_kl: bool = False,
) -> TrainingBytes:
    """Runs a micro-batch forward and backward.

    Args:
        model: from `build_skeleton`.
        batch: the micro-batch.
        target: the device.
        checkpointing: every so many layers are recomputed in the backward; None: none.
        offloading: TRL's `activation_offloading`.
        base_kl: the loss has the divergence from the base.
    """
    live, mode, host = _tracker(target), AsOnTarget(target, batch.masked), _Offloading(offloading, model)
    _set_checkpointing(model, checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    marks = {}

    def mark(name: str) -> None:
        marks[name], marks[f"{name} peak"] = live.now, live.peak
        live.mark()

    with _fused(model, target) as copies, _autocast(target, mode), live, mode, host.hooks():
        loss = _forward(model, batch, target, lambda hidden: mark("layers"), lambda grad: mark("head"), base_kl)
        before = live.now
        mode.forward_done()
        casts = before - live.now
        host.forward_done()
        mark("forward")
        # torch.autograd.backward would take `mode` off first, and recomputation needs it
        Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    for parameter in model.parameters():
        parameter.grad = None
    saved = marks["layers"] - casts
    return TrainingBytes(
        saved=saved,
        casts=casts,
        forward=marks["layers peak"] - marks["layers"],
        head_forward=marks["forward peak"] - marks["layers"],
        head_backward=marks["head peak"] - saved,
        layers_backward=live.peak - saved,
        dequantized=live.dequantized_at_peak,
        offloaded=host.nbytes,
        copies=copies,
    )


def scoring_bytes(model: PeftModel, batch: Batch, target: Target) -> int:
    """The most that a batch of the reference pass needs beside the weights."""
    live, mode = _tracker(target), AsOnTarget(target, batch.masked)
    _set_checkpointing(model, None)
    with torch.no_grad(), _fused(model, target), _autocast(target, mode), live, mode:
        _forward(model, batch, target)
    return live.peak


def _tracker(target: Target) -> LiveBytes:
    return LiveBytes(kernel_workspace, cuda_block if target.device == "cuda" else int, dequantizes)


def _forward(
    model: PeftModel,
    batch: Batch,
    target: Target,
    layers_done: Callable[[Tensor], None] | None = None,
    head_done: Callable[[Tensor], None] | None = None,
    base_kl: bool = False,
) -> Tensor:
    """The sum of log-probabilities, the way TRL's fused LM head makes them, and of the divergence from the base."""
    base = model.get_base_model()
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long, device="meta")
    mask = {"attention_mask": torch.ones_like(ids)} if batch.masked else {}
    hidden = base.base_model(input_ids=ids, use_cache=False, **mask).last_hidden_state
    if head_done is not None:
        hidden.register_hook(head_done)
        layers_done(hidden)
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)
    total = logprobs(hidden, head, target, softcap).sum()
    if not base_kl:
        return total
    bias = getattr(head, "bias", None)
    lm_head = LMHead(head.weight, bias, logit_scale(config), softcap, target.autocast or hidden.dtype)
    supervised = hidden[:, :-1].flatten(0, 1)
    return total + kl_to_base(supervised, lm_head, supervised.detach(), lm_head)


@contextlib.contextmanager
def _fused(model: PeftModel, target: Target) -> Iterator[int]:
    """The LoRA layers that training has. Yields the bytes of their 16-bit copies, which earlier steps have made."""
    if not target.fused_lora or target.autocast is None:
        yield 0
        return
    with fused_lora_linears(model, planned=target.autocast) as names:
        yield sum(model.get_submodule(name).forward.make_planned_copies() for name in names)


@contextlib.contextmanager
def _autocast(target: Target, mode: AsOnTarget) -> Iterator[None]:
    """Tells PEFT, which asks torch, that CUDA's autocast is on; it does nothing to meta tensors by itself.

    PEFT also turns autocast off for an adapter on experts, by their device, and torch has none for `meta`.
    """
    before, original = torch.is_autocast_enabled("cuda"), torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        off = device_type == "meta" and not kwargs.get("enabled", True)
        return mode.without_casts() if off else original(device_type, *args, **kwargs)

    torch.autocast = autocast
    torch.set_autocast_enabled("cuda", target.autocast is not None and target.device == "cuda")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)
        torch.autocast = original


def _set_checkpointing(model: PeftModel, every: int | None) -> None:
    """Checkpoints every so many layers; None: off."""
    base = model.get_base_model()
    current = hasattr(base, "activation_checkpointing_enable")  # how newer versions of transformers call it
    (base.activation_checkpointing_disable if current else base.gradient_checkpointing_disable)()
    base.disable_input_require_grads()
    if every is not None:
        enable = base.activation_checkpointing_enable if current else base.gradient_checkpointing_enable
        enable({"use_reentrant": False}, **({} if every == 1 else {"every_n_layers": every}))
        base.enable_input_require_grads()


class _Offloading:
    """`trl.models.activation_offloading.OffloadActivations`: what it moves, what it keeps, and for how long.

    A tensor saved for the backward goes to host memory, and its device memory is kept until five more tensors have been
    saved. What is saved again meanwhile, and what is small or a weight, stays.
    """

    smallest = 1024
    stash_size = 5

    def __init__(self, on: bool, model: nn.Module):
        self.on = on
        self.nbytes = 0
        self._count = 0
        self._stash: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}
        self._weights = {id(parameter.untyped_storage()) for parameter in model.parameters()}

    def hooks(self) -> contextlib.AbstractContextManager:
        if not self.on:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def forward_done(self) -> None:
        self._stash.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        self._count += 1
        source = tensor.untyped_storage()
        stashed = any(source is storage for _, storage in self._stash.values())
        if stashed or tensor.nbytes < self.smallest or id(source) in self._weights:
            return tensor
        for number in [number for number in self._stash if number <= self._count - self.stash_size]:
            del self._stash[number]
        broadcast = 0 in tensor.stride()
        held = tensor if broadcast or (tensor.is_contiguous() and tensor.storage_offset() == 0) else tensor.clone()
        self._stash[self._count] = held, source
        self.nbytes += source.nbytes() if broadcast else tensor.nbytes
        return _Offloaded(tensor.shape, tensor.stride(), tensor.dtype)

    def _unpack(self, saved: Tensor | _Offloaded) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return torch.empty_strided(saved.shape, saved.strides, dtype=saved.dtype, device="meta")


@dataclass(frozen=True)
class _Offloaded:
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
