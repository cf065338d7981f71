"""Reads a GGUF back: is every tensor the merged model's, up to the rounding of its type, and is the metadata its own?

Values are compared under a bound that follows from each tensor's type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from qpsft.export.gguf_file import KNOWN, GgufFile, Source, sources_of
from qpsft.export.llama_cpp import went_wrong
from qpsft.export.merged_model import MergedModel
from qpsft.verify.exported import ExportedWeights

HALF_STEP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of one rounding to nearest."""

F16_SMALLEST = 2.0**-24

BLOCK_OF_VALUES = 2**22
"""Values that are dequantized and compared at once: 16 MB in float32."""

BLOCK_ERROR = {
    "Q8_0": 0.01, "Q6_K": 0.04, "Q5_K": 0.07, "Q5_0": 0.08, "Q5_1": 0.08, "Q4_K": 0.14, "Q4_0": 0.16, "Q4_1": 0.16,
    "IQ4_NL": 0.15, "IQ4_XS": 0.15, "Q3_K": 0.28, "Q2_K": 0.5,
}  # fmt: skip
"""Relative error (root mean square) of the block types: twice what bell-shaped weights get in each (see the tests)."""

OTHER_SENSES = re.compile(
    r"(^|[._])(vision|visual|audio|image|multi_?modal|multi_modal_projector|connector|mm)([._]|$)"
)
"""In the names of tensors that see or hear: llama.cpp keeps those in a file of their own (`--mmproj`)."""

SLIDING = ("sliding_attention",)
"""Every layer's type in a config that has a window and does not say which layers slide."""

COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that converters compute from the config."""


@dataclass
class GgufCheck:
    """The result of reading a GGUF back.

    Attributes:
        tensors: how many tensors were compared with the merged weights.
        computed: names of tensors that have no source because they follow from the config.
        largest_error: largest relative error (root mean square) of a tensor.
        other_senses: how many tensors see or hear, and are not in the file.
        unsure: what was not found as expected, in an architecture whose layout is not known for sure here.
        stops_missing: stop tokens of the merged model that the file does not name.
        merge_order_lost: the file's SentencePiece tokenizer has one score for all pieces.
        adds_bos: llama.cpp puts the beginning-of-sequence token before every text.
        window_lost: tokens that the model's layers look back at, where llama.cpp looks at all.
    """

    tensors: int = 0
    computed: list[str] = field(default_factory=list)
    largest_error: float = 0.0
    types: dict[str, int] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    other_senses: int = 0
    unsure: list[str] = field(default_factory=list)
    stops_missing: list[str] = field(default_factory=list)
    merge_order_lost: bool = False
    adds_bos: bool = False
    window_lost: int | None = None

    def summary(self) -> str:
        """One sentence."""
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        return (
            f"read back: {self.tensors} tensors ({types}) equal the merged weights up to their type's rounding "
            f"(largest relative error {self.largest_error:.1e}), {len(self.metadata)} metadata keys match"
            f"{f'; {len(self.unsure)} are laid out in a way that is not known here' if self.unsure else ''}"
        )

    def differs(self, file: GgufFile, what: str) -> None:
        """Notes a difference. Raises ExportError where the architecture's layout is known for sure."""
        if file.architecture in KNOWN:
            raise went_wrong(file.path, what)
        self.unsure.append(what)


def check_gguf(path: Path, merged: MergedModel, gguf: ModuleType) -> GgufCheck:
    """Compares a GGUF with the merged model it was made from.

    Raises:
        ExportError: the file cannot be read; or, in an architecture whose layout is known for sure, a tensor is
            missing, has no source, another shape or other values, or metadata differ (named).
    """
    file, check = GgufFile(path, gguf), GgufCheck()
    _check_tensors(file, merged, check)
    _check_metadata(file, merged, check)
    _check_special_tokens(file, merged, check)
    _note_tokenizer(file, merged, check)
    window = _sliding_window(merged.config)
    check.window_lost = None if file.value("{arch}.attention.sliding_window") else window
    return check


def _check_tensors(file: GgufFile, merged: MergedModel, check: GgufCheck) -> None:
    """Every tensor of the merged model is in the file with its values, and every one in the file comes from it."""
    sources, nameless = sources_of(file, merged.weights, merged.config)
    senses = [name for name in nameless if merged.has_other_senses and OTHER_SENSES.search(name)]
    check.other_senses = len(senses)
    if texts := [name for name in nameless if name not in senses]:
        check.differs(file, f"{texts[0]} of the merged model has no name in llama.cpp's {file.architecture}")
    bar = {"desc": "reading back", "unit": "tensor", "disable": None, "leave": False}
    for source in tqdm(sources, **bar):
        if source.name not in file.tensors:
            check.differs(file, f"it lacks {source.name}, which is {source.sources[0]} of the merged model")
            continue
        kind = file.type_of(source.name)
        check.types[kind] = check.types.get(kind, 0) + 1
        error, wrong = _compare(file, source, merged.weights)
        if wrong:
            check.differs(file, wrong)
        else:
            check.largest_error = max(check.largest_error, error)
            check.tensors += 1
    rest = sorted(set(file.tensors) - {source.name for source in sources})
    check.computed = [name for name in rest if name.startswith(COMPUTED)]
    if unknown := [name for name in rest if name not in check.computed]:
        check.differs(file, f"{unknown[0]} in it comes from no tensor of the merged model")


def _compare(file: GgufFile, source: Source, weights: ExportedWeights) -> tuple[float, str]:
    """The tensor's relative error, and what is wrong with it where that is more than its type explains."""
    parts = [source.layout.forward(weights.tensor(name)) for name in source.sources]
    where = f"{source.name} ({source.sources[0]})"
    if len({part.shape for part in parts}) > 1:
        return 0.0, f"{where} is made of tensors of several shapes"
    expected = parts[0] if len(parts) == 1 else torch.stack(parts)  # in float32, before the type's rounding
    if file.shape_of(source.name) != list(expected.shape):
        return 0.0, f"{where} has shape {file.shape_of(source.name)}, not {list(expected.shape)}"
    kind = file.type_of(source.name)
    # by rows, because a vocabulary's embedding is large
    rows = max(1, BLOCK_OF_VALUES // max(1, expected.numel() // len(expected)))
    blocks = (slice(start, start + rows) for start in range(0, len(expected), rows))
    error, right = rounding_error(((file.values(source.name, block), expected[block]) for block in blocks), kind)
    if right is None:
        return error, f"{where} is of type {kind}, whose rounding is not known here"
    return (
        error,
        "" if right else f"the values of {where} differ by {error:.1e} of their size, and {kind} explains less",
    )


def rounding_error(blocks: Iterable[tuple[Tensor, Tensor]], kind: str) -> tuple[float, bool | None]:
    """How far values are from those a type was made of, and whether rounding to the type explains it.

    Args:
        blocks: (in the file, expected) of one tensor, block by block, both float32 and of one shape. The first of
            each pair is overwritten.

    Returns:
        (‖in the file − expected‖ / ‖expected‖, verdict); the verdict is None for an unknown type.
    """
    wrong, size, within = 0.0, 1e-60, True
    for stored, expected in blocks:
        difference = stored.sub_(expected).abs_()
        wrong += float(difference.norm()) ** 2
        size += float(expected.norm()) ** 2
        if kind in HALF_STEP:
            allowed = expected.abs().mul_(HALF_STEP[kind]).add_(F16_SMALLEST if kind == "F16" else 0.0)
            within &= bool((difference <= allowed).all())
    error = math.sqrt(wrong / size)
    if kind in HALF_STEP:
        return error, within
    return error, error <= BLOCK_ERROR[kind] if kind in BLOCK_ERROR else None


def _check_metadata(file: GgufFile, merged: MergedModel, check: GgufCheck) -> None:
    """What the file says of the architecture and the tokenizer is what the merged model's config and tokenizer say."""
    config, tokenizer = merged.config, merged.tokenizer
    rope = config.get("rope_parameters") or {}
    expected = {
        "{arch}.block_count": config.get("num_hidden_layers"),
        "{arch}.context_length": config.get("max_position_embeddings"),
        "{arch}.embedding_length": config.get("hidden_size"),
        "{arch}.feed_forward_length": config.get("intermediate_size"),
        "{arch}.attention.head_count": config.get("num_attention_heads"),
        "{arch}.attention.head_count_kv": config.get("num_key_value_heads"),
        "{arch}.attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "{arch}.rope.freq_base": rope.get("rope_theta", config.get("rope_theta")),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    for key, value in expected.items():
        stored = file.value(key)
        if value is None or stored is None or isinstance(stored, list):
            continue
        equal = abs(stored - value) <= 1e-6 * abs(value) if isinstance(value, float) else stored == value
        key = key.replace("{arch}", file.architecture)
        if equal:
            check.metadata.append(key)
        else:
            check.differs(file, f"its {key} is {stored!r}, not {value!r}")


def _check_special_tokens(file: GgufFile, merged: MergedModel, check: GgufCheck) -> None:
    """Special tokens must be there and be special: a plain one would be cut into pieces by llama.cpp."""
    tokens = file.value("tokenizer.ggml.tokens") or []
    types = file.value("tokenizer.ggml.token_type") or []
    kinds = file.gguf.TokenType
    whole = {int(kind) for kind in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)}
    for number, token in merged.tokenizer.added_tokens_decoder.items():
        if number >= len(tokens) or tokens[number] != token.content:
            stored = repr(tokens[number]) if number < len(tokens) else "missing"
            check.differs(file, f"its token {number} is {stored}, not {token.content!r}")
        elif token.special and types and types[number] not in whole:
            check.differs(file, f"its token {token.content!r} is plain text")
    check.metadata.append("tokenizer.ggml.tokens")


def _note_tokenizer(file: GgufFile, merged: MergedModel, check: GgufCheck) -> None:
    """Where llama.cpp will treat texts in another way than the merged model's tokenizer: no fault of the conversion."""
    scores, types = file.value("tokenizer.ggml.scores") or [], file.value("tokenizer.ggml.token_type") or []
    plain = int(file.gguf.TokenType.NORMAL)
    of_plain_tokens = {score for score, kind in zip(scores, types, strict=False) if kind == plain}
    is_sentencepiece = file.value("tokenizer.ggml.model") == "llama"
    check.merge_order_lost = is_sentencepiece and len(scores) > 256 and len(of_plain_tokens) == 1
    check.adds_bos = _adds_bos(file)
    named = {file.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    missing = sorted(merged.stops - named)
    check.stops_missing = [str(merged.tokenizer.convert_ids_to_tokens(token)) for token in missing]


def _sliding_window(config: dict[str, Any]) -> int | None:
    """Tokens that a model's sliding layers look back at; None where no layer slides, or no text is longer."""
    window, context = config.get("sliding_window"), config.get("max_position_embeddings") or math.inf
    slides = config.get("use_sliding_window", True) and "sliding_attention" in (config.get("layer_types") or SLIDING)
    return window if slides and window and window < context else None


def _adds_bos(file: GgufFile) -> bool:
    """What the file says, else llama.cpp's default for its kind of tokenizer (llama-vocab.cpp)."""
    said = file.value("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if file.value("tokenizer.ggml.model") == "llama":
        return True
    return file.value("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")
