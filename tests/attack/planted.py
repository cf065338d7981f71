"""Folders with planted Python code that leaves a mark when it runs, and commands that are fed from a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from qpsft.model.folder import MODEL_DIR

ROOT = Path(__file__).resolve().parents[2]
YES = "y\nyes\n1\n" * 5
"""What a user may well write into a pipe, and what transformers takes for consent."""


def plant(folder: Path, *names: str) -> Path:
    """Python files in `folder` that make the file returned when they are imported."""
    mark = folder.parent / f"{folder.name}.was-run"
    for name in names or ("evil.py",):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit(0)\n")
    return mark


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def prompt_tuning(folder: Path, base: Path = MODEL_DIR, **values: Any) -> Path:
    """An adapter of PEFT's prompt tuning, whose config says that it is in training and which tokenizer to load."""
    config = AutoConfig.from_pretrained(base)
    folder.mkdir()
    settings = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello",
        "tokenizer_name_or_path": str(folder), "inference_mode": False, "num_transformer_submodules": 1,
        "token_dim": config.hidden_size, "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | values))
    save_file({"prompt_embeddings": torch.zeros(4, config.hidden_size)}, folder / "adapter_model.safetensors")
    return folder


def qpsft(
    *arguments: Any, fed: str = YES, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the command line does with `fed` in its standard input."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from qpsft.cli import main; sys.exit(main())", *map(str, arguments)],
        input=fed,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **environment},
    )
