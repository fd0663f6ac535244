"""benchmarks/teaching.py: a setting from end to end gives a row that holds what its runs hold."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
import settings
import teaching
import torch
from settings import Setting, Transfer

from l2t import cli, tasks
from l2t.tasks import Task

TINY = "--updates 2 --students 2 --lr 0.1 --set steps=4 trial_students=2 batch_size=16"
COMPARE = "--grid 0.1 0.3 --tuning-students 2 --arms cross-entropy label-smoothing-0.1"


@pytest.fixture
def tiny(monkeypatch):
    setting = Setting("digits", "few", "mlp", TINY, COMPARE, seeds=(3, 4), students=3)
    monkeypatch.setitem(settings.SETTINGS, "tiny", setting)
    static = ("--slots 1 --weight shared --link sigmoid", "static")  # one start is enough of these
    monkeypatch.setitem(settings.KINDS, "static", static)
    # In this process: what happens in processes of their own is for test_cli.py.
    monkeypatch.setattr(cli, "_teach_several", lambda lessons, jobs: max(map(cli._teach_one, lessons)))
    return setting


def teach_tiny(monkeypatch, folder, *flags):
    where = ["--runs", str(folder / "runs"), "--out", str(folder / "rows")]
    monkeypatch.setattr(sys, "argv", ["teaching.py", "tiny", *where, *flags])
    teaching.main()
    return json.loads((folder / "rows" / "tiny.json").read_text())


def test_a_row_holds_what_its_runs_hold_and_is_made_once(tiny, tmp_path, monkeypatch):
    row = teach_tiny(monkeypatch, tmp_path)
    runs = tmp_path / "runs" / "tiny"
    assert sorted(path.name for path in runs.iterdir()) == [
        "arms",
        "seed-3",
        "seed-4",
        "static-3",
        "static-4",
    ]
    assert (row["task"], row["regime"], row["student"], row["students"]) == ("digits", "few", "mlp", 3)
    assert list(row["teachers"]) == ["seed-3", "seed-4"]
    assert row["also"] == ["static taught loss, static-3", "static taught loss, static-4"]
    assert list(row["arms"]) == ["cross-entropy", "label smoothing 0.1", *row["also"]]
    assert row["comparisons"] == 8
    assert len(row["commands"]) == 3
    assert row["command"] == "python benchmarks/teaching.py tiny"
    for name, teacher in row["teachers"].items():
        comparison = json.loads((runs / name / "comparison.json").read_text())
        assert teacher["seed"] == int(name.removeprefix("seed-"))
        assert teacher["test_error"] == pytest.approx(comparison["test_error"]["taught"], abs=1e-7)
        for arm, against in teacher["against"].items():
            assert row["arms"][arm]["test_error"] == pytest.approx(comparison["test_error"][arm], abs=1e-7)
            difference = statistics.fmean(teacher["test_error"]) - statistics.fmean(
                row["arms"][arm]["test_error"]
            )
            assert against["difference"] == pytest.approx(difference, abs=1e-6)
            assert against["p_corrected"] == comparison["p_corrected"][arm]
            assert against["interval"] == comparison["interval"][arm]
    # A teacher that is returned is written each time, the same bytes; what it was taught in is not.
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("families/**/*.safetensors")}
    bytes_of = {path: path.read_bytes() for path in runs.rglob("*.safetensors")}
    assert len(bytes_of) > len(written) > 0
    assert teach_tiny(monkeypatch, tmp_path) == row
    assert written == {path: path.stat().st_mtime_ns for path in runs.rglob("families/**/*.safetensors")}
    assert bytes_of == {path: path.read_bytes() for path in runs.rglob("*.safetensors")}


def test_every_setting_is_one_that_the_commands_take(monkeypatch, capsys):
    """The words of every setting are understood, and name a task, a regime and a student that there are."""
    monkeypatch.setattr(Task, "require", lambda task: None)  # whose files may not be on this machine
    monkeypatch.setattr(sys, "argv", ["teaching.py", "--list"])
    teaching.main()
    shown = capsys.readouterr().out
    for name, setting in (settings.SETTINGS | settings.TRANSFERS).items():
        assert name in shown.splitlines()
        task = tasks.get(setting.task)
        task.setting(setting.regime)
        task.student(setting.student)
        for step in teaching.commands(name, teaching.ROOT / "runs"):
            options = cli._parser().parse_args(step)
            if options.command == "teach" and name in settings.SETTINGS:
                lessons = [cli._lesson(options, seed) for seed in options.seeds]
                assert [lesson.directory.parent for lesson in lessons] == [
                    teaching.ROOT / "runs" / name
                ] * len(lessons)


def test_the_budget_of_translators_is_that_of_their_settings():
    """The table in their head: steps, minutes of a course, arms, students, minutes of all, a teacher's."""
    said = {}
    for line in settings.__doc__.splitlines():
        name, *numbers = line.split() or [""]
        if name in settings.TRANSLATORS:
            said[name] = [float(word) for word in numbers if word != "to"]
    assert said.keys() == settings.TRANSLATORS.keys()
    for name, (steps, minutes, arms, students, low, high, _) in said.items():
        setting = settings.TRANSLATORS[name]
        *teach, compare = (cli._parser().parse_args(step) for step in teaching.commands(name, Path("runs")))
        assert [int(one.steps) for one in teach] == [steps] * len(setting.kinds)
        assert len(compare.arms) + len(setting.seeds) * len(setting.kinds) == arms
        assert setting.students == students
        assert [low, high] == [pytest.approx(arms * (k + students) * minutes, abs=0.51) for k in (3, 5)]
        windows = int(teach[0].updates) * (teach[0].students or 4)  # which the recipe has by itself
        assert f"{windows} windows of {teach[0].window}" in settings.__doc__


def test_a_transfer_teaches_at_its_source_and_compares_elsewhere(tiny, tmp_path, monkeypatch):
    to = Transfer("tiny", "digits", "clean", "mlp-relu", f"--steps 5 {COMPARE}", students=3)
    monkeypatch.setitem(settings.TRANSFERS, "tiny-to-relu", to)
    monkeypatch.setitem(settings.SETTINGS, "tiny", tiny._replace(kinds=("dynamic",), seeds=(3,)))
    row = teaching.run("tiny-to-relu", tmp_path, 1)
    assert (row["source"], row["regime"], row["student"]) == ("tiny", "clean", "mlp-relu")
    assert row["recipe"]["steps"] == 5
    assert [command.split()[1] for command in row["commands"]] == ["teach", "transfer"]
    comparison = json.loads((tmp_path / "tiny-to-relu" / "seed-3" / "comparison.json").read_text())
    mine = row["teachers"]["seed-3"]["test_error"]
    assert mine == pytest.approx(comparison["test_error"]["taught"], abs=1e-7)
    assert not (tmp_path / "tiny" / "seed-3" / "comparison.json").exists()


def test_unknown_settings_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["teaching.py", "no-such"])
    with pytest.raises(SystemExit) as stop:
        teaching.main()
    assert stop.value.code == 2
    assert "no-such must be one of mnist1d-mlp-clean" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_benchmark(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(settings.SETTINGS, "tiny", tiny._replace(regime="dirty"))
    with pytest.raises(SystemExit) as stop:
        teach_tiny(monkeypatch, tmp_path)
    assert stop.value.code == 2
    assert not (tmp_path / "rows").exists()


def test_versions_say_what_the_bits_depend_on():
    assert teaching.versions()["torch"] == torch.__version__
    assert "instruction set" in teaching.versions()
