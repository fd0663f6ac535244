"""Several starts: which are tried, which is taught, what comes out, and that a run repeats."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys

import pytest
import torch
from torch import nn

import l2t
from l2t.starts import Starts, default_starts, teach_best
from l2t.students import calibrated_error, wrong

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


def test_a_class_without_rows_takes_no_weight_from_the_others():
    """The loss of the rows that there are is as steep as without the class."""
    uneven = default_starts(4, counts=[20, 5, 0, 0]).teachers[-1].class_weights
    assert uneven == pytest.approx([0.05, 0.2, 0.125, 0.125])
    even = default_starts(5, counts=[100, 100, 100, 100, 0]).teachers
    assert [teacher.class_weights for teacher in even] == [None] * 4
    for counts in ([20, 5], [20, 5, 0, 0]):
        teacher = default_starts(len(counts), counts=counts).teachers[-2].neutral()
        scale = teacher(l2t.StudentState(0.0, 1.0, 0.5)).scale
        torch.testing.assert_close(scale[:2], torch.tensor([0.4, 1.6]))


def test_the_best_start_of_each_family_is_taught():
    bad = [1e-3, 1e-3, 1e-3, 1.0]  # all but one class count for nothing
    teachers = [
        l2t.Teacher(4, "full", link="identity", class_weights=bad),
        l2t.Teacher(4, "full", link="identity"),
        l2t.Teacher(4),
    ]
    history = run(Starts(teachers, [])).history
    assert [row["taught"] for row in history["starts"]] == [False, True, True]
    assert [row["teacher"]["weight"] for row in history["choice"]] == ["full", "shared"] * 2
    assert [row["taught"] for row in history["choice"]] == [True, True, False, False]
    errors = [min(row["dev_error"]) for row in history["starts"]]
    assert errors[0] > errors[1] + 0.1
    assert sum(row["chosen"] for row in history["choice"]) == 1


@pytest.fixture
def faked(monkeypatch):
    """Lessons and trials that are noted, not held: what was taught of a kind has the error of the kind."""
    module = sys.modules["l2t.starts"]
    errors = {"full": 0.3, "shared": 0.2, "known": 0.4}
    lessons, judged = [], []

    def teach(teacher, make, train, dev, *, recipe, **settings):
        rows = None if dev is None else sorted(dev[0][:, 0].tolist())
        assert recipe.trial_margin == 0.0  # the start competes later
        lessons.append((teacher.kind, sorted(train[0][:, 0].tolist()), rows, recipe.updates))
        taught = copy.deepcopy(teacher)
        taught.name = teacher.kind
        return l2t.Taught(taught, {"seconds": {"updates": 1.0}, "trial": None}, recipe)

    def trial(candidates, make, train, dev, recipe, rates, seed, score):
        trial.scores.append(score)
        trial.rates.append(list(rates))
        rows = None if dev is None else sorted(dev[0][:, 0].tolist())
        judged.append((sorted(train[0][:, 0].tolist()), rows))
        found = torch.zeros(len(candidates), len(rates), 3, 100)
        for index, one in enumerate(candidates):
            found[index, ..., : round(100 * errors[getattr(one, "name", "known")])] = 1.0
        return found

    trial.scores, trial.rates = [], []
    monkeypatch.setattr(module, "teach", teach)
    monkeypatch.setattr(module, "trial", trial)
    monkeypatch.setattr(module, "check_arguments", lambda *_: None)
    return lessons, judged, errors


def numbered(rows: int):
    return torch.arange(rows, dtype=torch.float32)[:, None], torch.arange(rows) % 4


FAMILIES = [l2t.Teacher(4, "full", link="identity"), l2t.Teacher(4)]


def test_a_given_dev_set_chooses_by_rows_that_were_not_taught_on(faked):
    """Each family is taught on either half with half of the updates, and judged on the other."""
    lessons, judged, _ = faked
    train, dev = numbered(20), numbered(9)
    recipe = dataclasses.replace(RECIPE, updates=7)
    taught = teach_best(Starts(FAMILIES, []), student, train, dev, recipe=recipe, progress=False)
    every, everything = train[0][:, 0].tolist(), dev[0][:, 0].tolist()
    second, first = judged[1][1], judged[2][1]
    assert judged == [(every, everything), (every, second), (every, first)]
    assert sorted(first + second) == everything
    assert sys.modules["l2t.starts"].trial.scores == [wrong, calibrated_error, calibrated_error]
    assert len(first) == 5
    assert lessons == [
        *((kind, every, half, 3) for half in (first, second) for kind in ("full", "shared")),
        ("shared", every, everything, 7),
    ]
    assert taught.teacher.kind == "shared"
    assert [row["chosen"] for row in taught.history["choice"]] == [False, True, False, False]
    assert taught.history["seconds"]["updates"] == 5.0


def test_without_a_dev_set_rows_are_set_aside_to_choose_by(faked):
    """Three tenths, and other ones again until a thousand have judged, three times at most."""
    lessons, judged, _ = faked
    train = numbered(20)
    taught = teach_best(Starts(FAMILIES, []), student, train, recipe=RECIPE, progress=False)
    every = train[0][:, 0].tolist()
    assert judged[0] == (every, None)
    assert len(judged) == 4
    assert all(sorted(rest + rows) == every and len(rows) == 6 for rest, rows in judged[1:])
    assert len({row for _, rows in judged[1:] for row in rows}) == 18
    assert lessons == [
        *((kind, rest, None, 1) for rest, _ in judged[1:] for kind in ("full", "shared")),
        ("shared", every, None, 2),
    ]
    assert taught.teacher.kind == "shared"
    for rows, folds in ((3334, 1), (3330, 2), (1666, 2), (1664, 3)):
        judged.clear()
        teach_best(Starts(FAMILIES[1:], []), student, numbered(rows), recipe=RECIPE, progress=False)
        assert [len(part) for _, part in judged[1:]] == [round(0.3 * rows)] * folds


def test_the_least_error_wins_and_a_known_loss_where_none_is_less(faked):
    lessons, _, errors = faked
    errors["shared"] = 0.39
    taught = teach_best(Starts(FAMILIES[1:], []), student, numbered(20), recipe=RECIPE, progress=False)
    assert [row["chosen"] for row in taught.history["choice"]] == [True, False]
    errors["shared"], errors["known"] = 0.4, 0.4
    taught = teach_best(Starts(FAMILIES[1:], []), student, numbered(20), recipe=RECIPE, progress=False)
    assert [row["chosen"] for row in taught.history["choice"]] == [False, True]
    assert taught.history["choice"][1]["teacher"] == FAMILIES[1].config()
    assert not hasattr(taught.teacher, "name")  # the start
    lessons.clear()
    settings = {"recipe": RECIPE, "progress": False, "guard": False}
    taught = teach_best(Starts(FAMILIES[1:], []), student, numbered(20), **settings)
    assert [row["chosen"] for row in taught.history["choice"]] == [True]  # without a guard no start competes
    assert len(lessons) == 4


def test_what_competes_is_tried_at_rates_between_those_of_the_starts(faked):
    for lr, coarse, fine in ((0.2, [0.1], [0.1, 0.2]), (None, [0.4, 0.1], [0.4, 0.2, 0.1])):
        rates = sys.modules["l2t.starts"].trial.rates = []
        recipe = dataclasses.replace(RECIPE, lr=lr, probe_lrs=(0.4, 0.2, 0.1))
        taught = teach_best(Starts(FAMILIES, []), student, numbered(20), recipe=recipe, progress=False)
        assert rates == [coarse, *[fine] * 3]
        assert taught.history["rates"] == {"starts": coarse, "choice": fine}
        assert [len(row["dev_error"]) for row in taught.history["starts"]] == [len(coarse)] * 2
        assert [len(row["expected_error"]) for row in taught.history["choice"]] == [len(fine)] * 4


def test_folds_count_alike_at_the_rate_that_is_best_over_all(monkeypatch, faked):
    """By hand: at the first rate taught and known have 0.3 and 0.4, at the second 0.35 and 0.2."""
    module = sys.modules["l2t.starts"]
    folds = iter(
        [[[0.5], [0.5]], [[0.1, 0.6], [0.5, 0.0]], [[0.5, 0.1], [0.3, 0.4]], [[0.3, 0.35], [0.4, 0.2]]]
    )

    def trial(candidates, *_):
        errors = torch.tensor(next(folds))
        return (torch.arange(100) < (100 * errors[..., None, None]).round()).float()[: len(candidates)]

    monkeypatch.setattr(module, "trial", trial)
    taught = teach_best(Starts(FAMILIES[1:], []), student, numbered(20), recipe=RECIPE, progress=False)
    found = [row["expected_error"] for row in taught.history["choice"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[0.3, 0.35], [0.4, 0.2]]))
    assert [row["chosen"] for row in taught.history["choice"]] == [False, True]


def test_the_clock_counts_every_family_and_trial():
    seconds = run(Starts(FAMILIES, [])).history["seconds"]
    folds = [f"fold-{fold}" for fold in range(3)]
    assert set(seconds) == {"starts", "probe", "updates", "trial", *folds}
    assert all(seconds[part] > 0 for part in ("starts", "updates", "trial", *folds))
    assert seconds["probe"] == 0  # the rate is given


def test_what_does_not_fit_is_refused_before_any_student(monkeypatch):
    monkeypatch.setattr(sys.modules["l2t.starts"], "trial", None)
    flipped = dataclasses.replace(RECIPE, augment="flip")
    with pytest.raises(ValueError, match="augment"):
        teach_best(default_starts(4), student, data(), recipe=flipped, progress=False)


@pytest.mark.parametrize(("train", "dev", "sentence"), [
    (2, None, "train must have 3 or more rows, some to teach by and some to choose by, got 2"),
    (20, 3, "dev must have 4 or more rows, some to teach by and some to choose by, got 3"),
])  # fmt: skip
def test_too_few_rows_to_cut_are_refused_before_any_student(monkeypatch, train, dev, sentence):
    monkeypatch.setattr(sys.modules["l2t.starts"], "trial", None)
    x, y = data()
    given = None if dev is None else (x[:dev], y[:dev])
    with pytest.raises(ValueError, match=f"l2t.teach_best: {sentence}"):
        teach_best(default_starts(4), student, (x[:train], y[:train]), given, recipe=RECIPE, progress=False)


def test_a_known_loss_that_is_ahead_is_the_result():
    bad = l2t.Teacher(4, "full", link="identity", class_weights=[1e-3, 1e-3, 1e-3, 1.0], emphasis=0.0)
    known = l2t.Teacher(4, "full", link="identity", smoothing=0.1)
    taught = run(Starts([bad], [known]))
    assert taught.history["choice"][2]["chosen"]
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


def test_trials_that_are_not_whole_are_named(tmp_path):
    (tmp_path / "families").mkdir()
    file = tmp_path / "families" / "trials.json"
    file.write_text('{"judged": {"starts": [')
    with pytest.raises(
        ValueError, match=re.escape(f"l2t: {file} must be JSON as this library writes it, got")
    ):
        run(Starts([l2t.Teacher(4)], []), directory=tmp_path, resume=True)


def test_the_result_takes_the_place_of_a_teacher_that_was_there(tmp_path):
    l2t.Teacher(3, "per-class").save(tmp_path)
    starts = Starts([l2t.Teacher(4, "full", link="identity")], [])
    taught = run(starts, directory=tmp_path)
    assert l2t.Teacher.load(tmp_path).config() == taught.teacher.config()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"teacher.safetensors", "teacher.json", "history.json"} == set(before)
    run(starts, directory=tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_runs_of_one_teacher_and_of_several_do_not_mix(tmp_path):
    several, one = Starts([l2t.Teacher(4)], []), tmp_path / "one"
    settings = {"recipe": RECIPE, "progress": False}
    l2t.teach(l2t.Teacher(4), student, data(), directory=one, **settings)
    run(several, directory=tmp_path / "several")
    for resume, sentence in ((False, "directory must hold no run"), (True, "got different (starts|teacher)")):
        with pytest.raises(ValueError, match=sentence):
            run(several, directory=one, resume=resume)
        with pytest.raises(ValueError, match=sentence):
            l2t.teach(
                l2t.Teacher(4), student, data(), directory=tmp_path / "several", resume=resume, **settings
            )


@pytest.mark.parametrize(("what", "changes"), [
    ("student", {"student": lambda: nn.Sequential(nn.Linear(6, 4))}),
    ("data and start weights", {"train": data(150)}),
    ("data and start weights", {"dev": data(30)}),
    ("data and start weights", {"starts": Starts([l2t.Teacher(4, seed=1)], [])}),
    ("starts", {"starts": Starts([l2t.Teacher(4, emphasis=0.5)], [])}),
    ("guard", {"guard": False}),
    ("seed", {"seed": 1}),
    ("recipe.steps", {"recipe": dataclasses.replace(RECIPE, steps=13)}),
])  # fmt: skip
def test_a_run_of_other_arguments_is_not_gone_on_with(monkeypatch, tmp_path, what, changes):
    """Whether it was broken off after its first trial or later."""
    settings = {"starts": Starts([l2t.Teacher(4)], []), "student": student, "train": data(), "dev": None}
    settings |= {"recipe": RECIPE, "progress": False, "directory": tmp_path}
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["l2t.starts"], "_folds", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            teach_best(**settings)
    monkeypatch.setattr(sys.modules["l2t.starts"], "trial", None)
    with pytest.raises(ValueError, match=f"started with the same arguments, got different {what}"):
        teach_best(**{**settings, **changes}, resume=True)


def test_the_rows_held_back_are_not_taught_with():
    held = dataclasses.replace(RECIPE, hold_back=0.5)
    x, y = data(80)
    found = [
        teach_best(
            Starts(FAMILIES[1:], []), student, data(), (x, labels), recipe=held, progress=False, seed=3
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
