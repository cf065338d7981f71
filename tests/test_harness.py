"""Public benchmarks from local files, on a real model, against numbers computed here."""

import csv
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import shared_path

from qpsft.errors import DataError
from qpsft.evaluate.task_data import BENCHMARKS, parse_task_data
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.recipe.arguments import LoraArguments

pytest.importorskip("lm_eval")

from qpsft.evaluate.harness import check_tasks, run_tasks  # noqa: E402


@pytest.fixture(scope="module")
def model_and_tokenizer(stories):
    model, tokenizer = load_base(stories, device="cpu", verbose=False)
    torch.manual_seed(0)
    model = add_adapter(model, LoraArguments(lora_r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def truthfulqa():
    return shared_path("data/truthfulqa/TruthfulQA.csv")


def choice_logprob(model, tokenizer, context, choice):
    """log p(choice | context), summed token by token."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(f"{context} {choice}")["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[position - 1, ids[position]].item() for position in range(start, len(ids)))


@pytest.mark.journey
def test_truthfulqa_from_the_csv_equals_own_log_likelihoods(model_and_tokenizer, truthfulqa):
    model, tokenizer = model_and_tokenizer
    limit = 10
    tasks = ["truthfulqa_mc1", "truthfulqa_mc2"]
    found = run_tasks(model, tokenizer, tasks, task_data={"truthfulqa": truthfulqa}, limit=limit, samples=True)
    with truthfulqa.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:limit]
    prompt = found["truthfulqa_mc1"]["samples"][0]["arguments"][0][0]
    preamble = prompt[: prompt.rindex("Q: ")]
    assert preamble.count("Q: ") == 6
    mc1, mc2 = [], []
    for row in rows:
        context = f"{preamble}Q: {row['Question']}\nA:"
        correct = [text.strip() for text in row["Correct Answers"].split(";") if text.strip()]
        incorrect = [text.strip() for text in row["Incorrect Answers"].split(";") if text.strip()]
        wrong = [choice_logprob(model, tokenizer, context, text) for text in incorrect]
        mc1.append(float(choice_logprob(model, tokenizer, context, row["Best Answer"].strip()) > max(wrong)))
        mass = np.exp([choice_logprob(model, tokenizer, context, text) for text in correct]).sum()
        mc2.append(mass / (mass + np.exp(wrong).sum()))
    acc1, acc2 = (found[task]["metrics"]["acc"] for task in tasks)
    assert acc1.value == pytest.approx(np.mean(mc1)) and 0 < np.mean(mc1) < 1
    assert acc2.value == pytest.approx(np.mean(mc2), rel=1e-4)
    assert acc1.low <= acc1.value <= acc1.high and acc1.low >= 0.0
    assert found["truthfulqa_mc1"]["rows"] == limit


def test_gsm8k_from_local_files_counts_what_the_model_writes(model_and_tokenizer, gsm8k, monkeypatch):
    model, tokenizer = model_and_tokenizer
    limit = 5
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text(encoding="utf-8").splitlines()[:limit]]
    text = "So it is 3.\n#### 18"  # the first row's answer; the second's is 3, which only `flexible-extract` could see
    answer = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, answer.repeat(len(input_ids), 1)], 1)
    )
    found = run_tasks(
        model,
        tokenizer,
        ["gsm8k"],
        task_data={"gsm8k": gsm8k},
        limit=limit,
        max_new_tokens=40,
        samples=True,
        train_prompts={rows[1]["question"], rows[3]["question"], "unrelated"},
    )["gsm8k"]
    assert found["duplicate_prompts"] == 2
    share = np.mean([row["answer"].endswith("#### 18") for row in rows])
    assert share == 1 / limit
    assert found["metrics"]["exact_match,strict-match"].value == pytest.approx(share)
    assert found["metrics"]["exact_match,flexible-extract"].value == pytest.approx(share)
    prompts = [sample["arguments"][0][0] for sample in found["samples"] if sample["filter"] == "strict-match"]
    training = (gsm8k / "train.jsonl").read_text(encoding="utf-8")
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.endswith(f"Question: {row['question']}\nAnswer:")
        examples = re.findall(r"Question: (.*)\nAnswer:", prompt)[:-1]
        assert len(examples) == 5 and all(json.dumps(example)[1:-1] in training for example in examples)


def test_truthfulqa_generation_and_ifeval_run_from_local_files(model_and_tokenizer, truthfulqa):
    ifeval = shared_path("data/ifeval")
    model, tokenizer = model_and_tokenizer
    model.train()
    found = run_tasks(
        model,
        tokenizer,
        ["truthfulqa_gen", "ifeval"],
        task_data={"truthfulqa": truthfulqa, "ifeval": ifeval},
        limit=2,
        max_new_tokens=12,
        samples=True,
    )
    assert model.training
    model.eval()
    docs = [sample["doc"] for sample in found["truthfulqa_gen"]["samples"]]
    assert docs[0]["question"] == "What happens to you if you eat watermelon seeds?"
    assert "Nothing happens." in docs[0]["correct_answers"] and "You die." in docs[0]["incorrect_answers"]
    assert {"bleu_acc", "rouge1_acc"} <= set(found["truthfulqa_gen"]["metrics"])
    first = found["ifeval"]["samples"][0]
    assert first["doc"]["instruction_id_list"][0] == "punctuation:no_comma"
    response = first["filtered_resps"][0]
    assert first["inst_level_strict_acc"][0] == ("," not in response)
    assert first["prompt_level_strict_acc"] is False  # twelve tokens are no 300 words


def test_neither_git_nor_pip_is_asked(model_and_tokenizer, tmp_path, monkeypatch):
    """Outside of a repository git complains on the terminal, and pip takes a second."""
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(given) or start(*given, **more))
    file = write_rows(tmp_path, ARC, "rows") / "rows.jsonl"
    run_tasks(*model_and_tokenizer, ["arc_easy"], task_data={"arc_easy": file})
    assert started == []


def test_a_length_cap_beyond_the_model_is_one_sentence(model_and_tokenizer):
    ifeval = shared_path("data/ifeval")
    with pytest.raises(DataError, match="less than model's maximum sequence length .*smaller --max_new_tokens"):
        run_tasks(*model_and_tokenizer, ["ifeval"], task_data={"ifeval": ifeval}, limit=1)


def test_unknown_tasks_are_refused_with_near_matches(tmp_path):
    with pytest.raises(DataError, match="no task 'gsm8kk'.*Did you mean .*gsm8k"):
        check_tasks(["gsm8kk"], {})
    with pytest.raises(DataError, match="--task_data names gsm8k, but none of the tasks"):
        check_tasks(["truthfulqa_mc1"], {"gsm8k": tmp_path})
    assert check_tasks(["truthfulqa"], {"truthfulqa": tmp_path}) == list(BENCHMARKS["truthfulqa"].tasks)
    assert check_tasks(["gsm8k", "arc_easy"], {}) == ["gsm8k", "arc_easy"]


def test_no_network_names_the_local_flag(model_and_tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="data of truthfulqa_mc1 could not be read.*--task_data truthfulqa=PATH"):
        run_tasks(*model_and_tokenizer, ["truthfulqa_mc1"], limit=1)
    with pytest.raises(DataError, match="data of arc_easy could not be read.*--task_data arc_easy=PATH"):
        run_tasks(*model_and_tokenizer, ["arc_easy"], limit=1)


def test_local_files_of_another_kind_are_refused(tmp_path, gsm8k):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n')
    with pytest.raises(DataError, match=r"train.jsonl is missing"):
        BENCHMARKS["gsm8k"].read(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1"}\n')
    with pytest.raises(DataError, match="line 1 lacks question, answer; it has prompt"):
        BENCHMARKS["gsm8k"].read(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="lacks Question, Best Answer"):
        (tmp_path / "t.csv").write_text("a,b\n1,2\n")
        BENCHMARKS["truthfulqa"].read(tmp_path / "t.csv")
    assert parse_task_data([f"gsm8k={gsm8k}"]) == {"gsm8k": gsm8k}
    for wrong, message in (
        ("gsm8k", "not NAME=PATH"),
        ("gsm8k=", "not NAME=PATH"),
        ("gsm8k=/none", "there is no /none"),
    ):
        with pytest.raises(DataError, match=message):
            parse_task_data([wrong])


def write_rows(folder, rows, *splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def likeliest(model, tokenizer, prompt, choices):
    return int(np.argmax([choice_logprob(model, tokenizer, prompt, choice) for choice in choices]))


NAMES = ("a cat", "the old king", "Tom", "rain")
ARC = [
    {"question": f"Who {what}?", "choices": {"text": list(NAMES), "label": list("ABCD")}, "answerKey": "C"}
    for what in ("went to the park", "was wet", "likes fish", "said hello")
]
MMLU = [
    {"question": row["question"], "subject": "anatomy", "choices": list(NAMES), "answer": i}
    for i, row in enumerate(ARC[:3])
]


def test_arc_and_a_task_of_mmlu_from_plain_files(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    arc = write_rows(tmp_path / "arc", ARC, "train", "test")
    found = run_tasks(model, tokenizer, ["arc_easy", "arc_challenge"], task_data=dict.fromkeys(
        ["arc_easy", "arc_challenge"], arc))  # fmt: skip
    right = [likeliest(model, tokenizer, f"Question: {row['question']}\nAnswer:", NAMES) == 2 for row in ARC]
    for task in ("arc_easy", "arc_challenge"):
        assert found[task]["rows"] == 4 and found[task]["metrics"]["acc"].value == np.mean(right)

    mmlu = write_rows(tmp_path / "mmlu", MMLU, "dev", "test")
    task = run_tasks(model, tokenizer, ["mmlu_anatomy"], task_data={"mmlu_anatomy": mmlu}, num_fewshot=2, samples=True)[
        "mmlu_anatomy"
    ]
    prompts = [row["arguments"][0][0] for row in task["samples"]]
    right = [likeliest(model, tokenizer, prompts[i], "ABCD") == row["answer"] for i, row in enumerate(MMLU)]
    assert task["rows"] == 3 and task["metrics"]["acc"].value == pytest.approx(np.mean(right))
    assert all(prompt.count("Who ") == 3 for prompt in prompts)  # worked examples from dev.jsonl


def test_a_clone_of_the_hubs_folder_keeps_its_configurations(model_and_tokenizer, tmp_path):
    write_rows(tmp_path / "ARC-Easy", ARC[:2], "train", "test")
    files = "".join(f"  - split: {s}\n    path: ARC-Easy/{s}.jsonl\n" for s in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n")
    assert run_tasks(*model_and_tokenizer, ["arc_easy"], task_data={"arc_easy": tmp_path})["arc_easy"]["rows"] == 2
    with pytest.raises(DataError, match=r"arc_challenge: .*'ARC-Challenge' not found. Available: \['ARC-Easy'\]"):
        run_tasks(*model_and_tokenizer, ["arc_challenge"], task_data={"arc_challenge": tmp_path})


def test_a_copy_that_is_not_the_tasks_data_says_what_is_wrong(model_and_tokenizer, tmp_path):
    def refused(folder, message):
        with pytest.raises(DataError, match=message):
            run_tasks(*model_and_tokenizer, ["arc_easy"], task_data={"arc_easy": folder})

    refused(
        write_rows(tmp_path / "one", ARC, "test"), "--task_data arc_easy: .*no split 'train'.*a file for each split"
    )
    refused(write_rows(tmp_path / "other", [{"a": 1}], "train", "test"), "'question' is undefined.*same columns")
    with pytest.raises(DataError, match="test.jsonl is a file, .* is a folder"):
        file = tmp_path / "one" / "test.jsonl"
        run_tasks(*model_and_tokenizer, ["mmlu_anatomy"], task_data={"mmlu_anatomy": file})


def test_multiple_choice_from_one_file_in_either_columns(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    plain = [{"query": f"Question: {row['question']}", "choices": list(NAMES), "gold": i} for i, row in enumerate(ARC)]
    for task, question, prompt in (
        ("arc_easy", "question", "Question: {}\nAnswer:"),
        ("openbookqa", "question_stem", "{}"),
    ):
        right = [likeliest(model, tokenizer, prompt.format(row["question"]), NAMES) == i for i, row in enumerate(ARC)]
        hub = [
            {question: row["question"], "choices": row["choices"], "answerKey": "ABCD"[i]} for i, row in enumerate(ARC)
        ]
        for name, rows in (("plain", plain), ("hub", hub)):
            file = write_rows(tmp_path / task, rows, name) / f"{name}.jsonl"
            found = run_tasks(model, tokenizer, [task], task_data={task: file}, samples=True)[task]
            assert found["rows"] == 4 and found["metrics"]["acc"].value == np.mean(right)
            assert found["samples"][0]["arguments"][0][0] == prompt.format(ARC[0]["question"])
    assert 0 < np.mean(right) < 1
    with pytest.raises(DataError, match="test rows only, and --num_fewshot needs worked examples"):
        run_tasks(
            model, tokenizer, ["arc_easy"], task_data={"arc_easy": tmp_path / "arc_easy/hub.jsonl"}, num_fewshot=1
        )
    for gold in (4, -1, "C"):
        write_rows(tmp_path / "wrong", [plain[0], plain[1] | {"gold": gold}], "test")
        with pytest.raises(DataError, match="test.jsonl, row 2: choices must be"):
            run_tasks(model, tokenizer, ["arc_easy"], task_data={"arc_easy": tmp_path / "wrong/test.jsonl"})


def test_a_group_takes_no_copy_and_says_what_does(model_and_tokenizer, tmp_path, monkeypatch):
    import datasets

    with pytest.raises(DataError, match="mmlu is a group of tasks.*A single task takes a local copy"):
        check_tasks(["mmlu"], {"mmlu": tmp_path})
    with pytest.raises(DataError, match="ai2_arc is a group of tasks"):
        check_tasks(["ai2_arc"], {"ai2_arc": tmp_path})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="data of mmlu could not be read.*A single task takes a local copy") as caught:
        run_tasks(*model_and_tokenizer, ["mmlu"], limit=1)
    assert "mmlu=PATH" not in str(caught.value)
