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
# # Quickstart: Proximal SFT on one GPU
#
# <a href="https://colab.research.google.com/github/qpsft/qpsft/blob/main/notebooks/01_quickstart.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a>
#
# Fine-tune a 4-bit model on demonstrations with a trust region, watch entropy and clip fraction while it trains, compare
# its answers before and after, and save an adapter that plain PEFT loads.
#
# - **Runs on** a free Colab T4 (`Runtime → Change runtime type → T4 GPU`) with Qwen2.5-0.5B on GSM8K, or on any CPU with
#   the embedded base model of 0.5 M parameters.
# - **The outputs you see** are from the embedded base on 2 CPU cores.

# %%
import importlib.util

get_ipython().system_raise_on_error = True  # a command that fails ends "Run all"
if importlib.util.find_spec("qpsft") is None:
    # %pip install -q "qpsft @ git+https://github.com/qpsft/qpsft"

# %% [markdown]
# ## Parameters
#
# The one cell to edit. On a machine without a GPU, or with `QPSFT_NOTEBOOK=demo` set, everything runs on the embedded base.
#
# For rows of your own, upload two files on the left, one to train on and one to measure on, and uncomment the last lines. A
# file has no test split: `TEST` must name rows that are not trained on.

# %% tags=["parameters"]
import os

import torch

SETTING = os.environ.get("QPSFT_NOTEBOOK") or ("gpu" if torch.cuda.is_available() else "demo")  # gpu, demo or test
if SETTING == "gpu":
    OPTIONS = {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "dataset_name": "openai/gsm8k",
        "dataset_config": "main",
        "dataset_columns": {"prompt": "question", "completion": "answer"},
        "max_length": 512,
        "max_steps": 200,
        "learning_rate": 2e-4,
        "gradient_accumulation_steps": 8,
    }
    GUARD = {"data": "instruction_checks", "metric": "kl", "max_drop": 0.2, "every": 50}
else:
    OPTIONS = {
        "model_name_or_path": "demo",
        "dataset_name": "demo-noisy",  # 30 % of these demonstrations contain a wrong step
        "max_length": 128,
        "max_steps": 252 if SETTING == "demo" else 16,
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "lora_r": 8,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "base_kl": 0.05,  # holds the run near its base: more is learnt before the guard stops it
    }
    GUARD = {"data": "old_skill.jsonl", "metric": "accuracy", "max_drop": 0.5, "every": 16, "max_new_tokens": 56}
OUTPUT = "runs/quickstart"
TEST = OPTIONS["dataset_name"]  # its test split

# Your own rows (.jsonl, .json, .csv or .parquet) with the columns prompt and completion, or messages; for other columns
# "dataset_columns": {"prompt": "your column", "completion": "your column"}. Raise max_length if preview says rows are cut.
# OPTIONS |= {"dataset_name": "train.jsonl", "dataset_config": None, "dataset_columns": None}
# TEST = "test.jsonl"

# %% [markdown]
# ## A recipe
#
# A run is a flat YAML file; names are TRL's and transformers'. `qpsft train recipe.yaml` on the command line does what this
# notebook does. The method: blocks of K = 8 mini-batches between two snapshots of the policy, each gone through four times,
# after one block of plain SFT. For the paper's recipe leave `num_iterations` and `sft_warmup_steps` out.
#
# The guard: rows of something that the base can do. When the model has lost more of it than `max_drop`, the run stops, and
# the adapter that is written is the last one that had not. `instruction_checks` are prompts that come with qpsft, for an
# instruct model; here, with `kl`, the model may move 0.2 nats per token from the base on them.

# %%
import json
from pathlib import Path

import yaml

if GUARD["data"] == "old_skill.jsonl":
    from qpsft.data import built_in

    rows = built_in.out_of_domain("validation", 25)["shorter_a"] + built_in.out_of_domain("validation", 25)["set_b"]
    Path(GUARD["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))

METHOD = {"reference_steps": 8, "num_iterations": 4, "sft_warmup_steps": 8, "epsilon": 0.28, "logging_steps": 8}
Path("recipe.yaml").write_text(
    yaml.safe_dump(OPTIONS | METHOD | {"guard": GUARD, "output_dir": OUTPUT}, sort_keys=False)
)
print(Path("recipe.yaml").read_text())

# %% [markdown]
# ## What the model will see
#
# Before any training: the rows, tokenized as they will be, the supervised tokens marked.

# %%
# !qpsft preview recipe.yaml

# %% [markdown]
# ## The base before
#
# The base in 4 bits, and its answers to three of the test rows. Those that stand among the training rows too are counted:
# with any of them, what follows measures memory as well.

# %%
from qpsft import PSFTConfig, load_base
from qpsft.data.tokenize import load_rows
from qpsft.evaluate.rows import duplicates, load_evaluation_rows
from qpsft.recipe.file import load_recipe

recipe = load_recipe("recipe.yaml", ["--overwrite"], PSFTConfig)
rows = load_evaluation_rows(TEST, recipe.data, "test")
trained = load_rows(recipe.data.dataset_name, recipe.data, recipe.data.dataset_train_split)
print(f"{len(rows.rows)} test rows:", duplicates(trained.rows, rows.rows), "among the training rows")
model, tokenizer = load_base(recipe.model.model_name_or_path)

# %%
from qpsft.evaluate import evaluate

NEW_TOKENS, LIMIT = (320, 32) if SETTING == "gpu" else (56, 100 if SETTING == "demo" else 8)
measure = {"k": 4, "max_new_tokens": NEW_TOKENS, "limit": LIMIT, "arguments": recipe.data}
before = evaluate(model, tokenizer, rows, **measure)
for row in before.completions[:3]:
    print(f"{row.prompt}\n  {row.greedy[0]!r}\n")

# %% [markdown]
# ## Train
#
# Four curves, redrawn while it trains:
#
# - **NLL** falls. It is what plain SFT minimizes; PSFT's own objective is not a likelihood.
# - **Entropy**: a steep fall towards 0 is collapse, a rise above the first value is noise being learned.
# - **Clip fraction**: the share of tokens that the trust region takes out of the gradient. 0 right after a snapshot, growing
#   until the next. Always 0: it never acts. Above a half: lower the learning rate.
# - **KL** from the last snapshot to the policy: how far one block moves it.
#
# The last panel is the guard's: the old skill beside the new one. If the guard stops the run, the summary says at which step.
# On the embedded base it does: a third of the new task is right by then, and half of the old skill is left. `02_sft_vs_psft`
# has the methods that keep more.

# %%
from qpsft.train.notebook import LivePlot
from qpsft.train.run import train

summary = train(recipe, callbacks=[LivePlot("Proximal SFT")])

# %%
print(summary)

# %% [markdown]
# ## Before and after
#
# The same prompts, answered by the base with the adapter on.

# %%
from peft import PeftModel

model = PeftModel.from_pretrained(model, OUTPUT)
after = evaluate(model, tokenizer, rows, **measure)
for old, new in list(zip(before.completions, after.completions))[:3]:
    print(f"{new.prompt}\n  before  {old.greedy[0]!r}\n  after   {new.greedy[0]!r}\n  right   {new.reference!r}\n")

# %%
print(f"{'':24}{'before':>10}{'after':>10}")
for name in ("accuracy", "pass@1", "pass@4", "nll", "entropy", "sample_entropy"):
    print(f"{name:24}{before[name]:10.3f}{after[name]:10.3f}")
print(f"{'kl_samples (drift)':24}{'':10}{after['kl_samples']:10.3f}")

# %% [markdown]
# ## Talk to it
#
# `qpsft chat` streams in a terminal; `/both` answers with base and tuned. Here one line is piped in.

# %%
import subprocess

prompt = " ".join(after.completions[0].prompt.splitlines())  # a line is a turn
command = ["qpsft", "chat", OUTPUT, "--temperature", "0", "--max_new_tokens", str(NEW_TOKENS)]
answer = subprocess.run(command, input=prompt, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
print(answer.stdout)
answer.check_returncode()

# %% [markdown]
# ## Keep it
#
# The folder is a PEFT adapter with its tokenizer, a model card, the curves and the resolved recipe. `recipe.yaml` in it
# repeats the run; `--resume` continues one that was cut off.

# %%
for path in sorted(Path(OUTPUT).iterdir()):
    if path.is_file():
        print(f"{path.stat().st_size:>12,}  {path.name}")

# %% [markdown]
# ## Next
#
# - `02_sft_vs_psft`: is PSFT better than SFT on *your* data?
# - `03_merge_and_export`: a merged model or a GGUF that is proven to be this one.
# - `04_grpo_from_psft`: reinforcement learning from this adapter.
# - To keep the adapter from Colab: `qpsft push runs/quickstart YOU/NAME`, or download the folder on the left.
