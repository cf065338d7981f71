"""Messages, calls and schemas as people write them become one form, or an error that names line and turn."""

import datetime
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizers import CHATML, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import OWN, templates, tokenizer_for
from test_nothing_lost import stretches

from qpsft.data.messages import CALL_ROLES, FLAGS, ROLES, read_messages, read_tools
from qpsft.data.read import as_records
from qpsft.data.shapes import to_rows
from qpsft.data.tokenize import load_rows, tokenize_records
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def rows_of(*rows, **options):
    return to_rows(as_records(list(rows), "rows"), DataArguments(**options)).rows


def messages_of(*messages):
    return rows_of({"messages": list(messages)})[0]["messages"]


def refusal(*messages, **columns) -> str:
    with pytest.raises(DataError) as caught:
        rows_of({"messages": list(messages), **columns})
    assert "rows, row 1" in caught.value.what and caught.value.todo
    return str(caught.value)


def trained(row, template, **options):
    tokenizer = tokenizer_for(template)
    data = tokenize_records(as_records([row], "rows"), tokenizer, DataArguments(**options), None)
    return stretches(data.dataset[0], tokenizer)


@pytest.mark.parametrize(("written", "role"), [*ROLES.items(), ("Human", "user"), (" GPT ", "assistant")])
def test_roles_are_known_by_their_names_in_both_formats(written, role):
    turn = {"role": role, "content": "x"}
    others = [ANSWER] if role != "assistant" else [USER]
    assert messages_of({"role": written, "content": "x"}, *others)[0] == turn
    assert messages_of({"from": written, "value": "x"}, *others)[0] == turn


@pytest.mark.parametrize("role", ["critic", "assistent", "", None, 3, "</s>"])
def test_an_unknown_role_is_an_error_with_line_and_role(role):
    text = refusal(USER, {"role": role, "content": "x"}, ANSWER)
    assert "messages, turn 2: " in text and (
        "no role" in text if not isinstance(role, str) or not role else role in text
    )


@pytest.mark.parametrize("family", ["gptoss", "gemma4_v5", "qwen2_5", "llama3", "chatml"])
def test_a_developer_is_the_system_where_the_template_has_none(family):
    row = {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]}
    _, read = trained(row, templates()[family])
    assert "Be brief." in read
    knows = "'developer'" in templates()[family] or '"developer"' in templates()[family]
    assert ("developer" in read.partition("Be brief.")[0][-40:]) == (knows and family == "gptoss")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("off", "on"), [(False, True), (0, 1), (0.0, 1.0)])
def test_a_flag_says_whether_a_turn_is_trained_on(flag, off, on):
    wrong = {"role": "assistant", "content": "wrong", flag: off}
    row = {"messages": [USER, wrong, {**USER, flag: off}, {**ANSWER, flag: on}]}
    for template in (CHATML, templates()["qwen3"], templates()["mistral_v0_3"]):
        learned, read = trained(row, template)
        assert "wrong" in read and "wrong" not in learned and "ho" in learned
    pair = {"prompt": [USER], "completion": [wrong, USER, ANSWER]}
    learned, read = trained(pair, CHATML)
    assert "wrong" in read and "wrong" not in learned and "ho" in learned


def test_sharegpt_turns_have_flags_too():
    turns = [("human", "hi", None), ("gpt", "wrong", 0), ("human", "hm", None), ("gpt", "ho", 1)]
    row = {"conversations": [{"from": who, "value": text, "weight": flag} for who, text, flag in turns]}
    learned, read = trained(row, CHATML)
    assert "wrong" in read and "wrong" not in learned and "ho" in learned


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0, 1], float("nan"), {}])
def test_a_flag_is_0_or_1(value):
    assert "turn 2: loss_mask is" in refusal(USER, {**ANSWER, "loss_mask": value})


def test_flags_that_cannot_be_meant():
    assert "train and weight contradict each other" in refusal(USER, {**ANSWER, "train": True, "weight": 0})
    assert "asks to train on a turn of the user" in refusal({**USER, "train": True}, ANSWER)
    with pytest.raises(DataError, match="prompt, turn 2: weight asks to train on a turn of the prompt"):
        rows_of({"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]})
    with pytest.raises(DataError, match=r"no supervised token.*Mark at least one assistant turn as trained"):
        trained({"messages": [USER, {**ANSWER, "train": 0}]}, CHATML)


def test_an_empty_answer_may_be_context_only():
    empty = {"role": "assistant", "content": ""}
    assert "turn is empty, which would teach the model to stop" in refusal(USER, empty, USER, ANSWER)
    learned, _ = trained({"messages": [USER, {**empty, "train": 0}, USER, ANSWER]}, CHATML)
    assert learned == "ho<|im_end|>\n"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
        {"tool_calls": CALL},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [json.dumps(CALL)]},
        {"tool_calls": [{"function": {"name": "f", "arguments": [("a", 1)]}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"a": np.int64(1), "b": None}}}]},
        {"tool_calls": np.array([CALL], dtype=object)},
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
        {"role": "tool_call", "content": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_a_call_may_be_written_in_many_ways(message):
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages_of(USER, {"role": "assistant", "content": None, **message})[1] == expected


@pytest.mark.parametrize("empty", [None, "", " ", {}, "{}", "null"])
def test_arguments_may_be_empty(empty):
    call = {"function": {"name": "f", "arguments": empty}}
    function = messages_of(USER, {"role": "assistant", "tool_calls": [call]})[1]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1, 2], "the arguments must be an object, found list"),
        ([["a", 1]], "the arguments must be an object, found list"),
        ("[1]", "the arguments must be an object, found list"),
        ('"text"', "the arguments must be an object, found str"),
        (5, "the arguments must be an object, found int"),
        ("{a: 1}", "the arguments are text, but not valid JSON"),
        ({"a": datetime.date(2026, 11, 27)}, "JSON has no way to write date 2026-11-27"),
        ({"a": float("nan")}, "JSON has no way to write float nan"),
        ({"a": "\ud800"}, "a text holds \\ud800, half a surrogate pair"),
        ({1: 2}, "a key must be text, found int 1"),
    ],
)
def test_arguments_that_are_no_mapping_are_refused(arguments, message):
    call = {"function": {"name": "f", "arguments": arguments}}
    text = refusal(USER, {"role": "assistant", "tool_calls": [call]})
    assert f"messages, turn 2, the call to f: {message}" in text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a tool call has no function name"),
        ({"tool_calls": 5}, "tool_calls must be a list"),
        ({"tool_calls": [5]}, "a tool call has no function name"),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, "tool_calls stand beside the older function_call"),
        ({"role": "function_call", "content": "f(1)"}, "the tool call is text, but not valid JSON"),
        ({"role": "function_call", "content": ""}, "the assistant message has no content"),
        ({"content": {"text": "x"}}, "content must be text, found dict"),
        ({"content": float("nan")}, "content must be text, found NaN, an empty cell. Fill it or delete the row."),
        ({"content": 42}, 'content must be text, found int 42. Write it as text: "42".'),
        ({"content": "x", "reasoning": "a", "thinking": "b"}, "reasoning and thinking differ"),
    ],
)
def test_calls_and_contents_that_cannot_be_read(message, text):
    assert f"messages, turn 2: {text}" in refusal(USER, {"role": "assistant", **message})


@pytest.mark.parametrize("empty", [None, "", " ", "[]", [], {}])
def test_tools_may_be_empty(empty):
    assert rows_of({"messages": [USER, ANSWER], "tools": empty}) == [{"messages": [USER, ANSWER]}]


def test_schemas_get_their_outer_object_and_lose_arrows_nulls():
    flat = {"name": "f", "description": None, "parameters": {"properties": {"a": {"type": "string"}, "b": None}}}
    whole = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
    for tools in ([flat], flat, [{"type": "function", "function": flat}], [{"function": flat}]):
        assert read_tools(tools, "row 1") == whole
    # JSON text says what its writer meant: Arrow adds nothing to it
    text = json.dumps([{"name": "f", "parameters": {"default": None}}])
    assert read_tools(text, "row 1")[0]["function"] == {"name": "f", "parameters": {"default": None}}
    for tools, message in (
        (["f"], "the tool is text, but not"),
        ([{"x": 1}], "must be an object with a name"),
        (5, "list"),
    ):
        assert message in refusal(USER, ANSWER, tools=tools)


def test_reasoning_goes_by_several_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        message = messages_of(USER, {**ANSWER, name: "thought", "reasoning_details": None})[1]
        assert message == {**ANSWER, "reasoning_content": "thought"}
    assert messages_of(USER, {**ANSWER, "reasoning_content": "", "thinking": None})[1] == ANSWER


def test_arrow_maps_are_mappings(tmp_path):
    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", arguments)])
    fields = [("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(call))]
    calls = [[("city", "Oslo")], []]
    rows = [[USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": call}]}] for call in calls]
    column = pyarrow.array(rows, type=pyarrow.list_(pyarrow.struct(fields)))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "maps.parquet")
    loaded = load_rows(str(tmp_path / "maps.parquet"), DataArguments()).rows
    functions = [row["messages"][1]["tool_calls"][0]["function"] for row in loaded]
    assert functions == [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "f", "arguments": {}}]


@pytest.mark.parametrize("source", ["parquet", "jsonl", "python", "datasets"])
def test_nulls_of_other_rows_calls_do_not_exist_wherever_rows_come_from(tmp_path, source):
    def row(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    filled = [row({"a": 1, "in": {"x": 2, "y": None}, "b": None}), row({"a": None, "in": None, "b": 3})]
    if source == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "rows.parquet")
        rows = load_rows(str(tmp_path / "rows.parquet"), DataArguments()).rows
    elif source == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, filled)))
        rows = load_rows(str(tmp_path / "rows.jsonl"), DataArguments()).rows
    elif source == "datasets":
        import datasets

        rows = rows_of(*datasets.Dataset.from_list(filled).to_list())
    else:
        rows = rows_of(*filled)
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert arguments == [{"a": 1, "in": {"x": 2}}, {"b": 3}]


def test_a_null_that_was_written_as_json_text_stays():
    call = {"function": {"name": "f", "arguments": '{"city": null, "days": 3}'}}
    function = messages_of(USER, {"role": "assistant", "tool_calls": [call]})[1]["tool_calls"][0]["function"]
    assert function["arguments"] == {"city": None, "days": 3}


def test_values_nested_too_deeply_are_refused():
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    call = {"function": {"name": "f", "arguments": deep}}
    assert "nested too deeply" in refusal(USER, {"role": "assistant", "tool_calls": [call]})
    assert "nested too deeply" in refusal(USER, {**ANSWER, "notes": deep})
    assert "nested too deeply" in refusal(USER, ANSWER, tools=[{"name": "f", "parameters": deep}])


def test_old_function_turns_are_tool_turns():
    old = {"role": "function", "name": "f", "content": "4"}
    row = {"messages": [USER, {"role": "assistant", "function_call": CALL["function"], "content": None}, old, ANSWER]}
    learned, read = trained(row, templates()["qwen2_5"])
    assert '{"name": "f", "arguments": {"a": 1}}' in learned and "<tool_response>\n4\n</tool_response>" in read


def test_of_several_templates_the_one_for_tool_use_is_taken_for_rows_with_tools():
    both = {"default": CHATML, "tool_use": (OWN / "hermes3_tool_use.jinja").read_text()}
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = both
    tool = {"name": "f", "description": "Adds.", "parameters": {"properties": {"a": {"type": "integer"}}}}
    calling = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [tool]}
    data = tokenize_records(
        as_records([calling, {"messages": [USER, ANSWER]}], "rows"), tokenizer, DataArguments(), None
    )
    (learned, read), (plain, _) = (stretches(row, tokenizer) for row in data.dataset)
    assert '"arguments": {"a": 1}' in learned and "<tools>" in read and plain == "ho<|im_end|>\n"
    with pytest.raises(DataError, match="does not write the call to f"):
        tokenize_records(as_records([{"messages": calling["messages"]}], "rows"), tokenizer, DataArguments(), None)
    tokenizer.chat_template = {"tool_use": both["tool_use"]}
    with pytest.raises(DataError, match=r"several chat templates \(tool_use\) and none is the default"):
        tokenize_records(as_records([{"messages": [USER, ANSWER]}], "rows"), tokenizer, DataArguments(), None)


def test_templates_that_want_arguments_as_text_get_them():
    template = templates()["deepseekv3"].replace("{#", "{# #}{#")  # another text, so that TRL does not know it
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    learned, _ = trained(row, template + "{# changed #}")
    assert 'f\n```json\n{"a": "é"}\n```' in learned


# Context columns


def test_a_system_column_is_used_wherever_it_first_appears():
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER], "system": "Be brief. "},
        {"messages": [USER, ANSWER], "system": " "},
    ]
    system = {"role": "system", "content": "Be brief."}
    expected = [[USER, ANSWER], [system, USER, ANSWER], [system, USER, ANSWER], [USER, ANSWER]]
    assert [row["messages"] for row in rows_of(*rows)] == expected
    assert rows_of(
        {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "sys": "x"}, dataset_columns={"system": "sys"}
    )
    clash = {**rows[2], "system": "Be long."}
    assert "the column system says one thing" in refusal(*clash.pop("messages"), **clash)
    left_out = to_rows(as_records(rows, "rows"), DataArguments(dataset_columns={"system": None}))
    assert left_out.rows[1]["messages"] == [USER, ANSWER] and left_out.unused_columns == ["system"]


@pytest.mark.parametrize("history", [None, "", [], "[]", float("nan")])
def test_alpaca_without_context_stays_two_texts(history):
    row = {"instruction": "a", "output": "b", "history": history, "system": None}
    assert rows_of(row) == [{"prompt": "a", "completion": "b"}]


def test_history_and_system_of_any_row_are_its_context():
    plain = {"instruction": "a", "input": "i", "output": "b"}
    full = {**plain, "history": [["q", "r"]], "system": "s"}
    text = {**plain, "history": '[["q", "r"]]'}
    one, two, three = rows_of(plain, full, text, prompt_format="<{prompt}>")
    assert one == {"prompt": "a\n\ni", "completion": "b"}
    turns = [("system", "s"), ("user", "<q>"), ("assistant", "r"), ("user", "<a\n\ni>")]
    assert [(m["role"], m["content"]) for m in two["prompt"]] == turns
    assert [(m["role"], m["content"]) for m in three["prompt"]] == turns[1:]
    assert two["completion"] == three["completion"] == [{"role": "assistant", "content": "b"}]
    mapped = rows_of(plain, {**plain, "past": [["q", "r"]]}, dataset_columns={"history": "past"})
    assert len(mapped[1]["prompt"]) == 3
    for history in ("q", [["q"]], [["q", None]], [["q", ""]], {"q": "r"}):
        with pytest.raises(DataError, match="row 1: .*history"):
            rows_of({**plain, "history": history})


def test_plain_text_has_no_place_for_context():
    row = {"instruction": "a", "output": "b", "system": "s"}
    with pytest.raises(DataError, match="the row is made of messages, but the tokenizer has no chat template"):
        tokenize_records(as_records([row], "rows"), byte_tokenizer(), DataArguments(), None)
    tools = {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}
    with pytest.raises(DataError, match="the row has tools, and plain text has no place for them"):
        tokenize_records(as_records([tools], "rows"), byte_tokenizer(), DataArguments(), None)


def test_columns_and_keys_that_are_not_used_are_named():
    rows = [{"messages": [USER, ANSWER]}, {"messages": [{**USER, "time": 5, "name": "Bo"}, ANSWER], "id": 7}]
    data = tokenize_records(as_records(rows, "rows"), byte_tokenizer(CHATML), DataArguments(), None)
    assert data.counts.unused_columns == ["id", "messages.name", "messages.time"]
    assert data.counts.facts() == ["columns not used: id, messages.name, messages.time"]
    template = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ m.name }} {{ m.time }}")
    data = tokenize_records(as_records(rows, "rows"), byte_tokenizer(template), DataArguments(), None)
    assert data.counts.unused_columns == ["id"]


def test_a_template_that_shortens_schemas_is_said_once():
    deep = {"where": {"type": "array", "items": {"type": "object", "properties": {f"key_{n}": {} for n in range(9)}}}}
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": deep}}
    row = {"messages": [USER, ANSWER], "tools": [tool]}
    tokenizer = tokenizer_for(templates()["gptoss"])
    with pytest.warns(UserWarning, match="shortens the tool schemas of 2 rows") as caught:
        data = tokenize_records(as_records([row, row], "rows"), tokenizer, DataArguments(), None)
    assert len(caught) == 1 and data.counts.shortened_schemas == 2
    assert "2 with tool schemas that the chat template shortens" in data.counts.facts()
    _, read = trained(row, templates()["qwen3"])
    assert all(f"key_{n}" in read for n in range(9))


# Any row


KEYS = st.sampled_from(
    [*"role content value from name id type function arguments parameters tool_calls function_call tools".split()]
    + [*FLAGS, *CALL_ROLES, "reasoning_content", "thinking", "text", "properties"]
)
TEXTS = st.sampled_from(
    ["user", "assistant", "tool", "system", "f", "{}", "[]", "<think>a</think>b", "\ud800", "</s>", "x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from([*ROLES, *CALL_ROLES]), "content": VALUES}) | st.dictionaries(
    KEYS, VALUES, max_size=5
)
CALLING = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS, "tool_calls": VALUES | st.lists(st.just(CALL), max_size=2)}
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(MESSAGE | CALLING | st.just(USER), max_size=4),
    st.none() | VALUES,
    st.sampled_from(
        ["qwen3", "gptoss", "mistral_v0_3", "llama3_1", "gemma4_v5", "deepseek_r1_distill", "idefics3", "chatml"]
    ),
)
def test_no_row_ends_in_a_traceback(messages, tools, family):
    row = {"messages": [*messages, ANSWER], "tools": tools}
    try:
        trained(row, templates()[family])
    except DataError as error:
        assert "rows" in error.what and error.todo


@given(VALUES)
def test_any_value_in_the_column_is_messages_or_an_error(value):
    try:
        assert all(message["role"] in ROLES.values() for message in read_messages(value, "messages", "row 1"))
    except DataError as error:
        assert "row 1" in error.what
