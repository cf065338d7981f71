"""Hostile inputs by the thousand through the command line: each ends with an exit code and a reason, no traceback.

`fuzz.py` makes them; the same seed gives the same inputs.
"""

import json
import shutil
import sys
import time

import pytest
from fuzz import ADAPTER, GOOD, GROUPS, LOOP, SHARES, attack, inputs, outcome
from planted import edit

from qpsft import cli
from qpsft.errors import DataError, RecipeError, boundary, shown
from qpsft.model.folder import MODEL_DIR

SHORT, LONG = 100, 10_000


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's would hide what a user sees


def survive(some, folder):
    wrong = {f"{group}:{number}": found for group, number in some if (found := attack(group, number, folder)[0])}
    assert not wrong, f"`python tests/attack/fuzz.py 0 {' '.join(wrong)}`:\n" + "\n".join(wrong.values())


def test_hostile_inputs_end_without_a_traceback(tmp_path):
    survive(inputs(SHORT), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_many_hostile_inputs(tmp_path, group):
    survive(((group, number) for number in range(round(LONG * SHARES[group]))), tmp_path)


def refused(argv, capsys) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line, said",
    [
        ("seed: " + "9" * 5000, "recipe.yaml, line 3: not valid YAML"),
        ("chat_date: 9999-99-99", "recipe.yaml, line 3: not valid YAML"),
        ("dataset_columns: !!set {a, b}", "recipe.yaml: 'dataset_columns' cannot be read: it holds a set"),
        ("run_name: 2026-11-23 10:00:00", "recipe.yaml: 'run_name' cannot be read: it holds a datetime"),
        ('run_name: "a\\0b"', "recipe.yaml: 'run_name' cannot be read: it holds a character"),
        ("guard: {~: 1}", "recipe.yaml: guard: None: there is no such option"),
        ("dataset_columns: {prompt: [a]}", "dataset_columns maps prompt to ['a'], but no row"),
        ("guard: &a [*a]", "recipe.yaml: 'guard' cannot be read: its values are nested too deeply"),
        ("guard: " + "[" * 5000, "not valid YAML (it is nested too deeply)"),
        ("seed: 1e300", "recipe.yaml: seed is '1e300'; it must be a whole number"),
        ("extends: " + "x" * 300, "recipe.yaml: extends cannot be followed: [Errno 36] File name too long"),
    ],
)
def test_a_recipe_names_the_file_and_the_key_or_the_line(tmp_path, capsys, line, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: demo\ndataset_name: demo-noisy\n{line}\n")
    started = time.process_time()
    assert said in refused(["preview", recipe], capsys)
    assert time.process_time() - started < 10


def test_a_date_in_a_recipe_is_its_text(tmp_path):
    from qpsft.recipe.flags import plain

    assert plain({"chat_date": __import__("datetime").date(2026, 11, 23)}) == {"chat_date": "2026-11-23"}


def test_a_parquet_file_names_the_column_that_python_has_no_value_for(tmp_path, capsys):
    import pyarrow.parquet

    table = {"prompt": ["p"], "completion": ["c"], "when": pyarrow.array([2**62], pyarrow.timestamp("us"))}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    said = refused(["preview", "--model_name_or_path=demo", f"--dataset_name={tmp_path / 'rows.parquet'}"], capsys)
    assert "rows.parquet, column 'when': its values cannot be read" in said


def test_a_csv_that_is_left_in_its_middle_says_its_error_only(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\na,b\na,b,c\n" + "a,b\n" * 50)
    said = refused(["preview", "--model_name_or_path=demo", f"--dataset_name={rows}"], capsys)
    assert said.startswith("error: ") and "line 3: 3 cells, but the header has 2 columns" in said


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MODEL_DIR.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    "values, said",
    [
        ({"num_hidden_layers": 10**9}, "config.json has 1000000000 for num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "config.json cannot be read by transformers"),
        ({"quantization_config": [1]}, "config.json has [1] for quantization_config"),
        ({"text_config": "x"}, "config.json has 'x' for text_config"),
    ],
)
def test_a_config_of_wrong_types_is_named(model, capsys, values, said):
    edit(model / "config.json", **values)
    assert said in refused(["plan", f"--model_name_or_path={model}", "--dataset_name=demo-noisy"], capsys)


@pytest.mark.parametrize("ids", [[[1]], [1, "2"], ["</s>"], [None], [True], {"a": 1}, "1", 1.5])
@pytest.mark.parametrize("verb", ["merge", "evaluate"])
def test_stop_tokens_that_are_no_ids_are_named(model, tmp_path, capsys, ids, verb):
    edit(model / "generation_config.json", eos_token_id=ids)
    if verb == "merge":
        argv = ["merge", ADAPTER, "--base", model, "-o", tmp_path / "merged"]
    else:
        argv = ["evaluate", model, "--data", "demo-clean", "--limit", "1"]
    assert f"generation_config.json has {shown(ids)} for eos_token_id" in refused(argv, capsys)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", ["512", [512], {"a": 1}, "null"])
def test_a_tokenizer_s_settings_of_a_wrong_type_are_named(model, capsys, value):
    edit(model / "tokenizer_config.json", model_max_length=value)
    said = refused(["preview", f"--model_name_or_path={model}", "--dataset_name=demo-noisy"], capsys)
    assert f"The tokenizer in {model} cannot be loaded: " in said


@pytest.mark.parametrize("tokens", [["a"], "abc", 5, [None], [[1]]])
def test_an_adapter_s_settings_of_a_wrong_type_are_named(tmp_path, capsys, tokens):
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    edit(folder / "adapter_config.json", alora_invocation_tokens=tokens)
    said = refused(["evaluate", folder, "--base", "demo", "--data", "demo-clean", "--limit", "1"], capsys)
    assert f"adapter_config.json has {shown(tokens)} for alora_invocation_tokens" in said


def test_a_record_that_assumes_what_it_does_not_have_is_named(tmp_path, capsys):
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    edit(folder / "base_quantization.json", assumed=["quantization", "n"])
    said = refused(["merge", folder, "--base", "demo", "-o", tmp_path / "merged"], capsys)
    assert "base_quantization.json has 'n' under assumed" in said and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("shard", [None, 3, "", "..", "../model/model-1.safetensors", "/etc/passwd", "a\0.safetensors"])
def test_a_shard_index_names_files_of_its_folder_only(model, capsys, shard):
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    argv = ["evaluate", model, "--data", "demo-clean", "--limit", "1"]
    assert f"places 'lm_head.weight' in {shown(shard)}, which is no safetensors file" in refused(argv, capsys)


def test_a_template_that_never_ends_is_stopped(model, capsys, monkeypatch):
    monkeypatch.setattr("qpsft.data.render.SECONDS", 1)
    (model / "chat_template.jinja").write_text("{{ 1 }}" + LOOP)
    started = time.process_time()
    said = refused(["preview", f"--model_name_or_path={model}", "--dataset_name=demo-noisy"], capsys)
    assert "The chat template does not end: it was stopped after 1 seconds." in said
    assert time.process_time() - started < 10


def test_a_template_that_fills_the_memory_is_refused(model, capsys):
    (model / "chat_template.jinja").write_text("{{ 'x' * 10 ** 10 }}")
    said = refused(["preview", f"--model_name_or_path={model}", "--dataset_name=demo-noisy"], capsys)
    assert "The chat template takes more than 2 GiB for a question of a few words." in said


def test_memory_that_one_conversation_takes_is_said_with_its_place(model, capsys, tmp_path):
    (model / "chat_template.jinja").write_text(
        GOOD + "{{ messages[0]['content'] * 10 ** 9 if messages[0]['content'] == 'hi' }}"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "a"}]}\n'
    )
    said = refused(["preview", f"--model_name_or_path={model}", f"--dataset_name={rows}"], capsys)
    assert "takes more than 2 GiB for" in said and "rows.jsonl, line 1" in said


def test_a_template_that_writes_half_a_character_is_refused(model, capsys):
    (model / "chat_template.jinja").write_text(GOOD + "{{ '\\ud800' }}")
    said = refused(["preview", f"--model_name_or_path={model}", "--dataset_name=demo-noisy"], capsys)
    assert "the chat template fails on this conversation: UnicodeEncodeError" in said and "row 1" in said


def test_a_boundary_names_the_file_and_lets_our_own_errors_pass():
    with pytest.raises(DataError, match=r"x\.json cannot be read: KeyError: 'a'. Copy it."):
        with boundary("x.json cannot be read", DataError, "Copy it."):
            {}["a"]
    with pytest.raises(RecipeError, match="mine"):
        with boundary("x.json cannot be read", DataError, "Copy it."):
            raise RecipeError("mine")
    assert len(shown([["x" * 500] * 500] * 500)) < 100 and "int" in shown(10**5000)


def test_the_fuzzer_sees_a_traceback_and_a_silent_refusal(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: {}["a"])
    assert "KeyError: 'a'" in outcome(["preview"])
    monkeypatch.setattr(cli, "main", lambda argv: 2)
    assert "exit code 2" in outcome(["preview"])
