"""The fused LoRA linear is PEFT's, to 16 bits' rounding; where it would not be, PEFT's own code runs."""

import contextlib
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_runs import gradients, make_lora, make_trainer, policy, same
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from qpsft.model.base import load_base
from qpsft.model.lora_linear import _FusedForward, fused_lora_linears
from qpsft.psft.reference import ReferencePolicy

ROUNDING = 2**-7  # two units in the last place of bfloat16


def adapted(folder, dtype="bfloat16", checkpointing=False, quantization="nf4", **lora):
    torch.manual_seed(1)
    model, _ = load_base(folder, dtype=dtype, quantization=quantization, verbose=False)
    model = get_peft_model(model, make_lora(**{"init_lora_weights": False, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()


def loss_and_gradients(model, dtype=torch.bfloat16):
    ids = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    with autocast(dtype):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    result = loss.detach(), gradients(model)
    model.zero_grad()
    return result


def close(ours, theirs, rounding=ROUNDING):
    """By the norm of the difference, relative to the tensor's own."""
    return (ours.float() - theirs.float()).norm() <= rounding * theirs.float().norm()


class Operators(TorchDispatchMode):
    """Counts operators, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def one_layer(layer, x, weight):
    """Output and the gradients of x, A and B."""
    x = x.detach().requires_grad_()
    with autocast():
        y = layer(x)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y.detach(), *torch.autograd.grad((y.float() * weight).sum(), [x, *trained])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16-bit x", "float32 x"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_values_and_gradients_of_a_layer_are_pefts(base, quantization, dtype):
    model = adapted(base, quantization=quantization, lora_alpha=6)  # a scale that is no power of two
    layer = layers(model)[0]
    x, weight = torch.randn(2, 9, 64).to(dtype), torch.randn(2, 9, 64)
    theirs = one_layer(layer, x, weight)
    with fused_lora_linears(model), Operators() as operators:
        ours = one_layer(layer, x, weight)
    assert "clone" not in operators.counts
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert close(one, other)
    assert ours[2].dtype == ours[3].dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_whole_model_trains_as_under_peft_with_and_without_checkpointing(base, quantization, checkpointing):
    model = adapted(base, quantization=quantization, checkpointing=checkpointing)
    loss, theirs = loss_and_gradients(model)
    with fused_lora_linears(model) as names:
        assert len(names) == 14
        fused_loss, ours = loss_and_gradients(model)
        again_loss, again = loss_and_gradients(model)
    assert (fused_loss - loss).abs() < 0.02
    exact = adapted(base, dtype="float32", quantization=quantization)
    _, right = loss_and_gradients(exact, dtype=None)
    for name in right:  # no further from float32's than PEFT's are, which the layers above have blurred
        error, of_peft = (ours[name] - right[name]).norm(), (theirs[name] - right[name]).norm()
        assert error <= 1.5 * of_peft + ROUNDING * right[name].norm(), name
    assert fused_loss == again_loss and same(ours, again)


def test_checkpointing_does_not_change_a_bit(base):
    results = []
    for checkpointing in (False, True):
        model = adapted(base, checkpointing=checkpointing)
        with fused_lora_linears(model):
            results.append(loss_and_gradients(model))
    assert same(*results)


def test_in_float32_nothing_changes_bit_for_bit(base):
    model = adapted(base, dtype="float32")
    theirs = loss_and_gradients(model, dtype=None)
    with fused_lora_linears(model):
        assert same(theirs, loss_and_gradients(model, dtype=None))


CASES = {
    "DoRA": dict(use_dora=True),
    "dropout": dict(lora_dropout=0.5),
    "lora_bias": dict(lora_bias=True),
}


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES.keys())
def test_what_is_more_than_two_matrices_is_left_to_peft(base, lora):
    model = adapted(base, **lora)
    torch.manual_seed(5)
    theirs = loss_and_gradients(model)
    torch.manual_seed(5)
    with fused_lora_linears(model):
        assert same(theirs, loss_and_gradients(model))


@pytest.mark.parametrize("state", ["evaluation", "several adapters", "adapter off", "merged"])
def test_what_is_not_training_one_adapter_is_left_to_peft(base, state, monkeypatch):
    model = adapted(base, quantization="none")
    if state == "several adapters":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "other"])
    if state == "evaluation":
        model.eval()
    if state == "merged":
        model.merge_adapter()
    ids = torch.randint(3, 128, (2, 9))
    off = model.disable_adapter() if state == "adapter off" else contextlib.nullcontext()
    with off, torch.no_grad(), autocast():
        theirs = model(input_ids=ids).logits
        with fused_lora_linears(model):
            assert torch.equal(model(input_ids=ids).logits, theirs)


def test_the_copies_are_made_once_per_step(base):
    model = adapted(base)
    layer = layers(model)[0]
    x = torch.randn(1, 5, 64).bfloat16()
    optimizer = SGD(model.parameters(), lr=1.0)
    casts = []
    with fused_lora_linears(model), autocast():
        for _ in range(2):
            for _ in range(3):  # micro-batches
                with Operators() as operators:
                    layer(x).sum().backward()
                casts.append(operators.counts["_to_copy"])
            optimizer.step()
            optimizer.zero_grad()
        assert casts[0] - casts[1] == casts[3] - casts[4] == 2 and casts[1] == casts[2] == casts[4]
        assert torch.equal(layer(x), layer.forward(x))
        after = layer(x)
    with autocast():
        assert close(after, layer(x))


def test_a_step_behind_autograds_back_renews_the_copies(base):
    """bitsandbytes' optimizers write through pointers, so no version of a tensor tells."""

    class Hidden(SGD):
        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(2.0)

    model = adapted(base)
    layer = layers(model)[0]
    x = torch.randn(1, 5, 64).bfloat16()
    optimizer = Hidden([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with torch.no_grad(), autocast(), fused_lora_linears(model):
        before = layer(x)
        optimizer.step()
        after = layer(x)
    with torch.no_grad(), autocast():
        assert close(after, layer(x)) and not close(after, before)


def test_the_reference_is_computed_with_its_own_copies(base):
    model = adapted(base)
    reference = ReferencePolicy(model)
    ids = torch.randint(3, 128, (1, 9))
    with torch.no_grad(), autocast(), fused_lora_linears(model):
        before = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        moved = model(input_ids=ids).logits
        assert not torch.equal(moved, before)
        with reference.active():
            assert torch.equal(model(input_ids=ids).logits, before)
        reference.snapshot()  # other numbers in the same storage
        with reference.active():
            assert torch.equal(model(input_ids=ids).logits, moved)
        assert torch.equal(model(input_ids=ids).logits, moved)


def test_nothing_of_it_is_left_or_saved(base):
    model = adapted(base)
    before = list(model.state_dict())
    with pytest.raises(ZeroDivisionError), fused_lora_linears(model):
        loss_and_gradients(model)
        assert list(model.state_dict()) == before
        raise ZeroDivisionError
    assert not any("forward" in layer.__dict__ for layer in layers(model))


def test_training_in_bfloat16_runs_fused_and_leaves_no_trace(base, tmp_path, monkeypatch):
    calls = Counter()
    original = _FusedForward._in_16_bits
    monkeypatch.setattr(_FusedForward, "_in_16_bits", lambda *args: calls.update(fused=1) or original(*args))
    trainer = make_trainer(base, tmp_path, model=adapted(base), bf16=True, fused_lora=True, max_steps=4)
    start = policy(trainer.model)
    trainer.train()
    assert calls["fused"] > 0 and not same(start, policy(trainer.model))
    assert not any("forward" in layer.__dict__ for layer in layers(trainer.model))
    first = next(line for line in trainer.state.log_history if "ratio_max" in line)
    assert first["ratio_max"] == 1.0  # right after the snapshot, bit for bit
