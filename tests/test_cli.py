"""The command line: instant help, verbs, exit codes, one paragraph per mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from qpsft import __version__, cli


def qpsft(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "qpsft", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, time\n"
        "from qpsft.cli import main; code = main(['--help'])\n"
        "seconds = time.process_time()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
        "print(code, heavy, seconds < 0.5)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 set() True"
    for verb in cli.VERBS:
        assert verb in result.stdout


def test_import_is_lazy_and_exports_what_it_says():
    code = "import sys, qpsft; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    import qpsft
    from qpsft import PSFTConfig, PSFTTrainer, ReferencePolicy, load_base, psft_loss

    named = {each.__name__ for each in (PSFTConfig, PSFTTrainer, ReferencePolicy, load_base, psft_loss)}
    assert named == {"PSFTConfig", "PSFTTrainer", "ReferencePolicy", "load_base", "psft_loss"} <= set(qpsft.__all__)
    assert PSFTTrainer.__mro__[1].__name__ == "SFTTrainer"
    with pytest.raises(AttributeError, match="psft_los"):
        _ = qpsft.psft_los


def test_without_a_verb_it_prints_help_and_exits_2():
    result = qpsft()
    assert result.returncode == 2 and "usage: qpsft VERB" in result.stderr and not result.stdout


def test_version():
    result = qpsft("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"qpsft {__version__}")


def test_an_unknown_verb_is_an_error_that_suggests_the_right_one(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: qpsft {verb}" in out and len(out) > 300
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_only_the_help_of_a_whole_recipe_waits_for_torch():
    """train and preview list the trainer's options, which come from transformers."""
    verbs = sorted(set(cli.VERBS) - {"train", "preview"})
    code = (
        "import sys\n"
        "from qpsft.cli import main\n"
        f"for verb in {verbs}: assert main([verb, '--help']) == 0, verb\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()", result.stdout[-500:] + result.stderr


def test_the_help_of_train_shows_every_own_option_with_its_default(capsys):
    cli.main(["train", "--help"])
    short = capsys.readouterr().out
    for option in ("--epsilon", "--reference_steps", "--num_iterations", "--lora_r", "--dataset_columns", "--resume"):
        assert option in short
    assert "(default: 0.28)" in short and "--adam_beta1" not in short
    assert "Unset: 2 x lora_r" in short
    cli.main(["train", "--help_all"])
    assert "--adam_beta1" in capsys.readouterr().out


def test_the_help_of_train_fits_eighty_columns(capsys):
    for flag in ("--help", "--help_all"):
        cli.main(["train", flag])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_help_of_chat_shows_the_defaults_of_drawing(capsys):
    cli.main(["chat", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 0, the likeliest token)" in out and "of this total (default: 1, all)" in out


def test_the_demo_says_the_same_time_everywhere(capsys):
    cli.main(["demo", "--help"])
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, readme):
        assert "two to three minutes on two cores" in " ".join(text.split()).lower()


def test_help_asks_for_no_value_of_a_switch(capsys):
    cli.main(["compare", "--help"])
    out = capsys.readouterr().out
    assert "--seeds N " in out and "--arms [TEXT ...]" in out and "--tune  " in out
    cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert "  --resume\n" in out and "  --double_quant {true,false}\n" in out


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("300", 100)])
def test_errors_are_as_wide_as_the_terminal(columns, most, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["train", "--optim=adamm"]) == 2
    assert max(map(len, capsys.readouterr().err.splitlines())) in range(most - 30, most + 1)


def test_a_mistake_is_one_paragraph_without_a_traceback(tmp_path):
    result = qpsft("train", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no recipe") and "Traceback" not in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("merge", "qpsft merge: the following arguments are required: ADAPTER. `qpsft merge --help` explains it."),
        ("verify adapter", "the following arguments are required: EXPORTED"),
        ("export adapter", "the following arguments are required: --to"),
        ("merge adapter --overwritte", "--overwritte: there is no such option. Did you mean overwrite?"),
        ("merge adapter --zzz", "--zzz: there is no such option. `qpsft merge --help` lists the options."),
        ("merge adapter merged", "'merged' belongs to no option."),
        ("merge adapter --base", "--base needs a value."),
        ("merge adapter --dtype fp8", "--dtype is 'fp8'; it must be bfloat16, float16 or float32."),
        ("export adapter --to ggml", "--to is 'ggml'; it must be gguf, gguf-lora, ollama, vllm or nf4."),
        ("plan --processes two", "--processes is 'two'; it must be a whole number."),
        ("chat demo --quantization int8", "--quantization: int8 is no longer supported. Use nf4."),
        ("compare", "qpsft compare needs a recipe."),
        ("compare --seeds 3", "qpsft compare needs a recipe."),
    ],
)
def test_mistakes_on_the_command_line(command, message, capsys):
    assert cli.main(command.split()) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and not captured.out


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    for verb, todo in (("train", "--resume"), ("compare", "the same command goes on"), ("merge", "Interrupted.\n")):
        monkeypatch.setattr(f"qpsft.{verb}.command.{verb}", interrupted)
        assert cli.main([verb]) == 130
        said = capsys.readouterr().err
        assert todo in said and ("--resume" in said) is (verb == "train")


def test_a_wrong_path_is_told_before_transformers_is_imported(tmp_path):
    code = (
        "import sys\n"
        "from qpsft.cli import main\n"
        "code = main(['train', 'nowhere.yaml'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 1)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 2 and "There is no recipe nowhere.yaml" in told.stderr
