"""The preview shows every token in order, marks exactly the supervised ones, and its counts add up."""

import json

import pytest
from transformers import AutoTokenizer

from qpsft.data.preview import GREEN, RESET, render_preview
from qpsft.data.tokenize import load_dataset
from qpsft.recipe.arguments import DataArguments

FORMAT = "Q: {prompt}\nA:"


@pytest.fixture
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


def preview(tmp_path, tokenizer, rows, max_length=None, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(dataset_name=str(path), prompt_format=FORMAT)
    return render_preview(load_dataset(arguments, tokenizer, max_length), tokenizer, width=60, **options)


def test_supervised_tokens_are_bracketed_without_colour_and_green_with(tmp_path, tokenizer):
    rows = [{"prompt": "Who is é\u00e8?", "completion": " Lily, the dog"}]
    assert "\n<s> Q: Who is é\u00e8?\nA:⟦ Lily, the dog</s>⟧\n" in preview(tmp_path, tokenizer, rows, color=False)
    green = preview(tmp_path, tokenizer, rows, color=True)
    assert f"\nA:{GREEN} Lily, the dog</s>{RESET}\n" in green and "⟦" not in green


def test_every_turn_of_a_conversation_is_marked_by_itself(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    talk = [("user", "Hi"), ("assistant", "Ho"), ("user", "Up"), ("assistant", "Down")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    text = preview(tmp_path, tokenizer, rows, color=False)
    assert "[user] Hi</s> [assistant]⟦ Ho</s>⟧ [user] Up</s> [assistant] ⟦Down</s>⟧" in text


def test_n_rows_are_shown_with_their_places(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": f"answer {n}"} for n in range(5)]
    text = preview(tmp_path, tokenizer, rows, n=2, color=False)
    assert "line 1: " in text and "line 2: " in text and "answer 1" in text and "answer 2" not in text


def test_control_characters_of_a_row_do_not_reach_the_terminal(tmp_path, tokenizer):
    text = preview(tmp_path, tokenizer, [{"prompt": "a", "completion": "b\x1b[2Jc\td"}], color=False)
    assert "\x1b" not in text and "b\\x1b[2Jc\td</s>⟧" in text


def test_colour_is_off_where_output_is_no_terminal_or_no_color_is_set(tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": "a", "completion": "b"}]
    assert "⟦" in preview(tmp_path, tokenizer, rows)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert GREEN in preview(tmp_path, tokenizer, rows)
    monkeypatch.setenv("NO_COLOR", "1")
    assert GREEN not in preview(tmp_path, tokenizer, rows)


def test_the_table_counts_rows_drops_cuts_and_tokens(tmp_path, tokenizer):
    rows = [{"prompt": "x" * n, "completion": "y" * n, "id": n} for n in (2, 20, 50)]
    text = preview(tmp_path, tokenizer, rows, max_length=40, color=False)
    table = dict(line.split("  ", 1) for line in text.splitlines()[-8:])
    table = {key.strip(): value.strip() for key, value in table.items()}
    assert table["rows"] == "3, of which 2 are trained on"
    assert table["dropped"] == "1 (no supervised token within max_length=40)"
    assert table["truncated"] == "1 (max_length 40)"
    assert table["columns not used"] == "id"
    first = tokenizer(FORMAT.replace("{prompt}", "xx") + "yy")["input_ids"]
    assert table["tokens"] == str(len(first) + 1 + 40)
