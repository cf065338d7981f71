"""The weights of a merge, bit for bit: rounded as bitsandbytes rounds them, changed in float32, rounded once."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from merging import save_peft_adapter, tokens, vouch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from qpsft.errors import ExportError
from qpsft.merge import merge_adapter
from qpsft.merge.rounding import RoundedWeight, Rounding, dequantize, quantize
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.model.block_maxima import round_maxima, rounding_of

FLOAT = torch.float32


def merge(adapter, output, **options):
    return merge_adapter(adapter, output, no_verify=True, **options)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("count", [64, 4096, 4096 * 3 + 64, 5 * 37, 1000])
def test_quantize_is_bitsandbytes_own(kind, block, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.02
    values[:16] = 0
    code = bnb.get_4bit_type(kind, device="cpu").sort().values
    edges = ((code[1:] + code[:-1]) / 2) * values.abs().max()  # values as near as can be to where codes change
    values[-15:] = edges
    expected, state = bnb.quantize_4bit(values, blocksize=block, quant_type=kind)
    codes, absmax = quantize(values, kind, block)
    assert torch.equal(codes, expected.view(-1)) and torch.equal(absmax, state.absmax)
    rounding = Rounding(kind, False, block, FLOAT, FLOAT)
    if count % 2 == 0:  # bitsandbytes compiles a kernel of its own for odd counts, for half a minute
        assert torch.equal(
            dequantize(codes, absmax, count, rounding, FLOAT), bnb.dequantize_4bit(expected, state).view(-1)
        )


def test_an_odd_count_dequantizes_as_its_even_part():
    values = torch.randn(129, generator=torch.Generator().manual_seed(0))
    rounding = Rounding("nf4", False, 64, FLOAT, FLOAT)
    odd = dequantize(*quantize(values, "nf4", 64), 129, rounding, FLOAT)
    even = dequantize(*quantize(torch.cat([values, torch.zeros(1)]), "nf4", 64), 130, rounding, FLOAT)
    assert odd.shape == (129,) and torch.equal(odd, even[:129])


@pytest.mark.parametrize("quantized_on", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(96, 172), (1000, 64), (7, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_double_quantization_in_pieces_is_that_of_the_whole(monkeypatch, shape, dtype, quantized_on):
    monkeypatch.setattr("qpsft.merge.rounding.PIECE", 2048)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with rounding_of(quantized_on, "cpu"):
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = bnb.dequantize_4bit(packed, state).float().view(-1)
    rounding = Rounding("nf4", True, 64, dtype, dtype, quantized_on)
    found = RoundedWeight(lambda start, stop: weight.view(-1)[start:stop], weight.numel(), rounding)
    for start in range(0, weight.numel(), 1024):
        stop = min(start + 1024, weight.numel())
        assert torch.equal(found.values(start, stop), expected[start:stop])
    assert not torch.equal(round_maxima(found._absmax, quantized_on), found._absmax) or shape == (7, 1024)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight(tmp_path, compute, dtype):
    """The live model's dequantized weights in its compute dtype, plus the update in float32, rounded once."""
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(
        tmp_path / "adapter", base, load={"dtype": compute}, target_modules=["q_proj", "up_proj"]
    )
    merge(adapter, tmp_path / "out", dtype=dtype)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    live, _ = load_base(base, dtype=compute, verbose=False)
    expected = {name: parameter.data.float() for name, parameter in live.named_parameters() if parameter.dim() == 1}
    expected |= {
        f"{name}.weight": live.get_submodule(name).weight.data.float() for name in ("model.embed_tokens", "lm_head")
    }
    for name, layer in quantized_linears(live).items():
        weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.dtype == getattr(torch, compute)
        a, b = (factors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        expected[f"{name}.weight"] = weight.float() if a is None else weight.float() + b @ (a * 2.0)
    assert merged.keys() == expected.keys()
    for name, values in merged.items():
        assert values.dtype == getattr(torch, dtype)
        assert torch.equal(values, expected[name].to(values.dtype)), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
@pytest.mark.parametrize("piece", [100, 640, 3000])
def test_pieces_of_any_size(tmp_path, monkeypatch, piece, config):
    """Large tensors come in pieces that must start on blocks and rows; small ones would hide a mistake."""
    base = save_tiny_model(tmp_path / "base", hidden_size=60, intermediate_size=172, head_dim=14)
    adapter = save_peft_adapter(tmp_path / "adapter", base, **config)
    merge(adapter, tmp_path / "whole", dtype="float32")
    for module in ("rounding", "weights"):
        monkeypatch.setattr(f"qpsft.merge.{module}.PIECE", piece)
    merge(adapter, tmp_path / "pieces", dtype="float32")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert all(
        torch.equal(found[name], value) or torch.allclose(found[name], value, rtol=1e-6)
        for name, value in expected.items()
    )
    untouched = [name for name in expected if "down_proj" in name and config.get("target_modules")]
    assert all(torch.equal(found[name], expected[name]) for name in untouched)


def test_the_modules_that_were_left_unquantized_are_not_rounded(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "out", dtype="float32")
    merged, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert torch.equal(merged["lm_head.weight"], original["lm_head.weight"])
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"])


def test_onto_the_original_weights(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    report = merge(adapter, tmp_path / "out", dtype="float32", onto="original")
    (adapter / "base_quantization.json").unlink()  # other tools write none, and this needs none
    merge(adapter, tmp_path / "again", dtype="float32", onto="original")
    merged, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert all(
        torch.equal(value, merged[name]) for name, value in load_file(tmp_path / "again" / "model.safetensors").items()
    )
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert "original" in report.summary()


def test_embeddings_and_norms_are_rounded_as_the_live_model_rounds_them(tmp_path):
    """Trained in bfloat16, merged to float32: the base's float32 embeddings were never in the live model."""
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, load={"dtype": "bfloat16"})
    merge(adapter, tmp_path / "out", dtype="float32")
    merged, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    name = "model.embed_tokens.weight"
    assert torch.equal(merged[name], original[name].bfloat16().float()) and not torch.equal(
        merged[name], original[name]
    )


def test_a_value_too_large_for_float16_is_an_error(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    vouch(adapter)
    with pytest.raises(ExportError, match=r"model.embed_tokens.weight has a value of 1e\+05 after merging"):
        merge(adapter, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    merge(adapter, tmp_path / "out", dtype="bfloat16")


def test_a_broken_value_in_the_base_is_an_error(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    vouch(adapter)
    with pytest.raises(ExportError, match=r"layers.1.mlp.down_proj.weight has values that are not finite"):
        merge(adapter, tmp_path / "out")


def test_what_an_architecture_keeps_in_float32_stays_float32(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"], raising=False)
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "out", dtype="bfloat16")
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        assert values.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name


def test_integers_are_copied(tmp_path):
    """A stored buffer, such as a table of positions, has no dtype to be merged to."""
    from qpsft.merge.base_tensors import BaseTensor
    from qpsft.merge.safetensors_stream import TensorFile
    from qpsft.merge.weights import MergedTensor

    ids = tokens()
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    with TensorFile(tmp_path / "ids.safetensors") as file:
        tensor = BaseTensor("ids", file.tensors["ids"], "ids", None, tuple(ids.shape), False, False)
        merged = MergedTensor(tensor, None, rounding=None, plain_dtype=torch.float16, dtype=torch.int64)
        assert torch.equal(torch.cat(list(merged.pieces())), ids.view(-1))
