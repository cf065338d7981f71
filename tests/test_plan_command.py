"""`qpsft plan` on the command line, and the warning before a training that will not fit."""

import json
import types

import pytest
import torch
from tiny_models import edit_config, save_tiny_model

from qpsft import cli, plan, run
from qpsft.config import PSFTConfig
from qpsft.errors import BaseModelError, RecipeError
from qpsft.plan import make_plan, warn_if_short
from qpsft.planning.cards import GIB, find_card
from qpsft.planning.planned_config import PlannedConfig
from qpsft.recipe import load_recipe

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip


def recipe_of(*flags, model="somebody/some-llama", trainer=PlannedConfig):
    return load_recipe(None, [f"--model_name_or_path={model}", "--report_to=none", *flags], trainer)


def fake_cuda(monkeypatch, total: int, free: int | None = None, capability=(8, 6)):
    card = types.SimpleNamespace(name="A card", total_memory=total, major=capability[0], minor=capability[1])
    for name, value in (
        ("is_available", True), ("current_device", 0), ("get_device_properties", card), ("memory_reserved", 0),
        ("mem_get_info", (total if free is None else free, total)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)


def planned(*flags, **settings):
    return make_plan(recipe_of(*flags), config=LLAMA, **settings)


def test_a_recipe_and_flags_and_json(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: demo\ndataset_name: nowhere.jsonl\nlora_r: 4\n")
    assert cli.main(["plan", str(recipe), "--gpu=6GB", "--max_length=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    again = make_plan(load_recipe(recipe, ["--max_length=64"], PlannedConfig), card=find_card("6GB"))
    assert found["peak_bytes"] == again.peak_bytes and found["parts"] == again.parts
    assert found["fits"] is True and found["suggestion"] is None and found["length"] == 64
    assert list(found["parts"])[:3] == ["quantized weights", "quantization constants", "unquantized weights"]


def test_without_a_card_it_names_sizes_that_do(capsys):
    assert cli.main(["plan", "--model_name_or_path=demo"]) == 0
    out = capsys.readouterr().out
    assert "fits cards of 6 GB and more" in out and "longest max_length" not in out


def test_a_run_that_does_not_fit_says_what_would(capsys):
    flags = ["--model_name_or_path=demo", "--per_device_train_batch_size=512", "--gradient_checkpointing=false"]
    assert cli.main(["plan", *flags, "--gpu=2GB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit 2 GB" in out and "what makes it fit" in out and "--per_device_train_batch_size 1" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model_name_or_path=./no/such/folder"], "There is no base model folder"),
        ([], "model_name_or_path is missing"),
        (["--model_name_or_path=demo", "--gpu=huge"], "'huge' is not known"),
        (["--model_name_or_path=demo", "--processes=0"], "must be above 0"),
        (["--model_name_or_path=demo", "--max_length=none"], "longest row is not known"),
        (["--model_name_or_path=demo", "--max_lenght=64"], "max_length"),
        (["--model_name_or_path=demo", "--lora_target_modules=nothing"], "no layer of this model"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(flags, says, capsys):
    assert cli.main(["plan", *flags]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error and "Traceback" not in error


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path)
    edit_config(folder, model_type="t5")
    with pytest.raises(BaseModelError, match="not a causal language model"):
        make_plan(recipe_of(model=str(folder)))


def test_a_model_whose_code_needs_values_is_refused_by_name(monkeypatch):
    def needs_values(*args, **kwargs):
        return torch.empty(3, device="meta").tolist()

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", needs_values)
    with pytest.raises(BaseModelError, match="activations of a llama model cannot be planned"):
        planned()


def test_options_that_this_machine_cannot_train_with_can_be_planned():
    flags = ("--optim=paged_adamw_8bit", "--activation_offloading", "--fp16")
    trainer = recipe_of(*flags).trainer
    assert (trainer.optim, trainer.activation_offloading, trainer.fp16) == ("paged_adamw_8bit", True, True)
    with pytest.raises(RecipeError, match="optim 'adamm' is not known"):
        recipe_of("--optim=adamm")


# --- training plans first ---

TRAIN = ["--dataset_name=demo-noisy", "--dataset_limit=32", "--max_length=128"]


def test_training_warns_before_it_loads(monkeypatch, tmp_path):
    class Loading(Exception):
        pass

    def load_base(*args, **kwargs):
        raise Loading

    monkeypatch.setattr(run, "load_base", load_base)
    recipe = recipe_of(*TRAIN, f"--output_dir={tmp_path}", model="demo", trainer=PSFTConfig)
    recipe.trainer.use_cpu = False
    fake_cuda(monkeypatch, GIB // 4)
    with pytest.warns(UserWarning, match=r"A card has 0\.25, so it will probably run out of memory") as warned:
        with pytest.raises(Loading):
            run.train(recipe)
    assert any("qpsft plan" in str(warning.message) for warning in warned)


@pytest.fixture
def no_warning(recwarn):
    yield
    assert not [w for w in recwarn if "memory" in str(w.message)]


def test_training_is_silent_where_it_fits(monkeypatch, no_warning):
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    recipe.trainer.use_cpu = False
    fake_cuda(monkeypatch, 24 * GIB)
    found = warn_if_short(recipe, {"input_ids": [[1] * 30, [1] * 50]})
    assert found.fits and found.length == 50


def test_training_on_the_cpu_warns_only_when_memory_is_short(monkeypatch, no_warning):
    rows = {"input_ids": [[1] * 50]}
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    assert warn_if_short(recipe, rows) is None  # far from short: not even planned
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**20))
    with pytest.warns(UserWarning, match="are free, so it will probably run out"):
        short = warn_if_short(recipe, rows)
    assert short.parts["CUDA context"] == 0 and not short.fits


def test_a_run_without_a_plan_goes_on(monkeypatch):
    def fails(*args, **kwargs):
        raise BaseModelError("Its activations cannot be planned.")

    monkeypatch.setattr(plan, "make_plan", fails)
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    recipe.trainer.use_cpu = False
    fake_cuda(monkeypatch, 24 * GIB)
    with pytest.warns(UserWarning, match="no memory plan for this run"):
        assert warn_if_short(recipe, {"input_ids": [[1]]}) is None
