"""Ollama: the template is derived from the model's own, and the Modelfile says what stops it."""

import re
from pathlib import Path

import pytest
import trl
from exporting import copy_folder, export, make_adapter, merge_by_hand

from qpsft.errors import ExportError, OutputError, RecipeError
from qpsft.export import gguf as gguf_module
from qpsft.export import llama_cpp
from qpsft.export.ollama import ChatPieces, derive_template, modelfile
from qpsft.model.base import load_tokenizer
from qpsft.model.llama_server import has_llama_cpp

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
BRANCH = re.compile(r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}")


@pytest.fixture
def tokenizer():
    return load_tokenizer("demo")


def run_go_template(template: str, messages: list[dict[str, str]]) -> str:
    """The little of Go's text/template that the Modelfiles here use, written without the code under test."""
    before, rest = template.split("{{ range .Messages }}")
    turn, after = rest.split("{{ end }}{{ end }}")
    default = re.search(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", before, re.DOTALL)
    text = before[: default.start()] if default else before
    if default and not any(message["role"] == "system" for message in messages):
        text += default[1]
    _, *branches = BRANCH.split(turn)
    bodies = dict(zip(branches[::2], branches[1::2], strict=True))
    for message in messages:
        # a literal {{ is written {{ "{{" }}, so content goes in last
        text += bodies.get(message["role"], "").replace("{{ .Content }}", message["content"])
    return (text + after).replace('{{ "{{" }}', "{{")


CONVERSATIONS = [
    [{"role": "user", "content": "One?"}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": "Two?"}],
    [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "A\nb"},
        {"role": "assistant", "content": "C d."},
        {"role": "user", "content": "E"},
    ],
]


@pytest.mark.parametrize("name", [None, "llama3", "qwen2_5", "qwen3", "phi3", "deepseekv3", "glm4moe", "cohere"])
def test_the_derived_template_renders_as_the_models_own(tokenizer, name):
    if name is not None:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    pieces, reason = derive_template(tokenizer, adds_bos=True)
    assert pieces is not None, reason
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go_template(pieces.go_template(), messages) == expected.removeprefix(tokenizer.bos_token), name


def test_a_default_system_turn_is_kept_apart(tokenizer):
    tokenizer.chat_template = (TEMPLATES / "qwen2_5.jinja").read_text()
    pieces, _ = derive_template(tokenizer, adds_bos=False)
    assert "You are Qwen" in pieces.default_system
    assert pieces.go_template().startswith("{{ if not .System }}<|im_start|>system\nYou are Qwen")


def test_the_first_token_is_in_the_template_only_if_llama_cpp_does_not_write_it(tokenizer):
    assert derive_template(tokenizer, adds_bos=True)[0].head == ""
    assert derive_template(tokenizer, adds_bos=False)[0].head == "<s>"


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "no chat template"),
        # counts its turns, as some do
        ("{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}>", "one turn after the other"),
        # writes the newest turn first
        ("{% for m in messages[::-1] %}<{{ m.role }}>{{ m.content }}{% endfor %}>", "one turn after the other"),
        ('{% for m in messages %}"""{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:', '"""'),
    ],
)
def test_a_template_that_does_not_come_apart_is_left_to_ollama(tokenizer, template, words):
    tokenizer.chat_template = template
    pieces, reason = derive_template(tokenizer, adds_bos=True)
    assert pieces is None and words in reason


def test_modelfile_quotes_and_escapes():
    pieces = ChatPieces("{{", "", {"user": ("u", "\n"), "assistant": ("a", "")}, "a")
    text = modelfile("m.gguf", pieces, ["<|end|>", 'a"b\n'], 4096)
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert 'TEMPLATE """{{ "{{" }}{{ range .Messages }}{{ if eq .Role "user" }}u{{ .Content }}\n{{ else if' in text
    assert 'PARAMETER stop "<|end|>"\nPARAMETER stop "a\\"b\\n"\nPARAMETER num_ctx 4096\n' in text
    assert modelfile("m.gguf", None, [], None) == "FROM ./m.gguf\n"


@pytest.mark.processes
def test_an_adapter_becomes_a_folder_for_ollama_create(tmp_path):
    try:
        llama_cpp.find_llama_cpp()
    except ExportError as error:
        pytest.skip(f"llama.cpp's converters cannot be downloaded here: {error.what}")
    adapter = make_adapter(tmp_path / "adapter")
    merged = merge_by_hand(adapter, tmp_path / "merged", "float16")
    output = tmp_path / "ollama"
    report = export("ollama", merged, output)
    if has_llama_cpp():
        assert report.compared == 6 and "llama.cpp writes 6 conversations the same" in " ".join(
            report.summary().split()
        )
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "model.gguf"]
    text = (output / "Modelfile").read_text()
    assert (
        text.startswith('# Written by qpsft export.\nFROM ./model.gguf\nTEMPLATE """')
        and '{{ if eq .Role "system" }}<|system|>' in text
    )
    assert text.endswith('PARAMETER stop "<|end|>"\nPARAMETER num_ctx 512\n')
    assert report.template and f"ollama create NAME -f {output / 'Modelfile'}" in report.summary()
    with pytest.raises(OutputError, match="exists"):
        export("ollama", merged, output, no_run=True)


def test_a_failed_export_leaves_no_folder(tmp_path, monkeypatch):
    merged = merge_by_hand(make_adapter(tmp_path / "adapter"), tmp_path / "merged", "float16")

    def fail(*args, **options):
        raise ExportError("no", "no")

    monkeypatch.setattr(gguf_module, "run_converter", fail)
    tools = tmp_path / "llama.cpp"
    (tools / "gguf-py/gguf").mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py", "gguf-py/gguf/quants.py"):
        (tools / name).touch()
    with pytest.raises(ExportError):
        export("ollama", merged, tmp_path / "o", llama_cpp=tools)
    assert not (tmp_path / "o").exists()
    with pytest.raises(RecipeError, match="num_ctx is 0"):
        export("ollama", copy_folder(merged, tmp_path / "m2"), tmp_path / "o", num_ctx=0)
