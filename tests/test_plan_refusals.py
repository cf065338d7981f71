"""A plan refuses what training on that card would refuse, in the same words, and nothing else."""

import pytest
import torch
from planned_runs import LLAMA, planned, recipe_of
from trl.kernels import chunked_logprob

from qpsft import cli
from qpsft.errors import BaseModelError, RecipeError
from qpsft.plan import make_plan
from qpsft.plan.cards import find_card

GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 64}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attn_implementation=flash_attention_2", "--gpu=T4"], "no kernels for sm_75"),
        (["--attn_implementation=flash_attention_2", "--gpu=1080 ti"], "no kernels for sm_61"),
        (["--attn_implementation=flash_attention_2", "--gpu=A10", "--dtype=float32"], "no kernels for float32"),
        (["--bf16", "--gpu=T4"], "base is in float16 and fp16 is off"),
    ],
)
def test_what_the_card_cannot_do_is_said_with_exit_code_2(flags, says, capsys):
    assert cli.main(["plan", "--model_name_or_path=demo", *flags]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_what_it_can_do_is_planned():
    flash, t4 = "--attn_implementation=flash_attention_2", find_card("T4")
    assert planned(flash, card=find_card("A10")).fits
    assert planned("--fp16", card=t4).fits
    assert planned("--bf16", "--dtype=bfloat16", card=t4).fits  # emulated: slow, not wrong


def test_a_base_stored_in_int8_is_refused():
    stored = LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    with pytest.raises(BaseModelError, match="weights are quantized in int8.* Use the original model"):
        make_plan(recipe_of(), config=stored, card=find_card("T4"))


@pytest.mark.parametrize("card", ["T4", "A10"])
def test_float16_asked_for_where_the_model_overflows_in_it(card):
    with pytest.raises(RecipeError, match="gemma2 models overflow in float16"):
        make_plan(recipe_of("--fp16"), config=GEMMA, card=find_card(card))
    found = make_plan(recipe_of(), config=GEMMA, card=find_card(card))
    assert found._planner.dtype == (torch.float32 if card == "T4" else torch.bfloat16)


def test_an_optimizer_without_kernels_there():
    with pytest.raises(RecipeError, match="pages to host memory, which bitsandbytes cannot do on cpu"):
        planned("--optim=paged_adamw_8bit", device="cpu")


def test_flash_attention_is_planned_for_models_that_sdpa_cannot_run():
    """Gemma 2 caps its scores, which FlashAttention can and SDPA cannot: by itself it is `eager`."""
    flags, card = ("--max_length=2048", "--per_device_train_batch_size=1"), find_card("A10")
    flash = make_plan(recipe_of(*flags, "--attn_implementation=flash_attention_2"), config=GEMMA, card=card)
    eager = make_plan(recipe_of(*flags), config=GEMMA, card=card)
    scores = 4 * 2048 * 2048 * 2  # of all heads
    assert flash.complete and flash.fits
    assert eager.parts["layer working set"] - flash.parts["layer working set"] > scores
    with pytest.raises(BaseModelError, match="does not support .*scaled_dot_product_attention"):
        make_plan(recipe_of("--attn_implementation=sdpa"), config=GEMMA, card=card)


def test_flash_attention_takes_the_memory_of_torchs_own_kernel():
    flags, card = ("--max_length=512",), find_card("A10")
    of = [planned(*flags, f"--attn_implementation={name}", card=card) for name in ("sdpa", "flash_attention_2")]
    assert of[0].parts == of[1].parts


def test_a_model_without_flash_attention_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM._supports_flash_attn", False)
    with pytest.raises(BaseModelError, match="llama models have no flash_attention_2"):
        planned("--attn_implementation=flash_attention_2", card=find_card("A10"))


def test_a_build_of_torch_without_flash_attention_and_triton_is_planned_as_it_is(monkeypatch):
    """Those for Windows: keys are repeated for the memory-efficient kernel, and the LM head's tiles are torch's."""
    flags, card = ("--max_length=2048", "--per_device_train_batch_size=1"), find_card("A10")
    usual = planned(*flags, card=card)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    no_flash = planned(*flags, card=card)
    assert no_flash.parts["layer working set"] > usual.parts["layer working set"]
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", False)
    assert planned(*flags, card=card).parts["LM-head tile"] > 1.2 * usual.parts["LM-head tile"]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    assert planned(*flags, card=card).parts == usual.parts
