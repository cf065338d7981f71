"""`qpsft plan` as a user runs it: cards, where the shape comes from, mistakes; and training, which plans first."""

import json
import re
import types

import pytest
import torch
from planned_runs import LLAMA, planned, recipe_of
from tiny_models import edit_config, save_tiny_model

from qpsft import cli
from qpsft.errors import BaseModelError, RecipeError
from qpsft.model.hardware import hardware_of
from qpsft.plan import make_plan, memory_plan
from qpsft.plan.cards import GIB, USABLE, find_card
from qpsft.plan.memory import OF_ACTIVATIONS
from qpsft.plan.memory_plan import plan_run
from qpsft.plan.planned_config import PlannedConfig
from qpsft.plan.shapes import find_shape
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.train import run

# --- cards ---


@pytest.mark.parametrize(
    ("text", "gib", "capability"),
    [
        ("12GB", 12, (8, 0)), ("12", 12, (8, 0)), ("7.5 gib", 7.5, (8, 0)), ("6144MiB", 6, (8, 0)),
        ("T4", 15, (7, 5)), ("Tesla T4", 15, (7, 5)), ("RTX 4090", 24, (8, 9)), ("rtx3080ti", 12, (8, 6)),
        ("NVIDIA GeForce RTX 3060 12GB", 12, (8, 6)), ("4070 Ti Super", 16, (8, 9)), ("A100-80GB", 80, (8, 0)),
        ("1080 ti", 11, (6, 1)),
    ],
)  # fmt: skip
def test_cards_by_size_and_name(text, gib, capability):
    card = find_card(text)
    assert card.nbytes == int(gib * GIB * USABLE) and card.capability == capability


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a big one", "not known"), ("-3GB", "no card"), ("0", "no card"), ("1e9", "not known"), ("", "not known"),
        ("RTX 3060", "several sizes"), ("RTX 4090 -2GB", "no card"), ("auto", "sees no CUDA device"),
    ],
)  # fmt: skip
def test_cards_that_cannot_be_read(text, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=says):
        find_card(text)


def fake_cuda(monkeypatch, total: int, free: int | None = None, capability=(8, 6)):
    rocm = isinstance(capability, str)
    major, minor = map(int, re.match(r"gfx(\d+)(\d)[0-9a-f]\b", capability).groups()) if rocm else capability
    card = types.SimpleNamespace(name="A card", total_memory=total, major=major, minor=minor, gcnArchName=capability)
    monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
    for name, value in (
        ("is_available", True), ("current_device", 0), ("get_device_properties", card), ("memory_reserved", 0),
        ("mem_get_info", (total if free is None else free, total)), ("reset_peak_memory_stats", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)


def test_memory_that_others_hold_does_not_count(monkeypatch):
    fake_cuda(monkeypatch, 8 * GIB, 5 * GIB)
    card = find_card("auto")
    assert 5 * GIB < card.nbytes < 6 * GIB and (card.name, card.capability) == ("A card", (8, 6))
    fake_cuda(monkeypatch, 8 * GIB, 8 * GIB - 2**20)
    assert find_card("auto").nbytes == 8 * GIB


def test_an_old_card_computes_in_float16():
    assert make_plan(recipe_of(), config=LLAMA, card=find_card("T4"))._planner.dtype == torch.float16
    assert make_plan(recipe_of(), config=LLAMA, card=find_card("12GB"))._planner.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "flash"),
    [("gfx1030", torch.float16, False), ("gfx906:sramecc+:xnack-", torch.float16, False),
     ("gfx90a:sramecc+:xnack-", torch.bfloat16, True), ("gfx1100", torch.bfloat16, True)],
)  # fmt: skip
def test_this_machines_amd_card_computes_as_training_will(monkeypatch, name, dtype, flash):
    fake_cuda(monkeypatch, 8 * GIB, capability=name)
    card = find_card("auto")
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    found, real = make_plan(recipe_of("--max_length=2048"), config=LLAMA, card=card), hardware_of("cuda:0")
    assert found._planner.dtype == real.compute_dtype == dtype and real.flash_attention == flash
    cuda = make_plan(recipe_of("--max_length=2048"), config=LLAMA, card=find_card("A100-80GB" if flash else "T4"))
    scores = 4 * 2048 * 2048 * 2  # of all heads: without a fused kernel they are kept
    assert (found.parts["layer working set"] - cuda.parts["layer working set"] > scores) == (not flash)
    assert found.parts["workspaces and rounding"] >= 32 * 2**20


# --- where the shape comes from ---


def test_only_config_json_is_fetched(monkeypatch, tmp_path):
    save_tiny_model(tmp_path)
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_shape("somebody/a-llama").config.hidden_size == 64
    assert (asked["name"], asked["allow_patterns"]) == ("somebody/a-llama", ["config.json"])
    asked.clear()
    assert "table" in find_shape("qwen/qwen2.5-7b-instruct").source and not asked
    find_shape("somebody/a-llama", revision="v1")
    assert asked["revision"] == "v1"


def test_a_folder_needs_no_weights(tmp_path, capsys):
    (save_tiny_model(tmp_path) / "model.safetensors").unlink()
    assert cli.main(["plan", "--model_name_or_path", str(tmp_path), "--gpu", "8GB", "--max_length", "32"]) == 0
    out = capsys.readouterr().out
    assert "shape from its config.json" in " ".join(out.split()) and "fits 8 GB" in out
    assert "longest max_length that fits: 64 " in out  # its context
    assert max(map(len, out.splitlines())) <= 80


# --- the command line ---


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
        (["--model_name_or_path=demo", "--gpu="], "--gpu '' is not known"),
        (["--model_name_or_path=demo", "--optim=adamw_8bit", "--optim_args=foo"], "optim_args 'foo' cannot be read"),
        (["--model_name_or_path=demo", '--gradient_checkpointing_kwargs={"every_n_layers": 0}'], "every_n_layers is 0"),
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


def test_rows_longer_than_the_models_context_are_noted():
    beyond = planned("--max_length=5000")
    assert "rows of 5,000 tokens are longer than the model's context, 4,096" in " ".join(str(beyond).split())
    assert planned("--max_length=4096").notes == []


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path)
    edit_config(folder, model_type="t5")
    with pytest.raises(BaseModelError, match="not a causal language model"):
        make_plan(recipe_of(model=str(folder)))


def test_a_model_whose_code_needs_values_is_planned_without_activations(monkeypatch):
    whole = planned()

    def needs_values(*args, **kwargs):
        return torch.empty(3, device="meta").tolist()

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", needs_values)
    found = planned(gpu_bytes=24 * GIB)
    kept = [name for name in found.parts if name not in (*OF_ACTIVATIONS, "fragmentation margin")]
    assert kept and all(found.parts[name] == whole.parts[name] for name in kept)
    assert not set(OF_ACTIVATIONS) & set(found.parts) and found.needed_bytes < whole.needed_bytes
    assert (found.complete, found.fits, found.max_length, found.suggestion) == (False, None, None, None)
    said = " ".join(str(found).split())
    assert "whether it fits 24.00 GiB" in said and "activations of a llama model need is not known" in said
    json.dumps(found.to_dict())
    assert "which cards it fits is not known" in " ".join(str(planned()).split())
    short = planned(gpu_bytes=2**20)  # for the weights alone
    assert short.fits is False and "and activations come on top" in " ".join(str(short).split())

    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    recipe.trainer.use_cpu = False
    fake_cuda(monkeypatch, 24 * GIB)
    with pytest.warns(UserWarning, match="no whole plan for this run: what activations of a llama model need"):
        assert plan_run(recipe, {"input_ids": [[1]]}).fits is None


MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "num_heads": 8,
         "head_dim": 16, "n_groups": 1, "state_size": 16}  # fmt: skip


@pytest.mark.parametrize("card", ["RTX 3090", "T4"])
def test_experts_are_planned_whole(card):
    few, more = (
        make_plan(recipe_of("--max_length=256"), config=MIXTRAL | {"num_experts_per_tok": n}, card=find_card(card))
        for n in (1, 2)
    )
    assert few.complete and few.fits and more.parts["policy adapter"] == few.parts["policy adapter"]
    twice = 256 * 2 * 1024 * 2  # a token's gate and up, once more, in 16 bits
    assert more.parts["layer working set"] - few.parts["layer working set"] > twice


def test_what_peft_refuses_is_one_sentence():
    with pytest.raises(RecipeError, match="on a mamba2 model: .*out_proj.*linear layers are in_proj, out_proj"):
        make_plan(recipe_of("--max_length=64"), config=MAMBA)
    assert make_plan(recipe_of("--max_length=64", "--lora_target_modules=in_proj"), config=MAMBA).complete


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
    found = plan_run(recipe, {"input_ids": [[1] * 30, [1] * 50]})
    assert found.fits and found.length == 50


def test_training_on_the_cpu_warns_only_when_memory_is_short(monkeypatch, no_warning):
    rows = {"input_ids": [[1] * 50]}
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    assert plan_run(recipe, rows) is None  # far from short: not even planned
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**20))
    with pytest.warns(UserWarning, match="are free, so it will probably run out"):
        short = plan_run(recipe, rows)
    assert short.parts["CUDA context"] == 0 and not short.fits


def test_a_sharded_run_is_not_said_to_run_out_of_memory(monkeypatch, no_warning):
    """The plan's numbers are DDP's: `accelerate launch` says in the environment that it is FSDP, not in the options."""
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    assert make_plan(recipe, device="cpu").notes == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP's sharding is not planned: these are the numbers of DDP" in make_plan(recipe, device="cpu").notes
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**20))
    assert plan_run(recipe, {"input_ids": [[1] * 50]}) is None


def test_a_run_without_a_plan_goes_on(monkeypatch):
    def fails(*args, **kwargs):
        raise BaseModelError("Its activations cannot be planned.")

    monkeypatch.setattr(memory_plan, "make_plan", fails)
    recipe = recipe_of(*TRAIN, model="demo", trainer=PSFTConfig)
    recipe.trainer.use_cpu = False
    fake_cuda(monkeypatch, 24 * GIB)
    with pytest.warns(UserWarning, match="no memory plan for this run"):
        assert plan_run(recipe, {"input_ids": [[1]]}) is None
