"""PSFTTrainer: trl.SFTTrainer with a reference policy and the PSFT loss. A drop-in: two names change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import has_length
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpsft.data.mix import MixedDataset
from qpsft.errors import DivergedError, RecipeError, TrainingError
from qpsft.model.attention import attention_by_piece, repeat_keys_where_no_kernel_groups
from qpsft.model.environment import check_machine, use_triton_where_it_runs
from qpsft.model.hardware import INSTEAD_OF_FLOAT16, settle_precision
from qpsft.model.lora_linear import fused_lora_linears
from qpsft.model.tiled_mlp import TileMlpsAgain, tile_mlps
from qpsft.model.undisturbed import undisturbed
from qpsft.processes import from_main
from qpsft.psft import checkpoint
from qpsft.psft.base_kl import BASE_HIDDEN, BaseKL, is_measured
from qpsft.psft.base_logprobs import BaseLogprobs
from qpsft.psft.config import PSFTConfig
from qpsft.psft.float16 import repeat_until_finite
from qpsft.psft.forward import policy_forward, spread
from qpsft.psft.lm_head import top_entropy
from qpsft.psft.losses import (
    BASE_LOGPROBS,
    LOSSES,
    OLD_LOGPROBS,
    TOP_ENTROPY,
    Loss,
    NotFiniteError,
    loss_statistics,
    per_item,
)
from qpsft.psft.metrics import RunStatistics
from qpsft.psft.movement import MovementCheck
from qpsft.psft.old_logprobs import OldLogprobs
from qpsft.psft.packing import check_packing, packed_collator
from qpsft.psft.policy import check_loss, default_config, float32_adapter, prepare_policy, warn_of_noise
from qpsft.psft.reference import BasePolicy, ReferencePolicy
from qpsft.psft.rows import as_datasets, labels_are_ours, tokenized
from qpsft.psft.schedule import BlockSampler, BlockSchedule, StepPosition, make_schedule, steps_per_epoch
from qpsft.psft.scoring import real_tokens
from qpsft.psft.sharding import check_sharding
from qpsft.psft.trust_region import TrustRegion
from qpsft.recipe.secret import taken_out

__all__ = ["PSFTConfig", "PSFTTrainer"]


class PSFTTrainer(SFTTrainer):
    """Trains with Proximal SFT (arXiv 2508.17784) or another loss; everything else is `trl.SFTTrainer`'s.

    ```python
    trainer = PSFTTrainer(model, args=PSFTConfig("runs/a"), train_dataset=rows, peft_config=LoraConfig(r=16))
    trainer.train()
    ```

    Before the first micro-batch of an optimizer step, all of them get what the loss needs (`qpsft.psft.losses.LOSSES`):
    for PSFT the old log-probabilities, made by `qpsft.psft.old_logprobs`, for STM those under the base, made by
    `qpsft.psft.base_logprobs`. Then they train as in SFTTrainer.

    Args:
        model: as in SFTTrainer: a name or path, a model, or a PEFT model (any adapter name, trained before or not).
            A model without an adapter is trained in full, and the reference is then a second copy of it.
        args: PSFTConfig.
        peft_config: LoRA and the like; `lora_dropout` above 0 warns. The adapter stays float32.
        **kwargs: processing_class, callbacks, … of SFTTrainer. train_dataset and eval_dataset may be lists of dicts;
            rows of texts or messages are prepared as by `qpsft train` (docs/data.md), tokenized ones as by TRL.
            train_dataset may be what `qpsft.data.mix.mixed` makes of several.

    Raises:
        RecipeError: settings that cannot work together.
        DataError: rows that cannot be used.
        DivergedError: while training, a loss or gradient that is not finite, with step and rows.
        TrainingError: nothing was learned (`qpsft.psft.movement`).
        OutputError: a checkpoint that cannot be written.
    """

    _tag_names = ["trl", "sft", "psft", "qpsft"]
    _name = "PSFT"
    _paper = {
        "title": "Proximal Supervised Fine-Tuning",
        "id": "2508.17784",
    }
    loss_is_scaled_for_ga = True
    row_places: Sequence[str] | None = None
    """Where each training row came from, such as "data.jsonl, line 57"; errors then name rows by it."""

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PSFTConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        args = default_config(model) if args is None else args
        if not isinstance(args, PSFTConfig):
            raise RecipeError(f"args is a {type(args).__name__}.", "Pass a qpsft.PSFTConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise RecipeError("compute_loss_func is not supported: the loss is loss_type's.", "Use trl.SFTTrainer.")
        check_machine(on_cpu=args.cpu_is_asked_for)
        use_triton_where_it_runs(args.device)
        set_seed(args.seed)  # the adapter's initial values are random
        model = prepare_policy(model, args, peft_config, quantization_config)
        settle_precision(model, args)
        repeat_keys_where_no_kernel_groups()
        for name in {"train_dataset", "eval_dataset"} & kwargs.keys():
            kwargs[name] = as_datasets(kwargs[name], kwargs.get("formatting_func"))
        with float32_adapter(model), _nll_for_trl(args):
            super().__init__(model, args, **kwargs)

        check_sharding(self)
        if self.args.packing:
            self.data_collator = packed_collator(
                self.data_collator,
                self.model.config,
                self.args.max_length,
                tensors_only=self.args.world_size > 1 and not has_length(self.train_dataset),
            )
        if self.args.tiled_mlp:
            tile_mlps(self.model)
            self.add_callback(TileMlpsAgain)
        check_loss(self.model, self.args)
        if BASE_LOGPROBS in LOSSES[args.loss_type].needs and not _has_numbered_rows(self.train_dataset):
            raise RecipeError(
                f"loss_type {args.loss_type} scores all rows under the base before the first step: it needs tokenized "
                "rows, of a known number, not a stream and no images.",
                "Load the data without streaming, or choose another loss_type.",
            )
        if self.args.visits > 1 and not has_length(self.train_dataset):
            raise RecipeError(
                "num_iterations above 1 needs a data set of known length, not a stream.",
                "Load it without streaming, or set num_iterations to 1.",
            )
        self.add_callback(MovementCheck(self.accelerator))
        self._start_over()
        warn_of_noise(self.model, self.args)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in transformers, which walks through all parameters for every micro-batch; here once per run."""
        tokens = inputs["input_ids"].numel()
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) // max(1, tokens)
        return self._flops_per_token * tokens

    def _start_over(self) -> None:
        self._flops_per_token: int | None = None
        self.old_logprobs = OldLogprobs(self.model, self.args)
        self.trust_region = TrustRegion(self.args.epsilon, self.args.target_kl, self.args.target_clip_fraction)
        self.base_logprobs = BaseLogprobs(self.model, self.args)
        self.base_kl = BaseKL(self.model, self.args)
        self._schedule: BlockSchedule | None = None
        self._early_ends: list[int] = []  # of the run that is resumed
        self._position: StepPosition | None = None
        self._statistics = RunStatistics()

    @property
    def reference(self) -> ReferencePolicy | None:
        """The reference policy; None before the first snapshot, and with a loss that needs none."""
        return self.old_logprobs.reference

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere unless the user names a Hub id."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError, RuntimeError) as error:
            what = f"optim {getattr(self.args.optim, 'value', self.args.optim)} cannot be used here: "
            todo = "Use adamw_torch_fused, adamw_8bit or paged_adamw_8bit."
            raise RecipeError(what + str(error).splitlines()[0], todo) from error

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = given

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers; then the rate is this run's, which may be longer than the one it goes on from."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(schedule := self.lr_scheduler, LambdaLR):
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            schedule._last_lr = [first * factor(schedule.last_epoch) for first, factor in rates]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    # ---- the rows ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Texts and messages get our labels; what TRL then does with tokenized rows (packing, …) is the same.

        The sources of a mix are prepared, and packed, each by itself.
        """
        if isinstance(dataset, MixedDataset):
            rest = processing_class, args, packing, formatting_func, dataset_name
            rows = [self._prepare_dataset(as_datasets(part.rows, formatting_func), *rest) for part in dataset.parts]
            return MixedDataset([replace(part, rows=own) for part, own in zip(dataset.parts, rows, strict=True)])
        if labels_are_ours(dataset, processing_class, formatting_func):
            dataset = tokenized(dataset, processing_class, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    # ---- the order of the data ----

    def rows_per_step(self) -> int:
        """Rows of a mini-batch: one optimizer step's data, all processes together."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        size = self.rows_per_step()
        per_epoch = steps_per_epoch(train_dataset, size)
        return BlockSampler(self._get_schedule, per_epoch, size, step=lambda: self.state.global_step)

    def _get_schedule(self) -> BlockSchedule:
        if self._schedule is None:
            self._schedule = make_schedule(self.args, self.train_dataset, self.rows_per_step(), self.state.max_steps)
            for step in self._early_ends:
                self._schedule.end_block(step)
        return self._schedule

    # ---- one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The step's micro-batches, each with what the loss needs, and N."""
        if self.state.global_step >= self.state.max_steps:
            # a finished run that is resumed: transformers would take one step more before it looks
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        self._begin_step()
        if self._get_schedule().early_ends and has_length(self.train_dataset):
            batches, num_items = self._batches_now(len(batches), device), None  # the loader had fetched rows ahead
        if num_items is None:
            counts = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches).to(device)
            num_items = self.accelerator.gather(counts).sum()
        self._window = batches, num_items
        self._measure_kl(batches[-1])
        self._attach(batches)
        return batches, num_items

    def _attach(self, batches: list[dict[str, Any]]) -> None:
        """Gives each micro-batch what the loss needs from other forwards than its own."""
        step, needs = self.state.global_step, self._loss().needs
        base_hidden = self.base_kl.hidden(batches, step) if self.args.base_kl else []
        if OLD_LOGPROBS in needs:
            self.old_logprobs.attach(batches, self._position, step)
        if BASE_LOGPROBS in needs:
            if self.base_logprobs.sha256 is None:
                with self._statistics.paused():
                    self.base_logprobs.score(self.train_dataset, self.data_collator)
            self.base_logprobs.attach(batches, self._own_rows(len(batches)))
        for batch, states in zip(batches, base_hidden, strict=False):  # of no micro-batch, or of all
            batch[BASE_HIDDEN] = states

    def _measure_kl(self, batch: dict[str, Any]) -> None:
        """Measures `kl_to_base` for the log, in some steps, where `base_kl` does not give it anyway."""
        lines = {"logging_steps": self.state.logging_steps, "max_steps": self.state.max_steps}
        micro_batches = self.args.gradient_accumulation_steps
        if self.args.base_kl or not is_measured(self.state.global_step + 1, **lines, micro_batches=micro_batches):
            return
        if not self.is_fsdp_enabled and BasePolicy.missing(self.model) is None:  # FSDP takes the LM head apart
            self._statistics.add_measured(*self.base_kl.measure(batch, self.state.global_step))

    def _begin_step(self) -> None:
        """Where the step stands, after the trust region has had its say about the block."""
        schedule, step = self._get_schedule(), self.state.global_step
        self.trust_region.end_step(self.accelerator)
        if self.trust_region.is_left and schedule.end_block(step):
            self.trust_region.blocks_ended += 1
        self._position = schedule.position(step)
        if self._position.is_snapshot:
            self.trust_region.begin_block()

    def _own_rows(self, micro_batches: int) -> list[list[int]]:
        """The data set's row numbers of this process's micro-batches: the processes take them in turn."""
        rows, size = self._get_schedule().rows(self.state.global_step), self.args.train_batch_size
        world, rank = self.args.world_size, self.args.process_index
        return [rows[(m * world + rank) * size :][:size] for m in range(micro_batches)]

    def _batches_now(self, micro_batches: int, device: torch.device) -> list[dict[str, Any]]:
        """This process's micro-batches of the step, by the schedule as it is now."""
        dataset = self._remove_unused_columns(self.train_dataset, description="training")
        made = [self.data_collator([dataset[row] for row in rows]) for rows in self._own_rows(micro_batches)]
        return [send_to_device(batch, device) for batch in made]

    def _loss(self) -> Loss:
        """The step's loss: the negative log-likelihood in the SFT warm-up."""
        warms_up = self.args.takes_snapshots and self._position.is_warmup
        return LOSSES["nll" if warms_up else self.args.loss_type]

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of one micro-batch, divided by the supervised tokens of the whole optimizer step.

        In evaluation, and where the outputs are asked for, it is SFTTrainer's: the negative log-likelihood.
        """
        if return_outputs or not self.model.training:
            with _nll_for_trl(self.args):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        needs = self._loss().needs
        attached, base_logprobs = inputs.pop(OLD_LOGPROBS, None), inputs.pop(BASE_LOGPROBS, None)
        base_hidden = inputs.pop(BASE_HIDDEN, None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        right_padded = isinstance(self.data_collator, DataCollatorForLanguageModeling)
        hidden = TOP_ENTROPY in needs or base_hidden is not None
        outputs = policy_forward(model, inputs, right_padded=right_padded, hidden=hidden)
        logprobs, mask = outputs.log_probs, outputs.label_mask
        old_logprobs = self.old_logprobs.resolve(attached, logprobs)
        made = {OLD_LOGPROBS: old_logprobs, BASE_LOGPROBS: base_logprobs, "epsilon": self.trust_region.epsilon}
        if TOP_ENTROPY in needs:
            made[TOP_ENTROPY] = spread(top_entropy(outputs.hidden, outputs.head), mask)
        try:
            loss = self._loss()(logprobs, mask, made, self.args, num_items_in_batch)
        except NotFiniteError as error:
            raise self._not_finite(f"{error.name} is NaN or infinite") from error
        kl = None
        if base_hidden is not None:
            kl = self.base_kl.total(outputs, base_hidden)
            loss = loss + self.args.base_kl * per_item(kl, mask, num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages gradients
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        part = loss_statistics(
            logprobs.detach(),
            old_logprobs,
            mask,
            epsilon=self.trust_region.epsilon,
            entropy=outputs.entropy.detach(),
            is_top1=outputs.is_top1,
        )
        if kl is not None:
            part["kl_to_base"] = kl.detach()
        self._statistics.add(part, real_tokens(inputs))
        self.trust_region.add(part)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None:
            return repeat_until_finite(self, model, norm, self._window, self._forget_step)
        if not torch.isfinite(torch.as_tensor(norm)):
            raise self._not_finite("the gradient is NaN or infinite")
        return norm

    def _forget_step(self) -> None:
        self._statistics.forget(len(self._window[0]))
        self.trust_region.forget_step()

    def _not_finite(self, what: str) -> DivergedError:
        rows, counted = "", " (counted from 0, in the prepared data)"
        if has_length(self.train_dataset):
            numbers = sorted(set(self._get_schedule().rows(self.state.global_step)))
            named = list(map(str, numbers[:32]))
            if self.row_places is not None:
                named, counted = [self.row_places[number] for number in numbers[:32]], ""
            rows = f" on training rows {(', ' if counted else '; ').join(named)}{', …' if len(numbers) > 32 else ''}"
        last = checkpoint.newest_complete_checkpoint(self.args.output_dir)
        step = self.state.global_step + 1
        return DivergedError(
            f"Training stopped at optimizer step {step}{rows}: {what}.",
            (f"In float16, activations may overflow. {INSTEAD_OF_FLOAT16} " if self.args.fp16 else "")
            + f"Lower the learning rate, or look at these rows{counted}. "
            + (f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."),
            step,
        )

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers of docs/metrics.md: token means since the last line, over all steps and processes."""
        if self.model.training:
            numbers = self._statistics.read(self.accelerator)
            if numbers:
                numbers |= self.trust_region.numbers()
                self.trust_region.warn_if_far(numbers["approx_kl"], numbers["entropy"])
            if numbers and self.accelerator.scaler is not None:
                numbers["loss_scale"] = self.accelerator.scaler.get_scale()
            self._metrics["train"].update({name: [value] for name, value in numbers.items()})
            self._total_train_tokens = self._statistics.num_tokens  # SFTTrainer logs it with evaluations
        super().log(logs, start_time)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the model may be run on anything: training goes on as without it, and the time does not count in
        `tokens_per_second`."""
        with self._statistics.paused(), undisturbed(self.model):
            yield

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer, on lists of rows too; training goes on as without it."""
        with self.measuring(), self._attention():
            return super().evaluate(as_datasets(eval_dataset, self._formatting_func), *args, **kwargs)

    def _attention(self) -> AbstractContextManager:
        if not getattr(self.data_collator, "by_piece", False):
            return nullcontext()
        return attention_by_piece(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    def _lora_linears(self) -> AbstractContextManager:
        # the parameters of a sharded layer come and go, and copies of them would grow stale
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return fused_lora_linears(self.model) if self.args.fused_lora and not sharded else nullcontext()

    # ---- saving and resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As in transformers; `True` resumes from the newest whole checkpoint, skipping half-written ones.

        Raises TrainingError where a file of the checkpoint is damaged, before anything of it is loaded.
        """
        if resume_from_checkpoint is True:
            newest = checkpoint.newest_complete_checkpoint(self.args.output_dir)
            if newest is None:
                raise TrainingError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            from_main(lambda: checkpoint.check_bytes(Path(resume_from_checkpoint)))
        self._start_over()
        with self._attention(), self._lora_linears():
            if self.args.packing and self.model.device.type == self.args.device.type:  # FSDP moves others later
                check_packing(self.model, self.data_collator, next(iter(self.train_dataset))["input_ids"])
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            begun = Path(resume_from_checkpoint).resolve()
            if begun.parent == Path(self.args.output_dir).resolve():  # killed, perhaps, before it removed old ones
                self._remove_old_checkpoints(begun)
        return result

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with taken_out(self.args):  # the arguments are pickled beside the model
            super()._save(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the old ones go when this one is whole
        try:
            with checkpoint.whole_or_removed(folder):
                self._write_checkpoint(folder, model, trial)
        finally:
            self.args.save_total_limit = limit
        self._remove_old_checkpoints(folder)

    def _remove_old_checkpoints(self, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if self.args.should_save and limit is not None and limit > 0:
            checkpoint.remove_old(newest.parent, limit, keep={newest.name, Path(best or newest).name})

    def _write_checkpoint(self, folder: Path, model, trial) -> None:
        if self.args.should_save:
            checkpoint.remove_folder(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if self.args.takes_snapshots:
            state = self.old_logprobs.state_dict()
            checkpoint.save_psft_state(folder, state, self.args.process_index, with_reference=self.args.should_save)
        self.trust_region.end_step(self.accelerator)
        num_tokens = self._statistics.tokens_so_far(self.accelerator)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            progress = {
                "num_tokens": num_tokens,
                "early_ends": self._get_schedule().early_ends,
                "trust_region": self.trust_region.state_dict(),
                "base_logprobs_sha256": self.base_logprobs.sha256,
                "gradient_checkpointing": self.args.gradient_checkpointing,
            }
            checkpoint.save_run(folder, checkpoint.order_settings(self.args, self.train_dataset), progress)
            for callback in self._checkpointed_callbacks():
                callback.save_to(folder)
            checkpoint.mark_complete(folder)

    def _checkpointed_callbacks(self) -> list[checkpoint.CheckpointedCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, checkpoint.CheckpointedCallback)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if isinstance(self.model, PeftModel):
            checkpoint.check_adapter(folder, self.model.peft_config[self.model.active_adapter])
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        settings = checkpoint.order_settings(self.args, self.train_dataset)
        if progress := checkpoint.load_run(folder, settings):
            self._statistics.num_tokens = progress["num_tokens"]
            self._early_ends = progress["early_ends"]
            self.trust_region.load_state_dict(progress["trust_region"])
            if progress["base_logprobs_sha256"] is not None:
                self.base_logprobs.resume(progress["base_logprobs_sha256"])
        for callback in self._checkpointed_callbacks():
            callback.load_from(folder)
        if self.args.takes_snapshots:
            self.old_logprobs.load_state_dict(checkpoint.load_psft_state(folder, self.args.process_index))


def _has_numbered_rows(dataset: Any) -> bool:
    return has_length(dataset) and "input_ids" in (getattr(dataset, "column_names", None) or ())


@contextmanager
def _nll_for_trl(args: PSFTConfig) -> Iterator[None]:
    """SFTTrainer, which does not know all of our losses, takes the negative log-likelihood inside."""
    loss_type, args.loss_type = args.loss_type, "nll"
    try:
        yield
    finally:
        args.loss_type = loss_type
