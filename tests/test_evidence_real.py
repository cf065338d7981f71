"""benchmarks/evidence_real.py: the wrong rows, the table from made-up results, and the whole study at tiny size."""

import ast
import json
import math
from dataclasses import replace
from fractions import Fraction

import evidence_full
import evidence_real
import evidence_real_parts as parts
import evidence_real_table as table
import pytest
import rl_smollm2
from byte_tokenizers import CHATML, byte_tokenizer
from conftest import shared_path
from evidence_real import ARMS, Run
from tiny_models import save_tiny_model

from qpsft.errors import RecipeError

pytestmark = pytest.mark.bench


@pytest.fixture(scope="session")
def data():
    return shared_path("data")


# ---- rows ----


def text(row):
    return row["completion"][0]["content"]


MISLABELLED = {"chal-680"}  # 4 - 2 + 3, and the answer given is 1


def test_every_answer_of_svamp_is_its_equation_s(data):
    wrong = set()
    for row in parts.svamp_split(data):
        equation, _, answer = parts.solved(row["Equation"]).partition(" = ")
        assert abs(eval(equation) - float(answer)) < 0.01
        if abs(float(answer) - row["Answer"]) > 0.01:
            wrong.add(row["ID"])
    assert wrong == MISLABELLED
    assert parts.solved("( 8.0 / ( 5.0 - 3.5 ) )") == "8 / (5 - 3.5) = 5.33"


@pytest.mark.parametrize(
    "equation, expected",
    [
        ("( 76.0 - 25.0 )", {"76 + 25", "76 * 25", "76 / 25", "25 - 76"}),
        ("( 2.0 * 2.0 )", {"2 - 2", "2 / 2"}),  # 2 + 2 is right too
        ("( 5.0 / 3.0 )", {"5 + 3", "5 - 3", "5 * 3", "3 / 5"}),
        ("( 7.0 - 0.0 )", {"7 * 0", "0 - 7"}),  # 7 + 0 is right, 7 / 0 nothing
        ("7.0", set()),
    ],
)
def test_mistakes_are_another_operator_or_exchanged_operands(equation, expected):
    assert set(parts.mistakes(equation)) == expected


def test_mistakes_reach_every_operation_of_a_nested_equation():
    found = set(parts.mistakes("( ( 8.0 + 6.0 ) / 2.0 )"))
    assert {"(8 - 6) / 2", "(8 + 6) * 2", "8 + 6 - 2"} <= found and "(8 + 6) / 2" not in found


def test_exactly_three_in_ten_training_rows_are_wrong_each_consistent_with_itself(data):
    sizes = (700, 100, 200)
    clean, noisy = (parts.load_part(name, data, sizes) for name in ("svamp", "svamp_noisy"))
    assert noisy == parts.load_part("svamp_noisy", data, sizes)
    assert (len(noisy.train), len(noisy.validation), len(noisy.test)) == sizes
    assert noisy.validation == clean.validation and noisy.test == clean.test
    wrong = 0
    for right, row in zip(clean.train, noisy.train, strict=True):
        assert row["prompt"] == right["prompt"]
        equation, _, answer = text(row).partition(" = ")
        value = parts.value_of(ast.parse(equation, mode="eval").body)
        assert abs(value - Fraction(answer)) <= Fraction(1, 200)
        wrong += parts.RIGHT(right, text(row)) is not True
    assert wrong == sum(one != other for one, other in zip(clean.train, noisy.train, strict=True)) == 210


@pytest.mark.parametrize("name", evidence_real.PARTS)
def test_no_row_is_in_two_splits(data, name):
    part = parts.load_part(name, data, (64, 16, 32))
    sets = [{json.dumps(row["prompt"]) for row in rows} for rows in (part.train, part.validation, part.test)]
    assert [len(one) for one in sets] == [64, 16, 32] and len(set.union(*sets)) == 112
    assert name != "gsm8k" or "<<" not in text(part.train[0])


def test_kept_is_relative_to_the_base_and_leaves_out_what_it_cannot_do():
    base = {"ifeval": 0.4, "arc_easy": 0.5, "openbookqa": 0.0, "mt_bench/nll": 1.0, "user/nll": 1.0, "probe_words": 60}
    assert parts.kept(base, base) == {
        "ifeval": 1, "arc_easy": 1, "mt_bench": 1, "user": 1, "probe": 1, "text": 1, "kept": 1
    }  # fmt: skip
    after = base | {"ifeval": 0.1, "user/nll": 2.0, "probe_words": 6}
    found = parts.kept(after, base)
    assert found["ifeval"] == 0.25 and found["probe"] == 0.1 and found["user"] == pytest.approx(0.36788, abs=1e-5)
    assert found["kept"] == pytest.approx((0.25 + 1 + 1 + 0.36788 + 0.1) / 5, abs=1e-5)
    del after["ifeval"]
    assert "kept" not in parts.kept(after, base)  # in the middle of a run, where tasks are not measured
    assert parts.kept(base | {"probe_words": 0}, base)["probe"] == 0
    assert "probe" not in parts.kept(base, base | {"probe_words": 0})


# ---- the table, from made-up results ----

BASE = {"test/accuracy": 0.1, "test/nll": 2.0, "mt_bench/nll": 1.0, "user/nll": 1.0, "ifeval": 0.5, "probe_words": 60.0}


def made_up(learnt, ifeval, validation=None):
    """A run measured twice; it keeps half as much at the end as in the middle."""
    middle = BASE | {"test/accuracy": learnt / 2, "ifeval": ifeval}
    end = BASE | {"test/accuracy": learnt, "ifeval": ifeval / 2}
    end |= {"validation/accuracy": learnt if validation is None else validation, "validation/nll": 1.0}
    return {"points": [{"epoch": 1, "step": 5, "metrics": middle}, {"epoch": 2, "step": 10, "metrics": end}]}


@pytest.fixture
def records():
    made = {
        Run("svamp", "sft", 1e-4): made_up(0.3, 0.5),
        Run("svamp", "sft", 1e-3): made_up(0.5, 0.3),
        Run("svamp", "psft", 1e-4): made_up(0.4, 0.5),
        Run("svamp", "psft", 1e-3): made_up(0.5, 0.5) | {"diverged": {"step": 9, "error": "NaN"}},
        Run("svamp", "sft_matched", 1e-4): made_up(0.3, 0.5),
        Run("svamp", "sft", 1e-3, 1): made_up(0.6, 0.4),
        Run("svamp", "psft", 1e-4, 1): made_up(0.4, 0.6),
        Run("svamp", "sft_matched", 1e-4, 1): made_up(0.3, 0.5),
    }
    return made


def test_rates_are_chosen_on_validation_rows_and_a_control_takes_its_treatment_s(records):
    arms = ["sft", "psft", "sft_matched"]
    assert evidence_real.chosen_rates("svamp", arms, records) == {"sft": 1e-3, "psft": 1e-4, "sft_matched": 1e-4}
    records[Run("svamp", "sft", 1e-4)] = made_up(0.3, 0.5, validation=0.9)
    assert evidence_real.chosen_rates("svamp", arms, records)["sft"] == 1e-4
    by_nll = Run("gsm8k", "sft", 1e-4), Run("gsm8k", "sft", 1e-3)
    found = {run: made_up(0.3, 0.5) for run in by_nll}
    found[by_nll[1]]["points"][-1]["metrics"] |= {"validation/nll": 0.9, "validation/accuracy": 0.0}
    assert evidence_real.chosen_rates("gsm8k", ["sft"], found) == {"sft": 1e-3}


def test_the_table_has_means_over_seeds_beside_the_base(records):
    rates = {"sft": 1e-3, "psft": 1e-4}
    header, base, sft, psft = table.arm_rows(records, rates, "svamp", BASE)
    cell = {name: header.index(name) for name in ("seeds", "learnt", "IFEval", "words")}
    assert [row[cell["learnt"]] for row in (base, sft, psft)] == ["0.1", "0.55 ± 0.071", "0.4 ± 0"]
    assert [row[cell["IFEval"]] for row in (base, sft)] == ["0.5", "0.175 ± 0.035"]
    assert sft[cell["seeds"]] == "2" and "TQA 1" not in header and sft[cell["words"]] == "60 ± 0"
    diverged = table.arm_rows(records, {"psft": 1e-3}, "svamp", BASE)[-1]
    assert diverged[cell["seeds"]] == "0" and diverged[cell["learnt"]] == "–"
    epochs = table.epoch_rows(records, rates, "svamp", BASE)
    assert [row[:3] for row in epochs[1:3]] == [["sft", "1", "0.275 ± 0.035"], ["sft", "2", "0.55 ± 0.071"]]


def test_what_is_kept_is_compared_at_equal_in_domain_score(records):
    rates = {"sft": 1e-3, "psft": 1e-4, "sft_matched": 1e-4}
    found = {
        (one["arm"], one["control"], one["over"]): one
        for one in table.compared(records, rates, "svamp", BASE)
        if one["of"] == "kept"
    }
    assert ("psft", "sft_matched", "frontier") not in found  # a control has one rate
    # kept: of IFEval and four skills that stay. At .3, the most of the control, psft lies halfway between its points.
    control = found["psft", "sft_matched", "chosen"]
    assert control["learnt"] == 0.3 and control["difference"]["n"] == 2
    expected = [(0.75 * 0.5 - 0.25) / 0.5 / 4, (0.75 * 0.6 - 0.25) / 0.5 / 4]
    assert control["difference"]["mean"] == pytest.approx(sum(expected) / 2)
    assert control["difference"]["half_width"] > 0
    rows = table.comparison_rows([control])
    assert rows[1][:4] == ["psft − sft_matched", "kept", "chosen", "0.300"] and "±" in rows[1][4]
    frontier = found["psft", "sft", "frontier"]  # over all rates: the diverged run's points count too
    assert frontier["learnt"] == pytest.approx((0.5 + 0.4) / 2)


def test_own_text_is_compared_where_right_answers_are_as_likely():
    def run(nll, text):  # text: the likelihood of own text, relative
        own = {f"{name}/nll": 1 - math.log(text) for name in ("mt_bench", "user")}
        return {"points": [{"epoch": 1, "step": 5, "metrics": BASE | {"test/nll": nll} | own}]}

    made = {
        Run("svamp", "sft", 1e-4): run(1.0, 0.9),
        Run("svamp", "sft", 1e-3): run(0.5, 0.7),
        Run("svamp", "psft", 1e-4): run(1.5, 0.9),  # halfway between the base and sft at 1e-4
        Run("svamp", "psft", 5e-4): run(0.6, 0.7),
        Run("svamp", "psft", 5e-4, 1): run(0.7, 0.9),
        Run("svamp", "psft", 1e-3): run(0.4, 0.8),  # beyond sft
        Run("svamp", "psft", 1e-2): run(0.4, 0.8) | {"diverged": {"step": 9, "error": "NaN"}},
    }
    rows = table.equal_rows(made, "svamp", BASE)
    assert [row[1:] for row in rows[1:]] == [
        ["0.0001", "1.500", "0.900", "-0.050"],
        ["0.0005", "0.650", "0.800", "+0.040"],
        ["0.001", "0.400", "0.800", "+0.100"],
    ]
    assert table.equal_rows({run: one for run, one in made.items() if run.arm != "sft"}, "svamp", BASE)[1:] == []


def test_nothing_is_compared_where_nothing_was_learnt(records):
    rates = {"sft": 1e-3, "psft": 1e-4}
    assert not table.compared(records, rates, "svamp", BASE | {"test/accuracy": 0.7})


def test_more_seeds_are_for_the_named_arms_the_controls_and_those_that_led(monkeypatch, records):
    monkeypatch.setattr(evidence_real, "SEEDED", ("sft",))
    given = evidence_real.parser().parse_args([])
    given.arms, given.rates, given.seeds = ["sft", "psft", "dft", "sft_matched"], [1e-4, 1e-3], 2
    made = {run: one for run, one in records.items() if run.seed == 0 and run.arm != "sft_matched"}
    made[Run("svamp", "dft", 1e-4)] = made_up(0.2, 0.5)
    runs = evidence_real.seeded("svamp", given, made, BASE)
    assert Run("svamp", "sft_matched", 1e-4) in runs  # at psft's rate
    assert {run.arm for run in runs if run.seed == 1} == {"sft"}
    given.all_seeds = given.every_rate = True
    more = [run for run in evidence_real.seeded("svamp", given, made, BASE) if run.seed == 1]
    assert len([run for run in more if run.arm == "dft"]) == 2
    assert [run.rate for run in more if run.arm == "sft_matched"] == [1e-4]


def test_a_study_has_other_trust_regions_only_where_they_are_named(tmp_path):
    def arms(*named):
        return evidence_real.read_options([f"--model={tmp_path}", f"--data={tmp_path}", "--device=cpu", *named]).arms

    (tmp_path / "config.json").write_text("{}")
    assert not set(arms()) & set(evidence_real.TRUST_REGIONS)
    named = arms("--arms=psft,psft_eps0.1")
    assert ARMS[named[1]].options == ARMS[named[0]].options | {"epsilon": 0.1}


# ---- the whole study ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that reads bytes and has a chat template."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.eos_token = "<|im_end|>"
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096, **small)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def flags(model, data, output, *more):
    tiny = {"parts": "svamp_noisy", "arms": "sft,sft_matched,psft", "rates": "5e-3", "seeds": 1, "epochs": "1,2"}
    tiny |= {
        "train": 32,
        "held_out": "2,3",
        "ifeval": 2,
        "truthfulqa": 1,
        "choices": 1,
        "answers": 2,
        "probe": 2,
        "max_tokens": 8,
    }
    given = {"model": model, "data": data, "output": output, "device": "cpu", "dtype": "float32"} | tiny
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def test_the_whole_study_goes_on_does_nothing_twice_and_prints_its_table(model, data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    for name in ("EQUATION_TOKENS", "SENTENCES_TOKENS"):
        monkeypatch.setattr(parts, name, 8)
    done = []
    real = evidence_real.do_run

    def counted(study, run):
        if len(done) == 2:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(run.label)
        return real(study, run)

    monkeypatch.setattr(evidence_real, "do_run", counted)
    with pytest.raises(KeyboardInterrupt):
        evidence_real.main(flags(model, data, tmp_path))
    capsys.readouterr()
    assert evidence_real.main(flags(model, data, tmp_path, "--table", f"--tables={tmp_path / 'other'}")) == 0
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"summary.txt", "summary.json", "kept.png"}
    assert evidence_real.main(flags(model, data, tmp_path, "--table")) == 0
    assert "sft" in capsys.readouterr().out and len(done) == 3
    assert evidence_real.main(flags(model, data, tmp_path)) == 0
    sft, psft = ("svamp_noisy-sft-lr0.005-seed0", "svamp_noisy-psft-lr0.005-seed0")
    assert done == ["svamp_noisy-base", sft, "killed", psft]  # sft_matched is sft's run at that rate
    assert evidence_real.main(flags(model, data, tmp_path)) == 0 and len(done) == 4
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("IFEval", "TQA 1", "ARC-e", "OBQA", "words", "sft_matched", "psft"))
    assert (tmp_path / "kept.png").stat().st_size > 10_000

    (path,) = (tmp_path / "runs").glob(f"{sft}-*.json")
    record = json.loads(path.read_text())
    assert [point["epoch"] for point in record["points"]] == [1, 2] and record["points"][-1]["step"] == 4
    middle, end = (point["metrics"] for point in record["points"])
    assert "ifeval" not in middle and {"ifeval", "truthfulqa_mc2", "validation/accuracy"} <= set(end)
    assert end["test/nll"] < middle["test/nll"] and end["mt_bench/kl"] > middle["mt_bench/kl"] > 0
    assert record["environment"]["versions"]["torch"] and "evidence_real.py" in record["environment"]["command"]
    summary = json.loads((tmp_path / "summary.json").read_text())["svamp_noisy"]
    assert summary["rates"] == {"sft": 0.005, "sft_matched": 0.005, "psft": 0.005}
    assert summary["environment"]["versions"] and len(summary["runs"]) == 3
    assert summary["base"]["mt_bench/nll"] != end["mt_bench/nll"]

    # full fine-tuning on the same rows
    own = [flag for flag in flags(model, data, tmp_path) if not flag.startswith(("--arms", "--rates", "--seeds"))]
    evidence_full.main([*own, "--arms=sft,psft", "--rates=1e-2,3e-2"])
    capsys.readouterr()
    evidence_full.main([*own, "--arms=sft,psft", "--rates=1e-2,3e-2"])
    assert "psft" in capsys.readouterr().out
    full = [json.loads(path.read_text()) for path in sorted((tmp_path / "full").iterdir())]
    assert [one["steps"] for one in full] == [40] * 4  # as few as a block with visits, and the block before it
    likelihoods = {one["metrics"]["test/nll"] for one in full}
    assert len(likelihoods) == 4 and max(likelihoods) < summary["base"]["test/nll"]


def test_full_fine_tuning_takes_as_many_steps_with_every_arm():
    for given, taken in ((44, 40), (88, 72)):
        options = {arm: evidence_full.options_of(arm, given) for arm in evidence_full.ARMS}
        steps = {
            arm: one["sft_warmup_steps"] + one["blocks"] * evidence_full.REFERENCE_STEPS * one["num_iterations"]
            for arm, one in options.items()
        }
        assert set(steps.values()) == {taken}, steps


def test_grpo_goes_on_from_the_starts(model, data, tmp_path, monkeypatch, capsys):
    for name in ("EQUATION_TOKENS", "SENTENCES_TOKENS"):
        monkeypatch.setattr(parts, name, 8)
    monkeypatch.setattr(rl_smollm2, "EQUATION_TOKENS", 8)
    arguments = [flag for flag in flags(model, data, tmp_path) if not flag.startswith(("--arms", "--rates", "--seeds"))]
    arguments += ["--starts=sft,psft", "--arm_rate=5e-3", "--rate=1e-2", "--steps=2"]
    with pytest.raises(SystemExit, match="base is not measured yet"):
        rl_smollm2.main(arguments)
    study = evidence_real.make_study(evidence_real.read_options(flags(model, data, tmp_path, "--dtype=float32")), [])
    (tmp_path / "runs").mkdir()
    evidence_real.do_run(replace(study, measured=study.measured | {"truthfulqa": 0}), Run("svamp_noisy"))
    rl_smollm2.main(arguments)
    rl_smollm2.main(arguments)  # what is done is read
    assert capsys.readouterr().out.count("psft") == 4
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "rl").glob("*.json"))]
    assert [record["start"] for record in records] == ["psft", "sft"]
    for record in records:
        assert [point["step"] for point in record["points"]] == [0, 2] and len(record["log"]) == 2
    first = [record["points"][0]["test/nll"] for record in records]
    assert first[0] != first[1]


def test_the_reward_is_the_right_number_and_the_questions_are_new(data):
    rows = rl_smollm2.questions(data, (350, 20, 100))
    other = parts.load_part("svamp", data, (350, 20, 100))
    seen = {row["prompt"][0]["content"] for row in [*other.train, *other.validation, *other.test]}
    assert len(rows) == 530 and seen.isdisjoint(row["prompt"][0]["content"] for row in rows)
    completions = [[{"role": "assistant", "content": text}] for text in ("8 + 5 = 13", "13", "8 + 5 = 14", "")]
    assert rl_smollm2.right(completions, ["13 = 13"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_unpacked_weights_give_the_same_numbers(model, data):
    from qpsft.model.base import load_base
    from qpsft.model.base_record import quantized_linears

    loaded, _ = load_base(str(model), dtype="bfloat16", device="cpu", verbose=False)
    rows = [{"input_ids": list(range(20)), "labels": list(range(20))}]
    before = parts.likelihood(loaded, rows)
    layers = list(quantized_linears(loaded).values())
    with parts.dense(loaded):
        assert parts.likelihood(loaded, rows) == before and "forward" in vars(layers[0])
    assert parts.likelihood(loaded, rows) == before and not any("forward" in vars(layer) for layer in layers)


def test_another_setting_is_another_run(model, data, tmp_path):
    argv = flags(model, data, tmp_path)
    study = evidence_real.make_study(evidence_real.read_options(argv), argv)
    run = Run("svamp", "psft_kl", 1e-3)
    others = [replace(study, epochs=(1,)), replace(study, measured=study.measured | {"probe": 3})]
    others += [replace(study, rows=study.rows | {"svamp": (33, 2, 3)})]
    assert len({one.path(run) for one in (study, *others)}) == 4
    assert study.path(replace(run, seed=1)) != study.path(run) != study.path(replace(run, rate=2e-3))
    assert study.path(Run("svamp", "sft", 1e-3)) == study.path(Run("svamp", "sft_matched", 1e-3))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_that_qpsft_reads(model, data, tmp_path, arm):
    import yaml

    from qpsft.psft.config import PSFTConfig
    from qpsft.recipe.file import load_recipe

    argv = flags(model, data, tmp_path)
    study = evidence_real.make_study(evidence_real.read_options(argv), argv)
    values = evidence_real.recipe_values(study, Run("svamp", arm, 1e-3, 1), tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path, [], PSFTConfig)
    trainer = recipe.trainer
    assert trainer.learning_rate == 1e-3 and trainer.seed == 1 and trainer.num_train_epochs == 2
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == 16
    assert recipe.data.replay_share == (0.1 if arm.endswith("replay") else None)
    assert (trainer.base_kl > 0) == (arm in ("sft_kl", "asft", "psft_kl"))
    assert trainer.visits == (4 if arm in ("psft_visits", "sft_blocks") else 1)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--arms=sftt"], "no arm 'sftt'"),
        (["--parts=svam"], "no part 'svam'"),
        (["--arms=sft,sft_matched"], "takes the rate of psft"),
        (["--model=nowhere"], "no model in nowhere"),
        (["--data=nowhere"], "not in nowhere"),
    ],
)
def test_a_mistake_is_named(model, data, tmp_path, given, message, capsys):
    assert evidence_real.main([*flags(model, data, tmp_path), *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_quick_is_small_and_a_flag_wins_over_it(model, data):
    given = [f"--model={model}", f"--data={data}", "--device=cpu"]
    quick = evidence_real.read_options([*given, "--quick", "--seeds=2"])
    assert quick.arms == ("sft", "psft_kl") and quick.seeds == 2 and quick.train == 96 and quick.dtype == "auto"
    small = evidence_real.read_options([*given, "--small", "--arms=sft,sft_kl"])
    assert small.arms == ["sft", "sft_kl"] and small.seeds == 3 and small.rates == (5e-4,) and small.dtype == "bfloat16"
    whole = evidence_real.read_options(given)
    assert whole.arms == tuple(evidence_real.STUDIED) and whole.seeds == 3 and whole.ifeval == 150
    with pytest.raises(RecipeError):
        evidence_real.read_options([*given, "--arms=psftt"])
