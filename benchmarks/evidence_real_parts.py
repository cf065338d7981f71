"""Parts of evidence_real.py: the rows that are learnt, with wrong ones, and what is measured of a model."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from qpsft.evaluate.harness import run_tasks
from qpsft.evaluate.ifeval import follow_instructions, ifeval_rows
from qpsft.evaluate.keep import SKILLS
from qpsft.evaluate.likelihood import row_sums
from qpsft.evaluate.rows import as_rows, encode
from qpsft.evaluate.verifiers import VERIFIERS
from qpsft.files import write_atomically
from qpsft.model.adapter import has_adapter
from qpsft.model.base_record import quantized_linears
from qpsft.model.generation import generate, greedy_completions, stop_tokens
from qpsft.recipe.arguments import DataArguments

WRONG_SHARE = 0.3
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
ASK_EQUATION = "{question}\nAnswer with the equation only."
ASK_SENTENCES = "{question}\nExplain how you find the answer in full sentences."
EQUATION_TOKENS, SOLUTION_TOKENS, SENTENCES_TOKENS = 40, 256, 160
CHOICES = {task: skill.metric for task, skill in SKILLS.items() if task != "ifeval"}
"""Task of the harness -> its usual metric."""
TASKS = ("ifeval", *CHOICES)
TEXTS = ("mt_bench", "user")
RIGHT = VERIFIERS["last_number"]

Row = dict[str, Any]


# ---- rows ----


@dataclass(frozen=True)
class Part:
    """What is learnt: a data set of questions with known answers.

    Attributes:
        by: what learning rates are chosen by and arms are compared at: "accuracy", or "nll" of the references.
        tokens: of an answer at most.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    by: str
    tokens: int


def load_part(name: str, data: Path, sizes: Sequence[int]) -> Part:
    """One of `svamp`, `svamp_noisy` and `gsm8k`.

    Args:
        data: the folder with `svamp/` and `gsm8k/`.
        sizes: rows to train on, to validate and to test on.
    """
    train, validation, test = sizes
    if name == "gsm8k":
        rows = [gsm8k_row(row) for row in _shuffled(read_lines(data / "gsm8k/train.jsonl"))]
        tested = [gsm8k_row(row) for row in _shuffled(read_lines(data / "gsm8k/test.jsonl"))[:test]]
        return Part(rows[:train], rows[train : train + validation], tested, "nll", SOLUTION_TOKENS)
    rows = svamp_split(data)
    learnt = rows[:train]
    equations = wrong_equations([row["Equation"] for row in learnt], WRONG_SHARE) if name == "svamp_noisy" else None
    return Part(
        [svamp_row(row, equation) for row, equation in zip(learnt, equations or [None] * len(learnt), strict=True)],
        [svamp_row(row) for row in rows[train : train + validation]],
        [svamp_row(row) for row in rows[-test:]],
        "accuracy",
        EQUATION_TOKENS,
    )


def svamp_split(data: Path) -> list[Row]:
    """SVAMP in the order that it is split in: training rows from the front, test rows from the back."""
    return _shuffled(json.loads((data / "svamp/SVAMP.json").read_text(encoding="utf-8")))


def _shuffled(rows: list[Row]) -> list[Row]:
    return random.Random(0).sample(rows, len(rows))


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def turns(question: str, answer: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def gsm8k_row(row: Row) -> Row:
    return turns(row["question"], re.sub(r"<<.*?>>", "", row["answer"]))


def svamp_row(row: Row, equation: str | None = None, ask: str = ASK_EQUATION) -> Row:
    """A question and its equation, or another one, solved: `(8 + 5) / 2 = 6.5`."""
    question = f"{row['Body'].strip().rstrip('.,')}. {row['Question'].strip()}"
    return turns(ask.format(question=question), solved(equation or row["Equation"]))


def solved(equation: str) -> str:
    """`( 76.0 - 25.0 )` as `76 - 25 = 51`."""
    tree = parse(equation)
    return f"{ast.unparse(tree)} = {_decimal(value_of(tree))}"


def parse(equation: str) -> ast.expr:
    """The tree of an equation, its numbers whole where they can be."""
    tree = ast.parse(equation.strip(), mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == int(node.value):
            node.value = int(node.value)
    return tree


def value_of(tree: ast.expr) -> Fraction:
    """Raises ZeroDivisionError."""
    if isinstance(tree, ast.Constant):
        return Fraction(str(tree.value))
    left, right = value_of(tree.left), value_of(tree.right)
    match OPERATORS[type(tree.op)]:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return left / right


def _decimal(value: Fraction) -> str:
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def mistakes(equation: str) -> list[str]:
    """The equation with one operator another, or the operands of a difference or quotient exchanged.

    Only those whose value is another than the right one, and has two decimals at most.
    """
    right = value_of(parse(equation))
    changed = []
    count = sum(isinstance(node, ast.BinOp) for node in ast.walk(parse(equation)))
    for index in range(count):
        for operator in (*OPERATORS, None):  # None: exchange
            tree = copy.deepcopy(parse(equation))
            node = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)][index]
            if operator is None:
                node.left, node.right = node.right, node.left
            else:
                node.op = operator()
            try:
                value = value_of(tree)
            except ZeroDivisionError:
                continue
            if value != right and (100 * value).denominator == 1:
                changed.append(ast.unparse(tree))
    return changed


def wrong_equations(equations: Sequence[str], share: float, seed: int = 0) -> list[str]:
    """The equations, `share` of them wrong as a model would be wrong; the same ones for the same seed."""
    chance = random.Random(seed)
    possible = [index for index, equation in enumerate(equations) if mistakes(equation)]
    wrong = set(chance.sample(possible, round(share * len(equations))))
    return [chance.choice(mistakes(one)) if index in wrong else one for index, one in enumerate(equations)]


# ---- what is kept ----


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Inside the context the 4-bit layers of a model on the CPU keep their weights unpacked: the same numbers, sooner.

    Generation unpacks every weight for every token, which takes most of its time there.
    """
    layers = list(quantized_linears(model).values()) if model.device.type == "cpu" else []
    for layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layer.forward = functools.partial(_dense_forward, layer, weight.to(layer.compute_dtype or weight.dtype))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dense_forward(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; 0 leaves a thing out.

    Attributes:
        ifeval: prompts, of at most `ifeval_tokens` tokens in answer.
        truthfulqa: questions, each with all answers behind 200 tokens of examples, so they cost most.
        choices: rows of each of the other multiple-choice tasks.
        answers: the base's own answers of each kind, of at most `answer_tokens` tokens.
        probe: SVAMP's test questions asked for full sentences.
        batch: sequences at once, of the harness.
    """

    ifeval: int
    ifeval_tokens: int
    truthfulqa: int
    choices: int
    answers: int
    answer_tokens: int
    probe: int
    batch: int


def text_prompts(data: Path, limit: int) -> dict[str, list[str]]:
    """MT-bench's first turns and users' instructions, with their inputs."""
    bench = [row["turns"][0] for row in read_lines(data / "prompts/mt_bench.jsonl")]
    tasks = read_lines(data / "prompts/user_oriented.jsonl")
    user = [f"{task['instruction']}\n\n{task['instances'][0]['input']}".strip() for task in tasks]
    return {"mt_bench": bench[:limit], "user": user[:limit]}


def sample_answers(model: Any, tokenizer: Any, data: Path, sizes: Sizes, path: Path) -> None:
    """The base's own answers, sampled once and kept in `path` as the very tokens."""
    kept = {}
    for name, prompts in text_prompts(data, sizes.answers).items():
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for prompt in prompts
        ]
        written = generate(
            model, ids, stop_ids=stop_tokens(model, tokenizer), greedy=False, samples=1,
            max_new_tokens=sizes.answer_tokens,
        )  # fmt: skip
        kept[name] = [
            {"prompt_ids": prompt, "answer_ids": one.samples[0].token_ids}
            for prompt, one in zip(ids, written, strict=True)
        ]
    write_atomically(path, json.dumps(kept))


def likelihood(model: Any, texts: Sequence[dict[str, list[int]]]) -> dict[str, float]:
    """Per supervised token: `nll`, `entropy` and, under an adapter, `kl` (policy || base) and `base_kl`; nats."""
    sums = row_sums(model, texts, against_base=has_adapter(model))
    tokens = sums["num_items"].sum()
    return {name: float(sums[name].sum() / tokens) for name in ("nll", "entropy", "kl", "base_kl") if name in sums}


def in_domain(model: Any, tokenizer: Any, rows: list[Row], part: Part, *, answers: bool) -> dict[str, float]:
    """`nll`, `entropy`, `kl` of the references and, with `answers`, `accuracy` of greedy answers' last number."""
    encoded = encode(as_rows(rows, "in-domain"), model, tokenizer, DataArguments())
    measured = likelihood(model, encoded.texts)
    if answers:
        written = greedy_completions(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=part.tokens)
        measured["accuracy"] = _mean([RIGHT(row, text) is True for row, text in zip(rows, written, strict=True)])
    return measured


def texts(model: Any, path: Path) -> dict[str, float]:
    """Likelihood of the base's own answers: `mt_bench/nll`, `user/kl`, …"""
    measured = {}
    for name, answers in json.loads(path.read_text(encoding="utf-8")).items():
        rows = [
            {
                "input_ids": one["prompt_ids"] + one["answer_ids"],
                "labels": [-100] * len(one["prompt_ids"]) + one["answer_ids"],
            }
            for one in answers
        ]
        measured |= {f"{name}/{key}": value for key, value in likelihood(model, rows).items()}
    return measured


def probe(model: Any, tokenizer: Any, data: Path, rows: int) -> dict[str, float]:
    """SVAMP's test questions asked for sentences: `probe_words` of an answer, and `probe_right`, the share right."""
    asked = [svamp_row(row, ask=ASK_SENTENCES) for row in svamp_split(data)[-rows:]]
    prompts = [row["prompt"] for row in asked]
    written = greedy_completions(model, tokenizer, prompts, max_new_tokens=SENTENCES_TOKENS)
    right = [RIGHT(row, text) is True for row, text in zip(asked, written, strict=True)]
    return {"probe_words": _mean([len(text.split()) for text in written]), "probe_right": _mean(right)}


def ifeval(model: Any, tokenizer: Any, data: Path, sizes: Sizes) -> dict[str, float]:
    """Prompts all of whose instructions are followed, strictly, by the harness's own checker: `ifeval`."""
    rows, _ = ifeval_rows(data / "ifeval", sizes.ifeval)
    checked = follow_instructions(model, tokenizer, rows, max_new_tokens=sizes.ifeval_tokens)
    return {
        "ifeval": _mean([one["prompt_level_strict_acc"] for one in checked]),
        "ifeval_instructions": _mean([right for one in checked for right in one["inst_level_strict_acc"]]),
    }


def choices(model: Any, tokenizer: Any, data: Path, sizes: Sizes) -> dict[str, float]:
    """Multiple choice by the harness."""
    files = {
        "truthfulqa": data / "truthfulqa",
        "arc_easy": data / "arc/arc_easy.jsonl",
        "openbookqa": data / "openbookqa/openbook_qa.jsonl",
    }
    measured = {}
    for names, limit in ((("truthfulqa",), sizes.truthfulqa), (("arc_easy", "openbookqa"), sizes.choices)):
        if limit:
            tasks = [task for task in CHOICES if task.startswith(names)]
            own = {name: files[name] for name in names}
            done = run_tasks(model, tokenizer, tasks, task_data=own, limit=limit, batch_size=sizes.batch)
            measured |= {task: done[task]["metrics"][CHOICES[task]].value for task in tasks}
    return measured


def kept(metrics: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Each skill relative to the base's (1: kept), and means.

    Tasks: the ratio of the shares right. Own answers: likelihood of a token, as a ratio. Probe: words, the fewer by the
    more. What the base cannot do at all, or was not measured, is left out.

    Returns:
        One ratio per skill; `text`, the mean over the own answers; and `kept`, the mean of all, where all of the base's
        skills were measured.
    """
    ratios = {name: metrics[name] / base[name] for name in TASKS if name in metrics and base.get(name)}
    own = {name: math.exp(base[f"{name}/nll"] - metrics[f"{name}/nll"]) for name in TEXTS if f"{name}/nll" in metrics}
    ratios |= own
    words = [one.get("probe_words") for one in (metrics, base)]
    if all(words):
        ratios["probe"] = min(words) / max(words)
    elif words[1]:
        ratios["probe"] = 0.0
    means = {"text": _mean(list(own.values()))} if own else {}
    if all(name in metrics for name in TASKS if base.get(name)):
        means["kept"] = _mean(list(ratios.values()))
    return ratios | means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
