"""PSFTTrainer: trl.SFTTrainer with a reference policy and the PSFT loss. A drop-in: two names change."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import has_length, rotate_checkpoints
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from qpsft import resume
from qpsft.config import PSFTConfig
from qpsft.errors import OutputError, RecipeError, TrainingError
from qpsft.losses import NotFiniteError, dft_loss, loss_statistics, nll_loss, psft_loss
from qpsft.reference import ReferencePolicy
from qpsft.schedule import BlockSampler, BlockSchedule, StepPosition
from qpsft.statistics import RunStatistics

__all__ = ["PSFTConfig", "PSFTTrainer"]


class PSFTTrainer(SFTTrainer):
    """Trains with Proximal SFT (arXiv 2508.17784), plain SFT or DFT; everything else is `trl.SFTTrainer`'s.

    ```python
    trainer = PSFTTrainer(model, args=PSFTConfig("runs/a"), train_dataset=rows, peft_config=LoraConfig(r=16))
    trainer.train()
    ```

    Once per optimizer step, before the first micro-batch, the whole accumulation window is scored under the reference
    policy; the micro-batches then train, each carrying its `old_logprobs`. What has been scored in a block is kept
    until the block ends. The first step after a snapshot needs no scoring: its own log-probabilities are the old ones.

    Args:
        model: as in SFTTrainer: a name or path, a model, or a PEFT model (any adapter name, trained before or not).
            A model without an adapter is trained in full, and the reference is then a second copy of it.
        args: PSFTConfig.
        peft_config: LoRA and the like; `lora_dropout` above 0 warns. The adapter stays float32.
        **kwargs: train_dataset, eval_dataset, processing_class, callbacks, … of SFTTrainer.

    Raises:
        RecipeError: settings that cannot work together. TrainingError, while training: a loss or gradient that is not
        finite, with step and rows; OutputError: a checkpoint that cannot be written.
    """

    _tag_names = ["trl", "sft", "psft", "qpsft"]
    _name = "PSFT"
    _paper = {
        "title": "Proximal Supervised Fine-Tuning",
        "id": "2508.17784",
    }
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PSFTConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PSFTConfig(f"{Path(name).name}-PSFT")
        if not isinstance(args, PSFTConfig):
            raise RecipeError(f"args is a {type(args).__name__}.", "Pass a qpsft.PSFTConfig.")
        set_seed(args.seed)  # the adapter's initial values are random
        if isinstance(model, str):
            model = _load(model, args, quantization_config)
        if peft_config is not None and not is_peft_model(model):
            if args.chat_template_path and not args.chat_template_path.endswith((".jinja", ".j2")):
                raise RecipeError(
                    f"chat_template_path {args.chat_template_path!r} names a tokenizer, whose added tokens would "
                    "have to be trained in a 4-bit embedding.",
                    "Give a .jinja file, or clone the template onto the model before it is quantized.",
                )
            model = get_peft_model(model, peft_config)
            peft_config = None

        trainable = _float32_adapter(model) if is_peft_model(model) else []
        loss_type, args.loss_type = args.loss_type, "nll" if args.loss_type == "psft" else args.loss_type
        try:
            # SFTTrainer casts a quantized model's trainable parameters to bfloat16, too coarse for small steps
            for parameter in trainable:
                parameter.requires_grad_(False)
            super().__init__(model, args, peft_config=peft_config, **kwargs)
        finally:
            args.loss_type = loss_type
            for parameter in trainable:
                parameter.requires_grad_(True)

        self.reference: ReferencePolicy | None = None
        self._schedule: BlockSchedule | None = None
        self._position: StepPosition | None = None
        self._scores: dict[int, list[Tensor]] = {}  # old log-probabilities of the block, by mini-batch
        self._resumed: tuple | None = None
        self._statistics = RunStatistics()
        self._check_dropout()

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere unless the user names a Hub id."""

    def _check_dropout(self) -> None:
        configs = self.model.peft_config.values() if is_peft_model(self.model) else []
        dropout = max((getattr(c, "lora_dropout", 0.0) or 0.0 for c in configs), default=0.0)
        if dropout > 0 and self.args.loss_type == "psft":
            warnings.warn(
                f"lora_dropout is {dropout}: the two passes drop different inputs, so the ratio differs from 1 right "
                "after a snapshot and the trust region clips noise. Set lora_dropout to 0 for PSFT.",
                stacklevel=3,
            )

    # ---- the order of the data ----

    def _mini_batch_size(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(train_dataset):
            if self._visits() > 1:
                raise RecipeError(
                    "num_iterations above 1 needs a data set of known length, not a stream.",
                    "Load it without streaming, or set num_iterations to 1.",
                )
            return None
        return BlockSampler(
            self._get_schedule, len(train_dataset), self._mini_batch_size(), step=lambda: self.state.global_step
        )

    def _visits(self) -> int:
        return self.args.num_iterations if self.args.loss_type == "psft" or self.args.block_order else 1

    def _get_schedule(self) -> BlockSchedule:
        if self._schedule is None:
            rows = len(self.train_dataset) if has_length(self.train_dataset) else self._mini_batch_size()
            self._schedule = BlockSchedule(
                rows,
                self._mini_batch_size(),
                reference_steps=self.args.reference_steps,
                num_iterations=self._visits(),
                warmup_steps=self.args.sft_warmup_steps_of(self.state.max_steps),
                total_steps=self.state.max_steps,
                seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
                permute=self._permutation(),
            )
            self._explain_schedule(self._schedule)
        return self._schedule

    def _permutation(self):
        strategy = self.args.train_sampling_strategy
        if strategy == "random":
            return None
        if strategy == "sequential":
            return lambda generator: list(range(len(self.train_dataset)))
        if strategy == "group_by_length":
            lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
            size = self._mini_batch_size()
            return lambda generator: get_length_grouped_indices(lengths, size, generator=generator)
        raise RecipeError(
            f"train_sampling_strategy {strategy!r} cannot be combined with blocks.",
            "Use random, sequential or group_by_length.",
        )

    def _explain_schedule(self, schedule: BlockSchedule) -> None:
        if self.args.loss_type != "psft":
            return
        left = schedule.total_steps - schedule.warmup_steps
        if left <= 0:
            raise RecipeError(
                f"sft_warmup_steps takes all {schedule.total_steps} optimizer steps, so PSFT never begins.",
                "Lower sft_warmup_steps, or use loss_type nll.",
            )
        if schedule.reference_steps > left:
            warnings.warn(
                f"A block of reference_steps = {schedule.reference_steps} is longer than the {left} optimizer steps "
                "of the run: the reference policy is never renewed. Lower reference_steps or train longer.",
                stacklevel=2,
            )
        unseen = schedule.unseen_share() if has_length(self.train_dataset) else 0.0
        if unseen > 0 and schedule.num_iterations > 1:
            warnings.warn(
                f"With num_iterations = {schedule.num_iterations}, {schedule.total_steps} optimizer steps never reach "
                f"{unseen:.0%} of the rows; num_train_epochs = {schedule.num_iterations} would cover them all.",
                stacklevel=2,
            )

    # ---- one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The step's micro-batches, each with its `old_logprobs` unless they are the step's own."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        if num_items is None:
            counts = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches).to(device)
            num_items = self.accelerator.gather(counts).sum()
        self._position = self._get_schedule().position(self.state.global_step)
        if self.args.loss_type == "psft" and not self._position.is_warmup:
            self._attach_old_logprobs(batches)
        return batches, num_items

    def _attach_old_logprobs(self, batches: list[dict[str, Tensor]]) -> None:
        if self.reference is None:
            self.reference = ReferencePolicy(self.model, fused_lm_head=True)
            if self._resumed is not None:
                state, scores = self._resumed
                if state is not None:
                    self.reference.load_state_dict(state)
                self._scores = resume.to_device(scores, self.args.device)
                self._resumed = None
        if self._position.is_snapshot:
            self.reference.snapshot()
            self._scores = {self._position.mini_batch: []}  # filled by the training forward itself
            for i, batch in enumerate(batches):
                batch["micro_batch"] = i
            return
        old_logprobs = self._scores.get(self._position.mini_batch)
        if old_logprobs is None:
            old_logprobs = self._score(batches)
            if self._visits() > 1:
                self._scores[self._position.mini_batch] = old_logprobs
        for batch, old in zip(batches, old_logprobs, strict=True):
            batch["old_logprobs"] = old

    def _score(self, batches: list[dict[str, Tensor]]) -> list[Tensor]:
        budget = self.args.score_token_budget or 4 * max(batch["input_ids"].numel() for batch in batches)
        was_training = self.model.training
        self.model.train()  # the mode of the training forward: other modes may choose other kernels
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            # dropout must not draw from the stream that training draws from, or a resumed run would differ
            with torch.random.fork_rng(devices):
                return self.reference.score(batches, token_budget=budget)
        finally:
            self.model.train(was_training)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of one micro-batch, divided by the supervised tokens of the whole optimizer step.

        In evaluation, and where the outputs are asked for, it is SFTTrainer's: the negative log-likelihood.
        """
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        old_logprobs, micro_batch = inputs.pop("old_logprobs", None), inputs.pop("micro_batch", None)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        logprobs, mask = outputs.log_probs, outputs.label_mask
        if micro_batch is not None:
            old_logprobs = logprobs.detach().float()
            if self._visits() > 1:
                self._scores[self._position.mini_batch].append(old_logprobs)
        try:
            loss = self._loss(logprobs, old_logprobs, mask, num_items_in_batch)
        except NotFiniteError as error:
            raise self._not_finite(f"{error.name} is NaN or infinite") from error
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages gradients
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        part = loss_statistics(
            logprobs.detach(),
            old_logprobs,
            mask,
            epsilon=self.args.epsilon,
            entropy=outputs.entropy.detach(),
            is_top1=outputs.is_top1,
        )
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        self._statistics.add(part, real.sum())
        return loss

    def _loss(self, logprobs: Tensor, old_logprobs: Tensor | None, mask: Tensor, num_items) -> Tensor:
        if self.args.loss_type == "dft":
            return dft_loss(logprobs, None, mask, num_items=num_items)
        if self.args.loss_type == "nll" or self._position.is_warmup:
            return nll_loss(logprobs, None, mask, num_items=num_items)
        return psft_loss(logprobs, old_logprobs, mask, epsilon=self.args.epsilon, num_items=num_items)

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        # with loss scaling, infinite gradients are expected: the scaler skips that step
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise self._not_finite("the gradient is NaN or infinite")
        return norm

    def _not_finite(self, what: str) -> TrainingError:
        rows = ""
        if has_length(self.train_dataset):
            numbers = sorted(set(self._get_schedule().rows(self.state.global_step)))
            rows = f" on training rows {', '.join(map(str, numbers[:32]))}{', …' if len(numbers) > 32 else ''}"
        last = resume.newest_complete_checkpoint(self.args.output_dir)
        return TrainingError(
            f"Training stopped at optimizer step {self.state.global_step + 1}{rows}: {what}.",
            "Lower the learning rate, or look at these rows (counted from 0, in the prepared data). "
            + (f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."),
        )

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers of DESIGN §2 as token means over the steps since the last log, all processes together."""
        if self.model.training:
            numbers = self._statistics.read(self.accelerator)
            self._metrics["train"].update({name: [value] for name, value in numbers.items()})
        super().log(logs, start_time)

    # ---- saving and resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As in transformers; `True` resumes from the newest whole checkpoint, skipping half-written ones."""
        if resume_from_checkpoint is True:
            found = resume.newest_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise TrainingError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
            resume_from_checkpoint = str(found)
        self._schedule = None
        self._statistics.restart()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the old ones go when this one is whole
        try:
            if self.args.should_save:
                resume.remove_folder(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.loss_type == "psft":
                reference = self.reference.state_dict() if self.reference and self.args.should_save else None
                resume.save_psft_state(folder, self.args.process_index, reference, self._scores)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / "tokens.json").write_text(json.dumps({"num_tokens": self._statistics.num_tokens}))
                resume.mark_complete(folder)
        except OSError as error:
            resume.remove_folder(folder)
            raise OutputError(
                f"The checkpoint {folder} could not be written: {error.strerror or error}.",
                "Free some space or choose another output_dir; earlier checkpoints are untouched, so `--resume` "
                "continues from the last one.",
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        tokens = folder / "tokens.json"
        if tokens.is_file():
            self._statistics.num_tokens = json.loads(tokens.read_text())["num_tokens"]
        if self.args.loss_type == "psft":
            self.reference, self._scores = None, {}
            self._resumed = resume.load_psft_state(folder, self.args.process_index)


def _load(name: str, args: PSFTConfig, quantization_config: Any) -> PreTrainedModel:
    arguments = {"trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        arguments["device_map"] = None
    return create_model_from_path(name, **arguments)


def _float32_adapter(model: PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's trainable parameters, widened to float32 in place (exact) where they were narrower."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return trainable
