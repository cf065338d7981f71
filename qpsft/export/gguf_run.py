"""Runs a GGUF with llama.cpp and compares it with the merged model it was made from.

Tokens of varied texts must be equal, stop tokens must stop it, and the probabilities of the next token must be the
merged model's, as near as the file's type allows (`LIMITS`).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from qpsft.errors import ExportError
from qpsft.export.gguf_texts import varied_texts
from qpsft.export.merged_model import MergedModel
from qpsft.model.hardware import pick_device
from qpsft.model.llama_server import INSTALL, LlamaServer, has_llama_cpp
from qpsft.verify.exported import load_exported
from qpsft.verify.measure import Measurement, Sequence, kept_positions, measure
from qpsft.verify.prompts import Prompt
from qpsft.verify.text import CONVERSATIONS, first_difference, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMITS = {
    "f32": 0.001, "f16": 0.001, "bf16": 0.005, "q8_0": 0.05, "q6_k": 0.1, "q5_k_m": 0.2, "q5_k_s": 0.2, "q5_1": 0.2,
    "q5_0": 0.2, "q4_k_m": 0.4, "q4_k_s": 0.4, "iq4_nl": 0.4, "iq4_xs": 0.4, "q4_1": 0.5, "q4_0": 0.5, "q3_k_l": 0.8,
    "q3_k_m": 1.0, "q3_k_s": 1.5, "q2_k": 2.0,
}  # fmt: skip
"""Largest mean KL(merged ‖ file) of the next token, in nats, that rounding explains, by the file's type.

Measured on SmolLM2-135M-Instruct: f16 5e-6, q8_0 0.008, q4_k_m 0.10, q2_k 0.62; the smaller a model, the more rounding
does to it. The other types lie between these by their bits.
"""

LONGEST = 128
PROMPTS = 8
POSITIONS = 200
TOP = 64
"""Likeliest tokens whose probabilities are compared at a position; all others count as one."""

SURE = 1000.0
"""A logit bias that makes a token the next one, whatever the model says."""


@dataclass(frozen=True)
class Compared:
    """A file's next-token probabilities beside the merged model's.

    Attributes:
        sequences: the tokens.
        exact: the merged model's log-probabilities on them.
        positions: how many positions were compared.
        kl: the mean KL(merged ‖ file) of the next token there, in nats.
        top1: the share of them with the same likeliest token.
        chosen: the file's log-probability of the text's own next token, by position.
    """

    sequences: list[Sequence]
    exact: Measurement
    positions: int
    kl: float
    top1: float
    chosen: dict[int, float]


@dataclass
class GgufRun:
    """The result of running a GGUF.

    Attributes:
        ran: whether it was run; llama.cpp may not be installed.
        texts: how many texts gave the same tokens.
        compared: its probabilities; None when it was not run.
        limit: of their mean KL, in nats, by the file's type.
    """

    ran: bool
    why_not: str = ""
    texts: int = 0
    compared: Compared | None = None
    limit: float = 0.0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence."""
        if not self.ran:
            return f"run with llama.cpp: not run ({self.why_not})"
        return (
            f"run with llama.cpp: {self.texts} texts give the same tokens; at {self.compared.positions} positions the "
            f"next token's probabilities are {self.compared.kl:.1e} nats (KL) from the merged model's (limit "
            f"{self.limit:g}), the likeliest token is the same at {self.compared.top1:.1%}"
        )


def run_gguf(path: Path, merged: MergedModel, prompts: list[Prompt], outtype: str) -> GgufRun:
    """Loads the file with llama.cpp, tokenizes and evaluates.

    Args:
        outtype: the file's type, which says how far its probabilities may be.

    Raises:
        ExportError: llama.cpp cannot load the file, makes other tokens of a text (both shown), or computes other
            probabilities.
    """
    if not has_llama_cpp():
        return GgufRun(False, f"xllamacpp, which brings llama.cpp, is not installed: {INSTALL}")
    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size > free:
        return GgufRun(False, f"it needs {size / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free")
    with LlamaServer(path, context=LONGEST + 8, exact=True) as server:
        texts, notes = _compare_tokens(server, merged.tokenizer)
        result = GgufRun(True, texts=texts, limit=LIMITS[outtype])
        result.notes = [*notes, *_notes_on_stops(server, merged), *_notes_on_text(server, merged.tokenizer)]
        result.compared = _compare_probabilities(server, merged, prompts, result.limit)
    return result


def _compare_tokens(server: LlamaServer, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """Returns how many texts were compared, and a note where only texts that are not normalized give other tokens."""
    texts, notes = varied_texts(tokenizer), []
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        made = server.tokenize(text)
        if made == expected:
            continue
        difference = first_difference(expected, made)
        form = _normalized_by(server, tokenizer, text, expected)
        if form is None:
            raise ExportError(
                f"llama.cpp makes other tokens of {text!r} than the model's own tokenizer: {difference}; so "
                f"{server.path.name} would not be the model that was trained.",
                "Use the merged safetensors folder, or a base whose tokenizer llama.cpp knows. (--no_run skips this.)",
            )
        notes = notes or [
            f"the tokenizer puts texts into Unicode's form {form} first and llama.cpp does not, so of {text!r} it "
            f"makes other tokens: {difference}. Most texts are in that form"
        ]
    return len(texts), notes


def _normalized_by(
    server: LlamaServer, tokenizer: PreTrainedTokenizerBase, text: str, expected: list[int]
) -> str | None:
    """The Unicode form into which the tokenizer puts texts first, if that alone explains llama.cpp's other tokens."""
    for form in ("NFC", "NFKC"):
        changed = unicodedata.normalize(form, text)
        same = tokenizer(changed, add_special_tokens=False, verbose=False)["input_ids"] == expected
        if changed != text and same and server.tokenize(changed) == expected:
            return form
    return None


def _notes_on_stops(server: LlamaServer, merged: MergedModel) -> list[str]:
    """The stop tokens at which llama.cpp goes on: each is made the next token, and must be the last."""
    passed = []
    for token in sorted(merged.stops):
        made = server.complete([token], n_predict=4, temperature=0.0, logit_bias=[[token, SURE]])
        if made["stop_type"] != "eos":
            passed.append(repr(merged.tokenizer.convert_ids_to_tokens(token)))
    if not passed:
        return []
    return [f"llama.cpp does not stop at {', '.join(passed)} by itself: give it as a stop string (a Modelfile does)"]


def _notes_on_text(server: LlamaServer, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Where llama.cpp begins or writes a prompt otherwise than the tokenizer: users of its chat get that."""
    if tokenizer.chat_template is None:
        made, own = server.tokenize("a", start=True), tokenizer("a", verbose=False)["input_ids"]
        if made == own:
            return []
        return [f"of plain text llama.cpp makes {made[:3]}… where the tokenizer makes {own[:3]}…: mind the BOS token"]
    for conversation in CONVERSATIONS:
        text = render(tokenizer, conversation, opened=True)
        if text is None or conversation[-1]["role"] != "user":
            continue
        expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        try:
            written = server.apply_template(conversation)
        except ExportError as error:
            return [
                f"llama.cpp cannot write the chat template ({error.what}): give it prompts written by the tokenizer"
            ]
        made = server.tokenize(written, start=True)
        if made != expected:
            return [
                f"llama.cpp writes the chat template otherwise than training did: {written!r} instead of {text!r} "
                f"({first_difference(expected, made)}); give it prompts written by the tokenizer"
            ]
    return []


def _compare_probabilities(server: LlamaServer, merged: MergedModel, prompts: list[Prompt], limit: float) -> Compared:
    """Raises ExportError where the file is further off than its type explains."""
    sequences = as_sequences(prompts)
    device = pick_device("auto")
    exact = measure(load_exported(merged.weights, device), sequences, merged.config["vocab_size"], device)
    compared = compare_with_file(server, exact, sequences)
    if not compared.kl <= limit:
        raise ExportError(
            f"llama.cpp computes other probabilities with {server.path.name}: {compared.kl:.2g} nats (KL) off on "
            f"average, where its type explains {limit:g}.",
            "Try a newer llama.cpp with --llama_cpp, or use the merged safetensors folder.",
        )
    return compared


def as_sequences(prompts: list[Prompt]) -> list[Sequence]:
    """The beginnings of a few prompts, as tokens to measure on."""
    chosen = [prompt for prompt in prompts[:PROMPTS] if len(prompt.ids) > 1]
    return [Sequence(prompt.ids[:LONGEST], min(prompt.prompt_length, LONGEST)) for prompt in chosen]


def compare_with_file(server: LlamaServer, exact: Measurement, sequences: list[Sequence]) -> Compared:
    """How far a file's next-token probabilities are from a model's, at `POSITIONS` positions evenly spread.

    Args:
        exact: the model's, of these sequences.
    """
    places = [(sequence, end) for sequence in sequences for end in range(1, len(sequence.ids))]
    kept = kept_positions(len(places), exact.full.shape[1])
    rows = torch.linspace(0, len(kept) - 1, min(POSITIONS, len(kept))).round().long().tolist()
    kl = same = 0.0
    own = {}
    for row in rows:
        number = int(kept[row])
        sequence, end = places[number]
        chosen, tokens, logprobs = _next_token(server, sequence.ids[:end], sequence.ids[end])
        kl += _coarse_kl(exact.full[row], tokens, logprobs)
        same += int(tokens[0]) == int(exact.best[number])
        if chosen is not None:
            own[number] = chosen
    return Compared(sequences, exact, len(rows), kl / len(rows), same / len(rows), own)


def _next_token(server: LlamaServer, ids: list[int], chosen: int) -> tuple[float | None, Tensor, Tensor]:
    """Log-probability of a chosen next token, None for half a character; the likeliest tokens (TOP,) int64 and their
    log-probabilities (TOP,) float32."""
    # The bias has the server choose and so report a token; what it reports are the model's own probabilities.
    options = {"n_predict": 1, "n_probs": TOP, "temperature": 0.0}
    reported = server.complete(ids, logit_bias=[[chosen, SURE]], **options).get("completion_probabilities")
    logprob = reported[0]["logprob"] if reported else None
    if not reported:  # it reports no token that is a part of a character
        whole = server.tokenize("a")[-1]
        reported = server.complete(ids, logit_bias=[[whole, SURE]], **options)["completion_probabilities"]
    top = reported[0]["top_logprobs"]
    tokens, logprobs = torch.tensor([one["id"] for one in top]), torch.tensor([one["logprob"] for one in top])
    return logprob, tokens, logprobs


def _coarse_kl(exact: Tensor, tokens: Tensor, logprobs: Tensor) -> float:
    """KL(exact ‖ file) in nats, with all tokens but the given ones taken for one.

    Args:
        exact: log-probabilities of the whole vocabulary (V,) float32.
        tokens, logprobs: of the file's likeliest tokens, (TOP,).
    """
    p, q = exact[tokens].double(), logprobs.double()
    rest_p, rest_q = ((1 - side.exp().sum()).clamp_min(1e-9) for side in (p, q))
    return float((p.exp() * (p - q)).sum() + rest_p * (rest_p / rest_q).log())
