"""4-bit models of real shapes with random weights, made on the device without a download.

    python benchmarks/real_shapes.py llama-3.1-8b          build it, and say how long it took and what it holds

The numbers are kept in benchmarks/results/build_DEVICE.json; exit code 3 when it took over two minutes, or more memory
than the finished model and one 16-bit tensor.

transformers' own loader does the work: it builds the model on the meta device, puts bitsandbytes' layers in, and asks
for one tensor after the other. Here each tensor is drawn at random on the device when it is asked for, quantized, and
gone again: the 16-bit model never exists, and what comes out is a loaded 4-bit model in every respect, because it was
loaded. The weights of a shape and a seed are the same every time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpsft.model.base_record import BaseSource, parameter_count, quantized_linears, stored_bytes
from qpsft.model.folder import config_sha256
from qpsft.model.hardware import compute_dtype_for, pick_device

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LONGEST_SECONDS = 120.0
MARGIN = 512 * 2**20  # bytes; what quantizing a tensor takes, and the allocator's blocks
QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""As in these models' config.json; and `tiny`, for tests and for a look at the programs on a CPU."""


def llama_shape(
    hidden_size: int, layers: int, *, vocab_size: int = 2048, heads: int | None = None, **more: Any
) -> dict[str, Any]:
    """A small Llama's shape: SwiGLU of 8/3 of the width, grouped attention with heads of 32."""
    heads = heads or max(2, hidden_size // 32)
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 64 * round(hidden_size * 8 / 3 / 64),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "vocab_size": vocab_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    } | more


SHAPES["tiny"] = llama_shape(64, 1, vocab_size=256)


def config_of(shape: str | dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration of a shape by name, or of its settings."""
    from transformers import AutoConfig

    settings = dict(SHAPES[shape] if isinstance(shape, str) else shape)
    return AutoConfig.for_model(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)


class RandomTensor:
    """A tensor of a checkpoint that is made when the loader slices it, as it slices a safetensors file.

    Matrices are normal with the model's initializer_range, norms are the identity, biases small.
    """

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, std: float, norm: float):
        self.name, self.shape, self.dtype, self.device, self.std, self.norm = name, shape, dtype, device, std, norm

    def __getitem__(self, index: Any) -> Tensor:
        if "norm" in self.name:
            return torch.full(self.shape, self.norm, dtype=self.dtype, device=self.device)[index]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(std=self.std, generator=generator)[index]


def build_model(
    shape: str | dict[str, Any],
    device: torch.device | str = "cuda",
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A frozen causal LM of a shape in NF4 with double quantization, as `qpsft.load_base` returns it.

    Args:
        shape: a name of SHAPES, or a configuration's settings with their `model_type`.
        device: where it is made; "cuda" needs a card.
        dtype: compute dtype, and dtype of everything unquantized; "auto" as in `load_base`.
        attn_implementation: as in transformers.

    Memory while building: the finished model and one 16-bit tensor.
    """
    from transformers import BitsAndBytesConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    device = pick_device(device)
    compute_dtype = compute_dtype_for(device, dtype)
    config = config_of(shape)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        skeleton = model_class(config)
    norm = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma multiplies by 1 + weight
    weights = {
        name: RandomTensor(name, parameter.shape, compute_dtype, device, config.initializer_range, norm)
        for name, parameter in skeleton.named_parameters()  # a tied head is not among them
    }
    kept = (skeleton.get_output_embeddings(), skeleton.get_input_embeddings())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=[name for name, module in skeleton.named_modules() if module in kept],
    )
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=compute_dtype,
        device_map={"": device},
        quantization_config=quantization,
        output_loading_info=True,
        **kwargs,
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    for layer in quantized_linears(model).values():
        layer.support_avx512bf16_for_cpu = False  # or the first forward in eval mode repacks its weight
        layer.compute_type_is_set = True
    model.requires_grad_(False)
    name = shape if isinstance(shape, str) else config.model_type
    model.name_or_path = model.config._name_or_path = f"random-{name}"
    model.qpsft_source = BaseSource(f"random-{name}", None, config_sha256(config.to_dict()), prequantized=False)
    return model


def sharing_base(model: PreTrainedModel) -> PreTrainedModel:
    """Another model on the same weights: modules of its own, so that it takes another adapter, and no new tensor.

    The base is frozen and never written, so any number of trainers can share it: eight trainers of an 8B shape hold
    one base of 5.7 GB and eight adapters.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            shared[id(state)] = state
    return copy.deepcopy(model, shared)


def plain_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of three special tokens; rows come as token ids, but trainers ask it how to pad."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<last>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def random_rows(
    count: int, length: int, vocab_size: int, *, ragged: bool = False, prompt_share: float = 0.0, seed: int = 0
) -> Dataset:
    """`count` rows of random tokens with labels; the time of a step does not depend on which tokens they are.

    Args:
        length: tokens of every row; with `ragged` of the longest, the shortest having a quarter.
        prompt_share: the part of each row, from its start, that is not supervised.
    """
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for _ in range(count):
        size = int(torch.randint(length // 4, length + 1, (1,), generator=generator)) if ragged else length
        ids = torch.randint(3, vocab_size, (size,), generator=generator).tolist()
        prompt = int(size * prompt_share)
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(rows)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor a model holds, quantization constants too."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                tensors += [part.absmax, part.code]
    return tensors


def missed_goals(seconds: float, peak: int, stored: int, largest: int) -> list[str]:
    """What a build took too much of, in words.

    Args:
        seconds: of the build.
        peak: bytes held at most.
        stored: bytes of the finished model.
        largest: bytes of its largest tensor as it is drawn.
    """
    missed = []
    if seconds > LONGEST_SECONDS:
        missed.append(f"built in {seconds:.0f} s, more than {LONGEST_SECONDS:.0f}")
    if peak > stored + largest + MARGIN:
        missed.append(f"held {peak:,} bytes: more than the model's {stored:,} and one tensor of {largest:,}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    from machine import GOAL_MISSED, RESULTS, Results, describe, device_name, environment, memory_meter, slug

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    args = parser.parse_args(arguments)
    gc.collect()
    with memory_meter(args.device) as meter:
        start = time.perf_counter()
        model = build_model(args.shape, args.device)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - start, meter.peak
    quantized = [layer.in_features * layer.out_features for layer in quantized_linears(model).values()]
    largest = model.dtype.itemsize * max([*quantized, *(parameter.numel() for parameter in model.parameters())])
    numbers = {
        "shape": args.shape,
        "parameters": parameter_count(model),
        "seconds": round(seconds, 1),
        "stored_bytes": stored_bytes(model),
        "peak_bytes_while_building": peak,
        "largest_tensor_bytes": largest,
        "missed": missed_goals(seconds, peak, stored_bytes(model), largest),
    }
    found = environment(args.device)
    print(json.dumps(numbers))
    print(describe(found))
    for missed in numbers["missed"]:
        print(f"goal missed: {missed}")
    Results(args.results / f"build_{slug(device_name(args.device))}.json", found).add(args.shape, numbers)
    return GOAL_MISSED if numbers["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
