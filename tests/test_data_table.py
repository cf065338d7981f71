"""docs/data.md's table is what the real templates do today."""

import sys
from pathlib import Path

import pytest
from real_templates import templates

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import data_table  # noqa: E402


def test_the_table_is_true():
    document = (DOCS / "data.md").read_text(encoding="utf-8")
    assert data_table.with_table(document, data_table.table()) == document, "run python docs/data_table.py"


def test_every_family_has_its_line():
    lines = (DOCS / "data.md").read_text(encoding="utf-8").partition(data_table.BEGIN)[2].splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == list(templates())
    assert len(templates()) >= 20 and not any("fails" in line and "hermes" not in line for line in lines)


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_template_that_takes_more_changes_its_line(family):
    before = data_table.cells(templates()[family])
    everything = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.reasoning_content }}{{ m.tool_calls }}</s>"
    everything += "{% endfor %}{{ tools }}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert before != data_table.cells(everything) != ["right"] * 5  # the tools come behind all turns
