"""What a model is shown in a chat and what becomes of its answer: prompts as in training, greedy as model.generate."""

import pytest
import torch
from byte_tokenizers import CHATML, LLAMA3, MARKED, byte_tokenizer
from exporting import make_adapter
from peft import PeftModel
from transformers import GenerationConfig

from qpsft.chat.conversation import BASE, TUNED, Conversation, _Stream
from qpsft.data.shapes import Rows
from qpsft.data.tokenize import encode_prompt, tokenize_rows
from qpsft.errors import DataError
from qpsft.evaluate.model import load_evaluated
from qpsft.model.base import load_base
from qpsft.model.generation import generate
from qpsft.recipe.arguments import DataArguments

QUESTION = "add one, then sort, then rotate, then swap halves: 0259"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """An adapter that changes what the embedded base says."""
    return load_evaluated(str(make_adapter(tmp_path_factory.mktemp("chat") / "adapter", size=0.15)))


@pytest.fixture
def plain(stories):
    """A model without a chat template."""
    return load_base(stories, quantization="none", verbose=False)


def by_generate(model, tokenizer, messages, tokens=24) -> str:
    """The reference: transformers' own generate on the template's own ids."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- prompts ----


@pytest.mark.parametrize("format", ["{prompt}", "Question: {prompt}\nAnswer: "])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("use", ["auto", "never"])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, MARKED], ids=["none", "chatml", "llama3", "marked"])
def test_a_prompt_is_what_stood_before_the_answer_in_training(template, use, bos, format):
    tokenizer = byte_tokenizer(template, bos=bos)
    arguments = DataArguments(use_chat_template=use, prompt_format=format)
    rows = Rows("x", "prompt_completion", [{"prompt": "1+1=?", "completion": "two"}], ["row 1"], [])
    (row,) = tokenize_rows(rows, tokenizer, arguments, None).dataset
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    prompt = encode_prompt([user("1+1=?")], tokenizer, arguments)
    assert prompt == row["input_ids"][:start] and len(prompt) >= len(format) - len("{prompt}") + 5


def test_a_prompt_does_not_end_where_the_tokenizer_ends_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a")["input_ids"][-1] == 1
    assert encode_prompt([user("a")], tokenizer, DataArguments())[-1] != 1


def test_of_a_conversation_in_plain_text_only_the_last_turn_counts():
    tokenizer = byte_tokenizer(bos=True)
    arguments = DataArguments(prompt_format="Q: {prompt}\n")
    one = encode_prompt([user("b")], tokenizer, arguments)
    assert encode_prompt([user("a"), assistant("x"), user("b")], tokenizer, arguments) == one
    assert tokenizer.decode(one) == "<s>Q: b\n"


def test_a_format_goes_around_every_user_turn_of_a_chat():
    tokenizer = byte_tokenizer(CHATML)
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("x"), user("b")]
    text = tokenizer.decode(encode_prompt(messages, tokenizer, DataArguments(prompt_format="<{prompt}>")))
    assert text.endswith("user\n<a><|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n<b><|im_end|>\n"
                         "<|im_start|>assistant\n")  # fmt: skip
    assert text.startswith("<|im_start|>system\ns<|im_end|>")


# ---- answers ----


def test_greedy_answers_are_those_of_generate(loaded):
    model, tokenizer = loaded
    chat = Conversation(model, tokenizer, max_new_tokens=24)
    messages = []
    for text in (QUESTION, "reverse: 1234"):
        chat.say(text)
        messages.append(user(text))
        assert chat.answer() == by_generate(model, tokenizer, messages)
        messages.append(assistant(chat.turns[-1].answers[TUNED]))
    alone, _ = load_base("demo", verbose=False)
    chat.reset()
    chat.say(QUESTION)
    base, tuned = chat.answer(BASE), chat.answer(TUNED)
    assert base == by_generate(alone, tokenizer, [user(QUESTION)]) and base != tuned
    assert tuned == by_generate(model, tokenizer, [user(QUESTION)])
    assert not any(p.requires_grad and "lora" not in name for name, p in model.named_parameters())


def test_the_bases_generation_settings_change_no_answer(loaded):
    """Qwen2.5-Instruct ships a repetition penalty and a top_k: with them, the likeliest token is not what is taken."""
    model, tokenizer = loaded
    chat = Conversation(model, tokenizer, max_new_tokens=24)
    draws = Conversation(model, tokenizer, max_new_tokens=24, temperature=1.5)
    for one in (chat, draws):
        one.say(QUESTION)
    drawn = draws.answer()
    own = model.get_base_model().generation_config
    shipped = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [5], "min_new_tokens": 24}
    model.get_base_model().generation_config = GenerationConfig(top_k=1, temperature=0.1, **shipped)
    try:
        assert by_generate(model, tokenizer, [user(QUESTION)]) != chat.answer()  # they do change generate's
        prompt, _ = chat._prompt(TUNED)
        (written,) = generate(model, [prompt], stop_ids=chat._stops, max_new_tokens=24)
        assert chat.answer() == tokenizer.decode(written.greedy.token_ids, skip_special_tokens=True)
        assert draws.answer() == drawn
        kept = model.get_base_model().generation_config
        assert kept.top_k == 1 and shipped.items() <= kept.to_dict().items()
    finally:
        model.get_base_model().generation_config = own


def test_each_speaker_sees_its_own_answers_and_the_others_where_it_gave_none(loaded):
    model, tokenizer = loaded
    chat = Conversation(model, tokenizer, max_new_tokens=40)
    chat.say("one")
    chat.turns[0].answers = {BASE: "from the base", TUNED: "from the adapter"}
    chat.say("two")
    chat.turns[1].answers = {TUNED: "adapter again"}
    chat.say("three")
    start, end = [user("one")], [user("two"), assistant("adapter again"), user("three")]
    assert chat._messages(BASE, 0) == [*start, assistant("from the base"), *end]
    assert chat._messages(TUNED, 0) == [*start, assistant("from the adapter"), *end]
    chat.take_back()
    assert [turn.user for turn in chat.turns] == ["one", "two"]


def test_draws_depend_on_the_seed_and_on_nothing_else(loaded):
    model, tokenizer = loaded

    def drawn(seed, **options):
        chat = Conversation(model, tokenizer, temperature=1.5, seed=seed, max_new_tokens=12, **options)
        chat.say(QUESTION)
        return chat.answer()

    torch.manual_seed(5)
    first, state = drawn(0), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # a caller's own stream goes on
    torch.manual_seed(6)
    assert drawn(0) == first and len({drawn(seed) for seed in (1, 2)}) == 2
    greedy = Conversation(model, tokenizer, max_new_tokens=12)
    greedy.say(QUESTION)
    assert drawn(0, top_p=1e-6) == greedy.answer() != first


def test_a_draw_may_be_any_token(loaded, monkeypatch):
    """transformers leaves only the 50 likeliest unless told otherwise."""
    model, tokenizer = loaded
    shown = []
    monkeypatch.setattr(_Stream, "put", lambda self, value: shown.append(value.flatten()))
    for seed in range(4):
        chat = Conversation(model, tokenizer, temperature=1e4, seed=seed, max_new_tokens=1)
        chat.say(QUESTION)
        chat.answer()
    prompts, drawn = shown[::2], torch.cat(shown[1::2])
    with torch.no_grad():
        logits = model(prompts[0].unsqueeze(0)).logits[0, -1]
    assert (logits > logits[drawn].unsqueeze(1)).sum(1).max() >= 50


def test_it_stops_where_training_ended_answers_whatever_the_base_says(loaded):
    model, tokenizer = loaded
    settings = model.get_base_model().generation_config
    before, settings.eos_token_id = settings.eos_token_id, None
    try:
        chat = Conversation(model, tokenizer, max_new_tokens=200)
        chat.say("reverse: 1234")
        text = chat.answer(BASE)
    finally:
        settings.eos_token_id = before
    assert text == "4321"


def test_text_comes_in_pieces_that_are_the_answer(loaded):
    model, tokenizer = loaded
    chat = Conversation(model, tokenizer, max_new_tokens=40)
    chat.say(QUESTION)
    pieces = []
    assert chat.answer(write=pieces.append) == "".join(pieces) and len(pieces) > 5


def test_characters_of_several_tokens_come_whole_and_lines_keep_their_spaces(stories):
    for tokenizer in (byte_tokenizer(), load_base(stories, quantization="none", verbose=False)[1]):
        text = "a ü🙂\n  indented\n\tx\N{REPLACEMENT CHARACTER}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = []
        stream = _Stream(tokenizer, pieces.append)
        stream.put(torch.tensor([[7, 8, 9]]))
        for token in ids:
            stream.put(torch.tensor([token]))
        stream.end()
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) == stream.text == whole and "  indented" in whole
        assert sum("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) == 1


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(loaded):
    chat = Conversation(*loaded, max_new_tokens=40)
    chat.say(QUESTION)
    seen = []

    def write(text):
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer(write=write)
    assert chat.turns[-1].answers == {TUNED: "".join(seen)}
    chat.say("reverse: 1234")  # and the model is as it was
    assert chat.answer(BASE)


# ---- the model's length ----


def test_the_oldest_turns_make_room_and_the_system_turn_stays(loaded):
    model, tokenizer = loaded
    chat = Conversation(model, tokenizer, system="be brief", max_new_tokens=8)
    counts = []
    for number in range(12):
        chat.say(f"{number}: " + "9" * 60)
        chat.answer()
        counts.append(chat.left_out)
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] >= 3
    ids, room = chat._prompt(TUNED)
    text = tokenizer.decode(ids)
    assert len(ids) + 8 <= chat.limit == 512 and room == 8
    assert text.startswith("<s><|system|>be brief<|end|><|user|>") and text.count("<|user|>") == 12 - counts[-1]
    assert "<|user|>11: " in text and "<|user|>0: " not in text
    # One turn more would have been too much.
    longer = encode_prompt(chat._messages(TUNED, counts[-1] - 1), tokenizer, chat.arguments)
    assert len(longer) + 8 > chat.limit


def test_a_long_turn_gets_what_room_is_left_and_one_too_long_is_refused(loaded):
    chat = Conversation(*loaded, max_new_tokens=400)
    chat.say("9" * 450)
    ids, room = chat._prompt(TUNED)
    assert room == 512 - len(ids) < 100
    chat.answer()
    chat.take_back()
    chat.say("9" * 600)
    with pytest.raises(DataError, match="This turn alone is 60. tokens long, and the model takes 512"):
        chat.answer()


# ---- models without a chat template ----


def test_plain_prompts_are_answered_one_by_one(plain):
    model, tokenizer = plain
    chat = Conversation(model, tokenizer, DataArguments(prompt_format="{prompt}, there was"), max_new_tokens=12)
    assert not chat.as_chat and chat.speakers == (TUNED,)
    for text in ("Once upon a time", "One day"):
        chat.say(text)
        ids = tokenizer(f"{text}, there was", return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert chat.answer() == tokenizer.decode(written, skip_special_tokens=True)


def test_a_system_turn_needs_a_template(plain):
    with pytest.raises(DataError, match="needs a chat template"):
        Conversation(*plain, system="x")


def test_a_template_that_refuses_a_system_turn_says_so_at_once(loaded):
    model, tokenizer = loaded
    own = tokenizer.chat_template
    tokenizer.chat_template = own.replace("elif message['role'] == 'system'", "elif message['role'] == 'no'")
    try:
        with pytest.raises(DataError, match="refuses this conversation: Unknown role: system"):
            Conversation(model, tokenizer, system="x")
    finally:
        tokenizer.chat_template = own


def test_a_model_loaded_by_peft_alone_works_too(loaded, tmp_path):
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base("demo", verbose=False)[0], tmp_path).eval()
    answers = []
    for one in (model, again):
        chat = Conversation(one, tokenizer, max_new_tokens=30)
        chat.say(QUESTION)
        answers.append(chat.answer())
    assert answers[0] == answers[1]
