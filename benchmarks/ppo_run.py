"""One PPO run by TRL 1.12 from a merged folder, in an environment of its own: started by ppo_start.py.

    ENV/bin/python benchmarks/ppo_run.py MERGED ROWS.jsonl RESULT.json --seed 0 --learning_rate 1e-4

Nothing of qpsft's training is in it: the model is a folder that transformers reads, the reward is the built-in world's
verifier (standard library only). TRL wants a reward *model*; `Verifier` is one in form.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from qpsft.data import built_in


class Verifier(nn.Module):
    """The built-in world's verifier in the form of TRL's reward model: `score(backbone(ids).hidden_states[-1])`.

    The reward, 1 for a right answer and 0 else, stands at every position; TRL takes that of the last token.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, tasks: dict[tuple[int, ...], dict]):
        super().__init__()
        self._tokenizer, self._tasks = tokenizer, tasks
        self.backbone = self._rewards
        self.score = nn.Identity()

    def _rewards(self, input_ids: Tensor, attention_mask: Tensor, **other: Any) -> SimpleNamespace:
        """`hidden_states[-1]` (batch, sequence, 1)."""
        rewards = [self._reward(row[mask].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        each = torch.tensor(rewards, device=input_ids.device)[:, None, None]
        return SimpleNamespace(hidden_states=[each.expand(*input_ids.shape, 1)])

    def _reward(self, ids: list[int]) -> float:
        prompt = next(known for known in self._tasks if tuple(ids[: len(known)]) == known)
        text = self._tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        return float(built_in.check({"task": self._tasks[prompt]}, text))


class Log(TrainerCallback):
    """Keeps what TRL logs of each update."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "objective/scores" in logs:
            kept = {"reward": "objective/scores", "entropy": "policy/entropy_avg", "kl": "objective/kl"}
            self.lines.append({"step": state.global_step} | {name: round(logs[key], 6) for name, key in kept.items()})


@torch.no_grad()
def measure(model: Any, tokenizer: Any, rows: list[dict], *, max_new_tokens: int) -> dict[str, float]:
    """Greedy accuracy in-domain and out of it (the mean over the sets), and the share of samples that are right."""
    right: dict[str, list[bool]] = {}
    model.eval()
    by_length: dict[int, list[tuple[dict, list[int]]]] = {}
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        by_length.setdefault(len(ids), []).append((row, ids))
    for group in by_length.values():
        ids = torch.tensor([one for _, one in group])
        for sampled in (False, True):
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=sampled, top_k=0, temperature=1.0,
                max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for (row, _), text in zip(group, texts, strict=True):
                name = row["set"] if not sampled else f"{row['set']}/sampled"
                right.setdefault(name, []).append(bool(built_in.check(row, text)))
    shares = {name: sum(found) / len(found) for name, found in right.items()}
    out = [share for name, share in shares.items() if "/" not in name and name != "in_domain"]
    return {
        "in_domain": shares["in_domain"],
        "right_sampled": shares["in_domain/sampled"],
        "out_of_domain": sum(out) / len(out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a merged folder")
    parser.add_argument("rows", type=Path, help="JSON lines: prompt, task, set (train, in_domain or another)")
    parser.add_argument("result", type=Path, help="written: points (before, after), log, versions")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--updates", type=int, required=True, help="batches of prompts, each answered once")
    parser.add_argument("--batch", type=int, required=True, help="prompts of an update")
    parser.add_argument("--max_new_tokens", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(options.seed)  # of the value head
    value = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        value.score.weight.zero_()  # the first values are 0, not noise
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in rows
        if row["set"] == "train"
    ]
    tasks = dict(zip(map(tuple, prompts), (row["task"] for row in rows if row["set"] == "train"), strict=True))
    tested = [row for row in rows if row["set"] != "train"]
    log = Log()
    trainer = PPOTrainer(
        args=PPOConfig(
            tempfile.mkdtemp(),  # nothing is saved there
            seed=options.seed,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            total_episodes=options.updates * options.batch,
            response_length=options.max_new_tokens,
            local_rollout_forward_batch_size=options.batch,
            num_sample_generations=0,
            stop_token="eos",
            temperature=1.0,
            kl_coef=0.0,  # as in the runs of GRPO beside it: no pull to where it started
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=Verifier(tokenizer, tasks),
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        eval_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts[: options.batch]]),
        callbacks=[log],
    )
    points = [{"step": 0} | measure(policy, tokenizer, tested, max_new_tokens=options.max_new_tokens)]
    trainer.train()
    points.append({"step": options.updates} | measure(policy, tokenizer, tested, max_new_tokens=options.max_new_tokens))
    import datasets
    import transformers
    import trl

    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, datasets)}
    options.result.write_text(json.dumps({"points": points, "log": log.lines, "versions": versions}) + "\n")


if __name__ == "__main__":
    main()
