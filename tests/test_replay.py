"""Replay: old rows, or the base's own answers, in a stated share of every mini-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shared_path
from safetensors.torch import load_file
from small_runs import same

from qpsft import cli
from qpsft.data.mix import MixedDataset
from qpsft.data.prompts import SHIPPED, read_prompts
from qpsft.errors import DataError
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.generation import generate, stop_tokens
from qpsft.recipe.arguments import DataArguments
from qpsft.train import replay as replay_module

FLAGS = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128", "--lora_r=4",
    "--learning_rate=1e-3", "--warmup_steps=0", "--reference_steps=2", "--per_device_train_batch_size=5",
    "--gradient_accumulation_steps=1", "--gradient_checkpointing=false", "--logging_steps=2", "--max_steps=4",
    "--replay_share=0.2", "--replay_max_new_tokens=60", "--save_steps=2", "--seed=1",
]  # fmt: skip
PROMPTS = [f"any order of {number}" for number in range(1234, 1242)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return f"--replay_prompts={path}"


def train(folder, *flags):
    return cli.main(["train", *FLAGS, f"--output_dir={folder}", *flags])


def answers(folder):
    return [json.loads(line) for line in (folder / "replay.jsonl").read_text().splitlines()]


def err(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_the_base_s_own_answers_are_sampled_and_trained_on(tmp_path, prompts, capsys):
    trained = []

    class Watched(MixedDataset):
        def __init__(self, parts):
            super().__init__(parts)
            trained.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpsft.train.data.MixedDataset", Watched)
        assert train(tmp_path / "a", prompts) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the base's own answers to 8 prompts" in out
    kept = answers(tmp_path / "a")
    assert kept and {row["prompt"] for row in kept} <= set(PROMPTS)
    # they are what the base says without any adapter, token by token
    model, tokenizer = load_base("demo", verbose=False)
    ids = [row["prompt_ids"] for row in kept]
    prompts_read = read_prompts(prompts.partition("=")[2], tokenizer, DataArguments())
    sampled = generate(
        model,
        prompts_read.ids,
        stop_ids=stop_tokens(model, tokenizer),
        greedy=False,
        samples=1,
        max_new_tokens=60,
        seed=1,
    )
    by_prompt = dict(zip(map(tuple, prompts_read.ids), sampled, strict=True))
    assert [row["answer_ids"] for row in kept] == [by_prompt[tuple(one)].samples[0].token_ids for one in ids]
    # and they are trained on from the answer's first token to the one that ends it
    part = trained[-1].parts[1]
    assert part.name == "the base's answers" and float(part.share) == 0.2
    for row, answer in zip(part.rows, kept, strict=True):
        assert row["input_ids"] == answer["prompt_ids"] + answer["answer_ids"]
        assert row["labels"] == [-100] * len(answer["prompt_ids"]) + answer["answer_ids"]
        assert row["labels"][-1] in stop_tokens(model, tokenizer)
    assert "the base's answers" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.journey
def test_answers_are_reused_while_what_they_come_from_is_the_same(tmp_path, prompts, monkeypatch):
    calls = []
    real = replay_module.generate
    monkeypatch.setattr(replay_module, "generate", lambda *a, **k: (calls.append(k), real(*a, **k))[1])

    def run(*flags):
        """One step: what is told apart comes before training."""
        return train(tmp_path / "a", prompts, "--max_steps=1", "--save_strategy=no", *flags)

    assert run() == 0
    first = (tmp_path / "a" / "replay.jsonl").read_bytes()
    assert run("--overwrite", "--learning_rate=2e-3") == 0
    assert len(calls) == 1
    for changed in ("--seed=2", "--replay_max_new_tokens=50", "--replay_samples=2", "--quantization=none"):
        assert run("--overwrite", changed) == 0
    assert len(calls) == 5
    assert run("--overwrite") == 0
    assert (tmp_path / "a" / "replay.jsonl").read_bytes() == first and len(calls) == 6
    (tmp_path / "a" / "replay.jsonl").write_bytes(first[:-40])  # half-written
    assert run("--overwrite") == 0
    assert (tmp_path / "a" / "replay.jsonl").read_bytes() == first and len(calls) == 7


def test_a_run_with_replay_goes_on_to_the_byte(tmp_path, prompts):
    assert train(tmp_path / "cut", prompts, "--max_steps=2", "--lr_scheduler_type=constant") == 0
    assert train(tmp_path / "cut", prompts, "--resume", "--lr_scheduler_type=constant") == 0
    assert train(tmp_path / "whole", prompts, "--lr_scheduler_type=constant") == 0
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert same(*adapters)
    assert train(tmp_path / "alone", "--replay_share=none", "--lr_scheduler_type=constant") == 0
    assert not same(adapters[0], load_file(tmp_path / "alone" / "adapter_model.safetensors"))


def test_answers_that_do_not_end_are_dropped_and_counted(tmp_path, prompts, capsys):
    assert train(tmp_path / "a", prompts) == 0
    lengths = sorted(len(row["answer_ids"]) for row in answers(tmp_path / "a"))
    middle = lengths[len(lengths) // 2]
    short = sum(length <= middle for length in lengths)
    capsys.readouterr()
    assert train(tmp_path / "b", prompts, f"--replay_max_new_tokens={middle}") == 0
    assert len(answers(tmp_path / "b")) == short
    assert f"{8 - short} dropped (did not end within the length limit)" in " ".join(capsys.readouterr().out.split())
    assert train(tmp_path / "c", prompts, "--replay_max_new_tokens=1") == 2
    assert "None of the base's answers" in err(capsys)


def test_prompt_and_answer_together_stay_within_max_length(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "any order of 1234"}) + "\n" + json.dumps({"prompt": "a" * 500}) + "\n"
    )
    assert train(tmp_path / "a", f"--replay_prompts={tmp_path / 'p.jsonl'}") == 0
    assert "1 dropped (prompts as long as max_length)" in " ".join(capsys.readouterr().out.split())
    assert all(len(row["prompt_ids"]) + len(row["answer_ids"]) <= 128 for row in answers(tmp_path / "a"))


def test_rows_of_a_file_are_replayed_and_mixed_into_a_mix(tmp_path, capsys):
    rows = [{"q": f"any order of {i}", "completion": f"1) {i}"} for i in range(1000, 1006)]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = f"--replay_dataset={{dataset_name: {tmp_path / 'old.jsonl'}, dataset_columns: {{prompt: q}}}}"
    mix = "--dataset_mix=[{dataset_name: demo-noisy, dataset_limit: 64, share: 0.75}, {dataset_name: demo-clean}]"
    alone = [flag for flag in FLAGS if "dataset" not in flag]
    assert cli.main(["preview", *alone, mix, old]) == 0
    out = capsys.readouterr().out
    shares = [line.split()[1] for line in out.splitlines() if line.endswith("times") and "%" in line]
    assert shares == ["60.0%", "20.0%", "20.0%"]
    assert cli.main(["train", *FLAGS, old, f"--output_dir={tmp_path / 'a'}"]) == 0
    assert not (tmp_path / "a" / "replay.jsonl").exists()


def test_preview_says_what_will_be_sampled(prompts, capsys):
    assert cli.main(["preview", *FLAGS, prompts]) == 0
    assert "20.0% of the rows of a step are the base's own answers to 8 prompts" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "The embedded base knows only its own tasks"),
        (["--replay_share=1"], "replay_share is 1; it must be above 0 and below 1"),
        (["--replay_share=none", "--replay_dataset=demo-clean"], "replay_dataset has no effect without replay_share"),
        (["--replay_prompts=a.txt", "--replay_dataset=demo-clean"], "are both given"),
        (["--replay_prompts=nothing.txt"], "There is no file nothing.txt"),
        (["--replay_prompts=a.txt"], "a.txt is empty"),
        (["--replay_prompts=a.jsonl"], "has no column `prompt`"),
        (["--replay_prompts=b.jsonl"], "b.jsonl, line 2: the prompt is empty"),
        (["--replay_prompts=c.jsonl"], "the prompt ends with the turn of assistant"),
        (["--replay_dataset={dataset_name: demo-clean, share: 0.1}"], "Its share is replay_share"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, flags, words, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n")
    Path("a.jsonl").write_text('{"text": "x"}\n')
    Path("b.jsonl").write_text('{"prompt": "x"}\n{"prompt": " "}\n')
    Path("c.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
    )
    assert train(tmp_path / "x", *flags) == 2
    assert words in err(capsys)


def test_the_shipped_prompts_are_many_and_need_a_chat_template():
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) >= 100 and all(line == line.strip() for line in lines)
    tokenizer = load_tokenizer("demo")
    assert len(read_prompts(None, tokenizer, DataArguments()).ids) == len(lines)
    with pytest.raises(DataError, match="Give replay_prompts"):
        read_prompts(None, tokenizer, DataArguments(use_chat_template="never"))


def test_a_base_without_template_gets_prompts_as_they_stand(tmp_path):
    (tmp_path / "p.txt").write_text("any order\n")
    tokenizer = load_tokenizer("demo")
    plain = DataArguments(use_chat_template="never", prompt_format="Q: {prompt}")
    (ids,) = read_prompts(str(tmp_path / "p.txt"), tokenizer, plain).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "any order"
    (chat,) = read_prompts(str(tmp_path / "p.txt"), tokenizer, DataArguments(prompt_format="Q: {prompt}")).ids
    assert "<|user|>any order<|end|><|assistant|>" in tokenizer.decode(chat)


@pytest.mark.slow
def test_smollm2_answers_the_shipped_prompts(tmp_path):
    script = shared_path("models/smollm2.py")
    folder = Path(os.environ.get("SMOLLM2", "~/.cache/qpsft-models/SmolLM2-135M-Instruct")).expanduser()
    if not (folder / "model.safetensors").is_file():
        made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{script}: {made.stderr[-200:]}")
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in "abcdefghij"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        f"--model_name_or_path={folder}", f"--dataset_name={tmp_path / 'rows.jsonl'}", "--max_steps=2",
        "--method=psft_replay", "--replay_max_new_tokens=48", "--max_length=256", f"--output_dir={tmp_path / 'a'}",
    ]  # fmt: skip
    assert cli.main(["train", *flags]) == 0
    kept = answers(tmp_path / "a")
    assert len(kept) > 10 and all(torch.tensor(row["answer_ids"]).numel() <= 48 for row in kept)
