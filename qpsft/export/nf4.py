"""A 4-bit checkpoint (bitsandbytes NF4) that transformers and vLLM load: the merged model, rounded once more.

That rounding can take a part of the training with it, so what is left is measured on the written folder.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qpsft.export.gguf_run import PROMPTS, as_sequences
from qpsft.export.kept import ENOUGH, TrainingKept, training_kept
from qpsft.export.options import ExportOptions
from qpsft.files import check_space, finished_folder, sync
from qpsft.merge.merging import merge_adapter
from qpsft.merge.model_files import copy_tokenizer, write_json
from qpsft.merge.report import MergeReport
from qpsft.model.base import load_base
from qpsft.model.folder import check_folder, is_adapter
from qpsft.model.hardware import pick_device
from qpsft.terminal import wrap
from qpsft.verify.exported import ExportedWeights, load_exported
from qpsft.verify.measure import Distance, Sequence, distance, measure
from qpsft.verify.prompts import read_prompts

REPORT = "nf4_report.json"
"""By which a folder that this wrote is known."""


@dataclass
class Nf4Report:
    """A 4-bit checkpoint that was written.

    Attributes:
        distance: of the folder, loaded again, from the merged model.
        kept: how much of an adapter's training is left; None for a model that was merged before.
    """

    folder: Path
    bytes: int
    distance: Distance
    merge: MergeReport | None
    kept: TrainingKept | None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for a terminal, the command that comes next last."""
        lines = [f"wrote {self.folder}: {self.bytes / 1e6:,.1f} MB, bitsandbytes nf4"]
        lines.append(
            f"loaded again: KL {self.distance.kl:.1e} nats from the merged model, the likeliest token is the same at "
            f"{self.distance.top1:.1%}"
        )
        lines += [self.kept.summary()] if self.kept else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*map(wrap, lines), f"next: {shlex.join(['vllm', 'serve', str(self.folder)])}"])


def export_nf4(options: ExportOptions) -> Nf4Report:
    """Writes a merged model, or an adapter that is merged first, as a 4-bit folder, loads it again and compares.

    Raises:
        BaseModelError: source or base cannot be loaded.
        NotTheSameModelError: the merge is not the model that was trained.
        OutputError: the output exists or cannot be written, or the disk is too full.
    """
    from_adapter, merge, source = is_adapter(options.source), None, options.source
    with finished_folder(options.output, mark=REPORT, overwrite=options.overwrite, sources=(options.source,)) as folder:
        if from_adapter:
            source = folder / "merged"
            merge = merge_adapter(options.source, source, base=options.base, dtype="bfloat16")
        check_folder(source)
        check_space(folder, sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2, "The export")
        model, tokenizer = load_base(source, quantization="nf4", dtype="bfloat16", verbose=False)
        model.save_pretrained(folder)
        del model
        copy_tokenizer(source, source, folder)
        prompts, _ = read_prompts(None, options.source, tokenizer, PROMPTS, 2**20)
        apart, kept = _compare(folder, source, options, as_sequences(prompts), from_adapter)
        if from_adapter:
            shutil.rmtree(source)
        write_json(folder / REPORT, {"source": str(options.source), "kl": apart.kl, "top1": apart.top1})
        for path in folder.iterdir():
            with path.open("r+b") as file:
                sync(file)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    return Nf4Report(options.output, size, apart, merge, kept, _remedy(options, kept))


def _compare(
    folder: Path, merged: Path, options: ExportOptions, sequences: list[Sequence], from_adapter: bool
) -> tuple[Distance, TrainingKept | None]:
    """The written folder, loaded again, beside the merged model, and beside the base where there is one."""
    device = pick_device("auto")
    again, _ = load_base(folder, dtype="float32", verbose=False)
    vocabulary = again.config.get_text_config().vocab_size
    rounded = measure(again, sequences, vocabulary, device)
    del again
    trained = measure(load_exported(ExportedWeights(merged), device), sequences, vocabulary, device)
    apart = distance(trained, rounded, sequences, 0.0)
    if not from_adapter:
        return apart, None
    own = dict(enumerate(rounded.chosen.tolist()))
    return apart, training_kept(options.source, options.base, sequences, trained, apart.kl, own)


def _remedy(options: ExportOptions, kept: TrainingKept | None) -> list[str]:
    if kept is None or kept.share >= ENOUGH:
        return []
    return [
        f"the second rounding takes {1 - kept.share:.0%} of the training away: serve the adapter unrounded beside its "
        f"4-bit base, which is the model that was trained (qpsft export {options.source} --to vllm)"
    ]
