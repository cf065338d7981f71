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
# # Which method keeps what? The honest comparison
#
# <a href="https://colab.research.google.com/github/qpsft/qpsft/blob/main/notebooks/02_sft_vs_psft.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a>
#
# Same base, same rows, same number of optimizer steps: plain SFT, SFT held near the base, DFT and PSFT. After every
# epoch: what is learnt, what is kept of what the base could do, entropy, drift from the base, pass@k.
#
# All methods take the recipe's learning rate here. A result to rely on gives each the rate that is best for *it* on
# validation rows: `"tune": True` in `COMPARE` does that, in several times the time.
#
# - **Runs on** a CPU with the embedded base in about 20 minutes as it stands (2 cores), on a T4 with your model in hours:
#   lower `seeds` and `epochs` in `COMPARE` first.
# - **The outputs you see** are from the embedded base on 2 CPU cores.

# %%
import importlib.util

get_ipython().system_raise_on_error = True  # a command that fails ends "Run all"
if importlib.util.find_spec("qpsft") is None:
    # %pip install -q "qpsft @ git+https://github.com/qpsft/qpsft"

# %% [markdown]
# ## Parameters
#
# For your own model: a recipe as in `01_quickstart`, `in_domain` rows held out from training, and one or more
# `out_of_domain` files with what the model must not forget.

# %% tags=["parameters"]
import os

import torch

SETTING = os.environ.get("QPSFT_NOTEBOOK") or ("gpu" if torch.cuda.is_available() else "demo")  # gpu, demo or test
OUTPUT = "runs/comparison"
RECIPE = {
    "model_name_or_path": "demo",
    "dataset_name": "demo-noisy",  # 30 % of these demonstrations contain a wrong step
    "max_length": 128,
    "lora_r": 8,
    "warmup_steps": 0,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "reference_steps": 8,
    "num_iterations": 4,
    "sft_warmup_steps": 8,
    "base_kl": 0.3,  # of the arms that are held near the base
    "logging_steps": 16,
}
COMPARE = {
    "arms": ["sft", "sft_kl", "dft", "psft", "psft_visits"],
    "seeds": 3,
    "epochs": 4,
    "max_new_tokens": 56,
    "k": 4,
}
if SETTING == "gpu":
    RECIPE |= {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "dataset_name": "openai/gsm8k",
        "dataset_config": "main",
        "dataset_columns": {"prompt": "question", "completion": "answer"},
        "dataset_limit": 2000,
        "max_length": 512,
        "lora_r": 16,
        "learning_rate": 2e-4,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "base_kl": 0.1,
    }
    # what is kept: prompts whose instructions a program checks, and the base's own answers; IFEval comes at the end
    COMPARE |= {"max_new_tokens": 320, "in_domain": "gsm8k_test.jsonl"}
    COMPARE["arms"] = ["sft", "sft_kl", "sft_replay", "dft", "psft_visits"]  # the embedded base cannot answer, so no replay
if SETTING == "test":
    COMPARE |= {"arms": ["sft", "psft_visits"], "seeds": 1, "epochs": 0.25, "eval_rows": 16, "sample_rows": 4, "k": 2}

# %% [markdown]
# ## The arms
#
# | arm | what it is |
# | --- | --- |
# | `sft` | plain SFT |
# | `sft_kl` | SFT that is held near the base by the KL from it, with weight `base_kl` |
# | `sft_replay` | SFT with one row in ten an answer of the base's own; on a GPU only |
# | `dft` | dynamic fine-tuning (arXiv 2508.05629) |
# | `psft` | Proximal SFT as in the paper: K = 8, one visit |
# | `psft_visits` | the same, each block gone through four times, one block of SFT warm-up |

# %%
from pathlib import Path

import yaml

Path("comparison.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
if SETTING == "gpu":
    from datasets import load_dataset

    test = load_dataset("openai/gsm8k", "main", split="test").select(range(200))
    test.rename_columns({"question": "prompt", "answer": "completion"}).to_json(COMPARE["in_domain"])

# %% [markdown]
# ## Run
#
# Every run is kept as soon as it is done: interrupt it and run the cell again, or add an arm, and only what is missing is
# done. `qpsft compare comparison.yaml` does the same in a terminal; `tune=True` tries four learning rates for each arm.

# %%
from qpsft.compare import compare

found = compare("comparison.yaml", ["--output_dir", OUTPUT], **COMPARE)

# %% [markdown]
# ## What came out
#
# One sentence and a table of four columns. The sentence follows from 95 % intervals over seeds, paired: with few seeds they are
# wide, and it says so. Every pair in words and every number are in `report.html`.

# %%
from qpsft.compare.verdict import render

print(render(found))

# %% [markdown]
# ## Over the epochs

# %%
from IPython.display import display
from PIL import Image

for picture in sorted(Path(OUTPUT).glob("*.png")):
    display(Image.open(picture).convert("RGB").quantize(32))  # few colours, so that this notebook stays small

# %% [markdown]
# ## Read it yourself
#
# `report.html` in the output folder is one page with all of this, sample completions side by side and every setting; it opens
# from disk. `comparison.json` has every number of every seed.

# %%
arm = COMPARE["arms"][-1]
level, difference = found.matched(arm, "sft")
print(f"{arm} − sft, kept at equal in-domain score ({level:.3f}): {difference.mean:+.3f}", end="")
print("" if difference.half_width is None else f" ± {difference.half_width:.3f} (95 %, {difference.n} seeds)")

# %% [markdown]
# ## On a GPU: IFEval
#
# The gate before publishing: base and tuned model answer the same prompts of IFEval, and the verdict is KEPT, LOST or UNSURE.
# All 541 prompts, without `--limit`, make the interval narrower and take longer.

# %%
if SETTING == "gpu":
    get_ipython().system("pip install -q 'qpsft[eval] @ git+https://github.com/qpsft/qpsft'")
    for method, options in {"sft": "--base_kl 0", "sft_replay": "--base_kl 0", "sft_kl": ""}.items():
        run = f"runs/{method}"  # base_kl is in the recipe, and what stands there goes before what the method sets
        get_ipython().system(f"qpsft train comparison.yaml --method {method} {options} --output_dir {run} --overwrite")
        get_ipython().system(f"qpsft evaluate {run} --keep ifeval --limit 150 || test $? -eq 1")  # 1: something was lost

# %% [markdown]
# ## When to choose which
#
# The gain depends on the data. This project's own measurements are in `docs/evidence.md`, every method with its formula and
# cost in `docs/methods.md`.
