"""Does an adapter's file hold exactly the tensors that its config calls for on a base?

PEFT itself says what is called for: its layers are put on the base, and what it would save of them is wanted. When PEFT
loads a file, it only warns of missing tensors and says nothing of unknown ones, so a file whose every name has a
foreign prefix leaves the bare base. Here each of these is an error.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpsft.errors import BaseModelError, one_line
from qpsft.model.adapter import POLICY
from qpsft.model.base_record import logical_shape
from qpsft.model.folder import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import PeftModel

Shapes = dict[str, tuple[int, ...]]

_TRAINED = (".lora_", ".modules_to_save.", ".original_module.", ".token_adapter.")
"""What PEFT writes into the names of modules that are not the base's own."""

_COPY_AGAIN = (
    "Copy the adapter's files again. If they are complete, they do not belong together, or the adapter is for another "
    "base."
)


def check_tensors(file: Path, stored: Shapes, model: PeftModel, base: Any) -> None:
    """Compares the tensors of an adapter's file with its layers.

    Weights of the base that PEFT saves beside an adapter, such as resized embeddings, may be in the file too.

    Args:
        file: the adapter's safetensors file, for messages.
        stored: shapes of its tensors by name.
        model: with the adapter's layers on it; on the meta device or with values.
        base: what messages call the base.

    Raises:
        BaseModelError: tensors are missing, unknown or of another shape. It names the first of them, beside the wanted
            name if it has another, and says how many there are.
    """
    wanted, loaded = _wanted(model), _loaded(file, stored, model, base)
    known = _base_weights(model) | wanted
    missing = sorted(set(wanted) - set(loaded))
    unknown = sorted(tensor.name for name, tensor in loaded.items() if name not in known)
    if missing and unknown:
        near = difflib.get_close_matches(missing[0], unknown[:1000], n=1, cutoff=0.0)[0]
        raise BaseModelError(
            f"{file} has other names than {ADAPTER_CONFIG} calls for on {base}: it holds {near} in place of "
            f"{missing[0]}. {len(missing)} of {len(wanted)} tensors are missing, and {len(unknown)} of the file's "
            f"{len(stored)} are unknown.",
            "Save the adapter again with PEFT's save_pretrained, from the model without the wrappers of torch.compile, "
            "DDP or FSDP, or rename the tensors in the file. If the names are right, give the base that it was trained "
            "on.",
        )
    if missing:
        raise BaseModelError(
            f"{file} lacks {missing[0]}, which {ADAPTER_CONFIG} calls for on {base} ({len(missing)} of {len(wanted)} "
            "tensors are missing).",
            _COPY_AGAIN,
        )
    if unknown:
        raise BaseModelError(
            f"{file} holds {unknown[0]}, which {ADAPTER_CONFIG} does not call for on {base} ({len(unknown)} of its "
            f"{len(stored)} tensors are unknown).",
            _COPY_AGAIN,
        )
    misshapen = sorted(name for name, tensor in loaded.items() if tensor.shape != known[name])
    if misshapen:
        first = loaded[misshapen[0]]
        raise BaseModelError(
            f"{first.name} in {file} has shape {first.shape}; on {base}, with the rank in {ADAPTER_CONFIG}, it would "
            f"have {known[misshapen[0]]} ({len(misshapen)} of {len(stored)} tensors have other shapes).",
            "The files do not belong together, the adapter is for another base, or the vocabulary was resized: give "
            "the base it was trained on.",
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor as PEFT loads it: its shape, and its name in the file (its new one if it is made of several)."""

    name: str
    shape: tuple[int, ...]


def _wanted(model: PeftModel) -> Shapes:
    """What PEFT would save of the adapter."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _base_weights(model: PeftModel) -> Shapes:
    """The base's own parameters, by the names under which PEFT would save them."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: tuple(logical_shape(p)) for name, p in parameters if not any(part in name for part in _TRAINED)}


def _loaded(file: Path, stored: Shapes, model: PeftModel, base: Any) -> dict[str, _Tensor]:
    """The stored tensors by the names under which PEFT loads them."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    names = {id(tensor): name for name, tensor in empty.items()}
    loaded = as_peft_loads(empty, model, file, base)
    return {name: _Tensor(names.get(id(tensor), name), tuple(tensor.shape)) for name, tensor in loaded.items()}


def as_peft_loads(tensors: dict[str, torch.Tensor], model: PeftModel, file: Path, base: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file as PEFT loads them, by name.

    They are those in the file, except where transformers has renamed or fused modules since it was written.

    Args:
        tensors: of the file by name, with values or on the meta device.
        model: with the adapter's layers on it.
        file, base: for messages.

    Raises:
        BaseModelError: they cannot be converted.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    try:
        return convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[POLICY], tensors, POLICY)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        raise BaseModelError(
            f"The tensors in {file} cannot be converted for {base}: {one_line(error)}",
            "Copy the adapter's files again, or save it with the versions of peft and transformers in use here.",
        ) from error
