"""`l2t compare` for taught losses of translators, on a toy language."""

from __future__ import annotations

import json
import math
import os
import pickle
import shlex
import shutil
import signal
import statistics
import sys
from multiprocessing import Value
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draw_results
import pytest
import settings
import teaching
import torch
from scipy import stats
from settings import Translator
from torch import Tensor
from toy_translator import toy_corpus

from l2t import StudentState, check, cli, contest
from l2t.cli import main
from l2t.report import find_runs
from l2t.teacher import AnyTeacher
from l2t.translation import contest as token_contest
from l2t.translation import course, runs, scores
from l2t.translation.corpus import Corpus, write_folder
from l2t.translation.token_teacher import TokenTeacher

TEACH = ["--pieces", "60", "--steps", "8", "--window", "2", "--updates", "1", "--students", "2", "--quiet"]
TEACH += ["--lr", "0.02", "--set", "stages=2", "refresh=1", "lr_warmup=2", "dim=8", "tokens=60"]
TEACH += ["dev_batches=1"]
COMPARE = ["--students", "3", "--grid", "0.01", "0.03", "--arms", "maximum-likelihood", "focal-1", "--quiet"]


def small() -> Corpus:
    corpus = toy_corpus()
    return corpus._replace(train=corpus.train[:150], dev=corpus.dev[:15], test=corpus.test[:15])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dynamic and a static run, compared."""
    where = tmp_path_factory.mktemp("contest")
    write_folder(small(), where / "pairs")
    teach = ["teach", "translation", "--data", str(where / "pairs"), *TEACH]
    assert main([*teach, "--out", str(where / "runs" / "seed-0")]) == 0
    assert main([*teach, "--out", str(where / "runs" / "static-0"), "--slots", "1"]) == 0
    assert main(["compare", str(where / "runs"), *COMPARE]) == 0
    return where / "runs"


def file_of(out: Path, arm: str) -> Path:
    """The one file of an arm; no other arm's name goes on as this one's does."""
    (file,) = (out / "arms").glob(f"{arm}-*.json")
    return file


@pytest.fixture
def found(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def test_the_arms_are_the_baselines_and_the_taught_losses(out: Path, found: dict) -> None:
    assert set(found["arms"]) == {"maximum-likelihood", "focal-1", "static taught loss", "taught by seed-0"}
    assert found["taught"] == ["taught by seed-0"]
    assert all(len(arm[key]) == 3 for arm in found["arms"].values() for key in ("bleu", "chrf", "perplexity"))
    assert "tok:13a" in found["signatures"]["BLEU"]
    assert any("paired t-test of test BLEU" in sentence for sentence in found["protocol"])
    history = json.loads((out / "seed-0" / "history.json").read_text())
    cost = found["teaching"]["taught by seed-0"]
    assert cost["seconds"] == history["seconds"]["updates"] + history["seconds"]["trial"]
    runs_of_it = cost["seconds"] / statistics.fmean(found["arms"]["taught by seed-0"]["cpu_seconds"])
    assert cost["student_runs"] == pytest.approx(runs_of_it)


def test_the_page_of_results_says_what_a_comparison_found(out: Path, found: dict, tmp_path: Path) -> None:
    about = {"name": "translation-toy", "command": "python this", "commands": ["l2t teach translation"]}
    at = {"taught_at": {"commit": "abc", "versions": {"torch": "2.13"}}}
    row = about | at | json.loads(json.dumps(teaching.row_of_translators(find_runs(out))))
    assert row["courses"] == 4 * 3 + sum(len(arm["tuning"]["grid"]) for arm in found["arms"].values())
    assert {name: len(teacher["settings"]["features"]) for name, teacher in row["teachers"].items()} == {
        "seed-0": 3, "static-0": 3,
    }  # fmt: skip
    assert str(out) not in json.dumps(row)
    assert str(out.parent) not in json.dumps(row)
    win = {"difference": 1.25, "interval": [0.5, 2.0], "p": 1e-4, "p_corrected": 2e-4}
    loss = {"difference": -1.0, "interval": [-1.5, -0.5], "p": 1e-4, "p_corrected": 2e-3}
    even = {"difference": 0.5, "interval": [-0.5, 1.5], "p": 0.3, "p_corrected": None}
    row["tests"]["taught by seed-0"] = {
        "maximum-likelihood": win, "focal-1": even, "static taught loss": loss,
    }  # fmt: skip
    for arm, bleu in {"maximum-likelihood": 20.0, "focal-1": 19.0, "static taught loss": 22.0}.items():
        row["arms"][arm]["bleu"] = [bleu - 1, bleu, bleu + 1]
    row["arms"]["taught by seed-0"]["bleu"] = [20.25, 21.25, 22.25]
    row["bootstrap"] = {"taught by seed-0": [{"difference": 1.0, "p": 0.01}, {"difference": 1.0, "p": 0.1}]}
    row["best_baseline"] = "static taught loss"
    row["arms"]["focal-1"]["tuning"] |= {"grid": [0.03, 9.0], "dev_bleu": [1.0, None]}
    row["arms"]["focal-1"]["perplexity"] = [2.0, None, 3.0]  # the second is infinite
    row["teachers"]["seed-0"]["chosen"] = "neutral"
    (tmp_path / "translation-toy.json").write_text(json.dumps(row))
    page = draw_results.page(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    (short,) = [line for line in lines if line[0] == "[translation-toy](#translation-toy)"]
    assert short[1:] == [
        "maximum-likelihood", "20.00 ± 1.00", "21.25", "+1.25", "*win*", "22.00 ± 1.00", "-1.00", "**loss**",
    ]  # fmt: skip
    of = {line[0]: line for line in lines if len(line) == 6}
    assert list(of)[1:] == [
        "---",
        "**taught by seed-0**",
        "static taught loss",
        "maximum-likelihood",
        "focal-1",
    ]
    assert of["maximum-likelihood"][5] == "+1.25 [+0.50, +2.00], p 2e-4, *win*"
    assert of["static taught loss"][5] == "-1.00 [-1.50, -0.50], p 0.002, **loss**"
    assert of["focal-1"][5] == "+0.50 [-0.50, +1.50], p –, even"
    chrf = row["arms"]["focal-1"]["chrf"]
    assert of["focal-1"][2] == f"{statistics.fmean(chrf):.2f} ± {statistics.stdev(chrf):.2f}"
    assert of["focal-1"][3] == "inf"
    assert (
        "against static taught loss, paired bootstrap over test sentences, p < 0.05: ahead in 1 and" in page
    )
    assert "* What was taught in seed-0 did not end lower on dev, so it says what it started as.\n" in page
    assert "* diverged, and out of the running: focal-1 at 9\n" in page
    assert "150 / 15 / 15 pairs, 60 pieces; student lstm, 3 an arm)" in page
    assert "There are no rows yet." in page  # of images
    assert "* The teachers were taught at commit abc (torch 2.13) and are kept in benchmarks/results/" in page


def test_kept_teachers_are_compared_without_teaching(
    out: Path, found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits, where their runs and the folder of their pairs are gone."""
    setting = Translator("lstm", shlex.join(TEACH[2:]), shlex.join(COMPARE), students=3)
    monkeypatch.setitem(settings.TRANSLATORS, "toy", setting)
    kept = tmp_path / "rows" / "teachers" / "toy"
    teaching.keep(out, kept)
    assert sorted(path.name for path in kept.iterdir()) == ["made.json", "seed-0", "static-0"]
    assert str(out.parent) not in "".join(path.read_text() for path in kept.rglob("*.json"))
    (kept / "made.json").write_text('{"commit": "abc", "versions": {"torch": "2.13"}}')
    teaching.keep(out, kept)  # of the same teachers, which another commit has made
    shutil.copytree(out.parent / "pairs", tmp_path / "sets" / "translation-de-en")
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr(runs, "teach", None)
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows")]
    monkeypatch.setattr(sys, "argv", ["teaching.py", "toy", "--taught", *where])
    page = draw_results.page(tmp_path / "rows")
    assert "## toy: taught, not yet compared" in page
    history = json.loads((out / "seed-0" / "history.json").read_text())
    for loss, (level,) in history["trial"]["measure"].items():
        assert f" {loss} |" in page
        assert f"| {level:.3f} |" in page
    teaching.main()
    assert "not yet compared" not in draw_results.page(tmp_path / "rows")
    row = json.loads((tmp_path / "rows" / "toy.json").read_text())
    assert row["arms"].keys() == found["arms"].keys()
    for arm, its in row["arms"].items():
        assert all(its[key] == found["arms"][arm][key] for key in ("bleu", "chrf", "perplexity", "tuning"))
    assert row["taught_at"]["commit"] == "abc"
    shutil.copytree(tmp_path / "runs" / "toy" / "seed-0", tmp_path / "runs" / "toy" / "seed-1")
    with pytest.raises(SystemExit, match=r"must hold the teachers of .*toy alone"):
        teaching.main()
    shutil.rmtree(kept / "static-0")
    assert "--taught` begins with, once a static teacher is there, too (" in "\n".join(
        draw_results.taught_alone(kept)
    )
    with pytest.raises(SystemExit, match=r"toy must hold static-0 too"):
        teaching.main()
    teaching.keep(out, kept)
    assert json.loads((kept / "made.json").read_text())["commit"] == teaching.commit()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["toy"]


def test_kept_teachers_of_several_seeds_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Translator("lstm", kinds=("dynamic", "static"), seeds=(0, 2))
    monkeypatch.setitem(settings.TRANSLATORS, "toy", setting)
    ran: list[list[str]] = []
    monkeypatch.setattr(teaching.cli, "main", lambda step: ran.append(step) or 7)
    kept = tmp_path / "kept" / "toy"
    for name in ("seed-0", "seed-2", "static-0"):
        (kept / name).mkdir(parents=True)
        (kept / name / "teacher.safetensors").write_bytes(name.encode())
    with pytest.raises(SystemExit, match=r"toy must hold static-2 too"):
        teaching.run("toy", tmp_path / "runs", 1, tmp_path / "kept", taught=True)
    (kept / "static-0").rename(kept / "static-2")
    with pytest.raises(SystemExit, match=r"toy must hold static-0 too"):
        teaching.run("toy", tmp_path / "runs", 1, tmp_path / "kept", taught=True)
    shutil.copytree(kept / "static-2", kept / "static-0")
    with pytest.raises(SystemExit) as end:
        teaching.run("toy", tmp_path / "runs", 1, tmp_path / "kept", taught=True)
    assert end.value.code == 7
    assert [step[0] for step in ran] == ["compare"]
    taken = sorted(path.name for path in (tmp_path / "runs" / "toy").iterdir())
    assert taken == ["seed-0", "seed-2", "static-0", "static-2"]


def test_teachers_that_nobody_kept_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("translation-lstm", "must hold seed-0, static-0 too"), ("digits-mlp-few", "2")):
        monkeypatch.setattr(sys, "argv", ["teaching.py", name, "--taught", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            teaching.main()
        assert said in str(stop.value.code)


def test_a_student_of_an_arm_is_what_a_course_trains(out: Path, found: dict) -> None:
    arm = found["arms"]["focal-1"]
    kept = json.loads(file_of(out, "focal-1").read_text())
    vocabulary, corpus = runs.load(out / "seed-0").vocabulary, small()
    seed = token_contest.seed_of(0, 2, 1)
    how = course.Course(**{**found["course"], "lr": arm["tuning"]["lr"], "seed": seed})
    made = course.train(corpus, vocabulary, how, course.focal(1.0), progress=False)
    said = made.translate([source for source, _ in corpus.test])
    wanted = [target for _, target in corpus.test]
    assert said == kept["said"][1]
    assert arm["bleu"][1] == scores.bleu(said, wanted).value
    assert arm["perplexity"][1] == scores.fit(made.student, vocabulary.encode_pairs(corpus.test)).perplexity


def test_the_arm_of_a_teacher_is_the_loss_in_its_folder(out: Path, tmp_path: Path) -> None:
    """Whatever it says, and not what it started as."""
    shutil.copytree(out, tmp_path / "runs")
    for index, name in enumerate(("seed-0", "static-0")):
        folder = tmp_path / "runs" / name
        teacher = AnyTeacher.load(folder)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        teacher.save(folder)
    budget = contest.Budget(2, 1, (0.01,), 0, ("maximum-likelihood",))
    comparison = token_contest.set_up(token_contest.of_runs([tmp_path / "runs"], budget))
    hidden, head, target = torch.randn(2, 3, 4), torch.randn(60, 4), torch.tensor([[5, 9, 3], [4, 3, -100]])
    losses = []
    for arm, name in (("taught by seed-0", "seed-0"), ("static taught loss", "static-0")):
        teacher = AnyTeacher.load(tmp_path / "runs" / name)
        assert isinstance(teacher, TokenTeacher)
        for progress in (0.1, 0.9):
            state = StudentState(progress, 2.0, 0.3)
            losses.append(float(teacher.loss(hidden, head, None, target, state)))
            assert float(comparison.arms[arm](hidden, head, None, target, state)) == losses[-1]
            neutral = float(teacher.neutral().loss(hidden, head, None, target, state))
            assert abs(losses[-1] - neutral) > 1e-3
    assert len(set(losses)) == 3  # the static one says the same at every stage


def test_rates_are_tuned_by_translations_of_dev_beside_its_references(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, read = small(), []

    class Says:
        def translate(self, sentences: list[str]) -> list[str]:
            read.append(sentences)
            return [f"red {text}" for text in sentences]

    def bleu(said: list[str], wanted: list[str], target: str) -> SimpleNamespace:
        assert target == "en"
        assert said == [f"red {source}" for source, _ in corpus.dev]
        assert wanted == [target for _, target in corpus.dev]
        return SimpleNamespace(value=7.0)

    monkeypatch.setattr(token_contest, "train", lambda *_, **more: Says())
    monkeypatch.setattr(token_contest.scores, "bleu", bleu)
    budget = contest.Budget(2, 3, (0.01,), 0, ("maximum-likelihood",))
    comparison = token_contest.set_up(token_contest.of_runs([out], budget)._replace(folder=tmp_path))
    assert comparison._dev_bleu("maximum-likelihood", 0.01, lambda _: None) == 7.0
    assert read == [[source for source, _ in corpus.dev]] * 3


def test_rates_are_tuned_on_dev_from_one_grid_that_goes_on_at_its_ends(found: dict) -> None:
    for arm in found["arms"].values():
        tuning = arm["tuning"]
        assert sorted([0.01, 0.03, *tuning["added"]]) == tuning["grid"]
        assert 1 <= len(tuning["added"]) <= 2  # of two rates, one is at an end
        best = tuning["dev_bleu"].index(max(tuning["dev_bleu"]))
        assert tuning["lr"] == tuning["grid"][best]
        assert tuning["at_edge"] == (best in (0, len(tuning["grid"]) - 1))
        assert len(tuning["added"]) == 2 or not tuning["at_edge"]


class Made:
    """A student that translates nothing."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def translate(self, sentences: list[str]) -> list[str]:
        return [f"{self.rate:g}"] * len(sentences)


@pytest.mark.parametrize(
    ("diverge", "finally_diverge", "grid", "bleu", "lr", "edge"),
    [
        ([0.2], [], [0.05, 0.1, 0.2], [3, 5, None], 0.1, False),
        ([0.1, 0.2], [], [0.025, 0.05, 0.1, 0.2], [2, 3, None, None], 0.05, False),
        ([0.05, 0.1, 0.2], [], [0.013, 0.025, 0.05, 0.1, 0.2], [1, 2, None, None, None], 0.025, False),
        ([], [], [0.05, 0.1, 0.2, 0.4, 0.8], [3, 5, 6, 7, 8], 0.8, True),
        ([0.8], [0.4], [0.05, 0.1, 0.2, 0.4, 0.8], [3, 5, 6, None, None], 0.2, False),
    ],
)
def test_a_rate_that_diverges_is_out_of_the_running_and_stops_nothing(
    diverge: list[float], finally_diverge: list[float], grid: list[float], bleu: list[float | None],
    lr: float, edge: bool, out: Path, found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    levels = {0.013: 1.0, 0.025: 2.0, 0.05: 3.0, 0.1: 5.0, 0.2: 6.0, 0.4: 7.0, 0.8: 8.0}
    budget = contest.Budget(3, 1, (0.1, 0.05, 0.2), 0, ("maximum-likelihood",))
    one = token_contest.of_runs([out], budget)
    comparison = token_contest.set_up(one._replace(folder=tmp_path))

    def trained(corpus: object, vocabulary: object, how: course.Course, *_: object, **more: Any) -> Made:
        more["directory"].mkdir(parents=True, exist_ok=True)
        final = how.seed != token_contest.seed_of(0, 1, 0)
        if how.lr in (finally_diverge if final else diverge):
            raise check.DivergedError
        return Made(how.lr or 0.0)

    monkeypatch.setattr(token_contest, "train", trained)
    monkeypatch.setattr(
        token_contest.scores, "bleu", lambda said, *_: SimpleNamespace(value=levels[float(said[0])])
    )
    monkeypatch.setattr(comparison, "_read_test", lambda made: {"bleu": [student.rate for student in made]})
    made = comparison.run("maximum-likelihood")
    tuning = made["tuning"]
    assert (tuning["grid"], tuning["dev_bleu"]) == (grid, bleu)
    assert (tuning["lr"], tuning["at_edge"]) == (lr, edge)
    assert tuning["added"] == [rate for rate in grid if rate not in (0.05, 0.1, 0.2)]
    assert made["bleu"] == [lr] * 3
    found["arms"]["maximum-likelihood"]["tuning"] = tuning
    said = "\n".join(token_contest.table("toy", found))
    out_of_it = [rate for rate, value in zip(grid, bleu, strict=True) if value is None]
    assert ("diverged, and out of the running: " in said) == bool(out_of_it)
    assert all(f"maximum-likelihood at {rate:g}" in said for rate in out_of_it)
    (line,) = (line for line in said.splitlines() if line.startswith("maximum-likelihood "))
    assert f" {lr:g}{'*' if edge else ' '} " in line


def test_an_arm_all_of_whose_rates_diverge_says_so(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverges(hidden: Tensor, *_: object) -> Tensor:
        return hidden.sum() * math.inf

    monkeypatch.setitem(course.LOSSES, "focal-2", diverges)
    assert main(["compare", str(out), "--grid", "0.1", "0.2", "--arms", "focal-2", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "the grid must have a learning rate at which no student of 'focal-2' diverges, got" in said
    assert "got 0.025, 0.05, 0.1, 0.2. Give smaller ones (--grid)." in said


def test_tests_are_those_of_scipy_and_sacrebleu(out: Path, tmp_path: Path) -> None:
    made_up = {
        "taught-by-seed-0": [31.0, 32.5, 31.9],
        "focal-1": [30.0, 31.4, 30.9],
        "maximum-likelihood": [30.5, 32.9, 31.0],
        "static-taught-loss": [31.0, 32.5, 31.9],
    }
    wanted = [target for _, target in small().test]
    shutil.copytree(out, tmp_path / "runs")
    for name, values in made_up.items():
        file = file_of(tmp_path / "runs", name)
        row = json.loads(file.read_text())
        row["bleu"], row["perplexity"][0] = values, None  # which is what a file has of infinity
        others = [
            ["red dog"] * len(wanted),
            wanted[1:] + wanted[:1],
            wanted[:4] + ["red"] * (len(wanted) - 4),
        ]
        row["said"] = [wanted] * 3 if name == "taught-by-seed-0" else others
        file.write_text(json.dumps(row))
    budget = contest.Budget(3, 1, (0.01, 0.03), 0, ("maximum-likelihood", "focal-1"))
    one = token_contest.of_runs([tmp_path / "runs"], budget)
    comparison = token_contest.set_up(one)
    assert comparison.missing() == []
    found = comparison.result()
    own = found["tests"]["taught by seed-0"]
    mine, ps = made_up["taught-by-seed-0"], []
    for name in ("focal-1", "maximum-likelihood"):
        ps.append(stats.ttest_rel(mine, made_up[name]).pvalue)
        assert own[name]["p"] == pytest.approx(ps[-1])
        assert own[name]["difference"] == pytest.approx(sum(mine) / 3 - sum(made_up[name]) / 3)
    assert own["static taught loss"]["p"] is None
    assert ps[0] < ps[1]
    assert own["focal-1"]["p_corrected"] == pytest.approx(3 * ps[0])  # the equal arm counts
    assert own["maximum-likelihood"]["p_corrected"] == pytest.approx(min(1.0, 2 * ps[1]))
    assert found["best_baseline"] == "static taught loss"
    rows, ahead = found["bootstrap"]["taught by seed-0"], [100 - scores.bleu(x, wanted).value for x in others]
    assert [row["difference"] for row in rows] == pytest.approx(ahead)  # each beside the same student's
    assert len({round(x) for x in ahead}) == 3
    assert rows[0]["p"] < 0.05
    lines = {line.split("  ")[0]: line for line in token_contest.table("toy", found)}
    assert " inf " in lines["focal-1"]
    assert "win" in lines["focal-1"]  # 3 * ps[0] is below 0.01
    assert "win" not in lines["maximum-likelihood"]
    assert any("ahead in 3 and behind in 0 of 3" in line for line in lines.values())


def test_the_same_command_again_makes_nothing_and_what_was_broken_off_alone(
    out: Path, found: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    whole, rates = token_contest.train, len(found["arms"]["focal-1"]["tuning"]["grid"])

    def counted(*given: object, **more: object) -> course.Trained:
        calls.append(str(more["name"]))
        if len(calls) == rates + 2:
            raise KeyboardInterrupt
        return whole(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(token_contest, "train", counted)
    assert main(["compare", str(out), *COMPARE]) == 0
    assert calls == []
    said = capsys.readouterr().out
    assert "taught by seed-0 less this" in said
    assert "static taught loss" in said
    assert "paired bootstrap over test sentences" in said
    file_of(out, "focal-1").write_text("{")  # which is as if there were none
    assert main(["compare", str(out), *COMPARE]) == 130
    assert main(["compare", str(out), *COMPARE]) == 0
    assert calls == ["focal-1"] * (rates + 2 + 3)  # tuned before; the courses that are there are read
    again = json.loads((out / "comparison.json").read_text())
    for one in (found, again):
        for arm in one["arms"].values():
            arm.pop("cpu_seconds")
        one.pop("teaching")
    assert again == found
    left = {path.name for path in (out / "arms").iterdir() if not path.name.startswith("focal-2-")}
    arms = "focal-1", "maximum-likelihood", "static-taught-loss", "taught-by-seed-0"
    assert left == {file_of(out, arm).name for arm in arms}  # focal-2 diverged, above


def test_a_process_of_its_own_makes_an_arm_from_the_contest_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []  # this process is not its own
    monkeypatch.setattr(contest.signal, "signal", lambda *given: taken.append(given))
    budget = contest.Budget(2, 1, (0.01,), 5, ("maximum-likelihood",))
    one = token_contest.of_runs([out], budget)
    comparison = token_contest.set_up(one)
    assert len(comparison.missing()) == 3
    asked: list[object] = []

    def of(given: object) -> token_contest.TokenComparison:
        asked.append(given)
        return comparison

    turns = Value("i", 0), Value("i", 0)
    contest._work([one], [(0, "maximum-likelihood")], *turns, of)
    assert asked == [one]
    assert turns[1].value == 1
    assert len(comparison.missing()) == 2
    assert comparison.others.keys() >= {"maximum-likelihood"}
    comparison.forget()
    assert len(comparison.missing()) == 3
    # Ctrl-C is the parent's, whose signal to end interrupts a course as Ctrl-C does.
    assert taken[:2] == [
        (signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.default_int_handler),
    ]  # fmt: skip
    monkeypatch.setattr(comparison, "run", lambda _: signal.default_int_handler(signal.SIGTERM, None))
    turns = Value("i", 0), Value("i", 0)
    with pytest.raises(SystemExit, match="130"):
        contest._work([one], [(0, "maximum-likelihood")], *turns, of)
    assert turns[1].value == 0
    assert pickle.loads(pickle.dumps((one, token_contest.set_up))) == (one, token_contest.set_up)


def test_arms_are_listed_and_what_makes_no_sense_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(out), "--arms", "list"]) == 0
    assert capsys.readouterr().out.split() == [*course.LOSSES]
    for more, said in (
        (["--arms", "hinge"], "the arm must be one of maximum-likelihood"),
        (["--students", "1"], "students must be"),
        (["--grid", "-1"], "grid must be"),
        (
            ["--regime", "clean"],
            "a comparison of translators must come without flags of another, got --regime",
        ),
    ):
        assert main(["compare", str(out), *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", "translation"]) == 2
    assert "must be given folders of runs, got the word translation. Write for" in capsys.readouterr().err
    other = tmp_path / "seed-9"
    other.mkdir()
    for path in (out / "seed-0").glob("*.*"):
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["course"]["steps"] = 9
    (other / "config.json").write_text(json.dumps(config))
    assert main(["compare", str(out), str(other)]) == 2
    assert "must have the same students and sentence pairs, got another course" in capsys.readouterr().err


def test_a_run_whose_settings_break_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "config.json").write_text("{")
    assert main(["compare", str(tmp_path)]) == 2
    assert str(tmp_path / "seed-0" / "config.json") in capsys.readouterr().err


def test_runs_of_other_vocabularies_do_not_meet(out: Path, tmp_path: Path) -> None:
    """Of the same pairs and size, but by another version of sentencepiece."""
    budget = contest.Budget(2, 1, (0.01,), 5, ("maximum-likelihood",))
    for name in ("one", "other"):
        shutil.copytree(out / "seed-0", tmp_path / name)
    assert len(token_contest.of_runs([tmp_path], budget).runs) == 2
    (tmp_path / "other" / course.VOCABULARY).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"got another vocabulary\.model in .*other'"):
        token_contest.of_runs([tmp_path], budget)


def test_an_arm_of_a_long_name_has_a_file(out: Path) -> None:
    comparison = token_contest.set_up(
        token_contest.of_runs([out], contest.Budget(2, 1, (0.01,), 5, ("maximum-likelihood",)))
    )
    short, *long = (comparison._file(name).name for name in ("focal-1", "ü" * 300, "ü" * 300 + " 2"))
    assert short.startswith("focal-1-")
    assert len({*long}) == 2
    assert all(len(name.encode()) < 205 for name in long)  # a temporary neighbour's is longer


class Killed:
    """A process that ran out of memory."""

    name, exitcode, pid = "Process-7", -9, 1

    def __init__(self, **given: Any) -> None:
        self.name = given.get("name", self.name)
        self.sentinel, end = os.pipe()
        os.close(end)

    def start(self) -> None: ...

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        os.close(self.sentinel)


def test_a_process_that_was_killed_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    context = SimpleNamespace(Value=Value, Process=Killed)
    monkeypatch.setattr(contest.multiprocessing, "get_context", lambda _: context)
    comparison = SimpleNamespace(missing=lambda: ["one", "two"])
    assert not contest.make([None], [comparison], 2, False)
    said = "a process must run to its end, got Process-7 ended by SIGKILL. Give the same command again"
    assert capsys.readouterr().err.count(said) == 2
    lessons: list[Any] = [SimpleNamespace(directory=tmp_path / name) for name in ("a", "b")]
    assert cli._teach_several(lessons, 1) == 9
    assert f"got {tmp_path / 'b'} ended by SIGKILL. Go on with --resume" in capsys.readouterr().err
    assert "ended by signal 99" in check.process_killed("x", -99, makes_missing=True)
