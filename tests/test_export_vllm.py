"""vLLM: the command for adapters it can serve, the reasons for those it refuses, and the merge instead."""

import shlex
from pathlib import Path

import pytest
from exporting import copy_folder, edit_json, export, make_adapter
from merging import ALL, save_peft_adapter
from safetensors.torch import load_file, save_file

from qpsft.errors import BaseModelError, ExportError
from qpsft.model.folder import MODEL_DIR


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Trained on a base of the Hub."""
    folder = make_adapter(tmp_path_factory.mktemp("vllm") / "my adapter")
    edit_json(folder / "base_quantization.json", base_model_name_or_path="owner/name", revision="abc")
    return folder


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Has one model, owner/name at revision abc: the embedded base."""

    def snapshot(name, patterns, *, revision=None, local_files_only=False):
        assert (name, revision) in [("owner/name", "abc"), ("owner/name", None)] and "*.safetensors" not in patterns
        return MODEL_DIR

    monkeypatch.setattr("qpsft.model.folder.hub_snapshot", snapshot)


def test_the_command_for_an_adapter(adapter):
    report = export("vllm", adapter)
    assert report.servable and not report.refusals
    assert shlex.split(report.command) == [
        *("vllm", "serve", "owner/name", "--revision", "abc", "--quantization", "bitsandbytes", "--enable-lora"),
        *("--lora-modules", f"my adapter={adapter}"),
    ]
    assert "rounds the base as training did" in report.notes[0]
    assert shlex.split(export("vllm", adapter, base=str(MODEL_DIR)).command)[2:4] == [str(MODEL_DIR), "--quantization"]
    with pytest.raises(BaseModelError, match="no base model folder /models/other"):
        export("vllm", adapter, base="/models/other")


def test_the_embedded_base_is_served_from_its_folder(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    command = shlex.split(export("vllm", adapter).command)
    assert command[2] == str(MODEL_DIR) and (Path(command[2]) / "config.json").is_file()
    assert shlex.split(export("vllm", adapter, base="demo").command)[2] == str(MODEL_DIR)


def test_a_base_in_a_folder_is_named_in_full_and_must_have_its_weights(tmp_path, monkeypatch):
    """vLLM loads it from there, from any folder: unlike a Hub id it cannot download what is missing."""
    base = copy_folder(MODEL_DIR, tmp_path / "my base")
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tmp_path / "adapter", "my base")
    for given in (None, "my base", "./my base"):
        assert shlex.split(export("vllm", adapter, base=given).command)[2] == str(base)
    (base / "model.safetensors").unlink()
    for given in (None, "my base"):
        with pytest.raises(BaseModelError, match="neither model.safetensors"):
            export("vllm", adapter, base=given)


@pytest.mark.parametrize("rank, flag", [(16, None), (17, "32"), (64, "64"), (100, "128"), (512, "512")])
def test_ranks_above_vllms_default_need_a_flag(tmp_path, rank, flag):
    other = save_peft_adapter(tmp_path / "adapter", "demo", r=rank, target_modules=["q_proj"])
    command = shlex.split(export("vllm", other).command)
    assert command[-2:] == ["--max-lora-rank", flag] if flag else "--max-lora-rank" not in command


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"modules_to_save": ["lm_head"]}, "trained in full (lm_head)"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"target_modules": [*ALL, "lm_head"]}, "adapts lm_head"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks or alphas of their own"),
        ({"alpha_pattern": {"q_proj": 8}}, "ranks or alphas of their own"),
        ({"r": 1024}, "its rank is 1024"),
        ({"target_modules": r"lm_head|.*\.[qv]_proj"}, "adapts lm_head"),
        ({"target_modules": r".*embed_tokens|.*\.q_proj"}, "adapts model.embed_tokens"),
    ],
)
def test_what_vllm_refuses(tmp_path, settings, words):
    other = save_peft_adapter(tmp_path / "adapter", "demo", **settings)
    report = export("vllm", other)
    assert not report.servable and report.command is None
    assert words in report.refusals[0] and words in report.summary() and "next: merge it" in report.summary()


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [5]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 2}},
    ],
    ids=str,
)
def test_what_is_more_than_low_rank_updates_of_the_base_is_not_servable(adapter, tmp_path, settings):
    """vLLM would load these, and compute another model."""
    other = copy_folder(adapter, tmp_path / "adapter")
    edit_json(other / "adapter_config.json", **settings)
    report = export("vllm", other)
    assert not report.servable and report.command is None and next(iter(settings)) in report.refusals[0]
    assert "next: merge" not in report.summary()


def test_a_text_adapter_of_a_model_with_images_is_not_servable(adapter, tmp_path, monkeypatch):
    base = copy_folder(MODEL_DIR, tmp_path / "base")
    edit_json(base / "config.json", vision_config={"hidden_size": 8})
    monkeypatch.setattr("qpsft.model.adapter_folder.AdapterFolder.base_folder", lambda *args, **kwargs: base)
    report = export("vllm", adapter)
    assert not report.servable and "images or sound" in report.refusals[0] and "next: merge it" in report.summary()


def test_foreign_prefixes_are_refused(tmp_path):
    other = make_adapter(tmp_path / "adapter")
    file = other / "adapter_model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(BaseModelError, match="in place of"):
        export("vllm", other)


def test_a_base_that_vllm_rounds_otherwise_is_noted(adapter, tmp_path):
    other = copy_folder(adapter, tmp_path / "adapter")
    edit_json(other / "base_quantization.json", quantization="fp4")
    report = export("vllm", other)
    assert "--quantization" not in report.command and "does not round the base to fp4" in report.notes[0]


def test_a_refused_adapter_is_merged_instead(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", use_dora=True)
    assert export("vllm", adapter).merge is None
    report = export("vllm", adapter, tmp_path / "merged")
    assert report.command == f"vllm serve {tmp_path / 'merged'}" and (tmp_path / "merged/config.json").is_file()


def test_a_servable_adapter_is_not_merged(adapter, tmp_path):
    report = export("vllm", adapter, tmp_path / "merged")
    assert report.merge is None and "--enable-lora" in report.command and not (tmp_path / "merged").exists()


def test_a_merged_folder_is_served_as_it_is(tmp_path):
    merged = copy_folder(MODEL_DIR, tmp_path / "merged model")
    report = export("vllm", merged)
    assert report.servable and shlex.split(report.command) == ["vllm", "serve", str(merged)]
    assert "a merged model" in report.summary() and report.summary().endswith(f"next: vllm serve '{merged}'")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="neither an adapter folder"):
        export("vllm", tmp_path / "empty")
    (merged / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="merged model"):
        export("vllm", merged)


def test_bad_input(adapter, tmp_path):
    other = copy_folder(adapter, tmp_path / "adapter")
    edit_json(other / "adapter_config.json", peft_type="LOHA")
    with pytest.raises(ExportError, match="of type LOHA"):
        export("vllm", other)
    (other / "adapter_config.json").write_text("{")
    with pytest.raises(BaseModelError, match="is not valid JSON"):
        export("vllm", other)
