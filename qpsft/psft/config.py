"""PSFTConfig: trl.SFTConfig with the options of Proximal SFT and defaults that suit LoRA on a 4-bit base."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import SFTConfig

from qpsft.errors import RecipeError
from qpsft.model.hardware import check_run, hardware_of, pick_device
from qpsft.psft.losses import BASE_LOGPROBS, EPSILON, LOSSES, OLD_LOGPROBS
from qpsft.psft.trust_region import check_targets
from qpsft.recipe.methods import REFERENCE_STEPS

DECAY = 0.3
"""Share of a run over which `warmup_stable_decay` lowers the rate."""

MINI_BATCH = 16
"""Rows per optimizer step and process, between the paper's mini-batches of 8 and 32, unless both sizes are given."""

# Values of `report_to` that `get_available_reporting_integrations` does not list.
_UNLISTED = ("all", "none", "azure_ml", "flyte", "kubeflow")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _rest(size: int) -> int:
    """How often `size` goes into a step's rows, at least once; a size that is not above 0 is refused elsewhere."""
    return max(1, round(MINI_BATCH / max(1, size)))


MOST = {
    "epsilon": 1e3, "learning_rate": 1e2, "base_kl": 1e6, "eaft_alpha": 1e2, "stm_threshold": 1e30, "target_kl": 1e30,
    "weight_decay": 1e3, "max_grad_norm": 1e30, "adam_epsilon": 1.0, "num_train_epochs": 1e6, "max_steps": 1e9,
    "max_length": 1e8, "reference_steps": 1e6, "num_iterations": 1e6, "sft_warmup_steps": 1e9, "warmup_steps": 1e9,
    "per_device_train_batch_size": 1e6, "per_device_eval_batch_size": 1e6, "gradient_accumulation_steps": 1e6,
    "score_token_budget": 1e9, "logging_steps": 1e9, "save_steps": 1e9, "eval_steps": 1e9,
}  # fmt: skip
"""Far above what anybody trains with, and far below what overflows or never ends."""


@dataclass
class PSFTConfig(SFTConfig):
    """Arguments of `PSFTTrainer`: everything of `trl.SFTConfig`, and the options below.

    Defaults that differ from SFTConfig's, each with its reason in its help: `loss_type`, `learning_rate`,
    `lr_scheduler_type`, `warmup_steps`, `per_device_train_batch_size`, `gradient_accumulation_steps`, `save_steps`,
    `save_total_limit`, `bf16`/`fp16` (by hardware; off on the CPU).

    Raises:
        RecipeError: a value out of range.
    """

    loss_type: str = _option(
        "psft",
        "psft (Proximal SFT, arXiv 2508.17784), nll (plain SFT), dft (arXiv 2508.05629), eaft (2601.02151), trsft "
        "(2512.17636) or stm (2501.14315). docs/methods.md has their formulas and when to take which.",
        choices=list(LOSSES),
    )
    epsilon: float = _option(
        EPSILON,
        "Trust region: a token gets no gradient once it is (1 + epsilon) times as likely as at the last snapshot. "
        "0.28 as in the paper; 0.1 to 0.5 work.",
    )
    eaft_alpha: float = _option(
        1.0, "eaft: power of a token's normalized entropy in its weight; 1 as in the paper, 0 is plain SFT."
    )
    trsft_alpha: float = _option(
        0.1,
        "trsft: tokens less likely than this are damped, by their probability over it; 0.1 as in the paper, 1 is dft.",
    )
    stm_threshold: float = _option(
        2.5, "stm: the largest perplexity (1 / probability) under the base of a token that is trained on; the paper's."
    )
    base_kl: float = _option(
        0.0,
        "Added to any loss: this times KL(base || policy) over the supervised tokens' whole distributions, nats. nll "
        "with it is SFT-KL, dft with it ASFT (arXiv 2509.23753, whose code has 0.05 to 0.1). It costs a forward "
        "without the adapter per row and step.",
    )
    reference_steps: int = _option(
        REFERENCE_STEPS,
        "K: optimizer steps' worth of data in a block; the reference policy is renewed at each block's start. 8 as in "
        "the paper (64/8 and 256/32); 4 when the data fill few blocks; 1 with one visit is plain SFT.",
    )
    num_iterations: int = _option(
        1,
        "How often each block is gone through before the next snapshot (PPO epochs). Visits count as epochs. 1 as in "
        "the paper; 4 with one block of warm-up for noisy or model-written demonstrations.",
    )
    sft_warmup_steps: float = _option(
        0,
        "Optimizer steps of plain SFT before the first snapshot: a number of steps, or below 1 a fraction of the run. "
        "0 as in the paper; one block (reference_steps) with num_iterations > 1, where visits otherwise learn late.",
    )
    target_kl: float | None = _option(
        None,
        "End a block early, and renew the reference, after a step whose mean approx_kl passed this many nats per "
        "token. PPO's practice: 0.01 to 0.1. At high learning rates every step becomes a block, which is plain SFT.",
    )
    target_clip_fraction: float | None = _option(
        None,
        "Move epsilon from block to block, to between a quarter and 4 times of what was given, so that this share of "
        "the tokens is clipped. For those who do not know which epsilon to take: 0.1 to 0.3.",
    )
    score_token_budget: int | None = _option(
        None,
        "Tokens per batch, padding included, in the reference pass. Unset: those of two micro-batches, at "
        "least 512; with activation_offloading of one. 0: the micro-batches as they are trained, which is slower and "
        "free of rounding noise: without a change of the weights the ratio is 1 to the bit.",
    )
    block_order: bool = _option(
        False,
        "The other losses go through the data in PSFT's order (blocks and visits), as a control. psft always does.",
    )

    packing: bool = _option(
        False,
        "Lay several rows end to end, up to max_length tokens, each seeing itself only; on any attention "
        "implementation. Batch sizes and reference_steps then count packed rows.",
    )
    tiled_mlp: bool = _option(
        True,
        "Run the MLPs of rows of 4,096 tokens and more in tiles, which takes much less memory. The results are the "
        "same; shorter rows run whole.",
    )
    fused_lora: bool = _option(
        False,
        "Run each LoRA layer as one function while training in 16 bits, with 16-bit copies of A and B made once per "
        "step: a third fewer operators. Off until it has been measured on a GPU.",
    )
    learning_rate: float = _option(
        2e-4, "Initial learning rate of AdamW. 2e-4 is QLoRA's usual one; PSFT takes 1 to 2 times the best for SFT."
    )
    lr_scheduler_type: str = _option(
        "warmup_stable_decay",
        "Constant after a warm-up, then a linear fall to 0 over the last 30 % of the run: where a rate stays constant, "
        "chance decides how a run ends. lr_scheduler_kwargs changes its parts, such as {num_decay_steps: 20}.",
    )
    warmup_steps: float = _option(
        10,
        "Learning-rate warm-up: steps, or below 1 a fraction of the run; at most a tenth of it. 10 as in the paper.",
    )
    max_grad_norm: float = _option(1.0, "Gradient clipping, as in the paper; 0 turns it off.")
    per_device_train_batch_size: int | Literal["auto"] = _option(
        "auto",
        "Rows per micro-batch. auto: the fastest that fits this machine by `qpsft plan`, which then also decides on "
        "gradient_checkpointing if it is not given; the result is the same up to rounding. From Python: 2.",
    )
    gradient_accumulation_steps: int | Literal["auto"] = _option(
        "auto",
        "Micro-batches per optimizer step. auto: as many as make 16 rows a step on each device, between the paper's "
        "mini-batches of 8 and 32. For a step of other than 16 rows give both sizes.",
    )
    save_steps: float = _option(
        100, "Save a checkpoint every so many steps. Often, since adapters are small and runs at home get interrupted."
    )
    save_total_limit: int | None = _option(2, "Checkpoints kept; two, so that one is whole while the next is written.")

    def __post_init__(self) -> None:
        self._settle_batch()
        self._check_ranges()
        self._check_supported()
        self._check_loggers()
        self.cpu_is_asked_for = self.use_cpu
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on the CPU unless it is said
        self.hardware = hardware_of("cpu" if self.use_cpu else pick_device())
        self.automatic_precision = self.bf16 is None and not self.fp16
        if self.automatic_precision:  # until the model is known: see settle_precision
            dtype = self.hardware.compute_dtype
            self.bf16, self.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        check_run(self.hardware, optimizer=self.optim, mixed_precision="fp16" if self.fp16 else None)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # the adapter's are all used; looking for others costs each step
        self.logging_nan_inf_filter = False  # every loss is checked already; this would wait for the device once more
        super().__post_init__()
        # several cards need several processes: torch's DataParallel ruins 4-bit weights
        self._n_gpu = min(1, self.n_gpu)
        self._check_scheduler()
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise RecipeError(
                "average_tokens_across_devices: false is not supported: "
                "the loss is a mean over the tokens of all processes."
            )
        if self.torch_compile:
            raise RecipeError(
                "torch_compile is not supported: compiling takes longer than it saves (benchmarks/README.md).",
                "Leave torch_compile, torch_compile_backend and torch_compile_mode out.",
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise RecipeError(
                "activation_offloading needs a GPU: activations on the CPU are in host memory already.", "Leave it out."
            )
        self._check_texts()
        if self.accelerator_config.split_batches:
            raise RecipeError("split_batches is not supported.", "Give per_device_train_batch_size per process.")

    def _settle_batch(self) -> None:
        """Numbers for `auto`. Where both sizes are, `automatic_batch` lets `qpsft.plan.batch_sizes` choose others."""
        rows, count = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self.automatic_batch = rows == count == "auto"
        if rows == "auto":
            rows = 2 if count == "auto" else _rest(count)
        self.per_device_train_batch_size = rows
        self.gradient_accumulation_steps = _rest(rows) if count == "auto" else count

    def _check_ranges(self) -> None:
        if self.loss_type not in LOSSES:
            raise RecipeError(f"loss_type {self.loss_type!r} is not known.", f"Use one of {', '.join(LOSSES)}.")
        at_least_one = (
            "reference_steps",
            "num_iterations",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("epsilon", "learning_rate", "num_train_epochs"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not value <= most:
                raise RecipeError(f"{name} is {value:g}; it must be at most {most:g}.", "No run takes as much.")
        if not 0 < self.trsft_alpha <= 1:
            raise RecipeError(f"trsft_alpha is {self.trsft_alpha}; it must be above 0 and at most 1.")
        if not self.stm_threshold > 1:
            raise RecipeError(f"stm_threshold is {self.stm_threshold}; it must be above 1: no perplexity is below 1.")
        for name in ("sft_warmup_steps", "warmup_steps", "max_grad_norm", "weight_decay", "eaft_alpha", "base_kl"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name, least in (("score_token_budget", 0), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name} is {value}; it must be at least {least}, or left out.")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise RecipeError(f"{name} is {value}; it must be from 0 to {2**32 - 1}.")
        for kind in ("logging", "save"):
            value = getattr(self, f"{kind}_steps")
            if getattr(self, f"{kind}_strategy") == "steps" and not value > 0:
                todo = f"To turn it off, set {kind}_strategy: 'no'."
                raise RecipeError(f"{kind}_steps is {value}; it must be above 0.", todo)
        if self.max_steps == 0 or self.max_steps < -1:
            raise RecipeError(f"max_steps is {self.max_steps}; it must be at least 1, or left out to train by epochs.")

    def _check_supported(self) -> None:
        check_targets(self.target_kl, self.target_clip_fraction, self.loss_type, self.takes_snapshots)
        if self.packing and self.packing_strategy == "wrapped":
            raise RecipeError(
                "packing_strategy wrapped cuts rows in two and lets them see each other.",
                "Use bfd, which cuts none, or bfd_split.",
            )
        if self.packing and self.max_length is None:
            raise RecipeError("packing needs max_length, the length of a packed row.", "Set max_length, such as 2048.")
        refused = {
            "auto_find_batch_size": "It changes the rows of a step under way; set per_device_train_batch_size.",
            "ignore_data_skip": "A resumed run must go on in the same block.",
            "label_smoothing_factor": "The losses are those of the papers; use trl.SFTTrainer.",
        }
        for name, why in refused.items():
            if getattr(self, name):
                raise RecipeError(f"{name} is not supported.", why)
        if self.takes_snapshots and self.reference_steps == 1 and self.num_iterations == 1:
            warnings.warn(
                "reference_steps = 1 with one visit is plain SFT: the ratio is 1 at every step and nothing is ever "
                "clipped. Use reference_steps 4 to 8 for PSFT.",
                stacklevel=4,
            )

    def _check_loggers(self) -> None:
        known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in known:
                raise RecipeError(f"report_to {name!r} is not known.", f"Use one of {', '.join(sorted(known))}.")
            if name not in _UNLISTED and name not in get_available_reporting_integrations():
                todo = f"pip install {name.replace('_', '-')}, or leave it out."
                raise RecipeError(f"report_to {name}: that logger is not installed.", todo)

    def _check_texts(self) -> None:
        """Options that transformers reads only when it builds the optimizer or turns checkpointing on."""
        if self.optim_args and any(part.count("=") != 1 for part in self.optim_args.split(",")):
            raise RecipeError(f"optim_args {self.optim_args!r} cannot be read.", "Write name=value, name=value, ….")
        every = (self.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
        if type(every) is not int or every < 1:
            raise RecipeError(
                f"gradient_checkpointing_kwargs: every_n_layers is {every}; it must be a whole number, at least 1."
            )

    def _check_scheduler(self) -> None:
        """Refuses schedules without the arguments they need, as transformers does only when training starts."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, self.scheduler_kwargs(2))
        except (ValueError, TypeError) as error:
            raise RecipeError(
                f"lr_scheduler_type {getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)!r}: {error}",
                "Set lr_scheduler_kwargs, or another.",
            ) from None

    @property
    def takes_snapshots(self) -> bool:
        """Whether the loss compares the policy with a reference policy, a snapshot renewed every block."""
        return OLD_LOGPROBS in LOSSES[self.loss_type].needs

    @property
    def needs_base(self) -> str | None:
        """What compares the policy with the base, for messages; None if nothing does."""
        if BASE_LOGPROBS in LOSSES[self.loss_type].needs:
            return f"loss_type {self.loss_type}"
        return f"base_kl {self.base_kl:g}" if self.base_kl else None

    @property
    def visits(self) -> int:
        """How often each block is gone through: `num_iterations` where there are blocks, else 1."""
        return self.num_iterations if self.takes_snapshots or self.block_order else 1

    @property
    def order_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """`warmup_steps` as a number of optimizer steps: at most a tenth of the run, or short runs would not learn."""
        asked, longest = super().get_warmup_steps(num_training_steps), num_training_steps // 10
        if asked > longest and self.warmup_steps > 0.1:  # not for 0.1 itself, rounded up
            warnings.warn(
                f"warmup_steps = {self.warmup_steps:g} is shortened to {longest}, a tenth of the run's "
                f"{num_training_steps:,} optimizer steps.",
                stacklevel=1,
            )
        return min(asked, longest)

    def scheduler_kwargs(self, total_steps: int) -> dict[str, Any] | None:
        """`lr_scheduler_kwargs` for a run of `total_steps`; of `warmup_stable_decay` with a linear fall at its end."""
        if self.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
            return self.lr_scheduler_kwargs
        decay = {"num_decay_steps": round(DECAY * total_steps), "decay_type": "linear"}
        return decay | (self.lr_scheduler_kwargs or {})

    def sft_warmup_steps_of(self, total_steps: int) -> int:
        """`sft_warmup_steps` as a number of optimizer steps, for a run of `total_steps`."""
        steps = self.sft_warmup_steps
        return round(steps * total_steps) if 0 < steps < 1 else int(steps)
