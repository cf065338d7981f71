"""The benchmark programs at tiny size: what needs a GPU there runs here on the CPU, or with a faked card."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path

import all_gpu
import machine
import pytest
import real_shapes
import scale
import step_cost
import step_grid
import torch
from machine import HostMeter, Results
from real_shapes import RandomTensor, build_model, config_of, held_tensors, llama_shape, random_rows, sharing_base
from step_goals import ARMS
from step_grid import Cell
from tiny_models import save_tiny_model
from turns import Turns, train_in_turns

from qpsft import load_base
from qpsft.model.base_record import quantized_linears, stored_bytes

pytestmark = pytest.mark.bench

CELL = Cell("tiny", 1, 16, rows=2, rank=4, steps=4, warmup=1)


@pytest.fixture(scope="module")
def base():
    return build_model("tiny", "cpu")


# ---- models of real shapes ----


@pytest.mark.parametrize(
    "shape, parameters",
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-0.5b", 494_032_768),
        ("gemma-2-2b", 2_614_341_888),
    ],
)
def test_the_shapes_are_those_of_the_published_models(shape, parameters):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_built_model_is_a_loaded_4bit_model(base, tmp_path):
    folder = save_tiny_model(tmp_path / "saved", tie_word_embeddings=True, num_hidden_layers=1)
    loaded, _ = load_base(folder, device="cpu", verbose=False)
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "training"):
        assert getattr(base, name) == getattr(loaded, name), name
    assert type(base.hf_quantizer) is type(loaded.hf_quantizer)
    assert base.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert {type(m) for m in base.modules()} == {type(m) for m in loaded.modules()}
    for mine, theirs in zip(base.parameters(), loaded.parameters(), strict=True):
        assert (mine.dtype, mine.requires_grad) == (theirs.dtype, theirs.requires_grad)
    for mine, theirs in zip(quantized_linears(base).values(), quantized_linears(loaded).values(), strict=True):
        for name in ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert mine.weight.quant_state.nested and mine.weight.quant_type == theirs.weight.quant_type
    assert base.lm_head.weight is base.model.embed_tokens.weight
    again = build_model("tiny", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))


def test_building_never_holds_the_unquantized_model():
    shape = llama_shape(128, 6, vocab_size=256)
    gc.collect()
    with HostMeter() as meter:
        model = build_model(shape, "cpu")
        peak = meter.peak
    largest = max(4 * layer.in_features * layer.out_features for layer in quantized_linears(model).values())
    whole = sum(4 * layer.in_features * layer.out_features for layer in quantized_linears(model).values())
    allowed = stored_bytes(model) + 2 * largest  # a float32 weight, and what rounding it takes
    assert stored_bytes(model) < peak < allowed < whole
    with torch.device("meta"):
        skeleton = type(model)(config_of(shape))
    with HostMeter() as meter:  # the control: every tensor made beforehand
        weights = {
            name: RandomTensor(name, p.shape, torch.float32, torch.device("cpu"), 0.02, 1.0)[...]
            for name, p in skeleton.named_parameters()
        }
        assert meter.peak > whole
        del weights


def test_a_build_is_kept_and_held_against_its_goals(tmp_path, monkeypatch, capsys):
    arguments = ["tiny", "--device", "cpu", "--results", str(tmp_path)]
    assert real_shapes.main(arguments) == 0
    (file,) = tmp_path.glob("build_*.json")
    content = json.loads(file.read_text())
    kept = content["cells"]["tiny"]
    assert content["runs"][kept["run"]]["versions"]["torch"] == torch.__version__
    assert kept["parameters"] > 0 and kept["peak_bytes_while_building"] > kept["stored_bytes"] > 0
    assert kept["missed"] == [] and kept["largest_tensor_bytes"] == 4 * 256 * 64  # the embedding, float32 on the CPU
    monkeypatch.setattr(real_shapes, "LONGEST_SECONDS", 0.0)
    monkeypatch.setattr(real_shapes, "MARGIN", -kept["peak_bytes_while_building"])
    assert real_shapes.main(arguments) == machine.GOAL_MISSED
    assert len(json.loads(file.read_text())["cells"]["tiny"]["missed"]) == 2
    shown = capsys.readouterr().out
    assert "goal missed: built in" in shown and "goal missed: held" in shown


def test_models_on_one_base_share_every_tensor_and_no_module(base):
    before = [tensor.clone() for tensor in held_tensors(base)]
    with HostMeter() as meter:
        other = sharing_base(base)
        assert meter.peak < 1000
    assert all(a is b for a, b in zip(base.parameters(), other.parameters(), strict=True))
    mine = quantized_linears(base).values()
    assert all(a is not b for a, b in zip(mine, quantized_linears(other).values(), strict=True))
    ids = torch.arange(3, 15)[None]
    expected = base(ids).logits
    config = step_grid.make_config("nll", ARMS["nll"], CELL, torch.float32, "unused", 2)
    config.learning_rate = 0.1
    trainer = step_grid.make_trainer(base, config, 4, random_rows(4, 16, 256), [])
    trainer.train()
    assert not torch.equal(trainer.model(ids).logits, expected)
    assert torch.equal(base(ids).logits, expected) and torch.equal(other(ids).logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, held_tensors(base), strict=True))


# ---- memory, results, time ----


def test_the_host_meter_counts_what_is_alive_and_the_peak():
    held = [torch.zeros(10)]
    with HostMeter(held) as meter:
        assert meter.now == 40
        x = torch.zeros(1000)
        view = x.view(10, 100)
        assert meter.now == 4040
        del x
        assert meter.now == 4040  # the view holds it
        y = view @ view.T
        del y, view
        assert meter.now == 40 and meter.peak == 4440


def test_results_are_kept_cell_by_cell_with_the_run_they_come_from(tmp_path):
    first = Results(tmp_path / "r.json", {"date": "monday"})
    first.add("a", {"value": 1})
    second = Results(tmp_path / "r.json", {"date": "tuesday"})
    second.add("b", {"value": 2})
    second.add("a", {"value": 3})
    content = json.loads((tmp_path / "r.json").read_text())
    assert [run["date"] for run in content["runs"]] == ["monday", "tuesday"]
    assert content["cells"] == {"a": {"run": 1, "value": 3}, "b": {"run": 1, "value": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_environment_names_device_versions_command_and_date():
    found = machine.environment("cpu")
    assert found["device"].endswith("CPU") and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python ") and found["date"].endswith("+00:00")
    assert torch.__version__ in machine.describe(found)


def test_turns_run_one_at_a_time_in_order_until_each_leaves():
    order, running = [], []
    turns = Turns(["a", "b", "c"])

    class Worker:
        def __init__(self, name, steps):
            self.name, self.steps = name, steps

        def train(self):
            for _ in range(self.steps):
                assert not running
                running.append(self.name)
                order.append(self.name)
                time.sleep(0.01)
                running.clear()
                turns.hand_over()
                turns.wait(self.name)
            if self.name == "b":
                raise ValueError("b fails at its end")

    workers = {name: Worker(name, steps) for name, steps in (("a", 3), ("b", 1), ("c", 2))}
    with pytest.raises(ValueError, match="b fails"):
        train_in_turns(workers, turns)
    assert order == list("abcaca")


# ---- scale ----


def test_a_sweep_is_measured_drawn_and_kept(tmp_path, monkeypatch, capsys):
    tiny = replace(
        scale.SWEEPS["cpu"],
        shapes=["h64-l2"],
        shape="h64-l2",
        lengths=[16],
        length=16,
        micro_batches=[1],
        micro_batch=1,
        ranks=[4],
        rank=4,
        reference_steps=[8],
        rows=1,
        steps=2,
    )
    monkeypatch.setitem(scale.SWEEPS, "cpu", tiny)
    assert scale.main(["--device", "cpu", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 2  # the centre is one point of four factors, and K's are another
    for key, cell in cells.items():
        assert set(cell["step_seconds"]) == {"nll", "psft K=8"} and cell["clock"] == "cpu"
        assert set(cell["peak_bytes"]) == (set() if key.endswith(" K") else {"nll", "psft K=8"})
    assert file.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(scale, "measure_point", lambda *args: pytest.fail("measured again"))
    assert scale.main(["--device", "cpu", "--results", str(tmp_path)]) == 0


# ---- the GPU session ----


def test_every_part_of_the_gpu_session_is_a_command_that_its_program_takes():
    for part in all_gpu.PARTS:
        command = part.command(3.0)
        assert Path(command[1]).is_file(), command
        assert ("--minutes" in command) == (part.minutes is not None)
    grids = [part for part in all_gpu.PARTS if part.program == "step_cost.py"]
    for part in grids:
        args = step_cost.options(part.command(3.0)[2:])
        assert args.device == "cuda"


def test_the_gpu_session_goes_on_stops_overruns_and_brings_results_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_gpu, "HERE", tmp_path)
    results, out = tmp_path / "results", tmp_path / "out"
    out.mkdir()
    (tmp_path / "good.py").write_text("import sys; print('measured', *sys.argv[1:])")
    (tmp_path / "missed.py").write_text("raise SystemExit(3)")
    (tmp_path / "broken.py").write_text("raise ValueError('a bug')")
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    parts = tuple(all_gpu.Part(name, f"{name}.py", minutes=0.02 if name == "slow" else None) for name in
                  ("good", "missed", "broken", "slow"))  # fmt: skip
    assert all_gpu.run_parts(parts, 2.0, results, out, grace=0.5) == machine.AGAIN
    progress = all_gpu.read_progress(results / "gpu_progress.json")
    assert {name: state["exit_code"] for name, state in progress.items()} == {
        "good": 0, "missed": 3, "broken": 1, "slow": -9,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "measured" in shown and "a bug" in shown and "done; a goal is missed" in shown
    assert (out / "gpu_progress.json").is_file() and "begun" in (out / "gpu_log.txt").read_text()
    (tmp_path / "good.py").write_text("raise SystemExit('run twice')")
    (tmp_path / "broken.py").write_text("")
    assert all_gpu.run_parts(parts[:3], 2.0, results, out) == 0
    assert "run twice" not in capsys.readouterr().out


def test_the_gpu_session_begins_no_part_that_cannot_end(tmp_path, monkeypatch):
    monkeypatch.setattr(all_gpu, "HERE", tmp_path)
    (tmp_path / "good.py").write_text("")
    parts = (all_gpu.Part("large", "good.py", least=3.0), all_gpu.Part("small", "good.py"))
    assert all_gpu.run_parts(parts, 2.0, tmp_path / "results", None) == machine.AGAIN
    assert list(all_gpu.read_progress(tmp_path / "results" / "gpu_progress.json")) == ["small"]
    assert all_gpu.run_parts(parts, 4.0, tmp_path / "results", None) == 0
    of_8b = {"build", "step_cost", "max_context", "profile", "plan", "step_cost_grid"}
    assert {part.name for part in all_gpu.PARTS if part.least == 3.0} == of_8b
