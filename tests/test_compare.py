"""Which runs a comparison takes, what is reused, and how learning rates are chosen; the runs themselves are made up."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
from comparing import FakeRuns, write_recipe
from datasets import Dataset

from qpsft import cli
from qpsft.compare import compare, queue, report
from qpsft.compare.arms import ARMS, find_arms
from qpsft.compare.comparison import choose_rate
from qpsft.compare.coverage import unseen_share
from qpsft.compare.options import load_comparison
from qpsft.compare.report import report_page
from qpsft.compare.run import RESULT
from qpsft.compare.tables import tuning_rows
from qpsft.compare.verdict import limits
from qpsft.errors import RecipeError, TrainingError
from qpsft.recipe.methods import METHODS


def scores(spec):
    """PSFT keeps more; each is best in-domain at another rate than out of domain."""
    if not spec.method:
        return [(0.0, 0.9)], 0.0
    kept = 0.6 if spec.method["loss_type"] == "psft" else 0.2
    best = 4e-3 if spec.method["loss_type"] == "psft" else 1e-3
    off = abs(spec.learning_rate - best)
    return [(0.5 - off, 0.7), (0.9 - off, kept + spec.seed / 100)], 0.9 - 10 * off


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda comparison, folder: None)  # drawing takes seconds

    def use(**changes):
        runs = FakeRuns(**({"scores": scores} | changes))
        monkeypatch.setattr(queue, "do_run", runs)
        return runs

    return use


def labels(runs):
    return sorted(spec.label for spec in runs.specs)


def test_every_arm_runs_once_per_seed_and_shared_runs_once(tmp_path, fake):
    runs = fake()
    found = compare(write_recipe(tmp_path), arms="sft,sft_matched,psft")
    # sft_matched is sft here: both have the recipe's learning rate
    expected = [f"{kind}-lr2e-3-seed{seed}" for kind in ("nll", "psft") for seed in (3, 4)]
    assert labels(runs) == sorted(["base", *expected])
    assert (found.done, found.reused) == (5, 0)
    assert found.arms["psft"].last("out_of_domain") == {3: 0.63, 4: 0.64}
    assert found.same_runs("sft", "sft_matched") and not found.same_runs("sft", "psft")


def test_adding_arms_and_seeds_reuses_the_others(tmp_path, fake):
    recipe = write_recipe(tmp_path)
    fake()
    compare(recipe, arms="sft,psft")
    runs = fake()
    found = compare(recipe, arms="sft,dft,psft", seeds=3)
    assert labels(runs) == [f"dft-lr2e-3-seed{s}" for s in (3, 4, 5)] + ["nll-lr2e-3-seed5", "psft-lr2e-3-seed5"]
    assert (found.done, found.reused) == (5, 5)
    runs = fake()
    assert compare(recipe, arms="sft,dft,psft", seeds=3).done == 0
    assert not runs.specs


def test_killed_between_runs_it_goes_on_with_the_next(tmp_path, fake):
    recipe = write_recipe(tmp_path)
    first = fake(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, arms="sft,psft")
    second = fake()
    found = compare(recipe, arms="sft,psft")
    assert len(first.specs) == 3 and len(second.specs) == 2
    assert not set(labels(first)) & set(labels(second))
    assert (found.reused, found.done) == (3, 2)


def test_a_result_that_was_cut_off_is_made_again(tmp_path, fake):
    recipe = write_recipe(tmp_path)
    fake()
    compare(recipe, arms="sft", seeds=1)
    (path,) = tmp_path.glob(f"comparison/results/nll-*/{RESULT}")
    path.write_text(path.read_text()[:100])
    runs = fake()
    assert compare(recipe, arms="sft", seeds=1).done == 1
    assert labels(runs) == ["nll-lr2e-3-seed3"]
    assert json.loads(path.read_text())["label"] == "nll-lr2e-3-seed3"


@pytest.mark.parametrize("change", ["--max_grad_norm=0.5", "--lora_r=8", "--dataset_limit=12", "--quantization=none"])
def test_what_decides_a_run_makes_another_one(tmp_path, fake, change):
    recipe = write_recipe(tmp_path)
    fake()
    compare(recipe, arms="sft", seeds=1)
    runs = fake()
    compare(recipe, [change], arms="sft", seeds=1)
    assert "nll-lr2e-3-seed3" in labels(runs)


def test_what_does_not_decide_a_run_reuses_it(tmp_path, fake):
    recipe = write_recipe(tmp_path)
    fake()
    compare(recipe, arms="sft,psft", seeds=1)
    runs = fake()
    compare(recipe, ["--logging_steps=3", "--num_iterations=8", "--save_strategy=steps"], arms="sft,psft", seeds=1)
    assert not runs.specs  # visits belong to psft_visits, and no arm here has them


def test_tuning_chooses_on_validation_and_reuses_the_grid(tmp_path, fake):
    runs = fake()
    found = compare(
        write_recipe(tmp_path),
        arms="sft,sft_matched,psft",
        seeds=3,
        tune=True,
        tune_seeds=2,
        learning_rates=[1e-3, 2e-3, 4e-3],
    )
    assert {name: arm.learning_rate for name, arm in found.arms.items()} == {
        "sft": 1e-3,
        "psft": 4e-3,
        "sft_matched": 4e-3,
    }
    # base, 2 arms × 3 rates × 2 seeds, one more seed each, and sft_matched's third seed at a rate the grid has for two
    assert len(runs.specs) == 1 + 12 + 2 + 1
    assert sorted(found.arms["psft"].runs) == [3, 4, 5]
    assert set(found.arms["sft"].grid) == {1e-3, 2e-3, 4e-3} and not found.arms["sft_matched"].grid
    record = json.loads((tmp_path / "comparison/comparison.json").read_text())
    assert record["arms"]["psft"]["tuning"]["0.004"] == pytest.approx(0.9)


def test_test_scores_do_not_move_the_choice(tmp_path, fake):
    def poisoned(spec):
        after_epochs, validation = scores(spec)
        good = spec.learning_rate == 2e-3
        return [(float(good), float(good)) for _ in after_epochs], validation

    fake(scores=poisoned)
    found = compare(write_recipe(tmp_path), arms="sft,psft", tune=True, learning_rates=[1e-3, 2e-3, 4e-3])
    assert (found.arms["sft"].learning_rate, found.arms["psft"].learning_rate) == (1e-3, 4e-3)


def test_choose_rate():
    assert choose_rate({1e-3: [0.5, 0.7], 2e-3: [0.9, 0.1]}, 1) == 1e-3
    assert choose_rate({1e-3: [0.5, 0.7], 2e-3: [0.9, 0.1]}, -1) == 2e-3
    assert choose_rate({4e-3: [0.5], 1e-3: [0.5]}, 1) == 1e-3
    for sign in (1, -1):  # NaN or infinite: training diverged
        assert choose_rate({1e-3: [math.nan, 0.9], 2e-3: [0.1, 0.1], 4e-3: [math.inf]}, sign) == 2e-3


# ---- rows that visits leave no time for ----

VISITS = {"reference_steps": 8, "num_iterations": 4, "sft_warmup_steps": 8}


def trainer_options(**changes):
    options = {"train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": -1, "packing": False}
    return SimpleNamespace(**(options | changes))


@pytest.mark.parametrize(
    ("method", "epochs", "changes", "expected"),
    [
        (VISITS, 2, {}, 0.392),  # 126 steps: 8 + 3 × 8 + ⌈22 / 4⌉ = 38 mini-batches of 16 rows, of 1,000
        (VISITS, 4, {}, 0.0),
        ({}, 2, {}, 0.0),
        ({"reference_steps": 8, "num_iterations": 1}, 2, {}, 0.0),
        ({}, 0.5, {}, 1 - 32 * 16 / 1000),
        (VISITS, 2, {"max_steps": 40}, 1 - 16 * 16 / 1000),  # 8 + 32 / 4 mini-batches
        (VISITS, 2, {"train_batch_size": 4, "gradient_accumulation_steps": 4}, 0.392),
        (VISITS, 2, {"packing": True, "max_length": 64}, 1 - (8 + 6) * 16 / 250),  # 250 pieces, 32 steps
    ],
)
def test_unseen_share_by_hand(method, epochs, changes, expected):
    rows = Dataset.from_dict({"input_ids": [[1] * 16] * 1000})
    assert unseen_share(method, trainer_options(**changes), epochs, rows) == pytest.approx(expected)


def test_rows_that_an_arm_never_saw_are_told_before_and_after(tmp_path, fake):
    runs = fake()
    said = []

    def told(spec):
        said.append([str(one.message) for one in caught])
        return scores(spec)

    runs.scores = told
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compare(write_recipe(tmp_path), ["--dataset_limit=64"], arms="sft,sft_blocks,psft,psft_visits")
    # 32 steps: 2 of warm-up and 4 blocks of 2 mini-batches, of 16
    line = "sft_blocks and psft_visits saw 62% of the rows, since each is visited 4 times: --epochs 4 shows them all."
    assert [one for one in said[0] if "rows" in one] == [line]
    assert line in limits(found)
    record = json.loads((tmp_path / "comparison/comparison.json").read_text())["arms"]
    assert {name: arm["unseen_share"] for name, arm in record.items()} == {
        "sft": 0, "sft_blocks": 0.375, "psft": 0, "psft_visits": 0.375,
    }  # fmt: skip
    assert "several visits, one block of SFT first, learning rate 0.002 (62% of the rows)" in report_page(found, {})
    four = compare(write_recipe(tmp_path), ["--dataset_limit=64"], arms="sft,psft_visits", epochs=4)
    assert limits(four) == []


# ---- learning rates that diverge ----

GRID = {"arms": "sft,sft_matched,psft", "tune": True, "learning_rates": [1e-3, 2e-3, 4e-3]}


def test_a_rate_that_diverges_is_the_worst_and_the_others_are_compared(tmp_path, fake):
    # psft's best rate is 4e-3; one of its two seeds diverges there
    runs = fake(diverges=lambda spec: "psft-lr4e-3-seed4" in spec.label)
    found = compare(write_recipe(tmp_path), **GRID)
    assert found.arms["psft"].learning_rate == 2e-3
    assert len(runs.specs) == 1 + 12  # every run of the grid is done all the same
    record = json.loads((tmp_path / "comparison/comparison.json").read_text())["arms"]["psft"]
    assert record["tuning"] == {"0.001": pytest.approx(0.87), "0.002": pytest.approx(0.88), "0.004": None}
    assert record["grid"]["0.004"]["4"]["diverged"]["step"] == 6 and "diverged" not in record["grid"]["0.004"]["3"]
    runs = fake()
    assert compare(write_recipe(tmp_path), **GRID).reused == 13 and not runs.specs


def test_a_rate_that_diverges_is_told_in_table_and_verdict(tmp_path, fake):
    fake(diverges=lambda spec: spec.learning_rate == 4e-3)
    found = compare(write_recipe(tmp_path), **GRID)
    assert ["psft", ".870", ".880", "diverged"] in tuning_rows(found, "")
    line = (
        "psft: training diverged at learning rate 0.004 (2 of 2 seeds, at optimizer step 6), so it counts as the worst."
    )
    assert line in limits(found)
    assert "<td>diverged</td>" in report_page(found, {})


def test_a_run_at_a_chosen_rate_that_diverges_ends_the_comparison(tmp_path, fake):
    # the third seed has no part in the choice
    runs = fake(diverges=lambda spec: "psft-lr4e-3-seed5" in spec.label)
    counts = []
    for _ in range(2):
        with pytest.raises(
            TrainingError, match="psft-lr4e-3-seed5 diverged.*: Training stopped at .* step 6"
        ) as caught:
            compare(write_recipe(tmp_path), **GRID, seeds=3)
        assert "--learning_rates" in caught.value.todo
        counts.append(len(runs.specs))
    assert counts[0] == counts[1]  # what is known to diverge is not trained once more


def test_a_rate_taken_over_that_diverges_ends_the_comparison_before_more_runs(tmp_path, fake):
    runs = fake(diverges=lambda spec: "nll-lr4e-3" in spec.label)  # sft_matched takes psft's
    with pytest.raises(TrainingError, match="nll-lr4e-3-seed3 diverged"):
        compare(write_recipe(tmp_path), **GRID, seeds=3)
    assert len(runs.specs) == 1 + 12


def test_when_every_rate_diverges_it_says_so(tmp_path, fake):
    fake(diverges=lambda spec: spec.method["loss_type"] == "nll")
    with pytest.raises(TrainingError, match=r"sft diverged at every learning rate of the grid \(0.001, 0.002, 0.004\)"):
        compare(write_recipe(tmp_path), **GRID)


def test_known_rates_are_taken(tmp_path, fake):
    runs = fake()
    compare(write_recipe(tmp_path), arms="sft,sft_matched,psft", seeds=1, arm_rates="{sft: 2e-3, psft: 5e-4}")
    assert labels(runs) == ["base", "nll-lr2e-3-seed3", "nll-lr5e-4-seed3", "psft-lr5e-4-seed3"]


def test_methods_of_the_arms(tmp_path):
    recipe, _ = load_comparison(write_recipe(tmp_path), [], {})
    methods = {name: arm.options(recipe.trainer) for name, arm in ARMS.items()}
    assert set(METHODS) <= set(ARMS)
    assert methods["sft"] == methods["sft_matched"] == {"loss_type": "nll"}
    assert methods["dft"] == {"loss_type": "dft"}
    psft = {"loss_type": "psft", "epsilon": 0.28, "reference_steps": 2, "num_iterations": 1, "sft_warmup_steps": 0}
    assert methods["psft"] == psft
    assert methods["psft_kl"] == psft | {"base_kl": 0.05} and methods["psft_replay"] == psft | {"replay_share": 0.1}
    assert ARMS["psft_replay"].options(recipe.trainer, 0.2)["replay_share"] == 0.2
    assert methods["asft"] == {"loss_type": "dft", "base_kl": 0.05}
    assert methods["psft_visits"] == psft | {"num_iterations": 4, "sft_warmup_steps": 2}
    # the same order as psft_visits, another loss
    order = {name: methods["psft_visits"][name] for name in ("reference_steps", "num_iterations", "sft_warmup_steps")}
    assert methods["sft_blocks"] == {"loss_type": "nll", "block_order": True, **order}


def test_unknown_arms_get_the_nearest_name():
    with pytest.raises(RecipeError, match="no arm 'psft_visit'. Did you mean psft_visits"):
        find_arms(["sft", "psft_visit"])
    with pytest.raises(RecipeError, match="takes the learning rate of psft or psft_visits"):
        find_arms(["sft", "sft_matched"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--arms", "sfft"], "Did you mean sft"),
        (["--seeds", "many"], "--seeds is 'many'; it must be a whole number"),
        (["--tune", "--seeds", "2", "--tune_seeds", "3"], "tune_seeds is 3, more than the 2 seeds"),
        (["--learning_rates", "1e-3,-1"], "learning_rates is -1.0; it must be above 0"),
        (["--noise", "0,0.3"], "Use `python benchmarks/noise_study.py RECIPE"),
        (["--sedes", "3"], "--sedes: there is no such option"),
        (["--in_domain", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_in_one_paragraph(tmp_path, capsys, flags, message):
    assert cli.main(["compare", str(write_recipe(tmp_path)), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_misspelt_option_in_the_recipe(tmp_path):
    recipe = write_recipe(tmp_path, "model_name_or_path: demo\ndataset_name: demo-noisy\ncompare: {sedes: 3}\n")
    with pytest.raises(RecipeError, match="compare: sedes: there is no such option. Did you mean seeds"):
        compare(recipe)


def test_flags_win_and_epochs_default_to_four(tmp_path):
    text = "model_name_or_path: demo\ndataset_name: demo-noisy\ncompare: {seeds: 3, k: 2}\n"
    _, options = load_comparison(write_recipe(tmp_path, text), [], {"seeds": "7"})
    assert (options.seeds, options.k, options.epochs) == (7, 2, 4)
    recipe, options = load_comparison(write_recipe(tmp_path, text + "num_train_epochs: 2\n"), [], {})
    assert options.epochs is None and recipe.trainer.num_train_epochs == 2


def test_help(capsys):
    assert cli.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--arms" in text and "sft,psft_visits,sft_kl,psft_replay,sft_replay" in " ".join(text.split())
