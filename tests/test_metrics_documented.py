"""docs/metrics.md defines every number that real small runs log or write, and none that they do not."""

import json
import re

import pytest
from comparing import write_recipe
from exporting import make_adapter
from markdown import ROOT, code_names, section, text_of
from noise_study import NoiseStudy
from small_runs import in_float16, make_base, make_rows, make_trainer
from test_guard import write_rows

from qpsft import cli
from qpsft.compare import compare
from qpsft.data import built_in
from qpsft.evaluate import keep
from qpsft.recipe.arguments import DataArguments, GuardArguments
from qpsft.train.guard import Guard
from qpsft.train.guard_set import GuardSet, load_guard_set
from qpsft.train.progress import MetricsCallback, read_metrics

METRICS = text_of(ROOT / "docs" / "metrics.md")


def defined(heading: str) -> set[str]:
    """The names in the first column of the tables of a section, which begin with `name`."""
    cells = re.findall(r"^\| (`.*?) \|", section(METRICS, heading), flags=re.M)
    return set().union(*map(code_names, cells))


def keys(record, *free: str) -> set[str]:
    """Every key in a record of JSON, at any depth; those below a key of `free` are names of the user's choice."""
    if isinstance(record, list):
        return set().union(*(keys(part, *free) for part in record))
    if not isinstance(record, dict):
        return set()
    found = set(record)
    for name, part in record.items():
        parts = part.values() if name in free and isinstance(part, dict) else [part]
        found |= set().union(*(keys(one, *free) for one in parts))
    return found


def test_every_logged_number_is_defined_and_no_other(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    data = write_rows(tmp_path / "old.jsonl", [{"prompt": "w3 w4", "completion": "w5 w6"}] * 20)
    monkeypatch.setattr(GuardSet, "score", lambda self, model, tokenizer: 0.9)
    trainer = make_trainer(
        make_base(tmp_path / "base"),
        out,
        callbacks=[MetricsCallback(out / "metrics.jsonl")],
        eval_dataset=make_rows(4, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        target_kl=10.0,
        target_clip_fraction=0.1,
    )
    for metric in ("accuracy", "nll", "kl"):
        options = GuardArguments(data=str(data), metric=metric, every=4, action="warn")
        Guard(load_guard_set(options, DataArguments()), None).watch(trainer, resumed=False)
    in_float16(trainer).train()  # which logs `loss_scale` too
    lines = read_metrics(out / "metrics.jsonl")
    assert len(lines) == 7 + 3 * 2
    assert keys(lines) == defined("## Logged while training")


@pytest.mark.filterwarnings("ignore")
def test_everything_that_evaluate_writes_is_defined(tmp_path):
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in built_in.demonstrations("clean", 3)]
    choices = [{"prompt": "reverse: 0123", "completion": "3210", "choices": ["3210", "0123"]}] * 3
    for name, part in (("rows", rows), ("choices", choices)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = [str(tmp_path / f"{name}.jsonl") for name in ("rows", "choices")]
    adapter, target = make_adapter(tmp_path / "adapter"), tmp_path / "numbers.json"
    options = ["--train_data", data[0], "--k", "3", "--max_new_tokens", "4", "--json", str(target), "--completions"]
    assert cli.main(["evaluate", str(adapter), "--data", *data, *options]) == 0
    record = json.loads(target.read_text())
    assert set(record["settings"]) > {"k", "drift_samples"}
    record["settings"] = {}  # the command's options, which its help explains
    assert len(record["data"]) == 2
    metrics = {re.sub(r"@\d+", "@k", name) for one in record["data"].values() for name in one["metrics"]}
    assert metrics == defined("## Measured by `qpsft evaluate`") - set(record["data"]) - VERIFIERS
    written = {re.sub(r"@\d+", "@k", name) for name in keys(record, "data")}
    assert written <= code_names(section(METRICS, "## Measured by `qpsft evaluate`"))


@pytest.mark.filterwarnings("ignore")
def test_everything_that_the_gate_writes_is_defined(tmp_path):
    adapter, target = make_adapter(tmp_path / "adapter"), tmp_path / "numbers.json"
    cli.main(["evaluate", str(adapter), "--keep", "--limit", "2", "--json", str(target)])
    text = section(METRICS, "## Kept, by `qpsft evaluate --keep`")
    record = json.loads(target.read_text())["keep"]
    assert {"difference", "verdict", "low", "max_drop", "set_b"} <= keys(record) <= code_names(text)
    assert {name for skill in keep.SKILLS.items() for name in (skill[0], skill[1].metric)} <= code_names(text)


VERIFIERS = {"exact", "last_number", "gsm8k", "math_verify", "choice", "instructions", "tokens", "demo"}
"""Another table of that section."""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    found = compare(write_recipe(folder), arms="sft,psft", seeds=1, epochs=1)
    return found, json.loads((folder / "comparison" / "comparison.json").read_text())


def general(metric: str) -> str:
    """The name a metric is documented by: `out_of_domain/SET_kl` for out_of_domain/set_b_kl."""
    metric = re.sub(r"pass@\d+, T=[\d.]+", "pass@k, T=t", metric)
    return re.sub(r"(?<=out_of_domain/).*?(?=$|_nll$|_entropy$|_kl$)", "SET", metric)


def test_everything_that_compare_writes_is_defined(comparison):
    _, record = comparison
    text = section(METRICS, "## Compared by `qpsft compare`")
    points = [point for arm in record["arms"].values() for run in arm["runs"].values() for point in run["points"]]
    measured = {general(name) for point in points for name in point["metrics"]}
    table = text[: text.index("| in the record |")]
    cells = re.findall(r"^\| (`.*?\| .*?) \|", table, flags=re.M)
    also = re.findall(r"`(out_of_domain/SET_\w+)`", table)
    assert measured == set().union(*(code_names(cell.partition(" | ")[0]) for cell in cells)) | set(also)
    logged = {name for arm in record["arms"].values() for run in arm["runs"].values() for name in keys(run["log"])}
    assert logged <= defined("## Logged while training") and len(logged) > 5
    for name in list(record["settings"]):
        record["settings"][name] = {}  # options and versions
    free = ("arms", "runs", "grid", "tuning", "metrics", "base", "rows", "overlap_with_training", "last_epoch")
    record["overlap_with_training"] = {name: {} for name in record["overlap_with_training"]}
    written = keys(record, *free) - logged - set(points[0]["metrics"]) - set(record["base"])
    assert {"half_width", "same_runs", "matched_in_domain_over_rates"} <= written
    assert written <= code_names(text)


def test_everything_that_the_noise_study_writes_is_defined(comparison):
    found, _ = comparison
    found.arms["psft_visits"] = found.arms.pop("psft")
    record = json.loads(json.dumps(NoiseStudy("demo-noisy", {0.0: found, 0.3: found}).to_dict()))
    record["learning_rates"] = []
    text = section(METRICS, "## Compared by `qpsft compare`")
    assert keys(record, "gains") <= code_names(text[text.index("`noise.json`") :]) | {"name"}
