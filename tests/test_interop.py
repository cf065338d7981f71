"""Out of qpsft into PEFT and TRL, and back: adapters load, train on and merge on either side."""

import json
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from small_runs import largest_difference, make_lora, make_rows, make_trainer, policy, same
from test_trainer import frozen
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from qpsft import cli
from qpsft.merge import merge_adapter
from qpsft.model.adapter import save_adapter
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.base_record import quantized_linears, write_base_record

TRL = dict(
    per_device_train_batch_size=4, learning_rate=1e-2, max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
    disable_tqdm=True, bf16=False, gradient_checkpointing=False, seed=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """What PSFT trained in a few steps, as qpsft saves it."""
    folder = tmp_path_factory.mktemp("psft")
    trainer = make_trainer(base, folder / "run", max_steps=4)
    trainer.train()
    return save_adapter(trainer.model, folder / "adapter")


def trainable(base, adapter):
    """The adapter on its base, ready to be trained by any trainer."""
    return PeftModel.from_pretrained(load_base(base, verbose=False)[0], adapter, is_trainable=True)


def logits(model):
    model.eval()
    for layer in quantized_linears(model).values():
        layer.support_avx512bf16_for_cpu = False  # such CPUs compute another kernel's numbers otherwise
    with torch.no_grad():
        return model(torch.arange(3, 40).view(1, -1)).logits


def test_auto_peft_model_finds_the_base_by_itself(base, adapter):
    loaded = PeftModel.from_pretrained(load_base(base, verbose=False)[0], adapter)
    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.embed_tokens"],
    )
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=rounding, dtype=torch.float32)
    assert torch.equal(logits(auto), logits(loaded))
    with auto.disable_adapter():
        assert (logits(auto) - logits(loaded)).abs().max() > 1e-2


def assert_only_the_adapter_moved(model, before, base_before):
    assert largest_difference(policy(model), before) > 1e-3
    assert same(frozen(model), base_before)


def test_trl_s_sft_trainer_trains_it_further(base, adapter, tmp_path):
    model = trainable(base, adapter)
    before, base_before = policy(model), frozen(model)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), **TRL),
        train_dataset=make_rows(8),
        processing_class=load_tokenizer(base),
    )
    trainer.train()
    assert_only_the_adapter_moved(model, before, base_before)


def test_trl_s_grpo_trainer_starts_from_it(base, adapter, tmp_path):
    """One step on a reward that can be checked: how many tokens of a completion have an even number."""
    model = trainable(base, adapter)
    before, base_before = policy(model), frozen(model)
    tokenizer = load_tokenizer(base)

    def even_numbers(completions, **columns):
        return [float(sum(int(word[1:]) % 2 == 0 for word in text.split() if word[0] == "w")) for text in completions]

    trainer = GRPOTrainer(
        model,
        reward_funcs=even_numbers,
        args=GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=8, temperature=1.0, **TRL),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(5, 13)]),
        processing_class=tokenizer,
    )
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    assert line["reward_std"] > 0  # otherwise there is nothing to learn from
    assert_only_the_adapter_moved(model, before, base_before)


UNSLOTH_STYLE = dict(
    lora_alpha=5.5,
    target_modules=r".*(self_attn|mlp)\.(q_proj|v_proj|up_proj|down_proj)",
    exclude_modules=r".*layers\.0\.mlp.*",
    rank_pattern={"v_proj": 2},
    alpha_pattern={"v_proj": 3.0},
    use_rslora=True,
)


@pytest.fixture(scope="module")
def from_trl(base, tmp_path_factory):
    """An adapter that trl.SFTTrainer made and trained, with a config as Unsloth writes them, and saved by TRL."""
    folder = tmp_path_factory.mktemp("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: None)
        trainer = SFTTrainer(
            load_base(base, verbose=False)[0],
            args=SFTConfig(str(folder / "run"), **TRL | {"max_steps": 3}),
            train_dataset=make_rows(16),
            processing_class=load_tokenizer(base),
            peft_config=make_lora(**UNSLOTH_STYLE),
        )
        trainer.train()
    trainer.save_model(str(folder / "adapter"))
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"unsloth_fixed": True, "of_tomorrow": [1]}))
    return folder / "adapter"


def test_an_adapter_of_trl_s_is_trained_further_merged_and_verified(base, from_trl, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"w{i}", "completion": f" w{i + 1} w{i + 2}"}) + "\n" for i in range(5, 45))
    )
    out = tmp_path / "out"
    flags = [
        f"--model_name_or_path={base}", f"--dataset_name={rows}", f"--adapter_name_or_path={from_trl}",
        f"--output_dir={out}", "--max_steps=2", "--max_length=32", "--warmup_steps=0", "--learning_rate=5e-3",
        "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--save_strategy=no",
        "--reference_steps=2", "--logging_steps=1",
    ]  # fmt: skip
    assert cli.main(["train", *flags]) == 0
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (from_trl, out))
    moved = max((end[name] - start[name].float()).abs().max() for name in start)
    assert start.keys() == end.keys() and 1e-3 < moved < 0.05
    report = merge_adapter(out, dtype="float32", show_progress=False)
    assert report.verification["same_model"] and report.onto == "trained"


def test_an_adapter_of_trl_s_merges_as_it_is(base, from_trl, tmp_path):
    """Onto the original weights at once; onto the rounded ones, and verified, once their record is written."""
    adapter = tmp_path / "adapter"
    shutil.copytree(from_trl, adapter)
    assert merge_adapter(adapter, tmp_path / "original", onto="original", show_progress=False).onto == "original"
    write_base_record(load_base(base, verbose=False)[0], adapter)
    report = merge_adapter(adapter, tmp_path / "trained", dtype="float32", show_progress=False)
    assert report.verification["same_model"]


def test_psft_trainer_takes_it_from_peft_s_own_loading(base, from_trl, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT names the keys it does not know
        model = trainable(base, from_trl)
    before = policy(model)
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer = make_trainer(base, tmp_path, model=model, max_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-1.0, abs=1e-6)  # a ratio to where TRL ended
    assert largest_difference(policy(model), before) > 1e-3
