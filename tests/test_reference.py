"""ReferencePolicy on a 4-bit model: what it copies, what it computes, what it leaves alone."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_runs import MODULES, make_lora, make_rows, policy, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence

from qpsft.errors import TrainingError
from qpsft.model.base import load_base
from qpsft.psft.reference import ReferencePolicy

ADAPTERS = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "bias": dict(bias="lora_only", lora_bias=True),
    "embedding": dict(modules_to_save=["embed_tokens"]),
    "norm": dict(modules_to_save=["norm"]),
}


def adapted(base, adapter_name="default", **lora):
    torch.manual_seed(1)
    model, _ = load_base(base, verbose=False)
    return get_peft_model(model, make_lora(**lora), adapter_name=adapter_name)


def shake(model, seed=2, scale=0.3):
    """Moves every trainable parameter: LoRA's B starts at zero, where many mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.device) * scale)


def collate(rows, left=False):
    def pad(lists, value):
        tensors = [torch.tensor(x) for x in lists]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right")

    ones = [[1] * len(ids) for ids in rows["input_ids"]]
    return {
        "input_ids": pad(rows["input_ids"], 0),
        "attention_mask": pad(ones, 0),
        "labels": pad(rows["labels"], -100),
    }


def ragged_batches(sizes=(1, 3, 2), left=False):
    rows = make_rows(sum(sizes), seed=5)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [collate(rows[start : start + size], left) for start, size in zip(starts, sizes, strict=True)]


@torch.no_grad()
def direct_logprobs(model, batch):
    """The labels' log-probabilities from the full logits, row by row and without padding.

    At the positions that the tokens have in the batch: behind padding a row's rotary angles are other float32 numbers,
    which alone moves a log-probability by up to 2e-5.
    """
    result = torch.zeros(len(batch["labels"]), batch["labels"].shape[1] - 1)
    for r, real in enumerate(batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][r, real], batch["labels"][r, real][1:]
        positions = torch.nonzero(real).flatten().unsqueeze(0)
        logits = model(input_ids=ids.unsqueeze(0), position_ids=positions).logits
        logprobs = logits[0, :-1].float().log_softmax(-1)
        picked = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        picked = picked.masked_fill(labels == -100, 0.0)
        result[r, torch.nonzero(real).flatten()[1:] - 1] = picked
    return result


def base_bytes(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_the_linear_layers_are_nf4_in_these_tests(base):
    import bitsandbytes as bnb

    layers = [m for m in adapted(base).modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * len(MODULES)
    assert {m.weight.quant_type for m in layers} == {"nf4"} and {m.weight.dtype for m in layers} == {torch.uint8}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_copies_everything_an_adapter_has_and_changes_only_at_snapshots(base, kind):
    model = adapted(base, **ADAPTERS[kind])
    reference = ReferencePolicy(model)
    before = policy(model)
    assert same(reference.state_dict(), before)
    wanted = {
        "dora": "lora_magnitude_vector",
        "bias": "lora_B.default.bias",
        "embedding": "embed_tokens.modules_to_save.default.weight",
        "norm": "norm.modules_to_save.default.weight",
    }.get(kind, "lora_A.default.weight")
    assert any(wanted in name for name in reference.state_dict())

    batch = ragged_batches()[1]
    at_snapshot = reference.score([batch])[0]
    shake(model)
    assert same(reference.state_dict(), before) and not same(policy(model), before)
    assert torch.equal(reference.score([batch])[0], at_snapshot)
    assert (direct_logprobs(model, batch) - at_snapshot).abs().max() > 0.1  # the policy itself has moved on

    reference.snapshot()
    assert same(reference.state_dict(), policy(model))
    assert (reference.score([batch])[0] - direct_logprobs(model, batch)).abs().max() < 1e-5


def test_every_part_of_the_copy_is_used_in_scoring(base):
    """A magnitude, a bias or an embedding left out of the swap would go unnoticed where it equals the policy's."""
    for kind in ("dora", "bias", "embedding", "norm"):
        model = adapted(base, **ADAPTERS[kind])
        reference = ReferencePolicy(model)
        batch = ragged_batches()[1]
        before = reference.score([batch])[0]
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                with torch.no_grad():
                    p.mul_(1.7).add_(0.1)
        assert torch.equal(reference.score([batch])[0], before), kind
        reference.snapshot()
        assert (reference.score([batch])[0] - before).abs().max() > 1e-3, kind


def test_it_holds_exactly_one_adapter_s_bytes_and_adds_nothing_to_the_model(base):
    for kind in ("lora", "dora", "embedding"):
        model = adapted(base, **ADAPTERS[kind])
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]]
        reference = ReferencePolicy(model)
        reference.score(ragged_batches(), token_budget=40)
        reference.snapshot()
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        assert reference.nbytes == trained
        assert names == [n for n, _ in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]]
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("budget", [None, 1, 45, 10_000])
def test_scores_equal_a_second_model_with_the_snapshot_s_adapter(base, tmp_path, budget, left):
    model = adapted(base)
    shake(model)
    reference = ReferencePolicy(model)
    model.save_pretrained(tmp_path)
    shake(model, seed=3)

    second = PeftModel.from_pretrained(load_base(base, verbose=False)[0], tmp_path)
    batches = ragged_batches((1, 3, 2, 1), left)
    scores = reference.score(batches, token_budget=budget)
    for batch, score in zip(batches, scores, strict=True):
        assert score.shape == batch["labels"][:, 1:].shape and score.dtype == torch.float32
        assert (score - direct_logprobs(second, batch)).abs().max() < 1e-5
        assert torch.all(score[batch["labels"][:, 1:] == -100] == 0)
        assert torch.all(score[batch["labels"][:, 1:] != -100] < 0)


def test_batches_with_other_keys_are_run_as_they_are(base):
    """Padding-free rows lie end to end; their position_ids keep them apart and must not be taken out of the batch."""
    model = adapted(base)
    shake(model)
    reference = ReferencePolicy(model)
    rows = make_rows(3, seed=5)
    packed = {
        "input_ids": torch.tensor([sum(rows["input_ids"], [])]),
        "labels": torch.tensor([[x for labels in rows["labels"] for x in [-100, *labels[1:]]]]),
        "position_ids": torch.tensor([[i for ids in rows["input_ids"] for i in range(len(ids))]]),
    }
    seen = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    score = reference.score([packed], token_budget=4)[0]
    handle.remove()
    assert seen == [packed["input_ids"].shape]
    separate = collate(rows[:])
    expected = direct_logprobs(model, separate)
    expected = torch.cat([row[: len(ids) - 1] for row, ids in zip(expected, rows["input_ids"], strict=True)])
    starts = packed["position_ids"][0] == 0
    assert (score[0][~starts[1:]] - expected).abs().max() < 1e-5


def test_scoring_batches_respect_the_token_budget_and_are_sorted_by_length(base):
    model = adapted(base)
    reference = ReferencePolicy(model)
    batches = ragged_batches((4, 5, 3))
    lengths = sorted(int(n) for batch in batches for n in batch["attention_mask"].sum(1))
    shapes = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for budget in (1, 30, 64, 10_000):
        shapes.clear()
        reference.score(batches, token_budget=budget)
        assert all(rows * width <= budget or rows == 1 for rows, width in shapes)
        assert [width for _, width in shapes] == sorted(width for _, width in shapes)
        assert sum(rows for rows, _ in shapes) == len(lengths)
        done = 0
        for i, (rows, width) in enumerate(shapes):
            done += rows
            assert width == lengths[done - 1]  # padded to its longest row, no further
            if i + 1 < len(shapes):  # one more row would not have fitted
                assert (rows + 1) * lengths[done] > budget
    handle.remove()
    assert len(shapes) == 1


def test_it_never_takes_gradients(base):
    model = adapted(base)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    reference = ReferencePolicy(model)
    batch = ragged_batches()[1]
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    scores = reference.score([batch], token_budget=50)
    assert not any(s.requires_grad for s in scores)
    assert not any(t.requires_grad for t in reference.state_dict().values())
    assert same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    with reference.active():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def state_of(model):
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {name: p.data_ptr() for name, p in model.named_parameters()},
        list(model.active_adapters),
    )


@pytest.mark.parametrize("adapter_name", ["default", "tuned"])
def test_it_leaves_requires_grad_and_modes_as_it_found_them_on_exceptions_too(base, adapter_name):
    model = adapted(base, adapter_name)
    reference = ReferencePolicy(model)
    shake(model)
    for i, module in enumerate(model.modules()):  # an odd mixture that a blanket train() or eval() would not restore
        module.training = i % 3 == 0
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    state, weights, frozen = state_of(model), policy(model), base_bytes(model)
    batches = ragged_batches()

    reference.score(batches, token_budget=30)
    assert state_of(model) == state

    with pytest.raises(IndexError):
        reference.score([{**batches[0], "input_ids": batches[0]["input_ids"] + 10_000}])
    with pytest.raises(ZeroDivisionError), reference.active():
        raise ZeroDivisionError
    assert state_of(model) == state
    assert same(policy(model), weights) and same(base_bytes(model), frozen)


def test_a_failure_while_switching_restores_the_policy(base, monkeypatch):
    model = adapted(base)
    reference = ReferencePolicy(model)
    shake(model)
    state = state_of(model)
    last = list(reference._copy)[-1]

    class Broken(torch.Tensor):
        def to(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(reference._copy, last, reference._copy[last].as_subclass(Broken))
    with pytest.raises(torch.OutOfMemoryError):
        reference.score(ragged_batches())
    assert state_of(model) == state


def test_it_works_under_another_adapter_name_and_on_a_trained_adapter(base, tmp_path):
    model = adapted(base, "tuned")
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        load_base(base, verbose=False)[0], tmp_path / "tuned", adapter_name="mine", is_trainable=True
    )
    reference = ReferencePolicy(loaded)
    assert all(".mine." in name for name in reference.state_dict())
    batch = ragged_batches()[1]
    trained = direct_logprobs(model, batch)
    assert (reference.score([batch])[0] - trained).abs().max() < 1e-5
    with loaded.disable_adapter():
        assert (direct_logprobs(loaded, batch) - trained).abs().max() > 0.1  # the base alone is another policy


def test_only_the_trainable_adapter_of_two_is_copied(base):
    model = adapted(base, "first")
    model.add_adapter("second", make_lora())
    model.set_adapter("second")
    assert all(".second." in name for name in ReferencePolicy(model).state_dict())


def test_on_a_gpu_the_copy_is_in_host_memory_and_comes_to_the_device_to_score():
    """With tensors that have a device and no data: on a CPU alone too."""
    with FakeTensorMode():
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(3, 3, device="cuda"))
        reference = ReferencePolicy(model)
        assert reference.in_host_memory and reference.state_dict()["weight"].device.type == "cpu"
        with reference.active():
            assert model.weight.device.type == "cuda"
        reference.load_state_dict({"weight": torch.empty(3, 3)})
    on_cpu = torch.nn.Linear(3, 3)
    assert not ReferencePolicy(on_cpu).in_host_memory


@pytest.mark.gpu
def test_on_a_gpu_it_scores_as_the_policy_did_from_pinned_memory(base):
    model = get_peft_model(load_base(base, device="cuda", verbose=False)[0], make_lora(init_lora_weights=False))
    reference, batches = ReferencePolicy(model), [{k: v.cuda() for k, v in b.items()} for b in ragged_batches()]
    assert reference.in_host_memory and all(t.is_pinned() for t in reference.state_dict().values())
    at_snapshot = reference.score(batches)
    shake(model)
    assert same(reference.score(batches), at_snapshot)


def test_state_dict_round_trip_and_refusals(base):
    model = adapted(base)
    shake(model)
    reference = ReferencePolicy(model)
    saved = {name: t.clone() for name, t in reference.state_dict().items()}
    shake(model, seed=3)
    reference.snapshot()
    assert not same(reference.state_dict(), saved)
    reference.load_state_dict(saved)
    assert same(reference.state_dict(), saved)

    name = next(iter(saved))
    with pytest.raises(TrainingError, match=r"1 names differ, such as .*lora_A"):
        reference.load_state_dict({n: t for n, t in saved.items() if n != name})
    with pytest.raises(TrainingError, match=r"shape \(7,\) for .*lora_A"):
        reference.load_state_dict({**saved, name: torch.zeros(7)})
    assert same(reference.state_dict(), saved)  # a refused state changes nothing


def test_a_model_without_trainable_parameters_is_refused(base):
    model, _ = load_base(base, verbose=False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        ReferencePolicy(model)
