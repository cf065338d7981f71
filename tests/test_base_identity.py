"""An adapter belongs to one base, by its weights and stop tokens too, and a record to one adapter's file."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging import save_peft_adapter
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from qpsft import cli, files
from qpsft.errors import BaseModelError
from qpsft.export.options import ExportOptions
from qpsft.export.vllm import export_vllm
from qpsft.files import finished_files
from qpsft.merge import merge_adapter
from qpsft.model import base_record as base_record_module
from qpsft.model import fingerprint
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_base
from qpsft.model.base_record import RECORD_FILE, base_record, read_base_record, write_base_record
from qpsft.model.fingerprint import weights_sha256
from qpsft.train import outputs, run
from qpsft.verify.verification import verify_export

SHIPPED = Path(__file__).resolve().parents[1] / "adapters" / "demo-psft"
SIZES = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1"]
"""Stated: nothing is planned."""
FLAGS = ["--dataset_name=demo-clean", "--dataset_limit=8", "--max_steps=1", "--lora_r=2", "--use_cpu", *SIZES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def trained(base):
    return save_peft_adapter(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def merged(trained):
    folder = trained.parent / "merged"
    merge_adapter(trained, folder, no_verify=True)
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def copied(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copied"))


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}), encoding="utf-8")


def other_weights(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    """Another model of the same configuration: one value of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[777] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def ask(monkeypatch, capsys, arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 2?\n"))
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


VERBS = {
    "chat": lambda adapter, base, out, merged: ["chat", adapter, "--base", base],
    "evaluate": lambda adapter, base, out, merged: [
        "evaluate", adapter, "--base", base, "--data=demo-clean", "--json", f"{out}.json",
    ],
    "verify": lambda adapter, base, out, merged: ["verify", adapter, merged, "--base", base],
    "merge": lambda adapter, base, out, merged: ["merge", adapter, "--base", base, "-o", out],
    "onto original": lambda adapter, base, out, merged: [
        "merge", adapter, "--base", base, "-o", out, "--onto=original", "--no_verify",
    ],
    "gguf": lambda adapter, base, out, merged: ["export", adapter, "--base", base, "--to=gguf", "-o", f"{out}.gguf"],
    "gguf-lora": lambda adapter, base, out, merged: [
        "export", adapter, "--base", base, "--to=gguf-lora", "-o", f"{out}.gguf",
    ],
    "ollama": lambda adapter, base, out, merged: ["export", adapter, "--base", base, "--to=ollama", "-o", out],
    "vllm": lambda adapter, base, out, merged: ["export", adapter, "--base", base, "--to=vllm"],
    "train": lambda adapter, base, out, merged: [
        "train", f"--model_name_or_path={base}", "--dataset_name=demo-clean", "--dataset_limit=8", "--max_steps=1",
        f"--adapter_name_or_path={adapter}", f"--output_dir={out}", *SIZES,
    ],
}  # fmt: skip


def refused(monkeypatch, capsys, tmp_path, verb, adapter, base, merged) -> str:
    before = {path.name for path in tmp_path.iterdir()}
    code, text = ask(monkeypatch, capsys, VERBS[verb](adapter, base, tmp_path / "out", merged))
    assert code == 2 and "error: " in text and "Traceback" not in text, text
    assert {path.name for path in tmp_path.iterdir()} == before, "something was written"
    return text


# --- which base ---


@pytest.mark.parametrize("verb", VERBS)
def test_another_base_with_the_same_config_is_refused(
    monkeypatch, capsys, tmp_path, trained, base, copied, merged, verb
):
    other_weights(copied)
    text = refused(monkeypatch, capsys, tmp_path, verb, trained, copied, merged)
    own, other = weights_sha256(base)[:12], weights_sha256(copied)[:12]
    for words in (str(trained), f"trained on {base}", own, str(copied), other, "weights", "--base"):
        assert words in text, (words, text)


@pytest.mark.parametrize("verb", ["merge", "verify", "vllm", "train"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_other_stop_tokens_are_another_base(monkeypatch, capsys, tmp_path, trained, base, copied, merged, file, verb):
    edit_json(copied / file, eos_token_id=[2, 7])
    text = refused(monkeypatch, capsys, tmp_path, verb, trained, copied, merged)
    for words in (str(base), "[2]", str(copied), "[2, 7]", "eos_token_id"):
        assert words in text, (words, text)


def test_a_copy_of_the_base_is_the_base(trained, copied):
    AdapterFolder(trained).base_folder(copied)


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"train"}))
def test_of_a_base_that_was_moved_every_verb_names_the_flag(monkeypatch, capsys, tmp_path, adapter, merged, verb):
    edit_json(adapter / RECORD_FILE, base_model_name_or_path=str(tmp_path / "moved" / "away"))
    monkeypatch.setitem(
        VERBS, verb, lambda *of, own=VERBS[verb]: [word for word in own(*of) if word != "--base" and word]
    )
    text = refused(monkeypatch, capsys, tmp_path, verb, adapter, "", merged)
    assert "moved/away" in text and "with --base" in text and "qpsft " not in text


def test_a_merge_reads_the_bases_fingerprint_once(monkeypatch, tmp_path, trained):
    read = []
    monkeypatch.setattr(
        base_record_module, "weights_sha256", lambda folder: read.append(folder) or weights_sha256(folder)
    )
    assert merge_adapter(trained, tmp_path / "merged").verification["same_model"]
    assert len(read) == 1


def test_files_and_shards_do_not_count(tmp_path, base):
    """The same weights in shards with other names, in another order, and with other metadata."""
    own = weights_sha256(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert weights_sha256(tmp_path / "sharded") == own
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "other" / "model.safetensors", metadata={"by": "someone"})
    assert weights_sha256(tmp_path / "other") == own


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_any_tensor_counts(base, copied, name):
    other_weights_at = load_file(copied / "model.safetensors")
    other_weights_at[name].view(-1)[13] += 1
    save_file(other_weights_at, copied / "model.safetensors")
    assert weights_sha256(copied) != weights_sha256(base)


def test_names_shapes_and_dtypes_count(tmp_path):
    found = set()
    for tensors in (
        {"a": torch.zeros(4, 6), "b": torch.ones(24)},
        {"b": torch.zeros(4, 6), "a": torch.ones(24)},
        {"a": torch.zeros(6, 4), "b": torch.ones(24)},
        {"a": torch.zeros(4, 6, dtype=torch.int32), "b": torch.ones(24)},
        {"a": torch.zeros(4, 6)},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        found.add(weights_sha256(tmp_path))
    assert len(found) == 5


def test_of_a_large_tensor_a_piece_of_every_mib_is_read(tmp_path):
    """And its last bytes; of one up to a MiB all."""
    file, size = tmp_path / "model.safetensors", 3 * fingerprint.EVERY + 999

    def with_changes(*places: int) -> str:
        values = torch.zeros(size, dtype=torch.uint8)
        values[list(places)] = 1
        small = torch.zeros(fingerprint.EVERY, dtype=torch.uint8)
        save_file({"large": values, "small": small}, file)
        return weights_sha256(tmp_path)

    plain = with_changes()
    sampled = [
        0,
        fingerprint.PIECE - 1,
        fingerprint.EVERY,
        2 * fingerprint.EVERY + 5,
        size - 1,
        size - fingerprint.PIECE,
    ]
    assert all(with_changes(place) != plain for place in sampled)
    assert with_changes(fingerprint.PIECE + 1, fingerprint.EVERY - 1) == plain
    with_changes()
    flip(file, file.stat().st_size - fingerprint.EVERY // 2)  # in the middle of the small one, which lies behind
    assert weights_sha256(tmp_path) != plain


def test_the_dtype_of_the_load_does_not_count(base):
    loads = ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "none"}, {"quantization": "fp4"})
    records = [base_record(load_base(base, device="cpu", verbose=False, **load)[0]) for load in loads]
    assert {record["weights_sha256"] for record in records} == {weights_sha256(base)}
    assert all(record["eos_token_ids"] == [2] for record in records)


def test_a_base_that_transformers_loaded(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert base_record(model)["weights_sha256"] == weights_sha256(base)


def test_a_base_quantized_on_disk(monkeypatch, capsys, tmp_path, base, merged):
    load_base(base, device="cpu", verbose=False)[0].save_pretrained(tmp_path / "packed")
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "packed")
    adapter = save_peft_adapter(tmp_path / "on", tmp_path / "packed")
    assert AdapterFolder(adapter).base_folder() == tmp_path / "packed"
    flip(tmp_path / "packed" / "model.safetensors")
    text = refused(monkeypatch, capsys, tmp_path, "merge", adapter, tmp_path / "packed", merged)
    assert "weights" in text


def test_onto_the_16_bit_model_that_a_quantized_base_was_made_from(tmp_path, base):
    """Its weights cannot be compared with packed ones, which is said."""
    load_base(base, device="cpu", verbose=False)[0].save_pretrained(tmp_path / "packed")
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "packed")
    adapter = save_peft_adapter(tmp_path / "on", tmp_path / "packed")
    with pytest.warns(UserWarning, match="weights .* were not compared"):
        report = merge_adapter(adapter, tmp_path / "merged", base=base, onto="original", no_verify=True)
    assert "not compared" in report.summary()


def test_the_embedded_base_and_the_shipped_adapter(recwarn):
    record = read_base_record(SHIPPED)
    assert record.weights_sha256 == weights_sha256(AdapterFolder(SHIPPED).base_folder())
    assert not [str(warning.message) for warning in recwarn if "compared" in str(warning.message)]


def test_an_old_record_works_and_says_that_the_weights_were_not_compared(tmp_path, adapter, copied):
    edit_json(adapter / RECORD_FILE, drop=("weights_sha256", "eos_token_ids", "adapter_sha256"))
    record = read_base_record(adapter)
    assert record.weights_sha256 is record.eos_token_ids is record.adapter_sha256 is None
    with pytest.warns(UserWarning, match=rf"weights .* were not compared .*{RECORD_FILE} does not say"):
        report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verification["same_model"] and "weights not compared" in report.summary()


@pytest.mark.parametrize("value", [3, ["a"], {}, ""])
@pytest.mark.parametrize("name", ["weights_sha256", "adapter_sha256"])
def test_a_digest_that_is_none(adapter, name, value):
    edit_json(adapter / RECORD_FILE, **{name: value})
    with pytest.raises(BaseModelError, match=f"{RECORD_FILE} .*{name}"):
        read_base_record(adapter)


def test_the_reports_name_the_base_that_was_used(tmp_path, trained, copied):
    snapshot = tmp_path / "snapshots" / ("0123456789" * 4)
    shutil.copytree(copied, snapshot)
    report = merge_adapter(trained, tmp_path / "out", base=snapshot)
    assert report.base_folder == str(snapshot) and report.base_revision == snapshot.name
    assert report.base_weights_sha256 == weights_sha256(snapshot)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text(encoding="utf-8"))
    assert (written["base_folder"], written["base_weights_sha256"]) == (str(snapshot), weights_sha256(snapshot))
    for text in (report.summary(), verify_export(trained, tmp_path / "out", base=copied).summary()):
        assert f"{weights_sha256(snapshot)[:12]}" in text
    assert str(copied) in " ".join(verify_export(trained, tmp_path / "out", base=copied).summary().split())


def test_weights_that_are_not_here(tmp_path, trained, copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"has neither model\.safetensors nor"):
        export_vllm(ExportOptions(trained, base=str(copied), to="vllm"))  # would print a command that cannot start
    with pytest.raises(BaseModelError, match=r"has neither model\.safetensors nor"):
        AdapterFolder(trained).base_folder(copied)


def test_a_run_goes_on_with_the_weights_that_it_began_with(tmp_path, capsys):
    base = Path(shutil.copytree(SHIPPED.parents[1] / "qpsft" / "demo" / "model", tmp_path / "base"))
    flags = ["train", *FLAGS, "--save_steps=1", f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'run'}"]
    assert cli.main(flags) == 0
    flip(base / "model.safetensors")
    assert cli.main([*flags, "--resume", "--max_steps=2"]) == 2
    assert "weights_sha256" in capsys.readouterr().err


# --- which adapter ---


@pytest.mark.parametrize("verb", VERBS)
def test_a_flipped_byte_of_the_adapter_is_found(monkeypatch, capsys, tmp_path, adapter, base, merged, verb):
    flip(adapter / "adapter_model.safetensors")
    text = refused(monkeypatch, capsys, tmp_path, verb, adapter, base, merged)
    for words in (str(adapter / "adapter_model.safetensors"), RECORD_FILE):
        assert words in text, (words, text)


def test_an_adapter_of_another_run_beside_this_record(monkeypatch, capsys, tmp_path, adapter, base, merged):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    text = refused(monkeypatch, capsys, tmp_path, "merge", adapter, base, merged)
    assert "adapter_model.safetensors" in text and "another run" in text


def test_a_record_written_anew_takes_the_file_that_is_there(adapter, base):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    write_base_record(load_base(base, verbose=False)[0], adapter)
    AdapterFolder(adapter).base_folder()


class Killed(BaseException):
    """Ends a run as a kill would: nothing catches it."""


def train(out: Path, *more: str) -> int:
    return cli.main(["train", *FLAGS, "--model_name_or_path=demo", f"--output_dir={out}", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out) == 0
    return out


@pytest.mark.parametrize("when", ["while it trains", "while its files take their places"])
def test_an_overwrite_that_is_cut_off_certifies_no_old_adapter(tmp_path, monkeypatch, finished, when):
    """Whatever is left is the old adapter with its own record, or a pair that is refused."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    old = (out / "adapter_model.safetensors").read_bytes(), (out / RECORD_FILE).read_bytes()

    def killed(*_, **__):
        raise Killed

    if when == "while it trains":
        monkeypatch.setattr(run, "run_trainer", killed)
        with pytest.raises(Killed):
            train(out, "--overwrite", "--quantization=fp4")
        assert ((out / "adapter_model.safetensors").read_bytes(), (out / RECORD_FILE).read_bytes()) == old
        assert read_base_record(out / outputs.NEW_RUN).quantization == "fp4"
        AdapterFolder(out).base_folder()
        monkeypatch.undo()
        assert train(out, "--overwrite", "--quantization=fp4") == 0
        assert AdapterFolder(out).record.quantization == "fp4"
        AdapterFolder(out).base_folder()
        return
    real, left = files.move, 0

    def stopping(finished, place):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        real(finished, place)

    monkeypatch.setattr(outputs, "move", stopping)
    for stop in (1, sum(path.is_file() for path in out.iterdir()) - 1):
        folder = Path(shutil.copytree(out, tmp_path / f"cut-{stop}"))
        left = stop
        with pytest.raises(Killed):
            train(folder, "--overwrite", "--lora_alpha=3", "--quantization=fp4")
        assert (folder / "adapter_model.safetensors").read_bytes() != old[0]
        assert (folder / RECORD_FILE).read_bytes() == old[1], "the record did not come last"
        with pytest.raises(BaseModelError, match="of another run"):
            AdapterFolder(folder).base_folder()


def test_first_and_last_files_take_their_places_so(tmp_path, monkeypatch):
    order, real = [], files.put_in_place
    monkeypatch.setattr(files, "put_in_place", lambda one, place: (order.append(place.name), real(one, place)))
    with finished_files(tmp_path, first="m", last="b") as partial:
        for name in "abmz":
            (partial / name).write_text(name)
    assert order == ["m", "a", "z", "b"]


def test_what_a_finished_run_leaves(finished):
    left = {path.name for path in finished.iterdir()}
    assert RECORD_FILE in left and not (finished / outputs.NEW_RUN).exists()
    record = read_base_record(finished)
    content = (finished / "adapter_model.safetensors").read_bytes()
    assert record.adapter_sha256 == hashlib.sha256(content).hexdigest()
