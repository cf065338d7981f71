"""What is decided for each kind of hardware, by faking device properties: dtype, loss scaling, kernels, optimizers."""

import contextlib
import json
import re
import warnings

import pytest
import torch
import transformers.training_args
from peft import get_peft_model
from small_runs import make_base, make_config, make_lora, make_rows
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qpsft import PSFTConfig, PSFTTrainer
from qpsft.errors import BaseModelError, RecipeError
from qpsft.evaluate.model import dtype_here, load_evaluated
from qpsft.model import base as base_module
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.model.hardware import (
    base_dtype,
    check_run,
    default_stream,
    hardware_for,
    hardware_of,
    has_kernels,
    overflowing_type,
    settle_precision,
    warn_if_slow,
)
from qpsft.plan import make_plan
from qpsft.plan.cards import Card
from qpsft.plan.planned_config import PlannedConfig
from qpsft.psft import config
from qpsft.recipe.arguments import LoraArguments
from qpsft.recipe.file import load_recipe

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BUILD_CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def card(monkeypatch):
    """Makes torch see one CUDA card of a capability, or a ROCm one of a name, and be built for some architectures."""

    def fake(capability, built_for=()):
        rocm = isinstance(capability, str)
        properties = type("Properties", (), {"gcnArchName": capability})
        monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))

    return fake


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "flash_attention"),
    [
        ((6, 1), "sm_61", F32, False),
        ((7, 0), "sm_70", F16, False),
        ((7, 5), "sm_75", F16, False),
        ((8, 0), "sm_80", BF16, True),
        ((8, 6), "sm_86", BF16, True),
        ((8, 9), "sm_89", BF16, True),
        ((9, 0), "sm_90", BF16, True),
        ((12, 0), "sm_120", BF16, True),
        ("gfx90a:sramecc+:xnack-", "gfx90a", BF16, True),
        ("gfx1100", "gfx1100", BF16, True),
        ("gfx1030", "gfx1030", F16, False),
    ],
)
def test_cards(card, capability, name, dtype, flash_attention):
    card(capability)
    found = hardware_of("cuda:0")
    assert (found.name, found.compute_dtype, found.flash_attention) == (name, dtype, flash_attention)
    assert found.loss_scaling and found.optimizers_8bit and found.optimizers_paged


@pytest.mark.parametrize(
    ("device", "dtype", "loss_scaling", "flash_attention", "optimizers_8bit", "paged"),
    [
        ("xpu", BF16, True, True, True, True),
        ("mps", F32, True, False, False, False),
        ("cpu", F32, False, False, True, False),
    ],
)
def test_other_devices(device, dtype, loss_scaling, flash_attention, optimizers_8bit, paged):
    found = hardware_of(device)
    assert (found.name, found.compute_dtype, found.loss_scaling) == (device, dtype, loss_scaling)
    assert (found.flash_attention, found.optimizers_8bit, found.optimizers_paged) == (
        flash_attention,
        optimizers_8bit,
        paged,
    )


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("sm_61", False),
        ("sm_70", False),
        ("sm_75", True),
        ("sm_86", True),
        ("sm_89", True),  # as sm_86
        ("sm_90", True),
        ("sm_103", True),  # as sm_100
        ("sm_121", True),
        ("sm_130", True),  # compiled from compute_120 when it is loaded
        ("gfx90a", False),
    ],
)
def test_which_cards_a_build_of_torch_serves(name, runs):
    assert has_kernels(name, BUILD_CU130) == runs
    assert not has_kernels("sm_130", BUILD_CU130[:-1])
    assert has_kernels("sm_90", ["sm_90a"]) and not has_kernels("sm_86", ["sm_89"])
    assert has_kernels("gfx90a", ["gfx90a", "gfx1100"]) and not has_kernels("gfx1030", ["gfx90a", "gfx1100"])


def test_a_card_that_cannot_be_served_is_told_what_can_be_done(card):
    card((7, 0), BUILD_CU130)
    with pytest.raises(BaseModelError) as caught:
        hardware_of("cuda:0")
    assert "was built for sm_75, sm_80" in caught.value.what and "cuda:0 is sm_70" in caught.value.what
    assert "CUDA 12.6 or older" in caught.value.todo and "use_cpu: true" in caught.value.todo
    with pytest.raises(BaseModelError, match="This card is sm_52; bitsandbytes has kernels from sm_60"):
        hardware_for("cuda", (5, 2))
    card("gfx1030", ["gfx90a", "gfx1100"])
    with pytest.raises(BaseModelError, match="built for gfx90a, gfx1100; cuda:0 is gfx1030"):
        hardware_of("cuda:0")


def test_kernels_that_are_not_there_are_refused_by_name():
    t4, ampere, mps, cpu = (hardware_for(*kind) for kind in (("cuda", (7, 5)), ("cuda", (8, 6)), ("mps",), ("cpu",)))
    with pytest.raises(BaseModelError, match="flash_attention_2 has no kernels for sm_75. Leave attn_implementation"):
        check_run(t4, attention="flash_attention_2", dtype=F16)
    with pytest.raises(BaseModelError, match="flash_attention_2 has no kernels for float32"):
        check_run(ampere, attention="flash_attention_2", dtype=F32)
    for optimizer in ("paged_adamw_8bit", "paged_lion_32bit"):
        with pytest.raises(RecipeError, match="pages to host memory, which bitsandbytes cannot do on cpu"):
            check_run(cpu, optimizer=optimizer)
    for optimizer in ("adamw_8bit", "adamw_bnb_8bit", "lion_32bit", "ademamix_8bit", "rmsprop_bnb"):
        with pytest.raises(RecipeError, match="no optimizer kernels for mps. Use adamw_torch_fused"):
            check_run(mps, optimizer=optimizer)
        check_run(t4, optimizer=optimizer)
    check_run(ampere, attention="flash_attention_2", dtype=BF16)
    for attention in (None, "sdpa", "eager"):
        check_run(cpu, attention=attention, dtype=F32)
    for optimizer in ("adamw_torch_fused", "adafactor", "sgd", "adamw_torch_8bit"):
        check_run(mps, optimizer=optimizer)


def test_precision_that_cannot_be_trained_in_is_refused():
    t4, cpu, gemma = hardware_for("cuda", (7, 5)), hardware_for("cpu"), {"model_type": "gemma2"}
    with pytest.raises(RecipeError, match="fp16 needs loss scaling, which torch does not have on cpu"):
        check_run(cpu, mixed_precision="fp16")
    with pytest.raises(RecipeError, match="gemma2 models overflow in float16"):
        check_run(t4, mixed_precision="fp16", config=gemma)
    for mixed_precision in ("no", "bf16"):
        with pytest.raises(RecipeError, match="The base is in float16 and fp16 is off"):
            check_run(t4, mixed_precision=mixed_precision, dtype=F16)
    check_run(t4, mixed_precision="fp16", dtype=F16, config={"model_type": "llama"})
    check_run(t4, dtype=F16)  # load_base, which does not know the trainer's mixed precision


def test_the_checks_stand_before_the_work(tmp_path):
    base = make_base(tmp_path / "base")
    with pytest.raises(BaseModelError, match="flash_attention_2 has no kernels for cpu"):
        load_base(base, device="cpu", attn_implementation="flash_attention_2", verbose=False)
    with pytest.raises(RecipeError, match="optim 'paged_adamw_8bit' pages to host memory"):
        make_config(tmp_path, optim="paged_adamw_8bit")
    with pytest.raises(RecipeError, match="fp16 needs loss scaling, which torch does not have on cpu"):
        make_config(tmp_path, fp16=True)
    int8 = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(BaseModelError, match="is in int8, and qpsft trains on 4-bit"):
        PSFTTrainer(int8, args=make_config(tmp_path), train_dataset=make_rows(4), peft_config=make_lora())


def test_weights_are_rounded_on_the_stream_that_bitsandbytes_uses(monkeypatch, tmp_path):
    """Its kernels go to CUDA's default stream; what they read must have been copied there, not on the user's own."""
    on = []

    @contextlib.contextmanager
    def stream(one):
        on.append(one)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"the default one of {device}")
    with default_stream(torch.device("cuda:1")):
        assert on == ["the default one of cuda:1"]
    with default_stream(torch.device("cpu")):
        assert not on
    monkeypatch.setattr(base_module, "default_stream", lambda device: stream(device))
    load, during = base_module._load_model, []
    monkeypatch.setattr(base_module, "_load_model", lambda *args: during.extend(on) or load(*args))
    load_base(make_base(tmp_path / "base"), device="cpu", verbose=False)
    assert during == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("capability", "trained", "model_type", "computed"),
    [
        ((7, 5), "bfloat16", "llama", F16),
        ((7, 5), "bfloat16", "gemma2", F32),
        ((6, 1), "bfloat16", "llama", F32),
        ((7, 5), "float16", "llama", None),
        ((8, 9), "bfloat16", "llama", None),
        ((8, 9), "float16", "llama", None),
    ],
)
def test_an_adapter_from_another_card_computes_in_what_this_one_is_good_at(
    card, capability, trained, model_type, computed
):
    card(capability)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = dtype_here(trained, {"model_type": model_type}, torch.device("cuda:0"))
    assert found == (computed or getattr(torch, trained))
    told = [str(one.message) for one in said if "The adapter was trained in bfloat16" in str(one.message)]
    assert len(told) == (computed is not None)
    assert computed is None or f"computing in {str(computed).removeprefix('torch.')}" in told[0]
    assert dtype_here(trained, {"model_type": model_type}, torch.device("cpu")) == getattr(torch, trained)


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_its_base_is_rounded_as_in_training_all_the_same(tmp_path, monkeypatch, storage):
    """Also where the 4-bit codes are stored as the very dtype that is converted."""
    monkeypatch.setattr("qpsft.model.base.storage_dtype", lambda compute_dtype: storage)
    base, tokenizer = load_base(make_base(tmp_path / "base"), device="cpu", dtype="bfloat16", verbose=False)
    adapter = save_adapter(add_adapter(base, LoraArguments(lora_r=2)), tmp_path / "adapter")
    tokenizer.save_pretrained(adapter)
    there, _ = load_evaluated(str(adapter))
    monkeypatch.setattr("qpsft.evaluate.model.dtype_here", lambda *args: F16)
    here, _ = load_evaluated(str(adapter))
    assert (there.dtype, here.dtype) == (BF16, F16)
    codes = [
        {name: layer.weight.data.view(torch.uint8) for name, layer in quantized_linears(model).items()}
        for model in (there, here)
    ]
    assert len(codes[0]) == 14 and all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    logprobs = [model(torch.arange(3, 40).unsqueeze(0)).logits.float().log_softmax(-1) for model in (there, here)]
    assert 0 < (logprobs[0] - logprobs[1]).abs().max() < 0.2 and logprobs[1].isfinite().all()


# --- the trainer's mixed precision ---


def config_on_a_card(monkeypatch, card, capability, tmp_path, **settings):
    """A PSFTConfig as it would be made on a machine with one such card."""
    card(capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(config, "pick_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    return PSFTConfig(str(tmp_path), report_to=[], save_strategy="no", max_steps=1, **settings)


@pytest.mark.parametrize(
    ("capability", "mixed_precision"),
    [((6, 1), "no"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16"), ("gfx1030", "fp16")],
)
def test_mixed_precision_follows_the_card(monkeypatch, card, tmp_path, capability, mixed_precision):
    args = config_on_a_card(monkeypatch, card, capability, tmp_path)
    assert args.mixed_precision == mixed_precision and args.automatic_precision
    assert (args.bf16, args.fp16) == (mixed_precision == "bf16", mixed_precision == "fp16")
    asked = config_on_a_card(monkeypatch, card, capability, tmp_path, bf16=False, fp16=False)
    assert asked.mixed_precision == "no" and not asked.automatic_precision


@pytest.mark.parametrize(
    ("config_json", "found"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
        ({"model_type": "some_vision_model", "text_config": {"model_type": "gemma3_text"}}, "gemma3_text"),
        ({"model_type": "gemma3n_text"}, "gemma3n_text"),
        ({"model_type": "gemma4_text"}, "gemma4_text"),
        ({"model_type": "glm4_moe"}, "glm4_moe"),
        ({"model_type": "gpt_oss"}, "gpt_oss"),
        ({"model_type": "qwen3_5"}, "qwen3_5"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        *(({"model_type": name}, None) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "glm")),
        ({}, None),
    ],
)
def test_models_known_to_overflow_in_float16(config_json, found):
    assert overflowing_type(config_json) == found


def test_the_base_of_an_overflowing_model_is_computed_in_float32_on_a_t4():
    t4, gemma, llama = hardware_for("cuda", (7, 5)), {"model_type": "gemma2"}, {"model_type": "llama"}
    assert base_dtype(t4, "auto", gemma) == F32
    with pytest.warns(UserWarning, match=r"gemma2 models overflow in float16 \(says vLLM\).* computing in float32"):
        warn_if_slow(t4, "auto", gemma)
    with pytest.raises(BaseModelError, match="gemma2 models overflow in float16 .*Use dtype float32"):
        base_dtype(t4, "float16", gemma)
    assert base_dtype(t4, "auto", llama) == base_dtype(t4, "float16", llama) == F16
    assert base_dtype(t4, "bfloat16", gemma) == BF16
    assert base_dtype(hardware_for("cuda", (8, 9)), "auto", gemma) == BF16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, config_json in (("auto", llama), ("float32", gemma)):
            warn_if_slow(t4, dtype, config_json)


def test_the_trainer_turns_off_or_refuses_float16_for_an_overflowing_model(monkeypatch, card, tmp_path):
    save_tiny_model(tmp_path / "gemma", "gemma2")
    with pytest.raises(BaseModelError, match="gemma2 models overflow in float16"):
        load_base(tmp_path / "gemma", device="cpu", dtype="float16", verbose=False)
    gemma = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")  # past load_base
    chosen = config_on_a_card(monkeypatch, card, (7, 5), tmp_path)
    settle_precision(gemma, chosen)
    assert (chosen.fp16, chosen.mixed_precision) == (False, "no")
    asked = config_on_a_card(monkeypatch, card, (7, 5), tmp_path, fp16=True)
    with pytest.raises(RecipeError, match="gemma2 models overflow in float16"):
        PSFTTrainer(gemma, args=asked, train_dataset=make_rows(4), peft_config=make_lora())
    with pytest.raises(RecipeError, match="The base is in float16 and fp16 is off"):
        settle_precision(gemma.half(), config_on_a_card(monkeypatch, card, (7, 5), tmp_path))


@pytest.mark.parametrize(
    ("capability", "dtype", "mixed_precision"),
    [
        ((7, 5), "float16", "fp16"),
        ((7, 5), "bfloat16", "bf16"),
        ((7, 5), "float32", "no"),
        ((8, 0), "bfloat16", "bf16"),
        ((8, 0), "float32", "no"),
    ],
)
@pytest.mark.filterwarnings("ignore:bfloat16 is emulated")
def test_a_loaded_base_is_trained_in_the_dtype_it_was_asked_for(
    monkeypatch, card, tmp_path, capability, dtype, mixed_precision
):
    """`dtype` of a recipe, in training as in the plan: no 16-bit autocast over a base that is float32 on purpose."""
    folder = make_base(tmp_path / "llama")
    llama, _ = load_base(folder, device="cpu", dtype=dtype, verbose=False)
    for model in (llama, get_peft_model(llama, make_lora())):
        args = config_on_a_card(monkeypatch, card, capability, tmp_path)
        settle_precision(model, args)
        assert (args.mixed_precision, args.bf16, args.fp16) == (
            mixed_precision, mixed_precision == "bf16", mixed_precision == "fp16"
        )  # fmt: skip
    config_json = json.loads((folder / "config.json").read_text())
    recipe = load_recipe(None, [f"--model_name_or_path={folder}", f"--dtype={dtype}"], PlannedConfig)
    planned = make_plan(recipe, config=config_json, card=Card("a card", 2**34, capability))
    autocast = {"no": None, "bf16": BF16, "fp16": F16}[mixed_precision]
    assert planned._planner._passes[False]._target.autocast == autocast
    by_hand = AutoModelForCausalLM.from_pretrained(folder)  # float32 weights and 16-bit products are usual there
    args = config_on_a_card(monkeypatch, card, capability, tmp_path)
    settle_precision(by_hand, args)
    assert args.mixed_precision == ("fp16" if capability == (7, 5) else "bf16")


def test_float16_on_the_cpu_is_refused(tmp_path):
    llama, _ = load_base(make_base(tmp_path / "llama"), device="cpu", dtype="float16", verbose=False)
    with pytest.raises(RecipeError, match="fp16 needs loss scaling, which torch does not have on cpu"):
        settle_precision(llama, make_config(tmp_path))
    with pytest.raises(RecipeError, match=re.escape("Set fp16: true (on a GPU), or load the base in float32")):
        settle_precision(llama, make_config(tmp_path, bf16=False))


def test_emulated_bfloat16_warns(monkeypatch, card, tmp_path):
    llama, _ = load_base(make_base(tmp_path / "llama"), device="cpu", verbose=False)
    asked = config_on_a_card(monkeypatch, card, (7, 5), tmp_path, bf16=True)
    with pytest.warns(UserWarning, match="bfloat16 is emulated on sm_75, which is slow"):
        settle_precision(llama, asked)
