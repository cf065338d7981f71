"""What a plan says: which parts are alive together, whether a card does, how long rows can be, what to change."""

import pytest
import torch
from planned_runs import LLAMA, planned, recipe_of
from safetensors.torch import save_file

from qpsft.errors import BaseModelError
from qpsft.plan import make_plan, result
from qpsft.plan.cards import GIB, find_card
from qpsft.plan.changes import Suggestion, changed
from qpsft.plan.passes import Passes


def narrow(monkeypatch):
    """An LM-head tile so small that layers and lengths decide."""
    monkeypatch.setattr("qpsft.plan.lm_head.TILE_COLUMNS", 64)


# --- parts and phases ---


def test_phases_add_up_the_parts_that_are_alive_together():
    found = planned("--lora_r=64", "--max_length=256")
    parts = found.parts
    held = sum(parts[name] for name in list(parts)[: list(parts).index("gradients")])
    assert found.held_bytes == held
    assert parts["policy adapter"] == parts["gradients"] and parts["reference adapter"] == 0  # it is in host memory
    backward = ("gradients", "saved activations", "layer working set", "dequantization buffers")
    assert found.phases["backward"] == held + sum(parts[name] for name in backward)
    assert found.phases["scoring pass"] == held + parts["scoring pass"]
    assert found.phases["optimizer step"] == held + parts["gradients"]
    assert found.peak_bytes == max(found.phases.values()) and found.fits is None
    assert found.margin_bytes == parts["CUDA context"] + parts["fragmentation margin"] > 0
    assert found.needed_bytes == found.peak_bytes + found.margin_bytes


def test_without_a_snapshot_there_is_no_copy_and_no_scoring():
    found = planned("--loss_type=nll")
    assert found.parts["reference adapter"] == found.parts["scoring pass"] == 0
    assert "scoring pass" not in found.phases


def test_one_micro_batch_per_step_has_its_gradients_only_at_the_end(monkeypatch):
    narrow(monkeypatch)
    one, two = (planned(f"--gradient_accumulation_steps={n}", "--lora_r=64", "--max_length=256") for n in (1, 2))
    difference = two.phases["backward"] - one.phases["backward"]
    window = two.parts["batch"] - one.parts["batch"]
    assert 0 < difference - window < two.parts["gradients"]


def test_every_process_of_ddp_has_buckets_of_the_gradients_size():
    alone, among = planned(), planned(processes=2)
    assert among.parts["DDP gradient buckets"] == among.parts["gradients"]
    assert among.peak_bytes == alone.peak_bytes + alone.parts["gradients"]
    assert "each of 2 processes" in " ".join(str(among).split())


def test_paged_state_and_offloaded_activations_are_on_the_host():
    paged, offloaded = ["--optim=paged_adamw_8bit"], ["--activation_offloading", "--gradient_checkpointing=false"]
    both, first, second = (planned("--lora_r=512", *flags) for flags in (paged + offloaded, paged, offloaded))
    assert first.host_bytes > 2 * 2 * 14 * 512 * 256 and second.host_bytes > 10 * 2**20
    plain = planned("--lora_r=512", "--gradient_checkpointing=false")
    assert both.host_bytes + plain.host_bytes == first.host_bytes + second.host_bytes  # the reference is in each
    assert both.parts["saved activations"] < plain.parts["saved activations"]
    assert both.parts["optimizer state"] < plain.parts["optimizer state"] / 20


@pytest.mark.parametrize(("card", "each"), [("T4", 8_519_680), ("H100", 32 * 2**20)])
def test_forward_and_backward_have_a_blas_workspace_each(card, each):
    flags = ("--quantization=none", "--lora_r=8")  # few small tensors, so hardly any rounding
    found = planned(*flags, card=find_card(card)).parts["workspaces and rounding"]
    assert 2 * each <= found < 2 * each + 2**20


def test_a_run_in_host_memory_has_no_cuda_context():
    found = planned("--dtype=float32", device="cpu", gpu_bytes=8 * GIB)
    assert found.parts["CUDA context"] == found.parts["workspaces and rounding"] == 0 and found.fits


def batches(*flags, **changes):
    found = make_plan(recipe_of(*flags), config=LLAMA | changes)
    activations = found._planner.measure(found._recipe).activations
    return tuple(activations.batch.__dict__.values()), tuple(activations.score_batch.__dict__.values())


def test_rows_are_masked_only_where_packed_rows_are_not_attended_to_piece_by_piece():
    two = ("--per_device_train_batch_size=2", "--gradient_accumulation_steps=3", "--max_length=200")
    two += ("--score_token_budget=1200",)
    assert batches(*two) == ((2, 200, False), (6, 200, False))
    assert batches(*two, "--packing") == ((2, 200, False), (6, 200, False))
    window = {"model_type": "gemma3_text", "sliding_window": 100, "head_dim": 64}
    assert batches(*two, "--packing", **window)[0] == (2, 200, True)
    flash = batches(*two, "--packing", "--attn_implementation=flash_attention_2")
    assert flash == ((1, 400, False), (1, 400, False))  # laid end to end, scored as they are


def test_two_micro_batches_are_scored_together_or_as_many_tokens_as_are_asked_for():
    rows = ("--per_device_train_batch_size=1", "--gradient_accumulation_steps=64", "--max_length=600")
    assert batches(*rows)[1][0] == 2
    assert batches(*rows, "--activation_offloading")[1][0] == 1
    assert batches(*rows, "--score_token_budget=1800")[1][0] == 3
    assert batches(*rows, "--score_token_budget=0")[1][0] == 1
    assert batches(*rows, "--score_token_budget=1000000")[1][0] == 64
    assert batches(*rows, "--max_length=100")[1][0] == 5  # 512 tokens at least


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("meta-llama/Llama-3.1-8B", 0),
        ("meta-llama/Llama-3.2-1B", 0),
        ("google/gemma-2-2b", 0),
        ("Qwen/Qwen2.5-0.5B", 64 * 2**20),
        ("HuggingFaceTB/SmolLM2-135M", 64 * 2**20),
    ],
)
@pytest.mark.parametrize(("rows", "length"), [(2, 1024), (1, 2048)])
def test_scoring_is_not_the_peak_or_by_little_in_small_models(model, more, rows, length):
    flags = (f"--per_device_train_batch_size={rows}", f"--max_length={length}")
    phases = make_plan(recipe_of(*flags, model=model)).phases
    assert phases.pop("scoring pass") <= max(phases.values()) + more


@pytest.mark.journey
def test_rows_just_below_the_tiled_ones_may_need_the_most(monkeypatch):
    narrow(monkeypatch)
    shape = LLAMA | {"intermediate_size": 2048, "max_position_embeddings": 16384}
    flags = ("--per_device_train_batch_size=1", "--gradient_accumulation_steps=2")
    of = {
        length: make_plan(recipe_of(*flags, f"--max_length={length}"), config=shape).phases["backward"]
        for length in (4095, 4096, 16384)
    }
    assert of[4095] <= of[4096] < 1.01 * of[4095] and of[16384] > 1.3 * of[4095]
    whole = make_plan(recipe_of(*flags, "--max_length=16384", "--tiled_mlp=false"), config=shape)
    assert whole.phases["backward"] > 1.2 * of[16384]


def test_what_very_long_rows_need_is_on_a_line_unless_attention_keeps_scores(monkeypatch):
    narrow(monkeypatch)
    measure, run = Passes.measure, []

    def recorded(self, batch, *args, **settings):
        run.append(batch.length)
        return measure(self, batch, *args, **settings)

    monkeypatch.setattr(Passes, "measure", recorded)
    for attention, on_a_line in (("sdpa", True), ("eager", False)):
        flags = ("--per_device_train_batch_size=1", "--max_length=4000", f"--attn_implementation={attention}")
        monkeypatch.setattr("qpsft.plan.planner.FAR", 8192)
        exact = planned(*flags).phases
        monkeypatch.setattr("qpsft.plan.planner.FAR", 2048)
        run.clear()
        found = planned(*flags).phases
        assert (4000 in run) != on_a_line and 2048 in run
        assert found == (pytest.approx(exact, rel=0.02) if on_a_line else exact)


def test_the_reference_is_in_host_memory_on_a_card_and_comes_to_score(monkeypatch):
    narrow(monkeypatch)
    flags = ("--lora_r=256", "--max_length=128")
    on_card, on_cpu = planned(*flags), planned(*flags, "--dtype=float32", device="cpu")
    adapter = on_card.parts["policy adapter"]
    assert on_card.parts["reference adapter"] == 0 and on_card.host_bytes == adapter
    assert on_card.parts["scoring pass"] > adapter
    assert on_cpu.parts["reference adapter"] == on_cpu.parts["policy adapter"] and on_cpu.host_bytes == 0


def test_models_that_overflow_in_float16_are_planned_in_float32():
    gemma = LLAMA | {"model_type": "gemma2", "head_dim": 64}
    assert make_plan(recipe_of(), config=gemma, card=find_card("T4"))._planner.dtype == torch.float32
    with pytest.raises(BaseModelError, match="overflow in float16"):
        make_plan(recipe_of("--dtype=float16"), config=gemma)


def test_an_adapter_that_is_trained_further_brings_its_rank(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")  # a plan looks at the config only
    found = planned(f"--adapter_name_or_path={tmp_path}")
    assert found.parts["policy adapter"] == 4 * 2 * 3 * ((256 + 256) + (256 + 1024))


def test_an_export_needs_memory_for_its_largest_tensor_and_disk_for_two_files():
    few, many = (make_plan(recipe_of("--max_length=64"), config=LLAMA | {"vocab_size": n}) for n in (300_000, 400_000))
    assert many.export_ram_bytes - few.export_ram_bytes == 14 * 256 * 100_000
    assert few.export_ram_bytes > few.merge_ram_bytes
    parameters = few._planner.weights.parameters
    assert few.disk_bytes["export"] == 4 * parameters and few.disk_bytes["quantized"] == round(1.07 * parameters)
    said = " ".join(str(many).split())
    assert "to export GGUF: 1.80 GiB" in said and "a quantized one up to 0.21 more GiB" in said


# --- verdicts, lengths, changes ---


def test_it_fits_down_to_the_last_byte():
    needed = planned().needed_bytes
    assert planned(gpu_bytes=needed).fits and not planned(gpu_bytes=needed - 1).fits
    assert planned(gpu_bytes=needed).suggestion is None


@pytest.mark.journey
def test_the_longest_length_fits_and_a_longer_one_does_not(monkeypatch):
    narrow(monkeypatch)
    limit = planned("--max_length=1500").needed_bytes
    found = planned("--max_length=128", gpu_bytes=limit)
    assert 1400 < found.max_length <= 1500
    assert planned(f"--max_length={found.max_length}", gpu_bytes=limit).fits
    assert not planned(f"--max_length={int(found.max_length * 1.08)}", gpu_bytes=limit).fits
    assert planned("--max_length=128", gpu_bytes=80 * GIB).max_length == 4096  # the model's context
    assert planned("--max_length=128", gpu_bytes=2**20).max_length is None


BIG = ("--max_length=1024", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--lora_r=256")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--gradient_checkpointing=false",), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
        (("--gradient_checkpointing=false", "--per_device_train_batch_size=1"), {"gradient_checkpointing": True}),
        (("--per_device_train_batch_size=1", "--max_length=64"), {"optim": "adamw_8bit"}),
    ],
)
def test_the_cheapest_change_that_makes_it_fit(monkeypatch, flags, expected):
    narrow(monkeypatch)
    recipe = recipe_of(*BIG, *flags)
    limit = make_plan(changed(recipe, expected), config=LLAMA).needed_bytes
    found = make_plan(recipe, config=LLAMA, gpu_bytes=limit)
    assert not found.fits and found.suggestion.options == expected
    again = make_plan(changed(recipe, found.suggestion.options), config=LLAMA, gpu_bytes=limit)
    assert again.fits and again.needed_bytes == found.suggestion.needed
    assert found.suggestion.flags().startswith(f"--{next(iter(expected))} ")
    assert recipe.trainer.gradient_checkpointing == ("--gradient_checkpointing=false" not in flags)  # untouched


@pytest.mark.journey
def test_changes_are_combined_and_rows_made_shorter_when_one_is_not_enough(monkeypatch):
    narrow(monkeypatch)
    recipe = recipe_of(*BIG, "--gradient_checkpointing=false")
    smallest = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit", "activation_offloading": True, "max_length": 300,
    }  # fmt: skip
    limit = make_plan(changed(recipe, smallest), config=LLAMA).needed_bytes
    found = make_plan(recipe, config=LLAMA, gpu_bytes=limit).suggestion
    assert 290 <= found.options["max_length"] < 1024 and found.options["per_device_train_batch_size"] == 1
    assert make_plan(changed(recipe, found.options), config=LLAMA, gpu_bytes=limit).fits
    assert not make_plan(changed(recipe, found.options | {"max_length": 1024}), config=LLAMA, gpu_bytes=limit).fits
    assert make_plan(recipe, config=LLAMA, gpu_bytes=2**20).suggestion is None


def known_family(monkeypatch):
    sizes = {"tiny/small": 1, "tiny/middle": 2, "tiny/large": 30}
    table = {
        name: {"family": "tiny", "parameters": size, "id": name, "variant": 0}
        | {"config": LLAMA | {"vocab_size": 10_000 * size}}
        for name, size in sizes.items()
    }
    monkeypatch.setattr("qpsft.plan.shapes.known_shapes", lambda: table)


def test_a_smaller_model_of_the_family_is_the_last_resort(monkeypatch):
    known_family(monkeypatch)
    limit = make_plan(recipe_of(model="tiny/middle")).needed_bytes
    found = make_plan(recipe_of(model="tiny/large"), gpu_bytes=limit)
    monkeypatch.setattr(result, "suggest", lambda *args, **settings: None)
    assert not found.fits and found.suggestion.options == {"model_name_or_path": "tiny/middle"}
    assert found.suggestion.needed == limit


def test_a_smaller_model_comes_before_rows_shorter_than_half(monkeypatch):
    known_family(monkeypatch)
    limit = make_plan(recipe_of("--gradient_checkpointing=true", model="tiny/middle")).needed_bytes
    for length in (64, 512):
        shorter = Suggestion({"gradient_checkpointing": True, "max_length": length}, limit)
        monkeypatch.setattr(result, "suggest", lambda *args, shorter=shorter, **settings: shorter)
        flags = ("--max_length=1024", "--gradient_checkpointing=false")
        found = make_plan(recipe_of(*flags, model="tiny/large"), gpu_bytes=limit).suggestion
        if length < 1024 / 2:
            assert found.options["model_name_or_path"] == "tiny/middle" and "max_length" not in found.options
        else:
            assert found == shorter
    monkeypatch.setattr(result, "smaller_models", lambda name: [])
    shorter = Suggestion({"max_length": 64}, limit)
    monkeypatch.setattr(result, "suggest", lambda *args, **settings: shorter)
    assert make_plan(recipe_of(*flags, model="tiny/large"), gpu_bytes=limit).suggestion == shorter
