"""benchmarks/step_cost.py at tiny size on the CPU: its numbers, its goals, its profile."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import machine
import profiling
import pytest
import step_cost
import step_goals
import step_grid
import torch
from machine import Budget, Results
from real_shapes import build_model, random_rows
from step_goals import ARMS, Arm
from step_grid import Cell
from torch.autograd import DeviceType
from trl import SFTConfig
from turns import Step

from qpsft.model.base_record import stored_bytes

pytestmark = pytest.mark.bench

CELL = Cell("tiny", 1, 16, rows=2, rank=4, steps=4, warmup=1)


@pytest.fixture(scope="module")
def base():
    return build_model("tiny", "cpu")


def steps_of(k, v, *, train=1.0, score=0.25):
    """Two blocks, timed perfectly."""
    block = [Step(train, 0.0, "snapshot")] + [Step(train + score, score, "scored")] * (k - 1)
    return (block + [Step(train, 0.0, "kept")] * (k * (v - 1))) * 2


@pytest.mark.parametrize("k, v", [(1, 1), (2, 1), (8, 1), (16, 1), (8, 4)])
def test_an_average_step_is_that_of_whole_blocks(k, v):
    steps, arm = steps_of(k, v), Arm("psft", k, v)
    mean = sum(step.seconds for step in steps) / len(steps)
    assert step_goals.step_seconds(arm, steps) == pytest.approx(mean)
    share = sum(step.scoring for step in steps) / sum(step.seconds for step in steps)
    assert step_goals.scoring_share(arm, steps) == pytest.approx(share)
    if k > 1:  # the kinds that a short run misses are filled in from the training part of a scored step
        some = [step for step in steps if step.kind == "scored"]
        assert step_goals.step_seconds(arm, some) == pytest.approx(mean)
        with pytest.raises(ValueError, match="no scored step"):
            step_goals.step_seconds(arm, [Step(1.0, 0.0, "kept")])


def test_goals_pass_fail_or_say_that_they_were_not_measured():
    seconds = {"trl": 1.0, "nll": 1.02, "psft K=2": 1.3, "psft K=8": 1.2, "psft K=8 V=4": 1.06}
    peaks = {"nll": 1000, "psft K=8": 1020}
    found = {g.name: g for g in step_goals.goals(seconds, peaks, micro_batch=1, checkpointing=True)}
    passed = {name: goal.passed for name, goal in found.items()}
    assert passed == {
        "qpsft nll / trl.SFTTrainer, time": True,
        "psft K=2 / nll, time": False,  # 1.27 > 1 + 1/6 + .03
        "psft K=4 / nll, time": None,
        "psft K=8 / nll, time": False,  # 1.176 > 1.15
        "psft K=16 / nll, time": None,
        "psft K=8 V=4 / nll, time": True,
        "psft K=8 / nll, peak memory": False,
    }
    large = {g.name: g for g in step_goals.goals(seconds, peaks, micro_batch=8, checkpointing=True)}
    assert large["psft K=8 / nll, time"].passed and large["psft K=8 / nll, time"].limit == pytest.approx(
        1 + 7 / 24 + 0.03
    )
    assert all(len(goal.line()) <= 80 for goal in found.values())


def test_the_grid_measures_every_arm_and_goes_on_where_it_stopped(base, tmp_path, monkeypatch, capsys):
    arms = {name: ARMS[name] for name in ("trl", "nll", "psft K=2")}
    monkeypatch.setattr(step_grid, "PEAK_ARMS", ("nll", "psft K=2"))
    cells = [CELL, replace(CELL, micro_batch=2)]
    results = Results(tmp_path / "r.json", machine.environment("cpu"))
    assert not step_grid.run_grid(base, cells, arms, results, FirstCellOnly(), "cpu")
    cell = json.loads((tmp_path / "r.json").read_text())["cells"][CELL.key]
    assert list(cell["arms"]) == list(arms)
    for name, numbers in cell["arms"].items():
        assert len(numbers["steps"]) == CELL.steps
        assert numbers["tokens_per_second"] == pytest.approx(2 * 16 / numbers["step_seconds"])
        kinds = [step["kind"] for step in numbers["steps"]]
        assert kinds == (["plain"] * 4 if name != "psft K=2" else ["scored", "snapshot"] * 2)
    scored = [step for step in cell["arms"]["psft K=2"]["steps"] if step["kind"] == "scored"]
    assert all(0 < step["scoring"] < step["seconds"] for step in scored)
    assert set(cell["peak_bytes"]) == {"nll", "psft K=2"}
    assert all(peak > stored_bytes(base) for peak in cell["peak_bytes"].values())
    assert 0 <= cell["ratio_noise"]["p999"] <= cell["ratio_noise"]["max"] < 1e-4
    assert "run the command again" in capsys.readouterr().out

    measured = []
    monkeypatch.setattr(step_grid, "measure_cell", lambda base, cell, *args: measured.append(cell) or oom(cell))
    again = Results(tmp_path / "r.json", machine.environment("cpu"))
    assert step_grid.run_grid(base, cells, arms, again, Budget(None), "cpu")
    assert measured == cells[1:]
    assert "out of memory" in capsys.readouterr().out


def test_a_first_cell_needs_time_for_itself_after_the_build(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_grid, "measure_cell", lambda *args: pytest.fail("begun"))
    results, budget = Results(tmp_path / "r.json", {}), Budget(2, clock=lambda: 0.0)
    assert not step_grid.run_grid(base, [CELL], {}, results, budget, "cpu", first_seconds=110)
    assert "about 110 s, 120 s are left" in capsys.readouterr().out


class FirstCellOnly(Budget):
    """As if the time were up once a cell's cost is known."""

    def __init__(self):
        super().__init__(1)

    def allows(self, seconds):
        return seconds == 0


def oom(cell):
    return {**cell.to_dict(), "out_of_memory": True, "cell_seconds": 1.0}


def test_a_cell_that_does_not_fit_is_a_result(base, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step_grid, "peak_memory", out_of_memory)
    assert step_grid.measure_cell(base, CELL, ARMS, "cpu")["out_of_memory"]


def test_an_arm_that_does_not_fit_leaves_the_others_and_their_goals(base, monkeypatch):
    def make_trainer(base, config, *rest, make=step_grid.make_trainer):
        if type(config) is SFTConfig:  # trl's arm
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(base, config, *rest)

    monkeypatch.setattr(step_grid, "make_trainer", make_trainer)
    arms = {name: ARMS[name] for name in ("trl", "nll", "psft K=8")}
    cell = step_grid.measure_cell(base, replace(CELL, steps=2), arms, "cpu")
    assert cell["out_of_memory"] == ["trl"] and list(cell["arms"]) == list(cell["peak_bytes"]) == ["nll", "psft K=8"]
    passed = {goal["name"]: goal["passed"] for goal in cell["goals"]}
    assert passed["qpsft nll / trl.SFTTrainer, time"] is None
    assert passed["psft K=8 / nll, time"] is not None and passed["psft K=8 / nll, peak memory"] is not None
    said = step_grid.report(CELL, cell).splitlines()
    assert "  trl             out of memory" in said
    only = step_grid.measure_cell(base, CELL, {"trl": ARMS["trl"]}, "cpu")
    assert only["out_of_memory"] is True


def test_step_cost_of_the_embedded_base(capsys, tmp_path):
    arguments = "--steps 2 --reference_steps 2 --accumulation 1 --length 16 --threads 1 --json".split()
    assert step_cost.main([*arguments, str(tmp_path / "numbers.json")]) in (0, 1)
    out = capsys.readouterr().out
    assert "trl.SFTTrainer" in out and "qpsft psft" in out and "reference pass" in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["steps"] == 2 and 0 < numbers["reference_share"] < 1
    assert numbers["ratio"]["psft"] == pytest.approx(
        numbers["median_step_seconds"]["psft"] / numbers["median_step_seconds"]["trl"]
    )


# ---- profile ----


@pytest.mark.parametrize(
    "names, kind",
    [
        (["void kDequantizeBlockwise<__nv_bfloat16>", "bitsandbytes::dequantize_4bit", "MatMul4BitBackward"], "4-bit"),
        (["nvjet_tst_128x256_64x4", "aten::mm", "aten::linear"], "matrix"),
        (["nvjet_tst_128x256_64x4", "aten::mm", "ChunkedLogProbFunction"], "LM head"),
        (["pytorch_flash::flash_fwd_kernel", "aten::_scaled_dot_product_flash_attention"], "attention"),
        (["multi_tensor_apply_kernel", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (
            ["vectorized_elementwise_kernel", "aten::silu", "MmBackward0", "autograd::engine::evaluate_function"],
            "norms",
        ),
        (["MmBackward0"], "Python"),
    ],
)
def test_kinds_of_kernels(names, kind):
    assert profiling.kind_of(names).startswith(kind)


def test_a_profile_adds_up_to_the_time_of_its_steps(tmp_path, capsys):
    arms = {"psft K=8": ARMS["psft K=8"]}
    profiling.profile_cell(CELL, arms, tmp_path / "p.json", machine.environment("cpu"), "cpu")
    (cell,) = json.loads((tmp_path / "p.json").read_text())["cells"].values()
    kinds = cell["seconds_by_kind"]
    for kind in ("matrix products of base and adapter", "LM head and log-probabilities", "attention"):
        assert kinds[kind] > 0
    assert list(kinds)[-1] == profiling.IDLE and kinds[profiling.IDLE] > 0
    assert len(cell["top"]) == 15
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


def test_the_devices_mirrors_of_ranges_are_no_kernels():
    """With CUDA a range (record_function, the optimizer's step) is also an event on the device, above its kernels."""

    def event(name, **more):
        fake = dict(device_type=DeviceType.CPU, kernels=[], cpu_parent=None, is_user_annotation=False)
        fake["time_range"] = SimpleNamespace(elapsed_us=lambda: 1e6)
        return SimpleNamespace(name=name, **{**fake, **more})

    launched = event("aten::mm", kernels=[SimpleNamespace(name="gemm", duration=1e6)])
    on_device = [event("gemm", device_type=DeviceType.CUDA), event("gemm", device_type=DeviceType.CUDA)]
    mirror = event("Optimizer.step#AdamW.step", device_type=DeviceType.CUDA, is_user_annotation=True)
    sums = profiling.seconds_by_kind([launched, *on_device, mirror], 5.0, "cuda")
    assert sums == {"matrix products of base and adapter": 1.0, profiling.REST: 1.0, profiling.IDLE: 3.0}

    averages = [
        SimpleNamespace(key=name, count=1, self_device_time_total=ms * 1000, is_user_annotation=annotation)
        for name, ms, annotation in (("gemm", 2, False), ("Optimizer.step#AdamW.step", 9, True))
    ]
    top = profiling.top_kernels(SimpleNamespace(key_averages=lambda: averages), "cuda")
    assert top == [{"name": "gemm", "calls": 1, "ms": 2.0}]


def test_the_noise_of_the_ratio_is_that_between_the_two_passes(base, tmp_path):
    config = step_grid.make_config("psft", Arm("psft", 2), CELL, base.dtype, str(tmp_path), 2)
    trainer = step_grid.make_trainer(base, config, 4, random_rows(4, 16, 256), [])
    trainer.train()
    assert step_grid.ratio_noise(trainer)["max"] < 1e-4
    score = trainer.old_logprobs.score
    trainer.old_logprobs.score = lambda *args: [old - 0.01 for old in score(*args)]
    noise = step_grid.ratio_noise(trainer)
    assert noise["tokens"] == 2 * 15 and noise["p999"] == pytest.approx(0.01005, rel=1e-2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "gpt-9"], "no shape gpt-9. Use one of llama-3.1-8b"),
        (["--arms", "psft-k8"], "no arm psft-k8. Use one"),
    ],
)
def test_a_name_that_is_not_there_is_told(flags, said, capsys):
    assert step_cost.main(["--device", "cpu", "--shape", "tiny", *flags]) == 2
    assert said in capsys.readouterr().err
