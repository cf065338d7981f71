"""push: only what belongs to the model goes up, and a missing token is said before anything is sent."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from merging import whole_adapter

from qpsft.errors import ExportError
from qpsft.export.push import push

WANTED = {
    "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer.model",
    "chat_template.jinja", "base_quantization.json", "recipe.yaml", "training.png", "model-Q4.gguf", "Modelfile",
    "model.safetensors.index.json", "merge_report.json",
}  # fmt: skip
UNWANTED = {
    "optimizer.pt", "optimizer.safetensors", "optimizer.bin", "pytorch_model.bin", "adapter_model.bin", "rng_state.pth",
    "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json", "verify_prompts.jsonl", "metrics.jsonl",
    ".env", "train.jsonl", "weights.ckpt", "notes.pkl",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    for name in WANTED | UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 10)
    whole_adapter(folder)
    for name in ("checkpoint-8", ".git", "runs"):
        (folder / name).mkdir()
        (folder / name / "adapter_model.safetensors").write_bytes(b"x")
    return folder


class FakeHub:
    """Records what would be sent."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **options):
        self.calls.append((repo_id, options))

    def upload_folder(self, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(options)
        return "https://huggingface.co/owner/name/commit/1"


def test_a_dry_run_lists_files_and_sizes_without_a_token(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    report = push(folder, "owner/name", dry_run=True)
    assert report.files == [(name, (folder / name).stat().st_size) for name in sorted(WANTED)]
    assert UNWANTED < set(report.left_out) and {"checkpoint-8/", ".git/", "runs/"} < set(report.left_out)
    assert "dry run: would upload to owner/name: 13 files" in report.summary()


def test_only_what_belongs_to_the_model_is_sent(folder, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    report = push(folder, "owner/name", private=True)
    (repo_id, options), upload = hub.calls
    assert repo_id == "owner/name" and options == {"private": True, "exist_ok": True}
    sent = list(
        huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()],
            allow_patterns=upload["allow_patterns"],
            ignore_patterns=upload.get("ignore_patterns"),
        )
    )
    assert set(sent) == WANTED
    assert report.url.endswith("/commit/1") and "(private)" in report.summary()


def test_no_token_is_said_before_anything_is_sent(folder, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(ExportError, match="no Hugging Face token.*hf auth login"):
        push(folder, "owner/name")
    assert hub.calls == []


@pytest.mark.parametrize(
    "error, words",
    [
        (
            HfHubHTTPError("403 Forbidden: read-only token", response=SimpleNamespace(headers={}, request=None)),
            "refused the upload.*403 Forbidden",
        ),
        (HTTPError("Name or service not known"), "failed: Name or service not known"),
        (OSError("read error"), "failed: read error"),
    ],
    ids=["refused", "no network", "disk"],
)
def test_what_the_hub_says_is_passed_on(folder, monkeypatch, error, words):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(error))
    with pytest.raises(ExportError, match=words):
        push(folder, "owner/name")


def test_bad_input(folder, tmp_path):
    with pytest.raises(ExportError, match="not a repository name.*OWNER/NAME") as error:
        push(folder, "a/b/c", dry_run=True)
    assert "repo_type" not in str(error.value)
    with pytest.raises(ExportError, match="There is no folder"):
        push(tmp_path / "none", "owner/name", dry_run=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="holds no weights"):
        push(tmp_path / "empty", "owner/name", dry_run=True)
