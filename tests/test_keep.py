"""`qpsft evaluate --keep`: real models that kept and lost skills, what is said of them, exit codes, the model card."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import shared_path
from exporting import make_adapter, merge_by_hand

from qpsft import cli
from qpsft.data import built_in
from qpsft.errors import DataError
from qpsft.evaluate import harness, ifeval, keep, kept_card
from qpsft.evaluate.estimates import Estimate, paired_difference
from qpsft.evaluate.keep import KEPT, LOST, UNSURE, Kept, KeptSkill, verdict_on
from qpsft.evaluate.options import EvaluationOptions
from qpsft.model.base import load_base
from qpsft.recipe.flags import Parser, parse

pytestmark = pytest.mark.filterwarnings("ignore")
DESTROYED = 3.0
"""Size of B's random entries at which nothing of the base is left."""


def run(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def gate(folder, target, *arguments):
    """Exit code, and what was written of --keep."""
    code = run(folder, "--keep", *arguments, "--json", target)
    return code, json.loads(target.read_text(encoding="utf-8"))["keep"]


# ---- statistics ----


def test_the_interval_of_a_paired_difference_is_bonett_and_price_s():
    """Worked by hand from their formula: f12 = 3 rows got worse, f21 = 8 got better, of n = 40."""
    before = np.array([1] * 3 + [0] * 8 + [1] * 20 + [0] * 9)
    after = np.array([0] * 3 + [1] * 8 + [1] * 20 + [0] * 9)
    worse, better, n = 4 / 42, 9 / 42, 42
    half = 1.96 * np.sqrt((worse + better - (better - worse) ** 2) / n)
    found = paired_difference(before, after)
    assert found.value == 5 / 40
    assert (found.low, found.high) == pytest.approx((better - worse - half, better - worse + half))


def test_rows_none_of_which_differ_are_not_certain():
    same = np.ones(20)
    found = paired_difference(same, same)
    assert found.value == 0 and found.high == -found.low == pytest.approx(1.96 * np.sqrt(2) / 22)
    worst = paired_difference(np.ones(5), np.zeros(5))
    assert worst.value == worst.low == -1 and worst.high > -1


@pytest.mark.parametrize(
    ("base", "difference", "verdict", "said"),
    [
        (0.6, Estimate(-0.10, -0.14, -0.06), LOST, ""),
        (0.6, Estimate(-0.10, -0.24, 0.04), LOST, "reaches +0.040"),
        (0.6, Estimate(0.7 - 0.75, -0.10, 0.00), UNSURE, "100 rows are too few"),  # -0.050000000000000044
        (0.6, Estimate(-0.02, -0.04, 0.00), KEPT, ""),
        (0.6, Estimate(0.10, -0.06, 0.26), UNSURE, "100 rows are too few"),
        (0.05, Estimate(0.0, -0.01, 0.01), UNSURE, "the base itself scores 0.050"),
        (0.6, Estimate(math.nan, math.nan, math.nan), LOST, ""),
    ],
)
def test_verdicts(base, difference, verdict, said):
    found, note = verdict_on(base, difference, 100, 0.05)
    assert found == verdict and said in note and bool(said) == bool(note)


def test_as_few_rows_as_are_said_are_enough_for_kept():
    for max_drop in (0.01, 0.05, 0.1, 0.3):
        least = int(keep.few_rows(1, max_drop).partition("KEPT takes ")[2].split()[0])
        for rows, verdict in ((least, KEPT), (least - 1, UNSURE)):
            same = np.ones(rows)
            assert verdict_on(1.0, paired_difference(same, same), rows, max_drop)[0] == verdict


# ---- the embedded base: no benchmark, no network ----


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("zero") / "adapter", size=0.0)


@pytest.fixture(scope="module")
def destroyed(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("destroyed") / "adapter", size=DESTROYED)


def test_an_untrained_adapter_kept_everything(zero, tmp_path, capsys):
    code, record = gate(zero, tmp_path / "a.json", "--limit", 10, "--max_drop", 0.3)
    assert code == 0 and set(record["skills"]) == set(built_in.OUT_OF_DOMAIN)
    for skill in record["skills"].values():
        assert skill["difference"]["value"] == 0.0 and skill["verdict"] == KEPT and skill["rows"] == 10
        assert skill["per_row"]["base"] == skill["per_row"]["tuned"] and skill["base"] >= 0.5
    said = capsys.readouterr().out
    assert "KEPT: nothing fell by as much as 0.3" in said
    assert "in_domain" not in said  # its own rows, which evaluate measures without --keep


def test_a_destroyed_adapter_lost_everything_and_fails(destroyed, tmp_path, capsys):
    code, record = gate(destroyed, tmp_path / "a.json", "--limit", 10)
    assert code == 1 and {skill["verdict"] for skill in record["skills"].values()} == {LOST}
    styles = record["skills"]["styles"]
    assert np.mean(styles["per_row"]["base"]) == styles["base"] > 0.8 and styles["tuned"] < 0.2
    assert "LOST: set_b, shorter_a, any_order and styles fell by more than 0.05." in " ".join(
        capsys.readouterr().out.split()
    )
    assert run(destroyed, "--keep", "styles", "--limit", 5, "--max_drop", 1) == 0


def test_too_few_rows_are_said_and_do_not_fail(zero, tmp_path, capsys):
    code, record = gate(zero, tmp_path / "a.json", "--limit", 5)
    assert code == 0 and {skill["verdict"] for skill in record["skills"].values()} == {UNSURE}
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "any_order and styles: 5 rows are too few to rule out a fall by more than 0.05 (KEPT takes 54 at least)" in said
    )
    assert "Nothing fell by more than 0.05, but not sure of set_b, shorter_a, any_order and styles." in said


def test_a_whole_model_is_compared_with_the_base_that_is_named(destroyed, tmp_path, capsys):
    merged = merge_by_hand(destroyed, tmp_path / "merged")
    assert run(merged, "--keep") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "not an adapter's folder" in said and "the one that it was tuned from: --base MODEL." in said
    for model, base in ((tmp_path / "gone", "demo"), ("demo", tmp_path / "gone")):
        assert run(model, "--keep", "--base", base) == 2
        captured = capsys.readouterr()
        assert "asking" not in captured.out and str(tmp_path / "gone") in " ".join(captured.err.split())
    code, record = gate(merged, tmp_path / "a.json", "styles", "--base", "demo", "--limit", 10)
    assert code == 1 and record["skills"]["styles"]["verdict"] == LOST and record["skills"]["styles"]["base"] > 0.8
    code, record = gate("demo", tmp_path / "a.json", "--base", "demo", "--limit", 10, "--max_drop", 0.3)
    assert code == 0 and {skill["verdict"] for skill in record["skills"].values()} == {KEPT}


def test_data_and_the_gate_in_one_run(zero, tmp_path, capsys):
    target = tmp_path / "a.json"
    assert run(zero, "--data", "demo-clean", "--k", 0, "--keep", "styles", "--limit", 2, "--json", target) == 0
    record = json.loads(target.read_text())
    assert set(record["keep"]["skills"]) == {"styles"} and "in_domain" in record["data"]


# ---- benchmarks ----


@pytest.fixture(scope="module")
def own_choices(stories, tmp_path_factory):
    """Twenty questions of ARC whose right answer is the one that stories260K finds likeliest."""
    pytest.importorskip("lm_eval")
    source = shared_path("data/arc/arc_easy.jsonl")
    model, tokenizer = load_base(stories, device="cpu", verbose=False)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:20]]
    found = harness.run_tasks(model, tokenizer, ["arc_easy"], task_data={"arc_easy": source}, limit=20, samples=True)
    for sample in found["arc_easy"]["samples"]:
        likelihoods = [one[0] for one in sample["filtered_resps"]]
        rows[sample["doc_id"]]["gold"] = int(np.argmax(likelihoods))
    file = tmp_path_factory.mktemp("rows") / "arc_easy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_all_benchmarks_from_files_with_an_untrained_adapter(stories, own_choices, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", stories, size=0.0)
    files = {
        "ifeval": shared_path("data/ifeval/input_data.jsonl"),
        "truthfulqa": shared_path("data/truthfulqa/TruthfulQA.csv"),
        "arc_easy": own_choices,
        "openbookqa": shared_path("data/openbookqa/openbook_qa.jsonl"),
    }
    local = [f"{name}={path}" for name, path in files.items()]
    few = ["--limit", 5, "--max_drop", 0.4]  # KEPT takes 5 rows then
    code, record = gate(adapter, tmp_path / "a.json", *few, "--max_new_tokens", 8, "--task_data", *local)
    assert code == 0 and list(record["skills"]) == list(keep.SKILLS)
    for name, skill in record["skills"].items():
        assert skill["difference"]["value"] == 0 and skill["rows"] == 5 and skill["metric"] == keep.SKILLS[name].metric
        assert skill["verdict"] == (KEPT if skill["base"] > 0.4 else UNSURE)
    assert record["skills"]["arc_easy"]["base"] == 1.0
    said = " ".join(capsys.readouterr().out.split())
    left_out = not ifeval._has_punkt()
    assert ("of its prompts are left out" in said) == left_out and "TruthfulQA MC1" in said


def test_the_base_is_the_model_without_its_adapter_and_a_destroyed_one_fails(stories, own_choices, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", stories, size=DESTROYED)
    local = ["--task_data", f"arc_easy={own_choices}"]
    code, record = gate(adapter, tmp_path / "a.json", "arc_easy", *local)
    (skill,) = record["skills"].values()
    assert code == 1 and skill["verdict"] == LOST and skill["base"] == 1.0 and skill["tuned"] < 0.6
    assert run(adapter, "--tasks", "arc_easy", *local, "--json", tmp_path / "b.json") == 0
    alone = json.loads((tmp_path / "b.json").read_text())["tasks"]["arc_easy"]["metrics"]["acc"]["value"]
    assert skill["tuned"] == alone


def test_a_model_whose_numbers_are_not_finite_is_an_error_that_says_so(stories, own_choices, tmp_path, capsys):
    """The harness takes the first of choices that are NaN, in TruthfulQA MC1 always the right one: a score of 1."""
    adapter = make_adapter(tmp_path / "adapter", stories, size=math.nan)
    local = ["--task_data", f"truthfulqa={shared_path('data/truthfulqa/TruthfulQA.csv')}", f"arc_easy={own_choices}"]
    assert run(adapter, "--keep", "truthfulqa_mc1", "arc_easy", "--limit", 5, *local) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "On 5 of 5 rows of TruthfulQA MC1 the tuned model's log-likelihoods are not finite numbers" in said
    assert "broken" in said and "adapter off" not in said


def test_mc2_of_a_model_that_finds_every_choice_very_unlikely():
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}

    def score(*likelihoods):
        row = {"doc": doc, "filtered_resps": [(one, False) for one in likelihoods], "acc": None}
        return keep.score_of("truthfulqa_mc2", row)

    thirds = [math.log(share) for share in (0.5, 0.25, 0.25)]
    assert score(*thirds) == pytest.approx(0.75)
    assert score(*(one - 2000 for one in thirds)) == pytest.approx(0.75)  # exp() of each is 0
    assert math.isnan(score(math.nan, *thirds[1:])) and math.isnan(score(-math.inf, *thirds[1:]))


def test_prompts_that_need_punkt_are_left_out_only_without_it(monkeypatch):
    pytest.importorskip("lm_eval")
    path = shared_path("data/ifeval")
    monkeypatch.setattr(ifeval, "_has_punkt", lambda: True)
    rows, left_out = ifeval.ifeval_rows(path)
    assert len(rows) == 541 and left_out == 0
    monkeypatch.setattr(ifeval, "_has_punkt", lambda: False)
    others, left_out = ifeval.ifeval_rows(path, 400)
    assert len(others) == 400 and 0 < left_out < 141
    without = [row for row in rows if "sentences" not in str(row["instruction_id_list"])]
    assert all(row in without for row in others)


def test_the_hub_s_rows_of_ifeval_are_checked_like_the_file_s(stories, monkeypatch):
    """The Hub's have every argument of every check, None where it is not that check's."""
    import datasets

    pytest.importorskip("lm_eval")
    (local, *_), _ = ifeval.ifeval_rows(shared_path("data/ifeval"), 1)
    names = {name for kwargs in local["kwargs"] for name in kwargs} | {"letter"}
    hub = local | {"kwargs": [dict.fromkeys(names) | kwargs for kwargs in local["kwargs"]]}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: {("google/IFEval", "train"): datasets.Dataset.from_list([hub])}[name, split],
    )
    (row,), _ = ifeval.ifeval_rows(None)
    assert row["kwargs"] != local["kwargs"]
    model, tokenizer = load_base(stories, device="cpu", verbose=False)
    found, expected = (ifeval.follow_instructions(model, tokenizer, [one], max_new_tokens=5) for one in (row, local))
    assert found == expected and len(found[0]["inst_level_strict_acc"]) == len(local["instruction_id_list"]) > 1


def test_instructions_are_checked_on_greedy_answers(stories):
    pytest.importorskip("lm_eval")
    model, tokenizer = load_base(stories, device="cpu", verbose=False)
    row = {"key": 1, "prompt": "Once upon a time", "kwargs": [{}]}
    rows = [row | {"instruction_id_list": [rule]} for rule in ("punctuation:no_comma", "change_case:english_capital")]
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [
        one["prompt_level_strict_acc"] for one in ifeval.follow_instructions(model, tokenizer, rows, max_new_tokens=20)
    ]
    assert found == ["," not in text, False]


def test_without_the_harness_it_says_what_to_install(stories, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(tmp_path / "adapter", stories)
    monkeypatch.setattr(harness, "_manager", harness._manager.__wrapped__)  # not the index that is there already
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(adapter, "--keep") == 2
    assert "which is not installed. pip install '.[eval]'" in " ".join(capsys.readouterr().err.split())


def test_rows_that_are_nowhere_name_the_flag(stories, tmp_path, monkeypatch, capsys):
    import datasets

    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    adapter = make_adapter(tmp_path / "adapter", stories)
    for skill in ("ifeval", "arc_easy"):
        assert run(adapter, "--keep", skill, "--limit", 1) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"data of {skill} could not be read" in said and f"--task_data {skill}=PATH" in said


def test_all_rows_that_are_nowhere_are_named_at_once_before_a_model_is_loaded(stories, tmp_path, monkeypatch, capsys):
    import datasets

    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("qpsft.evaluate.run.load_evaluated", lambda *_, **__: pytest.fail("a model is loaded"))
    adapter = make_adapter(tmp_path / "adapter", stories)
    capsys.readouterr()
    assert run(adapter, "--keep") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--task_data ifeval=PATH truthfulqa=PATH arc_easy=PATH openbookqa=PATH" in said
    local = [f"ifeval={shared_path('data/ifeval/input_data.jsonl')}", f"arc_easy={tmp_path / 'arc.jsonl'}"]
    (tmp_path / "arc.jsonl").write_text('{"text": "no question"}\n', encoding="utf-8")
    assert run(adapter, "--keep", "ifeval", "openbookqa", "--task_data", local[0]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data of openbookqa could not be read" in said and "--task_data openbookqa=PATH" in said
    assert run(adapter, "--keep", "arc_easy", "--task_data", local[1]) == 2
    assert "arc.jsonl, line 1 lacks question" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "arc"], "--keep has no skill 'arc'"),
        (["--keep", "--max_drop", "-1"], "max_drop is -1; it must be from 0 to 1. It is a share: 0.05 is 5 points"),
        (["--keep", "--max_drop", "5"], "max_drop is 5; it must be from 0 to 1. It is a share: 0.05 is 5 points"),
        (["--data", "demo-clean", "--max_drop", "0.05"], "--max_drop is given without --keep"),
        (["--keep", "styles", "--task_data", "gsm8k=."], "--task_data names gsm8k, which --keep does not ask."),
        (["--task_data", "gsm8k=."], "--task_data is given without --tasks or --keep"),
    ],
)
def test_mistakes_are_one_paragraph(zero, arguments, message, capsys):
    assert run(zero, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_behind_a_flag_that_takes_words_is_told_to_stand_first(zero, capsys):
    assert run("--keep", zero) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the following arguments are required: MODEL" in said
    assert "Put the model first: qpsft evaluate MODEL --keep." in said


def test_skills_are_read_as_they_are_declared():
    def read(*argv):
        return parse(Parser("qpsft evaluate", "", ""), ["m", *argv], EvaluationOptions).keep

    assert read() is False and read("--keep") is True and read("--keep", "--limit", "3") is True
    assert read("--keep", "ifeval") == ["ifeval"] and read("--keep", "ifeval,arc_easy") == ["ifeval", "arc_easy"]
    assert list(keep.chosen_skills(["truthfulqa", "ifeval"], keep.SKILLS)) == [
        "truthfulqa_mc1", "truthfulqa_mc2", "ifeval"
    ]  # fmt: skip
    assert list(keep.chosen_skills(True, keep.SKILLS)) == list(keep.SKILLS)
    with pytest.raises(DataError, match="no skill 'arc_esy'. Did you mean arc_easy?"):
        keep.chosen_skills(["arc_esy"], keep.SKILLS)


# ---- the model card ----

CARD = "---\nlibrary_name: peft\n---\r\n\r\n# Mine\n\nMy own text: \\1 ü.  \n\n## What it kept\n\nMine too.\n"


def a_result(verdict=KEPT, **changes):
    skill = KeptSkill("ARC-easy", "acc", 60, 0.5, 0.49, Estimate(-0.01, -0.03, 0.01), verdict, **changes)
    return Kept(0.05, "its base (adapter off)", {"set_b": skill}, [])


def test_only_the_own_section_of_a_card_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(CARD.encode())
    assert kept_card.update_card(tmp_path, a_result()) == path
    first = path.read_bytes().decode()
    assert first.startswith(CARD) and first.count("KEPT: nothing fell by as much as 0.05.") == 1
    assert "| ARC-easy | 60 | 0.500 | 0.490 | -0.010 [-0.030, +0.010] | KEPT |" in first
    path.write_bytes((first + "\nAdded below.\n").encode())
    kept_card.update_card(tmp_path, a_result(LOST, note="\\2 for a reason."))
    second = path.read_bytes().decode()
    assert second.startswith(CARD) and second.endswith("\nAdded below.\n")
    assert second.count(kept_card.BEGIN) == 1 and "LOST: ARC-easy fell by more than 0.05." in second
    assert "- ARC-easy: \\2 for a reason." in second and "nothing fell" not in second
    assert [one.name for one in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_cannot_be_written_is_what_it_was_and_the_verdict_stands(destroyed, monkeypatch, capsys):
    from qpsft import files

    card = destroyed / "README.md"
    card.write_bytes(CARD.encode())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert run(destroyed, "--keep", "styles", "--limit", 5) == 1
    assert "could not be updated: No space left on device" in " ".join(capsys.readouterr().out.split())
    assert card.read_bytes() == CARD.encode()
    monkeypatch.undo()
    assert run(destroyed, "--keep", "styles", "--limit", 5) == 1
    assert f"written: {card} (What it kept)" in capsys.readouterr().out
    assert b"| styles | 5 |" in card.read_bytes() and card.read_bytes().startswith(CARD.encode())


def test_a_folder_without_a_card_gets_none(zero, capsys):
    (zero / "README.md").unlink()  # PEFT's
    assert run(zero, "--keep", "styles", "--limit", 2) == 0
    assert f"there is no {zero / 'README.md'}" in capsys.readouterr().out and not (zero / "README.md").exists()
