"""The report of a merge: lines for a terminal, `merge_report.json`, and the card of the merged model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qpsft.files import write_atomically
from qpsft.merge.model_files import write_json
from qpsft.model.folder import CARD, MERGE_REPORT
from qpsft.recipe.markdown import as_text
from qpsft.terminal import wrap


@dataclass
class MergeReport:
    """What was merged, where it is and how it was checked. `merge_report.json` holds the same.

    Attributes:
        base: what the adapter's record calls its base; else as it was given, or as PEFT's config says.
        base_revision: the Hub commit of the base that was used, if known.
        base_folder: the folder that it was read from.
        base_weights_sha256: `qpsft.model.fingerprint.weights_sha256` of it.
        base_used: that base in words, and whether it is known to have the weights of the training.
        rounding: how the base was rounded in training, in words.
        bytes: of the weights written.
        low_rank: matrices that a low-rank update was added to.
        replaced: tensors changed otherwise (copies trained in full, biases, token rows).
        seconds: of the whole merge, `merge_seconds` without the verification.
        peak_rss: the process's largest resident memory so far, in bytes.
        left_out: tensors of the base's folder that its architecture does not use.
        verification: None if it was not run; else `same_model`, `numbers` and `summary` of `qpsft.verify.verification`.
    """

    qpsft_version: str
    adapter: str
    base: str
    base_revision: str | None
    base_folder: str
    base_weights_sha256: str | None
    base_used: str
    output: str
    onto: str
    dtype: str
    rounding: str
    bytes: int
    tensors: int
    low_rank: int
    replaced: int
    peak_rss: int
    left_out: list[str]
    seconds: float = 0.0
    merge_seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    verification: dict[str, Any] | None = None

    def summary(self) -> str:
        """What a person wants to know, in some ten lines."""
        lines = [
            f"merged {Path(self.adapter).name} onto the {self.onto} weights of {Path(self.base).name}",
            f"base in training: {self.rounding}",
            wrap(f"base used: {self.base_used}"),
            wrap(
                f"wrote {self.output}: {self.tensors} tensors, {self.bytes / 1e9:.3g} GB in {self.dtype}, "
                f"{len(self.files)} files; {self.merge_seconds:.1f} s, peak memory {self.peak_rss / 1e6:.0f} MB"
            ),
        ]
        if self.left_out:
            lines.append(
                wrap(f"left out {len(self.left_out)} tensors that the model does not use, such as {self.left_out[0]}")
            )
        lines += ["", self.verification["summary"] if self.verification else "verification: not run"]
        lines += ["", f"next: qpsft export {self.output} --to gguf", "      or load it with transformers or vLLM"]
        return "\n".join(lines)

    def card(self) -> str:
        """README.md of the merged model. It names no folder of this machine."""
        on_hub = not Path(self.base).is_absolute() and self.base != "demo"
        onto = {
            "trained": "the weights training saw: the base's, rounded and dequantized with the settings of the "
            f"training run ({self.rounding}). This is the model that was trained, up to the rounding to {self.dtype}.",
            "original": "the base's original weights. The adapter was trained on rounded weights "
            f"({self.rounding}), so this is near the model that was trained, and not the same.",
        }[self.onto]
        revision = f" @ {self.base_revision}" if self.base_revision else ""
        verified = "Not run. `qpsft verify ADAPTER THIS_FOLDER` runs it."
        if self.verification:
            verified = f"```\n{self.verification['summary'].replace('```', '…')}\n```"
        base_model = yaml.safe_dump({"base_model": self.base}, allow_unicode=True) if on_hub else ""
        return f"""---
{base_model}library_name: transformers
pipeline_tag: text-generation
tags: [qpsft, psft, lora-merged]
---

# {as_text(Path(self.output).name)}

A LoRA adapter merged into its base model by qpsft {self.qpsft_version}.

| | |
| --- | --- |
| base | {as_text((self.base if on_hub else Path(self.base).name) + revision)} |
| adapter | {as_text(Path(self.adapter).name)} |
| merged onto | {onto} |
| dtype | {self.dtype} |
| changed | {self.low_rank} matrices by low-rank updates, {self.replaced} tensors otherwise |

## Verification against the live model

{verified}

`merge_report.json` holds the same and more numbers.
"""

    def write(self, folder: Path) -> None:
        """Writes the card and `merge_report.json` into the merged folder, as its last files."""
        self.files = sorted([*(path.name for path in folder.iterdir()), CARD, MERGE_REPORT])
        write_atomically(folder / CARD, self.card())
        write_json(folder / MERGE_REPORT, asdict(self))


def files_of_merge(folder: Path) -> list[str]:
    """Names of the files that a merge wrote into a folder, by its report there; none where that cannot be read."""
    try:
        content = json.loads((folder / MERGE_REPORT).read_text(encoding="utf-8"))
        names = content["files"] if content["qpsft_version"] else []
        return [name for name in names if isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
