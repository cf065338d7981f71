"""Fixtures shared by the tests: the real data and model of ../shared, and small 4-bit models on the CPU."""

import functools
import gc
import signal
from importlib import metadata
from pathlib import Path

import jinja2
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import imports
from small_runs import make_base

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish(session):
    """What is loaded by now stays: the garbage collections of every run need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrix products of these sizes are faster, and the same from run to run, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Processes that tests start and interrupt must see it: a shell's background jobs begin with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_plots():
    """To draw a run's plot takes as long as a run of four steps; `test_run.py` draws one all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpsft.train.outputs.draw_training", lambda lines, path, title: path.touch())
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_are_looked_up_once():
    """accelerate parses a package's metadata whenever it asks whether it is there: dozens of times for a trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        yield


@pytest.fixture(scope="session", autouse=True)
def cards_are_compiled_once():
    """PEFT and TRL write a model card into every checkpoint and compile its template anew: a third of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        patch.setattr("trl.trainer.utils.version", functools.cache(metadata.version))
        yield


@pytest.fixture(autouse=True)
def mixed_precision_is_global_state():
    """What `small_runs.in_float16` sets is undone."""
    yield
    if AcceleratorState._shared_state:
        AcceleratorState._shared_state["_mixed_precision"] = "no"


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here: ../shared lies beside the project on its own machines only")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of `small_runs.make_base`; tests read it and write nothing into it."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained Llama of 260K parameters, without a chat template."""
    return shared_path("models/stories260K")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K's folder: train.jsonl and test.jsonl with `question` and `answer`."""
    return shared_path("data/gsm8k")
