"""The evidence on a real instruct model: what fine-tuning costs SmolLM2-135M-Instruct, and what keeps it.

    python ../shared/models/smollm2.py                     the model, once
    python benchmarks/evidence_real.py --jobs 2            the whole study; repeat it to go on where it stopped
    python benchmarks/evidence_real.py --quick --jobs 2    a look, in about ten minutes on two free cores
    python benchmarks/evidence_real.py --small --jobs 2    noisy SVAMP at one rate, for a CPU: 10 to 17 core minutes
    python benchmarks/evidence_real.py --table             the table and the plot of what is done (with the same flags)

For each part (what is learnt) and each arm (method): every learning rate with one seed, then the rate that validation
rows chose with more seeds. Training is `qpsft.train.run.train` on a recipe, the base in NF4; every run is one JSON file
in `results/evidence_real/runs`, named by a hash of all that decides it, so a study that was cut off goes on. Measured
are what was learnt and what was kept: evidence_real_parts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpsft.errors import DivergedError, QpsftError, RecipeError, did_you_mean
from qpsft.files import digest, write_atomically
from qpsft.recipe.methods import REFERENCE_STEPS, REPLAY_SHARE, VISITS
from qpsft.terminal import fill, quiet_libraries, quiet_worker

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "evidence_real"
MODEL = Path.home() / ".cache" / "qpsft-models" / "SmolLM2-135M-Instruct"
PARTS = ("svamp", "svamp_noisy", "gsm8k")
RATES = (1e-4, 2e-4, 5e-4, 1e-3)
ROWS_A_STEP = 16
MICRO_BATCH = {"svamp": 16, "svamp_noisy": 16, "gsm8k": 8}
"""Rows; large ones, because on the CPU every micro-batch unpacks the 4-bit weights again."""
LOGGED = ("nll", "entropy", "clip_fraction", "approx_kl", "grad_norm")
FORMAT = 1
"""Goes up when the same settings give other numbers than before."""


@dataclass(frozen=True)
class Arm:
    """What a run is told beside the rate: options of a recipe, and the arm whose rate it takes, if not its own."""

    options: dict[str, Any] = field(hash=False)
    rate_of: str | None = None


METHOD_ARMS = ("sft", "sft_kl", "asft", "dft", "eaft", "stm", "trsft", "psft", "psft_visits", "psft_kl")
BLOCKS = {"block_order": True, "num_iterations": VISITS, "sft_warmup_steps": REFERENCE_STEPS}
STUDIED = {name: Arm({"method": name}) for name in METHOD_ARMS} | {
    "sft_replay": Arm({"method": "sft", "replay_share": REPLAY_SHARE}),
    "psft_replay": Arm({"method": "psft_replay"}),
    "sft_matched": Arm({"method": "sft"}, rate_of="psft"),  # the controls: they differ from PSFT in the loss alone
    "sft_blocks": Arm({"method": "sft"} | BLOCKS, rate_of="psft_visits"),
}
TRUST_REGIONS = {
    "psft_k64": Arm({"method": "psft", "reference_steps": 64}),  # in `--small` one block: the base is the reference
    "psft_eps0.1": Arm({"method": "psft", "epsilon": 0.1}),
}
"""How narrow PSFT's clip has to be to keep something; only in a study that names them."""
ARMS = STUDIED | TRUST_REGIONS
CONTROLS = {"psft": "sft_matched", "psft_visits": "sft_blocks"}
SEEDED = ("sft", "sft_kl", "psft", "psft_visits", "stm", "sft_replay", "psft_replay", "sft_matched", "sft_blocks")
"""The arms that get more seeds than one, beside those that led."""


@dataclass(frozen=True)
class Run:
    """One run; without an arm the base, which is only measured."""

    part: str
    arm: str | None = None
    rate: float = 0.0
    seed: int = 0

    @property
    def label(self) -> str:
        """Of arms with the same options the first one's: they are the same run."""
        if self.arm is None:
            return f"{self.part}-base"
        first = next(name for name, arm in ARMS.items() if arm.options == ARMS[self.arm].options)
        return f"{self.part}-{first}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Attributes:
        data: the folder with `svamp`, `gsm8k`, `ifeval`, …
        rows: part -> rows to train on, to validate and to test on.
        measured: sizes of what is kept: `evidence_real_parts.Sizes`.
        every_epoch: measure IFEval and the multiple-choice tasks after each of `epochs`, not at the end alone.
    """

    model: str
    data: str
    output: str
    device: str
    dtype: str
    epochs: tuple[int, ...]
    rows: dict[str, tuple[int, int, int]] = field(hash=False)
    measured: dict[str, int] = field(hash=False)
    every_epoch: bool
    command: tuple[str, ...]

    def path(self, run: Run) -> Path:
        """Where a run's record is kept."""
        return Path(self.output) / "runs" / f"{run.label}-{digest(json.dumps(self.identity(run)))[:10]}.json"

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that decides a run's numbers but the libraries."""
        training = {"options": ARMS[run.arm].options, "rate": run.rate, "seed": run.seed} if run.arm else None
        model = (Path(self.model) / "config.json").read_text(encoding="utf-8")
        return {
            "format": FORMAT,
            "model": digest(model),
            **{name: getattr(self, name) for name in ("device", "dtype", "epochs", "measured", "every_epoch")},
            "part": run.part,
            "rows": self.rows[run.part],
            "training": training,
        }

    @property
    def answers(self) -> Path:
        """The base's own answers, sampled once."""
        model = (Path(self.model) / "config.json").read_text(encoding="utf-8")
        sizes = {name: self.measured[name] for name in ("answers", "answer_tokens")}
        key = digest(json.dumps([model, self.device, self.dtype, sizes]))[:10]
        return Path(self.output) / f"answers-{key}.json"

    def read(self, run: Run) -> dict[str, Any] | None:
        path = self.path(run)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- one run ----


def do_run(study: Study, run: Run) -> dict[str, Any]:
    """Trains and measures, and keeps the record: `points` (epoch, step, metrics), `log`, `seconds`, `environment`."""
    from machine import environment

    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = _train(study, run) if run.arm else {"points": [_measure_base(study, run)]}
    record = {
        "label": run.label,
        "identity": study.identity(run),
        **outcome,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(study.device, study.command),
    }
    write_atomically(study.path(run), json.dumps(record, indent=1) + "\n")
    return record


def _measure_base(study: Study, run: Run) -> dict[str, Any]:
    from evidence_real_parts import dense

    from qpsft.model.base import load_base

    model, tokenizer = load_base(study.model, dtype=study.dtype, device=study.device, verbose=False)
    with dense(model):
        return _base_point(study, run, model, tokenizer)


def _base_point(study: Study, run: Run, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The base as a point of its own; its answers are sampled before the first."""
    from evidence_real_parts import Sizes, sample_answers

    data, sizes = Path(study.data), Sizes(**study.measured)
    if not study.answers.is_file():
        sample_answers(model, tokenizer, data, sizes, study.answers)
    return {"epoch": 0, "step": 0, "metrics": measure_model(study, run.part, model, tokenizer, is_last=True)}


def measure_model(study: Study, part_name: str, model: Any, tokenizer: Any, *, is_last: bool) -> dict[str, float]:
    """What was learnt and what was kept; at the end also of the validation rows."""
    import evidence_real_parts as parts

    data, sizes = Path(study.data), parts.Sizes(**study.measured)
    part = parts.load_part(part_name, data, study.rows[part_name])
    answers = is_last or part.by == "accuracy"
    sets = {"test": part.test} | ({"validation": part.validation} if is_last else {})
    metrics = {}
    for name, rows in sets.items():
        measured = parts.in_domain(model, tokenizer, rows, part, answers=answers)
        metrics |= {f"{name}/{key}": value for key, value in measured.items()}
    metrics |= parts.texts(model, study.answers)
    if sizes.probe:
        metrics |= parts.probe(model, tokenizer, data, sizes.probe)
    if is_last or study.every_epoch:
        if sizes.ifeval:
            metrics |= parts.ifeval(model, tokenizer, data, sizes)
        if sizes.truthfulqa or sizes.choices:
            metrics |= parts.choices(model, tokenizer, data, sizes)
    return {name: float(f"{value:.6g}") for name, value in metrics.items()}


def _train(study: Study, run: Run) -> dict[str, Any]:
    """Trains as `qpsft train` does on a recipe in a folder of its own, and measures after `study.epochs`."""
    from transformers import AutoTokenizer

    from qpsft.train.outputs import METRICS
    from qpsft.train.progress import read_metrics
    from qpsft.train.run import train

    points: list[dict[str, Any]] = []
    tokenizer = AutoTokenizer.from_pretrained(study.model)  # of its own: the harness changes its tokenizer's padding

    def measure(model: Any, epoch: float, step: int, is_last: bool) -> None:
        metrics = measure_model(study, run.part, model, tokenizer, is_last=is_last)
        points.append({"epoch": epoch, "step": step, "metrics": metrics})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(study, run, folder)
        diverged = {}
        try:
            train(recipe, [_after_epochs(study.epochs, measure)])
        except DivergedError as error:
            diverged = {"diverged": {"step": error.step, "error": str(error)}}
        lines = read_metrics(folder / METRICS)
    log = [{"step": line["step"], **{key: line[key] for key in LOGGED if key in line}} for line in lines]
    return {"points": points, "log": log, **diverged}


def write_recipe(study: Study, run: Run, folder: Path) -> Any:
    """Writes a run's rows and recipe into a folder, and reads the recipe: `qpsft.recipe.file.load_recipe`."""
    import yaml
    from evidence_real_parts import load_part

    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.file import load_recipe

    part = load_part(run.part, Path(study.data), study.rows[run.part])
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in part.train), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_values(study, run, rows)), encoding="utf-8")
    return load_recipe(folder, [], PSFTConfig)


def recipe_values(study: Study, run: Run, rows: Path) -> dict[str, Any]:
    """A run as a recipe; what is not here is qpsft's default, the schedule and the warm-up among them."""
    micro = MICRO_BATCH[run.part]
    return {
        "model_name_or_path": study.model,
        "quantization": "nf4",
        "dtype": study.dtype,
        "dataset_name": str(rows),
        "held_out_rows": 0,
        "learning_rate": run.rate,
        "seed": run.seed,
        "num_train_epochs": max(study.epochs),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": ROWS_A_STEP // micro,
        "gradient_checkpointing": False,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": study.device == "cpu",
        **ARMS[run.arm].options,
    }


def _after_epochs(epochs: Sequence[int], measure: Any) -> Any:
    """A callback that measures after these epochs and at the end; training goes on as without it."""
    from evidence_real_parts import dense
    from transformers import TrainerCallback

    from qpsft.model.undisturbed import undisturbed

    class AfterEpochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, model: Any = None, **kwargs: Any) -> None:
            is_last = state.global_step >= state.max_steps
            if is_last or round(state.epoch) in epochs:
                with undisturbed(model), dense(model):
                    measure(model, round(state.epoch, 3), state.global_step, is_last)

    return AfterEpochs()


# ---- many runs ----


def do_runs(study: Study, runs: Iterable[Run], jobs: int) -> dict[Run, dict[str, Any]]:
    """The records of these runs: kept ones are read, the others done, `jobs` at a time.

    Raises:
        QpsftError: a run failed; those that are done are kept.
    """
    runs = list(runs)
    missing = [run for run in {study.path(run): run for run in runs}.values() if study.read(run) is None]
    if jobs == 1 or len(missing) < 2:
        for run in missing:
            print(line_of(do_run(study, run)), flush=True)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(missing)), context, quiet_worker) as pool:
            try:
                for future in as_completed([pool.submit(do_run, study, run) for run in missing]):
                    print(line_of(future.result()), flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return {run: study.read(run) for run in runs}


def line_of(record: dict[str, Any]) -> str:
    metrics = record["points"][-1]["metrics"] if record["points"] else {}
    names = ("test/accuracy", "test/nll", "mt_bench/nll", "probe_words", "ifeval")
    scores = [f"{name} {metrics[name]:.3g}" for name in names if name in metrics]
    if "diverged" in record:
        scores.append(f"diverged at step {record['diverged']['step']}")
    return f"{record['label']:<40} {' · '.join(scores)} · {record['seconds']:.0f} s"


def score(record: dict[str, Any], by: str, rows: str = "validation") -> tuple[float, float]:
    """What rates are chosen by, more is better: accuracy and then NLL, or NLL alone; a run that diverged is the worst.

    Args:
        by: as in `evidence_real_parts.Part`.
    """
    if "diverged" in record:
        return float("-inf"), float("-inf")
    metrics = record["points"][-1]["metrics"]
    nll = -metrics[f"{rows}/nll"]
    return (metrics[f"{rows}/accuracy"], nll) if by == "accuracy" else (nll, nll)


def by_of(part: str) -> str:
    return "nll" if part == "gsm8k" else "accuracy"


def chosen_rates(part: str, arms: Sequence[str], records: dict[Run, dict[str, Any]]) -> dict[str, float]:
    """Each arm's rate with the best validation score of seed 0; a control takes its treatment's."""
    rates = {}
    for arm in arms:
        source = ARMS[arm].rate_of or arm
        tried = [run for run in records if (run.part, run.arm, run.seed) == (part, source, 0)]
        if tried:
            rates[arm] = max(tried, key=lambda run: score(records[run], by_of(part))).rate
    return rates


def leaders(part: str, rates: dict[str, float], records: dict[Run, dict[str, Any]], base: dict[str, float]) -> set[str]:
    """The arm that learnt most on validation rows, and the one that kept most of those that learnt as much as `sft`."""
    from evidence_real_parts import kept

    last = {arm: records.get(Run(part, arm, rate)) for arm, rate in rates.items()}
    last = {arm: record for arm, record in last.items() if record and "diverged" not in record}
    if not last:
        return set()
    least = score(last["sft"], by_of(part)) if "sft" in last else (float("-inf"),)
    able = {
        arm: kept(record["points"][-1]["metrics"], base).get("kept", 0.0)
        for arm, record in last.items()
        if score(record, by_of(part))[0] >= least[0]
    }
    return {max(last, key=lambda arm: score(last[arm], by_of(part))), max(able, key=able.get)}


def planned(part: str, options: argparse.Namespace) -> list[Run]:
    """The runs that choose the rates."""
    own = [arm for arm in options.arms if ARMS[arm].rate_of is None]
    return [Run(part, arm, rate) for arm in own for rate in options.rates]


def seeded(part: str, options: argparse.Namespace, records: dict[Run, dict], base: dict[str, float]) -> list[Run]:
    """The runs after them: the controls, and the other seeds, of all arms or of those that are worth it."""
    rates = chosen_rates(part, options.arms, records)
    worth = set(options.arms) if options.all_seeds else {*SEEDED, *leaders(part, rates, records, base)}
    runs = [Run(part, arm, rate) for arm, rate in rates.items()]
    for seed in range(1, options.seeds):
        for arm in (arm for arm in rates if arm in worth):
            tried = options.rates if options.every_rate and ARMS[arm].rate_of is None else [rates[arm]]
            runs += [Run(part, arm, rate, seed) for rate in tried]
    return runs


def do_study(study: Study, options: argparse.Namespace) -> None:
    """The base first, whose answers the others need; then part by part."""
    (Path(study.output) / "runs").mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        (base,) = do_runs(study, [Run(part)], 1).values()
        records = do_runs(study, planned(part, options), options.jobs)
        do_runs(study, seeded(part, options, records, base["points"][0]["metrics"]), options.jobs)


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(kind: type) -> Any:
        return lambda text: [kind(item) for item in text.split(",") if item]

    found.add_argument("--model", default=str(MODEL), help="folder of an instruct model")
    found.add_argument("--data", help="folder of svamp, gsm8k, ifeval, … (default: ../shared/data)")
    found.add_argument("--output", default=str(OUTPUT), help="folder of all results")
    found.add_argument("--tables", help="folder of the tables and the plot (default: that of --output)")
    found.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    found.add_argument("--dtype", help="compute dtype (auto: float32 on the CPU, else by card)")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time")
    found.add_argument("--parts", type=listed(str), help=f"default: {','.join(PARTS)}")
    found.add_argument("--arms", type=listed(str), help=f"default: {','.join(STUDIED)}; also {','.join(TRUST_REGIONS)}")
    found.add_argument("--rates", type=listed(float), help="learning rates tried with one seed (default: 4)")
    found.add_argument("--seeds", type=int, help="seeds at the chosen rate (default: 3; on CUDA 5)")
    found.add_argument("--all_seeds", action="store_true", help="for every arm, not only those that are worth it")
    found.add_argument("--every_rate", action="store_true", help="every seed at every rate")
    found.add_argument("--epochs", type=listed(int), help="measured after these; the last is the run's end (1,2,4)")
    found.add_argument("--train", type=int, help="training rows (default: 700 of SVAMP, 2,048 of GSM8K)")
    found.add_argument("--held_out", type=listed(int), help="rows to validate and to test on (default: 100,200)")
    found.add_argument("--ifeval", type=int, help="IFEval prompts (default: 150; on CUDA all)")
    found.add_argument("--truthfulqa", type=int, help="its questions, the dearest (default: 50; on CUDA all)")
    found.add_argument("--choices", type=int, help="rows of ARC-easy and OpenBookQA (default: 200; on CUDA all)")
    found.add_argument("--answers", type=int, help="the base's own answers of each kind (default: all)")
    found.add_argument("--probe", type=int, help="questions asked for sentences (default: 100; on CUDA 200)")
    found.add_argument("--max_tokens", type=int, help="of an answer to IFEval; half for the base's own (512; 1,280)")
    found.add_argument("--tasks", choices=("end", "every"), help="when tasks are measured (end; on CUDA every)")
    found.add_argument("--quick", action="store_true", help="a look: few rows, two arms, one rate, one seed")
    found.add_argument("--small", action="store_true", help="noisy SVAMP, half of its rows, one rate, bfloat16")
    found.add_argument("--table", action="store_true", help="only print what is done, and draw it")
    return found


DEFAULTS = {
    "parts": PARTS, "arms": tuple(STUDIED), "rates": RATES, "seeds": 3, "epochs": (1, 2, 4), "train": None,
    "held_out": (100, 200), "ifeval": 150, "truthfulqa": 50, "choices": 200, "answers": 1000, "probe": 100,
    "max_tokens": 512, "tasks": "end", "dtype": "auto",
}  # fmt: skip
ON_CUDA = {"seeds": 5, "ifeval": 541, "truthfulqa": 1000, "choices": 10_000, "probe": 200, "max_tokens": 1280}
ON_CUDA |= {"tasks": "every"}
QUICK = {
    "parts": ("svamp_noisy",), "arms": ("sft", "psft_kl"), "rates": (5e-4,), "seeds": 1, "epochs": (2,), "train": 96,
    "held_out": (16, 32), "ifeval": 12, "truthfulqa": 4, "choices": 16, "answers": 12, "probe": 12, "max_tokens": 128,
}  # fmt: skip
SMALL = {
    "parts": ("svamp_noisy",), "rates": (5e-4,), "epochs": (2,), "train": 350, "held_out": (20, 100), "ifeval": 48,
    "truthfulqa": 0, "choices": 100, "answers": 48, "probe": 32, "max_tokens": 128, "dtype": "bfloat16",
}  # fmt: skip


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, its defaults by device. Raises RecipeError."""
    import torch

    options = parser().parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS | (ON_CUDA if options.device == "cuda" else {})
    defaults |= QUICK if options.quick else SMALL if options.small else {}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for kind, given, known in (("arm", options.arms, ARMS), ("part", options.parts, PARTS)):
        for name in given:
            if name not in known:
                raise RecipeError(f"There is no {kind} {name!r}.", f"{did_you_mean(name, known)}{', '.join(known)}.")
    for arm in options.arms:
        if ARMS[arm].rate_of not in (None, *options.arms):
            raise RecipeError(f"{arm} takes the rate of {ARMS[arm].rate_of}.", f"Add {ARMS[arm].rate_of} to --arms.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("There is no CUDA device here.", "Use --device cpu.")
    if not (Path(options.model) / "config.json").is_file():
        raise RecipeError(f"There is no model in {options.model}.", "Run python ../shared/models/smollm2.py.")
    places = [Path(options.data)] if options.data else [ROOT.parent / "shared/data", ROOT / "shared/data"]
    options.data = next((place for place in places if place.is_dir()), None)
    if options.data is None:
        raise RecipeError(f"The data are not in {places[0]}.", "Give their folder with --data.")
    return options


def make_study(options: argparse.Namespace, argv: Sequence[str]) -> Study:
    validation, test = options.held_out
    rows = {part: (options.train or (2048 if part == "gsm8k" else 700), validation, test) for part in PARTS}
    return Study(
        model=options.model, data=str(options.data), output=options.output, device=options.device, dtype=options.dtype,
        epochs=tuple(options.epochs), rows=rows, every_epoch=options.tasks == "every",
        measured={
            "ifeval": options.ifeval, "ifeval_tokens": options.max_tokens, "truthfulqa": options.truthfulqa,
            "choices": options.choices,
            "answers": options.answers, "answer_tokens": options.max_tokens // 2, "probe": options.probe,
            "batch": 64 if options.device == "cuda" else 8,
        },
        command=("benchmarks/evidence_real.py", *argv),
    )  # fmt: skip


def small_study(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *flags: str
) -> tuple[argparse.Namespace, Study]:
    """The options of a script that goes on from `--small`, and that study; flags it does not know are the study's.

    Args:
        flags: of this study, that come before the user's.
    """
    parser.add_argument("--output", default=str(OUTPUT), help="where the base's record is (default: %(default)s)")
    options, sizes = parser.parse_known_args(argv)
    quiet_libraries()
    flags = ["--small", *flags, "--output", options.output, *sizes]
    return options, make_study(read_options(flags), flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a line per run is enough
    try:
        options = read_options(argv)
        study = make_study(options, argv)
        if not options.table:
            do_study(study, options)
        from evidence_real_table import show

        show(study, options)
    except QpsftError as error:
        print(fill(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
