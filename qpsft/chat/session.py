"""`qpsft chat`: a conversation in the terminal, or with lines from a pipe.

Answers go to standard output; notes, errors, and the prompt if the output is no terminal, to standard error.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpsft.chat.conversation import TUNED, Conversation, Turns
from qpsft.chat.gguf import GgufConversation
from qpsft.chat.options import ChatOptions
from qpsft.errors import BaseModelError, DataError, QpsftError, did_you_mean
from qpsft.evaluate.model import describe_evaluated, is_merged, load_evaluated, prompt_arguments
from qpsft.model.folder import near_folders
from qpsft.model.llama_server import LlamaServer
from qpsft.recipe.arguments import DataArguments
from qpsft.terminal import fill, no_standard_input, takes_color, visible

BOTH = "both"
GGUF_CONTEXT = 8192
"""Tokens of a conversation with a GGUF, or the model's own limit where that is less: a longer one takes much memory."""
INTERRUPTED = 130
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
COMMANDS = {
    "/base": "answer with the adapter off",
    "/tuned": "answer with the adapter",
    "/both": "answer with both, the base first",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *(f"  {name:<8}{what}" for name, what in COMMANDS.items()),
        "Text behind a command is sent after it. Begin a line with // to send one that",
        "starts with a slash. Ctrl-C stops an answer.",
    ]
)


def chat(options: ChatOptions) -> int:
    """Talks to an adapter or a model until the input ends.

    Returns:
        The exit code: 0; 2 if lines of a pipe could not be answered; 130 after Ctrl-C in a pipe.

    Raises:
        QpsftError: the model cannot be loaded, or an option does not suit it.
    """
    with contextlib.ExitStack() as stack:
        return _talk(*_open(options, stack), options)


def _open(options: ChatOptions, stack: contextlib.ExitStack) -> tuple[Turns, str]:
    """The conversation, and in words what answers."""
    sampling = {
        "system": options.system,
        "temperature": options.temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed or 0,
    }
    folder = Path(options.model).expanduser()
    if folder.suffix.lower() == ".gguf":
        return _open_gguf(folder, options, sampling, stack)
    arguments = prompt_arguments(
        folder, use_chat_template=options.use_chat_template, prompt_format=options.prompt_format
    )
    with no_standard_input():  # the lines in a pipe are for the model
        model, tokenizer = load_evaluated(
            options.model, base=options.base, quantization=options.quantization, device=options.device
        )
    return Conversation(model, tokenizer, arguments, **sampling), describe_evaluated(model)


def _open_gguf(
    path: Path, options: ChatOptions, sampling: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[Turns, str]:
    if not path.is_file():
        raise BaseModelError(f"There is no file {path}.", near_folders(path))
    given = {"base": options.base, "quantization": options.quantization}
    if names := [f"--{name}" for name, value in given.items() if value is not None]:
        raise BaseModelError(f"{', '.join(names)} has no effect on {path}: a GGUF is run as it is.", "Leave it out.")
    asked = {"use_chat_template": options.use_chat_template, "prompt_format": options.prompt_format}
    arguments = DataArguments(**{name: value for name, value in asked.items() if value is not None})
    server = stack.enter_context(LlamaServer(path, context=GGUF_CONTEXT))
    size = path.stat().st_size / 1e6
    return GgufConversation(server, arguments, **sampling), f"{size:,.1f} MB, run by llama.cpp"


def _talk(conversation: Turns, what: str, options: ChatOptions) -> int:
    session = _Session(conversation, options.model, merged=is_merged(Path(options.model).expanduser()))
    session.note(f"chat with {options.model} · {what}")
    if not conversation.as_chat:
        session.note(
            f"No chat template: each line is a prompt of its own, written as {conversation.arguments.prompt_format!r}."
        )
    try:
        return session.run()
    except BrokenPipeError:  # whoever read the answers has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Session:
    """Lines in, answers out."""

    def __init__(self, conversation: Turns, name: str, *, merged: bool):
        self.conversation, self.name, self.merged = conversation, name, merged
        self.speaker = TUNED
        self.failed = False
        self.told_left_out = False
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # characters outside the encoding must not end the conversation

    def run(self) -> int:
        """Until the input ends, /quit, or Ctrl-C at the prompt. Returns the exit code."""
        if self.on_terminal:
            self.note("/help lists the commands, Ctrl-D leaves.")
            with contextlib.suppress(ImportError):  # Windows
                import readline  # noqa: F401  (input() then edits lines and remembers them)
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                print(file=sys.stderr)
                return 0 if self.on_terminal else INTERRUPTED
            if line is None or line.split()[:1] == ["/quit"]:
                return 2 if self.failed and not self.on_terminal else 0
            try:
                self._take(line)
            except QpsftError as error:
                self.failed = True
                print(fill(f"error: {error}"), file=sys.stderr)
            except KeyboardInterrupt:
                print(flush=True)
                if not self.on_terminal:
                    return INTERRUPTED
                if self.conversation.turns and not any(self.conversation.turns[-1].answers.values()):
                    self.conversation.take_back()

    def note(self, text: str) -> None:
        """Prints a remark on standard error."""
        dim, plain = (DIM, PLAIN) if takes_color(sys.stderr) else ("", "")
        print(f"{dim}{fill(text)}{plain}", file=sys.stderr, flush=True)

    def _read(self) -> str | None:
        """The next line without its end; None when there is none."""
        prompt = f"{self.speaker}> " if len(self.conversation.speakers) > 1 else "> "
        if self.on_terminal:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        if sys.stdin.isatty():  # only the output goes elsewhere
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _take(self, line: str) -> None:
        """Does what a command says, and answers any other line that is not empty."""
        if line.lstrip().startswith("//"):
            line = line.replace("/", "", 1)
        elif line.lstrip().startswith("/"):
            command, _, line = line.strip().partition(" ")
            self._obey(command)
        if line.strip():
            self._answer(line)

    def _obey(self, command: str) -> None:
        if command not in COMMANDS:
            todo = f"{did_you_mean(command, COMMANDS)}Commands: {', '.join(COMMANDS)}."
            raise DataError(f"There is no command {visible(command)}.", todo)
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            self.conversation.reset()
            self.told_left_out = False
        elif len(self.conversation.speakers) > 1:
            self.speaker = command.removeprefix("/")
        else:
            kind = "a merged model: its base is no longer in it" if self.merged else "a model without an adapter"
            raise DataError(
                f"{command} has no base to switch to: {self.name} is {kind}.",
                "Chat with the adapter's folder to have both.",
            )

    def _answer(self, line: str) -> None:
        conversation = self.conversation
        conversation.say(line)
        try:
            for speaker in conversation.speakers if self.speaker == BOTH else (self.speaker,):
                if self.speaker == BOTH:
                    bold, plain = (BOLD, PLAIN) if takes_color(sys.stdout) else ("", "")
                    print(f"{bold}{speaker}:{plain}", flush=True)
                self._stream(speaker)
        except QpsftError:
            conversation.take_back()
            raise
        if self.on_terminal:
            print()
        if conversation.left_out and not self.told_left_out:
            self.told_left_out = True
            self.note(
                f"The conversation is longer than the {conversation.limit} tokens the model takes: its oldest turns "
                "are left out from here on."
            )

    def _stream(self, speaker: str) -> None:
        show: Callable[[str], str] = visible if sys.stdout.isatty() else str
        self.conversation.answer(speaker, lambda text: print(show(text), end="", flush=True))
        print(flush=True)
