"""`qpsft train` with packing: the rows are the labelled ones that preview shows, and the run can be resumed."""

import pytest
import torch
from safetensors.torch import load_file

from qpsft import cli
from qpsft.data.tokenize import load_dataset
from qpsft.model.base import load_tokenizer
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train import run
from qpsft.train.data import hold_out
from qpsft.train.progress import read_metrics

FLAGS = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128", "--lora_r=4",
    "--learning_rate=1e-3", "--warmup_steps=0", "--reference_steps=2", "--num_iterations=2", "--max_steps=6",
    "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2", "--gradient_checkpointing=false",
    "--logging_steps=1", "--save_steps=3", "--seed=1", "--packing=true",
]  # fmt: skip


def train(folder, *flags):
    return cli.main(["train", *FLAGS, f"--output_dir={folder}", *flags])


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    """The folder, and the trainer that filled it."""
    folder, trainers, make_trainer = tmp_path_factory.mktemp("run") / "a", [], run.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_trainer", lambda *args: trainers.append(make_trainer(*args)) or trainers[0])
        assert train(folder) == 0
    return folder, trainers[0]


def pieces(packed):
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            yield tuple(row["input_ids"][start : start + length]), tuple(row["labels"][start : start + length])
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"]) <= 128


def test_the_pieces_are_the_labelled_rows(packed_run):
    _, trainer = packed_run
    recipe = load_recipe(None, FLAGS, PSFTConfig)
    rows = load_dataset(recipe.data, load_tokenizer("demo"), 128, show_progress=False)
    kept, _ = hold_out(rows, 16, seed=1)
    expected = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in kept)
    assert sorted(pieces(trainer.train_dataset)) == expected and len(expected) == 58
    assert len(trainer.train_dataset) < 58
    assert all(labels[0] == -100 and set(labels) != {-100} for _, labels in expected)


def test_the_log_counts_real_tokens_and_each_block_starts_at_ratio_1(packed_run):
    folder, trainer = packed_run
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "nll" in line]
    schedule = trainer._get_schedule()
    tokens = [sum(len(trainer.train_dataset[r]["input_ids"]) for r in schedule.rows(step)) for step in range(6)]
    assert [line["num_tokens"] for line in lines] == torch.tensor(tokens).cumsum(0).tolist()
    assert [line["ratio_max"] == 1.0 for line in lines] == [True, False, False, False, True, False]


def test_it_says_what_was_packed(packed_run):
    _, trainer = packed_run
    packing = run.packing_line(trainer, 58)
    count = len(trainer.train_dataset)
    assert " ".join(packing.split()).startswith(f"packing: 58 rows in {count} of 128 tokens, ")
    assert packing.split()[-5:] == ["4", "packed", "rows", "a", "step"]
    assert all(len(line) <= 80 for line in packing.split("\n"))


def test_resumed_it_ends_in_the_same_bytes(packed_run, tmp_path):
    folder, _ = packed_run
    assert train(tmp_path / "b", "--save_steps=2", "--save_total_limit=3") == 0
    for step in (4, 6):
        run.remove_folder(tmp_path / "b" / f"checkpoint-{step}")
    assert train(tmp_path / "b", "--resume") == 0
    first, again = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "b"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--packing_strategy=wrapped"], "packing_strategy wrapped cuts rows in two"),
        (["--packing_strategy=bfd_split"], "packing_strategy has no effect in `qpsft train`"),
        (["--max_length=none"], "packing needs max_length"),
    ],
)
def test_what_cannot_be_packed_is_a_clear_error(tmp_path, capsys, flags, said):
    assert train(tmp_path / "c", *flags) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error
