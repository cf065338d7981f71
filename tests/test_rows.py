"""Every mistake in a data file is one DataError that names the place and says what to do; good files read the same."""

import codecs
import gzip
import json
import os
import socket
import time

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpsft.data.tokenize import load_dataset, load_rows
from qpsft.errors import DataError, QpsftError
from qpsft.recipe.arguments import DataArguments

GOOD = [{"prompt": f"{n}+1?", "completion": str(n + 1)} for n in range(60)]
LINES = [json.dumps(row) for row in GOOD]


def write(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    return load_rows(str(path), DataArguments(**options))


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.exit_code == 2 and isinstance(caught.value, QpsftError)
    assert caught.value.todo and "\n" not in str(caught.value)
    return str(caught.value)


def with_line_57(line):
    return "\n".join([*LINES[:56], line, *LINES[57:]])


CSV = "prompt,completion\r\n" + "".join(f"{row['prompt']},{row['completion']}\r\n" for row in GOOD)
PARQUET = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), PARQUET)
SAME = {
    "data.jsonl": "\n".join(LINES),
    "crlf.jsonl": "\r\n".join(LINES) + "\r\n",
    "bom.jsonl": codecs.BOM_UTF8 + "\r\n".join(LINES).encode(),
    "blank lines.JSONL": "\n\n" + "\n \n".join(LINES) + "\n\n",
    "data.jsonl.gz": gzip.compress("\n".join(LINES).encode()),
    "list.json": json.dumps(GOOD, indent=1),
    "under data.json": json.dumps({"version": 1, "data": GOOD}),
    "data.csv": CSV,
    "bom.csv": codecs.BOM_UTF8 + CSV.replace("\r\n", "\n").encode(),
    "data.parquet": PARQUET.getvalue().to_pybytes(),
}


@pytest.mark.parametrize("name", SAME)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    rows = read(write(tmp_path, SAME[name], name))
    assert rows.rows == GOOD and rows.shape == "prompt_completion"
    assert read(write(tmp_path, SAME[name], name), dataset_limit=3).rows == GOOD[:3]


def test_places_count_lines_as_an_editor_does(tmp_path):
    assert read(write(tmp_path, "\n" + LINES[0] + "\n\n" + LINES[1])).places[1].endswith("data.jsonl, line 4")
    quoted = 'prompt,completion\n"two\nlines",1\n\nx,2\n'
    rows = read(write(tmp_path, quoted, "data.csv"))
    assert [place.rpartition(", ")[2] for place in rows.places] == ["line 2", "line 5"]
    assert rows.rows[0] == {"prompt": "two\nlines", "completion": "1"}
    assert read(write(tmp_path, json.dumps(GOOD), "data.json")).places[56].endswith("data.json, row 57")


def test_line_separators_inside_strings_do_not_split_lines(tmp_path):
    row = {"prompt": "a\u2028b\x0c\x85c", "completion": "d"}
    assert read(write(tmp_path, json.dumps(row, ensure_ascii=False))).rows == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a" "completion": "b"}', r"line 57: not valid JSON (Expecting ',' delimiter, column 16)."),
        ('{"prompt": "a"}', "line 57: the column 'completion' is missing; found prompt."),
        ('{"prompt": "a", "completion": ""}', "line 57: the completion is empty"),
        ('{"prompt": "a", "completion": " \\n"}', "line 57: the completion is empty"),
        ('{"prompt": "a", "completion": null}', "line 57: completion must be text, found null."),
        ('{"prompt": "a", "completion": 42}', "line 57: completion must be text, found int 42."),
        ('{"prompt": "\\ud800", "completion": "b"}', "line 57: prompt holds \\ud800, half a surrogate pair."),
        ('["a", "b"]', 'line 57: expected an object with named columns, found ["a", "b"]'),
        ("[" * 100_000, "line 57: not usable JSON"),
        ('{"prompt": [], "completion": "b"}', "line 57: prompt must be a list of messages, found an empty list."),
    ],
)
def test_a_bad_line_57_is_named(tmp_path, line, message):
    text = refusal(write(tmp_path, with_line_57(line)))
    assert message in text and str(tmp_path / "data.jsonl") in text


def test_invalid_utf8_names_line_and_byte(tmp_path):
    content = "\n".join(LINES[:2]).encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n'
    text = refusal(write(tmp_path, content))
    assert "data.jsonl, line 3: byte 16 of the line (0xe9) is not valid UTF-8." in text
    assert "UTF-16" in refusal(write(tmp_path, "\n".join(LINES).encode("utf-16")))


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv"])
@pytest.mark.parametrize("content", [b"", b"\n \n", codecs.BOM_UTF8])
def test_an_empty_file_is_refused(tmp_path, name, content):
    if name == "e.csv":
        content += b"prompt,completion\n"
    assert "is empty: there is no row in it" in refusal(write(tmp_path, content, name))


@pytest.mark.parametrize(("separator", "named"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_a_csv_without_commas_says_what_separates_it(separator, named, tmp_path):
    text = refusal(write(tmp_path, f"\nprompt{separator}completion\na, b{separator}c\n", "data.csv"))
    assert f"data.csv, line 2: the header is separated by {named}" in text and "Save the file with commas" in text
    assert read(write(tmp_path, "text\none;two\n", "one column.csv")).rows == [{"text": "one;two"}]


def test_broken_csv_json_and_parquet_files(tmp_path):
    text = refusal(write(tmp_path, "prompt,completion\na,b\nc,d,e\n", "data.csv"))
    assert "data.csv, line 3: 3 cells, but the header has 2 columns." in text
    assert "line 2: not valid CSV" in refusal(write(tmp_path, 'prompt,completion\n"a,b\n', "data.csv"))
    assert "appears twice" in refusal(write(tmp_path, "prompt,prompt\na,b\n", "data.csv"))
    assert "line 2: not valid JSON" in refusal(write(tmp_path, '[\n{"prompt" 1}]', "data.json"))
    assert "name it .jsonl" in refusal(write(tmp_path, "\n".join(LINES), "data.json"))
    assert "name it .json." in refusal(write(tmp_path, "[\n" + ",\n".join(LINES) + "]"))
    assert "expected a list of objects" in refusal(write(tmp_path, '{"rows": []}', "data.json"))
    assert "row 2: expected an object" in refusal(write(tmp_path, '[{"text": "a"}, 5]', "data.json"))
    assert "not a readable Parquet file" in refusal(write(tmp_path, b"PAR0", "data.parquet"))
    assert "cannot be read" in refusal(write(tmp_path, b"not gzip", "data.jsonl.gz"))


def test_missing_files_are_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "\n".join(LINES), "train.jsonl")
    assert "There is no file trian.jsonl. Did you mean train.jsonl?" == refusal("trian.jsonl")
    assert f"Did you mean {tmp_path}/train.jsonl?" in refusal(tmp_path / "train")
    assert "The folder data does not exist either." in refusal("data/x.csv")
    assert "Data files in that folder: train.jsonl." in refusal("./zzz")


def test_folders_unknown_endings_and_unreadable_files(tmp_path, monkeypatch):
    path = write(tmp_path, "\n".join(LINES))
    assert "is a folder, not a data file. Name one file in it: data.jsonl." in refusal(tmp_path)
    text = refusal(write(tmp_path, "a", "notes.txt"))
    assert "files that end in '.txt'" in text and ".jsonl, .json, .csv, .parquet" in text
    os.chmod(path, 0)
    if os.access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr("pathlib.Path.open", lambda self, mode: open("/proc/self/mem", mode))
    assert "cannot be read" in refusal(path)


@pytest.fixture
def hub_answers(monkeypatch):
    """The Hub is there; what it holds is up to the test."""
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, *, revision, timeout: None)


def test_a_hub_that_cannot_be_reached_costs_no_time(monkeypatch):
    """Real requests, to a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", nowhere)
    start = time.monotonic()
    text = refusal("nobody/no-data")
    assert time.monotonic() - start < 5  # five attempts with pauses between them take 23 seconds
    assert "no Hub dataset of that name could be reached (" in text and "refused" in text.lower()


@pytest.mark.parametrize("reachable", [True, False])
def test_without_the_hub_only_the_cache_is_asked(monkeypatch, reachable):
    def answer(self, name, *, revision, timeout):
        assert (name, revision) == ("me/data", "v2") and timeout < 60
        if not reachable:
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    def hub(name, config, split, revision):
        assert datasets.config.HF_HUB_OFFLINE is not reachable
        return datasets.Dataset.from_list(GOOD)

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read("me/data", dataset_revision="v2").rows == GOOD
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_hub_name_that_is_not_there_says_so(tmp_path, monkeypatch, hub_answers):
    def gone(name, config, split, revision):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/train' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    write(tmp_path / "me", "", "train.csv")
    text = refusal("me/train")
    assert "There is no file me/train, and no Hub dataset of that name could be reached" in text
    assert "Did you mean me/train.csv?" in text
    assert "Did you mean demo-noisy" in refusal("demo-nosy")
    assert refusal("openai/gsm8k").endswith("needs `hf auth login`.") and "folder" not in refusal("openai/gsm8k")


def test_hub_rows_come_with_config_split_revision_and_limit(monkeypatch, hub_answers):
    def hub(name, config, split, revision):
        assert (name, config, split, revision) == ("openai/gsm8k", "main", "test", "abc")
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}, {"question": "", "answer": ""}])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    columns = {"prompt": "question", "completion": "answer"}
    options = {"dataset_config": "main", "dataset_revision": "abc", "dataset_columns": columns, "dataset_limit": 1}
    rows = load_rows("openai/gsm8k", DataArguments(**options), "test")
    assert rows.rows == [{"prompt": "1+1?", "completion": "2"}]
    assert rows.places == ["openai/gsm8k, main, test, row 1"]


def test_what_the_hub_library_says_is_passed_on(monkeypatch, hub_answers):
    def ambiguous(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", ambiguous)
    text = refusal("openai/gsm8k")
    assert "Please pick one among the available configs: ['main', 'socratic']" in text and "dataset_config" in text


def test_columns_of_no_known_shape_are_listed_with_an_example(tmp_path):
    text = refusal(write(tmp_path, '{"question": "1+1?", "answer": "2"}'))
    assert "data.jsonl, line 1: its columns (question, answer) fit no shape" in text
    assert "dataset_columns: {prompt: question, completion: answer}" in text


def test_columns_of_several_shapes_ask_which(tmp_path):
    path = write(tmp_path, '{"instruction": "a", "output": "b", "text": "ab"}')
    assert "fit several shapes: alpaca, text" in refusal(path)
    assert read(path, dataset_shape="text").rows == [{"text": "ab"}]
    mapped = read(path, dataset_columns={"prompt": "instruction", "completion": "output"})
    assert mapped.rows == [{"prompt": "a", "completion": "b"}] and mapped.unused_columns == ["text"]
    assert "dataset_shape messages needs messages" in refusal(path, dataset_shape="messages")


def test_a_mapping_that_cannot_be_right(tmp_path):
    path = write(tmp_path, '{"question": "1+1?", "answer": "2"}')
    text = refusal(path, dataset_columns={"prompt": "qestion", "completion": "answer"})
    assert "maps prompt to 'qestion'" in text and "Did you mean question?" in text
    assert "Did you mean completion?" in refusal(path, dataset_columns={"completon": "answer"})
    path = write(tmp_path, '{"question": "1+1?", "answer": "2"}\n{"question": "1"}')
    text = refusal(path, dataset_columns={"prompt": "question", "completion": "answer"})
    assert "line 2: the column 'answer' (mapped to completion) is missing" in text


def talk(*messages):
    return json.dumps({"messages": list(messages)})


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (talk(USER), "line 1: messages has no assistant turn to learn from; its roles are user."),
        (talk(), "line 1: messages must be a list of messages, found an empty list."),
        ('{"messages": "hi"}', "line 1: messages must be a list of messages, found str."),
        (talk(USER, {"role": "assistant", "content": " "}), "messages, turn 2: the assistant's turn is empty"),
        (talk(USER, {"role": "assistant"}), "messages, turn 2: the assistant message has no content."),
        (talk(USER, {"content": "ho"}), "messages, turn 2: the message has no role; found content."),
        (talk(USER, "ho"), "messages, turn 2: a message must be an object, found str."),
        (talk(USER, {**ASSISTANT, "weight": 0.5}), "turn 2: weight is 0.5, and a turn is either trained on or not."),
        (talk({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), "a content part of type 'image_url'"),
        ('{"conversations": [{"from": "critic", "value": "a"}]}', "conversations, turn 1: unknown role 'critic'."),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "conversations has no assistant turn"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "completion has no assistant turn"),
        ('{"instruction": "a", "output": ""}', "line 1: the output is empty"),
        ('{"text": " "}', "line 1: the text is empty"),
    ],
)
def test_bad_conversations_name_line_and_turn(tmp_path, line, message):
    assert message in refusal(write(tmp_path, line))


def test_mixed_prompt_and_completion_become_messages(tmp_path):
    lines = [{"prompt": [USER], "completion": "ho"}, {"prompt": "hi", "completion": [ASSISTANT]}]
    rows = read(write(tmp_path, "\n".join(map(json.dumps, lines)))).rows
    assert rows == [{"prompt": [USER], "completion": [ASSISTANT]}] * 2


def test_what_arrow_fills_in_and_content_parts_are_smoothed(tmp_path):
    message = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    rows = read(write(tmp_path, talk(message, {**ASSISTANT, "tool_calls": None, "name": None})))
    assert rows.rows == [{"messages": [USER, ASSISTANT]}]


def test_a_10_mb_row_is_read_from_every_text_format(tmp_path):
    long = "0123456789" * 1_000_000
    start = time.monotonic()
    line = json.dumps({"prompt": "a", "completion": long})
    files = {"a.jsonl": line, "a.json": f"[{line}]", "a.csv": f"prompt,completion\na,{long}\n"}
    for name, content in files.items():
        assert read(write(tmp_path, content, name)).rows == [{"prompt": "a", "completion": long}]
    assert time.monotonic() - start < 30


def test_no_dataset_name_is_an_error():
    with pytest.raises(DataError, match="dataset_name is missing"):
        load_dataset(DataArguments(), None, 16)


KEYS = st.sampled_from(
    "prompt completion messages conversations instruction input output text tools tool_calls role content from value "
    "function arguments name type weight user assistant human gpt".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | KEYS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.fixed_dictionaries({"role": KEYS, "content": VALUES}, optional={"tool_calls": VALUES, "weight": VALUES})
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3)}, optional={"tools": VALUES}),
    st.fixed_dictionaries({"conversations": st.lists(st.fixed_dictionaries({"from": VALUES, "value": VALUES}))}),
    st.fixed_dictionaries({"prompt": VALUES, "completion": VALUES}),
    st.fixed_dictionaries({"instruction": VALUES, "output": VALUES}, optional={"input": VALUES}),
    st.dictionaries(KEYS, VALUES, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=2))
def test_rows_of_any_content_load_or_are_refused_with_a_place(tmp_path_factory, rows):
    path = write(tmp_path_factory.getbasetemp(), "\n".join(map(json.dumps, rows)), "any.jsonl")
    try:
        loaded = read(path)
    except DataError as error:
        assert "any.jsonl" in error.what and error.todo
    else:
        assert len(loaded.rows) == len(rows)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["any.jsonl", "any.json", "any.csv", "any.parquet", "any.csv.gz"]), st.binary(max_size=60))
def test_files_of_any_bytes_load_or_are_refused(tmp_path_factory, name, content):
    path = write(tmp_path_factory.getbasetemp(), b"text\n" + content, name)
    try:
        assert read(path).rows
    except DataError as error:
        assert "any." in error.what
