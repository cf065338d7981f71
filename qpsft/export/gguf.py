"""Adapter or merged model -> GGUF, by llama.cpp's own converter, and read back before it gets its name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from qpsft.errors import ExportError
from qpsft.export.gguf_check import GgufCheck, check_gguf
from qpsft.export.gguf_quantize import kernel, quantize_gguf
from qpsft.export.gguf_run import PROMPTS, GgufRun, run_gguf
from qpsft.export.kept import ENOUGH, TrainingKept, training_kept
from qpsft.export.llama_cpp import CONVERTER, find_llama_cpp, load_gguf, run_converter
from qpsft.export.merged_model import MergedModel, count_weights, stage
from qpsft.export.options import CONVERTED, QUANTIZED, ExportOptions
from qpsft.files import check_space, put_in_place, work_folder
from qpsft.merge.merging import merge_adapter
from qpsft.merge.model_files import copy_tokenizer, write_config
from qpsft.merge.report import MergeReport
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.folder import is_adapter
from qpsft.model.llama_server import INSTALL, has_llama_cpp
from qpsft.terminal import wrap
from qpsft.verify.exported import ExportedWeights, read_text_config
from qpsft.verify.prompts import read_prompts

MERGED_TO = ("f32", "bf16", "f16")
MERGE_DTYPE = {"f32": "float32", "bf16": "bfloat16"}
"""What an adapter is merged to, so that weights are rounded once; float16 for the others, which round more than it."""


MTP_EXPECTED = re.compile(r"Qwen3(Next|_5)")
"""Architectures that llama.cpp's converter takes to predict several tokens (MTP), which training leaves out."""


@dataclass
class ExportReport:
    """A GGUF that was written and what was checked.

    Attributes:
        outtype: its type, which is f16 where a quantized one was asked for and could not be made.
        stops: the model's stop tokens, as text.
        kept: how much of an adapter's training a type of few bits has left; None where it was not measured.
    """

    path: Path
    outtype: str
    bytes: int
    check: GgufCheck
    run: GgufRun
    merge: MergeReport | None
    notes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    kept: TrainingKept | None = None

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"wrote {self.path}: {self.bytes / 1e6:,.1f} MB, {self.outtype}"]
        if self.merge is not None and self.merge.verification:
            same = self.merge.verification["same_model"]
            lines.append(f"merged {'and verified: the same model' if same else 'onto other weights: another model'}")
        notes = [f"note: {note}" for note in self.notes]
        kept = [self.kept.summary()] if self.kept else []
        lines += [wrap(text) for text in (self.check.summary(), self.run.summary(), *kept, *notes)]
        return "\n".join(lines)


def export_gguf(options: ExportOptions) -> ExportReport:
    """Writes a GGUF and checks it. An adapter is merged first, into a temporary folder.

    A quantized type needs llama.cpp's kernels (xllamacpp); without them the f16 is left, and the report says so.

    Raises:
        BaseModelError: source or base cannot be loaded.
        ExportError: the converter fails, or the file is not the merged model.
        NotTheSameModelError: the merge is not the model that was trained.
        OutputError: the output exists or cannot be written, or the disk is too full.
    """
    from_adapter, notes = is_adapter(options.source), []
    if options.outtype in QUANTIZED and kernel() is None:
        wanted, output = options.outtype, _renamed(options.output, options.outtype)
        options = replace(options, outtype="f16", output=output)
        why = "xllamacpp's library gives no access to it here" if has_llama_cpp() else f"{INSTALL} brings it"
        notes.append(
            f"{wanted} needs llama.cpp's rounding ({why}); the f16 is left as {output.name}: `llama-quantize "
            f"{output.name} {options.output.stem}-{wanted}.gguf {wanted}` of any llama.cpp rounds it"
        )
    converted_type = options.outtype if options.outtype in CONVERTED else "f16"
    with work_folder(options.output, overwrite=options.overwrite, source=options.source) as work:
        check_space(options.output.parent, _bytes_needed(options, from_adapter, converted_type), "The export")
        tools = find_llama_cpp(options.llama_cpp)
        gguf = load_gguf(tools)
        merge, folder = None, options.source
        if from_adapter:
            _check_tokenizer(AdapterFolder(options.source), options, tools, work)
            folder = work / "merged"
            merge = merge_adapter(
                options.source, folder, base=options.base, dtype=MERGE_DTYPE.get(converted_type, "float16")
            )
        merged = MergedModel.load(folder)
        made = _convert(merged, options, converted_type, tools, work)
        if options.outtype != converted_type:
            converted, made = made, work / "quantized.gguf"
            quantize_gguf(converted, made, options.outtype, gguf)
            converted.unlink()
        check = check_gguf(made, merged, gguf)
        ran = GgufRun(False, "switched off") if options.no_run else _run(made, merged, options)
        if check.merge_order_lost and not ran.ran:
            raise _merge_order_lost(options, from_adapter)
        kept = _training_kept(options, ran) if from_adapter else None
        notes += ran.notes + _notes_on_check(check, ran) + _remedy(options, kept)
        report = ExportReport(
            options.output, options.outtype, made.stat().st_size, check, ran, merge,
            notes=notes, stops=merged.stop_texts(), kept=kept,
        )  # fmt: skip
        put_in_place(made, options.output)
    return report


def _convert(merged: MergedModel, options: ExportOptions, converted_type: str, tools: Path, work: Path) -> Path:
    """The GGUF in the work folder."""
    made = work / "converted.gguf"
    staged = stage(merged.folder, work / "staged")
    arguments = [*_source(merged.folder, staged), "--outtype", converted_type]
    arguments += ["--model-name", options.source.resolve().name]
    size = int(count_weights(merged.weights) * CONVERTED[converted_type])
    run_converter(tools, CONVERTER, arguments, made, expected=size, special=merged.further_stops())
    return made


def _source(folder: Path, staged: Path) -> list[str]:
    """What to convert, as arguments of the converter: it has to be told where a Qwen has lost its MTP layers."""
    architecture = (read_text_config(folder).get("architectures") or [""])[0]
    lost = MTP_EXPECTED.match(architecture) and not any("mtp." in name for name in ExportedWeights(folder).names())
    return [str(staged), *(["--no-mtp"] if lost else [])]


def _check_tokenizer(adapter: AdapterFolder, options: ExportOptions, tools: Path, work: Path) -> None:
    """Has the converter write the vocabulary alone, as the merged model will have it: minutes before it is merged.

    Raises:
        ExportError: it does not know the architecture or the tokenizer, or cannot run.
    """
    base, folder = adapter.base_folder(options.base, same_rounding=False), work / "unmerged"
    folder.mkdir()
    write_config(base, folder, "float16", predicts_ahead=True)
    copy_tokenizer(adapter.path, base, folder)
    for path in base.glob("*.safetensors*"):  # of which the converter reads the names
        (folder / path.name).symlink_to(path.resolve())
    arguments = [*_source(folder, stage(folder, work / "vocabulary")), "--vocab-only"]
    run_converter(tools, CONVERTER, arguments, work / "vocabulary.gguf", expected=0)


def _run(made: Path, merged: MergedModel, options: ExportOptions) -> GgufRun:
    context = merged.config.get("max_position_embeddings") or 2**20
    prompts, _ = read_prompts(None, options.source, merged.tokenizer, PROMPTS, context)
    return run_gguf(made, merged, prompts, options.outtype)


def _training_kept(options: ExportOptions, ran: GgufRun) -> TrainingKept | None:
    """Of an adapter's training, in a type that rounds more than the merge does."""
    if not ran.ran or options.outtype in MERGED_TO:
        return None
    run = ran.compared
    return training_kept(options.source, options.base, run.sequences, run.exact, run.kl, run.chosen)


def _remedy(options: ExportOptions, kept: TrainingKept | None) -> list[str]:
    if kept is None or kept.share >= ENOUGH:
        return []
    return [
        f"{options.outtype} rounds {1 - kept.share:.0%} of the training away: choose a type of more bits (q8_0, f16), "
        f"or keep the adapter unrounded beside a {options.outtype} of its base (qpsft export {options.source} --to "
        "gguf-lora)"
    ]


def _merge_order_lost(options: ExportOptions, from_adapter: bool) -> ExportError:
    folder = options.source
    if from_adapter:
        folder = AdapterFolder(options.source).base_folder(options.base, same_rounding=False)
    return ExportError(
        f"{folder} has no tokenizer.model, so the converter cannot tell the order in which pieces are merged, and "
        "llama.cpp would make other tokens than training did.",
        f"Copy tokenizer.model from the original model into {folder}, and export again.",
    )


def _notes_on_check(check: GgufCheck, ran: GgufRun) -> list[str]:
    """What reading the file back left open, and what to do about it where the file was not run."""
    notes = []
    if check.other_senses:
        notes.append(
            f"{check.other_senses} tensors that see or hear are not in the file: it is the language model alone"
        )
    if check.unsure and not ran.ran:
        notes.append(
            f"{len(check.unsure)} things could not be compared, because llama.cpp's layout of this architecture is not "
            f"known here, such as: {check.unsure[0]}. Only running the file tells whether it is the merged model"
        )
    if check.window_lost:
        notes.append(
            f"the model looks back at {check.window_lost} tokens (sliding window), and in this architecture llama.cpp "
            "looks at all: on longer texts it computes another model"
        )
    if check.stops_missing and not ran.ran:
        names = ", ".join(map(repr, check.stops_missing))
        notes.append(f"the file does not name the stop tokens {names}: a Modelfile or --stop must")
    return notes


def _renamed(output: Path, wanted: str) -> Path:
    """The name of the f16 that is left: with f16 for the type in it, or f16 added."""
    stem = re.sub(re.escape(wanted), "f16", output.stem, flags=re.IGNORECASE)
    return output.with_name((stem if stem != output.stem else f"{output.stem}-f16") + output.suffix)


def _bytes_needed(options: ExportOptions, from_adapter: bool, converted_type: str) -> float:
    """Of the temporary merge, the converted file and the quantized one, at the same time."""
    merge = 0.0
    if from_adapter:
        adapter = AdapterFolder(options.source)
        count = count_weights(ExportedWeights(adapter.base_folder(options.base, same_rounding=False)))
        count *= 2 if adapter.record.prequantized else 1  # two 4-bit weights are stored in one byte
        merge = count * (4 if converted_type == "f32" else 2)
    else:
        count = count_weights(ExportedWeights(options.source))
    quantized = CONVERTED["q8_0"] if options.outtype != converted_type else 0
    return merge + count * (CONVERTED[converted_type] + quantized) + 50e6
