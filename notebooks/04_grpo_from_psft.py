# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reinforcement learning from a PSFT adapter
#
# <a href="https://colab.research.google.com/github/qpsft/qpsft/blob/main/notebooks/04_grpo_from_psft.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a>
#
# A cold start with Proximal SFT, then GRPO with TRL's `GRPOTrainer` on the same 4-bit base and the same adapter, with a reward
# that is checked, not learned.
#
# - **Runs on** a T4 with Qwen2.5-0.5B on GSM8K, or on a CPU with the embedded base.
# - **The outputs you see** are from the embedded base on 2 CPU cores.

# %%
import importlib.util

get_ipython().system_raise_on_error = True  # a command that fails ends "Run all"
if importlib.util.find_spec("qpsft") is None:
    # %pip install -q "qpsft[eval] @ git+https://github.com/qpsft/qpsft"

# %% [markdown]
# ## Parameters
#
# For rows of your own, upload two files on the left, one to train on and one to measure on, and uncomment the last lines. A
# file has no test split: `TEST` must name rows that are not trained on.

# %% tags=["parameters"]
import os

import torch

SETTING = os.environ.get("QPSFT_NOTEBOOK") or ("gpu" if torch.cuda.is_available() else "demo")  # gpu, demo or test
ADAPTER = "runs/cold_start"
GPU = SETTING == "gpu"
OPTIONS = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct" if GPU else "demo",
    "dataset_name": "openai/gsm8k" if GPU else "demo-noisy",
    **({"dataset_config": "main", "dataset_columns": {"prompt": "question", "completion": "answer"}} if GPU else {}),
    "max_length": 512 if GPU else 128,
    "max_steps": {"gpu": 100, "demo": 128, "test": 8}[SETTING],
    "learning_rate": 2e-4 if GPU else 2e-3,
    "lora_r": 16 if GPU else 8,
    "gradient_checkpointing": GPU,
    "per_device_train_batch_size": 2 if GPU else 16,
    "gradient_accumulation_steps": 8 if GPU else 1,
    "output_dir": ADAPTER,
}
GRPO_STEPS = {"gpu": 100, "demo": 40, "test": 2}[SETTING]
NEW_TOKENS = 320 if GPU else 56
TEST = OPTIONS["dataset_name"]  # its test split

# Your own rows (.jsonl, .json, .csv or .parquet) with the columns prompt and completion; for other columns "dataset_columns":
# {"prompt": "your column", "completion": "your column"}. A verifier must be able to tell right answers from wrong ones.
# OPTIONS |= {"dataset_name": "train.jsonl", "dataset_config": None, "dataset_columns": None}
# TEST = "test.jsonl"

# %% [markdown]
# ## Cold start
#
# A short run of Proximal SFT on demonstrations.

# %%
from pathlib import Path

import yaml

from qpsft import PSFTConfig
from qpsft.train.notebook import LivePlot
from qpsft.recipe.file import load_recipe
from qpsft.train.run import train

Path("recipe.yaml").write_text(yaml.safe_dump(OPTIONS | {"logging_steps": 8}, sort_keys=False))
recipe = load_recipe("recipe.yaml", ["--overwrite"], PSFTConfig)
summary = train(recipe, callbacks=[LivePlot("Cold start")])

# %% [markdown]
# ## Three lines
#
# The adapter loads as it is: base in 4 bits, adapter on it, trainable.

# %%
from peft import PeftModel

from qpsft import load_base

base, tokenizer = load_base(OPTIONS["model_name_or_path"])
model = PeftModel.from_pretrained(base, ADAPTER, is_trainable=True)

# %% [markdown]
# ## Prompts and a reward
#
# 1 for a right answer, 0 for a wrong one: the verifiers of `qpsft evaluate` give it. Prompts come from the training split; the
# test rows are for the measurements before and after, and those that stand among the training rows too are counted.

# %%
from datasets import Dataset

from qpsft.evaluate.rows import duplicates, load_evaluation_rows
from qpsft.evaluate.verifiers import find_verifier, text_of

rows = load_evaluation_rows(OPTIONS["dataset_name"], recipe.data, "train").rows
test = load_evaluation_rows(TEST, recipe.data, "test").rows
print(f"{len(test)} test rows:", duplicates(rows, test), "among the training rows")
verifier, is_right = find_verifier("auto", rows, OPTIONS["dataset_name"])
print("verifier:", verifier)
prompts = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": text_of(row["prompt"])}], "row": i} for i, row in enumerate(rows)]
)


def reward(completions, row, **kwargs):
    return [float(is_right(rows[i], text_of(completion)) or 0) for i, completion in zip(row, completions)]


# %% [markdown]
# ## Before

# %%
from qpsft.evaluate import evaluate

measure = {"k": 8, "max_new_tokens": NEW_TOKENS, "arguments": recipe.data, "limit": {"gpu": 32, "demo": 64, "test": 4}[SETTING]}
before = evaluate(model, tokenizer, test, **measure)
print(f"pass@1 {before['pass@1']:.3f}  pass@8 {before['pass@8']:.3f}  entropy {before['sample_entropy']:.3f}")

# %% [markdown]
# ## GRPO
#
# TRL rounds a quantized model's adapter to bfloat16, which cannot take small steps; made inside `float32_adapter` the trainer
# leaves it as it is. The compute dtype is the base's: float16 on a T4, float32 on a CPU.

# %%
from trl import GRPOConfig, GRPOTrainer

from qpsft import float32_adapter

config = GRPOConfig(
    "runs/grpo",
    max_steps=GRPO_STEPS,
    learning_rate=1e-4 if GPU else 1e-3,
    bf16=base.dtype == torch.bfloat16,
    fp16=base.dtype == torch.float16,
    num_generations=8,
    per_device_train_batch_size=8 if GPU else 64,
    gradient_accumulation_steps=4 if GPU else 1,
    max_completion_length=NEW_TOKENS,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
with float32_adapter(model):
    trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer)
trainer.train()
print("The adapter was trained in", {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad})

# %% [markdown]
# ## After

# %%
import matplotlib.pyplot as plt

lines = [line for line in trainer.state.log_history if "reward" in line]
plt.figure(figsize=(6, 3), dpi=70)
plt.plot([line["step"] for line in lines], [line["reward"] for line in lines], color="0.1")
plt.xlabel("GRPO step")
plt.ylabel("mean reward")
plt.grid(color="0.9")
plt.show()

# %%
after = evaluate(trainer.model, tokenizer, test, **measure)
for name in ("accuracy", "pass@1", "pass@8", "sample_entropy", "kl_samples"):
    print(f"{name:16}{before[name]:8.3f}{after[name]:8.3f}")

# %% [markdown]
# ## Is the start worth it?
#
# `benchmarks/rl_start.py` runs the same GRPO from SFT, SFT-matched and PSFT adapters with several seeds; the result is in
# `docs/rl.md`.
