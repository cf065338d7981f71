"""The table of updates against the rounding step says what re-quantizing would keep."""

from __future__ import annotations

import json
import math

import pytest
import torch
from bitsandbytes import functional as bnb
from merging import save_peft_adapter
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from qpsft.merge import merge_adapter
from qpsft.merge.rounding import Rounding
from qpsft.merge.update_size import LayerUpdate, UpdateMeter, update_verdict
from qpsft.model.base import load_base

NF4 = Rounding("nf4", False, 64, torch.float32, torch.float32)


def round_trip(values):
    codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
    packed = codes.view(-1)
    return bnb.dequantize_4bit(codes, state).view(values.shape), torch.stack([packed >> 4, packed & 15])


def gaussian(size=0.02, seed=0):
    return size * torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_the_three_numbers(size):
    """Measured in pieces, they are those of the whole matrices."""
    before, after = gaussian(), gaussian() + gaussian(size, seed=1)
    rounded, codes = round_trip(before)
    rounded_after, codes_after = round_trip(after)
    meter = UpdateMeter(NF4)
    for rows in range(0, 64, 16):
        meter.add(before[rows : rows + 16].reshape(-1), after[rows : rows + 16].reshape(-1))
    found = meter.result("layer", (64, 256))
    update = after - before
    assert found.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
    assert found.weight_norm == pytest.approx(float(before.norm()), rel=1e-5)
    assert found.update_to_step == pytest.approx(float(update.norm() / (before - rounded).norm()), rel=1e-4)
    assert found.codes_changed == pytest.approx(float((codes != codes_after).double().mean()), abs=1e-9)
    kept = float(((rounded_after - rounded) * update).sum() / update.square().sum())
    assert found.kept == pytest.approx(kept, rel=1e-3, abs=1e-4)


def test_small_updates_of_rounded_weights_are_erased_and_large_ones_kept():
    on_codes, _ = round_trip(gaussian())
    step = float((gaussian() - on_codes).norm())
    kept, changed = [], []
    for size in (1e-5, 1e-3, 3e-2):
        meter = UpdateMeter(NF4)
        meter.add(on_codes.view(-1), (on_codes + gaussian(size, seed=1)).view(-1))
        meter.add_step(0.0)
        result = meter.result("layer", (64, 256))
        kept.append(result.kept)
        changed.append(result.codes_changed)
    assert kept[0] < 0.2 and 0.95 < kept[2] < 1.05 and changed == sorted(changed) and changed[0] < 0.01 < changed[2]
    assert step > 0


def layer(update, step, kept, changed=0.1):
    ratio = update / step if step else math.inf
    return LayerUpdate("x", (4, 4), update, 1.0, step, ratio, changed, kept)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "No matrix was changed"),
        ([layer(0.0, 1.0, 1.0)], "No matrix was changed"),
        (
            [layer(0.1, 1.0, 0.1), layer(0.01, 1.0, 1.0)],
            "would erase most of what was learnt (10.0% of the adapted weights",
        ),
        ([layer(0.1, 1.0, 0.9)], "would bury what was learnt in errors 10 times its size"),
        (
            [layer(2.0, 1.0, 0.9)],
            "would keep most of what was learnt (10.0% of the adapted weights would change their 4-bit code, 90%",
        ),
    ],
)
def test_the_verdict(layers, text):
    assert text in update_verdict(layers)


def test_in_a_merge(tmp_path):
    """Onto the trained weights: the step is that of the original weights, the codes those of the live model."""
    base = save_tiny_model(tmp_path / "base")
    adapter = save_peft_adapter(tmp_path / "adapter", base, target_modules=["up_proj"])
    report = merge_adapter(adapter, dtype="float32", verify=False, show_progress=False)
    merged, original = (load_file(f / "model.safetensors") for f in (tmp_path / "adapter-merged", base))
    model, _ = load_base(base, verbose=False)
    for found in report.layers:
        live = model.get_submodule(found.name).weight
        weight = original[f"{found.name}.weight"]
        update = merged[f"{found.name}.weight"] - bnb.dequantize_4bit(live.data, live.quant_state)
        assert found.shape == tuple(weight.shape) == (128, 64)
        assert found.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert found.step_norm == pytest.approx(float((weight - round_trip(weight)[0]).norm()), rel=1e-4)
        changed = (round_trip(weight)[1] != round_trip(merged[f"{found.name}.weight"])[1]).double().mean()
        assert found.codes_changed == pytest.approx(float(changed), abs=1e-9)
    assert len(report.layers) == 2 and json.loads(json.dumps(report.verdict))


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_base_rounded_on_disk_has_a_step_too(tmp_path, quantization):
    """Its original is not known; the estimate is near what the original's rounding was."""
    base = save_tiny_model(tmp_path / "base")
    model, tokenizer = load_base(base, quantization=quantization, verbose=False)
    model.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    steps = []
    for name, folder in (("one", base), ("two", tmp_path / "rounded")):
        load = {"quantization": quantization} if name == "one" else {}
        adapter = save_peft_adapter(tmp_path / name, folder, load=load)
        report = merge_adapter(adapter, verify=False, show_progress=False)
        steps.append({layer.name: layer.step_norm for layer in report.layers})
    assert steps[0].keys() == steps[1].keys() and len(steps[0]) == 14
    assert all(steps[1][name] == pytest.approx(step, rel=0.1) for name, step in steps[0].items())
