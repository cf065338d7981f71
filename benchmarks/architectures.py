"""Which architectures train, merge, verify, become a GGUF that runs, and are served: docs/architectures.md.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py             # all that the record has not yet
    OMP_NUM_THREADS=1 python benchmarks/architectures.py llama gpt2  # these, again if need be

Each is a random model of a few layers (`tiny_architectures.py`) with a small tokenizer. It goes the whole way as a
user's model does: one optimizer step of PSFT on NF4 with `all-linear`, merge to float32, verify, export to GGUF in f32
with every check, the run in llama.cpp where its wheel is installed, and the gate before vLLM. What is found is kept in
`results/architectures.json`, by architecture; the page is written from it.

llama.cpp's converter knows byte-level tokenizers by a hash of what they make of one text. A copy of it is told that
these split texts as GPT-2's or Qwen's do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tiny_architectures import ARCHITECTURES, MIXTURES, MULTIMODAL, save_architecture, save_bpe_tokenizer

from qpsft import cli
from qpsft.errors import QpsftError
from qpsft.export import llama_cpp
from qpsft.export.command import write_export
from qpsft.export.options import ExportOptions
from qpsft.merge import merge_adapter
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import MODEL_DIR
from qpsft.verify import verify_export

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 512
SENTENCEPIECE = {
    "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text",
    "ernie4_5", "ernie4_5_moe", "nemotron",
}  # fmt: skip
"""Architectures of which the converter takes no byte-level tokenizer: they get the embedded base's."""
TOKENIZERS = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35"}
"""Classes that split texts in their own way, and llama.cpp's names of that."""
TEXTS = ROOT / "qpsft" / "export" / "gguf_texts.json"
RECORD, PAGE = ROOT / "benchmarks" / "results" / "architectures.json", ROOT / "docs" / "architectures.md"
COLUMNS = ("train", "merge", "verify", "GGUF", "run", "vLLM")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")


BECAUSE = {
    "mistral": "llama.cpp computes a Mistral as a Llama, without the sliding window, here of 8 tokens",
    "nemotron": "its converter says that texts begin with a space, which the tokenizer of this trial does not add",
    "dots1": "its converter leaves the sliding window out, here of 8 tokens",
    "gpt_neox": "transformers 5 writes this elsewhere; a config.json from the Hub has it",
    "hunyuan_v1_moe": "it asks for a list, one number a layer, as the Hub's config.json has it",
    "jamba": "it takes a tokenizer.model, which this trial has none of that fits",
    "mpt": "it asks for the Hub's name, MPTForCausalLM, and transformers writes another",
}
"""What is behind a refusal, by architecture, where its own words do not say it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types (default: those not tried yet)")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"found": {}}
    found, versions = record["found"], {name: version(name) for name in LIBRARIES}
    llama_cpp.run_process = convert_in_a_fork
    names = arguments.names or [name for name in ARCHITECTURES if name not in found]
    crashed = []
    with tempfile.TemporaryDirectory() as work:
        tools = llama_cpp_for_this_tokenizer(Path(work))
        for name in names:
            started = time.perf_counter()
            try:
                found[name] = go_the_whole_way(Path(work) / name, name, tools)
            except Exception:  # a fault of ours and no result
                traceback.print_exc()
                crashed.append(name)
                continue
            print(f"{name}: {found[name]} ({time.perf_counter() - started:.0f} s)", flush=True)
            ordered = {known: found[known] for known in ARCHITECTURES if known in found}
            record = {"versions": versions, "found": ordered}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(page(record), encoding="utf-8")
    if crashed:
        sys.exit(f"crashed: {', '.join(crashed)}")


def go_the_whole_way(folder: Path, name: str, tools: Path) -> dict[str, str]:
    """What each step came to, by column; where one is refused, why, and the later ones that need it are left out."""
    base, adapter, merged = (folder / part for part in ("base", "adapter", "merged"))
    results: dict[str, str] = {}

    def step(column: str, what) -> bool:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                results[column] = what()
        except QpsftError as error:
            results[column] = f"no: {_in_short(' '.join(error.what.replace(f'{folder}/', '').split()))}"
        return not results[column].startswith("no")

    save_base(base, name)
    if not step("train", lambda: train(base, adapter)):
        return results
    step("vLLM", lambda: gate(adapter))
    if not step("merge", lambda: merge(adapter, merged)):
        return results
    step("verify", lambda: verify(adapter, merged))
    if not step("GGUF", lambda: gguf(merged, folder / "run.gguf", tools, results)):
        why = results["GGUF"]
        if step("GGUF", lambda: gguf(merged, folder / "read.gguf", tools, results, no_run=True)):
            results["run"] = why
    return results


def _in_short(reason: str, length: int = 320) -> str:
    """A converter's last error, what llama.cpp says while loading, else the beginning."""
    if unknown := re.search(r"Model (\w+) is not supported", reason):
        return f"llama.cpp's converter does not know {unknown[1]}"
    if missing := re.search(r"error loading model: (.+?) (?:\d+\.\d+\.|$)", reason):
        return f"llama.cpp cannot load it: {missing[1]}"
    if "line " in reason and (errors := re.findall(r"\w+Error: ", reason)):
        return f"llama.cpp's converter fails: {errors[-1]}{reason.rpartition(errors[-1])[2].rstrip(' .')}"
    return reason if len(reason) <= length else f"{reason[: length + 1].rpartition(' ')[0]} …"


def save_base(folder: Path, name: str) -> None:
    """A random model with a tokenizer and a chat template."""
    if name in SENTENCEPIECE:
        save_architecture(folder, name, len(load_tokenizer(MODEL_DIR)))
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MODEL_DIR / file, folder)
        return
    save_architecture(folder, name, VOCABULARY)
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    save_bpe_tokenizer(folder, [text for kind in texts.values() for text in kind], VOCABULARY)


def llama_cpp_for_this_tokenizer(folder: Path) -> Path:
    """A copy of the converters that takes a byte-level tokenizer for what its class says, else for one like GPT-2's."""
    tools = shutil.copytree(llama_cpp.find_llama_cpp(), folder / "llama.cpp")
    file = tools / "conversion" / "base.py"
    code, place = file.read_text(encoding="utf-8"), "        chktok = tokenizer.encode(chktxt)\n"
    assert code.count(place) == 1, "this llama.cpp looks its tokenizers up in another way"
    known = f'        return {TOKENIZERS}.get(type(tokenizer).__name__, "gpt-2")\n'
    file.write_text(code.replace(place, known + place), encoding="utf-8")
    return tools


def convert_in_a_fork(command: list[str], environment: dict[str, str], output: Path, **_: Any) -> tuple[int, str]:
    """`run_process` for the converter, as a copy of this process: it need not import torch and transformers again."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            code = 1
            try:
                logging.getLogger().handlers.clear()  # the converter sets its own up
                os.environ.update(environment)
                sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
                sys.stdout = sys.stderr = os.fdopen(1, "w")
                sys.argv = command[1:2] + command[3:]
                exec(command[2], {"__name__": "__main__"})
                code = 0
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        return os.waitstatus_to_exitcode(status), log.read()


def train(base: Path, adapter: Path) -> str:
    flags = ["--dataset_name=demo-clean", "--dataset_limit=8", "--max_steps=1", "--lora_r=4", "--held_out_rows=2"]
    flags += ["--use_cpu", "--learning_rate=1e-2", "--per_device_train_batch_size=4", "--report_to=none"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["train", f"--model_name_or_path={base}", f"--output_dir={adapter}", *flags])
    if code != 0:
        raise QpsftError(said.getvalue().partition("error: ")[2].split("\n\n")[0].strip())
    return "yes"


def merge(adapter: Path, merged: Path) -> str:
    merge_adapter(adapter, merged, dtype="float32", no_verify=True)
    return "yes"


def verify(adapter: Path, merged: Path) -> str:
    report = verify_export(adapter, merged, max_prompts=2, max_new_tokens=8)
    report.require_same()
    return f"{report.numbers['distance']['max_abs']:.0e}"


def gguf(merged: Path, file: Path, tools: Path, results: dict[str, str], **options: Any) -> str:
    options |= {"llama_cpp": str(tools)}
    report = write_export(ExportOptions(merged, to="gguf", output=str(file), outtype="f32", **options))
    if report.run.ran:
        results["run"] = "yes"
    return "yes"


def gate(adapter: Path) -> str:
    return "adapter" if write_export(ExportOptions(adapter, to="vllm")).servable else "merged"


def page(record: dict[str, Any]) -> str:
    """docs/architectures.md, from the record: the versions of the last run, and what was found."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    reasons: dict[str, int] = {}
    lines = []
    for name, results in record["found"].items():
        cells = []
        for column in COLUMNS:
            result = results.get(column, "–")
            if result.startswith("no: "):
                reason = result.removeprefix("no: ")
                if name in BECAUSE:
                    reason = f"{reason} ({BECAUSE[name]})"
                result = f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
            cells.append(result)
        kind = " (experts)" if name in MIXTURES else " (multimodal)" if name in MULTIMODAL else ""
        lines.append(f"| `{name}`{kind} | {' | '.join(cells)} |")
    why = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    why = f"\nWhere it says no:\n\n{why}" if why else ""
    return f"""# Architectures

Written by `benchmarks/architectures.py` ({versions}).
Each line is a random model of a few layers that goes the whole way: one step of PSFT on NF4 with `all-linear`, merge to
float32, verify, GGUF in f32 with every check, the run in llama.cpp, and the gate before vLLM.

| architecture | {" | ".join(COLUMNS)} |
| --- |{" --- |" * len(COLUMNS)}
{chr(10).join(lines)}

*verify*: the largest difference of a log-probability between the live model and the merged one, in nats. *run*:
llama.cpp makes the same tokens, and its next-token probabilities are less than 0.001 nats (KL) from the merged
model's; – is not tried. *vLLM*: what can be served there, the adapter on its base or the merged model. That is what
the gate before it (`qpsft export --to vllm`) reads from the files; vLLM itself was not started.
{why}"""


if __name__ == "__main__":
    sys.exit(main())
