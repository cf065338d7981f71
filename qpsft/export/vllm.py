"""Can vLLM serve an adapter beside its base? If so the exact command; if not why, and the merged model instead."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import ExportError
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base_record import BaseRecord
from qpsft.model.folder import DEMO, MODEL_DIR, check_folder, is_adapter
from qpsft.terminal import wrap

if TYPE_CHECKING:
    from qpsft.merge.merging import MergeReport

DEFAULT_RANK = 16
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank."""

EMBEDDINGS = ("lm_head", "embed_tokens")


@dataclass
class VllmReport:
    """Whether vLLM can serve an adapter or a merged folder, and how.

    Attributes:
        source: the folder.
        servable: vLLM can load it: an adapter beside its base, a merged folder as it is.
        refusals: why not.
        command: the `vllm serve` command, for the adapter or for the merged folder; None when there is neither.
        notes: what the user should know.
        merge: the report of the merge, if the adapter was merged because it is not servable.
        is_adapter: False for a merged folder.
    """

    source: Path
    servable: bool
    refusals: list[str]
    command: str | None
    notes: list[str] = field(default_factory=list)
    merge: MergeReport | None = None
    is_adapter: bool = True

    def summary(self) -> str:
        """A few lines for a terminal, the command last."""
        kind = "as an adapter" if self.is_adapter else "as it is: a merged model"
        lines = [f"vLLM can{'' if self.servable else 'not'} serve {self.source} {kind}"]
        lines += [wrap(f"  ✗ {reason}", "    ") for reason in self.refusals]
        if self.merge is not None:
            lines.append(f"so it was merged into {self.merge.output}")
        lines += [wrap(f"note: {note}") for note in self.notes]
        return "\n".join([*lines, f"next: {self.command or 'merge it with qpsft export --to vllm -o FOLDER'}"])


def check_vllm(adapter: str | Path, *, base: str | None = None) -> VllmReport:
    """Looks for what vLLM refuses in an adapter, without vLLM and without the base's weights.

    Args:
        adapter: the adapter's folder.
        base: what to serve instead of the base in the adapter's record.

    Raises:
        BaseModelError: not an adapter folder, no record of its base, no such base, or not the base of this adapter.
        ExportError: its config is not a LoRA's.
    """
    opened = AdapterFolder(adapter)
    adapter, config = opened.path, opened.settings
    if config.get("peft_type") != "LORA":
        raise ExportError(
            f"The adapter in {adapter} is of type {config.get('peft_type')}.", "vLLM serves LoRA adapters only."
        )
    record = opened.record
    opened.base_folder(base, same_rounding=False, weights=False)
    refusals = _refusals(config)
    report = VllmReport(adapter, not refusals, refusals, None)
    if report.servable:
        report.command = _serve(adapter, base, record, _largest_rank(config))
        report.notes = _notes(record)
    return report


def export_vllm(
    source: str | Path, output: str | Path | None = None, *, base: str | None = None, **options: Any
) -> VllmReport:
    """The command that serves an adapter or a merged folder; an adapter that vLLM refuses is merged into `output`.

    Args:
        source: an adapter's folder or a merged one.
        output: folder for the merged model, used only when it is needed; None never merges.
        base: as in `check_vllm`, and for the merge.
        options: for `qpsft.merge.merge_adapter`.

    Raises:
        ExportError: it is neither.
        As `check_vllm`, and as `merge_adapter`.
    """
    source = Path(source).expanduser()
    if not is_adapter(source):
        check_folder(source)
        return VllmReport(source, True, [], shlex.join(["vllm", "serve", str(source.resolve())]), is_adapter=False)
    report = check_vllm(source, base=base)
    if not report.servable and output is not None:
        from qpsft.merge.merging import merge_adapter

        report.merge = merge_adapter(source, output, base=base, **options)
        report.command = shlex.join(["vllm", "serve", report.merge.output])
    return report


def _refusals(config: dict[str, Any]) -> list[str]:
    """What vLLM's PEFTHelper and its LoRA layers refuse, or take and compute wrongly."""
    saved, targets = config.get("modules_to_save") or [], config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    refusals = []
    if saved:
        refusals.append(f"it has modules trained in full ({', '.join(saved)}); vLLM takes low-rank updates only")
    if config.get("use_dora"):
        refusals.append("it is a DoRA adapter, which vLLM does not support")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        refusals.append("it has trained biases, which vLLM does not support")
    embeddings = [name for name in targets if name.rpartition(".")[2] in EMBEDDINGS]
    if embeddings:
        refusals.append(f"it adapts {', '.join(embeddings)}, which vLLM does not adapt for most models")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        refusals.append("layers have ranks or alphas of their own, and vLLM scales all layers by one alpha / rank")
    if config.get("target_parameters"):
        refusals.append("it adapts parameters directly (target_parameters), which vLLM does not support")
    if config.get("trainable_token_indices"):
        refusals.append("it has trainable token rows, which vLLM does not support")
    rank = _largest_rank(config)
    if rank > RANKS[-1]:
        refusals.append(f"its rank is {rank}, and vLLM's largest is {RANKS[-1]}")
    return refusals


def _largest_rank(config: dict[str, Any]) -> int:
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _serve(adapter: Path, base: str | None, record: BaseRecord, rank: int) -> str:
    name = base or record.base_model_name_or_path
    # `demo` is a name that only qpsft knows.
    command = ["vllm", "serve", str(MODEL_DIR) if name == DEMO else name]
    if base is None and record.revision:
        command += ["--revision", record.revision]
    if _vllm_rounds_alike(record):
        command += ["--quantization", "bitsandbytes"]
    command += ["--enable-lora", "--lora-modules", f"{adapter.resolve().name}={adapter.resolve()}"]
    if rank > DEFAULT_RANK:
        command += ["--max-lora-rank", str(next(size for size in RANKS if size >= rank))]
    return shlex.join(command)


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
