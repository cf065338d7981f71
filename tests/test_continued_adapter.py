"""`adapter_name_or_path`: training goes on from adapters that qpsft, PEFT, TRL or Unsloth wrote, or says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merging import shake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_runs import MODULES, Recorder, log_lines, make_base, make_trainer, policy, same

from qpsft import cli
from qpsft.merge import merge_adapter
from qpsft.model.base import load_base, load_tokenizer
from qpsft.model.base_record import write_base_record
from qpsft.model.continue_adapter import continue_adapter
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe

FLAGS = [
    "--max_length=32", "--learning_rate=5e-3", "--warmup_steps=0", "--reference_steps=2", "--max_steps=2",
    "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--logging_steps=1", "--save_strategy=no",
    "--gradient_checkpointing=false",
]  # fmt: skip

# As PEFT writes them today, with what Unsloth and later versions of PEFT add.
UNKNOWN_KEYS = {
    "unsloth_fixed": True,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "a_key_of_tomorrow": {"x": 1},
}
KINDS = {
    "unsloth": dict(
        r=4,
        lora_alpha=6.5,
        target_modules=r".*(self_attn|mlp)\.(q_proj|k_proj|v_proj|gate_proj|down_proj)",
        exclude_modules=r".*layers\.0\.mlp.*",
        lora_dropout=0.05,
        use_rslora=True,
    ),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=MODULES,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        alpha_pattern={"q_proj": 3.5},
    ),
    "in full too": dict(
        r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], use_dora=True
    ),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(5, 45)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_foreign(folder: Path, base: Path, name: str = "default", **config) -> Path:
    """An adapter as another trainer leaves it: no record of the base, keys that PEFT does not know."""
    model, _ = load_base(base, verbose=False)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "task_type": "CAUSAL_LM"} | config
    peft_model = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    shake(peft_model)
    peft_model.save_pretrained(folder)
    folder = folder if name == "default" else folder / name
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | UNKNOWN_KEYS))
    return folder


def recipe_of(base, start, *flags):
    return load_recipe(None, [f"--model_name_or_path={base}", f"--adapter_name_or_path={start}", *flags], PSFTConfig)


def train(base, rows, output, *flags):
    return cli.main(
        ["train", f"--model_name_or_path={base}", f"--dataset_name={rows}", f"--output_dir={output}", *FLAGS, *flags]
    )


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 40).view(1, -1)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_model_that_peft_loads(base, tmp_path, kind):
    start = save_foreign(tmp_path, base, name="sft", **KINDS[kind])
    model, _ = load_base(base, verbose=False)
    alone = logits(model)
    continued = continue_adapter(model, recipe_of(base, start))
    by_peft = PeftModel.from_pretrained(load_base(base, verbose=False)[0], start)
    assert torch.equal(logits(continued), logits(by_peft))
    assert (logits(continued) - alone).abs().max() > 1e-3
    trained = {name: p for name, p in continued.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert len(trained) == len(load_file(start / "adapter_model.safetensors"))
    config = continued.peft_config["default"]
    assert config.lora_dropout == 0 and config.lora_alpha == KINDS[kind]["lora_alpha"]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_further_merged_and_verified(base, rows, tmp_path, kind):
    start = save_foreign(tmp_path / "start", base, **KINDS[kind])
    before = load_file(start / "adapter_model.safetensors")
    assert train(base, rows, tmp_path / "out", f"--adapter_name_or_path={start}") == 0
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys() and {n: t.shape for n, t in after.items()} == {
        n: t.shape for n, t in before.items()
    }
    moved = max((after[n].float() - before[n].float()).abs().max() for n in after)
    assert 1e-3 < moved < 0.05, "it did not start from these values"  # two steps of 5e-3
    assert same(before, load_file(start / "adapter_model.safetensors"))

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name, value in KINDS[kind].items():
        if name in ("target_modules", "modules_to_save") and isinstance(value, list):
            assert sorted(config[name]) == sorted(value)
        elif name != "lora_dropout":
            assert config[name] == value, name
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| rank, alpha | {KINDS[kind]['r']}, {KINDS[kind]['lora_alpha']:g} |" in card and str(start) in card
    report = merge_adapter(tmp_path / "out", dtype="float32", show_progress=False)
    assert report.verification["same_model"] and report.onto == "trained"


def test_values_of_copies_are_not_rounded_to_the_base_s_dtype(base, tmp_path):
    start = save_foreign(tmp_path, base, **KINDS["in full too"])
    model, _ = load_base(base, dtype="bfloat16", verbose=False)
    continued = continue_adapter(model, recipe_of(base, start))
    saved = load_file(start / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    copy = continued.get_parameter("base_model.model.lm_head.modules_to_save.default.weight")
    assert torch.equal(copy, saved) and not torch.equal(saved, saved.bfloat16().float())


def test_its_own_result_goes_on_with_its_own_recipe(base, rows, tmp_path):
    assert train(base, rows, tmp_path / "one", "--lora_r=4", "--lora_alpha=6", "--lora_target_modules=q_proj") == 0
    again = ["train", str(tmp_path / "one" / "recipe.yaml"), f"--adapter_name_or_path={tmp_path / 'one'}"]
    assert cli.main([*again, f"--output_dir={tmp_path / 'two'}"]) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert 0 < max((one[n] - two[n]).abs().max() for n in one) < 0.05
    resolved = load_recipe(tmp_path / "two" / "recipe.yaml", [], PSFTConfig)
    assert resolved.lora.adapter_name_or_path == str(tmp_path / "one")
    # A third run from the resolved recipe alone is the second one.
    assert cli.main(["train", str(tmp_path / "two" / "recipe.yaml"), f"--output_dir={tmp_path / 'three'}"]) == 0
    assert same(two, load_file(tmp_path / "three" / "adapter_model.safetensors"))


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(base, rows, tmp_path):
    start = save_foreign(tmp_path / "start", base, **KINDS["patterns"])
    flags = [f"--adapter_name_or_path={start}", "--save_strategy=steps", "--save_steps=2", "--max_steps=4"]
    assert train(base, rows, tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    assert train(base, rows, tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert same(whole, cut) and not same(whole, load_file(start / "adapter_model.safetensors"))


def test_the_adapter_s_own_tokenizer_is_the_one_that_is_trained_with(base, rows, tmp_path, capsys):
    start = save_foreign(tmp_path / "start", base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %} w9 {{ m.content }} w8{% endfor %}{% if add_generation_prompt %} w9"
    )
    tokenizer.chat_template += "{% endif %}"
    tokenizer.save_pretrained(start)
    common = [f"--model_name_or_path={base}", f"--dataset_name={rows}"]
    assert cli.main(["preview", *common]) == 0 and "w9" not in capsys.readouterr().out.split("──")[1]
    assert cli.main(["preview", *common, f"--adapter_name_or_path={start}"]) == 0
    assert "w9 w5 w6 w8" in capsys.readouterr().out
    assert train(base, rows, tmp_path / "out", f"--adapter_name_or_path={start}") == 0
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


def refused(capsys, *arguments) -> str:
    assert train(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r=16"], "lora_r is 16, and the adapter in"),
        (["--lora_alpha=9"], "lora_alpha is 9"),
        (["--use_dora"], "use_dora is True"),
        (["--lora_modules_to_save=lm_head"], "lora_modules_to_save is lm_head"),
        (["--lora_target_modules=all-linear"], "has q_proj, v_proj. Leave lora_target_modules out"),
    ],
)
def test_options_that_say_otherwise(base, rows, tmp_path, capsys, flags, message):
    start = save_foreign(tmp_path / "start", base, target_modules=["q_proj", "v_proj"])
    text = refused(capsys, base, rows, tmp_path / "out", f"--adapter_name_or_path={start}", *flags)
    assert message in text and "the adapter brings its own" in text
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_another_base(base, rows, tmp_path, capsys):
    start = save_foreign(tmp_path / "start", base)
    other = make_base(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    flag = f"--adapter_name_or_path={start}"
    assert train(other, rows, tmp_path / "out", flag) == 0  # nothing tells but the name
    assert "make sure that they are the same model" in " ".join(capsys.readouterr().err.split())
    write_base_record(load_base(base, verbose=False)[0], start)
    assert "is another model (config hash" in refused(capsys, other, rows, tmp_path / "two", flag)
    assert train(base, rows, tmp_path / "three", flag, "--quantization=none") == 0
    assert "with quantization nf4, and this run has none" in " ".join(capsys.readouterr().err.split())


def test_another_shape_and_files_that_do_not_belong_together(base, rows, tmp_path, capsys, stories):
    start = save_foreign(tmp_path / "start", base)
    flag = f"--adapter_name_or_path={start}"
    assert f"calls for on {stories}" in refused(capsys, stories, rows, tmp_path / "out", flag)
    file = start / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != first}, file)
    assert "lacks base_model.model.model.layers.0" in refused(capsys, base, rows, tmp_path / "out", flag)
    save_file(tensors | {"base_model.model.model.layers.7.x.lora_A.weight": tensors[first].clone()}, file)
    assert "holds base_model.model.model.layers.7" in refused(capsys, base, rows, tmp_path / "out", flag)


def test_no_adapter_there(base, rows, tmp_path, capsys):
    def text(start, *more):
        return refused(capsys, base, rows, tmp_path / "out", f"--adapter_name_or_path={start}", *more)

    start = save_foreign(tmp_path / "start", base, name="sft")
    assert f"Did you mean {start}?" in text(tmp_path / "start")
    assert f"There is no adapter folder {tmp_path / 'strat'}. Did you mean {tmp_path / 'start'}?" in text(
        tmp_path / "strat"
    )
    assert "is not an adapter's folder. It is a whole model" in text(base)
    assert f"output_dir {start} holds the adapter" in text(start, f"--output_dir={start}")
    assert "adapter_name_or_path is empty" in text("")
    (start / "adapter_model.safetensors").rename(start / "adapter_model.bin")
    assert "it holds adapter_model.bin, and loading a pickle" in text(start)


def test_on_the_hub_without_network(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refused(capsys, base, rows, tmp_path / "out", "--adapter_name_or_path=nobody/no-adapter")
    assert "not on this machine and cannot be reached" in text


def test_adapters_that_cannot_be_trained_or_merged(base, rows, tmp_path, capsys):
    head = save_foreign(tmp_path / "head", base, target_modules=["q_proj", "lm_head"])
    flag = f"--adapter_name_or_path={head}"
    assert "is on the LM head too" in refused(capsys, base, rows, tmp_path / "out", flag)
    config = head / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    assert "init_lora_weights 'pissa'" in refused(capsys, base, rows, tmp_path / "out", flag)
    flag = f"--adapter_name_or_path={save_foreign(tmp_path / 'biases', base, bias='all')}"
    text = refused(capsys, base, rows, tmp_path / "out", flag, "--dtype=bfloat16")
    assert "trains the base's own biases (bias: all)" in text and "Use dtype float32" in text


def test_a_comparison_starts_from_the_base(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: demo\ndataset_name: demo-noisy\nadapter_name_or_path: x\n")
    assert cli.main(["compare", str(recipe)]) == 2
    assert "start from the bare base" in " ".join(capsys.readouterr().err.split())


def test_python_users_go_on_with_peft_s_own_loading(base, tmp_path):
    """The same in code: `PSFTTrainer` on `PeftModel.from_pretrained(…, is_trainable=True)`."""
    start = save_foreign(tmp_path, base, name="sft", **KINDS["unsloth"])
    model = PeftModel.from_pretrained(load_base(base, verbose=False)[0], start, adapter_name="more", is_trainable=True)
    before, seen = policy(model), []
    model.peft_config["more"].lora_dropout = 0.0
    for module in model.modules():
        if getattr(module, "lora_dropout", None):
            module.lora_dropout["more"] = torch.nn.Identity()
    trainer = make_trainer(base, tmp_path / "run", model=model, max_steps=2)
    trainer.add_callback(Recorder(lambda step: seen.append(policy(model))))
    trainer.train()
    assert same(seen[0], before) and not same(policy(model), before)
    assert log_lines(trainer)[0]["loss"] == pytest.approx(-1.0, abs=1e-6)
