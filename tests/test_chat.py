"""`qpsft chat` as a user has it: through a pipe, in a terminal, and with every mistake."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml

from qpsft import cli
from qpsft.chat.conversation import BASE, TUNED, Conversation
from qpsft.evaluate.model import load_evaluated
from qpsft.merge import merge_adapter
from qpsft.model.base import load_base

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "add one, then sort, then rotate, then swap halves: 0259", "reverse: 1234"
CAP = "--max_new_tokens=24"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Trained for a few steps on the built-in demonstrations, so hard that it answers otherwise than its base."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    flags = [
        "--model_name_or_path=demo", "--dataset_name=demo-clean", "--dataset_limit=128", "--max_length=128",
        "--lora_r=8", "--learning_rate=1e-2", "--warmup_steps=0", "--reference_steps=4", "--max_steps=12",
        "--per_device_train_batch_size=8", "--gradient_accumulation_steps=1", "--gradient_checkpointing=false",
        "--save_strategy=no", "--epsilon=0.5",
    ]  # fmt: skip
    assert cli.main(["train", *flags, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def answers(adapter):
    """What each speaker answers, greedily, to FIRST, then SECOND, in one conversation."""
    conversation = Conversation(*load_evaluated(str(adapter)), max_new_tokens=24)
    found = {BASE: [], TUNED: []}
    for text in (FIRST, SECOND):
        conversation.say(text)
        for speaker, said in found.items():
            said.append(conversation.answer(speaker))
    assert found[BASE][0] != found[TUNED][0]
    return found


def talk(monkeypatch, name, text, *options):
    """The exit code of `qpsft chat` with `text` from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.main(["chat", str(name), *options])


def said(capsys) -> str:
    """What went to standard error, as one line."""
    return " ".join(capsys.readouterr().err.split())


# ---- through a pipe ----


@pytest.mark.journey
def test_every_line_of_a_pipe_is_answered_and_nothing_else_is_printed(adapter, answers):
    result = subprocess.run(
        [sys.executable, "-m", "qpsft", "chat", adapter, CAP],
        input=f"{FIRST}\r\n\n   \n{SECOND}".encode() + b"\n/reset\n\xff\xfe\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    lines = result.stdout.decode().splitlines()
    assert lines[:2] == answers[TUNED] and len(lines) == 3 and b"\x1b" not in result.stdout + result.stderr
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert f"chat with {adapter}" in " ".join(result.stderr.decode().split())


def test_speakers_take_turns(adapter, answers, monkeypatch, capsys):
    lines = f"/base\n{FIRST}\n/reset\n/both {FIRST}\n{SECOND}\n/tuned\n/reset\n {FIRST}\n/quit\nnever read\n"
    assert talk(monkeypatch, adapter, lines, CAP) == 0
    base, tuned = answers[BASE], answers[TUNED]
    both = [line for b, t in zip(base, tuned, strict=True) for line in ("base:", b, "tuned:", t)]
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [base[0], *both] and out[-1] != base[0]


def test_help_goes_beside_the_answers(adapter, monkeypatch, capsys):
    assert talk(monkeypatch, adapter, "/help\n") == 0
    captured = capsys.readouterr()
    assert not captured.out
    for command in ("/base", "/tuned", "/both", "/reset", "/quit", "//", "Ctrl-C"):
        assert command in captured.err
    assert max(map(len, captured.err.splitlines())) <= 80


def test_an_unknown_command_lists_them_and_the_rest_is_answered(adapter, answers, monkeypatch, capsys):
    assert talk(monkeypatch, adapter, f"/bose\n/x\x1b[2J\n{FIRST}\n", CAP) == 2
    captured = capsys.readouterr()
    text = " ".join(captured.err.split())
    assert (
        "There is no command /bose. Did you mean /base? Commands: /base, /tuned, /both, /reset, /help, /quit." in text
    )
    assert "\x1b" not in captured.err and captured.out.splitlines() == [answers[TUNED][0]]


def test_a_line_may_start_with_a_slash(adapter, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Conversation, "say", lambda self, text: seen.append(text))
    monkeypatch.setattr(Conversation, "answer", lambda self, speaker, write: write("yes"))
    assert talk(monkeypatch, adapter, "//etc/hosts?\n  a /base b\n") == 0
    assert seen == ["/etc/hosts?", "  a /base b"] and capsys.readouterr().out == "yes\nyes\n"


def test_control_characters_of_an_answer_reach_a_pipe_but_no_terminal(adapter, monkeypatch, capsys):
    monkeypatch.setattr(Conversation, "answer", lambda self, speaker, write: write("a\x1b[2Jb\tc"))
    assert talk(monkeypatch, adapter, "x\n") == 0 and capsys.readouterr().out == "a\x1b[2Jb\tc\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert talk(monkeypatch, adapter, "x\n") == 0 and capsys.readouterr().out == "a\\x1b[2Jb\tc\n"


def test_a_reader_that_has_had_enough_ends_it_quietly(adapter, monkeypatch, capfd):
    """`qpsft chat … | head -1`: a real pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True))
    assert talk(monkeypatch, adapter, f"{FIRST}\n{SECOND}\n", CAP) == 0
    sys.stdout.close()
    assert "Broken" not in capfd.readouterr().err


def test_ctrl_c_in_a_pipe_ends_it_without_a_word(adapter, monkeypatch, capsys):
    def interrupted(self, speaker, write):
        write("half an")
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    assert talk(monkeypatch, adapter, f"{FIRST}\n{SECOND}\n") == 130
    captured = capsys.readouterr()
    assert captured.out == "half an\n" and "nterrupt" not in captured.err


def test_turns_left_out_are_mentioned_once(adapter, monkeypatch, capsys):
    lines = "".join(f"{number}: {'9' * 100}\n" for number in range(8))
    assert talk(monkeypatch, adapter, lines + f"/reset\n{'9' * 600}\n", "--max_new_tokens=4") == 2
    err = said(capsys)
    assert err.count("its oldest turns are left out from here on") == 1
    assert "This turn alone is 604 tokens long, and the model takes 512" in err


# ---- in a terminal ----


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *arguments, columns: int, **environment: str):
        self.output = b""
        process, self.file = pty.fork()
        if process == 0:
            # an environment of its own: readline, where pytest has imported it, hides COLUMNS in the C library's
            given = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | environment
            own = {name: value for name, value in given.items() if name not in ("COLUMNS", "LINES")}
            os.execve(sys.executable, [sys.executable, "-m", "qpsft", *map(str, arguments)], own)
        self.process = process
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def until(self, pattern: str, seconds: float = 240) -> str:
        """What comes until `pattern` stands at the end; everything until the process ends for an empty pattern."""
        came, end = b"", time.monotonic() + seconds
        while not (pattern and re.search(pattern.encode() + rb"$", came)):
            assert time.monotonic() < end, came
            if select.select([self.file], [], [], 1)[0]:
                try:
                    piece = os.read(self.file, 65536)
                except OSError:  # the process has ended
                    piece = b""
                if not piece:
                    break
                came = REDRAWN.sub(b"", came + piece)
        self.output += came
        return came.decode().replace("\r\n", "\n")

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, until the process ends.

        Python sees a signal that comes between readline's prompt and its wait for keys only with the next key.
        """
        self.send("\x03")
        try:
            self.until("", seconds=20)
        except AssertionError:
            self.send("\x03")
            self.until("")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


ANSWERED = r"\r\n\r\nboth> "
"""An empty line and the next prompt."""
REDRAWN = re.compile(rb"\r\x1b\[K\r\w+> ")
"""The prompt once more: readline draws it anew when the width changes, sooner or later."""


@pytest.mark.journey
def test_both_in_a_terminal(adapter, answers):
    terminal = Terminal("chat", adapter, CAP, columns=120)
    assert "/help lists the commands" in terminal.until("tuned> ")
    terminal.send("/both\n")
    terminal.until("both> ")
    terminal.send(f"{FIRST}\n")
    came = terminal.until(ANSWERED)
    assert "\x1b[1mbase:\x1b[0m\n" in came
    assert f"base:\n{answers[BASE][0]}\ntuned:\n{answers[TUNED][0]}\n" in re.sub(r"\x1b\[[\d;]*[mK]", "", came)
    terminal.interrupt()
    assert terminal.exit_code() == 0 and b"Traceback" not in terminal.output


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_the_environment_says_so(environment, adapter, monkeypatch, capsys):
    monkeypatch.setattr(Conversation, "answer", lambda self, speaker, write: write("yes"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for settings, bold in (({"TERM": "xterm"}, True), (environment, False)):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert talk(monkeypatch, adapter, "/both x\n") == 0
        assert ("\x1b[1mbase:" in capsys.readouterr().out) is bold


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(adapter, monkeypatch, capsys):
    """On a terminal: half an answer is kept, a turn without any is forgotten."""
    turns, answer = [], Conversation.answer

    def interrupted(self, speaker, write):
        turns.append([turn.user for turn in self.turns])
        if len(turns) == 1:
            self.turns[-1].answers[speaker] = ""
            raise KeyboardInterrupt
        if len(turns) == 2:
            write("half")
            self.turns[-1].answers[speaker] = "half"
            raise KeyboardInterrupt
        return answer(self, speaker, write)

    lines = iter(["one", "two", "three"])

    def typed(prompt):
        assert prompt == "tuned> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Conversation, "answer", interrupted)
    monkeypatch.setattr("builtins.input", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert cli.main(["chat", str(adapter), CAP]) == 0
    assert turns == [["one"], ["two"], ["two", "three"]]
    assert "half\n" in capsys.readouterr().out


# ---- what it talks to ----


def test_a_merged_model_answers_as_the_adapter_and_has_no_base(adapter, answers, tmp_path, monkeypatch, capsys):
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", no_verify=True)
    capsys.readouterr()
    assert talk(monkeypatch, tmp_path / "merged", f"/base\n/both\n{FIRST}\n", CAP) == 2
    captured = capsys.readouterr()
    text = " ".join(captured.err.split())
    assert text.count("is a merged model: its base is no longer in it. Chat with the adapter's folder") == 2
    assert captured.out.splitlines() == [answers[TUNED][0]]


def test_any_model_by_itself(monkeypatch, capsys, answers):
    assert talk(monkeypatch, "demo", f"{FIRST}\n/base\n", CAP) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [answers[BASE][0]]
    assert "demo is a model without an adapter" in " ".join(captured.err.split())


def test_prompts_are_written_as_the_adapter_was_trained(stories, tmp_path, monkeypatch, capsys):
    """An adapter on a base without a chat template, trained on prompt and completion columns with a format."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"day {n}", "completion": " a dog ran."}) + "\n" for n in range(30)))
    recipe = {
        "model_name_or_path": str(stories), "dataset_name": str(rows), "max_length": 64, "max_steps": 2,
        "prompt_format": "Once upon a {prompt}, there was", "per_device_train_batch_size": 4, "report_to": "none",
        "gradient_accumulation_steps": 1, "save_strategy": "no", "reference_steps": 2, "logging_steps": 2,
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    assert cli.main(["train", str(tmp_path / "my.yaml"), f"--output_dir={out}"]) == 0
    capsys.readouterr()
    model, tokenizer = load_base(stories, verbose=False)

    def expected(text):
        from peft import PeftModel

        ids = tokenizer(text, return_tensors="pt")
        tuned = PeftModel.from_pretrained(model, out) if not hasattr(model, "peft_config") else model
        written = tuned.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(written, skip_special_tokens=True)

    assert talk(monkeypatch, out, "time\nday\n", "--max_new_tokens=8") == 0
    captured = capsys.readouterr()
    texts = [expected(f"Once upon a {word}, there was") for word in ("time", "day")]
    assert captured.out == "".join(f"{text}\n" for text in texts)
    assert "No chat template: each line is a prompt of its own" in " ".join(captured.err.split())
    assert talk(monkeypatch, out, "time\n", "--max_new_tokens=8", "--prompt_format=A {prompt} was") == 0
    assert capsys.readouterr().out == expected("A time was") + "\n"
    # The merged folder knows its adapter's recipe.
    merge_adapter(out, tmp_path / "merged", dtype="float32", no_verify=True)
    capsys.readouterr()
    assert talk(monkeypatch, tmp_path / "merged", "time\n", "--max_new_tokens=8") == 0
    assert capsys.readouterr().out == f"{texts[0]}\n"


def test_drawn_answers_and_a_system_turn(adapter, monkeypatch, capsys):
    def out(*options):
        assert talk(monkeypatch, adapter, f"{FIRST}\n", CAP, *options) == 0
        return capsys.readouterr().out

    seeds = [out("--temperature=2", "--top_p=0.9", f"--seed={seed}") for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert out("--system=add one: 1111, with names, with arrows") != out()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere/adapter"], "There is no base model folder /nowhere/adapter"),
        (["demo", "--base", "demo"], "--base is given, but demo is not an adapter's folder"),
        (["demo", "--temperature=-1"], "temperature is -1.0; it must be at least 0"),
        (["demo", "--temperature=nan"], "--temperature is 'nan'; it must be a finite number"),
        (["demo", "--temperature=1", "--top_p=0"], "top_p is 0.0; it must be above 0"),
        (["demo", "--top_p=0.9", "--seed=1"], "--top_p and --seed have no effect at temperature 0"),
        (["demo", "--temperature=1", "--seed=-1"], "seed is -1; it must be at least 0"),
        (["demo", "--max_new_tokens=0"], "max_new_tokens is 0; it must be at least 1"),
        (["demo", "--prompt_format=x"], "prompt_format 'x' lacks {prompt}"),
        (["demo", "--use_chat_template=never", "--system=x"], "A system turn needs a chat template"),
    ],
)
def test_mistakes_are_one_paragraph(options, message, monkeypatch, capsys):
    assert talk(monkeypatch, options[0], "hi\n", *options[1:]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and "Traceback" not in captured.err and not captured.out


def test_folders_that_are_no_adapter_s_and_other_bases(adapter, stories, tmp_path, monkeypatch, capsys):
    assert talk(monkeypatch, adapter, "hi\n", "--quantization=none") == 2
    assert "base_quantization.json says nf4. Leave the flag out." in said(capsys)
    assert talk(monkeypatch, adapter, "hi\n", f"--base={stories}") == 2
    assert "is another model (config hash" in said(capsys)
    assert talk(monkeypatch, tmp_path, "hi\n") == 2
    assert "has no config.json, so it is not a model folder" in said(capsys)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert talk(monkeypatch, tmp_path, "hi\n") == 2
    assert f"{tmp_path} has no adapter_model.safetensors" in said(capsys)
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "recipe.yaml").write_text("a: [")
    assert talk(monkeypatch, other, "hi\n") == 2
    assert "recipe.yaml, line 1: not valid YAML" in said(capsys)
