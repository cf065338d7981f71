"""The long attacks: kills at random moments, every file of every folder damaged, full disks, many runs at once.

    nice pytest tests/attack/test_long.py -m slow -n 0 -s

Each prints what it tried. With $QPSFT_KILLS, so many kills for each verb instead of 50.
"""

import contextlib
import gc
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from killer import VERBS
from planted import ROOT
from small_runs import make_base
from verbs import TRAIN, contents, flip, half, train

from qpsft import cli
from qpsft.export.llama_cpp import find_llama_cpp
from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.folder import MODEL_DIR
from qpsft.psft.checkpoint import check_bytes, checkpoints, is_complete

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("QPSFT_KILLS", 50))
HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_any_moment(tmp_path, verb):
    if verb == "export":
        find_llama_cpp()  # before anything is killed: it may be downloaded
    command = [sys.executable, str(HERE / "killer.py"), verb, str(tmp_path / "out"), str(KILLS), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout, end="")


# ---- damage ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind that verbs read."""
    place = tmp_path_factory.mktemp("folders")
    base = make_base(place / "base")
    rows = place / "rows.jsonl"
    rows.write_text('{"prompt": "w3 w4", "completion": "w5"}\n' * 32)
    flags = [f"--model_name_or_path={base}", f"--dataset_name={rows}", "--prompt_format={prompt} "]
    assert train(place / "run", *TRAIN, *flags, "--save_steps=1") == 0
    assert cli.main(["merge", str(place / "run"), "-o", str(place / "merged"), "--no_verify"]) == 0
    return {"base": base, "run": place / "run", "merged": place / "merged", "rows": rows}


def verbs_of(kind: str, copy: Path, folders: dict[str, Path], out: Path) -> list[list[str]]:
    """What reads a folder of this kind."""
    rows, sources = folders["rows"], {**folders, kind: copy}
    flags = [*TRAIN, f"--dataset_name={rows}", "--prompt_format={prompt} ", f"--output_dir={out}"]
    new = ["train", *flags, f"--model_name_or_path={sources['base']}"]
    if kind == "base":
        return [new, ["chat", str(copy)], ["merge", str(folders["run"]), "--base", str(copy), "-o", str(out)]]
    if kind == "merged":
        return [
            ["chat", str(copy)],
            ["verify", str(folders["run"]), str(copy)],
            ["push", str(copy), "a/b", "--dry_run"],
        ]
    resumed = [word for word in new if "--output_dir" not in word] + [
        f"--output_dir={copy}",
        "--resume",
        "--max_steps=2",
    ]
    return [
        ["chat", str(copy)],
        ["evaluate", str(copy), "--data", str(rows), "--k=0", "--no_drift"],
        ["merge", str(copy), "-o", str(out), "--no_verify"],
        ["export", str(copy), "--to=vllm"],
        ["push", str(copy), "a/b", "--dry_run"],
        resumed,
    ]


DAMAGES = {
    "flipped": lambda path, rng: flip(path, rng),
    "half": lambda path, rng: half(path),
    "empty": lambda path, rng: path.write_bytes(b""),
    "gone": lambda path, rng: path.unlink(),
}


@pytest.mark.parametrize("kind", ["base", "run", "merged"])
def test_every_file_of_every_folder_damaged(folders, tmp_path, kind, monkeypatch):
    """Every verb that reads it ends with 0, 1 (verify) or 2; with a damaged checkpoint or adapter never with 0."""
    rng, counts, fell = random.Random(5), Counter(), []
    names = sorted(contents(folders[kind]))
    for name in names:
        for damage, do in DAMAGES.items():
            if damage != "flipped" and not (folders[kind] / name).stat().st_size:
                continue
            copy = Path(shutil.copytree(folders[kind], tmp_path / "copy", dirs_exist_ok=True))
            if damage == "flipped" and (copy / name).stat().st_size < 4:
                continue
            do(copy / name, rng)
            for arguments in verbs_of(kind, copy, folders, tmp_path / "out"):
                monkeypatch.setattr(sys, "stdin", io.StringIO("w3\n"))
                said = io.StringIO()
                try:
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                        code = cli.main(arguments)
                except Exception as error:  # noqa: BLE001
                    fell.append(f"{name} {damage}: {arguments[0]}: {type(error).__name__}: {str(error)[:200]}")
                    code = None
                counts[f"exit {code}"] += 1
                decisive = name.endswith(("adapter_model.safetensors", "optimizer.pt")) and damage != "gone"
                in_checkpoint = "checkpoint-" in name
                reads_it = ("--resume" in arguments) == in_checkpoint
                if kind == "run" and decisive and reads_it and code == 0:
                    fell.append(f"{name} {damage}: {arguments[0]} took it")
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.rmtree(copy)
    print(f"{kind}: {len(names)} files, {sum(counts.values())} tried, {len(fell)} fell; {dict(counts)}")
    assert not fell, "\n".join(fell)


# ---- full disks ----


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int):
    """A file system of so many KB."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=False)
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield
    finally:
        gc.collect()  # of models whose weights are files there
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("over", [False, True], ids=["new", "overwrite"])
def test_a_disk_that_is_full_anywhere_in_a_run(tmp_path, capsys, over):
    place, counts = tmp_path / "disk", Counter()
    flags = [*TRAIN, "--max_steps=2", "--save_steps=1"]
    assert train(tmp_path / "earlier", *flags, "--seed=5") == 0
    earlier = contents(tmp_path / "earlier")
    size = sum(map(len, earlier.values())) // 1000
    for kilobytes in [round(size * (over + share / 12)) + 64 * over for share in range(1, 19)]:
        with disk(place, kilobytes):
            folder = place / "run"
            if over:
                shutil.copytree(tmp_path / "earlier", folder)
            capsys.readouterr()
            code = train(folder, *flags, "--seed=3", *(["--overwrite"] if over else []))
            words = capsys.readouterr().err
            assert code in (0, 2) and "Traceback" not in words, words
            counts[f"exit {code}"] += 1
            for one in checkpoints(folder) if folder.exists() else []:
                if is_complete(one):
                    check_bytes(one)
            if code == 2:
                assert "cannot be written" in words or "could not be written" in words or "No space" in words, words
                if over:
                    now = {name: text for name, text in contents(folder).items() if not name.startswith(".qpsft")}
                    assert now == {name: text for name, text in earlier.items() if not name.startswith(".qpsft")}
            if (folder / "adapter_model.safetensors").is_file():
                AdapterFolder(folder).base_folder()
    print(f"full disk, {'overwrite' if over else 'new'}: {sum(counts.values())} sizes; {dict(counts)}")
    assert len(counts) == 2, "the sizes tried nothing"


def test_a_disk_that_is_full_anywhere_in_a_merge(tmp_path, capsys):
    assert train(tmp_path / "run", *TRAIN) == 0
    size = sum(map(len, contents(MODEL_DIR).values())) // 1000
    counts = Counter()
    for share in range(1, 31):
        with disk(tmp_path / "disk", round(size * share / 20)):
            output = tmp_path / "disk" / "merged"
            code = cli.main(["merge", str(tmp_path / "run"), "-o", str(output), "--no_verify"])
            words = capsys.readouterr().err
            assert code in (0, 2) and "Traceback" not in words and output.exists() == (code == 0)
            assert [path for path in (tmp_path / "disk").iterdir() if path != output] == []
            counts[f"exit {code}"] += 1
    print(f"full disk, merge: {sum(counts.values())} sizes; {dict(counts)}")


@pytest.mark.parametrize("verb", ["merge", "gguf", "nf4"])
def test_a_disk_of_just_the_size_that_the_check_asks_for(tmp_path, monkeypatch, capsys, verb):
    assert train(tmp_path / "run", *TRAIN) == 0
    asked = []
    modules = {"merge": ["merge.weights"], "gguf": ["export.gguf"], "nf4": ["merge.weights", "export.nf4"]}[verb]
    for module in modules:
        monkeypatch.setattr(f"qpsft.{module}.check_space", lambda folder, needed, what: asked.append(needed))

    def write(folder: Path) -> int:
        argv = ["merge", "--no_verify"] if verb == "merge" else ["export", f"--to={verb}"]
        return cli.main([argv[0], str(tmp_path / "run"), "-o", str(folder / "out"), *argv[1:]])

    (tmp_path / "free").mkdir()
    assert write(tmp_path / "free") == 0
    monkeypatch.undo()
    pages = -(-int(max(asked)) // 4096)
    for more, code in ((0, 0), (-1, 2)):
        with disk(tmp_path / "disk", 4 * (pages + more)):
            capsys.readouterr()
            assert write(tmp_path / "disk") == code, capsys.readouterr().err
            assert (tmp_path / "disk" / "out").exists() == (code == 0)
    print(f"disk of just the size, {verb}: 2 sizes")


# ---- many at once ----


def start(arguments: list[str], **more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from qpsft.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**more)
    )


def test_eight_runs_share_caches_that_are_empty(tmp_path):
    caches = {name: str(tmp_path / "caches" / name) for name in ("HF_HOME", "QPSFT_CACHE", "XDG_CACHE_HOME")}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n} + {n} = ", "completion": "{2 * n}"}}\n' for n in range(32)))
    flags = [*TRAIN, "--max_steps=2", f"--dataset_name={rows}"]
    runs = [start(["train", *flags, f"--output_dir={tmp_path / str(n)}"], **caches) for n in range(8)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 8, said
    made = {(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(8)}
    assert len(made) == 1
    print("8 runs with shared empty caches: 8 held, the same bytes")


def test_of_eight_runs_in_one_folder_at_most_one_writes(tmp_path):
    flags = [*TRAIN, "--max_steps=30", f"--output_dir={tmp_path / 'run'}"]
    runs = [start(["train", *flags]) for _ in range(8)]
    said = [run.communicate()[0] for run in runs]
    codes = Counter(run.returncode for run in runs)
    assert set(codes) <= {0, 2} and codes[0] <= 1, said
    refused = [text for run, text in zip(runs, said, strict=True) if run.returncode == 2]
    assert all("is writing into" in text or "already holds a run" in text for text in refused)
    if codes[0]:
        AdapterFolder(tmp_path / "run").base_folder()
    print(f"8 runs in one folder: {dict(codes)}")


# ---- folders that an ordinary user may read only ----

WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
"""As root, but what a file's bits forbid is forbidden, as it is to everyone else."""
VERBS_IN_TURN = """
import contextlib, io, json, sys
from qpsft.cli import main
outcomes = []
for argv in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(argv)
    outcomes.append([code, said.getvalue()])
json.dump(outcomes, sys.stdout)
"""


@pytest.mark.parametrize("how", ["mount", "permissions"])
def test_folders_that_can_only_be_read(tmp_path, how):
    if subprocess.run([*WITHOUT_PRIVILEGES, "true"], check=False, capture_output=True).returncode:
        pytest.skip("setpriv cannot give up privileges here")
    shelf, free = tmp_path / "shelf", tmp_path / "free"
    free.mkdir()
    with disk(shelf, 2**16) if how == "mount" else contextlib.nullcontext():
        base, rows, run = make_base(shelf / "base"), shelf / "rows.jsonl", shelf / "run"
        rows.write_text('{"prompt": "w3 w4", "completion": "w5"}\n' * 32)
        (shelf / "home").mkdir()
        flags = [f"--model_name_or_path={base}", f"--dataset_name={rows}", "--prompt_format={prompt} ", *TRAIN[3:]]
        assert train(run, *flags, "--save_steps=1") == 0
        assert cli.main(["merge", str(run), "-o", str(shelf / "merged")]) == 0
        command = {
            "mount": ["mount", "-o", "remount,ro", str(shelf)],
            "permissions": ["chmod", "-R", "a-w", str(shelf)],
        }[how]
        subprocess.run(command, check=True)
        before = contents(shelf)
        reading = [
            ["preview", *flags], ["plan", *flags], ["verify", run, shelf / "merged"],
            ["evaluate", run, "--data", rows, "--limit=2"], ["train", *flags, f"--output_dir={free / 'run'}"],
            ["merge", run, "-o", free / "merged"], ["export", run, "--to=vllm", "-o", free / "adapter"],
            ["compare", run, "--arms=sft", "--seeds=1", "--epochs=1", f"--output_dir={free / 'compared'}"],
        ]  # fmt: skip
        writing = [
            ["train", *flags, f"--output_dir={shelf / 'new'}"], ["train", *flags, f"--output_dir={run}", "--overwrite"],
            ["train", run, "--resume", "--max_steps=2"], ["merge", run, "-o", shelf / "again"],
            ["merge", run, "-o", shelf / "merged", "--overwrite"], ["export", run, "--to=gguf", "-o", shelf / "x.gguf"],
            ["compare", run, "--arms=sft", "--seeds=1", "--epochs=1", f"--output_dir={shelf / 'compared'}"],
            ["demo", f"--output_dir={shelf / 'demo'}"],
        ]  # fmt: skip
        argvs = [[str(word) for word in argv] for argv in [*reading, *writing, ["doctor"]]]
        done = subprocess.run(
            [*WITHOUT_PRIVILEGES, sys.executable, "-c", VERBS_IN_TURN], input=json.dumps(argvs), capture_output=True,
            text=True, cwd=shelf, env=environment(HOME=str(shelf / "home")),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        outcomes = list(zip(argvs, json.loads(done.stdout), strict=True))
        for argv, (code, said) in outcomes[: len(reading)]:
            assert code == 0, (argv, said)
        assert outcomes.pop()[1][0] == 1, "doctor: nothing can be downloaded into caches that are read-only"
        for argv, (code, said) in outcomes[len(reading) :]:
            assert code == 2 and ("Read-only file system" in said or "Permission denied" in said), (argv, said)
        assert contents(shelf) == before
        if how == "permissions":
            subprocess.run(["chmod", "-R", "u+w", str(shelf)], check=True)
    print(f"read-only by {how}: {len(reading)} that read, {len(writing)} that write")
