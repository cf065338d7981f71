"""Rows that cannot be used: collected while rows are read and tokenized, then reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.errors import DataError

SHOWN = 5
"""Bad rows that a message names one by one."""


class RowError(DataError):
    """One row cannot be used; the others may be."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        number: its line or row number in the source, from 1.
        error: why; its text begins with the row's place, such as "data.jsonl, line 57".
    """

    number: int
    error: RowError


def refuse(bad: Sequence[BadRow], name: str, total: int) -> None:
    """Raises one error for all of `bad`; does nothing if there is none.

    Args:
        bad: in any order.
        name: the file or dataset, as the user wrote it.
        total: rows of the source, bad ones included.

    Raises:
        DataError: the row's own error if there is one bad row only, else one that names the first five and the total.
    """
    if not bad:
        return
    if len(bad) == 1:
        raise bad[0].error from None
    todos = {row.error.todo for row in bad}
    todo = todos.pop() if len(todos) == 1 else "Mend or delete them."
    raise DataError(
        "\n".join([f"{name}: {len(bad):,} of {total:,} rows cannot be used{_counted(bad)}:", *first_lines(bad, name)]),
        f"\n{todo} --skip_bad_rows leaves them out and counts them.",  # on a line of its own
    ) from None


def first_lines(bad: Sequence[BadRow], name: str) -> list[str]:
    """One indented line for each of the first five bad rows, in the source's order."""
    first = sorted(bad, key=lambda row: row.number)[:SHOWN]
    return [f"  {row.error.what.removeprefix(f'{name}, ')}" for row in first]


def _counted(bad: Sequence[BadRow]) -> str:
    return f". The first {SHOWN}" if len(bad) > SHOWN else ""
