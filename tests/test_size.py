"""Many rows, and rows without end: read and tokenized a few at a time, with the same result."""

import dataclasses
import json
import random
import resource
import time

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from qpsft import cli
from qpsft.data import encode, tokenize, workers
from qpsft.data.read import open_rows, read_records
from qpsft.data.tokenize import load_dataset, row_lengths, tokenize_records
from qpsft.errors import DataError
from qpsft.model.folder import MODEL_DIR
from qpsft.recipe.arguments import DataArguments

ROWS = [
    {"prompt": f"{n} + {n} =", "completion": f" {2 * n}" * (1 + n % 7), **({"note": n} if n == 1501 else {})}
    for n in range(2300)
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def contents(made):
    return made.dataset.to_list(), made.places, made.counts


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("options", [{}, {"use_chat_template": "never"}, {"dataset_limit": 1001}])
def test_rows_read_a_few_at_a_time_are_those_read_at_once(file, tokenizer, monkeypatch, options):
    arguments = DataArguments(dataset_name=str(file), **options)
    at_once = tokenize_records(read_records(str(file), arguments), tokenizer, arguments, 20, False)
    monkeypatch.setattr(tokenize, "BATCH", 300)
    monkeypatch.setattr(tokenize, "IN_MEMORY", 10_000)
    few = load_dataset(arguments, tokenizer, 20, show_progress=False)
    assert contents(few) == contents(at_once) and few.dataset.features == at_once.dataset.features
    assert len(few.dataset.data.to_batches()) > 3
    assert few.counts.unused_columns == ([] if options.get("dataset_limit") else ["note"])
    picked = few.dataset.select([5, 900, 3])
    assert row_lengths(picked) == [len(ids) for ids in picked["input_ids"]]
    assert row_lengths(few.dataset) == [len(row["input_ids"]) for row in contents(few)[0]]


def test_bad_rows_of_every_batch_are_told_together(file, tokenizer, monkeypatch):
    lines = file.read_text().splitlines()
    lines[3], lines[1200], lines[2299] = "{", '{"prompt": 3, "completion": "x"}', '{"prompt": "x"}'
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match="(?s)3 of 2,300 rows cannot be used.*line 4: .*line 1201: .*line 2300: "):
        load_dataset(DataArguments(dataset_name=str(file)), tokenizer, 64, show_progress=False)
    kept = load_dataset(DataArguments(dataset_name=str(file), skip_bad_rows=True), tokenizer, 64, show_progress=False)
    assert kept.counts.dropped == {"cannot be used": 3} and len(kept.dataset) == 2297
    assert f"{file}, line 1201" not in kept.places and kept.places[-1] == f"{file}, line 2299"


def test_a_mapped_column_may_come_late(file, tokenizer):
    rows = [*({"prompt": "p", "completion": "c"} for _ in range(1100)), {"prompt": "p", "completion": "c", "s": "x"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = load_dataset(DataArguments(dataset_name=str(file), dataset_columns={"system": "s"}), tokenizer, 64)
    assert len(made.dataset) == 1101
    with pytest.raises(DataError, match="maps system to 't', but no row"):
        load_dataset(DataArguments(dataset_name=str(file), dataset_columns={"system": "t"}), tokenizer, 64)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_is_read_as_its_rows_are_asked_for(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    else:
        head = "prompt,completion\n" if kind == "csv" else ""
        write = (
            (lambda row: f"{row['prompt']},{row['completion']}\n")
            if kind == "csv"
            else (lambda r: json.dumps(r) + "\n")
        )
        path.write_text(head + "".join(map(write, ROWS)))
    source = open_rows(str(path), DataArguments())
    rows = iter(source)
    assert next(rows)[1]["prompt"] == "0 + 0 =" and source.done < source.size / 2
    assert len([None for _ in rows]) == len(ROWS) - 1 and source.done == source.size


def test_preview_shows_the_first_rows_before_it_has_read_all(file, monkeypatch, capsys):
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, "{"]))
    assert cli.main(["preview", "--model_name_or_path=demo", f"--dataset_name={file}"]) == 2
    printed = capsys.readouterr()
    assert "line 1: " in printed.out and "line 2301: not valid JSON" in " ".join(printed.err.split())
    file.write_text("\n".join(lines))
    assert cli.main(["preview", "--model_name_or_path=demo", f"--dataset_name={file}"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(tokenize, "BATCH", 5000)
    assert cli.main(["preview", "--model_name_or_path=demo", f"--dataset_name={file}"]) == 0
    assert capsys.readouterr().out == whole and whole.count("── ") == 3


def many_messages(special):
    """Rows of several kinds: special tokens, keys nobody reads, two answers, and some that cannot be used."""
    for n in range(1500):
        row = {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        if n % 50 == 7:
            row["messages"][0]["content"] += special
        if n % 400 == 399:
            row["messages"][1][f"key{n}"] = n
        if n % 100 == 50:
            row["messages"] *= 2
        if n % 300 == 251:
            row["messages"].pop()
        yield row


@pytest.fixture
def two_workers(monkeypatch):
    """Two worker processes for any rows; counts the batches that come back from them."""
    monkeypatch.setattr(tokenize, "BATCH", 100)
    monkeypatch.setattr(tokenize, "ROWS_WORTH_WORKERS", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    came_back = []
    make = workers._Worker.make

    def counted(worker, batch):
        made = make(worker, batch)
        came_back.append((worker, made))
        return made

    monkeypatch.setattr(workers._Worker, "make", counted)
    return came_back


def test_worker_processes_make_the_same_rows_in_the_same_order(tmp_path, tokenizer, two_workers, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many_messages(tokenizer.eos_token)))
    arguments = DataArguments(dataset_name=str(path), skip_bad_rows=True)

    def load(threshold, **options):
        monkeypatch.setattr(tokenize, "ROWS_WORTH_WORKERS", threshold)
        with pytest.warns(UserWarning) as warned:
            made = load_dataset(dataclasses.replace(arguments, **options), tokenizer, 20, show_progress=False)
        return contents(made), [str(one.message) for one in warned]

    one_process, together = load(10**9), load(0)
    assert one_process == together and len([made for _, made in two_workers if made is not None]) == 14
    counts = together[0][2]
    assert counts.special_tokens == 30 and counts.dropped == {"cannot be used": 5} and counts.truncated
    assert counts.unused_columns == ["messages.key1199", "messages.key399", "messages.key799"]

    monkeypatch.setattr(workers, "START", "raise SystemExit")  # they end before they have done anything
    assert load(0) == one_process


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
WITH_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{{ tools | tojson }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_workers_end_with_the_error_of_one_process(tmp_path, tokenizer, two_workers, monkeypatch):
    tokenizer.chat_template = {"tool_use": WITH_TOOLS}  # and none for rows without tools
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": messages, "tools": TOOLS if n != 350 else []} for n in range(900)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    errors = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(tokenize, "ROWS_WORTH_WORKERS", threshold)
        with pytest.raises(DataError, match="several chat templates .* none is the default") as error:
            load_dataset(DataArguments(dataset_name=str(path)), tokenizer, 64, show_progress=False)
        errors.append((type(error.value), error.value.what, error.value.todo))
    assert errors[0] == errors[1] and two_workers
    assert {worker._process.poll() is None for worker, _ in two_workers} == {False}


def long_texts():
    rng = random.Random(5)
    words = ["a", "the", "once", "upon", "9", "7+8=15", "(", "\n", "aaaaaaaa", "é", "🙂", "x" * 30, "    "]
    yield " ".join(rng.choices(words, k=40_000))
    yield "".join(rng.choices(words, k=60_000))
    yield "a" * 150_000
    yield "1234567" * 30_000


@pytest.mark.parametrize("text", long_texts(), ids=["words", "no spaces", "one letter", "digits"])
@pytest.mark.parametrize("model", ["demo", "stories"])
def test_the_start_of_a_very_long_row_has_the_tokens_of_the_whole(text, model, stories, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if model == "demo" else stories)
    rows = [{"prompt": "p", "completion": text}, {"prompt": text, "completion": "c"}]
    arguments = DataArguments(skip_bad_rows=True, use_chat_template="auto")
    made = [load(rows, tokenizer, arguments)]
    monkeypatch.setattr(encode, "LONG", 10**9)
    made.append(load(rows, tokenizer, arguments))
    (cut, counts), (whole, uncut) = made
    assert cut == whole and counts.truncated == uncut.truncated == 1 and counts.dropped == uncut.dropped
    assert counts.length_percentiles[100] == pytest.approx(uncut.length_percentiles[100], rel=0.1)


def load(rows, tokenizer, arguments):
    from qpsft.data.read import as_records

    made = tokenize_records(as_records(rows, "rows"), tokenizer, arguments, 128)
    return made.dataset.to_list(), made.counts


def test_a_row_of_five_megabytes_is_quick(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "word " * 1_000_000}) + "\n")
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = load_dataset(DataArguments(dataset_name=str(path)), tokenizer, 128)
    assert made.counts.truncated == 1 and len(made.dataset[0]["input_ids"]) == 128
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; all its tokens take 600,000
