"""A folder for `ollama create`: the GGUF and a Modelfile with the template, the stop tokens and the context length.

The template is derived by rendering: conversations made of placeholders go through the model's own chat template. What
stands around the placeholders becomes Ollama's template, which must then render other conversations to the same text.
Where that fails, Ollama is left to read the chat template in the GGUF.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpsft.errors import ExportError, OutputError
from qpsft.export.gguf import ExportReport, export_gguf
from qpsft.export.options import ExportOptions
from qpsft.files import finished_folder, write_atomically
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import is_adapter, resolve_folder
from qpsft.model.llama_server import LlamaServer
from qpsft.terminal import wrap
from qpsft.verify.exported import read_text_config
from qpsft.verify.text import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
WRITTEN = "# Written by qpsft export."
"""The first line of a Modelfile, by which an earlier export is known."""
LARGE_CACHE = 4e9
CONTEXT = 512
"""Tokens of a model that only writes its template."""
SYSTEM, USER, ANSWER = "qpsftSystem", "qpsftUser", "qpsftAnswer"

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], "str | None"]


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around each turn, from which Ollama's template is made.

    Attributes:
        head: before everything.
        default_system: after the head when there is no system turn.
        turns: role -> (before, after) the content.
        opening: the generation prompt, which opens the assistant's next turn.
    """

    head: str
    default_system: str
    turns: dict[str, tuple[str, str]]
    opening: str

    def render(self, messages: Messages, *, opened: bool) -> str:
        """What `go_template` renders, in Python; with the generation prompt if `opened`."""
        text = self.head
        if not any(message["role"] == "system" for message in messages):
            text += self.default_system
        for message in messages:
            before, after = self.turns[message["role"]]
            text += before + message["content"] + after
        return text + (self.opening if opened else "")

    def go_template(self) -> str:
        """The same as a Go template for a Modelfile."""
        parts = [_literal(self.head)]
        if self.default_system:
            parts.append("{{ if not .System }}" + _literal(self.default_system) + "{{ end }}")
        branches = [
            f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
            for role, (before, after) in self.turns.items()
        ]
        turn = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        return "".join([*parts, "{{ range .Messages }}", turn, "{{ end }}", _literal(self.opening)])


def _literal(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


@dataclass
class OllamaReport:
    """What was written for Ollama.

    Attributes:
        template: whether a TEMPLATE was derived.
        compared: how many conversations llama.cpp itself writes as that TEMPLATE does; None: it was not run.
    """

    folder: Path
    gguf: ExportReport
    template: bool
    stops: list[str]
    num_ctx: int | None
    notes: list[str] = field(default_factory=list)
    compared: int | None = None

    def summary(self) -> str:
        """A few lines for a terminal, with the command that comes next."""
        template = "derived from the chat template" if self.template else "left to Ollama"
        if self.compared:
            template += f" (llama.cpp writes {self.compared} conversations the same)"
        written = (
            f"wrote {self.folder / MODELFILE}: template {template}, stop "
            f"{', '.join(map(repr, self.stops)) or 'none'}, num_ctx {self.num_ctx}"
        )
        notes = [wrap(f"note: {note}") for note in self.notes]
        command = shlex.join(["ollama", "create", "NAME", "-f", str(self.folder / MODELFILE)])
        return "\n".join([self.gguf.summary(), wrap(written), *notes, f"next: {command}"])


def export_ollama(options: ExportOptions) -> OllamaReport:
    """Writes a folder with `model.gguf` and `Modelfile`.

    Raises:
        OutputError: the folder holds something and `overwrite` is False, or what no export wrote.
        As `export_gguf`.
    """
    source, output = options.source, options.output
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; an Ollama export is a folder.", "Choose another with -o.")
    if is_adapter(source):
        adapter = AdapterFolder(source)
        config_folder = adapter.base_folder(options.base, same_rounding=False)
        tokenizer = adapter.tokenizer(config_folder)
    else:
        config_folder, tokenizer = resolve_folder(source), load_tokenizer(source)
    config = read_text_config(config_folder)
    length = options.num_ctx or config.get("max_position_embeddings")
    with finished_folder(
        output, mark=MODELFILE, overwrite=options.overwrite, sources=(source, config_folder), written=_files_of_export
    ) as folder:
        made = export_gguf(replace(options, to="gguf", output=folder / MODEL_FILE))
        gguf = replace(made, path=output / made.path.name)
        template, reason = derive_template(tokenizer, adds_bos=gguf.check.adds_bos)
        compared, difference = None, []
        if template is not None and gguf.run.ran:
            compared, difference = compare_with_llama_cpp(made.path, template)
        text = f"{WRITTEN}\n{modelfile(gguf.path.name, template, gguf.stops, length)}"
        write_atomically(folder / MODELFILE, text)
    notes = _notes(tokenizer, template, reason, config, length) + difference
    return OllamaReport(output, gguf, template is not None, gguf.stops, length, notes, compared)


def compare_with_llama_cpp(path: Path, template: ChatPieces) -> tuple[int, list[str]]:
    """How many conversations llama.cpp writes from the GGUF's chat template as the derived template does; a note on the
    first that it writes otherwise."""
    talks = [talk for talk in _conversations("system" in template.turns) if talk[-1]["role"] == "user"]
    with LlamaServer(path, context=CONTEXT) as server:
        for number, talk in enumerate(talks):
            expected = template.render(talk, opened=True)
            try:
                written = server.apply_template(talk)
            except ExportError as error:
                written = error.what
            if written != expected:
                note = f"llama.cpp, which reads the chat template in the GGUF, writes {written!r} and not {expected!r}"
                return number, [f"{note}: Ollama writes the second, as training did"]
    return len(talks), []


def _files_of_export(folder: Path) -> list[str]:
    """Names of the files that an export wrote into a folder, by its Modelfile; none where that is another's."""
    lines = (folder / MODELFILE).read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] != [WRITTEN]:
        return []
    return [MODELFILE, *(line.removeprefix("FROM ./") for line in lines if line.startswith("FROM ./"))]


def _notes(
    tokenizer: PreTrainedTokenizerBase, template: ChatPieces | None, reason: str, config: dict, length: int | None
) -> list[str]:
    """What the user should know of the template and of the memory that the context takes."""
    notes = []
    if template is None:
        notes.append(f"{reason}: TEMPLATE is left to Ollama, which reads the chat template in the GGUF")
    elif "system" not in template.turns:
        notes.append("the chat template has no system turn of its own, so Ollama will leave SYSTEM messages out")
    if template is not None and "strftime_now" in str(tokenizer.chat_template):
        notes.append("the chat template writes the current date; the Modelfile keeps the date of this export")
    cache = _cache_bytes(config, length or 0)
    if cache > LARGE_CACHE:
        notes.append(
            f"a context of {length} tokens takes {cache / 1e9:.0f} GB of cache beside the model: lower num_ctx if that "
            "is too much"
        )
    return notes


def modelfile(model: str, template: ChatPieces | None, stops: list[str], num_ctx: int | None) -> str:
    """The Modelfile's text."""
    lines = [f"FROM ./{model}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template.go_template()}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if num_ctx:
        lines.append(f"PARAMETER num_ctx {num_ctx}")
    return "\n".join(lines) + "\n"


def _cache_bytes(config: dict[str, Any], length: int) -> float:
    """Of keys and values in float16."""
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return 4.0 * length * config.get("num_hidden_layers", 0) * (config.get("num_key_value_heads") or heads) * width


def derive_template(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool) -> tuple[ChatPieces | None, str]:
    """The pieces of a tokenizer's chat template, or None and the reason why it has no such pieces.

    Args:
        tokenizer: with or without a chat template.
        adds_bos: llama.cpp writes the beginning-of-sequence token itself, so the pieces must not.
    """
    bos = tokenizer.bos_token if adds_bos else None

    def render_here(messages: Messages, opened: bool) -> str | None:
        text = render(tokenizer, messages, opened=opened)
        return text.removeprefix(bos) if text is not None and bos else text

    if tokenizer.chat_template is None:
        return None, "the model has no chat template"
    for derive, opened in ((_from_conversations, (False, True)), (_from_prompts, (True,))):
        pieces = derive(render_here)
        if pieces is not None and _renders_the_same(pieces, render_here, opened):
            if '"""' in pieces.go_template():
                return None, 'the chat template contains """'
            return pieces, ""
    return None, "the chat template does not write one turn after the other"


def _renders_the_same(pieces: ChatPieces, render: Render, opened: tuple[bool, ...]) -> bool:
    """Whether the pieces render conversations as the chat template does.

    Args:
        opened: whether the generation prompt follows: never, always, or both are tried. With it alone, conversations
            end with a user's turn.
    """
    conversations = _conversations("system" in pieces.turns)
    if opened == (True,):
        conversations = [messages for messages in conversations if messages[-1]["role"] == "user"]
    return all(
        render(messages, last) == pieces.render(messages, opened=last) for messages in conversations for last in opened
    )


def _from_conversations(render: Render) -> ChatPieces | None:
    """The pieces, by what each turn adds to the text of the turns before it."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    one, two = render([user], False), render([user, answer], False)
    three, opened = render([user, answer, user], False), render([user], True)
    if None in (one, two, three, opened) or not (two.startswith(one) and three.startswith(two)):
        return None
    again = three[len(two) :]  # a user turn that is not the first, so without the head
    if not opened.startswith(one) or not one.endswith(again) or USER not in again or ANSWER not in two[len(one) :]:
        return None
    before_user, _, after_user = again.partition(USER)
    before_answer, _, after_answer = two[len(one) :].partition(ANSWER)
    turns = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    both = render([{"role": "system", "content": SYSTEM}, user], False)
    return _with_system(one[: len(one) - len(again)], turns, opened[len(one) :], both, again)


def _from_prompts(render: Render) -> ChatPieces | None:
    """The pieces, by conversations that end with a user's turn and the generation prompt: Ollama renders no others.

    Some templates end or trim a conversation in another way where no generation prompt follows. What stands between two
    turns may be counted to either.
    """
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    one, three = render([user], True), render([user, answer, user], True)
    if one is None or three is None or one.count(USER) != 1 or three.count(ANSWER) != 1:
        return None
    start, _, opening = one.partition(USER)
    if not (three.startswith(start + USER) and three.endswith(USER + opening)):
        return None
    before_answer, _, between = three[len(start + USER) : -len(USER + opening)].partition(ANSWER)
    before_user = os.path.commonprefix([start[::-1], between[::-1]])[::-1]
    turns = {"user": (before_user, ""), "assistant": (before_answer, between.removesuffix(before_user))}
    both = render([{"role": "system", "content": SYSTEM}, user], True)
    return _with_system(start.removesuffix(before_user), turns, opening, both, before_user + USER + opening)


def _with_system(head: str, turns: dict[str, tuple[str, str]], opening: str, both: str | None, rest: str) -> ChatPieces:
    """The pieces, with a system turn if the template has one.

    Args:
        both: the text of a system turn followed by a user's; None: the template refuses it.
        rest: the end of that text, without the system turn.
    """
    default = ""
    if both is not None and SYSTEM in both and both.endswith(rest):
        before, _, after = both.removesuffix(rest).partition(SYSTEM)
        if not before.startswith(head):
            # Without a system turn, the template writes one of its own.
            head, default = "", head
        turns = {"system": (before.removeprefix(head), after)} | turns
    return ChatPieces(head, default, turns, opening)


def _conversations(with_system: bool) -> list[Messages]:
    talk = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4. Anything else?"},
        {"role": "user", "content": "Line one\nline two"},
        {"role": "assistant", "content": "ünïcödé 🙂 {{ braces }}"},
        {"role": "user", "content": "bye"},
    ]
    system = {"role": "system", "content": "Be brief."}
    conversations = [talk[:1], talk[:2], talk[:3], talk]
    return conversations + ([[system, *some] for some in conversations] if with_system else [])
