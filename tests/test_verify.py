"""verify_export: correct merges pass in every dtype, and every kind of other model fails with its reason."""

import json
import re
from pathlib import Path

import pytest
import torch
from exporting import DTYPES, copy_folder, edit_json, edit_weights, make_adapter, merge_by_hand
from small_runs import make_base

from qpsft.errors import BaseModelError, DataError, NotTheSameModelError
from qpsft.merge import merge_adapter
from qpsft.model.base import load_base
from qpsft.model.folder import MODEL_DIR
from qpsft.verify import verify_export
from qpsft.verify.exported import ExportedWeights, load_exported, load_whole
from qpsft.verify.live import load_live
from qpsft.verify.measure import Measurement, Sequence, continue_greedily, distance, measure
from qpsft.verify.report import VerifyReport


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("verify") / "adapter")


@pytest.fixture(scope="module")
def merged(adapter: Path) -> Path:
    """A correct merge in bfloat16."""
    return merge_by_hand(adapter, adapter.parent / "merged", "bfloat16")


def verify(adapter: Path, exported: Path, **options) -> VerifyReport:
    options = {"max_prompts": 6, "max_new_tokens": 12} | options
    return verify_export(adapter, exported, **options)


@pytest.mark.parametrize(
    "dtype, largest_kl, largest_error", [("float32", 1e-9, 1e-4), ("float16", 1e-6, 0.02), ("bfloat16", 5e-5, 0.2)]
)
def test_a_correct_merge_passes(adapter, tmp_path, dtype, largest_kl, largest_error):
    report = verify(adapter, merge_by_hand(adapter, tmp_path / "merged", dtype))
    assert report.same_model, report.summary()
    assert report.failing_layer is None and report.dtype == dtype
    assert report.numbers["distance"]["kl"] < largest_kl
    assert report.numbers["distance"]["max_abs"] < largest_error
    assert report.numbers["weights"]["update_kept"] == pytest.approx(1, abs=0.01)
    assert json.loads(json.dumps(report.numbers)) == report.numbers
    report.require_same()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]},
        {"quantization": "none"},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["dora", "rslora on some layers", "unquantized", "embeddings trained in full"],
)
def test_every_kind_of_adapter_agrees_with_its_merge(tmp_path, options):
    """`merge` and `verify` compute the trained weights from different sources: files there, live modules here."""
    adapter = make_adapter(tmp_path / "adapter", **options)
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", no_verify=True)
    report = verify(adapter, tmp_path / "merged", max_prompts=2)
    assert report.same_model, report.summary()
    assert report.numbers["distance"]["max_abs"] < 2e-4 and report.numbers["weights"]["largest_relative_error"] < 2e-6


def test_a_merge_onto_the_original_weights_is_another_model(adapter, tmp_path):
    merge_adapter(adapter, tmp_path / "merged", onto="original", dtype="float32", no_verify=True)
    report = verify(adapter, tmp_path / "merged")
    assert not report.same_model and "on purpose" in report.notes[-1]


def test_a_scale_is_named_only_where_the_update_is_all_that_differs(adapter, tmp_path):
    """The bare base's original weights hold none of the update, whatever their rounding errors' share in it is."""
    scaled = verify(adapter, merge_by_hand(adapter, tmp_path / "scaled", scale=2.2), max_prompts=1)
    assert "holds 1.1 times the adapter's update instead of 1" in scaled.reasons[0]
    bare = verify(adapter, MODEL_DIR, max_prompts=1)
    assert re.search(r"is another weight, [\d.]+ times the adapter's update away", bare.reasons[0])
    assert "holds" not in bare.summary()


def swap_two_layers(tensors):
    first, second = sorted(name for name in tensors if name.endswith("down_proj.lora_B.weight"))[:2]
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "mistake, layer",
    [
        ({"scale": 0.0}, "model.layers.0.self_attn.q_proj.weight"),
        ({"scale": 2.2}, "model.layers.0.self_attn.q_proj.weight"),
        ({"change": swap_two_layers}, "model.layers.0.mlp.down_proj.weight"),
        ({"quantization": "fp4"}, "model.layers.0.self_attn.q_proj.weight"),
    ],
    ids=["no adapter", "wrong scaling", "two layers swapped", "fp4 for nf4"],
)
def test_another_model_fails_with_the_layer(adapter, tmp_path, mistake, layer, dtype):
    report = verify(adapter, merge_by_hand(adapter, tmp_path / "merged", dtype, **mistake))
    assert not report.same_model
    assert report.failing_layer == layer
    if dtype == "float32":  # bfloat16's rounding is about as large as a scale that is wrong by a tenth
        assert report.numbers["distance"]["kl"] > report.numbers["bounds"]["kl"], "the words alone must tell it too"
    with pytest.raises(NotTheSameModelError) as error:
        report.require_same()
    assert error.value.exit_code == 1 and layer in str(error.value)


def test_an_update_below_the_dtypes_rounding_is_still_seen_to_be_lost(tmp_path):
    """No log-probability tells this adapter from none in bfloat16; the projection on the update does."""
    adapter = make_adapter(tmp_path / "adapter", size=2e-4)
    right = verify(adapter, merge_by_hand(adapter, tmp_path / "right", "bfloat16"))
    lost = verify(adapter, merge_by_hand(adapter, tmp_path / "lost", "bfloat16", scale=0.0))
    assert right.same_model, right.summary()
    assert lost.numbers["distance"]["kl"] < lost.numbers["bounds"]["kl"]
    assert not lost.same_model and "times the adapter's update" in lost.reasons[0]


def test_a_small_update_erased_by_the_dtype_is_noted(tmp_path):
    """Weights trained in bfloat16 are on its grid, so updates under half a step vanish whole; float32 keeps them."""
    adapter = make_adapter(tmp_path / "adapter", size=2e-5, trained_in="bfloat16")
    exports = [merge_by_hand(adapter, tmp_path / dtype, dtype, trained_in="bfloat16") for dtype in DTYPES]
    float32, bfloat16, _ = [verify(adapter, export, max_prompts=1) for export in exports]
    assert bfloat16.same_model and "survives rounding to bfloat16" in bfloat16.notes[0], bfloat16.summary()
    assert float32.same_model and not float32.notes
    assert float32.numbers["weights"]["update_kept"] == pytest.approx(1, abs=0.01)


def test_one_wrong_weight_of_another_kind_is_found(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")

    def scale_a_norm(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"][:3] *= 1.02

    edit_weights(spoiled, scale_a_norm)
    report = verify(adapter, spoiled)
    assert report.failing_layer == "model.layers.1.post_attention_layernorm.weight"


def test_right_weights_with_another_config_fail_and_name_what_differs(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")
    edit_json(spoiled / "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    report = verify(adapter, spoiled)
    assert not report.same_model and report.numbers["weights"]["wrong"] == []
    assert report.failing_layer is None and "config.json, where rope_parameters differs" in report.reasons[-1]


def test_another_chat_template_fails(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")
    template = spoiled / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|> ", 1))
    report = verify(adapter, spoiled)
    assert report.failing_layer is None and len(report.reasons) == 1
    assert "chat template renders conversation 3 differently" in report.reasons[0]
    assert report.numbers["chat_template_equal"] is False


def test_a_lost_chat_template_fails(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")
    (spoiled / "chat_template.jinja").unlink()
    assert "the chat template is missing" in verify(adapter, spoiled).reasons[0]


@pytest.mark.parametrize("stop, words", [(1, "lacks '<|end|>'"), ([3, 0], "adds '<unk>'")])
def test_other_stop_tokens_fail(adapter, merged, tmp_path, stop, words):
    spoiled = copy_folder(merged, tmp_path / "spoiled")
    edit_json(spoiled / "generation_config.json", eos_token_id=stop)
    if stop == 1:
        edit_json(spoiled / "tokenizer_config.json", eos_token="<s>")
    report = verify(adapter, spoiled)
    assert not report.same_model and any(words in reason for reason in report.reasons), report.reasons


def test_nan_in_the_export_fails(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")

    def break_one(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")

    edit_weights(spoiled, break_one)
    report = verify(adapter, spoiled)
    assert not report.same_model and report.failing_layer == "model.layers.2.mlp.up_proj.weight"


def test_weights_left_over_or_left_out_are_named(adapter, merged, tmp_path):
    spoiled = copy_folder(merged, tmp_path / "spoiled")

    def add(tensors):
        tensors["extra.weight"] = torch.zeros(2)

    edit_weights(spoiled, add)
    assert verify(adapter, spoiled).reasons == ["extra.weight in the export is no weight of the model"]

    def remove(tensors):
        del tensors["extra.weight"], tensors["model.norm.weight"]

    edit_weights(spoiled, remove)
    with pytest.raises(BaseModelError, match="missing tensors, such as model.norm.weight"):
        verify(adapter, spoiled)


def test_a_model_read_module_by_module_says_the_same_as_one_loaded_whole(merged):
    weights = ExportedWeights(merged)
    sequences = [Sequence([5, 40, 41, 42, 60, 61, 3], 7), Sequence([4, 50, 51, 3, 5], 5)]
    device = torch.device("cpu")
    streamed = load_exported(weights, device)
    assert all(parameter.device.type == "meta" for parameter in streamed.parameters())
    one, other = (measure(m, sequences, 384, device) for m in (streamed, load_whole(weights, device)))
    assert torch.equal(one.chosen, other.chosen) and torch.equal(one.full, other.full)
    assert all(parameter.device.type == "meta" for parameter in streamed.parameters()), "weights were kept"


def test_a_card_that_is_too_small_leaves_it_to_the_cpu(adapter, merged, monkeypatch):
    devices = []

    def small_card(*args, device, **options):
        devices.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError
        return load_live(*args, device=device, **options)

    monkeypatch.setattr("qpsft.verify.verification.load_live", small_card)
    assert verify(adapter, merged, max_prompts=1).same_model and devices == ["auto", "cpu"]


def test_prompts_come_from_the_adapter_folder(adapter, merged, tmp_path):
    own = copy_folder(adapter, tmp_path / "adapter")
    (own / "verify_prompts.jsonl").write_text(
        '{"text": "ab", "input_ids": [4, 40, 41, 3, 5, 50, 51, 3], "prompt_length": 5}\n'
    )
    report = verify(own, merged)
    assert report.same_model and report.prompts == "held-out rows of the training"
    # The row's own answer has 7 next tokens; the model's continuation of its 5 first tokens has 5 to 16.
    assert 7 + 5 <= report.numbers["tokens"] <= 7 + 4 + 12


def test_bad_input_says_what_and_where(adapter, merged, tmp_path):
    with pytest.raises(BaseModelError, match="not an adapter's folder"):
        verify(merged, merged)
    with pytest.raises(BaseModelError, match="is a LoRA adapter, not a base model"):
        verify(adapter, adapter)
    prompts = tmp_path / "prompts.jsonl"
    for content, words in [
        ('{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ('{"answer": 1}\n', "row 1 is not a prompt"),
        ('{"input_ids": [99999]}\n', "beyond the tokenizer"),
        ('{"input_ids": [5, 6], "prompt_length": 3}\n', "prompt_length 3 of 2"),
        ("", "no prompts"),
    ]:
        prompts.write_text(content)
        with pytest.raises(DataError, match=words):
            verify(adapter, merged, prompts=prompts)


def test_another_base_is_refused_with_both_names(adapter, merged, stories):
    with pytest.raises(BaseModelError, match="trained on demo.*stories260K is another model"):
        verify(adapter, merged, base=stories)


def test_distance_of_two_known_distributions():
    """Two tokens, p = (.5, .5) and q = (.25, .75): KL = .5 ln(.5/.25) + .5 ln(.5/.75)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    first = Measurement(p[:, 0], torch.tensor([0]), torch.tensor([0.0]), p)
    second = Measurement(q[:, 0], torch.tensor([1]), torch.tensor([1.1]), q)
    result = distance(first, second, [Sequence([0, 0], 1)], near_tie=0.1)
    assert result.kl == pytest.approx(0.143841, abs=1e-6)
    assert result.max_abs == pytest.approx(0.693147, abs=1e-6)
    assert (result.top1, result.greedy, result.flips) == (0.0, 0.0, 0)
    first.lead = torch.tensor([0.2])
    assert distance(first, second, [Sequence([0, 0], 1)], near_tie=0.1).flips == 1


def test_the_likeliest_continuation_knows_no_repetition_penalty(tmp_path):
    """The base's generation settings once took part: Qwen's penalty changes even greedy answers."""
    model, _ = load_base(make_base(tmp_path / "base"), quantization="none", verbose=False)
    prompt = [5, 6, 7]
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    model.generation_config.repetition_penalty = 9.0
    assert continue_greedily(model, [prompt], max_new_tokens=8, stop=set(), pad=0) == [expected[3:]]
    assert model.generation_config.repetition_penalty == 9.0
    assert len(set(expected)) < len(expected)  # so that a penalty would have shown
