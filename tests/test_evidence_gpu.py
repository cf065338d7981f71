"""benchmarks/evidence_gpu.py at toy size, the pretraining behind it, and runs that must end in time."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import embedded_base as pretrain
import pytest
import torch
from comparing import FakeRuns, write_recipe
from transformers import AutoTokenizer

from qpsft.compare import queue as run_queue
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.options import load_comparison
from qpsft.compare.queue import RunQueue, TimeUp
from qpsft.compare.run import RunSpec
from qpsft.errors import OutputError
from qpsft.model.folder import MODEL_DIR

pytestmark = pytest.mark.bench

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def evidence_gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import evidence_gpu

        yield evidence_gpu
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


# ---- the whole pipeline ----


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_whole_pipeline_stops_in_time_goes_on_and_does_nothing_twice(
    device, evidence_gpu, tmp_path, monkeypatch, capsys
):
    flags = ["--tiny", f"--device={device}", "--seeds=1", "--jobs=1", "--workers=0", f"--output={tmp_path}"]
    assert evidence_gpu.main([*flags, "--minutes=0"]) == 0
    assert "repeat the command" in capsys.readouterr().out
    assert torch.load(tmp_path / ".base.partial" / "state.pt")["step"] == 5 and not (tmp_path / "base").exists()

    done = []
    monkeypatch.setattr(run_queue, "do_run", counted(run_queue.do_run, done))
    assert evidence_gpu.main(flags) == 0
    labels = [spec.label.partition("-lr")[0] for spec in done]
    assert labels == ["base", "nll", "dft", "psft", "psft-4visits"]  # sft_matched has sft's rate: its run
    record = json.loads((tmp_path / "evidence_gpu.json").read_text())
    assert {"device", "driver", "versions", "command", "date", "seconds"} <= record.keys()
    assert "--tiny" in record["command"] and record["versions"]["torch"] == torch.__version__
    large = record["scales"][-1]
    assert list(large["arms"]) == ["sft", "sft_matched", "dft", "psft", "psft_visits"]
    assert large["parameters"] == 384 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64  # tied embeddings, one layer
    assert large["rows"]["train"] == 16 and record["seeds"] == 1
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert large["arms"]["psft"]["in_domain"] == report["arms"]["psft"]["last_epoch"]["in_domain"]
    assert (tmp_path / "report.html").is_file() and "psft_visits" in (tmp_path / "summary.txt").read_text()

    assert evidence_gpu.main(flags) == 0
    assert len(done) == len(labels)


def counted(function, calls):
    def inner(spec, *more):
        calls.append(spec)
        return function(spec, *more)

    return inner


def test_without_a_cuda_device_it_says_what_works(evidence_gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evidence_gpu.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().out


def test_both_scales_stand_in_one_table(evidence_gpu):
    def scale(parameters, value, half_width):
        matched = {"mean": 0.2, "half_width": half_width, "in_domain": value}
        one = {"treatment": "psft", "control": "sft", "same_runs": False, "matched_in_domain": matched}
        found = {"learning_rate": 1e-3, "in_domain": {"mean": value, "sd": 0.125, "n": 5}, "out_of_domain": None}
        base = {"in_domain": 0.0, "out_of_domain": 0.9}
        return {"parameters": parameters, "base": base, "arms": {"sft": found}, "differences": [one]}

    text = evidence_gpu.render([scale(541_568, 0.5, 0.1), scale(36_000_000, 0.75, None)])
    assert "0.54 M  sft   0.001      5  .500 ± .125" in text and "36 M    sft   0.001      5  .750 ± .125" in text
    assert "psft − sft: +0.200 ± .100 at .500" in text and "psft − sft: +0.200 at .750" in text


# ---- pretraining ----


def first_batches(tokenizer, count, **settings):
    data = pretrain.batches(tokenizer, 4, seed=3, **settings)
    found = [(ids.tolist(), weights.tolist()) for ids, weights in islice(data, count)]
    data.close()
    return found


def test_worker_processes_make_the_same_batches_in_the_same_order(tokenizer, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS_AT_A_TIME", 3)
    alone = first_batches(tokenizer, 8)
    # threads, which see the smaller chunk; what a process gets and gives is pickled in the test below
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    assert first_batches(tokenizer, 8, workers=2) == alone
    assert len({json.dumps(batch) for batch in alone}) == 8


@pytest.mark.slow
def test_a_real_worker_process_makes_them_too(tokenizer):
    assert first_batches(tokenizer, 3, workers=1) == first_batches(tokenizer, 3)


def options(folder, **changes):
    flags = {"output": folder / "base", "steps": 6, "qat_steps": 4, "hidden": 64, "layers": 1, "batch_size": 4}
    flags |= {"save_every": 2, "rows": 0, "tokenizer": MODEL_DIR} | changes
    return pretrain.parser().parse_args([f"--{name}={value}" for name, value in flags.items()])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 3, 4])
def test_pretraining_goes_on_to_the_same_bytes(tmp_path, monkeypatch, saves):
    monkeypatch.setattr(pretrain, "ROWS_AT_A_TIME", 4)
    pretrain.make(options(tmp_path / "whole"))
    left = [saves]

    def stop():
        left[0] -= 1
        if not left[0]:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain.make(options(tmp_path / "cut"), stop)
    assert not (tmp_path / "cut" / "base").exists()
    with pytest.raises(OutputError, match="other options"):
        pretrain.make(options(tmp_path / "cut", seed=1))
    pretrain.make(options(tmp_path / "cut"))
    whole, cut = (tmp_path / name / "base" for name in ("whole", "cut"))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in cut.iterdir())


def test_both_stretches_learn(tokenizer, capsys):
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, 64, 1)
    data = pretrain.batches(tokenizer, 16, seed=0)
    ids, weights = next(pretrain.batches(tokenizer, 16, seed=1))
    seen = []
    for label, quantize in (("dense", False), ("rounded", True)):
        pretrain.train(model, data, pretrain.Stretch(label, 40, 8e-3, quantize, warmup=5))
        with torch.no_grad():
            seen.append(pretrain.losses(model, ids, weights)[1].item())
    assert 5.9 > seen[0] > seen[1] and seen[0] < 3.5  # log(384) = 5.95 nats to begin with
    assert "rounded step 40/40 loss" in capsys.readouterr().out


# ---- runs that must end in time ----


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Makes a RunQueue whose runs take ten seconds each on a clock of its own; `queue.runs` has those done."""
    clock = [100.0]
    recipe, compared = load_comparison(write_recipe(tmp_path), [])
    setting = make_setting(recipe, compared, prepare(recipe, tmp_path / "out"))
    fake = FakeRuns(lambda spec: ([(0.5, 0.5)], 0.5))

    def run(*arguments):
        clock[0] += 10.0
        return fake(*arguments)

    monkeypatch.setattr(run_queue, "do_run", run)
    monkeypatch.setattr(
        run_queue, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0], sleep=time.sleep)
    )
    monkeypatch.setattr(run_queue, "ProcessPoolExecutor", lambda jobs, context, start: ThreadPoolExecutor(jobs))

    def make(jobs, seconds, run_seconds=0.0):
        found = RunQueue(setting, tmp_path / "results", jobs, clock[0] + seconds, run_seconds)
        found.expect(9)
        return found

    make.runs = fake.specs
    return make


SPECS = [RunSpec({"loss_type": "nll"}, 1e-3, seed, 1.0) for seed in range(5)]


def test_no_run_is_begun_that_would_not_be_done_in_time(queue):
    with queue(1, 35.0) as runs:
        with pytest.raises(TimeUp):
            runs.do(SPECS)
    assert queue.runs == SPECS[:3]  # after 30 s a fourth would end at 40
    with queue(1, 1000.0) as runs:
        assert list(runs.do(SPECS)) == SPECS and runs.reused == 3
    assert queue.runs == SPECS


def test_several_at_a_time_are_all_kept_when_time_is_up(queue):
    with queue(2, 25.0) as runs:
        with pytest.raises(TimeUp):
            runs.do(SPECS)
    begun = len(queue.runs)
    assert 2 <= begun < 5
    with queue(2, 1000.0) as runs:
        assert set(runs.do(SPECS)) == set(SPECS) and runs.reused == begun
    assert len(queue.runs) == 5


@pytest.mark.parametrize("jobs", [1, 4])
def test_before_the_first_run_is_done_the_callers_estimate_counts(queue, jobs):
    with queue(jobs, 39.0, run_seconds=40.0) as runs, pytest.raises(TimeUp):
        runs.do(SPECS)
    assert not queue.runs
    with queue(1, 41.0, run_seconds=40.0) as runs, pytest.raises(TimeUp):
        runs.do(SPECS)
    assert len(queue.runs) == 4  # the first took ten seconds, so the fourth, begun after 30, is done in time


@pytest.mark.parametrize("jobs", [1, 4])
def test_before_the_first_run_is_done_kept_ones_say_how_long_it_takes(queue, jobs):
    with queue(1, 1000.0) as runs:
        runs.do(SPECS[:1])  # it says that it took two seconds
    expected = 2.0 + run_queue.STARTING
    with queue(jobs, expected - 1, run_seconds=500.0) as runs, pytest.raises(TimeUp):
        runs.do(SPECS)
    assert len(queue.runs) == 1
    with queue(1, expected + 1, run_seconds=500.0) as runs, pytest.raises(TimeUp):
        runs.do(SPECS)
    assert len(queue.runs) > 1


def test_when_time_is_up_before_the_first_run_none_is_begun(queue):
    for jobs in (1, 2):
        with queue(jobs, -1.0) as runs, pytest.raises(TimeUp):
            runs.do(SPECS)
    assert not queue.runs
