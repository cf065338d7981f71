"""README and the pages behind it: commands run as they are written, options exist, numbers are the plan's."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from markdown import ROOT, Block, blocks, command_lines, commands, text_of

from qpsft import cli
from qpsft.data import built_in
from qpsft.errors import ExportError
from qpsft.export.llama_cpp import find_llama_cpp
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.flags import option_types

README = text_of(ROOT / "README.md")
PAGES = {name: text_of(ROOT / name) for name in (
    "README.md", "docs/install.md", "docs/training.md", "docs/export.md", "docs/memory.md", "docs/python.md",
)}  # fmt: skip
"""Documents whose blocks are run, in this order and in one folder."""
LONGEST_README = 150
OPTIONS = option_types((ModelArguments, LoraArguments, DataArguments, RunArguments, PSFTConfig))
BY_CI = ("pip install -c constraints.txt . && qpsft demo", "pip install -c constraints.txt -e '.[test]' && pytest")
"""Lines that .ci/run runs word for word, before and after this test."""
SMALLER = {
    "train": ["--max_steps=2", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--lora_r=4"],
    "compare": ["--max_steps=2", "--seeds=1", "--eval_rows=4", "--out_of_domain_rows=2", "--k=0", "--arms=sft,psft"],
    "evaluate": ["--limit=2", "--k=1", "--max_new_tokens=8"],
}
"""Added to commands so that they take seconds; everything else is as the pages have it."""
PROMISED = ("adapter_model.safetensors", "tokenizer.json", "README.md", "metrics.jsonl", "training.png", "recipe.yaml")
"""What docs/training.md says a run's folder holds."""


def shell_blocks(*pages: str) -> list[Block]:
    return [block for page in pages or PAGES for block in blocks(PAGES[page], "bash", "sh", "console")]


def test_readme_is_short():
    assert len(README.splitlines()) <= LONGEST_README


def test_readmes_two_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line for block in shell_blocks("README.md") for line in command_lines(block.text)]
    for line in BY_CI:
        assert line in lines
        assert line.replace("pip install", "pip install -q") in ci


@pytest.mark.parametrize("page", PAGES)
def test_marks_say_what_a_block_needs(page):
    marks = re.findall(r"<!-- test: (.*?) -->", PAGES[page])
    assert all(mark.startswith("needs ") for mark in marks), marks
    assert len(marks) == sum(bool(block.mark) for block in blocks(PAGES[page])), "a mark stands before no fence"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder as README's reader has it: the repository's recipes, a recipe of his own, rows, and a test set.

    The recipe is README's, word for word but for the base, which needs no download, and for rows to replay: that base
    cannot answer the prompts that come with qpsft.
    """
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("adapters", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "comparison", "img"))
    (folder / "tests").mkdir()
    shutil.copytree(ROOT / "tests" / "recipes", folder / "tests" / "recipes")
    recipe = blocks(README, "yaml")[0].text
    assert "model_name_or_path:" in recipe and "dataset_name: my/rows.jsonl" in recipe
    (folder / "my").mkdir()
    assert "method: sft_replay" in recipe
    mine = re.sub(r"(?<=model_name_or_path: )\S+", "demo", recipe) + "replay_dataset: my/old.jsonl\n"
    (folder / "my" / "recipe.yaml").write_text(mine, encoding="utf-8")
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in built_in.demonstrations("clean", 48)]
    for name, part in (("my/rows.jsonl", rows[:32]), ("my/old.jsonl", rows[32:40]), ("test.jsonl", rows[40:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def run_line(line: str) -> None:
    """Runs a line of a shell block; a single qpsft command in this process, which has torch loaded already."""
    words, *others = commands(line)
    if words[0] == "qpsft" and not others:
        assert cli.main(words[1:] + SMALLER.get(words[1], [])) == 0, line
        return
    shell = (
        f'qpsft() {{ "{sys.executable}" -m qpsft "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\nset -e\n{line}\n'
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def has_converter() -> bool:
    """Whether llama.cpp's converters are in the cache, or can be downloaded."""
    try:
        return find_llama_cpp().is_dir()
    except ExportError as error:
        if "could not download" in error.what:
            return False
        raise


@pytest.mark.journey
@pytest.mark.filterwarnings("ignore")
def test_the_shell_blocks_run_in_order(workshop, monkeypatch):
    """Every line of every block without a mark, as written (see SMALLER), one after the other in one folder."""
    monkeypatch.chdir(workshop)
    ran = []
    for block in shell_blocks():
        for line in command_lines(block.text):
            needs_converter = re.search(r"--to (gguf|ollama)", line) and not has_converter()
            if block.mark or line in BY_CI or line.startswith("pip install") or needs_converter:
                continue
            run_line(line)
            ran.append(line)
    assert len(ran) >= 10, ran
    assert all((workshop / "runs" / "mine" / name).is_file() for name in PROMISED)
    assert (workshop / "runs" / "mine-merged" / "config.json").is_file()


@pytest.mark.journey
@pytest.mark.filterwarnings("ignore")
def test_the_python_blocks_run(workshop, monkeypatch):
    """As written, but for the base."""
    from datasets import Dataset

    monkeypatch.chdir(workshop)
    torch.manual_seed(0)
    written = [block for text in PAGES.values() for block in blocks(text, "python")]
    assert written
    for number, block in enumerate(written):
        if block.mark:
            continue
        code = re.sub(r'load_base\("[^"]+"\)', 'load_base("demo", verbose=False)', block.text)
        code = code.replace("runs/mine", f"runs/python-{number}")
        rows = [json.loads(line) for line in (workshop / "my" / "rows.jsonl").read_text().splitlines()[:16]]
        exec(compile(code, "docs/python.md", "exec"), {"rows": Dataset.from_list(rows)})


def test_every_option_in_recipes_and_tables_exists():
    named, defaults = set(), {}
    for text in PAGES.values():
        for block in blocks(text, "yaml"):
            named |= set(re.findall(r"^\s*(\w+):", block.text, flags=re.M))
        defaults |= dict(re.findall(r"^\| `(\w+)` \| ([\d.e-]+) \|", text, flags=re.M))
    assert {"model_name_or_path", "guard"} <= named <= set(OPTIONS), named - set(OPTIONS)
    assert {"epsilon", "reference_steps", "learning_rate"} <= set(defaults)
    for name, default in defaults.items():
        assert float(default) == float(getattr(PSFTConfig, name)), name


def test_the_tree_names_what_is_there():
    tree = re.search(r"```text\nqpsft/\n(.*?)```", text_of(ROOT / "CONTRIBUTING.md"), flags=re.S)[1]
    named = set(re.findall(r"(?<![\w/])(\w+\.py|\w+/)(?=[ \n])", tree))
    modules = {p.name for p in (ROOT / "qpsft").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{p.name}/" for p in (ROOT / "qpsft").iterdir() if (p / "__init__.py").is_file()}
    assert modules <= named and packages <= named, (modules | packages) - named
    assert all((ROOT / "qpsft" / name).exists() or (ROOT / name).exists() for name in named)


@pytest.mark.journey
def test_what_fits_a_card_is_what_the_plan_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import fits

    table = re.search(r"<!-- models: made by docs/fits.py -->\n(.*?)\n\n", README, re.DOTALL)[1]
    header, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert header == list(fits.CARDS.values())
    names = [model.partition("/")[2] for model in fits.MODELS]
    assert [line[0] for line in lines] == names + [f"{model.partition('/')[2]}, offloading" for model in fits.OFFLOADED]
    rows = {line[0]: dict(zip(fits.CARDS, line[1:], strict=True)) for line in lines}
    for name, model, flags in (
        ("Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", ()),
        ("Qwen3-14B, offloading", "Qwen/Qwen3-14B", (fits.OFFLOADING,)),
    ):
        assert rows[name]["12GB"] == fits.cell(fits.longest(model, "12GB", *flags))
