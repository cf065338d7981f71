"""An exported folder of safetensors: its tensors read one at a time, and a model that reads its weights as it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qpsft.errors import BaseModelError
from qpsft.model.folder import read_config
from qpsft.model.skeleton import predicts_ahead

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_text_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with the language model's part of it (`text_config`) at the top."""
    config = read_config(folder)
    return config | (config.get("text_config") or {})


class ExportedWeights:
    """The tensors of a folder by name, read from disk one at a time."""

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
        """Of all tensors, file by file."""
        return list(self._files)

    def shape_of(self, name: str) -> list[int]:
        """The tensor's shape, from the file's header."""
        return self._files[name].get_slice(name).get_shape()

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's dtype; the folder's most common one for a name it lacks (a tied head)."""
        if name not in self._files:
            return _DTYPES[self._common()]
        return _DTYPES.get(self._files[name].get_slice(name).get_dtype(), torch.float32)

    def main_dtype(self) -> str:
        """The dtype that most of the weights have, such as "bfloat16"."""
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


def load_exported(weights: ExportedWeights, device: torch.device, fetch: Callable[[str], Tensor] | None = None) -> Any:
    """The exported model with float32 arithmetic, each module's weights read from disk when it runs.

    So the memory needed is one module's weights, whatever the model's size. A model whose modules do not match its
    file name by name (transformers fuses the experts of some) is loaded whole.

    Args:
        fetch: what to read a tensor with, by its name in the file; None is `weights.tensor`.

    Raises:
        BaseModelError: it cannot be loaded, or tensors are missing or too many.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(weights.folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    model.tie_weights()
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    if set(canonical.values()) - set(weights.names()):
        return load_whole(weights, device, fetch)
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{own}"
            module._buffers[own] = (weights.tensor(full) if full in weights else buffer).to(device)
        names = {own: canonical[id(parameter)] for own, parameter in module.named_parameters(recurse=False)}
        if names:
            module._parameters = _OnDisk(module._parameters, names, fetch or weights.tensor, device)
            module.register_forward_pre_hook(_read_all)
            module.register_forward_hook(partial(_free_all, dict(module._parameters)), always_call=True)
    return model


class _OnDisk(dict):
    """A module's parameters by their names in it; one that is on the meta device is read whenever it is asked for.

    Before a forward of the module, `_read_all` reads them once. Some models use a module's weight without calling the
    module (a convolution's in hybrid models, the embedding's in Gemma 4); then it is read here.
    """

    def __init__(self, empty: dict, names: dict[str, str], fetch: Callable[[str], Tensor], device: torch.device):
        super().__init__(empty)
        self.names, self._fetch, self._device = names, fetch, device

    def __getitem__(self, own: str) -> nn.Parameter:
        parameter = super().__getitem__(own)
        if parameter is None or not parameter.is_meta:
            return parameter
        return nn.Parameter(self._fetch(self.names[own]).to(self._device), requires_grad=False)


def _read_all(module: Any, args: Any) -> None:
    for own in module._parameters.names:
        module._parameters[own] = module._parameters[own]


def _free_all(empty: dict[str, nn.Parameter], module: Any, args: Any, output: Any) -> None:
    module._parameters.update(empty)


def load_whole(weights: ExportedWeights, device: torch.device, fetch: Callable[[str], Tensor] | None = None) -> Any:
    """The exported model as transformers loads it, in float32, all of it in memory.

    `fetch` replaces the weights that have a tensor of their own in the file. Raises as `load_exported`.
    """
    from transformers import AutoModelForCausalLM

    folder = weights.folder
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"The export in {folder} cannot be loaded: {first}", "Export again.") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[key]))
        if key == "unexpected_keys":
            names = [name for name in names if not predicts_ahead(name, model.config)]
        if names:
            raise BaseModelError(
                f"The export in {folder} has {len(names)} {key.removesuffix('_keys')} tensors, such as {names[0]}.",
                "Export again.",
            )
    for name, parameter in model.named_parameters():
        if fetch is not None and name in weights:
            parameter.data = fetch(name).to(device)
    return model.eval()
