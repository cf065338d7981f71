"""`qpsft doctor`: its flags, and an exit code that says whether training could work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Look at this machine line by line: Python, torch against the driver, the GPU and its dtype, bitsandbytes' 4-bit "
    "product and its gradient, Triton, attention kernels, torchvision, memory, disk, caches, versions, the Hub and "
    "llama.cpp. Each line is ✓, or ! (it works, with a drawback) or ✗ with the cure. Exit code 1 when training could "
    "not work. A minute at most; nothing is downloaded, nothing is changed."
)


@dataclass
class DoctorOptions:
    """What `qpsft doctor` takes."""

    json: bool = option(False, "print it as JSON, for a bug report")


def doctor(argv: Sequence[str]) -> int:
    """`qpsft doctor`. Returns 1 when training could not work on this machine."""
    options = parse(Parser("qpsft doctor", "[options]", DESCRIPTION), argv, DoctorOptions)
    quiet_libraries()
    from qpsft.doctor.report import examine, render, to_dict

    findings = examine()
    print(json.dumps(to_dict(findings), indent=1, ensure_ascii=False) if options.json else render(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0
