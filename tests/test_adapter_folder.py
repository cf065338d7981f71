"""An adapter whose file does not hold exactly the tensors that its config calls for is an error in every verb."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging import ALL, save_peft_adapter, vouch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save_tiny_model

from qpsft import cli
from qpsft.errors import BaseModelError
from qpsft.merge import merge_adapter
from qpsft.model.adapter_folder import AdapterFolder

DEMO = Path(__file__).resolve().parents[1] / "adapters" / "demo-psft"
PREFIX = "base_model.model."
FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
"""By name, the first of the file's tensors."""
COUNT = 42


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A right merge of the demo adapter."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(DEMO, folder, no_verify=True)
    return folder


def train(adapter, out, exported):
    flags = ["--model_name_or_path=demo", "--dataset_name=demo-clean", "--dataset_limit=8", "--max_steps=1"]
    flags += ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1"]  # stated: nothing is planned
    return ["train", *flags, f"--adapter_name_or_path={adapter}", f"--output_dir={out}"]


VERBS = {
    "chat": lambda adapter, out, exported: ["chat", adapter],
    "evaluate": lambda adapter, out, exported: ["evaluate", adapter, "--json", f"{out}.json"],
    "verify": lambda adapter, out, exported: ["verify", adapter, exported],
    "merge": lambda adapter, out, exported: ["merge", adapter, "-o", out],
    "gguf": lambda adapter, out, exported: ["export", adapter, "--to", "gguf", "-o", f"{out}.gguf"],
    "gguf-lora": lambda adapter, out, exported: ["export", adapter, "--to", "gguf-lora", "-o", f"{out}.gguf"],
    "ollama": lambda adapter, out, exported: ["export", adapter, "--to", "ollama", "-o", out],
    "vllm": lambda adapter, out, exported: ["export", adapter, "--to", "vllm", "-o", out],
    "train": train,
}


def every_layer(wrapper):
    """What FSDP makes of a name: the wrapper stands before each block, and before the whole."""
    return lambda key: wrapper + key.replace(".mlp.", f".{wrapper}mlp.").replace(".self_attn.", f".{wrapper}self_attn.")


RENAMED = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "FSDP": every_layer("_fsdp_wrapped_module."),
    "part of a larger model": lambda key: key.replace(PREFIX, f"{PREFIX}language_model."),
    "without PEFT's prefix": lambda key: key.removeprefix(PREFIX),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}
LATER = f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight"


def extra(tensors):
    tensors[LATER] = tensors[FIRST].clone()


def missing(tensors):
    del tensors[FIRST]


def shorter(tensors):
    tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()


CHANGED = {
    "missing": (missing, [f"lacks {FIRST}", f"1 of {COUNT} tensors are missing"]),
    "extra": (extra, [f"holds {LATER}", f"1 of its {COUNT + 1} tensors are unknown"]),
    "wrong shape": (shorter, [f"{FIRST} in", "it would have (8, 256)", f"1 of {COUNT} tensors have other shapes"]),
}


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def break_header(file):
    file.write_bytes(b"12345678{]" + file.read_bytes()[10:])


DAMAGED = {"cut in half": cut_in_half, "broken header": break_header}


def spoilt(folder: Path, kind: str) -> list[str]:
    """Spoils the adapter's file; returns what the error must say."""
    file = folder / "adapter_model.safetensors"
    if kind in DAMAGED:
        DAMAGED[kind](file)
        return [f"{file} is truncated or not a safetensors file"]
    tensors = load_file(file)
    assert len(tensors) == COUNT and min(tensors) == FIRST
    if kind in RENAMED:
        tensors = {RENAMED[kind](key): tensor for key, tensor in tensors.items()}
        words = [f"it holds {RENAMED[kind](FIRST)} in place of {FIRST}.", f"{COUNT} of {COUNT} tensors are missing"]
    else:
        change, words = CHANGED[kind]
        change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return [str(file), *words]


@pytest.fixture
def adapter(tmp_path):
    return Path(shutil.copytree(DEMO, tmp_path / "adapter"))


def run(monkeypatch, capsys, arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 2?\n"))
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("kind", [*RENAMED, *CHANGED, *DAMAGED])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses(monkeypatch, capsys, tmp_path, adapter, exported, verb, kind):
    words = spoilt(adapter, kind)
    code, text = run(monkeypatch, capsys, VERBS[verb](adapter, tmp_path / "out", exported))
    assert code == 2 and "error: " in text and "Traceback" not in text
    assert all(word in text for word in words), text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "something was written"


QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj."
HEAD, EMBEDDING = f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens."
TIED = {"tie_word_embeddings": True}


def kind(lost: str, model: str = "llama", base: dict | None = None, **config) -> tuple:
    """An adapter, and the tensor whose loss must be noticed."""
    return lost, model, base or {}, config


KINDS = {
    "plain": kind(f"{QUERY}lora_B.weight"),
    "rsLoRA, ranks of its own": kind(f"{QUERY}lora_A.weight", use_rslora=True, rank_pattern={"q_proj": 2}),
    "DoRA": kind(f"{QUERY}lora_magnitude_vector", use_dora=True),
    "head and embedding in full": kind(HEAD, modules_to_save=["embed_tokens", "lm_head"]),
    "tied in full": kind(
        f"{EMBEDDING}weight", base=TIED, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "norms in full": kind(f"{PREFIX}model.norm.weight", modules_to_save=["model.norm"]),
    "embedding adapted": kind(f"{EMBEDDING}lora_embedding_A", target_modules=[*ALL, "embed_tokens"]),
    "token rows": kind(f"{EMBEDDING}token_adapter.trainable_tokens_delta", trainable_token_indices=[3, 5]),
    "token rows, tied": kind(
        f"{EMBEDDING}token_adapter.trainable_tokens_delta", base=TIED, trainable_token_indices=[3, 5]
    ),
    "biases": kind(f"{QUERY}base_layer.bias", "qwen2", bias="all", load={"quantization": "none"}),
    "one layer": kind(f"{QUERY}lora_A.weight", layers_to_transform=[0]),
    "attention of a mixture": kind(
        f"{QUERY}lora_A.weight",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        target_modules=["q_proj"],
    ),
    "experts": kind(
        f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        load={"quantization": "none"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_of_every_kind_is_what_is_called_for(tmp_path, kind):
    lost, model, config, settings = KINDS[kind]
    base = save_tiny_model(tmp_path / "base", model, **config)
    folder = save_peft_adapter(tmp_path / "adapter", base, **settings)
    assert AdapterFolder(folder).base_folder() == base
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match=re.escape(f"lacks {lost}")):
        AdapterFolder(folder).base_folder()


@pytest.mark.parametrize("name", ["embed_tokens.weight", "embed_tokens.base_layer.weight"])
def test_an_embedding_saved_with_the_adapter(tmp_path, name):
    """PEFT saves the base's embedding with an adapter on it, or after its vocabulary was resized."""
    base = save_tiny_model(tmp_path / "base")
    targets = [*ALL, "embed_tokens"] if "base_layer" in name else ALL
    folder = save_peft_adapter(tmp_path / "adapter", base, target_modules=targets)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {f"{PREFIX}model.{name}": torch.zeros(200, 64)}
    save_file(tensors, file)
    vouch(folder)
    AdapterFolder(folder).base_folder()
    save_file(tensors | {f"{PREFIX}model.{name}": torch.zeros(203, 64)}, file)
    with pytest.raises(BaseModelError, match=r"has shape \(203, 64\); on .* would have \(200, 64\)"):
        AdapterFolder(folder).base_folder()


def test_a_whole_weight_under_an_adapted_layer_is_unknown(tmp_path):
    """PEFT would not load it, so merging must not either."""
    base = save_tiny_model(tmp_path / "base")
    folder = save_peft_adapter(tmp_path / "adapter", base)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"{QUERY}weight": torch.zeros(64, 64)}, file)
    with pytest.raises(BaseModelError, match=f"holds {QUERY}weight, which adapter_config.json does not call for"):
        AdapterFolder(folder).base_folder()


@pytest.mark.parametrize("kind", ["torch.compile", "DDP", "FSDP", "part of a larger model"])
def test_names_on_a_base_whose_names_transformers_converts(tmp_path, kind):
    """PEFT converts names of an older transformers on a mixture of experts; the error shows the file's own."""
    base = save_tiny_model(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    folder = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = {RENAMED[kind](name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match="has other names than adapter_config.json calls for") as error:
        AdapterFolder(folder).base_folder()
    assert f"it holds {RENAMED[kind](f'{QUERY}lora_A.weight')} in place of {QUERY}lora_A.weight." in error.value.what


def test_the_record_says_which_base(tmp_path):
    """One question for all verbs: another configuration, and one rounded on disk, are refused by name."""
    base, other = save_tiny_model(tmp_path / "base"), save_tiny_model(tmp_path / "other", rms_norm_eps=0.5)
    adapter = AdapterFolder(save_peft_adapter(tmp_path / "adapter", base))
    with pytest.raises(BaseModelError, match=f"trained on {base} .* and {other} is another model"):
        adapter.base_folder(other)
    edit_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(BaseModelError, match="trained on a base that was not quantized on disk, and .* is quantized"):
        adapter.base_folder()
    adapter.base_folder(same_rounding=False)
    base.rename(tmp_path / "moved")
    with pytest.raises(BaseModelError, match="that the adapter in .*adapter was trained on cannot be had") as error:
        adapter.base_folder()
    assert "--base" in error.value.todo


def test_without_a_record_the_config_names_the_base(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    folder = save_peft_adapter(tmp_path / "adapter", base)
    (folder / "base_quantization.json").unlink()
    adapter = AdapterFolder(folder)
    assert adapter.base_folder() == base and not adapter.has_record
    with pytest.raises(BaseModelError, match="has no base_quantization.json"):
        adapter.record  # noqa: B018
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(BaseModelError, match="does not name its base"):
        AdapterFolder(folder).base_folder()


def test_what_is_no_adapter(tmp_path):
    for path, words, todo in [
        (tmp_path / "nowhere", "does not exist, so it is not an adapter's folder", ""),
        (DEMO / "recipe.yaml", "is a file", "Give the folder"),
        (save_tiny_model(tmp_path / "base"), "has no adapter_config.json", "It is a whole model"),
        (DEMO.parent, "has no adapter_config.json", f"Did you mean {DEMO}?"),
    ]:
        with pytest.raises(BaseModelError, match=words) as error:
            AdapterFolder(path)
        assert todo in error.value.todo


@pytest.mark.parametrize("content", ['{"peft_type": "LO', "[]", "{}", '{"peft_type": "NOTHING"}', '{"peft_type": 3}'])
def test_a_config_that_cannot_be_read(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(BaseModelError, match="adapter_config.json"):
        AdapterFolder(adapter).config  # noqa: B018
