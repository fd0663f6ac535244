"""Teaching: what an episode says, the teacher's step, the guard, the probe, checkpoints, sentences."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2t
from l2t import students
from l2t.compare import Comparison
from l2t.students import calibrated_error, seed_of
from l2t.teach import MEASURES, Episode, Guard, episode, standard_error, threads

CLASSES = 4
SMALL = l2t.Recipe(
    steps=12, batch_size=16, lr=0.1, students=3, updates=6, teacher_lr=0.05, guard_window=2, trial_students=3
)


def data(count: int = 240, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, generator=generator)
    y = (x @ torch.randn(6, CLASSES, generator=generator)).argmax(1)
    flip = torch.rand(count, generator=generator) < noise
    return x, torch.where(flip, (y + 1) % CLASSES, y)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def run(teacher=None, dev=None, *, recipe=SMALL, **options):
    options = {"progress": False, "student": mlp, **options}
    student = options.pop("student")
    return l2t.teach(teacher or l2t.Teacher(CLASSES), student, data(), dev, recipe=recipe, **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def told(taught: l2t.Taught) -> tuple:
    """All that a run has come to, to the bit: the teacher, and the history less what the clock says."""
    rows = [{**row, "students_per_second": None} for row in taught.history["updates"]]
    history = {**taught.history, "updates": rows, "seconds": None}
    return [p.tolist() for p in taught.teacher.parameters()], history


# ---- measures


def test_measures_against_their_definitions():
    logits = torch.randn(2, 9, CLASSES, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, 9))
    for i in range(2):
        p = logits[i].softmax(-1)
        own = p[range(9), target[i]]
        for name, expected in {
            "cross-entropy": F.cross_entropy(logits[i], target[i]),
            "calibrated-cross-entropy": min(
                F.cross_entropy(math.exp(x / 1000) * logits[i], target[i]) for x in range(-4000, 4001)
            ),
            "expected-error": (1 - own).mean(),
            "smooth-error": (2 / (1 + torch.exp(-7 * (p.max(-1).values - own))) - 1).mean(),
        }.items():
            torch.testing.assert_close(MEASURES[name](logits, target, 7.0)[i], expected, rtol=1e-6, atol=1e-6)


def test_the_smooth_error_tends_to_the_error():
    logits, target = torch.randn(1, 50, CLASSES), torch.randint(CLASSES, (1, 50))
    wrong = (logits.argmax(-1) != target).float().mean(-1)
    torch.testing.assert_close(MEASURES["smooth-error"](logits, target, 1e6), wrong)


@pytest.mark.parametrize("measure", list(MEASURES))
def test_every_measure_teaches(measure):
    recipe = dataclasses.replace(SMALL, measure=measure, sharpness=5.0, updates=2)
    taught = run(l2t.Teacher(CLASSES, "full", link="identity"), recipe=recipe, guard=False)
    assert not same_weights(taught.teacher, l2t.Teacher(CLASSES, "full", link="identity"))


# ---- an episode


def test_agreement_and_norms():
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 0.0], [torch.nan, 0.0]])
    measure = torch.tensor([1.0, 1.0, 1.0, 1.0])
    seen = Episode(measure, measure, gradient, [], {})
    assert seen.norms == [3.0, 4.0, 5.0, math.inf]
    assert seen.agreement == pytest.approx(1 / 3)
    assert math.isnan(seen._replace(gradient=gradient[:1], measure=measure[:1]).agreement)
    assert seen._replace(measure=torch.tensor([torch.nan, 1.0, 1.0, 1.0])).norms[0] == math.inf


def test_an_episode_is_seeded_to_the_bit():
    def once(seed, make=mlp):
        torch.rand(7)  # moves the global generator
        return episode(l2t.Teacher(CLASSES), make, data(), None, SMALL, 0.1, seed, 3)

    def with_dropout():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES))

    for make in (mlp, with_dropout):
        a, b, other = once(1, make), once(1, make), once(2, make)
        assert torch.equal(a.gradient, b.gradient)
        assert torch.equal(a.measure, b.measure)
        assert not torch.equal(a.gradient, other.gradient)
    assert len(set(a.measure.tolist())) == 3


@pytest.mark.parametrize("kind", ["full", "low-rank"])
def test_every_curvature_gives_the_same_gradient(kind):
    teacher = l2t.Teacher(CLASSES, kind)
    a, b = (
        episode(teacher, mlp, data(), None, dataclasses.replace(SMALL, curvature=curvature), 0.1, 3, 2)
        for curvature in ("reverse", "recompute")
    )
    assert torch.equal(a.gradient, b.gradient)
    assert a.states == b.states


def test_an_episode_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    episode(l2t.Teacher(CLASSES), mlp, data(), None, SMALL, 0.1, 0, 2)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_dev_set_every_student_has_a_split_of_its_own(monkeypatch):
    seen = []
    module = __import__("sys").modules["l2t.teach"]
    split = module.split_pools

    def spy(*arguments):
        seen.append(split(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "split_pools", spy)
    run(recipe=dataclasses.replace(SMALL, updates=2), guard=False)
    assert len(seen) == 2  # one an episode
    rows = [tuple(row.tolist()) for pools in seen for row in pools.dev]
    assert len(set(rows)) == 6
    assert all(len(row) == 48 for row in rows)


# ---- a step of the teacher


def faked(monkeypatch, gradients, measures=None):
    """Episodes with the given gradients of the students, one list an update; the courses are skipped."""
    module = __import__("sys").modules["l2t.teach"]
    count = iter(range(10**6))
    size = sum(p.numel() for p in l2t.Teacher(CLASSES).parameters())

    def fake(*_):
        update = next(count)
        rows = torch.stack(
            [torch.as_tensor(row, dtype=torch.float32).expand(size) for row in gradients[update]]
        )
        measure = torch.tensor([1.0] * len(rows) if measures is None else measures[update])
        return Episode(measure, measure / 2, rows / math.sqrt(size), [1.0], {"progress": [0.0]})

    monkeypatch.setattr(module, "episode", fake)
    return l2t.Teacher(CLASSES)


@pytest.mark.parametrize(("averaging", "expected"), [
    ("mean", 0.4), ("median", 0.9), ("direction", 1 / 3),
])  # fmt: skip
def test_how_students_are_brought_together(monkeypatch, averaging, expected):
    steps = []

    def note(self):
        steps.append(self.param_groups[0]["params"][0].grad.flatten()[0].item())

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    recipe = dataclasses.replace(SMALL, updates=1, clip=1e9, skip=1e9, averaging=averaging)
    start = faked(monkeypatch, [[1.0, 0.9, -0.7]])
    run(start, recipe=recipe, guard=False)
    size = sum(p.numel() for p in start.parameters())
    assert steps == [pytest.approx(expected / math.sqrt(size))]


def test_the_clock_counts_every_part():
    began = time.perf_counter()
    seconds = run(recipe=dataclasses.replace(SMALL, lr=None)).history["seconds"]
    assert set(seconds) == {"probe", "updates", "trial"}
    assert all(part > 0 for part in seconds.values())
    assert sum(seconds.values()) < time.perf_counter() - began


def test_an_anchor_pulls_back_to_the_start(monkeypatch):
    """Steps of one each: of the way that the first went, the second takes its share back."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data += 1.0

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    start = faked(monkeypatch, [[1.0, 1.0]] * 2)
    recipe = dataclasses.replace(SMALL, updates=2, warmup=0, cooldown=0.0, average=0.0, anchor=4.0)
    taught = run(start, recipe=recipe, guard=False)
    for before, after in zip(start.parameters(), taught.teacher.parameters(), strict=True):
        assert torch.allclose(after - before, torch.tensor(2.0 - recipe.teacher_lr * 4.0), atol=1e-6)


def test_a_perturbed_measure_is_that_of_moved_students():
    """Its gradient is that of its own differences, the length of the move included."""
    rows = [x.double() if x.is_floating_point() else x for x in (*data(), *data(60))]
    recipe = dataclasses.replace(SMALL, steps=3, perturb=0.2)
    teacher = l2t.Teacher(CLASSES, diagonal_start=0.7).double()
    generator = torch.Generator().manual_seed(0)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in teacher.parameters()]

    def at(share, recipe=recipe):
        moved = copy.deepcopy(teacher)
        with torch.no_grad():
            for parameter, step in zip(moved.parameters(), way, strict=True):
                parameter += share * step
        return episode(moved, lambda: mlp().double(), tuple(rows[:2]), tuple(rows[2:]), recipe, 0.1, 3, 2)

    seen, plain = at(0.0), at(0.0, dataclasses.replace(recipe, perturb=0.0))
    assert not torch.allclose(seen.measure, plain.measure)
    exact = seen.gradient @ torch.cat([step.flatten() for step in way])
    assert torch.allclose((at(1e-5).measure - at(-1e-5).measure) / 2e-5, exact, rtol=1e-4, atol=1e-9)
    assert exact.abs().max() > 1e-6


def test_clipping_by_the_running_median(monkeypatch):
    steps = []

    def note(self):
        steps.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    recipe = dataclasses.replace(SMALL, updates=2, clip=2.0, skip=1e9)
    start = faked(monkeypatch, [[1.0, 1.0, 1.0], [1.0, 30.0, -0.5]])
    taught = run(start, recipe=recipe, guard=False)
    norms = [float(step.norm()) for step in steps]
    assert norms[0] == pytest.approx(1.0)
    assert norms[1] == pytest.approx((1.0 + 2.0 - 0.5) / 3)  # 30 is clipped to twice the median, 1
    assert [row["clipped"] for row in taught.history["updates"]] == [0, 1]
    assert taught.history["updates"][1]["norm"] == pytest.approx(1.0)
    assert taught.history["updates"][1]["agreement"] == pytest.approx(-1 / 3)


def test_wild_students_are_skipped_and_counted_aloud(monkeypatch, capsys):
    recipe = dataclasses.replace(SMALL, updates=3, skip=50.0)
    start = faked(monkeypatch, [[1.0, 1.0, 1.0], [torch.nan, 1.0, 60.0], [torch.inf, torch.inf, torch.nan]])
    taught = run(start, recipe=recipe, guard=False)
    assert [row["skipped"] for row in taught.history["updates"]] == [0, 2, 3]
    assert taught.history["updates"][2]["norm"] is None
    assert all(p.isfinite().all() for p in taught.teacher.parameters())
    said = capsys.readouterr().err
    assert "skipped 2 of 3 students whose teacher gradient was not finite or far above the usual norm" in said
    assert "(5 so far)" in said
    json.dumps(taught.history, allow_nan=False)


def test_warm_up_and_cool_down():
    recipe = dataclasses.replace(SMALL, updates=10, warmup=4, cooldown=0.5, teacher_lr=1.0, steps=2)
    rates = [row["teacher_lr"] for row in run(recipe=recipe, guard=False).history["updates"]]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_the_result_is_the_average_of_the_last_teachers(monkeypatch):
    recipe = dataclasses.replace(SMALL, updates=4, average=0.5)
    seen = []
    adam = torch.optim.Adam.step

    def spy(self):
        adam(self)
        seen.append([p.detach().clone() for g in self.param_groups for p in g["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    taught = run(recipe=recipe, guard=False)
    for i, parameter in enumerate(taught.teacher.parameters()):
        torch.testing.assert_close(parameter.detach(), (seen[2][i] + seen[3][i]) / 2)


@pytest.mark.parametrize("average", [0.25, 0.0])
@pytest.mark.parametrize("guarded", [True, False])
def test_short_teachings_try_what_was_taught(average, guarded, monkeypatch):
    """Of two updates with no average the last teacher; of a quarter of two updates none is averaged."""
    module = __import__("sys").modules["l2t.teach"]
    last, tried = [], []
    adam, trial = torch.optim.Adam.step, module.trial

    def spy(self):
        adam(self)
        last[:] = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(module, "trial", lambda teachers, *a: tried.extend(teachers) or trial(teachers, *a))
    taught = run(recipe=dataclasses.replace(SMALL, updates=2, average=average), guard=guarded)
    first = tried[0] if guarded else taught.teacher
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), last, strict=True))
    if guarded:
        assert list(taught.history["trial"]["expected_error"]) == ["average", "neutral"]


def test_what_the_guard_has_taken_back_is_not_tried(monkeypatch):
    start = faked(monkeypatch, [[math.nan] * 3] * 9)
    taught = run(start, recipe=dataclasses.replace(SMALL, updates=2))  # not ended: two returns of five
    assert list(taught.history["trial"]["expected_error"]) == ["neutral"]


def test_students_with_nothing_to_say_are_no_measure_of_others(monkeypatch):
    start = faked(monkeypatch, [[0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0] * 3, [2.0, 0.0, 200.0]])
    recipe = dataclasses.replace(SMALL, updates=4, clip=2.0, skip=50.0, guard_norm=1.5)
    rows = run(start, recipe=recipe, guard=False).history["updates"]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1]  # the usual norm is that of 1 and 3
    assert [row["clipped"] for row in rows] == [0, 0, 0, 0]
    watch = guard(guard_norm=10.0)
    assert feed(watch, [(1.0, 0.0), (1.0, 0.0), (1.0, 2.0), (1.0, 0.0), (1.0, 3.0)]) == [None] * 5
    assert watch.memory["least_norm"] == 2.0
    assert "norm is 30, which has been 2" in feed(watch, [(1.0, 25.0), (1.0, 30.0)])[1]


def test_the_smooth_error_teaches_by_the_students_that_it_tells_apart():
    """Most have an exact zero for a gradient: saturated, or right on all dev rows."""
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    recipe = l2t.Recipe(
        steps=20,
        updates=6,
        lr=0.1,
        measure="smooth-error",
        dev_rows=10,
        trial_students=2,
        trial_rates=(1.0,),
    )
    taught = l2t.teach(
        l2t.Teacher(2, "full", link="identity"), lambda: nn.Linear(4, 2), (x, (x[:, 0] > 0).long()),
        progress=False, recipe=recipe,
    )  # fmt: skip
    rows = taught.history["updates"]
    silent = sum(norm == 0 for row in rows for norm in row["norms"])
    assert silent > 0
    assert sum(row["skipped"] for row in rows) < len(rows) * recipe.students - silent


def test_states_are_the_mean_over_finite_students(monkeypatch):
    """Of three students the second diverges."""
    module = __import__("sys").modules["l2t.teach"]
    real = module.taught_loss

    def diverging(*arguments, **options):
        loss = real(*arguments, **options)
        call = type(loss).__call__
        factor = torch.tensor([1.0, math.inf, 1.0])
        monkeypatch.setattr(type(loss), "__call__", lambda *a: call(*a) * factor)
        return loss

    x, y = data()
    plain = episode(l2t.Teacher(CLASSES), mlp, (x, y), (x[:50], y[:50]), SMALL, 0.1, 3, 3).states
    monkeypatch.setattr(module, "taught_loss", diverging)
    seen = episode(l2t.Teacher(CLASSES), mlp, (x, y), (x[:50], y[:50]), SMALL, 0.1, 3, 3).states
    assert all(math.isfinite(value) for values in seen.values() for value in values)
    assert seen["progress"] == plain["progress"]
    assert seen["train_loss"][0] == plain["train_loss"][0]
    assert seen["train_loss"][-1] != plain["train_loss"][-1]  # without what the second would have said


def test_what_is_frozen_does_not_learn(tmp_path):
    def teacher(*frozen):
        made = l2t.Teacher(CLASSES)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return made

    names = [name for name, _ in teacher().named_parameters()]
    for guarded in (True, False):
        recipe = dataclasses.replace(SMALL, updates=3, average=1.0, trial_margin=0.0, trial_rates=(1.0,))
        taught = run(teacher(names[0]), recipe=recipe, guard=guarded, directory=tmp_path / str(guarded))
        own = dict(taught.teacher.named_parameters())
        assert {name for name, value in own.items() if not value.requires_grad} == {names[0]}
        start = dict(teacher().named_parameters())
        if not guarded or taught.history["trial"]["chosen"] != "neutral":
            same = {name for name in names if torch.equal(own[name], start[name])}
            assert same == {names[0]}
        assert same_weights(l2t.Teacher.load(tmp_path / str(guarded)), taught.teacher)
        with pytest.raises(ValueError, match="got different data and start weights"):
            run(teacher(), recipe=recipe, guard=guarded, directory=tmp_path / str(guarded), resume=True)
    with pytest.raises(
        ValueError, match="teacher must have a parameter that requires grad, got one that is frozen"
    ):
        run(teacher(*names))


def test_rows_that_require_a_gradient_are_given_none():
    x, y = data()
    x.requires_grad_()
    recipe = dataclasses.replace(SMALL, updates=1, lr=None, probe_lrs=(0.1, 0.05), probe_students=2)
    l2t.teach(l2t.Teacher(CLASSES), mlp, (x, y), (x, y), recipe=recipe, progress=False)
    assert x.grad is None


def test_teaching_lowers_the_measure():
    x, y = data(900)
    flipped = data(900, noise=0.45)[1]
    recipe = l2t.Recipe(steps=60, lr=0.1, updates=12, teacher_lr=0.2, students=3, trial_students=4)
    teacher = l2t.Teacher(CLASSES, "full", link="identity", off_diagonal_scale=0.5)
    taught = l2t.teach(
        teacher, mlp, (x[:600], flipped[:600]), (x[600:], y[600:]), recipe=recipe, progress=False
    )
    rows = taught.history["updates"]
    assert rows[-1]["measure"] < 0.9 * rows[0]["measure"]
    assert rows[-1]["dev_error"] < 0.8 * rows[0]["dev_error"]
    assert rows[0]["agreement"] > 0.5
    assert taught.history["trial"]["chosen"] != "neutral"


def test_the_given_teacher_is_left_as_it_is():
    teacher = l2t.Teacher(CLASSES)
    before = l2t.Teacher(CLASSES)
    taught = run(teacher)
    assert same_weights(teacher, before)
    assert all(p.grad is None for p in teacher.parameters())
    assert taught.recipe.lr == 0.1


def test_low_agreement_is_explained_once(monkeypatch, capsys):
    recipe = dataclasses.replace(SMALL, updates=25)
    start = faked(monkeypatch, [[1.0, -1.0, 1.0]] * 25)
    taught = run(start, recipe=recipe, guard=False)
    said = capsys.readouterr().err
    assert said.count("the teacher learns next to nothing. Use a smaller learning rate while teaching") == 1
    assert [e["kind"] for e in taught.history["events"]] == ["agreement"]
    assert taught.history["events"][0]["update"] == 9


def test_history_is_what_it_says():
    history = run().history
    assert set(history) == {
        "seed", "recipe", "teacher", "lr", "probe", "updates", "events", "adjoint_norms", "states", "trial",
        "seconds",
    }  # fmt: skip
    assert [row["update"] for row in history["updates"]] == list(range(6))
    assert set(history["adjoint_norms"]) == {"0", "1", "2", "4", "5"}
    assert all(len(norms) == SMALL.steps + 1 for norms in history["adjoint_norms"].values())
    assert history["states"]["progress"] == pytest.approx([step / 12 for step in range(12)])
    assert set(history["states"]) == {"progress", "train_loss", "train_accuracy"}
    assert all(row["students_per_second"] > 0 for row in history["updates"])
    assert l2t.Recipe(**history["recipe"]) == SMALL
    json.dumps(history, allow_nan=False)


def test_it_is_seeded_to_the_bit():
    a, b, other = run(seed=1), run(seed=1), run(seed=2)
    assert told(a) == told(b)
    assert told(a) != told(other)


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher, l2t.WeightNet])
def test_students_may_compute_under_autocast(make):
    """The gradient to the teacher is the one in float32 but for the students' rounding."""
    teacher = make(CLASSES)

    def seen():
        return episode(teacher, mlp, data(), None, SMALL, 0.1, 0, 3)

    alone = seen()
    with torch.autocast("cpu", torch.bfloat16):
        under = seen()
        taught = run(teacher, recipe=dataclasses.replace(SMALL, updates=1))
    assert under.gradient.dtype is torch.float32
    assert under.dev_error.dtype is torch.float32
    torch.testing.assert_close(under.measure, alone.measure, rtol=0.01, atol=0.0)
    assert (under.gradient - alone.gradient).norm() < 0.02 * alone.gradient.norm()
    assert len(taught.history["updates"]) == 1


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before


# ---- the guard


SMALL_WINDOWS = dataclasses.replace(SMALL, guard_window=5)


def guard(**settings) -> Guard:
    recipe = dataclasses.replace(SMALL, guard_window=3, **settings)
    return Guard(recipe, {"w": torch.zeros(1)})


def feed(guard, episodes):
    """Judges of (measure, norm) of two students an episode; the teacher's weight is the episode's number."""
    return [
        guard.judge([measure, measure], [norm, norm], {"w": torch.tensor([float(number)])})
        for number, (measure, norm) in enumerate(episodes)
    ]


def test_the_guard_keeps_the_mean_teacher_of_the_best_window():
    watch = guard()
    assert feed(watch, [(1.0, 1.0), (0.9, 1.0), (0.8, 1.0), (0.82, 1.0), (0.8, 1.0)]) == [None] * 5
    assert watch.memory["best"] == pytest.approx((0.8 + 0.82 + 0.8) / 3)
    assert watch.good["w"] == 3.0


def test_the_guard_sees_a_measure_that_rises():
    watch = guard()
    verdicts = feed(watch, [(1.1, 1.0)] + [(1.0, 1.0)] * 3 + [(1.1, 1.0)] * 3)
    assert verdicts[:6] == [None] * 6
    assert "the dev measure has risen to 1.1000, which has been 1.0000" in verdicts[6]
    assert watch.good["w"] == 2.0


def test_the_guard_sees_a_run_that_breaks_before_its_window_is_full():
    watch = Guard(SMALL_WINDOWS, {"w": torch.full((1,), -1.0)})
    verdicts = feed(watch, [(1.0, 1.0), (3.0, 1.0), (3.0, 1.0), (3.0, 1.0)])
    assert verdicts[:3] == [None] * 3
    assert "the dev measure has risen to 2.5000, which has been 1.0000" in verdicts[3]
    assert watch.good["w"] == -1.0
    watch = Guard(SMALL_WINDOWS, {"w": torch.full((1,), -1.0)})
    verdicts = feed(watch, [(1.0, 1.0), (1.0, 40.0), (1.0, 50.0)])
    assert "norm is 50, which has been 1" in verdicts[2]


def test_noise_in_the_measure_is_no_rise():
    torch.manual_seed(0)
    watch = guard()
    for number in range(200):
        measures = (1 + 0.04 * torch.randn(8)).tolist()
        assert watch.judge(measures, [1.0] * 8, {"w": torch.tensor([float(number)])}) is None


def test_the_guard_sees_norms_that_stay_high():
    watch = guard(guard_norm=10.0)
    quiet = [(1.0, 1.0), (0.9, 1.0), (0.9, 1.0)]
    assert (
        feed(watch, [*quiet, (0.5, 20.0), (0.5, 1.0), (0.5, 20.0)]) == [None] * 6
    )  # one alone is an outlier
    watch = guard(guard_norm=10.0)
    verdicts = feed(watch, [*quiet, (0.5, 20.0), (0.5, 30.0)])
    assert "norm is 30, which has been 1" in verdicts[4]
    assert watch.good["w"] == 1.0  # a low measure at high norms is none to come back to


def test_the_guard_sees_students_that_are_not_finite():
    watch = guard()
    teacher = {"w": torch.zeros(1)}
    assert watch.judge([1.0, 1.0, torch.nan, 1.0], [1.0, 1.0, math.inf, math.inf], teacher) is None
    verdict = watch.judge([1.0, torch.nan, torch.nan], [1.0, math.inf, math.inf], teacher)
    assert "2 of 3 students have no finite teacher gradient" in verdict


def test_going_back(monkeypatch, capsys):
    broken = [[1.0] * 3] * 4 + [[1e3] * 3] * 2 + [[1.0] * 3] * 6
    start = faked(monkeypatch, broken)
    recipe = dataclasses.replace(SMALL, updates=12, warmup=2, cooldown=0.0, teacher_lr=0.1, skip=1e9)
    taught = run(start, recipe=recipe)
    (event,) = [e for e in taught.history["events"] if e["kind"] == "guard"]
    assert event["update"] == 5
    assert "back to the last good teacher, with a teacher learning rate of 0.05" in capsys.readouterr().err
    rates = [row["teacher_lr"] for row in taught.history["updates"]]
    assert rates[:6] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert rates[6:9] == pytest.approx([0.025, 0.05, 0.05])  # half the step, after a new warm-up


def test_it_ends_after_too_many_returns(monkeypatch, capsys):
    start = faked(monkeypatch, [[math.nan] * 3] * 50)
    taught = run(start, recipe=dataclasses.replace(SMALL, updates=50, guard_returns=3))
    assert len(taught.history["updates"]) == 3
    assert "3 returns are enough; teaching ends with the last good teacher" in capsys.readouterr().err
    assert same_weights(taught.teacher, start.neutral())


def test_a_guarded_run_beyond_stability_ends_at_cross_entropy(capsys):
    start = l2t.Teacher(CLASSES, "full", link="identity")
    taught = run(start, recipe=dataclasses.replace(SMALL, lr=1e30, trial_rates=(1.0, 1e-31)))
    assert taught.history["trial"]["chosen"] == "neutral"
    assert same_weights(taught.teacher, start.neutral())
    assert "the result is the neutral teacher: the loss that teaching started with" in capsys.readouterr().err


def test_the_trial_takes_each_teacher_at_its_best_rate(monkeypatch):
    module = __import__("sys").modules["l2t.teach"]
    errors = torch.tensor(
        [
            [[0.5, 0.5, 0.5], [0.1, 0.1, 0.15], [0.6, 0.5, 0.6]],  # average: best at the second rate
            [[0.2, 0.2, 0.2], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]],  # good
            [[0.2, 0.25, 0.2], [0.4, 0.4, 0.4], [0.9, 0.9, 0.9]],  # neutral: best at the first
        ]
    )

    def trial(teachers, *_):  # one row a student
        return (errors if len(teachers) == 3 else errors[::2])[..., None]

    monkeypatch.setattr(module, "trial", trial)
    recipe = dataclasses.replace(SMALL, updates=8, average=0.8, trial_rates=(0.5, 1.0, 2.0))
    taught = run(recipe=recipe)
    assert taught.history["trial"]["chosen"] == "average"
    assert taught.history["trial"]["rates"] == pytest.approx([0.05, 0.1, 0.2])
    errors[0, 1] = torch.tensor([0.1, 0.1, 0.2])  # ahead by 0.083, with a standard error of 0.044
    errors[1] = 0.5
    assert run(recipe=recipe).history["trial"]["chosen"] == "neutral"
    assert run(recipe=dataclasses.replace(recipe, trial_margin=1.5)).history["trial"]["chosen"] == "average"


@pytest.mark.parametrize("given", [False, True])
def test_students_who_do_not_fit_side_by_side_are_tried_in_turn(monkeypatch, given):
    """A trial of ResNets took gigabytes at once."""
    module = __import__("sys").modules["l2t.teach"]
    teachers = [l2t.Teacher(4, "full", link="identity"), l2t.Teacher(4, features=("progress", "dev_loss"))]
    recipe, dev, rates = dataclasses.replace(SMALL, trial_students=3), data() if given else None, (0.1, 0.3)

    def tried():
        return module.trial(teachers, mlp, data(), dev, recipe, rates, 7, calibrated_error)

    together, calls = tried(), []
    make = module.Stack
    monkeypatch.setattr(module, "Stack", lambda *some: calls.append(len(some[1])) or make(*some))
    for most, sizes in ((4, [3, 3]), (2, [2, 1, 2, 1])):
        monkeypatch.setattr(students, "SIDE_BY_SIDE", most * sum(students.bytes_of(mlp, data()[0][:16])))
        calls.clear()
        torch.testing.assert_close(tried(), together)
        assert calls == 2 * sizes


@pytest.mark.parametrize(
    ("rows", "dev", "given", "students"),
    [(150, 0, None, 34), (500, 0, None, 10), (40, 0, None, 100), (40, 50, None, 20), (150, 0, 3, 3)],
)
def test_a_trial_takes_more_students_where_dev_rows_are_few(rows, dev, given, students):
    """Ten times thirty answers told label smoothing of one strength from another by a single mistake."""
    module = __import__("sys").modules["l2t.teach"]
    recipe = l2t.Recipe(steps=1, trial_students=given)
    made = module.trial([l2t.Teacher(CLASSES)], mlp, data(rows), data(dev) if dev else None, recipe, [0.1], 0)
    assert made.shape == (1, 1, students, dev or rows // 5)


@pytest.mark.parametrize("perturb", [0.0, 0.05])
def test_many_dev_rows_are_evaluated_again_in_the_backward(monkeypatch, perturb):
    module = __import__("sys").modules["l2t.teach"]
    recipe = dataclasses.replace(SMALL, perturb=perturb)
    arguments = l2t.Teacher(CLASSES, "full", link="identity"), mlp, data(), None, recipe, 0.1, 3, 4
    whole, calls, plain = episode(*arguments), [], module.evaluate_again
    monkeypatch.setattr(module, "evaluate_again", lambda *a: calls.append(a[2]) or plain(*a))
    of_a_row = students.bytes_of(mlp, data()[0][:16]).step // 16
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 4 * 40 * of_a_row)  # of 48 dev rows
    found = episode(*arguments)
    assert calls == [5]
    torch.testing.assert_close(found.measure, whole.measure)
    torch.testing.assert_close(found.dev_error, whole.dev_error)
    torch.testing.assert_close(found.gradient, whole.gradient)


def test_a_run_that_says_nothing_of_memory_takes_a_quarter_of_what_is_free(monkeypatch, capsys):
    module = __import__("sys").modules["l2t.teach"]
    recipe = dataclasses.replace(SMALL, lr=None, probe_lrs=(0.2, 0.1), updates=2)
    expected = run(recipe=recipe)
    assert "takes steps again" not in capsys.readouterr().err
    memories, plain = [], module.unroll
    monkeypatch.setattr(module, "unroll", lambda *a, **k: memories.append(k["memory"]) or plain(*a, **k))
    asked = dataclasses.replace(recipe, students=8)  # as many as the probe has
    needs = module.plan_episode(l2t.Teacher(CLASSES), mlp, data(), recipe=asked).needs.memory
    monkeypatch.setattr(module, "free_memory", lambda device: 4 * needs)
    run(recipe=recipe)
    assert set(memories) == {None}
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * needs)
    memories.clear()
    found = run(recipe=recipe)
    assert set(memories) == {needs // 2}
    assert same_weights(found.teacher, expected.teacher)
    assert found.recipe == expected.recipe  # says nothing of memory either
    assert capsys.readouterr().err.count("so it remembers") == 1
    monkeypatch.setattr(module, "free_memory", lambda device: 1)
    assert same_weights(run(recipe=recipe).teacher, expected.teacher)  # a step fits
    memories.clear()
    run(recipe=dataclasses.replace(recipe, memory="1GB"))
    assert set(memories) == {"1GB"}


def test_the_trial_is_judged_by_calibrated_expected_errors():
    module = __import__("sys").modules["l2t.teach"]
    start = l2t.Teacher(CLASSES, "full", link="identity")
    recipe = dataclasses.replace(SMALL, updates=12)
    taught = run(start, recipe=recipe)
    rates = taught.history["trial"]["rates"]
    again = module.trial([start.neutral()], mlp, data(), None, recipe, rates, seed_of(0, 2), calibrated_error)
    found = taught.history["trial"]["expected_error"]
    assert found["neutral"] == again.mean((-2, -1))[0].tolist()
    assert len(found) > 1


def test_the_standard_error_is_over_students_and_over_rows_that_they_share():
    values = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    students = torch.tensor([0.5, 0.75]).var() / 2
    rows = torch.tensor([0.0, 1.0, 0.5, 1.0]).var() / 4
    assert standard_error(values, same_rows=True) == pytest.approx(float(students + rows) ** 0.5)
    assert standard_error(values, same_rows=False) == pytest.approx(float(students) ** 0.5)
    assert standard_error(values[:, :1], same_rows=True) == 0.0


def test_a_held_back_part_of_the_dev_set_is_for_the_trial_alone(monkeypatch):
    module = __import__("sys").modules["l2t.teach"]
    seen = {"episode": [], "trial": []}
    for name in seen:
        real = getattr(module, name)

        def spy(*arguments, name=name, real=real):
            seen[name].append({tuple(row) for row in arguments[3][0].tolist()})
            return real(*arguments)

        monkeypatch.setattr(module, name, spy)
    dev = data(300)[0][240:], data(300)[1][240:]
    run(dev=dev, recipe=dataclasses.replace(SMALL, hold_back=0.25))
    (held,) = seen["trial"]
    assert len(held) == 15
    assert all(len(rows) == 45 and not rows & held for rows in seen["episode"])


# ---- the probe


def probed(monkeypatch, table, **settings):
    """A run whose probe sees (norm, agreement, dev error) by rate, and the rates that it tried."""
    module = __import__("sys").modules["l2t.teach"]
    tried = []

    class Seen(Episode):
        agreement = property(lambda self: self.adjoint_norms[0])

    def fake(teacher, student, train, dev, recipe, lr, seed, size):
        if size != recipe.probe_students:
            return real(teacher, student, train, dev, recipe, lr, seed, size)
        tried.append(lr)
        norm, agreement, error = table[lr]
        gradient = torch.tensor([[norm]] * size) * torch.tensor(
            [[1.0]] * (size - 1) + [[settings.get("most", 1.0)]]
        )
        return Seen(torch.zeros(size), torch.full((size,), error), gradient, [agreement], {})

    real = module.episode
    monkeypatch.setattr(module, "episode", fake)
    recipe = dataclasses.replace(SMALL, lr=None, probe_lrs=tuple(table), probe_students=8, updates=1)
    return run(recipe=recipe, guard=False), tried


def test_the_probe_goes_down_while_the_dev_error_falls(monkeypatch):
    table = {
        0.5: (1e11, 0.9, 9.0),  # agrees, but far too large
        0.4: (0.5, 0.01, 1.0),  # small, but does not agree
        0.3: (0.5, 0.5, 1.0),
        0.2: (0.4, 0.6, 0.9),
        0.1: (0.3, 0.7, 0.95),
        0.05: (0.2, 0.8, 0.1),
    }
    taught, tried = probed(monkeypatch, table)
    assert tried == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert taught.recipe.lr == taught.history["lr"] == 0.15
    assert [row["lr"] for row in taught.history["probe"]] == tried
    assert not taught.history["events"]


def test_one_wild_student_is_enough_to_refuse_a_rate(monkeypatch):
    taught, tried = probed(monkeypatch, {0.5: (0.1, 0.9, 1.0), 0.2: (0.1, 0.9, 1.0)}, most=11.0)
    assert tried == [0.5, 0.2]
    assert taught.history["events"][0]["kind"] == "probe"


def test_a_probe_that_finds_none_says_so(monkeypatch, capsys):
    taught, _ = probed(
        monkeypatch,
        {0.5: (9.0, 0.9, 1.0), 0.2: (0.5, 0.01, 1.0), 0.1: (0.5, 0.02, 1.0), 0.05: (0.4, math.nan, 1.0)},
    )
    assert taught.recipe.lr == 0.075  # the best agreement among small norms
    assert (
        "no learning rate that the probe tried gave students whose teacher gradients"
        in capsys.readouterr().err
    )


def test_the_probe_finds_a_stable_rate_of_real_students():
    x, y = data(900)
    flipped = data(900, noise=0.45)[1]
    taught = l2t.teach(
        l2t.Teacher(CLASSES, "full", link="identity"),
        mlp,
        (x[:600], flipped[:600]),
        (x[600:], y[600:]),
        recipe=l2t.Recipe(steps=60, probe_lrs=(1000.0, 0.1), updates=1),
        guard=False,
        progress=False,
    )
    assert taught.recipe.lr == 0.075
    assert taught.history["probe"][1]["agreement"] > 0.3
    assert not taught.history["events"]


# ---- files


def test_a_run_leaves_a_teacher_and_its_history(tmp_path):
    taught = run(directory=tmp_path / "deep" / "run")
    assert same_weights(l2t.Teacher.load(tmp_path / "deep" / "run"), taught.teacher)
    written = json.loads((tmp_path / "deep" / "run" / "history.json").read_text())
    assert written == taught.history
    assert len(list((tmp_path / "deep" / "run").glob("checkpoint-*"))) == 1


def test_a_finished_run_is_resumed_without_work(tmp_path, monkeypatch):
    taught = run(directory=tmp_path)
    monkeypatch.setattr(__import__("sys").modules["l2t.teach"], "episode", None)
    again = run(directory=tmp_path, resume=True)
    assert same_weights(again.teacher, taught.teacher)
    assert again.history == taught.history
    assert again.recipe == taught.recipe


def test_a_finished_run_gets_its_teacher_back(tmp_path):
    taught = run(directory=tmp_path)
    (tmp_path / "teacher.safetensors").unlink()
    run(directory=tmp_path, resume=True)
    assert same_weights(l2t.Teacher.load(tmp_path), taught.teacher)


def test_a_checkpoint_that_is_cut_or_gone_is_named(tmp_path):
    run(directory=tmp_path)
    (file,) = tmp_path.glob("checkpoint-*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"must be a safetensors file, whole.* or remove the folder"
        ) as caught:
            run(directory=tmp_path, resume=True)
        assert str(file) in str(caught.value)
        file.unlink(missing_ok=True)


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(__import__("sys").modules["l2t.teach"], "episode", None)
    recipe = dataclasses.replace(SMALL, lr=None)
    with pytest.raises(
        PermissionError, match=r"l2t\.teach: the folder .*/file/run must be one that can be written"
    ):
        run(directory=tmp_path / "file" / "run", recipe=recipe)


def test_ctrl_c_leaves_a_resumable_run(tmp_path, monkeypatch, capsys):
    module = __import__("sys").modules["l2t.teach"]
    real = module.episode

    def interrupted(*arguments):
        if len(list(tmp_path.glob("checkpoint-000003*"))):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(directory=tmp_path)
    assert "stopped after 3 of 6 updates; all of them are in" in capsys.readouterr().err
    monkeypatch.setattr(module, "episode", real)
    assert told(run(directory=tmp_path, resume=True)) == told(run())


def test_resume_starts_where_there_is_none(tmp_path):
    assert told(run(directory=tmp_path, resume=True)) == told(run())


def test_a_run_is_not_overwritten(tmp_path):
    run(directory=tmp_path)
    with pytest.raises(ValueError, match=r"l2t\.teach: directory must hold no run, got .* with one"):
        run(directory=tmp_path)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("different seed.", {"seed": 3}),
        ("recipe.steps, recipe.momentum.", {"recipe": dataclasses.replace(SMALL, steps=13, momentum=0.8)}),
        ("data and start weights, teacher.slots.", {"teacher": l2t.Teacher(CLASSES, slots=2)}),
        (
            "different teacher.link.",
            {"teacher": l2t.Teacher(CLASSES, link="log-sigmoid", diagonal_start=0.3)},
        ),
        ("data and start weights", {"teacher": l2t.Teacher(CLASSES, seed=1)}),
        ("data and start weights", {"dev": data(100)}),
        ("guard", {"guard": False}),
        ("student, student's modules.", {"student": lambda: nn.Linear(6, CLASSES)}),
        ("different student's modules.", {"student": lambda: relu_in_place_of_tanh(mlp())}),
        ("different student's modules.", {"student": lambda: frozen_below(mlp())}),
        ("different student's modules.", {"student": lambda: mlp().eval()}),
    ],
)
def test_a_run_of_other_arguments_is_not_resumed(tmp_path, what, arguments):
    run(directory=tmp_path)
    with pytest.raises(
        ValueError, match="must have been started with the same arguments, got different"
    ) as caught:
        run(directory=tmp_path, resume=True, **arguments)
    assert what in str(caught.value)


def test_a_run_that_does_not_say_what_its_students_are_is_not_resumed(tmp_path):
    run(directory=tmp_path)
    marker = tmp_path / "checkpoint.json"
    content = json.loads(marker.read_text())
    del content["identity"]["student's modules"]
    marker.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"got different student's modules\."):
        run(directory=tmp_path, resume=True)


def relu_in_place_of_tanh(student):
    student[1] = nn.ReLU()
    return student


def frozen_below(student):
    student[0].requires_grad_(False)
    return student


def test_a_checkpoint_that_is_not_whole_is_named(tmp_path):
    run(directory=tmp_path)
    marker = tmp_path / "checkpoint.json"
    for content, got in (
        (marker.read_text()[:99], "what breaks off or is none"),
        ("{}", "an object without tensors, "),
    ):
        marker.write_text(content)
        with pytest.raises(ValueError) as caught:
            run(directory=tmp_path, resume=True)
        assert f"l2t: {marker} must be JSON as this library writes it, got {got}" in str(caught.value)


# ---- sentences


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps must be an integer of 1 or more, got 0"),
        ({"students": 2.0}, "students must be an integer of 1 or more, got 2.0"),
        ({"threads": 0}, "threads must be an integer of 1 or more, got 0"),
        ({"trial_students": 1}, "trial_students must be an integer of 2 or more, got 1"),
        ({"lr": 0.0}, "lr must be a number in (0, inf), got 0.0"),
        ({"lr": "fast"}, "lr must be a number in (0, inf), got 'fast'"),
        ({"momentum": 1.5}, "momentum must be a number in [0, 1], got 1.5"),
        ({"teacher_lr": math.nan}, "teacher_lr must be a number in (0, inf), got nan"),
        ({"trial_margin": -1.0}, "trial_margin must be a number in [0, inf), got -1.0"),
        ({"perturb": -0.1}, "perturb must be a number in [0, inf), got -0.1"),
        ({"anchor": -1.0}, "anchor must be a number in [0, inf), got -1.0"),
        ({"damping": 0.0}, "damping must be a number in (0, 1], got 0.0"),
        ({"growth": 0.5}, "growth must be a number in [1, inf), got 0.5"),
        ({"averaging": "mode"}, "averaging must be one of mean, median, direction, got 'mode'"),
        ({"decay": "cosine"}, "decay must be one of linear, constant, got 'cosine'"),
        ({"measure": "accuracy"}, "measure must be one of calibrated-cross-entropy, cross-entropy"),
        ({"curvature": "exact"}, "forward, central, one-sided, got 'exact'"),
        ({"schedule": "binary"}, "schedule must be one of auto, all, every, binomial, disk, got 'binary'"),
        (
            {"memory": "much"},
            "memory must be a number of bytes or a text such as '64MB' or '2GiB', got 'much'",
        ),
        ({"schedule": "binomial"}, "memory must be given with schedule='binomial', got None"),
        ({"truncate": 0}, "truncate must be an integer of 1 or more, got 0"),
        ({"betas": (0.9,)}, "betas must be a sequence of 2 positive numbers, got (0.9,)"),
        ({"probe_lrs": ()}, "probe_lrs must be a sequence of positive numbers, got ()"),
        ({"trial_rates": (1.0, -1.0)}, "trial_rates must be a sequence of positive numbers, got (1.0, -1.0)"),
    ],
)
def test_a_bad_recipe_says_so(settings, sentence):
    with pytest.raises(ValueError) as caught:
        l2t.Recipe(**settings)
    assert sentence in str(caught.value)


X, Y = data(20)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (mlp, (X.to("meta"), Y)),
            "train must be on one device, got inputs on meta and targets on cpu. Move",
        ),
        ((mlp, (X.long(), Y)), "train inputs must have the teacher's dtype torch.float32, got torch.int64"),
        ((mlp, (X, Y.float())), "train targets must be int64 of shape (N,), got torch.float32"),
        (
            (mlp, (X, Y[:, None])),
            "train targets must be int64 of shape (N,), got torch.int64 of shape (20, 1)",
        ),
        (
            (mlp, (X, Y[:9])),
            "train must be two or more inputs with a target each, got 20 inputs and 9 targets",
        ),
        ((mlp, (X, Y + 1)), "train targets must be in [0, 4), got 1 to 4"),
        ((mlp, (X, Y), (X, Y - 9)), "dev targets must be in [0, 4), got -9"),
        (
            (mlp, (X, Y), (X.to("meta"), Y.to("meta"))),
            "dev must be on the device of train, cpu, got meta. Move it there",
        ),
        (
            (lambda: nn.Linear(6, 5), (X, Y)),
            "student must return logits of shape (2, 4) for two rows, got (2, 5)",
        ),
        (
            (lambda: nn.LSTM(6, 4), (X, Y)),
            "student must return logits of shape (2, 4) for two rows, got a tuple. Give it",
        ),
        (
            (lambda: nn.Linear(5, 4), (X, Y)),
            f"must run on train inputs of shape {(SMALL.batch_size, 6)}, torch.float32, but raised Runtime",
        ),
        (
            (lambda: nn.Linear(6, 4).double(), (X, Y)),
            f"inputs of shape {(SMALL.batch_size, 6)}, torch.float32, but raised RuntimeError: mat1 and",
        ),
        (
            (lambda: nn.Sequential(nn.LazyLinear(4)), (X, Y)),
            "parameters of student must have a shape, got the uninitialised 0.weight. Let the function",
        ),
        (
            (mlp, (X, Y), (X[:, :5], Y)),
            "dev inputs must have rows of shape (6,), as those of train have, got (5,). Prepare them alike.",
        ),
        (
            (mlp(), (X, Y)),
            "returns a fresh torch.nn.Module, got a made Sequential. Pass the class or a lambda",
        ),
        ((None, (X, Y)), "returns a fresh torch.nn.Module, got a made NoneType. Pass the class or a lambda"),
        ((lambda: "student", (X, Y)), "a function that returns a fresh torch.nn.Module, got a function that"),
    ],
)
def test_bad_arguments_say_so_before_any_work(arguments, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:
        l2t.teach(l2t.Teacher(CLASSES), *arguments, recipe=SMALL, directory=tmp_path / "run", progress=False)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def with_norm():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))


def test_a_batch_too_small_for_the_student_says_so():
    one = dataclasses.replace(SMALL, batch_size=1)
    with pytest.raises(ValueError, match=r"shape \(1, 6\), torch.float32, but raised ValueError: Expected"):
        l2t.teach(l2t.Teacher(CLASSES), with_norm, (X, Y), recipe=one, progress=False)
    frozen = l2t.teach(
        l2t.Teacher(CLASSES), lambda: with_norm().eval(), (X, Y), recipe=one, progress=False
    )  # in eval() its statistics stand still, and one row is enough
    assert frozen.history["updates"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_half_precision_says_so(dtype):
    got = str(dtype).removeprefix("torch.")
    sentence = f"teacher must be float32 or float64, got {got}. Call teacher.float()"
    with pytest.raises(ValueError, match=re.escape(f"l2t.teach: {sentence}")):
        l2t.teach(l2t.Teacher(CLASSES).to(dtype), mlp, (X, Y), recipe=SMALL, progress=False)
    with pytest.raises(ValueError, match=re.escape(f"l2t.compare: {sentence}")):
        Comparison({"a": l2t.Teacher(CLASSES).to(dtype)}, mlp, (X, Y), (X, Y), recipe=SMALL)


SET = torch.utils.data.TensorDataset(X, Y)


@pytest.mark.parametrize(("train", "dev", "got"), [
    (SET, None, "got TensorDataset."),
    (torch.utils.data.DataLoader(SET), None, "got DataLoader."),
    ((X.numpy(), Y.numpy()), None, "got (ndarray, ndarray)."),
    ((X, Y, Y), None, "got (Tensor, Tensor, Tensor)."),
    ((X, Y), SET, "got TensorDataset."),
])  # fmt: skip
def test_data_that_are_no_tensors_say_how_to_make_them(train, dev, got):
    name = "train" if dev is None else "dev"
    sentence = f"{name} must be two tensors, inputs (N, ...) and targets (N,), {got} Make them"
    for teach in (
        l2t.teach,
        lambda teacher, *rest, **more: l2t.teach_best(l2t.Starts([teacher], []), *rest, **more),
    ):
        with pytest.raises(TypeError) as caught:
            teach(l2t.Teacher(CLASSES), mlp, train, dev, recipe=SMALL, progress=False)
        assert sentence in str(caught.value)
    x, y = torch.utils.data.default_collate(list(SET))  # as the sentence says
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_a_seed_is_any_whole_number():
    recipe = dataclasses.replace(SMALL, updates=1, steps=3, trial_rates=(1.0,))
    assert told(run(seed=np.int64(-3), recipe=recipe)) == told(run(seed=-3, recipe=recipe))
    for seed in (None, 1.5, "0"):
        with pytest.raises(ValueError, match=rf"l2t\.teach: seed must be a whole number, got {seed!r}"):
            run(seed=seed)


def test_one_student_that_is_made_once_says_so():
    made = mlp()
    with pytest.raises(ValueError, match="got the same one twice"):
        run(student=lambda: made)


def test_teaching_wants_gradients_wherever_it_is_called():
    with torch.no_grad():
        under = told(run())
    assert under == told(run())


def test_a_student_that_cannot_stack_says_so():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else -super().forward(x)

    with pytest.raises(RuntimeError, match=r"student must be a module that torch.vmap can run"):
        l2t.teach(l2t.Teacher(CLASSES), lambda: Branching(6, CLASSES), data(), recipe=SMALL, progress=False)


def test_the_bar_shows_what_matters(capsys):
    run(recipe=dataclasses.replace(SMALL, updates=1), progress=True)
    shown = capsys.readouterr().err
    for part in ("measure", "dev error", "norm", "agreement", "students/s"):
        assert part in shown


def test_seeds_of_updates_do_not_meet_those_of_other_parts():
    parts = [(seed, part, update) for seed in range(20) for part in range(3) for update in range(50)]
    assert len({seed_of(*some) for some in parts}) == len(parts)
