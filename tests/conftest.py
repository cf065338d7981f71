"""Fixtures shared by the tests: the real data and model of ../shared, and small 4-bit models on the CPU."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrix products of these sizes are faster, and the same from run to run, on one thread."""
    torch.set_num_threads(1)


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here: ../shared lies beside the project on its own machines only")
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained Llama of 260K parameters, without a chat template."""
    return shared_path("models/stories260K")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K's folder: train.jsonl and test.jsonl with `question` and `answer`."""
    return shared_path("data/gsm8k")
