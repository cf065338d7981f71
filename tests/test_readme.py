"""README's promises that a machine can check: its commands, paths, flags and options."""

import re
import shlex
from pathlib import Path

import pytest

from qpsft.cli import VERBS
from qpsft.config import PSFTConfig
from qpsft.recipe import DataArguments, LoraArguments, ModelArguments, RunArguments, option_types

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = option_types((ModelArguments, LoraArguments, DataArguments, RunArguments, PSFTConfig))


def bash_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in bash_blocks() for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part]


def test_its_two_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in (
        "pip install -c constraints.txt . && qpsft demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ):
        assert any(command in block for block in bash_blocks())
        assert command.replace("pip install", "pip install -q") in ci


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "qpsft"], ids=" ".join)
def test_every_qpsft_command_names_a_verb_and_flags_it_has(command, capsys):
    from qpsft import cli

    assert command[1] in VERBS
    flags = [word.split("=")[0] for word in command if word.startswith("--")]
    if command[1] in ("train", "preview"):
        assert all(flag[2:] in OPTIONS for flag in flags)
        return
    try:
        cli.main([command[1], "--help"])
    except SystemExit:
        pass
    help_text = capsys.readouterr().out
    assert all(flag in help_text for flag in flags)


def test_every_path_it_links_or_names_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(r"`((?:tests|benchmarks|adapters|docs|qpsft)/[\w./-]+)`", README)
    in_commands = re.findall(r"(?:python|train|compare) ((?:tests|benchmarks|adapters)/[\w./-]+)", README)
    assert links and named and in_commands
    for path in {*links, *named, *in_commands}:
        assert (ROOT / path).exists(), path


def test_every_option_in_its_recipes_and_tables_exists():
    for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.S):
        for name in re.findall(r"^\s*(\w+):", block, flags=re.M):
            assert name in OPTIONS, name
    for name, default in re.findall(r"^\| `(\w+)` \| (\S+) \|", README, flags=re.M):
        assert float(default) == float(getattr(PSFTConfig, name)), name


def test_its_tree_names_what_is_there():
    tree = re.search(r"```text\nqpsft/\n(.*?)```", README, flags=re.S)[1]
    named = set(re.findall(r"(?<![\w/])(\w+\.py|\w+/)(?=[ \n])", tree))
    modules = {p.name for p in (ROOT / "qpsft").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{p.name}/" for p in (ROOT / "qpsft").iterdir() if (p / "__init__.py").is_file()}
    assert modules <= named and packages <= named, (modules | packages) - named
    assert all((ROOT / "qpsft" / name).exists() or (ROOT / name).exists() for name in named)
