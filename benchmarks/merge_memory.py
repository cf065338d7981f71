"""Memory and time of `qpsft merge` on a generated model, beside PEFT's `merge_and_unload` and a plain copy.

    python benchmarks/merge_memory.py --gigabytes 4

Each way runs in a process of its own. "libraries" is what the process holds once everything is imported; a merge
cannot do with less. The base is random, in bfloat16, in shards; both ways write the same number of bytes and bring
them to the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HIDDEN, INTERMEDIATE, VOCABULARY = 2560, 6912, 32000
WAYS = ("copy", "qpsft", "qpsft original", "peft")


def make_base(folder: Path, gigabytes: float) -> int:
    """Writes a random Llama of about `gigabytes`; returns its bytes."""
    from qpsft.merge.safetensors_stream import ShardWriter, TensorSpec, plan_shards, shard_index

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, torch.bfloat16, shape)

    def layer(number: int) -> list[TensorSpec]:
        start = f"model.layers.{number}."
        square = [spec(f"{start}self_attn.{name}_proj.weight", HIDDEN, HIDDEN) for name in "qkvo"]
        wide = [spec(f"{start}mlp.{name}_proj.weight", INTERMEDIATE, HIDDEN) for name in ("gate", "up")]
        norms = [spec(f"{start}{name}_layernorm.weight", HIDDEN) for name in ("input", "post_attention")]
        return [*square, *wide, spec(f"{start}mlp.down_proj.weight", HIDDEN, INTERMEDIATE), *norms]

    ends = [spec("model.embed_tokens.weight", VOCABULARY, HIDDEN), spec("lm_head.weight", VOCABULARY, HIDDEN)]
    each = sum(tensor.nbytes for tensor in layer(0))
    layers = max(1, round((gigabytes * 1e9 - sum(tensor.nbytes for tensor in ends)) / each))
    specs = [
        *ends,
        *(tensor for number in range(layers) for tensor in layer(number)),
        spec("model.norm.weight", HIDDEN),
    ]
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards = plan_shards(specs, 2 * 10**9)
    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for file, tensors in shards.items():
        writer = ShardWriter(folder / file, tensors)
        for tensor in tensors:
            left = tensor.nbytes // 2
            while left:
                left -= writer.write(noise[: min(left, noise.numel())]) // 2
        writer.close()
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(shard_index(shards)))
    return sum(tensor.nbytes for tensor in specs)


def make_adapter(folder: Path, base: Path) -> None:
    """Writes a random rank-16 adapter on every linear layer but the head, trained on NF4 as its record says."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from qpsft.model.base_record import RECORD_FILE, BaseRecord
    from qpsft.model.folder import config_sha256, read_config

    config = read_config(base)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN))
    shapes |= {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    generator, tensors = torch.Generator().manual_seed(1), {}
    for number in range(config["num_hidden_layers"]):
        for name, (out, into) in shapes.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            start = f"base_model.model.model.layers.{number}.{part}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(16, into, generator=generator) * 0.02
            tensors[f"{start}.lora_B.weight"] = torch.randn(out, 16, generator=generator) * 0.005
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(shapes), task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(folder)
    record = BaseRecord(
        qpsft_version="benchmark",
        base_model_name_or_path=str(base),
        revision=None,
        config_sha256=config_sha256(config),
        quantization="nf4",
        double_quant=True,
        block_size=64,
        quant_storage="uint8",
        compute_dtype="bfloat16",
        weights_dtype="bfloat16",
        prequantized=False,
        unquantized_modules=["lm_head"],
    )
    (folder / RECORD_FILE).write_text(json.dumps(dataclasses.asdict(record)))


def run(way: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """One way, in this process: seconds by the clock and of the CPU, resident memory at its peak and before."""
    if way == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (so that libraries are counted)
    elif way != "copy":
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401

        from qpsft.merge import merge_adapter
    libraries, started, cpu = peak_memory(), time.perf_counter(), time.process_time()
    if way == "copy":
        shutil.copytree(base, output)
    elif way == "peft":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
        model.merge_and_unload().save_pretrained(output, max_shard_size="2GB")
    else:
        onto = "original" if "original" in way else "trained"
        merge_adapter(adapter, output, onto=onto, no_verify=True)
    os.sync()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "peak": peak_memory(), "libraries": libraries}


def peak_memory() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory too, from before this program was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the generated base")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="what to run")
    parser.add_argument("--folder", type=Path, help="where to generate it (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, *paths = arguments.child
        print(json.dumps(run(way, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="merge-memory-") as temporary:
        base, adapter = Path(temporary) / "base", Path(temporary) / "adapter"
        size = make_base(base, arguments.gigabytes)
        make_adapter(adapter, base)
        results = {"base_bytes": size, "threads": torch.get_num_threads()}
        for way in arguments.ways:
            output = Path(temporary) / "output"
            child = [sys.executable, __file__, "--child", way, str(base), str(adapter), str(output)]
            done = subprocess.run(child, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
            results[way] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(output)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{size / 1e9:.2f} GB in bfloat16, {results['threads']} threads")
    print(f"{'':<16}{'seconds':>9}{'CPU s':>8}{'peak MB':>10}{'libraries MB':>14}{'rest MB':>9}")
    for way in arguments.ways:
        row = results[way]
        peak, libraries = row["peak"] / 1e6, row["libraries"] / 1e6
        times = f"{row['seconds']:>9.1f}{row['cpu_seconds']:>8.1f}"
        print(f"{way:<16}{times}{peak:>10.0f}{libraries:>14.0f}{peak - libraries:>9.0f}")


if __name__ == "__main__":
    main()
