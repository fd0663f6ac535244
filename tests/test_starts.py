"""Several starts: which are tried, which is taught, what comes out, and that a run repeats."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

import l2t
from l2t.starts import Starts, default_starts, teach_best

RECIPE = l2t.Recipe(
    steps=12, batch_size=16, updates=2, lr=0.2, students=2, trial_students=3, trial_rates=(0.5, 1.0), warmup=0
)


def data(rows: int = 160, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x @ torch.randn(6, classes, generator=generator)).argmax(1)


def student():
    return nn.Linear(6, 4)


def run(starts, **settings):
    return teach_best(starts, student, data(), recipe=RECIPE, progress=False, **settings)


def test_the_defaults_follow_what_is_known_of_the_labels():
    plain = default_starts(10)
    assert not plain.known
    assert {(teacher.kind, teacher.link) for teacher in plain.teachers} == {("full", "identity")}
    noisy = default_starts(10, noisy=True, slots=1)
    assert ("shared", "sigmoid") in {(teacher.kind, teacher.link) for teacher in noisy.teachers}
    assert [(one.diagonal_start, one.bias_start) for one in noisy.known] == [(0.7, -5.0)]
    assert {teacher.slots for teacher in [*noisy.teachers, *noisy.known]} == {1}
    even, tail = default_starts(2, counts=[20, 10]).teachers, default_starts(2, counts=[20, 5]).teachers
    assert [teacher.class_weights for teacher in even] == [None] * 4
    assert [0.05, 0.2] in [teacher.class_weights for teacher in tail]
    assert {teacher.kind for teacher in default_starts(100).teachers} == {"low-rank"}


def test_the_best_start_of_each_family_is_taught():
    bad = [1e-3, 1e-3, 1e-3, 1.0]  # all but one class count for nothing
    teachers = [
        l2t.Teacher(4, "full", link="identity", class_weights=bad),
        l2t.Teacher(4, "full", link="identity"),
        l2t.Teacher(4),
    ]
    history = run(Starts(teachers, [])).history
    assert [row["taught"] for row in history["starts"]] == [False, True, True]
    assert [row["teacher"]["weight"] for row in history["choice"]] == ["full", "shared"]
    errors = [min(row["dev_error"]) for row in history["starts"]]
    assert errors[0] > errors[1] + 0.1
    assert sum(row["chosen"] for row in history["choice"]) == 1
    least = min(history["choice"], key=lambda row: min(row["dev_error"]))
    assert least["chosen"]


def test_a_given_dev_set_chooses_by_rows_that_were_not_taught_on(monkeypatch):
    """Each family is taught on either half with half of the updates, and judged on the other."""
    module = sys.modules["l2t.starts"]
    lessons, judged = [], []

    def teach(teacher, make, train, dev, *, recipe, **settings):
        lessons.append((teacher.kind, sorted(dev[1].tolist()), recipe.updates))
        taught = l2t.Taught(teacher, {"seconds": {"updates": 1.0}, "trial": None}, recipe)
        return taught

    def trial(candidates, make, train, dev, recipe, rates, seed):
        judged.append(sorted(dev[1].tolist()))
        errors = {"full": 0.3, "shared": 0.2}
        return torch.stack([torch.full((len(rates), 3, 5), errors[one.kind]) for one in candidates])

    monkeypatch.setattr(module, "teach", teach)
    monkeypatch.setattr(module, "trial", trial)
    monkeypatch.setattr(module, "check_arguments", lambda *_: None)
    dev = data()[0][:9], torch.arange(9)
    recipe = dataclasses.replace(RECIPE, updates=7)
    teachers = [l2t.Teacher(4, "full", link="identity"), l2t.Teacher(4)]
    taught = teach_best(Starts(teachers, []), student, data(), dev, recipe=recipe, progress=False)
    everything, first, second = list(range(9)), judged[2], judged[1]
    assert judged == [everything, second, first]
    assert sorted(first + second) == everything
    assert len(first) == 5
    assert lessons == [
        ("full", first, 3), ("shared", first, 3), ("full", second, 3), ("shared", second, 3),
        ("shared", everything, 7),
    ]  # fmt: skip
    assert taught.teacher.kind == "shared"
    assert [row["chosen"] for row in taught.history["choice"]] == [False, True]
    assert taught.history["seconds"]["updates"] == 5.0
    lessons.clear()
    teach_best(Starts(teachers[1:], []), student, data(), dev, recipe=recipe, progress=False)
    assert lessons == [("shared", everything, 7)]  # nothing to choose from


def test_the_clock_counts_every_family_and_trial():
    families = [l2t.Teacher(4, "full", link="identity"), l2t.Teacher(4)]
    seconds = run(Starts(families, [])).history["seconds"]
    assert set(seconds) == {"starts", "probe", "updates", "trial", "choice"}
    assert all(seconds[part] > 0 for part in ("starts", "updates", "trial", "choice"))
    assert seconds["probe"] == 0  # the rate is given


def test_what_does_not_fit_is_refused_before_any_student(monkeypatch):
    monkeypatch.setattr(sys.modules["l2t.starts"], "trial", None)
    flipped = dataclasses.replace(RECIPE, augment="flip")
    with pytest.raises(ValueError, match="augment"):
        teach_best(default_starts(4), student, data(), recipe=flipped, progress=False)


def test_a_known_loss_that_is_ahead_is_the_result():
    bad = l2t.Teacher(4, "full", link="identity", class_weights=[1e-3, 1e-3, 1e-3, 1.0], emphasis=0.0)
    known = l2t.Teacher(4, "full", link="identity", smoothing=0.1)
    taught = run(Starts([bad], [known]))
    assert taught.history["choice"][1]["chosen"]
    state = l2t.StudentState(0.5, 1.0, 0.5)
    for found, wanted in zip(taught.teacher(state), known.neutral()(state), strict=True):
        torch.testing.assert_close(
            found[0] if isinstance(found, tuple) else found,
            wanted[0] if isinstance(wanted, tuple) else wanted,
        )


def test_it_repeats_and_goes_on_from_its_files(tmp_path):
    starts = default_starts(4, noisy=True)
    first = run(starts, directory=tmp_path / "a")
    (tmp_path / "a" / "teacher.safetensors").unlink()
    again = run(starts, directory=tmp_path / "a", resume=True)
    other = run(starts)
    for name, value in first.teacher.state_dict().items():
        assert torch.equal(again.teacher.state_dict()[name], value)
        assert torch.equal(other.teacher.state_dict()[name], value)
    loaded = l2t.Teacher.load(tmp_path / "a")
    assert loaded.config() == first.teacher.config()
    with pytest.raises(ValueError, match="resume"):
        run(starts, directory=tmp_path / "a")


def test_the_rows_held_back_are_not_taught_with():
    held = dataclasses.replace(RECIPE, hold_back=0.5)
    x, y = data(80)
    found = [
        teach_best(
            default_starts(4), student, data(), (x, labels), recipe=held, progress=False, seed=3
        ).history["updates"][0]["measure"]
        for labels in (y, held_back_swapped(y, held, 3))
    ]
    assert found[0] == found[1]


def held_back_swapped(y, recipe, seed):
    """The labels with those of the rows that are held back changed."""
    from l2t.teach import split_dev

    rows = torch.arange(len(y)).float()
    _, (held, _) = split_dev((rows, y), recipe, seed)
    swapped = y.clone()
    swapped[held.long()] = (y[held.long()] + 1) % 4
    return swapped


@pytest.mark.parametrize("starts", [l2t.Teacher(4), [l2t.Teacher(4)]])
def test_starts_of_another_kind_are_refused(starts):
    with pytest.raises(ValueError, match=r"l2t\.teach_best: starts must be an l2t\.Starts, got"):
        run(starts)


@pytest.mark.parametrize(
    "starts", [Starts([], []), Starts([l2t.Teacher(4)], [l2t.Teacher(3)]), Starts([], [l2t.Teacher(4)])]
)
def test_starts_that_make_no_sense_are_refused(starts):
    with pytest.raises(ValueError, match=r"l2t\.teach_best: starts must have a teacher to teach"):
        run(starts)
