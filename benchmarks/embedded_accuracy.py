"""How often the embedded base is right, measured the way it is used: in NF4, greedy, on every set of its world.

python benchmarks/embedded_accuracy.py --rows 512
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qpsft.data import built_in
from qpsft.model.folder import MODEL_DIR


def load_nf4(folder: Path) -> Any:
    """The model of `folder` in NF4 (double quantization, block size 64, all linear layers but lm_head) on the CPU."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Else the first forward repacks the weight in place and computes in bfloat16: other numbers.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_dense(folder: Path) -> Any:
    """The model of `folder` as shipped, in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluation_sets(split: str, n: int, seed: int = 0) -> dict[str, list[dict]]:
    """The sets the base is judged on, `n` rows each.

    `one_to_three`: chains as long as in pretraining; `four`: the in-domain problems with any style accepted;
    `in_domain`; and the out-of-domain sets.
    """
    in_domain = built_in.in_domain(split, n, seed)
    return {
        "one_to_three": built_in.short_chains(split, n, seed),
        "four": [{**row, "task": {**row["task"], "style": None}} for row in in_domain],
        "in_domain": in_domain,
        **built_in.out_of_domain(split, n, seed),
    }


def generate(model: Any, tokenizer: Any, rows: list[dict], batch_size: int = 256, max_new_tokens: int = 56) -> list:
    """Greedy completions of `rows`, one text a row."""
    import torch

    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = tokenizer.apply_chat_template(
            [row["prompt"] for row in rows[start : start + batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracies(model: Any, tokenizer: Any, sets: dict[str, list[dict]]) -> dict[str, float]:
    """Share of right completions by set."""
    shares = {}
    for name, rows in sets.items():
        texts = generate(model, tokenizer, rows)
        shares[name] = sum(map(built_in.check, rows, texts)) / len(rows)
    return shares


def out_of_domain_mean(shares: dict[str, float]) -> float:
    """Mean over the out-of-domain sets."""
    return sum(shares[name] for name in built_in.OUT_OF_DOMAIN) / len(built_in.OUT_OF_DOMAIN)


def print_table(folder: Path, split: str, rows: int) -> dict[str, float]:
    """Print accuracies in NF4 and unquantized, as a Markdown table; returns those in NF4."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets = evaluation_sets(split, rows)
    nf4 = accuracies(load_nf4(folder), tokenizer, sets)
    dense = accuracies(load_dense(folder), tokenizer, sets)
    for shares in (nf4, dense):
        shares["out of domain, mean"] = out_of_domain_mean(shares)
    print(f"| {split}, {rows} rows each, greedy | NF4 | unquantized |\n| --- | --- | --- |")
    for name in nf4:
        print(f"| {name} | {nf4[name]:.3f} | {dense[name]:.3f} |", flush=True)
    return nf4


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL_DIR, help="of the model (default: the package's)")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="validation")
    parser.add_argument("--rows", type=int, default=512, help="rows a set (default: %(default)s)")
    arguments = parser.parse_args()
    print_table(arguments.folder, arguments.split, arguments.rows)


if __name__ == "__main__":
    main()
