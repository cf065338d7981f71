"""Hostile inputs made from a seed, and what the command line makes of each: an exit code, or a traceback.

python tests/attack/fuzz.py 10000         # counts per group, as docs/reliability.md has them
python tests/attack/fuzz.py 0 data:731    # one input again, with its traceback
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qpsft import cli  # noqa: E402
from qpsft.model.folder import MODEL_DIR  # noqa: E402

ADAPTER = ROOT / "adapters" / "demo-psft"
SECONDS = 120
"""An input that takes longer counts as one that hangs."""

# ---- values that nobody expects ----

BIG, DEEP, NAN, HUGE = "@big@", "@deep@", "@nan@", "@huge@"
AS_JSON = {f'"{BIG}"': "9" * 5000, f'"{DEEP}"': "[" * 20000 + "]" * 20000, f'"{NAN}"': "NaN", f'"{HUGE}"': "1e999"}
"""What stands in a JSON text in place of these; json.dumps cannot write it."""


def strange(rng: random.Random) -> Any:
    """A JSON value."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**300, 0.5, -0.0, 1e308, 1e-308, BIG, DEEP,
            NAN, HUGE, "", " ", "\n", "\0", "a\0b", "\ud800", "\U0010ffff", "é" * 3, "x" * 5000, "/", ".", "..",
            "../x", "../../../etc/passwd", "~", "C:\\x", "{{ 1 / 0 }}", "%s", "{prompt}", "{", "</s>", "<s>", "1e5",
            "true", "null", "none", "nan", [], {}, [[]], [None], [1, "a"], [[1, 2], [3]], {"a": None}, {"": ""},
            {"a": {"b": [{}]}}, ["x"] * 40, {str(n): n for n in range(40)}, "http://x/y", "hf://x", "a/b/c/d",
            "x" * 300 + "/y", {"role": "user", "content": "hi"}, [{"role": "assistant", "content": None}],
            {"type": "text", "text": 3}, {"__type__": "AddedToken", "content": 5}, "cuda", "float8", "int8", "mamba",
            "llama", "bfloat16",
        ]
    )  # fmt: skip


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(item)


def changed(value: Any, rng: random.Random, times: int) -> Any:
    """A copy in which values are replaced, taken out, put in, renamed or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        there = list(places_in(value))
        if not there:
            return strange(rng)
        container, key = rng.choice(there)
        kind = rng.random()
        if kind < 0.6:
            container[key] = strange(rng)
        elif kind < 0.7:
            container.pop(key)
        elif kind < 0.8:
            container[key] = rng.choice([[container[key]], {"value": container[key]}, str(container[key])])
        elif kind < 0.9 and isinstance(container, dict):
            container[
                rng.choice(
                    [
                        "",
                        "x",
                        "name",
                        "role",
                        "type",
                        "content",
                        "tools",
                        "\0",
                        "é",
                        "a" * 300,
                    ]
                )
            ] = strange(rng)
        else:
            other, name = rng.choice(there)
            with contextlib.suppress(LookupError):
                container[key] = json.loads(json.dumps(other[name]))
    return strange(rng) if rng.random() < 0.02 else value


def as_json(value: Any) -> str:
    text = json.dumps(value)
    for name, written in AS_JSON.items():
        text = text.replace(name, written)
    return text


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes cut, flipped, put in, doubled; or another encoding."""
    kind = rng.randrange(8)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind == 2:
        return bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.01 else byte for byte in content)
    if kind == 3:
        return (
            content[:at]
            + rng.choice(
                [
                    b"\0",
                    b"\xff\xfe",
                    b"\xed\xa0\x80",
                    b"\xef\xbb\xbf",
                    b"\r",
                    b"\x1a",
                    b'"',
                    b"}",
                    b"[",
                    b"\t",
                ]
            )
            + content[at:]
        )
    if kind == 4:
        other = rng.choice(["utf-16", "utf-32", "latin-1", "cp1252"])
        return content.decode("utf-8", "replace").encode(other, "replace")
    if kind == 5:
        return content * 2
    if kind == 6:
        return rng.choice(
            [
                b"",
                b"\0" * 64,
                b"\n",
                b"null",
                b"[]",
                b"{}",
                b"3",
                b'"x"',
                b"[" * 100_000,
                rng.randbytes(200),
            ]
        )
    return content[:at] + content[rng.randrange(len(content) + 1) :]


# ---- recipes and flags ----

YAML_VALUES = [
    "2026-11-23", "2026-11-23 10:00:00", "2026-11-23T10:00:00Z", "9999-99-99", "!!timestamp 2001-01-01", "12:30:45",
    "0x1F", "0o17", "1_000", ".inf", "-.inf", ".nan", "1e308", "-1e308", "1e-308", "1e999", "9" * 5000,
    "-" + "9" * 5000, "0." + "9" * 5000, "[" * 3000, "[" * 300 + "]" * 300, "{a: " * 300 + "1" + "}" * 300,
    "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!float nan", "!!int 'x'", "!!bool 3",
    "!!null ''", "!!str 3", "!!python/object/apply:os.system [ls]", "!x y", "~", "''", '"\\0"', '"a\\0b"',
    '"\\ud800"', '"\\U0010FFFF"', "&a [*a]", "&a {b: *a}", "*a", "<<", "{1: 2}", "{a: 1, a: 2}", "{[1]: 2}",
    "{2026-11-23: 1}", "{~: 1}", "? [a]", "- a", "a: b", "%x", "@x", "`x`", "|", ">", "|\n  text", "'x", '"x',
    "x" * 5000, "/" + "x" * 300, "y/" * 3000, "x" * 256 + ".jsonl", "true", "yes", "off", "0", "-1", "1", "-0", "0.0",
    "1.5", "2147483648", "9223372036854775808", "null", "None", "[]", "{}", "[~]", "[1, a, 2.5]", "[2026-11-23]",
    "[{}]", "[[1]]", "{data: x}", "{data: [], every: x}", "{data: rows.jsonl, every: 0.5}", "demo", "demo-noisy",
    "rows.jsonl", ".", "..", "~", "/", "/dev/null", "/dev/zero/x", "/proc/self/mem", "recipe.yaml", "rows.jsonl/x",
    "https://x.y/z", "org/name", "a//b", "\\\\x\\y", "{prompt}", "{prompt} {x}", "{{prompt}}",
    f"[&a0 [x, x], {', '.join(f'&a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 24))}]",
]  # fmt: skip
BASIC = {"model_name_or_path": "demo", "dataset_name": "rows.jsonl", "max_length": "64", "dataset_limit": "3"}
ROWS = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}", "note": "x"} for n in range(4)]


def option_names() -> list[str]:
    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments
    from qpsft.recipe.flags import option_types

    own = [*option_types([ModelArguments, LoraArguments, DataArguments, RunArguments])] * 4
    nested = ["guard", "dataset_mix", "dataset_columns", "extends", "replay_dataset"] * 4
    return [*own, *option_types([PSFTConfig]), *nested]


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def hostile_options(rng: random.Random) -> dict[str, str]:
    names = option_names()
    chosen = {rng.choice(names): rng.choice(YAML_VALUES) for _ in range(rng.choice([1, 1, 1, 2, 4]))}
    if rng.random() < 0.05:
        chosen[rng.choice(["", "x", "Seed", "\u2028", "a b", "x" * 3000, "1", "~", "2026-11-23", "[a]"])] = "1"
    return BASIC | chosen


def as_yaml(options: dict[str, Any]) -> bytes:
    return "".join(f"{name}: {value}\n" for name, value in options.items()).encode("utf-8", "surrogatepass")


def recipe(rng: random.Random, folder: Path) -> list[str]:
    """A recipe with values of other types, other YAML and damaged bytes."""
    rows_file(folder)
    path = folder / "recipe.yaml"
    content = as_yaml(hostile_options(rng))
    path.write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
    given = rng.choice([path, path, path, folder, str(path)[:-1], "x" * 300 + ".yaml", f"{path}/x"])
    return [rng.choice(["preview"] * 4 + ["plan"]), str(given)]


def flags(rng: random.Random, folder: Path) -> list[str]:
    """The same values as flags."""
    rows = rows_file(folder)
    options = hostile_options(rng)
    options = {name: str(rows) if value == "rows.jsonl" else value for name, value in options.items()}
    words = [f"--{name}={value}" if rng.random() < 0.8 else f"--{name} {value}" for name, value in options.items()]
    if rng.random() < 0.1:
        words.insert(
            rng.randrange(len(words)),
            rng.choice(
                [
                    "--",
                    "-",
                    "---x",
                    "x",
                    "=",
                    "--=",
                    "-x=1",
                    "\ud800",
                    "--é=1",
                ]
            ),
        )
    return [rng.choice(["preview"] * 4 + ["plan"]), *words]


# ---- rows ----

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"properties": {"x": {"items": {"type": "object", "properties": {"y": {"type": "string"}}}}}},
    },
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAPES = [
    {"prompt": "1+1=", "completion": "2"}, {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
    {"messages": [{"role": "system", "content": "s"}, *CHAT, *CHAT]},
    {"messages": [CHAT[0], CALLING, {"role": "tool", "content": "1", "tool_call_id": "c1"}, CHAT[1]], "tools": [TOOL]},
    {"messages": [CHAT[0], {"role": "assistant", "content": "a", "reasoning_content": "r", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]}, {"text": "once upon a time"},
    {"prompt": "p", "completion": "c", "tools": [TOOL], "system": "s"},
]  # fmt: skip
TIMES = [2**62, -(2**62), 253402300800000000, 0, 1, -1]


def data(rng: random.Random, folder: Path) -> list[str]:
    """Rows of every shape and file format, with values of other types and damaged bytes."""
    shape = rng.choice(SHAPES)
    rows = [shape] * rng.choice([1, 3, 6])
    rows = [changed(row, rng, rng.choice([0, 1, 1, 2, 4])) if rng.random() < 0.6 else row for row in rows]
    kind = rng.choice(["jsonl", "jsonl", "json", "csv", "parquet", "parquet"])
    path = folder / f"rows.{kind}"
    text = "" if kind == "parquet" else _text(rows, kind, rng)
    path.write_bytes(_parquet(rows, rng) if kind == "parquet" else text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.35:
        path.write_bytes(damaged(path.read_bytes(), rng))
    if kind != "parquet" and rng.random() < 0.1:
        packed = gzip.compress(path.read_bytes())
        path = folder / f"rows.{kind}.gz"
        path.write_bytes(damaged(packed, rng) if rng.random() < 0.5 else packed)
    words = [f"--dataset_name={path}", "--model_name_or_path=demo", "--max_length=64"]
    words += rng.choice([
        [], [], ["--skip_bad_rows"], ["--split_turns"], ["--use_chat_template=never"], ["--refuse_special_tokens"],
        ["--dataset_limit=2"], ["--streaming", "--max_steps=1"], ["--dataset_columns={prompt: note}"],
        ["--supervise_prompt"], ["--dataset_shape=messages"], ["--replay_share=0.2", f"--replay_dataset={path}"],
        ["--replay_share=0.2", f"--replay_prompts={path}"],
    ])  # fmt: skip
    return ["preview", *words]


def _text(rows: list, kind: str, rng: random.Random) -> str:
    if kind == "json":
        return as_json(rng.choice([rows, {"data": rows}, rows[0], {"data": rows[0]}]))
    if kind == "jsonl":
        return "".join(as_json(row) + rng.choice(["\n", "\n", "\r\n", "\n\n"]) for row in rows)
    import csv

    lines = io.StringIO()
    writer = csv.writer(lines)
    rows = [row for row in rows if isinstance(row, dict)] or [{"prompt": "p", "completion": "c"}]
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([as_json(value) if not isinstance(value, str) else value for value in row.values()])
    return lines.getvalue()


def _parquet(rows: list, rng: random.Random) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [row for row in rows if isinstance(row, dict)] or [{"prompt": "p", "completion": "c"}]
    columns = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except Exception:  # values of several types, which Arrow has no column for
            columns[name] = pyarrow.array([json.dumps(value) for value in values])
    count = len(rows)
    times, zone = rng.choices(TIMES, k=count), rng.choice([None, "UTC", "Mars/Base"])
    odd = [
        lambda: pyarrow.array(times, pyarrow.timestamp(rng.choice(["s", "ms", "us", "ns"]), zone)),
        lambda: pyarrow.array(times, pyarrow.date64()),
        lambda: pyarrow.array([rng.choice([2**30, -(2**30), 0]) for _ in range(count)], pyarrow.date32()),
        lambda: pyarrow.array(times, pyarrow.duration("s")),
        lambda: pyarrow.array([datetime.time(1, 2)] * count),
        lambda: pyarrow.array([decimal.Decimal("9" * 30)] * count), lambda: pyarrow.array([b"\xff\xfe"] * count),
        lambda: pyarrow.array([float("nan")] * count, pyarrow.float16()),
        lambda: pyarrow.array([[("a", 1), ("a", 2)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        lambda: pyarrow.array(["p"] * count).dictionary_encode(), lambda: pyarrow.nulls(count),
        lambda: pyarrow.array([{}] * count, pyarrow.struct([])), lambda: pyarrow.array([[[["x"]]]] * count),
        lambda: pyarrow.array([2**64 - 1] * count, pyarrow.uint64()),
    ]  # fmt: skip
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice([*columns, "extra", "prompt", "completion", "messages", "text"])
        with contextlib.suppress(pyarrow.ArrowException, OverflowError, ValueError):
            columns[name] = rng.choice(odd)()
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    except pyarrow.ArrowException:  # a type that Parquet cannot store
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "completion": ["c"]}), sink)
    return sink.getvalue()


# ---- folders of bases and adapters ----


def linked(source: Path, folder: Path) -> Path:
    """A copy of a folder of which single files can be replaced."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


def put(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def spoil(path: Path, rng: random.Random) -> None:
    """Other values or other bytes in a JSON file."""
    content = path.read_bytes()
    if rng.random() < 0.75:
        put(path, as_json(changed(json.loads(content), rng, rng.choice([1, 1, 2, 5]))))
    else:
        put(path, damaged(content, rng))


CONFIG_KEYS = [
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "quantization_config", "auto_map", "text_config",
    "architectures", "torch_dtype", "dtype", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings",
    "max_position_embeddings", "hidden_act", "attn_implementation", "layer_types", "intermediate_size",
    "rms_norm_eps", "initializer_range", "attention_bias", "sliding_window", "num_local_experts",
    "transformers_version",
]  # fmt: skip
HUGE_NUMBERS = [10**9, 2**31, 2**62, 10**30, 1e300]


def base(rng: random.Random, folder: Path) -> list[str]:
    """A base model whose config, tokenizer, generation settings, index or weights are not what they should be."""
    rows = rows_file(folder)
    model = linked(MODEL_DIR, folder / "model")
    kind = rng.choice(
        [
            "config",
            "config",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "index",
            "weights",
            "other",
        ]
    )
    if kind == "config":
        if rng.random() < 0.5:
            config = json.loads((model / "config.json").read_text())
            config[rng.choice(CONFIG_KEYS)] = strange(rng) if rng.random() < 0.7 else rng.choice(HUGE_NUMBERS)
            put(model / "config.json", as_json(config))
        else:
            spoil(model / "config.json", rng)
    elif kind == "index":
        _sharded(model, rng)
    elif kind == "weights":
        put(model / "model.safetensors", _weights((model / "model.safetensors").read_bytes(), rng))
    elif kind == "other":
        name = rng.choice(
            [
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
                "tokenizer.model",
                "adapter_config.json",
                "chat_template.json",
            ]
        )
        put(model / name, rng.choice([as_json(strange(rng)), damaged(b'{"a": "b"}', rng)]))
        if rng.random() < 0.3:
            (model / "tokenizer.json").unlink()
    else:
        spoil(model / kind, rng)
    if rng.random() < 0.1:
        victim = rng.choice(list(model.iterdir()))
        victim.unlink()
        if rng.random() < 0.5:
            victim.mkdir()
    words = [f"--model_name_or_path={model}", f"--dataset_name={rows}", "--max_length=32"]
    loading = [
        ["evaluate", str(model), "--data", str(rows), "--limit", "1", "--max_new_tokens", "1", "--k", "0"],
        ["merge", str(ADAPTER), "--base", str(model), "-o", str(folder / "merged")],
        ["train", *words, f"--output_dir={folder / 'out'}", "--max_steps=1", "--quantization=none"],
    ]
    cheap = [["preview", *words], ["plan", *words]]
    needs_weights = kind in ("index", "weights", "generation_config.json")
    return rng.choice(loading if needs_weights else [*cheap * 3, *loading])


def _sharded(model: Path, rng: random.Random) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    names = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names.pop("__metadata__", None)
    shard = "model-00001-of-00001.safetensors"
    put(model / shard, content)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    if rng.random() < 0.6:
        name = rng.choice(list(names))
        index["weight_map"][name] = rng.choice(
            [
                "../x.safetensors",
                f"../model/{shard}",
                "/etc/passwd",
                "/dev/zero",
                "",
                ".",
                None,
                3,
                [shard],
                {},
                "\0",
                "x" * 300,
                "..",
                "config.json",
                "a/b",
            ]
        )
    else:
        index = changed(index, rng, rng.choice([1, 3]))
    text = as_json(index)
    put(model / "model.safetensors.index.json", damaged(text.encode(), rng) if rng.random() < 0.2 else text)


def _weights(content: bytes, rng: random.Random) -> bytes:
    """Another header, or other bytes."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        return damaged(content[: 8 + length], rng) + content[8 + length :]
    header = changed(json.loads(content[8 : 8 + length]), rng, rng.choice([1, 2]))
    header = as_json(header).encode("utf-8", "surrogatepass")
    size = rng.choice([len(header)] * 4 + [0, 2**63, len(header) + 5])
    return size.to_bytes(8, "little") + header + content[8 + length :]


ADAPTER_FILES = [
    *["adapter_config.json", "base_quantization.json"] * 3, "adapter_model.safetensors", "recipe.yaml",
    "recipe.resolved.yaml", "verify_prompts.jsonl", "tokenizer_config.json", "metrics.jsonl",
]  # fmt: skip


def adapter(rng: random.Random, folder: Path) -> list[str]:
    """An adapter's folder: its config, the record of its base, its weights, its recipe, its prompts, its log."""
    mine = linked(ADAPTER, folder / "adapter")
    kind = rng.choice(ADAPTER_FILES)
    path = mine / kind
    if kind.endswith(".json"):
        spoil(path, rng)
    elif kind == "adapter_model.safetensors":
        put(path, _weights(path.read_bytes(), rng))
    elif kind.endswith(".jsonl"):
        lines = path.read_text().splitlines()
        other = rng.choice([strange(rng), changed(json.loads(lines[0]), rng, 2)])
        lines[rng.randrange(len(lines))] = as_json(other)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        put(path, damaged(content, rng) if rng.random() < 0.4 else content)
    else:
        values = yaml.safe_load(path.read_text())
        name = rng.choice(["prompt_format", "use_chat_template", "chat_date", "loss_type", "x"])
        content = as_yaml({**values, name: rng.choice(YAML_VALUES)})
        put(path, damaged(content, rng) if rng.random() < 0.4 else content)
    if rng.random() < 0.05:
        put(mine / "README.md", damaged(b"---\nbase_model: x\n---\n# x", rng))
    rows = rows_file(folder)
    out = str(folder / "out")
    short = ["--model_name_or_path=demo", f"--dataset_name={rows}", "--max_length=32", "--max_steps=1"]
    verbs = [
        ["merge", str(mine), "-o", out], ["merge", str(mine), "-o", out, "--onto", "original"],
        ["push", str(mine), "owner/name", "--dry_run"], ["export", str(mine), "--to", "vllm", "-o", out],
        ["chat", str(mine)],
        ["evaluate", str(mine), "--data", str(rows), "--limit", "1", "--max_new_tokens", "1", "--k", "0"],
        ["train", f"--adapter_name_or_path={mine}", *short, f"--output_dir={out}"],
    ]  # fmt: skip
    if kind == "metrics.jsonl":
        (mine / "adapter_model.safetensors").unlink()
        return ["train", *short, f"--output_dir={mine}", rng.choice(["--resume", "--overwrite", "--seed=1"])]
    if kind == "verify_prompts.jsonl":
        return ["merge", str(mine), "-o", out]
    if kind.startswith("recipe"):
        return rng.choice([verbs[2], verbs[4], verbs[5]])
    return rng.choice(verbs)


# ---- chat templates ----

LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{{ a }}" + "{% endfor %}" * 3
GOOD = (MODEL_DIR / "chat_template.jinja").read_text()
PIECES = [
    "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", LOOP, "{% if messages|length > 1 %}" + LOOP + "{% endif %}",
    "{{ 10 ** 10 ** 10 }}", "{{ 9 ** 9 ** 9 }}", "{{ 'x' * 10 ** 11 }}", "{{ [1] * 10 ** 11 }}", "{{ 2 ** 100000 }}",
    "{{ '%999999999999d' % 1 }}", "{{ '{:>99999999999}'.format(1) }}", "{{ messages[99].content }}",
    "{{ messages.x.y }}", "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no') }}",
    "{{ raise_exception(1) }}", "{{ x.y.z }}", "{% for m in messages %}{{ m }}{% endfor %}", "{{ messages|tojson }}",
    "{{ tools|tojson }}", "{{ strftime_now('%d %b %Y') }}", "{{ strftime_now(3) }}", "{{ strftime_now('%') }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% include 'x' %}", "{% import 'x' as y %}",
    "{% extends 'x' %}", "{% generation %}", "{% generation %}x{% endgeneration %}", "{% endfor %}", "{{", "{%", "{#",
    "{{ }}", "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{{ lipsum() }}",
    "{{ dict(a=1)|dictsort }}", "\0", "\ud800", "{{ '\\ud800' }}", "{{ bos_token * 3 }}", "{{ eos_token }}",
    "{{ messages|groupby('role') }}", "{{ messages|map('x')|list }}", "{{ messages[0].content|int|abs }}",
    "{{ [3, 'a']|sort }}", "{{ none + 1 }}", "{{ 'a' < 1 }}", "{% break %}", "{{ range(10**10)|list }}",
]  # fmt: skip


def template(rng: random.Random, folder: Path) -> list[str]:
    """A chat template that fails, loops, grows, or writes something else."""
    rows = folder / "rows.jsonl"
    rows.write_text(as_json(changed(rng.choice(SHAPES[1:5]), rng, rng.choice([0, 0, 1]))) + "\n")
    model = linked(MODEL_DIR, folder / "model")
    piece = rng.choice(PIECES)
    at = rng.choice([0, len(GOOD), rng.randrange(len(GOOD))])
    several = "".join(rng.choices(PIECES, k=3))
    text = rng.choice([piece, piece + GOOD, GOOD + piece, GOOD[:at] + piece + GOOD[at:], several])
    content = text.encode("utf-8", "surrogatepass")
    put(model / "chat_template.jinja", damaged(content, rng) if rng.random() < 0.15 else content)
    return ["preview", f"--model_name_or_path={model}", f"--dataset_name={rows}", "--max_length=64"]


# ---- what becomes of them ----

GROUPS: dict[str, Callable[[random.Random, Path], list[str]]] = {
    "recipe": recipe, "flags": flags, "data": data, "base": base, "adapter": adapter, "template": template,
}  # fmt: skip


class HangsError(BaseException):
    """No Exception, which code under attack may catch."""


def hangs(*_: Any) -> None:
    raise HangsError


def outcome(argv: list[str]) -> str:
    """ "" if the command ended as it should: without a traceback, in time, and with a reason where it refused."""
    said, own = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(argv)
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.stdin = own
    if code not in (0, 1, 2) or (code == 2 and "error:" not in said.getvalue()) or "Traceback" in said.getvalue():
        return f"exit code {code}: {said.getvalue()}"
    return ""


def attack(group: str, number: int, folder: Path) -> tuple[str, list[str]]:
    """What is wrong with the outcome of one input ("" for nothing), and its command line."""
    own = folder / f"{group}-{number}"
    own.mkdir()
    argv = GROUPS[group](random.Random(f"{group} {number}"), own)
    before = set(own.rglob("*"))
    try:
        wrong = outcome(argv)
        new = set(own.rglob("*")) - before
        if not wrong and new and argv[0] in ("preview", "plan", "push", "chat", "evaluate"):
            wrong = f"it left {new}"
        return wrong, argv
    finally:
        shutil.rmtree(own, ignore_errors=True)


SHARES = {"recipe": 0.25, "flags": 0.2, "data": 0.3, "base": 0.1, "adapter": 0.1, "template": 0.05}


def inputs(count: int) -> Iterator[tuple[str, int]]:
    """Group and number of `count` inputs, the groups in their shares."""
    for group, share in SHARES.items():
        yield from ((group, number) for number in range(round(count * share)))


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = [(group, int(number)) for group, _, number in (word.partition(":") for word in sys.argv[2:])]
    tried, failed, seen = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0), set()
    with tempfile.TemporaryDirectory() as folder:
        for group, number in chosen or inputs(int(sys.argv[1])):
            started = time.monotonic()
            wrong, argv = attack(group, number, Path(folder))
            tried[group] += 1
            failed[group] += bool(wrong)
            kind = "\n".join(wrong.splitlines()[-5:])[:600]
            if wrong and (kind not in seen or chosen):
                seen.add(kind)
                took = f"{time.monotonic() - started:.0f} s"
                print(
                    f"--- {group}:{number} ({took}) {' '.join(argv)[:300]!r}\n{wrong if chosen else kind}", flush=True
                )
    for group, count in tried.items():
        print(f"| {group} | {count} | {count - failed[group]} |")


if __name__ == "__main__":
    main()
