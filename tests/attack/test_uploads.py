"""No secret in a file of ours, nothing uploaded that is not named, and names in cards stay names."""

import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from merging import whole_adapter
from small_runs import make_trainer

from qpsft import cli
from qpsft.errors import ExportError, RecipeError
from qpsft.evaluate.kept_card import section
from qpsft.export.push import push
from qpsft.merge.report import MergeReport
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.file import load_recipe
from qpsft.recipe.markdown import as_code, as_text
from qpsft.recipe.secret import holds_secret
from qpsft.train.model_card import model_card, resolved_recipe

SECRET = "hf_" + "QpsftTestSecret" * 2
HOSTILE = "x`</code><img src=x onerror=alert(1)>\n# owned [a](javascript:b) | c"


def holding(folder: Path, secret: str = SECRET) -> list[str]:
    """Files below `folder` with the secret in them."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# ---- secrets ----

GIVEN = {
    "hub_token": [f"--hub_token={SECRET}"],
    "hub_token that looks like none": ["--hub_token=abc"],
    "in another option": [f"--run_name=run-{SECRET}"],
    "password in an address": ["--dataset_name=https://me:pa55word@example.org/rows.jsonl"],
    "signed address": ["--dataset_name=https://example.org/rows.jsonl?X-Amz-Signature=0123456789"],
    "nested": [f"--dataset_mix=[{{dataset_name: a.jsonl, share: 1, auth_token: {SECRET}}}]"],
}


@pytest.mark.parametrize("flags", GIVEN.values(), ids=GIVEN)
def test_a_secret_among_options_is_refused_before_anything_is_written(tmp_path, capsys, flags):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 4)
    options = {"model_name_or_path": "demo", "dataset_name": str(rows), "output_dir": str(tmp_path / "out")}
    given = [f"--{name}={value}" for name, value in options.items() if not flags[0].startswith(f"--{name}=")]
    assert cli.main(["train", *given, *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds a secret" in said and "hf auth login" in said
    assert SECRET not in said and "pa55word" not in said and not (tmp_path / "out").exists()


def test_a_secret_in_a_recipe_or_its_parent_is_refused(tmp_path):
    (tmp_path / "parent.yaml").write_text(f"model_name_or_path: demo\nhub_token: {SECRET}\n")
    (tmp_path / "recipe.yaml").write_text("extends: parent.yaml\ndataset_name: rows.jsonl\n")
    with pytest.raises(RecipeError, match="parent.yaml: hub_token holds a secret") as error:
        load_recipe(tmp_path / "recipe.yaml", [], PSFTConfig)
    assert SECRET not in str(error.value)


def test_options_that_are_no_secrets_are_taken(tmp_path):
    flags = ["--model_name_or_path=demo", "--dataset_name=rows.jsonl", "--replay_max_new_tokens=8", "--model_revision",
             "0123456789abcdef0123456789abcdef01234567", "--prompt_format={prompt} token: "]  # fmt: skip
    assert load_recipe(None, flags, PSFTConfig).model.model_revision
    assert not holds_secret("eos_token", "</s>") and not holds_secret("hub_token", None)


def test_a_resolved_recipe_never_holds_a_token_that_python_set():
    recipe = load_recipe(None, ["--model_name_or_path=demo", "--dataset_name=rows.jsonl"], PSFTConfig)
    recipe.given["hub_token"] = recipe.trainer.hub_token = SECRET
    text = resolved_recipe(recipe)
    assert SECRET not in text and "hub_token" not in text and "dataset_name: rows.jsonl" in text


def test_checkpoints_and_saved_arguments_hold_no_token(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, hub_token=SECRET)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"training_args.bin", "checkpoint-1", "checkpoint-2"} <= names and not holding(tmp_path)
    assert trainer.args.hub_token == SECRET, "the running trainer keeps it"
    assert SECRET.encode() in pickle.dumps(trainer.args), "this control finds what the pickle would hold"


# ---- what is uploaded ----


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("README.md", "tokenizer.json", "recipe.yaml"):
        (folder / name).write_text("{}")
    whole_adapter(folder)
    return folder


def uploaded(folder: Path) -> set[str]:
    return {name for name, _ in push(folder, "owner/name", dry_run=True).files}


def test_only_named_files_are_uploaded(folder):
    wanted = uploaded(folder)
    strangers = ("secrets.json", "passwords.txt", "notes.txt", "credentials.json", "rows.json", "diary.md", "me.png",
                 "wandb.yaml", "answers.html", "other.safetensors", "secret.model", "x.jinja", "config.json.bak",
                 "id_rsa", "README.md~", "model-1.safetensors", "service-account.json", "recipe.old.yaml")  # fmt: skip
    for name in strangers:
        (folder / name).write_text("mine")
    (folder / "config.json").mkdir()
    os.mkfifo(folder / "Modelfile")
    report = push(folder, "owner/name", dry_run=True)
    assert {name for name, _ in report.files} == wanted and set(strangers) <= set(report.left_out)


@pytest.mark.parametrize("target", ["outside", "inside", "folder", "nowhere"])
def test_links_are_not_followed(folder, tmp_path, target):
    outside = tmp_path / "private.txt"
    outside.write_text("mine")
    (folder / "metrics.jsonl").write_text("rows")
    to = {"outside": outside, "inside": folder / "metrics.jsonl", "folder": tmp_path, "nowhere": tmp_path / "none"}
    for name in ("README.md", "LICENSE", "config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to[target])
    report = push(folder, "owner/name", dry_run=True)
    assert not {"README.md", "LICENSE", "config.json"} & {name for name, _ in report.files}
    assert "README.md (a link)" in report.left_out and "left out: LICENSE (a link)" in report.summary()


def test_weights_that_are_a_link_are_refused(folder, tmp_path):
    (tmp_path / "weights").write_text("mine")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(ExportError, match="adapter_model.safetensors is a link to .*weights; only files of the folder"):
        uploaded(folder)


@pytest.mark.parametrize(
    "name, text",
    [
        ("recipe.yaml", f"loss_type: psft\nhub_token: {SECRET}\n"),
        ("recipe.yaml", "hub_token: looks-like-none\n"),
        ("recipe.resolved.yaml", "guard: {data: x, api_key: looks-like-none}\n"),
        ("README.md", f"# mine\n\nexport HF_TOKEN={SECRET}\n"),
        ("Modelfile", "# sk-abcdefghijklmnopqrstuvwx\n"),
        ("adapter_config.json", '{"base_model_name_or_path": "https://me:pa55word@example.org/model"}'),
    ],
)
def test_a_secret_in_what_would_be_uploaded_stops_it(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ExportError, match=f"{re.escape(name)}.* holds what looks like a secret.*nothing was") as error:
        uploaded(folder)
    assert SECRET not in str(error.value) and "pa55word" not in str(error.value)


def test_a_name_of_a_gguf_is_no_pattern(folder, monkeypatch):
    import huggingface_hub

    (folder / "[a-z]*.gguf").write_text("x")
    (folder / "private.gguf.json").write_text("x")
    sent = []
    hub = SimpleNamespace(create_repo=lambda *a, **o: None, upload_folder=lambda **o: sent.append(o) or "url")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push(folder, "owner/name")
    names = [path.name for path in folder.iterdir()] + ["secret.gguf"]
    chosen = set(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=sent[0]["allow_patterns"]))
    assert "[a-z]*.gguf" in chosen and "secret.gguf" not in chosen and "private.gguf.json" not in chosen


# ---- names in cards ----


def test_names_are_escaped():
    assert as_code("a`b") == "``a`b``" and as_code("`") == "`` ` ``" and as_code("rows.jsonl") == "`rows.jsonl`"
    assert (
        as_text("<b>&[x](y)|z\n#") == r"&lt;b&gt;&amp;[x\](y)\|z #" and as_text("my_rows-1.jsonl") == "my_rows-1.jsonl"
    )


def rendered(card: str) -> tuple[dict, str]:
    """A card's front matter and the text after it, without code."""
    _, front, text = card.split("---\n", 2)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return yaml.safe_load(front), re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def inert(text: str) -> bool:
    return "<" not in text.replace("<!--", "") and not re.search(r"(?<!\\)\]\(java|^# owned", text, re.MULTILINE)


def test_names_in_the_card_of_a_run_stay_names(tmp_path):
    recipe = load_recipe(None, ["--model_name_or_path=demo", "--dataset_name=rows.jsonl"], PSFTConfig)
    recipe.model.model_name_or_path = recipe.data.dataset_name = recipe.lora.adapter_name_or_path = HOSTILE
    numbers = dict.fromkeys(("nll", "entropy", "clip_fraction"), 0.5)
    folder = tmp_path / HOSTILE.replace("/", "")
    summary = SimpleNamespace(folder=folder, numbers=numbers, written=1, data=[f"columns not used: {HOSTILE}"],
                              notes=[HOSTILE])  # fmt: skip
    card = model_card(recipe, summary, SimpleNamespace(r=4, lora_alpha=8), "recipe.yaml")
    front, text = rendered(card)
    assert front["base_model"] == HOSTILE and inert(text), text
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert repr(HOSTILE) in code


def test_names_in_the_cards_of_merging_and_evaluating_stay_names():
    report = MergeReport.__new__(MergeReport)
    values = dict(base=HOSTILE.replace("/", ""), onto="trained", rounding="nf4", dtype="float16", qpsft_version="0",
                  base_revision=None, output=HOSTILE, adapter=HOSTILE, low_rank=1, replaced=0,
                  verification={"summary": f"same\n```\n{HOSTILE}"})  # fmt: skip
    vars(report).update(values)
    front, text = rendered(report.card())
    assert front["base_model"] == values["base"] and inert(text), text
    kept = SimpleNamespace(cells=lambda: [["", HOSTILE], [HOSTILE, "1"]], said=lambda: [HOSTILE], base=HOSTILE)
    vars(kept).update(sentence=lambda: HOSTILE, max_drop=0.1, skills={})
    assert inert(rendered(f"---\n---\n{section(kept)}")[1].replace("-->", ""))
