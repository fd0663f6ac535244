"""Students side by side are the students one by one; the course; the gradient to the teacher."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional as F

import l2t
from l2t import students as module
from l2t.students import (
    Lesson,
    Stack,
    TaughtLoss,
    Tracker,
    bytes_of,
    calibrated_cross_entropy,
    calibrated_error,
    cross_entropy,
    draw_batches,
    error,
    evaluate,
    evaluate_again,
    judge,
    learning_rates,
    seed_of,
    side_by_side,
    split_pools,
    train,
)

SEEDS = (3, 4, 5)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def alone(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}, {"curvature": "forward"}], ids=str)
@pytest.mark.parametrize("make", [mlp, batch_norm, Tied])
def test_a_stack_is_unrolled_as_the_students_alone(make, plan):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 10, 6), torch.randint(3, (4, 3, 10))
    optimizer = l2t.optim.AdamW(lr=0.01)

    def run_alone(i):
        weight = torch.ones(10, requires_grad=True)
        run = l2t.unroll(
            alone(make, SEEDS[i]),
            range(4),
            lambda model, _, t: (weight * F.cross_entropy(model(x[t, i]), y[t, i], reduction="none")).mean(),
            lambda model: F.cross_entropy(model(x[0, i]), y[0, i]),
            optimizer=optimizer,
            **plan,
        )
        run.backward()
        return run.measure, weight.grad

    weight = torch.ones(3, 10, requires_grad=True)

    def rows(model, t):
        return F.cross_entropy(model(x[t]).flatten(0, 1), y[t].flatten(), reduction="none").view(3, 10)

    run = l2t.unroll(
        Stack(make, SEEDS),
        range(4),
        lambda model, _, t: (weight * rows(model, t)).mean(1).sum(),
        lambda model: rows(model, 0).mean(1),
        optimizer=optimizer,
        **plan,
    )
    run.backward()
    for i in range(3):
        measure, gradient = run_alone(i)
        torch.testing.assert_close(run.measure[i], measure)
        torch.testing.assert_close(weight.grad[i], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [mlp, batch_norm, Tied])
def test_a_stack_is_the_students_alone(make):
    stack, students = Stack(make, SEEDS), [alone(make, seed) for seed in SEEDS]
    x = torch.randn(3, 10, 6)
    for training in (True, True, False):
        stack.train(training)
        together = stack(x)
        for i, student in enumerate(students):
            torch.testing.assert_close(together[i], student.train(training)(x[i]))
    for (name, every), (other, _) in zip(
        stack.student.state_dict().items(), students[0].state_dict().items(), strict=True
    ):
        assert name == other
        for i, student in enumerate(students):  # weights, and buffers as training has left them
            torch.testing.assert_close(every[i], student.state_dict()[name])
    gradients = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    for i, student in enumerate(students):
        own = torch.autograd.grad(student(x[i]).square().sum(), list(student.parameters()))
        for every, one in zip(gradients, own, strict=True):
            torch.testing.assert_close(every[i], one, rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied():
    stack = Stack(Tied, SEEDS)
    assert stack.student.first.weight is stack.student.second.weight
    assert len(list(stack.parameters())) == 5


def test_perturbed_students_stand_a_share_of_their_length_away():
    stack = Stack(lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), [1, 2])
    before = {name: value.clone() for name, value in stack.named_parameters()}
    x = torch.randn(2, 5, 6)
    plain = stack(x)
    with stack.perturbed(0.1, seed=3):
        weight = stack.student[0].weight
        moved = stack(x)
    with stack.perturbed(0.1, seed=3):
        assert torch.equal(stack(x), moved)
    with stack.perturbed(0.1, seed=4):
        assert not torch.equal(stack(x), moved)
    with stack.perturbed(0.0, seed=3):
        assert torch.equal(stack(x), plain)
    assert torch.equal(stack(x), plain)
    way = weight - before["student.0.weight"]
    for student, start in zip(way, before["student.0.weight"], strict=True):
        assert float(student.detach().norm() / start.norm()) == pytest.approx(0.1, rel=0.15)  # of 240 draws
    assert float(F.cosine_similarity(way[0].flatten(), way[1].flatten(), 0).abs()) < 0.25


def test_a_stack_survives_an_error_in_its_student():
    stack = Stack(mlp, SEEDS)
    before = {name: value.clone() for name, value in stack.named_parameters()}
    with pytest.raises(RuntimeError):
        stack(torch.randn(3, 10, 7))
    for name, value in stack.named_parameters():
        assert torch.equal(value, before[name])
        assert isinstance(value, nn.Parameter)


def test_making_a_stack_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Stack(mlp, SEEDS)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_differs_between_students():
    stack = Stack(lambda: nn.Dropout(0.5), SEEDS)
    a, b, c = stack(torch.ones(3, 50, 4))
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else -super().forward(x)


class Assigning(nn.Linear):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: Branching(6, 3), RuntimeError, r"student must be a module that torch.vmap can run"),
        (lambda: Assigning(6, 3), ValueError, r"buffer 'mean' must be updated in place, got a new tensor"),
        (
            lambda: 3,
            ValueError,
            r"must be a function that returns a fresh torch.nn.Module, got a function that",
        ),
        (
            lambda: nn.Linear(6, 1 + int(torch.rand(()) * 9)),
            ValueError,
            r"students of the same parameter names and",
        ),
    ],
)
def test_what_cannot_stack_says_so(make, kind, sentence):
    with pytest.raises(kind, match=sentence):
        Stack(make, SEEDS)(torch.randn(3, 10, 6))


class Features(nn.Linear):
    """Random features, or none, as a plain tensor."""

    def __init__(self, random: bool) -> None:
        super().__init__(6, 3)
        self.features = torch.randn(6, 6) if random else torch.eye(6)

    def forward(self, x):
        return super().forward((x @ self.features).tanh())


def test_a_plain_tensor_that_differs_says_so():
    sentence = (
        r"plain tensor '0\.features' must be the same for every seed, .* self\.register_buffer\('features', "
    )
    with pytest.raises(ValueError, match=sentence):
        Stack(lambda: nn.Sequential(Features(True), nn.Tanh()), SEEDS)
    x = torch.randn(3, 10, 6)
    stack = Stack(lambda: Features(False), SEEDS)
    for i, seed in enumerate(SEEDS):
        torch.testing.assert_close(stack(x)[i], alone(lambda: Features(False), seed)(x[i]))
    with pytest.warns(FutureWarning, match="weight_norm"):  # whose weight is made anew before each call
        Stack(lambda: nn.utils.weight_norm(nn.Linear(6, 3)), SEEDS)


class Listed(nn.Module):
    """A student that reads its weights, and a buffer, from a list, a dict and an attribute."""

    def __init__(self, kind=list) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("shift", torch.randn(6))
        self.weights = kind([self.first.weight, self.second.weight])
        self.biases = {"first": [self.first.bias], "second": self.second.bias}
        self.__dict__["added"] = self.shift
        self.sizes, self.rate, self.name = (6, 3), 0.5, "listed"

    def forward(self, x):
        x = torch.tanh(x @ self.weights[0].T + self.biases["first"][0] + self.added)
        return x @ self.weights[1].T + self.biases["second"]


def test_tensors_in_lists_and_dicts_are_those_of_each_student():
    """And they are trained: by the oracle of the students alone."""
    stack, students = Stack(Listed, SEEDS), [alone(Listed, seed) for seed in SEEDS]
    assert set(dict(stack.student.named_parameters())) == set(dict(students[0].named_parameters()))
    x = torch.randn(3, 10, 6)
    together = stack(x)
    gradients = torch.autograd.grad(together.square().sum(), list(stack.parameters()))
    for i, student in enumerate(students):
        torch.testing.assert_close(together[i], student(x[i]))
        own = torch.autograd.grad(student(x[i]).square().sum(), list(student.parameters()))
        for every, one in zip(gradients, own, strict=True):
            torch.testing.assert_close(every[i], one, rtol=1e-4, atol=1e-5)
    assert stack.student.weights[0] is stack.student.first.weight
    again = copy.deepcopy(stack)
    torch.testing.assert_close(again(x), together)
    with stack.perturbed(0.1, seed=0):
        assert not torch.equal(stack(x), together)
    assert torch.equal(stack(x), together)


@pytest.mark.parametrize("plan", [{}, {"curvature": "forward"}], ids=str)
def test_weights_in_lists_are_unrolled_as_those_of_the_student_alone(plan):
    x, y = torch.randn(10, 6), torch.arange(10) % 3

    def run(student, rows):
        taken = l2t.unroll(
            student,
            range(3),
            lambda model, batch, step: F.cross_entropy(rows(model), y),
            lambda model: F.cross_entropy(rows(model), y),
            **plan,
        )
        return taken.measure

    one = run(alone(Listed, 3), lambda model: model(x))
    torch.testing.assert_close(run(Stack(Listed, [3]), lambda model: model(x[None])[0]), one)


class Kept(nn.Linear):
    """A student that keeps something of its own."""

    def __init__(self, kept) -> None:
        super().__init__(6, 3)
        self.kept = kept()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Listed(tuple), r"read from places that can be set, got first\.weight in a tuple in weights"),
        (lambda: Kept(lambda: [torch.randn(6)]), r"plain tensor 'kept\[0\]' must be the same for every seed"),
        (
            lambda: Kept(lambda: {"a": (torch.rand(2),)}),
            r"plain tensor \"kept\['a'\]\[0\]\" must be the same",
        ),
        (
            lambda: Kept(lambda: torch.randperm(60).tolist()),
            r"the student's number 'kept\[0\]' must be the same",
        ),
        (
            lambda: Kept(lambda: torch.rand(()).item()),
            r"the student's number 'kept' must be the same for every",
        ),
    ],
)
def test_what_differs_in_lists_and_numbers_says_so(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        Stack(make, SEEDS)


def test_what_modules_keep_beside_their_tensors_may_stay():
    names = itertools.count()

    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.1)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.rates, self.generator = [i / 3 for i in range(3)], torch.Generator()
            self.label, self.nothing, self.nan = f"student {next(names)}", None, math.nan
            self.register_forward_hook(lambda part, args, out: out)

        def forward(self, x):
            return self.norm(x)

    assert Stack(Usual, SEEDS)(torch.randn(3, 10, 6)).shape == (3, 10, 6)


def test_an_empty_stack_says_so():
    with pytest.raises(ValueError, match="seeds must be one or more, got none"):
        Stack(mlp, [])


# ---- seeds, splits, batches


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_a_seed_is_one_that_torch_takes(parts):
    assert 0 <= seed_of(*parts) < 2**63
    torch.Generator().manual_seed(seed_of(*parts))


def test_seeds_of_different_parts_differ():
    parts = [(a, b) for a in range(60) for b in range(60)] + [(a,) for a in range(60)]
    assert len({seed_of(*some) for some in parts}) == len(parts)


@settings(deadline=None)
@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 1000), st.integers(1, 50))
def test_a_split_is_a_partition(count, fraction, seed, most):
    pools = split_pools(count, 3, fraction, seed, most)
    for train_rows, dev_rows in zip(*pools, strict=True):
        assert 1 <= len(dev_rows) <= most
        assert len(train_rows) >= 1
        assert sorted([*train_rows.tolist(), *dev_rows.tolist()]) == list(range(count))
    assert torch.equal(pools.dev, split_pools(count, 3, fraction, seed, most).dev)
    assert pools.dev.shape[1] == min(split_pools(count, 3, fraction, seed).dev.shape[1], most)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20))
def test_batches_walk_through_the_pool_in_epochs(steps, batch_size, size):
    pools = 100 + torch.arange(2 * size).reshape(2, size)
    batches = draw_batches(pools, steps, batch_size, seed=1)
    assert batches.shape == (steps, 2, batch_size)
    for pool, rows in zip(pools, batches.transpose(0, 1).reshape(2, -1), strict=True):
        for epoch in rows.split(size):
            assert len(set(epoch.tolist())) == len(epoch)
            assert set(epoch.tolist()) <= set(pool.tolist())
    assert torch.equal(batches, draw_batches(pools, steps, batch_size, seed=1))
    if size > 4 and steps * batch_size > 4:
        assert not torch.equal(batches, draw_batches(pools, steps, batch_size, seed=2))


# ---- state


def test_the_tracker_keeps_running_means():
    tracker = Tracker(2, 4, 10, torch.zeros(()))
    start = tracker.state(0)
    torch.testing.assert_close(start.train_loss, torch.full((2,), 4.0).log())
    torch.testing.assert_close(start.train_accuracy, torch.full((2,), 0.25))
    logits, target = torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    tracker.update(0, logits, target)
    tracker.update(0, -logits, target)  # the reverse pass runs a step again: no second record
    state = tracker.state(1)
    assert len(tracker.states) == 2
    for i in range(2):
        assert state.progress[i] == pytest.approx(0.1)
        loss = F.cross_entropy(logits[i], target[i])
        accuracy = (logits[i].argmax(1) == target[i]).float().mean()
        torch.testing.assert_close(state.train_loss[i], 0.9 * torch.tensor(4.0).log() + 0.1 * loss)
        torch.testing.assert_close(state.train_accuracy[i], 0.9 * 0.25 + 0.1 * accuracy)


def test_dev_features_are_measured_in_evaluation_mode():
    def make():
        return nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 3))

    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    dev = torch.randn(2, 7, 6), torch.randint(3, (2, 7))
    teacher = l2t.Teacher(3, features=["dev_loss", "dev_accuracy"])
    lesson = Lesson(
        (x, y), draw_batches(torch.arange(40).expand(2, -1), 30, 8, 0), TaughtLoss(teacher), 3, dev
    )
    stack = Stack(make, (0, 1))
    before = judge(stack, *dev)
    train(stack, lesson, lr=0.1, momentum=0.0, weight_decay=0.0, decay="constant")
    torch.testing.assert_close(lesson.tracker.state(0).dev_loss, before[1])
    torch.testing.assert_close(lesson.tracker.state(0).dev_accuracy, 1 - before[0])
    assert stack.training
    measured = {tuple(state.dev_loss.tolist()) for state in lesson.tracker.states[:-1]}
    assert len(measured) == 30  # 20 looks or one a step


def test_dev_features_without_a_dev_set_say_so():
    teacher = l2t.Teacher(3, features=["dev_loss"])
    lesson = Lesson(
        (torch.randn(9, 6), torch.zeros(9, dtype=torch.long)), torch.zeros(2, 2, 3, dtype=torch.long),
        TaughtLoss(teacher), 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dev_loss must be a number, got None"):
        lesson(Stack(mlp, (0, 1)), lesson.batches[0], 0)


@pytest.mark.parametrize(("loss", "got"), [
    (lambda z, t, *_: F.cross_entropy(z.flatten(0, 1), t.flatten()), "shape (), float32 on cpu"),
    (lambda z, t, *_: F.cross_entropy(z.mT, t, reduction="none"), "shape (2, 4), float32 on cpu"),
    (lambda z, t, *_: 1.0, "float"),
])  # fmt: skip
def test_a_loss_that_is_not_one_for_each_student_says_so(loss, got):
    rows = torch.randn(9, 6), torch.zeros(9, dtype=torch.long)
    lesson = Lesson(rows, torch.zeros(2, 2, 4, dtype=torch.long), loss, 3)
    sentence = f"loss of an arm must be of shape (2,), a number for each student, got {got}. Take the mean"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        lesson(Stack(mlp, (0, 1)), lesson.batches[0], 0)


# ---- the course


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_the_course_is_that_of_torch_optim(decay):
    x, y = torch.randn(60, 6), torch.randint(3, (60,))
    batches = draw_batches(torch.arange(60).expand(3, -1), 12, 10, 0)
    stack = Stack(mlp, SEEDS)
    rates = torch.tensor([0.1, 0.2, 0.05])
    train(
        stack,
        Lesson((x, y), batches, lambda z, t, state, step: cross_entropy(z, t), 3),
        lr=rates,
        momentum=0.9,
        weight_decay=0.01,
        decay=decay,
    )
    for i, seed in enumerate(SEEDS):
        student = alone(mlp, seed)
        sgd = torch.optim.SGD(student.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
        for step, now in enumerate(learning_rates(float(rates[i]), 12, decay)):
            sgd.param_groups[0]["lr"] = now
            sgd.zero_grad()
            F.cross_entropy(student(x[batches[step, i]]), y[batches[step, i]]).backward()
            sgd.step()
        for every, one in zip(stack.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(every[i], one, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_a_student_does_not_use_stays_as_it_is():
    """In the course of a comparison or trial as in the unrolled run, beside the same course of the others."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = mlp(), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    x, y = torch.randn(60, 6), torch.randint(3, (60,))
    batches = draw_batches(torch.arange(60).expand(3, -1), 5, 10, 0)

    def lesson():
        return Lesson((x, y), batches, lambda z, t, state, step: cross_entropy(z, t), 3)

    stack, plain = Stack(Spare, SEEDS), Stack(mlp, SEEDS)
    before = stack.student.spare.weight.detach().clone()
    for one in (stack, plain):
        train(one, lesson(), lr=0.1, momentum=0.9, weight_decay=0.0, decay="linear")
    assert torch.equal(stack.student.spare.weight, before)
    for ours, theirs in zip(stack.student.used.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    unrolled = Stack(Spare, SEEDS)
    rates = learning_rates(0.1, 5, "linear")
    sgd = l2t.optim.SGD(lr=lambda step: rates[step], momentum=0.9)
    run = l2t.unroll(
        unrolled,
        batches,
        lesson(),
        lambda model: cross_entropy(model(x.expand(3, -1, -1)), y.expand(3, -1)),
        optimizer=sgd,
    )
    expected = cross_entropy(evaluate(stack, x.expand(3, -1, -1)), y.expand(3, -1))
    torch.testing.assert_close(run.measure, expected)


def test_learning_rates_fall_along_a_line():
    assert learning_rates(0.4, 4, "linear") == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert learning_rates(0.4, 2, "constant") == [0.4, 0.4]


def test_train_calls_at_the_steps_asked_for():
    seen = []
    batches = torch.zeros(5, 1, 2, dtype=torch.long)
    lesson = Lesson(
        (torch.randn(3, 6), torch.tensor([0, 1, 2])), batches, lambda z, t, *_: cross_entropy(z, t), 3
    )
    train(
        Stack(mlp, (0,)), lesson, lr=0.1, momentum=0.9, weight_decay=0.0, decay="linear", at=(0, 3, 5),
        then=seen.append,
    )  # fmt: skip
    assert seen == [0, 3, 5]


def test_evaluate_goes_by_chunks_and_restores_the_mode():
    stack = Stack(batch_norm, SEEDS)
    x = torch.randn(3, 11, 6)
    torch.testing.assert_close(evaluate(stack, x, chunk=6), evaluate(stack, x))
    assert stack.training
    stack.eval()
    evaluate(stack, x)
    assert not stack.training


def test_inputs_of_fewer_students_are_those_of_the_next_ones_too_a_part_at_a_time(monkeypatch):
    """A trial of 110 students on 15,000 images would else copy these 110 times."""
    stack, x = Stack(mlp, range(6)), torch.randn(2, 50, 6)
    expected, seen = evaluate(stack, x.repeat(3, 1, 1), chunk=30), []
    forward = stack.forward
    monkeypatch.setattr(stack, "forward", lambda part: seen.append(part.shape) or forward(part))
    assert torch.equal(evaluate(stack, x, chunk=30), expected)
    assert seen == [(6, 5, 6)] * 10


def test_students_train_side_by_side_as_many_as_fit(monkeypatch):
    def sizes(most, students, rates):
        monkeypatch.setattr(module, "SIDE_BY_SIDE", most * one)
        groups = side_by_side(mlp, x, students, rates)
        every = [
            (index, rate)
            for group in groups
            for rate in group.rates
            for index in range(students)[group.students]
        ]
        assert every == [(index, rate) for rate in rates for index in range(students)]
        assert [len(group.lr(x)) for group in groups] == [
            len(range(students)[group.students]) * len(group.rates) for group in groups
        ]
        return [len(group.lr(x)) for group in groups]

    x = torch.randn(16, 6)
    # Weights, gradients and moments of 6 x 8 + 8 + 8 x 3 + 3 numbers; what enters each layer.
    assert bytes_of(mlp, x) == (4 * 3 * 83, 4 * 16 * (6 + 8))
    assert bytes_of(mlp, torch.randn(1000, 6)[:16]) == bytes_of(mlp, x)
    one = sum(bytes_of(mlp, x))
    assert sizes(100, 3, (0.1, 0.2, 0.4)) == [9]
    assert sizes(7, 3, (0.1, 0.2, 0.4)) == [6, 3]
    assert sizes(2, 3, (0.1, 0.2)) == [2, 1, 2, 1]
    assert sizes(0, 2, (0.1,)) == [1, 1]
    assert side_by_side(mlp, x, 2, (0.3, 0.1))[0].lr(x).tolist() == pytest.approx([0.3])


def test_dev_rows_that_are_evaluated_again_give_the_same_and_keep_less():
    """Of 16,000 images that eight ResNets are measured on, the graph would take 19 GB."""
    stack, x = Stack(batch_norm, SEEDS), torch.randn(3, 50, 6)
    weights = list(stack.parameters())

    def of(evaluated, moved):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            logits = evaluated(moved)
        stack.train()  # in which the backward finds it
        grads = torch.autograd.grad(logits.square().sum(), weights)
        return logits, grads, sum(t.numel() for t in {t.data_ptr(): t for t in kept}.values())

    def at_once(moved):
        with moved():
            return evaluate(stack, x)

    for share in (0.0, 0.1):
        logits, grads, whole = of(at_once, lambda share=share: stack.perturbed(share, 3))
        again, same, part = of(
            lambda moved: evaluate_again(stack, x, 7, moved), lambda share=share: stack.perturbed(share, 3)
        )
        torch.testing.assert_close(again, logits)
        torch.testing.assert_close(same, grads)
        assert part < whole / 2


def test_evaluate_leaves_frozen_modules_frozen():
    def half_frozen() -> nn.Module:
        student = batch_norm()
        student[1].eval()
        return student

    stack = Stack(half_frozen, SEEDS)
    x = torch.randn(3, 11, 6)
    before = stack(x)
    evaluate(stack, x)
    assert [module.training for module in stack.student] == [True, False, True, True]
    assert torch.equal(stack(x), before)
    assert not stack.student[1].num_batches_tracked.any()


def test_a_broken_student_is_wrong_everywhere():
    stack = Stack(mlp, SEEDS)
    with torch.no_grad():
        next(stack.parameters())[1] = torch.nan
    errors, losses = judge(stack, torch.randn(3, 8, 6), torch.zeros(3, 8, dtype=torch.long))
    assert errors[1] == 1
    assert losses[1] == torch.inf
    assert losses[[0, 2]].isfinite().all()


# ---- the gradient to the teacher


@pytest.mark.parametrize(
    ("kind", "link", "make_teacher"),
    [
        ("full", "identity", l2t.Teacher),
        ("low-rank", "log-sigmoid", l2t.GateTeacher),
        ("shared", "sigmoid", l2t.static_teacher),
    ],
)
def test_gradients_of_students_are_plain_autograd_through_each_run(kind, link, make_teacher):
    torch.manual_seed(0)
    teacher = make_teacher(3, kind, link=link, dtype=torch.float64)
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(3, (50,))
    steps = 6
    batches = draw_batches(torch.arange(40).expand(3, -1), steps, 8, 0)
    stack = Stack(lambda: mlp().double(), SEEDS)
    loss = TaughtLoss(teacher, record=True)
    lesson = Lesson((x, y), batches, loss, 3)

    def measure(model):
        return cross_entropy(evaluate(model, x[40:].expand(3, 10, 6)), y[40:].expand(3, 10))

    run = l2t.unroll(stack, batches, lesson, measure, optimizer=l2t.optim.SGD(lr=0.3, momentum=0.9))
    run.backward()
    found = loss.gradient()
    assert all(parameter.grad is None for parameter in teacher.parameters())

    for i, seed in enumerate(SEEDS):
        weights = [w.detach().requires_grad_() for w in alone(lambda: mlp().double(), seed).parameters()]
        moments = [torch.zeros_like(w) for w in weights]
        average = [torch.tensor(3.0, dtype=torch.float64).log(), torch.tensor(1 / 3, dtype=torch.float64)]

        def forward(rows, weights):
            return torch.tanh(x[rows] @ weights[0].T + weights[1]) @ weights[2].T + weights[3]

        for step in range(steps):
            rows = batches[step, i]
            z = forward(rows, weights)
            value = teacher.loss(z, y[rows], l2t.StudentState(step / steps, *average))
            with torch.no_grad():
                average[0] = 0.9 * average[0] + 0.1 * F.cross_entropy(z, y[rows])
                average[1] = 0.9 * average[1] + 0.1 * (1 - error(z[None], y[rows][None])[0])
            grads = torch.autograd.grad(value, weights, create_graph=True)
            moments = [0.9 * m + g for m, g in zip(moments, grads, strict=True)]
            weights = [w - 0.3 * m for w, m in zip(weights, moments, strict=True)]
        end = F.cross_entropy(forward(torch.arange(40, 50), weights), y[40:])
        torch.testing.assert_close(run.measure[i], end.detach(), rtol=1e-10, atol=0)
        own = torch.autograd.grad(end, list(teacher.parameters()))
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in own]), rtol=1e-8, atol=1e-12)


def test_the_unrolled_run_and_the_course_are_the_same():
    torch.manual_seed(0)
    teacher = l2t.Teacher(3, "full")
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    batches = draw_batches(torch.arange(50).expand(3, -1), 10, 8, 0)
    rates = learning_rates(0.2, 10, "linear")
    unrolled = l2t.unroll(
        Stack(mlp, SEEDS),
        batches,
        Lesson((x, y), batches, TaughtLoss(teacher, record=True), 3),
        lambda model: cross_entropy(evaluate(model, x.expand(3, 50, 6)), y.expand(3, 50)),
        optimizer=l2t.optim.SGD(lr=lambda step: rates[step], momentum=0.9, weight_decay=0.01),
    )
    stack = Stack(mlp, SEEDS)
    lesson = Lesson((x, y), batches, TaughtLoss(teacher), 3)
    train(stack, lesson, lr=0.2, momentum=0.9, weight_decay=0.01, decay="linear")
    for name, weight in stack.named_parameters():
        torch.testing.assert_close(unrolled.weights[name], weight.detach(), rtol=1e-4, atol=1e-6)


def least(logits, targets):
    """The inverse temperature of the least cross-entropy of one student's logits, and that."""

    def at(place):
        return float(F.cross_entropy(math.exp(place) * logits, targets))

    found = optimize.minimize_scalar(at, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x), found.fun


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_calibrated_is_at_the_best_temperature(scale):
    torch.manual_seed(0)
    targets = torch.randint(4, (3, 50))
    logits = scale * (F.one_hot(targets, 4).double() + torch.randn(3, 50, 4, dtype=torch.float64))
    error, loss = calibrated_error(logits, targets), calibrated_cross_entropy(logits, targets)
    for z, y, of_rows, mean in zip(logits, targets, error, loss, strict=True):
        inverse, wanted = least(z, y)
        p = torch.softmax(inverse * z, -1)[range(50), y]
        torch.testing.assert_close(of_rows, 1.0 - p, rtol=0.0, atol=1e-5)
        assert float(mean) == pytest.approx(wanted, abs=1e-9)


def test_the_calibrated_cross_entropy_has_the_gradient_of_the_least_one():
    """By differences: the temperature moves with each logit."""
    torch.manual_seed(1)
    targets, logits = torch.randint(3, (1, 6)), torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(calibrated_cross_entropy(logits, targets).sum(), logits)
    for row in range(6):
        for entry in range(3):
            step = torch.zeros(6, 3, dtype=torch.float64)
            step[row, entry] = 1e-4
            above, below = (least(logits.detach()[0] + sign * step, targets[0])[1] for sign in (1, -1))
            assert float(gradient[0, row, entry]) == pytest.approx((above - below) / 2e-4, abs=1e-6)
    # So no student gains by the length of its logits.
    assert float((gradient * logits.detach()).sum()) == pytest.approx(0.0, abs=1e-7)


def test_the_calibrated_error_of_what_no_temperature_helps():
    targets = torch.tensor([[0, 1], [1, 0]])
    right = 5.0 * F.one_hot(targets, 2).float()
    assert calibrated_error(right, targets).max() < 1e-6  # as sure as it may be
    torch.testing.assert_close(
        calibrated_error(-right, targets), torch.full((2, 2), 0.5), atol=0.05, rtol=0.0
    )


def test_a_broken_student_is_wrong_and_moves_no_temperature():
    torch.manual_seed(0)
    targets, logits = torch.randint(4, (3, 50)), torch.randn(3, 50, 4)
    logits[1, 7, 2] = math.nan
    found = calibrated_error(logits, targets)
    assert found[1].eq(1.0).all()
    assert torch.equal(found[[0, 2]], calibrated_error(logits[[0, 2]], targets[[0, 2]]))
    assert calibrated_error(logits[1:2], targets[1:2]).eq(1.0).all()
