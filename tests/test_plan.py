"""The memory plan against the real thing: bytes of loaded models exactly, and activations of real training steps."""

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from datasets import Dataset
from planned_runs import planned
from small_runs import Recorder, make_config, policy
from tiny_models import save_tiny_model

import qpsft.plan.lm_head as lm_head
from qpsft.errors import BaseModelError
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.model.base_record import quantized_linears
from qpsft.model.skeleton import load_config
from qpsft.plan.kernels import Target, dequantizes, kernel_workspace
from qpsft.plan.live_bytes import LiveBytes, cuda_block
from qpsft.plan.optimizers import optimizer_bytes
from qpsft.plan.passes import Passes, shortened
from qpsft.plan.planned_config import PlannedConfig
from qpsft.plan.shapes import known_shapes, read_shape, smaller_models
from qpsft.plan.step import Batch, training_bytes
from qpsft.plan.weights import build_skeleton, weight_bytes
from qpsft.psft.old_logprobs import OldLogprobs
from qpsft.psft.trainer import PSFTTrainer
from qpsft.recipe.arguments import LoraArguments, ModelArguments

WIDE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, head_dim=32, num_attention_heads=4)


def skeleton_of(folder: Path, lora: LoraArguments, dtype: torch.dtype, **model):
    return build_skeleton(load_config(folder, False), ModelArguments(**model), lora, dtype)


# --- what can be counted exactly ---


def test_a_base_is_quantized_after_a_plan_as_before_it(tmp_path, monkeypatch):
    """bitsandbytes keeps the code table of its first quantization for all later ones."""
    folder = save_tiny_model(tmp_path)
    before = load_base(folder, device="cpu", verbose=False)[0].state_dict()
    monkeypatch.setattr(functional, "name2qmap", {})
    skeleton_of(folder, LoraArguments(lora_r=3), torch.float32)
    after = load_base(folder, device="cpu", verbose=False)[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("model_type", "tied", "quantization", "double_quant", "dtype", "lora"),
    [
        ("llama", False, "nf4", True, "bfloat16", {"lora_r": 3}),
        ("llama", True, "nf4", False, "float32", {"use_dora": True}),
        ("qwen2", False, "fp4", True, "float16", {"lora_target_modules": ["q_proj", "down_proj"]}),
        ("qwen2", True, "nf4", False, "bfloat16", {"lora_r": 8}),
        ("gemma2", True, "nf4", True, "bfloat16", {"lora_r": 1, "use_rslora": True}),
        ("gpt2", False, "nf4", True, "float16", {"lora_r": 4}),
        ("phi3", False, "nf4", True, "bfloat16", {"lora_modules_to_save": ["lm_head"]}),
        ("qwen3", True, "none", True, "bfloat16", {"lora_r": 5}),
    ],
)
def test_weights_constants_and_adapter_are_counted_to_the_byte(
    tmp_path, model_type, tied, quantization, double_quant, dtype, lora
):
    folder = save_tiny_model(tmp_path, model_type, tie_word_embeddings=tied, intermediate_size=320)
    lora = LoraArguments(**lora)
    settings = {"quantization": quantization, "double_quant": double_quant}
    base, _ = load_base(folder, dtype=dtype, device="cpu", verbose=False, **settings)
    loaded = weight_bytes(add_adapter(base, lora))
    planned = weight_bytes(skeleton_of(folder, lora, getattr(torch, dtype), **settings))
    assert loaded.quantized + loaded.unquantized > 0 and loaded.adapter > 0
    sums = ("quantized", "constants", "unquantized", "parameters", "largest", "largest_tensor", "adapter", "trainable")
    for name in sums:
        assert getattr(planned, name) == getattr(loaded, name), name
    assert sorted(planned.sizes) == sorted(loaded.sizes)


def test_planning_leaves_nothing_of_the_meta_device_behind(tmp_path, monkeypatch):
    # bitsandbytes keeps the code table of its first quantization in a process
    monkeypatch.setattr(functional, "name2qmap", {})
    folder = save_tiny_model(tmp_path)
    skeleton_of(folder, LoraArguments(), torch.bfloat16)
    assert not functional.name2qmap
    base, _ = load_base(folder, device="cpu", verbose=False)
    state = next(iter(quantized_linears(base).values())).weight.quant_state
    assert state.state2.code.device.type == "cpu" and len(state.state2.code.unique()) > 200


def test_constants_of_nf4_by_hand(tmp_path):
    # 64 weights share a constant, 256 constants a constant of their own; tables of 16 and 256 float32, one offset
    folder = save_tiny_model(tmp_path, intermediate_size=320)
    planned = weight_bytes(skeleton_of(folder, LoraArguments(), torch.bfloat16, quantization="nf4"))
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (320, 64), (320, 64), (64, 320)] * 2
    blocks = [-(-rows * columns // 64) for rows, columns in shapes]
    assert planned.quantized == sum(rows * columns // 2 for rows, columns in shapes)
    assert planned.constants == sum(b + 4 * -(-b // 256) + 4 + 4 * 16 + 4 * 256 for b in blocks)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor"])
def test_gradients_reference_and_optimizer_state_are_counted_to_the_byte(tmp_path, optim):
    folder = save_tiny_model(tmp_path / "base", pad_token_id=0, hidden_size=128, intermediate_size=192)
    lora = LoraArguments(lora_r=48)  # some parameters above and some below the 4,096 weights from which 8 bits are used
    base, tokenizer = load_base(folder, verbose=False)
    ids = [[1, 5, 9, 17] * 4] * 24
    gradient_bytes = []
    trainer = PSFTTrainer(
        add_adapter(base, lora),
        args=make_config(tmp_path / "out", optim=optim, max_steps=2, reference_steps=2),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer,
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.add_callback(Recorder(on_gradients=lambda step: gradient_bytes.append(sum(p.grad.nbytes for p in trained))))
    trainer.train()
    weights = weight_bytes(skeleton_of(folder, lora, torch.float32))
    planned = optimizer_bytes(trainer.args, weights.trainable)
    counters = optim in ("adamw_torch", "adafactor")  # which stay on the CPU
    state = {id(t): t for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
    kept = [t.nbytes for t in state.values() if not (counters and t.dim() == 0)]
    assert (planned.device, planned.host, planned.known) == (sum(kept), 0, True)
    assert weights.adapter == gradient_bytes[-1] == trainer.reference.nbytes
    assert weights.adapter == sum(t.nbytes for t in policy(trainer.model).values())


def test_large_state_of_a_paged_optimizer_is_in_host_memory():
    shapes = [torch.Size((400, 250)), torch.Size((10, 10)), torch.Size((64, 64))]
    paged = optimizer_bytes(PlannedConfig("out", optim="paged_adamw_8bit", report_to=[]), shapes)
    flat = optimizer_bytes(PlannedConfig("out", optim="adamw_8bit", report_to=[]), shapes)
    assert paged.host == 2 * 400 * 250 and paged.host + paged.device == flat.device and flat.host == 0
    unknown = optimizer_bytes(PlannedConfig("out", optim="galore_adamw", report_to=[]), shapes)
    assert not unknown.known and unknown.device == 8 * sum(shape.numel() for shape in shapes)


# --- activations: every tensor's bytes in real steps of the trainer ---


@pytest.fixture
def narrow_head(monkeypatch):
    """A tile of the LM head so small that the layers, not the head, need the most."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(lm_head, "TILE_COLUMNS", 64)


def real_peaks(
    folder: Path,
    out: Path,
    *,
    rows: int,
    length: int,
    dtype: str,
    checkpointing: bool,
    fused: bool = False,
    base_kl: float = 0.0,
) -> dict[str, int]:
    """Bytes above the weights, gradients and optimizer state at the peak of a micro-batch and of a reference pass."""
    base, tokenizer = load_base(folder, dtype=dtype, verbose=False)
    ids = [(torch.arange(length - 1 + i % 2) % 100 + 3).tolist() for i in range(8 * rows)]  # every other row is shorter
    trainer = PSFTTrainer(
        add_adapter(base, LoraArguments(lora_r=8)),
        args=make_config(
            out,
            per_device_train_batch_size=rows,
            reference_steps=2,
            max_steps=2,
            max_length=length,
            bf16=dtype == "bfloat16",
            gradient_checkpointing=checkpointing,
            fused_lora=fused,
            base_kl=base_kl,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer,
    )
    peaks = {}

    def measured(name, call):
        def run(*args, **kwargs):
            with LiveBytes(kernel_workspace, int, dequantizes) as live:
                result = call(*args, **kwargs)
            peaks[name] = live.peak  # the last call's: with gradients and optimizer state there already
            return result

        return run

    trainer.training_step = measured("training_step", trainer.training_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OldLogprobs, "score", measured("score", OldLogprobs.score))
        trainer.train()
    return peaks


def planned_peaks(
    folder: Path,
    *,
    rows: int,
    length: int,
    dtype: str,
    checkpointing: bool,
    fused: bool = False,
    base_kl: float = 0.0,
) -> dict[str, int]:
    compute = getattr(torch, dtype)
    target = Target("cpu", (8, 0), None if dtype == "float32" else compute, fused_lora=fused)
    lora = LoraArguments(lora_r=8)

    def build(config):
        return build_skeleton(config, ModelArguments(), lora, compute)

    passes = Passes(load_config(folder, False), build, lora, target)
    found = passes.measure(
        Batch(rows, length, False),
        Batch(2 * rows, length, False),
        checkpointing=1 if checkpointing else None,
        offloading=False,
        base_kl=base_kl > 0,
    )
    # the reference's 16-bit copies take the place of the policy's, which the meter has not seen coming
    return {"training_step": found.training.peak, "score": found.scoring + found.training.copies}


@pytest.mark.parametrize(
    ("model_type", "rows", "length", "dtype", "checkpointing", "fused"),
    [
        ("llama", 1, 128, "float32", True, False),
        ("qwen2", 2, 128, "bfloat16", True, True),
        ("gemma2", 1, 96, "bfloat16", False, False),
        ("llama", 1, 96, "bfloat16", False, True),
        ("gpt2", 2, 64, "float32", True, False),
        ("mixtral", 1, 96, "float32", True, False),
    ],
)
def test_activations_are_those_of_real_steps(
    tmp_path, narrow_head, model_type, rows, length, dtype, checkpointing, fused
):
    wide = WIDE | {"gpt2": {"n_embd": 128, "n_layer": 3}, "mixtral": {"num_local_experts": 3}}.get(model_type, {})
    folder = save_tiny_model(tmp_path / "base", model_type, pad_token_id=0, max_position_embeddings=256, **wide)
    settings = dict(rows=rows, length=length, dtype=dtype, checkpointing=checkpointing, fused=fused)
    real = real_peaks(folder, tmp_path / "out", **settings)
    planned = planned_peaks(folder, **settings)
    for name in real:
        assert planned[name] == pytest.approx(real[name], rel=0.01), name
    off = planned_peaks(folder, **{**settings, "length": length + 16})
    assert off["training_step"] > 1.05 * real["training_step"]  # so 1 % means something


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_divergence_from_the_base_is_counted(tmp_path, narrow_head, dtype):
    folder = save_tiny_model(
        tmp_path / "base", "llama", pad_token_id=0, max_position_embeddings=256, **WIDE | {"vocab_size": 5_000}
    )
    settings = dict(rows=2, length=128, dtype=dtype, checkpointing=True, base_kl=0.1)
    real = real_peaks(folder, tmp_path / "out", **settings)
    planned = planned_peaks(folder, **settings)
    assert planned["training_step"] == pytest.approx(real["training_step"], rel=0.02)
    without = planned_peaks(folder, **settings | {"base_kl": 0.0})
    assert without["training_step"] < 0.9 * real["training_step"]


def test_the_base_s_hidden_states_are_held_and_scored():
    """16 rows of 512 tokens and 256 states of two bytes each; the base's pass runs where the loss has no other."""
    parts = [
        planned("--loss_type=nll", "--max_length=512", *more, gpu_bytes=24 * 2**30).parts
        for more in ([], ["--base_kl=0.1"])
    ]
    assert parts[1]["batch"] - parts[0]["batch"] == 16 * 512 * 256 * 2
    assert parts[0]["scoring pass"] == 0 < parts[1]["scoring pass"]


def test_a_model_of_a_few_layers_stands_for_all():
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    shape = {"model_type": "gemma3_text", **WIDE, "num_hidden_layers": 5, "layer_types": kinds, "vocab_size": 300}
    config = read_shape(shape)
    lora = LoraArguments(lora_target_modules=["q_proj", "up_proj"])

    def build(config):
        return build_skeleton(config, ModelArguments(), lora, torch.bfloat16)

    target, batch = Target("cuda", (8, 6), torch.bfloat16), Batch(2, 64, True)
    whole = training_bytes(build(config), batch, target, checkpointing=1, offloading=False)
    passes = Passes(config, build, lora, target)
    extended = passes.measure(batch, None, checkpointing=1, offloading=False).training
    assert extended == whole
    assert sorted(passes._models) == [2, 3]
    named = LoraArguments(lora_target_modules=r".*layers\.[34]\.mlp\.up_proj")
    assert Passes(config, build, named, target)._short(1, False) == (5, 5)


def test_layers_of_several_kinds_are_taken_by_whole_periods():
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 3
    shape = {"model_type": "qwen3_5_text", **WIDE, "num_hidden_layers": 9, "layer_types": kinds, "vocab_size": 300}
    config = read_shape(shape | {"num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2})
    target, lora = Target("cuda", (8, 6), torch.bfloat16), LoraArguments(lora_target_modules=["q_proj", "in_proj_qkv"])

    def build(config):
        return build_skeleton(config, ModelArguments(), lora, torch.bfloat16)

    passes = Passes(config, build, lora, target)
    assert passes._short(1, False) == (3, 6) and passes._short(2, False) == (9, 9)
    batch = Batch(1, 64, False)
    whole = training_bytes(build(config), batch, target, checkpointing=1, offloading=False)
    assert passes.measure(batch, None, checkpointing=1, offloading=False).training == whole


def test_layers_with_experts_may_come_after_some_without():
    shape = {"model_type": "glm4_moe", **WIDE, "num_hidden_layers": 6, "first_k_dense_replace": 3, "vocab_size": 300}
    shape |= {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 256, "num_experts_per_tok": 4}
    config = read_shape(shape)
    target, lora = Target("cuda", (8, 6), torch.bfloat16), LoraArguments(lora_r=4)

    def build(config):
        return build_skeleton(config, ModelArguments(), lora, torch.bfloat16)

    batch = Batch(1, 64, False)
    passes = Passes(config, build, lora, target)
    assert passes._short(1, False) == (4, 5)
    whole = training_bytes(build(config), batch, target, checkpointing=None, offloading=False)
    assert passes.measure(batch, None, checkpointing=None, offloading=False).training == whole


def test_shortened_configs_keep_lists_by_layer_in_step():
    config = read_shape(known_shapes()["huggingfacetb/smollm3-3b"]["config"])
    short = shortened(config, 3)
    assert short.num_hidden_layers == len(short.layer_types) == len(short.no_rope_layers) == 3
    assert config.num_hidden_layers == len(config.no_rope_layers) == 36


# --- what only CUDA does ---


def cuda_step(batch: Batch, capability=(8, 6), offloading=False, tiled=False, **changes):
    few = {**WIDE, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 300}
    config = read_shape({"model_type": "llama", **few, **changes})
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    model = build_skeleton(config, ModelArguments(), LoraArguments(), dtype, tiled_mlp=tiled)
    target = Target("cuda", capability, dtype)
    return training_bytes(model, batch, target, checkpointing=1, offloading=offloading)


@pytest.mark.parametrize("capability", [(8, 6), (7, 5)])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_attention_without_a_mask_needs_no_memory_of_length_squared(capability, key_heads):
    # torch's memory-efficient kernel takes no grouped queries: qpsft.model.attention
    def needed(length):
        return cuda_step(Batch(1, length, False), capability, num_key_value_heads=key_heads).layers_backward

    assert needed(2048) / needed(1024) < 2.1


def test_a_mask_is_quadratic_and_small_beside_scores():
    one, two = (cuda_step(Batch(1, length, True), (7, 5)).layers_backward for length in (1024, 2048))
    assert two / one < 2.5


def test_offloading_moves_layer_inputs_to_the_host():
    batch = Batch(1, 256, False)
    here, away = (cuda_step(batch, offloading=on, num_hidden_layers=12) for on in (False, True))
    inputs = 12 * 256 * 128 * 2
    assert here.offloaded == 0 and inputs <= away.offloaded < 1.3 * inputs
    assert 7 <= (here.saved - away.saved) / (256 * 128 * 2) <= 9  # five are still on the device when the forward ends


def test_a_tile_that_is_computed_again_does_not_go_to_the_host():
    batch, wide = Batch(1, 8192, False), {"intermediate_size": 2048, "num_hidden_layers": 8}
    whole, tiles = (cuda_step(batch, offloading=True, tiled=on, **wide) for on in (False, True))
    assert 0 < tiles.offloaded < 1.1 * whole.offloaded


def test_tiles_of_the_mlp_save_its_wide_intermediate():
    batch = Batch(1, 8192, False)
    whole, tiles = (cuda_step(batch, tiled=on, intermediate_size=2048).layers_backward for on in (False, True))
    assert whole - tiles > 8192 * 2048 * 2  # at least one of the wide tensors
    short = Batch(1, 1024, False)
    assert cuda_step(short, tiled=True) == cuda_step(short)


@pytest.mark.parametrize(
    ("nbytes", "counted"),
    [(1, 512), (512, 512), (3_000_000, 3_000_320), (10 * 2**20, 10 * 2**20), (11 * 2**20 + 2**19, 12 * 2**20),
     (10 * 2**20 + 2**18, 10 * 2**20 + 2**18)],
)  # fmt: skip
def test_blocks_of_the_cuda_allocator(nbytes, counted):
    assert cuda_block(nbytes) == counted


def test_live_bytes_counts_storages_once_and_until_they_are_freed():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.empty(256)
        b = a.view(2, 128).t()
        before.add_(1)
        before[10:20].mul_(2)
        assert live.now == 1024
        c = a + 1
        del a
        assert live.now == 2048  # the view holds it
        del b
        assert (live.now, live.peak) == (1024, 2048)
        live.mark()
        assert live.peak == 1024
        del c
    assert live.now == 0


# --- shapes ---


def test_known_shapes_have_the_published_number_of_weights():
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    seen = set()
    for entry in known_shapes().values():
        if entry["variant"] == 0 and entry["parameters"] not in seen:
            seen.add(entry["parameters"])
            with torch.device("meta"), no_init_weights():
                model = AutoModelForCausalLM.from_config(read_shape(entry["config"]))
                model.tie_weights()
            assert sum(p.numel() for p in model.parameters()) == entry["parameters"], entry["id"]
    assert len(seen) > 20


def test_smaller_models_are_of_the_same_family_and_kind():
    assert smaller_models("Qwen/Qwen2.5-3B-Instruct") == ["Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"]
    assert smaller_models("meta-llama/Llama-3.2-1B") == smaller_models("nobody/nothing") == []


def test_a_config_that_is_no_model_is_an_error():
    with pytest.raises(BaseModelError, match="cannot be read"):
        read_shape({"model_type": "llama", "hidden_size": "wide"})
    config = read_shape({"model_type": "llama", **WIDE, "vocab_size": 300})
    config.hidden_size = -4
    with pytest.raises(BaseModelError, match="No causal language model"):
        build_skeleton(config, ModelArguments(), LoraArguments(), torch.float32)
