"""`report_to`: every logger gets every number of a log line, and one that is not installed is named."""

import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest
from small_runs import log_lines, make_trainer

from qpsft import cli
from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig

STEPS = 4
METRICS = (
    "loss", "nll", "entropy", "clip_fraction", "approx_kl", "ratio_max", "grad_norm", "mean_token_accuracy",
    "tokens_per_second",
)  # fmt: skip


def train(base, folder, logger: str) -> list[dict]:
    """A short run; its own record of what was logged at each step."""
    trainer = make_trainer(base, folder, max_steps=STEPS, report_to=[logger])
    trainer.train()
    return log_lines(trainer)


def assert_all_there(logged: dict[int, dict[str, float]], lines: list[dict]) -> None:
    """`logged`: step -> metric -> value, as the logger has it."""
    assert [line["step"] for line in lines] == sorted(logged) == list(range(1, STEPS + 1))
    for line in lines:
        for metric in METRICS:
            value = logged[line["step"]][f"train/{metric}"]
            assert math.isfinite(value) and value == pytest.approx(line[metric], rel=1e-6), metric


def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra test)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(base, tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    logged: dict[int, dict[str, float]] = {step: {} for step in range(1, STEPS + 1)}
    for metric in METRICS:
        for event in events.Scalars(f"train/{metric}"):
            logged[event.step][f"train/{metric}"] = event.value
    assert_all_there(logged, lines)


class Settings(dict):
    def update(self, values, allow_val_change):
        super().update(values)


class Recorded(types.ModuleType):
    """A logger's module as far as transformers' callback for it goes: what is logged is kept in `lines`."""

    __version__ = "0.43.0"

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.lines: list[dict] = []
        self.config = Settings()
        self.run = None
        self.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.run = types.SimpleNamespace(summary={}, _label=lambda code: None)

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        pass


@pytest.fixture
def recorded(monkeypatch):
    def install(name: str) -> Recorded:
        module = Recorded(name)
        errors = types.ModuleType(f"{name}.sdk.lib.config_util")
        errors.ConfigError = KeyError
        for inner in (module, types.ModuleType(f"{name}.sdk"), types.ModuleType(f"{name}.sdk.lib"), errors):
            monkeypatch.setitem(sys.modules, inner.__name__, inner)
        return module

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_transformers_hands_to(base, tmp_path, recorded, name):
    """The library stands in by a module that keeps what it is told; the callback is transformers' own."""
    module = recorded(name)
    lines = train(base, tmp_path, name)
    assert_all_there({line["train/global_step"]: line for line in module.lines if "train/loss" in line}, lines)
    assert module.config["reference_steps"] == 3 and module.config["loss_type"] == "psft"


def test_wandb_offline(base, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        lines = train(base, tmp_path / "run", "wandb")
        last = dict(wandb.run.summary)
    finally:
        wandb.finish()
    for metric in METRICS:
        assert last[f"train/{metric}"] == pytest.approx(lines[-1][metric], rel=1e-6), metric
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_on_this_machine(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    lines = train(base, tmp_path / "run", "trackio")
    (run,) = SQLiteStorage.get_runs("huggingface")
    logged = SQLiteStorage.get_logs("huggingface", run)
    assert_all_there({line["train/global_step"]: line for line in logged if "train/loss" in line}, lines)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow", "comet_ml"])
def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    others = [one for one in ("tensorboard", "wandb", "trackio", "mlflow") if one != name]
    monkeypatch.setattr("qpsft.psft.config.get_available_reporting_integrations", lambda: others)
    with pytest.raises(RecipeError, match=f"report_to {name}: that logger is not installed") as caught:
        PSFTConfig(str(tmp_path), report_to=[others[0], name])
    assert f"pip install {name.replace('_', '-')}" in caught.value.todo
    PSFTConfig(str(tmp_path), report_to=others[0])


def test_from_the_command_line(tmp_path, capsys):
    if importlib.util.find_spec("clearml"):
        pytest.skip("clearml is installed")
    assert cli.main(["train", "--model_name_or_path=demo", "--report_to=clearml", f"--output_dir={tmp_path}"]) == 2
    assert "pip install clearml" in " ".join(capsys.readouterr().err.split())
