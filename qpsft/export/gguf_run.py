"""Runs a GGUF with llama.cpp (llama-cpp-python) and compares it with the merged model it was made from.

Tokens must be equal. Log-probabilities are bounded by what the file's type does by itself, which is measured on the
same texts: the merged model, and the same model with the weights that are in the file and with the inputs of its
linear layers rounded as llama.cpp rounds them (to the weights' type, or to 8 bits in blocks for the block types).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpsft.errors import ExportError
from qpsft.export.gguf_file import GgufFile, sources_of
from qpsft.export.gguf_texts import varied_texts
from qpsft.export.merged_model import MergedModel
from qpsft.model.hardware import pick_device
from qpsft.verify.exported import load_exported
from qpsft.verify.measure import Sequence, measure
from qpsft.verify.prompts import Prompt
from qpsft.verify.text import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLACK = 2.0
NOISE_MEAN = 1e-4
"""Nats. On float32 weights llama.cpp and transformers differ by 2e-6 on average (demo base, float32 cache)."""

BLOCK = 32
LONGEST = 128
PROMPTS = 8


@dataclass
class GgufRun:
    """The result of running a GGUF.

    Attributes:
        ran: whether it was run; llama-cpp-python may not be installed.
        texts: how many texts gave the same tokens.
        numbers: mean and largest |Δ log-probability| of llama.cpp and of rounding alone, and the bound, in nats.
    """

    ran: bool
    why_not: str = ""
    texts: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence."""
        if not self.ran:
            return f"run with llama.cpp: not run ({self.why_not})"
        line = f"run with llama.cpp: {self.texts} texts give the same tokens"
        if self.numbers:
            line += (
                f"; log-probabilities differ by {self.numbers['mean_abs']:.1e} nats on average "
                f"(bound {self.numbers['bound']:.1e}, rounding alone {self.numbers['rounding_mean_abs']:.1e})"
            )
        return line


def llama_cpp_python() -> ModuleType | None:
    """The llama_cpp module, or None when it is not installed."""
    return None if importlib.util.find_spec("llama_cpp") is None else importlib.import_module("llama_cpp")


def run_gguf(path: Path, merged: MergedModel, gguf: ModuleType, prompts: list[Prompt]) -> GgufRun:
    """Loads the file with llama-cpp-python, tokenizes and evaluates.

    Raises:
        ExportError: llama.cpp cannot load the file, makes other tokens of a text (both shown), or computes other
            log-probabilities.
    """
    llama_cpp = llama_cpp_python()
    if llama_cpp is None:
        return GgufRun(False, "llama-cpp-python is not installed: pip install llama-cpp-python")
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=LONGEST + 8, logits_all=True, type_k=0, type_v=0, n_gpu_layers=0, verbose=False
        )  # type 0 is float32: the cache's own rounding is no part of the file
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ExportError(f"llama.cpp cannot load {path.name}: {error}.", "Try a newer llama.cpp.") from error
    try:
        result = GgufRun(True)
        result.texts = _compare_tokens(model, merged.tokenizer, path)
        result.notes = _notes(model, merged, llama_cpp)
        result.numbers = _compare_logprobs(model, merged, GgufFile(path, gguf), prompts)
    finally:
        model.close()
    return result


def _compare_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path) -> int:
    """Returns how many texts were compared."""
    texts = varied_texts(tokenizer)
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        made = model.tokenize(text.encode(), add_bos=False, special=True)
        if made != expected:
            raise ExportError(
                f"llama.cpp makes other tokens of {text!r} than the model's own tokenizer: "
                f"{first_difference(expected, made)}; so {path.name} would not be the model that was trained.",
                "Use the merged safetensors folder, or a base whose tokenizer llama.cpp knows. (--no_run skips this.)",
            )
    return len(texts)


def _notes(model: Any, merged: MergedModel, llama_cpp: ModuleType) -> list[str]:
    notes, tokenizer = [], merged.tokenizer
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    passed = [token for token in sorted(merged.stops) if not llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    if passed:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in passed)
        notes.append(f"llama.cpp does not stop at {names} by itself: give it as a stop string (a Modelfile does)")
    plain, own = model.tokenize(b"a", add_bos=True, special=True), tokenizer("a", verbose=False)["input_ids"]
    if plain != own and tokenizer.chat_template is None:
        notes.append(
            f"of plain text llama.cpp makes {plain[:3]}… where the tokenizer makes {own[:3]}…: mind the BOS token"
        )
    return notes


def _compare_logprobs(model: Any, merged: MergedModel, file: GgufFile, prompts: list[Prompt]) -> dict[str, float]:
    """Returns the numbers of `GgufRun`. Raises ExportError where rounding does not explain the difference."""
    config, weights = merged.config, merged.weights
    sequences = [Sequence(prompt.ids[:LONGEST], len(prompt.ids)) for prompt in prompts[:PROMPTS] if len(prompt.ids) > 1]
    stored = {source.sources[0]: source for source in sources_of(file, weights, config) if len(source.sources) == 1}

    def in_file(name: str) -> Tensor:
        source = stored.get(name)
        return weights.tensor(name) if source is None else source.layout.back(file.values(source.name))

    device, vocabulary = pick_device("auto"), config["vocab_size"]
    exact = measure(load_exported(weights, device), sequences, vocabulary, device).chosen
    rounding = load_exported(weights, device, in_file)
    _round_inputs(rounding, {name: file.type_of(source.name) for name, source in stored.items()})
    rounded = measure(rounding, sequences, vocabulary, device).chosen
    computed = torch.cat([_next_logprobs(model, sequence.ids) for sequence in sequences])
    difference, alone = (computed - exact).abs(), (rounded - exact).abs()
    bound = SLACK * float(alone.mean()) + NOISE_MEAN
    numbers = {
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "rounding_mean_abs": float(alone.mean()),
        "rounding_max_abs": float(alone.max()),
        "bound": bound,
    }
    if not numbers["mean_abs"] <= bound:
        raise ExportError(
            f"llama.cpp computes other log-probabilities with {file.path.name}: {numbers['mean_abs']:.2g} nats off "
            f"on average, where its rounding explains {bound:.2g}.",
            "Try a newer llama.cpp with --llama_cpp, or use the merged safetensors folder.",
        )
    return numbers


def _round_inputs(model: Any, types: dict[str, str]) -> None:
    """Makes linear layers round their inputs as llama.cpp does for weights of these types."""
    embedding = next((kind for name, kind in types.items() if name.endswith("embed_tokens.weight")), "F32")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = types.get(f"{name}.weight", embedding if name == "lm_head" else "F32")
            module.register_forward_pre_hook(partial(_rounded_input, kind))


def _rounded_input(kind: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = args
    if kind in ("F16", "BF16"):
        return (x.to(torch.float16 if kind == "F16" else torch.bfloat16).float(),)
    if kind == "F32" or x.shape[-1] % BLOCK:
        return (x,)
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (((blocks / scale).round() * scale).flatten(-2),)


def _next_logprobs(model: Any, ids: list[int]) -> Tensor:
    """Log-probability of each next token, (len(ids) − 1,) float32."""
    model.reset()
    model.eval(ids)
    logprobs = torch.log_softmax(torch.from_numpy(model.scores[: len(ids) - 1].copy()).float(), dim=-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
