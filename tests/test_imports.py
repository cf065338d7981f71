"""The house rules that a machine can check: imports run downward, and ruff is content."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qpsft"

# Lowest first. A module imports from its own package and from lower layers only.
LAYERS = [
    {"errors", "lazy"},
    {"processes"},
    {"files", "terminal"},
    {"recipe"},
    {"data", "model"},
    {"psft", "verify"},
    {"plan", "evaluate"},
    {"train", "merge"},
    {"compare", "export", "chat", "doctor"},
    {"demo", "schema"},
    {"cli"},
    {"__main__"},
]


def layer_of(package: str) -> int:
    return next(layer for layer, packages in enumerate(LAYERS) if package in packages)


def imported_packages(source: str) -> set[str]:
    """Packages and top-level modules of qpsft that a file imports anywhere, type checking included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "qpsft" else {f"qpsft.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.split(".")[1] for name in names if name.startswith("qpsft.")}
    return inside - {"__version__"}


def upward_imports(package: str, source: str) -> set[str]:
    return {other for other in imported_packages(source) - {package} if layer_of(other) >= layer_of(package)}


def test_imports_run_downward():
    wrong = {}
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package != "__init__" and (upward := upward_imports(package, path.read_text(encoding="utf-8"))):
            wrong[str(path.relative_to(ROOT))] = upward
    assert not wrong


def test_no_module_imports_itself_through_others():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qpsft."):
                graph.setdefault(path, set()).add(PACKAGE.parent.joinpath(*node.module.split(".")).with_suffix(".py"))
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("package", "source", "upward"),
    [
        ("psft", "def f():\n    from qpsft.train.run import train\n", {"train"}),
        ("data", "import qpsft.model.base\n", {"model"}),
        ("recipe", "if TYPE_CHECKING:\n    from qpsft.psft.config import PSFTConfig\n", {"psft"}),
        ("train", "from qpsft.psft.losses import psft_loss\nfrom qpsft import __version__\n", set()),
    ],
)
def test_the_check_sees_an_upward_import(package, source, upward):
    assert upward_imports(package, source) == upward


def test_every_package_is_installed():
    """setuptools takes what pyproject.toml lists, and only an installed copy shows a package that is missing."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    there = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert sorted(listed) == sorted(".".join(path.parts) for path in there)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
