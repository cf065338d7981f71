"""`qpsft evaluate`: its flags."""

from __future__ import annotations

from collections.abc import Sequence

from qpsft.evaluate.options import EvaluationOptions
from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Measure an adapter on its 4-bit base, or a model: likelihood of references, accuracy and pass@k of completions, "
    "entropy, and drift from the base; and public benchmarks by lm-evaluation-harness. Prints a table with 95 % "
    "intervals; docs/metrics.md defines every number."
)


def evaluate(argv: Sequence[str]) -> int:
    """`qpsft evaluate`."""
    options = parse(Parser("qpsft evaluate", "MODEL [options]", DESCRIPTION), argv, EvaluationOptions)
    quiet_libraries()
    from qpsft.evaluate.run import run_evaluation
    from qpsft.model.base_record import state_quantized_on

    state_quantized_on(options.model, options.quantized_on)
    report = run_evaluation(options)
    print(f"\n{report.table()}")
    if options.json is not None:
        print(f"\nwritten: {options.json}")
    return 0
