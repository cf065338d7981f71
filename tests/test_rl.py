"""From supervised fine-tuning to RL: an adapter of qpsft in TRL's GRPOTrainer, and benchmarks/rl_start.py."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from comparing import write_recipe
from datasets import Dataset
from peft import PeftModel
from small_runs import make_base, make_trainer, policy, same

from qpsft import float32_adapter
from qpsft.data import built_in
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import load_base
from qpsft.recipe.arguments import LoraArguments

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(base folder, adapter folder, its weights) of a PSFT run of a few steps."""
    folder = tmp_path_factory.mktemp("adapter")
    base = make_base(folder / "base")
    trainer = make_trainer(base, folder / "run", max_steps=4)
    trainer.train()
    return base, save_adapter(trainer.model, folder / "adapter"), policy(trainer.model)


@pytest.fixture(scope="module")
def rl_start():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import rl_start

        yield rl_start
    finally:
        sys.path.remove(str(BENCHMARKS))


def many_words(completions, **other):
    return [float(len(set(text.split()))) for text in completions]


def grpo_trainer(model, tokenizer, folder, **settings):
    from trl import GRPOConfig, GRPOTrainer

    config = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=1e-6,  # TRL's default
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=many_words,
        args=GRPOConfig(str(folder), **(config | settings)),
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7", "w9 w8"] * 4}),
        processing_class=tokenizer,
    )


def load(base, folder):
    model, tokenizer = load_base(base, verbose=False)
    return PeftModel.from_pretrained(model, folder, is_trainable=True), tokenizer


def moved(model, start):
    now = policy(model)
    return sum(int((now[name] != start[name]).sum()) for name in now) / sum(p.numel() for p in now.values())


def test_an_adapter_goes_into_grpo_trainer_as_it_is_and_stays_float32(adapter, tmp_path):
    base, folder, trained = adapter
    model, tokenizer = load(base, folder)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    with float32_adapter(model):
        trainer = grpo_trainer(model, tokenizer, tmp_path)
    assert same(policy(model), trained)  # the bits that PSFT left, all of them trainable
    trainer.train()
    assert {p.dtype for p in policy(model).values()} == {torch.float32}
    assert moved(model, trained) > 0.9
    assert same({name: p for name, p in model.named_parameters() if name in frozen}, frozen)
    assert [line["reward"] > 0 for line in trainer.state.log_history if "reward" in line] == [True] * 3


def test_without_that_trl_rounds_it_and_small_steps_are_lost(adapter, tmp_path):
    base, folder, trained = adapter
    model, tokenizer = load(base, folder)
    trainer = grpo_trainer(model, tokenizer, tmp_path)
    start = policy(model)
    assert {p.dtype for p in start.values()} == {torch.bfloat16}
    assert all(torch.equal(start[name], trained[name].bfloat16()) for name in trained)
    trainer.train()
    assert 0 < moved(model, start) < 0.5


def test_with_beta_the_reference_is_the_adapter_as_it_came(adapter, tmp_path):
    base, folder, trained = adapter
    model, tokenizer = load(base, folder)
    with float32_adapter(model):
        trainer = grpo_trainer(model, tokenizer, tmp_path, beta=0.1, learning_rate=1e-2)
    reference = {n.replace(".ref.", ".default."): p.clone() for n, p in model.named_parameters() if ".ref." in n}
    assert same(reference, trained)
    trainer.train()
    after = {n.replace(".ref.", ".default."): p for n, p in model.named_parameters() if ".ref." in n}
    assert same(after, trained) and not same({n: p for n, p in policy(model).items() if ".ref." not in n}, trained)
    assert [line["kl"] for line in trainer.state.log_history if "kl" in line][-1] > 0


def test_float32_adapter_gives_the_gradients_back_when_the_trainer_cannot_be_made(adapter):
    model, _ = load(*adapter[:2])
    before = sorted(policy(model))
    with pytest.raises(ZeroDivisionError), float32_adapter(model):
        assert not policy(model)
        1 / 0  # noqa: B018
    assert sorted(policy(model)) == before


@pytest.mark.bench
def test_the_script_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (BENCHMARKS.parent / "docs" / "rl.md").read_text()
    three_lines, script = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for line in three_lines.splitlines():
        assert line.split("(")[0].strip() in script  # the same calls
    monkeypatch.chdir(tmp_path)
    save_adapter(add_adapter(load_base("demo", verbose=False)[0], LoraArguments(lora_r=2)), tmp_path / "qpsft-demo")
    assert "max_steps=30" in script and "max_completion_length=56" in script
    script = script.replace("max_steps=30", "max_steps=1, report_to=[], disable_tqdm=True")
    exec(compile(script.replace("length=56", "length=4"), "docs/rl.md", "exec"), {"__name__": "docs"})
    assert (tmp_path / "runs" / "grpo" / "adapter_model.safetensors").is_file()


def test_the_reward_is_the_verifier_s_and_the_prompts_are_neither_demonstrated_nor_tested(rl_start):
    rows = rl_start.prompt_rows()
    texts = {row["prompt"][0]["content"] for row in rows}
    assert len(texts) == len(rows) > 1000
    other = [
        *built_in.demonstrations("noisy"),
        *built_in.in_domain("test", 300),
        *built_in.in_domain("validation", 300),
    ]
    assert texts.isdisjoint(row["prompt"][0]["content"] for row in other)
    row = built_in.demonstrations("clean", 1, seed=rl_start.PROMPTS_SEED)[0]
    answer = row["completion"][0]["content"]
    completions = [[{"role": "assistant", "content": text}] for text in (answer, answer[:-1], answer[::-1], "")]
    assert rl_start.right(completions, [row["task"]] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.fixture
def tiny(rl_start, tmp_path, monkeypatch):
    """Runs rl_start.py on a few rows, with an evidence that has the learning rates; returns its output folder."""
    monkeypatch.setattr(rl_start, "RECIPE", write_recipe(tmp_path / "recipe").parent)
    sizes = dict(steps=3, prompts=2, generations=4, max_new_tokens=8, every=2, test_rows=3, k=2)
    evidence = tmp_path / "evidence" / "noisy" / "comparison.json"
    evidence.parent.mkdir(parents=True)
    rates = {"sft": 2e-3, "sft_matched": 2e-3, "psft": 1e-3}
    arms = {name: {"learning_rate": rate} for name, rate in rates.items()}
    measured = [{"metrics": {"in_domain": 0.25}}, {"metrics": {"in_domain": 0.125}}]
    arms["psft"]["runs"] = {"3": {"label": "psft-lr1e-3-seed3", "points": measured}}
    arms["sft"]["runs"] = {"3": {"label": "nll-lr4e-3-seed3", "points": measured}}  # at another rate
    evidence.write_text(json.dumps({"arms": arms}))
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--arms=sft,sft_matched,psft", "--seeds=1", "--learning_rates=1e-3", f"--output={tmp_path / 'out'}"]
    flags += [f"--evidence={evidence}"]

    def run(*more):
        rl_start.main([*flags, *more])
        return tmp_path / "out"

    return run


@pytest.mark.bench
def test_rl_start_does_every_run_once_and_reports_it(tiny, rl_start, monkeypatch, capsys):
    # a reward that a few random completions do get
    monkeypatch.setattr(
        rl_start, "right", lambda completions, **_: [float("1" in c[-1]["content"]) for c in completions]
    )
    out = tiny()
    record = json.loads((out / "rl_start.json").read_text())
    assert len(list(out.glob("results/*.json"))) == 2  # sft and sft_matched have the same rate: the same runs
    assert record["runs"]["sft"] == record["runs"]["sft_matched"] != record["runs"]["psft"]
    run = record["runs"]["psft"]["0.001"]["3"]
    assert [point["step"] for point in run["points"]] == [0, 2, 3]
    assert [line["step"] for line in run["log"]] == [1, 2, 3]
    assert {"pass@1", "pass@2", "entropy", "in_domain", "out_of_domain"} <= run["points"][0].keys()
    assert "in_domain" not in run["points"][1] and run["start"].startswith("psft-lr1e-3")
    assert run["points"][0]["entropy"] != run["points"][-1]["entropy"]  # it was trained
    rewards = [line["reward"] for line in run["log"]]
    assert record["summary"]["0.001"]["psft"]["mean_reward"]["mean"] == pytest.approx(sum(rewards) / 3)
    assert [[d["treatment"], d["control"]] for d in record["differences"]["0.001"]] == [
        ["psft", "sft"],  # sft_matched was trained at another rate here, so it is no control of the loss
    ]
    assert [record["runs"][arm]["0.001"]["3"]["evidence_in_domain"] for arm in ("sft", "psft")] == [None, 0.125]
    assert (out / "rl_start.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "2 to do" in printed and (out / "summary.txt").read_text().strip() in printed

    monkeypatch.setattr(rl_start, "rl_run", lambda *_: pytest.fail("a run was done again"))
    monkeypatch.setattr(rl_start, "trained_adapter", lambda *_: pytest.fail("an adapter was trained again"))
    tiny()
    assert "0 to do" in capsys.readouterr().out
    again = json.loads((out / "rl_start.json").read_text())
    assert again["runs"] == record["runs"] and again["summary"] == record["summary"]


def test_rl_start_says_what_is_missing(tiny, tmp_path):
    with pytest.raises(SystemExit, match="evidence.py noisy"):
        tiny(f"--evidence={tmp_path / 'none.json'}")
    with pytest.raises(SystemExit, match="dft"):
        tiny("--arms=sft,dft")
    with pytest.raises(SystemExit, match="psft"):
        tiny("--arm_rates=sft=2e-3,sft_matched=1e-3")


def made_up(start, pass_at_1, rewards, evidence=0.5):
    points = [
        {"step": 10 * i, "pass@1": value, "pass@8": 0.9, "entropy": 1.0 - i, "in_domain": 0.5, "out_of_domain": 0.25}
        for i, value in enumerate(pass_at_1)
    ]
    log = [{"step": i + 1, "reward": reward} for i, reward in enumerate(rewards)]
    return {
        "start": start, "arm_learning_rate": 2e-3, "points": points, "log": log, "evidence_in_domain": evidence,
        "machine": "none", "versions": {"trl": "1"},
    }  # fmt: skip


def test_the_report_pairs_seeds_and_words_follow_the_intervals(rl_start):
    from rl_report import Outcome

    outcome = Outcome({"steps": 6, "k": 8})
    for seed, (sft, psft) in enumerate([(0.1, 0.3), (0.2, 0.42), (0.3, 0.48)]):
        outcome.add("sft", seed, 1e-3, made_up(f"nll-{seed}", [0.0, sft], [sft] * 6))
        outcome.add("psft", seed, 1e-3, made_up(f"psft-{seed}", [0.1, psft], [0.0] + [psft] * 5))
    found = outcome.difference("psft", "sft", 1e-3, "end_pass@1")
    # differences .2, .22, .18: mean .2, sd .02, t(2) 4.303
    assert found.mean == pytest.approx(0.2) and found.half_width == pytest.approx(4.303 * 0.02 / 3**0.5)
    assert outcome.values("psft", 1e-3, "mean_reward")[0] == pytest.approx(0.25)
    assert outcome.values("psft", 1e-3, "last_reward")[0] == pytest.approx(0.3)
    assert (
        outcome.values("psft", 1e-3, "start_entropy")[0] == 1.0 and outcome.values("sft", 1e-3, "end_entropy")[0] == 0
    )
    assert outcome.words(1e-3) == ["· lr 0.001: psft is the better start: mean reward +.133 ± .072 against sft."]
    assert "6 adapters were checked" in outcome.render()

    outcome.add("psft", 2, 1e-3, made_up("psft-2", [0.1, 0.1], [0.0] * 6, evidence=0.75))
    assert "no difference of mean reward is shown" in outcome.words(1e-3)[0]
    assert "not as accurate as in the evidence: psft-2 (0.500, not 0.750)" in outcome.render()
