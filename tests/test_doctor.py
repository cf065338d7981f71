"""`qpsft doctor`: every line on the machine that is here, and each thing that can be wrong with its cure."""

import importlib.machinery
import json
import re
import urllib.error
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from trl.kernels import chunked_logprob

from qpsft import cli
from qpsft.doctor import checks, report
from qpsft.doctor.checks import CHECKS, HEAD_SIZES, TESTED, Finding
from qpsft.errors import BaseModelError
from qpsft.model import environment
from qpsft.model.hardware import hardware_for

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def on_a_card(monkeypatch):
    """Checks believe that the device is an RTX 4090."""
    monkeypatch.setattr(checks, "_device", lambda: CUDA)
    monkeypatch.setattr("qpsft.model.hardware.hardware_of", lambda device: hardware_for("cuda", (8, 9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_this_machine_line_by_line(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == "This machine can train."
    marked = [line for line in lines if line[:1] in report.MARKS.values()]
    assert len(marked) == len(CHECKS) == 13 and not any(line.startswith("✗") for line in marked)
    for name in ("Python ", "torch ", "GPU ", "bitsandbytes ", "Triton ", "attention ", "disk ", "llama.cpp "):
        assert sum(line[2:].startswith(name) for line in marked) == 1


def test_json_for_bug_reports(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["can_train"] is True and told["qpsft"] and told["platform"]
    for check in told["checks"]:
        assert check.keys() == {"name", "status", "seen", "cure"} and check["status"] in report.MARKS
        assert bool(check["cure"]) is (check["status"] != "ok") and check["seen"]


def test_an_idle_gpu_ends_with_exit_code_1_and_the_cure(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "nvidia_driver", lambda: "580.82")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "✗ torch " in said and "whl/cu130" in said and said.endswith("Training could not work here: see torch.\n")


def test_a_check_that_breaks_down_has_failed(capsys):
    def a_check():
        raise ValueError("what nobody\nexpected")

    def another():
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    found = report.examine([checks.python, a_check, another])
    assert [one.status for one in found] == ["ok", "fail", "fail"] and not report.can_train(found)
    assert found[1].seen == "ValueError: what nobody expected" and "--json" in found[1].cure
    assert found[2].cure == "`pip install trl`."
    assert "see a check, another." in report.render(found)


# ---- packages ----


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert {name: re.search(rf"^{name}==(\S+)$", pinned, flags=re.M)[1] for name in TESTED} == TESTED


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({}, "ok", "as tested: torch"),
        ({"torch": "2.13.0+cu130"}, "ok", "as tested"),
        ({"torch": "2.9.1+cu128"}, "warn", "torch is 2.9.1+cu128, tested is 2.13.0"),
        ({"trl": "1.2.0"}, "fail", "trl is 1.2.0, needed is <2,>=1.16"),
        ({"peft": None}, "fail", "peft is not installed"),
    ],
)
def test_versions(monkeypatch, installed, status, said):
    real = importlib.metadata.version

    def version(name):
        if name in installed and installed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or TESTED.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = checks.versions()
    assert found.status == status and said in found.seen


def test_torchvision(monkeypatch):
    monkeypatch.setattr(environment, "broken_torchvision", lambda: BaseModelError("It does not import.", "Remove it."))
    assert checks.torchvision() == Finding("torchvision", "fail", "It does not import.", "Remove it.")


# ---- the GPU ----


def test_a_card_and_a_card_that_torch_has_no_kernels_for(on_a_card, monkeypatch):
    assert checks.gpu() == Finding("GPU", "ok", "NVIDIA GeForce RTX 4090 (sm_89), computes in bfloat16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checks.gpu().seen.endswith("one of 2, the others by torchrun")

    def too_old(device):
        raise BaseModelError("torch was built for newer ones.", "Use the CPU.")

    monkeypatch.setattr("qpsft.model.hardware.hardware_of", too_old)
    assert checks.gpu() == Finding("GPU", "fail", "torch was built for newer ones.", "Use the CPU.")


def test_bitsandbytes_forward_and_backward_are_compared(monkeypatch):
    assert checks.bitsandbytes().status == "ok"
    forward = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: forward(self, x).detach() + 0 * forward(self, x))
    wrong_gradient = checks.bitsandbytes()
    assert wrong_gradient.status == "fail" and "are wrong, by 1 of the largest value" in wrong_gradient.seen
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: forward(self, x) + 0.5)
    assert checks.bitsandbytes().status == "fail"
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: forward(self, x) * float("nan"))
    assert checks.bitsandbytes().status == "fail"


def test_triton(on_a_card, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", False)
    assert checks.triton().status == "warn" and checks.triton().seen == "not installed"
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    monkeypatch.setattr(environment, "triton_problem", lambda device: "Failed to find C compiler.")
    assert checks.triton().status == "warn" and "python3-dev" in checks.triton().cure
    monkeypatch.setattr(environment, "triton_problem", lambda device: None)
    assert checks.triton().status == "ok"


def test_attention_kernels_by_head_size(on_a_card, monkeypatch):
    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kwargs: empty(*shape, **kwargs))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda asked: asked.query.shape[-1] <= 128)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda asked: True)
    assert HEAD_SIZES == (64, 96, 128, 256)
    found = checks.attention()
    assert found.status == "ok"
    assert found.seen == "head size 64, 96, 128: flash attention; head size 256: memory-efficient"
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda asked: False)
    assert checks.attention().status == "warn" and "head size 256: plain products" in checks.attention().seen


# ---- memory, disk and the world outside ----


def test_little_memory(monkeypatch):
    assert checks.memory().status == "ok"
    monkeypatch.setattr("qpsft.model.hardware.free_device_bytes", lambda device: 2**30)
    found = checks.memory()
    assert found.status == "warn" and found.seen.startswith("1.0 GiB free on the GPU")


def test_little_disk_and_caches_of_somebody_else(monkeypatch, tmp_path):
    assert checks.disk().status == checks.caches().status == "ok"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**29}))
    assert checks.disk().status == "warn"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(checks.os, "access", lambda path, mode: path != tmp_path)
    found = checks.caches()
    assert (found.status, found.cure) == ("fail", "Set TRITON_CACHE_DIR to a folder of yours.")


def test_the_hub(monkeypatch):
    assert checks.hub() == Finding("Hub", "ok", "not asked: HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def answer(error):
        def urlopen(request, timeout):
            assert request.method == "HEAD" and timeout <= 10
            raise error

        monkeypatch.setattr(checks.urllib.request, "urlopen", urlopen)
        return checks.hub()

    assert answer(urllib.error.HTTPError("url", 405, "not allowed", None, None)).status == "ok"
    found = answer(urllib.error.URLError("Name or service not known"))
    assert found.status == "warn" and "Name or service not known" in found.seen and "HF_HUB_OFFLINE=1" in found.cure


def test_llama_cpp(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.llama_cpp().status == "warn"
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr(checks.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.10")
    assert checks.llama_cpp().seen == "xllamacpp 2026.10"
