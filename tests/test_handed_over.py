"""benchmarks/ppo_start.py and vllm_serve.py: their numbers here; with the marker slow, the programs they start."""

import json

import ppo_start
import pytest
import vllm_serve
from merging import save_peft_adapter

from qpsft.data import built_in
from qpsft.model.base import load_base
from qpsft.verify.measure import Sequence, measure

pytestmark = pytest.mark.bench


def run_of(rewards, before, after):
    points = [
        {"step": 0, "in_domain": 0.1, "right_sampled": before, "out_of_domain": 0.5},
        {"step": len(rewards), "in_domain": 0.6, "right_sampled": after, "out_of_domain": 0.4},
    ]
    return {"points": points, "log": [{"reward": reward} for reward in rewards], "seconds": 1.0}


def test_the_table_has_means_over_seeds_and_differences_paired_by_seed():
    results = {
        "sft": {0: run_of([0.1, 0.3], 0.1, 0.4), 1: run_of([0.3, 0.5], 0.2, 0.6)},
        "psft": {0: run_of([0.3, 0.5], 0.1, 0.5), 1: run_of([0.5, 0.7], 0.2, 0.7)},
    }
    rows = {line.split("  ")[0].strip(): line for line in ppo_start.report(results).splitlines()}
    assert "0.300 ± 0.141" in rows["sft"] and "0.500 ± 0.141" in rows["psft"]  # mean reward
    assert "+0.200 ± 0.000" in rows["psft − sft"] and "+0.100 ± 0.000" in rows["psft − sft"]


def test_rewards_are_smoothed_over_the_updates_before():
    assert ppo_start.smoothed([1, 0, 0, 0, 0, 1]) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 5])


def test_rows_have_every_set_and_no_test_row_is_trained_on(tmp_path):
    ppo_start.write_rows(tmp_path / "rows.jsonl", 4)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["set"] for row in rows} == {"train", "in_domain", *built_in.OUT_OF_DOMAIN}
    trained = {row["prompt"][0]["content"] for row in rows if row["set"] == "train"}
    assert not trained & {row["prompt"][0]["content"] for row in rows if row["set"] != "train"}


@pytest.mark.parametrize("shift, off", [(0.0, 0.0), (0.5, 0.5)])
def test_a_served_model_is_compared_token_by_token(monkeypatch, shift, off):
    model, tokenizer = load_base("demo", quantization="none", dtype="float32", verbose=False)
    texts = vllm_serve.texts_of(model, tokenizer)
    replies = {one.messages[0]["content"]: tokenizer.decode(one.reply, skip_special_tokens=True) for one in texts}

    def asked(address, path, **body):
        """What vLLM would answer, by the same model."""
        if path == "chat/completions":
            text = replies[body["messages"][0]["content"]] + ("other" if shift else "")
            return {"choices": [{"message": {"content": text}}]}
        ids = body["prompt"]
        chosen = measure(model, [Sequence(ids, len(ids))], model.config.vocab_size, model.device).chosen.tolist()
        places = [{str(token): {"logprob": one + shift}} for token, one in zip(ids[1:], chosen, strict=True)]
        return {"choices": [{"prompt_logprobs": [None, *places]}]}

    monkeypatch.setattr(vllm_serve, "asked", asked)
    found = vllm_serve.differences("", "demo", model, tokenizer)
    assert found["max_nats"] == pytest.approx(off, abs=1e-4) and found["mean_nats"] == pytest.approx(off, abs=1e-4)
    assert found["equal_replies"] == (0.0 if shift else 1.0) and found["positions"] > 100


@pytest.mark.slow
def test_ppo_starts_from_a_merged_folder(tmp_path):
    """Needs the environment that ppo_start.py makes."""
    if not (ppo_start.ENVIRONMENT / "made-for.txt").is_file():
        pytest.skip("python benchmarks/ppo_start.py makes its environment")
    flags = ["--arms=sft", "--seeds=1", "--updates=2", "--batch=8", "--test_rows=4", f"--output={tmp_path}"]
    ppo_start.main(flags)
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert len(result["log"]) == 2 and result["versions"]["trl"] == ppo_start.TRL
    assert (tmp_path / "ppo_start.png").stat().st_size > 5000


@pytest.mark.slow
def test_vllm_serves_the_trained_model(tmp_path):
    """Needs the environment that vllm_serve.py makes."""
    if not (vllm_serve.ENVIRONMENT / "made-for.txt").is_file():
        pytest.skip("python benchmarks/vllm_serve.py makes its environment")
    adapter = save_peft_adapter(tmp_path / "adapter", "demo", target_modules=["q_proj", "down_proj"])
    vllm_serve.main([f"--adapter={adapter}", f"--output={tmp_path / 'served.json'}"])
    rows = json.loads((tmp_path / "served.json").read_text())["demo"]["rows"]
    assert all(row["max_nats"] < vllm_serve.CLOSE for row in rows if row["against"] != "the trained model")
