"""Secrets among options and in files: tokens, passwords and keys, which must never be written down or uploaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_NAME = re.compile(
    r"(?:^|[_-])(?:token|secret|password|passwd|passphrase|credentials?|(?:api|access|secret|private)[_-]?key)$",
    re.IGNORECASE,
)
_NO_SECRETS = {f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
_VALUE = re.compile(
    r"""\bhf_[A-Za-z0-9]{16,} | \bsk-[\w-]{16,} | \bgh[opsur]_\w{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \bA(?:KI|SI)A[0-9A-Z]{16}\b | \bxox[abeoprs]-[\w-]{10,} | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | ://[^/\s:@]*:[^/\s@]+@ | [?&](?:[\w-]*token|sig|[\w-]*signature|api_?key|password)=[^&\s]+""",
    re.VERBOSE | re.IGNORECASE,
)


def holds_secret(name: str, value: Any) -> bool:
    """Whether an option's value is, or holds, a secret: by the option's name, or by how secrets look."""
    if isinstance(value, Mapping):
        return any(holds_secret(str(key), item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds_secret(name, item) for item in value)
    if not isinstance(value, str) or not value:
        return False
    return bool(_NAME.search(name) and name not in _NO_SECRETS) or bool(_VALUE.search(value))


def line_with_secret(text: str) -> int | None:
    """The first line, counted from 1, that holds what looks like a secret; None without."""
    found = _VALUE.search(text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


@contextmanager
def taken_out(options: Any) -> Iterator[None]:
    """Secrets of a dataclass of options are None inside: it can be saved."""
    names = [field.name for field in dataclasses.fields(options)]
    secrets = {name: getattr(options, name, None) for name in names}
    secrets = {name: value for name, value in secrets.items() if holds_secret(name, value)}
    try:
        for name in secrets:
            setattr(options, name, None)
        yield
    finally:
        for name, value in secrets.items():
            setattr(options, name, value)
