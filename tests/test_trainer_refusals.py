"""What PSFTConfig and PSFTTrainer refuse or warn about."""

import re
import warnings

import pytest
import torch
from peft import get_peft_model
from small_runs import make_config, make_lora, make_rows, make_trainer
from trl import SFTConfig

from qpsft import PSFTConfig, PSFTTrainer
from qpsft.errors import QpsftError, RecipeError
from qpsft.model.base import load_base


def test_the_defaults_are_the_paper_s_and_suit_lora_on_4_bit(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        args = PSFTConfig(str(tmp_path), use_cpu=True)
    assert (args.loss_type, args.epsilon, args.reference_steps, args.num_iterations) == ("psft", 0.28, 8, 1)
    assert (args.sft_warmup_steps, args.score_token_budget, args.block_order) == (0, None, False)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-4, "warmup_stable_decay", 10)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 8)
    assert args.gradient_checkpointing and not args.bf16 and not args.fp16


def test_every_option_of_its_own_has_help():
    options = set(PSFTConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    assert {"epsilon", "reference_steps", "num_iterations", "sft_warmup_steps", "score_token_budget"} <= options
    for name in options | {"loss_type", "learning_rate", "save_steps"}:
        assert len(PSFTConfig.__dataclass_fields__[name].metadata["help"]) > 40


@pytest.mark.parametrize(
    "settings,what",
    [
        (dict(epsilon=0.0), "epsilon is 0.0; it must be above 0"),
        (dict(epsilon=-0.1), "epsilon is -0.1; it must be above 0"),
        (dict(epsilon=float("nan")), "epsilon is nan; it must be above 0"),
        (dict(reference_steps=0), "reference_steps is 0; it must be at least 1"),
        (dict(num_iterations=-2), "num_iterations is -2; it must be at least 1"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size is 0; it must be at least 1"),
        (dict(per_device_eval_batch_size=-1), "per_device_eval_batch_size is -1; it must be at least 1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps is 0; it must be at least 1"),
        (dict(num_train_epochs=0), "num_train_epochs is 0; it must be above 0"),
        (dict(num_train_epochs=-1.0), "num_train_epochs is -1.0; it must be above 0"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; it must be above 0"),
        (dict(learning_rate=-1e-4), "learning_rate is -0.0001; it must be above 0"),
        (dict(sft_warmup_steps=-1), "sft_warmup_steps is -1; it must not be negative"),
        (dict(warmup_steps=-1), "warmup_steps is -1; it must not be negative"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; it must not be negative"),
        (dict(max_grad_norm=-1.0), "max_grad_norm is -1.0; it must not be negative"),
        (dict(eaft_alpha=-0.5), "eaft_alpha is -0.5; it must not be negative"),
        (dict(trsft_alpha=0), "trsft_alpha is 0; it must be above 0 and at most 1"),
        (dict(trsft_alpha=1.5), "trsft_alpha is 1.5; it must be above 0 and at most 1"),
        (dict(stm_threshold=1.0), "stm_threshold is 1.0; it must be above 1"),
        (dict(stm_threshold=float("nan")), "stm_threshold is nan; it must be at most 1e+30"),
        (dict(score_token_budget=-1), "score_token_budget is -1; it must be at least 0, or left out"),
        (dict(max_length=1), "max_length is 1; it must be at least 2, or left out"),
        (dict(max_steps=0), "max_steps is 0; it must be at least 1"),
        (dict(max_steps=-5), "max_steps is -5; it must be at least 1"),
        (dict(loss_type="ppo"), "loss_type 'ppo' is not known. Use one of psft, nll, dft, eaft, trsft, stm."),
        (dict(auto_find_batch_size=True), "auto_find_batch_size is not supported"),
        (dict(ignore_data_skip=True), "ignore_data_skip is not supported"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor is not supported"),
        (dict(optim="adamw_8bit", optim_args="foo"), "optim_args 'foo' cannot be read. Write name=value, name=value"),
        (dict(optim_args="a=1,b=2=3"), "optim_args 'a=1,b=2=3' cannot be read"),
        (dict(gradient_checkpointing_kwargs={"every_n_layers": 0}), "every_n_layers is 0; it must be a whole number"),
        (dict(gradient_checkpointing_kwargs={"every_n_layers": 1.5}), "every_n_layers is 1.5; it must be a whole"),
        (dict(accelerator_config={"split_batches": True}), "split_batches is not supported"),
    ],
)
def test_values_out_of_range_are_refused_by_name(tmp_path, settings, what):
    with pytest.raises(RecipeError, match=re.escape(what)) as caught:
        make_config(tmp_path, **settings)
    assert isinstance(caught.value, QpsftError) and isinstance(caught.value, ValueError)


def test_one_step_blocks_with_one_visit_are_plain_sft_and_warn(tmp_path):
    with pytest.warns(UserWarning, match="reference_steps = 1 with one visit is plain SFT"):
        make_config(tmp_path, reference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_config(tmp_path, reference_steps=1, num_iterations=2)
        make_config(tmp_path, reference_steps=1, loss_type="nll")


@pytest.mark.parametrize(
    "settings,warning",
    [
        (dict(num_iterations=3), r"num_iterations = 3, 6 optimizer steps never reach 67% of the rows; num_train_ep"),
        (dict(num_iterations=2, loss_type="nll", block_order=True), r"6 optimizer steps never reach 50% of the rows"),
    ],
)
def test_schedules_that_disappoint_warn(base, tmp_path, settings, warning):
    trainer = make_trainer(base, tmp_path, **settings)
    with pytest.warns(UserWarning, match=warning):
        trainer.train()


def test_a_warm_up_longer_than_the_run_is_refused(base, tmp_path):
    trainer = make_trainer(base, tmp_path, sft_warmup_steps=6)
    with pytest.raises(RecipeError, match="sft_warmup_steps takes all 6 optimizer steps, so PSFT never begins"):
        trainer.train()


def test_a_usual_run_is_silent(base, tmp_path):
    trainer = make_trainer(base, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "pin_memory" not in str(w)] == []


def test_noise_of_every_kind_warns_and_only_for_psft(base, tmp_path):
    model, _ = load_base(base, verbose=False)
    model.config.attention_dropout = 0.1
    with pytest.warns(UserWarning, match="the base model's dropout is 0.1"):
        make_trainer(base, tmp_path, model=model, lora=make_lora())
    with pytest.warns(UserWarning, match="neftune_noise_alpha is 5"):
        make_trainer(base, tmp_path, neftune_noise_alpha=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(base, tmp_path, lora=make_lora(lora_dropout=0.1), loss_type="nll")
        two = get_peft_model(load_base(base, verbose=False)[0], make_lora(lora_dropout=0.1), adapter_name="idle")
        two.add_adapter("mine", make_lora())
        two.set_adapter("mine")
        make_trainer(base, tmp_path, model=two)


def test_arguments_that_would_be_ignored_are_refused(base, tmp_path):
    model, tokenizer = load_base(base, verbose=False)
    common = dict(train_dataset=make_rows(4), processing_class=tokenizer, peft_config=make_lora())
    with pytest.raises(RecipeError, match="args is a SFTConfig. Pass a qpsft.PSFTConfig"):
        PSFTTrainer(model, args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False), **common)
    with pytest.raises(RecipeError, match="compute_loss_func is not supported"):
        PSFTTrainer(model, args=make_config(tmp_path), compute_loss_func=lambda *a, **k: torch.zeros(()), **common)
    with pytest.raises(RecipeError, match="chat_template_path 'org/model' names a tokenizer"):
        PSFTTrainer(model, args=make_config(tmp_path, chat_template_path="org/model"), **common)


def test_streams_train_with_one_visit_and_are_refused_with_more(base, tmp_path):
    stream = make_rows(24).to_iterable_dataset()
    with pytest.raises(RecipeError, match="num_iterations above 1 needs a data set of known length"):
        make_trainer(base, tmp_path, rows=stream, num_iterations=2)
    trainer = make_trainer(base, tmp_path, rows=stream, max_steps=5)
    trainer.train()
    kl = [line["approx_kl"] for line in trainer.state.log_history if "approx_kl" in line]
    assert [value == 0 for value in kl] == [True, False, False, True, False]


def test_an_order_that_blocks_cannot_take_is_refused(base, tmp_path):
    trainer = make_trainer(base, tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(RecipeError, match="train_sampling_strategy 'batch_rebalance' cannot be combined with blocks"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_other_orders_of_the_rows(base, tmp_path, strategy):
    trainer = make_trainer(base, tmp_path, train_sampling_strategy=strategy, max_steps=6)
    trainer.train()
    rows = [row for step in range(6) for row in trainer._get_schedule().rows(step)]
    assert sorted(rows) == list(range(24))
    assert (rows == list(range(24))) == (strategy == "sequential")
    lengths = [len(trainer.train_dataset[row]["input_ids"]) for row in rows]
    in_order = [lengths[i : i + 4] == sorted(lengths[i : i + 4], reverse=True) for i in range(0, 24, 4)]
    assert all(in_order) == (strategy == "group_by_length")  # within a mini-batch


def test_transformers_own_check_of_the_loss_is_left_out(tmp_path):
    """It waits for the device in every micro-batch and hides a NaN from the log; here a NaN stops the run."""
    assert make_config(tmp_path).logging_nan_inf_filter is False
