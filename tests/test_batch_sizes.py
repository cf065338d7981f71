"""`per_device_train_batch_size: auto`: how a step's rows are split, by the memory and the rows' lengths."""

import json
import shutil
import types

import pytest
import yaml
from planned_runs import AUTO, LLAMA, planned, recipe_of

from qpsft import cli
from qpsft.plan import memory_plan
from qpsft.plan.batch_sizes import SPEEDS, RowLengths, fastest_that_fits, seconds_per_step, splits
from qpsft.plan.cards import GIB
from qpsft.plan.changes import changed
from qpsft.psft.config import PSFTConfig
from qpsft.psft.trainer import PSFTTrainer

ROWS, COUNT, CHECKPOINTING = "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"


def sizes(rows: int, count: int, checkpointing: bool) -> dict:
    return {ROWS: rows, COUNT: count, CHECKPOINTING: checkpointing}


@pytest.mark.parametrize(
    ("given", "settled", "automatic"),
    [
        ({}, (2, 8), True),
        ({ROWS: "auto", COUNT: "auto"}, (2, 8), True),
        ({ROWS: 4}, (4, 4), False),
        ({ROWS: 3}, (3, 5), False),
        ({ROWS: 64}, (64, 1), False),
        ({COUNT: 2}, (8, 2), False),
        ({ROWS: 4, COUNT: 8}, (4, 8), False),
    ],
)
def test_a_step_has_16_rows_unless_both_sizes_are_given(tmp_path, given, settled, automatic):
    args = PSFTConfig(str(tmp_path), report_to=[], **given)
    assert ((args.per_device_train_batch_size, args.gradient_accumulation_steps), args.automatic_batch) == (
        settled,
        automatic,
    )


def test_every_split_has_the_same_rows_and_what_is_stated_stays():
    ways = splits(recipe_of(*AUTO))
    assert len(ways) == 10 and {way[ROWS] * way[COUNT] for way in ways} == {16}
    for flag in ("--gradient_checkpointing=true", "--activation_checkpointing=true"):
        assert {way[CHECKPOINTING] for way in splits(recipe_of(*AUTO, flag))} == {True}
    assert {way[CHECKPOINTING] for way in splits(recipe_of(*AUTO, "--gradient_checkpointing=false"))} == {False}


def test_estimated_times_are_those_measured_on_a_cpu():
    """benchmarks/results/micro_batches.json: the embedded base, steps of 16 rows of 85 tokens, 97 at most."""
    base = {"layers": 4, "parameters": 542_000, "speed": SPEEDS["cpu"]}

    def time(*way):
        return seconds_per_step(sizes(*way), RowLengths(97, 85), **base)

    for way, over in (((1, 16, True), 1.66), ((16, 1, True), 0.42), ((2, 8, False), 0.66), ((16, 1, False), 0.30)):
        assert time(*way) / time(2, 8, True) == pytest.approx(over, rel=0.2), way


def test_padding_counts():
    """Where one row is much longer than the others, more rows at a time are mostly padding."""
    large = {"layers": 28, "parameters": 7_000_000_000, "device": "cuda"}

    def chosen(*lengths):
        return fastest_that_fits(recipe_of(*AUTO), lambda recipe: 0, 1, RowLengths(*lengths), **large)[ROWS]

    assert chosen(100, 100) == 16 and chosen(8000, 200) == 1


@pytest.mark.journey
def test_the_fastest_split_that_leaves_a_share_of_the_memory_free():
    whole = planned(*AUTO, "--max_length=256", gpu_bytes=80 * GIB)
    assert whole.chosen == sizes(16, 1, False) and whole.fits

    def needed(rows: int, count: int, checkpointing: bool) -> int:
        one = recipe_of("--max_length=256", f"--{ROWS}={rows}", f"--{COUNT}={count}")
        return memory_plan.make_plan(changed(one, {CHECKPOINTING: checkpointing}), config=LLAMA).needed_bytes

    for way in ((1, 16, True), (8, 2, False)):
        plan = planned(*AUTO, "--max_length=256", gpu_bytes=int(needed(*way) / 0.9) + 1)
        assert plan.needed_bytes <= 0.9 * plan.gpu_bytes and plan.needed_bytes == needed(*plan.chosen.values())
    tight = planned(*AUTO, "--max_length=256", gpu_bytes=needed(1, 16, True) // 2)
    assert tight.chosen == sizes(1, 16, True) and tight.fits is False


def test_a_plan_says_what_it_chose_and_how_long_rows_can_be():
    plan = planned(*AUTO, "--max_length=256", gpu_bytes=2 * GIB)
    said = " ".join(str(plan).split())
    assert f"chosen: {plan.chosen[ROWS]} x {plan.chosen[COUNT]} rows a step, gradient checkpointing" in said
    assert "with one row per micro-batch" in said
    one = planned("--per_device_train_batch_size=1", "--gradient_accumulation_steps=16", gpu_bytes=2 * GIB)
    assert plan.max_length == one.max_length
    assert json.loads(json.dumps(plan.to_dict()))["chosen"] == plan.chosen
    assert planned("--max_length=256", gpu_bytes=2 * GIB).chosen is None  # the sizes are stated


@pytest.mark.slow
def test_offloading_makes_longer_rows_fit(monkeypatch):
    monkeypatch.setattr("qpsft.plan.lm_head.TILE_COLUMNS", 64)
    deep = LLAMA | {"num_hidden_layers": 24, "max_position_embeddings": 100_000, "vocab_size": 300}
    one = ("--per_device_train_batch_size=1", "--max_length=2048")
    plan = memory_plan.make_plan(recipe_of(*one), config=deep, gpu_bytes=GIB)
    away = memory_plan.make_plan(recipe_of(*one, "--activation_offloading"), config=deep, gpu_bytes=GIB)
    assert plan.max_length_offloaded == away.max_length > 1.5 * plan.max_length
    assert f"with --activation_offloading {away.max_length:,}" in " ".join(str(plan).split())
    assert away.max_length_offloaded is None


# --- training ---

TRAIN = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128",
    "--lora_r=4", "--warmup_steps=0", "--reference_steps=2", "--logging_steps=1", "--save_steps=2", "--max_steps=4",
    "--report_to=none",
]  # fmt: skip


def free(monkeypatch, nbytes: int) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=nbytes))


@pytest.fixture
def seen(monkeypatch):
    """What every trainer was made with, and whether its model recomputes."""
    made = []
    train = PSFTTrainer.train

    def spy(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        on = self.model.get_base_model().is_activation_checkpointing
        made.append((self.args.train_batch_size, self.args.gradient_accumulation_steps, on))
        return result

    monkeypatch.setattr(PSFTTrainer, "train", spy)
    return made


def test_a_run_is_split_by_the_free_memory_says_so_records_it_and_resumes_with_it(tmp_path, monkeypatch, capsys, seen):
    free(monkeypatch, 16 * GIB)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(["train", *TRAIN, f"--output_dir={whole}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "batches: 16 x 1 rows a step, gradient checkpointing off: the fastest for rows of" in said
    recorded = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert (recorded[ROWS], recorded[COUNT], recorded[CHECKPOINTING]) == (16, 1, False)

    shutil.copytree(whole, cut)  # as if it had been cut off after step 3
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "recipe.yaml").unlink()
    (cut / "adapter_model.safetensors").unlink()
    free(monkeypatch, 60 * 2**20)  # a new run would be split otherwise
    assert cli.main(["train", *TRAIN, f"--output_dir={cut}", "--resume"]) == 0
    assert seen == [(16, 1, False)] * 2
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_short_memory_takes_one_row_at_a_time(tmp_path, monkeypatch, seen, capsys):
    free(monkeypatch, 4 * 2**20)
    assert cli.main(["train", *TRAIN, f"--output_dir={tmp_path}", "--max_steps=1", "--save_strategy=no"]) == 0
    assert "are free, so it will probably run out" in " ".join(capsys.readouterr().err.split())
    assert seen == [(1, 16, True)]
