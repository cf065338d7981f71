"""A QLoRA adapter that another tool trained: its owner says how the base was loaded, and it leaves like one of ours."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging import ALL, largest, load_strictly, logprobs, shake, tokens
from peft import LoraConfig, get_peft_model
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qpsft import cli
from qpsft.errors import BaseModelError
from qpsft.merge import merge_adapter
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base_record import RECORD_FILE, read_base_record

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
TOLD = {"quantization": "nf4", "double_quant": True, "compute_dtype": "float32", "quantized_on": "cpu"}
TRAINED = {  # what a training gave transformers, and what its owner says
    "nf4, double": (NF4, TOLD),
    "nf4": (NF4 | {"bnb_4bit_use_double_quant": False}, TOLD | {"double_quant": False}),
    "fp4": (NF4 | {"bnb_4bit_quant_type": "fp4"}, TOLD | {"quantization": "fp4"}),
    "not quantized": (None, {"quantization": "none", "compute_dtype": "float32"}),
}


def train_elsewhere(folder: Path, base: Path, settings: dict | None) -> torch.Tensor:
    """transformers loads the base, PEFT saves the adapter; returns the log-probabilities of the model trained there."""
    load = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)} if settings else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **load)
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM"))
    shake(model)
    model.save_pretrained(folder)
    model.train()
    with torch.no_grad():
        return model(tokens()).logits.log_softmax(-1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def trained(base):
    folder = base.parent / "trained"
    return folder, train_elsewhere(folder, base, NF4)


@pytest.fixture
def adapter(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def flags(told: dict) -> list[str]:
    return [f"--{name}={str(value).lower()}" for name, value in told.items()]


def refused(capsys, arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", TRAINED)
def test_the_merge_is_the_model_that_was_trained(tmp_path, base, capsys, kind):
    settings, told = TRAINED[kind]
    adapter = tmp_path / "adapter"
    live = train_elsewhere(adapter, base, settings)
    assert cli.main(["merge", str(adapter), "--dtype=float32", *flags(told)]) == 0
    shown = capsys.readouterr()
    assert "verify: the same model" in shown.out and f"as stated in {RECORD_FILE}" in " ".join(shown.out.split())
    assert largest(logprobs(load_strictly(tmp_path / "adapter-merged"), tokens()), live) < 1e-5
    record = read_base_record(adapter)
    assert record.assumed == [] and record.unquantized_modules[-1] == "lm_head"
    assert "assumed" not in shown.err


def test_what_is_not_stated_is_assumed_and_said(capsys, adapter):
    assert cli.main(["merge", str(adapter), "--quantization=nf4", "--compute_dtype=float32"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "nf4 in blocks of 64, double quantization, computed in float32" in said
    assert "assumed: double_quant True, quantized_on cuda" in said
    report = json.loads((adapter.parent / "adapter-merged" / "merge_report.json").read_text())
    assert "assumed: double_quant True, quantized_on cuda" in report["rounding"]


def test_a_wrong_statement_is_another_model(base, adapter, trained):
    merge_adapter(adapter, dtype="float32", **TOLD | {"double_quant": False})
    assert largest(logprobs(load_strictly(adapter.parent / "adapter-merged"), tokens()), trained[1]) > 1e-3


def test_what_was_stated_can_be_stated_better(adapter):
    merge_adapter(adapter, no_verify=True, **TOLD | {"quantization": "fp4"})
    merge_adapter(adapter, no_verify=True, overwrite=True, quantization="nf4")
    record = read_base_record(adapter)
    assert (record.quantization, record.compute_dtype, record.quantized_on) == ("nf4", "float32", "cpu")
    AdapterFolder(adapter).base_folder()


def test_a_base_that_is_quantized_on_disk_says_it_itself(tmp_path, base, capsys):
    """As Unsloth's `…-bnb-4bit` repositories are."""
    settings = BitsAndBytesConfig(load_in_4bit=True, **NF4)
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "base-bnb-4bit")
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "base-bnb-4bit")
    live = train_elsewhere(tmp_path / "adapter", tmp_path / "base-bnb-4bit", None)
    command = ["merge", str(tmp_path / "adapter"), "--dtype=float32"]
    for flag in ("--quantization=fp4", "--double_quant=false", "--quantized_on=cuda"):
        text = refused(capsys, [*command, flag])
        assert "does not go with a base that is quantized on disk" in text
    assert cli.main(command) == 0
    assert largest(logprobs(load_strictly(tmp_path / "adapter-merged"), tokens()), live) < 1e-5
    record = read_base_record(tmp_path / "adapter")
    assert record.prequantized and record.assumed == ["compute_dtype"] and record.unquantized_modules == ["lm_head"]


VERBS = {
    "chat": ["chat", "adapter"],
    "evaluate": ["evaluate", "adapter", "--data=rows.jsonl", "--k=0", "--max_new_tokens=1", "--no_drift"],
    "export": ["export", "adapter", "--to=vllm"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_other_verbs_take_it_too(monkeypatch, capsys, adapter, verb):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
    monkeypatch.chdir(adapter.parent)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "w1 w2", "completion": " w3"}))
    arguments = VERBS[verb]
    refused(capsys, [*arguments, "--compute_dtype=float32"])
    assert not (adapter / RECORD_FILE).exists()
    assert cli.main([*arguments, *flags(TOLD)]) == 0
    assert read_base_record(adapter).assumed == []
    text = refused(capsys, [*arguments, "--quantization=fp4", "--base=/nowhere/at/all"])
    assert "/nowhere/at/all" in text


def test_statements_that_do_not_fit(capsys, adapter, base):
    merge = ["merge", adapter]
    assert "--quantization nf4, fp4 or none" in refused(capsys, [*merge, "--double_quant=true"])
    assert "does not go with --quantization none" in refused(
        capsys, [*merge, "--quantization=none", "--quantized_on=cpu"]
    )
    assert "is not an adapter's folder" in refused(capsys, ["chat", base, "--compute_dtype=float32"])
    assert "--quantization nf4 --double_quant true" in refused(capsys, merge)
    assert not (adapter / RECORD_FILE).exists()


def test_a_record_of_the_training_is_not_overwritten(tmp_path, capsys, adapter):
    merge_adapter(adapter, no_verify=True, **TOLD)
    path = adapter / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"assumed": None}))
    text = refused(capsys, ["merge", adapter, "-o", tmp_path / "out", "--double_quant=false"])
    assert f"--double_quant false: {path} says true" in text
    merge_adapter(adapter, tmp_path / "out", no_verify=True, double_quant=True)
    with pytest.raises(BaseModelError, match="--compute_dtype bfloat16"):
        merge_adapter(adapter, tmp_path / "out", overwrite=True, compute_dtype="bfloat16")
