"""Proximal SFT (arXiv 2508.17784) with LoRA on a 4-bit base in one file: PyTorch, PEFT, transformers for the model.

    python docs/psft_in_one_file.py

It is the method alone, as qpsft.PSFTTrainer trains it: tests/test_psft_in_one_file.py gets the same adapter from both.
What the trainer adds is left out: micro-batches, several processes, checkpoints, float16, packing, long rows. The rows
and the base are those of `qpsft demo` (0.5M parameters): a step takes a fraction of a second on a CPU.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qpsft.data.built_in import demonstrations


@dataclass
class Args:
    base: str = str(Path(__file__).parents[1] / "qpsft" / "demo" / "model")
    lora_r: int = 8
    lora_alpha: int = 16
    epsilon: float = 0.28  # the trust region: no gradient for a token 1.28 times as likely as at the last snapshot
    reference_steps: int = 8  # K: mini-batches in a block; the reference policy is renewed at each block's start
    num_iterations: int = 4  # V: how often each block is gone through (the paper: once)
    sft_warmup_steps: int = 8  # steps of plain SFT before the first block
    blocks: int = 7
    mini_batch: int = 16  # rows of an optimizer step
    learning_rate: float = 2e-3
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    output_dir: str | None = "runs/psft_in_one_file"


# ---- data: a row is token ids and labels; the prompt's labels are -100, which is not supervised ----


def tokenize(tokenizer, prompt, completion):
    question = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    return {"input_ids": ids, "labels": [-100] * len(question) + ids[len(question) :]}


@functools.cache
def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def mini_batch(rows, number, args):
    """Mini-batch `number` of an endless stream: one permutation of the rows after another. It is always full."""
    places = range(number * args.mini_batch, (number + 1) * args.mini_batch)
    chosen = [rows[permutation(len(rows), args.seed + place // len(rows))[place % len(rows)]] for place in places]
    ids, labels = ([torch.tensor(row[key]) for row in chosen] for key in ("input_ids", "labels"))
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


# ---- the policy: a frozen base in NF4, and a float32 adapter, which is all that is trained ----


def make_policy(args):
    rounding = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **rounding)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, quantization_config=nf4)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else another kernel computes where there are no gradients
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(args.seed)  # the adapter's first values are random
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def logprobs_of(policy, batch):
    """log π(y_t | x, y_<t) of the labels and the entropy of each distribution, in nats, (batch, sequence - 1)."""
    ids, labels = batch  # padded on the right: no real token sees a pad, so no attention mask is needed
    distribution = policy(input_ids=ids).logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:].unsqueeze(-1)
    return distribution.gather(-1, labels.clamp(min=0)).squeeze(-1), -(distribution.exp() * distribution).sum(-1)


# ---- the method ----


def psft_loss(logprobs, old_logprobs, mask, epsilon):
    """PPO's clipped surrogate with advantage +1 on every demonstrated token: -mean of min(r, clip(r, 1 ± ε)).

    For r below 1 the minimum is r itself, so only the upper clip is left. At r = 1 the gradient is plain SFT's.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return -ratio.clamp(max=1 + epsilon)[mask].mean()


def train(args, policy, rows):
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0)
    step, steps = 0, args.sft_warmup_steps + args.blocks * args.reference_steps * args.num_iterations

    def optimizer_step(batch, old_logprobs=None):
        """One step of PSFT; without old log-probabilities, of plain SFT."""
        nonlocal step
        mask = batch[1][:, 1:] != -100
        logprobs, entropy = logprobs_of(policy, batch)
        nll = -logprobs[mask].mean()
        loss = nll if old_logprobs is None else psft_loss(logprobs, old_logprobs, mask, args.epsilon)
        loss.backward()
        fall = round(0.3 * steps)  # the rate is constant, then falls to 0 over the last 30 % of the run
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (steps - step) / fall)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with torch.no_grad():  # the surrogate is no likelihood: these numbers say how training goes
            log_ratio = (torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs)[mask]
            ratio = log_ratio.exp()
            clip_fraction = (ratio > 1 + args.epsilon).float().mean()
            approx_kl = (ratio - 1 - log_ratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
        if step % 8 == 1:
            print(
                f"step {step:3}  loss {loss:6.3f}  nll {nll:.3f}  entropy {entropy[mask].mean():.3f}  "
                f"clip_fraction {clip_fraction:.3f}  approx_kl {approx_kl:.3g}  grad_norm {grad_norm:.2f}"
            )

    for number in range(args.sft_warmup_steps):  # the first trust region is around a policy that knows the format
        optimizer_step(mini_batch(rows, number, args))
    for block in range(args.blocks):
        first = args.sft_warmup_steps + block * args.reference_steps
        batches = [mini_batch(rows, first + i, args) for i in range(args.reference_steps)]
        with torch.no_grad():  # the snapshot: at a block's start the policy itself is the reference policy
            old_logprobs = [logprobs_of(policy, batch)[0] for batch in batches]
        for visit in range(args.num_iterations):
            seed = (args.seed * 1_000_003 + block) * 1_009 + visit  # any would do; this is PSFTTrainer's
            order = permutation(len(batches), seed) if visit else range(len(batches))
            for i in order:
                optimizer_step(batches[i], old_logprobs[i])
    return policy


if __name__ == "__main__":
    args = Args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = [tokenize(tokenizer, row["prompt"], row["completion"]) for row in demonstrations("noisy")]
    policy = train(args, make_policy(args), rows)
    if args.output_dir:
        policy.save_pretrained(args.output_dir)
        print(f"wrote {args.output_dir}")
