"""What rounding a trained model once more leaves of its training: NF4 again, and GGUF's types of few bits.

    python benchmarks/requantized.py ADAPTER          # an adapter that qpsft trained: its held-out rows are measured on

Each export measures itself (`qpsft/export/kept.py`): the KL divergence from the trained model, and what a token of the
held-out answers costs, beside the base's own. Writes `results/requantized.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from machine import RESULTS, environment

from qpsft.export.command import write_export
from qpsft.export.options import ExportOptions
from qpsft.terminal import quiet_libraries

FORMATS = ("nf4", "q8_0", "q4_k_m")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", help="where its base is now")
    parser.add_argument("--formats", default=",".join(FORMATS), help="nf4 and types of GGUF")
    parser.add_argument("--result", type=Path, default=RESULTS / "requantized.json")
    options = parser.parse_args(argv)
    quiet_libraries()
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats.split(","):
            to, outtype = ("nf4", None) if name == "nf4" else ("gguf", name)
            output = Path(folder) / name
            report = write_export(
                ExportOptions(source=options.adapter, to=to, outtype=outtype, output=output, base=options.base)
            )
            print(f"{name}: {report.kept.summary()}", flush=True)
            measured[name] = {"share": report.kept.share, "bytes": report.bytes, **dataclasses.asdict(report.kept)}
            record = {"environment": environment("cpu"), "adapter": str(options.adapter), "kept": measured}
            options.result.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
