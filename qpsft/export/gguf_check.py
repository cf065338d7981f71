"""Reads a GGUF back: is every tensor the merged model's, up to the rounding of its type, and is the metadata its own?

Names are mapped with gguf-py's own tables, the layouts that llama.cpp wants are made here once more from the merged
weights (not with the converter's code), and values are compared under a bound that follows from each tensor's type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qpsft.errors import ExportError
from qpsft.verify.exported import ExportedWeights, read_text_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

ROTARY_NORMAL = {
    "llama", "granite", "granitemoe", "olmo", "minicpm", "deci", "arctic", "chameleon", "llada", "bailingmoe", "xverse",
    "baichuan", "internlm2",
}  # fmt: skip
"""Architectures whose rotary embedding pairs neighbouring rows in llama.cpp and halves in transformers."""

COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that converters compute from the config."""

EXPERT = re.compile(r"(.*experts)\.(\d+)\.(.+)")


@dataclass
class GgufCheck:
    """What reading back found.

    Attributes:
        tensors: how many tensors were compared with the merged weights.
        computed: names of tensors that have no source because they follow from the config.
        largest_error: largest relative error (root mean square) of a tensor.
        types: how many tensors of each type.
        metadata: the keys that were compared.
        stops_missing: stop tokens of the merged model that the file does not name.
        merge_order_lost: the file's SentencePiece tokenizer has one score for all pieces.
        adds_bos: llama.cpp puts the beginning-of-sequence token before every text.
    """

    tensors: int = 0
    computed: list[str] = field(default_factory=list)
    largest_error: float = 0.0
    types: dict[str, int] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    stops_missing: list[str] = field(default_factory=list)
    merge_order_lost: bool = False
    adds_bos: bool = False

    def summary(self) -> str:
        """One sentence."""
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        return (
            f"read back: {self.tensors} tensors ({types}) equal the merged weights up to their type's rounding "
            f"(largest relative error {self.largest_error:.1e}), {len(self.metadata)} metadata keys match"
        )


class GgufFile:
    """A GGUF opened with a llama.cpp's own gguf-py.

    Attributes:
        gguf: the gguf module.
        path: the file.
        architecture: llama.cpp's name of it.
    """

    def __init__(self, path: Path, gguf: ModuleType):
        self.path, self.gguf = path, gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ExportError(f"{path} cannot be read back as GGUF: {error}.", "Export again.") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = ""
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """A metadata value, None when the key is not there; `{arch}` in the key is the architecture."""
        field_ = self._reader.get_field(key.replace("{arch}", self.architecture))
        return None if field_ is None else field_.contents()

    def type_of(self, name: str) -> str:
        return self.tensors[name].tensor_type.name

    def shape_of(self, name: str) -> list[int]:
        """Shape in torch's order, the fastest dimension last."""
        return [int(size) for size in reversed(self.tensors[name].shape)]

    def values(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or rows of its first dimension, dequantized to float32, in torch's order of dimensions."""
        tensor = self.tensors[name]
        dense = self.gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        return torch.from_numpy(np.array(dense, dtype=np.float32)).reshape(-1, *self.shape_of(name)[1:])

    def name_map(self, blocks: int | None = None) -> Callable[[str], str | None]:
        """A function from a checkpoint's tensor name to the GGUF's; None for a name llama.cpp does not know.

        Args:
            blocks: number of layers; None is what the file says (an adapter's does not).
        """
        by_name = {name: arch for arch, name in self.gguf.MODEL_ARCH_NAMES.items()}
        blocks = int(self.value("{arch}.block_count") or 0) if blocks is None else blocks
        if self.architecture not in by_name:
            raise ExportError(f"gguf-py has no architecture {self.architecture!r}.", "Use another --llama_cpp.")
        names = self.gguf.get_tensor_name_map(by_name[self.architecture], blocks)
        return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays a tensor out, and the way back."""

    forward: Callable[[Tensor], Tensor] = lambda weight: weight
    back: Callable[[Tensor], Tensor] = lambda weight: weight


@dataclass(frozen=True)
class Source:
    """Where one GGUF tensor comes from: its name, the merged tensors it is made of (in order), and their layout."""

    name: str
    sources: list[str]
    layout: Layout


def sources_of(file: GgufFile, merged: ExportedWeights, config: dict[str, Any]) -> Iterator[Source]:
    """Every tensor of the merged folder with the GGUF tensor it must be in.

    Raises:
        ExportError: a merged tensor has no name in llama.cpp.
    """
    mapped = file.name_map()
    stacks: dict[str, list[str]] = {}
    tied = bool(config.get("tie_word_embeddings"))
    for name in merged.names():
        expert = EXPERT.fullmatch(name)
        target = mapped(f"{expert[1]}.{expert[3]}" if expert else name)
        if target is None:
            if name.endswith(("rotary_emb.inv_freq", "attn.masked_bias")):
                continue
            raise ExportError(f"{name} of the merged model has no name in llama.cpp's {file.architecture}.", "")
        if target == "output.weight" and tied and target not in file.tensors:
            continue
        stacks.setdefault(target, []).append(name)
    for target, names in stacks.items():
        if EXPERT.fullmatch(names[0]):
            names.sort(key=lambda name: int(EXPERT.fullmatch(name)[2]))
        yield Source(target, names, layout_of(file.architecture, names[0], config))


def layout_of(architecture: str, name: str, config: dict[str, Any]) -> Layout:
    """How a merged tensor of this name is laid out in a GGUF of this architecture."""
    heads = config.get("num_attention_heads")
    if architecture in ROTARY_NORMAL and (match := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
        count = heads if match[1] == "q" else config.get("num_key_value_heads") or heads
        return Layout(lambda weight: interleave_halves(weight, count), lambda weight: join_halves(weight, count))
    if architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
        return Layout(lambda weight: weight + 1, lambda weight: weight - 1)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return Layout(lambda weight: weight.T, lambda weight: weight.T)
    return Layout()


def interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (0, 1, …, d/2, d/2 + 1, …) of each head -> (0, d/2, 1, d/2 + 1, …), for `(heads · d, …)` tensors."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def join_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave_halves`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def check_gguf(
    path: Path,
    merged: Path,
    gguf: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    progress: Any = None,
) -> GgufCheck:
    """Compares a GGUF with the merged folder it was made from.

    Args:
        path: the GGUF.
        merged: the folder.
        gguf: llama.cpp's gguf-py, of `qpsft.export.llama_cpp.load_gguf`.
        tokenizer: the folder's.
        stops: the folder's stop tokens.
        progress: a tqdm bar over tensors.

    Raises:
        ExportError: a tensor is missing, has no source, another shape or other values; or metadata differ (named).
    """
    config = read_text_config(merged)
    file, weights, check = GgufFile(path, gguf), ExportedWeights(merged), GgufCheck()
    seen = set()
    if progress is not None:
        progress.reset(total=len(file.tensors))
    for source in sources_of(file, weights, config):
        if source.name not in file.tensors:
            raise _wrong(path, f"it lacks {source.name}, which is {source.sources[0]} of the merged model")
        seen.add(source.name)
        error = _check_tensor(file, source, weights)
        check.largest_error = max(check.largest_error, error)
        kind = file.type_of(source.name)
        check.types[kind] = check.types.get(kind, 0) + 1
        check.tensors += 1
        if progress is not None:
            progress.update()
    rest = sorted(set(file.tensors) - seen)
    check.computed = [name for name in rest if name.startswith(COMPUTED)]
    if unknown := [name for name in rest if name not in check.computed]:
        raise _wrong(path, f"{unknown[0]} in it comes from no tensor of the merged model")
    _check_metadata(file, config, tokenizer, check)
    _note_stops(file, tokenizer, stops, check)
    return check


def _wrong(path: Path, what: str) -> ExportError:
    return ExportError(
        f"The conversion to {path.name} went wrong: {what}.",
        "Try a newer llama.cpp with --llama_cpp, or use the merged safetensors folder.",
    )


def expected_values(source: Source, weights: ExportedWeights) -> Tensor:
    """What the GGUF tensor must hold before its type's rounding, float32."""
    parts = [source.layout.forward(weights.tensor(name)) for name in source.sources]
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _check_tensor(file: GgufFile, source: Source, weights: ExportedWeights) -> float:
    """Returns the tensor's relative error. Raises ExportError when it is more than its type explains."""
    expected = expected_values(source, weights)
    where = f"{source.name} ({source.sources[0]})"
    if file.shape_of(source.name) != list(expected.shape):
        raise _wrong(file.path, f"{where} has shape {file.shape_of(source.name)}, not {list(expected.shape)}")
    kind = file.type_of(source.name)
    # by rows, because a vocabulary's embedding is large
    rows = max(1, BLOCK_OF_VALUES // max(1, expected.numel() // len(expected)))
    blocks = (slice(start, start + rows) for start in range(0, len(expected), rows))
    error, right = rounding_error(((file.values(source.name, block), expected[block]) for block in blocks), kind)
    if right is None:
        raise ExportError(f"{where} is of type {kind}, which qpsft cannot check.", "Choose another --outtype.")
    if not right:
        raise _wrong(file.path, f"the values of {where} differ by {error:.1e} of their size, and {kind} explains less")
    return error


def rounding_error(blocks: Iterable[tuple[Tensor, Tensor]], kind: str) -> tuple[float, bool | None]:
    """How far values are from those a type was made of, and whether rounding to the type explains it.

    Args:
        blocks: (found, expected) of one tensor, block by block, both float32 and of one shape; `found` is used up.

    Returns:
        (‖found − expected‖ / ‖expected‖, verdict); the verdict is None for an unknown type.
    """
    wrong, size, within = 0.0, 1e-60, True
    for found, expected in blocks:
        difference = found.sub_(expected).abs_()
        wrong += float(difference.norm()) ** 2
        size += float(expected.norm()) ** 2
        if kind in HALF_STEP:
            allowed = expected.abs().mul_(HALF_STEP[kind]).add_(F16_SMALLEST if kind == "F16" else 0.0)
            within &= bool((difference <= allowed).all())
    error = math.sqrt(wrong / size)
    if kind in HALF_STEP:
        return error, within
    return error, error <= BLOCK_ERROR[kind] if kind in BLOCK_ERROR else None


def _check_metadata(
    file: GgufFile, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, check: GgufCheck
) -> None:
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
        found = file.value(key)
        if value is None or found is None or isinstance(found, list):
            continue
        equal = abs(found - value) <= 1e-6 * abs(value) if isinstance(value, float) else found == value
        if not equal:
            raise _wrong(file.path, f"its {key.replace('{arch}', file.architecture)} is {found!r}, not {value!r}")
        check.metadata.append(key.replace("{arch}", file.architecture))
    _check_tokens(file, tokenizer, check)


def _check_tokens(file: GgufFile, tokenizer: PreTrainedTokenizerBase, check: GgufCheck) -> None:
    """Special tokens must be there and be special: a plain one would be cut into pieces by llama.cpp."""
    tokens = file.value("tokenizer.ggml.tokens") or []
    types = file.value("tokenizer.ggml.token_type") or []
    kinds = file.gguf.TokenType
    whole = {int(kind) for kind in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)}
    for number, token in tokenizer.added_tokens_decoder.items():
        if number >= len(tokens) or tokens[number] != token.content:
            found = repr(tokens[number]) if number < len(tokens) else "missing"
            raise _wrong(file.path, f"its token {number} is {found}, not {token.content!r}")
        if token.special and types and types[number] not in whole:
            raise _wrong(file.path, f"its token {token.content!r} is plain text")
    check.metadata.append("tokenizer.ggml.tokens")
    scores = file.value("tokenizer.ggml.scores") or []
    normal = {score for score, kind in zip(scores, types, strict=False) if kind == int(kinds.NORMAL)}
    check.merge_order_lost = file.value("tokenizer.ggml.model") == "llama" and len(scores) > 256 and len(normal) == 1
    check.adds_bos = _adds_bos(file)


def _adds_bos(file: GgufFile) -> bool:
    """The file's own word, else llama.cpp's default for its kind of tokenizer (llama-vocab.cpp)."""
    said = file.value("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if file.value("tokenizer.ggml.model") == "llama":
        return True
    return file.value("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")


def _note_stops(file: GgufFile, tokenizer: PreTrainedTokenizerBase, stops: set[int], check: GgufCheck) -> None:
    named = {file.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    check.stops_missing = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops - named)]
