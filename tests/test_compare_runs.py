"""A comparison of real runs on the embedded base: measuring leaves training alone, and what is written."""

import itertools
import json
import random
from html.parser import HTMLParser

import noise_study
import numpy as np
import pytest
import torch
from comparing import RECIPE, make_comparison, write_recipe
from small_runs import policy, same

from qpsft.compare import compare, data
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.data import load_data
from qpsft.compare.figures import figures
from qpsft.compare.measure import EpochEvaluation
from qpsft.compare.options import load_comparison
from qpsft.compare.report import write_report
from qpsft.compare.run import RunSpec, do_run, read_result
from qpsft.errors import DataError, RecipeError
from qpsft.evaluate.rows import duplicates
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.undisturbed import undisturbed
from qpsft.psft.config import PSFTConfig
from qpsft.train import run
from qpsft.train.progress import read_metrics

ARMS = "sft,dft,psft_visits"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A small real comparison, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    found = compare(write_recipe(folder), arms=ARMS, seeds=1)
    return found, folder / "comparison"


def test_every_run_takes_the_same_steps_and_is_measured_after_every_epoch(compared):
    found, _ = compared
    runs = [run for arm in found.arms.values() for run in arm.runs.values()]
    assert [[point["step"] for point in run["points"]] for run in runs] == [[4, 8]] * 3
    assert [[point["epoch"] for point in run["points"]] for run in runs] == [[1.0, 2.0]] * 3
    for run_ in runs:
        first, last = (point["metrics"] for point in run_["points"])
        assert "validation" in last and "validation" not in first
        for name in (
            "in_domain",
            "out_of_domain",
            "out_of_domain/set_b",
            "sample_entropy",
            "sample_kl",
            "in_domain_kl",
        ):
            assert name in first and name in last
        assert {"pass@1, T=1", "pass@2, T=1", "pass@2, T=0.6"} <= last.keys()
        assert last["sample_kl"] > 0
    assert found.base["sample_kl"] == found.base["in_domain_kl"] == 0


def test_the_arms_train_by_their_methods(compared):
    found, _ = compared
    clipped = {name: arm.runs[3]["log"][-1]["clip_fraction"] for name, arm in found.arms.items()}
    assert clipped["sft"] == 0 and clipped["psft_visits"] > 0
    assert found.arms["sft"].runs[3]["points"] != found.arms["psft_visits"].runs[3]["points"]


def test_what_is_written(compared):
    found, folder = compared
    record = json.loads((folder / "comparison.json").read_text())
    assert record["arms"]["sft"]["runs"]["3"]["points"] == found.arms["sft"].runs[3]["points"]
    assert record["rows"]["train"] == 16 and record["overlap_with_training"]["in_domain"]["duplicate_rows"] == 0
    assert len(list(folder.glob("results/*/result.json"))) == 4
    assert not list(folder.glob("results/*/training"))
    for name in ("curves", "frontier"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_on_the_frontiers_axes_do_not_touch():
    comparison = make_comparison({"sft": {0: [(0.0, 0.59), (0.02, 0.55)]}, "psft": {0: [(0.0, 0.95), (0.0, 0.93)]}})
    _, figure = figures(comparison)["frontier"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    boxes = [box for box in boxes if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1]
    assert len(boxes) > 2 and all(left.x1 + 4 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_real_run_that_diverges_leaves_a_result_that_says_so(tmp_path):
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    setting = make_setting(recipe, options, prepare(recipe))
    spec = RunSpec({"loss_type": "nll"}, 100.0, 3, 1.0)
    result = do_run(spec, setting, tmp_path / "results")
    step = result["diverged"]["step"]
    assert step > 1  # the first step's update came from finite numbers
    assert result["diverged"]["error"].startswith(f"Training stopped at optimizer step {step} on training rows ")
    kept = read_result(spec, setting, tmp_path / "results")
    assert kept["points"] == result["points"] == [] and kept["diverged"] == result["diverged"]
    assert not list((tmp_path / "results").glob("*/training"))


@pytest.mark.slow
def test_worker_processes_get_the_same_numbers(compared, tmp_path):
    found, _ = compared
    again = compare(write_recipe(tmp_path), arms=ARMS, seeds=1, jobs=2)
    assert again.done == 4
    for name, arm in found.arms.items():
        assert again.arms[name].runs[3]["points"] == arm.runs[3]["points"]


class Page(HTMLParser):
    """The links, sources and text of a page."""

    def __init__(self):
        super().__init__()
        self.links, self.text, self.tags = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "data", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_holds_the_numbers(compared):
    found, folder = compared
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "http:" not in text and "https:" not in text and "url(http" not in text and "@import" not in text
    assert page.links and all(link.startswith("#") for link in page.links)  # an SVG's own parts
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 2
    for arm in found.arms.values():
        assert f"{arm.last('sample_entropy')[3]:.3f}" in page.text
    assert f"{found.base['out_of_domain']:.3f}".removeprefix("0") in page.text
    shown = found.arms["sft"].runs[3]["completions"]["in_domain"][0]
    assert shown["prompt"] in page.text and shown["greedy"][0] in page.text
    assert found.settings["versions"]["torch"] in page.text


def test_markup_in_completions_is_text(tmp_path):
    comparison = make_comparison({"sft": {0: [(0.5, 0.5)]}})
    row = {"prompt": "<script>alert(1)</script>", "reference": "&", "greedy": ["<b>", False], "samples": []}
    comparison.base_completions = {"in_domain": [row]}
    comparison.arms["sft"].runs[0]["completions"] = {"in_domain": [row]}
    write_report(comparison, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text


def trained(folder, recipe, data=None, how=None):
    """The policy after a short run with dropout, which draws random numbers at every step; measured or not."""
    model, tokenizer = load_base("demo", verbose=False)
    torch.manual_seed(0)
    recipe.lora.lora_dropout = 0.2
    model = add_adapter(model, recipe.lora)
    folder.mkdir()
    arguments = PSFTConfig(
        str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=1, reference_steps=2,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], learning_rate=1e-3, seed=1,
    )  # fmt: skip
    trainer = run.make_trainer(model, tokenizer, arguments, data.train, folder)
    watch = EpochEvaluation(tokenizer, data, how, "run") if how else None
    if watch:
        trainer.add_callback(watch)
    trainer.train()
    if watch:
        assert [point["step"] for point in watch.points] == [4, 6]
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder / run.METRICS)]
    return policy(model), [line for line in lines if "nll" in line], {n: m.training for n, m in model.named_modules()}


@pytest.mark.filterwarnings("ignore:.*lora_dropout")
def test_measuring_leaves_training_bit_for_bit_as_it_was(tmp_path):
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    setting = make_setting(recipe, options, prepare(recipe))
    with_it = trained(tmp_path / "measured", recipe, setting.data, setting.measurement)
    without = trained(tmp_path / "plain", recipe, setting.data)
    assert same(with_it[0], without[0])
    assert with_it[1] == without[1]
    assert with_it[2] == without[2]


def test_undisturbed_puts_everything_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model.device = torch.device("cpu")
    model[0].bias.requires_grad_(False)
    model[1].eval()

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with undisturbed(model):
        draw()
        model.eval()
        model.requires_grad_(True)
    assert draw() == expected
    assert model.training and model[0].training and not model[1].training
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad


# ---- rows ----


def rows_of(folder, text=RECIPE, **given):
    recipe, options = load_comparison(write_recipe(folder, text), [], given)
    return load_data(recipe, options, load_tokenizer("demo"))


def write_rows(path, count, start=0):
    rows = [{"prompt": f"reverse: {i:04d}", "completion": f"{i:04d}"[::-1]} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_sets_of_the_built_in_world_share_no_row(tmp_path):
    data = rows_of(tmp_path)
    assert data.metric == "accuracy"
    assert duplicates(data.validation.rows, data.in_domain.rows)["duplicate_prompts"] == 0
    assert {name: len(rows.rows) for name, rows in data.out_of_domain.items()} == dict.fromkeys(
        ("set_b", "shorter_a", "any_order", "styles"), 2
    )
    assert all(count == 0 for counts in data.overlap.values() for count in counts.values())


OWN = "model_name_or_path: demo\ndataset_name: {}\nmax_length: 128\n"


def test_rows_of_ones_own_are_set_aside_before_training(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 40)
    data = rows_of(tmp_path, OWN.format("rows.jsonl"))
    assert data.counts == {"train": 33, "validation": 3, "in_domain": 4}
    assert all(count == 0 for counts in data.overlap.values() for count in counts.values())
    assert data.metric == "nll"  # an exact match of free text would say nothing
    assert rows_of(tmp_path, OWN.format("rows.jsonl")).key == data.key


def test_overlap_with_training_rows_is_counted(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "test.jsonl", 10, start=35)
    old = write_rows(tmp_path / "old.jsonl", 6, start=37)
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row | {"completion": "no"}) + "\n" for row in old))
    write_rows(tmp_path / "valid.jsonl", 2, start=44)
    data = rows_of(tmp_path, OWN.format("rows.jsonl"), in_domain="test.jsonl", validation="valid.jsonl",
                   out_of_domain=["old.jsonl"])  # fmt: skip
    assert data.overlap["in_domain"] == {"duplicate_rows": 5, "duplicate_prompts": 5}
    assert data.overlap["old"] == {"duplicate_rows": 0, "duplicate_prompts": 3}
    assert data.overlap["in_domain in validation"] == {"duplicate_rows": 1, "duplicate_prompts": 1}


def test_too_few_rows_and_metrics_that_cannot_be(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 5)
    with pytest.raises(DataError, match="too few to set a tenth aside as in-domain test rows"):
        rows_of(tmp_path, OWN.format("rows.jsonl"))
    (tmp_path / "text.jsonl").write_text('{"text": "reverse: 0123"}\n' * 3)
    with pytest.raises(RecipeError, match="text is plain text, which has no accuracy"):
        rows_of(tmp_path, metric="accuracy", out_of_domain=["text.jsonl"])
    assert rows_of(tmp_path, out_of_domain=["text.jsonl"]).metric == "mixed"
    assert rows_of(tmp_path, out_of_domain=["text.jsonl"], metric="nll").metric == "nll"
    with pytest.raises(RecipeError, match="noise cannot be varied in"):
        recipe, options = load_comparison(write_recipe(tmp_path, OWN.format("rows.jsonl")), [], {})
        load_data(recipe, options, load_tokenizer("demo"), noise=0.1)


# ---- text sampled from the base ----


def test_text_sampled_from_the_base_is_made_once(tmp_path, stories, gsm8k, monkeypatch):
    monkeypatch.setattr(data, "SAMPLED_LENGTH", 32)
    text = f"""\
model_name_or_path: {stories}
dataset_name: {gsm8k}/train.jsonl
dataset_columns: {{prompt: question, completion: answer}}
prompt_format: "{{prompt}}\\n"
dataset_limit: 40
max_length: 128
compare: {{in_domain: {gsm8k}/test.jsonl, out_of_domain: [base_samples], eval_rows: 4, out_of_domain_rows: 4, k: 0}}
"""
    recipe, options = load_comparison(write_recipe(tmp_path, text), [], {})
    folder = prepare(recipe)
    rows = make_setting(recipe, options, folder).data
    (path,) = folder.glob("base_samples-*.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) > 100 and len(set(texts)) > 100 and "once upon a time" in " ".join(texts).lower()
    assert [row["text"] for row in rows.out_of_domain["base_samples"].rows] == texts[:4]
    assert rows.metric == "mixed" and rows.counts["in_domain"] == 4  # GSM8K's answers can be checked, texts cannot
    written = path.stat().st_mtime_ns
    assert make_setting(recipe, options, folder).data.key == rows.key
    assert path.stat().st_mtime_ns == written


# ---- several shares of wrong rows ----


def test_the_noise_study_compares_at_each_share(tmp_path, monkeypatch):
    def compare_at(recipe, options, *, noise, folder):
        folder.mkdir()
        assert options.results_dir == str(tmp_path / "comparison" / "results")
        kept = {0.0: 0.5, 0.1: 0.6, 0.5: 0.8}[noise]
        scores = {"sft": {s: [(0.9, 0.5 - noise + s / 50)] for s in range(3)}}
        return make_comparison(scores | {"psft_visits": {s: [(0.9, kept)] for s in range(3)}})

    monkeypatch.setattr("qpsft.compare.comparison.compare_loaded", compare_at)
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    study = noise_study.study_noise(recipe, options, [0.5, 0, 0.1])
    assert list(study.comparisons) == [0.0, 0.1, 0.5]
    gains = study.gains("psft_visits")["at equal in-domain accuracy"]
    assert [round(gain.mean, 3) for gain in gains] == [-0.02, 0.18, 0.78]
    assert "+.180 ± " in str(study)
    assert json.loads((tmp_path / "comparison" / "noise.json").read_text())["noise"] == [0.0, 0.1, 0.5]
    assert (tmp_path / "comparison" / "noise.png").is_file()
    with pytest.raises(RecipeError, match="compares with sft"):
        options.arms = ["psft"]
        noise_study.study_noise(recipe, options, [0.1])


def test_the_noise_study_as_a_program(tmp_path, monkeypatch, capsys):
    asked = []

    def compare_at(recipe, options, *, noise, folder):
        folder.mkdir(exist_ok=True)
        asked.append((noise, options.seeds, options.arms, recipe.lora.lora_r))
        scores = {arm: {seed: [(0.9, 0.5)] for seed in range(3)} for arm in options.arms}
        return make_comparison(scores)

    monkeypatch.setattr("qpsft.compare.comparison.compare_loaded", compare_at)
    recipe = str(write_recipe(tmp_path))
    assert noise_study.main([recipe, "--noise", "0,0.5", "--seeds", "3", "--lora_r", "4"]) == 0
    assert asked == [(share, 3, ["sft", "psft_visits"], 4) for share in (0.0, 0.5)]
    out = capsys.readouterr().out
    assert "50% wrong demonstrations" in out and f"report: {tmp_path / 'comparison'}/report.html" in out
    for argv, message in (
        ([recipe, "--noise", "0,2"], "shares are from 0 to 1"),
        (["--noise", "0"], "needs a recipe"),
        ([recipe, "--nois", "0"], "--nois: there is no such option"),
    ):
        assert noise_study.main(argv) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_noise_changes_the_answers_and_not_the_questions(tmp_path):
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    tokenizer = load_tokenizer("demo")
    few, many = (load_data(recipe, options, tokenizer, noise=noise) for noise in (0.0, 1.0))
    assert few.key != many.key and len(few.train) == len(many.train) == 16
    prompts = [
        [ids[: labels.count(-100)] for ids, labels in zip(data.train["input_ids"], data.train["labels"], strict=True)]
        for data in (few, many)
    ]
    assert prompts[0] == prompts[1]
