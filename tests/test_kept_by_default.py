"""What a comparison measures out of domain if nothing is named: instructions to follow, and the base's own answers."""

import json
import shutil

import pytest
from comparing import write_recipe
from transformers import AutoTokenizer

from qpsft import cli
from qpsft.compare import compare, data
from qpsft.compare.arms import DEFAULT_ARMS
from qpsft.compare.comparison import default_arms, make_setting, prepare
from qpsft.compare.data import ANSWERED, REPLAYED
from qpsft.compare.measure import measure
from qpsft.compare.options import load_comparison
from qpsft.compare.run import load_setting
from qpsft.data.prompts import SHIPPED
from qpsft.data.tokenize import IGNORED
from qpsft.errors import DataError
from qpsft.evaluate.evaluation import evaluate
from qpsft.evaluate.rows import encode, instruction_checks
from qpsft.evaluate.verifiers import CHECKS, find_verifier, instructions
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.model.generation import generate, stop_tokens

END = "{% if m.role == 'assistant' %}{{ eos_token }}\n{% else %} {% endif %}"
TEMPLATE = "{% for m in messages %}{{ m.content }}" + END + "{% endfor %}"
FREE = [{"prompt": f"One day {n}", "completion": f"the cat {n} ran"} for n in range(40)]


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """What models write is cut off after a line or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SAMPLED_LENGTH", 32)
        patch.setattr("qpsft.compare.measure.MAX_NEW_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory, stories):
    """stories260K with a chat template: it answers with stories."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(stories, folder)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def setting(folder, base, *flags, **given):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FREE))
    text = f"model_name_or_path: {base}\ndataset_name: rows.jsonl\nmax_length: 128\nquantization: none\nlora_r: 4\n"
    text += "per_device_train_batch_size: 8\ngradient_accumulation_steps: 1\ngradient_checkpointing: false\n"
    recipe, options = load_comparison(write_recipe(folder, text), list(flags), given)
    return make_setting(recipe, options, prepare(recipe)), options


@pytest.fixture(scope="module")
def by_default(tmp_path_factory, chat_base):
    return setting(tmp_path_factory.mktemp("default"), chat_base, eval_rows=2, k=0, max_new_tokens=4)


def test_a_base_with_a_chat_template_is_measured_on_instructions_and_its_own_answers(by_default):
    found, options = by_default
    assert options.out_of_domain == ["instruction_checks", "base_answers"]
    prompts = SHIPPED.read_text().strip().split("\n")
    answers = found.data.out_of_domain["base_answers"].rows
    assert {row["prompt"] for row in answers} <= set(prompts[::2]) and len(answers) > 40
    assert len(found.data.out_of_domain["instruction_checks"].rows) == len(instruction_checks().rows)
    assert found.data.metric == "nll_accuracy"  # the rows' own answers are free text


def test_the_base_agrees_with_what_it_wrote_and_a_trained_model_less(by_default):
    found, _ = by_default
    model, tokenizer = load_setting(found)
    model = add_adapter(model, found.lora)
    before = measure(model, tokenizer, found.data, found.measurement)["metrics"]
    assert before["out_of_domain/base_answers"] > 0.999
    assert before["out_of_domain/base_answers_nll"] < 1
    both = [before[f"out_of_domain/{name}"] for name in ("base_answers", "instruction_checks")]
    assert before["out_of_domain"] == pytest.approx(sum(both) / 2, rel=1e-4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    after = measure(model, tokenizer, found.data, found.measurement)["metrics"]
    assert after["out_of_domain/base_answers"] < before["out_of_domain/base_answers"] - 0.1


def test_answers_are_measured_as_the_tokens_that_were_written(by_default):
    found, _ = by_default
    model, tokenizer = load_setting(found)
    rows = found.data.out_of_domain["base_answers"]
    encoded = encode(rows, model, tokenizer, found.measurement.arguments)
    again = generate(model, encoded.prompts, stop_ids=stop_tokens(model, tokenizer), max_new_tokens=data.SAMPLED_LENGTH)
    assert [[label for label in one["labels"] if label != IGNORED] for one in encoded.texts] == [
        one.greedy.token_ids for one in again
    ]
    assert [one["input_ids"][: len(prompt)] for one, prompt in zip(encoded.texts, encoded.prompts, strict=True)] == (
        encoded.prompts
    )
    lengths = sorted(len(one["input_ids"]) for one in encoded.texts)
    model.config.max_position_embeddings = longest = lengths[len(lengths) // 2]
    shorter = encode(rows, model, tokenizer, found.measurement.arguments)
    assert 0 < len(shorter.kept) < len(encoded.kept) and max(len(one["input_ids"]) for one in shorter.texts) <= longest


def test_it_says_so_in_one_line_and_can_be_turned_off(tmp_path, chat_base, capsys):
    setting(tmp_path, chat_base, out_of_domain=["instruction_checks"])
    assert "kept: measured" not in capsys.readouterr().out
    found, options = setting(tmp_path, chat_base, out_of_domain="nothing")
    assert options.out_of_domain == [] and found.data.out_of_domain == {} and found.data.metric == "nll"
    setting(tmp_path, chat_base)
    said = " ".join(capsys.readouterr().out.split())
    assert said == (
        "kept: measured on instructions that a program checks and the base's own answers to general prompts "
        "(--out_of_domain FILE … for your own, or nothing)"
    )


def test_a_base_without_a_chat_template_is_measured_on_its_own_texts(tmp_path, stories):
    found, options = setting(tmp_path, stories)
    assert options.out_of_domain == ["base_samples"] and found.data.metric == "nll"


def test_the_built_in_world_keeps_its_own_sets(tmp_path, capsys):
    recipe, options = load_comparison(write_recipe(tmp_path), [], {})
    found = make_setting(recipe, options, prepare(recipe))
    assert list(found.data.out_of_domain) == ["set_b", "shorter_a", "any_order", "styles"]
    assert options.out_of_domain is None and "kept:" not in capsys.readouterr().out


def test_what_is_replayed_is_not_what_is_measured(tmp_path, chat_base):
    found, _ = setting(
        tmp_path,
        chat_base,
        "--method=sft_replay",
        "--replay_max_new_tokens=32",
        "--max_length=512",
        arms="sft,psft_replay",
        seeds=1,
    )
    measured = {row["prompt"] for row in found.data.out_of_domain["base_answers"].rows}
    replayed = [json.loads(line)["prompt"] for line in (tmp_path / "comparison/replay.jsonl").read_text().splitlines()]
    assert replayed and not measured & set(replayed)
    assert len(found.replay) == len(replayed)


def test_replay_is_compared_where_the_base_has_something_to_replay(tmp_path, chat_base, stories, capsys):
    def arms(*flags):
        return default_arms(load_comparison(write_recipe(tmp_path), list(flags))[0])

    chat = arms(f"--model_name_or_path={chat_base}")
    own = [f"--model_name_or_path={stories}", "--replay_share=0.2", "--replay_dataset=rows.jsonl"]
    assert chat == list(DEFAULT_ARMS) == arms(*own)
    assert capsys.readouterr().out == ""
    for flags in (["--model_name_or_path=demo"], [f"--model_name_or_path={chat_base}", "--use_chat_template=never"]):
        assert arms(*flags) == ["sft", "psft_visits", "sft_kl"]
        assert "replay needs a base with a chat template" in capsys.readouterr().out


def test_all_prompts_are_either_answered_or_replayed():
    numbers = list(range(104))
    assert sorted(numbers[ANSWERED] + numbers[REPLAYED]) == numbers


def test_a_comparison_from_rows_alone(tmp_path, chat_base):
    """A chat base and rows, nothing else named: the page speaks of what is kept."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FREE))
    text = (
        f"model_name_or_path: {chat_base}\ndataset_name: rows.jsonl\nmax_length: 128\nlora_r: 4\nlearning_rate: 2e-3\n"
    )
    text += "num_train_epochs: 1\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 1\nwarmup_steps: 0\n"
    text += "compare: {out_of_domain_rows: 3, eval_rows: 2, seeds: 1, k: 0, max_new_tokens: 8}\n"
    found = compare(write_recipe(tmp_path, text), arms="sft,psft")
    metrics = found.arms["sft"].runs[42]["points"][-1]["metrics"]
    assert 0 <= metrics["out_of_domain/instruction_checks"] <= 1 and 0 < metrics["out_of_domain/base_answers"] < 1
    page = (tmp_path / "comparison/report.html").read_text()
    assert "kept: out-of-domain accuracy" in page and "learnt: in-domain NLL" in page


# ---- the instructions ----


def test_every_reference_follows_its_instructions_and_chatter_follows_few():
    rows = instruction_checks().rows
    assert 40 <= len(rows) <= 60 and len({row["prompt"] for row in rows}) == len(rows)
    assert not {row["prompt"] for row in rows} & set(SHIPPED.read_text().split("\n"))  # which may be replayed
    assert [row["prompt"] for row in rows if instructions(row, row["completion"]) is not True] == []
    assert sum(instructions(row, "18") for row in rows) == 0
    chatter = "Sure! Here is an answer, as you asked:\n\n1. It depends, on 3 things.\n2) Let me know if it helps"
    assert sum(instructions(row, chatter) for row in rows) < 6
    used = {name for row in rows for name in row["checks"]}
    assert used == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "wanted", "followed", "not_followed"),
    [
        ("bullets", 2, "Here:\n- a\n* b", "- a\n- b\n- c"),
        ("bullets", 1, "- a, with -2 and\nb", "-2"),
        ("numbered", 2, "1. a\n2) b", "1. a\n3. b"),
        ("paragraphs", 2, "a\n \nb", "a\nb"),
        ("sentences", 2, "It is 5.5 metres. \"Really?\"", "One. Two. Three"),
        ("sentences", 1, "no stop at the end", "One. no stop at the end"),
        ("min_words", 3, "don't stop now", "don't stop"),
        ("max_words", 2, "well-known facts", "three words here"),
        ("no_commas", True, "a; b", "a, b"),
        ("no_digits", True, "five", "5"),
        ("lower_case", True, "all 3 lower.", "One upper"),
        ("upper_case", True, "ALL 3 UPPER!", "ALL BUt one"),
        ("starts_with", "Yes", "Yes, it is", "yes"),
        ("ends_with", "Done", "so. Done", "Done."),
        ("contains", ["sea", "sun"], "The Sea and the sun", "seaside and sun"),
        ("avoids", ["ill"], "a hill", "Ill again"),
        ("one_of", ["yes", "no"], "No.", "No, they cannot"),
        ("quoted", True, "“so”", "he said \"so\""),
        ("json_keys", ["a", "b"], '```json\n{"b": 1, "a": 2}\n```', '{"a": 1, "b": 2} and so on'),
        ("json_keys", ["a"], '{"a": 1}', '["a"]'),
        ("json_items", 2, "[1, 2]", "[1, 2, 3]"),
        ("placeholders", 2, "Dear [name], on [date]", "Dear [name]"),
        ("bold", 2, "**a** and **b c**", "**a** and *b*"),
    ],
)  # fmt: skip
def test_checks(name, wanted, followed, not_followed):
    row = {"prompt": "?", "completion": "?", "checks": {name: wanted}}
    assert instructions(row, f" {followed}\n") is True
    assert instructions(row, not_followed) is False
    assert instructions(row, " \n") is None


def test_thoughts_are_no_answer():
    row = {"prompt": "?", "completion": "?", "checks": {"no_commas": True}}
    assert instructions(row, "<think>\nso, so\n</think>\n\nhere") is True
    assert instructions(row, "<think>\nso so") is None
    assert instructions(row, "so\n</think>\nthis, that") is False  # where the template opens the thought


def test_all_checks_of_a_row_count_and_rows_that_have_none_are_refused():
    row = {"prompt": "?", "completion": "a b", "checks": {"max_words": 2, "no_commas": True, "json_keys": None}}
    assert (
        instructions(row, "a b") is True and instructions(row, "a, b") is False and instructions(row, "a b c") is False
    )
    assert find_verifier("auto", [row], "x")[0] == "instructions"
    with pytest.raises(DataError, match="row 1: there is no check 'bulets'. Did you mean bullets"):
        find_verifier("auto", [row | {"checks": {"bulets": 3}}], "x")
    with pytest.raises(DataError, match="row 1: instructions need a column `checks`, a mapping"):
        find_verifier("auto", [row | {"checks": "bullets"}], "x")
    with pytest.raises(DataError, match="x, row 1: instructions need a column `checks`"):
        find_verifier("instructions", [{"prompt": "?", "completion": "a"}], "x")


def test_evaluate_takes_the_instructions_by_name(tmp_path, chat_base, capsys):
    target = tmp_path / "numbers.json"
    options = [
        "--data",
        "instruction_checks",
        "--limit",
        "4",
        "--k",
        "0",
        "--max_new_tokens",
        "8",
        "--json",
        str(target),
    ]
    assert cli.main(["evaluate", str(chat_base), "--device", "cpu", *options]) == 0
    record = json.loads(target.read_text())["data"]
    (one,) = record.values() if isinstance(record, dict) else record
    assert one["name"] == "instruction_checks" and one["rows"] == 4 and one["settings"]["verifier"] == "instructions"
    assert "instruction_checks · 4 rows" in capsys.readouterr().out


def test_rows_of_ones_own_can_have_checks(chat_base):
    model, tokenizer = load_base(chat_base, device="cpu", verbose=False)
    rows = [{"prompt": "Once", "completion": "upon", "checks": {"min_words": 2}}] * 2
    found = evaluate(model, tokenizer, rows, k=0, max_new_tokens=12)
    assert found.settings["verifier"] == "instructions" and found["accuracy"] == 1
    rows = [{"prompt": "Once", "completion": "upon", "checks": {"max_words": 1}}] * 2
    assert evaluate(model, tokenizer, rows, k=0, max_new_tokens=12)["accuracy"] == 0
