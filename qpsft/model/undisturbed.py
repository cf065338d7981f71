"""Measurements in the middle of training: afterwards everything is as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards random states, train modes and `requires_grad` are as they were, whatever was done inside."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    python, numbers = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
