"""Recipes: one flat set of options from YAML and flags, strictly read."""

import pytest

from qpsft.errors import RecipeError
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.recipe.flags import option_types


def read(*flags, path=None):
    return load_recipe(path, flags, PSFTConfig)


def yaml_file(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_flags_make_one_set_and_flags_win(tmp_path):
    path = yaml_file(
        tmp_path,
        "model_name_or_path: demo\ndataset_name: demo-noisy\nlearning_rate: 1e-3  # PyYAML reads a text\n"
        "lora_r: 4\nmax_steps: 7\ndataset_columns: {prompt: question}\n",
    )
    recipe = read("--lora_r", "32", "--max-steps=9", "--lora_target_modules", "q_proj", "v_proj", path=path)
    assert recipe.trainer.learning_rate == 1e-3 and recipe.trainer.max_steps == 9
    assert recipe.lora.lora_r == 32 and recipe.lora.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.data.dataset_columns == {"prompt": "question"} and recipe.model.model_name_or_path == "demo"
    assert recipe.trainer.output_dir == str(tmp_path)  # the recipe's folder


def test_a_flag_without_a_value_is_true_and_values_may_be_negative():
    assert read("--use_dora", "--max_steps", "-1").lora.use_dora is True
    assert read("--use_dora", "false").lora.use_dora is False


@pytest.mark.parametrize(
    ("flags", "alpha"),
    [
        ([], 32),
        (["--lora_r=8"], 16),
        (["--lora_r=8", "--lora_alpha=none"], 16),
        (["--lora_r=8", "--lora_alpha=32"], 32),
        (["--lora_alpha=4"], 4),
    ],
)
def test_alpha_follows_the_rank_unless_it_is_given(flags, alpha, tmp_path):
    """A smaller rank alone must not make the adapter's scale, alpha / r, larger."""
    recipe = read(*flags)
    assert recipe.lora.lora_alpha == recipe.values()["lora_alpha"] == alpha  # the number itself is written


def test_the_resolved_values_read_back_to_the_same_recipe(tmp_path):
    import yaml

    first = read("--learning_rate", "3e-4", "--num_iterations", "4", "--adam_beta2", "0.98", "--lora_alpha", "8")
    path = yaml_file(tmp_path, yaml.safe_dump(first.values()))
    again = read(path=path)
    assert again.values() == first.values()
    assert again.trainer.adam_beta2 == 0.98 and again.trainer.num_iterations == 4


def test_no_option_is_declared_twice():
    from dataclasses import fields

    from qpsft.recipe.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments

    classes = (ModelArguments, LoraArguments, DataArguments, RunArguments, PSFTConfig)
    names = [option.name for cls in classes for option in fields(cls) if option.init]
    assert len(names) == len(set(names)) == len(option_types(classes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "Did you mean learning_rate"),
        (["--lora_rank", "8"], "lora_r"),
        (["--lora_r", "x"], "must be a whole number"),
        (["--lora_r", "1.5"], "must be a whole number"),
        (["--lora_r", "-8"], "rank must be at least 1"),
        (["--lora_r", "0"], "rank must be at least 1"),
        (["--epsilon", "0"], "epsilon is 0.0; it must be above 0"),
        (["--epsilon", "-0.2"], "must be above 0"),
        (["--per_device_train_batch_size", "0"], "must be at least 1"),
        (["--per_device_train_batch_size", "-2"], "must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "must be at least 1"),
        (["--num_train_epochs", "0"], "must be above 0"),
        (["--num_train_epochs", "-1"], "must be above 0"),
        (["--learning_rate", "-1e-4"], "must be above 0"),
        (["--reference_steps", "0"], "must be at least 1"),
        (["--num_iterations", "0"], "must be at least 1"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--max_length", "1"], "must be at least 2"),
        (["--quantization", "nf5"], "must be nf4, fp4 or none"),
        (["--loss_type", "ppo"], "psft, nll, dft, eaft, trsft, stm"),
        (["--lora_dropout", "1"], r"in \[0, 1\)"),
        (["--dataset_limit", "0"], "at least 1"),
        (["--prompt_format", "Question:"], "lacks {prompt}"),
        (["--use_dora", "maybe"], "true or false"),
        (["--optim", "adamm"], "--optim: adamm is not a valid"),
        (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type: cosin is not a valid"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type .*min_lr"),
        (["--lora_rank", "8"], "Did you mean lora_r or"),
        (["--epsilon"], "--epsilon needs a value. It must be a finite number"),
        (["--dtype", "--use_dora"], "--dtype needs a value"),
        (["--seed", "-1"], "seed is -1; it must be from 0 to"),
        (["--seed", "4294967296"], "seed is 4294967296"),
        (["--lora_r", "inf"], "must be a whole number"),
        (["--report_to", "bogus"], "report_to 'bogus' is not known"),
        (["--logging_steps", "0"], "logging_steps is 0.0; it must be above 0"),
        (["--save_steps", "-5"], "save_steps is -5.0; it must be above 0"),
        (["--deepspeed", "nope.json"], "--deepspeed: "),
        (["--accelerator_config", "nope.json"], "--accelerator_config: "),
        (["--eval_strategy", "steps"], "Name one: eval_dataset"),
        (["--do_eval"], "without eval_strategy"),
        (["--push_to_hub", "true"], "qpsft push"),
        (["--padding_free", "true"], "packing: true"),
        (["--chat_template_path", "/nope"], "chat_template.jinja"),
        (["--completion_only_loss", "false"], "supervise_prompt"),
        (["--assistant_only_loss"], "supervise_prompt"),
        (["--truncation_mode", "keep_end"], "max_length"),
        (["--dataset_text_field", "text"], "dataset_columns"),
        (["--dataset_kwargs", "{a: 1}"], "dataset_shape"),
        (["--dataset_num_proc", "2"], "no effect"),
        (["--eos_token", "<|im_end|>"], "tokenizer_config.json"),
        (["--pad_token", "<pad>"], "padding is masked"),
        (["--shuffle_dataset", "true"], "data_seed"),
        (["--model_init_kwargs", "{dtype: float32}"], "Set dtype"),
        (["--formatting", "x"], "dataset_columns"),
        (["--resume_from_checkpoint", "true"], "Give resume instead"),
        (["--resume", "--overwrite"], "contradict"),
        (["oops"], "belongs to no option"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(RecipeError, match=message):
        read(*flags)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", ".inf"])
@pytest.mark.parametrize(
    "name",
    ["sft_warmup_steps", "warmup_steps", "lora_alpha", "max_grad_norm", "learning_rate", "weight_decay", "epsilon"],
)
def test_numbers_must_be_finite(name, number):
    with pytest.raises(RecipeError, match=f"--{name} is .*; it must be a finite number"):
        read(f"--{name}={number}")


def test_options_that_are_off_or_have_an_effect_are_taken():
    recipe = read("--eval_strategy=no", "--do_eval=false", "--push_to_hub=false", "--padding_free", "--packing")
    assert recipe.trainer.padding_free and recipe.trainer.packing


def test_python_takes_what_a_recipe_refuses(tmp_path):
    arguments = PSFTConfig(tmp_path, completion_only_loss=True, eval_strategy="steps", truncation_mode="keep_end")
    assert arguments.completion_only_loss and arguments.truncation_mode == "keep_end"


@pytest.mark.parametrize(("what", "text"), [("It is red", "It is red. Mend it."), ("Red!", "Red! Mend it.")])
def test_cause_and_advice_are_two_sentences(what, text):
    assert str(RecipeError(what, "Mend it.")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "is a list, not a mapping"),
        ("just words\n", "is a str, not a mapping"),
        ("", "is empty"),
        ("lora_r: [1,\n", "line"),
        ("lora_r: 8\nlora_r: 16\n", "lora_r is given twice"),
        ("learning_rte: 1e-4\n", "Did you mean learning_rate"),
        ("1: 2\n", "not a mapping of option names"),
        ("lora_r: eight\n", "recipe.yaml: lora_r is 'eight'"),
        ("dataset_columns: [a]\n", "a mapping"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read(path=yaml_file(tmp_path, text))


def test_a_missing_file_names_its_neighbour(tmp_path):
    yaml_file(tmp_path, "lora_r: 8\n", "gsm8k.yaml")
    with pytest.raises(RecipeError, match=r"Did you mean .*gsm8k\.yaml"):
        read(path=tmp_path / "gsm8.yaml")


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00lora")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(path=path)


def test_data_beside_the_recipe_are_found(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = yaml_file(tmp_path, "dataset_name: rows.jsonl\n")
    assert read(path=path).data.dataset_name == str(tmp_path / "rows.jsonl")


def test_mixed_precision_follows_the_compute_dtype():
    assert not read("--dtype", "float32").trainer.bf16
    assert read("--dtype", "bfloat16").trainer.bf16
    assert not read("--dtype", "bfloat16", "--bf16", "false").trainer.bf16


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    parent = "model_name_or_path: demo\ndataset_name: rows.jsonl\nlearning_rate: 1e-3\nlora_r: 4\n"
    yaml_file(tmp_path, parent)
    (tmp_path / "below").mkdir()
    twin = yaml_file(tmp_path / "below", "extends: ..  # a folder\nloss_type: nll\nlora_r: 8\n", "sft.yaml")
    again = yaml_file(tmp_path / "below", "extends: sft.yaml\nmax_steps: 3\n", "short.yaml")
    recipe = read("--learning_rate", "5e-4", path=again)
    assert (recipe.trainer.loss_type, recipe.trainer.max_steps, recipe.lora.lora_r) == ("nll", 3, 8)
    assert recipe.trainer.learning_rate == 5e-4 and read(path=twin).trainer.learning_rate == 1e-3
    assert recipe.data.dataset_name == str(tmp_path / "rows.jsonl")  # beside the recipe that names it
    assert recipe.trainer.output_dir == str(tmp_path / "below")
    assert "extends" not in recipe.values()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.yaml": "extends: b.yaml"}, r"There is no recipe .*b\.yaml"),
        ({"a.yaml": "extends: b.yaml\n", "b.yaml": "extends: a.yaml\n"}, r"b\.yaml: extends: .*a\.yaml extends this"),
        ({"a.yaml": "extends: a.yaml"}, "in turn"),
        ({"a.yaml": "extends: [b.yaml]"}, "path of one other recipe"),
        ({"a.yaml": "extends: b.yaml", "b.yaml": "lora_rank: 8"}, r"b\.yaml: lora_rank: there is no such option"),
        ({"a.yaml": "extends: b.yaml", "b.yaml": "lora_r: x"}, r"b\.yaml: lora_r is 'x'"),
    ],
)
def test_bad_extensions(tmp_path, files, message):
    for name, text in files.items():
        yaml_file(tmp_path, text, name)
    with pytest.raises(RecipeError, match=message):
        read(path=tmp_path / "a.yaml")


def test_extends_is_no_flag():
    with pytest.raises(RecipeError, match="--extends: there is no such option"):
        read("--extends", "other.yaml")
