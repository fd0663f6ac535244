"""Several starts: which are tried, which is taught, what comes out, and that a run repeats."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

import l2t
from l2t.starts import Starts, _simplest, _tried, default_starts, teach_best

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
    (chosen,) = (row for row in history["choice"] if row["chosen"])
    assert chosen["behind"][0] <= chosen["behind"][1]


def wrong(*shares: float, students: int = 8, rows: int = 100, own: bool = False) -> torch.Tensor:
    """Candidates of these errors at two rates, the first of which is worse: wrong on the first rows, all
    students alike; or, with ``own``, on as many rows of their own.
    """
    found = torch.zeros(len(shares), 2, students, rows)
    for candidate, share in enumerate(shares):
        found[candidate, 0] = 1.0
        for student in range(students):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(student if own else 0))
            found[candidate, 1, student, order[: round(share * rows)]] = 1.0
    return found


def test_of_those_near_the_best_the_simplest_is_chosen():
    # The second is 0.04 behind: on 100 rows with a standard deviation of 0.197 that is 2 standard errors.
    shares = (0.20, 0.24, 0.21)
    tried = _tried(wrong(*shares), same_rows=True)
    deviation = (0.04 * 0.96 * 100 / 99) ** 0.5
    assert tried.errors[1] == pytest.approx([1.0, 0.24])
    assert [mean for mean, _ in tried.behind] == pytest.approx([0.0, 0.04, 0.01], abs=1e-6)
    assert tried.behind[1][1] == pytest.approx(deviation / 10, rel=1e-4)
    assert tried.behind[2][1] == pytest.approx((0.01 * 0.99 * 100 / 99) ** 0.5 / 10, rel=1e-4)
    assert _simplest(tried, [100, 0, 5]) == 2  # one standard error behind; the known loss is two
    assert _simplest(tried, [5, 0, 100]) == 0
    assert _simplest(tried, [0, 0, 0]) == 0
    assert _simplest(_tried(wrong(0.20, 0.21, 0.22), same_rows=False), [100, 0, 0]) == 0  # all students agree


def test_rows_of_their_own_are_in_what_students_differ_in():
    seen = wrong(0.2, 0.2, own=True)
    seen[1, 1, :4, :] = 0.0  # half of the students make no error, the others 0.2
    (_, error), (mean, _) = _tried(seen, same_rows=False).behind
    assert mean == 0.0
    assert error == pytest.approx(torch.tensor([0.2] * 4 + [0.0] * 4).std().item() / 8**0.5)


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
