"""Whatever a row says is in its tokens, or the row is refused: 500 conversations, the chat templates of 55 families.

The check here knows nothing of the one it tests: every text is made of words that stand nowhere else, so it is enough
to look for them in what the model learns and in what it only reads.
"""

import itertools
import json
import random
import warnings
from collections import Counter

import pytest
from real_templates import more_templates, templates, tokenizer_for

from qpsft.data import template as chat_template
from qpsft.data.contents import find_losses
from qpsft.data.read import as_records
from qpsft.data.tokenize import tokenize_records
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

FIRST, CONVERSATIONS = 100, 500
"""Conversations tried in every run of the tests, and by those that try all."""
SHARE = 4
"""Templates that each conversation is tried on, unless all are asked for with -m slow."""
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
COMMON = ["yes", "no", "4", "ok", "user", "a"]
"""Texts that come again in other turns, or stand in the templates themselves."""


class Writer:
    """Writes rows, and keeps what must be found: (text, learned, may be stripped)."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.expected: list[tuple[str, bool, bool]] = []
        self.common = Counter()

    def word(self) -> str:
        return "".join(self.random.choices(SYLLABLES, k=5))

    def text(self, learned: bool) -> str:
        if self.random.random() < 0.15:
            text = self.random.choice(COMMON)
            self.common[text] += 1
            return text
        text = " ".join(self.word() for _ in range(self.random.randrange(1, 4)))
        text = self.random.choice([text, text, text, f"{text}\n{self.word()}", f'"{self.word()}" {text} é'])
        self.expected.append((text, learned, False))
        return self.random.choice(["", "", "\n", " "]) + text + self.random.choice(["", "", "\n"])

    def answer(self, learned: bool, is_last: bool) -> dict:
        message = {"role": "assistant", "content": self.text(learned)}
        thinks = self.random.random()
        if thinks < 0.25:
            thought = " ".join((self.word(), self.word()))
            self.expected.append((thought, learned, not is_last))
            if thinks < 0.12:
                message["reasoning_content"] = thought
            else:
                message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content'].strip()}"
        return message

    def calls(self, learned: bool) -> list[dict]:
        """An assistant's calls and their results."""
        calls, results = [], []
        for _ in range(self.random.choice([1, 1, 2])):
            name, key, value, identity = self.word(), self.word(), self.value(learned), self.word()[:9]
            self.expected += [(name, learned, False), (key, learned, False)]
            function = {"name": name, "arguments": {key: value}}
            if self.random.random() < 0.3:
                function["arguments"] = json.dumps(function["arguments"])
            calls.append({"type": "function", "id": identity, "function": function})
            results.append({"role": "tool", "name": name, "tool_call_id": identity, "content": self.text(False)})
        content = self.text(learned) if self.random.random() < 0.15 else self.random.choice(["", None])
        return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]

    def value(self, learned: bool) -> object:
        word = self.word()
        number = self.random.randrange(10**8, 10**9)
        value, text = self.random.choice(
            [(word, word), (f'{word} "x"', word), (number, str(number)), ([word, None], word), ({"in": [word]}, word)]
        )
        self.expected.append((text, learned, False))
        return value

    def row(self) -> dict:
        messages, tools = [], []
        if self.random.random() < 0.35:
            role = self.random.choice(["system", "system", "system", "developer"])
            messages.append({"role": role, "content": self.text(False)})
        turns = self.random.randrange(1, 4)
        for turn in range(turns):
            messages.append({"role": "user", "content": self.text(False)})
            uses_tools = self.random.random() < 0.2
            learned = self.random.random() > 0.15 or turn == turns - 1
            if uses_tools:
                messages += self.calls(True)
            answer = self.answer(learned, turn == turns - 1)
            messages.append(answer if learned else {**answer, self.random.choice(["train", "weight"]): 0})
            if self.random.random() < 0.05 and turn < turns - 1:
                messages.append({"role": "system", "content": self.text(False)})
        if self.random.random() < 0.15:
            name, description, key = self.word(), self.word(), self.word()
            self.expected += [(text, False, False) for text in (name, description, key)]
            parameters = {"type": "object", "properties": {key: {"type": "string"}}}
            tools.append({"type": "function", "function": {"name": name, "description": description}})
            tools[0]["function"]["parameters"] = parameters
        return self.shaped(messages) | ({"tools": tools} if tools else {})

    def shaped(self, messages: list[dict]) -> dict:
        """The same messages in one of the shapes that can hold them."""
        if any(message.keys() - {"role", "content"} for message in messages):
            return {"messages": messages}
        if self.random.random() < 0.4:
            if len(messages) == 2:
                return {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
            prompt = "\n".join(message["content"] for message in messages[:-1])
            self.expected = [(text, learned and text not in prompt, may) for text, learned, may in self.expected]
            return {"prompt": messages[:-1], "completion": messages[-1:]}
        if self.random.random() < 0.3 and not any(message["role"] == "developer" for message in messages):
            names = {"user": "human", "assistant": "gpt", "system": "system"}
            return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
        return {"messages": messages}


def stretches(row: dict, tokenizer) -> tuple[str, str]:
    """What the model learns to write, and what it only reads; each with a line between its stretches."""
    texts = {True: [], False: []}
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
        texts[learned].append(tokenizer.decode([token for token, _ in group]))
    return "\n|\n".join(texts[True]), "\n|\n".join(texts[False])


def is_in(text: str, where: str) -> bool:
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    twice = json.dumps(escaped, ensure_ascii=False)[1:-1]
    return text in where or escaped in where or twice in where or json.dumps(text)[1:-1] in where


def what_is_lost(writer: Writer, row: dict, template: str, split_turns: bool = False) -> list[str] | None:
    """Texts of the row that are not where they should be; None if it is refused."""
    tokenizer = tokenizer_for(template)
    arguments = DataArguments(split_turns=split_turns)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = tokenize_records(as_records([row], "rows"), tokenizer, arguments, None)
    except DataError:
        return None
    parts = [stretches(one, tokenizer) for one in data.dataset]
    learned, read = ("\n#\n".join(texts) for texts in zip(*parts, strict=True))
    lost, stripped = [], 0
    for text, is_learned, may_be_stripped in writer.expected:
        if not is_in(text, learned if is_learned else read):
            if may_be_stripped and not is_in(text, learned + read):
                stripped += 1
            else:
                lost.append(text)
        elif not is_learned and is_in(text, learned):
            lost.append(f"{text} (learned)")
    if stripped > data.counts.stripped_reasoning:
        lost.append(f"{stripped} thoughts without a word")
    whole = learned + read
    return lost + [text for text, number in writer.common.items() if whole.count(text) < number]


def tried(seed: int, families: dict[str, str], share: int | None) -> list[str]:
    names = list(families)
    return names if share is None else [names[(seed * share + i) % len(names)] for i in range(share)]


def search(families: dict[str, str], conversations: int, share: int | None) -> tuple[dict, Counter]:
    lost, outcomes = {}, Counter()
    for seed in range(conversations):
        for name in tried(seed, families, share):
            writer = Writer(seed)
            row = writer.row()
            gone = what_is_lost(writer, row, families[name])
            outcomes["refused" if gone is None else "whole"] += 1
            if gone:
                lost[seed, name] = gone
    return lost, outcomes


@pytest.mark.parametrize("conversations", [FIRST, pytest.param(CONVERSATIONS, marks=pytest.mark.journey)])
def test_nothing_of_500_conversations_is_lost(conversations):
    lost, outcomes = search(templates(), conversations, SHARE)
    assert not lost
    assert outcomes["whole"] > 1.6 * conversations and outcomes["refused"] > 0.4 * conversations


@pytest.mark.slow
def test_nothing_is_lost_on_any_template():
    lost, _ = search(templates(), CONVERSATIONS, None)
    assert not lost


@pytest.mark.slow
def test_nothing_is_lost_on_llama_cpps_collection():
    if not more_templates():
        pytest.skip("llama.cpp's source is not in ~/.cache/qpsft: `qpsft export` downloads it")
    lost, _ = search(more_templates(), CONVERSATIONS, None)
    assert not lost


def test_split_turns_keeps_every_thought():
    lost, whole = {}, 0
    for seed in range(100):
        for name in tried(seed, templates(), SHARE):
            writer = Writer(seed)
            row = writer.row()
            # with every answer in a row of its own, no reasoning may be missing, and earlier answers are read as well
            writer.expected = [(text, learned, False) for text, learned, _ in writer.expected if learned]
            gone = what_is_lost(writer, row, templates()[name], split_turns=True)
            whole += gone is not None
            if gone:
                lost[seed, name] = gone
    assert not lost and whole > 100


def test_without_the_check_much_is_lost(monkeypatch):
    """The negative control: the same search sees what templates leave out."""
    monkeypatch.setattr(chat_template, "find_losses", lambda *args: [])
    monkeypatch.setattr(chat_template.ChatTemplate, "_losses_of_kind", lambda *args: [])
    lost, _ = search(templates(), 60, SHARE)
    assert len(lost) > 30


def part_of(message, text, spans):
    return [loss.part.label for loss in find_losses(text, spans, [message], None)]


def test_a_call_s_key_is_not_found_inside_a_longer_word():
    function = {"name": "add", "arguments": {"a": 2, "b": True}}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    whole = '{"name": "add", "arguments": {"a": 2, "b": true}}'
    assert part_of(message, whole, {0: [(0, len(whole))]}) == []
    short = '{"name": "add", "arguments": {}}'
    assert (
        part_of(message, short, {0: [(0, len(short))]})
        == ["the argument a of the call to add"] * 2 + ["the argument b of the call to add"] * 2
    )


def test_words_that_one_turn_has_taken_count_for_no_other():
    messages = [{"role": "user", "content": "yes"}] * 2 + [{"role": "assistant", "content": "yes"}]
    text = "U:yes U: A:yes"
    losses = find_losses(text, {2: [(11, 14)]}, messages, None)
    assert [(loss.turn, loss.part.label) for loss in losses] == [(1, "the content")]
    assert find_losses("U:yes U:yes A:yes", {2: [(14, 17)]}, messages, None) == []
