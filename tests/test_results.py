"""docs/results.md says what the rows of benchmarks/results say; and the cheapest row can be made again."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import draw_results
import pytest
import studies
import teaching
from scipy import stats

import l2t
from l2t import tasks

ROOT = Path(__file__).resolve().parents[1]
CHEAPEST = "mnist1d-mlp-clean"


def arm(*errors, lr=0.1, at_edge=False):
    return {
        "test_error": list(errors),
        "lr": lr,
        "grid": [lr],
        "added": [],
        "dev_error": [0.5],
        "at_edge": at_edge,
    }


def row_of(name, teachers, arms, oracles=(), also=(), **more):
    """A row whose teachers are (errors, {arm: (corrected p, chosen)})."""
    return {
        "name": name,
        "command": f"python benchmarks/teaching.py {name}",
        "commands": ["l2t teach digits", "l2t compare runs/some"],
        "task": "digits",
        "regime": "few",
        "student": "mlp",
        "commit": "abcdef123456",
        "versions": {"torch": "9.9"},
        "seed": 0,
        "students": 3,
        "minutes": {"teaching": 1.25, "comparison": 2.5},
        "protocol": ["First this was done.", "Then that."],
        "comparisons": len(teachers) * len(arms),
        "oracles": list(oracles),
        "also": list(also),
        "arms": arms,
        "teachers": {
            teacher: {
                "seed": 0,
                "chosen": chosen,
                **arm(*errors),
                "against": {
                    other: {
                        "difference": statistics.fmean(errors) - statistics.fmean(arms[other]["test_error"]),
                        "p": ps[other] / 10,
                        "p_corrected": ps[other],
                        "interval": [-0.02, 0.01],
                    }
                    for other in arms
                },
            }
            for teacher, (errors, ps, chosen) in teachers.items()
        },
        **more,
    }


ARMS = {
    "cross-entropy": arm(0.30, 0.32, 0.34),
    "label smoothing 0.1": arm(0.29, 0.30, 0.31, lr=1.0, at_edge=True),
    "told (oracle)": arm(0.10, 0.11, 0.12),
    "static taught loss": arm(0.25, 0.26, 0.27),
}
WON = {"cross-entropy": 2e-5, "label smoothing 0.1": 0.0031, "told (oracle)": 1e-4, "static taught loss": 0.4}
LOST = {**WON, "label smoothing 0.1": 0.02, "static taught loss": 0.001}


@pytest.fixture
def results(tmp_path):
    won = row_of(
        "a-won",
        {"seed-0": ([0.2, 0.21, 0.25], WON, "average"), "seed-1": ([0.2, 0.22, 0.24], WON, "good")},
        ARMS, ["told (oracle)"], ["static taught loss"],
    )  # fmt: skip
    mixed = row_of(
        "b-mixed",
        {"seed-0": ([0.2, 0.21, 0.25], WON, "average"), "seed-1": ([0.4, 0.42, 0.44], LOST, "neutral")},
        ARMS, ["told (oracle)"], ["static taught loss"],
    )  # fmt: skip
    plain = {name: ARMS[name] for name in ("cross-entropy", "label smoothing 0.1")}
    moved = row_of("c-moved", {"seed-0": ([0.5, 0.6, 0.7], WON, None)}, plain, source="a-won")
    for row in (won, mixed, moved):
        (tmp_path / f"{row['name']}.json").write_text(json.dumps(row))
    (tmp_path / "other.md").write_text("## By hand\n\nNumbers.\n")
    return tmp_path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def lines_of(page: str, start: str) -> list[list[str]]:
    return [cells(line) for line in page.splitlines() if line.startswith(start)]


def test_the_summary_is_what_the_rows_say(results):
    page = draw_results.page(results)
    won, mixed = lines_of(page, "| [a-won]")[0], lines_of(page, "| [b-mixed]")[0]
    assert won[1:4] == [
        "label smoothing 0.1",
        "30.00 ± 1.00",
        "22.00 / 22.00",
    ]  # not the oracle, nor the static
    assert won[4:7] == ["-8.00 / -8.00", "0.0031", "*win*"]
    assert won[7:] == ["26.00 ± 1.00", "-4.00 / -4.00", "even"]
    assert mixed[3:7] == ["22.00 / 42.00", "-8.00 / +12.00", "0.02", "1 *win*, 1 even"]
    assert mixed[8:] == ["-4.00 / +16.00", "1 even, 1 **loss**"]
    summary, transfers = page.split("## Transfer")
    assert "2 settings with 4 teachers and 16 comparisons." in summary
    assert "every teacher wins in 1, and some teacher loses in 0." in summary
    assert "of 2 settings that have one, every dynamic teacher wins in 0, and some loses in 1." in summary
    assert "1 settings with 1 teachers and 2 comparisons." in transfers
    assert "every teacher wins in 0, and some teacher loses in 1." in transfers
    assert "Teachers of `a-won`." in transfers
    assert page.endswith("## By hand\n\nNumbers.\n")


def test_kinds_are_compared_by_their_means_over_teachers(results):
    """Static teachers, two of them, against two dynamic ones: by hand, a student at a time."""
    row = json.loads((results / "a-won.json").read_text())
    row["arms"]["static taught loss, two"] = arm(0.23, 0.22, 0.30)
    row["also"].append("static taught loss, two")
    for teacher in row["teachers"].values():
        teacher["against"]["static taught loss, two"] = teacher["against"]["static taught loss"]
    (results / "a-won.json").write_text(json.dumps(row))
    page = draw_results.page(results)
    first, second = lines_of(page, "| a-won |")[0], lines_of(page, "| b-mixed |")[0]
    assert first[1:3] == ["22.00 / 22.00", "26.00 / 25.00"]
    # By student: 20, 21.5, 24.5 less 24, 24, 28.5, which is -4, -2.5, -4: t = -7 and, on two degrees,
    # p = 1 - 7 / sqrt(51) = 0.0198. The other's: 5, 5.5, 7.5, t = 7.86, p = 0.0158, times two by Holm.
    assert first[3].startswith("-3.50 [")
    assert second[1:3] == ["22.00 / 42.00", "26.00"]
    assert second[3].startswith("+6.00 [")
    assert first[4:] == second[4:] == ["0.032", "even"]
    same = json.loads(
        (results / "b-mixed.json").read_text()
    )  # teachers that differ from the static one in nothing
    for teacher in same["teachers"].values():
        teacher["test_error"] = same["arms"]["static taught loss"]["test_error"]
    (results / "b-mixed.json").write_text(json.dumps(same))
    page = draw_results.page(results)
    assert lines_of(page, "| b-mixed |")[0][3:] == ["+0.00 [+0.00, +0.00]", "–", "even"]
    assert lines_of(page, "| a-won |")[0][4:] == ["0.04", "even"]
    for name in ("a-won", "b-mixed"):  # without static teachers there is no such table
        left = json.loads((results / f"{name}.json").read_text())
        left["also"] = []
        (results / f"{name}.json").write_text(json.dumps(left))
    assert "as kinds" not in draw_results.page(results)


def test_a_table_is_what_its_row_says(results):
    page = draw_results.page(results)
    part = page.split("## b-mixed\n")[1].split("\n## ")[0]
    table = [cells(line) for line in part.splitlines() if line.startswith("| ")]
    assert table[0] == ["loss", "test error, %", "rate", "seed-0 less this", "seed-1 less this"]
    assert [line[0] for line in table[2:]] == [
        "**taught**, seed-0", "**taught**, seed-1 (a known loss)",
        "told (oracle)", "static taught loss", "label smoothing 0.1", "cross-entropy",
    ]  # fmt: skip
    low, high = map(float, re.findall(r"\d+\.\d+", table[2][1].split("[")[1]))
    reach = 4.302652729911275 * 100 * statistics.stdev([0.2, 0.21, 0.25]) / 3**0.5  # t of 2 degrees at 0.975
    assert (low, high) == pytest.approx((22 - reach, 22 + reach), abs=0.006)
    assert table[2][1].startswith("**22.00 ± 2.65**")
    smoothing = table[6]
    assert smoothing[2] == "1\\*"
    assert smoothing[3:] == [
        "-8.00 [-2.00, +1.00], p 0.0031, *win*",
        "+12.00 [-2.00, +1.00], p 0.02, even",
    ]
    assert table[4][4] == "+31.00 [-2.00, +1.00], p 1e-4, **loss**"
    for words in (
        "`python benchmarks/teaching.py b-mixed` (task digits, regime few, student mlp; 3 students an arm)",
        "Minutes of one core: 1.2 for teaching, 2.5 for the comparison;",
        "commit abcdef123456, torch 9.9",
        "```\nl2t teach digits\nl2t compare runs/some\n```",
        "* First this was done.\n* Then that.",
    ):
        assert words in part


def test_a_weight_net_is_a_baseline_and_no_static_loss(tmp_path):
    arms = {**ARMS, "Meta-Weight-Net": arm(0.24, 0.25, 0.26)}
    ps = {**WON, "Meta-Weight-Net": 0.3}
    also = ["static taught loss", "Meta-Weight-Net"]
    row = row_of("a", {"seed-0": ([0.2, 0.21, 0.25], ps, "average")}, arms, ["told (oracle)"], also)
    (tmp_path / "a.json").write_text(json.dumps(row))
    (line,) = lines_of(draw_results.page(tmp_path), "| [a]")
    assert line[1:3] == ["Meta-Weight-Net", "25.00 ± 1.00"]
    assert line[6:] == ["even", "26.00 ± 1.00", "-4.00", "even"]


def test_of_arms_that_are_as_good_the_first_is_the_best_baseline():
    """Whatever order a set of their names would have."""
    names = [f"arm {number}" for number in range(9)]
    arms = {name: {"test_error": [0.2, 0.3]} for name in names}
    for _ in names:
        names.append(names.pop(0))
        row = {"arms": {name: arms[name] for name in names}, "oracles": [], "also": []}
        assert draw_results.best_baseline(row) == names[0]


def test_wins_of_known_losses_are_told_apart(results):
    assert "fell back" not in draw_results.page(results).split("## Transfer")[0].split("## a-won")[0]
    row = json.loads((results / "a-won.json").read_text())
    row["teachers"]["seed-1"]["chosen"] = "neutral"
    (results / "a-won.json").write_text(json.dumps(row))
    said = "Of the former 1 and of the latter 0 have a teacher that fell back to a known loss"
    assert said in draw_results.page(results)


def test_kept_teachers_stand_with_what_their_trials_found_as_far_as_there_is_any(tmp_path):
    kept = tmp_path / "teachers" / "toy"
    (tmp_path / "teachers" / ".part-abc" / "toy").mkdir(parents=True)  # of a copy that was broken off
    trials = {
        "seed-0": {"chosen": "good", "runs": 1, "by": "1 - BLEU", "measure": {"neutral": [0.5, 0.75],
                   "good": [None, 0.5]}},
        "seed-1": None,
    }  # fmt: skip
    for name, trial in trials.items():
        (kept / name).mkdir(parents=True)
        content = {"trial": trial, "seconds": {"updates": 7200.0, "trial": 1800.0}}
        (kept / name / "history.json").write_text(json.dumps(content))
    (kept / "made.json").write_text(json.dumps({"commit": "abc", "versions": {"torch": "9.9"}}))
    page = draw_results.page(tmp_path)
    assert page.count("taught, not yet compared") == 1
    assert lines_of(page, "| seed-") == [["seed-0", "good", "2.5", "0.625", "inf"]]
    assert "the least 1 - BLEU on dev is taken" in page
    (kept / "seed-0" / "history.json").unlink()
    page = draw_results.page(tmp_path)
    assert "--taught` begins with, once a static teacher is there, too (commit abc, torch 9.9).\n" in page
    assert "is taken" not in page


def test_without_rows_the_page_says_so(tmp_path):
    assert "There are no rows yet." in draw_results.page(tmp_path)


def test_the_page_of_the_docs_is_drawn_from_the_rows_that_are_there():
    if not list(teaching.RESULTS.glob("*.json")):
        pytest.skip("benchmarks/results holds no rows yet")
    assert (ROOT / "docs" / "results.md").read_text() == draw_results.page(teaching.RESULTS)


@pytest.mark.long
def test_the_cheapest_row_can_be_made_again(tmp_path, monkeypatch):
    """One teacher of it, taught and compared anew, lands inside what the page states of its teachers.

    Students of the same seeds are others on another instruction set, so the other arms may differ by chance.
    """
    path = teaching.RESULTS / f"{CHEAPEST}.json"
    if not path.is_file():
        pytest.skip("benchmarks/results holds no row of it yet")
    stated = json.loads(path.read_text())
    setting = teaching.SETTINGS[CHEAPEST]._replace(kinds=("dynamic",), seeds=(0,))
    monkeypatch.setitem(teaching.SETTINGS, CHEAPEST, setting)
    row = teaching.run(CHEAPEST, tmp_path, jobs=2)
    (teacher,) = row["teachers"].values()
    means = [draw_results.mean_interval(one["test_error"]) for one in stated["teachers"].values()]
    assert min(means)[0] <= statistics.fmean(teacher["test_error"]) <= max(high for _, high in means)
    for name, of in row["arms"].items():
        p = stats.ttest_ind(of["test_error"], stated["arms"][name]["test_error"], equal_var=False).pvalue
        assert not p < 0.01 / len(row["arms"]), name  # NaN where all errors are equal


def test_the_table_of_a_study_says_what_its_rows_say(tmp_path):
    def row(option, seed, error):
        return {
            "option": option,
            "seed": seed,
            "norm": 2.5,
            "agreement": 0.25,
            "test_error": [error, error + 0.02],
            "cross_entropy": [0.5, 0.5],
            "p": 0.02,
        }

    rows = [row("none", 1, 0.6), row("none", 0, 0.5), row("rate", 0, 0.4)]
    words = {"none": "nothing done", "rate": "half the rate", "other": "never run"}
    content = {"command": "python it", "commit": "abc", "about": "Of edges.", "words": words, "rows": rows}
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "edge.json").write_text(json.dumps(content))
    page = draw_results.page(tmp_path)
    first = page.index("| half the rate | 2.5 | 0.25 | -9.00 (p 0.02) | -9.00 |")
    assert page.index("| nothing done | 2.5 | 0.25 | +1.00 (p 0.02) / +11.00 (p 0.02) | +6.00 |") > first
    assert "never run" not in page
    assert "## Study: edge" in page
    assert "Of edges. `python it` (commit abc)" in page
    assert "The default is a smaller rate while teaching" in page
    assert draw_results.OF_STUDIES.keys() == studies.STUDIES.keys()


def test_a_study_goes_on_from_rows_of_as_many_students(tmp_path):
    path = tmp_path / "edge.json"
    assert studies.kept(path, 2) == []
    few, many = {"option": "none", "test_error": [0.5] * 2}, {"option": "rate", "test_error": [0.5] * 20}
    path.write_text(json.dumps({"rows": [few, many]}))
    assert studies.kept(path, 2) == [few]
    assert studies.kept(path, 20) == [many]


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_option_of_a_study_can_be_taught(name):
    """Recipe, teacher and student of each are what they should be, and differ from the study's own."""
    study = studies.STUDIES[name]
    task = tasks.get("mnist1d")
    assert study.regime in task.regimes
    seen = set()
    for option in study.options.values():
        recipe = l2t.Recipe(steps=300, batch_size=50, **{**study.recipe, **option.recipe})
        teacher = l2t.Teacher(10, **{**study.teacher, **option.teacher}).config()
        task.student(option.student)
        seen.add(json.dumps([recipe.to_json(), teacher, option.student]))
        assert recipe.students * recipe.updates <= 160
    assert len(seen) == len(study.options)
