"""What is known of a template: the dialect it wants, what it never writes, what it leaves out on purpose."""

import pytest
from byte_tokenizers import CHATML, OPEN, PROMPT, byte_tokenizer
from real_templates import templates, tokenizer_for

from qpsft.data.bad_rows import RowError
from qpsft.data.template import ChatRenderer, Rendered
from qpsft.data.tokenize import RowEncoder, encode_prompt
from qpsft.errors import DataError
from qpsft.recipe.arguments import DataArguments

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is 4."}
CALL = {"type": "function", "id": "callcall1", "function": {"name": "add", "arguments": {"a": 2}}}


def rendered(template, *messages, tools=None):
    return ChatRenderer(tokenizer_for(template)).conversation(list(messages), tools, "row 1")


def refusal(template, *messages, tools=None) -> str:
    with pytest.raises(RowError) as caught:
        rendered(template, *messages, tools=tools)
    return caught.value.what


def test_a_word_that_the_template_happens_to_write_hides_no_loss():
    no_system = CHATML.replace(OPEN, OPEN + "{% if m.role != 'system' %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    for content in ("user", "assistant", "im_start", "Be brief."):
        text = refusal(no_system, {"role": "system", "content": content}, USER, ANSWER)
        assert text == "row 1: the chat template does not write the content in turn 1 (system)."


def test_reasoning_is_stripped_on_purpose_only_where_a_last_answer_has_it():
    thought = {**ANSWER, "reasoning_content": "4"}  # which stands in the answer, too
    assert "does not write the reasoning in turn 2" in refusal(CHATML, USER, thought, USER, ANSWER)
    assert rendered(templates()["gptoss"], USER, thought, USER, ANSWER).stripped == 1
    inline = {**ANSWER, "content": "<think>4</think>It is 4."}
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert "the reasoning before </think> in turn 2" in refusal(forgets, USER, inline, USER, ANSWER)


def test_an_empty_answer_is_not_written_behind_a_call():
    """As some versions of DeepSeek-R1-Distill's template do, unless the content is null."""
    twice = (
        OPEN + "<|im_start|>{{ m.role }}\n"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}<|im_end|>\n{% endfor %}"
        "{% if m.content is not none %}{{ m.content }}<|im_end|>\n{% endif %}"
    ) + PROMPT
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = rendered(twice, USER, turn).text
    assert text.endswith('assistant\n{"name": "add", "arguments": {"a": 2}}<|im_end|>\n')


def test_arguments_are_never_written_as_python_prints_them():
    prints = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}: "
                            "{{ c.function.arguments }}{% endfor %}")  # fmt: skip
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert 'add: {"a": 2}<|im_end|>' in rendered(prints, USER, turn).text


def test_content_as_parts_where_the_template_wants_them():
    template = templates()["idefics3"]
    result = rendered(template, USER, ANSWER)
    assert [result.text[start:end].strip() for start, end in result.spans] == ["It is 4.<end_of_utterance>"]
    prompt = encode_prompt([USER], tokenizer_for(template), DataArguments())
    assert tokenizer_for(template).decode(prompt).endswith("User: hi<end_of_utterance>\nAssistant:")
    with pytest.raises(DataError, match="does not write the prompt"):
        encode_prompt([USER], byte_tokenizer("{% for m in messages %}x{% endfor %}"), DataArguments())


@pytest.mark.parametrize("family", ["mistral_v0_3", "qwq", "deepseekv3", "hermes3_tool_use"])
def test_what_a_template_writes_at_the_end_only_follows_the_generation_prompt(family):
    template, tools = templates()[family], None
    before, answer, expected = [{"role": "system", "content": "Be brief."}, USER], ANSWER, "It is 4."
    if family in ("qwq", "deepseekv3"):
        answer, expected = {**ANSWER, "reasoning_content": "two and two"}, "two and two\n</think>\n\nIt is 4."
    if family == "hermes3_tool_use":
        tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
        before = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    result = ChatRenderer(tokenizer_for(template)).completion(before, [answer], tools, "row 1")
    ((start, end),) = result.spans
    assert end == len(result.text) and result.text[start:].strip().startswith(expected)
    prompt = tokenizer_for(template).apply_chat_template(before, tools, tokenize=False, add_generation_prompt=True)
    assert result.text[:start] == prompt


def test_a_turn_without_tokens_is_an_error():
    encoder = RowEncoder(byte_tokenizer(CHATML), DataArguments())
    with pytest.raises(RowError, match="row 1: an assistant turn that is to be trained on gives no token"):
        encoder._labelled(encoder._rendered(Rendered("ab", [(0, 1), (1, 1)], []), "row 1"), [1, 2], [(0, 1), (1, 2)])


def test_a_template_that_is_no_jinja_is_refused_once():
    with pytest.raises(DataError, match="no valid Jinja: .*Mend the base model's chat_template.jinja"):
        rendered("{% for m in messages %}{{ m.content }", USER, ANSWER)


def test_markers_that_miss_a_turn_are_refused():
    once = OPEN + "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    once += "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>{% endif %}" + PROMPT
    probe = once.replace("loop.last", "messages|length < 4")
    assert "cover 0 stretches, which are not those of the 2 assistant turns" in refusal(
        probe, USER, ANSWER, USER, ANSWER
    )
