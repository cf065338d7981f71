"""An adapter's folder as PEFT writes it, opened: config, tensors, the record of its base, tokenizer.

Every verb that uses an adapter opens it here and asks `base_folder` for its base. So three questions have one answer
everywhere: is this its base, does its file hold exactly the tensors that its config calls for, and is it the very file
that the record of the base was written for?
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qpsft.errors import BaseModelError, ExportError, one_line
from qpsft.files import file_sha256, read_object
from qpsft.model.adapter import POLICY
from qpsft.model.adapter_tensors import check_tensors
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.base_record import ADAPTER_WEIGHTS, RECORD_FILE, BaseRecord, BaseSource, read_base_record, source_of
from qpsft.model.folder import (
    ADAPTER_CONFIG,
    MODEL_DIR,
    PICKLE_SUFFIXES,
    cannot_be_hub_id,
    check_weights,
    hub_snapshot,
    near_folders,
    resolve_folder,
    tensor_shapes,
)
from qpsft.model.remote_code import code_is_off
from qpsft.model.skeleton import build_skeleton

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
HUB_FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD_FILE, "token*", "special_tokens_map.json", "*.jinja"]
"""What of a Hub repository belongs to an adapter."""

_GIVE_ITS_BASE = (
    "Give the base it was trained on (--base; in a recipe model_name_or_path), or restore it if it has changed since."
)

SETTINGS_TYPES: dict[str, Any] = {
    "peft_type": str, "base_model_name_or_path": str, "revision": str, "modules_to_save": list[str], "bias": str,
    "r": int, "lora_alpha": (int, float), "rank_pattern": dict, "alpha_pattern": dict,
    "target_modules": (str, list[str]), "alora_invocation_tokens": list[int],
}  # fmt: skip
"""Of the keys of adapter_config.json that are read here, or that PEFT does not check itself."""
PREFIX = "base_model.model."
"""What PEFT puts before the base's own names, in its model and in its files."""

# Features of PEFT's LoRA whose forward is not W + a low-rank product, or that merging does not know.
_OTHER_FORWARDS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_INITS_THAT_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterFolder:
    """An adapter's folder. Opening it reads adapter_config.json and the header of the weights file, no values.

    Args:
        path: a local folder; `AdapterFolder.find` also takes a Hub id.

    Attributes:
        path: the folder.
        settings: what adapter_config.json says.
        shapes: of the tensors in the weights file, by their names there.

    Raises:
        BaseModelError: it is not an adapter's folder; a file is missing, a pickle, cut off or broken.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        self.settings = _read_settings(self.path)
        _check_weights(self.path)
        self.shapes = tensor_shapes(self.weights_file)
        self._sources: dict[Path, BaseSource] = {}

    @classmethod
    def find(cls, name_or_path: str | os.PathLike) -> AdapterFolder:
        """Opens a local folder, or a Hub id, which is downloaded.

        Raises:
            BaseModelError: as for a folder; or there is neither such a folder nor such a Hub id.
        """
        name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
        if path.exists():
            return cls(path)
        if cannot_be_hub_id(name):
            raise BaseModelError(f"There is no adapter folder {path}.", near_folders(path))
        return cls(hub_snapshot(name, HUB_FILES))

    @property
    def weights_file(self) -> Path:
        """The safetensors file."""
        return self.path / ADAPTER_WEIGHTS

    @cached_property
    def config(self) -> PeftConfig:
        """`settings` as PEFT's config, without the keys that this version of PEFT does not know; warns of those.

        Raises:
            BaseModelError: PEFT cannot read them.
        """
        from peft import PeftConfig

        if self.unknown_options:
            warnings.warn(
                f"{self.path / ADAPTER_CONFIG} sets {', '.join(self.unknown_options)}, which this version of PEFT does "
                "not know and passes over: the model may not be the one that was trained. Upgrade peft.",
                stacklevel=2,
            )
        with warnings.catch_warnings(), code_is_off():
            warnings.simplefilter("ignore")
            try:
                return PeftConfig.from_pretrained(str(self.path))
            except Exception as error:
                raise BaseModelError(
                    f"{self.path / ADAPTER_CONFIG} cannot be read by PEFT: {one_line(error)}",
                    "Upgrade peft, or copy it again.",
                ) from error

    @property
    def unknown_options(self) -> list[str]:
        """Keys of adapter_config.json that have a value and that this version of PEFT does not know."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        config = PEFT_TYPE_TO_CONFIG_MAPPING.get(self.settings["peft_type"])
        known = {field.name for field in dataclasses.fields(config)} if config else self.settings
        return sorted(name for name, value in self.settings.items() if value and name not in known)

    @property
    def has_record(self) -> bool:
        """Whether the folder says how its base was rounded. Adapters of other trainers do not."""
        return (self.path / RECORD_FILE).is_file()

    @cached_property
    def record(self) -> BaseRecord:
        """What the base was and how it was rounded. Raises BaseModelError when there is no such record."""
        return read_base_record(self.path)

    @property
    def has_tokenizer(self) -> bool:
        """Whether training saved its tokenizer here, as qpsft does; other trainers may leave it to the base."""
        return any((self.path / name).is_file() for name in TOKENIZER_FILES)

    def tokenizer(self, base_folder: Path) -> PreTrainedTokenizerBase:
        """The tokenizer that training used: the adapter's own, else the base's."""
        return load_tokenizer(self.path if self.has_tokenizer else base_folder)

    def base_folder(
        self, base: str | os.PathLike | None = None, *, same_rounding: bool = True, weights: bool = True
    ) -> Path:
        """The local folder of the adapter's base, downloaded if need be, and checked by `check_base`.

        Args:
            base: its folder or Hub id, if it is no longer where the adapter says.
            weights: download a Hub id's weights too, not its configuration and tokenizer only.

        Raises:
            BaseModelError: the base is not there, or as `check_base`.
        """
        folder = self._recorded_base(weights) if base is None else resolve_folder(base, weights=weights)
        self.check_base(folder, same_rounding=same_rounding, weights=weights)
        return folder

    @property
    def base_name(self) -> str | None:
        """The base as the record names it, or the config where there is no record."""
        return self.record.base_model_name_or_path if self.has_record else self.config.base_model_name_or_path

    def _recorded_base(self, weights: bool) -> Path:
        name, revision = self.base_name, self.record.revision if self.has_record else self.config.revision
        if not name:
            raise BaseModelError(f"The adapter in {self.path} does not name its base.", "Give it with --base.")
        try:
            return resolve_folder(name, revision=revision, weights=weights)
        except BaseModelError as error:
            raise BaseModelError(
                f"The base that the adapter in {self.path} was trained on cannot be had: {error.what}",
                f"Give its folder with --base. {error.todo}",
            ) from error

    def check_base(
        self, folder: Path, *, same_rounding: bool = True, weights: bool = True, trust_remote_code: bool = False
    ) -> None:
        """Makes sure that the model in `folder` is the adapter's base, and that the adapter's tensors fit it.

        Reads config.json, a sample of the base's weights and the adapter's file; the model is built without memory.

        Args:
            folder: a base model's.
            same_rounding: also refuse a base that was quantized on disk where the trained one was not, or the other
                way round: its rounded weights may differ.
            weights: the base's weights must be there; else they are compared if they are.
            trust_remote_code: run Python code that comes with the base.

        Raises:
            BaseModelError: it is another model; a tensor of the adapter is missing, unknown or of another shape; or
                its file is not the one that the record was written for.
        """
        self.check_identity(folder, same_rounding=same_rounding, weights=weights)
        model = self.put_layers(build_skeleton(folder, trust_remote_code=trust_remote_code))
        check_tensors(self.weights_file, self.shapes, model, folder)
        self.check_own_file()

    def check_identity(self, folder: Path, *, same_rounding: bool = True, weights: bool = True) -> None:
        """The first third of `check_base`: is it the model in the record? Without a record nothing can be said.

        Where the record does not say which weights it was, or they were rounded otherwise, there is a warning that
        they were not compared. Weights that are not on this machine are passed over, unless they are asked for.
        """
        if not self.has_record:
            return
        if weights:
            check_weights(folder)
        record, source = self.record, self.source_of(folder)
        if source.config_sha256 != record.config_sha256:
            raise BaseModelError(
                f"The adapter in {self.path} was trained on {record.base_model_name_or_path} (config hash "
                f"{record.config_sha256[:12]}…), and {folder} is another model (config hash "
                f"{source.config_sha256[:12]}…).",
                _GIVE_ITS_BASE,
            )
        if same_rounding and source.prequantized != record.prequantized:
            kinds = {True: "quantized on disk", False: "not quantized on disk"}
            raise BaseModelError(
                f"The adapter in {self.path} was trained on a base that was {kinds[record.prequantized]}, and {folder} "
                f"is {kinds[source.prequantized]}: its rounded weights may differ.",
                f"Give the base it was trained on ({record.base_model_name_or_path}) with --base.",
            )
        self._check_weights_and_stops(source)

    def _check_weights_and_stops(self, source: BaseSource) -> None:
        """Raises BaseModelError where a base of the same configuration has other weights or other stop tokens."""
        record, trained_on = self.record, self._recorded_name()
        if record.eos_token_ids is not None and source.eos_token_ids != record.eos_token_ids:
            raise BaseModelError(
                f"The adapter in {self.path} was trained on {trained_on}, whose texts end with eos_token_id "
                f"{record.eos_token_ids}, and those of {source.name} with {source.eos_token_ids} (config.json and "
                "generation_config.json).",
                _GIVE_ITS_BASE,
            )
        unknown = self.why_not_compared(source)
        if unknown is not None:
            warnings.warn(
                f"The weights of {source.name} were not compared with those that the adapter in {self.path} was "
                f"trained on, {trained_on}: {unknown}.",
                stacklevel=2,
            )
        elif source.weights_sha256 is not None and source.weights_sha256 != record.weights_sha256:
            raise BaseModelError(
                f"The adapter in {self.path} was trained on {trained_on} (weights {record.weights_sha256[:12]}…), and "
                f"{source.name} has the same configuration and other weights ({source.weights_sha256[:12]}…): it is "
                "another model.",
                _GIVE_ITS_BASE,
            )

    def source_of(self, folder: Path) -> BaseSource:
        """What a base's folder says of itself, its weights read once for all who ask. Raises BaseModelError."""
        if folder not in self._sources:
            self._sources[folder] = source_of(folder)
        return self._sources[folder]

    def base_in_words(self, folder: Path, source: BaseSource) -> str:
        """Which base was used, such as "owner/name at 0123abc, weights 12ab… as in training".

        Args:
            folder: what `base_folder` returned.
            source: `source_of` it.
        """
        place = str(folder.resolve())
        name = self.base_name or place
        words = name
        if source.revision:
            words += f" at {source.revision[:12]}"
        elif name != place and folder != MODEL_DIR:
            words += f" in {place}"
        if source.weights_sha256:
            words += f", weights {source.weights_sha256[:12]}…"
        unknown = self.why_not_compared(source)
        if unknown:
            return f"{words}, weights not compared: {unknown}"
        return f"{words} as in training" if self.record.assumed is None else f"{words} as stated in {RECORD_FILE}"

    def why_not_compared(self, source: BaseSource) -> str | None:
        """Why nobody can say whether a base has the weights in the record, in words; None where that is known."""
        if not self.has_record:
            return f"there is no {RECORD_FILE}"
        record = self.record
        if record.weights_sha256 is None:
            return f"{self.path / RECORD_FILE} does not say which they were"
        if record.prequantized != source.prequantized:
            return "one of the two is quantized on disk and the other is not"
        return None

    def _recorded_name(self) -> str:
        """The base's name in the record, with its Hub commit."""
        record = self.record
        return record.base_model_name_or_path + (f" at {record.revision}" if record.revision else "")

    def check_own_file(self) -> None:
        """The last third of `check_base`. Raises BaseModelError where the weights file is not the record's."""
        if not self.has_record or self.record.adapter_sha256 is None:
            return
        try:
            found = file_sha256(self.weights_file)
        except OSError as error:
            raise BaseModelError(
                f"{self.weights_file} cannot be read: {error.strerror or error}.", "Check its permissions."
            ) from error
        if found != self.record.adapter_sha256:
            raise BaseModelError(
                f"{self.weights_file} (SHA-256 {found[:12]}…) is not the file that {RECORD_FILE} beside it was written "
                f"for ({self.record.adapter_sha256[:12]}…): it is damaged, or of another run.",
                "Copy the whole folder again from where the training wrote it. If that run was cut off while it wrote, "
                "continue it with --resume.",
            )

    def put_layers(self, skeleton: nn.Module) -> PeftModel:
        """PEFT's layers of this adapter on a model on the meta device, without values.

        Raises:
            BaseModelError: the config does not fit this model, such as a target module that it does not have.
        """
        from peft import get_peft_model

        config = copy.copy(self.config)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # there are no values to start from
        config.inference_mode = True  # in training, prompt tuning loads the tokenizer that the config names
        with warnings.catch_warnings(), code_is_off():
            warnings.simplefilter("ignore")
            try:
                return get_peft_model(skeleton, config, adapter_name=POLICY, low_cpu_mem_usage=True)
            except Exception as error:
                raise BaseModelError(
                    f"The adapter in {self.path} does not fit the base, a {type(skeleton).__name__}: {one_line(error)}",
                    "Give the base it was trained on.",
                ) from error

    def load_base(self, folder: Path, *, device: str = "auto") -> PreTrainedModel:
        """The base as training had it, loaded from what `base_folder` returned.

        Raises:
            BaseModelError: no record, or as `qpsft.model.base.load_base`.
        """
        record = self.record
        model, _ = load_base(
            folder,
            quantization="none" if record.prequantized else record.quantization,
            double_quant=record.double_quant,
            # A base that was quantized on disk has been rounded already; any other is rounded from `weights_dtype`.
            dtype=record.compute_dtype if record.prequantized else record.weights_dtype,
            device=device,
            quantized_on=record.quantized_on,
            # A Hub id says more than the snapshot's folder that it is loaded from.
            source=replace(self.source_of(folder), name=record.base_model_name_or_path),
            verbose=False,
        )
        return model

    def put_on(self, model: nn.Module) -> PeftModel:
        """The adapter with its values on its loaded base, for inference: in eval mode, frozen, float32.

        `base_folder` must have passed the base before. Raises BaseModelError when the values cannot be read or put on.
        """
        from peft import PeftModel

        try:
            with code_is_off():
                return PeftModel.from_pretrained(model, self.path, adapter_name=POLICY)
        except Exception as error:
            raise BaseModelError(
                f"The adapter in {self.path} cannot be put on its base: {one_line(error)}",
                f"Check that {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} belong together and to this base.",
            ) from error

    def beyond_low_rank(self) -> list[str]:
        """What the adapter has beside low-rank updates of layers, in words. Programs that serve adapters lack these."""
        settings = self.settings
        features = {
            f"modules trained in full ({', '.join(settings.get('modules_to_save') or [])})": "modules_to_save",
            "DoRA": "use_dora",
            "trained biases": "lora_bias" if settings.get("bias", "none") == "none" else "bias",
            "adapted parameters (target_parameters)": "target_parameters",
            "trainable token rows": "trainable_token_indices",
        }
        return [what for what, key in features.items() if settings.get(key)]

    def mergeable_config(self) -> LoraConfig:
        """The config of an adapter whose trained weights are the base's plus low-rank products.

        Raises:
            ExportError: not LoRA, or LoRA with a feature or an initialisation that cannot be merged.
        """
        settings, file = self.settings, self.path / ADAPTER_CONFIG
        if settings.get("peft_type") != "LORA":
            raise ExportError(
                f"{file} is for {settings.get('peft_type')}, and only LoRA can be merged.", "Train with LoRA."
            )
        for feature in _OTHER_FORWARDS:
            if settings.get(feature):
                raise ExportError(
                    f"{file} uses {feature}, which cannot be merged into the base's weights.",
                    "Serve the adapter beside its base, or train without it.",
                )
        init = settings.get("init_lora_weights")
        if init not in _INITS_THAT_LEAVE_THE_BASE:
            raise ExportError(
                f"{file} has init_lora_weights {init!r}: training started by taking a part out of the base's weights, "
                "and the file does not say which.",
                "Save it with PEFT's path_initial_model_for_weight_conversion, as the plain LoRA that it equals.",
            )
        return self.config


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises BaseModelError as `AdapterFolder`."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise _not_an_adapter(folder)
    content = read_object(file, BaseModelError, "Copy it again.", SETTINGS_TYPES)
    if not content.get("peft_type"):
        raise BaseModelError(f"{file} names no peft_type, so it is not PEFT's config of an adapter.", "Copy it again.")
    return content


def _not_an_adapter(folder: Path) -> BaseModelError:
    inside = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")) if folder.is_dir() else []
    if not folder.exists():
        what, todo = "does not exist", near_folders(folder)
    elif folder.is_file():
        what, todo = "is a file", "Give the folder that training wrote."
    elif inside:  # PEFT puts an adapter that is not called "default" into a folder of its own
        what, todo = f"has no {ADAPTER_CONFIG}", f"Did you mean {' or '.join(map(str, inside[:3]))}?"
    elif (folder / "config.json").is_file():
        what, todo = f"has no {ADAPTER_CONFIG}", "It is a whole model: give the folder of an adapter."
    else:
        what, todo = f"has no {ADAPTER_CONFIG}", "Give the folder that training wrote."
    return BaseModelError(f"{folder} {what}, so it is not an adapter's folder.", todo)


def _check_weights(folder: Path) -> None:
    """Raises BaseModelError where an adapter's folder has no safetensors."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    raise BaseModelError(
        f"{folder} has no {ADAPTER_WEIGHTS}"
        + (f"; it holds {pickles[0]}, and loading a pickle can run any code." if pickles else "."),
        "Copy the folder again, or save the adapter with safetensors.",
    )
