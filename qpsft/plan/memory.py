"""From parts to the peak: what is alive at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from qpsft.plan.cards import CONTEXT
from qpsft.plan.live_bytes import cuda_block
from qpsft.plan.optimizers import OptimizerBytes
from qpsft.plan.passes import Activations
from qpsft.plan.weights import WeightBytes

FRAGMENTATION = 0.1
"""Allowance, as a share of what comes and goes: torch's allocator cannot fill every gap between blocks."""

OF_ACTIVATIONS = ("saved activations", "layer working set", "dequantization buffers", "LM-head tile", "scoring pass")


@dataclass(frozen=True)
class Settings:
    """What the sums need to know of a recipe.

    Attributes:
        cuda: on a CUDA device, else in the CPU's memory.
        capability: CUDA's (major, minor), or ROCm's architecture name, by which the BLAS workspaces are sized.
        reference: "device", "host" or "none".
        accumulates: more than one micro-batch per optimizer step.
        processes: of DDP.
        window_bytes: token ids, masks and old log-probabilities of the accumulation window.
        layers: of the model.
    """

    cuda: bool
    capability: tuple[int, int] | str
    reference: str
    accumulates: bool
    processes: int
    window_bytes: int
    layers: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        parts: each part by name, in the table's order.
        held: alive all the time.
        phases: total of each phase of an optimizer step, `held` included.
        margin: the last two parts, which torch does not count.
        host: in host memory for the device's sake: the reference, paged state, offloaded activations.
    """

    parts: dict[str, int]
    held: int
    phases: dict[str, int]
    margin: int
    host: int

    @property
    def peak(self) -> int:
        """What `torch.cuda.max_memory_allocated()` would say after a few steps."""
        return max(self.phases.values())


def add_up(weights: WeightBytes, optimizer: OptimizerBytes, activations: Activations, settings: Settings) -> Memory:
    """The parts of a run and the phases of its steps; without what activations need, where they are not known."""
    training, adapter = activations.training, weights.adapter
    on_device = settings.reference == "device"
    parts = {
        "quantized weights": weights.quantized,
        "quantization constants": weights.constants,
        "unquantized weights": weights.unquantized,
        "policy adapter": adapter,
        "reference adapter": adapter if on_device else 0,
        "optimizer state": optimizer.device,
        "batch": settings.window_bytes,
        "workspaces and rounding": _overhead(weights, settings, 2 + on_device) if settings.cuda else 0,
    }
    if training.copies:
        parts["adapter in 16 bits"] = training.copies
    if settings.processes > 1:
        parts["DDP gradient buckets"] = adapter
    held = sum(parts.values())
    head = max(training.casts + training.head_forward, training.head_backward)
    parts |= {
        "gradients": adapter,
        "saved activations": training.saved,
        "layer working set": training.layers_backward - training.dequantized,
        "dequantization buffers": training.dequantized,
        "LM-head tile": head,
        "scoring pass": activations.scoring + (adapter if settings.reference == "host" and activations.scoring else 0),
        "optimizer step": optimizer.step,
    }
    forward = held + training.saved + max(training.casts + training.forward, head)
    gradients = adapter
    if settings.accumulates:  # the first micro-batch's gradients are there while the others run
        layers = held + gradients + training.saved + training.layers_backward
        forward += gradients
    else:  # gradients come as saved activations go, so the most is at one end
        share = 1 / settings.layers
        ends = (training.saved + gradients * share, gradients + training.saved * share)
        layers = held + training.layers_backward + round(max(ends))
    phases = {
        "forward and LM head": forward,
        "backward": layers,
        "optimizer step": held + gradients + optimizer.step,
    }
    if not activations.known:
        phases = {"optimizer step": phases["optimizer step"]}
        parts = {name: size for name, size in parts.items() if name not in OF_ACTIVATIONS}
    elif activations.score_batch is not None:
        phases["scoring pass"] = held + parts["scoring pass"]
    context = CONTEXT if settings.cuda else 0
    fragmentation = round(FRAGMENTATION * (max(phases.values()) - held))
    parts |= {"CUDA context": context, "fragmentation margin": fragmentation}
    host = optimizer.host + training.offloaded + (adapter if settings.reference == "host" else 0)
    return Memory(parts, held, phases, context + fragmentation, host)


def _overhead(weights: WeightBytes, settings: Settings, adapter_copies: int) -> int:
    """BLAS workspaces, and what the allocator counts for tensors above their bytes."""
    adapter = sum(cuda_block(4 * shape.numel()) - 4 * shape.numel() for shape in weights.trainable)
    weights_of_base = sum(cuda_block(size) - size for size in weights.sizes)
    # torch keeps one for each thread's handle: the forward's, and autograd's own for the backward
    return 2 * _workspace(settings.capability) + weights_of_base + adapter_copies * adapter


def _workspace(capability: tuple[int, int] | str) -> int:
    """`parseChosenWorkspaceSize` in torch's aten/src/ATen/cuda/CublasHandlePool.cpp."""
    if isinstance(capability, str):
        return (128 if capability.startswith(("gfx94", "gfx95")) else 32) * 2**20
    return 32 * 2**20 if capability >= (9, 0) else 8_519_680
