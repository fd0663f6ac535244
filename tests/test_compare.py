"""The comparison: pairing, tuning, one look at the test set."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

import l2t
from l2t import compare as compare_module
from l2t.baselines import Arm, baselines, stateless
from l2t.compare import compare
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
            if arm != "taught" and len(set(differences)) > 1:
                expected = stats.ttest_rel(one["test_error"]["taught"], values).pvalue
                assert one["p"][arm] == pytest.approx(expected)
            assert one["curves"][arm]["step"] == list(range(1, 21))
            assert len(one["curves"][arm]["dev_error"]) == 20
            tuned = one["tuning"][arm]
            assert tuned["lr"] == tuned["grid"][tuned["dev_error"].index(min(tuned["dev_error"]))]
            assert tuned["at_edge"]
    assert found["a"]["test_error"]["cross-entropy"] == found["b"]["test_error"]["cross-entropy"]
    json.dumps(found, allow_nan=False)


def test_it_is_seeded_to_the_bit():
    a, b, other = run(seed=1), run(seed=1), run(seed=2)
    for one in (a, b, other):
        one["mine"].pop("seconds")
    assert a == b
    assert a["mine"]["test_error"] != other["mine"]["test_error"]


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


def test_the_test_set_is_looked_at_once_when_all_is_done(monkeypatch):
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
    assert "read" in log
    assert "run" not in log[log.index("read") :]
    assert log.count("run") == 2 * (1 + len(baselines(torch.tensor([1, 1, 1]))))


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
    assert all(tuned["dev_error"][1] == 1.0 for tuned in one["mine"]["tuning"].values())
    assert all(math.isfinite(value) for values in one["mine"]["test_loss"].values() for value in values)


# ---- sentences


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teachers": {}}, "teachers must be one or more, got none. Teach one with l2t.teach"),
        ({"students": 1}, "students must be 2 or more, got 1. A spread needs two, a test twenty"),
        ({"tuning_students": 0}, "tuning_students must be 1 or more, got 0"),
        ({"grid": ()}, "grid must be positive learning rates, got ()"),
        ({"grid": (0.1, -0.1)}, "grid must be positive learning rates, got (0.1, -0.1)"),
        ({"dev_is_clean": True}, "dev must be given where dev_is_clean is True, got None"),
        ({"train": (torch.zeros(4, 5), torch.zeros(4))}, "l2t.compare: train targets must be int64"),
        ({"student": lambda: nn.Linear(5, 9)}, "l2t.compare: student must return logits of shape (2, 3)"),
    ],
)
def test_bad_arguments_say_so(options, sentence, monkeypatch):
    monkeypatch.setattr(compare_module, "_run", None)
    with pytest.raises(ValueError) as caught:
        run(**options)
    assert sentence in str(caught.value)
