"""The house rules that a machine can check: imports run downward, files stay small, ruff is content."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qpsft"

# DESIGN §4, lowest floor first. A module may import from its own floor and from those below.
FLOORS = [
    {"errors", "processes", "quiet", "wrapping", "__init__"},
    {
        "recipe",
        "recipe_file",
        "options",
        "losses",
        "hardware",
        "schedule",
        "demo.__init__",
        "demo.tasks",
        "export.__init__",
    }
    | {"dataset.__init__", "merging.__init__", "verification.__init__", "evaluation.__init__", "comparison.__init__"}
    | {"planning.__init__"},
    {
        "reference",
        "resume",
        "statistics",
        "config",
        "dataset.chat",
        "dataset.chat_date",
        "dataset.rows",
        "dataset.shapes",
        "data",
        "dataset.preview",
    }
    | {"checkpoint", "base_record", "base", "adapter", "adapter_folder", "continued_adapter"}
    | {"policy", "last_visit", "precision", "sharding", "loss_scaling"}
    | {"forward", "grouped_queries", "kernels", "packing", "piece_attention", "scoring", "tiled_mlp"},
    {
        "trainer",
        "console",
        "evaluate",
        "evaluation.evaluation_rows",
        "evaluation.generation",
        "evaluation.likelihood",
        "evaluation.verifiers",
        "evaluation.estimates",
    }
    | {"evaluation.harness", "evaluation.task_data", "evaluation.evaluation_options"}
    | {
        "merging.safetensors_stream",
        "merging.finished_folder",
        "merging.rounding",
        "merging.update_size",
        "merging.base_tensors",
        "merging.adapter_file",
    }
    | {"merging.merged_tensor", "merging.merged_files", "merge"}
    | {
        "verification.live",
        "verification.measure",
        "verification.exported",
        "verification.exported_parameters",
        "verify",
        "verification.verify_prompts",
        "verification.verify_text",
    }
    | {"verification.verify_weights", "push"}
    | {"planning.live_bytes", "planning.kernels", "planning.lm_head", "planning.skeleton", "planning.step"}
    | {"planning.optimizers", "planning.passes", "planning.cards", "planning.shapes", "planning.memory"}
    | {"planning.planner", "planning.changes", "planning.after", "planning.table", "planning.planned_config", "plan"}
    | {"export.llama_cpp", "export.work_folder", "export.gguf_check", "export.gguf_texts", "export.gguf_run"}
    | {"export.gguf", "export.gguf_lora", "export.ollama", "export.vllm"},
    {"report"},
    {"run", "model_card", "notebook", "conversation", "chat"}
    | {"evaluation.evaluated_model", "evaluation.evaluation_run"}
    | {"demo.accuracy", "demo.tokenizer", "demo.pretrain"},
    {"demo.walkthrough"},
    {
        "comparison.arms",
        "comparison.compare_options",
        "comparison.compared_data",
        "comparison.compared_evaluation",
        "comparison.compared_run",
        "comparison.run_queue",
        "comparison.paired",
        "comparison.row_coverage",
    }
    | {
        "comparison.results",
        "comparison.verdict",
        "comparison.comparison_figures",
        "comparison.comparison_report",
        "compare",
        "comparison.noise_study",
    },
    {"cli", "__main__"},
]


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "__pycache__" not in path.parts
    }


def floor_of(name: str) -> int:
    for floor, names in enumerate(FLOORS):
        if name in names:
            return floor
    pytest.fail(f"qpsft/{name.replace('.', '/')}.py is on no floor: add it to FLOORS in {Path(__file__).name}")


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions; type checking aside."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.skipped = True
        if getattr(node, "skipped", False):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qpsft":
            inner = node.module.removeprefix("qpsft").removeprefix(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".strip(".")
                found.add(full if full in known else inner or "__init__")
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("qpsft.") for a in node.names if a.name.startswith("qpsft.")}
    return {f"{name}.__init__" if f"{name}.__init__" in known else name for name in found}


def test_imports_run_downward():
    known = modules()
    wrong = []
    for name, path in known.items():
        for target in imported(path, set(known)):
            if floor_of(target) > floor_of(name):
                wrong.append(f"qpsft.{name} imports qpsft.{target}, which is on a higher floor")
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_an_upward_import(tmp_path):
    file = tmp_path / "losses.py"
    file.write_text("def f():\n    from qpsft.trainer import PSFTTrainer\n    import qpsft.cli\n")
    targets = imported(file, set(modules()))
    assert targets == {"trainer", "cli"}
    assert all(floor_of(target) > floor_of("losses") for target in targets)


@pytest.mark.parametrize("folder", ["qpsft", "tests", "benchmarks", "docs"])
def test_no_file_is_longer_than_400_lines(folder):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path} has {lines} lines: that is two files"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
