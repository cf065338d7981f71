"""`qpsft evaluate --keep`, the gate before publishing: what a tuned model lost of what its base could do.

    skills ── the base's score on each row ── the tuned model's on the same rows ── paired difference ── a verdict each

docs/guard.md says what the verdicts mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qpsft.data import built_in
from qpsft.errors import DataError, QpsftError, did_you_mean
from qpsft.evaluate.estimates import TWO_SIDED_95, Estimate, paired_difference
from qpsft.evaluate.evaluation import evaluate
from qpsft.evaluate.harness import UnreachableError, check_tasks, read_rows, run_tasks, unreachable
from qpsft.evaluate.ifeval import MAX_NEW_TOKENS, follow_instructions, ifeval_rows
from qpsft.evaluate.options import EvaluationOptions
from qpsft.evaluate.rows import as_rows
from qpsft.evaluate.task_data import used_by
from qpsft.terminal import listed, text_table, wrap

KEPT, LOST, UNSURE = "KEPT", "LOST", "UNSURE"
ROUNDING = 1e-9
BUILT_IN_ROWS = 100
"""Of each of the embedded base's old skills."""
TASK_BATCH = 8


@dataclass(frozen=True)
class Skill:
    """A benchmark: its name for people, and the metric that counts, one number in [0, 1] per row."""

    title: str
    metric: str


SKILLS = {
    "ifeval": Skill("IFEval", "prompt_level_strict_acc"),
    "truthfulqa_mc1": Skill("TruthfulQA MC1", "acc"),
    "truthfulqa_mc2": Skill("TruthfulQA MC2", "acc"),
    "arc_easy": Skill("ARC-easy", "acc"),
    "openbookqa": Skill("OpenBookQA", "acc_norm"),
}
"""By the harness's name of the task."""
BUILT_IN_SKILLS = {name: Skill(name, "accuracy") for name in built_in.OUT_OF_DOMAIN}
"""Of the embedded base, which can do nothing else."""


@dataclass(frozen=True)
class Gate:
    """What both models are asked; read and checked before a model is loaded.

    Attributes:
        skills: keys of `SKILLS`, or of `BUILT_IN_SKILLS`.
        task_data: local copies of benchmarks.
        instructions: IFEval's rows, without those `left_out` because NLTK's punkt_tab is not here.
    """

    skills: dict[str, Skill]
    options: EvaluationOptions
    task_data: dict[str, Path]
    instructions: list[dict[str, Any]]
    left_out: int = 0

    @classmethod
    def prepare(cls, options: EvaluationOptions, task_data: Mapping[str, Path], *, is_demo: bool) -> Gate:
        """Raises DataError: an unknown skill, the harness is not installed, or rows that cannot be read."""
        skills = chosen_skills(options.keep, BUILT_IN_SKILLS if is_demo else SKILLS)
        own = used_by(skills, task_data)
        if is_demo:
            return cls(skills, options, own, [])
        check_tasks(list(skills), own)
        rows, left_out, nowhere = [], 0, {}
        for name in skills:
            try:
                if name == "ifeval":
                    rows, left_out = ifeval_rows(own.get("ifeval"), options.limit)
                else:
                    read_rows(name, own)
            except UnreachableError as error:
                nowhere[name] = error.__cause__
        if nowhere:  # all are named at once
            raise unreachable(list(nowhere), {}, next(iter(nowhere.values())))
        return cls(skills, options, own, rows, left_out)

    def scores(self, model: Any, tokenizer: Any, who: str) -> dict[str, np.ndarray]:
        """(rows,) scores in [0, 1] of each skill, in the order of the benchmark's rows.

        Args:
            who: whose they are, for the terminal.

        Raises:
            DataError: rows cannot be read from the Hub. QpsftError: log-likelihoods that are not finite numbers.
        """
        print(wrap(f"asking {who}: {', '.join(skill.title for skill in self.skills.values())}", "  "), flush=True)
        tasks = [name for name in self.skills if name in SKILLS and name != "ifeval"]
        # Before IFEval, which takes longest: a broken model shows at once.
        scores = self._choices(model, tokenizer, tasks, who) if tasks else {}
        if "ifeval" in self.skills:
            scores["ifeval"] = self._instructions(model, tokenizer, f"IFEval, {who}")
        for name in self.skills:
            if name in BUILT_IN_SKILLS:
                scores[name] = self._built_in(model, tokenizer, name)
        return {name: scores[name] for name in self.skills}

    def _choices(self, model: Any, tokenizer: Any, tasks: list[str], who: str) -> dict[str, np.ndarray]:
        results = run_tasks(
            model,
            tokenizer,
            tasks,
            task_data=used_by(tasks, self.task_data),
            limit=self.options.limit,
            batch_size=self.options.batch_size or TASK_BATCH,
            seed=self.options.seed,
            samples=True,
        )
        scores = {}
        for task in tasks:
            rows = sorted(results[task]["samples"], key=lambda row: row["doc_id"])
            scores[task] = np.array([score_of(task, row) for row in rows], dtype=float)
            if broken := np.isnan(scores[task]).sum():
                raise QpsftError(
                    f"On {broken} of {len(rows)} rows of {SKILLS[task].title} {who}'s log-likelihoods are not finite "
                    "numbers (NaN or infinite), so no score of it means anything: it is broken.",
                    "Look for NaN in its weights. If its numbers are too large for float16, use bfloat16 or float32.",
                )
        return scores

    def _instructions(self, model: Any, tokenizer: Any, description: str) -> np.ndarray:
        checked = follow_instructions(
            model,
            tokenizer,
            self.instructions,
            max_new_tokens=self.options.max_new_tokens or MAX_NEW_TOKENS,
            batch_size=self.options.batch_size,
            description=description,
        )
        return np.array([row[SKILLS["ifeval"].metric] for row in checked], dtype=float)

    def _built_in(self, model: Any, tokenizer: Any, name: str) -> np.ndarray:
        rows = as_rows(built_in.out_of_domain("test", BUILT_IN_ROWS)[name], name)
        result = evaluate(
            model, tokenizer, rows, limit=self.options.limit, k=0, drift=False, max_new_tokens=built_in.ANSWER_TOKENS,
            batch_size=self.options.batch_size, progress=True,
        )  # fmt: skip
        return np.array(result.per_row["accuracy"])


def score_of(task: str, row: Mapping[str, Any]) -> float:
    """A row's score by a task of choices: the harness's, but NaN where a log-likelihood is not finite.

    The harness takes the first of choices that are NaN, in TruthfulQA MC1 always the right one.

    Args:
        row: the harness's record of it.
    """
    likelihoods = np.array([likelihood for likelihood, _ in row["filtered_resps"]], dtype=float)
    if not np.isfinite(likelihoods).all():
        return math.nan
    if task == "truthfulqa_mc2":
        # The harness's own is 0 / 0 where exp() of every choice's log-likelihood is 0.
        shares = np.exp(likelihoods - likelihoods.max())
        right = np.array(row["doc"]["mc2_targets"]["labels"]) == 1
        return float(shares[right].sum() / shares.sum())
    return float(row[SKILLS[task].metric])


def chosen_skills(names: bool | list[str], known: Mapping[str, Skill]) -> dict[str, Skill]:
    """The skills of --keep: all of `known`, or those named; `truthfulqa` names both of its tasks.

    Raises:
        DataError: there is no such skill.
    """
    if not isinstance(names, list):
        return dict(known)
    chosen = []
    for name in names:
        part = [name] if name in known else [one for one in known if one.startswith(f"{name}_")]
        if not part:
            raise DataError(
                f"--keep has no skill {name!r}.", f"{did_you_mean(name, known)}They are: {', '.join(known)}."
            )
        chosen += part
    return {name: known[name] for name in dict.fromkeys(chosen)}


@dataclass(frozen=True)
class KeptSkill:
    """One skill of both models, measured on the same rows.

    Attributes:
        base, tuned: mean scores.
        difference: tuned - base, with the 95 % interval of paired rows.
        verdict: KEPT, LOST or UNSURE.
        note: why it is not clear, where it is not.
        per_row: each model's score on each row.
    """

    title: str
    metric: str
    rows: int
    base: float
    tuned: float
    difference: Estimate
    verdict: str
    note: str = ""
    per_row: dict[str, list[float]] = field(default_factory=dict, repr=False)


@dataclass
class Kept:
    """The gate's result.

    Attributes:
        base: what the tuned model is compared with, in words.
        notes: what is to be said beside the table.
    """

    max_drop: float
    base: str
    skills: dict[str, KeptSkill]
    notes: list[str]

    def named(self, verdict: str) -> list[str]:
        """Titles of the skills with this verdict."""
        return [skill.title for skill in self.skills.values() if skill.verdict == verdict]

    @property
    def is_lost(self) -> bool:
        """Whether any skill fell by more than `max_drop`."""
        return bool(self.named(LOST))

    def sentence(self) -> str:
        """The answer."""
        unsure = f"not sure of {listed(self.named(UNSURE))}" if self.named(UNSURE) else ""
        if self.is_lost:
            return f"LOST: {listed(self.named(LOST))} fell by more than {self.max_drop:g}{unsure and '; ' + unsure}."
        if unsure:
            return f"Nothing fell by more than {self.max_drop:g}, but {unsure}."
        return f"KEPT: nothing fell by as much as {self.max_drop:g}."

    def cells(self) -> list[list[str]]:
        """The table, its header first."""
        rows = [["skill", "rows", "base", "tuned", "difference [95 % interval]", "verdict"]]
        for skill in self.skills.values():
            change = skill.difference
            interval = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            rows.append(
                [skill.title, str(skill.rows), f"{skill.base:.3f}", f"{skill.tuned:.3f}", interval, skill.verdict]
            )
        return rows

    def said(self) -> list[str]:
        """What is to be known of the numbers, one sentence each."""
        titles: dict[str, list[str]] = {}
        for skill in self.skills.values():
            titles.setdefault(skill.note, []).append(skill.title)
        return [*self.notes, *(f"{listed(names)}: {note}" for note, names in titles.items() if note)]

    def table(self) -> str:
        """For the terminal: the table, the notes and the answer."""
        head = f"what it kept, against {self.base}"
        return "\n".join([head, text_table(self.cells()), "", *map(wrap, self.said()), wrap(self.sentence())])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(gate: Gate, base_name: str, base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> Kept:
    """Compares the two models' scores on the same rows.

    Args:
        base, tuned: as from `Gate.scores`.
    """
    max_drop = gate.options.max_drop
    skills = {}
    for name, skill in gate.skills.items():
        before, after = base[name], tuned[name]
        change = paired_difference(before, after)
        verdict, note = verdict_on(float(before.mean()), change, len(before), max_drop)
        per_row = {"base": before.tolist(), "tuned": after.tolist()}
        skills[name] = KeptSkill(
            skill.title, skill.metric, len(before), float(before.mean()), float(after.mean()), change, verdict, note,
            per_row,
        )  # fmt: skip
    notes = []
    if gate.left_out:
        notes.append(
            f"IFEval: {gate.left_out} of its prompts are left out. Checking them takes NLTK's punkt_tab, which is not "
            "here and could not be downloaded (python -m nltk.downloader punkt_tab)."
        )
    return Kept(max_drop, base_name, skills, notes)


def verdict_on(base: float, difference: Estimate, rows: int, max_drop: float) -> tuple[str, str]:
    """LOST, KEPT or UNSURE, and what is not clear.

    LOST: the difference itself is beyond `max_drop`, or not a number. KEPT: its whole interval is inside. UNSURE:
    neither, or the base scores too low to lose that much.
    """
    drop = -difference.value
    if not drop <= max_drop + ROUNDING:
        chance = f"the interval reaches {difference.high:+.3f}, so {rows} rows do not rule out chance; more would."
        return LOST, chance if difference.high > -max_drop else ""
    if base <= max_drop:
        return UNSURE, f"the base itself scores {base:.3f} on these {rows} rows, so such a fall could not show."
    if difference.low > -max_drop:
        return KEPT, ""
    return UNSURE, few_rows(rows, max_drop)


def few_rows(rows: int, max_drop: float) -> str:
    """Too few rows for KEPT, which takes some even where no row differs."""
    least = math.floor(TWO_SIDED_95 * math.sqrt(2) / max_drop) - 1 if max_drop else 0
    more = f" (KEPT takes {least} at least)" if rows < least else ""
    return f"{rows} rows are too few to rule out a fall by more than {max_drop:g}{more}."
