"""Base models: what is quantized and how exactly, what the record says, and every bad folder's one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import VOCABULARY, load, refusal, save_tiny_model, save_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qpsft.errors import BaseModelError, OutputError
from qpsft.model import hardware
from qpsft.model.adapter import add_adapter
from qpsft.model.base import (
    base_record,
    compute_dtype_for,
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_base_record,
    write_base_record,
)
from qpsft.model.base_record import parameter_count, stored_bytes
from qpsft.model.folder import config_sha256, resolve_folder
from qpsft.recipe.arguments import LoraArguments

IDS = torch.tensor([[1, 5, 9, 17, 33, 65, 129, 7], [1, 3, 4, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_llama(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "my-model"))


def logprobs(model):
    return model(input_ids=IDS).logits.float().log_softmax(-1)


# --- dtype and device ---


@pytest.mark.parametrize(
    ("device_type", "capability", "dtype"),
    [
        ("cuda", (9, 0), torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("cuda", (7, 0), torch.float16),
        ("cuda", (6, 1), torch.float32),
        ("cuda", (6, 0), torch.float16),
        ("cuda", (12, 0), torch.bfloat16),
        ("cuda", "gfx90a:sramecc+:xnack-", torch.bfloat16),
        ("cuda", "gfx1100", torch.bfloat16),
        ("cuda", "gfx906", torch.float16),
        ("cuda", "gfx1030", torch.float16),
        ("xpu", None, torch.bfloat16),
        ("mps", None, torch.float32),
        ("cpu", None, torch.float32),
    ],
)
def test_dtype_of_each_kind_of_hardware(device_type, capability, dtype):
    assert pick_dtype(device_type, capability) == dtype


def test_cuda_dtype_needs_a_capability():
    with pytest.raises(ValueError, match="capability"):
        pick_dtype("cuda")


def test_compute_dtype_asks_the_card(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (7, 5))
    assert compute_dtype_for("cuda:1") == torch.float16
    assert asked == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.version, "hip", "6.2")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert compute_dtype_for("cuda:0") == torch.bfloat16


def test_requested_dtype_wins():
    assert compute_dtype_for("cpu", "bfloat16") == torch.bfloat16
    with pytest.raises(BaseModelError, match="'half' is not known"):
        compute_dtype_for("cpu", "half")


def test_device_follows_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(BaseModelError, match=r"5 processes were started on a machine with 4 GPU\(s\). Start 4"):
        pick_device()
    monkeypatch.delenv("LOCAL_RANK")
    assert pick_device() == torch.device("cuda", 0)


def test_missing_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BaseModelError, match="cuda:4"):
        pick_device("cuda:4")
    with pytest.raises(BaseModelError, match="no device 'gpu'"):
        pick_device("gpu")
    assert hardware.pick_device("cpu") == torch.device("cpu")


# --- what is loaded ---


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_but_the_head_is_quantized(tmp_path, model_type, tied):
    model, _ = load(save_tiny_model(tmp_path, model_type, tie_word_embeddings=tied))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ordinary = [module for module in model.modules() if type(module) is nn.Linear]
    assert ordinary == [head]
    assert isinstance(embedding, nn.Embedding)
    assert head.weight.dtype == embedding.weight.dtype == torch.float32
    assert (head.weight is embedding.weight) == tied
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 2 * (4 if model_type == "gpt2" else 7)
    assert all(module.weight.dtype == torch.uint8 for module in quantized)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.isfinite(logprobs(model)).all()


def requantized(tensor, record):
    """A checkpoint's tensor, rounded as the record says."""
    return bnb.quantize_4bit(
        tensor.to(getattr(torch, record.weights_dtype)),
        blocksize=record.block_size,
        compress_statistics=record.double_quant,
        quant_type=record.quantization,
        quant_storage=getattr(torch, record.quant_storage),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_record_reproduces_the_loaded_weights_bit_for_bit(own_llama, quantization, double_quant, dtype):
    model, _ = load(own_llama, quantization=quantization, double_quant=double_quant, dtype=dtype)
    write_base_record(model, own_llama / "adapter")
    record = read_base_record(own_llama / "adapter")
    checkpoint = load_file(own_llama / "model.safetensors")
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            packed, state = requantized(checkpoint[f"{name}.weight"], record)
            assert torch.equal(packed, module.weight.data)
            assert torch.equal(
                bnb.dequantize_4bit(packed, state), bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            )
            assert module.compute_dtype == getattr(torch, record.compute_dtype)
            compared += 1
    assert compared == 14
    assert (record.quantization, record.double_quant, record.compute_dtype) == (quantization, double_quant, dtype)


def test_record_reproduces_a_pretrained_model(stories):
    model, tokenizer = load(stories)
    settings = base_record(model)
    with safe_open(stories / "model.safetensors", framework="pt") as file:
        tensor = file.get_tensor("model.layers.3.mlp.down_proj.weight")
    packed, _ = bnb.quantize_4bit(tensor, blocksize=settings["block_size"], compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed, model.model.layers[3].mlp.down_proj.weight.data)
    assert settings["unquantized_modules"] == ["lm_head"]
    assert settings["base_model_name_or_path"] == str(stories.resolve())
    assert tokenizer.pad_token == "<unk>"


def test_quantization_none_keeps_the_checkpoint(own_llama):
    model, _ = load(own_llama, quantization="none")
    checkpoint = load_file(own_llama / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint[name])
    settings = base_record(model)
    assert settings["quantization"] == "none" and settings["block_size"] is None
    assert "model.layers.0.mlp.up_proj" in settings["unquantized_modules"]


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("with_avx512_bf16", [False, True])
def test_eval_forward_is_the_training_forward(llama, monkeypatch, quantization, with_avx512_bf16):
    # bitsandbytes asks the CPU when it makes a layer; a CPU that has the instructions gets the kernel that repacks.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: with_avx512_bf16)
    model, _ = load(llama, quantization=quantization)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    trained = logprobs(model).detach()
    model.eval()
    with torch.no_grad():
        evaluated = logprobs(model)
        assert torch.equal(logprobs(model), evaluated)
    assert torch.equal(evaluated, trained)
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_a_base_in_int8_has_no_record(llama):
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=int8)
    with pytest.raises(BaseModelError, match="q_proj.weight is in int8.* Load the base with qpsft.load_base"):
        base_record(model)


def test_a_record_that_says_int8_is_refused(llama, tmp_path):
    path = write_base_record(load(llama)[0], tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": "int8"}))
    with pytest.raises(BaseModelError, match="says that the base was in int8.* Load the adapter with PEFT") as error:
        read_base_record(tmp_path)
    assert str(path) in error.value.what and "quantization: nf4" in error.value.todo


def test_bfloat16_compute_on_request(llama):
    model, _ = load(llama, dtype="bfloat16")
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert base_record(model)["compute_dtype"] == "bfloat16"


def test_weights_quantized_on_disk_keep_their_settings(llama, tmp_path):
    first, tokenizer = load(llama, quantization="fp4", double_quant=False, dtype="bfloat16")
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, quantization="nf4")
    settings = base_record(model)
    assert (settings["quantization"], settings["double_quant"], settings["prequantized"]) == ("fp4", False, True)
    assert settings["compute_dtype"] == "float32" and settings["weights_dtype"] == "bfloat16"
    name = "model.layers.1.mlp.gate_proj"
    assert torch.equal(model.get_submodule(name).weight.data, first.get_submodule(name).weight.data)


def test_experts_that_cannot_be_quantized_are_warned_about(tmp_path):
    save_tiny_model(tmp_path, "mixtral", num_local_experts=4)
    with pytest.warns(UserWarning, match="experts of a mixture"):
        load(tmp_path)


def test_a_sentence_of_eighty_columns_says_what_was_loaded(llama, capsys):
    load_base(llama, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(line.strip() for line in lines)
    assert f"base: {llama.name} · 99.6k parameters · nf4 + double quantization · float32 compute on cpu · " in said
    assert len(lines) == 2 and max(map(len, lines)) <= 80 and lines[1].startswith("      ")
    load(llama)
    assert capsys.readouterr().out == ""


def test_counts_and_bytes(llama):
    plain, _ = load(llama, quantization="none")
    model, _ = load(llama)
    assert parameter_count(model) == parameter_count(plain) == sum(p.numel() for p in plain.parameters())
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear4bit))
    assert stored_bytes(plain) > stored_bytes(model) > packed


def test_counts_and_bytes_are_the_base_s_own_with_an_adapter_on_it_too(llama):
    model, _ = load(llama)
    alone = parameter_count(model), stored_bytes(model)
    add_adapter(model, LoraArguments(lora_r=4, lora_modules_to_save=["lm_head"], use_dora=True))
    assert sum(tensor.nbytes for tensor in model.parameters()) > alone[1]
    assert (parameter_count(model), stored_bytes(model)) == alone


def test_demo_is_the_embedded_base():
    from qpsft.model.folder import MODEL_DIR

    assert resolve_folder("demo") == Path(MODEL_DIR)
    model, tokenizer = load("demo")
    assert base_record(model)["base_model_name_or_path"] == "demo"
    # PEFT writes this name into the adapter, where only a path can be loaded.
    assert Path(model.name_or_path).is_dir()
    assert tokenizer.pad_token_id is not None


# --- pad token and tokenizer ---


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        (("<s>", "</s>"), "</s>"),
        (("<s>", "</s>", "<unk>"), "<unk>"),
        (("<s>", "</s>", "<unk>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        (("[PAD]", "</s>"), "[PAD]"),
    ],
)
def test_pad_token_is_found_without_growing_the_vocabulary(tmp_path, special, pad):
    save_tiny_model(tmp_path, special=special)
    model, tokenizer = load(tmp_path)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == 180
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert load_tokenizer(tmp_path).pad_token == pad


def test_given_pad_token_is_kept(own_llama):
    path = own_llama / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "w9"}))
    assert load_tokenizer(own_llama).pad_token == "w9"


def test_no_pad_and_no_end(tmp_path):
    assert "neither a pad nor an end-of-sequence token" in refusal(save_tiny_model(tmp_path, special=("<s>",)))


def test_tokenizer_larger_than_the_embedding(own_llama):
    save_tokenizer(own_llama, size=VOCABULARY + 5)
    message = refusal(own_llama)
    assert f"up to id {VOCABULARY + 4}" in message and f"{VOCABULARY} rows" in message


def test_missing_tokenizer(own_llama):
    (own_llama / "tokenizer.json").unlink()
    (own_llama / "tokenizer_config.json").unlink()
    assert "tokenizer" in refusal(own_llama)


# --- the record ---


def test_record_is_complete_and_atomic(llama, tmp_path, monkeypatch):
    model, _ = load(llama)
    path = write_base_record(model, tmp_path / "adapter")
    assert sorted(p.name for p in path.parent.iterdir()) == ["base_quantization.json"]
    record = read_base_record(path.parent)
    assert json.loads(path.read_text()) == base_record(model)
    assert record.base_model_name_or_path == str(llama)
    assert record.config_sha256 == config_sha256(json.loads((llama / "config.json").read_text()))
    assert (record.block_size, record.quant_storage, record.prequantized) == (64, "uint8", False)
    before = path.read_text()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_base_record(model, path.parent)
    assert path.read_text() == before
    assert len(list(path.parent.iterdir())) == 1


def test_record_of_a_model_loaded_by_other_means(llama):
    from transformers import AutoModelForCausalLM

    settings = base_record(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    loaded, _ = load(llama, quantization="none")
    assert settings == base_record(loaded)


def test_config_digest_ignores_versions_and_sees_shapes():
    config = {"hidden_size": 64, "rope": {"theta": 1e4, "dtype": "float32"}, "transformers_version": "5.0"}
    other = {"transformers_version": "5.1", "rope": {"theta": 1e4}, "hidden_size": 64, "dtype": "bfloat16"}
    assert config_sha256(config) == config_sha256(other)
    assert config_sha256(config) != config_sha256(config | {"hidden_size": 65})
    assert config_sha256(config) != config_sha256(config | {"rope": {"theta": 1e5}})


def test_broken_records(llama, tmp_path):
    with pytest.raises(BaseModelError, match="has no base_quantization.json"):
        read_base_record(tmp_path)
    path = tmp_path / "base_quantization.json"
    for content, said in (
        ("{", "is not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"revision": null}', "lacks qpsft_v"),
    ):
        path.write_text(content)
        with pytest.raises(BaseModelError, match=said):
            read_base_record(tmp_path)
