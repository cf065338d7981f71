"""The tiled MLP is the MLP: values, gradients of adapter and input, and its memory."""

import pytest
import torch
from peft import get_peft_model
from small_runs import gradients, largest_difference, make_lora, make_rows, make_trainer, policy
from tiny_models import save_tiny_model

from qpsft.model import tiled_mlp
from qpsft.model.base import load_base
from qpsft.model.tiled_mlp import is_tiled, tile_mlps
from qpsft.plan.live_bytes import LiveBytes


@pytest.fixture
def short_tiles(monkeypatch):
    monkeypatch.setattr(tiled_mlp, "TILE", 8)


def adapted(folder, checkpointing=None, **lora):
    torch.manual_seed(1)
    model, _ = load_base(folder, verbose=False)
    model = get_peft_model(model, make_lora(init_lora_weights=False, target_modules="all-linear", **lora))
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
        model.enable_input_require_grads()
    return model.train()


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    result = loss.detach(), gradients(model)
    model.zero_grad()
    return result


def watch_mlp(model, layer=0):
    """Records (tokens, with gradient) of every forward of an MLP's first linear layer."""
    seen = []
    mlp = next(m for name, m in model.named_modules() if name.endswith(f"layers.{layer}.mlp"))
    linear = next(m for m in mlp.modules() if hasattr(m, "base_layer"))
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_values_and_gradients_are_those_of_the_whole_mlp(base, short_tiles, checkpointing, lora):
    model = adapted(base, checkpointing, **lora)
    ids = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    seen = watch_mlp(model)
    loss, whole = loss_and_gradients(model, batch)
    assert set(seen) == {42}
    seen.clear()
    assert len(tile_mlps(model)) == len(tile_mlps(model)) == 2  # twice is once
    tiled_loss, tiled = loss_and_gradients(model, batch)
    assert set(seen) == {7}  # 42 tokens in six tiles of at most 8
    assert (tiled_loss - loss).abs() < 1e-6
    assert largest_difference(tiled, whole) < 1e-5 * max(g.abs().max() for g in whole.values())
    assert any("mlp" in name and g.abs().max() > 0 for name, g in whole.items())
    with torch.no_grad():
        seen.clear()
        assert (model(**batch).loss - loss).abs() < 1e-6
        assert seen == [7] * 6


def test_under_gradient_checkpointing_the_tiles_cost_no_forward_more(base, short_tiles):
    ids = torch.randint(3, 128, (1, 48))
    model = adapted(base, "non-reentrant")
    seen = watch_mlp(model)
    loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    whole = sum(seen)
    tile_mlps(model)
    seen.clear()
    loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert sum(seen) == whole == 2 * 48
    assert seen == [8] * 12


def test_dropout_draws_the_same_numbers_again(base, short_tiles):
    """The gradient is that of the very forward that was made: the difference quotient along it, with the same seed."""
    model = adapted(base, "non-reentrant", lora_dropout=0.5)
    tile_mlps(model)
    ids = torch.randint(3, 128, (1, 48), generator=torch.Generator().manual_seed(0))

    def loss():
        torch.manual_seed(5)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss().backward()
    along = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "mlp" in name}
    norm = sum(g.double().square().sum().item() for g in along.values()) ** 0.5
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in along:
                    p.add_(along[name], alpha=step / norm)
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(norm, rel=1e-2)


def test_short_rows_are_run_whole(base):
    assert not is_tiled(4095) and is_tiled(4096)
    model = adapted(base)
    tile_mlps(model)
    seen = watch_mlp(model)
    with torch.no_grad():
        model(torch.randint(3, 128, (40, 128)))  # many tokens in short rows
    assert seen == [40 * 128]


def test_the_wide_intermediate_never_exists_for_the_whole_row(short_tiles, tmp_path):
    save_tiny_model(tmp_path, intermediate_size=2048, max_position_embeddings=256)
    ids = torch.randint(3, 180, (1, 128))

    def peak(model):
        with LiveBytes() as live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return live.peak

    model = adapted(tmp_path, "non-reentrant")
    peak(model)
    whole = peak(model)
    tile_mlps(model)
    assert peak(model) < 0.6 * whole and whole > 128 * 2048 * 4 * 4


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_hooks_on_saved_tensors_do_not_reach_a_tiles_graph(base, short_tiles, checkpointing):
    """TRL's activation offloading has such hooks in force in the backward too: a tile would go to the host and back."""
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    ids = torch.randint(3, 128, (1, 48), generator=torch.Generator().manual_seed(0))
    model = adapted(base, checkpointing)
    tile_mlps(model)
    _, plain = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        in_forward = len(packed)
        loss.backward()
    assert in_forward > 0 and len(packed) == in_forward
    hooked = gradients(model)
    assert plain.keys() == hooked.keys() and all(torch.equal(plain[name], hooked[name]) for name in plain)


SIZES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "bloom": {"n_layer": 2, "n_head": 4},  # whose MLP adds the residual itself: forward(x, residual)
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
}


@pytest.mark.parametrize(
    ("model_type", "count"), [("qwen2", 2), ("gemma2", 2), ("gpt_neox", 2), ("qwen3_moe", 0), ("bloom", 0), ("mpt", 0)]
)
def test_which_mlps_are_tiled(tmp_path, model_type, count):
    save_tiny_model(tmp_path, model_type, **SIZES.get(model_type, {}))
    assert len(tile_mlps(load_base(tmp_path, verbose=False, quantization="none")[0])) == count


def liger(model, config=None):
    """What Liger does to the MLPs of a model that is there already: a forward of its own, bound to the instance."""

    def swiglu(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    for module in model.modules():
        if hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            module.__dict__["forward"] = swiglu.__get__(module, type(module))


@pytest.mark.parametrize("before", [False, True], ids=["tiles first", "Liger first"])
def test_with_liger_long_rows_are_tiled_all_the_same(base, tmp_path, short_tiles, monkeypatch, before):
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", liger)  # which is called when training begins
    rows = make_rows(24, longest=40)
    model, _ = load_base(base, verbose=False)
    if before:
        liger(model)
    settings = {"use_liger_kernel": True, "max_steps": 2}
    trainer = make_trainer(base, tmp_path / "out", model=model, lora=make_lora(), rows=rows, **settings)
    seen = watch_mlp(trainer.model)
    trainer.train()
    assert any("swiglu" in repr(m.forward) for m in trainer.model.modules())  # it is Liger's forward that is tiled
    assert max(seen) < 32  # two tiles are 16 tokens of a row, and there are two rows


def test_runs_with_long_rows_use_it_unless_told_otherwise(base, tmp_path, short_tiles):
    def train(name, **settings):
        trainer = make_trainer(
            base, tmp_path / name, rows=make_rows(24, longest=40), learning_rate=1e-3, adam_epsilon=1e-4, **settings
        )
        seen = watch_mlp(trainer.model)
        trainer.train()
        return policy(trainer.model), seen

    tiled, seen_tiled = train("tiled")
    whole, seen_whole = train("whole", tiled_mlp=False)
    assert max(seen_whole) > 40 and max(seen_tiled) < 32  # a batch of rows shorter than two tiles is run whole
    assert largest_difference(tiled, whole) < 1e-5
