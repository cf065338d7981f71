"""One run of a comparison: what identifies it, how it is done, and the result that is kept of it.

A result's folder is named by a hash of everything that decides it: the base's weights, the rows of all sets, the
options of training, the adapter and the measurement, the seed. So arms that ask for the same run share it, adding an
arm or a seed reuses the others, and a run that was cut off leaves no result and is done again from its start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from qpsft.compare.arms import METHOD_OPTIONS
from qpsft.compare.data import ComparedData
from qpsft.compare.measure import EpochEvaluation, Measurement, measure, rounded
from qpsft.data.mix import mixed
from qpsft.errors import DivergedError, OutputError
from qpsft.files import digest, write_atomically
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import parameter_count
from qpsft.model.fingerprint import weights_sha256
from qpsft.model.folder import resolve_folder
from qpsft.psft.checkpoint import rows_sha256
from qpsft.psft.config import PSFTConfig
from qpsft.psft.schedule import planned_steps
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import LoraArguments, ModelArguments
from qpsft.recipe.file import Recipe
from qpsft.recipe.trainer_options import COMMON_TRAINER_OPTIONS
from qpsft.train import run as runs
from qpsft.train.model_card import package_versions
from qpsft.train.progress import ConsoleCallback, read_metrics

RESULT = "result.json"
FORMAT = 1
"""Goes up when the same options give another run than before, so that older results are not reused."""
NOT_DECISIVE = frozenset(
    {"output_dir", "save_strategy", "save_steps", "save_total_limit", "report_to", "logging_steps", "learning_rate"}
    | {"seed", "num_train_epochs", "disable_tqdm", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"}
    | {"load_best_model_at_end", "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size"}
)
"""Options that a comparison sets itself, or that do not change what is learned."""
LOGGED = ("nll", "entropy", "clip_fraction", "approx_kl", "ratio_max", "grad_norm", "mean_token_accuracy")
LOG_LINES = 32
SMALL_BASE = 20e6
"""Parameters; matrix products of smaller models are faster on one thread."""
BASE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class Setting:
    """What the runs on one data set share.

    Attributes:
        options: `decisive_options` of the recipe.
        base_key: hash of the base's weights.
        measurement: what is measured, and how.
        replay: tokenized rows for arms with `replay_share`.
    """

    model: ModelArguments
    lora: LoraArguments
    options: dict[str, Any]
    logging_steps: float
    base_key: str
    data: ComparedData
    measurement: Measurement
    replay: datasets.Dataset | None = None

    @property
    def rounded_key(self) -> str:
        """Hash of the base as it is loaded: of its weights and of how they are rounded."""
        model = self.model
        text = json.dumps([self.base_key, model.quantization, model.double_quant, model.dtype])
        return digest(text)[:16]


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        method: options of PSFTConfig that make the arm; empty for the base itself, which is only measured.
        learning_rate, seed, epochs: of PSFTConfig.
    """

    method: dict[str, Any] = field(hash=False)
    learning_rate: float = 0.0
    seed: int = 0
    epochs: float = 0.0

    @property
    def label(self) -> str:
        """For people: method, learning rate and seed."""
        if not self.method:
            return "base"
        kind = self.method["loss_type"]
        if self.method.get("num_iterations", 1) > 1:
            kind += f"-{self.method['num_iterations']}visits"
        kind += "-kl" if "base_kl" in self.method else "-replay" if "replay_share" in self.method else ""
        return f"{kind}-lr{short_rate(self.learning_rate)}-seed{self.seed}"

    def identity(self, setting: Setting) -> dict[str, Any]:
        """Everything that decides the result, ready for JSON."""
        measurement = dataclasses.asdict(setting.measurement)
        written = {name: measurement["arguments"][name] for name in ("use_chat_template", "prompt_format")}
        model, lora = dataclasses.asdict(setting.model), dataclasses.asdict(setting.lora)
        del lora["adapter_name_or_path"]  # which a comparison refuses
        training = {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "epochs": self.epochs,
            "options": setting.options,
            "lora": lora,
        }
        if "replay_share" in self.method:
            training["replay"] = rows_sha256(setting.replay)
        return {
            "format": FORMAT,
            "base": setting.base_key,
            "model": {name: model[name] for name in ("quantization", "double_quant", "dtype", "attn_implementation")},
            "data": setting.data.key,
            "metric": setting.data.metric,
            "measurement": measurement | {"arguments": written},
            **(training if self.method else {}),
        }

    def key(self, setting: Setting) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity(setting), sort_keys=True)
        return digest(text)[:12]

    def folder(self, setting: Setting, results: Path) -> Path:
        """Where its result is kept."""
        return results / f"{self.label}-{self.key(setting)}"


def short_rate(rate: float) -> str:
    """0.002 as 2e-3."""
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def decisive_options(recipe: Recipe) -> dict[str, Any]:
    """The trainer's options that decide what is learned: the common ones and those given, the arms' aside."""
    names = (set(COMMON_TRAINER_OPTIONS) | set(recipe.given)) - NOT_DECISIVE - METHOD_OPTIONS
    fields = {option.name for option in dataclasses.fields(PSFTConfig)}
    values = {name: getattr(recipe.trainer, name) for name in sorted(names & fields)}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}


def base_key(name: str, revision: str | None = None) -> str:
    """Hash of a base: its configuration, generation settings and tokenizer, and a sample of its weights."""
    folder = resolve_folder(name, revision=revision)
    return digest(*_decisive_bytes(folder), weights_sha256(folder))[:16]


def _decisive_bytes(folder: Path) -> Iterator[str | bytes]:
    for path in sorted(path for path in folder.iterdir() if path.name in BASE_FILES):
        yield f"{path.name} {path.stat().st_size}"
        yield path.read_bytes()


def read_result(spec: RunSpec, setting: Setting, results: Path) -> dict[str, Any] | None:
    """The kept result of a run, or None if there is none that is complete."""
    path = spec.folder(setting, results) / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.", "Choose another --results_dir.") from None


def do_run(spec: RunSpec, setting: Setting, results: Path) -> dict[str, Any]:
    """Trains and measures one run and keeps its result.

    Returns:
        `identity`, `label`, `points` (`epoch`, `step`, `metrics`), `log` (lines of training), `completions` of the last
        point, `seconds` (`training`, `evaluation`), `versions` and `machine`. Of a run that diverged also `diverged`
        (`step`, `error`); its `points` end there.

    Raises:
        QpsftError: as training and evaluating do, but for DivergedError: the next attempt would diverge too.
    """
    folder = spec.folder(setting, results)
    started = time.perf_counter()
    model, tokenizer = load_setting(setting)
    with fitting_threads(model):
        if spec.method:
            outcome = _train(spec, setting, model, tokenizer, folder / "training")
        else:
            # with an adapter that is still zero, so that drift is measured as for the arms
            point = measure(add_adapter(model, setting.lora), tokenizer, setting.data, setting.measurement)
            outcome = {
                "points": [{"epoch": 0.0, "step": 0, "metrics": point["metrics"]}],
                "log": [],
                "completions": point["completions"],
                "seconds": {"training": 0.0, "evaluation": round(time.perf_counter() - started, 1)},
            }
    result = {
        "label": spec.label,
        "identity": spec.identity(setting),
        **outcome,
        "versions": versions(),
        "machine": machine_of(model),
    }
    keep_result(result, folder)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return result


def keep_result(result: dict[str, Any], folder: Path) -> None:
    """Writes a result into a run's folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULT, json.dumps(result, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **package_versions()}


def machine_of(model: Any) -> str:
    """The device that a model computes on, in words."""
    return torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def load_setting(setting: Setting) -> tuple[Any, Any]:
    """The base and its tokenizer."""
    return load_base(
        setting.model.model_name_or_path,
        quantization=setting.model.quantization,
        double_quant=setting.model.double_quant,
        dtype=setting.model.dtype,
        device="cpu" if setting.options["use_cpu"] else "auto",
        revision=setting.model.model_revision,
        attn_implementation=setting.model.attn_implementation,
        trust_remote_code=setting.options["trust_remote_code"],
        verbose=False,
    )


def make_run_trainer(spec: RunSpec, setting: Setting, model: Any, tokenizer: Any, folder: Path) -> PSFTTrainer:
    """The trainer of a run, on a base as `load_setting` returns it; `folder` is emptied."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    folder.mkdir(parents=True)
    options = {name: value for name, value in {**setting.options, **spec.method}.items() if name != "replay_share"}
    arguments = PSFTConfig(
        output_dir=str(folder),
        **options,
        learning_rate=spec.learning_rate,
        seed=spec.seed,
        num_train_epochs=spec.epochs,
        logging_steps=setting.logging_steps,
        save_strategy="no",
        report_to=[],
    )
    rows = setting.data.train
    if (share := spec.method.get("replay_share")) is not None:
        size = arguments.train_batch_size * arguments.gradient_accumulation_steps
        arguments.max_steps = planned_steps(arguments, rows, size)  # an epoch of the mix would be longer
        rows = mixed([(rows, None), (setting.replay, share)])
    torch.manual_seed(spec.seed)
    trainer = runs.make_trainer(add_adapter(model, setting.lora), tokenizer, arguments, rows, folder)
    trainer.remove_callback(ConsoleCallback)
    return trainer


def _train(spec: RunSpec, setting: Setting, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    trainer = make_run_trainer(spec, setting, model, tokenizer, folder)
    watch = EpochEvaluation(tokenizer, setting.data, setting.measurement, spec.label)
    trainer.add_callback(watch)
    diverged = {}
    started = time.perf_counter()
    try:
        trainer.train()
    except DivergedError as error:
        diverged["diverged"] = {"step": error.step, "error": error.what}
    seconds = time.perf_counter() - started - watch.seconds
    return diverged | {
        "points": watch.points,
        "log": _thinned([line for line in read_metrics(folder / runs.METRICS) if "nll" in line]),
        "completions": watch.completions,
        "seconds": {"training": round(seconds, 1), "evaluation": round(watch.seconds, 1)},
    }


def _thinned(lines: list[dict]) -> list[dict]:
    """At most `LOG_LINES` log lines, evenly spaced, the last among them."""
    stride = -(-len(lines) // LOG_LINES)
    kept = lines[::-1][::stride][::-1] if lines else []
    return [{"step": line["step"], **{name: rounded(line[name]) for name in LOGGED if name in line}} for line in kept]


@contextlib.contextmanager
def fitting_threads(model: Any) -> Iterator[None]:
    """One thread for a small model on the CPU, whose matrix products are slower on several."""
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and parameter_count(model) < SMALL_BASE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
