"""What describes a run in its adapter folder: the model card, and the options as a recipe that repeats it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from qpsft import __version__
from qpsft.recipe.file import Recipe
from qpsft.recipe.markdown import as_code, as_text
from qpsft.recipe.sources import data_name

if TYPE_CHECKING:
    from peft import LoraConfig

    from qpsft.train.summary import RunSummary

WRITTEN = "# Written by qpsft train."
RUN_OPTIONS = ("held_out_rows", "early_stopping_patience", "guard")
"""Those of RunArguments that repeat a run."""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def resolved_recipe(recipe: Recipe) -> str:
    """The run's options as YAML that `qpsft train` reads again, with the versions in comments."""
    values = recipe.values()
    values.pop("output_dir", None)  # the folder may be moved
    if not recipe.trainer.cpu_is_asked_for:  # another machine may have a GPU
        values.pop("use_cpu", None)
    values |= {name: getattr(recipe.run, name) for name in RUN_OPTIONS}
    versions = [f"# {line}" for line in _versions()]
    header = [f"{WRITTEN} The options of this run; `qpsft train` on this file repeats it.", *versions]
    return "\n".join(header) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def model_card(recipe: Recipe, summary: RunSummary, config: LoraConfig, options: str) -> str:
    """README.md of the adapter folder: a model card that the Hub understands.

    Args:
        summary: how the run ended.
        config: of the adapter.
        options: name of the file with the resolved recipe.
    """
    folder, n = summary.folder, summary.numbers
    arguments = recipe.trainer
    base = recipe.model.model_name_or_path
    on_hub = not Path(base).exists() and base != "demo"
    front = {
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qpsft", arguments.loss_type, "lora", "trl"],
    }
    packages, machine = _versions()
    blocks = f", {arguments.num_iterations} visits" if arguments.num_iterations > 1 else ""
    method = {
        "psft": f"Proximal SFT (arXiv 2508.17784), ε = {arguments.epsilon}, K = {arguments.reference_steps}{blocks}",
        "nll": "plain SFT (negative log-likelihood)",
        "dft": "DFT (arXiv 2508.05629)",
        "eaft": f"EAFT (arXiv 2601.02151), α = {arguments.eaft_alpha:g}",
        "trsft": f"TrSFT (arXiv 2512.17636), α = {arguments.trsft_alpha:g}",
        "stm": f"STM (arXiv 2501.14315), perplexity up to {arguments.stm_threshold:g}",
    }[arguments.loss_type]
    if arguments.base_kl:
        method += f" + {arguments.base_kl:g} KL(base || policy)"
    start = recipe.lora.adapter_name_or_path
    start = f" Training went on from the adapter {as_code(start)}." if start else ""
    rows_from = as_code(data_name(recipe.data))
    rows = f"\n\nOf the rows: {as_text(', '.join(summary.data))}." if summary.data else ""
    notes = "".join(f"\n- {as_text(note)}" for note in summary.notes)
    notes = f"\nWhile it trained:\n{notes}\n" if notes else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {as_text(folder.resolve().name)}

A LoRA adapter for {as_code(base)} ({recipe.model.quantization}), trained with qpsft on {rows_from}
by {method}.{start}{rows}

| | |
| --- | --- |
| optimizer steps | {summary.written} |
| learning rate | {arguments.learning_rate:g} |
| rank, alpha | {config.r}, {config.lora_alpha:g} |
| NLL at the end | {n["nll"]:.4f} nats per token |
| entropy at the end | {n["entropy"]:.4f} nats per token |
| clip fraction at the end | {n["clip_fraction"]:.1%} |
{notes}
![training curves](training.png)

```python
from peft import PeftModel
from qpsft import load_base

model, tokenizer = load_base({_python(base)}, quantization="{recipe.model.quantization}")
model = PeftModel.from_pretrained(model, {_python(folder.name)})
```

The adapter was trained on the rounded base that `base_quantization.json` describes. All options: `{options}`.

Made with {packages}; {machine}.
"""


def _python(name: str) -> str:
    """A text as Python writes it, in double quotes where it can be."""
    return f'"{name}"' if repr(name) == f"'{name}'" and '"' not in name else repr(name)


def package_versions() -> dict[str, str]:
    """Of qpsft and the packages that results depend on."""
    return {"qpsft": __version__} | {name: version(name) for name in PACKAGES}


def _versions() -> list[str]:
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu()}, {os.cpu_count()} cores"
    return [
        ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {machine}",
    ]


def _cpu() -> str:
    """The CPU and the instructions that torch uses on it; on another one results are rounded differently."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", info.read_text(), flags=re.M) if info.exists() else []
    return f"{(models or ['CPU'])[0]} ({torch.backends.cpu.get_cpu_capability()})"
