"""The supervised tokens are the right ones: by decoded text and by id, for every shape, template and truncation."""

import json
import time
from pathlib import Path

import pytest
from byte_tokenizers import (
    BOS,
    CHATML,
    EOS,
    FORGETS_THOUGHTS,
    LLAMA3,
    MARKED,
    MARKED_WITHOUT_END,
    OPEN,
    OPENS_THOUGHTS,
    PROMPT,
    SPECIAL,
    TURN,
    byte_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen2_5_chat_template, qwen2_5_training_chat_template
from trl.data_utils import common_prefix_length
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpsft.data.tokenize import load_dataset, load_rows, tokenize_rows
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

DEMO = Path(__file__).parents[1] / "qpsft" / "demo" / "model"


def tokenized(tmp_path, rows, tokenizer, max_length=None, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(DataArguments(dataset_name=str(path), **options), tokenizer, max_length)


def learned(row, tokenizer):
    """The decoded runs of supervised tokens of a row; checks on the way that a label is -100 or the token's id."""
    runs, previous = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


def only(tokenized):
    assert len(tokenized.dataset) == 1
    return tokenized.dataset[0]


USER = {"role": "user", "content": "2+3?"}
FIVE = {"role": "assistant", "content": "5"}
TALK = [{"role": "system", "content": "Add."}, USER, FIVE, {"role": "user", "content": "+1?"}]
TALK = [*TALK, {"role": "assistant", "content": "6\n"}]


def test_strings_without_a_template_get_bos_once_and_a_supervised_eos(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    row = only(tokenized(tmp_path, [{"prompt": "a{b}", "completion": "5"}], tokenizer, prompt_format="Q:{prompt} A:"))
    assert tokenizer.decode(row["input_ids"]) == "<s>Q:a{b} A:5</s>"
    assert row["labels"] == [-100] * 10 + row["input_ids"][10:]
    assert row["input_ids"][0] == BOS and row["input_ids"][-1] == row["labels"][-1] == EOS


def test_bos_and_eos_that_the_text_already_has_are_not_doubled(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    row = only(tokenized(tmp_path, [{"prompt": "<s>2", "completion": "5</s>"}], tokenizer))
    assert tokenizer.decode(row["input_ids"]) == "<s>25</s>"
    assert learned(row, tokenizer) == ["5</s>"]


def test_an_eos_that_the_tokenizer_adds_itself_is_supervised_once(tmp_path):
    tokenizer = byte_tokenizer()
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = template
    row = only(tokenized(tmp_path, [{"prompt": "2", "completion": "5"}], tokenizer))
    assert tokenizer.decode(row["input_ids"]) == "<s>25</s>"
    assert learned(row, tokenizer) == ["5</s>"]


def test_strings_go_through_the_template_when_there_is_one(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3, bos=True)
    rows = [{"prompt": "2+3?", "completion": "5"}]
    row = only(tokenized(tmp_path, rows, tokenizer, prompt_format="Add {prompt}"))
    expected = "<s><|start_header_id|>user<|end_header_id|>\n\nAdd 2+3?<|eot_id|>"
    expected += "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>"
    assert tokenizer.decode(row["input_ids"]) == expected
    assert learned(row, tokenizer) == ["5<|eot_id|>"]
    plain = only(tokenized(tmp_path, rows, tokenizer, use_chat_template="never"))
    assert tokenizer.decode(plain["input_ids"]) == "<s>2+3?5</s>"


def test_always_needs_a_template(tmp_path):
    with pytest.raises(DataError, match="always, but the tokenizer has no chat template"):
        tokenized(tmp_path, [{"prompt": "a", "completion": "b"}], byte_tokenizer(), use_chat_template="always")


def test_alpaca_puts_the_input_under_the_instruction(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [{"instruction": "Add.", "input": "2+3", "output": "5"}, {"instruction": "Hi.", "input": "", "output": "Ho"}]
    data = tokenized(tmp_path, rows, tokenizer)
    assert data.shape == "alpaca"
    assert [tokenizer.decode(row["input_ids"]) for row in data.dataset] == ["Add.\n\n2+35</s>", "Hi.Ho</s>"]
    assert [learned(row, tokenizer) for row in data.dataset] == [["5</s>"], ["Ho</s>"]]


def test_text_is_supervised_from_its_second_token_on(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    data = tokenized(tmp_path, [{"text": "abc"}], tokenizer)
    assert learned(only(data), tokenizer) == ["bc</s>"]
    assert (data.counts.tokens, data.counts.supervised_tokens) == (4, 3)


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END], ids=["unmarked", "marked", "end outside"])
def test_every_assistant_turn_is_supervised_with_its_end_token(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    after = "" if template == MARKED else "\n"
    one, many = tokenized(tmp_path, [{"messages": [USER, FIVE]}, {"messages": TALK}], tokenizer).dataset
    assert learned(one, tokenizer) == ["5<|im_end|>" + after]
    assert learned(many, tokenizer) == ["5<|im_end|>" + after, "6\n<|im_end|>" + after]
    text = tokenizer.decode(many["input_ids"])
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False) and text.count("<|im_end|>") == 5


def test_llama3_style_end_token_is_supervised_and_bos_comes_once(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3, bos=True)
    row = only(tokenized(tmp_path, [{"messages": TALK}], tokenizer))
    assert learned(row, tokenizer) == ["5<|eot_id|>", "6<|eot_id|>"]
    assert row["input_ids"].count(BOS) == 1


def test_a_template_trl_knows_gets_trls_labels(tmp_path):
    tokenizer = byte_tokenizer(qwen2_5_chat_template)
    row = only(tokenized(tmp_path, [{"messages": TALK}], tokenizer))
    trl = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, chat_template=qwen2_5_training_chat_template
    )
    assert row["input_ids"] == trl["input_ids"]
    assert [label != -100 for label in row["labels"]] == [bool(bit) for bit in trl["assistant_masks"]]
    assert learned(row, tokenizer) == ["\n5<|im_end|>\n", "\n6\n<|im_end|>\n"]


def test_sharegpt_is_the_same_conversation(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    tokenizer = byte_tokenizer(CHATML)
    data = tokenized(tmp_path, [{"conversations": talk}], tokenizer)
    assert data.shape == "sharegpt"
    assert only(data) == only(tokenized(tmp_path, [{"messages": TALK}], tokenizer))


def test_completion_messages_are_supervised_and_earlier_answers_are_not(tmp_path):
    tokenizer = byte_tokenizer(MARKED)
    row = only(tokenized(tmp_path, [{"prompt": TALK[:-1], "completion": TALK[-1:]}], tokenizer))
    assert learned(row, tokenizer) == ["6\n<|im_end|>\n"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["unmarked", "marked"])
def test_a_tools_result_inside_a_completion_is_not_supervised(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    completion = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}]
    completion.append({"role": "assistant", "content": "It is 42"})
    row = only(tokenized(tmp_path, [{"prompt": TALK[:-1], "completion": completion}], tokenizer))
    assert [run.strip() for run in learned(row, tokenizer)] == ["call<|im_end|>", "It is 42<|im_end|>"]


def test_tools_and_tool_calls_reach_the_template_with_arguments_as_an_object(tmp_path):
    template = (
        "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}" + OPEN + "<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    ) + PROMPT
    tokenizer = byte_tokenizer(template)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        FIVE,
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}
    row = only(tokenized(tmp_path, [row], tokenizer))
    assert tokenizer.decode(row["input_ids"]).startswith("<tool>add</tool><|im_start|>user\n2+3?")
    assert learned(row, tokenizer) == ['{"name": "add", "arguments": {"a": 2}}<|im_end|>\n', "5<|im_end|>\n"]


def test_a_generation_prompt_that_opens_a_thought_ends_where_the_answer_differs(tmp_path):
    tokenizer = byte_tokenizer(OPENS_THOUGHTS)
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "<5"}]},
        {"prompt": "2+3?", "completion": "<think>\n5"},
    ]
    first, second = tokenized(tmp_path, rows[:1], tokenizer), tokenized(tmp_path, rows[1:], tokenizer)
    assert learned(only(first), tokenizer) == ["<5<|im_end|>\n"]
    assert learned(only(second), tokenizer) == ["5<|im_end|>\n"]


def test_reasoning_that_a_template_strips_from_earlier_answers_is_said_once(tmp_path):
    talk = [USER, {"role": "assistant", "content": "2+3 is</think>5"}, *TALK[-2:]]
    tokenizer = byte_tokenizer(FORGETS_THOUGHTS)
    rows = [{"messages": [USER, FIVE]}, {"messages": talk}, {"prompt": talk[:2], "completion": talk[2:]}]
    for row in rows[1:]:
        with pytest.warns(UserWarning, match="leaves out the reasoning of 1 earlier answer. --split_turns") as caught:
            data = tokenized(tmp_path, [row], tokenizer)
        assert len(caught) == data.counts.stripped_reasoning == 1
        assert "2+3 is" not in tokenizer.decode(only(data)["input_ids"])
    assert learned(only(data), tokenizer) == ["6\n<|im_end|>\n"]
    data = tokenized(tmp_path, rows[:2], tokenizer, split_turns=True)
    assert data.counts.stripped_reasoning == 0 and data.counts.conversations == 2 and data.counts.rows == 3
    assert [learned(row, tokenizer) for row in data.dataset] == [
        ["5<|im_end|>\n"],
        ["2+3 is</think>5<|im_end|>\n"],
        ["6\n<|im_end|>\n"],
    ]
    assert [place.rpartition("line ")[2] for place in data.places] == ["1", "2, answer 1 of 2", "2, answer 2 of 2"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row(tmp_path):
    template = OPEN + "<|im_start|>{{ m.role }}\n{{ 'last ' if loop.last }}{{ m.content }}<|im_end|>\n" + PROMPT
    rows = [{"messages": TALK[-2:]}, {"messages": TALK}]
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used:\n  line 1: .* first 1 turns differently"):
        tokenized(tmp_path, rows, byte_tokenizer(template))


def test_a_template_that_writes_a_prompt_differently_by_itself_is_refused(tmp_path):
    template = OPEN + "<|im_start|>{{ m.role }}\n{{ '/last ' if loop.last }}{{ m.content }}<|im_end|>\n" + PROMPT
    with pytest.raises(DataError, match="line 1: the chat template writes the first 1 turns differently"):
        tokenized(tmp_path, [{"prompt": "2+3?", "completion": "5"}], byte_tokenizer(template))


def test_a_conversation_the_assistant_opens_needs_markers(tmp_path):
    rows = [{"messages": [FIVE, USER, FIVE]}]
    with pytest.raises(DataError, match="line 1: the conversation starts with an assistant turn"):
        tokenized(tmp_path, rows, byte_tokenizer(CHATML))
    tokenizer = byte_tokenizer(MARKED)
    assert learned(only(tokenized(tmp_path, rows, tokenizer)), tokenizer) == ["5<|im_end|>"] * 2


def test_a_bar_is_shown_on_stderr_for_many_rows_only(tmp_path, monkeypatch, capsys):
    rows = [{"text": "ab"}] * 3
    tokenized(tmp_path, rows, byte_tokenizer())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("qpsft.data.tokenize.ROWS_WORTH_A_BAR", 3)
    monkeypatch.setattr("qpsft.data.tokenize.LINE", 1)
    tokenized(tmp_path, rows, byte_tokenizer())
    captured = capsys.readouterr()
    assert "100%" in captured.err and captured.out == ""


def test_a_template_that_refuses_a_row_names_it(tmp_path):
    template = OPEN + "{% if m.role == 'system' %}{{ raise_exception('No system turns') }}{% endif %}" + TURN + PROMPT
    with pytest.raises(DataError, match="line 2: the chat template refuses this conversation: No system turns"):
        tokenized(tmp_path, [{"messages": [USER, FIVE]}, {"messages": TALK}], byte_tokenizer(template))


def test_a_template_without_an_end_of_turn_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing after an assistant turn"):
        tokenized(tmp_path, [{"messages": TALK}], byte_tokenizer(CHATML.replace("<|im_end|>", "")))


def test_messages_without_a_template_are_refused(tmp_path):
    with pytest.raises(DataError, match="line 1: the row is made of messages, but the tokenizer has no chat template"):
        tokenized(tmp_path, [{"messages": TALK}], byte_tokenizer())


def test_supervise_prompt_supervises_all_but_the_first_token(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    row = only(tokenized(tmp_path, [{"messages": TALK}], tokenizer, supervise_prompt=True))
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_padding_is_not_supervised_though_it_has_the_id_of_the_supervised_eos(tmp_path):
    tokenizer = byte_tokenizer(pad="</s>")
    rows = [{"prompt": "2", "completion": "5"}, {"prompt": "1</s>", "completion": "12</s>34"}]
    data = tokenized(tmp_path, rows, tokenizer).dataset
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)([data[0], data[1]])
    short, long = batch["labels"].tolist()
    assert batch["input_ids"][0].tolist()[2:] == [EOS] * 6
    assert short == [-100, data[0]["input_ids"][1], EOS] + [-100] * 5
    assert long == [-100, -100, *data[1]["input_ids"][2:]] and long.count(EOS) == 2


def test_truncation_keeps_the_start_and_drops_rows_left_without_a_supervised_token(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [("ab", "cde"), ("abcdef", "g"), ("a", "b"), ("abcd", "ef")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    data = tokenized(tmp_path, rows, tokenizer, max_length=5)
    assert [tokenizer.decode(row["input_ids"]) for row in data.dataset] == ["abcde", "ab</s>", "abcde"]
    assert [learned(row, tokenizer) for row in data.dataset] == [["cde"], ["b</s>"], ["e"]]
    counts = data.counts
    assert counts.dropped == {"no supervised token within max_length=5": 1}
    assert (counts.rows, counts.kept, counts.truncated, counts.tokens, counts.supervised_tokens) == (4, 3, 2, 13, 6)
    assert counts.length_percentiles == {50: 6, 90: 8, 99: 8, 100: 8}
    assert [place.rpartition(", ")[2] for place in data.places] == ["line 1", "line 3", "line 4"]


def test_a_run_with_no_supervised_token_is_an_error(tmp_path):
    rows = [{"prompt": "abcdef", "completion": "g"}, {"prompt": "abcdefgh", "completion": "i"}]
    with pytest.raises(DataError, match=r"not one supervised token .*max_length=6: 2 rows.*Raise max_length"):
        tokenized(tmp_path, rows, byte_tokenizer(), max_length=6)


def test_a_token_across_the_prompts_end_is_supervised_and_counted(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "A", ":", " ", "5", " 5"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "5")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    rows = [{"prompt": "A: ", "completion": "5"}, {"prompt": "A:", "completion": " 5"}]
    data = tokenized(tmp_path, rows, tokenizer)
    assert [row["labels"] for row in data.dataset] == [[-100, -100, 6, 1]] * 2
    assert data.counts.shared_tokens == 1


TEXT = st.text(min_size=1, max_size=12).filter(str.strip).filter(lambda text: not any(s in text for s in SPECIAL))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_markers_and_prefixes_find_the_same_answers(tmp_path_factory, turns):
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for template, after in ((MARKED, ""), (CHATML, "\n")):
        tokenizer = byte_tokenizer(template)
        row = only(tokenized(tmp_path_factory.mktemp("data"), [{"messages": messages}], tokenizer))
        assert learned(row, tokenizer) == [f"{answer}<|im_end|>{after}" for _, answer in turns]


def test_demo_rows_supervise_the_answer_and_its_end_token():
    if not (DEMO / "tokenizer.json").exists():
        pytest.skip("the embedded base has not been built")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    arguments = DataArguments(dataset_name="demo-noisy", dataset_limit=20)
    rows = load_rows("demo-noisy", arguments)
    data = tokenize_rows(rows, tokenizer, arguments, 256)
    assert rows.unused_columns == ["task"] and data.counts.dropped == {}
    for row, source in zip(data.dataset, rows.rows, strict=True):
        assert learned(row, tokenizer) == [source["completion"][0]["content"] + "<|end|>"]
        prompt = tokenizer.apply_chat_template(source["prompt"], add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][: len(prompt)] == [-100] * len(prompt)


def test_rows_of_10_mb_are_tokenized_and_cut(tmp_path):
    words = ["<s>", "</s>", "<unk>", "a" * 50, "b" * 49]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    long = f"{words[3]} {words[4]} " * 100_000
    start = time.monotonic()
    data = tokenized(tmp_path, [{"prompt": words[3] + " ", "completion": long}], tokenizer, max_length=8)
    assert time.monotonic() - start < 180  # about 5 s on a free core; quadratic work would take hours
    assert only(data) == {"input_ids": [3, 3, 4, 3, 4, 3, 4, 3], "labels": [-100, 3, 4, 3, 4, 3, 4, 3]}
    assert data.counts.length_percentiles[100] == pytest.approx(200_002, rel=0.01)  # of so long a row an estimate
    assert data.counts.truncated == 1


GSM8K_COLUMNS = {"prompt": "question", "completion": "answer"}


def load_gsm8k(folder, tokenizer, **options):
    arguments = DataArguments(
        dataset_name=str(folder / "train.jsonl"), dataset_columns=GSM8K_COLUMNS, dataset_limit=200, **options
    )
    return load_rows(arguments.dataset_name, arguments), load_dataset(arguments, tokenizer, None)


def test_gsm8k_supervises_exactly_the_answers(stories, gsm8k):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows, data = load_gsm8k(gsm8k, tokenizer, prompt_format="Question: {prompt}\nAnswer:\n")
    assert data.counts.kept == 200 and data.counts.shared_tokens == 0
    for source, row in zip(rows.rows, data.dataset, strict=True):
        assert learned(row, tokenizer) == [source["completion"] + "</s>"]
        ids = tokenizer(f"Question: {source['prompt']}\nAnswer:\n{source['completion']}")["input_ids"]
        assert row["input_ids"] == [*ids, tokenizer.eos_token_id] and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_gsm8k_in_a_chat_has_the_labels_trl_would_give_it(stories, gsm8k, template):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_tokens(SPECIAL[2:7], special_tokens=True)
    tokenizer.chat_template = template
    rows, data = load_gsm8k(gsm8k, tokenizer)
    for source, row in zip(rows.rows, data.dataset, strict=True):
        prompt = [{"role": "user", "content": source["prompt"]}]
        messages = [*prompt, {"role": "assistant", "content": source["completion"]}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        start = common_prefix_length(before, ids)
        assert row == {"input_ids": ids, "labels": [-100] * start + ids[start:]}
