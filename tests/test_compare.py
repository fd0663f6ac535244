"""The comparison: pairing, tuning, one look at the test set an arm, arms kept in files, statistics."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import l2t
from l2t import compare as compare_module
from l2t import students as students_module
from l2t.baselines import Arm, baselines, label_smoothing, stateless
from l2t.compare import Comparison, compare, holm, paired, slug
from l2t.students import cross_entropy

CLASSES = 3
RECIPE = l2t.Recipe(steps=20, batch_size=16)
NOISE = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.4, 0.0, 0.6]], dtype=torch.float64)


def data(count=300, noise=0.0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 5, generator=generator)
    y = (x @ torch.randn(5, CLASSES, generator=generator)).argmax(1)
    flip = torch.rand(count, generator=generator) < noise
    return x, torch.where(flip, (y + 1) % CLASSES, y)


def linear() -> nn.Module:
    return nn.Linear(5, CLASSES)


def run(teachers=None, dev=None, train=None, *, student=linear, **options):
    options = {"recipe": RECIPE, "students": 3, "grid": (0.05, 0.2), "tuning_students": 2, **options}
    x, y = data()
    return compare(
        {"mine": l2t.Teacher(CLASSES)} if teachers is None else teachers,
        student,
        train or (x[:200], y[:200]),
        (x[200:], y[200:]),
        dev,
        progress=False,
        **options,
    )


# ---- the comparison


def test_a_comparison_is_what_it_says():
    teachers = {"a": l2t.Teacher(CLASSES), "b": l2t.Teacher(CLASSES, "full", seed=1)}
    found = run(teachers, also={"static": l2t.static_teacher(CLASSES, "full")})
    assert list(found) == ["a", "b"]
    for name, one in found.items():
        arms = ["taught", *baselines(torch.tensor([1, 1, 1])), "static"]
        for key in ("test_error", "test_loss", "summary", "tuning", "curves"):
            assert list(one[key]) == arms
        assert list(one["p"]) == arms[1:]
        assert all(len(values) == 3 for values in one["test_error"].values())
        assert one["teacher"] == teachers[name].config()
        for arm, values in one["test_error"].items():
            assert one["summary"][arm]["mean"] == pytest.approx(sum(values) / 3)
            differences = [
                mine - other for mine, other in zip(one["test_error"]["taught"], values, strict=True)
            ]
            assert one["summary"][arm]["difference"] == pytest.approx(sum(differences) / 3)
            assert one["summary"][arm]["ahead"] == sum(d < 0 for d in differences)
            assert one["summary"][arm]["behind"] == sum(d > 0 for d in differences)
            if arm != "taught":
                assert (one["p"][arm], one["interval"][arm]) == (
                    pytest.approx(paired(one["test_error"]["taught"], values).p),
                    pytest.approx(list(paired(one["test_error"]["taught"], values).interval)),
                )
            assert one["curves"][arm]["step"] == list(range(1, 21))
            assert len(one["curves"][arm]["dev_error"]) == 20
            tuned = one["tuning"][arm]
            best = tuned["dev_error"].index(min(tuned["dev_error"]))
            assert tuned["lr"] == tuned["grid"][best]
            assert sorted({0.05, 0.2, *tuned["added"]}) == tuned["grid"]
            assert tuned["at_edge"] == (best in (0, len(tuned["grid"]) - 1))
            assert len(tuned["added"]) == 2 or (
                tuned["added"] and not tuned["at_edge"]
            )  # of two rates, an end
    assert found["a"]["test_error"]["cross-entropy"] == found["b"]["test_error"]["cross-entropy"]
    every = [p for one in found.values() for p in one["p"].values()]
    assert [p for one in found.values() for p in one["p_corrected"].values()] == holm(every)
    assert found["a"]["comparisons"] == found["b"]["comparisons"] == len(every) == 2 * (len(arms) - 1)
    assert found["a"]["also"] == ["static"]
    json.dumps(found, allow_nan=False)


def test_it_is_seeded_to_the_bit():
    a, b, other = run(seed=1), run(seed=1), run(seed=2)
    for one in (a, b, other):
        one["mine"].pop("seconds")
    assert a == b
    assert a["mine"]["test_error"] != other["mine"]["test_error"]


def test_students_who_do_not_fit_side_by_side_train_in_turn(monkeypatch):
    teachers = {"mine": l2t.Teacher(CLASSES, features=("progress", "dev_loss"))}
    together = run(teachers)["mine"]
    monkeypatch.setattr(
        students_module, "SIDE_BY_SIDE", 2 * sum(students_module.bytes_of(linear, data()[0][:16]))
    )
    in_turn = run(teachers)["mine"]
    assert in_turn["tuning"] == together["tuning"]
    assert in_turn["test_error"] == together["test_error"]
    for arm, losses in together["test_loss"].items():
        assert in_turn["test_loss"][arm] == pytest.approx(losses)


def test_students_are_paired(monkeypatch):
    """Two arms of the same loss get the same students, rows and errors, and no p."""
    same = {"cross-entropy": Arm(stateless(cross_entropy)), "again": Arm(stateless(cross_entropy))}
    monkeypatch.setattr(compare_module, "baselines", lambda *_: dict(same))
    one = run({"mine": l2t.Teacher(CLASSES, "full", link="identity").neutral()})["mine"]
    assert one["test_error"]["cross-entropy"] == one["test_error"]["again"]
    assert one["test_error"]["taught"] == pytest.approx(one["test_error"]["again"], abs=0.011)  # a row of 100
    identical = run({"mine": l2t.Teacher(CLASSES)}, also={"also": l2t.Teacher(CLASSES)})["mine"]
    assert identical["p"]["also"] is None
    assert identical["summary"]["also"]["difference"] == 0


def rows_seen(monkeypatch, **options):
    """Rows that the students of each arm learn from, and rows that they are judged on, by stage."""
    seen = []
    real = compare_module._share

    def spy(arm, rows, *arguments, final):
        share = real(arm, rows, *arguments, final=final)
        seen.append((arm.rows, arm.wants_dev, final, share))
        return share

    monkeypatch.setattr(compare_module, "_share", spy)
    run(**options)
    return seen


def test_rows_without_a_dev_set(monkeypatch):
    for _, _, final, share in rows_seen(monkeypatch):
        (learn,) = share.learn
        for mine, held in zip(learn.tolist(), share.dev.tolist(), strict=True):
            assert sorted([*mine, *held]) == list(range(200))
            assert len(held) == (0 if final else 40)


def test_rows_with_a_clean_dev_set(monkeypatch):
    x, y = data()
    teachers = {"mine": l2t.Teacher(CLASSES), "dev": l2t.Teacher(CLASSES, features=["dev_loss"])}
    seen = rows_seen(
        monkeypatch, teachers=teachers, dev=(x[200:250], y[200:250]), noise=NOISE, dev_is_clean=True
    )
    everything, dev = set(range(250)), set(range(200, 250))
    kinds = set()
    for rows, wants_dev, final, share in seen:
        kinds.add((rows, wants_dev))
        for parts in zip(*share.learn, share.dev, strict=True):
            *learn, held = (set(part.tolist()) for part in parts)
            together = set().union(*learn)
            if rows == "dev":
                assert together <= dev
                assert len(learn) == 1
            elif rows == "both":
                assert learn[0] == everything - dev
                assert learn[1] <= dev
            if not final or wants_dev:
                assert held
                assert held <= dev
                assert not held & together
            elif rows == "all":
                assert together == everything
    assert kinds == {("all", False), ("all", True), ("dev", False), ("both", False)}


def test_half_of_a_batch_is_from_the_dev_set(monkeypatch):
    seen = []
    real = compare_module.Lesson

    def spy(data, batches, *arguments):
        seen.append(batches)
        return real(data, batches, *arguments)

    monkeypatch.setattr(compare_module, "Lesson", spy)
    arm = {"half": Arm(stateless(cross_entropy), rows="both")}
    monkeypatch.setattr(compare_module, "baselines", lambda *_: dict(arm))
    x, y = data()
    run(dev=(x[200:250], y[200:250]))
    for batches in seen[:2]:
        assert ((batches >= 200).sum(-1) == 8).all()
        assert batches.shape[-1] == 16


def test_the_test_set_is_looked_at_once_an_arm_when_its_students_are_done(monkeypatch):
    log = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func.__name__ not in (
                "is_floating_point",
                "__get__",
                "dim",
                "min",
                "max",
                "__len__",
                "__lt__",
            ):
                log.append("read")
            return super().__torch_function__(func, types, args, kwargs or {})

    real = compare_module._run

    def spy(*arguments):
        log.append("run")
        return real(*arguments)

    monkeypatch.setattr(compare_module, "_run", spy)
    monkeypatch.setattr(compare_module.check, "teach_data", lambda *_: None)  # checks dtypes and ranges
    x, y = data()
    compare(
        {"mine": l2t.Teacher(CLASSES)}, linear, (x[:200], y[:200]), (x[200:].as_subclass(Watched), y[200:]),
        recipe=RECIPE, students=2, grid=(0.1,), tuning_students=1, progress=False,
    )  # fmt: skip
    looks = [stage for stage, _ in itertools.groupby(log)]
    arms = 1 + len(baselines(torch.tensor([1, 1, 1])))
    assert looks == ["run", "read"] * arms  # an arm: two runs, tuning and final, then its look
    assert log.count("run") == 2 * arms


@pytest.mark.parametrize(("rows", "given", "students"), [(150, None, 34), (500, None, 10), (150, 3, 3)])
def test_rates_are_tuned_by_more_students_where_dev_rows_are_few(rows, given, students):
    x, y = data(rows + 50)
    found = compare(
        {"mine": l2t.Teacher(CLASSES)}, linear, (x[:rows], y[:rows]), (x[rows:], y[rows:]),
        recipe=l2t.Recipe(steps=1), arms={}, students=2, grid=(0.1,), tuning_students=given, progress=False,
    )["mine"]  # fmt: skip
    assert f"dev error of {students} other students" in " ".join(found["protocol"])
    wrong = found["tuning"]["taught"]["dev_error"][0] * students * (rows // 5)
    assert wrong == pytest.approx(round(wrong), abs=1e-3)


def test_a_good_loss_wins_and_a_bad_one_loses():
    """Pair-flip noise: the oracle is far ahead, and a taught loss that turns rows around far behind."""
    x, y = data(1500)
    noisy = data(1500, noise=0.45)[1]
    noise = 0.55 * torch.eye(CLASSES) + 0.45 * torch.eye(CLASSES).roll(1, 1)
    bad = l2t.static_teacher(CLASSES, "full", link="identity", off_diagonal_scale=5.0)
    with torch.no_grad():
        bad.off_diagonal.fill_(-3.0)
    found = compare(
        {"bad": bad}, linear, (x[:600], noisy[:600]), (x[900:], y[900:]), (x[600:900], y[600:900]),
        recipe=l2t.Recipe(steps=100, batch_size=32), noise=noise, students=8, grid=(0.05, 0.2),
        tuning_students=3, progress=False,
    )["bad"]  # fmt: skip
    mean = {arm: row["mean"] for arm, row in found["summary"].items()}
    assert mean["forward correction, true noise (oracle)"] < 0.5 * mean["cross-entropy"]
    assert mean["taught"] > mean["forward correction, true noise (oracle)"]
    assert found["p"]["forward correction, true noise (oracle)"] < 1e-3
    assert found["summary"]["forward correction, true noise (oracle)"]["behind"] == 8


def test_a_learning_rate_that_breaks_students_is_not_chosen():
    one = run(
        grid=(0.1, 1e30),
        students=2,
        student=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    assert all(tuned["lr"] == 0.1 for tuned in one["mine"]["tuning"].values())
    assert all(tuned["dev_error"][-1] == 1.0 for tuned in one["mine"]["tuning"].values())
    assert all(math.isfinite(value) for values in one["mine"]["test_loss"].values() for value in values)


@pytest.mark.parametrize(
    ("grid", "added", "chosen", "at_edge"),
    [
        ((0.1, 1.0, 10.0), [], 1.0, False),
        ((0.01, 0.1), [1.0, 10.0], 1.0, False),
        ((0.001, 0.01), [0.1, 1.0], 1.0, True),
        ((10.0, 20.0), [2.5, 5.0], 2.5, True),
        ((0.3, 0.6), [1.2, 2.4], 1.2, False),
        ((0.3,), [], 0.3, False),  # one rate has no ratio
    ],
)
def test_a_grid_goes_on_where_its_best_rate_is_at_an_end(grid, added, chosen, at_edge, monkeypatch):
    def made(arm, student, rows, share, recipe, classes, rates, seed, points):
        """Two students whose dev error is least at a rate of 1, and falls along the run."""
        error = torch.tensor([abs(math.log10(rate)) for rate in rates]).repeat_interleave(2)
        yield None, [error + 1.0 / point for point in points]

    monkeypatch.setattr(compare_module, "_run", made)
    x, y = data()
    rows = compare_module._Rows(x, y, len(y))
    arm = Arm(stateless(cross_entropy))
    tuned, curve = compare_module._tune(arm, linear, rows, RECIPE, CLASSES, grid, 2, 0)
    assert tuned["grid"] == sorted([*grid, *added])
    assert tuned["dev_error"] == pytest.approx([abs(math.log10(rate)) + 0.05 for rate in tuned["grid"]])
    assert (tuned["added"], tuned["lr"], tuned["at_edge"]) == (added, chosen, at_edge)
    assert curve["dev_error"] == pytest.approx([abs(math.log10(chosen)) + 1 / step for step in curve["step"]])


def test_a_learning_curve_ends_in_the_error_of_all_dev_rows(monkeypatch):
    whole = run()["mine"]["curves"]["cross-entropy"]
    monkeypatch.setattr(compare_module, "CURVE_ROWS", 7)
    part = run()["mine"]["curves"]["cross-entropy"]
    assert part["dev_error"][-1] == whole["dev_error"][-1]
    assert part["dev_error"][:-1] != whole["dev_error"][:-1]
    for error in part["dev_error"][:-1]:
        assert error * 14 == pytest.approx(round(error * 14), abs=1e-4)  # two students of seven rows


# ---- statistics


@pytest.mark.parametrize("seed", range(20))
def test_holm_rejects_what_his_procedure_rejects(seed):
    """As he states it: from the least p on, each against alpha / (number left), until one fails."""
    generator = torch.Generator().manual_seed(seed)
    ps = (torch.rand(7, generator=generator).double() ** 4).tolist()
    corrected = holm(ps)
    for alpha in (0.001, 0.01, 0.05, 0.2, 0.7):
        rejected = set()
        for left, index in zip(range(7, 0, -1), sorted(range(7), key=ps.__getitem__), strict=True):
            if ps[index] > alpha / left:
                break
            rejected.add(index)
        assert {index for index in range(7) if corrected[index] <= alpha} == rejected
    assert holm([*ps, None])[-1] is None
    assert min(p for p in holm([*ps, None]) if p is not None) == pytest.approx(8 * min(ps))


def test_the_interval_is_that_of_the_mean_difference_and_fits_the_p():
    generator = torch.Generator().manual_seed(0)
    mine, other = torch.rand(2, 12, generator=generator).double()
    found = paired(mine.tolist(), other.tolist())
    difference = mine - other
    reach = 2.200985160082949 * float(difference.std()) / math.sqrt(12)  # t of 11 degrees at 0.975, a table's
    mean = float(difference.mean())
    assert found.interval == pytest.approx((mean - reach, mean + reach))
    edge = paired((mine - found.interval[1]).tolist(), other.tolist())  # just different from 0
    assert edge.p == pytest.approx(0.05)
    assert paired([0.5, 0.25], [0.25, 0.0]) == (None, (0.25, 0.25))


def test_differences_that_only_rounding_tells_apart_are_one():
    """Errors of float32 that all differ by a tenth: without a spread there is no test, and no win."""
    mine, other = (torch.tensor(errors).tolist() for errors in ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]))
    assert len({one - two for one, two in zip(mine, other, strict=True)}) > 1
    assert paired(mine, other).p is None
    assert paired([0.1, 0.2001], [0.2, 0.3]).p is not None


def test_the_protocol_says_what_was_done():
    x, y = data()
    told = " ".join(run(dev=(x[200:250], y[200:250]), noise=NOISE, dev_is_clean=True)["mine"]["protocol"])
    for words in (
        "the same 3 fresh students",
        "20 steps of 16 rows",
        "momentum 0.9 and a learning rate that falls to 0",
        "0.05, 0.2 with the least mean dev error of 2 other students",
        "The dev set is 50 rows beside 200 training rows",
        "'cross-entropy, dev only' learns from the dev rows alone",
        "'cross-entropy, half dev' learns half of every batch",
        "'forward correction, true noise (oracle)' knows what nobody has",
        "The test set, 100 rows",
        "corrected p below 0.01",
    ):
        assert words in told
    count = len(baselines(torch.tensor([1, 1, 1]), NOISE, dev_is_clean=True))
    assert f"all {count} comparisons of the table: 1 teacher against {count} arms each" in told
    course = l2t.Recipe(steps=20, batch_size=16, weight_decay=0.01, decay="constant")
    told = " ".join(run({"a": l2t.Teacher(3), "b": l2t.Teacher(3)}, recipe=course)["a"]["protocol"])
    assert "weight decay 0.01 and a constant learning rate" in told
    assert "each tuning student holds 20% of the 200 training rows back" in told
    count = len(baselines(torch.tensor([1, 1, 1])))
    assert f"all {2 * count} comparisons of the table: 2 teachers against {count} arms each" in told


def test_the_protocol_tells_whose_final_students_do_not_see_dev_rows():
    x, y = data()
    features = ("progress", "dev_loss")
    teachers, also = {"mine": l2t.Teacher(CLASSES, features=features)}, {"plain": l2t.Teacher(CLASSES)}
    for dev in ((x[200:250], y[200:250]), None):
        told = run(teachers, dev=dev, also=also, arms={})["mine"]["protocol"]
        (sentence,) = (one for one in told if "looks at dev rows while a student learns" in one)
        assert sentence.startswith("'taught by mine' looks")


# ---- arms in files


def count_runs(monkeypatch):
    calls = []
    real = compare_module._run
    monkeypatch.setattr(compare_module, "_run", lambda *a: calls.append(len(a)) or real(*a))
    return calls


def without_seconds(found):
    return {name: {**one, "seconds": None} for name, one in found.items()}


def test_a_comparison_that_is_broken_off_goes_on_where_it_was(tmp_path, monkeypatch):
    options = {"directory": tmp_path / "arms", "grid": (0.2,)}
    expected = run(grid=(0.2,))
    calls = count_runs(monkeypatch)
    real = compare_module._run

    def stop(*arguments):
        if len(calls) == 5:  # two arms are done, the third is tuned
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(compare_module, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    assert len(list((tmp_path / "arms").iterdir())) == 3
    monkeypatch.setattr(compare_module, "_run", real)
    first = run(**options)
    assert len(calls) == 2 * len(first["mine"]["test_error"])
    assert without_seconds(first) == without_seconds(expected)
    assert run(**options) == first  # seconds, too, are those of the making
    assert len(calls) == 2 * len(first["mine"]["test_error"])
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "arms").iterdir()}
    assert names == {slug(arm) for arm in first["mine"]["test_error"]}


def late(step):
    """A loss that stops at a step."""

    def loss(logits, target, state, now):
        return cross_entropy(logits, target) * (now < step)

    return loss


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES))


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({}, 0),
        ({"teachers": {"renamed": l2t.Teacher(CLASSES)}}, 0),
        ({"teachers": {"mine": l2t.Teacher(CLASSES, seed=1)}}, 1),
        ({"student": relu_mlp}, 2),
        ({"seed": 1}, 2),
        ({"students": 4}, 2),
        ({"grid": (0.3,)}, 2),
        ({"tuning_students": 3}, 2),
        ({"recipe": l2t.Recipe(steps=19, batch_size=16)}, 2),
        ({"recipe": l2t.Recipe(steps=20, batch_size=16, updates=3, teacher_lr=1.0)}, 0),
        ({"train": data(299)}, 2),
        ({"arms": {"a": Arm(stateless(label_smoothing(0.1)))}}, 1),
        ({"arms": {"a": Arm(late(15))}}, 1),
    ],
)
def test_an_arm_is_taken_from_its_file_only_where_it_is_the_same(changes, made, tmp_path, monkeypatch):
    options = {
        "teachers": {"mine": l2t.Teacher(CLASSES)},
        "student": tanh_mlp,
        "grid": (0.2,),
        "arms": {"a": Arm(stateless(cross_entropy))},
        "directory": tmp_path,
    }
    run(**options)
    calls = count_runs(monkeypatch)
    found = run(**{**options, **changes})
    assert len(calls) == 2 * made
    fresh = run(**{**options, **changes, "directory": None})
    assert without_seconds(found) == without_seconds(fresh)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (nn.Dropout(0.1), nn.Dropout(0.5)),
        (nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=0.5)),
        (nn.Linear(5, 5), nn.Linear(5, 5).requires_grad_(False)),
    ],
)
def test_an_arm_of_students_that_learn_otherwise_is_made_again(was, now, tmp_path):
    """Students that answer alike before they have learned."""
    x, y = data()

    def comparison(part):
        return Comparison(
            {"mine": l2t.Teacher(CLASSES)}, lambda: nn.Sequential(copy.deepcopy(part), nn.Linear(5, CLASSES)),
            (x[:200], y[:200]), (x[200:], y[200:]), recipe=RECIPE, students=2, grid=(0.2,),
            tuning_students=1, directory=tmp_path,
        )  # fmt: skip

    now.load_state_dict(was.state_dict())
    comparison(was).run("cross-entropy")
    assert "cross-entropy" not in comparison(was).missing()
    assert "cross-entropy" in comparison(now).missing()


@pytest.mark.parametrize(
    ("was", "now", "steps"),
    [
        (lambda state, step: step >= 1, lambda state, step: step >= 10, 200),  # lengths of a warm-up
        (lambda state, step: step < 10_000, lambda state, step: step < 9_990, 10_000),
        (lambda state, step: state.train_loss > 2.1, lambda state, step: state.train_loss > 2.0, 200),
    ],
)
def test_losses_that_differ_at_few_steps_have_files_of_their_own(was, now, steps, tmp_path):
    x, y = data()

    def comparison(on):
        def loss(logits, target, state, step):
            return cross_entropy(logits, target) * on(state, step)

        return Comparison(
            {"mine": l2t.Teacher(CLASSES)}, linear, (x[:200], y[:200]), (x[200:], y[200:]),
            recipe=l2t.Recipe(steps=steps), arms={"own": Arm(loss)}, directory=tmp_path,
        )  # fmt: skip

    files = [comparison(on)._file("own") for on in (was, was, now)]
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    calls = count_runs(monkeypatch)
    with pytest.raises(
        PermissionError, match=r"l2t\.compare: the folder .*/file/arms must be one that can be written"
    ):
        run(directory=tmp_path / "file" / "arms")
    assert not calls


def test_names_of_every_alphabet_are_told_apart_as_files():
    assert slug("taught by größe_1, 教师") == "taught-by-größe-1-教师"
    assert slug("focal loss, gamma 2.5") == "focal-loss-gamma-2.5"


def test_an_arm_whose_file_is_not_whole_is_made_again(tmp_path, monkeypatch):
    options = {"grid": (0.2,), "arms": {"a": Arm(stateless(cross_entropy))}, "directory": tmp_path}
    found = run(**options)
    (file,) = tmp_path.glob("a-*.json")
    whole = file.read_text()
    calls = count_runs(monkeypatch)
    for broken in (whole[: len(whole) // 2], "", "[]"):
        file.write_text(broken)
        assert without_seconds(run(**options)) == without_seconds(found)
    assert len(calls) == 6  # tuning and final students of one arm, each time


def test_arms_can_be_made_one_by_one_and_forgotten(tmp_path):
    x, y = data()
    comparison = Comparison(
        {"mine": l2t.Teacher(CLASSES)}, linear, (x[:200], y[:200]), (x[200:], y[200:]), recipe=RECIPE,
        students=3, grid=(0.05, 0.2), tuning_students=2, directory=tmp_path, about={"task": "rows"},
    )  # fmt: skip
    everything = comparison.missing()
    assert everything == [*baselines(torch.tensor([1, 1, 1])), "taught by mine"]
    said = []
    for name in reversed(everything):
        comparison.run(name, said.append)
    assert said[:2] == ["tuning taught by mine", "final taught by mine"]
    assert not comparison.missing()
    assert without_seconds(comparison.result()) == without_seconds(run())
    assert {json.loads(path.read_text())["of"]["task"] for path in tmp_path.iterdir()} == {"rows"}
    comparison.forget()
    assert comparison.missing() == everything
    assert not list(tmp_path.iterdir())


def test_a_comparison_trains_wherever_it_is_called():
    with torch.no_grad():
        under = without_seconds(run(grid=(0.2,), arms={"a": Arm(stateless(cross_entropy))}))
    assert under == without_seconds(run(grid=(0.2,), arms={"a": Arm(stateless(cross_entropy))}))


# ---- sentences


def test_inference_mode_is_refused():
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"l2t\.compare: the caller must be outside torch.inference_mode"),
    ):
        run()


def test_a_seed_is_any_whole_number():
    options = {"arms": {}, "grid": (0.1,)}
    assert without_seconds(run(seed=np.int64(3), **options)) == without_seconds(run(seed=3, **options))
    for seed in (None, 1.5):
        with pytest.raises(ValueError, match=rf"l2t\.compare: seed must be a whole number, got {seed}"):
            run(seed=seed, **options)


def test_half_a_batch_of_one_row_is_none():
    x, y = data()
    options = {"recipe": l2t.Recipe(steps=3, batch_size=1), "dev": (x[200:], y[200:]), "dev_is_clean": True}
    with pytest.raises(
        ValueError, match=r"recipe.batch_size must be 2 or more .* 'cross-entropy, half dev', got 1"
    ):
        run(**options)
    made = Comparison(
        {"mine": l2t.Teacher(CLASSES)}, linear, (x[:200], y[:200]), (x[200:], y[200:]),
        only=["cross-entropy"], **options,
    )  # fmt: skip
    assert list(made.others) == ["cross-entropy"]


def test_data_that_are_no_tensors_say_so():
    dataset = torch.utils.data.TensorDataset(*data(9))
    with pytest.raises(TypeError, match=r"l2t\.compare: train must be two tensors, .* got TensorDataset"):
        run(train=dataset)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teachers": {}}, "teachers must be one or more, got none. Teach one with l2t.teach"),
        (
            {"students": 1},
            "students must be a whole number of 2 or more, got 1. A spread needs two, a test twenty",
        ),
        ({"students": 2.5}, "students must be a whole number of 2 or more, got 2.5"),
        ({"tuning_students": 0}, "tuning_students must be a whole number of 1 or more, got 0"),
        ({"grid": ()}, "grid must be positive learning rates, got ()"),
        ({"grid": (0.1, -0.1)}, "grid must be positive learning rates, got (0.1, -0.1)"),
        ({"dev_is_clean": True}, "dev must be given where dev_is_clean is True, got None"),
        ({"train": (torch.zeros(4, 5), torch.zeros(4))}, "l2t.compare: train targets must be int64"),
        (
            {"dev": (torch.zeros(4, 3), torch.arange(4) % 3)},
            "l2t.compare: dev inputs must have rows of shape (5,), ",
        ),
        (
            {"teachers": {"a": l2t.Teacher(3), "b": l2t.Teacher(4)}},
            "teachers must be of one number of classes and one dtype, got 'a' with 3 and torch.float32, 'b'",
        ),
        ({"also": {"b": l2t.Teacher(3).double()}}, "with 3 and torch.float64. Compare them one by one"),
        (
            {"also": {"taught": l2t.Teacher(3)}},
            "arms and also must have names that no other arm has, got 'taught'. Take another name",
        ),
        ({"also": {"cross-entropy": l2t.Teacher(3)}}, "names that no other arm has, got 'cross-entropy'"),
        (
            {"arms": {"taught by mine": Arm(stateless(cross_entropy))}},
            "names that no other arm has, got 'taught by mine'",
        ),
        (
            {"arms": {"a": Arm(stateless(cross_entropy), rows="devs")}},
            "the rows of the arm 'a' must be one of all, dev, both, got 'devs'",
        ),
        (
            {"arms": {"a": Arm(stateless(cross_entropy), rows="dev")}},
            "dev must be given where an arm learns from it, as 'a' does, got None. Pass the clean rows",
        ),
        (
            {"noise": torch.ones(3, 3)},
            "noise must be of shape (3, 3) with rows of probabilities that sum to 1, got shape (3, 3).",
        ),
        ({"noise": torch.eye(4)}, "rows of probabilities that sum to 1, got shape (4, 4)"),
        ({"student": linear()}, "a function that returns a fresh torch.nn.Module, got a made Linear. Pass"),
        ({"student": lambda: nn.Linear(5, 9)}, "l2t.compare: student must return logits of shape (2, 3)"),
    ],
)
def test_bad_arguments_say_so(options, sentence, monkeypatch):
    monkeypatch.setattr(compare_module, "_run", None)
    with pytest.raises(ValueError) as caught:
        run(**options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teachers": [l2t.Teacher(3)]}, "teachers must be a dict of teachers by name, got list. Write for"),
        ({"also": {"a": None}}, "also must be a dict of teachers by name, got NoneType"),
        (
            {"arms": {"a": cross_entropy}},
            "arms must be a dict of l2t.baselines.Arm by name, got a function for 'a'. Wrap a loss of logits",
        ),
        ({"arms": ["a"]}, "a dict of l2t.baselines.Arm by name, got a list for 'arms'"),
    ],
)
def test_what_is_no_dict_of_teachers_or_arms_says_so(options, sentence):
    with pytest.raises(TypeError) as caught:
        run(**options)
    assert sentence in str(caught.value)


def test_a_result_needs_all_arms():
    x, y = data()
    comparison = Comparison(
        {"mine": l2t.Teacher(CLASSES)}, linear, (x[:200], y[:200]), (x[200:], y[200:]), recipe=RECIPE,
        students=2, grid=(0.2,), tuning_students=1, only=["cross-entropy"],
    )  # fmt: skip
    comparison.run("cross-entropy")
    with pytest.raises(ValueError, match=r"be made before the result, got none of taught by mine\. Call run"):
        comparison.result()
    with pytest.raises(ValueError, match="the arm must be one of cross-entropy, taught by mine, got 'focal'"):
        comparison.run("focal")


def test_scipy_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)

    def student():
        raise AssertionError("a student was made")

    data = torch.randn(20, 3), torch.randint(2, (20,))
    with pytest.raises(ImportError, match=r"l2t.compare: the package scipy must be installed.*l2t\[tasks\]"):
        compare({"one": l2t.Teacher(2)}, student, data, data, recipe=l2t.Recipe(steps=2))
