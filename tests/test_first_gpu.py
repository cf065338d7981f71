"""benchmarks/first_gpu.py: every part stands alone, its numbers are kept at once, and each rehearses on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import first_gpu
import first_gpu_parts
import pytest
import torch
from first_gpu import AGAIN, GOAL_MISSED, PARTS, Part, Record, exit_code, run_part, run_parts

pytestmark = pytest.mark.bench

TWINS = ("step_cost_large", "throughput_8b", "throughput_14b")
"""On the CPU the same as another part."""
ENVIRONMENT = {"slug": "some-card", "device": "Some Card", "driver": "580.1", "versions": {"torch": "2.13.0"}}
FAKE = """
import json, os, subprocess, sys, time
part, device, answer = sys.argv[1], sys.argv[3], sys.argv[5]
numbers = {"device": device, "env": os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"]}
found = {"status": "ok", "missed": [], "numbers": numbers}
if part == "broken":
    print("begun", flush=True)
    raise ValueError("a bug")
if part == "slow":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["CHILD"], "w").write(str(child.pid))
    time.sleep(600)
if part == "missed":
    found |= {"status": "missed", "missed": ["it is off by 3 %"]}
if part == "skipped":
    found = {"status": "skipped", "why": "it needs a GPU"}
if part == "killed":
    os.kill(os.getpid(), 9)
if part == "environment":
    found["numbers"] = json.loads(os.environ["ENVIRONMENT"])
open(answer, "w").write(json.dumps(found))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Parts that are quick and end as their names say."""
    path = tmp_path / "program" / "parts.py"
    path.parent.mkdir()
    path.write_text(FAKE)
    monkeypatch.setattr(first_gpu, "PROGRAM", path)
    monkeypatch.setattr(first_gpu, "LEAST_SECONDS", 0.5)
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    monkeypatch.setenv("ENVIRONMENT", json.dumps(ENVIRONMENT))
    monkeypatch.delenv("OUT", raising=False)
    return path


def parts(*names, limit=30.0):
    return tuple(Part(name, 1.0 if name == "slow" else limit, f"is {name} so?") for name in names)


def test_a_part_that_fails_hangs_or_is_killed_stops_no_other(program, tmp_path, capsys):
    record = Record(tmp_path / "results", "cuda", tmp_path)
    record.begin(ENVIRONMENT)
    started = time.monotonic()
    run_parts(parts("broken", "slow", "killed", "missed", "skipped", "good"), "cuda", 5.0, record)
    assert time.monotonic() - started < 60
    kept = json.loads((tmp_path / "results" / "first_gpu_some-card.json").read_text(encoding="utf-8"))
    assert kept == json.loads((tmp_path / "first_gpu_some-card.json").read_text(encoding="utf-8"))  # as for $OUT
    assert kept["runs"] == [ENVIRONMENT] and kept["device"] == "cuda"
    states = {name: part["status"] for name, part in kept["parts"].items()}
    assert states == {"broken": "failed", "slow": "timed out", "killed": "failed", "missed": "missed",
                      "skipped": "skipped", "good": "ok"}  # fmt: skip
    for part in kept["parts"].values():
        assert part["run"] == 0 and part["seconds"] >= 0 and part["limit"] > 0
    assert kept["parts"]["broken"]["said"][-1] == "ValueError: a bug" and kept["parts"]["broken"]["exit_code"] == 1
    assert kept["parts"]["good"]["numbers"] == {"device": "cuda", "env": "1"}
    shown = capsys.readouterr().out
    assert "it is off by 3 %" in shown and "failed: ValueError: a bug" in shown and "not done after 1 s" in shown


def test_what_a_part_started_ends_with_it(program, tmp_path):
    run_part(*parts("slow"), "cpu", 2.0)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("its child is still there")


def test_the_same_command_goes_on_with_what_is_missing(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_gpu, "PARTS", parts("environment", "good", "missed", "slow"))
    arguments = ["--results", str(tmp_path)]
    assert first_gpu.main(arguments) == 1
    (file,) = tmp_path.glob("first_gpu_*.json")
    before = json.loads(file.read_text())
    program.write_text(FAKE.replace("time.sleep(600)", "pass").replace('if part == "missed"', 'if part == "never"'))
    assert first_gpu.main(arguments) == GOAL_MISSED  # the missed one is measured, and is not run again by itself
    after = json.loads(file.read_text())
    assert after["parts"]["good"] == before["parts"]["good"] and after["parts"]["slow"]["status"] == "ok"
    assert (after["parts"]["good"]["run"], after["parts"]["slow"]["run"], len(after["runs"])) == (0, 1, 2)
    assert first_gpu.main([*arguments, "missed"]) == 0
    assert first_gpu.main([*arguments, "--list"]) == 0
    assert "slow" in capsys.readouterr().out and json.loads(file.read_text())["parts"]["missed"]["status"] == "ok"


def test_no_part_begins_without_time_and_one_that_had_less_than_its_due_begins_anew(program, tmp_path):
    record = Record(tmp_path, "cuda")
    record.begin(ENVIRONMENT)
    chosen = (Part("slow", 60.0, ""), Part("good", 60.0, ""))
    run_parts(chosen, "cuda", 2 / 60, record)
    assert {name: part["status"] for name, part in record.parts.items()} == {"slow": "not begun"}
    assert exit_code(chosen, record) == AGAIN


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    command = [sys.executable, first_gpu.__file__, "--results", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 2 and "To rehearse without one: --cpu" in told.stderr
    assert not list(tmp_path.iterdir())


def test_every_part_has_its_function_and_all_fit_their_time():
    assert [part.name for part in PARTS] == list(first_gpu_parts.PARTS)
    assert PARTS[0].name == "environment" and all(part.limit <= 120 and part.question for part in PARTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(part.name, marks=[pytest.mark.slow] if part.name in TWINS else []) for part in PARTS]
)
def test_every_part_rehearses_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(first_gpu.__file__).parents[1]))
    answer = tmp_path / "answer.json"
    assert first_gpu_parts.main([name, "--device", "cpu", "--answer", str(answer)]) == 0
    found = json.loads(answer.read_text(encoding="utf-8"))
    if name in ("paged_optimizer", "offloading"):
        assert found == {"status": "skipped", "why": f"{found['why']}"} and "needs a GPU" in found["why"]
        return
    assert (found["status"], found["missed"]) == ("ok", []) and found["numbers"]


def test_what_is_wrong_is_missed(monkeypatch):
    monkeypatch.setattr("noise_floor.measure", lambda args: [{"dtype": "bfloat16", "micro_batch": 1, "max": 1e-3}])
    found = first_gpu_parts.answer("noise", "cpu")
    assert found["status"] == "missed"
    assert found["missed"] == ["bfloat16, micro-batch 1: r is off by 1.0e-03 with budget 0"]
    weight = 0.02 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    found = first_gpu_parts.quantized(weight)
    assert found["codes"].numel() == weight.numel() // 2 and found["maxima"].numel() == weight.numel() // 64
    assert 0.99 < found["nearest"] <= 1 == first_gpu_parts.quantized(weight, "cuda")["nearest"]
    assert (found["values"] - weight).abs().mean() < 0.1 * 0.02
