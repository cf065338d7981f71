"""The table of docs/data.md: what the real chat templates of each family do with each kind of row.

    python docs/data_table.py            try every family and write the table into docs/data.md
    python docs/data_table.py --check    only say whether it is still true; exit code 1 if not

The templates are TRL's own files (`trl/chat_templates`) and those in tests/chat_templates; the rows are tokenized as
`qpsft train` does it.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from real_templates import templates, tokenizer_for  # noqa: E402

from qpsft.data.read import as_records  # noqa: E402
from qpsft.data.tokenize import tokenize_records  # noqa: E402
from qpsft.errors import DataError  # noqa: E402
from qpsft.recipe.arguments import DataArguments  # noqa: E402

DOCUMENT = HERE / "data.md"
BEGIN, END = "<!-- table: python docs/data_table.py -->\n", "<!-- end of table -->\n"
COLUMNS = ("system turn", "tools", "reasoning", "several turns", "flags")


def turn(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


SYSTEM, USER, ANSWER = turn("system", "Be brief."), turn("user", "Weather in Oslo?"), turn("assistant", "It is cold.")
AGAIN, LAST = turn("user", "And in Bergen?"), turn("assistant", "It rains there.")
THOUGHT = {"reasoning_content": "it is November"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Which one."}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Looks it up.", "parameters": CITY}}]


def calls(content: str, *cities: str) -> list[dict]:
    """A question, calls for the cities, their results and the answer; ids as Mistral wants them."""
    made = [(f"call0000{n}", city) for n, city in enumerate(cities)]
    called = [
        {"type": "function", "id": identity, "function": {"name": "weather", "arguments": {"city": city}}}
        for identity, city in made
    ]
    results = [turn("tool", f"4 C in {city}", tool_call_id=identity, name="weather") for identity, city in made]
    return [USER, turn("assistant", content, tool_calls=called), *results, ANSWER]


def outcome(template: str, messages: list[dict], tools: list[dict] | None = None, **options: bool) -> tuple[str, int]:
    """ "" or why the row is refused; and how many answers lost their reasoning on purpose."""
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    try:
        data = tokenize_records(as_records([row], "row"), tokenizer_for(template), DataArguments(**options), None)
    except DataError as error:
        return why(error.what), 0
    return "", data.counts.stripped_reasoning


def why(text: str) -> str:
    """An error's text in a few words."""
    text = re.sub(r"^row, row 1: ", "", text).rstrip(".")
    if said := re.search(r"refuses this conversation: (.+)", text):
        return f"“{said[1].rstrip('!').replace('user/assistant/user/assistant/', 'user/assistant/…')}”"
    for pattern, words in (
        (r"does not write the call to", "calls not written"),
        (r"does not write all of the tool", "schemas not written"),
        (r"does not write the reasoning", "no place for it"),
        (r"does not write the content in turn \d+ \(system\)", "not written"),
        (r"does not write the content", "not written"),
        (r"writes the first \d+ turns differently", "earlier turns change when others follow"),
        (r"writes nothing after an assistant turn", "nothing ends an answer"),
        (r"fails on this conversation: (?:\w+Error: )?(.+)", r"fails"),
    ):
        if re.search(pattern, text):
            return words
    return text


def cells(template: str) -> list[str]:
    """The five cells of one family."""
    return [system(template), tool_use(template), reasoning(template), turns(template), flags(template)]


def verdict(refusal: str, *limits: tuple[str, str]) -> str:
    if refusal:
        return f"refused: {refusal}"
    return "; ".join(["right", *(f"{what} refused: {said}" for what, said in limits if said)])


def system(template: str) -> str:
    first, _ = outcome(template, [SYSTEM, USER, ANSWER])
    several, _ = outcome(template, [SYSTEM, USER, ANSWER, AGAIN, LAST])
    if several and not first:
        several = "" if not outcome(template, [SYSTEM, USER, ANSWER, AGAIN, LAST], split_turns=True)[0] else several
        return "right with one answer a row (`split_turns`)" if not several else verdict(several)
    later, _ = outcome(template, [SYSTEM, USER, ANSWER, turn("system", "In French now."), AGAIN, LAST])
    return verdict(first, ("a later one", later))


def tool_use(template: str) -> str:
    one, _ = outcome(template, calls("", "Oslo"), TOOLS)
    if one:
        without, _ = outcome(template, calls("", "Oslo"))
        split, _ = outcome(template, calls("", "Oslo"), TOOLS, split_turns=True)
        if not split:
            return "right with one answer a row (`split_turns`)"
        return verdict(one) if without else f"calls right; schemas in a column `tools` refused: {one}"
    two, _ = outcome(template, calls("", "Oslo", "Bergen"), TOOLS)
    beside, _ = outcome(template, calls("Let me look.", "Oslo"), TOOLS)
    return verdict(one, ("two calls at once", two), ("text beside a call", beside))


def reasoning(template: str) -> str:
    one, _ = outcome(template, [USER, {**ANSWER, **THOUGHT}])
    answers = [USER, {**ANSWER, **THOUGHT}, AGAIN, {**LAST, **THOUGHT}]
    several, stripped = outcome(template, answers)
    if several and not one and not outcome(template, answers, split_turns=True)[0]:
        return "right with one answer a row (`split_turns`)"
    return "right; earlier answers’ left out, said once" if stripped else verdict(one, ("several", several))


def turns(template: str) -> str:
    return verdict(outcome(template, [USER, ANSWER, AGAIN, LAST])[0])


def flags(template: str) -> str:
    return verdict(outcome(template, [USER, {**ANSWER, "train": False}, AGAIN, LAST])[0])


def table() -> str:
    """The table in Markdown."""
    lines = [f"| template | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, template in templates().items():
            lines.append(f"| `{name}` | {' | '.join(cells(template))} |")
    return "\n".join(lines) + "\n"


def with_table(document: str, made: str) -> str:
    """`document` with `made` between its marks."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table is not true")
    check = parser.parse_args().check
    document = DOCUMENT.read_text(encoding="utf-8")
    new = with_table(document, table())
    if check:
        print("The table is as it was." if new == document else "The table is out of date: run docs/data_table.py.")
        return int(new != document)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
