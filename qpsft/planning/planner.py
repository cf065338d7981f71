"""A plan for one recipe: its model built on the meta device once, its passes measured for any batch and option."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qpsft.checkpoint import one_line
from qpsft.errors import BaseModelError, RecipeError
from qpsft.hardware import DTYPES, pick_dtype
from qpsft.planning.kernels import HALF, Target
from qpsft.planning.memory import Memory, Settings, add_up
from qpsft.planning.optimizers import OptimizerBytes, optimizer_bytes
from qpsft.planning.passes import Activations, Passes
from qpsft.planning.shapes import Shape
from qpsft.planning.skeleton import WeightBytes, build_skeleton, weight_bytes
from qpsft.planning.step import Batch
from qpsft.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `Planner.measure` found for one recipe."""

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
        capability: CUDA's (major, minor).
        processes: of DDP; all numbers are one process's.

    Raises:
        BaseModelError: the model cannot be built from its config, or the adapter's options do not fit it.
    """

    def __init__(self, recipe: Recipe, shape: Shape, *, device: str, capability: tuple[int, int], processes: int = 1):
        self.shape, self.device, self.capability, self.processes = shape, device, capability, processes
        self.dtype = _compute_dtype(recipe, device, capability)
        self._flash = (recipe.model.attn_implementation or "").startswith(("flash", "kernels-"))
        # flash attention's package need not be here, and torch's own flash kernel takes the same memory
        self._model = dataclasses.replace(recipe.model, attn_implementation="sdpa") if self._flash else recipe.model
        self._lora, self._trust = recipe.lora, recipe.trainer.trust_remote_code
        self.weights: WeightBytes = weight_bytes(self._build(shape.config))
        self.context_length = getattr(shape.config.get_text_config(), "max_position_embeddings", None) or 2**20
        target = Target(device, capability, _autocast(recipe, self.dtype))
        self._passes = Passes(shape.config, self._build, recipe.lora, target)
        self._optimizers: dict[tuple, OptimizerBytes] = {}
        self._measured: dict[tuple, Activations] = {}

    def _build(self, config: Any) -> Any:
        return build_skeleton(config, self._model, self._lora, self.dtype, self._trust)

    def of_another(self, recipe: Recipe, shape: Shape) -> Planner:
        """The same for another base."""
        return Planner(recipe, shape, device=self.device, capability=self.capability, processes=self.processes)

    def measure(self, recipe: Recipe) -> Measured:
        """The memory of `recipe`, whose base and adapter are those the planner was made for.

        Raises:
            BaseModelError: the model's code cannot be run on the meta device.
            RecipeError: there is no longest row.
        """
        args = recipe.trainer
        batch, score_batch = self.batches(args)
        every, notes = _checkpointing(args)
        key = (batch, score_batch, every, args.activation_offloading)
        if key not in self._measured:
            try:
                self._measured[key] = self._passes.measure(
                    batch, score_batch, checkpointing=every, offloading=args.activation_offloading
                )
            except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
                raise BaseModelError(
                    f"The activations of a {self.shape.config.model_type} model cannot be planned: {one_line(error)}",
                    "Train a few steps with --max_steps and watch the memory.",
                ) from error
        activations = self._measured[key]
        optimizer = self._optimizer(args)
        if not optimizer.known:
            notes.append(f"{args.optim} is not known here: two float32 numbers per trained weight are assumed")
        settings = Settings(
            cuda=self.device == "cuda",
            hopper=self.capability >= (9, 0),
            reference=self._reference(args),
            accumulates=args.gradient_accumulation_steps > 1,
            processes=self.processes,
            window_bytes=_window_bytes(args, batch),
            layers=self._passes.layers,
        )
        return Measured(add_up(self.weights, optimizer, activations, settings), activations, optimizer, notes)

    def _optimizer(self, args: Any) -> OptimizerBytes:
        key = (str(args.optim), args.optim_args)
        if key not in self._optimizers:
            found = optimizer_bytes(args, self.weights.trainable)
            if self.device == "cpu":  # there is nothing to page from
                found = dataclasses.replace(found, device=found.device + found.host, host=0)
            self._optimizers[key] = found
        return self._optimizers[key]

    def batches(self, args: Any) -> tuple[Batch, Batch | None]:
        """The largest micro-batch, and the largest batch of the reference pass or None."""
        if args.max_length is None:
            raise RecipeError("max_length is none, so the longest row is not known.", "Give --max_length.")
        rows, length = args.per_device_train_batch_size, args.max_length
        if args.packing and args.packing_strategy != "wrapped":
            rows, length = 1, rows * length  # a micro-batch becomes one row of several documents
        batch = Batch(rows, length, padded=not self._flash and (rows > 1 or args.packing))
        if not _scores(args):
            return batch, None
        if args.packing:
            return batch, batch
        budget = args.score_token_budget or 4 * rows * length
        score_rows = max(1, min(rows * args.gradient_accumulation_steps, budget // length))
        return batch, Batch(score_rows, length, padded=not self._flash and score_rows > 1)

    def _reference(self, args: Any) -> str:
        if args.loss_type != "psft" or args.reference != "snapshot":
            return "none"
        placement = getattr(args, "reference_placement", "device")
        return "device" if placement == "auto" or self.device == "cpu" else placement


def _scores(args: Any) -> bool:
    blocks = args.loss_type == "psft" and args.reference == "snapshot"
    return blocks and (args.reference_steps > 1 or args.num_iterations > 1)


def _checkpointing(args: Any) -> tuple[int | None, list[str]]:
    if not args.gradient_checkpointing:
        return None, []
    settings = dict(args.gradient_checkpointing_kwargs or {})
    if settings.get("selective"):
        return None, ["selective checkpointing is planned as none: an upper bound"]
    return settings.get("every_n_layers", 1), []


def _window_bytes(args: Any, batch: Batch) -> int:
    """Three int64 tensors per row of the window, and its old log-probabilities: a block's, where they are kept."""
    tokens = batch.rows * batch.length * args.gradient_accumulation_steps
    kept = args.reference_steps if args.num_iterations > 1 else 1
    return 3 * 8 * tokens + (4 * tokens * kept if args.loss_type == "psft" else 0)


def _compute_dtype(recipe: Recipe, device: str, capability: tuple[int, int]) -> torch.dtype:
    asked = recipe.model.dtype
    return pick_dtype(device, capability) if asked == "auto" else DTYPES[asked]


def _autocast(recipe: Recipe, dtype: torch.dtype) -> torch.dtype | None:
    """Mixed precision: as given, else by the compute dtype as `PSFTConfig` would on that device."""
    if {"bf16", "fp16"} & set(recipe.given):
        args = recipe.trainer
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return dtype if dtype in HALF else None
