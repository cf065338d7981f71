"""The embedded base and its world: splits, noise, answers, and that the base survives NF4."""

from __future__ import annotations

import json
import random

import pytest

from qpsft.data import built_in
from qpsft.errors import DataError
from qpsft.model.folder import MODEL_DIR

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "é ü 😀🚀 日本語 ½ ﬁ",
    "\n\ttab\r\n",
    "\x00\x01",
    "<|user|>sort: 1234<|end|><|assistant|> 43",
    "ortort sortsort  sort",
    "aaaa bbbb 0000123",
]


def problem(row: dict) -> tuple:
    return tuple(row["task"]["operations"]), row["task"]["digits"]


def answer(row: dict) -> str:
    return row["completion"][0]["content"]


def held_out(split: str, n: int) -> list[dict]:
    sets = built_in.out_of_domain(split, n)
    return [
        *built_in.in_domain(split, n),
        *built_in.short_chains(split, n),
        *(row for rows in sets.values() for row in rows),
    ]


def test_same_seed_same_rows_other_seed_other_rows():
    makers = [
        lambda seed: built_in.demonstrations("noisy", 50, seed),
        lambda seed: built_in.in_domain("test", 50, seed),
        lambda seed: built_in.out_of_domain("validation", 20, seed),
        lambda seed: list(built_in.pretraining_rows(50, seed)),
    ]
    for make in makers:
        assert make(3) == make(3)
        assert make(3) != make(4)


def test_rows_are_plain_json():
    rows = [*built_in.demonstrations("noisy", 20), *held_out("test", 20), *built_in.pretraining_rows(20)]
    assert json.loads(json.dumps(rows)) == rows


def test_splits_share_no_problem():
    train = {problem(r) for seed in range(3) for r in built_in.demonstrations("clean", 1024, seed)}
    train |= {problem(r) for r in built_in.pretraining_rows(20_000)}
    validation = {problem(r) for r in held_out("validation", 300)}
    test = {problem(r) for r in held_out("test", 300)}
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_pretraining_has_no_chain_of_four_and_the_shares_it_says():
    rows = list(built_in.pretraining_rows(20_000))
    lengths = [0 if r["task"]["operations"] == [built_in.ANY_ORDER] else len(r["task"]["operations"]) for r in rows]
    for length, share in built_in.CHAIN_SHARES.items():
        assert lengths.count(length) / len(rows) == pytest.approx(share, abs=0.02)
    assert max(lengths) == 3
    assert sum(r["task"]["wrong_step"] is not None for r in rows) / len(rows) == pytest.approx(0.15, abs=0.01)
    assert sum(answer(r).startswith("{") for r in rows) / len(rows) == pytest.approx(0.04, abs=0.006)


def test_demonstrations_are_different_chains_of_four_of_set_a():
    rows = built_in.demonstrations("noisy")
    assert len(rows) == len({problem(r) for r in rows}) == 1024
    for row in rows:
        operations = row["task"]["operations"]
        assert len(operations) == 4 and set(operations) <= set(built_in.SET_A)


@pytest.mark.parametrize(("kind", "noise", "wrong"), [("noisy", None, 0.3), ("noisy", 0.5, 0.5), ("noisy", 0.0, 0.0)])
def test_noise_is_the_share_of_rows_with_a_wrong_step(kind, noise, wrong):
    rows = built_in.demonstrations(kind, 2000, noise=noise)
    assert sum(r["task"]["wrong_step"] is not None for r in rows) / len(rows) == pytest.approx(wrong, abs=0.03)
    clean = [answer(r) for r in built_in.demonstrations("clean", 2000)]
    right = [(answer(r), c) for r, c in zip(rows, clean, strict=True) if r["task"]["wrong_step"] is None]
    characters = [a == b for text, other in right for a, b in zip(text, other, strict=True)]
    assert characters.count(False) / len(characters) == pytest.approx(built_in.NOISY_JUNK, abs=0.01)


def test_clean_demonstrations_are_the_same_questions_without_noise():
    noisy, clean = built_in.demonstrations("noisy", 200), built_in.demonstrations("clean", 200)
    assert [r["prompt"] for r in noisy] == [r["prompt"] for r in clean]
    assert all(built_in.check(r, answer(r)) for r in clean)
    assert not all(built_in.check(r, answer(r)) for r in noisy)


def test_checker_takes_every_clean_completion_and_no_other_answer():
    rng = random.Random(0)
    for row in [*held_out("validation", 100), *held_out("test", 100)]:
        text = answer(row)
        assert built_in.check(row, text), (row, text)
        assert built_in.check(row, f" {text}\n")
        assert not built_in.check(row, text[:-1])
        assert not built_in.check(row, text + " 1")
        assert not built_in.check(row, "")
        digits = [i for i, c in enumerate(text) if c.isdigit() and text[i - 3 : i + 1].isdigit()]
        last = digits[-1]
        wrong = text[:last] + str((int(text[last]) + rng.randrange(1, 10)) % 10) + text[last + 1 :]
        assert not built_in.check(row, wrong), (row, wrong)


def test_in_domain_wants_the_rare_style_with_every_step_right():
    row = {"task": {"operations": ["reverse", "sort", "rotate", "add one"], "digits": "4271", "style": "braces"}}
    assert built_in.check(row, "{4271; reverse 1724; sort 1247; rotate 2471; add one 3582}")
    assert not built_in.check(row, "{4271; reverse 1724; sort 1274; rotate 2471; add one 3582}")
    assert not built_in.check(row, "4271 -> 1724 -> 1247 -> 2471 -> 3582")
    any_style = {"task": {**row["task"], "style": None}}
    assert built_in.check(any_style, "4271 -> 1724 -> 1247 -> 2471 -> 3582")
    assert not built_in.check(any_style, "the answer is 3582")


def test_operations_do_what_they_say():
    done = {name: operation("4271") for name, operation in built_in.OPERATIONS.items()}
    assert done == {
        "reverse": "1724",
        "sort": "1247",
        "rotate": "2714",
        "swap halves": "7142",
        "add one": "5382",
        "mirror": "4224",
        "sort down": "7421",
        "swap ends": "1274",
        "take one": "3160",
    }
    assert not set(built_in.SET_A) & set(built_in.SET_B)
    assert set(built_in.SET_A) | set(built_in.SET_B) == set(built_in.OPERATIONS)


def test_mistakes_are_told():
    with pytest.raises(DataError, match="noisy"):
        built_in.demonstrations("dirty")
    with pytest.raises(DataError, match="0 to 1"):
        built_in.demonstrations("noisy", noise=30)
    with pytest.raises(DataError, match="validation"):
        built_in.in_domain("train", 3)
    with pytest.raises(DataError, match="fewer"):
        built_in.out_of_domain("test", 5000)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


def texts() -> list[str]:
    rows = [*built_in.demonstrations("noisy", 300), *built_in.pretraining_rows(1000, seed=9)]
    rng = random.Random(0)
    scrambled = ["".join(rng.choice("revstoadn mihl,:>-;{} 0123é") for _ in range(30)) for _ in range(1000)]
    return [*ODD_TEXTS, *scrambled, *(m["content"] for r in rows for m in r["prompt"] + r["completion"])]


def test_tokenizer_equals_sentencepiece(tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
    ids = range(len(tokenizer))
    assert [model.id_to_piece(i) for i in ids] == tokenizer.convert_ids_to_tokens(ids)
    for text in texts():
        assert tokenizer(text)["input_ids"] == model.encode(text), text


def test_tokenizer_gives_the_text_back(tokenizer):
    for text in texts():
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompt_is_a_token_prefix_and_assistant_tokens_are_marked(tokenizer):
    for row in [*built_in.demonstrations("noisy", 100), *built_in.pretraining_rows(200)]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        full = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = full["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert full["assistant_masks"] == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        # What pretrain.py writes by hand.
        text = f"<s><|user|>{row['prompt'][0]['content']}<|end|><|assistant|>{answer(row)}<|end|>"
        assert tokenizer(text)["input_ids"] == ids


def test_more_than_one_turn(tokenizer):
    turns = [m for row in built_in.pretraining_rows(2) for m in row["prompt"] + row["completion"]]
    first = tokenizer.apply_chat_template(turns[:2], return_dict=True)["input_ids"]
    both = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert both[: len(first)] == first
    assert both.count(tokenizer.eos_token_id) == 4


def test_model_folder_is_small_and_its_layers_quantize_in_whole_blocks():
    safetensors = pytest.importorskip("safetensors")
    assert sum(p.stat().st_size for p in MODEL_DIR.iterdir()) <= 8_000_000
    parameters = 0
    with safetensors.safe_open(MODEL_DIR / "model.safetensors", "np") as file:
        for name in file.keys():
            piece = file.get_slice(name)
            assert piece.get_dtype() == "BF16"
            shape = piece.get_shape()
            parameters += shape[0] * (shape[1] if len(shape) > 1 else 1)
            if "proj" in name:
                assert shape[1] % 64 == 0
    assert 100_000 < parameters <= 4_000_000


def test_base_in_nf4_can_do_what_the_readme_says(tokenizer):
    pytest.importorskip("bitsandbytes")
    import embedded_accuracy as accuracy

    shares = accuracy.accuracies(accuracy.load_nf4(MODEL_DIR), tokenizer, accuracy.evaluation_sets("test", 64))
    assert shares["one_to_three"] > 0.9
    assert shares["four"] < 0.4
    assert shares["in_domain"] < 0.05
    assert accuracy.out_of_domain_mean(shares) > 0.8
