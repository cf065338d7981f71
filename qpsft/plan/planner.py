"""A plan for one recipe: its model built on the meta device once, its passes measured for any batch and option."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from qpsft.errors import BaseModelError, RecipeError, one_line
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.attention import fits
from qpsft.model.continue_adapter import SAME_OPTIONS
from qpsft.model.hardware import MIXED_PRECISION, base_dtype, check_run, hardware_for
from qpsft.model.tiled_mlp import TILE, is_tiled
from qpsft.plan.kernels import STAND_IN, Target
from qpsft.plan.memory import Memory, Settings, add_up
from qpsft.plan.optimizers import OptimizerBytes, optimizer_bytes
from qpsft.plan.passes import Activations, Passes, in_line
from qpsft.plan.shapes import Shape
from qpsft.plan.step import Batch
from qpsft.plan.weights import WeightBytes, build_skeleton, weight_bytes
from qpsft.psft.forward import needs_mask
from qpsft.psft.scoring import token_budget
from qpsft.psft.sharding import fsdp_is_asked
from qpsft.recipe.arguments import LoraArguments
from qpsft.recipe.file import Recipe

FAR = 8 * TILE
"""Tokens. Longer rows are not run: what they need is on a straight line, unless attention has a matrix of scores."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `Planner.measure` returns for one recipe."""

    memory: Memory
    activations: Activations
    optimizer: OptimizerBytes
    notes: list[str]


class Planner:
    """Plans recipes that differ in the trainer's options only.

    Args:
        recipe: for the base, its quantization and the adapter.
        shape: of the base.
        device: "cuda" or "cpu".
        capability: CUDA's (major, minor), or ROCm's architecture name.
        processes: of DDP; all numbers are one process's.

    Raises:
        BaseModelError: the model cannot be built from its config, or the adapter's options do not fit it; the card is
            too old for bitsandbytes; card or model have no kernels for the attention asked for.
        RecipeError: training would refuse the optimizer or the mixed precision there.
    """

    def __init__(
        self, recipe: Recipe, shape: Shape, *, device: str, capability: tuple[int, int] | str, processes: int = 1
    ):
        self.shape, self.device, self.capability, self.processes = shape, device, capability, processes
        hardware, base_config = hardware_for(device, capability), shape.config.to_dict()
        self.dtype = base_dtype(hardware, recipe.model.dtype, base_config)
        mixed_precision = _mixed_precision(recipe, self.dtype)
        check_run(
            hardware,
            attention=recipe.model.attn_implementation,
            optimizer=_name(recipe.trainer.optim),
            mixed_precision=mixed_precision,
            dtype=self.dtype,
            config=base_config,
        )
        self._flash = (recipe.model.attn_implementation or "").startswith("flash")
        self._model = dataclasses.replace(recipe.model, attn_implementation=STAND_IN) if self._flash else recipe.model
        self.lora, self._trust = _adapter_options(recipe), recipe.trainer.trust_remote_code
        skeleton = self._build(shape.config, tiled=False)
        if self._flash and not skeleton.get_base_model()._supports_flash_attn:
            raise BaseModelError(
                f"{shape.config.model_type} models have no {recipe.model.attn_implementation} in transformers.",
                "Leave attn_implementation out.",
            )
        self.weights: WeightBytes = weight_bytes(skeleton)
        self._base_config = skeleton.get_base_model().config  # which knows its attention implementation
        self.context_length = getattr(shape.config.get_text_config(), "max_position_embeddings", None) or 2**20
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        target = Target(device, capability, autocast, fused_lora=recipe.trainer.fused_lora)
        self._passes = {
            tiled: Passes(shape.config, functools.partial(self._build, tiled=tiled), self.lora, target)
            for tiled in (False, True)
        }
        self.layers = self._passes[False].layers
        self._hidden_bytes = shape.config.get_text_config().hidden_size * self.dtype.itemsize
        self._optimizers: dict[tuple, OptimizerBytes] = {}
        self._measured: dict[tuple, Activations] = {}
        self._why_unknown = ""

    def _build(self, config: Any, tiled: bool) -> Any:
        return build_skeleton(
            config, self._model, self.lora, self.dtype, tiled_mlp=tiled, trust_remote_code=self._trust
        )

    def for_base(self, recipe: Recipe, shape: Shape) -> Planner:
        """A planner for the same device and another base."""
        return Planner(recipe, shape, device=self.device, capability=self.capability, processes=self.processes)

    def measure(self, recipe: Recipe) -> Measured:
        """The memory of `recipe`, whose base and adapter are those the planner was made for.

        Raises:
            RecipeError: there is no longest row.
        """
        args = recipe.trainer
        batch = self._batch(args)
        score_batch = self._score_batch(args, batch) if _scores(args) else None
        every, notes = _checkpointing(args)
        tiled = args.tiled_mlp and is_tiled(batch.length)
        way = (every, args.activation_offloading, bool(args.base_kl))
        activations = self._activations(batch, score_batch, tiled, *way)
        if tiled:  # the longest rows that are not, 4,095 tokens, may need more
            length = min(batch.length, 2 * TILE - 1)
            shorter = self._activations(*_of(length, batch, score_batch), False, *way)
            training = max(activations.training, shorter.training, key=lambda training: training.peak)
            scoring = max(activations.scoring, shorter.scoring)
            activations = dataclasses.replace(activations, training=training, scoring=scoring)
        if not activations.known:
            notes.append(
                f"what activations of a {self.shape.config.model_type} model need is not known here "
                f"({self._why_unknown}): train a few steps with --max_steps and watch the memory"
            )
        optimizer = self._optimizer(args)
        if not optimizer.known:
            notes.append(f"{_name(args.optim)} is not known here: two float32 numbers per trained weight are assumed")
        if fsdp_is_asked(args):
            notes.append("FSDP's sharding is not planned: these are the numbers of DDP")
        if batch.length > self.context_length and not args.packing:
            notes.append(
                f"rows of {batch.length:,} tokens are longer than the model's context, {self.context_length:,}: "
                "it was not trained on such positions"
            )
        settings = Settings(
            cuda=self.device == "cuda",
            capability=self.capability,
            reference=self._reference(args),
            accumulates=args.gradient_accumulation_steps > 1,
            processes=self.processes,
            window_bytes=_window_bytes(args, batch, self._hidden_bytes),
            layers=self.layers,
        )
        return Measured(add_up(self.weights, optimizer, activations, settings), activations, optimizer, notes)

    def needed(self, recipe: Recipe) -> int:
        """Bytes of the card that `recipe` takes, with what torch does not count."""
        memory = self.measure(recipe).memory
        return memory.peak + memory.margin

    def _activations(
        self, batch: Batch, score_batch: Batch | None, tiled: bool, every: int | None, offloading: bool, base_kl: bool
    ) -> Activations:
        if batch.length > FAR:
            settings = (tiled, every, offloading, base_kl)
            lengths = (FAR // 4, FAR // 2, FAR)
            near, middle, far = (self._activations(*_of(n, batch, score_batch), *settings) for n in lengths)
            if far.known and _close(in_line(near, middle, far.batch, far.score_batch), far):
                return in_line(middle, far, batch, score_batch)
        key = (batch, score_batch, tiled, every, offloading, base_kl)
        if key not in self._measured:
            try:
                self._measured[key] = self._passes[tiled].measure(
                    batch, score_batch, checkpointing=every, offloading=offloading, base_kl=base_kl
                )
            except Exception as error:  # any architecture's own code runs here, and all else is counted exactly
                self._why_unknown = one_line(error)
                self._measured[key] = Activations.unknown(batch, score_batch)
        return self._measured[key]

    def _optimizer(self, args: Any) -> OptimizerBytes:
        key = (str(args.optim), args.optim_args)
        if key not in self._optimizers:
            optimizer = optimizer_bytes(args, self.weights.trainable)
            if self.device == "cpu":  # there is nothing to page from
                optimizer = dataclasses.replace(optimizer, device=optimizer.device + optimizer.host, host=0)
            self._optimizers[key] = optimizer
        return self._optimizers[key]

    def _batch(self, args: Any) -> Batch:
        """The largest micro-batch, as `qpsft.psft.forward` and `qpsft.psft.packing` make it."""
        if args.max_length is None:
            raise RecipeError("max_length is none, so the longest row is not known.", "Give --max_length.")
        rows, length = args.per_device_train_batch_size, args.max_length
        if not args.packing:
            return Batch(rows, length, masked=not self._flash and needs_mask(self._base_config))
        if self._flash:
            return Batch(1, rows * length, masked=False)  # laid end to end
        return Batch(rows, length, masked=not fits(self._base_config, length))

    def _score_batch(self, args: Any, batch: Batch) -> Batch:
        """The largest batch of the reference pass, as `qpsft.psft.scoring` makes it."""
        budget = token_budget(args, batch.rows * batch.length)
        if budget is None or (args.packing and self._flash):
            return batch
        rows = max(1, min(args.per_device_train_batch_size * args.gradient_accumulation_steps, budget // batch.length))
        return dataclasses.replace(batch, rows=rows)

    def _reference(self, args: Any) -> str:
        """Where the reference's copy is, as `qpsft.psft.reference.ReferencePolicy` keeps it."""
        if not args.takes_snapshots:
            return "none"
        return "host" if self.device == "cuda" else "device"


def _of(length: int, *batches: Batch | None) -> list[Batch | None]:
    return [batch and dataclasses.replace(batch, length=length) for batch in batches]


def _close(one: Activations, other: Activations) -> bool:
    """Within 1 %."""
    pairs = ((one.training.peak, other.training.peak), (one.scoring, other.scoring))
    return all(abs(a - b) <= 0.01 * b for a, b in pairs)


def _scores(args: Any) -> bool:
    if args.needs_base:
        return True
    return args.takes_snapshots and (args.reference_steps > 1 or args.num_iterations > 1)


def _checkpointing(args: Any) -> tuple[int | None, list[str]]:
    if not args.gradient_checkpointing:
        return None, []
    settings = dict(args.gradient_checkpointing_kwargs or {})
    if settings.get("selective"):
        return None, ["selective checkpointing is planned as none: an upper bound"]
    return settings.get("every_n_layers", 1), []


def _window_bytes(args: Any, batch: Batch, hidden_bytes: int) -> int:
    """Three int64 tensors a row; old log-probabilities, a block's where they are kept; the base's hidden states.

    Args:
        hidden_bytes: of a token's last hidden state.
    """
    tokens = batch.rows * batch.length * args.gradient_accumulation_steps
    kept = args.reference_steps if args.num_iterations > 1 else 1
    per_token = 3 * 8 + (4 * kept if args.takes_snapshots else 0) + (hidden_bytes if args.base_kl else 0)
    return per_token * tokens


def _adapter_options(recipe: Recipe) -> LoraArguments:
    """The recipe's, or those of the adapter that it goes on from."""
    if not recipe.lora.adapter_name_or_path:
        return recipe.lora
    config = AdapterFolder.find(recipe.lora.adapter_name_or_path).mergeable_config()
    targets = config.target_modules
    return dataclasses.replace(
        recipe.lora,
        lora_target_modules=targets if isinstance(targets, str) else sorted(targets),
        lora_modules_to_save=sorted(config.modules_to_save or []) or None,
        **{name: getattr(config, own) for name, own in SAME_OPTIONS.items()},
    )


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _mixed_precision(recipe: Recipe, dtype: torch.dtype) -> str:
    """As given, else the base's own, as `qpsft.model.hardware.settle_precision` has it."""
    args = recipe.trainer
    if {"bf16", "fp16"} & set(recipe.given):
        return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    return MIXED_PRECISION[dtype]
