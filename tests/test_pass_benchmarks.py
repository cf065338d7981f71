"""`noise_floor.py`, `packing.py` and `scoring_groups.py` of benchmarks/ at tiny size: they measure what they say."""

import json
import sys

import noise_floor
import packing
import pytest
import scoring_groups
import torch
from transformers import LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

pytestmark = pytest.mark.bench


def options(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    return module.options()


def test_the_noise_floor_is_0_as_trained_and_rounding_in_larger_batches(monkeypatch, tmp_path, capsys):
    file = tmp_path / "results" / "noise.json"
    flags = ["--rows=8", "--windows=1", "--micro_batches", "1", "4", "--dtypes", "float32", "bfloat16+autocast"]
    args = options(noise_floor, monkeypatch, *flags, f"--json={file}")
    assert noise_floor.main() == 0
    record = json.loads(file.read_text())
    results = {(r["dtype"], r["micro_batch"]): r for r in record["results"]}
    assert len(results) == 4 and record["command"].startswith("python benchmarks/noise_floor.py --rows=8")
    assert all(0 <= r["median"] <= r["p99.9"] <= r["max"] < 1 for r in results.values())
    assert results["float32", 4]["max"] < 1e-4 < 1e-3 < results["bfloat16+autocast", 4]["max"]
    assert results["float32", 1]["tokens"] == results["float32", 4]["tokens"] > 100
    assert "bfloat16+autocast" in capsys.readouterr().out

    args = options(noise_floor, monkeypatch, *flags, "--score_token_budget=0")
    assert {r["max"] for r in noise_floor.measure(args)} == {0.0}


def test_packing_is_measured_in_real_tokens(monkeypatch, base, tmp_path):
    rows = [{"question": "w5 w6 " * (i % 4 + 1), "answer": "w7 " * (1 + 5 * (i % 3))} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model={base}", f"--data={data}", "--max_length=32", "--micro_batch=2", "--accumulation=2"]
    result = packing.measure(options(packing, monkeypatch, *flags, "--steps=3", "--rounds=2", "--reference_steps=2"))
    assert set(result["tokens_per_second"]) == {"padded", "grouped", "packed"}
    assert all(rate > 0 for rate in result["tokens_per_second"].values()) and result["over_padded"]["padded"] == 1
    assert len(result["over_padded_by_round"]["packed"]) == 2
    assert result["rows"]["padded"] == 24 > result["rows"]["packed"] >= 8
    assert all(0 <= share < 0.5 for share in result["padding_share"].values())
    words = [len(f"{row['question']} {row['answer']}".split()) for row in rows]
    assert result["row_length"][100] == max(words) + 1  # and the end-of-sequence token


def test_padding_is_counted_by_micro_batch():
    class Trainer:
        train_dataset = [{"input_ids": [0] * n} for n in (3, 5, 2, 8)]
        args = type("Args", (), {"per_device_train_batch_size": 2})

        def _get_schedule(self):
            return type("Schedule", (), {"rows": lambda self, step: [3, 0, 1, 2]})()

    assert packing.tokens_of(Trainer(), 1) == (18, 2 * 8 + 2 * 5)


def test_ways_of_scoring_agree_and_are_timed_on_the_same_windows(base, tmp_path, capsys):
    rows = [{"question": "w5 w6 " * (i % 4 + 1), "answer": "w7 " * (1 + 5 * (i % 3))} for i in range(64)]
    data, record = tmp_path / "rows.jsonl", tmp_path / "record.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--tokenizer={base}", f"--data={data}", f"--json={record}", "--models=small,llama", "--hidden=64"]
    assert scoring_groups.main([*flags, "--cells=2x2", "--blocks=1", "--max_length=32"]) == 0
    small, llama = json.loads(record.read_text())["results"]
    for result in (small, llama):
        assert set(result["scoring_share"]) == {"sorted", "two", "one"} and result["costs_more"]["sorted"] == 0
        assert all(0 < share < 0.9 for share in result["scoring_share"].values())
        assert result["largest_difference_nats"]["sorted"] == 0 < result["largest_difference_nats"]["one"] < 1e-4
        extra = result["scoring_share"]["two"] - result["scoring_share"]["sorted"]
        assert result["costs_more_by_block"]["two"] == [pytest.approx(extra)]
    assert small["parameters"] == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(base).parameters())
    assert "2 x 2: a step" in capsys.readouterr().out


def test_two_micro_batches_are_scored_as_one_and_given_back_apart():
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    lengths = [[3, 2], [6, 1], [4]]
    batches = [collate([{"input_ids": [n] * n, "labels": [n] * n} for n in batch]) for batch in lengths]
    seen = []

    def score(merged):
        seen.extend(batch["input_ids"].shape for batch in merged)
        return [batch["labels"][:, 1:].float() for batch in merged]

    scores = scoring_groups.two_at_a_time(score, batches)
    assert seen == [(4, 6), (1, 4)]
    assert all(torch.equal(s, b["labels"][:, 1:].float()) for s, b in zip(scores, batches, strict=True))
