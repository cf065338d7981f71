"""The shape of a base model: its config.json, on this machine or fetched, or qpsft's table of well-known ones.

`known_shapes.json` holds what the config.json of models that people fine-tune says about their shape, so that a plan
by Hub id works offline and for gated models. Each entry's `parameters` is the total that the model's page on the Hub
shows.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import BaseModelError
from qpsft.model.folder import CONFIG, DEMO, check_config, resolve_folder
from qpsft.model.skeleton import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TABLE = Path(__file__).with_name("known_shapes.json")


@dataclass(frozen=True)
class Shape:
    """A model's config and where it came from, in words that end "shape from …"."""

    config: PretrainedConfig
    source: str


def find_shape(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Shape:
    """The shape of a model that need not be on this machine.

    A folder's config.json, the Hub cache's, the table's (whatever the revision: a model keeps its shape), else
    config.json alone is fetched from the Hub.

    Raises:
        BaseModelError: no such model; its config is broken or not a causal language model's.
    """
    known = known_shapes().get(name.lower())
    local = name == DEMO or Path(name).expanduser().exists() or _is_cached(name, revision)
    if known is not None and not local:
        return Shape(_config_of(known), "qpsft's table, not from its config.json")
    folder = resolve_folder(name, revision=revision, config_only=True, remote_code=trust_remote_code)
    check_config(folder, trust_remote_code=trust_remote_code)
    return Shape(load_config(folder, trust_remote_code), "its config.json")


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, CONFIG, revision=revision), str)
    except HFValidationError:
        return False


@functools.cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """The table: Hub id in lower case -> {"id", "family", "parameters", "variant", "config"}."""
    table = {}
    for shape in json.loads(TABLE.read_text(encoding="utf-8"))["shapes"]:
        for variant, (name, differences) in enumerate(shape["ids"].items()):
            entry = {key: shape[key] for key in ("family", "parameters")}
            table[name.lower()] = entry | {"id": name, "variant": variant, "config": shape["config"] | differences}
    return table


def _config_of(known: dict[str, Any]) -> PretrainedConfig:
    return read_shape(known["config"])


def read_shape(config: dict[str, Any]) -> PretrainedConfig:
    """A config.json's content as transformers reads it. Raises BaseModelError when it cannot."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    content = dict(config)
    try:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"This config cannot be read by transformers: {error}.", "Check its values.") from error


def smaller_models(name: str) -> list[str]:
    """Hub ids of the same family and kind with fewer parameters, the largest first; none for an unknown model."""
    known = known_shapes().get(name.lower())
    if known is None:
        return []
    same = [
        entry
        for entry in known_shapes().values()
        if entry["family"] == known["family"] and entry["variant"] == known["variant"]
    ]
    fewer = [entry for entry in same if entry["parameters"] < known["parameters"]]
    return [entry["id"] for entry in sorted(fewer, key=lambda entry: -entry["parameters"])]
