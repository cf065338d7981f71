"""Make the embedded base's tokenizer: SentencePiece BPE with byte fallback, and the same thing as `tokenizer.json`.

    python benchmarks/embedded_tokenizer.py FOLDER

`tokenizer.model` is what llama.cpp's converter reads; `tokenizer.json` is what transformers reads, so that using the
model needs no sentencepiece. Both give the same ids: no dummy prefix, no whitespace or Unicode normalization.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from qpsft.data import built_in
from qpsft.errors import BaseModelError, QpsftError

UNK, BOS, EOS, PAD = "<unk>", "<s>", "<|end|>", "<pad>"
ROLE_MARKERS = ("<|user|>", "<|assistant|>", "<|system|>")
PIECES = 384
CONTEXT = 512
ROWS = 20_000

# The markers carry no spaces or newlines: a turn's tokens are the same whether the next turn follows or not, so a
# rendered prompt is a token prefix of the rendered conversation.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'system' %}<|system|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_demo_tokenizer(folder: Path, seed: int = 0) -> None:
    """Write the embedded base's tokenizer, trained on rows of its world, into `folder`."""
    rows = built_in.pretraining_rows(ROWS, seed=seed)
    texts = (message["content"] for row in rows for message in row["prompt"] + row["completion"])
    make_tokenizer(texts, folder, CONTEXT)


def make_tokenizer(texts: Iterable[str], folder: Path, context: int) -> None:
    """Train on `texts` and write tokenizer.model, tokenizer.json and tokenizer_config.json into `folder`."""
    try:
        import sentencepiece
    except ImportError:
        raise BaseModelError(
            "Making the demo tokenizer needs the sentencepiece package.", "Run `pip install sentencepiece`."
        ) from None
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        unk_piece=UNK,
        bos_id=1,
        bos_piece=BOS,
        # The end-of-turn marker must be found in templated text: SentencePiece does that for user-defined symbols.
        eos_id=-1,
        pad_id=2,
        pad_piece=PAD,
        user_defined_symbols=[EOS, *ROLE_MARKERS],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    _write_fast_tokenizer([model.id_to_piece(i) for i in range(model.get_piece_size())], folder, context)


def _write_fast_tokenizer(pieces: list[str], folder: Path, context: int) -> None:
    """Write `pieces` (in id order, which is merge order) as tokenizer.json with its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {piece: index for index, piece in enumerate(pieces)}
    special = [UNK, BOS, PAD, EOS, *ROLE_MARKERS]
    learned = [p for p in pieces if p not in special and not (p.startswith("<0x") and p.endswith(">"))]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        # The name transformers 4 and 5 both know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # BOS comes from the chat template, here and in llama.cpp: added by one side only, it cannot be doubled.
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        # llama.cpp's converter reads from here which pieces of tokenizer.model are special.
        "added_tokens_decoder": {
            str(ids[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in special
        },
        "additional_special_tokens": list(ROLE_MARKERS),
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    """Parse the command line and make the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to write tokenizer.model and tokenizer.json into")
    parser.add_argument("--seed", type=int, default=0, help="of the rows it is trained on (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        make_demo_tokenizer(arguments.folder, arguments.seed)
    except QpsftError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
