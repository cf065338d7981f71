"""An adapter trained on a GPU leaves on the CPU: the base is rounded as there, and the record says where that was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qpsft import cli
from qpsft.errors import NotTheSameModelError
from qpsft.evaluate.model import load_evaluated
from qpsft.merge import merge_adapter
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import RECORD_FILE, base_record, read_base_record
from qpsft.recipe.arguments import LoraArguments

IDS = torch.arange(40).view(2, 20) % 30 + 3


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def trained(request, tmp_path_factory):
    """An adapter on the embedded base, rounded as on a GPU or on the CPU; its folder and its live model's logits."""
    base, _ = load_base("demo", quantized_on=request.param, verbose=False)
    model = add_adapter(base, LoraArguments(lora_r=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        logits = model(IDS).logits
    folder = tmp_path_factory.mktemp(f"on-{request.param}")
    save_adapter(model, folder)
    return request.param, folder, logits


def rewrite(folder, target, **changes):
    shutil.copytree(folder, target)
    record = json.loads((target / RECORD_FILE).read_text()) | changes
    (target / RECORD_FILE).write_text(json.dumps({k: v for k, v in record.items() if v != "gone"}))
    return target


def test_the_two_roundings_are_two_models():
    logits = [load_base("demo", quantized_on=where, verbose=False)[0](IDS).logits for where in ("cpu", "cuda")]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_the_record_says_where(trained):
    where, folder, _ = trained
    assert read_base_record(folder).quantized_on == where
    assert base_record(load_base("demo", quantization="none", verbose=False)[0])["quantized_on"] is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_merge_is_the_live_model(trained, tmp_path, dtype):
    """Refused with max |Δ log-prob| 0.19 where the CPU's rounding was taken for a GPU's."""
    _, folder, logits = trained
    report = merge_adapter(folder, tmp_path / "merged", dtype=dtype)
    assert report.verification["same_model"]
    merged, _ = load_base(tmp_path / "merged", quantization="none", dtype="float32", verbose=False)
    with torch.no_grad():
        difference = (merged(IDS).logits.log_softmax(-1) - logits.log_softmax(-1)).abs()
    assert difference.mean() < (1e-5 if dtype == "float32" else 1e-2)


def test_a_merge_that_rounds_as_the_other_device_is_refused(trained, tmp_path, monkeypatch):
    where, folder, _ = trained
    other = "cpu" if where == "cuda" else "cuda"
    from qpsft.merge import rounding

    honest = rounding.round_maxima
    monkeypatch.setattr(rounding, "round_maxima", lambda maxima, quantized_on: honest(maxima, other))
    with pytest.raises(NotTheSameModelError):
        merge_adapter(folder, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


def test_chat_and_evaluate_round_as_the_record_says(trained):
    _, folder, logits = trained
    model, _ = load_evaluated(str(folder))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(("compute_dtype", "assumed"), [("float32", "cpu"), ("bfloat16", "cuda")])
def test_of_an_older_record_the_assumption_is_said(trained, tmp_path, compute_dtype, assumed):
    old = rewrite(trained[1], tmp_path / "old", quantized_on="gone", compute_dtype=compute_dtype)
    with pytest.warns(UserWarning, match=rf"does not say where .* {assumed}\. Give --quantized_on"):
        assert read_base_record(old).quantized_on == assumed


@pytest.mark.journey
def test_the_flag_states_it_in_the_record(trained, tmp_path, capsys, recwarn):
    where, folder, _ = trained
    old = rewrite(folder, tmp_path / "old", quantized_on="gone")
    arguments = ["merge", str(old), "-o", str(tmp_path / "merged"), "--dtype", "float32", "--quantized_on", where]
    assert cli.main(arguments) == 0
    assert read_base_record(old).quantized_on == where and not [w for w in recwarn if "does not say" in str(w.message)]
    merge_adapter(folder, tmp_path / "same", dtype="float32")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "same"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert cli.main(["verify", str(old), str(tmp_path / "merged"), "--quantized_on", where]) == 0
    capsys.readouterr()
    other_place = "cpu" if where == "cuda" else "cuda"
    assert cli.main(["verify", str(old), str(tmp_path / "merged"), "--quantized_on", other_place]) == 2
    assert f"says it was on {where}" in capsys.readouterr().err


def test_a_run_goes_on_with_the_rounding_it_began_with(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: demo\ndataset_name: demo-clean\ndataset_limit: 40\nlora_r: 2\nsave_steps: 1\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 1\nheld_out_rows: 1\nmax_steps: 2\n"
    )
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), "--output_dir", str(run)]) == 0
    record = json.loads((run / RECORD_FILE).read_text())
    (run / RECORD_FILE).write_text(json.dumps(record | {"quantized_on": "cuda"}))
    assert cli.main(["train", str(recipe), "--output_dir", str(run), "--resume", "--max_steps", "3"]) == 0
    assert read_base_record(run).quantized_on == "cuda"
    assert (
        cli.main(["train", str(recipe), "--adapter_name_or_path", str(run), "--output_dir", str(tmp_path / "on")]) == 0
    )
    assert read_base_record(tmp_path / "on").quantized_on == "cuda"
