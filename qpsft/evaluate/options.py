"""The options of `qpsft evaluate`: each field is a flag, declared once."""

from __future__ import annotations

from dataclasses import dataclass

from qpsft.errors import DataError, RecipeError
from qpsft.recipe.arguments import LoadOptions
from qpsft.recipe.flags import check_ranges, option

MAX_DROP = 0.05
"""Of --keep, unless --max_drop is given."""


@dataclass
class EvaluationOptions(LoadOptions):
    """What `qpsft evaluate` was asked for.

    Raises:
        RecipeError: a value is out of range. DataError: it has no effect.
    """

    model: str = option(help="folder of an adapter or of a model, a Hub id, or demo")
    data: list[str] = option(
        [],
        "data sets with references: files, Hub ids, demo-noisy for the built-in test sets, or instruction_checks: "
        "prompts such as 'in exactly three bullet points', which a program checks",
        metavar="DATA",
    )
    tasks: list[str] = option(
        [], "public benchmarks by lm-evaluation-harness: gsm8k truthfulqa_mc1 ifeval mmlu arc_easy …", metavar="TASK"
    )
    task_data: list[str] = option([], "local copies of benchmarks: gsm8k=FOLDER truthfulqa=FILE …", metavar="NAME=PATH")
    keep: bool | list[str] = option(
        False,
        "the gate before publishing: is it still as good as its base at ifeval, truthfulqa_mc1, truthfulqa_mc2, "
        "arc_easy and openbookqa, or at those named? Exit code 1: one fell by more than --max_drop. A whole model "
        "needs --base too",
        metavar="SKILL",
    )
    max_drop: float | None = option(
        None, f"of --keep: how far a score may fall, as a share (default: {MAX_DROP}, five points of accuracy)"
    )
    limit: int | None = option(None, "only the first N rows of each data set and task", least=1)
    seed: int = option(0, "seed of the samples and the bootstrap", least=0)
    k: int = option(8, "completions sampled per prompt, for pass@k; 0: greedy only", least=0)
    temperature: float = option(1.0, "temperature of the samples; greedy is always measured", metavar="T", above=0)
    max_new_tokens: int | None = option(
        None, "length cap of completions (default: 256, the built-in sets 56; tasks have their own)", least=1
    )
    verifier: str = option(
        "auto", "auto, exact, last_number, gsm8k, math_verify, instructions, choice, tokens or demo", metavar="NAME"
    )
    no_drift: bool = option(False, "do not measure the divergence from the base")
    drift_samples: int = option(1, "samples per prompt that the divergence is measured on", least=1)
    batch_size: int | None = option(None, "sequences at once (default: as many as fit; 8 for tasks)", least=1)
    split: str = option("test", "split of Hub data sets and of the built-in sets", metavar="NAME")
    train_data: str | None = option(
        None, "what it was trained on, to count duplicates (default: what the adapter's recipe names)", metavar="DATA"
    )
    dataset_config: str | None = option(None, "configuration of Hub data sets", metavar="NAME")
    dataset_columns: dict | None = option(None, "which column is which: '{prompt: question, completion: answer}'")
    num_fewshot: int | None = option(None, "worked examples in a task's prompt (default: as the task has it)")
    apply_chat_template: bool = option(False, "put the tasks' prompts through the chat template")
    dtype: str = option("auto", "compute dtype of a model without adapter", metavar="NAME")
    json: str | None = option(None, "write all numbers to this file", metavar="FILE")
    completions: bool = option(False, "write every completion with its verdict to it too")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.keep == []:
            self.keep = True
        if self.max_drop is not None and not self.keep:
            raise DataError("--max_drop is given without --keep.", "Add --keep, or leave it out.")
        if self.max_drop is None:
            self.max_drop = MAX_DROP
        if not 0 <= self.max_drop <= 1:
            raise RecipeError(
                f"max_drop is {self.max_drop:g}; it must be from 0 to 1.",
                "It is a share: 0.05 is 5 points of accuracy.",
            )
        if not self.data and self.train_data and not self.tasks:
            raise DataError("--train_data is given without --data.", "Name what to evaluate on.")
        if self.task_data and not self.tasks and not self.keep:
            raise DataError(
                "--task_data is given without --tasks or --keep.",
                "Name the tasks, such as --tasks gsm8k, or add --keep.",
            )
