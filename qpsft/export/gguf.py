"""Adapter or merged model -> GGUF, by llama.cpp's own converter, and read back before it gets its name."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from qpsft.errors import ExportError, OutputError
from qpsft.export.gguf_check import GgufCheck, check_gguf
from qpsft.export.gguf_run import PROMPTS, GgufRun, llama_cpp_python, run_gguf
from qpsft.export.llama_cpp import CONVERTER, find_llama_cpp, last_lines, load_gguf, run_converter, run_process
from qpsft.files import check_space, put_in_place, work_folder
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import check_folder, is_adapter
from qpsft.terminal import wrap
from qpsft.verify.exported import ExportedWeights, read_text_config
from qpsft.verify.prompts import read_prompts
from qpsft.verify.text import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qpsft.merge.merging import MergeReport

CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
"""Types the converter writes, and bytes a weight."""

QUANTIZED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
"""Types that llama-cpp-python makes from an f16 file."""

MERGE_DTYPE = {"f32": "float32", "bf16": "bfloat16"}
"""What to merge to, so that weights are rounded once; float16 for all other types, which round more than it."""

QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass
class ExportReport:
    """A GGUF that was written and what was checked.

    Attributes:
        path: the file.
        outtype: its type, which is f16 where a quantized one was asked for and could not be made.
        bytes: its size.
        source: the adapter or merged folder.
        check: what reading it back found.
        run: what running it with llama.cpp found.
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
    source, output, outtype = Path(source).expanduser(), Path(output).expanduser(), outtype.lower()
    if outtype not in CONVERTED and outtype not in QUANTIZED:
        raise ExportError(f"outtype {outtype!r} is not known.", f"Use {', '.join((*CONVERTED, *QUANTIZED))}.")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; a GGUF is one file.", "Give a file name that ends in .gguf.")
    from_adapter = is_adapter(source)
    notes = []
    wanted = outtype
    if outtype in QUANTIZED and llama_cpp_python() is None:
        outtype, output = "f16", _renamed(output, outtype)
        notes.append(
            f"{wanted} needs llama-cpp-python (pip install llama-cpp-python); the f16 is left as {output.name}"
        )
    first = outtype if outtype in CONVERTED else "f16"

    with work_folder(output, overwrite=overwrite, source=source) as work:
        check_space(output.parent, _bytes_needed(source, from_adapter, base, first, outtype), "The export")
        tools = find_llama_cpp(llama_cpp)
        gguf = load_gguf(tools)
        merge, folder = None, source
        if from_adapter:
            from qpsft.merge.merging import merge_adapter

            dtype = MERGE_DTYPE.get(first, "float16")
            merge = merge_adapter(
                source, work / "merged", base=base, onto=onto, dtype=dtype, verify=verify, show_progress=show_progress
            )
            folder = work / "merged"
        check_folder(folder)
        staged = stage(folder, work / "staged")
        weights = ExportedWeights(folder)
        made = work / "converted.gguf"
        arguments = [str(staged), "--outtype", first, "--model-name", source.resolve().name]
        size = int(_count(weights) * CONVERTED[first])
        run_converter(tools, CONVERTER, arguments, made, expected=size, show_progress=show_progress)
        if outtype != first:
            made = _quantize(made, work / "quantized.gguf", outtype, show_progress)
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = plain_template(tokenizer)
        stops = stop_tokens(folder, tokenizer)
        with tqdm(desc="reading back", unit="tensor", disable=None if show_progress else True, leave=False) as bar:
            check = check_gguf(made, folder, gguf, tokenizer, stops, bar)
        ran = GgufRun(False, "switched off")
        if run:
            context = read_text_config(folder).get("max_position_embeddings")
            chosen, _ = read_prompts(prompts, source, tokenizer, PROMPTS, context or 2**20)
            ran = run_gguf(made, folder, gguf, tokenizer, stops, chosen)
        if check.merge_order_lost and not ran.ran:
            lacking = AdapterFolder(source).base_folder(base, same_rounding=False) if from_adapter else source
            raise ExportError(
                f"{lacking} has no tokenizer.model, so the converter cannot tell the order in which pieces are merged, "
                "and llama.cpp would make other tokens than training did.",
                f"Copy tokenizer.model from the original model into {lacking}, and export again.",
            )
        report = ExportReport(
            output, outtype, made.stat().st_size, source, check, ran, merge, notes + ran.notes,
            stops=[str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops)],
        )  # fmt: skip
        put_in_place(made, output)
    if check.stops_missing and not ran.ran:
        names = ", ".join(map(repr, check.stops_missing))
        report.notes.append(f"the file does not name the stop tokens {names}: a Modelfile or --stop must")
    return report


def _renamed(output: Path, wanted: str) -> Path:
    """The name of the f16 that is left: with f16 for the type in it, or f16 added."""
    stem = re.sub(re.escape(wanted), "f16", output.stem, flags=re.IGNORECASE)
    return output.with_name((stem if stem != output.stem else f"{output.stem}-f16") + output.suffix)


def _count(weights: ExportedWeights) -> int:
    return sum(torch.Size(weights.shape_of(name)).numel() for name in weights.names())


def _bytes_needed(source: Path, from_adapter: bool, base: str | None, first: str, outtype: str) -> float:
    """Of the temporary merge, the converted file and the quantized one, at the same time."""
    needed, folder = 0.0, source
    if from_adapter:
        adapter = AdapterFolder(source)
        record, folder = adapter.record, adapter.base_folder(base, same_rounding=False)
    count = _count(ExportedWeights(folder))
    if from_adapter:
        count *= 2 if record.prequantized else 1  # two 4-bit weights are stored in one byte
        needed += count * (4 if first == "f32" else 2)
    return needed + count * (CONVERTED[first] + (CONVERTED["q8_0"] if outtype != first else 0)) + 50e6


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


def stage(folder: Path, staged: Path) -> Path:
    """A folder of links to a merged model, with what llama.cpp needs to read its tokenizer right.

    - `{% generation %}` markers in the chat template, which only training reads, become `{% if true %}`: llama.cpp's
      template engines do not know them, and the text rendered is the same.
    - tokenizer_config.json gets `added_tokens_decoder`. The converter learns from there which pieces of a
      `tokenizer.model` are special, transformers 5 does not write it any more, and without it "<|user|>" would be
      plain text to llama.cpp.
    """
    staged.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (staged / path.name).symlink_to(path.resolve())
    template = staged / "chat_template.jinja"
    if template.is_file():
        _replace(template, without_generation_markers(template.read_text(encoding="utf-8")))
    settings = staged / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if isinstance(content.get("chat_template"), str):
        content["chat_template"] = without_generation_markers(content["chat_template"])
    content["added_tokens_decoder"] = {
        str(number): {"content": token.content, "special": token.special}
        for number, token in load_tokenizer(folder).added_tokens_decoder.items()
    }
    _replace(settings, json.dumps(content, ensure_ascii=False, indent=2))
    return staged


def _replace(link: Path, text: str) -> None:
    link.unlink(missing_ok=True)
    link.write_text(text, encoding="utf-8")


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template as the GGUF holds it."""
    template = tokenizer.chat_template
    return without_generation_markers(template) if isinstance(template, str) else template


def without_generation_markers(template: str) -> str:
    """The template with its generation markers replaced by conditions that always hold; spacing marks stay."""
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)
