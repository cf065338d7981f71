"""The guard: an old skill is measured while a run trains, and what happens when too much of it is lost."""

import json
import math
import re
import shutil

import pytest
import torch
import yaml
from markdown import ROOT, text_of
from safetensors.torch import load_file
from test_resume import StopAt, contents, same

from qpsft import cli
from qpsft.data import built_in
from qpsft.errors import DataError, RecipeError, TrainingError
from qpsft.evaluate import evaluate
from qpsft.evaluate.rows import encode
from qpsft.evaluate.verifiers import find_verifier
from qpsft.model.adapter import add_adapter
from qpsft.model.base import load_base
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.arguments import DataArguments, GuardArguments, LoraArguments
from qpsft.recipe.file import load_recipe
from qpsft.train import guard as guards
from qpsft.train import run
from qpsft.train.guard_set import GuardSet, load_guard_set
from qpsft.train.progress import read_metrics

RUN = [
    "--model_name_or_path=demo", "--dataset_name=demo-noisy", "--dataset_limit=64", "--max_length=128", "--lora_r=4",
    "--learning_rate=1e-3", "--warmup_steps=0", "--reference_steps=3", "--num_iterations=2",
    "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--gradient_checkpointing=false",
    "--logging_steps=2", "--save_steps=2", "--save_total_limit=20", "--max_steps=8", "--seed=1", "--use_cpu",
    "--lr_scheduler_type=constant",
]  # fmt: skip
BASE = 0.9
ADAPTER = "adapter_model.safetensors"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Twenty rows of skills that the embedded base has, of every out-of-domain set."""
    sets = built_in.out_of_domain("test", 5).values()
    return write_rows(tmp_path_factory.mktemp("old") / "old.jsonl", [row for rows in sets for row in rows])


@pytest.fixture
def scores(monkeypatch):
    """Scores that the guard gets one after another, instead of measuring; the base's comes first."""
    told = []
    monkeypatch.setattr(GuardSet, "score", lambda self, model, tokenizer: told.pop(0))
    return told


def train(folder, *flags, guard=None, callbacks=()):
    given = [] if guard is None else [f"--guard={json.dumps({'every': 2, **guard})}"]
    return run.train(load_recipe(None, [*RUN, f"--output_dir={folder}", *given, *flags], PSFTConfig), callbacks)


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    """A run without a guard, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("unguarded") / "a"
    train(folder)
    return folder


def checks(folder, metric="accuracy"):
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "guard_limit" in line]
    return [(line["step"], line[f"guard_{metric}"]) for line in lines]


def logged(folder):
    """What training's log lines say of the training itself."""
    names = ("step", "nll", "num_tokens", "grad_norm")
    return [{n: line[n] for n in names} for line in read_metrics(folder / "metrics.jsonl") if "nll" in line]


def one_line(text):
    return " ".join(text.split())


# ---- what is measured ----


@pytest.fixture(scope="module")
def moved():
    """The embedded base with an adapter that has left it."""
    base, tokenizer = load_base("demo", verbose=False)
    torch.manual_seed(0)
    model = add_adapter(base, LoraArguments(lora_r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model, tokenizer


def guard_set(old, **options):
    return load_guard_set(GuardArguments(data=str(old), **options), DataArguments())


def logprobs_by_hand(model, row):
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"]])).logits[0, :-1].double().log_softmax(-1)


def test_kl_and_nll_are_means_over_the_supervised_tokens(moved, old):
    model, tokenizer = moved
    kl = nll = tokens = 0
    model.eval()
    for row in encode(guard_set(old).rows, model, tokenizer, DataArguments()).texts:
        labels = torch.tensor(row["labels"][1:])
        mask = labels != -100
        policy = logprobs_by_hand(model, row)[mask]
        with model.disable_adapter():
            base = logprobs_by_hand(model, row)[mask]
        kl += float((base.exp() * (base - policy)).sum())
        nll -= float(policy.gather(-1, labels[mask, None]).sum())
        tokens += int(mask.sum())
    assert guard_set(old, metric="kl").score(model, tokenizer) == pytest.approx(kl / tokens, rel=1e-3)
    assert guard_set(old, metric="nll").score(model, tokenizer) == pytest.approx(nll / tokens, rel=1e-4)
    other_way = evaluate(model, tokenizer, guard_set(old).rows, k=0)["kl_text"]  # KL(policy || base)
    assert abs(other_way - kl / tokens) > 0.01 * kl / tokens


def test_accuracy_is_that_of_evaluate(moved, old):
    model, tokenizer = moved
    rows = guard_set(old).rows
    found = evaluate(model, tokenizer, rows, k=0, drift=False, max_new_tokens=56)
    assert 0 < found["accuracy"] < 1
    assert guard_set(old, max_new_tokens=56).score(model, tokenizer) == found["accuracy"]


@pytest.mark.parametrize(
    ("metric", "base", "inside", "outside"),
    [("accuracy", 0.92, 0.87, 0.86), ("nll", 0.5, 0.55, 0.56), ("kl", 0.0, 0.05, 0.06), ("nll", 0.5, 0.1, math.nan)],
)
def test_a_drop_of_exactly_max_drop_is_inside(old, metric, base, inside, outside):
    one = guard_set(old, metric=metric)
    assert not one.is_outside(base, inside) and one.is_outside(base, outside)


def test_limit_and_columns(tmp_path):
    rows = [{"asked": f"reverse: 123{i}", "answered": f"{i}321"} for i in range(5)]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    one = guard_set(path, limit=3, columns={"prompt": "asked", "completion": "answered"})
    assert [row["completion"] for row in one.rows.rows] == ["0321", "1321", "2321"]


# ---- stop ----


@pytest.fixture
def stopped(old, scores, tmp_path, capsys):
    scores += [BASE, 0.9, 0.88, 0.8, "never asked for"]
    summary = train(tmp_path / "a", guard={"data": str(old)})
    return tmp_path / "a", summary, capsys.readouterr().out


def test_the_checks_that_come_with_qpsft_guard_an_instruct_model(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: demo\nguard: {data: instruction_checks, limit: 30}\n")
    options = GuardArguments(**load_recipe(tmp_path, [], PSFTConfig).run.guard)
    guard = load_guard_set(options, DataArguments())
    name, is_right = find_verifier("auto", guard.rows.rows, guard.rows.name)
    assert len(guard.rows.rows) == 30 and name == "instructions"
    assert all(is_right(row, row["completion"]) for row in guard.rows.rows)
    assert not any(is_right(row, "I cannot help with that, sorry.") for row in guard.rows.rows[:10])


def test_the_adapter_that_is_written_is_the_last_one_inside_the_limit(stopped, unguarded):
    folder, summary, printed = stopped
    assert (folder / ADAPTER).read_bytes() == (unguarded / "checkpoint-4" / ADAPTER).read_bytes()
    assert (folder / ADAPTER).read_bytes() != (unguarded / "checkpoint-6" / ADAPTER).read_bytes()
    assert (summary.steps, summary.written) == (6, 4)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert checks(folder) == [(0, 0.9), (2, 0.9), (4, 0.88), (6, 0.8)]
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "step 4/8 guard: accuracy 0.880 base 0.900 limit 0.850" in one_line(printed)


def test_summary_and_card_say_what_happened_and_what_to_do(stopped):
    folder, summary, _ = stopped
    said = one_line(str(summary))
    assert "trained 6 steps" in said and "log line of step 4" in said
    assert "guard: stopped at step 6: accuracy on " in said
    assert "fell from 0.900 to 0.800, more than 0.05; written: the adapter of step 4 (0.880)" in said
    assert "lower learning_rate" in said
    assert "--resume" not in summary.next_commands(load_recipe(None, RUN, PSFTConfig))
    card = (folder / "README.md").read_text()
    assert "| optimizer steps | 4 |" in card and "- guard: stopped at step 6" in card
    log = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] == 4 and "nll" in line]
    assert f"{log[0]['nll']:.4f}" in card
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["guard"]["max_drop"] == 0.05


def test_a_run_that_stays_inside_is_written_as_it_ends(old, scores, tmp_path, unguarded):
    scores += [BASE, 0.9, 0.86, 0.91, 0.9]
    summary = train(tmp_path / "a", guard={"data": str(old)})
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (unguarded / ADAPTER).read_bytes()
    assert summary.written == 8 and "inside the limit of 0.850" in one_line(str(summary))


def test_beyond_the_limit_at_the_very_end(old, scores, tmp_path, unguarded):
    scores += [BASE, 0.9, 0.2]
    summary = train(tmp_path / "a", guard={"data": str(old), "every": 5})
    assert [step for step, _ in checks(tmp_path / "a")] == [0, 5, 8]
    assert summary.written == 5 and not (tmp_path / "a" / "checkpoint-8").exists()
    assert (tmp_path / "a" / ADAPTER).read_bytes() != (unguarded / ADAPTER).read_bytes()


def test_without_any_trained_adapter_inside_the_limit_it_is_an_error(old, scores, tmp_path, capsys):
    scores += [BASE, 0.5]
    flags = [*RUN, f"--output_dir={tmp_path / 'a'}", f"--guard={{data: {old}, every: 2}}"]
    assert cli.main(["train", *flags]) == 2
    said = one_line(capsys.readouterr().err)
    assert "fell from 0.900 to 0.500" in said and "no earlier adapter inside the limit" in said
    assert "Lower learning_rate" in said and not (tmp_path / "a" / ADAPTER).exists()


# ---- lower_lr ----


def test_lower_lr_goes_on_from_the_kept_weights_at_half_the_rate(old, scores, tmp_path, unguarded):
    """In mid-block, where old log-probabilities are kept: they and the reference are made anew."""
    scores += [BASE, 0.9, 0.7, 0.9, 0.9]
    seen = {}

    class Watch(guards.CheckpointedCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 3, 4):  # before the guard acts
                seen[state.global_step] = kwargs["optimizer"].param_groups[0]["lr"]

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                adapter = [p.detach().clone() for p in kwargs["model"].parameters() if p.requires_grad]
                seen["weights"], seen["lr"] = adapter, kwargs["optimizer"].param_groups[0]["lr"]
                seen["moments"] = [v["exp_avg"].clone() for v in kwargs["optimizer"].state.values()]
                seen["reference"] = {k: v.clone() for k, v in self.trainer.reference.state_dict().items()}
                seen["policy"] = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}

        def save_to(self, folder):
            pass

    watch = Watch()
    real = run.make_trainer

    def with_watch(*args, **kwargs):
        watch.trainer = real(*args, **kwargs)
        return watch.trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_trainer", with_watch)
        summary = train(tmp_path / "a", guard={"data": str(old), "action": "lower_lr"}, callbacks=[watch])
    kept = load_file(unguarded / "checkpoint-2" / ADAPTER)
    assert sorted(t.sum().item() for t in kept.values()) == sorted(t.sum().item() for t in seen["weights"])
    optimizer = torch.load(unguarded / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert same(seen["moments"], [state["exp_avg"] for state in optimizer["state"].values()])
    assert (seen[3], seen["lr"]) == (1e-3, 5e-4)
    assert all(torch.equal(seen["policy"][name], tensor) for name, tensor in seen["reference"].items())
    lines = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "nll" in line]
    assert [line["learning_rate"] for line in lines] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert summary.written == 8 and "at step 4 back to the adapter" in one_line(str(summary))
    assert (tmp_path / "a" / ADAPTER).read_bytes() != (unguarded / ADAPTER).read_bytes()


def test_lower_lr_stops_after_a_few_halvings(old, scores, tmp_path, unguarded):
    scores += [BASE, 0.9, *[0.5] * 5]
    summary = train(tmp_path / "a", "--max_steps=20", guard={"data": str(old), "action": "lower_lr"})
    assert (summary.steps, summary.written) == (12, 2)
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (unguarded / "checkpoint-2" / ADAPTER).read_bytes()
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "nll" in line]
    assert rates == [1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


# ---- warn ----


def test_with_warn_the_weights_are_those_without_a_guard(old, tmp_path, capsys):
    """With real measurements, and with dropout, whose numbers a measurement must not draw."""
    noisy = ["--lora_dropout=0.2", "--loss_type=nll", "--num_iterations=1", "--max_steps=4"]
    train(tmp_path / "without", *noisy)
    options = {"data": str(old), "action": "warn", "max_drop": 1e-4, "max_new_tokens": 56}
    for metric in ("accuracy", "kl", "nll"):
        train(tmp_path / metric, *noisy, guard=options | {"metric": metric})
        for at in ("checkpoint-2", "."):
            wanted = (tmp_path / "without" / at / ADAPTER).read_bytes()
            assert (tmp_path / metric / at / ADAPTER).read_bytes() == wanted
        lines, others = map(logged, (tmp_path / metric, tmp_path / "without"))
        assert lines == others and len(lines) == 2
    assert len(checks(tmp_path / "kl", "kl")) == 3 and checks(tmp_path / "kl", "kl")[-1][1] > 1e-4
    assert "rose from 0.000 to" in one_line(capsys.readouterr().out)


# ---- resuming ----

PLANS = {
    "stop": [0.9, 0.88, 0.8],
    "lower_lr": [0.9, 0.7, 0.9, 0.6],  # back at step 4, and at the end the adapter of step 6
}


@pytest.mark.parametrize(("action", "cut"), [("stop", 4), ("lower_lr", 4), ("lower_lr", 6)])
def test_a_resumed_run_decides_alike_and_gives_the_same_bytes(old, scores, tmp_path, action, cut):
    plan, guard = PLANS[action], {"data": str(old), "action": action}
    scores += [BASE, *plan]
    whole = train(tmp_path / "whole", guard=guard)
    scores[:] = [BASE, *plan]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", guard=guard, callbacks=[StopAt(cut)])
    scores[:] = plan[cut // 2 :]
    resumed = train(tmp_path / "cut", "--resume", guard=guard)
    assert scores == []
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert (resumed.steps, resumed.written, resumed.notes[0]) == (whole.steps, whole.written, whole.notes[0])
    assert checks(tmp_path / "cut") == checks(tmp_path / "whole")
    last = sorted((tmp_path / "whole").glob("checkpoint-*"))[-1].name
    got, wanted = contents(tmp_path / "cut" / last), contents(tmp_path / "whole" / last)
    assert "guard_kept.safetensors" in wanted and [n for n in wanted if not same(got.get(n), wanted[n])] == []
    assert (tmp_path / "cut" / last / "guard.json").read_text() == (
        tmp_path / "whole" / last / "guard.json"
    ).read_text()


def test_a_checkpoint_without_all_of_the_guard_s_files_is_not_whole(old, scores, tmp_path):
    scores += [BASE, 0.9, 0.9]
    train(tmp_path / "a", "--max_steps=4", guard={"data": str(old)})
    for name in ("guard.json", "guard_kept.safetensors"):
        assert name in json.loads((tmp_path / "a" / "checkpoint-4" / "complete.json").read_text())["files"]


def test_resuming_with_another_guard(old, scores, tmp_path, unguarded):
    scores += [BASE, 0.9, 0.9]
    train(tmp_path / "a", "--max_steps=4", guard={"data": str(old)})
    flags = ["--resume", "--max_steps=8"]
    with pytest.raises(TrainingError, match="whose metric is accuracy, this run's is nll"):
        train(tmp_path / "a", *flags, guard={"data": str(old), "metric": "nll"})
    with pytest.raises(TrainingError, match="another action"):
        train(tmp_path / "a", *flags, guard={"data": str(old), "action": "lower_lr"})
    scores[:] = [0.8, 0.8]
    assert train(tmp_path / "a", *flags, guard={"data": str(old), "max_drop": 0.2}).written == 8
    shutil.copytree(unguarded, tmp_path / "b")
    scores[:] = [BASE, 0.88, 0.7]  # the base's, and the adapter's that the run goes on from
    more = train(tmp_path / "b", "--resume", "--max_steps=10", guard={"data": str(old)})
    assert checks(tmp_path / "b") == [(8, 0.88), (10, 0.7)] and more.written == 8
    assert (tmp_path / "b" / ADAPTER).read_bytes() == (unguarded / ADAPTER).read_bytes()


def test_an_adapter_to_continue_that_has_lost_the_skill_already(old, scores, tmp_path, unguarded):
    scores += [BASE, 0.5]
    flags = [flag for flag in RUN if not flag.startswith("--lora_r")]
    given = [
        f"--adapter_name_or_path={unguarded}",
        f"--output_dir={tmp_path / 'a'}",
        f"--guard={{data: {old}, every: 2}}",
    ]
    with pytest.raises(TrainingError, match="already before this run's first step"):
        run.train(load_recipe(None, [*flags, *given], PSFTConfig))


# ---- what is refused, and what is warned of ----


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("{data: x.jsonl, evry: 2}", "--guard: evry: there is no such option. Did you mean every"),
        ("{data: x.jsonl, metric: loss}", "--guard: metric is 'loss'; it must be accuracy, nll or kl"),
        ("{data: x.jsonl, action: halt}", "it must be stop, lower_lr or warn"),
        ("{every: 3}", "data is missing"),
        ("{data: x.jsonl, max_drop: 0}", "max_drop is 0.0; it must be above 0"),
        ("{data: x.jsonl, every: 0}", "every is 0; it must be at least 1"),
        ("x.jsonl", "it must be a mapping or none"),
    ],
)
def test_wrong_keys_and_values(guard, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, ["--guard", guard], PSFTConfig)


def test_a_recipe_s_guard_lies_beside_it(tmp_path, old):
    shutil.copy(old, tmp_path / "old.jsonl")
    (tmp_path / "recipe.yaml").write_text("guard: {data: old.jsonl, max_drop: 1e-1}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", [], PSFTConfig)
    assert recipe.run.guard["data"] == str(tmp_path / "old.jsonl") and recipe.run.guard["max_drop"] == 0.1
    (tmp_path / "recipe.yaml").write_text("guard: {data: old.jsonl, max_dropp: 1e-1}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: guard: max_dropp: .* Did you mean max_drop"):
        load_recipe(tmp_path / "recipe.yaml", [], PSFTConfig)


PLAIN = [{"text": "reverse 1234 is 4321"}] * 3
FREE = [{"prompt": "reverse: 1234", "completion": "no number"}] * 3


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (PLAIN, {}, "guard: .* is plain text: it has no answers.* metric to nll or kl"),
        (FREE, {"verifier": "gsm8k"}, "guard: .*finds no answer in any of the 3 references.* metric to nll or kl"),
        ([{"prompt": "a"}], {}, "guard: .*no references"),
    ],
)
def test_rows_without_answers(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        guard_set(write_rows(tmp_path / "rows.jsonl", rows), **options)


def test_plain_text_has_a_likelihood(tmp_path, moved):
    model, tokenizer = moved
    path = write_rows(tmp_path / "rows.jsonl", PLAIN)
    assert (
        0 < guard_set(path, metric="kl").score(model, tokenizer) < guard_set(path, metric="nll").score(model, tokenizer)
    )


def refused(capsys, folder, guard, *flags):
    assert cli.main(["train", *RUN, f"--output_dir={folder}", f"--guard={json.dumps(guard)}", *flags]) == 2
    return one_line(capsys.readouterr().err)


def test_an_earlier_run_is_there_still_when_the_guard_is_refused(old, scores, tmp_path, unguarded, capsys):
    shutil.copytree(unguarded, tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    scores += [0.03]
    said = refused(capsys, tmp_path / "a", {"data": str(old), "every": 2}, "--overwrite")
    assert "the base answers 3.0% of" in said and "no skill to guard" in said and "nll or kl" in said
    said = refused(capsys, tmp_path / "a", {"data": str(old), "every": 9}, "--overwrite")
    assert "every is 9, and the run has 8 optimizer steps" in said
    said = refused(capsys, tmp_path / "a", {"data": "./nowhere.jsonl"}, "--overwrite")
    assert "guard: There is no file ./nowhere.jsonl" in said
    evaluated = ["--eval_strategy=steps", "--eval_steps=2", "--eval_dataset=demo-noisy", "--load_best_model_at_end"]
    said = refused(capsys, tmp_path / "a", {"data": str(old), "every": 2}, "--overwrite", *evaluated)
    assert "both choose the adapter that is written" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}


def test_few_rows_are_warned_of(old):
    with pytest.warns(UserWarning, match="20 rows, so a single answer .* Use at least 50 rows"):
        guard_set(old, max_drop=0.02).check_base(0.9)


@pytest.mark.filterwarnings("error")
def test_enough_rows_are_not(old):
    guard_set(old).check_base(0.9)
    guard_set(old, metric="nll", max_drop=0.01).check_base(3.0)


@pytest.mark.parametrize(("seconds", "share"), [(0.5, None), (4.0, "80%")])
def test_a_guard_that_takes_more_than_a_tenth_of_the_time(old, scores, tmp_path, monkeypatch, recwarn, seconds, share):
    """A step takes a second, on a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr(guards.time, "perf_counter", lambda: clock[0])
    told = [BASE, *[0.9] * 4]

    def score(self, model, tokenizer):
        clock[0] += seconds
        return told.pop(0)

    monkeypatch.setattr(GuardSet, "score", score)

    class Step(guards.CheckpointedCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock[0] += 1.0

        def save_to(self, folder):
            pass

    train(tmp_path / "a", "--max_steps=20", guard={"data": str(old), "every": 5}, callbacks=[Step()])
    said = [str(w.message) for w in recwarn if "guard" in str(w.message)]
    if share is None:
        assert said == []
    else:
        assert len(said) == 1 and f"take {share} as long as the training itself, 4 s each" in said[0]
        assert "every: 40" in said[0]


def test_the_plot_shows_old_and_new_skill(tmp_path):
    from qpsft.train.plot import training_figure

    lines = [{"step": s, "nll": 2 - s / 8, "entropy": 1, "clip_fraction": 0, "approx_kl": 0} for s in (2, 4)]
    guarded = [{"step": s, "guard_accuracy": 0.9 - s / 100, "guard_limit": 0.85} for s in (0, 2, 4)]
    assert len(training_figure(lines).axes) == 4
    *_, left, right = training_figure(lines + guarded).axes
    old_skill, limit = left.get_lines()
    assert list(old_skill.get_ydata()) == [0.9, 0.88, 0.86] and limit.get_linestyle() == "--"
    assert list(limit.get_ydata()) == [0.85] * 3 and list(right.get_lines()[0].get_ydata()) == [1.75, 1.5]


def test_fsdp_is_refused(old, monkeypatch, tmp_path):
    monkeypatch.setattr(guards, "fsdp_is_asked", lambda args: True)
    with pytest.raises(RecipeError, match="not supported with FSDP"):
        train(tmp_path / "a", guard={"data": str(old)})


# ---- a real run ----


@pytest.mark.journey
def test_a_real_run_ends_before_the_old_skill_is_gone(tmp_path):
    """The recipe of docs/guard.md, with fewer rows and checks; what is written is measured again, from its folder."""
    from peft import PeftModel

    recipe = re.search(r"```yaml\n(model_name.*?)```", text_of(ROOT / "docs" / "guard.md"), re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(recipe)
    sets = built_in.out_of_domain("test", 25).values()
    old = write_rows(tmp_path / "old.jsonl", [row for rows in sets for row in rows])
    options = {"data": str(old), "every": 8, "max_drop": 0.05, "max_new_tokens": 56}
    flags = [f"--guard={json.dumps(options)}", "--eval_strategy=no", "--eval_dataset=", "--eval_steps=none"]
    torch.manual_seed(0)
    path = tmp_path / "recipe.yaml"
    summary = run.train(load_recipe(path, [*flags, "--use_cpu", f"--output_dir={tmp_path / 'a'}"], PSFTConfig))
    scores = dict(checks(tmp_path / "a"))
    assert 8 <= summary.written < summary.steps < 63 and summary.steps == summary.written + 8
    assert scores[summary.steps] < scores[0] - 0.05 <= scores[summary.written]
    base, tokenizer = load_base("demo", verbose=False)
    in_domain = load_guard_set(GuardArguments(data="demo-noisy", metric="nll"), DataArguments())
    before = in_domain.score(base, tokenizer)
    model = PeftModel.from_pretrained(base, tmp_path / "a")
    one = load_guard_set(GuardArguments(**options), DataArguments())
    assert one.score(model, tokenizer) == pytest.approx(scores[summary.written], abs=0.011)
    assert in_domain.score(model, tokenizer) < before - 0.5  # the new skill: 1.06 before
