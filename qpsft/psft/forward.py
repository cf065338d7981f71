"""The forward that training and scoring share, so that both run the same kernels and neither does needless work.

What is left out, exactly (up to float rounding):
- the attention mask of rows padded on the right: with causal attention no real token sees a pad, so PyTorch's SDPA can
  take its causal kernel, which needs no (sequence, sequence) mask, for full and for ragged batches alike; and that of
  packed rows where attention goes piece by piece (`qpsft.model.attention`);
- the LM head on tokens that are not supervised. TRL's tiled head skips them only where Triton runs (Linux with CUDA,
  ROCm or XPU, and a compiler); elsewhere they are taken out before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.trainer.utils import FusedCausalLMOutput

from qpsft.model.attention import no_mask
from qpsft.psft.lm_head import LMHead

PER_TOKEN = ("log_probs", "entropy", "is_top1")


@dataclass
class PolicyOutput(FusedCausalLMOutput):
    """What a forward gave. Beside TRL's fields, all (batch, sequence - 1):

    Attributes:
        hidden: of a forward that was asked for hidden states: those the labels are predicted from, (supervised tokens,
            hidden size), row after row, with gradient in training.
        head: of the same: the LM head, as it maps them to logits.
    """

    hidden: Tensor | None = None
    head: LMHead | None = None


def policy_forward(
    model: nn.Module, inputs: Mapping[str, Any], *, right_padded: bool, hidden: bool = False, logprobs: bool = True
) -> PolicyOutput:
    """Log-probabilities of the labels, by a model with TRL's tiled LM head.

    Args:
        model: as the trainer calls it: a causal LM, with or without a PEFT adapter, or that wrapped for several
            processes; patched by `trl.trainer.utils.add_fused_lm_head`.
        inputs: `input_ids` and `labels` (-100: not supervised), (batch, sequence), and whatever else the model takes;
            `seq_lengths` (see `qpsft.model.attention`) only if it attends by piece.
        right_padded: every pad of the batch stands right of its row's real tokens.
        hidden: also return the hidden states of the supervised tokens. Not with prompt learning.
        logprobs: False, with `hidden`: the LM head is not applied, and nothing but `hidden` and `head` is returned.

    Returns:
        `log_probs` and `entropy` (nats, float), `is_top1` and `label_mask` (bool), all (batch, sequence - 1) and 0
        where the label is -100; `hidden` and `head` if asked for.
    """
    inputs = {**inputs, "use_cache": False}
    bare = unwrap(model)
    causal_lm = bare.get_base_model() if isinstance(bare, PeftModel) else bare
    if right_padded and not needs_mask(causal_lm.config):
        inputs.pop("attention_mask", None)
    on_triton = chunked_logprob._use_triton(inputs["labels"].device)
    with no_mask() if "seq_lengths" in inputs else contextlib.nullcontext():
        if not hidden and (on_triton or is_prompt_learning(bare)):
            return PolicyOutput(**model(**inputs, fused_lm_head=True))
        return _supervised_only(model, causal_lm, inputs, hidden=hidden, logprobs=logprobs)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and the like."""
    return model.module if isinstance(getattr(model, "module", None), nn.Module) else model


def needs_mask(config: Any) -> bool:
    """Whether the attention mask of rows padded on the right changes what a model with this config computes."""
    config = config.get_text_config()
    sees_ahead = not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False)
    # a mixture's load-balancing loss counts the tokens that the mask lets through
    return bool(sees_ahead or getattr(config, "output_router_logits", False))


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether virtual tokens stand before the row's own: positions of labels are not those of the hidden states."""
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())


def _supervised_only(
    model: nn.Module, causal_lm: nn.Module, inputs: dict[str, Any], *, hidden: bool, logprobs: bool
) -> PolicyOutput:
    labels = inputs.pop("labels")[:, 1:]
    mask = labels != -100
    labels = labels[mask]
    kept: dict[str, Any] = {}

    def keep_supervised(module: nn.Module, args: tuple, outputs: Any) -> Any:
        supervised = outputs.last_hidden_state[:, :-1][mask]
        if hidden:
            kept.update(hidden=supervised, head=LMHead.of(causal_lm, supervised))
        outputs.last_hidden_state = (supervised if logprobs else supervised[:0]).unsqueeze(0)
        return outputs

    # `shift_labels` is TRL's way to give labels that already stand where their prediction does
    handle = causal_lm.base_model.register_forward_hook(keep_supervised)
    try:
        shift_labels = (labels if logprobs else labels[:0]).unsqueeze(0)
        outputs = model(**inputs, shift_labels=shift_labels, fused_lm_head=True)
    finally:
        handle.remove()
    if not logprobs:
        return PolicyOutput(**kept)
    per_token = {name: spread(getattr(outputs, name), mask) for name in PER_TOKEN}
    return PolicyOutput(**{**outputs, **per_token, "label_mask": mask, **kept})


def spread(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """Values of the supervised tokens, (tokens,), at their places in (batch, sequence - 1); 0 elsewhere."""
    return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
