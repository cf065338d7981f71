"""Completions: the same as transformers', whatever they are decoded with, and samples from the model's distribution."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, save_tiny_model

from qpsft.evaluate.likelihood import row_sums
from qpsft.model import generation
from qpsft.model.base import load_base
from qpsft.model.generation import generate

STOP = 7
GB = 10**9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_base(save_tiny_model(tmp_path_factory.mktemp("tiny")), device="cpu", verbose=False)[0]


def ragged_prompts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 180, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("gpt2", {}), ("gemma2", {}), ("mistral", {"sliding_window": 8}), ("qwen3", {})],
)
def test_greedy_completions_are_those_of_transformers(model_type, settings, tmp_path):
    folder = save_tiny_model(tmp_path / "m", model_type, **settings)
    model, _ = load_base(folder, quantization="none", dtype="float32", device="cpu", verbose=False)
    prompts = ragged_prompts()
    found = generate(model, prompts, stop_ids={STOP}, samples=1, max_new_tokens=20)
    lengths = set()
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": STOP, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        assert one.greedy.token_ids == expected
        assert one.greedy.stopped == (expected[-1] == STOP)
        lengths.add(tuple(expected))
    assert len(lengths) > 3


def test_samples_belong_to_seed_row_sample_and_position(tiny):
    prompts = ragged_prompts()
    settings = {"stop_ids": {STOP}, "samples": 4, "max_new_tokens": 24, "seed": 5}
    whole = [[sample.token_ids for sample in one.samples] for one in generate(tiny, prompts, **settings)]
    assert any(ids[-1] == STOP and len(ids) < 24 for one in whole for ids in one)  # rows leave the batch
    for changed in ({"batch_size": 1}, {"batch_size": 7}, {"greedy": False}):
        again = generate(tiny, prompts, **settings | changed)
        assert [[sample.token_ids for sample in one.samples] for one in again] == whole, changed
    fewer = generate(tiny, prompts[:3], **settings | {"samples": 2, "max_new_tokens": 10})
    assert [[s.token_ids for s in one.samples] for one in fewer] == [[s[:10] for s in one[:2]] for one in whole[:3]]
    other = generate(tiny, prompts, **settings | {"seed": 6})
    assert [[sample.token_ids for sample in one.samples] for one in other] != whole
    assert len({tuple(ids) for one in whole for ids in one}) == 24


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(tiny, temperature):
    prompt = ragged_prompts()[2]
    samples = 4000
    found = generate(
        tiny, [prompt], stop_ids=(), greedy=False, samples=samples, temperature=temperature, max_new_tokens=1
    )
    counts = np.bincount([sample.token_ids[0] for sample in found[0].samples], minlength=VOCABULARY)
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt])).logits[0, -1].double()
    wanted, other = ((logits / t).softmax(-1).numpy() for t in (temperature, 1.5 - temperature))

    def distance(probabilities):
        return ((counts - samples * probabilities) ** 2 / (samples * probabilities)).sum()

    degrees = VOCABULARY - 1
    assert distance(wanted) < degrees + 5 * (2 * degrees) ** 0.5
    assert distance(other) > 2 * degrees  # the test can tell temperatures apart


def test_entropy_is_that_of_the_distributions_the_tokens_came_from(tiny):
    prompts = ragged_prompts()
    found = generate(tiny, prompts, stop_ids={STOP}, samples=2, temperature=0.7, max_new_tokens=16)
    for prompt, one in zip(prompts, found, strict=True):
        for completion in (one.greedy, *one.samples):
            row = {"input_ids": prompt + completion.token_ids, "labels": [-100] * len(prompt) + completion.token_ids}
            sums = row_sums(tiny, [row])
            assert sums["num_items"][0] == len(completion.token_ids)
            assert completion.entropy == pytest.approx(sums["entropy"][0], rel=1e-4)


def test_completions_end_with_a_stop_token_at_the_cap_or_at_the_models_last_position(tiny):
    prompts = ragged_prompts()
    for one in generate(tiny, prompts, stop_ids=range(8, 180), samples=3, max_new_tokens=30):
        assert all(len(c.token_ids) == 1 or set(c.token_ids[:-1]).isdisjoint(range(8, 180)) for c in one.samples)
    never = generate(tiny, prompts, stop_ids=(), samples=2, max_new_tokens=9)
    assert all(len(c.token_ids) == 9 and not c.stopped for one in never for c in (one.greedy, *one.samples))
    long_prompt = ragged_prompts()[0] * 20  # 60 of the model's 64 positions
    assert len(generate(tiny, [long_prompt], stop_ids=(), max_new_tokens=30)[0].greedy.token_ids) == 4


def test_nothing_to_do_is_nothing_done(tiny):
    assert generate(tiny, [], stop_ids=(), samples=2) == []
    assert generate(tiny, [[1, 2]], stop_ids=(), greedy=False)[0].greedy is None
    with pytest.raises(ValueError, match="temperature"):
        generate(tiny, [[1, 2]], stop_ids=(), samples=1, temperature=0)


def test_the_mode_of_the_model_is_kept(tiny):
    for training in (True, False):
        tiny.train(training)
        generate(tiny, [[1, 2, 3]], stop_ids=(), max_new_tokens=2)
        assert tiny.training == training


def test_what_torch_holds_in_reserve_is_room_for_sequences(tiny, monkeypatch):
    on_a_card = SimpleNamespace(config=tiny.config, dtype=torch.bfloat16, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GB // 1000, 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB)
    short = generation._fitting_sequences(on_a_card, 64)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB + 9 * GB // 1000)
    assert generation._fitting_sequences(on_a_card, 64) == pytest.approx(10 * short, abs=10)
