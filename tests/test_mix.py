"""Several sources in stated shares of every mini-batch: the order of their rows, in trainers and from recipes."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import make_rows, make_trainer, policy, same

from qpsft import cli
from qpsft.data.mix import MixedMiniBatches, apportioned, mixed
from qpsft.errors import RecipeError, TrainingError
from qpsft.psft.schedule import BlockSchedule
from qpsft.recipe.sources import whole_shares


def order(num_rows=(40, 7), shares=(0.8, 0.2), size=16, seed=3, **changes):
    return MixedMiniBatches(num_rows, [Fraction(str(s)) for s in shares], size, seed, **changes)


def source_counts(mini_batches, count, num_rows=(40, 7)):
    """Rows of the first source and of the others, by mini-batch."""
    return [Counter(row < num_rows[0] for row in mini_batches.rows(m)) for m in range(count)]


def test_what_a_share_lacks_in_one_mini_batch_it_gets_in_the_next():
    # 3/8 and 5/8 of 4 rows: 1.5 and 2.5
    plan = order(shares=(0.375, 0.625), size=4)
    counts = [[counted[True], counted[False]] for counted in source_counts(plan, 4)]
    assert counts == [[2, 2], [1, 3], [2, 2], [1, 3]]
    assert [plan.taken(m) for m in (0, 1, 2)] == [[0, 0], [2, 2], [3, 5]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(1, 33), st.integers(0, 60))
@example([1, 1, 6, 6, 6, 6], 1, 12)  # off by a whole row
def test_shares_are_kept_in_every_mini_batch_and_over_the_run(weights, size, mini_batches):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    plan = MixedMiniBatches([5] * len(shares), shares, size, seed=1)
    before, after = plan.taken(mini_batches), plan.taken(mini_batches + 1)
    assert sum(after) == (mini_batches + 1) * size
    for share, start, end in zip(shares, before, after, strict=True):
        # the long run: who is owed most comes first, so six sources are owed 1/2 + 1/3 + ... + 1/6 of a row at most
        assert abs(end - share * (mini_batches + 1) * size) < 1.5
        assert end >= start and abs((end - start) - share * size) < 2  # this mini-batch


def test_apportioned_gives_whole_numbers_that_add_up():
    assert apportioned([Fraction(3, 2), Fraction(5, 2)], 4) == [2, 2]
    assert apportioned([Fraction(-1, 2), Fraction(9, 2)], 4) == [0, 4]
    assert apportioned([Fraction(1, 3)] * 3, 1) == [1, 0, 0]


def test_every_source_is_gone_through_before_a_row_comes_again():
    plan = order()
    rows = [row for m in range(40) for row in plan.rows(m)]
    first, second = [r for r in rows if r < 40], [r for r in rows if r >= 40]
    assert (len(first), len(second)) == (512, 128)
    by_mini_batch = plan.taken(3)[0]  # inside a mini-batch rows are shuffled: compare at its ends
    assert plan.per_epoch == 4 and by_mini_batch < 40 <= plan.taken(4)[0]
    assert set(Counter(second).values()) <= {18, 19}  # 128 rows of 7
    assert set(Counter(first).values()) <= {12, 13}


def test_the_order_is_the_seed_s_and_that_of_no_step_before():
    assert order().rows(30) == order().rows(30)
    assert order().rows(30) != order(seed=4).rows(30)
    there = order()
    one_by_one = [there.rows(m) for m in range(31)]
    assert one_by_one[30] == order().rows(30)
    assert order(shuffle=False).rows(0) == [*range(13), 40, 41, 42]


def test_the_mini_batches_of_a_block_come_again_in_every_visit():
    plan = BlockSchedule(
        47, 16, reference_steps=3, num_iterations=2, total_steps=12, seed=3, mini_batches=order(seed=3)
    )
    steps = [tuple(plan.rows(step)) for step in range(12)]
    assert sorted(steps[:3]) == sorted(steps[3:6]) and sorted(steps[6:9]) == sorted(steps[9:])
    assert len(set(steps)) == 6 and plan.steps_per_epoch == 4


def test_shares_must_add_up_to_one():
    assert whole_shares([0.2, None]) == [Fraction(1, 5), Fraction(4, 5)]
    thirds = whole_shares([0.3333333, 0.3333333, 0.3333333])
    assert thirds == [Fraction(1, 3)] * 3
    for shares, words in [
        ([0.5, 0.6], "add up to 1.1"),
        ([0.5, 0.4], "add up to 0.9"),
        ([0.5, 0.5, None], "nothing is left"),
        ([0.2, None, None], "2 sources have no share"),
        ([0, 1], "a share is 0"),
        ([-0.5, 1.5], "a share is -0.5"),
        ([1.5, None], "a share is 1.5"),
    ]:
        with pytest.raises(RecipeError, match=words):
            whole_shares(shares)


def mix_of(*counts, shares=(0.75, None)):
    rows = [make_rows(count, seed=seed) for seed, count in enumerate(counts)]
    return mixed(list(zip(rows, shares, strict=True)))


PLAN = dict(num_iterations=2, sft_warmup_steps=1, max_steps=12, save_strategy="steps", save_steps=1, epsilon=0.2)


def test_a_trainer_takes_the_shares_and_resumes_in_the_middle_of_a_block(base, tmp_path):
    seen = []

    def recording(trainer):
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: (seen.append([tuple(row["input_ids"]) for row in rows]), collate(rows))[1]
        return trainer

    mix = mix_of(12, 5)
    whole = recording(make_trainer(base, tmp_path / "a", rows=mix, save_total_limit=None, **PLAN))
    whole.train()
    second = {tuple(row["input_ids"]) for row in mix.parts[1].rows}
    batches = [seen[i] + seen[i + 1] for i in range(0, 24, 2)]  # two micro-batches a step
    assert [sum(row in second for row in batch) for batch in batches] == [1] * 12
    for step in (4, 9):
        again = make_trainer(base, tmp_path / "b", rows=mix_of(12, 5), **PLAN)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same(policy(again.model), policy(whole.model))
    other = make_trainer(base, tmp_path / "b", rows=mix_of(12, 5, shares=(0.5, None)), **PLAN)
    with pytest.raises(TrainingError, match="mix"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_an_epoch_is_one_pass_over_the_first_source(base, tmp_path):
    trainer = make_trainer(base, tmp_path, rows=mix_of(12, 5), max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.state.epoch == 2


def test_a_loss_that_keeps_scores_by_row_finds_the_rows_of_a_mix(base, tmp_path):
    trainer = make_trainer(base, tmp_path, rows=mix_of(12, 5), loss_type="stm", stm_threshold=99, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5


def test_packed_sources_keep_their_shares_of_packed_rows(base, tmp_path):
    trainer = make_trainer(base, tmp_path, rows=mix_of(30, 12), packing=True, max_length=64, max_steps=4)
    parts = trainer.train_dataset.parts
    assert all(max(map(len, part.rows["input_ids"])) <= 64 for part in parts) and len(parts[0].rows) < 30
    first = len(parts[0].rows)
    schedule = trainer._get_schedule() if trainer.train() else None
    assert [sum(row < first for row in schedule.rows(step)) for step in range(4)] == [3] * 4


def test_raw_rows_of_two_shapes_are_prepared_each_as_its_own(base, tmp_path):
    texts = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(3, 23)]
    pairs = [{"prompt": f"w{i} ", "completion": f"w{i + 7} w{i + 8}"} for i in range(3, 13)]
    rows = mixed([(texts, 0.75), (Dataset.from_list(pairs), 0.25)])
    trainer = make_trainer(base, tmp_path, rows=rows, max_steps=2)
    first, second = (part.rows for part in trainer.train_dataset.parts)
    assert (len(first), len(second)) == (20, 10)
    assert second[0]["labels"][:1] == [-100] and first[0]["labels"][1] != -100
    trainer.train()


# ---- from recipes ----

RECIPE = """
model_name_or_path: demo
dataset_mix:
- {dataset_name: demo-noisy, dataset_limit: 60}
- {dataset_name: others.jsonl, share: 0.3, dataset_columns: {prompt: question, completion: answer}}
max_length: 128
max_steps: 6
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
gradient_checkpointing: false
reference_steps: 2
learning_rate: 1e-3
lora_r: 4
logging_steps: 2
"""


@pytest.fixture
def recipe(tmp_path):
    rows = [{"question": f"any order of {i}", "answer": f"1) {i}", "id": i} for i in range(1000, 1005)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_preview_shows_the_sources_and_what_the_mix_comes_to(recipe, capsys):
    assert cli.main(["preview", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "any order of 1000" in out and "columns not used" in out and "id" in out  # found beside the recipe
    assert "an epoch is one pass over demo-noisy" in out
    table = [line.split() for line in out.splitlines() if line.startswith("  demo-noisy") or "30.0%" in line]
    # 54 rows are left to train on; 6 steps of 2.8 and 1.2 rows are 17 and 7
    assert table[0] == "demo-noisy 70.0% 2 to 3, 2.8 on average 54 0.3 times".split()
    assert table[1][1:] == "30.0% 1 to 2, 1.2 on average 5 1.4 times".split()
    assert "has too few rows for its share: they are gone through 1.4 times" in out


def test_a_recipe_trains_on_its_mix_and_its_card_says_so(recipe, tmp_path, capsys):
    assert cli.main(["train", str(recipe), f"--output_dir={tmp_path / 'a'}"]) == 0
    out = capsys.readouterr().out
    assert "data: demo-noisy" in out and "too few rows for its share" in out
    card = (tmp_path / "a" / "README.md").read_text()
    assert "70 % demo-noisy and 30 %" in card and "each seen 1.4 times" in card
    resolved = tmp_path / "a" / "recipe.yaml"
    assert cli.main(["train", str(resolved), f"--output_dir={tmp_path / 'b'}"]) == 0
    # on other rows than its first source alone
    alone = ["--dataset_mix=none", "--dataset_name=demo-noisy", "--dataset_limit=60"]
    assert cli.main(["train", str(recipe), *alone, f"--output_dir={tmp_path / 'c'}"]) == 0
    mix, again, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert same(mix, again) and not same(mix, first)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name=demo-noisy"], "dataset_name stands beside dataset_mix"),
        (["--dataset_limit=5"], "dataset_limit stands beside dataset_mix"),
        (["--dataset_mix=[{dataset_name: demo-noisy}]"], "at least two sources"),
        (["--dataset_mix=[{dataset_name: demo-noisy}, {share: 0.2}]"], "entry 2: dataset_name is missing"),
        (["--dataset_mix=[{dataset_name: demo-noisy}, demo-clean]"], "a list"),
        (["--dataset_mix=[{dataset_name: a, share: 0.5}, {dataset_name: b, share: 0.6}]"], "add up to 1.1"),
        (
            ["--dataset_mix=[{dataset_name: a}, {dataset_name: b, dataset_split: x}]"],
            "entry 2: dataset_split: there is no",
        ),
        (["--dataset_mix=[{dataset_name: a}, {dataset_name: b, share: much}]"], "entry 2: share is 'much'"),
        (["--train_sampling_strategy=group_by_length"], "cannot be combined with dataset_mix"),
    ],
)
def test_mistakes_in_a_mix_are_named(recipe, flags, words, capsys):
    assert cli.main(["preview", str(recipe), *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_bad_row_of_any_source_is_named_by_its_own_file(recipe, capsys):
    with (recipe.parent / "others.jsonl").open("a") as file:
        file.write('{"question": "q", "answer": ""}\n')
    assert cli.main(["preview", str(recipe)]) == 2
    assert "others.jsonl, line 6: the completion is empty" in " ".join(capsys.readouterr().err.split())


def test_evaluation_counts_duplicates_of_every_source(recipe, tmp_path, capsys):
    assert cli.main(["train", str(recipe), "--max_steps=2", f"--output_dir={tmp_path / 'a'}"]) == 0
    rows = [{"prompt": "any order of 1000", "completion": "1) 1000"}, {"prompt": "any order of 9", "completion": "9"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    flags = [f"--data={tmp_path / 'test.jsonl'}", "--k=1", "--no_drift", "--max_new_tokens=8"]
    assert cli.main(["evaluate", str(tmp_path / "a"), *flags]) == 0
    assert "1 of its rows are exact duplicates" in " ".join(capsys.readouterr().out.split())


def test_plan_takes_a_mix_and_compare_refuses_it(recipe, tmp_path, capsys):
    assert cli.main(["plan", str(recipe)]) == 0
    assert cli.main(["compare", str(recipe), f"--output_dir={tmp_path / 'c'}"]) == 2
    assert "qpsft compare cannot take dataset_mix" in " ".join(capsys.readouterr().err.split())
