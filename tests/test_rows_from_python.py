"""Rows given to PSFTTrainer in Python get the labels that `qpsft train` gives them, token by token."""

import json

import datasets
import pytest
from real_templates import templates, tokenizer_for
from small_runs import make_config, make_lora, make_rows, make_trainer
from transformers import AutoModelForCausalLM

from qpsft.data.tokenize import load_dataset
from qpsft.errors import DataError
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import DataArguments

ASK, ANSWER = {"role": "user", "content": "w3 in Oslo?"}, {"role": "assistant", "content": "w4 it is."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "w", "parameters": {"type": "object"}}}
TURNS = [ASK, ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still."}]
SHAPES = {
    "prompt and completion": {"prompt": "What is 2+2?", "completion": "It is 4."},
    "messages of a prompt": {"prompt": TURNS[:3], "completion": TURNS[3:]},
    "messages": {"messages": TURNS},
    "flags": {"messages": [ASK, ANSWER | {"train": False}, *TURNS[2:]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Add.", "input": "2 and 2", "output": "4", "history": [["Add 1 and 1.", "2"]]},
    "text": {"text": "Once upon a time."},
    "tools": {
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4 C"},
        ]
        + [{"role": "assistant", "content": "4 C."}],
        "tools": [TOOL],
    },
}


def made(base, out, rows, tokenizer, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    args = make_config(out, max_length=settings.pop("max_length", 1024), **settings)
    return PSFTTrainer(
        model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=make_lora()
    )


def as_lists(dataset) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in dataset]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["list", "Dataset"])
def test_the_labels_are_those_of_the_command(base, tmp_path, shape, kind):
    tokenizer = tokenizer_for(templates()["qwen2_5"])
    rows = [SHAPES[shape]] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = load_dataset(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")), tokenizer, 1024).dataset
    given = rows if kind == "list" else datasets.Dataset.from_list(rows)
    trainer = made(base, tmp_path / "out", given, tokenizer)
    assert as_lists(trainer.train_dataset) == as_lists(wanted) == as_lists(trainer.eval_dataset)
    assert any(-100 in labels for _, labels in as_lists(wanted))


def test_rows_of_values_that_arrow_cannot_hold_together(base, tmp_path):
    tokenizer = tokenizer_for(templates()["qwen2_5"])
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    other = {**SHAPES["tools"], "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    trainer = made(base, tmp_path, [SHAPES["tools"], other], tokenizer)
    assert len(trainer.train_dataset) == 2


def test_options_of_trl_keep_their_meaning(base, tmp_path):
    tokenizer = tokenizer_for(templates()["qwen2_5"])
    whole = made(base, tmp_path, [SHAPES["messages"]], tokenizer, completion_only_loss=False)
    assert all(labels[1:] == ids[1:] for ids, labels in as_lists(whole.train_dataset))
    text = made(base, tmp_path, [{"body": "Once upon a time."}], tokenizer, dataset_text_field="body")
    assert tokenizer.decode(text.train_dataset[0]["input_ids"]).startswith("Once upon a time.")
    cut = made(base, tmp_path, [SHAPES["messages"]], tokenizer, max_length=140)
    assert [len(ids) for ids, _ in as_lists(cut.train_dataset)] == [140]


def test_bad_rows_are_named(base, tmp_path):
    rows = [SHAPES["messages"], {"messages": [{"role": "wizard", "content": "w3"}, ANSWER]}]
    with pytest.raises(DataError, match="train_dataset, row 2"):
        made(base, tmp_path, rows, tokenizer_for(templates()["qwen2_5"]))


def test_what_is_not_used_is_said(base, tmp_path):
    with pytest.warns(UserWarning, match="train_dataset .*columns not used: topic"):
        made(base, tmp_path, [SHAPES["text"] | {"topic": "x"}], tokenizer_for(templates()["qwen2_5"]))


def test_tokenized_rows_are_trl_s(base, tmp_path):
    rows = make_rows(6)
    for given in (rows, rows.to_list()):
        trainer = make_trainer(base, tmp_path, rows=given)
        assert as_lists(trainer.train_dataset) == as_lists(rows)


def test_a_run_and_an_evaluation_on_lists(base, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(5, 29)]
    trainer = make_trainer(base, tmp_path, rows=rows, max_steps=3, packing=True, max_length=32)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] > 0


def test_a_formatting_function_stays_trl_s(base, tmp_path):
    tokenizer = tokenizer_for(templates()["qwen2_5"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    rows = datasets.Dataset.from_list([{"a": "one"}, {"a": "two"}])
    trainer = PSFTTrainer(
        model, args=make_config(tmp_path), train_dataset=rows, processing_class=tokenizer, peft_config=make_lora(),
        formatting_func=lambda row: row["a"] + "!",
    )  # fmt: skip
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("one!")
