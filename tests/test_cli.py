"""The command line: what it says, refuses and writes, its exit codes, Ctrl-C, and the doctor."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import l2t
from l2t import _native, cli, doctor, reference, tasks
from l2t.compare import compare

TINY = [
    "--students",
    "2",
    "--lr",
    "0.1",
    "--set",
    "steps=4",
    "trial_students=2",
    "batch_size=16",
    "teacher_lr=1.0",
]


def teach(*arguments: str) -> int:
    return cli.main(["teach", "digits", *arguments, *TINY])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bytes_of(directory: Path) -> dict[str, bytes]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """The command, running in a session of its own, and heeding Ctrl-C as what a script starts may not."""
    return subprocess.Popen(
        [sys.executable, "-m", "l2t.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


# ---- what it says


def test_the_first_screen_shows_the_way(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in ("l2t teach mnist1d", "l2t compare mnist1d", "l2t report runs/mnist1d-*"):
        assert command in shown
    for name in tasks.names():
        assert name in shown
        assert ", ".join(tasks.get(name).regimes) in shown
        assert f"students: {', '.join(tasks.get(name).students)}" in shown
        assert f"{tasks.get(name).origin}; licence: {tasks.get(name).licence}" in shown


@pytest.mark.parametrize("command", ["data", "teach", "compare", "transfer", "report", "doctor"])
def test_every_command_explains_itself(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: l2t {command}")
    assert len(shown.splitlines()) > 5
    assert max(map(len, shown.splitlines())) < 120


def test_only_the_first_screen_lists_the_tasks(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_tasks", lambda: "  all of them")
    for arguments, listed in (
        ([], True),
        (["--help"], True),
        (["--version"], False),
        (["report", "--help"], False),
    ):
        assert cli.main(arguments) == 0
        assert ("all of them" in capsys.readouterr().out) == listed


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"l2t {importlib.metadata.version('l2t')}"


def test_the_package_is_the_command(tmp_path):
    command = [sys.executable, "-m", "l2t", "--version"]
    # Beside the sources Python would take these in place of the package that is installed.
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == f"l2t {importlib.metadata.version('l2t')}"


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["teach", "cifar"], "mnist1d, got 'cifar'"),
        (
            ["teach", "digits", "--regime", "dirty"],
            "the regime of digits must be one of clean, few, symmetric",
        ),
        (["teach", "digits", "--student", "vit"], "the student of digits must be one of mlp, "),
        (["teach", "digits", "--weight", "huge"], "weight must be one of shared, per-class, low-rank, full"),
        (["teach", "digits", "--link", "cubic"], "link must be one of sigmoid, identity, log-sigmoid"),
        (["teach", "digits", "--teacher", "gate"], "the kind of teacher must be one of loss, weight-net"),
        (
            ["teach", "digits", "--teacher", "weight-net", "--slots", "2", "--features", "none"],
            "--teacher weight-net must come without flags of another teacher, got --slots, --features",
        ),
        (["teach", "digits", "--features", "mood"], "features must be a non-empty sequence of progress, "),
        (["teach", "digits", "--features", "none", "--slots", "2"], "features must be a non-empty sequence"),
        (
            ["teach", "digits", "--teacher", "weight-net", "--set", "curvature=central"],
            "curvature must be reverse or recompute for a WeightNet, got 'central'",
        ),
        (["teach", "digits", "--lr", "-1"], "lr must be a number in"),
        (["teach", "digits", "--set", "stepz=3"], "the field of --set must be one of students, updates"),
        (["teach", "digits", "--set", "steps"], "--set must be FIELD=VALUE, got 'steps'"),
        (["teach", "digits", "--set", "measure=luck"], "measure must be one of calibrated-cross-entropy"),
        (["teach", "digits", "--device", "cuda:99"], "--device must be one of cpu"),
        (["compare", "nowhere"], "mnist1d) or an existing folder, got 'nowhere'"),
        (["compare", ".", "nowhere"], "mnist1d) or an existing folder, got 'nowhere'"),
        (
            ["compare", "digits", "mnist1d"],
            "compare must be given one task, or folders alone, got 'digits mnist1d'",
        ),
        (["compare", ".", "digits"], "compare must be given one task, or folders alone, got '. digits'"),
        (
            ["compare", ".", "--regime", "few"],
            "a comparison of folders must come without flags of another, got --regime",
        ),
        (["compare", "digits"], "the folder must hold a taught run or seed-* folders with one"),
        (["compare", "digits", "--regime", "dirty"], "the regime of digits must be one of clean"),
        (["transfer", "nowhere", "--to", "digits"], "the folder must hold a taught run or seed-* folders"),
        (["transfer", "nowhere", "--to", "cifar"], "the task must be one of "),
        (["transfer", "nowhere", "--to", "digits", "--student", "vit"], "the student of digits must be"),
        (["report", "nowhere"], "the folder must hold a taught run or seed-* folders with one"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(arguments, sentence, here, capsys):
    assert cli.main(arguments) == 2
    line = one_line(capsys)
    assert line.startswith("l2t.")
    assert sentence in line
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["sing"], ["teach"], ["teach", "digits", "--speed", "9"], ["teach", "digits", "--updates", "0"]],
)
def test_wrong_usage_has_exit_code_2(arguments, here, capsys):
    assert cli.main(arguments) == 2
    assert "usage: l2t" in capsys.readouterr().err
    assert not any(here.iterdir())


def test_a_count_is_a_whole_number_of_one_or_more(capsys):
    assert cli.main(["teach", "digits", "--updates", "0"]) == 2
    assert "it must be a whole number of 1 or more, got 0" in capsys.readouterr().err
    assert cli.main(["teach", "digits", "--updates", "few"]) == 2
    assert "invalid whole number value: 'few'" in capsys.readouterr().err
    for flag in ("--seeds", "--data-seed"):
        assert cli.main(["teach", "digits", flag, str(2**63)]) == 2
        assert f"it must be a whole number of 64 bits, got {2**63}" in capsys.readouterr().err


# ---- data


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """No data set has its files anywhere."""
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_data_lists_what_there_is(nothing, capsys):
    assert cli.main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [*tasks.names(), "translation"]
    found = dict(line.split()[:2] for line in lines[::2])
    assert (found["digits"], found["mnist"], found["translation"]) == ("there", "not", "not")
    for name, line in zip(tasks.names(), lines[1:-1:2], strict=True):
        assert line.strip() == f"{tasks.get(name).origin}; licence: {tasks.get(name).licence}"
    assert not nothing.exists()


def test_data_of_a_package_are_there(nothing, capsys):
    assert cli.main(["data", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "licence: CC BY 4.0" in shown
    assert "in the package scikit-learn" in shown


def test_data_fetches_once_and_shows_checksums(nothing, monkeypatch, capsys):
    import gzip

    from l2t.tasks.places import Place

    fetched = []

    def fetch(place):
        fetched.append(place.name)
        place.folders()[0].mkdir(parents=True)
        for name in place.files:
            (place.folders()[0] / f"{name}.gz").write_bytes(gzip.compress(b"abc"))

    monkeypatch.setattr(Place, "fetch", fetch)
    for _ in range(2):
        assert cli.main(["data", "mnist"]) == 0
        shown = capsys.readouterr().out
        assert "licence: none stated" in shown
        path = nothing / "mnist" / "t10k-labels-idx1-ubyte.gz"
        sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc, FIPS 180-2
        assert f"there: {path}  sha256:{sha}, which is not the standard one" in shown
    assert fetched == ["mnist"]


def test_teach_fetches_nothing_and_says_what_does(nothing, here, monkeypatch, capsys):
    from l2t.tasks.places import Place

    monkeypatch.setattr(Place, "fetch", lambda place: pytest.fail("fetched without being asked"))
    assert cli.main(["teach", "mnist"]) == 2
    assert one_line(capsys).endswith("Run: l2t data mnist.")
    assert not any(here.iterdir())


# ---- teach


def test_teach_writes_a_run(here, capsys):
    assert teach("--seed", "3", "--updates", "2") == 0
    run = here / "runs" / "digits-clean" / "seed-3"
    assert str(run.relative_to(here)) in capsys.readouterr().out
    assert {"teacher.safetensors", "teacher.json", "history.json", "config.json"} <= set(bytes_of(run))
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["regime"], config["student"], config["seed"]) == (
        "digits",
        "clean",
        "mlp",
        3,
    )
    assert config["device"] in ("cpu", "cuda")
    assert config["recipe"]["steps"] == 4
    assert config["recipe"]["updates"] == 2
    assert config["versions"]["torch"] == torch.__version__
    history = json.loads((run / "history.json").read_text())
    taught = any(row["chosen"] and row["taught"] for row in history["choice"])
    assert len(history["updates"]) == (
        2 if taught else 1
    )  # of a known loss those of the run that it was ahead of
    assert config["teacher"] == {"class": "default"}
    starts = [row["teacher"] for row in history["starts"]]
    assert starts == [teacher.config() for teacher in l2t.default_starts(10).teachers]
    assert l2t.Teacher.load(run).config() in starts


def test_a_long_run_prints_its_plan_first(here, capsys):
    assert cli.main(["teach", "digits", "--updates", "1", *TINY, "memory=1MB"]) == 0
    plan, run = capsys.readouterr().out.split("expected: 1 updates in ")
    assert "an update, 2 students side by side:\nsteps              4\n" in plan
    assert "steps taken again  0\n" in plan
    assert "digits-clean/seed-0: 1 updates" in run
    assert cli.main(["teach", "digits", "--updates", "1", "--out", "short", *TINY]) == 0
    assert "steps taken again" not in capsys.readouterr().out


def test_augmentation_of_what_is_no_image_leaves_nothing_behind(here, capsys):
    assert cli.main(["teach", "digits", *TINY, "augment=crop", "--quiet"]) == 2
    assert "train inputs must be images (N, C, H, W) with augment='crop'" in one_line(capsys)
    assert not any(here.iterdir())


def test_the_library_teaches_the_same_bits(here):
    assert teach("--updates", "2", "--quiet") == 0
    config = json.loads((here / "runs/digits-clean/seed-0/config.json").read_text())
    task = tasks.get("digits")
    data = task.load("clean")
    taught = l2t.teach_best(
        l2t.default_starts(10),
        task.student(),
        data.train,
        recipe=l2t.Recipe(**config["recipe"]),
        progress=False,
    )
    loaded = l2t.Teacher.load(here / "runs/digits-clean/seed-0")
    for name, value in taught.teacher.named_parameters():
        assert torch.equal(value, loaded.get_parameter(name))


def test_options_reach_teacher_recipe_and_data(here):
    options = [
        "--weight",
        "per-class",
        "--link",
        "log-sigmoid",
        "--slots",
        "2",
        "--no-guard",
        "--data-seed",
        "7",
    ]
    assert (
        teach("--regime", "symmetric", "--student", "mlp-relu", "--updates", "1", "--out", "x", *options) == 0
    )
    config = json.loads((here / "x" / "config.json").read_text())
    assert (config["data_seed"], config["student"], config["guard"]) == (7, "mlp-relu", False)
    assert config["recipe"]["lr"] == 0.1
    assert config["recipe"]["students"] == 2
    taught = l2t.Teacher.load(here / "x")
    assert (taught.kind, taught.link, taught.slots) == ("per-class", "log-sigmoid", 2)


def test_a_static_teacher_has_a_folder_of_its_own(here):
    assert teach("--updates", "1", "--slots", "1", "--quiet") == 0
    assert l2t.Teacher.load(here / "runs" / "digits-clean" / "static-0").slots == 1


def test_features_reach_the_teacher_and_none_is_a_static_one(here):
    assert teach("--weight", "low-rank", "--rank", "2", "--features", "dev_loss", "dev_accuracy") == 0
    taught = l2t.Teacher.load(here / "runs/digits-clean/seed-0")
    assert (taught.kind, taught.rank, taught.features) == ("low-rank", 2, ("dev_loss", "dev_accuracy"))
    history = json.loads((here / "runs/digits-clean/seed-0/history.json").read_text())
    assert {"dev_loss", "dev_accuracy"} <= history["states"].keys()
    assert teach("--updates", "1", "--features", "none", "--quiet") == 0
    taught = l2t.Teacher.load(here / "runs/digits-clean/static-0")
    assert (taught.slots, taught.features) == (1, ())
    assert cli.main(["compare", "digits", "--students", "2", "--tuning-students", "2", "--grid", "0.1",
                     "--arms", "cross-entropy", "--quiet"]) == 0  # fmt: skip
    found = json.loads((here / "runs/digits-clean/seed-0/comparison.json").read_text())
    assert found["also"] == ["static taught loss"]


def test_a_weight_net_is_taught_compared_and_reported(here, capsys):
    assert teach("--updates", "1", "--quiet") == 0
    assert teach("--updates", "2", "--teacher", "weight-net", "--no-guard") == 0
    run = here / "runs/digits-clean/weight-net-0"
    assert isinstance(l2t.Teacher.load(run), l2t.WeightNet)
    assert not torch.equal(l2t.Teacher.load(run).weight_out, l2t.WeightNet(10).weight_out)
    assert len(json.loads((run / "history.json").read_text())["updates"]) == 2
    budget = [
        "--students",
        "2",
        "--tuning-students",
        "2",
        "--grid",
        "0.1",
        "--arms",
        "cross-entropy",
        "--quiet",
    ]
    assert cli.main(["compare", "digits", *budget]) == 0
    found = json.loads((here / "runs/digits-clean/seed-0/comparison.json").read_text())
    assert found["also"] == ["Meta-Weight-Net"]
    assert set(found["test_error"]) == {"taught", "cross-entropy", "Meta-Weight-Net"}
    assert not (run / "comparison.json").exists()
    for folder in (run.parent, run):
        assert cli.main(["report", str(folder)]) == 0
        assert "Meta-Weight-Net" in (folder / "report.html").read_text()


def test_a_weight_net_takes_smaller_steps_unless_told(here):
    arguments = [
        "teach",
        "digits",
        "--students",
        "2",
        "--lr",
        "0.1",
        "--updates",
        "1",
        "--teacher",
        "weight-net",
    ]
    for more, expected in (([], 0.01), (["teacher_lr=0.5"], 0.5)):
        out = f"x{len(more)}"
        settings = ["--set", "steps=4", "trial_students=2", *more]
        assert cli.main([*arguments, "--out", out, "--quiet", *settings]) == 0
        assert json.loads((here / out / "config.json").read_text())["recipe"]["teacher_lr"] == expected


def test_quiet_is_quiet(here, capfd):
    assert teach("--updates", "1", "--quiet") == 0
    assert capfd.readouterr().out == ""


def test_a_run_is_not_overwritten_and_a_finished_one_is_left_alone(here, capsys):
    assert teach("--updates", "2", "--out", "run", "--quiet") == 0
    before = bytes_of(here / "run")
    capsys.readouterr()
    assert teach("--updates", "2", "--out", "run", "--quiet") == 2
    assert "(--resume), or choose another directory" in one_line(capsys)
    assert teach("--updates", "2", "--out", "run", "--quiet", "--resume") == 0
    assert bytes_of(here / "run") == before
    for others, differing in (
        (["--updates", "3"], "recipe.updates"),
        (["--student", "mlp-relu"], "student"),
        (["--regime", "symmetric", "--data-seed", "1"], "regime, data_seed"),
        (["--no-guard"], "guard"),
        (["--weight", "full"], "teacher.class, teacher.num_classes, teacher.weight"),
    ):
        assert teach("--updates", "2", *others, "--out", "run", "--quiet", "--resume") == 2
        sentence = f"must have been started with the same arguments, got different {differing}. Resume with"
        assert sentence in one_line(capsys)
        assert bytes_of(here / "run") == before


def test_several_seeds_are_the_same_bits_and_one_that_fails_is_the_exit_code(here, capfd):
    (here / "many").mkdir()
    (here / "many" / "seed-1").write_text("in the way")
    assert teach("--updates", "2", "--seeds", "0", "1", "--jobs", "2", "--out", "many") == 1
    said = capfd.readouterr()
    assert "many/seed-0: 1 updates" in said.out  # of a known loss, and so of a run on a part of the rows
    assert "l2t: [Errno 17] File exists: 'many/seed-1'" in said.err.splitlines()
    assert "Traceback" not in said.err
    assert teach("--updates", "2", "--seed", "0", "--out", "one", "--quiet") == 0
    alone, among = ((here / where / "teacher.safetensors").read_bytes() for where in ("one", "many/seed-0"))
    assert alone == among


@pytest.mark.parametrize(("seeds", "how"), [
    (["0"], signal.SIGTERM), (["0", "1"], signal.SIGINT),
])  # fmt: skip
def test_ctrl_c_leaves_a_run_that_resumes_and_so_does_the_end_of_the_job(seeds, how, here):
    arguments = [
        "teach",
        "digits",
        "--seeds",
        *seeds,
        "--jobs",
        "2",
        "--out",
        "run",
        "--updates",
        "3000",
        *TINY,
    ]
    child = started(arguments)
    runs = [here / "run" / ("" if len(seeds) == 1 else f"seed-{seed}") for seed in seeds]
    marks = [run / "families" / "0" / "fold-0" / "checkpoint.json" for run in runs]
    patience = time.monotonic() + 60
    while not all(mark.exists() for mark in marks) and time.monotonic() < patience:
        time.sleep(0.05)
    if how == signal.SIGINT:
        os.killpg(child.pid, how)  # as a terminal does
    else:
        child.terminate()
    said = child.communicate(timeout=60)[1]  # its children hold the pipe, too
    assert child.returncode == 130
    assert "Traceback" not in said
    again = said.strip().splitlines()[-1]
    assert again.startswith("l2t teach: stopped. Go on with: l2t teach digits --seeds 0")
    assert again.endswith("--resume")
    for mark in marks:
        assert 0 < len(json.loads(mark.read_text())["history"]["updates"]) < 1500
    for run in runs:
        assert not (run / "teacher.safetensors").exists()
    assert cli.main(["report", "run"]) == 2  # not finished, and said so


# ---- compare and report


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Two taught teachers and a static one, compared."""
    folder = tmp_path_factory.mktemp("runs") / "few"
    for seed, slots in ((0, "4"), (1, "4"), (0, "1")):
        name = "static-0" if slots == "1" else f"seed-{seed}"
        where = ["--out", str(folder / name), "--slots", slots, "--regime", "few", "--seed", str(seed)]
        assert teach("--updates", "2", "--quiet", "--no-guard", *where) == 0
    assert cli.main(["compare", str(folder), "--students", "3", "--quiet"]) == 0
    return folder


def test_compare_writes_what_the_issue_promises(taught):
    for name in ("seed-0", "seed-1"):
        comparison = json.loads((taught / name / "comparison.json").read_text())
        assert "taught" in comparison["test_error"]
        assert all(len(errors) == 3 for errors in comparison["test_error"].values())
        assert set(comparison["p"]) == set(comparison["test_error"]) - {"taught"}
        assert comparison["also"] == ["static taught loss"]
        assert comparison["comparisons"] == 2 * len(comparison["p_corrected"])
        assert {"cross-entropy", "static taught loss"} < set(comparison["p"])
    assert not (taught / "static-0" / "comparison.json").exists()


def test_teachers_share_the_baselines_of_a_comparison(taught):
    first, second = (json.loads((taught / f"seed-{i}" / "comparison.json").read_text()) for i in (0, 1))
    assert first["test_error"]["cross-entropy"] == second["test_error"]["cross-entropy"]
    assert first["test_error"]["taught"] != second["test_error"]["taught"]


def test_the_table_shows_what_the_file_holds(taught, capsys):
    assert cli.main(["compare", str(taught), "--students", "3"]) == 0
    shown = capsys.readouterr().out
    comparison = json.loads((taught / "seed-0" / "comparison.json").read_text())
    (line,) = (line for line in shown.splitlines() if line.startswith("cross-entropy "))
    errors = torch.tensor(comparison["test_error"]["cross-entropy"], dtype=torch.float64) * 100
    assert f"{errors.mean():.2f} ± {errors.std():.2f}" in line
    difference = (torch.tensor(comparison["test_error"]["taught"]).double() * 100 - errors).mean()
    assert f"{difference:+.2f}" in line
    assert line.count("win") + line.count("loss") + line.count("even") == 2
    assert "digits, few" in shown
    edge = comparison["tuning"]["cross-entropy"]
    rate = f" {edge['lr']:g}{'*' if edge['at_edge'] else ' '} "
    assert rate in line


def test_the_table_marks_rates_at_the_edge_of_the_grid(taught):
    comparison = json.loads((taught / "seed-0" / "comparison.json").read_text())
    for arm, tuning in comparison["tuning"].items():
        tuning["at_edge"] = arm == "focal loss, gamma 2"
    *lines, last = cli.comparison_table("digits", {"seed-0": comparison})
    marked = [line for line in lines if "*" in line]
    assert len(marked) == 1
    assert marked[0].startswith("focal loss")
    assert last.endswith("(*: at the edge of the grid)")
    assert "after Holm's correction for " in last


def test_a_folder_that_cannot_be_written_is_told_before_the_work(taught, here, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main(["compare", str(taught), "--students", "3", "--quiet"]) == 2
    assert f"must be one that can be written, got no right to {taught}. Choose" in one_line(capsys)
    (here / "data").write_text("")
    monkeypatch.setenv("L2T_DATA", str(here / "data" / "of mine"))
    monkeypatch.setenv("HOME", str(here))
    assert cli.main(["data", "translation"]) == 2
    assert f"must be one that can be written, got a file at {here / 'data'}. Choose" in one_line(capsys)


def test_the_same_comparison_is_not_made_twice(taught, monkeypatch):
    from l2t import compare

    calls = []
    real = compare._run
    monkeypatch.setattr(compare, "_run", lambda *a: calls.append(a) or real(*a))
    arguments = ["compare", str(taught), "--students", "3", "--quiet"]
    before = (taught / "seed-0" / "comparison.json").read_bytes()
    assert cli.main(arguments) == 0
    assert not calls
    assert (taught / "seed-0" / "comparison.json").read_bytes() == before
    next((taught / "arms").glob("cross-entropy-*")).unlink()
    assert cli.main(arguments) == 0
    assert 2 <= len(calls) <= 4  # one arm: its grid, what is added to it, its final students
    calls.clear()
    assert cli.main([*arguments, "--again"]) == 0
    arms = json.loads(before)["test_error"]
    assert len(calls) >= 2 * (len(arms) + 1)
    after = json.loads((taught / "seed-0" / "comparison.json").read_text())
    assert after["test_error"] == arms


def test_arms_on_several_cores_are_the_same_arms(taught, here, capfd):
    shutil.copytree(taught, here / "many", ignore=shutil.ignore_patterns("arms", "comparison.json"))
    assert cli.main(["compare", "many", "--students", "3", "--quiet", "--jobs", "2"]) == 0
    for name in ("seed-0", "seed-1"):
        one, many = (json.loads((d / name / "comparison.json").read_text()) for d in (taught, here / "many"))
        assert {**one, "seconds": 0} == {**many, "seconds": 0}


def test_a_process_that_fails_is_the_exit_code_and_the_others_go_on(taught, here, capfd):
    shutil.copytree(taught, here / "many", ignore=shutil.ignore_patterns("arms", "comparison.json"))
    (here / "many" / "arms").write_text("in the way")
    assert cli.main(["compare", "many", "--students", "3", "--quiet", "--jobs", "2"]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 2  # one a process
    assert all(
        line.startswith("l2t.compare: the folder many/arms must be one that can be w") for line in lines
    )


def test_ctrl_c_keeps_the_arms_that_are_done(taught, here):
    shutil.copytree(taught, here / "many", ignore=shutil.ignore_patterns("arms", "comparison.json"))
    command = ["compare", "many", "--students", "200", "--jobs", "2", "--quiet", "--again"]
    child = started(command)
    patience = time.monotonic() + 60
    while not list((here / "many").glob("arms/*.json")) and time.monotonic() < patience:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130
    assert said.strip() == (
        "l2t compare: stopped. Go on with: l2t compare many --students 200 --jobs 2 --quiet"
    )
    kept = list((here / "many").glob("arms/*.json"))
    assert kept
    assert all("tuning" in json.loads(path.read_text()) for path in kept)
    assert not list((here / "many").glob("arms/.*"))


def test_arms_and_budget_by_flags(taught, here, capsys):
    shutil.copytree(taught, here / "few", ignore=shutil.ignore_patterns("arms", "comparison.json"))
    assert cli.main(["compare", "few", "--arms", "list"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("digits, few: cross-entropy label-smoothing-0.05 ")
    assert not (here / "few" / "arms").exists()
    flags = ["--grid", "0.1", "0.3", "0.2", "--tuning-students", "2", "--students", "3", "--seed", "5"]
    arms = ["--arms", "label-smoothing-0.1", "focal loss, gamma 2"]
    assert cli.main(["compare", "few", *flags, *arms, "--quiet"]) == 0
    comparison = json.loads((here / "few" / "seed-0" / "comparison.json").read_text())
    assert list(comparison["p"]) == ["label smoothing 0.1", "focal loss, gamma 2", "static taught loss"]
    tuning = comparison["tuning"]["taught"]
    assert sorted({0.1, 0.2, 0.3, *tuning["added"]}) == tuning["grid"]
    assert comparison["seed"] == 5
    errors = comparison["test_error"]
    assert cli.main(["compare", "few", *flags, "--seed", "6", *arms, "--quiet"]) == 0
    other = json.loads((here / "few" / "seed-0" / "comparison.json").read_text())["test_error"]
    assert all(other[arm] != errors[arm] for arm in errors)


def test_folders_of_several_courses_are_compared_apart_and_names_kept_apart(taught, here, capfd):
    shutil.copytree(taught / "seed-0", here / "a" / "seed-0")
    shutil.copytree(taught / "seed-1", here / "b" / "seed-0")  # the same course, and the same name
    clean = ["--regime", "clean", "--updates", "1", "--quiet", "--no-guard", "--out", "c"]
    assert teach(*clean) == 0
    capfd.readouterr()
    budget = ["--students", "2", "--tuning-students", "1", "--grid", "0.1", "--arms", "cross-entropy"]
    assert cli.main(["compare", "a", "b", "c", *budget, "--jobs", "2", "--quiet"]) == 0
    shown = capfd.readouterr().out
    assert shown.index("digits, few") < shown.index("digits, clean")
    assert "taught, a/seed-0" in shown
    assert "taught, b/seed-0" in shown
    errors = [
        json.loads((here / run / "comparison.json").read_text())["test_error"]["taught"]
        for run in ("a/seed-0", "b/seed-0", "c")
    ]
    assert len({tuple(one) for one in errors}) == 3


def test_teachers_teach_elsewhere(taught, here, capsys):
    budget = ["--students", "3", "--tuning-students", "2", "--grid", "0.1", "0.3"]
    to = ["--to", "digits", "--regime", "symmetric", "--student", "mlp-relu", "--steps", "5"]
    arms = ["--arms", "cross-entropy", "label-smoothing-0.1"]
    assert cli.main(["transfer", str(taught), *to, *budget, *arms, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "digits, symmetric: test error in percent, mean ± sd of 3 fresh students an arm" in shown
    assert "taught, seed-1 less this" in shown
    out = here / "runs" / "transfer" / "digits-symmetric-mlp-relu-5-steps"
    assert sorted(path.name for path in out.iterdir()) == ["arms", "seed-0", "seed-1"]
    comparison, config = (
        json.loads((out / "seed-1" / f"{n}.json").read_text()) for n in ("comparison", "config")
    )
    assert list(comparison["p"]) == ["cross-entropy", "label smoothing 0.1", "static taught loss"]
    assert config["recipe"]["steps"] == 5
    assert (config["regime"], config["student"]) == ("symmetric", "mlp-relu")
    assert (config["taught on regime"], config["taught on student"]) == ("few", "mlp")
    assert (out / "seed-1" / "teacher.safetensors").read_bytes() == (
        taught / "seed-1" / "teacher.safetensors"
    ).read_bytes()

    task, teacher = tasks.get("digits"), l2t.Teacher.load(taught / "seed-1")
    data = task.load("symmetric")
    alone = compare(
        {"mine": teacher}, task.student("mlp-relu"), data.train, data.test, data.dev, arms={},
        recipe=dataclasses.replace(task.recipe("symmetric"), steps=5), students=3, tuning_students=2,
        grid=(0.1, 0.3), progress=False,
    )  # fmt: skip
    assert alone["mine"]["test_error"]["taught"] == comparison["test_error"]["taught"]

    assert cli.main(["report", str(out)]) == 0
    assert "digits, symmetric" in (out / "report.html").read_text()


def test_teachers_that_cannot_go_elsewhere_are_refused(taught, here, capsys):
    l2t.Teacher(3).save(here / "three")
    assert cli.main(["transfer", str(taught), "three", "--to", "digits"]) == 2
    line = one_line(capsys)
    assert (
        "--to must be a task of 3 classes, as many as the teacher in 'three' has, got 'digits' with 10"
        in line
    )
    assert not (here / "runs").exists()
    for name in ("seed_0", "seed-0"):
        shutil.copytree(taught / "seed-0", here / "alike" / name)
    assert cli.main(["transfer", "alike", "--to", "digits"]) == 2
    assert "got 'seed-0' and 'seed_0', which would both go to seed-0. Rename" in one_line(capsys)
    assert not (here / "runs").exists()


def test_a_transfer_takes_the_place_of_nothing_else(taught, here, capsys):
    shutil.copytree(taught, here / "few")
    before = bytes_of(here / "few")
    budget = ["--students", "2", "--tuning-students", "1", "--grid", "0.1", "--arms", "cross-entropy"]

    def transfer(run: str, out: str, steps: str = "5") -> int:
        return cli.main(
            ["transfer", run, "--to", "digits", "--steps", steps, "--out", out, *budget, "--quiet"]
        )

    assert transfer("few", "few") == 2
    assert "must hold nothing but the same transfer, got 'few/seed-0' with a taught run" in one_line(capsys)
    assert bytes_of(here / "few") == before

    shutil.copytree(taught / "seed-1", here / "other" / "seed-1")
    assert transfer("few/seed-1", "out") == 0
    assert transfer(str(here / "few" / "seed-1"), "out") == 0  # the same again, by another name
    capsys.readouterr()
    before = bytes_of(here / "out")
    assert transfer("other/seed-1", "out") == 2
    assert "got 'out/seed-1' with one of another teacher. Give another folder" in one_line(capsys)
    assert transfer("few/seed-1", "out", steps="6") == 2
    assert "with one of another recipe.steps." in one_line(capsys)
    assert bytes_of(here / "out") == before

    l2t.Teacher(10).save(here / "mine" / "seed-1")
    assert transfer("few/seed-1", "mine") == 2
    assert "got 'mine/seed-1' with a teacher from elsewhere" in one_line(capsys)


def test_a_task_stands_for_its_default_folder(taught, here, capsys):
    (here / "runs").mkdir()
    (here / "runs" / "digits-few").symlink_to(taught)
    assert cli.main(["compare", "digits", "--regime", "few", "--students", "3", "--quiet"]) == 0
    assert "taught, seed-1" in capsys.readouterr().out


def test_compare_wants_runs_of_the_command(here, capsys):
    l2t.Teacher(10).save(here / "own")
    assert cli.main(["compare", "own"]) == 2
    assert "the run must come from `l2t teach`" in one_line(capsys)


def test_report_says_where_the_page_is(taught, capsys):
    assert cli.main(["report", str(taught)]) == 0
    assert capsys.readouterr().out.strip() == str(taught / "report.html")
    assert (taught / "report.html").read_text().startswith("<!doctype html>")


def test_runs_that_are_not_finished_are_left_out_aloud(taught, here, capsys):
    shutil.copytree(taught / "seed-0", here / "some" / "seed-0")
    shutil.copytree(taught / "seed-1", here / "some" / "seed-1")
    (here / "some" / "seed-1" / "teacher.safetensors").unlink()
    assert cli.main(["report", "some"]) == 0
    captured = capsys.readouterr()
    assert "left out what is not taught to the end: some/seed-1. Go on with" in captured.err
    assert captured.out.strip() == "some/report.html"


# ---- failures


def test_a_fault_is_one_line_and_its_place_is_on_request(taught, monkeypatch, capsys):
    from l2t import report

    def fault(*_: object) -> None:
        raise KeyError("some\nthing")

    monkeypatch.setattr(report, "write", fault)
    monkeypatch.delenv("L2T_TRACEBACK", raising=False)
    assert cli.main(["report", str(taught)]) == 1
    assert "KeyError" in (line := one_line(capsys))
    assert "Set L2T_TRACEBACK=1 to see where." in line
    monkeypatch.setenv("L2T_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["report", str(taught)])


def test_what_the_system_refuses_is_one_line(here, capsys):
    (here / "file").write_text("")
    assert teach("--updates", "1", "--out", "file/run", "--quiet") == 1
    assert "file/run" in one_line(capsys)


# ---- doctor


def test_the_doctor_finds_the_core_right(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "numpy", "threads", "cuda devices", "scikit-learn", *_native.instruction_sets()):
        assert word in shown
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert f"agrees in {dtype}" in shown
    assert "The compiled loss works here." in shown


def test_the_kernel_error_is_small_and_sees_a_wrong_kernel(monkeypatch):
    assert doctor.kernel_error(torch.float64) < 1e-12
    assert doctor.kernel_error(torch.float32) < 1e-5
    monkeypatch.setitem(reference.LINKS, "sigmoid", lambda u: torch.sigmoid(1.001 * u))
    assert doctor.kernel_error(torch.float64) > 1e-5


@pytest.mark.parametrize("part", range(4), ids=["loss", "gradient", "backward", "forward"])
def test_the_kernel_error_sees_one_wrong_derivative(part, monkeypatch):
    """The derivatives are those of the compiled loss when they are asked for the first time."""
    sizes, derivatives, calls = (1, 4, 5, 4), doctor._derivatives, []

    def wrong(*arguments):
        results = derivatives(*arguments)
        calls.append(len(results))
        if len(calls) == 1:
            results[sum(sizes[:part])].mul_(1.01)
        return results

    monkeypatch.setattr(doctor, "_derivatives", wrong)
    assert doctor.kernel_error(torch.float64) > 5e-3
    assert calls[0] == sum(sizes)


def test_the_doctor_tries_every_instruction_set_and_names_the_wrong_one(monkeypatch, capsys):
    tried, before = [], _native.instruction_set()

    def error(dtype: torch.dtype, device: str) -> float:
        tried.append((dtype, _native.instruction_set() if device == "cpu" else device))
        return float("inf") if tried[-1] == (torch.float64, "baseline") else 0.0

    monkeypatch.setattr(doctor, "kernel_error", error)
    assert cli.main(["doctor"]) == 1
    assert {place for _, place in tried} >= set(_native.instruction_sets())
    assert len(tried) == len(set(tried)) == 4 * len({place for _, place in tried})
    assert _native.instruction_set() == before
    shown = capsys.readouterr().out
    assert "! agrees in float64" in shown
    assert "baseline inf" in shown
    assert "To be mended: agrees in float64." in shown


def test_the_doctor_says_why_an_instruction_set_is_in_use(monkeypatch):
    used, every = _native.instruction_set(), _native.instruction_sets()
    built = {**_native.build_info(), "instruction_sets": " ".join(every)}  # all of which run here
    monkeypatch.setattr(doctor._native, "build_info", lambda: built)
    monkeypatch.delenv("L2T_INSTRUCTION_SET", raising=False)
    finding = doctor._instruction_set()
    assert finding.value == f"{used}, the best that runs here, of {', '.join(every)}"
    assert finding.good is True

    monkeypatch.setenv("L2T_INSTRUCTION_SET", used)
    assert doctor._instruction_set().value.startswith(f"{used}, L2T_INSTRUCTION_SET={used}, of")
    monkeypatch.setenv("L2T_INSTRUCTION_SET", "mmx")
    finding = doctor._instruction_set()
    assert finding.value.endswith("set L2T_INSTRUCTION_SET to one of these, or not at all")
    assert finding.good is False

    monkeypatch.delenv("L2T_INSTRUCTION_SET")
    built["instruction_sets"] += " x86-64-v9"
    assert "; x86-64-v9 built in but not for this processor" in doctor._instruction_set().value


@pytest.mark.parametrize(
    ("architectures", "torchs", "ours", "told", "good"),
    [
        ("", 0, 0, "0 seen by torch", None),
        ("", 2, 0, "2 seen by torch (built without CUDA), 0 by the compiled core: built without nvcc", None),
        ("sm_90 compute_90", 0, 0, "0 by the compiled core", None),
        ("sm_90 compute_90", 2, 2, "2 seen by torch (built without CUDA), 2 by the compiled core", True),
        ("sm_90 compute_90", 2, 0, "its CUDA is newer than the driver", False),
    ],
)
def test_the_doctor_counts_the_devices(architectures, torchs, ours, told, good, monkeypatch):
    built = {**_native.build_info(), "cuda_architectures": architectures}
    monkeypatch.setattr(doctor._native, "build_info", lambda: built)
    monkeypatch.setattr(doctor._native, "cuda_devices", lambda: ours)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torchs)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = [finding for finding in doctor._devices() if finding.name == "cuda devices"]
    assert told in finding.value
    assert finding.good is good


@pytest.mark.parametrize(
    ("script", "told", "good"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 580.65.06'", "NVIDIA H100 80GB HBM3, driver 580.65.06", True),
        ("exit 9", "nvidia-smi fails: ", None),
    ],
)
def test_the_doctor_asks_nvidia_smi_for_the_driver(script, told, good, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor._devices()[0]
    assert finding.value.startswith(told)
    assert finding.good is good


def test_the_doctor_says_what_to_mend(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "kernel_error", lambda dtype, device: float("inf"))
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "nothing")
    monkeypatch.setattr(l2t, "__version__", "9.9")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    agrees = ", ".join(f"agrees in {dtype}" for dtype in ("float32", "float64", "bfloat16", "float16"))
    assert f"To be mended: same version, {agrees}." in shown
    assert "no-such-package    not installed, needed for nothing: pip install 'l2t[tasks]'" in shown
    assert "run pip install . again" in shown
