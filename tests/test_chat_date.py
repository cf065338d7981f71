"""Templates that print today's date: a run keeps the day it started with, or it could not be resumed after midnight."""

import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from byte_tokenizers import CHATML, LLAMA3, MARKED, byte_tokenizer
from comparing import RECIPE, write_recipe

import qpsft
from qpsft import cli
from qpsft.compare.comparison import make_setting, prepare
from qpsft.compare.options import load_comparison
from qpsft.data import chat_date
from qpsft.data.shapes import Rows
from qpsft.data.tokenize import encode_prompt, tokenize_rows
from qpsft.errors import OutputError, RecipeError
from qpsft.model.base import load_tokenizer
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.file import load_recipe

LLAMA_3_2 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}Today Date: {{ date_string }}\n"
)
SMOLLM3 = '{%- set today = strftime_now("%d %B %Y") -%}Today Date: {{ today }}\n'
DEMO = Path(qpsft.__file__).parent / "demo" / "model"
ASKED = [{"role": "user", "content": "1+1=?"}]


def row(tokenizer, **arguments) -> str:
    rows = Rows("x", "prompt_completion", [{"prompt": "1+1=?", "completion": "two"}], ["row 1"], [])
    (found,) = tokenize_rows(rows, tokenizer, DataArguments(**arguments), None).dataset
    return tokenizer.decode(found["input_ids"])


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED], ids=["chatml", "llama3", "marked"])
@pytest.mark.parametrize("head, written", [(LLAMA_3_2, "01 Feb 2003"), (SMOLLM3, "01 February 2003")])
def test_rows_and_prompts_are_rendered_with_the_day_given(head, written, template):
    tokenizer = byte_tokenizer(head + template)
    text = row(tokenizer, chat_date="2003-02-01")
    assert f"Today Date: {written}\n" in text
    prompt = tokenizer.decode(encode_prompt(ASKED, tokenizer, DataArguments(chat_date="2003-02-01")))
    assert text.startswith(prompt) and text[len(prompt) :].startswith("two")
    assert f"Today Date: {date.today().year}" not in text and str(date.today().year) in row(tokenizer)


def test_only_templates_that_ask_need_a_day(tmp_path):
    assert chat_date.prints_date(byte_tokenizer(SMOLLM3 + CHATML))
    for text in (None, CHATML, "{% set date_string = '26 Jul 2024' %}" + CHATML):
        assert chat_date.find_chat_date(None, byte_tokenizer(text), tmp_path) is None
    assert chat_date.find_chat_date("2003-02-01", byte_tokenizer(CHATML), tmp_path) == "2003-02-01"


@pytest.fixture
def dated(tmp_path):
    """The embedded base, with a template that prints today's date."""
    folder = shutil.copytree(DEMO, tmp_path / "dated")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = SMOLLM3 + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on(monkeypatch):
    return lambda day: monkeypatch.setattr(chat_date, "today", lambda: day)


def train(base, folder, *flags) -> int:
    return cli.main(["train", f"--model_name_or_path={base}", "--dataset_name=demo-noisy", "--dataset_limit=32",
                     "--max_length=192", "--lora_r=4", "--learning_rate=1e-3", "--reference_steps=2",
                     "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--logging_steps=1",
                     "--max_steps=2", "--save_steps=1", f"--output_dir={folder}", *flags])  # fmt: skip


def test_a_run_is_resumed_after_midnight(dated, tmp_path, on):
    on("2026-11-23")
    assert train(dated, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "recipe.yaml").unlink()  # which a run that was cut off has not written yet
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    on("2026-11-24")
    assert train(dated, tmp_path / "cut", "--resume") == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    recipe = yaml.safe_load((tmp_path / "cut" / "recipe.yaml").read_text())
    assert recipe["chat_date"] == "2026-11-23"  # so that the recipe repeats the run on any day
    assert train(dated, tmp_path / "cut", "--overwrite", "--save_strategy=no") == 0
    assert (tmp_path / "cut" / "chat_date").read_text() == "2026-11-24\n"


def test_a_comparison_finds_yesterday_s_runs_again(dated, tmp_path, on):
    recipe, options = load_comparison(write_recipe(tmp_path, RECIPE.replace("demo\n", f"{dated}\n", 1)), [], {})

    def key():
        recipe.data.chat_date = None
        return make_setting(recipe, options, prepare(recipe)).data.key

    on("2026-11-23")
    first = key()
    on("2026-11-24")
    assert key() == first
    (tmp_path / "comparison" / "results" / "chat_date").unlink()
    assert key() != first


@pytest.mark.parametrize("text", ["chat_date: 2003-02-01", "chat_date: '2003-02-01'"])
def test_a_day_in_yaml(text, tmp_path):
    assert load_recipe(write_recipe(tmp_path, f"{RECIPE}{text}\n"), [], PSFTConfig).data.chat_date == "2003-02-01"


@pytest.mark.parametrize("given", ["tomorrow", "2026-02-30", "20031"])
def test_no_day(given):
    with pytest.raises(RecipeError, match="which is no day"):
        DataArguments(chat_date=given)


def test_a_folder_that_takes_no_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="chat_date cannot be written"):
        chat_date.keep_chat_date("2003-02-01", tmp_path / "file")
