"""docs/psft_in_one_file.py is the method that PSFTTrainer trains: the same rows, the same order, the same adapter."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from small_runs import largest_difference, log_lines, policy
from test_docs import load_script

from qpsft import PSFTConfig, PSFTTrainer, load_base
from qpsft.data.built_in import demonstrations
from qpsft.data.tokenize import load_dataset
from qpsft.model.base import load_tokenizer
from qpsft.recipe.arguments import DataArguments

STEPS = 2 + 2 * 4 * 2  # warm-up, and two blocks of K = 4 in two visits
CLOSE = 1e-6


@pytest.fixture(scope="module")
def one_file():
    return load_script("psft_in_one_file")


@pytest.fixture(scope="module")
def args(one_file):
    return replace(
        one_file.Args(),
        reference_steps=4,
        num_iterations=2,
        sft_warmup_steps=2,
        blocks=2,
        mini_batch=8,
        adam_epsilon=1e-4,  # with 1e-8 AdamW makes whole steps of the last bits of gradients near 0
        epsilon=0.1,
        seed=3,
    )


@pytest.fixture(scope="module")
def rows(one_file, args):
    tokenizer = load_tokenizer("demo")
    return [one_file.tokenize(tokenizer, row["prompt"], row["completion"]) for row in demonstrations("noisy", 60)]


@pytest.fixture(scope="module")
def trainer(args, rows, tmp_path_factory):
    model, tokenizer = load_base("demo", device="cpu", verbose=False)
    config = PSFTConfig(
        str(tmp_path_factory.mktemp("run")),
        epsilon=args.epsilon,
        reference_steps=args.reference_steps,
        num_iterations=args.num_iterations,
        sft_warmup_steps=args.sft_warmup_steps,
        per_device_train_batch_size=args.mini_batch // 2,
        gradient_accumulation_steps=2,
        learning_rate=args.learning_rate,
        adam_epsilon=args.adam_epsilon,
        warmup_steps=0,
        max_steps=STEPS,
        max_length=None,
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PSFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    start = policy(trainer.model)
    trainer.train()
    assert largest_difference(start, policy(trainer.model)) > 1e-2
    assert max(line["clip_fraction"] for line in log_lines(trainer)) > 0.1
    return trainer


def test_its_rows_are_those_of_qpsft_train(rows):
    data = DataArguments(dataset_name="demo-noisy", dataset_limit=60)
    prepared = load_dataset(data, load_tokenizer("demo"), 128, show_progress=False).dataset
    assert rows == [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepared]


def test_it_trains_the_trainer_s_adapter(one_file, args, rows, trainer, capsys):
    weights = policy(one_file.train(args, one_file.make_policy(args), rows))
    assert largest_difference(weights, policy(trainer.model)) < CLOSE
    lines, log = capsys.readouterr().out.splitlines(), log_lines(trainer)
    for line, step in zip(lines, (0, 8, 16), strict=True):  # the numbers are the trainer's, too
        words = line.split()
        printed = dict(zip(words[2::2], map(float, words[3::2]), strict=True))
        assert printed == pytest.approx({name: log[step][name] for name in printed}, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("change", [dict(epsilon=0.12), dict(num_iterations=1, blocks=4), dict(sft_warmup_steps=0)])
def test_another_method_would_be_noticed(one_file, args, rows, trainer, change):
    torch.manual_seed(0)
    other = replace(args, **change)
    other = policy(one_file.train(other, one_file.make_policy(other), rows))
    assert largest_difference(other, policy(trainer.model)) > 100 * CLOSE
