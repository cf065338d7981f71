"""On real input: PSFT and SFT lower the NLL of text they were not trained on; and the demo shows what it says."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qpsft import cli
from qpsft.data.tokenize import load_rows, tokenize_rows
from qpsft.demo.picture import BAR, bars
from qpsft.evaluate.likelihood import text_statistics
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.generation import greedy_completions
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe

RECIPE = Path(__file__).with_name("recipes") / "stories260k_gsm8k.yaml"


def held_out_rows(recipe, tokenizer, gsm8k):
    recipe.data.dataset_limit = 100
    rows = load_rows(str(gsm8k / "test.jsonl"), recipe.data)
    return list(tokenize_rows(rows, tokenizer, recipe.data, 512, show_progress=False).dataset)


@pytest.mark.journey
def test_60_steps_on_gsm8k_end_below_the_base(stories, gsm8k, tmp_path):
    flags = [f"--model_name_or_path={stories}", f"--dataset_name={gsm8k / 'train.jsonl'}", "--loss_type=psft"]
    flags.append("--max_steps=60")
    assert cli.main(["train", str(RECIPE), *flags, f"--output_dir={tmp_path / 'a'}"]) == 0
    recipe = load_recipe(RECIPE, flags, PSFTConfig)
    base, tokenizer = load_base(stories, verbose=False)
    rows = held_out_rows(recipe, tokenizer, gsm8k)
    before = text_statistics(base, rows)
    after = text_statistics(PeftModel.from_pretrained(base, tmp_path / "a"), rows)
    assert len(rows) >= 99  # one row's question alone fills the model's context
    print(f"{before['num_items']} tokens of {len(rows)} rows, base {before}, after {after}")
    assert before["nll"] > 4.0 and after["nll"] < before["nll"] - 2.0
    assert after["mean_token_accuracy"] > before["mean_token_accuracy"]


@pytest.mark.journey
def test_the_embedded_base_learns_with_both_losses(tmp_path):
    flags = ["--max_steps=32", "--base_kl=0", "--seed=0", "--save_strategy=no"]
    recipe_file = Path(__file__).parents[1] / "qpsft" / "demo" / "recipe.yaml"
    recipe = load_recipe(recipe_file, [], PSFTConfig)
    tokenizer = load_tokenizer("demo")
    rows = load_rows("demo-clean", recipe.data, "test")
    held_out = list(tokenize_rows(rows, tokenizer, recipe.data, 128, show_progress=False).dataset)
    before = text_statistics(load_base("demo", verbose=False)[0], held_out)
    for loss_type in ("psft", "nll"):
        folder = tmp_path / loss_type
        assert cli.main(["train", str(recipe_file), *flags, f"--loss_type={loss_type}", f"--output_dir={folder}"]) == 0
        model = PeftModel.from_pretrained(load_base("demo", verbose=False)[0], folder)
        assert text_statistics(model, held_out)["nll"] < before["nll"] - 0.5


def test_text_statistics_equal_a_computation_row_by_row(stories):
    model, _ = load_base(stories, verbose=False)
    torch.manual_seed(0)
    rows = []
    for length in (5, 17, 9, 30):
        ids = torch.randint(3, 500, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    nll, entropy, top1, count = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            for position in range(3, len(row["input_ids"])):
                here = logprobs[position - 1]
                nll -= here[row["input_ids"][position]].item()
                entropy -= (here.exp() * here).sum().item()
                top1 += int(here.argmax().item() == row["input_ids"][position])
                count += 1
    for batch_tokens in (1, 40, 10_000):
        found = text_statistics(model, rows, batch_tokens=batch_tokens)
        assert found["num_items"] == count
        assert found["nll"] == pytest.approx(nll / count, rel=1e-5)
        assert found["entropy"] == pytest.approx(entropy / count, rel=1e-5)
        assert found["mean_token_accuracy"] == pytest.approx(top1 / count)


def test_greedy_completions_do_not_depend_on_the_batch():
    from qpsft.data import built_in

    model, tokenizer = load_base("demo", verbose=False)
    prompts = [row["prompt"] for row in built_in.in_domain("test", 3) + built_in.out_of_domain("test", 3)["shorter_a"]]
    one_by_one = [greedy_completions(model, tokenizer, [prompt], max_new_tokens=40)[0] for prompt in prompts]
    assert greedy_completions(model, tokenizer, prompts, max_new_tokens=40, batch_size=4) == one_by_one
    assert len(set(one_by_one)) > 1 and all(text.strip() for text in one_by_one)


@pytest.mark.journey
def test_the_demo_learns_and_prints_what_it_did(tmp_path, capsys, monkeypatch):
    from qpsft.demo import walkthrough

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    measured = walkthrough.run("demo", limit=40)
    out = capsys.readouterr().out.replace(f"{tmp_path}/", "")  # a path is not broken, however long
    base, *trained = measured.values()
    for one in trained:
        assert one.accuracy["in_domain"] > base.accuracy["in_domain"] + 0.3
        assert one.nll < base.nll and math.isfinite(one.entropy)
        assert f"{one.accuracy['in_domain']:.1%}" in out and f"{one.out_of_domain:>4.0%}" in out
    sft, keeping = trained
    assert keeping.out_of_domain > sft.out_of_domain + 0.1
    assert "next: qpsft export demo-merged --to gguf\n" in out and "\n  qpsft verify demo demo-merged\n" in out
    assert max(map(len, out.splitlines())) <= 80
    for folder in ("demo", "demo-sft"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["demo", "--output_dir=demo"]) == 2  # never over an earlier one


def test_the_demo_s_next_steps_need_nothing_but_what_it_wrote(tmp_path, monkeypatch):
    """In a folder that is no clone of the repository."""
    from qpsft.compare.options import load_comparison
    from qpsft.demo import walkthrough

    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text(walkthrough.RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    text = walkthrough._next({walkthrough.KEEPING: Path("mine")}, Path("mine-merged"))
    assert "\n  qpsft compare mine\n" in text and "adapters/" not in text
    recipe, _ = load_comparison("mine", [])
    assert recipe.data.dataset_name == "demo-noisy" and recipe.trainer.output_dir == "mine/comparison"


def test_bars_are_as_long_as_the_shares_they_stand_for():
    lines = bars({"base": (0.0, 1.0), "plain SFT": (0.5, 0.25), "near the base": (0.505, 0.0)}).splitlines()
    assert [line.count("█") for line in lines] == [0, BAR, BAR // 2 + BAR // 4, BAR // 2]
    assert "50 %" not in lines[2] and " 50%" in lines[2] and " 25%" in lines[2] and "100%" in lines[1]
    assert max(map(len, lines)) <= 80
