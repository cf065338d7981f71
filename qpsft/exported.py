"""An exported folder of safetensors: its tensors one at a time, and the model as transformers loads it."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpsft.errors import BaseModelError
from qpsft.hardware import pick_device

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ExportedWeights:
    """The tensors of a folder by name, read from disk one at a time.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def shape_of(self, name: str) -> list[int]:
        return self._files[name].get_slice(name).get_shape()

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's dtype; the folder's most common one for a name it lacks (a tied head)."""
        if name not in self._files:
            return _DTYPES[self._common()]
        return _DTYPES.get(self._files[name].get_slice(name).get_dtype(), torch.float32)

    def main_dtype(self) -> str:
        return str(_DTYPES[self._common()]).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        """The tensor as float32 on the CPU. Raises BaseModelError when its bytes cannot be read."""
        try:
            return self._files[name].get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{name} in {self.folder} cannot be read: {error}.", "Export again.") from error

    def _common(self) -> str:
        counts: Counter[str] = Counter()
        for name, file in self._files.items():
            part = file.get_slice(name)
            if part.get_dtype() in _DTYPES:
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
        return counts.most_common(1)[0][0] if counts else "F32"


def load_exported(weights: ExportedWeights, device: str = "auto") -> Any:
    """The exported model as transformers loads it, in eval mode, with float32 arithmetic.

    Raises:
        BaseModelError: it cannot be loaded, or transformers finds tensors missing or too many.
    """
    from transformers import AutoModelForCausalLM

    folder = weights.folder
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map={"": pick_device(device)},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"The export in {folder} cannot be loaded: {first}", "Export again.") from error
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for key, names in wrong.items():
        if names:
            raise BaseModelError(
                f"The export in {folder} has {len(names)} {key.replace('_keys', '')} tensors, such as {names[0]}.",
                "Export again.",
            )
    return model.eval()
