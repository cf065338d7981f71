"""Can vLLM serve an adapter beside its base? If so the exact command; if not why, and the merged model instead."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpsft.errors import ExportError, OutputError
from qpsft.export.options import ExportOptions
from qpsft.merge.merging import merge_adapter
from qpsft.merge.model_files import GENERATION_CONFIG, settings_with_stops, write_json
from qpsft.merge.report import MergeReport
from qpsft.model.adapter_folder import PREFIX, AdapterFolder
from qpsft.model.base_record import BaseRecord
from qpsft.model.folder import DEMO, check_folder, has_weights, is_adapter, read_config
from qpsft.terminal import wrap

DEFAULT_RANK = 16
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank."""

EMBEDDINGS = ("lm_head", "embed_tokens")
LANGUAGE_MODEL = "language_model"
"""In the names of its layers, where it is a part of a larger model."""


@dataclass
class VllmReport:
    """Whether vLLM can serve an adapter or a merged folder, and how.

    Attributes:
        servable: vLLM can load it: an adapter beside its base, a merged folder as it is.
        command: the `vllm serve` command, for the adapter or for the merged folder; None when there is neither.
        merge: the report of the merge, if the adapter was merged because it is not servable.
        remedy: what to do when there is no command.
    """

    source: Path
    servable: bool
    refusals: list[str]
    command: str | None
    notes: list[str] = field(default_factory=list)
    merge: MergeReport | None = None
    is_adapter: bool = True
    remedy: str = "merge it with qpsft export --to vllm -o FOLDER"

    def summary(self) -> str:
        """A few lines for a terminal, the command last."""
        kind = "as an adapter" if self.is_adapter else "as it is: a merged model"
        lines = [f"vLLM can{'' if self.servable else 'not'} serve {self.source} {kind}"]
        lines += [wrap(f"  ✗ {reason}", "    ") for reason in self.refusals]
        if self.merge is not None:
            lines.append(f"so it was merged into {self.merge.output}")
        lines += [wrap(f"note: {note}") for note in self.notes]
        return "\n".join([*lines, f"next: {self.command or self.remedy}"])


def export_vllm(options: ExportOptions) -> VllmReport:
    """The command that serves an adapter or a merged folder, found without vLLM.

    An adapter that vLLM refuses is merged into `output`, if there is one; without it nothing is merged, and of a base
    on the Hub nothing but the configuration is read.

    Raises:
        BaseModelError: no record of the adapter's base, no such base, a folder without weights, or not the base of this
            adapter.
        ExportError: it is neither an adapter nor a merged folder, or its config is not a LoRA's.
        As `merge_adapter`.
    """
    source = options.source
    if not is_adapter(source):
        check_folder(source)
        return VllmReport(source, True, [], shlex.join(["vllm", "serve", str(source.resolve())]), is_adapter=False)
    adapter = AdapterFolder(source)
    config = adapter.settings
    if config.get("peft_type") != "LORA":
        raise ExportError(
            f"The adapter in {source} is of type {config.get('peft_type')}.", "vLLM serves LoRA adapters only."
        )
    try:
        adapter.mergeable_config()
    except ExportError as error:  # merging would refuse it too
        return VllmReport(source, False, [error.what], None, remedy=error.todo)
    record = adapter.record
    local = _is_folder(options.base or record.base_model_name_or_path)
    base_folder = adapter.base_folder(options.base, same_rounding=False, weights=local)
    refusals = _refusals(adapter, base_folder)
    if not refusals:
        served = str(base_folder.resolve()) if local else options.base
        command = _serve(source, served, record, _largest_rank(config))
        notes = _notes(record) + _note_on_weights(base_folder)
        if settings := _write_stops(adapter, base_folder, options):
            command += " " + shlex.join(["--generation-config", str(settings.parent.resolve())])
            notes.append(f"{settings} names the end of turn that training taught, which the base's settings do not")
        return VllmReport(source, True, [], command, notes)
    merge = command = None
    if options.output is not None:
        merge = merge_adapter(source, options.output, base=options.base, overwrite=options.overwrite)
        command = shlex.join(["vllm", "serve", merge.output])
    return VllmReport(source, False, refusals, command, merge=merge)


def _write_stops(adapter: AdapterFolder, base: Path, options: ExportOptions) -> Path | None:
    """A generation_config.json with the stop tokens, where the base's own lacks the template's end of turn.

    vLLM reads it from the folder that --generation-config names.
    """
    settings = settings_with_stops(base, adapter.tokenizer(base))
    if settings is None:
        return None
    path = (options.output or Path(f"{adapter.path.resolve().name}-vllm")) / GENERATION_CONFIG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Choose another folder with -o.") from error
    return path


def _refusals(adapter: AdapterFolder, base: Path) -> list[str]:
    """What vLLM's PEFTHelper and its LoRA layers refuse, or take and compute wrongly.

    The tensors in the file count, not the target modules of the config, which may be a regular expression.
    """
    config = adapter.settings
    refusals = [f"it has {what}, which vLLM does not support" for what in adapter.beyond_low_rank()]
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0].removesuffix(".weight") for name in adapter.shapes}
    embeddings = sorted(name for name in modules if name.rpartition(".")[2] in EMBEDDINGS)
    if embeddings:
        refusals.append(f"it adapts {', '.join(embeddings)}, which vLLM does not adapt for most models")
    ranks = {shape[0] for name, shape in adapter.shapes.items() if name.endswith(".lora_A.weight")}
    if len(ranks) > 1 or config.get("alpha_pattern"):
        refusals.append("layers have ranks or alphas of their own, and vLLM scales all layers by one alpha / rank")
    rank = _largest_rank(config)
    if rank > RANKS[-1]:
        refusals.append(f"its rank is {rank}, and vLLM's largest is {RANKS[-1]}")
    if _takes_other_inputs(base) and not all(LANGUAGE_MODEL in name for name in modules):
        refusals.append(
            "its base takes images or sound too, and training used the language model alone: vLLM serves the whole "
            "model, whose layers have other names than the adapter's"
        )
    return refusals


def _takes_other_inputs(base: Path) -> bool:
    """Whether the checkpoint is of a model with more than a language model."""
    return bool({"vision_config", "audio_config"} & set(read_config(base)))


def _largest_rank(config: dict[str, Any]) -> int:
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _is_folder(name: str) -> bool:
    """Whether a base is a folder of this machine, from which vLLM would load it, and no Hub id."""
    return name == DEMO or Path(name).expanduser().is_dir()


def _serve(adapter: Path, base: str | None, record: BaseRecord, rank: int) -> str:
    """The command.

    Args:
        base: its folder or Hub id; None is the Hub id in the record, at its commit.
    """
    command = ["vllm", "serve", base or record.base_model_name_or_path]
    if base is None and record.revision:
        command += ["--revision", record.revision]
    if _vllm_rounds_alike(record):
        command += ["--quantization", "bitsandbytes"]
    command += ["--enable-lora", "--lora-modules", f"{adapter.resolve().name}={adapter.resolve()}"]
    if rank > DEFAULT_RANK:
        command += ["--max-lora-rank", str(next(size for size in RANKS if size >= rank))]
    return shlex.join(command)


def _note_on_weights(base: Path) -> list[str]:
    """That nothing but the base's configuration was compared, where that is all there is of it here."""
    if has_weights(base):
        return []
    return ["the base's weights are not on this machine, so they were not compared with those of the training"]


def _vllm_rounds_alike(record: BaseRecord) -> bool:
    """vLLM's bitsandbytes quantization on loading is nf4 with double quantization, in blocks of 64."""
    return record.prequantized or (record.quantization == "nf4" and record.double_quant and record.block_size == 64)


def _notes(record: BaseRecord) -> list[str]:
    if record.quantization == "none":
        return []
    if _vllm_rounds_alike(record):
        return [
            "with --quantization bitsandbytes vLLM rounds the base as training did; without it, the adapter sits on "
            "other weights than it was trained on"
        ]
    kind = f"{record.quantization}{'' if record.double_quant else ' without double quantization'}"
    return [
        f"vLLM does not round the base to {kind} as training did, so this is not exactly the model that was trained; "
        "a merged folder (qpsft merge) is"
    ]
