"""Uploads an adapter or a merged model to the Hugging Face Hub: what a user of it needs, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qpsft.errors import ExportError

FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.md", "*.model", "*.txt", "*.png",
    "*.yaml", "*.html", "Modelfile", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What belongs to a model. No pickles (*.bin, *.pt): loading one can run any code."""

NEVER = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args*", "global_step*",
    "verify_prompts.jsonl", "metrics.jsonl", ".*",
)  # fmt: skip
"""State of a training run, and rows of the user's data."""


@dataclass(frozen=True)
class PushReport:
    """What was, or would be, uploaded.

    Attributes:
        private: whether the repository is (made) private.
        files: (path in the folder, bytes), in order of name.
        left_out: paths in the folder that are not uploaded.
        url: of the commit; None for a dry run.
    """

    folder: Path
    repo_id: str
    private: bool
    files: list[tuple[str, int]]
    left_out: list[str]
    url: str | None

    def summary(self) -> str:
        """A line for each file and a verdict."""
        total = sum(size for _, size in self.files)
        done = "uploaded to" if self.url else "dry run: would upload to"
        lines = [f"{size:>16,}  {name}" for name, size in self.files]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        lines.append(
            f"{done} {self.url or self.repo_id}{' (private)' if self.private else ''}: {len(self.files)} files, "
            f"{total / 1e6:,.1f} MB"
        )
        return "\n".join(lines)


def push(folder: str | Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> PushReport:
    """Uploads a folder, its card included. Checkpoints, optimizer states, pickles and data rows are never uploaded.

    Args:
        folder: an adapter's or a merged model's folder, or one with a GGUF.
        repo_id: `owner/name`; made if it does not exist.
        private: make it private (an existing repository stays as it is).
        dry_run: list only; needs no network and no token.

    Raises:
        ExportError: nothing to upload, a bad name, no token, or the Hub refuses (with its words).
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder).expanduser()
    files, left_out = files_to_upload(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(
            f"{repo_id!r} is not a repository name.",
            "Use OWNER/NAME: at most 96 letters, digits, '-', '_' and '.', with no '--' or '..' in it, no '-' or '.'"
            " at either end, and no .git at the end.",
        ) from error
    if dry_run:
        return PushReport(folder, repo_id, private, files, left_out, None)
    if get_token() is None:
        raise ExportError(
            "There is no Hugging Face token on this machine.",
            "Run `hf auth login` with a token that may write (from https://huggingface.co/settings/tokens), or set "
            "$HF_TOKEN.",
        )
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[name for name, _ in files],
            commit_message="Upload with qpsft",
        )
    except HfHubHTTPError as error:
        raise ExportError(
            f"The Hub refused the upload to {repo_id}: {str(error).strip().splitlines()[0]}",
            "Check that the token may write there (`hf auth whoami`).",
        ) from error
    except (HTTPError, OSError) as error:
        raise ExportError(
            f"The upload to {repo_id} failed: {error}.", "Check the connection; what arrived is not sent again."
        ) from error
    return PushReport(folder, repo_id, private, files, left_out, str(commit))


def files_to_upload(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """((path, bytes) of what belongs to the model, paths of all else); a folder of its own counts as one path.

    Raises:
        ExportError: it is not a folder, or holds no weights.
    """
    from huggingface_hub.utils import filter_repo_objects

    if not folder.is_dir():
        raise ExportError(f"There is no folder {folder}.", "Give the folder that qpsft train, merge or export wrote.")
    inside = sorted(folder.iterdir())
    names = [path.name for path in inside if path.is_file()]
    chosen = set(filter_repo_objects(names, allow_patterns=list(FILES), ignore_patterns=list(NEVER)))
    files = [(path.name, path.stat().st_size) for path in inside if path.name in chosen]
    left_out = [path.name + ("/" if path.is_dir() else "") for path in inside if path.name not in chosen]
    if not any(name.endswith((".safetensors", ".gguf")) for name, _ in files):
        raise ExportError(
            f"{folder} holds no weights to upload (*.safetensors or *.gguf).",
            "Give the folder that qpsft train, merge or export wrote.",
        )
    return files, left_out
