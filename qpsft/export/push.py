"""Uploads an adapter or a merged model to the Hugging Face Hub: what a user of it needs, and nothing else."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from qpsft.errors import ExportError
from qpsft.merge.model_files import TOKENIZER_FILES
from qpsft.model.adapter_folder import ADAPTER_WEIGHTS, AdapterFolder
from qpsft.model.base_record import RECORD_FILE
from qpsft.model.folder import ADAPTER_CONFIG, CARD, CONFIG, MERGE_REPORT, WEIGHTS, WEIGHTS_INDEX, check_weights
from qpsft.recipe.secret import holds_secret, line_with_secret

RECIPES = ("recipe.yaml", "recipe.resolved.yaml")
TEXTS = (
    *RECIPES, CARD, "Modelfile", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md",
    ADAPTER_CONFIG, RECORD_FILE, CONFIG, "generation_config.json", WEIGHTS_INDEX, MERGE_REPORT,
)  # fmt: skip
"""Files that people read and write too; secrets are looked for in them."""
WEIGHT_FILES = re.compile(rf"{re.escape(ADAPTER_WEIGHTS)}|{re.escape(WEIGHTS)}|model-\d+-of-\d+\.safetensors|.+\.gguf")
FILES = frozenset({*TEXTS, *TOKENIZER_FILES, "training.png"})
"""All that is uploaded, beside the weights. Nothing else that lies in the folder is, whatever its name ends in."""


@dataclass(frozen=True)
class PushReport:
    """What was, or would be, uploaded.

    Attributes:
        private: whether the repository is (made) private.
        files: (path in the folder, bytes), in order of name.
        left_out: what lies in the folder and is not uploaded, links with a word that they are.
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
    """Uploads a folder's weights and the files of `FILES`, its card included; never checkpoints, links or data rows.

    Args:
        folder: an adapter's or a merged model's folder, or one with a GGUF.
        repo_id: `owner/name`; made if it does not exist.
        private: make it private (an existing repository stays as it is).
        dry_run: list only; needs no network and no token.

    Raises:
        ExportError: nothing to upload, a secret in what would be, a bad name, no token, or the Hub refuses (with its
            words).
        BaseModelError: weights are damaged.
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
            allow_patterns=[glob.escape(name) for name, _ in files],
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
    """((path, bytes) of what belongs to the model, all else that lies there); a folder or a link counts as one.

    Raises:
        ExportError: it is not a folder, or holds no weights; weights are a link; a file holds what looks like a secret.
        BaseModelError: an adapter's file is not the one in its record, or weights are cut off.
    """
    if not folder.is_dir():
        raise ExportError(f"There is no folder {folder}.", "Give the folder that qpsft train, merge or export wrote.")
    files, left_out = [], []
    for path in sorted(folder.iterdir()):
        is_weights = WEIGHT_FILES.fullmatch(path.name) is not None
        if path.is_symlink():
            if is_weights:
                raise ExportError(
                    f"{path} is a link to {path.resolve()}; only files of the folder itself are uploaded.",
                    "Put the file in its place.",
                )
            left_out.append(f"{path.name} (a link)")
        elif path.is_file() and (is_weights or path.name in FILES):
            files.append((path.name, path.stat().st_size))
        else:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    if not any(WEIGHT_FILES.fullmatch(name) for name, _ in files):
        raise ExportError(
            f"{folder} holds no weights to upload (*.safetensors or *.gguf).",
            "Give the folder that qpsft train, merge or export wrote.",
        )
    for name, _ in files:
        if name in TEXTS:
            _refuse_secret(folder / name)
    _check_whole(folder)
    return files, left_out


def _check_whole(folder: Path) -> None:
    """An adapter's file is the one in its record, and a model's files are whole. Raises BaseModelError naming it."""
    if (folder / ADAPTER_CONFIG).is_file():
        AdapterFolder(folder).check_own_file()
    elif (folder / CONFIG).is_file():
        check_weights(folder)


def _refuse_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    line, where = line_with_secret(text), ""
    if line is not None:
        where = f", line {line},"
    elif path.name in RECIPES:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:
            content = None
        names = (
            [name for name in content if holds_secret(str(name), content[name])] if isinstance(content, dict) else []
        )
        where = f", {names[0]}," if names else ""
    if where:
        raise ExportError(
            f"{path}{where} holds what looks like a secret (a token, key or password); nothing was uploaded.",
            "Take it out of the file and push again; revoke it if others may have seen it.",
        )
