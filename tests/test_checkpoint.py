"""Base model folders: every bad one is one sentence before anything is loaded; only a Hub id uses the network."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, load, refusal, save_tiny_model

from qpsft.model.base import base_record, load_tokenizer

IDS = torch.tensor([[1, 5, 9, 17, 33, 65, 129, 7]])


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_llama(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "my-model"))


def test_missing_folder_names_the_nearest(own_llama):
    message = refusal(own_llama.parent / "my-modle")
    assert f"no base model folder {own_llama.parent / 'my-modle'}" in message
    assert f"Did you mean {own_llama}?" in message


def test_missing_folder_far_from_any(tmp_path):
    assert "does not exist either" in refusal(tmp_path / "a" / "b")


def test_a_file_is_not_a_model(own_llama):
    assert f"Give the folder, {own_llama}" in refusal(own_llama / "model.safetensors")
    (own_llama / "x.gguf").write_bytes(b"GGUF")
    assert "export to GGUF after" in refusal(own_llama / "x.gguf")


def test_truncated_weights(own_llama):
    path = own_llama / "model.safetensors"
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100, 4, 0):
        path.write_bytes(data[:length])
        message = refusal(own_llama)
        assert str(path) in message and "truncated" in message and f"{length:,} bytes" in message


def test_truncated_header_length(own_llama):
    path = own_llama / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    assert "truncated or not a safetensors file" in refusal(own_llama)


def sharded(llama, folder, pieces=3):
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(pieces):
        shard = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::pieces]}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::pieces], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_sharded_weights_load_as_one_file_does(llama, tmp_path):
    one, _ = load(llama)
    several, _ = load(sharded(llama, tmp_path))
    with torch.no_grad():
        assert torch.equal(one(input_ids=IDS).logits, several(input_ids=IDS).logits)


def test_bad_shards(llama, tmp_path):
    folder = sharded(llama, tmp_path)
    second = folder / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-10])
    assert str(second) in refusal(folder)
    second.unlink()
    assert "lacks 1 of 3 weight files its index names: model-00002-of-00003.safetensors" in refusal(folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", second)
    assert "which does not hold it" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(own_llama, name):
    class Bomb:
        def __reduce__(self):
            return (Path(own_llama / "exploded").write_text, ("",))

    (own_llama / "model.safetensors").unlink()
    torch.save(Bomb(), own_llama / name)
    message = refusal(own_llama)
    assert name in message and "pickle" in message and "save_pretrained" in message
    assert not (own_llama / "exploded").exists()


def test_no_weights_at_all(own_llama):
    (own_llama / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(own_llama)
    (own_llama / "m.gguf").write_bytes(b"GGUF")
    assert "only GGUF" in refusal(own_llama)


def test_git_lfs_pointer(own_llama):
    (own_llama / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refusal(own_llama)


def test_missing_tensor(own_llama):
    tensors = load_file(own_llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, own_llama / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(own_llama)


def test_tensor_of_another_shape(own_llama):
    edit_config(own_llama, intermediate_size=96)
    for quantization in ("nf4", "none"):
        message = refusal(own_llama, quantization=quantization)
        assert "6 tensors are missing or have another shape" in message


def test_config_missing_broken_or_not_an_object(own_llama):
    path = own_llama / "config.json"
    path.write_text('{"model_type": "llama"')
    assert f"{path} is not valid JSON" in refusal(own_llama)
    path.write_text("[]")
    assert "not a JSON object" in refusal(own_llama)
    path.unlink()
    assert "has no config.json" in refusal(own_llama)
    (own_llama / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter" in refusal(own_llama)


def test_config_value_transformers_cannot_use(own_llama):
    edit_config(own_llama, hidden_size="large")
    message = refusal(own_llama)
    assert "config.json" in message and "'hidden_size' expected int" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "lama"}, "Did you mean llama?"),
        ({"model_type": None}, "does not know"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized in int8"),
        ({"quantization_config": "fp8"}, "of the wrong type"),
    ],
)
def test_models_of_another_kind(own_llama, changes, said):
    edit_config(own_llama, **changes)
    assert said in refusal(own_llama)


def test_code_of_the_model_needs_consent(own_llama):
    edit_config(
        own_llama, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine", "AutoConfig": "mine.Config"}
    )
    (own_llama / "mine.py").write_text(f"open({str(own_llama / 'ran')!r}, 'w')")
    assert "trust_remote_code" in refusal(own_llama)
    assert not (own_llama / "ran").exists()


@pytest.mark.parametrize("quantization", ["nf3", "int8"])
def test_unknown_quantization(llama, quantization):
    assert f"{quantization!r} is not known. Use nf4, fp4, none" in refusal(llama, quantization=quantization)


# --- network ---


@pytest.fixture
def no_network(monkeypatch):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


def test_a_folder_never_uses_the_network(llama, no_network, monkeypatch):
    load(llama)
    monkeypatch.chdir(llama.parent)
    load(llama.name)  # a bare name that is also a folder here
    assert no_network == []


@pytest.mark.parametrize("name", ["./absent", "~/absent-model", "a/b/c", "/absent", "..", "  "])
def test_path_shapes_never_use_the_network(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(name)
    assert no_network == []


def test_hub_id_without_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("owner/model")
    assert "no folder owner/model" in message and "hf download owner/model" in message
    assert no_network  # a Hub id is what the network is for


def test_hub_id_when_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in refusal("owner/model", revision="v2")
    assert "cannot be a Hub id" in refusal("owner/-model--")


def hub_error(kind, status=404):
    import huggingface_hub.errors as errors
    from httpx2 import Request, Response

    return getattr(errors, kind)("said the Hub", response=Response(status, request=Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: hub_error("GatedRepoError", 403), "hf auth login"),
        (lambda: hub_error("RepositoryNotFoundError"), "Check the spelling"),
        (lambda: hub_error("RevisionNotFoundError"), "no revision main2"),
        (lambda: OSError("No space left on device"), "No space left"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, error, said):
    def snapshot_download(name, **kwargs):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert said in refusal("owner/model", revision="main2")


def test_hub_id_is_downloaded_as_safetensors_and_recorded_by_id_and_commit(llama, tmp_path, monkeypatch):
    asked = {}
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "0123abc"
    shutil.copytree(llama, snapshot)

    def snapshot_download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model, _ = load("owner/model", revision="main")
    assert (asked["name"], asked["revision"]) == ("owner/model", "main")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])
    settings = base_record(model)
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/model", "0123abc")
    assert model.name_or_path == "owner/model"
    load_tokenizer("owner/model")
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])
