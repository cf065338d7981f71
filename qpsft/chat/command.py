"""`qpsft chat`: its flags."""

from __future__ import annotations

from collections.abc import Sequence

from qpsft.chat.options import ChatOptions
from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Talk to an adapter on its 4-bit base, to a merged model, to a GGUF file (llama.cpp runs it), or to any model, in "
    "the terminal or through a pipe (`echo hi | qpsft chat runs/mine`: every line is answered). Prompts are written as "
    "in training; of a GGUF, as the file says. /base answers with the adapter off, /tuned with it, /both with both, "
    "one below the other; /reset, /help, /quit."
)


def chat(argv: Sequence[str]) -> int:
    """`qpsft chat`. Returns the exit code of the conversation."""
    options = parse(Parser("qpsft chat", "MODEL [options]", DESCRIPTION), argv, ChatOptions)
    quiet_libraries()
    from qpsft.chat.session import chat as talk
    from qpsft.model.stated_record import state_record

    state_record(options.model, options)
    return talk(options)
