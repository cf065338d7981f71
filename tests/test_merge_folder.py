"""The merged folder: its files, and that it is there finished or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from merging import load_strictly, save_peft_adapter, vouch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, save_tokenizer
from transformers import AutoTokenizer

from qpsft.errors import BaseModelError, ExportError, OutputError
from qpsft.files import finished_folder, process_mark
from qpsft.merge import merge_adapter
from qpsft.merge.safetensors_stream import ShardWriter, TensorFile, TensorSpec, plan_shards

SMALL_FILES = ["README.md", "config.json", "generation_config.json", "merge_report.json", "tokenizer.json"]
SMALL_FILES += ["tokenizer_config.json"]


@pytest.fixture
def base(tmp_path):
    return save_tiny_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return save_peft_adapter(tmp_path / "adapter", base)


def merge(adapter, output=None, **options):
    return merge_adapter(adapter, output, **{"no_verify": True} | options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


def test_exactly_these_files(tmp_path, adapter):
    report = merge(adapter)
    assert names(tmp_path / "adapter-merged") == sorted([*SMALL_FILES, "model.safetensors"]) == report.files
    assert hidden(tmp_path) == []
    with safe_open(tmp_path / "adapter-merged" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert report.bytes == 2 * sum(v.numel() for v in load_file(tmp_path / "base" / "model.safetensors").values())


def test_in_shards_of_a_size(tmp_path, adapter):
    report = merge(adapter, max_shard_size="50KB")
    folder = tmp_path / "adapter-merged"
    shards = sorted(name for name in names(folder) if name.startswith("model-"))
    count = len(shards)
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] and count > 3
    assert names(folder) == sorted([*SMALL_FILES, *shards, "model.safetensors.index.json"]) == report.files
    assert all((folder / shard).stat().st_size < 53_000 for shard in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {n: f for f in shards for n in load_file(folder / f)} == index["weight_map"]
    assert index["metadata"]["total_size"] == report.bytes
    merge(adapter, tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(whole[name], load_file(folder / index["weight_map"][name])[name]) for name in whole)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, adapter):
    save_tokenizer(adapter, size=202)
    with pytest.raises(BaseModelError, match="has 2 tokens more than the model's vocabulary of 200, such as 'w1"):
        merge(adapter)
    assert not (tmp_path / "adapter-merged").exists() and hidden(tmp_path) == []


def test_a_pointer_instead_of_a_tokenizer_is_refused(base, adapter):
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BaseModelError, match="tokenizer.json is a git-lfs pointer"):
        merge(adapter)


def test_half_a_tokenizer_is_completed_from_the_base(tmp_path, base, adapter):
    shutil.copy(base / "tokenizer_config.json", adapter)
    merge(adapter)
    merged = AutoTokenizer.from_pretrained(tmp_path / "adapter-merged")
    assert merged.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_the_end_of_turn_that_the_template_writes_is_a_stop_token(tmp_path, base, adapter):
    """The tokenizer's eos is `</s>`, and the template ends turns with another special token."""
    save_tokenizer(base, ("<s>", "</s>", "<end>"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} <end> {% endfor %}"
    tokenizer.save_pretrained(base)
    merge(adapter)
    settings = json.loads((tmp_path / "adapter-merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_config_and_tokenizer(tmp_path, base, adapter, dtype):
    (base / "tokenizer.model").write_bytes(b"a vocabulary that llama.cpp reads")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(base / "tokenizer.json", adapter)
    shutil.copy(base / "tokenizer_config.json", adapter)
    merge(adapter, dtype=dtype)
    folder = tmp_path / "adapter-merged"
    config, original = (json.loads((path / "config.json").read_text()) for path in (folder, base))
    assert config == {key: value for key, value in original.items() if key != "torch_dtype"} | {"dtype": dtype}
    assert load_strictly(folder).dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_nothing_is_said_of_quantization(tmp_path, base, adapter):
    from qpsft.model.base import load_base

    model, tokenizer = load_base(base, verbose=False)
    model.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    assert "quantization_config" in json.loads((tmp_path / "rounded" / "config.json").read_text())
    merge(save_peft_adapter(tmp_path / "a", tmp_path / "rounded"))
    assert "quantization_config" not in json.loads((tmp_path / "a-merged" / "config.json").read_text())
    stored = load_file(tmp_path / "a-merged" / "model.safetensors")
    assert stored.keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_embeddings_are_stored_under_the_embeddings_name(tmp_path, stored_as):
    base = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = save_peft_adapter(tmp_path / "adapter", base)
    tensors = load_file(base / "model.safetensors")
    matrix = tensors.pop("model.embed_tokens.weight")
    both = {name: matrix.clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | {k: v for k, v in both.items() if stored_as in (k, "both")}, base / "model.safetensors")
    vouch(adapter)
    merge(adapter, dtype="float32")
    merged = load_file(tmp_path / "adapter-merged" / "model.safetensors")
    assert "lm_head.weight" not in merged and torch.equal(merged["model.embed_tokens.weight"], matrix)
    load_strictly(tmp_path / "adapter-merged")


def test_what_the_architecture_does_not_use_is_left_out_and_said(tmp_path, base, adapter):
    tensors = load_file(base / "model.safetensors") | {"model.layers.9.extra.weight": torch.zeros(3)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    vouch(adapter)
    report = merge(adapter)
    load_strictly(tmp_path / "adapter-merged")
    assert report.left_out == ["model.layers.9.extra.weight"] and "model.layers.9.extra.weight" in report.summary()


def test_the_card_and_the_report_say_how(tmp_path, base, adapter):
    report = merge(adapter, no_verify=False, dtype="float32")
    assert report.verification["same_model"] and "the same model" in report.summary()
    card = (tmp_path / "adapter-merged" / "README.md").read_text()
    for text in ("| base | base |", "| adapter | adapter |", "weights training saw", "float32", "nf4 in blocks of 64"):
        assert text in card
    assert report.verification["summary"] in card and str(tmp_path) not in card
    stored = json.loads((tmp_path / "adapter-merged" / "merge_report.json").read_text())
    assert all(len(line) <= 80 for line in report.summary().splitlines() if str(tmp_path) not in line)
    assert stored["verification"]["same_model"] and stored["dtype"] == "float32" and stored["seconds"] > 0
    assert (stored["low_rank"], stored["replaced"]) == (14, 0)


def test_onto_the_original_weights_another_model_is_what_it_is(tmp_path, adapter):
    report = merge(adapter, onto="original", no_verify=False)
    assert not report.verification["same_model"]
    card = (tmp_path / "adapter-merged" / "README.md").read_text()
    for text in (card, report.summary()):
        assert "as expected: merged onto the original weights" in text and "KL(live ‖ export)" in text
        assert "NOT" not in text and "✗" not in text
    assert "and not the same" in card


def test_an_output_that_exists(tmp_path, base, adapter):
    merge(adapter)
    stamp = (tmp_path / "adapter-merged" / "merge_report.json").read_bytes()
    with pytest.raises(OutputError, match="adapter-merged exists"):
        merge(adapter)
    assert (tmp_path / "adapter-merged" / "merge_report.json").read_bytes() == stamp
    merge(adapter, overwrite=True, dtype="float32", max_shard_size="50KB")
    load_strictly(tmp_path / "adapter-merged")
    assert "model.safetensors" not in names(tmp_path / "adapter-merged") and hidden(tmp_path) == []
    for source in (adapter, base):
        with pytest.raises(OutputError, match="is what the result is made from"):
            merge(adapter, source, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="home holds no merge_report.json, so qpsft did not write it"):
        merge(adapter, tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    merge(adapter, tmp_path / "empty")


@pytest.mark.parametrize("in_one_step", [True, False])
def test_replacing_keeps_the_old_one_until_the_new_one_is_there(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr("qpsft.files._exchange", lambda one, other: False)
    for text in ("old", "new"):
        with finished_folder(tmp_path / "out", mark="merge_report.json", overwrite=True) as folder:
            assert text == "old" or (tmp_path / "out" / "text").read_text() == "old"
            (folder / "text").write_text(text)
            (folder / "merge_report.json").write_text("{}")
    assert (tmp_path / "out" / "text").read_text() == "new" and names(tmp_path) == ["out"]


def test_a_folder_moved_aside_by_a_killed_run_comes_back(tmp_path):
    aside = tmp_path / f".out.replaced.{process_mark().split('.')[0]}.{2**22 - 3}.1"
    aside.mkdir()
    (aside / "merge_report.json").write_text("{}")
    with pytest.raises(RuntimeError), finished_folder(tmp_path / "out", mark="merge_report.json", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["merge_report.json"]


def test_another_process_that_writes_there(tmp_path):
    import psutil

    parent = psutil.Process(os.getppid())
    mark = f"{process_mark().split('.')[0]}.{parent.pid}.{int(parent.create_time())}"
    (tmp_path / f".out.merging.{mark}").mkdir()
    with (
        pytest.raises(OutputError, match=f"Process {parent.pid} is writing"),
        finished_folder(tmp_path / "out", mark="merge_report.json", overwrite=False),
    ):
        pass
    assert hidden(tmp_path) == [f".out.merging.{mark}"]


def test_too_little_space_is_found_before_the_first_byte(tmp_path, monkeypatch, adapter):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr("qpsft.merge.weights.ShardWriter", None)
    with pytest.raises(OutputError, match=r"needs 0\.05 GB and .* has 0\.00 GB free"):
        merge(adapter)
    assert not (tmp_path / "adapter-merged").exists() and hidden(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way(tmp_path, monkeypatch, adapter):
    def write(self, piece):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(OutputError, match="adapter-merged cannot be written: No space left on device"):
        merge(adapter)
    assert not (tmp_path / "adapter-merged").exists() and hidden(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path, adapter):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: (Not a directory|File exists)"):
        merge(adapter, tmp_path / "file" / "out")


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, adapter, after):
    left = iter(range(after))
    write = ShardWriter.write

    def interrupted(self, piece):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(self, piece)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter)
    assert not (tmp_path / "adapter-merged").exists() and hidden(tmp_path) == []


def killed(tmp_path, adapter, kills, seed):
    script = Path(__file__).with_name("merge_killer.py")
    command = [sys.executable, str(script), str(adapter), str(tmp_path / "out"), str(kills), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    return done.stdout.split()


@pytest.mark.processes
def test_killed_at_any_moment(tmp_path, adapter):
    """Onto nothing and over an earlier merge: the old state or the finished folder, and the next run cleans up."""
    assert len(killed(tmp_path, adapter, 5, 0)) == 10


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path, adapter):
    found = killed(tmp_path, adapter, 20, 1)
    assert len(found) == 40 and "left-over" in found, found


def test_a_writer_that_got_too_little_says_so(tmp_path):
    writer = ShardWriter(tmp_path / "x", [TensorSpec("x", torch.float32, (4,))])
    writer.write(torch.zeros(3))
    with pytest.raises(ExportError, match="4 bytes short"):
        writer.close()


def test_files_are_what_safetensors_reads(tmp_path):
    """Mixed dtypes, empty and scalar tensors, written in pieces and read both ways."""
    values = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.randn(2, 2), "d": torch.zeros(0, 4)}
    values |= {"e": torch.tensor(3.5), "f": torch.tensor([True, False])}
    ((name, specs),) = plan_shards([TensorSpec(k, v.dtype, tuple(v.shape)) for k, v in values.items()], 10**6).items()
    writer = ShardWriter(tmp_path / name, specs)
    for spec in specs:
        for piece in values[spec.name].reshape(-1).split(4):
            writer.write(piece)
    writer.close()
    loaded = load_file(tmp_path / name)
    with TensorFile(tmp_path / name) as file:
        for key, value in values.items():
            assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype
            assert torch.equal(file.tensors[key].read(), value)
            assert torch.equal(torch.cat([value.new_zeros(0), *file.tensors[key].pieces(3)]), value.view(-1))
