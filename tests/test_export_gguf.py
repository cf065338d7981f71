"""GGUF export: llama.cpp's converter runs, and what it wrote is read back and compared.

Every conversion is a process that loads transformers, for seconds: those that only another folder tells apart are
marked `processes`.
"""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_tokenizers import byte_tokenizer
from exporting import copy_folder, edit_json, edit_weights, export, make_adapter, merge_by_hand
from merging import vouch
from safetensors.torch import load_file, save_file
from test_export_ollama import CONVERSATIONS, TEMPLATES, run_go_template
from tokenizers import normalizers

from qpsft import cli
from qpsft.chat.conversation import Conversation
from qpsft.errors import ExportError, OutputError
from qpsft.export import gguf as gguf_module
from qpsft.export import gguf_check, llama_cpp
from qpsft.export.gguf_check import BLOCK_ERROR, check_gguf, rounding_error
from qpsft.export.gguf_file import GgufFile, interleave_halves, join_halves
from qpsft.export.gguf_quantize import kernel, quantize_gguf
from qpsft.export.gguf_run import LIMITS, run_gguf
from qpsft.export.gguf_texts import COUNT, varied_texts
from qpsft.export.merged_model import MergedModel, stage, without_generation_markers
from qpsft.export.ollama import compare_with_llama_cpp, derive_template, modelfile
from qpsft.files import process_mark
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.folder import MODEL_DIR
from qpsft.model.llama_server import LlamaServer, has_llama_cpp
from qpsft.verify.prompts import read_prompts

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="xllamacpp is not installed")


@pytest.fixture(scope="session")
def tools() -> Path:
    """llama.cpp's converters: in the cache, or downloaded once."""
    try:
        return llama_cpp.find_llama_cpp()
    except ExportError as error:
        if "could not download" in error.what:
            pytest.skip(f"llama.cpp's converters cannot be downloaded here: {error.what}")
        raise


@pytest.fixture(scope="session")
def gguf(tools):
    return llama_cpp.load_gguf(tools)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("gguf") / "adapter")


@pytest.fixture(scope="module")
def merged(adapter) -> Path:
    return merge_by_hand(adapter, adapter.parent / "merged", "bfloat16")


@pytest.fixture(scope="module")
def exported(merged, tools) -> Path:
    """The merged demo model as f16, read back in many blocks of rows."""
    path = merged.parent / "demo.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_check, "BLOCK_OF_VALUES", 700)
        report = export("gguf", merged, path)
    assert report.check.types == {"F16": 22, "F32": 7} and report.check.tensors == 29
    assert report.check.largest_error < 2**-11 and report.run.ran == has_llama_cpp()
    assert {"llama.context_length", "llama.rope.freq_base", "tokenizer.chat_template"} <= set(report.check.metadata)
    assert report.stops == ["<|end|>"] and report.bytes == path.stat().st_size
    assert sorted(p.name for p in path.parent.iterdir()) == ["adapter", "demo.gguf", "merged"], "something was left"
    return path


def check(path: Path, folder: Path, gguf):
    return check_gguf(path, MergedModel.load(folder), gguf)


@pytest.mark.processes
def test_an_adapter_is_merged_verified_and_converted(adapter, tools, tmp_path):
    output = tmp_path / "new" / "model.gguf"
    report = export("gguf", adapter, output, outtype="q8_0", no_run=True)
    assert report.merge.verification["same_model"] and "verified: the same model" in report.summary()
    assert report.check.types == {"Q8_0": 22, "F32": 7} and 1e-3 < report.check.largest_error < 0.01
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]


def change_one_weight(tensors):
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] += 0.01


def swap_two_rows(tensors):
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    weight[[0, 1]] = weight[[1, 0]]


def lengthen(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


@pytest.mark.parametrize(
    "change, words",
    [
        (change_one_weight, "values of blk.1.ffn_gate.weight"),
        (swap_two_rows, "values of blk.0.attn_q.weight"),
        (lengthen, "blk.0.ffn_up.weight .* has shape"),
        (lambda t: t.pop("model.norm.weight"), "output_norm.weight in it comes from no tensor"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}), "it lacks blk.0.attn_q.bias"),
        (lambda t: t.update({"model.mystery.weight": torch.zeros(2)}), "model.mystery.weight .* has no name"),
    ],
    ids=["one value", "rows swapped", "shape", "left over", "left out", "unknown"],
)
def test_a_wrong_conversion_is_caught(exported, merged, gguf, tmp_path, monkeypatch, change, words):
    """The file is right and the folder it is compared with is not: the same difference, the other way round."""
    monkeypatch.setattr(gguf_check, "BLOCK_OF_VALUES", 700)
    other = copy_folder(merged, tmp_path / "other")
    edit_weights(other, change)
    with pytest.raises(ExportError, match=words):
        check(exported, other, gguf)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("max_position_embeddings", 1024, "llama.context_length is 512, not 1024"),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}, "llama.rope.freq_base is 10000.0"),
        ("rms_norm_eps", 1e-5, "layer_norm_rms_epsilon"),
    ],
)
def test_wrong_metadata_are_caught(exported, merged, gguf, tmp_path, key, value, words):
    other = copy_folder(merged, tmp_path / "other")
    edit_json(other / "config.json", **{key: value})
    with pytest.raises(ExportError, match=words):
        check(exported, other, gguf)


@pytest.mark.parametrize(
    "config, lost",
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, 64),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 3}, None),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 512}, None),
        ({"sliding_window": None}, None),
    ],
    ids=str,
)
def test_a_sliding_window_that_the_file_does_not_name_is_noted(exported, merged, gguf, tmp_path, config, lost):
    """llama.cpp computes a Mistral as a Llama."""
    other = copy_folder(merged, tmp_path / "other")
    edit_json(other / "config.json", **config)
    assert check(exported, other, gguf).window_lost == lost


def test_the_rotary_layout_is_llama_cpps(exported, merged, gguf):
    """By its definition: rows 2i and 2i + 1 of a head in the file are rows i and i + d/2 of the merged weight."""
    merged_weight = load_file(merged / "model.safetensors")["model.layers.2.self_attn.k_proj.weight"].float()
    stored = GgufFile(exported, gguf).values("blk.2.attn_k.weight")
    head, half = 3, 16
    for i in (0, 5, 15):
        assert torch.allclose(stored[head * 32 + 2 * i], merged_weight[head * 32 + i], rtol=1e-3, atol=1e-6)
        assert torch.allclose(stored[head * 32 + 2 * i + 1], merged_weight[head * 32 + half + i], rtol=1e-3, atol=1e-6)
    numbers = torch.arange(128.0)[:, None]
    assert torch.equal(join_halves(interleave_halves(numbers, 4), 4), numbers)


def test_a_truncated_file_is_refused(exported, merged, gguf, tmp_path):
    for size in (10, 5000, exported.stat().st_size - 1000):
        broken = tmp_path / f"{size}.gguf"
        broken.write_bytes(exported.read_bytes()[:size])
        with pytest.raises(ExportError, match="cannot be read back as GGUF"):
            check(broken, merged, gguf)


def test_generation_markers_become_conditions_with_the_same_text(merged):
    tokenizer = load_tokenizer(merged)
    template = tokenizer.chat_template
    assert "generation %}" in template
    plain = without_generation_markers(template)
    assert "generation %}" not in plain and "add_generation_prompt" in plain
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    texts = []
    for tokenizer.chat_template in (template, plain):
        texts.append(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    assert texts[0] == texts[1]
    assert without_generation_markers("a {%- generation -%} b {%- endgeneration +%}") == (
        "a {%- if true -%} b {%- endif +%}"
    )


def test_a_byte_level_tokenizer_is_named_as_before_transformers_5(merged, tmp_path):
    """Else the converter takes a Phi-4 for a Phi-3, and asks for its tokenizer.model."""

    def staged_class(folder: Path) -> str:
        return json.loads((stage(folder, tmp_path / "staged") / "tokenizer_config.json").read_text())["tokenizer_class"]

    other = copy_folder(merged, tmp_path / "other")
    (other / "tokenizer.model").unlink(missing_ok=True)
    byte_tokenizer().save_pretrained(other)
    assert staged_class(other) == "GPT2Tokenizer"
    shutil.rmtree(tmp_path / "staged")
    assert staged_class(merged) != "GPT2Tokenizer"


@pytest.mark.processes
def test_special_tokens_that_became_plain_text_are_caught(merged, tools, gguf, tmp_path):
    """What the converter makes of a folder that transformers 5 saved, without what `stage` adds to it."""
    path = tmp_path / "raw.gguf"
    arguments = [str(merged), "--outtype", "f16"]
    llama_cpp.run_converter(tools, llama_cpp.CONVERTER, arguments, path, expected=1)
    with pytest.raises(ExportError, match=r"its token '<\|end\|>' is plain text"):
        check_gguf(path, MergedModel(merged, load_tokenizer(merged), {3}), gguf)


@pytest.mark.processes
def test_a_lost_merge_order_is_refused_where_it_cannot_be_run(merged, tools, tmp_path):
    other = copy_folder(merged, tmp_path / "merged")
    (other / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match="has no tokenizer.model") as error:
        export("gguf", other, tmp_path / "x.gguf", no_run=True)
    assert str(error.value).count(str(other)) == 2


@pytest.mark.processes
def test_a_lost_merge_order_of_an_adapter_is_its_bases(tools, tmp_path):
    base = copy_folder(MODEL_DIR, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (base / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match="has no tokenizer.model") as error:
        export("gguf", adapter, tmp_path / "x.gguf", no_run=True)
    assert str(error.value).count(str(base)) == 2 and "exporting" not in str(error.value)


@pytest.mark.processes
def test_stop_tokens_the_file_cannot_name_and_a_type_it_cannot_be_are_reported(
    merged, tools, gguf, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_module, "kernel", lambda: None)
    two_stops = copy_folder(merged, tmp_path / "merged")
    edit_json(two_stops / "generation_config.json", eos_token_id=[3, 1, 4, 5])
    report = export("gguf", two_stops, tmp_path / "m-Q4_K_M.gguf", outtype="Q4_K_M", no_run=True)
    file, last = GgufFile(report.path, gguf), load_tokenizer(merged).convert_ids_to_tokens(5)
    assert [file.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")] == [3, 1, 4]
    assert len(report.stops) == 4 and any(f"stop tokens {last!r}:" in note for note in report.notes)
    assert report.path == tmp_path / "m-f16.gguf" and report.path.is_file() and report.outtype == "f16"
    assert "q4_k_m needs llama.cpp's rounding" in report.summary() and "llama-quantize m-f16.gguf" in report.summary()


def test_rounding_bounds_of_block_types_hold_and_bite(gguf):
    """Bell-shaped weights fit every bound; three times the error of the type does not."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for kind in ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
        number = gguf.GGMLQuantizationType[kind]
        dense = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
        error, right = rounding_error([(torch.tensor(dense), torch.tensor(values))], kind)
        assert right and error > BLOCK_ERROR[kind] / 3, (kind, error)
        worse = values + 3 * (dense - values)
        assert rounding_error([(torch.tensor(worse), torch.tensor(values))], kind)[1] is False


# the adapter alone


@pytest.mark.processes
def test_an_adapter_alone(tools, gguf, tmp_path):
    """llama.cpp's update is alpha / rank · B·A (llama-adapter.cpp), so B carries what PEFT's scale has besides."""
    adapter = make_adapter(tmp_path / "adapter", use_rslora=True)  # alpha / sqrt(4): twice the plain one
    edit_json(adapter / "adapter_config.json", alpha_pattern={"layers.2.mlp.down_proj": 4})
    report = export("gguf-lora", adapter, tmp_path / "lora.gguf")
    assert report.layers == 21 and "not the model that was trained" in report.summary()
    file = GgufFile(tmp_path / "lora.gguf", gguf)
    assert file.value("general.type") == "adapter" and file.value("adapter.lora.alpha") == 8
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
    assert torch.equal(file.values("blk.1.ffn_down.weight.lora_a"), tensors[name.format(1, "A")])
    assert torch.allclose(file.values("blk.1.ffn_down.weight.lora_b"), 2 * tensors[name.format(1, "B")])
    # of a layer with half the alpha
    assert torch.allclose(file.values("blk.2.ffn_down.weight.lora_b"), tensors[name.format(2, "B")])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.allclose(file.values("blk.1.attn_q.weight.lora_b"), 2 * interleave_halves(tensors[name], 4))


@pytest.mark.parametrize("key, value", [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all")])
def test_what_a_lora_gguf_cannot_hold_is_refused(adapter, tmp_path, key, value):
    other = copy_folder(adapter, tmp_path / "adapter")
    edit_json(other / "adapter_config.json", **{key: value})
    with pytest.raises(ExportError, match="cannot hold"):
        export("gguf-lora", other, tmp_path / "lora.gguf")


def test_a_nan_in_the_adapter_is_refused(adapter, tmp_path):
    other = copy_folder(adapter, tmp_path / "adapter")
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, other / "adapter_model.safetensors", metadata={"format": "pt"})
    vouch(other)
    with pytest.raises(ExportError, match="not finite"):
        export("gguf-lora", other, tmp_path / "lora.gguf")


# bad input


def test_bad_input_says_what_to_do(merged, tmp_path, monkeypatch):
    existing = tmp_path / "there.gguf"
    existing.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export("gguf", merged, existing)
    assert existing.read_text() == "mine"
    with pytest.raises(OutputError, match="is a folder"):
        export("gguf", merged, tmp_path)
    with pytest.raises(ExportError, match="outtype 'q9' is not known"):
        export("gguf", merged, tmp_path / "x.gguf", outtype="q9")
    with pytest.raises(ExportError, match="neither an adapter folder"):
        export("gguf", tmp_path, tmp_path / "x.gguf")
    with pytest.raises(ExportError, match="no llama.cpp checkout"):
        export("gguf", merged, tmp_path / "x.gguf", llama_cpp=tmp_path)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(OutputError, match="0.00 GB free"):
        export("gguf", merged, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.gguf"]


def fake_llama_cpp(folder: Path, script: str) -> Path:
    (folder / "gguf-py/gguf").mkdir(parents=True)
    (folder / "gguf-py/gguf/__init__.py").write_text("class SpecialVocab:\n    def add_to_gguf(self, writer): ...\n")
    (folder / "gguf-py/gguf/quants.py").touch()
    (folder / llama_cpp.CONVERTER).write_text(script)
    return folder


def test_a_failing_converter_shows_what_it_said_and_leaves_nothing(merged, tmp_path):
    script = "import sys\nprint('ERROR: the sky fell', file=sys.stderr)\nsys.exit(3)"
    tools = fake_llama_cpp(tmp_path / "llama.cpp", script)
    with pytest.raises(ExportError, match=r"(?s)exit code 3.*the sky fell"):
        export("gguf", merged, tmp_path / "x.gguf", llama_cpp=tools)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_what_the_converter_does_not_know_is_said_before_the_merge(adapter, tmp_path, monkeypatch):
    script = "import sys\nassert '--vocab-only' in sys.argv\nsys.exit('BPE pre-tokenizer was not recognized')"
    tools = fake_llama_cpp(tmp_path / "llama.cpp", script)
    monkeypatch.setattr(gguf_module, "merge_adapter", None)
    with pytest.raises(ExportError, match="byte-level BPE tokenizers by a hash"):
        export("gguf", adapter, tmp_path / "x.gguf", llama_cpp=tools)


@pytest.mark.parametrize(
    "said, code, words",
    [
        ("OSError: 4194304 requested and 1835008 written", 1, "The disk did not take all of it"),
        ("OSError: [Errno 28] No space left on device", 1, "The disk did not take all of it"),
        ("", -9, "memory is short"),
        ("ValueError: something else", 1, "Try a newer llama.cpp"),
    ],
)
def test_a_failing_converter_gets_the_advice_that_helps(said, code, words):
    assert words in llama_cpp._advice(said, code)


def test_an_interrupted_export_leaves_nothing_and_the_converter_dies(merged, tmp_path, monkeypatch):
    beat = tmp_path / "beat"
    script = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('x')\n    time.sleep(0.02)"
    tools = fake_llama_cpp(tmp_path / "llama.cpp", script)

    def interrupt(seconds):
        while not beat.exists():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        export("gguf", merged, tmp_path / "x.gguf", llama_cpp=tools)
    size = beat.stat().st_size
    import time

    time.sleep(0.2)
    assert beat.stat().st_size == size, "the converter still runs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beat", "llama.cpp"]


def test_what_a_killed_run_left_is_removed(merged, tmp_path):
    mark = f"{process_mark().split('.')[0]}.999999999.1"
    left = tmp_path / f".x.gguf.exporting.{mark}"
    (left / "merged").mkdir(parents=True)
    other = tmp_path / f".y.gguf.exporting.{mark}"
    other.mkdir()
    tools = fake_llama_cpp(tmp_path / "llama.cpp", "raise SystemExit(1)")
    with pytest.raises(ExportError):
        export("gguf", merged, tmp_path / "x.gguf", llama_cpp=tools)
    assert not left.exists() and other.exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(llama_cpp.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(ExportError, match="need no-such-package"):
        llama_cpp.check_requirements()


# running it


def test_the_varied_texts_are_varied(merged):
    tokenizer = load_tokenizer(merged)
    texts = varied_texts(tokenizer)
    assert len(texts) == len(set(texts)) == COUNT and texts == varied_texts(tokenizer)
    assert "Once upon a time, there was a little girl named Lily." in texts
    assert any("<|user|>Hello!<|end|><|assistant|>" in text for text in texts)
    assert any("😀" in text for text in texts) and any("漢" in text for text in texts)


@pytest.fixture(scope="module")
def prompts(merged):
    """Of the merged demo model, all of its own length."""
    return read_prompts(None, merged, load_tokenizer(merged), 8, 512)[0]


@needs_llama_cpp
def test_llama_cpp_computes_the_merged_model(exported, merged, prompts):
    run = run_gguf(exported, MergedModel.load(merged), prompts, "f16")
    assert run.texts == COUNT and not run.notes, "tokens, stop tokens and the chat template are the merged model's"
    assert run.compared.positions == 200 and run.compared.kl < 1e-5
    numbers = list(run.compared.chosen)
    computed = torch.tensor([run.compared.chosen[number] for number in numbers])
    assert torch.allclose(computed, run.compared.exact.chosen[numbers], atol=0.02)


@needs_llama_cpp
def test_where_the_layout_is_not_known_the_run_decides(merged, exported, gguf, prompts, tmp_path, monkeypatch):
    """The same layout that is refused in a Llama is only noted in an unknown architecture, and then found."""
    other = copy_folder(merged, tmp_path / "other")
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(other, lambda tensors: tensors.update({name: interleave_halves(tensors[name], 4).contiguous()}))
    monkeypatch.setattr(gguf_check, "KNOWN", set())
    report = check(exported, other, gguf)
    assert report.tensors == 28 and [what for what in report.unsure if "blk.0.attn_q.weight" in what]
    with pytest.raises(ExportError, match="other probabilities"):
        run_gguf(exported, MergedModel.load(other), prompts, "f32")


@needs_llama_cpp
def test_llama_cpp_that_computes_another_model_fails(merged, exported, prompts, tmp_path):
    """The weights are right (reading back says so) and the rotary base is another: only running it tells."""
    other = copy_folder(merged, tmp_path / "other")
    edit_json(other / "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    with pytest.raises(ExportError, match="other probabilities"):
        run_gguf(exported, MergedModel.load(other), prompts, "f16")


@needs_llama_cpp
@pytest.mark.skipif(kernel() is None, reason="xllamacpp's library exports no ggml_quantize_chunk here")
@pytest.mark.parametrize("outtype", ["q4_k_m", "q2_k", "iq4_xs"])
def test_a_quantized_file_is_the_merged_model_up_to_its_type(exported, merged, gguf, prompts, tmp_path, outtype):
    """llama.cpp reads what was rounded here: the values are the type's (read back), and so are the probabilities."""
    path, model = tmp_path / "x.gguf", MergedModel.load(merged)
    quantize_gguf(exported, path, outtype, gguf)
    assert path.stat().st_size < exported.stat().st_size
    report = check_gguf(path, model, gguf)
    assert report.tensors == 29 and {"q4_k_m": "Q4_K", "q2_k": "Q3_K", "iq4_xs": "IQ4_XS"}[outtype] in report.types
    assert 1e-5 < run_gguf(path, model, prompts, outtype).compared.kl < LIMITS[outtype]


@needs_llama_cpp
def test_chat_talks_to_the_file(exported, merged, capsys, monkeypatch):
    """The turns of a conversation, greedily: what the merged model answers, and it ends by itself."""
    model, tokenizer = load_base(merged, quantization="none", dtype="float32", verbose=False)
    expected = Conversation(model, tokenizer, max_new_tokens=24)
    asked = ["add one, then sort, then rotate, then swap halves: 0259", "reverse: 1234"]
    for text in asked:
        expected.say(text)
        expected.answer()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked) + "\n"))
    assert cli.main(["chat", str(exported), "--max_new_tokens=24"]) == 0
    said = capsys.readouterr()
    assert said.out == "".join(f"{turn.answers['tuned']}\n" for turn in expected.turns)
    assert "run by llama.cpp" in " ".join(said.err.split())
    assert cli.main(["chat", str(exported), "--base=demo"]) == 2 and "has no effect" in capsys.readouterr().err
    assert (
        cli.main(["chat", str(exported.with_name("dema.gguf"))]) == 2 and "There is no file" in capsys.readouterr().err
    )


def with_template(source: Path, path: Path, template: str, gguf) -> Path:
    """The same GGUF with another chat template."""
    file, writer = GgufFile(source, gguf), gguf.GGUFWriter(path, "llama")
    file.copy_metadata(writer)
    writer.kv_data[0]["tokenizer.chat_template"].value = template
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "phi3", "glm4moe"])
def test_ollamas_modelfile_writes_what_llama_cpp_does(exported, merged, gguf, tmp_path, name):
    """From the text of the Modelfile, and from the chat template in the GGUF."""
    tokenizer = load_tokenizer(merged)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    pieces, reason = derive_template(tokenizer, adds_bos=True)
    template = modelfile("m.gguf", pieces, [], None).split('TEMPLATE """')[1].split('"""')[0]
    path = with_template(exported, tmp_path / "x.gguf", tokenizer.chat_template, gguf)
    with LlamaServer(path, context=512) as server:
        for messages in CONVERSATIONS:
            assert run_go_template(template, messages) == server.apply_template(messages)
    count, notes = compare_with_llama_cpp(path, pieces)
    assert count == 6 and not notes
    if name == "llama3":
        other = replace(pieces, opening=pieces.opening.rstrip())
        count, (note,) = compare_with_llama_cpp(path, other)
        assert count == 0 and "llama.cpp, which reads the chat template in the GGUF, writes" in note


@needs_llama_cpp
def test_a_stop_token_that_llama_cpp_passes_is_named(exported, merged, prompts):
    model = MergedModel.load(merged)
    plain = model.tokenizer.convert_tokens_to_ids("a")
    model.stops.add(plain)
    (note,) = run_gguf(exported, model, prompts, "f16").notes
    assert note.startswith("llama.cpp does not stop at 'a' by itself")


@needs_llama_cpp
def test_a_tokenizer_that_normalizes_is_noted_and_one_that_changes_texts_refused(exported, merged, prompts):
    """Qwen's composes letters and accents, llama.cpp none: only texts that are not composed differ."""
    model = MergedModel.load(merged)
    backend, spaces = model.tokenizer.backend_tokenizer, normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces])
    (note,) = run_gguf(exported, model, prompts, "f16").notes
    assert note.startswith("the tokenizer puts texts into Unicode's form NFC first")
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), spaces])
    with pytest.raises(ExportError, match="makes other tokens of"):
        run_gguf(exported, model, prompts, "f16")


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_an_error_and_no_crash(exported, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(exported.read_bytes()[:20000])
    with pytest.raises(ExportError, match=r"(?s)cannot load broken.gguf.*exit code"):
        LlamaServer(broken)


@pytest.mark.processes
@needs_llama_cpp
@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_the_converters_types_are_the_merged_model(merged, tools, tmp_path, outtype):
    report = export("gguf", merged, tmp_path / "x.gguf", outtype=outtype)
    assert report.outtype == outtype and report.run.ran and report.run.compared.kl < LIMITS[outtype]


@pytest.mark.processes
@needs_llama_cpp
def test_stories260k_is_tokenized_otherwise_by_llama_cpp(stories, tools, tmp_path):
    with pytest.raises(ExportError, match="llama.cpp makes other tokens of 'Once upon a time, there was a little girl"):
        export("gguf", stories, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
