"""The command line: one verb a function, imports inside, so that help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence

from qpsft import __version__
from qpsft.errors import QpsftError

INTERRUPTED = 130  # what shells use for Ctrl-C


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
    _quiet_libraries()
    from qpsft import run

    summary = run.train(recipe)
    print(f"\n{summary}\n\nnext:\n  qpsft train {summary.folder} --resume --num_train_epochs N   train longer")
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
    _quiet_libraries()
    from qpsft.base import load_tokenizer
    from qpsft.data import load_dataset
    from qpsft.errors import RecipeError
    from qpsft.preview import render_preview

    if not recipe.model.model_name_or_path:
        raise RecipeError("model_name_or_path is missing.", "The tokenizer comes with the model: name it.")
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.trainer.trust_remote_code,
    )
    print(render_preview(load_dataset(recipe.data, tokenizer, recipe.trainer.max_length), tokenizer), end="")
    return 0


def demo(argv: Sequence[str]) -> int:
    """train the embedded base model and show what it learned"""
    parser = _parser(
        "demo",
        "Train the embedded base model with PSFT on built-in noisy demonstrations, in NF4, without any download, and "
        "show what it learned and what it kept. About two minutes on two cores.",
    )
    parser.add_argument("--output_dir", default="qpsft-demo", help="where the adapter goes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo's adapter")
    options = parser.parse_args(argv)
    _quiet_libraries()
    from qpsft.demo import walkthrough

    walkthrough.run(options.output_dir, overwrite=options.overwrite)
    return 0


def merge(argv: Sequence[str]) -> int:
    """merge an adapter into its base: plain safetensors"""
    parser = _parser(
        "merge",
        "Merge an adapter into its base model, tensor by tensor, and prove that the result is the model that was "
        "trained. CPU and a few hundred MB of memory suffice, whatever the model's size.",
    )
    parser.add_argument("adapter", help="folder that qpsft train wrote")
    parser.add_argument("-o", "--output", help="folder to write (default: ADAPTER-merged)")
    parser.add_argument("--base", help="the base's folder or Hub id, if it is no longer where the adapter says")
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
    _quiet_libraries()
    from qpsft.merge import merge_adapter

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
    parser = _parser(
        "verify",
        "Compare an exported model with the live 4-bit model and its adapter: weights, log-probabilities on real "
        "prompts, greedy answers, chat template and stop tokens. Exit code 1 when it is another model.",
    )
    parser.add_argument("adapter", help="folder that qpsft train wrote")
    parser.add_argument("exported", help="folder of the merged model")
    parser.add_argument("--base", help="the base's folder or Hub id, if it is no longer where the adapter says")
    parser.add_argument("--prompts", help="prompts to compare on (default: the adapter's held-out rows)")
    options = parser.parse_args(argv)
    _quiet_libraries()
    from qpsft.verify import verify_export

    report = verify_export(options.adapter, options.exported, base=options.base, prompts=options.prompts)
    print(report.summary())
    return 0 if report.same_model else 1


def evaluate(argv: Sequence[str]) -> int:
    """accuracy, pass@k, likelihood, drift; public benchmarks"""
    from qpsft.evaluation_options import parse_options

    options = parse_options(
        argv,
        "qpsft evaluate",
        "Measure an adapter on its 4-bit base, or a model: likelihood of references, accuracy and pass@k of "
        "completions, entropy, and drift from the base; and public benchmarks by lm-evaluation-harness. Prints a table "
        "with 95 % intervals; docs/metrics.md defines every number.",
    )
    _quiet_libraries()
    from qpsft.evaluation_run import run_evaluation

    report = run_evaluation(options)
    print(f"\n{report.table()}")
    if options.json is not None:
        print(f"\nwritten: {options.json}")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "preview": preview,
    "evaluate": evaluate,
    "merge": merge,
    "verify": verify,
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
    verb = VERBS.get(argv[0])
    try:
        if verb is None:
            raise _unknown_verb(argv[0])
        return verb(argv[1:])
    except QpsftError as error:
        print(_paragraph(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted. A training run continues from its last checkpoint with --resume.", file=sys.stderr)
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


def _paragraph(error: QpsftError) -> str:
    return textwrap.fill(f"error: {error}", 100, break_long_words=False, break_on_hyphens=False)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"qpsft {verb}", description=description)


def _recipe(verb: str, argv: Sequence[str], description: str, example: str):
    """The recipe named on the command line with its flags, or None when help was asked for and printed."""
    wants_all = "--help_all" in argv
    if wants_all or "-h" in argv or "--help" in argv:
        _quiet_libraries()
        from qpsft.config import PSFTConfig
        from qpsft.recipe import option_help

        print(f"usage: qpsft {verb} [RECIPE.yaml] [--any_option value …]\n\n{description}\n\n  {example}\n")
        print(option_help(PSFTConfig, everything=wants_all))
        return None
    _quiet_libraries()
    from qpsft.config import PSFTConfig
    from qpsft.recipe import load_recipe

    path = argv[0] if argv and not argv[0].startswith("-") else None
    return load_recipe(path, argv[1:] if path else argv, PSFTConfig)


def _quiet_libraries() -> None:
    """Libraries' notes that a user can do nothing about stay out of the way; our own warnings are one clear line."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "transformers", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"qpsft(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(textwrap.fill(f"warning: {message}", 100, break_long_words=False), file=sys.stderr)
