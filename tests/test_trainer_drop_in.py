"""A drop-in for trl.SFTTrainer: models given in every way, adapters of every kind, evaluation, what is saved."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import (
    Recorder,
    largest_difference,
    log_lines,
    make_config,
    make_lora,
    make_rows,
    make_trainer,
    policy,
    same,
)
from test_trainer import frozen, nll_by_hand
from transformers import BitsAndBytesConfig, set_seed

from qpsft import PSFTConfig, PSFTTrainer
from qpsft.errors import RecipeError
from qpsft.model.base import load_base
from qpsft.psft import policy as policy_module
from qpsft.psft.losses import LOSSES

PEFT_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([make_rows(1)[0]["input_ids"]])).logits


def test_a_path_a_quantization_config_and_a_peft_config_as_in_sft_trainer(base, tmp_path):
    trainer = PSFTTrainer(
        str(base),
        args=make_config(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4),
        train_dataset=make_rows(24),
        eval_dataset=make_rows(4),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=make_lora(),
    )
    before = frozen(trainer.model)
    assert trainer.model.is_loaded_in_4bit and len(before) > 30
    trainer.train()
    assert same(frozen(trainer.model), before)  # not repacked by the evaluations, on CPUs with AVX512-BF16 either
    assert {p.dtype for p in policy(trainer.model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "used"),
    [({}, {"": torch.device("cuda:1")}), ({"device_map": "auto"}, "auto"), ({"device_map": None}, None)],
)
def test_a_model_by_name_is_put_on_one_card_unless_a_map_is_given(tmp_path, monkeypatch, given, used):
    """TRL's own map shares it out over all cards that are visible, and what is computed ends on the last of them."""
    args = make_config(tmp_path, model_init_kwargs=given)
    asked = {}
    monkeypatch.setattr(policy_module, "create_model_from_path", lambda name, **kwargs: asked.update(kwargs))
    policy_module._load("some/model", args, None)
    assert asked.get("device_map") == given.get("device_map")  # on the CPU it is TRL's own choice
    asked.clear()
    monkeypatch.setattr(type(args), "device", torch.device("cuda:1"))
    policy_module._load("some/model", args, None)
    assert asked["device_map"] == used


def test_a_path_alone_names_the_output_folder_as_sft_trainer_does(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = PSFTTrainer(str(base), train_dataset=make_rows(4), peft_config=make_lora())
    assert trainer.args.output_dir == f"{base.name}-PSFT" and isinstance(trainer.args, PSFTConfig)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_the_adapter_stays_float32_and_bit_identical_to_peft_s_initial_values(base, tmp_path, base_dtype):
    set_seed(7)
    initial = policy(get_peft_model(load_base(base, dtype=base_dtype, verbose=False)[0], make_lora()))
    args = make_config(tmp_path)
    model, tokenizer = load_base(base, dtype=base_dtype, verbose=False)
    trainer = PSFTTrainer(
        model, args=args, train_dataset=make_rows(4), processing_class=tokenizer, peft_config=make_lora()
    )
    assert same(policy(trainer.model), initial)
    a = next(t for name, t in initial.items() if "lora_A" in name)
    assert a.dtype == torch.float32
    if base_dtype == "float32":  # (PEFT draws them in the base's dtype, then widens)
        assert not torch.equal(a, a.bfloat16().float())  # rounding on the way would have shown


def test_a_learning_rate_too_small_for_bfloat16_still_moves_every_weight(base, tmp_path):
    model = get_peft_model(load_base(base, verbose=False)[0], make_lora(init_lora_weights=False))
    trainer = make_trainer(base, tmp_path, model=model, learning_rate=1e-6, max_steps=3)
    start = policy(model)
    trainer.train()
    moved = [(policy(model)[name] != start[name]).float().mean().item() for name in start]
    assert min(moved) > 0.9


def test_a_peft_model_under_another_name_trains_saves_and_resumes(base, tmp_path):
    def model():
        torch.manual_seed(1)
        return get_peft_model(load_base(base, verbose=False)[0], make_lora(), adapter_name="mine")

    settings = dict(num_iterations=2, max_steps=6, save_strategy="steps", save_steps=4, save_total_limit=None)
    whole = make_trainer(base, tmp_path / "whole", model=model(), **settings)
    whole.train()
    assert list(whole.model.peft_config) == ["mine"] and all(".mine." in name for name in whole.reference.state_dict())

    resumed = make_trainer(base, tmp_path / "cut", model=model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(policy(resumed.model), policy(whole.model))
    assert resumed.model.active_adapters == ["mine"]


def test_training_goes_on_from_an_adapter_trained_before(base, tmp_path):
    first = make_trainer(base, tmp_path / "first", max_steps=4)
    first.train()
    first.save_model(tmp_path / "saved")
    trained = policy(first.model)
    loaded = PeftModel.from_pretrained(load_base(base, verbose=False)[0], tmp_path / "saved", is_trainable=True)
    seen = []
    second = make_trainer(
        base,
        tmp_path / "second",
        model=loaded,
        max_steps=2,
        callbacks=[Recorder(lambda step: seen.append(policy(second.model)))],
    )
    assert same(policy(second.model), trained)
    second.train()
    assert same(seen[0], trained)  # the first step started from there
    assert log_lines(second)[0]["loss"] == pytest.approx(-1.0, abs=1e-6)  # a ratio to it, not to the bare base
    assert largest_difference(policy(second.model), trained) > 1e-3
    with pytest.raises(RecipeError, match="has an adapter already"):
        make_trainer(base, tmp_path / "third", model=loaded, lora=make_lora())


def test_evaluation_gives_the_nll_and_does_not_disturb_the_run(base, tmp_path):
    rows, held_out = make_rows(24), make_rows(5, seed=11)

    def run(name, **settings):
        trainer = make_trainer(
            base, tmp_path / name, rows=rows, eval_dataset=held_out, num_iterations=2, max_steps=6, **settings
        )
        trainer.train()
        return trainer

    quiet = run("quiet")
    evaluated = run("evaluated", eval_strategy="steps", eval_steps=1, eval_on_start=True, per_device_eval_batch_size=5)
    assert same(policy(quiet.model), policy(evaluated.model))
    assert [line["step"] for line in log_lines(evaluated, "eval_loss")] == [0, 1, 2, 3, 4, 5, 6]
    with torch.no_grad():
        batches = [evaluated.data_collator([evaluated.eval_dataset[i] for i in range(5)])]
        expected = float(nll_by_hand(evaluated.model, batches))
    last = evaluated.evaluate()
    assert last["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert log_lines(evaluated, "eval_loss")[-2]["eval_loss"] == last["eval_loss"]
    assert last["eval_num_tokens"] == log_lines(evaluated)[-1]["num_tokens"]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_eval_loss_is_the_nll_whatever_the_loss(base, tmp_path, loss_type):
    trainer = make_trainer(base, tmp_path, eval_dataset=make_rows(2, seed=11), max_steps=2, loss_type=loss_type)
    trainer.train()
    with torch.no_grad():
        expected = float(nll_by_hand(trainer.model, [trainer.data_collator(list(trainer.eval_dataset))]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.args.loss_type == loss_type


KINDS = {
    "lora": ({}, "lora_A"),
    "rslora": (dict(use_rslora=True), "lora_A"),
    "dora": (dict(use_dora=True), "lora_magnitude_vector"),
    "bias": (dict(lora_bias=True), "lora_B.default.bias"),
    "embedding": (dict(modules_to_save=["embed_tokens"]), "embed_tokens"),
    "norm": (dict(modules_to_save=["norm"]), "norm.modules_to_save"),
    "head": (dict(modules_to_save=["lm_head"]), "lm_head.modules_to_save"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_adapters_of_every_kind_train_and_are_saved_as_peft_saves_them(base, tmp_path, kind):
    options, part = KINDS[kind]
    start = {}
    trainer = make_trainer(base, tmp_path / "run", lora=make_lora(**options), num_iterations=2, max_steps=6)
    start.update(policy(trainer.model))
    trainer.train()
    assert all(not torch.equal(p, start[name]) for name, p in policy(trainer.model).items())
    assert any(part in name for name in trainer.reference.state_dict())
    assert trainer.reference.state_dict().keys() == policy(trainer.model).keys()

    trainer.model.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == PEFT_FILES
    for file in (tmp_path / "saved").iterdir():
        assert b"reference" not in file.read_bytes().lower()
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == len(policy(trainer.model))
    loaded = PeftModel.from_pretrained(load_base(base, verbose=False)[0], tmp_path / "saved")
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))
    with loaded.disable_adapter():
        assert not torch.allclose(logits_of(loaded), logits_of(trainer.model), atol=1e-3)


def test_save_model_writes_no_reference_and_checkpoints_keep_it_apart(base, tmp_path):
    trainer = make_trainer(base, tmp_path, num_iterations=2, max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not [p.name for p in (tmp_path / "saved").iterdir() if "reference" in p.name or "psft" in p.name]
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert len(saved) == len(policy(trainer.model)) and not any("reference" in name for name in saved)
    now = logits_of(trainer.model)
    loaded = PeftModel.from_pretrained(load_base(base, verbose=False)[0], tmp_path / "checkpoint-4")
    assert torch.equal(logits_of(loaded), now)


def test_texts_in_trl_s_shapes_are_prepared(base, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(5, 17)])
    trainer = make_trainer(base, tmp_path, rows=rows, max_steps=4)
    trainer.train()
    row = trainer.train_dataset[0]
    assert row["labels"][:2] == [-100, -100] and row["labels"][2:] == row["input_ids"][2:] == [7, 8, 2]
    assert log_lines(trainer)[-1]["num_tokens"] == 4 * 4 * 5


def test_packed_rows_give_a_run_too(base, tmp_path):
    usual = PSFTConfig(str(tmp_path))
    assert usual.packing is False and usual.padding_free is False
    trainer = make_trainer(
        base, tmp_path, rows=make_rows(80), packing=True, max_length=32, num_iterations=2, max_steps=6
    )
    trainer.train()
    lines = log_lines(trainer)
    assert [line["approx_kl"] == 0 for line in lines] == [True] + [False] * 5
    assert all(abs(line["loss"]) < 1.2 for line in lines)


def test_a_second_train_call_starts_anew(base, tmp_path):
    trainer = make_trainer(base, tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    end = policy(trainer.model)
    trainer.train()
    lines = log_lines(trainer)
    assert [line["approx_kl"] == 0 for line in lines] == [True, False, False, False]
    assert lines[0]["num_tokens"] < 60 and largest_difference(end, policy(trainer.model)) > 1e-3
