"""`streaming: true`: rows read and prepared while training goes on, by the code that reads whole files."""

import gzip
import json
import random
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from small_runs import same

from qpsft import cli
from qpsft.data import read
from qpsft.data.stream import StreamedRows, shuffled
from qpsft.data.tokenize import load_dataset
from qpsft.errors import DataError
from qpsft.model.base import load_tokenizer
from qpsft.recipe.arguments import DataArguments


def write_rows(path, count=40, bad=()):
    rows = [{"prompt": f"any order of {1000 + i}", "completion": f"1) {1000 + i}"} for i in range(count)]
    lines = [
        '{"prompt": "q", "completion": ""}' if i in bad else json.dumps(row) for i, row in enumerate(rows, start=1)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return rows


def streamed(name, count, seed=0, held_out=0, **changes):
    arguments = DataArguments(dataset_name=str(name), streaming=True, **changes)
    rows = StreamedRows(arguments, load_tokenizer("demo"), 128, seed=seed, held_out=held_out)
    return [row for row, _ in zip(rows, range(count), strict=False)], rows


def test_the_rows_are_those_of_the_whole_file_token_by_token(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    whole = load_dataset(DataArguments(dataset_name=str(tmp_path / "a.jsonl")), load_tokenizer("demo"), 128)
    rows, _ = streamed(tmp_path / "a.jsonl", 40, streaming_buffer=1)
    assert rows == whole.dataset.to_list()
    mixed_up, _ = streamed(tmp_path / "a.jsonl", 40, streaming_buffer=8)
    assert mixed_up != rows and sorted(mixed_up, key=str) == sorted(rows, key=str)


def test_parquet_gz_and_the_hub_give_the_same_rows(tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "a.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    expected, _ = streamed(tmp_path / "a.jsonl", 60)
    for name in ("a.parquet", "a.jsonl.gz"):
        assert streamed(tmp_path / name, 60)[0] == expected
    monkeypatch.setattr(read, "_why_unreachable", lambda *_: None)
    asked = []

    def load(name, config, **settings):
        asked.append((name, config, settings))
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert streamed("someone/rows", 60, dataset_config="main")[0] == expected
    assert asked[0] == ("someone/rows", "main", {"split": "train", "revision": None, "streaming": True})


def test_a_pass_has_every_row_once_and_the_next_another_order(tmp_path):
    write_rows(tmp_path / "a.jsonl", 30)
    with pytest.warns(UserWarning, match="gone through again"):
        rows, _ = streamed(tmp_path / "a.jsonl", 60, streaming_buffer=10)
    first, second = map(str, rows[:30]), map(str, rows[30:])
    first, second = list(first), list(second)
    assert sorted(first) == sorted(second) and len(set(first)) == 30 and first != second
    assert streamed(tmp_path / "a.jsonl", 60, streaming_buffer=10)[0] == rows
    assert streamed(tmp_path / "a.jsonl", 60, seed=1, streaming_buffer=10)[0] != rows


def test_a_buffer_moves_rows_no_further_than_it_is_long():
    order = list(shuffled(range(100), 10, random.Random(0)))
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert all(row - place < 10 for place, row in enumerate(order))  # a row comes 10 places early at most


def test_the_file_is_not_read_before_its_rows_are_needed(tmp_path):
    write_rows(tmp_path / "a.jsonl", 1000, bad=[900])
    rows, _ = streamed(tmp_path / "a.jsonl", 400, streaming_buffer=50)
    assert len(rows) == 400
    with pytest.raises(DataError, match="a.jsonl, line 900: the completion is empty"):
        streamed(tmp_path / "a.jsonl", 1000, streaming_buffer=50)
    rows, stream = streamed(tmp_path / "a.jsonl", 999, streaming_buffer=50, skip_bad_rows=True)
    assert len(rows) == 999 and stream.counts.dropped == {"cannot be used": 1}


def test_rows_at_the_start_are_held_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", 30)
    rows, stream = streamed(tmp_path / "a.jsonl", 27, held_out=16, streaming_buffer=1)
    assert stream.held_out == 3  # a tenth
    everything, _ = streamed(tmp_path / "a.jsonl", 30, streaming_buffer=1)
    assert rows == everything[3:]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ('{"prompt": "q", "completion": ""}\n', "line 1: the completion is empty"),
        ('{"prompt": "q"\n', "line 1: not valid JSON"),
        ('{"a": "q"}\n', "fit no shape"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_before_training(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        streamed(tmp_path / "a.jsonl", 1)


FLAGS = [
    "--model_name_or_path=demo", "--streaming", "--streaming_buffer=16", "--max_length=128", "--lora_r=4",
    "--learning_rate=1e-3", "--warmup_steps=0", "--reference_steps=2", "--per_device_train_batch_size=2",
    "--gradient_accumulation_steps=2", "--gradient_checkpointing=false", "--logging_steps=2", "--max_steps=8",
    "--save_steps=3", "--save_total_limit=9", "--lr_scheduler_type=constant",
]  # fmt: skip


def train(tmp_path, name, *flags):
    data = f"--dataset_name={tmp_path / 'a.jsonl'}"
    return cli.main(["train", *FLAGS, data, f"--output_dir={tmp_path / name}", *flags])


def test_a_run_is_repeated_and_resumed_to_the_byte(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", 40)
    assert train(tmp_path, "whole") == 0
    out = capsys.readouterr().out
    assert "streamed: these are its first 40 rows" in out
    card = (tmp_path / "whole" / "README.md").read_text()
    assert 32 <= int(re.search(r"(\d+) read from the stream", card)[1]) <= 36  # accelerate is a batch ahead
    assert train(tmp_path, "cut", "--max_steps=3") == 0
    assert train(tmp_path, "cut", "--resume") == 0
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert same(*adapters)
    write_rows(tmp_path / "a.jsonl", 39)
    capsys.readouterr()
    assert train(tmp_path, "cut", "--resume", "--max_steps=9") == 2
    assert "rows_sha256" in capsys.readouterr().err


def test_a_bad_row_in_the_middle_of_a_run_is_named(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", 80, bad=[60])
    flags = ("--max_steps=16", "--save_strategy=no")
    assert train(tmp_path, "a", *flags) == 2
    assert "line 60: the completion is empty" in " ".join(capsys.readouterr().err.split())
    assert train(tmp_path, "b", *flags, "--skip_bad_rows") == 0
    assert "1 dropped (cannot be used)" in (tmp_path / "b" / "README.md").read_text()


def test_preview_shows_the_first_rows(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl")
    assert cli.main(["preview", *FLAGS, f"--dataset_name={tmp_path / 'a.jsonl'}"]) == 0
    out = capsys.readouterr().out
    assert "any order of 1000" in out and "streamed: these are its first 40 rows" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_steps=-1"], "streaming needs max_steps"),
        (["--num_iterations=2"], "streaming cannot be combined with num_iterations above 1"),
        (["--packing"], "streaming cannot be combined with packing"),
        (["--replay_share=0.1"], "streaming cannot be combined with replay_share"),
        (["--dataloader_num_workers=2"], "streaming cannot be combined with dataloader_num_workers"),
        (["--dataset_name=rows.csv"], "cannot be streamed"),
        (["--streaming_buffer=0"], "streaming_buffer is 0"),
    ],
)
def test_what_cannot_go_with_streaming_is_refused(tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    write_rows(tmp_path / "a.jsonl")
    assert train(tmp_path, "x", *flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())
