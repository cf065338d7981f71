"""Adapter or merged model -> GGUF, by llama.cpp's own converter, and read back before it gets its name."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from qpsft.errors import ExportError, OutputError
from qpsft.export.gguf_check import GgufCheck, check_gguf
from qpsft.export.gguf_run import PROMPTS, GgufRun, llama_cpp_python, run_gguf
from qpsft.export.llama_cpp import CONVERTER, find_llama_cpp, last_lines, load_gguf, run_converter, run_process
from qpsft.export.merged_model import MergedModel, count_weights, stage
from qpsft.files import check_space, put_in_place, work_folder
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.folder import is_adapter
from qpsft.terminal import wrap
from qpsft.verify.exported import ExportedWeights
from qpsft.verify.prompts import read_prompts

if TYPE_CHECKING:
    from qpsft.merge.merging import MergeReport

CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
"""Types the converter writes, and bytes a weight."""

QUANTIZED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
"""Types that llama-cpp-python makes from an f16 file."""

MERGE_DTYPE = {"f32": "float32", "bf16": "bfloat16"}
"""What an adapter is merged to, so that weights are rounded once; float16 for the others, which round more than it."""

QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass
class GgufOptions:
    """What `export_gguf` takes, which explains each, checked.

    Attributes:
        outtype: the type that can be made here: f16 where a quantized one was asked for without llama-cpp-python.
        output: the file; its name says f16 too in that case.
        notes: what the user should know; a line about that case.
    """

    source: str | Path
    output: str | Path
    outtype: str
    base: str | None
    onto: str
    llama_cpp: str | Path | None
    overwrite: bool
    verify: bool
    run: bool
    prompts: str | Path | list[Any] | None
    show_progress: bool
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source, self.output = Path(self.source).expanduser(), Path(self.output).expanduser()
        self.outtype = wanted = self.outtype.lower()
        if wanted not in CONVERTED and wanted not in QUANTIZED:
            raise ExportError(f"outtype {wanted!r} is not known.", f"Use {', '.join((*CONVERTED, *QUANTIZED))}.")
        if self.output.is_dir():
            raise OutputError(f"{self.output} is a folder; a GGUF is one file.", "Give a file name that ends in .gguf.")
        self.from_adapter = is_adapter(self.source)
        if wanted in QUANTIZED and llama_cpp_python() is None:
            self.outtype, self.output = "f16", _renamed(self.output, wanted)
            self.notes.append(
                f"{wanted} needs llama-cpp-python (pip install llama-cpp-python); the f16 is left as {self.output.name}"
            )

    @property
    def converted_type(self) -> str:
        """What the converter writes, from which llama-cpp-python makes the quantized types."""
        return self.outtype if self.outtype in CONVERTED else "f16"


@dataclass
class ExportReport:
    """A GGUF that was written and what was checked.

    Attributes:
        path: the file.
        outtype: its type, which is f16 where a quantized one was asked for and could not be made.
        bytes: its size.
        source: the adapter or merged folder.
        check: the result of reading it back.
        run: the result of running it with llama.cpp.
        merge: the report of the merge, if the source was an adapter.
        notes: what the user should know.
        stops: the model's stop tokens, as text.
    """

    path: Path
    outtype: str
    bytes: int
    source: Path
    check: GgufCheck
    run: GgufRun
    merge: MergeReport | None
    notes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"wrote {self.path}: {self.bytes / 1e6:,.1f} MB, {self.outtype}"]
        if self.merge is not None and self.merge.verification:
            same = self.merge.verification["same_model"]
            lines.append(f"merged {'and verified: the same model' if same else 'onto other weights: another model'}")
        notes = [f"note: {note}" for note in self.notes]
        lines += [wrap(text) for text in (self.check.summary(), self.run.summary(), *notes)]
        return "\n".join(lines)


def export_gguf(
    source: str | Path,
    output: str | Path,
    *,
    outtype: str = "f16",
    base: str | None = None,
    onto: str = "trained",
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    run: bool = True,
    prompts: str | Path | list[Any] | None = None,
    show_progress: bool = True,
) -> ExportReport:
    """Writes a GGUF and checks it.

    Args:
        source: an adapter's folder (it is merged first, into a temporary folder) or a merged one.
        output: the file to write.
        outtype: f32, f16, bf16 or q8_0, or one of `QUANTIZED`, which needs llama-cpp-python; without it the f16 is
            left and said so.
        base, onto, verify: for the merge, as in `qpsft.merge.merge_adapter`.
        llama_cpp: see `qpsft.export.llama_cpp.find_llama_cpp`.
        overwrite: replace an existing `output`.
        run: run the file too, if llama-cpp-python is installed.
        prompts: for that; see `qpsft.verify.prompts.read_prompts`.
        show_progress: show progress bars.

    Raises:
        BaseModelError: source or base cannot be loaded.
        ExportError: the type is unknown, the converter fails, or the file is not the merged model.
        NotTheSameModelError: the merge is not the model that was trained.
        OutputError: the output exists or cannot be written, or the disk is too full.
    """
    options = GgufOptions(
        source, output, outtype, base, onto, llama_cpp, overwrite, verify, run, prompts, show_progress
    )
    with work_folder(options.output, overwrite=options.overwrite, source=options.source) as work:
        check_space(options.output.parent, _bytes_needed(options), "The export")
        tools = find_llama_cpp(options.llama_cpp)
        gguf = load_gguf(tools)
        merge = _merge(options, work / "merged") if options.from_adapter else None
        merged = MergedModel.load(options.source if merge is None else work / "merged")
        made = _convert(merged, options, tools, work)
        check, ran = _check(made, merged, options, gguf)
        report = ExportReport(
            options.output, options.outtype, made.stat().st_size, options.source, check, ran, merge,
            notes=options.notes + ran.notes + _note_on_stops(check, ran), stops=merged.stop_texts(),
        )  # fmt: skip
        put_in_place(made, options.output)
    return report


def _merge(options: GgufOptions, folder: Path) -> MergeReport:
    from qpsft.merge.merging import merge_adapter

    return merge_adapter(
        options.source,
        folder,
        base=options.base,
        onto=options.onto,
        dtype=MERGE_DTYPE.get(options.converted_type, "float16"),
        verify=options.verify,
        show_progress=options.show_progress,
    )


def _convert(merged: MergedModel, options: GgufOptions, tools: Path, work: Path) -> Path:
    """The GGUF in the work folder."""
    kind, made = options.converted_type, work / "converted.gguf"
    staged = stage(merged.folder, work / "staged")
    arguments = [str(staged), "--outtype", kind, "--model-name", options.source.resolve().name]
    size = int(count_weights(merged.weights) * CONVERTED[kind])
    run_converter(tools, CONVERTER, arguments, made, expected=size, show_progress=options.show_progress)
    if options.outtype != kind:
        made = _quantize(made, work / "quantized.gguf", options.outtype, options.show_progress)
    return made


def _quantize(source: Path, target: Path, outtype: str, show_progress: bool) -> Path:
    command = [sys.executable, "-c", QUANTIZE, str(source), str(target), outtype]
    expected = int(source.stat().st_size * 0.3)
    code, said = run_process(command, dict(os.environ), target, expected=expected, show_progress=show_progress)
    if code != 0 or not target.is_file():
        raise ExportError(
            f"llama.cpp could not quantize to {outtype} (exit code {code}):\n{last_lines(said, 8)}\n",
            "Choose another --outtype; f16 and q8_0 work for every model.",
        )
    source.unlink()
    return target


def _check(made: Path, merged: MergedModel, options: GgufOptions, gguf: ModuleType) -> tuple[GgufCheck, GgufRun]:
    """Reads the file back, and runs it if asked to. Raises ExportError where it is not the merged model."""
    disable = None if options.show_progress else True
    with tqdm(desc="reading back", unit="tensor", disable=disable, leave=False) as bar:
        check = check_gguf(made, merged, gguf, bar)
    ran = GgufRun(False, "switched off")
    if options.run:
        context = merged.config.get("max_position_embeddings") or 2**20
        prompts, _ = read_prompts(options.prompts, options.source, merged.tokenizer, PROMPTS, context)
        ran = run_gguf(made, merged, gguf, prompts)
    if check.merge_order_lost and not ran.ran:
        lacking = options.source
        if options.from_adapter:
            lacking = AdapterFolder(options.source).base_folder(options.base, same_rounding=False)
        raise ExportError(
            f"{lacking} has no tokenizer.model, so the converter cannot tell the order in which pieces are merged, "
            "and llama.cpp would make other tokens than training did.",
            f"Copy tokenizer.model from the original model into {lacking}, and export again.",
        )
    return check, ran


def _note_on_stops(check: GgufCheck, ran: GgufRun) -> list[str]:
    """What to do about stop tokens that the file does not name; running the file has its own word on them."""
    if not check.stops_missing or ran.ran:
        return []
    names = ", ".join(map(repr, check.stops_missing))
    return [f"the file does not name the stop tokens {names}: a Modelfile or --stop must"]


def _renamed(output: Path, wanted: str) -> Path:
    """The name of the f16 that is left: with f16 for the type in it, or f16 added."""
    stem = re.sub(re.escape(wanted), "f16", output.stem, flags=re.IGNORECASE)
    return output.with_name((stem if stem != output.stem else f"{output.stem}-f16") + output.suffix)


def _bytes_needed(options: GgufOptions) -> float:
    """Of the temporary merge, the converted file and the quantized one, at the same time."""
    kind, merge = options.converted_type, 0.0
    if options.from_adapter:
        adapter = AdapterFolder(options.source)
        count = count_weights(ExportedWeights(adapter.base_folder(options.base, same_rounding=False)))
        count *= 2 if adapter.record.prequantized else 1  # two 4-bit weights are stored in one byte
        merge = count * (4 if kind == "f32" else 2)
    else:
        count = count_weights(ExportedWeights(options.source))
    quantized = CONVERTED["q8_0"] if options.outtype != kind else 0
    return merge + count * (CONVERTED[kind] + quantized) + 50e6
