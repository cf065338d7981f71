"""`qpsft verify`: its flags, and an exit code that is the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries
from qpsft.verify.options import VerifyOptions

DESCRIPTION = (
    "Compare an exported model with the live 4-bit model and its adapter: weights, log-probabilities on real prompts, "
    "greedy answers, chat template and stop tokens. Exit code 1 when it is another model."
)


def verify(argv: Sequence[str]) -> int:
    """`qpsft verify`. Returns 1 when the exported model is another one."""
    options = parse(Parser("qpsft verify", "ADAPTER EXPORTED [options]", DESCRIPTION), argv, VerifyOptions)
    quiet_libraries()
    from qpsft.verify.verification import verify_with

    report = verify_with(options)
    print(report.summary())
    return 0 if report.same_model else 1
