"""All checks, one after the other, and what they found as lines or as JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qpsft import __version__
from qpsft.doctor.checks import CHECKS, Finding
from qpsft.errors import one_line
from qpsft.terminal import wrap

MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}
WIDTH = 16  # of the names


def examine(checks: Iterable[Callable[[], Finding]] = CHECKS) -> list[Finding]:
    """What every check found. One that breaks down has failed, and says of what."""
    return [_examine(check) for check in checks]


def _examine(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a machine that is not as the check expects is what a doctor is for
        name = check.__name__.replace("_", " ")
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        cure = f"`pip install {missing}`." if missing else "Report this, with what --json prints."
        return Finding(name, "fail", f"{type(error).__name__}: {one_line(error)}", cure)


def can_train(findings: Sequence[Finding]) -> bool:
    return all(finding.status != "fail" for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """A line per finding, its cure below it, and the verdict; at most 80 columns."""
    lines = []
    for finding in findings:
        head = f"{MARKS[finding.status]} {finding.name:<{WIDTH}}"
        lines.append(wrap(f"{head}{finding.seen}", " " * len(head)))
        if finding.status != "ok":
            lines.append(wrap(f"{' ' * len(head)}→ {finding.cure}", " " * (len(head) + 2)))
    failed = [finding.name for finding in findings if finding.status == "fail"]
    verdict = f"Training could not work here: see {', '.join(failed)}." if failed else "This machine can train."
    return "\n".join([*lines, "", wrap(verdict, "")])


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """For a bug report. No name, path or address of the user is in it but those that a check has to show."""
    return {
        "qpsft": __version__,
        "platform": platform.platform(),
        "can_train": can_train(findings),
        "checks": [vars(finding) for finding in findings],
    }
