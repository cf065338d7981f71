"""Do the tokenizers of two model folders make the same tokens, and do both folders stop at the same ones?"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qpsft.data.ending import end_of_turn
from qpsft.errors import BaseModelError
from qpsft.files import read_object
from qpsft.model.folder import CONFIG_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With and without a system turn, with two turns of a user, and with an assistant's turn at the end.
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": "  spaces,\nlines and ünïcödé 🙂  "},
    ],
    [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 2 3"}],
)


def template_difference(trained: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> str | None:
    """The first conversation that the two chat templates turn into other tokens, in words; None when they agree.

    A conversation that both templates refuse, such as one with a system turn, counts as agreement.
    """
    if (trained.chat_template is None) != (exported.chat_template is None):
        return f"the chat template is {'missing' if exported.chat_template is None else 'new'} in the export"
    if trained.chat_template is None:
        return None
    for number, conversation in enumerate(CONVERSATIONS, 1):
        for opened in (False, True):
            expected, actual = (_rendered_ids(tokenizer, conversation, opened) for tokenizer in (trained, exported))
            if expected != actual:
                return (
                    f"the chat template renders conversation {number} differently: {first_difference(expected, actual)}"
                )
    return None


def tokens_difference(
    trained: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase, texts: list[str]
) -> str | None:
    """The first text of which the two tokenizers make other tokens, in words; None when they agree on all."""
    for text in texts:
        expected, actual = (tokenizer(text, verbose=False)["input_ids"] for tokenizer in (trained, exported))
        if expected != actual:
            return f"the tokenizer makes other tokens of {text!r}: {first_difference(expected, actual)}"
    return None


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], *, opened: bool) -> str | None:
    """A conversation as the chat template writes it, with the generation prompt if `opened`.

    None where the template refuses it, as many refuse a system turn.
    """
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=opened, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return None


def _rendered_ids(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], opened: bool
) -> list[int] | None:
    text = render(tokenizer, conversation, opened=opened)
    return None if text is None else tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_difference(expected: list[int] | None, actual: list[int] | None) -> str:
    """Where two lists of tokens begin to differ, in words; None is a conversation that the template refuses."""
    if expected is None or actual is None:
        return f"{'the trained' if expected is None else 'the exported'} one refuses it"
    place = next(i for i, (a, b) in enumerate(zip_longest(expected, actual)) if a != b)
    return f"at token {place}, {expected[place : place + 8]} became {actual[place : place + 8]}"


def all_stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """`stop_tokens`, and the end of turn that the chat template writes, whether or not the settings name it."""
    return stop_tokens(folder, tokenizer) | end_of_turn(tokenizer)


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids at which generation with this folder stops: generation_config.json's, else config.json's, and the eos."""
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        settings = read_object(path, BaseModelError, "Copy it again.", CONFIG_TYPES) if path.is_file() else {}
        value: Any = settings.get("eos_token_id")
        if value is not None:
            stops = set(value if isinstance(value, list) else [value])
            break
    return stops | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def stops_difference(trained: set[int], exported: set[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the two sets of stop tokens do not share, in words; None when they are equal."""
    if trained == exported:
        return None
    parts = []
    for what, ids in (("lacks", trained - exported), ("adds", exported - trained)):
        if ids:
            parts.append(f"{what} {', '.join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ids))}")
    return f"the export {' and '.join(parts)} as a stop token"
