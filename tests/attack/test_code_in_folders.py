"""Python code that lies in a model's or an adapter's folder never runs, whatever names it and whatever is piped in."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from exporting import copy_folder, make_adapter
from merging import vouch
from planted import ROOT, YES, edit, plant, prompt_tuning, qpsft
from small_runs import make_base
from transformers import AutoConfig, AutoModelForCausalLM

from qpsft import cli
from qpsft.errors import BaseModelError, ExportError
from qpsft.export import llama_cpp
from qpsft.model import llama_server
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.folder import MODEL_DIR
from qpsft.model.remote_code import link_without_code
from qpsft.terminal import no_standard_input
from qpsft.verify.exported import ExportedWeights, load_exported

ADAPTER = ROOT / "adapters" / "demo-psft"
LOADERS = re.compile(r"Auto(Config|Tokenizer|Model|Processor|Peft)|Peft")
FILES = ("evil.py", "modeling_evil.py", "__init__.py", "custom_generate/generate.py", "setup.py")

TOKENIZER_MAPS = {
    "pair": {"AutoTokenizer": ["evil.Evil", None]},
    "fast": {"AutoTokenizer": [None, "evil.Evil"]},
    "list": ["evil.Evil", None],
    "more": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"},
}
MODEL_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}


def run(capsys, monkeypatch, *arguments) -> tuple[int, str]:
    """A verb in this process, with consent in its standard input. Returns the exit code and what it said."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(YES))
    code = cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


def adapter_with(tmp_path: Path, auto_map, **tokenizer) -> tuple[Path, Path]:
    """A copy of the demo's adapter whose tokenizer names code, and the mark that the code would leave."""
    folder = copy_folder(ADAPTER, tmp_path / "adapter")
    edit(folder / "tokenizer_config.json", auto_map=auto_map, **tokenizer)
    edit(folder / "config.json", model_type="evil", auto_map=MODEL_MAP)
    return folder, plant(folder, *FILES)


# ---- adapters ----


@pytest.mark.parametrize("auto_map", TOKENIZER_MAPS.values(), ids=TOKENIZER_MAPS)
def test_an_adapter_whose_tokenizer_needs_code_is_refused_by_name(tmp_path, auto_map):
    folder, mark = adapter_with(tmp_path, auto_map, tokenizer_class="EvilTokenizer")
    with pytest.raises(
        BaseModelError, match=r"tokenizer_config.json asks for Python code .*auto_map.*trust_remote_code"
    ):
        AdapterFolder(folder).tokenizer(MODEL_DIR)
    assert not mark.exists()


VERBS = {
    "chat": ["chat", "{}"],
    "evaluate": ["evaluate", "{}", "--data", "{data}"],
    "train": ["train", "--model_name_or_path=demo", "--dataset_name={data}", "--adapter_name_or_path={}",
              "--output_dir={out}"],
    "export": ["export", "{}", "--to=gguf", "-o={out}"],
    "vllm": ["export", "{}", "--to=vllm"],
    "merge": ["merge", "{}", "-o={out}"],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["tokenizer", "prompt tuning", "prompt tuning elsewhere"])
def test_no_verb_runs_an_adapters_code(tmp_path, capsys, monkeypatch, verb, kind):
    folder, mark = adapter_with(tmp_path, TOKENIZER_MAPS["pair"], tokenizer_class="EvilTokenizer")
    if kind != "tokenizer":
        other = prompt_tuning(tmp_path / "prompt", tokenizer_name_or_path=str(folder))
        shutil.copy(folder / "base_quantization.json", other)
        if kind == "prompt tuning":
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(other / name, folder)
        else:
            folder = other
        vouch(folder)
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 4)
    arguments = [word.format(folder, data=data, out=out) for word in VERBS[verb]]
    code, said = run(capsys, monkeypatch, *arguments)
    assert not mark.exists() and "[y/N]" not in said and "Traceback" not in said
    assert code == 2 or (verb, kind) in {
        ("vllm", "tokenizer"),
        ("merge", "tokenizer"),
        ("chat", kind),
        ("evaluate", kind),
    }
    if kind == "tokenizer" and verb in ("chat", "evaluate", "train", "export"):
        assert code == 2 and "tokenizer_config.json asks for Python code" in said, said


@pytest.mark.processes
def test_the_lines_of_a_pipe_are_no_consent(tmp_path):
    folder, mark = adapter_with(tmp_path, TOKENIZER_MAPS["pair"], tokenizer_class="EvilTokenizer")
    prompt_tuning_folder = prompt_tuning(tmp_path / "prompt", tokenizer_name_or_path=str(folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(prompt_tuning_folder / name, folder)
    vouch(folder)
    done = qpsft("chat", folder)
    assert not mark.exists() and done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr
    assert "asks for Python code" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


# ---- models ----


def test_a_model_that_needs_code_is_refused_by_name(tmp_path, capsys, monkeypatch):
    folder = copy_folder(MODEL_DIR, tmp_path / "model")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    mark, out = plant(folder, *FILES), tmp_path / "out"
    for verb in (
        ["chat", folder],
        ["plan", f"--model_name_or_path={folder}"],
        ["export", folder, "--to=gguf", "-o", out],
    ):
        code, said = run(capsys, monkeypatch, *verb)
        assert code == 2 and "config.json asks for Python code" in said, said
    assert not mark.exists() and not out.exists()


def test_code_beside_a_model_that_transformers_knows_does_not_run(tmp_path):
    folder = make_base(tmp_path / "model")
    edit(folder / "config.json", auto_map=MODEL_MAP)
    edit(folder / "tokenizer_config.json", auto_map={"AutoProcessor": "evil.Evil"})
    edit(folder / "generation_config.json", auto_map=MODEL_MAP, custom_generate="evil")
    mark = plant(folder, *FILES)
    load_base(folder, verbose=False)
    load_exported(ExportedWeights(folder), "cpu")
    assert not mark.exists()


def test_an_attention_kernel_from_the_hub_is_refused(tmp_path):
    folder = make_base(tmp_path / "model")
    edit(folder / "config.json", attn_implementation="someone/attention")
    with pytest.raises(BaseModelError, match="attention kernel 'someone/attention', which is code"):
        load_base(folder, verbose=False)


# ---- conversion ----


@pytest.fixture(scope="module")
def tools() -> Path:
    try:
        return llama_cpp.find_llama_cpp()
    except ExportError as error:
        pytest.skip(f"llama.cpp's converters cannot be downloaded here: {error.what}")


SLOW = pytest.mark.slow


@pytest.mark.processes
@pytest.mark.parametrize(
    "family, to, name",
    [
        ("glm4", "gguf", "tokenizer_config.json"),
        pytest.param("glm", "gguf", "tokenizer_config.json", marks=SLOW),
        pytest.param("glm4", "gguf", "config.json", marks=SLOW),
        pytest.param("glm4", "gguf", "processor_config.json", marks=SLOW),
        pytest.param("glm4", "ollama", "tokenizer_config.json", marks=SLOW),
        pytest.param("qwen2", "gguf", "tokenizer_config.json", marks=SLOW),
        pytest.param("qwen2", "gguf-lora", "tokenizer_config.json", marks=SLOW),
    ],
)
def test_conversion_runs_no_code_of_a_folder(tools, tmp_path, capsys, monkeypatch, family, to, name):
    """For GLM the converter trusts the code of a tokenizer that transformers knows; for others it would ask."""
    base = make_base(tmp_path / "model")
    settings = json.loads((base / "config.json").read_text()) | {"vocab_size": 136, "head_dim": 16}
    settings = {key: settings[key] for key in settings if key not in ("model_type", "architectures", "dtype")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(base)
    edit(base / name, auto_map=MODEL_MAP | TOKENIZER_MAPS["pair"])
    mark, source = plant(base, *FILES), base
    if to == "gguf-lora":
        source = make_adapter(tmp_path / "adapter", base)
    code, said = run(capsys, monkeypatch, "export", source, "--to", to, "-o", tmp_path / "x.gguf", "--no_run")
    assert not mark.exists() and "[y/N]" not in said and "SystemExit" not in said
    # the converter came to the tokenizer, which it does not know by its hash
    assert code == 0 if to == "gguf-lora" else "BPE pre-tokenizer was not recognized" in said, said
    assert (base / "evil.py").is_file() and "auto_map" in json.loads((base / name).read_text())


def test_the_copy_for_the_converter_holds_data_only(tmp_path):
    folder = copy_folder(MODEL_DIR, tmp_path / "model")
    plant(folder, *FILES)
    (folder / "weights.bin").write_bytes(b"pickle")
    (folder / "sitecustomize.pth").write_text("import evil")
    edit(folder / "tokenizer_config.json", auto_map=["evil.Evil"], inner={"auto_map": {"a": "b"}, "kept": 1})
    (folder / "processor_config.json").write_text('{"auto\\u005fmap": {"AutoProcessor": "evil.Evil"}, "kept": 2}')
    link_without_code(folder, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"} <= names
    assert not {path for path in names if path.endswith((".py", ".bin", ".pth")) or path == "custom_generate"}
    settings = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["inner"] == {"kept": 1}
    assert json.loads((tmp_path / "copy" / "processor_config.json").read_text()) == {"kept": 2}
    assert (tmp_path / "copy" / "model.safetensors").samefile(folder / "model.safetensors")


def test_running_a_gguf_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "here").mkdir()
    mark = plant(tmp_path / "here", "json.py", "xllamacpp.py")
    code, environment = llama_server.SERVE, {"PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code, "a.gguf", "{}"], cwd=tmp_path / "here", env=environment, check=False)
    assert not mark.exists()


def test_the_archive_is_checked_before_anything_of_it_or_for_it_runs(tmp_path, monkeypatch):
    """The hash is compared first; no other program is started to download it, so no build requirement runs."""
    started = []
    monkeypatch.setattr(llama_cpp.subprocess, "Popen", lambda *a, **o: started.append(a))
    monkeypatch.setattr(llama_cpp.subprocess, "run", lambda *a, **o: started.append(a))
    monkeypatch.setattr(llama_cpp.urllib.request, "urlopen", lambda *a, **o: io.BytesIO(b"something else"))
    monkeypatch.setattr(llama_cpp, "_unpack", lambda *a: started.append(a))
    monkeypatch.setenv("QPSFT_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ExportError, match="has SHA-256"):
        llama_cpp.find_llama_cpp()
    assert not started and list(tmp_path.iterdir()) == []


def test_a_download_that_fails_is_a_clear_error(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(llama_cpp.urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("QPSFT_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ExportError, match="could not be downloaded from https.*no network.*--llama_cpp"):
        llama_cpp.find_llama_cpp()
    assert list(tmp_path.iterdir()) == []


# ---- the kind ----


def test_standard_input_is_empty_for_libraries():
    code = (
        "import sys, os\n"
        "from qpsft.terminal import no_standard_input\n"
        "with no_standard_input():\n"
        "    print(repr(sys.stdin.read()), os.read(0, 10))\n"
        "    try: input('consent? ')\n"
        "    except EOFError: print('asked in vain')\n"
        "print(input())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="mine\n", capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split("\n")[:2] == ["'' b''", "consent? asked in vain"] and done.stdout.endswith("\nmine\n")


def test_standard_input_comes_back_after_an_error(monkeypatch):
    own = io.StringIO("mine")
    monkeypatch.setattr(sys, "stdin", own)
    with pytest.raises(KeyError), no_standard_input():
        assert sys.stdin is not own
        raise KeyError
    assert sys.stdin is own


def test_every_loader_says_that_it_trusts_no_code():
    """transformers' loaders by an argument, PEFT's, which have none, under `code_is_off`."""
    calls, silent = 0, []
    for path in sorted((ROOT / "qpsft").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("code_is_off" in ast.unparse(item) for item in node.items)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, method = ast.unparse(node.func.value), node.func.attr
            if method not in ("from_pretrained", "from_config") or not LOADERS.match(owner):
                continue
            calls += 1
            says = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
            if not says and not (owner.startswith("Peft") and id(node) in guarded):
                silent.append(f"{path.name}:{node.lineno} {owner}.{method}")
    assert calls >= 9 and not silent, silent


def test_a_tokenizer_that_is_trusted_still_loads_its_code(tmp_path):
    """The control of this file: the planted code does run where the user asks for it."""
    folder = copy_folder(MODEL_DIR, tmp_path / "model")
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_MAPS["pair"], tokenizer_class="EvilTokenizer")
    mark = plant(folder)
    with pytest.raises(SystemExit):
        load_tokenizer(folder, trust_remote_code=True)
    assert mark.exists()
