"""Links from the documents to lines of code, written [`symbol`](../qpsft/file.py#L10-L20).

    python docs/line_links.py            rewrite every range to where its symbol stands now
    python docs/line_links.py --check    only say which are wrong; exit code 1 if any is

A symbol is a function, a class, a method (`Class.method`) or a constant; its range is the whole definition. A range
that has drifted by a few lines passes the check as long as the definition still begins inside it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\((?P<path>[\w./-]+\.py)#L(?P<first>\d+)(?:-L(?P<last>\d+))?\)")


def definition(source: str, symbol: str) -> tuple[int, int] | None:
    """First and last line (from 1) of a symbol's definition; None if the source has no such symbol."""
    body: Sequence[ast.AST] = ast.parse(source).body
    for name in symbol.split("."):
        found = next((node for node in body if name in _names(node)), None)
        if found is None:
            return None
        body = getattr(found, "body", [])
    return found.lineno, found.end_lineno


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def problems(document: Path) -> list[str]:
    """What is wrong with a document's links to lines, one sentence each."""
    found = []
    for link in LINK.finditer(document.read_text(encoding="utf-8")):
        source = document.parent / link["path"]
        first, last = int(link["first"]), int(link["last"] or link["first"])
        if not source.is_file():
            found.append(f"{document.name}: there is no {link['path']}")
            continue
        text = source.read_text(encoding="utf-8")
        lines = definition(text, link["symbol"])
        if lines is None:
            found.append(f"{document.name}: {link['path']} defines no {link['symbol']}")
        elif not first <= last <= len(text.splitlines()):
            found.append(f"{document.name}: {link['path']} has no lines {first} to {last}")
        elif not first <= lines[0] <= last:
            found.append(f"{document.name}: {link['symbol']} begins at line {lines[0]}, not in {first} to {last}")
    return found


def updated(document: Path) -> str:
    """The document's text with every range as it is now; links to what is not there stay as they are."""

    def replace(link: re.Match[str]) -> str:
        source = document.parent / link["path"]
        lines = definition(source.read_text(encoding="utf-8"), link["symbol"]) if source.is_file() else None
        return link[0] if lines is None else f"[`{link['symbol']}`]({link['path']}#L{lines[0]}-L{lines[1]})"

    return LINK.sub(replace, document.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    documents = sorted(HERE.glob("*.md"))
    if not options.check:
        for document in documents:
            document.write_text(updated(document), encoding="utf-8")
    wrong = [problem for document in documents for problem in problems(document)]
    print("\n".join(wrong) or "every link to lines is right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
