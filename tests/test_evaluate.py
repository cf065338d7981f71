"""evaluate(): every number against one computed apart, the model left as found, and rows that cannot be evaluated."""

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

from qpsft.data import built_in
from qpsft.errors import DataError
from qpsft.evaluate import evaluate
from qpsft.evaluate.likelihood import text_statistics
from qpsft.evaluate.rows import duplicates
from qpsft.model.adapter import adapter_off, add_adapter
from qpsft.model.base import load_base
from qpsft.recipe.arguments import LoraArguments

ROWS = built_in.out_of_domain("test", 12)["shorter_a"]
QUICK = {"k": 4, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def adapted():
    """The demo base with an adapter that changes it, and its tokenizer."""
    model, tokenizer = load_base("demo", device="cpu", verbose=False)
    torch.manual_seed(0)
    model = add_adapter(model, LoraArguments(lora_r=4, lora_alpha=32))  # a scale at which drift is measurable
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval(), tokenizer


def chat_ids(tokenizer, row, completion_ids=None):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    return prompt, completion_ids


def reference_distributions(model, tokenizer, texts):
    """Next-token log-probabilities at the completion's positions, one forward per text, float64."""
    with torch.no_grad():
        for prompt, completion in texts:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            yield logits.double().log_softmax(-1), torch.tensor(completion)


def test_likelihood_and_drift_equal_a_computation_row_by_row(adapted):
    model, tokenizer = adapted
    found = evaluate(model, tokenizer, ROWS, **QUICK)
    base, _ = load_base("demo", device="cpu", verbose=False)
    texts = []
    for row in ROWS:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        texts.append((prompt, whole[len(prompt) :]))
    policy = list(reference_distributions(model, tokenizer, texts))
    original = list(reference_distributions(base, tokenizer, texts))
    tokens = sum(len(ids) for _, ids in policy)
    nll = -sum(logprobs.gather(1, ids[:, None]).sum() for logprobs, ids in policy)
    entropy = -sum((logprobs.exp() * logprobs).sum() for logprobs, _ in policy)
    kl = sum((p.exp() * (p - q)).sum() for (p, _), (q, _) in zip(policy, original, strict=True))
    assert found["nll"] == pytest.approx(nll.item() / tokens, rel=1e-4)
    assert found["entropy"] == pytest.approx(entropy.item() / tokens, rel=1e-4)
    assert found["kl_text"] == pytest.approx(kl.item() / tokens, rel=1e-3) and found["kl_text"] > 1e-3
    assert sum(found.per_row["num_items"]) == tokens and sum(found.per_row["kl_text"]) == pytest.approx(
        kl.item(), rel=1e-3
    )


def test_drift_on_samples_is_measured_where_the_samples_are(adapted):
    model, tokenizer = adapted
    found = evaluate(model, tokenizer, ROWS, **QUICK, drift_samples=2)
    base, _ = load_base("demo", device="cpu", verbose=False)
    texts = []
    for row, one in zip(ROWS, found.completions, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for text, _ in one.samples[:2]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            texts.append((prompt, ids))
    policy = list(reference_distributions(model, tokenizer, texts))
    original = list(reference_distributions(base, tokenizer, texts))
    kl = sum((p.exp() * (p - q)).sum() for (p, _), (q, _) in zip(policy, original, strict=True)).item()
    tokens = sum(len(ids) for _, ids in texts)
    assert found["length_capped"] == 0.0  # so every sample ends with the stop token
    assert found["kl_samples"] == pytest.approx(kl / tokens, rel=1e-3)
    assert found["kl_samples"] != pytest.approx(found["kl_text"], rel=0.05)


def test_accuracies_are_those_of_the_completions(adapted):
    model, tokenizer = adapted
    found = evaluate(model, tokenizer, ROWS, **QUICK)
    right = [
        [built_in.check(row, text) for text, _ in one.samples] for row, one in zip(ROWS, found.completions, strict=True)
    ]
    greedy = [built_in.check(row, one.greedy[0]) for row, one in zip(ROWS, found.completions, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(greedy)) and found.per_row["accuracy"] == greedy
    assert found["pass@1"] == pytest.approx(np.mean(right))
    assert found["pass@4"] == pytest.approx(np.mean([any(row) for row in right]))
    assert 0 < found["pass@1"] < found["pass@2"] < found["pass@4"] <= 1
    assert found.per_row["samples_right"] == [sum(row) for row in right]
    assert found.counts["completions"] == 5 * len(ROWS) and found.settings["verifier"] == "demo"
    assert found.metrics["accuracy"].low <= found["accuracy"] <= found.metrics["accuracy"].high
    texts = [text for one in found.completions for text, _ in one.samples]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    assert found["length"] == pytest.approx(np.mean(lengths))


def test_the_same_seed_gives_the_same_numbers_and_the_first_rows_theirs(adapted):
    model, tokenizer = adapted
    first = evaluate(model, tokenizer, ROWS, **QUICK)
    again = evaluate(model, tokenizer, ROWS, **QUICK, batch_size=3)
    assert again.completions == first.completions
    for name, estimate in first.metrics.items():
        assert again[name] == pytest.approx(estimate.value, rel=1e-4), name
    few = evaluate(model, tokenizer, ROWS, **QUICK, limit=3)
    assert few.rows == 3 and few.completions == first.completions[:3]
    assert evaluate(model, tokenizer, ROWS, **QUICK, seed=1).completions != first.completions


def test_the_model_is_left_as_it_was(adapted):
    model, tokenizer = adapted
    model.add_adapter("reference", LoraConfig(r=2, target_modules="all-linear"))
    try:
        model.set_adapter("default")
        model.train()
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        assert len(set(before.values())) == 2
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        evaluate(model, tokenizer, ROWS, limit=2, **QUICK)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert model.training and model.active_adapter == "default"
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
        with pytest.raises(KeyError), adapter_off(model):
            raise KeyError
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    finally:
        model.delete_adapter("reference")
        model.eval()


def test_without_an_adapter_there_is_no_drift_and_an_untrained_one_has_none():
    base, tokenizer = load_base("demo", device="cpu", verbose=False)
    plain = evaluate(base, tokenizer, ROWS, limit=4, **QUICK)
    assert not {"kl_text", "kl_samples"} & set(plain.metrics)
    fresh_model = add_adapter(base, LoraArguments(lora_r=4))
    fresh = evaluate(fresh_model, tokenizer, ROWS, limit=4, **QUICK)
    assert fresh["kl_text"] == pytest.approx(0.0, abs=1e-6) and fresh["kl_samples"] == pytest.approx(0.0, abs=1e-6)
    assert fresh["nll"] == pytest.approx(plain["nll"], rel=1e-5)
    assert "kl_text" not in evaluate(fresh_model := base, tokenizer, ROWS, limit=2, drift=False, k=0).metrics, (
        fresh_model
    )


def test_plain_text_has_likelihood_and_drift_only(adapted):
    model, tokenizer = adapted
    texts = [{"text": "reverse: 1234"}, {"text": "sort: 9876"}]
    found = evaluate(model, tokenizer, texts)
    assert set(found.metrics) == {"nll", "mean_token_accuracy", "entropy", "kl_text"} and not found.completions
    assert found.settings["verifier"] is None and sum(found.per_row["num_items"]) == 14


def test_the_likeliest_choice_is_the_answer(adapted):
    model, tokenizer = adapted
    rows = []
    for row in ROWS[:6]:
        right = row["completion"][0]["content"]
        others = [other["completion"][0]["content"] for other in ROWS[6:8]]
        rows.append({"prompt": row["prompt"], "completion": right, "choices": [*others, right]})
    found = evaluate(model, tokenizer, rows)
    hits = []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            turn = [{"role": "assistant", "content": choice}]
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            whole = tokenizer.apply_chat_template(row["prompt"] + turn, return_dict=True)["input_ids"]
            labels = [-100] * len(prompt) + whole[len(prompt) :]
            one = text_statistics(model, [{"input_ids": whole, "labels": labels}])
            sums.append(one["nll"] * one["num_items"])
        hits.append(float(np.argmin(sums) == 2))
    assert found.per_row["accuracy"] == hits and found["accuracy"] == np.mean(hits) > 0.5
    wrong = [{**row, "completion": row["choices"][0]} for row in rows]
    assert evaluate(model, tokenizer, wrong)["accuracy"] == 0.0
    assert not found.completions and "pass@1" not in found.metrics


def test_conversations_are_evaluated_on_their_last_answer(adapted):
    model, tokenizer = adapted
    talks = [{"messages": row["prompt"] + row["completion"]} for row in ROWS[:3]]
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS[:3]]
    of_talks, of_pairs = (evaluate(model, tokenizer, rows, **QUICK) for rows in (talks, pairs))
    assert of_talks.completions == of_pairs.completions and of_talks["nll"] == of_pairs["nll"]
    assert of_talks.settings["verifier"] == "exact"


def test_generation_that_never_stops_reports_the_cap(adapted):
    model, tokenizer = adapted
    with pytest.warns(UserWarning, match=r"30 of 30 completions did not stop within 3 tokens"):
        found = evaluate(model, tokenizer, ROWS, limit=6, k=4, max_new_tokens=3)
    assert found["length_capped"] == found["greedy_length_capped"] == 1.0 and found["length"] == 3.0


def test_references_beyond_the_context_are_counted_and_completions_that_end_there_told_apart(adapted):
    model, tokenizer = adapted
    context = model.config.get_text_config().max_position_embeddings
    long = {"prompt": "1" * (context - 60), "completion": "2" * 100}  # a character is a token here
    with pytest.warns(UserWarning, match=f"before the model's context ended, at {context} tokens with the prompt"):
        found = evaluate(model, tokenizer, [long], k=0, max_new_tokens=90, drift=False)
    assert found.counts["truncated"] == 1 and found.counts["dropped"] == 0
    assert evaluate(model, tokenizer, ROWS[:2], k=0, max_new_tokens=40, drift=False).counts["truncated"] == 0
    with pytest.raises(DataError, match=rf"no row's reference begins within the {context} tokens") as caught:
        evaluate(model, tokenizer, [{"prompt": "1" * context, "completion": "2"}], k=0)
    assert "max_length" not in str(caught.value)


def test_a_verifier_that_never_matches_warns(adapted):
    model, tokenizer = adapted
    rows = [{"prompt": row["prompt"], "completion": "#### 5"} for row in ROWS[:3]]
    with pytest.warns(UserWarning, match="parsed 0 of 6 completions"):
        found = evaluate(model, tokenizer, rows, k=1, max_new_tokens=40)
    assert found.settings["verifier"] == "gsm8k" and found.counts["parsed"] == 0 and found["accuracy"] == 0.0


def test_duplicates_of_training_rows_are_counted(adapted):
    model, tokenizer = adapted
    seen = {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["completion"]}
    as_text = {"prompt": ROWS[1]["prompt"][0]["content"] + " ", "completion": ROWS[1]["completion"][0]["content"]}
    other_answer = {"prompt": ROWS[2]["prompt"], "completion": "no"}
    train = [seen, as_text, other_answer, {"prompt": "unrelated", "completion": "no"}]
    assert duplicates(train, ROWS) == {"duplicate_rows": 2, "duplicate_prompts": 3}
    assert duplicates(train[3:], ROWS) == {"duplicate_rows": 0, "duplicate_prompts": 0}
    found = evaluate(model, tokenizer, ROWS, k=0, max_new_tokens=2, train_rows=train, limit=2, drift=False)
    assert found.counts["duplicate_rows"] == 2 and found.counts["duplicate_prompts"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "2 + 2 ="}], "has prompts but no references: its columns are prompt"),
        ([{"question": "2 + 2 =", "id": 1}], "has prompts but no references"),
        ([{"prompt": "a", "completion": " "}], "row 1: the completion is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no assistant turn"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "starts with its answer"),
        ([], "no row to evaluate on"),
    ],
)
def test_rows_that_cannot_be_evaluated(adapted, rows, message):
    with pytest.raises(DataError, match=message):
        evaluate(*adapted, rows)


def test_rows_longer_than_the_model_are_dropped_and_counted(adapted):
    model, tokenizer = adapted
    long = {"prompt": [{"role": "user", "content": "reverse: 1234 " * 300}], "completion": ROWS[0]["completion"]}
    found = evaluate(model, tokenizer, [long, {k: ROWS[0][k] for k in ("prompt", "completion")}], k=0)
    assert found.rows == 1 and found.counts["dropped"] == 1 and found.completions[0].place == "rows, row 2"


def test_a_good_evaluation_warns_of_nothing(adapted):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(*adapted, ROWS, **QUICK)


def test_a_saved_adapter_measures_the_same(adapted, tmp_path):
    model, tokenizer = adapted
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base("demo", device="cpu", verbose=False)[0], tmp_path)
    one, other = (evaluate(m, tokenizer, ROWS, limit=4, **QUICK) for m in (model, again))
    assert one.completions == other.completions and one["kl_text"] == pytest.approx(other["kl_text"], rel=1e-5)


def test_every_number_is_defined_in_the_documentation(adapted):
    from pathlib import Path

    from qpsft.psft.losses import SUMS

    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    found = evaluate(*adapted, ROWS, limit=2, train_rows=[], **QUICK)
    names = {name.replace("pass@", "pass@k")[:6] if "pass@" in name else name for name in found.metrics}
    logged = {*SUMS, "ratio_max", "grad_norm", "loss", "tokens_per_second", "num_tokens"}
    undefined = {name for name in {*names, *found.counts, *logged} if f"`{name}`" not in text}
    assert not undefined and "pass@k" in names


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"k": -1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(adapted, settings):
    with pytest.raises(DataError, match="temperature must be above 0, k not negative and max_new_tokens at least 1"):
        evaluate(*adapted, ROWS, **settings)
