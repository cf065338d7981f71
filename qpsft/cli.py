"""The command line: one verb a function, imports inside, so that help is instant."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence

from qpsft import __version__
from qpsft.errors import QpsftError
from qpsft.processes import is_main, let_memory_segments_grow, say_once, world_size
from qpsft.terminal import fill, quiet_libraries, terminal_width

INTERRUPTED = 130  # what shells use for Ctrl-C
AFTER_INTERRUPT = {
    "train": "The run continues from its last checkpoint with --resume.",
    "compare": "Finished runs are kept: the same command goes on from here.",
}


def train(argv: Sequence[str]) -> int:
    """train an adapter as a recipe says"""
    recipe = _recipe(
        "train",
        argv,
        "Train an adapter on your demonstrations: PSFT by default, plain SFT (nll) or DFT as baselines.",
        "qpsft train adapters/mine/recipe.yaml --max_steps 50 --output_dir runs/a",
    )
    if recipe is None:
        return 0
    quiet_libraries()
    from qpsft.train import run

    summary = run.train(recipe)
    if is_main():
        print(f"\n{summary}\n\n{summary.next_commands(recipe)}")
    return 0


def preview(argv: Sequence[str]) -> int:
    """show the rows as the model will see them"""
    recipe = _recipe(
        "preview",
        argv,
        "Print rows as the model will see them, supervised tokens coloured, and what became of all rows.",
        "qpsft preview adapters/mine/recipe.yaml --dataset_limit 100",
    )
    if recipe is None:
        return 0
    quiet_libraries()
    from qpsft.data.preview import render_preview
    from qpsft.data.tokenize import load_dataset
    from qpsft.errors import RecipeError
    from qpsft.model.continue_adapter import recipe_tokenizer, warn_past_context

    if not recipe.model.model_name_or_path:
        raise RecipeError("model_name_or_path is missing.", "The tokenizer comes with the model: name it.")
    tokenizer = recipe_tokenizer(recipe)
    rows = load_dataset(recipe.data, tokenizer, recipe.trainer.max_length)
    print(render_preview(rows, tokenizer), end="")
    warn_past_context(recipe, rows.counts.longest)
    return 0


def plan(argv: Sequence[str]) -> int:
    """the memory a recipe needs, and whether a card has it"""
    parser = _parser(
        "plan",
        "Plan the memory of a training run from the model's config.json alone: every part, the peak, whether it fits a "
        "card, the cheapest change that makes it fit, and the longest rows that do. Nothing is loaded or downloaded "
        "but config.json. RECIPE is a recipe file or its folder; any option of qpsft train is a flag.",
        usage="qpsft plan [RECIPE] [--gpu 12GB] [--any_option_of_qpsft_train value …]",
    )
    parser.add_argument("--gpu", help="12GB, 'RTX 4090', T4, or auto: this machine's (default: auto if there is one)")
    parser.add_argument("--processes", type=int, default=1, help="of DDP; the plan is one process's")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    options, flags = parser.parse_known_args(argv)
    quiet_libraries()
    import json

    import torch

    from qpsft.plan.cards import find_card
    from qpsft.plan.memory_plan import make_plan
    from qpsft.plan.planned_config import PlannedConfig
    from qpsft.recipe.file import load_recipe

    path = flags.pop(0) if flags and not flags[0].startswith("-") else None
    recipe = load_recipe(path, flags, PlannedConfig)
    gpu = "auto" if options.gpu is None and torch.cuda.is_available() else options.gpu
    planned = make_plan(recipe, card=None if gpu is None else find_card(gpu), processes=options.processes)
    print(json.dumps(planned.to_dict(), indent=1) if options.json else planned)
    return 0


def demo(argv: Sequence[str]) -> int:
    """train the embedded base model and show what it learned"""
    parser = _parser(
        "demo",
        "Train the embedded base model with PSFT on built-in noisy demonstrations, in NF4, without any download, and "
        "show what it learned and what it kept. One to two minutes on two cores.",
    )
    parser.add_argument("--output_dir", default="qpsft-demo", help="where the adapter goes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo's adapter")
    options = parser.parse_args(argv)
    quiet_libraries()
    from qpsft.demo import walkthrough

    walkthrough.run(options.output_dir, overwrite=options.overwrite)
    return 0


def merge(argv: Sequence[str]) -> int:
    """merge an adapter into its base: plain safetensors"""
    parser = _adapter_parser(
        "merge",
        "Merge an adapter into its base model, tensor by tensor, and prove that the result is the model that was "
        "trained. CPU and a few hundred MB of memory suffice, whatever the model's size.",
    )
    parser.add_argument("-o", "--output", help="folder to write (default: ADAPTER-merged)")
    parser.add_argument(
        "--onto",
        default="trained",
        help="trained: the rounded weights training saw, the default; the result is the trained model. original: the "
        "16-bit weights on disk; often fine, never the same model",
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--max_shard_size", default="2GB", help="size of one file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the result with the live model")
    options = parser.parse_args(argv)
    quiet_libraries()
    from qpsft.merge.merging import merge_adapter

    report = merge_adapter(
        options.adapter,
        options.output,
        base=options.base,
        onto=options.onto,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        verify=not options.no_verify,
    )
    print(report.summary())
    return 0


def verify(argv: Sequence[str]) -> int:
    """prove that an exported model is the trained one"""
    parser = _adapter_parser(
        "verify",
        "Compare an exported model with the live 4-bit model and its adapter: weights, log-probabilities on real "
        "prompts, greedy answers, chat template and stop tokens. Exit code 1 when it is another model.",
    )
    parser.add_argument("exported", help="folder of the merged model")
    parser.add_argument("--prompts", help="prompts to compare on (default: the adapter's held-out rows)")
    options = parser.parse_args(argv)
    quiet_libraries()
    from qpsft.verify.verification import verify_export

    report = verify_export(options.adapter, options.exported, base=options.base, prompts=options.prompts)
    print(report.summary())
    return 0 if report.same_model else 1


def compare(argv: Sequence[str]) -> int:
    """compare SFT, DFT and PSFT from the same start"""
    from qpsft.compare.options import load_comparison, option_parser, read_flags
    from qpsft.errors import RecipeError

    if "-h" in argv or "--help" in argv or not argv:
        usage = "qpsft compare RECIPE [options] [--any_option_of_qpsft_train value …]"
        description = (
            "Train the same base on the same rows by several methods, with the same number of optimizer steps, and "
            "compare what they learn in-domain and keep out of domain: comparison.json, report.html and figures in "
            "output_dir. Finished runs are kept and reused. RECIPE is a recipe file or its folder."
        )
        print(option_parser(usage, description).format_help(), end="")
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise RecipeError("qpsft compare needs a recipe.", "Write it first: qpsft compare RECIPE --seeds 3")
    given, flags = read_flags(argv[1:])
    quiet_libraries()
    recipe, options = load_comparison(argv[0], flags, given)
    if options.noise is None:
        from qpsft.compare.comparison import compare_loaded
        from qpsft.compare.verdict import render

        found = render(compare_loaded(recipe, options), terminal_width())
    else:
        from noise_study import study_noise

        found = study_noise(recipe, options).render(terminal_width())
    print(f"\n{found}\n\nreport: {recipe.trainer.output_dir}/report.html")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """accuracy, pass@k, likelihood, drift; public benchmarks"""
    from qpsft.evaluate.options import parse_options

    options = parse_options(
        argv,
        "qpsft evaluate",
        "Measure an adapter on its 4-bit base, or a model: likelihood of references, accuracy and pass@k of "
        "completions, entropy, and drift from the base; and public benchmarks by lm-evaluation-harness. Prints a table "
        "with 95 % intervals; docs/metrics.md defines every number.",
    )
    quiet_libraries()
    from qpsft.evaluate.run import run_evaluation

    report = run_evaluation(options)
    print(f"\n{report.table()}")
    if options.json is not None:
        print(f"\nwritten: {options.json}")
    return 0


def chat(argv: Sequence[str]) -> int:
    """talk to an adapter, its base, or both side by side"""
    parser = _parser(
        "chat",
        "Talk to an adapter on its 4-bit base, to a merged model, or to any model, in the terminal or through a pipe "
        "(`echo hi | qpsft chat runs/mine`: every line is answered). Prompts are written as in training. /base "
        "answers with the adapter off, /tuned with it, /both with both side by side; /reset, /help, /quit.",
    )
    parser.add_argument("model", help="folder of an adapter or of a model, a Hub id, or demo")
    _add_base(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the conversation")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0, the likeliest token)")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw among tokens of this total (default: 1, all)")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the drawn tokens (default: 0)")
    parser.add_argument("--use_chat_template", choices=["auto", "always", "never"], help="(default: as in training)")
    parser.add_argument("--prompt_format", metavar="TEXT", help="text around a prompt (default: as in training)")
    parser.add_argument(
        "--quantization",
        choices=["nf4", "fp4", "none"],
        help="of a model without adapter (default: nf4; none for a merged one)",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    quiet_libraries()
    from qpsft.chat.session import chat as talk

    return talk(options.pop("model"), **options)


def export(argv: Sequence[str]) -> int:
    """write a GGUF, an Ollama folder, or what vLLM needs"""
    parser = _parser(
        "export",
        "Bring an adapter, or a merged model, to where models run, and check what was written against the trained "
        "model. An adapter is merged first, into a temporary folder.",
    )
    parser.add_argument("source", help="folder of an adapter or of a merged model")
    parser.add_argument("--to", required=True, choices=["gguf", "gguf-lora", "ollama", "vllm"])
    parser.add_argument("-o", "--output", help="file (gguf, gguf-lora) or folder (ollama, vllm) to write")
    parser.add_argument(
        "--outtype", help="f32, f16 (default), bf16, q8_0; q4_k_m and the like with llama-cpp-python; gguf-lora: f32"
    )
    _add_base(parser)
    parser.add_argument("--llama_cpp", help="llama.cpp's source (default: $LLAMA_CPP, else a pinned copy from PyPI)")
    parser.add_argument("--num_ctx", type=int, help="ollama: context length (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--no_run", action="store_true", help="do not run the GGUF in llama.cpp, only read it back")
    options = parser.parse_args(argv)
    quiet_libraries()
    from pathlib import Path

    from qpsft.export.gguf import export_gguf
    from qpsft.export.gguf_lora import export_gguf_lora
    from qpsft.export.ollama import export_ollama
    from qpsft.export.vllm import export_vllm

    name = Path(options.source.rstrip("/")).name
    common = {"base": options.base, "overwrite": options.overwrite}
    gguf = {**common, "llama_cpp": options.llama_cpp, "outtype": options.outtype or "f16", "run": not options.no_run}
    if options.to == "gguf":
        report = export_gguf(options.source, options.output or f"{name}.gguf", **gguf)
    elif options.to == "ollama":
        report = export_ollama(options.source, options.output or f"{name}-ollama", num_ctx=options.num_ctx, **gguf)
    elif options.to == "gguf-lora":
        lora = {**common, "llama_cpp": options.llama_cpp, "outtype": options.outtype or "f32"}
        report = export_gguf_lora(options.source, options.output or f"{name}-lora.gguf", **lora)
    else:
        report = export_vllm(options.source, options.output, **common)
    print(report.summary())
    return 0


def push(argv: Sequence[str]) -> int:
    """upload an adapter or a merged model to the Hub"""
    parser = _parser("push", "Upload a folder to the Hugging Face Hub, card included. Never checkpoints or data rows.")
    parser.add_argument("folder", help="an adapter's or a merged model's folder, or one with a GGUF")
    parser.add_argument("repo_id", help="OWNER/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--dry_run", action="store_true", help="list files and sizes; needs no network and no token")
    options = parser.parse_args(argv)
    quiet_libraries()
    from qpsft.export.push import push as push_folder

    print(push_folder(options.folder, options.repo_id, private=options.private, dry_run=options.dry_run).summary())
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "preview": preview,
    "plan": plan,
    "evaluate": evaluate,
    "compare": compare,
    "chat": chat,
    "merge": merge,
    "verify": verify,
    "export": export,
    "push": push,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a mistake the user can mend, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"qpsft {__version__}")
        return 0
    let_memory_segments_grow()
    verb = VERBS.get(argv[0])
    try:
        if verb is None:
            raise _unknown_verb(argv[0])
        if verb is not train and world_size() > 1:
            raise QpsftError(f"qpsft {argv[0]} works in one process, not in {world_size()}.", "Leave out torchrun.")
        return verb(argv[1:])
    except QpsftError as error:
        say_once(fill(f"error: {error}"))
        return error.exit_code
    except ImportError:  # transformers', where a package it uses does not import
        from qpsft.model.environment import broken_torchvision

        problem = broken_torchvision()
        if problem is None:
            raise
        say_once(fill(f"error: {problem}"))
        return problem.exit_code
    except KeyboardInterrupt:
        say_once(f"\nInterrupted. {AFTER_INTERRUPT.get(argv[0], '')}".rstrip())
        return INTERRUPTED


def _help() -> str:
    verbs = "\n".join(f"  {name:<10}{function.__doc__}" for name, function in VERBS.items())
    return (
        "usage: qpsft VERB [options]\n\n"
        "Proximal Supervised Fine-Tuning (PSFT) on 4-bit base models with LoRA.\n\n"
        f"{verbs}\n\n"
        "`qpsft VERB --help` explains one. Start with `qpsft demo`."
    )


def _unknown_verb(name: str) -> QpsftError:
    import difflib

    near = difflib.get_close_matches(name, VERBS, n=1)
    return QpsftError(
        f"qpsft has no verb {name!r}.", f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(VERBS)}."
    )


def _parser(verb: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"qpsft {verb}", usage=usage, description=description, allow_abbrev=False)


def _adapter_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for a verb on a trained adapter: its folder, and where its base is now."""
    parser = _parser(verb, description)
    parser.add_argument("adapter", help="folder that qpsft train wrote")
    _add_base(parser)
    return parser


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="the base's folder or Hub id, if it is no longer where the adapter says")


def _recipe(verb: str, argv: Sequence[str], description: str, example: str):
    """The recipe named on the command line with its flags, or None when help was asked for and printed."""
    wants_all = "--help_all" in argv
    if wants_all or "-h" in argv or "--help" in argv:
        quiet_libraries()
        from qpsft.psft.config import PSFTConfig
        from qpsft.recipe.flags import option_help

        print(f"usage: qpsft {verb} [RECIPE.yaml] [--any_option value …]\n")
        print(f"{textwrap.fill(description, 80)}\n\n  {example}\n")
        print(option_help(PSFTConfig, everything=wants_all))
        return None
    quiet_libraries()
    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.file import load_recipe

    path = argv[0] if argv and not argv[0].startswith("-") else None
    return load_recipe(path, argv[1:] if path else argv, PSFTConfig)
