"""The base model and its tokenizer: loaded once, rounded to 4 bits, frozen, in the dtype that suits the hardware.

What is loaded is always a local folder of safetensors (`qpsft.model.folder` finds and checks it). Linear layers are
quantized by bitsandbytes; the LM head, the embeddings and the norms keep an ordinary dtype. What the folder of an
adapter must know about all this is in `qpsft.model.base_record`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qpsft.errors import BaseModelError, one_line
from qpsft.model.base_record import (
    BaseRecord,
    BaseSource,
    base_record,
    check_read_back,
    parameter_count,
    quantized_linears,
    read_base_record,
    source_of,
    stored_bytes,
    write_base_record,
)
from qpsft.model.block_maxima import rounding_of
from qpsft.model.fingerprint import check_finite
from qpsft.model.folder import DEMO, check_folder, resolve_folder
from qpsft.model.hardware import (
    base_dtype,
    check_run,
    compute_dtype_for,
    default_stream,
    hardware_of,
    pick_device,
    pick_dtype,
    warn_if_slow,
)
from qpsft.model.remote_code import code_is_off, code_refused, names_code
from qpsft.model.skeleton import build_skeleton, load_config
from qpsft.terminal import short_number, wrap

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BaseRecord",
    "base_record",
    "compute_dtype_for",
    "describe",
    "load_base",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "read_base_record",
    "write_base_record",
]

QUANTIZATIONS = ("nf4", "fp4", "none")
TOKENIZER_CONFIG = "tokenizer_config.json"

# Tokens that models reserve for padding or that do not occur in their texts, best first.
PAD_TOKENS = (
    "<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|PAD_TOKEN|>", "<pad_id>",
    "<unk>", "[UNK]",
)  # fmt: skip


def load_base(
    name_or_path: str | os.PathLike,
    *,
    quantization: str = "nf4",
    double_quant: bool = True,
    dtype: str = "auto",
    device: torch.device | str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantized_on: str | None = None,
    source: BaseSource | None = None,
    verbose: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM, quantized and frozen, and its tokenizer with a pad token.

    Args:
        name_or_path: `demo` (the embedded base), a folder, or a Hub id. Only a Hub id may use the network.
        quantization: storage of the linear layers: "nf4", "fp4" or "none". The LM head and the embeddings are never
            quantized. A folder that bitsandbytes has already quantized keeps its own settings.
        double_quant: quantize the quantization constants of nf4 and fp4 too.
        dtype: compute dtype, and dtype of everything unquantized; "auto" fits the device and the model.
        device: "auto", or a torch device. The whole model goes to this one device.
        revision: branch, tag or commit of a Hub id.
        attn_implementation: as in transformers.
        trust_remote_code: run Python code that comes with the model.
        quantized_on: round block maxima as this type of torch device does, "cpu" or "cuda", as an adapter's record
            names it; None: as `device` does (`qpsft.model.block_maxima`).
        source: what `qpsft.model.base_record.source_of` said of this base, which reads its weights; None asks it.
        verbose: print what was loaded.

    Returns:
        (model in eval mode with no parameter requiring gradients, tokenizer). A quantized Linear of shape (out, in)
        holds out·in/2 bytes of uint8. The forward of a `Linear4bit` never repacks its weight, so eval and training mode
        compute the same numbers.

    Raises:
        BaseModelError: no such model; its folder is incomplete, truncated, pickle only, not a causal LM, or stored
            quantized in another format than bitsandbytes' 4 bits; a weight is NaN or infinite; its tokenizer has ids
            the embedding lacks; the hardware cannot do what is asked, or a layer's width on it.
    """
    from qpsft.model.attention import repeat_keys_where_no_kernel_groups

    repeat_keys_where_no_kernel_groups()
    if quantization not in QUANTIZATIONS:
        raise BaseModelError(f"quantization {quantization!r} is not known.", f"Use {', '.join(QUANTIZATIONS)}.")
    device = pick_device(device)
    folder = resolve_folder(name_or_path, revision=revision, remote_code=trust_remote_code)
    config_dict = check_folder(folder, trust_remote_code=trust_remote_code)
    hardware = hardware_of(device)
    compute_dtype = base_dtype(hardware, dtype, config_dict)
    warn_if_slow(hardware, dtype, config_dict)
    prequantized = config_dict.get("quantization_config") is not None
    if quantization != "none" or prequantized:
        _require_bitsandbytes(device)
    check_run(hardware, attention=attn_implementation, dtype=compute_dtype)

    config = load_config(folder, trust_remote_code)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if quantization != "none" and not prequantized:
        skip = modules_to_skip(build_skeleton(folder, trust_remote_code=trust_remote_code))
        kwargs["quantization_config"] = bitsandbytes_config(quantization, double_quant, compute_dtype, skip)
    with default_stream(device), rounding_of(quantized_on or device.type, device.type):
        model = _load_model(folder, config, compute_dtype, device, trust_remote_code, kwargs)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)

    _keep_one_kernel(model, compute_dtype)
    if device.type == "cpu":
        check_read_back(model)
    _check_unquantized(model, folder)
    check_finite(folder)
    set_pad_token(model, tokenizer)
    model.requires_grad_(False)

    name = _public_name(name_or_path, folder)
    # PEFT writes this name into adapter_config.json: a Hub id there works on any machine, a cache path does not.
    if name != DEMO:
        model.name_or_path = model.config._name_or_path = name
    source = source or source_of(folder, name)
    # A commit says more than a branch's name.
    model.qpsft_source = replace(source, revision=source.revision or revision, quantized_on=quantized_on or device.type)
    if verbose:
        print(wrap(describe(model, device, compute_dtype), "      "), flush=True)
    return model, tokenizer


def load_tokenizer(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a pad token, without loading the model.

    A missing pad token becomes a reserved token of the vocabulary (`PAD_TOKENS`), else the end-of-sequence token: the
    vocabulary never grows, so the embeddings keep their size. Padding is masked by position, so pad = eos is safe.

    Raises:
        BaseModelError: no such model, no tokenizer in it, or neither a pad nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder = resolve_folder(name_or_path, revision=revision, weights=False, remote_code=trust_remote_code)
    try:
        with code_is_off():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        tokenizer("a")  # settings of a wrong type, such as a model_max_length that is a text, show only now
    except Exception as error:  # broken files make it fail in many ways
        if not trust_remote_code and names_code(folder / TOKENIZER_CONFIG):
            raise code_refused(folder / TOKENIZER_CONFIG) from error
        raise BaseModelError(
            f"The tokenizer in {folder} cannot be loaded: {one_line(error)}",
            "Copy or download tokenizer.json and tokenizer_config.json (or tokenizer.model) of this model again.",
        ) from error
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        reserved = next((token for token in PAD_TOKENS if token in vocabulary), None)
        if reserved is None and tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"The tokenizer in {folder} has neither a pad nor an end-of-sequence token.",
                "Set eos_token in its tokenizer_config.json to the token that ends a text.",
            )
        tokenizer.pad_token = reserved or tokenizer.eos_token
    return tokenizer


def describe(model: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype) -> str:
    """One line: name, parameters, storage, compute dtype and device, bytes held."""
    linears = quantized_linears(model)
    storage = "not quantized"
    if linears:
        weight = next(iter(linears.values())).weight
        storage = weight.quant_type + (" + double quantization" if weight.compress_statistics else "")
    parts = [
        f"base: {Path(model.qpsft_source.name).name}",
        f"{short_number(parameter_count(model))} parameters",
        storage,
        f"{str(compute_dtype).removeprefix('torch.')} compute on {device}",
        f"{short_number(stored_bytes(model))}B",
    ]
    return " · ".join(parts)


def _require_bitsandbytes(device: torch.device) -> None:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BaseModelError("Quantization needs bitsandbytes.", "pip install bitsandbytes") from error
    if device.type not in bitsandbytes.supported_torch_devices:
        raise BaseModelError(
            f"bitsandbytes {bitsandbytes.__version__} does not work on {device.type}.", "Use quantization none."
        )


def modules_to_skip(model: PreTrainedModel) -> list[str]:
    """Names of the LM head and the input embeddings: what bitsandbytes must not quantize."""
    kept = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    return [name for name, module in model.named_modules() if id(module) in kept]


def bitsandbytes_config(
    quantization: str, double_quant: bool, compute_dtype: torch.dtype, skip: list[str]
) -> BitsAndBytesConfig:
    """transformers' settings for rounding linear layers to "nf4" or "fp4"."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype(compute_dtype),
        llm_int8_skip_modules=skip,  # the option of 4 bits too, in spite of its name
    )


def _load_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    kwargs: dict,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with code_is_off():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # raised below, by name
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
    except torch.OutOfMemoryError as error:
        raise BaseModelError(
            f"{folder} does not fit on {device}: {one_line(error)}", "Use nf4, a smaller model, or free the card."
        ) from error
    except Exception as error:
        raise BaseModelError(
            f"{folder} cannot be loaded: {one_line(error)}",
            "Check that config.json belongs to these weights, and that transformers is new enough for the model.",
        ) from error
    broken = sorted(info["missing_keys"]) + sorted(key[0] for key in info["mismatched_keys"])
    broken += [name for name, module in quantized_linears(model).items() if not _has_its_shape(module)]
    if broken:
        raise BaseModelError(
            f"The weights in {folder} are not those of a {type(model).__name__}: {len(broken)} tensors are missing "
            f"or have another shape, such as {broken[0]}.",
            "Get config.json and weights from one source; in place of a classifier or a bare encoder, use the causal "
            "LM it was made from.",
        )
    return model


def _has_its_shape(module: nn.Module) -> bool:
    # transformers compares the shapes of ordinary weights only.
    state = getattr(module.weight, "quant_state", None)
    shape = module.weight.shape if state is None else state.shape
    return tuple(shape) == (module.out_features, module.in_features)


def _keep_one_kernel(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """One kernel in one dtype for training and evaluation, so that a ratio of the two measures the policy only.

    On CPUs with AVX512-BF16 the first eval forward of a Linear4bit would repack its weight in place for a bfloat16
    kernel, and log-probabilities would differ from training's by up to 0.1 nats. A folder quantized on disk brings its
    own compute dtype along, which may not suit this hardware.
    """
    for module in quantized_linears(model).values():
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = compute_dtype
        module.compute_type_is_set = True


def _check_unquantized(model: PreTrainedModel, folder: Path) -> None:
    quantized = quantized_linears(model)
    if not quantized:
        return
    head = model.get_output_embeddings()
    if any(module is head for module in quantized.values()):
        raise BaseModelError(
            f"The LM head in {folder} is quantized on disk; training reads its weight directly.",
            "Use the 16-bit model it was made from, or one quantized without its LM head.",
        )
    ordinary = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[0] not in quantized and not _is_embedding(model, name)
    )
    share = ordinary / parameter_count(model)
    if share > 0.05:
        warnings.warn(
            f"{share:.0%} of this model's weights are not in linear layers that bitsandbytes can quantize (experts of "
            f"a mixture, for instance) and stay in {model.dtype}.",
            stacklevel=3,
        )


def _is_embedding(model: PreTrainedModel, parameter_name: str) -> bool:
    module = model.get_submodule(parameter_name.rpartition(".")[0])
    return isinstance(module, nn.Embedding) or module is model.get_output_embeddings()


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model the tokenizer's pad token. Raises BaseModelError when the two do not fit."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise BaseModelError(
            f"The tokenizer in {tokenizer.name_or_path} goes up to id {largest} ({token!r}), and the embedding matrix "
            f"has {rows} rows.",
            "They belong to different models; use the tokenizer that came with the weights.",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _public_name(name_or_path: str | os.PathLike, folder: Path) -> str:
    """What to call the base in records: `demo`, the Hub id, or the folder's absolute path."""
    name = os.fspath(name_or_path)
    if name == DEMO:
        return DEMO
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else name


def fsdp_is_on() -> bool:
    """Whether `accelerate launch` started this process for FSDP. transformers' own check asks the environment too."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def storage_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype that 4-bit weights are stored as: uint8, or with FSDP the dtype of the base's other weights."""
    return compute_dtype if fsdp_is_on() else torch.uint8
