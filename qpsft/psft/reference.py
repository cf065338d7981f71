"""The reference policy: a frozen copy of the trained parameters, and the log-probabilities under it.

    base model (4-bit, shared)  ──┬── policy     lora_A, lora_B, …   trained
                                  └── reference  lora_A, lora_B, …   the policy as it was at the last snapshot

The copy is a set of plain tensors, not a second PEFT adapter: `with reference.active():` exchanges the storage of the
policy's parameters with the copy's, and back. The same modules then compute both, so at a snapshot the two agree bit
for bit; nothing about the model changes that could be saved, optimized or forgotten to switch back (no second set of
parameters, no `requires_grad` toggling as in `peft.set_adapter`); and whatever is trained is covered: LoRA A and B,
DoRA magnitudes, biases, `modules_to_save`.

The base is a second reference, one that never changes and costs no memory: the same model with its adapter off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qpsft.errors import TrainingError
from qpsft.model.adapter import adapter_off, has_adapter
from qpsft.psft.forward import PolicyOutput, is_prompt_learning, policy_forward
from qpsft.psft.lm_head import LMHead
from qpsft.psft.scoring import Batch, fused_limit, passes
from qpsft.psft.sharding import as_sharded, exchanged, is_sharded, whole


class ReferencePolicy:
    """A frozen copy of a model's trainable parameters, taken when it is made and at every `snapshot()`.

    The copy of a policy on a CUDA device is kept in pinned host memory and comes to the device to score, when no
    gradients and no activations are there. Elsewhere, and of a sharded model, it is beside the policy.

    Args:
        model: a PEFT model (any adapter name, freshly made or already trained), or any module; what has
            `requires_grad` is the policy, the rest is the base that both share.
        fused_lm_head: the model has TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`), which returns
            log-probabilities without building (batch, sequence, vocabulary) logits.

    Attributes:
        in_host_memory: whether the copy is in host memory for a policy that is on a GPU.

    Raises:
        TrainingError: the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, *, fused_lm_head: bool = False):
        self.model = model
        self.fused_lm_head = fused_lm_head
        self.sharded = is_sharded(model)
        self._policy = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._policy:
            raise TrainingError(
                "The model has no trainable parameter, so there is nothing to take a snapshot of.",
                "Add an adapter (`peft_config=LoraConfig(...)`), or load yours with `is_trainable=True`.",
            )
        self.in_host_memory = not self.sharded and all(p.device.type == "cuda" for p in self._policy.values())
        self._copy = {name: self._empty_like(p) for name, p in self._policy.items()}
        self._fused_limit = fused_limit(model)
        self.snapshot()

    def _empty_like(self, parameter: Tensor) -> Tensor:
        if not self.in_host_memory:
            return torch.empty_like(parameter, requires_grad=False)
        return torch.empty_like(parameter, device="cpu", requires_grad=False, pin_memory=True)

    @property
    def nbytes(self) -> int:
        """Bytes the copy holds: those of the policy's parameters, no more."""
        return sum(t.untyped_storage().nbytes() for t in self._copy.values())

    @torch.no_grad()
    def snapshot(self) -> None:
        """Reference := copy of the policy as it is now."""
        for name, parameter in self._policy.items():
            self._copy[name].copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Policy := the copy, bit for bit."""
        for name, parameter in self._policy.items():
            parameter.copy_(self._copy[name])

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model computes with the reference's parameters inside, without gradients.

        No backward pass may be pending: recomputation under gradient checkpointing would see the other parameters.
        """
        if self.sharded:
            with torch.no_grad(), exchanged(self._policy, self._copy):
                yield self.model
            return
        policy = {name: p.data for name, p in self._policy.items()}
        with torch.no_grad():
            try:
                for name, p in self._policy.items():
                    p.data = self._copy[name].to(p.device, non_blocking=True)
                increment_version(list(self._policy.values()))  # for 16-bit copies of them (qpsft.model.lora_linear)
                yield self.model
            finally:
                for name, p in self._policy.items():
                    p.data = policy[name]
                increment_version(list(self._policy.values()))

    def score(self, batches: Sequence[Batch], *, token_budget: int | None = None) -> list[Tensor]:
        """Log-probabilities of the labels under the reference policy.

        The rows of all batches are sorted by length and run in groups of at most `token_budget` tokens (padding
        included; one row at least), in the mode (train or eval) the model is in.

        Args:
            batches: `input_ids`, `attention_mask` and `labels`, each (batch, sequence), and what else the model takes.
            token_budget: None: the batches as they are.

        Returns:
            One tensor per batch: (batch, sequence - 1), float32, 0 where the label is -100; on the model's device.
        """
        scores = [torch.zeros(batch["labels"][:, 1:].shape, device=self._device) for batch in batches]
        with self.active():
            for batch, right_padded, rows in passes(
                batches, token_budget=token_budget, fused_limit=self._fused_limit, sharded=self.sharded
            ):
                logprobs = self._logprobs(batch, right_padded=right_padded)
                for i, (length, b, r) in enumerate(rows):
                    scores[b][r, : length - 1] = logprobs[i, : length - 1]
        return scores

    def _logprobs(self, batch: Batch, *, right_padded: bool) -> Tensor:
        inputs = send_to_device(dict(batch), self._device)
        if self.fused_lm_head:
            return policy_forward(self.model, inputs, right_padded=right_padded).log_probs.float()
        labels = inputs.pop("labels")[:, 1:]
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked.masked_fill(labels == -100, 0.0)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._policy.values())).device

    def state_dict(self) -> dict[str, Tensor]:
        """The copy, by parameter name (not a clone). Of a sharded model it is gathered: every process must call it."""
        return {name: whole(tensor) for name, tensor in self._copy.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`. Raises TrainingError when names or shapes differ from the policy's."""
        if set(state) != set(self._copy):
            differing = sorted(set(state) ^ set(self._copy))
            raise TrainingError(
                f"The saved reference policy does not fit this adapter: {len(differing)} names differ, such as "
                f"{differing[0]}.",
                "Resume with the recipe the checkpoint was made with.",
            )
        for name, tensor in self._copy.items():
            if tensor.shape != state[name].shape:
                raise TrainingError(
                    f"The saved reference policy has shape {tuple(state[name].shape)} for {name}, "
                    f"the adapter {tuple(tensor.shape)}.",
                    "Resume with the recipe the checkpoint was made with.",
                )
        with torch.no_grad():
            for name, tensor in self._copy.items():
                tensor.copy_(as_sharded(state[name], tensor))


class BasePolicy:
    """The base under the adapter, as a policy: the same modules with the adapter off.

    LoRA and DoRA are left out, and the base's own modules stand for copies in `modules_to_save`. An adapter whose
    training goes on is off too: the base is what it was first trained on.

    Args:
        model: a PEFT model with TRL's fused LM head, on its device, and sharded if it will be.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._sharded, self._fused_limit = is_sharded(model), fused_limit(model)

    @staticmethod
    def missing(model: nn.Module) -> str | None:
        """Why `model` has no base that can be had by switching an adapter off; None if it has."""
        if not has_adapter(model):
            return "the base is the model with its LoRA adapter off, and this model has none"
        if is_prompt_learning(model):
            return "prompt learning is not supported with it"
        biases = {getattr(config, "bias", "none") for config in model.peft_config.values()} - {"none"}
        if biases:
            return f"this adapter trains the base's own biases (bias: {biases.pop()}), which cannot be switched off"
        return None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model computes as the base inside, without gradients. No backward pass may be pending."""
        with torch.no_grad(), adapter_off(self.model):
            yield self.model

    def logprobs(self, batches: Sequence[Batch], *, token_budget: int | None = None) -> list[list[Tensor]]:
        """Log-probabilities of the supervised labels under the base.

        Args:
            batches: `input_ids`, `attention_mask` and `labels`, each (batch, sequence), and what else the model takes.
            token_budget: None: the batches as they are.

        Returns: for each batch a tensor per row: (supervised tokens of the row,), float32, on the model's device.
        """
        return self._by_row(batches, token_budget, lambda output: output.log_probs[output.label_mask].float())

    def hidden(self, batches: Sequence[Batch], *, token_budget: int | None = None) -> tuple[list[Tensor], LMHead]:
        """The base's hidden states from which the supervised labels are predicted, and its LM head.

        Args:
            batches: `input_ids`, `attention_mask` and `labels`, each (batch, sequence), and what else the model takes.
            token_budget: None: the batches as they are.

        Returns: for each batch (supervised tokens, hidden size), row after row, in the dtype the model computes in.
        """
        heads: list[LMHead] = []

        def hidden_of(output: PolicyOutput) -> Tensor:
            heads[:] = [output.head]
            return output.hidden

        rows = self._by_row(batches, token_budget, hidden_of, hidden=True, logprobs=False)
        return [torch.cat(parts) for parts in rows], heads[0]

    def _by_row(
        self, batches: Sequence[Batch], token_budget: int | None, value: Callable[[PolicyOutput], Tensor], **what: bool
    ) -> list[list[Tensor]]:
        values: list[list[Tensor]] = [[torch.empty(0)] * len(batch["labels"]) for batch in batches]
        device = self.model.get_input_embeddings().weight.device
        with self.active():
            for batch, right_padded, rows in passes(
                batches, token_budget=token_budget, fused_limit=self._fused_limit, sharded=self._sharded
            ):
                inputs = send_to_device(dict(batch), device)
                counts = (inputs["labels"][:, 1:] != -100).sum(1).tolist()
                per_token = value(policy_forward(self.model, inputs, right_padded=right_padded, **what))
                for (_, b, r), part in zip(rows, per_token.split(counts), strict=True):
                    values[b][r] = part
        return values
