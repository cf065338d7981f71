"""What an optimizer keeps beside the parameters: counted on the optimizer itself, with parameters on `meta`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PAGED_FROM = 100_000
"""Parameters at least this large have their state in paged (host) memory: `Optimizer8bit.get_state_buffer`."""


@dataclass(frozen=True)
class OptimizerBytes:
    """Memory of an optimizer beside the parameters and their gradients.

    Attributes:
        device: state on the device, exact.
        host: state that bitsandbytes pages, in host memory.
        step: what a step allocates and frees again.
        known: False where the optimizer could not be tried, and two float32 tensors per parameter are assumed.
    """

    device: int
    host: int
    step: int
    known: bool = True


def optimizer_bytes(args: Any, shapes: Sequence[torch.Size]) -> OptimizerBytes:
    """The state of `args.optim` for float32 parameters of these shapes.

    Args:
        args: transformers' TrainingArguments: `optim`, `optim_args`.
        shapes: of the trained parameters.
    """
    numel = sum(shape.numel() for shape in shapes)
    # A step of all layers takes seconds: two parameters of a shape stand for all, the second for itself alone, so that
    # a tensor that all parameters share, of which the last use is taken below, counts once.
    tried = [
        (shape, times) for shape, count in Counter(shapes).items() for times in ((count - 1, 1) if count > 1 else (1,))
    ]
    try:
        state, paged, step = _state(
            args, [nn.Parameter(torch.empty(shape, device="meta")) for shape, _ in tried], numel
        )
    except (ValueError, ImportError, RuntimeError, NotImplementedError, TypeError, AttributeError):
        return OptimizerBytes(8 * numel, 0, 4 * numel, known=False)
    tensors = {id(t): (t, times) for (_, times), kept in zip(tried, state, strict=True) for t in kept}.values()
    host = sum(times * t.nbytes for t, times in tensors if paged and t.dim() > 0 and t.numel() >= PAGED_FROM)
    device = sum(times * t.nbytes for t, times in tensors) - host
    return OptimizerBytes(device, host, step)


def _state(args: Any, parameters: list[nn.Parameter], numel: int) -> tuple[list[list[Tensor]], bool, int]:
    """The tensors that the optimizer keeps for each parameter; whether it pages; bytes of a step's temporaries.

    Args:
        numel: weights of all trained parameters, of which `parameters` may be a part.
    """
    from transformers import Trainer

    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(copy.copy(args))
    if cls.__module__.startswith("bitsandbytes."):
        paged = kwargs.pop("is_paged", False)
        optimizer = cls(parameters, **kwargs)
        for number, parameter in enumerate(parameters):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
        return _tensors(optimizer, parameters), paged, 0
    fused = kwargs.pop("fused", False)  # the meta device has no kernel for it
    optimizer = cls(parameters, **kwargs)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    tensors = _tensors(optimizer, parameters)
    if not fused:  # the step counter stays on the CPU
        tensors = [[t for t in kept if t.dim() > 0] for kept in tensors]
    if cls.__module__.startswith("torch.optim"):  # steps all parameters at once, with a temporary tensor for each
        return tensors, False, 0 if fused else 4 * numel
    return tensors, False, 3 * max(parameter.nbytes for parameter in parameters)


def _tensors(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    return [[v for v in optimizer.state[p].values() if isinstance(v, Tensor)] for p in parameters]
