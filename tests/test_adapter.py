"""Adapters: float32, only they are trained, refusals by name, and a saved folder is the model that was trained."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from tiny_models import save_tiny_model
from trl.trainer.utils import add_fused_lm_head

from qpsft.errors import BaseModelError, OutputError, QpsftError
from qpsft.model.adapter import add_adapter, save_adapter
from qpsft.model.base import BaseRecord, base_record, load_base, read_base_record
from qpsft.recipe.arguments import LoraArguments

IDS = torch.tensor([[1, 5, 9, 17, 33, 65, 129, 7], [1, 3, 4, 5, 6, 7, 8, 9]])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def base(folder, **kwargs):
    return load_base(folder, device="cpu", verbose=False, **kwargs)[0]


def adapted(folder, quantization="nf4", dtype="auto", seed=0, **lora):
    torch.manual_seed(seed)
    model = base(folder, quantization=quantization, dtype=dtype)
    return add_adapter(model, LoraArguments(**{"lora_r": 4, "lora_alpha": 8, **lora}))


def logprobs(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float().log_softmax(-1)


def train(model, steps=5):
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def frozen_bytes(model):
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters() if not p.requires_grad}


def refusal(model, **lora):
    with pytest.raises(BaseModelError) as error:
        add_adapter(model, LoraArguments(**lora))
    assert error.value.what and error.value.todo and "\n" not in str(error.value)
    return str(error.value)


# --- what is trained ---


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_all_linear_layers_but_the_head(folder, quantization):
    model = adapted(folder, quantization)
    targets = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert targets == LINEAR
    assert len(model.targeted_module_names) == 14
    head = model.get_base_model().get_output_embeddings()
    assert type(head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_only_float32_adapter_parameters_are_trained(llama, dtype, lora):
    model = adapted(llama, dtype=dtype, **lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    before = frozen_bytes(model)
    train(model)
    after = frozen_bytes(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_training_starts_at_the_base(llama):
    assert torch.equal(logprobs(adapted(llama)), logprobs(base(llama)))


def test_scale(llama):
    scale = {rs: adapted(llama, lora_alpha=6, use_rslora=rs).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj").scaling["default"] for rs in (False, True)}  # fmt: skip
    assert scale == {False: 1.5, True: 3.0}


def test_arguments_are_not_written_into(folder):
    lora = LoraArguments(lora_r=4, lora_modules_to_save=["lm_head"], lora_target_modules=["q_proj"])
    add_adapter(base(folder), lora)
    assert (lora.lora_modules_to_save, lora.lora_target_modules) == (["lm_head"], ["q_proj"])


# --- target names ---


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        ("q_proj", 2),
        (["self_attn.q_proj"], 2),
        (r"model\.layers\.1\..*_proj", 7),
        (["model.layers.0.mlp.up_proj"], 1),
    ],
)
def test_targets_by_name_or_regex(llama, targets, count):
    assert len(adapted(llama, lora_target_modules=targets).targeted_module_names) == count


def test_wrong_target_lists_the_real_names(llama):
    message = refusal(base(llama), lora_target_modules=["q_proj", "query"])
    assert "'query'" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert "Did you mean q_proj?" in refusal(base(llama), lora_target_modules=["q_prj"])
    assert "Its linear layers are" in refusal(base(llama), lora_target_modules=r"encoder\..*")


def test_gpt2_names(tmp_path):
    model = base(save_tiny_model(tmp_path, "gpt2"))
    assert "c_attn, c_fc, c_proj" in refusal(model, lora_target_modules=["q_proj"])
    assert len(add_adapter(model, LoraArguments()).targeted_module_names) == 8


def test_bad_regex_and_other_modules(llama):
    assert "not a valid regular expression" in refusal(base(llama), lora_target_modules="(q_proj")
    assert "LlamaAttention, not a linear layer" in refusal(base(llama), lora_target_modules=["self_attn"])
    assert "Embedding" in refusal(base(llama), lora_target_modules=["embed_tokens"])
    assert "Embedding, not a linear layer" in refusal(base(llama), lora_target_modules=r"model\.embed.*")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "lm_head", r"(.*q_proj|lm_head)"])
def test_the_head_is_no_target(folder, targets):
    message = refusal(base(folder), lora_target_modules=targets)
    assert "LM head (lm_head)" in message and "lora_modules_to_save" in message


@pytest.mark.parametrize("rank", [0, -8])
def test_a_rank_is_positive(rank):
    with pytest.raises(QpsftError, match=f"lora_r is {rank}; a rank must be at least 1"):
        LoraArguments(lora_r=rank)


# --- modules trained in full ---


def fused_logprobs(model):
    return model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]])
def test_modules_to_save_are_trained_through_the_fused_head(folder, names, dtype):
    model = adapted(folder, dtype=dtype, lora_modules_to_save=names)
    plain = model.get_base_model()
    tied = plain.config.tie_word_embeddings
    add_fused_lm_head(plain)
    copies = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(copies) == {"norm": 5}.get(names[0], 1 if tied else len(names))
    fused_logprobs(model).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in copies.values())
    model.zero_grad()
    # the ordinary forward works without autocast too, although the copies are float32
    train(model)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    expected = logprobs(model)[:, :-1].gather(-1, IDS[:, 1:, None]).squeeze(-1)
    with torch.no_grad():
        torch.testing.assert_close(fused_logprobs(model).float(), expected, rtol=0, atol=tolerance)
    if names != ["norm"]:
        same = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        assert same == tied
    with model.disable_adapter():
        assert torch.equal(logprobs(model), logprobs(base(folder, dtype=dtype)))


def test_modules_that_cannot_be_trained_in_full(llama):
    assert "q_proj is quantized" in refusal(base(llama), lora_modules_to_save=["q_proj"])
    assert "is quantized" in refusal(base(llama), lora_modules_to_save=["mlp"])
    plain = base(llama, quantization="none")
    assert "is both in lora_modules_to_save and a target" in refusal(plain, lora_modules_to_save=["q_proj"])
    message = refusal(plain, lora_modules_to_save=["embed_token"])
    assert "Did you mean embed_tokens?" in message and "lm_head" in message


# --- saving ---


SAVED = [
    ("nf4", {}),
    ("nf4", {"use_dora": True, "use_rslora": True}),
    ("fp4", {"lora_target_modules": ["q_proj", "down_proj"]}),
    ("nf4", {"lora_modules_to_save": ["embed_tokens"]}),
    ("nf4", {"lora_modules_to_save": ["lm_head", "norm"]}),
    ("none", {}),
]


def saved_and_trained(folder, out, quantization, lora):
    model = adapted(folder, quantization, **lora)
    start = logprobs(model)
    train(model)
    trained = logprobs(model)
    assert (trained - start).abs().max() > 0.1
    save_adapter(model, out)
    return trained


@pytest.mark.parametrize(("quantization", "lora"), SAVED)
def test_plain_peft_loads_the_trained_model(folder, tmp_path, quantization, lora):
    trained = saved_and_trained(folder, tmp_path, quantization, lora)
    loaded = PeftModel.from_pretrained(base(folder, quantization=quantization), tmp_path)
    assert torch.equal(logprobs(loaded), trained)
    record = read_base_record(tmp_path)
    assert record.quantization == quantization
    of_base = BaseRecord(**base_record(base(folder, quantization=quantization)))
    assert dataclasses.replace(record, adapter_sha256=None) == of_base and record.adapter_sha256


def test_the_random_initialisation_is_left_to_the_seed(llama):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    values = [adapted(llama, seed=seed).get_parameter(name) for seed in (1, 1, 2)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_saved_files(llama, tmp_path):
    save_adapter(adapted(llama), tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base_quantization.json"}


def test_a_folder_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(adapted(llama), tmp_path / "file" / "adapter")


def test_stories_with_pretrained_weights(stories, tmp_path):
    trained = saved_and_trained(stories, tmp_path, "nf4", {"lora_r": 8})
    assert torch.equal(logprobs(PeftModel.from_pretrained(base(stories), tmp_path)), trained)
