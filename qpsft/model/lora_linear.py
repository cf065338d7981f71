"""A LoRA linear as one node of the autograd graph, for training in 16 bits.

    y = base(x) + scale · (x Aᵀ) Bᵀ        A (r, in), B (out, r): float32 parameters

PEFT's forward clones the base's output, casts A and B, multiplies, scales and adds, one kernel each, and its backward
undoes each of them. Here 16-bit copies of A (times the scale) and B are made once per optimizer step, and both products
go straight into the base's output (`addmm`). The gradients of A and B are float32, as the parameters are.

Under autocast only. In float32 PEFT's own forward runs, and its numbers stay what they were, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def fused_lora_linears(model: nn.Module, *, planned: torch.dtype | None = None) -> Iterator[list[str]]:
    """Inside the context, the LoRA linears of a model train as one autograd function each; yields their names.

    A layer runs PEFT's own forward where this one is not the same: in evaluation mode, without autocast to 16 bits,
    with dropout, DoRA or another variant, biases, several adapters, and while adapters are merged or switched off.

    Optimizers may write to parameters behind autograd's back (bitsandbytes' do), so inside the context each optimizer
    step increments the versions of its parameters. Whoever exchanges a parameter's storage must do so too
    (`torch.autograd.graph.increment_version`).

    Args:
        model: with PEFT's LoRA layers, not sharded: the copies would be of parameters that come and go.
        planned: what autocast would compute in, for a plan on the meta device, which has no autocast.
    """
    fused = {name: module for name, module in model.named_modules() if type(module) in _lora_linears()}
    before = {name: module.__dict__.get("forward") for name, module in fused.items()}
    for module in fused.values():
        module.forward = _FusedForward(module, planned)
    handle = register_optimizer_step_post_hook(_parameters_changed)
    try:
        yield list(fused)
    finally:
        handle.remove()
        for name, module in fused.items():
            del module.forward
            if before[name] is not None:
                module.forward = before[name]


def _lora_linears() -> tuple[type, ...]:
    return (lora.Linear, *(kind for kind in [getattr(lora, "Linear4bit", None)] if kind is not None))


def _parameters_changed(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    increment_version([p for group in optimizer.param_groups for p in group["params"]])


class _FusedForward:
    """Stands for the `forward` of one LoRA linear."""

    def __init__(self, module: nn.Module, planned: torch.dtype | None):
        self._module, self._by_peft, self._planned = module, module.forward, planned
        self._copies: tuple[Tensor, Tensor] | None = None
        self._of: tuple = ()  # what the copies are of

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter, dtype = self._only_adapter(), self._planned or _autocast_dtype(x.device.type)
        if args or kwargs or adapter is None or dtype not in HALF:
            return self._by_peft(x, *args, **kwargs)
        result = self._module.base_layer(x).contiguous()
        a, b = self._module.lora_A[adapter].weight, self._module.lora_B[adapter].weight
        scale = self._module.scaling[adapter]
        return _LoraLinear.apply(result, x, a, b, *self._in_16_bits(a, b, scale, dtype), scale)

    def make_planned_copies(self) -> int:
        """Makes the 16-bit copies of a plan's layer before its forward does. Returns their bytes; 0 for PEFT's own."""
        adapter = self._only_adapter()
        if adapter is None or self._planned not in HALF:
            return 0
        a, b = self._module.lora_A[adapter].weight, self._module.lora_B[adapter].weight
        return sum(copy.nbytes for copy in self._in_16_bits(a, b, self._module.scaling[adapter], self._planned))

    def _only_adapter(self) -> str | None:
        """The active adapter, where it is one, trained, and no more than two matrices and a scale."""
        module = self._module
        if not module.training or module.disable_adapters or module.merged or len(module.active_adapters) != 1:
            return None
        (adapter,) = module.active_adapters
        if adapter not in module.lora_A or adapter in module.lora_variant:
            return None
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        plain = a.bias is None and b.bias is None and isinstance(module.lora_dropout[adapter], nn.Identity)
        return adapter if plain and a.weight.dtype == b.weight.dtype == torch.float32 else None

    def _in_16_bits(self, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`scale * a` and `b`; made anew when the parameters have changed."""
        of = (a._version, b._version, a.data_ptr(), b.data_ptr(), scale, dtype)
        if self._copies is None or self._of != of:
            self._copies = (a.detach() * scale).to(dtype), b.detach().to(dtype)
            self._of = of
        return self._copies


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a type of device; None where it is off, or there is none (the meta device)."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class _LoraLinear(torch.autograd.Function):
    """Adds (x downᵀ) upᵀ to the base's output, in place: `down` is A times the scale, `up` is B, both in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.x_dtype, ctx.scale = x.dtype, scale
        ctx.down, ctx.up = down, up  # not saved as activations are, which offloading would move to the host
        x = x.to(down.dtype)
        hidden = F.linear(x, down)
        ctx.save_for_backward(x, hidden)
        ctx.mark_dirty(result)
        if result.dtype == up.dtype:
            _rows(result).addmm_(_rows(hidden), up.t())
        else:  # a float32 stream of activations, which autocast gives models with nn.LayerNorm
            result.add_(F.linear(hidden, up))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden = ctx.saved_tensors
        of_result = _rows(gradient.to(x.dtype))
        of_hidden = of_result @ ctx.up  # without the scale, which `down` has
        of_x = (of_hidden @ ctx.down).view(x.shape).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        of_a = _float32_product(of_hidden.t(), _rows(x)).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        of_b = _float32_product(of_result.t(), _rows(hidden)) if ctx.needs_input_grad[3] else None
        return gradient, of_x, of_a, of_b, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32: straight from the kernel where there is one that takes 16 bits and gives 32."""
    if left.is_cuda and not torch.version.hip:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
