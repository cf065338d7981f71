"""A conversation with a GGUF file: llama.cpp writes the prompts, answers and stops, as where the file is shipped to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpsft.chat.conversation import TUNED, Turns
from qpsft.errors import DataError, ExportError
from qpsft.model.llama_server import LlamaServer, has_chat_template
from qpsft.recipe.arguments import DataArguments


class GgufConversation(Turns):
    """A conversation with a file that llama.cpp has loaded.

    Args:
        server: of the file.
        arguments, options: as `Turns`. Without a chat template in the file, each line is a prompt of its own.

    Raises:
        DataError: a system turn, or use_chat_template: always, where there is no chat template.
    """

    def __init__(self, server: LlamaServer, arguments: DataArguments, **options: Any):
        self.server = server
        there = has_chat_template(server.path)
        if arguments.use_chat_template == "always" and not there:
            raise DataError(f"{server.path} has no chat template.", "Leave --use_chat_template out.")
        self.as_chat = there and arguments.use_chat_template != "never"
        super().__init__(arguments, **options)
        self.limit = server.settings()["default_generation_settings"]["n_ctx"]
        self.encode([*self.system, {"role": "user", "content": "?"}])

    def encode(self, messages: list[dict]) -> list[int]:
        """As `Turns.encode`. Raises DataError where the chat template refuses the conversation."""
        messages = [
            m | {"content": self.arguments.prompt_format.replace("{prompt}", m["content"])}
            if m["role"] == "user"
            else m
            for m in messages
        ]
        try:
            text = self.server.apply_template(messages) if self.as_chat else messages[-1]["content"]
        except ExportError as error:
            raise DataError(error.what, error.todo) from error
        return self.server.tokenize(text, start=True)

    def answer(self, speaker: str = TUNED, write: Callable[[str], None] | None = None) -> str:
        ids, room = self._prompt(speaker)
        # no sampler but those asked for
        options = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
        }
        text = ""
        try:
            for piece in self.server.stream(ids, n_predict=room, seed=self.seed + len(self.turns) - 1, **options):
                text += piece["content"]
                if piece["content"] and write is not None:
                    write(piece["content"])
        finally:
            self.turns[-1].answers[speaker] = text
        return text
