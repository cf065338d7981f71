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
# # From an adapter to where models run, proven
#
# <a href="https://colab.research.google.com/github/qpsft/qpsft/blob/main/notebooks/03_merge_and_export.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a>
#
# Merge an adapter that was trained on a 4-bit base, check that the result *is* the trained model, and take it to GGUF, Ollama
# and vLLM.
#
# - **Runs on** any machine: merging streams through a few hundred MB of memory and needs no GPU.
# - **The outputs you see** are from the embedded base on 2 CPU cores. The converter for GGUF
#   (llama.cpp's own, a few MB) is downloaded once.

# %%
import importlib.util

get_ipython().system_raise_on_error = True  # a command that fails ends "Run all"
if importlib.util.find_spec("qpsft") is None:
    # %pip install -q "qpsft[gguf] @ git+https://github.com/qpsft/qpsft"

# %% [markdown]
# ## Parameters
#
# `ADAPTER`: the folder that `qpsft train` wrote. Without one, a small one is trained on the embedded base.

# %% tags=["parameters"]
import os

SETTING = os.environ.get("QPSFT_NOTEBOOK") or "demo"  # demo, or test for the smallest sizes
ADAPTER = "runs/to_export"
MERGED = "runs/to_export-merged"
GGUF = "runs/to_export.gguf"

# %%
from pathlib import Path

from qpsft import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train.run import train

if not Path(ADAPTER, "adapter_model.safetensors").exists():
    Path("recipe.yaml").write_text("model_name_or_path: demo\ndataset_name: demo-noisy\nmax_length: 128\nlora_r: 8\n")
    steps = "96" if SETTING == "demo" else "8"
    flags = ["--max_steps", steps, "--learning_rate", "2e-3", "--gradient_checkpointing", "false", "--overwrite"]
    train(load_recipe("recipe.yaml", [*flags, "--output_dir", ADAPTER, "--logging_steps", "16"], PSFTConfig))

# %% [markdown]
# ## What the base was
#
# The adapter learned to correct the *rounded* weights. `base_quantization.json` records how they were rounded, so that the
# merge can restore them bit for bit.

# %%
print(Path(ADAPTER, "base_quantization.json").read_text())

# %% [markdown]
# ## Merge
#
# Onto the weights that training saw (`onto="trained"`), streamed tensor by tensor, then compared with the live 4-bit model
# plus adapter: weight by weight, and on the prompts that were held out from training. The bounds come from rounding to the
# output's dtype alone; a merge that exceeds them is removed, and the layer is named.

# %%
from qpsft.merge import merge_adapter

report = merge_adapter(ADAPTER, output=MERGED, overwrite=True)
print(report.summary())

# %% [markdown]
# ## The other target
#
# Merged onto the original 16-bit weights the model is another one: often fine, never the same. The check says by how much,
# and is told that this is expected.

# %%
other = merge_adapter(ADAPTER, output=MERGED + "-original", onto="original", overwrite=True)
print(other.summary())

# %% [markdown]
# ## It is an ordinary model now

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(MERGED, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MERGED)
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}")

# %% [markdown]
# ## GGUF
#
# llama.cpp's own converter, then every tensor is read back and compared, the tokenizer too. With `xllamacpp` installed
# the file is also run, its tokens and probabilities compared with the trained model's.

# %%
# !qpsft export "{ADAPTER}" --to gguf -o "{GGUF}" --overwrite

# %% [markdown]
# ## Ollama
#
# A folder with the GGUF and a Modelfile: template, stop tokens and context from the model.

# %%
# !qpsft export "{ADAPTER}" --to ollama -o runs/ollama --overwrite

# %%
print(Path("runs/ollama/Modelfile").read_text())

# %% [markdown]
# Then `ollama create mine -f runs/ollama/Modelfile` and `ollama run mine`.
#
# ## vLLM
#
# The command to serve the adapter on its base, or, where vLLM cannot serve it as LoRA, a merge.

# %%
# !qpsft export "{ADAPTER}" --to vllm

# %% [markdown]
# ## Verify again, any time
#
# Exit code 0: the same model. 1: another one.

# %%
# !qpsft verify "{ADAPTER}" "{MERGED}"
