"""The documents: links lead somewhere, commands and paths exist, figures come out of the code they explain."""

import importlib.util
import json
import math
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from markdown import (
    ROOT,
    anchors,
    blocks,
    code_names,
    command_lines,
    commands,
    documents,
    links,
    qpsft_commands,
    text_of,
    without_blocks,
)
from noise_study import NoiseOptions

import qpsft
from qpsft import cli
from qpsft.compare.options import CompareOptions
from qpsft.psft.config import PSFTConfig
from qpsft.psft.losses import EPSILON
from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
from qpsft.recipe.file import load_recipe
from qpsft.recipe.flags import option_types

OPTIONS = option_types((ModelArguments, LoraArguments, DataArguments, RunArguments, PSFTConfig))
FOLDERS = "adapters|benchmarks|docs|notebooks|qpsft|tests"
MADE = ("benchmarks/results/", "adapters/mine", "adapters/NAME")
"""Beginnings of paths that documents name and commands make."""
IMAGE_BYTES = 60_000


def load_script(name: str):
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_document = pytest.mark.parametrize("path", documents(), ids=named)


# ---- links and paths ----


def dead_links(path: Path, text: str) -> list[str]:
    """Targets that lead nowhere: files, anchors, lines, and addresses that are none. Nothing is fetched."""
    dead = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            address = urlsplit(target)
            if address.scheme not in ("http", "https") or not address.netloc:
                dead.append(target)
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or not file.is_relative_to(ROOT):
            dead.append(target)
        elif fragment and file.suffix == ".md" and fragment not in anchors(text_of(file) if name else text):
            dead.append(target)
        elif fragment and file.suffix == ".py":
            numbers = [int(number) for number in re.findall(r"L(\d+)", fragment)]
            if not numbers or max(numbers) > len(file.read_text(encoding="utf-8").splitlines()):
                dead.append(target)
    return dead


@every_document
def test_every_link_leads_somewhere(path):
    assert dead_links(path, text_of(path)) == []


def test_dead_links_are_seen():
    text = """
# A *title*, with `code`
[a](nowhere.md) [b](#nothing) [c](docs/metrics.md#measured-by-qpsft-evaluate) [d](#a-title-with-code)
[e](qpsft/psft/losses.py#L1-L99999) [`psft_loss`](nowhere.py) [f](https://arxiv.org/abs/1) [g](http:///x)
![h](docs/img/no.png) `[i](not_a_link.md)`
```
[j](nor_this.md)
```
"""
    dead = ["nowhere.md", "#nothing", "qpsft/psft/losses.py#L1-L99999", "nowhere.py", "http:///x", "docs/img/no.png"]
    assert dead_links(ROOT / "README.md", text) == dead


@every_document
def test_every_path_it_names_exists(path):
    text = text_of(path)
    named_in_code = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    in_commands = re.findall(rf"(?:python|train|compare|preview|plan) ((?:{FOLDERS})/[\w./-]+)", text)
    for name in {*named_in_code, *in_commands}:
        assert (ROOT / name).exists() or name.startswith(MADE), name


# ---- commands ----


@cache
def flags_of(verb: str) -> frozenset[str]:
    """The flags of a verb, read from its help; a verb that reads a recipe takes every option of it too."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([verb, "--help"])
    text = printed.getvalue()
    own = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) | {"-o", "-h", "--help"}
    return frozenset(own | ({f"--{name}" for name in OPTIONS} if "RECIPE" in text else set()))


def wrong_words(command: list[str]) -> list[str]:
    """What a `qpsft …` command names that does not exist: its verb or a flag."""
    verb, *rest = command[1:]
    if verb.startswith("-"):
        return [] if verb in ("--help", "--version") else [verb]
    if verb not in cli.VERBS:
        return [verb]
    flags = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    return [flag for flag in flags if flag not in flags_of(verb)]


@every_document
def test_every_command_has_its_verb_and_flags(path):
    found = list(qpsft_commands(text_of(path)))
    assert [(" ".join(command), wrong) for command in found if (wrong := wrong_words(command))] == []
    if path.name == "README.md" and path.parent == ROOT:
        assert len(found) >= 10


def test_wrong_commands_are_seen():
    text = """
`qpsft train a.yaml --lora_rank 3`, `qpsft trian a.yaml`

```
$ qpsft merge a --onto trained  and more --not_a_flag
X=1 qpsft compare a --seeds 3 --lora_r 4 --tunes && qpsft verify a b --base=c --promts d | tail -n 1
```
"""
    found = list(qpsft_commands(text))
    assert [wrong_words(command) for command in found] == [[], ["--tunes"], ["--promts"], ["--lora_rank"], ["trian"]]


@every_document
def test_every_flag_in_its_prose_belongs_to_a_verb(path):
    every = frozenset().union(*map(flags_of, cli.VERBS))
    text = without_blocks(text_of(path))
    scripts = "".join(
        file.read_text(encoding="utf-8") for file in [*ROOT.glob("docs/*.py"), *ROOT.glob("benchmarks/*.py")]
    )
    for flag in re.findall(r"`(--[a-z]\w*)(?:[ =][^`]*)?`", text):
        assert flag in every or f'"{flag}"' in scripts, flag


@every_document
def test_every_python_script_it_runs_takes_those_flags(path):
    text = text_of(path)
    lines = [line for block in blocks(text) for line in block.text.splitlines()] + sorted(code_names(text))
    for script, rest in re.findall(rf"python ((?:{FOLDERS})/[\w/]+\.py)([^\n]*)", "\n".join(lines)):
        source = (ROOT / script).read_text(encoding="utf-8")
        declared = option_types([NoiseOptions, CompareOptions]) if script.endswith("noise_study.py") else ()
        for flag in re.findall(r"(?<!\S)--\w+", rest.split("  ")[0]):
            assert f'"{flag}"' in source or flag[2:] in declared, f"{script} {flag}"


def test_blocks_and_their_marks_are_read():
    text = """
```bash
qpsft demo \\
  --overwrite   # again
```

1. A list.

   <!-- test: needs the Hub -->
   ```bash
   pip install x && qpsft train a  # and so on
   ```

```text
<!-- test: needs nothing, it is text -->
```
"""
    first, second, third = blocks(text)
    assert (first.mark, second.mark, third.mark) == ("", "needs the Hub", "")
    assert (first.language, second.language, third.language) == ("bash", "bash", "text")
    assert [command_lines(block.text) for block in (first, second)] == [
        ["qpsft demo    --overwrite"],
        ["pip install x && qpsft train a"],
    ]
    assert commands("A=1 pip install x && qpsft train 'a b' | tail") == [
        ["pip", "install", "x"],
        ["qpsft", "train", "a b"],
        ["tail"],
    ]


# ---- links from docs/ to lines of code ----


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=named)
def test_links_to_lines_lead_to_the_symbol(path):
    wrong = load_script("line_links").problems(path)
    assert not wrong, "\n".join([*wrong, "python docs/line_links.py renews them"])


def test_every_numbered_detail_of_the_algorithm_has_its_lines():
    details = re.findall(
        r"^(\d+)\. (.*?)(?=^\d+\. |^\*\*|^The trainer)", text_of(ROOT / "docs/algorithm.md"), re.M | re.S
    )
    assert [int(number) for number, _ in details] == list(range(1, len(details) + 1)) and len(details) >= 30
    link = load_script("line_links").LINK
    assert [number for number, detail in details if not link.search(detail)] == []


def test_a_drifted_link_is_seen_and_renewed(tmp_path):
    line_links = load_script("line_links")
    source = (
        "import os\nX: int = 1\n\n\nclass A:\n    y = 2\n\n    def f(self):\n        return 1\n\n\ndef f():\n    pass\n"
    )
    (tmp_path / "code.py").write_text(source)
    document = tmp_path / "a.md"
    document.write_text("[`A.f`](code.py#L8-L9) [`f`](code.py#L10-L12) [`X`](code.py#L2) [`A.y`](code.py#L6)")
    assert line_links.problems(document) == []
    document.write_text("[`A.f`](code.py#L9-L9) [`f`](code.py#L12-L99) [`g`](code.py#L1-L2) [`f`](gone.py#L1)")
    assert [problem.partition(": ")[2] for problem in line_links.problems(document)] == [
        "A.f begins at line 8, not in 9 to 9",
        "code.py has no lines 12 to 99",
        "code.py defines no g",
        "there is no gone.py",
    ]
    assert line_links.updated(document) == (
        "[`A.f`](code.py#L8-L9) [`f`](code.py#L12-L13) [`g`](code.py#L1-L2) [`f`](gone.py#L1)"
    )


# ---- the site ----


def nav() -> list[str]:
    """The pages that docs/mkdocs.yml names, in their order."""
    text = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    entries = yaml.safe_load(re.search(r"^nav:\n.*?\n\n", text, flags=re.M | re.S)[0])["nav"]
    pages = []
    while entries:
        entry = entries.pop(0)
        below = list(entry.values())[0] if isinstance(entry, dict) else entry
        entries = [*below, *entries] if isinstance(below, list) else entries
        pages += [below] if isinstance(below, str) else []
    return pages


def test_the_site_names_every_page():
    """index.md is README."""
    assert sorted(nav()) == sorted(["index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_reference_has_every_public_name():
    named = re.findall(
        r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", text_of(ROOT / "docs/python.md"), flags=re.M
    )
    functions = {
        "qpsft.merge.merge_adapter",
        "qpsft.compare.compare",
        "qpsft.evaluate.evaluate",
        "qpsft.plan.make_plan",
    }
    assert {heading or name for name, heading in named} == {f"qpsft.{name}" for name in qpsft.__all__} | functions
    for name, heading in named:
        if heading:
            module, _, attribute = name.rpartition(".")
            package, _, public = heading.rpartition(".")
            assert getattr(import_module(module), attribute) is getattr(import_module(package), public)


# ---- figures ----


def test_every_figure_is_shown_and_small():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {target.removeprefix("docs/") for path in pages for target in links(text_of(path)) if "img/" in target}
    files = {f"img/{path.name}": path.stat().st_size for path in (ROOT / "docs" / "img").glob("*.png")}
    assert shown == set(files) and max(files.values()) <= IMAGE_BYTES
    figures = load_script("figures")
    assert {f"img/{name}.png" for name in figures.FIGURES} == set(files)


def test_what_was_kept_is_drawn_from_the_record(tmp_path):
    figures = load_script("figures")
    base, points = figures.kept_points(figures.KEPT)
    part = json.loads(figures.KEPT.read_text(encoding="utf-8"))[figures.KEPT_PART]
    assert base == pytest.approx(math.exp(-part["base"]["test/nll"])) and set(points) == set(figures.KEPT_ARMS)
    assert {"sft", "psft", "sft_replay"} <= set(figures.kept_points(figures.KEPT_RATES)[1])
    table = text_of(ROOT / "docs" / "evidence.md").partition("## The digit world")[0]
    for arm, tried in points.items():
        (seeds,) = tried.values()
        (line,) = re.findall(rf"^\| `{arm}` \| .*$", table, re.M)
        cells = [cell.strip("* ") for cell in line.split("|")[1:-1]]
        ends = [run["end"] for run in part["runs"] if run["arm"] == arm]
        means = [sum(end[name] for end in ends) / len(ends) for name in ("test/nll", "text")]
        assert cells[1] == str(len(seeds))
        assert [float(cells[place].split(" ±")[0]) for place in (3, 6)] == pytest.approx(means, abs=6e-4)
    figures.draw_kept(figures.KEPT, figures.KEPT_RATES, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_readme_and_evidence_recommend_the_same():
    tables = [
        text_of(ROOT / name).partition("<!-- methods: begin -->")[2].partition("<!-- methods: end -->")[0]
        for name in ("README.md", "docs/evidence.md")
    ]
    assert tables[0].replace("(docs/", "(") == tables[1] and "sft_replay" in tables[1]


def test_the_clip_is_drawn_from_the_losses():
    token_curve = load_script("figures").token_curve
    ratios = [0.5, 1.0, 1.27, 1.29, 2.0]
    values, pushes = token_curve("psft", ratios, 0.4)
    assert values == pytest.approx([-0.5, -1.0, -1.27, -1 - EPSILON, -1 - EPSILON])
    assert pushes == pytest.approx([0.5, 1.0, 1.27, 0.0, 0.0])
    assert token_curve("nll", ratios, 0.4)[1] == pytest.approx([1.0] * 5)
    assert token_curve("dft", ratios, 0.4)[1] == pytest.approx([0.4 * ratio for ratio in ratios])


@pytest.mark.filterwarnings("ignore")
def test_the_runs_of_the_figures_are_real_and_are_drawn(tmp_path):
    figures = load_script("figures")
    for flags in figures.RUNS.values():
        trainer = load_recipe(figures.RECIPE, flags, PSFTConfig).trainer
    trainer = load_recipe(figures.RECIPE, [], PSFTConfig).trainer
    assert figures.BLOCK == trainer.reference_steps * trainer.num_iterations
    assert figures.WARMUP == trainer.sft_warmup_steps
    torch.manual_seed(0)
    small = ["--dataset_limit=64", "--per_device_train_batch_size=4"]
    good, bad = (figures.log_of(name, tmp_path, steps=n, flags=small) for name, n in (("good", 11), ("k1", 3)))
    assert [line["step"] for line in good] == list(range(1, 12))
    assert {line["clip_fraction"] for line in bad} == {0.0} and good[-1]["clip_fraction"] > 0.05
    assert figures.log_of("good", tmp_path) == good  # kept
    figures.draw_good(good, tmp_path / "img" / "good.png")
    figures.draw_failure("k1", good, bad, tmp_path / "img" / "k1.png")
    figures.draw_clip(tmp_path / "img" / "clip.png")
    for name in ("good", "k1", "clip"):
        assert (tmp_path / "img" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
