"""Which adapter is the better start for RL: the same short GRPO run from the SFT and PSFT adapters of the evidence.

    python benchmarks/evidence.py noisy     first: each arm's learning rate comes from its comparison.json
    python benchmarks/rl_start.py           every arm × 3 seeds × 2 learning rates of GRPO

An adapter of qpsft goes into TRL's GRPOTrainer as it is:

    model, tokenizer = load_base("demo")  # the base that it was trained on, rounded the same way
    model = PeftModel.from_pretrained(model, "runs/mine", is_trainable=True)
    trainer = GRPOTrainer(model=model, reward_funcs=reward, train_dataset=prompts, processing_class=tokenizer)

TRL rounds it to bfloat16 on the way in; `with float32_adapter(model):` around the third line, as here, keeps it
float32.

The adapters are those of `evidence.py noisy`, trained again by the comparison's own code from arm, learning rate and
seed (it does not keep them), and checked against what it measured. The reward is 1 for a right answer by the built-in
world's verifier, else 0. Prompts are problems like the demonstrations', of the training split; runs of one seed get the
same ones in the same order from every adapter. What is measured are test rows. Every run is kept as soon as it is done
and never done again, so the command may be killed at any time and repeated. See docs/rl.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpsft.terminal import quiet_libraries

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "adapters" / "demo-noisy"
OUTPUT = HERE / "results" / "rl_start"
EVIDENCE = HERE / "results" / "evidence" / "noisy" / "comparison.json"
ARMS = "sft,sft_matched,sft_blocks,dft,psft,psft_visits"
RATES = "3e-4,3e-3"
PROMPTS_SEED = 1
"""Of the problems RL is trained on; the demonstrations have 0."""
PROMPT_ROWS = 1024
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A GRPO run and how it is measured; whatever is not here is TRL's default.

    Attributes:
        steps: optimizer steps.
        prompts, generations: a step's batch: so many prompts, so many completions of each.
        max_new_tokens: length cap of a completion.
        every: steps between two measurements.
        test_rows, k: pass@k is measured on so many test rows with k samples each, at temperature 1.
    """

    steps: int = 30
    prompts: int = 8
    generations: int = 8
    max_new_tokens: int = 56
    every: int = 10
    test_rows: int = 64
    k: int = 8


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=ARMS, help="separated by commas (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, … of adapters and RL (default: %(default)s)")
    parser.add_argument("--learning_rates", default=RATES, help="of GRPO (default: %(default)s)")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the arms' rates come from")
    parser.add_argument("--arm_rates", help="instead: sft=2e-3,psft=1e-3,…")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    return parser.parse_args(argv)


def evidence_arms(options: argparse.Namespace) -> dict[str, Any]:
    """The arms of the evidence, by name: `learning_rate` and `runs` by seed; empty if it is not there."""
    if not options.evidence.is_file():
        return {}
    return json.loads(options.evidence.read_text(encoding="utf-8"))["arms"]


def arm_rates(options: argparse.Namespace) -> dict[str, float]:
    """Each arm's learning rate, chosen on validation rows by the evidence."""
    if options.arm_rates:
        pairs = [pair.split("=") for pair in options.arm_rates.split(",")]
        known = {name: float(rate) for name, rate in pairs}
    else:
        known = {name: arm["learning_rate"] for name, arm in evidence_arms(options).items()}
    if not known:
        sys.exit(f"{options.evidence} is not there yet: python benchmarks/evidence.py noisy, or give --arm_rates.")
    missing = [name for name in options.arms.split(",") if name not in known]
    if missing:
        sys.exit(f"No learning rate is known of {', '.join(missing)}; arms with one: {', '.join(known)}.")
    return {name: known[name] for name in options.arms.split(",")}


def load_evidence(
    options: argparse.Namespace, rates: dict[str, float], flags: Sequence[str] = ()
) -> tuple[Any, dict[str, dict[int, Any]]]:
    """The evidence's Setting, and the RunSpec of every arm and seed.

    Args:
        flags: options of the recipe; without them the learning rate falls at the end, as it does by default.
    """
    from qpsft.compare.arms import find_arm
    from qpsft.compare.comparison import make_setting
    from qpsft.compare.options import load_comparison
    from qpsft.compare.run import RunSpec

    recipe, compared = load_comparison(RECIPE, [f"--output_dir={options.output}", *flags])
    trainer = recipe.trainer
    specs = {
        name: {
            trainer.seed + i: RunSpec(
                find_arm(name).options(trainer), rate, trainer.seed + i, compared.epochs or trainer.num_train_epochs
            )
            for i in range(options.seeds)
        }
        for name, rate in rates.items()
    }
    return make_setting(recipe, compared, options.output), specs


def trained_adapter(spec: Any, setting: Any, output: Path) -> Path:
    """The folder of the spec's adapter, trained if it is not there."""
    from qpsft.compare.run import load_setting, make_run_trainer
    from qpsft.model.adapter import save_adapter

    folder = output / "adapters" / f"{spec.label}-{spec.key(setting)}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}")
    trainer = make_run_trainer(spec, setting, *load_setting(setting), partial / "training")
    trainer.train()
    save_adapter(trainer.model, partial)
    shutil.rmtree(partial / "training")
    partial.rename(folder)
    return folder


def prompt_rows() -> list[dict]:
    """`{"prompt", "task"}`: problems like the demonstrations', of the training split, none of them demonstrated."""
    from qpsft.data import built_in

    demonstrated = {row["prompt"][0]["content"] for row in built_in.demonstrations("noisy")}
    rows = built_in.demonstrations("clean", PROMPT_ROWS, seed=PROMPTS_SEED)
    return [
        {"prompt": row["prompt"], "task": row["task"]}
        for row in rows
        if row["prompt"][0]["content"] not in demonstrated
    ]


def right(completions: list[list[dict]], task: list[dict], **other: Any) -> list[float]:
    """The reward: 1 for a right answer, else 0."""
    from qpsft.evaluate.verifiers import demo

    return [float(demo({"task": t}, c[-1]["content"]) is True) for c, t in zip(completions, task, strict=True)]


def grpo_config(plan: Plan, rate: float, seed: int, model: Any, folder: Path) -> Any:
    """trl.GRPOConfig: constant learning rate; else TRL's defaults, among them β = 0 (no reference policy)."""
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        str(folder),
        per_device_train_batch_size=plan.prompts * plan.generations,
        num_generations=plan.generations,
        max_completion_length=plan.max_new_tokens,
        max_steps=plan.steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        seed=seed,
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
        use_cpu=model.device.type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def rl_run(adapter: Path, setting: Any, plan: Plan, rate: float, seed: int, label: str) -> dict[str, Any]:
    """One GRPO run from an adapter. Returns `points`, `log`, `seconds`, `versions`, `machine` (see `watcher`)."""
    import tempfile

    from datasets import Dataset
    from peft import PeftModel
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from qpsft import float32_adapter
    from qpsft.compare.run import load_setting, machine_of, versions

    started = time.perf_counter()
    model, tokenizer = load_setting(setting)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        with float32_adapter(model):
            trainer = GRPOTrainer(
                model=model,
                reward_funcs=right,
                args=grpo_config(plan, rate, seed, model, Path(folder)),
                train_dataset=Dataset.from_list(prompt_rows()),
                processing_class=tokenizer,
            )
        trainer.remove_callback(PrinterCallback)
        watch = watcher(plan, lambda ends: measure(model, tokenizer, setting, plan, ends), label)
        trainer.add_callback(watch)
        trainer.train()
    return {
        "points": watch.points,
        "log": watch.log,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "machine": machine_of(model),
    }


def measure(model: Any, tokenizer: Any, setting: Any, plan: Plan, is_end: bool) -> dict[str, float]:
    """Test rows: `pass@1`, `pass@k` and `entropy` of samples at temperature 1, in nats per token.

    With `is_end` also greedy accuracy, as the evidence measures it: `in_domain`, and `out_of_domain`, the sets' mean.
    """
    from qpsft.evaluate import evaluate
    from qpsft.model.undisturbed import undisturbed

    common = {"max_new_tokens": plan.max_new_tokens, "drift": False, "arguments": setting.measurement.arguments}
    data = setting.data
    with undisturbed(model):
        found = evaluate(model, tokenizer, data.in_domain, k=plan.k, limit=plan.test_rows, **common)
        point = {"pass@1": found["pass@1"], f"pass@{plan.k}": found[f"pass@{plan.k}"]}
        point["entropy"] = found["sample_entropy"]
        if is_end:
            greedy = {"in_domain": data.in_domain, **data.out_of_domain}
            scores = {
                name: evaluate(model, tokenizer, rows, k=0, **common)["accuracy"] for name, rows in greedy.items()
            }
            point["in_domain"] = scores.pop("in_domain")
            point["out_of_domain"] = sum(scores.values()) / len(scores)
    return point


def watcher(plan: Plan, measure: Callable[[bool], dict[str, float]], label: str) -> Any:
    """A TrainerCallback with a progress bar.

    Its `points` are measurements (`step` and what `measure` returns), at step 0, every `plan.every` and the last; its
    `log` has of each step `reward` (mean of the batch), `entropy` (of the sampled tokens, nats), the share of prompts
    whose completions all got the same reward (`same_reward`: no gradient) and the mean `length` in tokens.
    """
    from tqdm import tqdm
    from transformers import TrainerCallback

    logged = {"reward": "reward", "entropy": "entropy", "frac_reward_zero_std": "same_reward"}
    logged["completions/mean_length"] = "length"

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.log: list[dict[str, float]] = []
            self._bar = tqdm(total=plan.steps, desc=label, unit="step", disable=None, leave=False)

        def _measure(self, step: int) -> None:
            found = measure(step in (0, plan.steps))
            self.points.append({"step": step} | {name: round(value, 6) for name, value in found.items()})

        def on_train_begin(self, args, state, control, **kwargs):
            self._measure(0)

        def on_step_end(self, args, state, control, **kwargs):
            self._bar.update(1)
            if state.global_step % plan.every == 0 or state.global_step == plan.steps:
                self._measure(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                line = {short: round(logs[name], 6) for name, short in logged.items()}
                self.log.append({"step": state.global_step} | line)

        def on_train_end(self, args, state, control, **kwargs):
            self._bar.close()

    return Watch()


def identity(spec: Any, setting: Any, plan: Plan, rate: float) -> dict[str, Any]:
    """Everything that decides a run's result. The seed of adapter and RL is one and the same."""
    return {
        "format": FORMAT,
        "adapter": spec.identity(setting),
        "learning_rate": rate,
        "plan": dataclasses.asdict(plan),
        "prompts": [PROMPTS_SEED, PROMPT_ROWS],
    }


def kept_run(spec: Any, setting: Any, plan: Plan, rate: float, output: Path) -> tuple[Path, dict[str, Any] | None]:
    """Where a run is kept, and the run if it is there."""
    from qpsft.compare.run import short_rate

    text = json.dumps(identity(spec, setting, plan, rate), sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = output / "results" / f"{spec.label}-grpo{short_rate(rate)}-{key}.json"
    return path, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def do_runs(options: argparse.Namespace, plan: Plan) -> Iterator[tuple[str, int, float, dict[str, Any]]]:
    """Every run, made or found: (arm, seed, learning rate of GRPO, result). Arms with the same adapters share runs."""
    rates = arm_rates(options)
    from evidence import CONSTANT_RATE

    setting, specs = load_evidence(options, rates, CONSTANT_RATE)
    evidence = evidence_arms(options)
    grpo_rates = [float(rate) for rate in options.learning_rates.split(",")]
    todo = [(arm, seed, rate) for seed in next(iter(specs.values())) for rate in grpo_rates for arm in specs]
    left = {kept_run(specs[a][s], setting, plan, r, options.output)[0] for a, s, r in todo}
    left = {path for path in left if not path.is_file()}
    print(f"{len(todo)} runs of {', '.join(specs)}; {len(left)} to do", flush=True)
    seconds: list[float] = []
    for arm, seed, rate in todo:
        spec = specs[arm][seed]
        path, result = kept_run(spec, setting, plan, rate, options.output)
        if result is None:
            started = time.perf_counter()
            adapter = trained_adapter(spec, setting, options.output)
            result = rl_run(adapter, setting, plan, rate, seed, path.stem)
            measured = evidence.get(arm, {}).get("runs", {}).get(str(seed), {"label": None})
            same = measured["label"] == spec.label
            result["evidence_in_domain"] = measured["points"][-1]["metrics"]["in_domain"] if same else None
            result = {"start": spec.label, "arm_learning_rate": spec.learning_rate, "rate": rate, "seed": seed} | result
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
            partial.rename(path)
            left.discard(path)
            seconds.append(time.perf_counter() - started)
            minutes = len(left) * sum(seconds) / len(seconds) / 60
            first, last = result["points"][0], result["points"][-1]
            moved = f"right at T = 1 {first['pass@1']:.3f} -> {last['pass@1']:.3f}"
            print(f"{arm:<12} seed {seed}  lr {rate:g}  {moved}  about {minutes:.0f} min left", flush=True)
        yield arm, seed, rate, result


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    quiet_libraries()  # before they are imported
    import torch
    from evidence import Tee
    from rl_report import Outcome, write

    plan = Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)})
    torch.set_num_threads(1)  # matrix products of this size are slower on several
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "log.txt").open("a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(Tee(sys.stdout, log)):
            outcome = Outcome(dataclasses.asdict(plan))
            try:
                for arm, seed, rate, result in do_runs(options, plan):
                    outcome.add(arm, seed, rate, result)
                    write(outcome, options.output)  # what there is, whenever it is killed
            except KeyboardInterrupt:
                sys.exit("Interrupted. Finished runs are kept: the same command goes on from here.")
            print(f"\n{outcome.render()}", flush=True)


if __name__ == "__main__":
    main()
