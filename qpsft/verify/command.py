"""`qpsft verify`: its flags, and an exit code that is the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.arguments import QUANTIZED_ON, QuantizedOn
from qpsft.recipe.flags import Parser, option, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Compare an exported model with the live 4-bit model and its adapter: weights, log-probabilities on real prompts, "
    "greedy answers, chat template and stop tokens. Exit code 1 when it is another model."
)


@dataclass
class VerifyOptions:
    """What `qpsft verify` takes."""

    adapter: str = option(help="folder that qpsft train wrote")
    exported: str = option(help="folder of the merged model")
    base: str | None = option(
        None, "the base's folder or Hub id, if it is no longer where the adapter says", metavar="MODEL"
    )
    prompts: str | None = option(None, "prompts to compare on (default: the adapter's held-out rows)", metavar="FILE")
    quantized_on: QuantizedOn | None = option(None, QUANTIZED_ON)


def verify(argv: Sequence[str]) -> int:
    """`qpsft verify`. Returns 1 when the exported model is another one."""
    options = parse(Parser("qpsft verify", "ADAPTER EXPORTED [options]", DESCRIPTION), argv, VerifyOptions)
    quiet_libraries()
    from qpsft.model.base_record import state_quantized_on
    from qpsft.verify.verification import verify_export

    state_quantized_on(options.adapter, options.quantized_on)
    report = verify_export(options.adapter, options.exported, base=options.base, prompts=options.prompts)
    print(report.summary())
    return 0 if report.same_model else 1
