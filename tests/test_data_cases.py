"""Rows that went wrong in public reports, and what must become of them, on the real chat templates.

`../shared/cases/data` has the rows as files; they are repeated here, to be tried where that folder is not.
"""

import json

import pyarrow.parquet
import pytest
from conftest import shared_path
from real_templates import templates, tokenizer_for
from test_nothing_lost import stretches

from qpsft.data.tokenize import load_dataset
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SCHEMA = {"name": "weather", "description": "w", "parameters": {"type": "object", "properties": {"city": {}}}}
ASK = {"role": "user", "content": "Weather in Oslo?"}
ANSWERED = [{"role": "tool", "content": "4 C"}, {"role": "assistant", "content": "It is 4 C."}]
ROWS = {
    "D_pc": {"prompt": "What is 2+2?", "completion": "<think>\n2+2 equals 4.\n</think>\n\nThe answer is 4."},
    "R_reasoning": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4.", "reasoning_content": "two and two are four"},
        ]
    },
    "R_human_assistant": {
        "messages": [
            {"role": "human", "content": "What is the capital of Norway?"},
            {"role": "assistant", "content": "Oslo."},
        ]
    },
    "R_toolcalls_plain": {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [WEATHER]}, *ANSWERED],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    },
    "O_train": {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "WRONG ANSWER", "train": False},
            {"role": "user", "content": "no, in Spanish"},
            {"role": "assistant", "content": "uno"},
        ]
    },
    "B_alpaca_history": {
        "instruction": "And in Bergen?",
        "input": "",
        "output": "6 C.",
        "system": "You are a weather bot.",
        "history": [["Weather in Oslo?", "4 C."]],
    },
    "J_null_tool": {
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "id": "a", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "4"},
            {"role": "assistant", "content": "x"},
        ]
    },
    "B_sharegpt_fc": {
        "conversations": [
            {"from": "human", "value": "weather in Oslo?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "4 C"},
            {"from": "gpt", "value": "It is 4 C."},
        ],
        "system": "Answer in one line.",
        "tools": json.dumps([SCHEMA]),
    },
    "Q_html": {"prompt": "How do I strike text out in HTML?", "completion": "Write <s>old</s> new."},
}
REASONS = {
    "deepseek_r1_distill",
    "deepseekv3",
    "glm4moe",
    "gptoss",
    "lfm2_2_5",
    "qwen3",
    "qwen3_5_think",
    "smollm3",
    "gemma4_v5",
}
NO_REASONING = {
    "llama3",
    "llama3_1",
    "llama3_2",
    "qwen2_5",
    "chatml",
    "phi3",
    "phi4",
    "gemma",
    "gemma3",
    "cohere",
    "lfm2",
}
NO_REASONING |= {
    "falcon3",
    "granite3",
    "mistral_v0_2",
    "mistral_v0_3",
    "olmo2",
    "zephyr",
    "llama2",
    "cohere2",
}
NO_CALLS = {
    "llama3",
    "chatml",
    "phi3",
    "phi3_5",
    "deepseek_r1_distill",
    "lfm2",
    "smollm2",
    "olmo2",
    "falcon3",
    "granite3",
}
CALLS = {
    "qwen3",
    "qwen2_5",
    "qwen3_5_think",
    "glm4moe",
    "lfm2_v2",
    "llama3_1",
    "gemma4_v5",
    "nemotron_3_nano",
}


@pytest.fixture(params=["repeated here", "shared"])
def path_of(request, tmp_path):
    """Case -> its file, of the shared folder or written from ROWS."""

    def path(name):
        if request.param == "shared":
            return shared_path(f"cases/data/{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
        return tmp_path / f"{name}.jsonl"

    return path


def trained(path, family, **options):
    """What the model learns and what it only reads of a file's rows."""
    tokenizer = tokenizer_for(templates()[family])
    data = load_dataset(DataArguments(dataset_name=str(path), **options), tokenizer, None, show_progress=False)
    return stretches(data.dataset[0], tokenizer)


def refusal(path, family, **options):
    with pytest.raises(DataError) as caught:
        trained(path, family, **options)
    return str(caught.value)


def test_reasoning_of_a_completion_is_learned_as_in_messages(path_of, tmp_path):
    learned, _ = trained(path_of("D_pc"), "deepseek_r1_distill")
    assert "2+2 equals 4.\n</think>\n\nThe answer is 4.<｜end▁of▁sentence｜>" in learned
    row = ROWS["D_pc"]
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    (tmp_path / "messages.jsonl").write_text(json.dumps({"messages": messages}))
    # The header and the opening <think>, which the generation prompt gives, are marked in TRL's template.
    assert trained(tmp_path / "messages.jsonl", "deepseek_r1_distill")[0].endswith(learned)


@pytest.mark.parametrize("family", sorted(REASONS | NO_REASONING))
def test_reasoning_content_is_learned_or_refused_by_name(path_of, family):
    path = path_of("R_reasoning")
    if family in REASONS:
        learned, _ = trained(path, family)
        assert "two and two are four" in learned and "4." in learned.partition("two and two are four")[2]
    else:
        assert "line 1: the chat template does not write the reasoning in turn 2" in refusal(path, family)


def test_human_is_the_user(path_of):
    learned, read = trained(path_of("R_human_assistant"), "qwen2_5")
    assert "<|im_start|>user\nWhat is the capital of Norway?<|im_end|>" in read and "Oslo." in learned


@pytest.mark.parametrize("family", sorted(NO_CALLS | CALLS))
def test_tool_calls_are_learned_or_refused(path_of, family):
    path = path_of("R_toolcalls_plain")
    assert "has no attribute 'description'. It wants something that the row lacks" in refusal(path, "gptoss")
    if family in NO_CALLS:
        assert "does not write the call to weather in turn 2 (assistant)" in refusal(path, family)
    else:
        learned, read = trained(path, family)
        call, _, answer = learned.partition("\n|\n")
        assert "weather" in call and "city" in call and "Oslo" in call and "It is 4 C." in answer
        assert "4 C" in read and "Weather in Oslo?" in read


@pytest.mark.parametrize("family", ["qwen3", "llama3", "chatml", "phi3", "gptoss", "mistral_v0_3", "gemma3", "olmo2"])
def test_a_turn_that_is_not_trained_on_is_context(path_of, family):
    learned, read = trained(path_of("O_train"), family)
    assert "WRONG ANSWER" not in learned and "WRONG ANSWER" in read and "uno" in learned


def written_or_shared(tmp_path, kind):
    if kind == "shared":
        return shared_path("cases/data/A_tools.parquet")
    rows = []
    for name, arguments, answer in (("weather", {"city": "Oslo"}, "It is 4 C."), ("add", {"a": 2, "b": 3}, "5.")):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "string"} for key in arguments}
        parameters = {"type": "object", "properties": properties, "required": list(arguments)}
        tool = {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        messages += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "tools": [tool]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "A_tools.parquet")
    return tmp_path / "A_tools.parquet"


@pytest.mark.parametrize("kind", ["repeated here", "shared"])
def test_only_arguments_that_were_written_are_learned(tmp_path, kind):
    path = written_or_shared(tmp_path, kind)
    stored = pyarrow.parquet.read_table(path).to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert stored == {"city": "Oslo", "a": None, "b": None}  # what Arrow makes of rows with other calls
    tokenizer = tokenizer_for(templates()["qwen3"])
    data = load_dataset(DataArguments(dataset_name=str(path)), tokenizer, None).dataset
    first, second = (stretches(row, tokenizer) for row in data)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in first[0]
    assert '{"name": "add", "arguments": {"a": 2, "b": 3}}' in second[0]
    assert "null" not in "".join(first + second) and '"required": ["city"]' in first[1]


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "phi4", "mistral_v0_3", "gemma3", "cohere2"])
def test_alpacas_system_and_history_are_context(path_of, family):
    learned, read = trained(path_of("B_alpaca_history"), family)
    for text in ("You are a weather bot.", "Weather in Oslo?", "4 C.", "And in Bergen?"):
        assert text in read
    assert "6 C." in learned and "4 C." not in learned


def test_null_content_beside_a_call_is_no_content(path_of):
    learned, read = trained(path_of("J_null_tool"), "qwen3")
    assert '{"name": "f", "arguments": {}}' in learned and "None" not in learned + read
    for family in ("deepseek_r1_distill", "phi3", "llama3"):
        assert "does not write the call to f in turn 2" in refusal(path_of("J_null_tool"), family)
    assert "Tool call IDs should be alphanumeric strings with length 9!" in refusal(
        path_of("J_null_tool"), "mistral_v0_3"
    )


def test_sharegpts_calls_and_observations_are_tool_turns(path_of):
    learned, read = trained(path_of("B_sharegpt_fc"), "qwen3")
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in learned
    assert "<tool_response>\n4 C\n</tool_response>" in read and "It is 4 C." in learned
    assert "Answer in one line." in read and '"description": "w"' in read


def test_a_special_token_in_a_cell_is_said(path_of):
    path = path_of("Q_html")
    with pytest.warns(UserWarning, match=r"special tokens stand in the text of 1 row, first <s> in line 1\."):
        trained(path, "llama3")
    assert "its text holds <s>, which the tokenizer would read" in refusal(path, "llama3", refuse_special_tokens=True)


def test_the_shared_rows_are_those_repeated_here():
    for name, row in ROWS.items():
        shared = json.loads(shared_path(f"cases/data/{name}.jsonl").read_text().splitlines()[0])
        if name != "B_sharegpt_fc":  # there the schema is longer
            assert shared == row
