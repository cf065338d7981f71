"""The base's own answers to prompts, sampled once before training, as rows that are replayed."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpsft.data.prompts import Prompts, read_prompts
from qpsft.data.tokenize import IGNORED, TokenizedRows, tokenized_rows
from qpsft.errors import DataError, OutputError
from qpsft.files import digest, write_atomically
from qpsft.model.base_record import base_record
from qpsft.model.folder import DEMO
from qpsft.model.generation import Completion, generate, stop_tokens
from qpsft.recipe.file import Recipe

ROWS = "replay.jsonl"
MADE = "replay.json"


@dataclass(frozen=True)
class Replay:
    """Answers that are to be sampled.

    Attributes:
        prompts: what the base answers.
        samples: answers to each.
        max_new_tokens: of an answer at most.
        max_length: of prompt and answer together at most; None for no limit.
        seed: of the samples.
        share: of the rows of every mini-batch.
    """

    prompts: Prompts
    samples: int
    max_new_tokens: int
    max_length: int | None
    seed: int
    share: float

    @property
    def line(self) -> str:
        """What is going to be replayed, in lines of at most 80 columns."""
        what = f"the base's own answers to {len(self.prompts.ids):,} prompts ({self.prompts.name})"
        line = f"replay: {self.share:.1%} of the rows of a step are {what}, sampled before training"
        return textwrap.fill(line, 80, subsequent_indent="      ")


def read_replay(recipe: Recipe, tokenizer: Any) -> Replay | None:
    """The answers that a recipe asks for; None if it replays nothing, or rows that are there already.

    Raises:
        DataError: as `read_prompts`; the embedded base without prompts of its own kind.
    """
    data, args = recipe.data, recipe.trainer
    if data.replay_share is None or data.replay_dataset is not None:
        return None
    if data.replay_prompts is None and recipe.model.model_name_or_path == DEMO:
        raise DataError(
            "The embedded base knows only its own tasks, so it cannot answer the replay prompts that come with qpsft.",
            "Give replay_prompts: for instance a file with lines such as `any order of 4821`.",
        )
    prompts = read_prompts(data.replay_prompts, tokenizer, data)
    return Replay(
        prompts, data.replay_samples, data.replay_max_new_tokens, args.max_length, args.seed, data.replay_share
    )


def replay_rows(replay: Replay, model: Any, tokenizer: Any, folder: Path) -> TokenizedRows:
    """The answers of the base, from `folder` if they were made there before, else sampled and kept there.

    An answer is trained on as the very tokens that were sampled, the one that ends it included. Dropped and counted are
    answers that do not end within the limits, and empty ones.

    Args:
        model: the base, without an adapter.
        folder: of the run.

    Raises:
        DataError: no answer is left.
    """
    stop_ids = sorted(stop_tokens(model, tokenizer))
    made_with = {
        "base": {name: value for name, value in base_record(model).items() if name != "qpsft_version"},
        "prompts_sha256": digest(json.dumps(replay.prompts.ids)),
        **{name: getattr(replay, name) for name in ("samples", "max_new_tokens", "max_length", "seed")},
        "stop_ids": stop_ids,
    }
    kept = _kept_answers(folder, made_with)
    if kept is None:
        kept = _sampled(replay, model, tokenizer, stop_ids)
        _keep(folder, made_with, *kept)
    answers, dropped = kept
    if not answers:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise DataError(
            f"None of the base's answers to {replay.prompts.name} can be replayed: {reasons}.",
            "Raise replay_max_new_tokens or max_length, or give prompts with short answers.",
        )
    return _tokenized(replay, answers, dropped)


def share_answers(earlier: Path, folder: Path) -> None:
    """Copies the answers that an earlier run kept into the folder of one that may use them too. Raises OutputError."""
    if earlier == folder or (folder / MADE).is_file() or not (earlier / MADE).is_file():
        return
    try:
        for name in (ROWS, MADE):
            shutil.copyfile(earlier / name, folder / name)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.", "Free some space.") from error


def _sampled(
    replay: Replay, model: Any, tokenizer: Any, stop_ids: list[int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The answers that can be trained on, one dict each, and why others cannot, with counts."""
    rows = range(len(replay.prompts.ids))
    room = {i: _room(replay, len(replay.prompts.ids[i])) for i in rows}
    dropped: Counter[str] = Counter()
    dropped["prompts as long as max_length"] = replay.samples * sum(room[i] < 1 for i in rows)
    asked = [i for i in rows if room[i] > 0]
    written = generate(
        model,
        [replay.prompts.ids[i] for i in asked],
        stop_ids=stop_ids,
        greedy=False,
        samples=replay.samples,
        max_new_tokens=replay.max_new_tokens,
        seed=replay.seed,
        description="Sampling the base's answers for replay",
    )
    answers = []
    for i, completions in zip(asked, written, strict=True):
        for answer in completions.samples:
            if reason := _unusable(answer, room[i], tokenizer):
                dropped[reason] += 1
                continue
            answers.append(
                {
                    "prompt": replay.prompts.texts[i],
                    "completion": tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                    "place": replay.prompts.places[i],
                    "prompt_ids": replay.prompts.ids[i],
                    "answer_ids": answer.token_ids,
                }
            )
    return answers, {reason: count for reason, count in dropped.items() if count}


def _room(replay: Replay, prompt_length: int) -> int:
    """Tokens that an answer may have."""
    left = replay.max_new_tokens if replay.max_length is None else replay.max_length - prompt_length
    return min(left, replay.max_new_tokens)


def _unusable(answer: Completion, room: int, tokenizer: Any) -> str:
    if not answer.stopped or len(answer.token_ids) > room:
        return "did not end within the length limit"
    return "" if tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() else "empty"


def _kept_answers(folder: Path, made_with: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]] | None:
    """What `_keep` kept, if it was made with the same settings and is whole."""
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        text = (folder / ROWS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if made.get("made_with") != json.loads(json.dumps(made_with)) or made.get("sha256") != digest(text):
        return None
    return [json.loads(line) for line in text.split("\n") if line], made["dropped"]


def _keep(folder: Path, made_with: Mapping[str, Any], answers: list[dict[str, Any]], dropped: dict[str, int]) -> None:
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_atomically(folder / ROWS, text)
    made = {"made_with": made_with, "dropped": dropped, "sha256": digest(text)}
    write_atomically(folder / MADE, json.dumps(made, indent=1))


def _tokenized(replay: Replay, answers: list[dict[str, Any]], dropped: dict[str, int]) -> TokenizedRows:
    rows = []
    for answer in answers:
        ids = np.asarray([*answer["prompt_ids"], *answer["answer_ids"]], dtype=np.int32)
        labels = ids.copy()
        labels[: len(answer["prompt_ids"])] = IGNORED
        rows.append((ids, labels, f"the base's answer to {answer['place']}"))
    return tokenized_rows("the base's answers", "replay", rows, dropped)
