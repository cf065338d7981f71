"""Device memory of the training pass and of the scoring pass over all layers, from a model of a few layers.

What a layer keeps for the backward is the same for each, so two short models give the sum over all. The largest working
set is one layer's, whatever their number.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpsft.plan.kernels import Target
from qpsft.plan.step import Batch, TrainingBytes, scoring_bytes, training_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig

    from qpsft.recipe.arguments import LoraArguments

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Activations:
    """Both passes of a run.

    Attributes:
        batch, score_batch: what they run on; `score_batch` None: there is no scoring pass.
        training: over all layers.
        scoring: the most that scoring needs beside the weights.
        known: whether they were measured; both are 0 otherwise.
    """

    batch: Batch
    score_batch: Batch | None
    training: TrainingBytes
    scoring: int
    known: bool = True

    @classmethod
    def unknown(cls, batch: Batch, score_batch: Batch | None) -> Activations:
        """For a model whose code does not run on the meta device."""
        return cls(batch, score_batch, TrainingBytes(*(0 for _ in dataclasses.fields(TrainingBytes))), 0, known=False)


def in_line(near: Activations, far: Activations, batch: Batch, score_batch: Batch | None) -> Activations:
    """Activations of longer rows, on the straight line through those of two shorter lengths."""
    share = (batch.length - far.batch.length) / (far.batch.length - near.batch.length)

    def extend(a: int, b: int) -> int:
        return round(b + (b - a) * share)

    fields = [field.name for field in dataclasses.fields(TrainingBytes)]
    training = {name: extend(getattr(near.training, name), getattr(far.training, name)) for name in fields}
    return Activations(batch, score_batch, TrainingBytes(**training), extend(near.scoring, far.scoring))


class Passes:
    """Measures passes of one model; keeps what it has built.

    Args:
        config: of the base.
        build: makes the PEFT model on the meta device from a config.
        lora: the adapter's options.
        target: the device.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        build: Callable[[PretrainedConfig], PeftModel],
        lora: LoraArguments,
        target: Target,
    ):
        self.layers = config.get_text_config().num_hidden_layers
        self._config, self._build, self._target = config, build, target
        self._varied, self._period = _pattern(config)
        self._whole = _names_layers(lora)
        self._models: dict[int, PeftModel] = {}

    def measure(
        self,
        batch: Batch,
        score_batch: Batch | None,
        *,
        checkpointing: int | None,
        offloading: bool,
        base_kl: bool = False,
    ) -> Activations:
        """Args: as in `training_bytes`; `score_batch` None: no scoring pass."""
        options = {"checkpointing": checkpointing, "offloading": offloading, "base_kl": base_kl}

        def train(layers: int) -> TrainingBytes:
            return training_bytes(self._model(layers), batch, self._target, **options)

        def score(layers: int) -> int:
            return scoring_bytes(self._model(layers), score_batch, self._target)

        few, more = self._short(checkpointing or 1, offloading and checkpointing is not None)
        other = train(more)
        one = other if few == more else train(few)
        extended = {
            name: round(_extend(getattr(one, name), getattr(other, name), few, more, self.layers))
            for name in ("saved", "casts", "offloaded", "copies")
        }
        training = dataclasses.replace(other, **extended)
        scoring = 0
        if score_batch is not None:
            above = score(more)
            scoring = round(_extend(above if few == more else score(few), above, few, more, self.layers))
        return Activations(batch, score_batch, training, scoring)

    def _short(self, every: int, offloading: bool) -> tuple[int, int]:
        # offloading keeps the last five saved tensors on the device: fewer layers' inputs would all be among them
        unit = math.lcm(self._period, every)
        few = math.ceil(max(6 * every if offloading else 2 * every, self._varied) / unit) * unit
        more = few + unit
        if self._whole or more >= self.layers:
            return self.layers, self.layers
        return few, more

    def _model(self, layers: int) -> PeftModel:
        if layers not in self._models:
            self._models[layers] = self._build(shortened(self._config, layers))
        return self._models[layers]


def _extend(one: int, other: int, few: int, more: int, layers: int) -> float:
    return other if few == more else other + (other - one) / (more - few) * (layers - more)


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a model with the first `layers` of its layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    all_layers = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == all_layers:
            setattr(text, name, value[:layers])
    return config


def _names_layers(lora: LoraArguments) -> bool:
    """Whether the adapter goes on some layers only."""
    targets = lora.lora_target_modules
    named = [targets] if isinstance(targets, str) else list(targets)
    return any(re.search(r"\d", name) for name in [*named, *(lora.lora_modules_to_save or [])])


def _pattern(config: PretrainedConfig) -> tuple[int, int]:
    """How many of the first layers hold every kind of layer, and after how many layers the order of kinds repeats.

    Kinds of attention that differ in their reach only take the same memory, so they count as one. Layers with experts
    come after a few without in many models, and are all alike.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [None]
    mlps = getattr(text, "mlp_layer_types", None) or [None]
    varied = 1 + max(of.index(kind) for of in (kinds, mlps) for kind in set(of))
    varied = max(varied, 1 + (getattr(text, "first_k_dense_replace", None) or 0))
    if set(kinds) <= _ATTENTION | {None}:
        return varied, 1
    repeats = (n for n in range(1, len(kinds)) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return varied, next(repeats, len(kinds))
