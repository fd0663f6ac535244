"""Runs that compute in 16 bits: l2t.unroll under autocast against autograd through the run in float64."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2t
from l2t.curvature import add_scaled, power_of_two

STEPS, BATCH, CLASSES = 6, 512, 5


class Course:
    """A run whose batches are large and whose measure may be small: gradients of samples near 1e-6."""

    def __init__(self, dtype: torch.dtype, size: float) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, CLASSES)]
        self.student = nn.Sequential(*layers).to(dtype)
        self.x = torch.randn(STEPS + 1, BATCH, 12).to(dtype)
        self.y = torch.randint(CLASSES, (STEPS + 1, BATCH))
        self.weight = torch.eye(CLASSES, dtype=dtype).requires_grad_()
        self.size = size
        self.autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def loss(self, model: Any, batch: Tensor, step: int) -> Tensor:
        with self.autocast:
            logits = model(batch)
        return -(self.weight[self.y[step]] * logits.to(self.weight.dtype).log_softmax(1)).sum(1).mean()

    def measure(self, model: Any) -> Tensor:
        with self.autocast:
            logits = model(self.x[STEPS])
        return F.cross_entropy(logits.to(self.weight.dtype), self.y[STEPS]) * self.size

    def unroll(self, **options: Any) -> l2t.Run:
        optimizer = l2t.optim.SGD(lr=0.1, momentum=0.9)
        metas = [self.weight, *self.student.parameters()]
        for x in metas:
            x.grad = None
        run = l2t.unroll(
            self.student, self.x[:STEPS], self.loss, self.measure, optimizer=optimizer, meta=metas, **options
        )
        run.backward()
        return run

    def gradients(self) -> list[Tensor]:
        return [self.weight.grad, *(p.grad for p in self.student.parameters())]


def truth(size: float) -> list[Tensor]:
    course = Course(torch.float64, size)
    named = dict(course.student.named_parameters())
    weights, momentum = dict(named), {name: torch.zeros_like(w) for name, w in named.items()}

    def model(x: Tensor) -> Tensor:
        return torch.func.functional_call(course.student, weights, (x,))

    for step in range(STEPS):
        value = course.loss(model, course.x[step], step)
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        momentum = {name: 0.9 * m + g for (name, m), g in zip(momentum.items(), grads, strict=True)}
        weights = {name: w - 0.1 * momentum[name] for name, w in weights.items()}
    return list(torch.autograd.grad(course.measure(model), [course.weight, *named.values()]))


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    off = math.hypot(*(float((x.double() - y).norm()) for x, y in zip(found, expected, strict=True)))
    return off / math.hypot(*(float(y.norm()) for y in expected))


ROOM = {
    torch.float16: {"central": 0.06, "one-sided": 0.15, "exact": 4e-3},
    torch.bfloat16: {"central": 0.2, "one-sided": 0.4, "exact": 1e-2},
}


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward", "central", "one-sided"])
@pytest.mark.parametrize("dtype", list(ROOM), ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_run_under_autocast_is_off_by_its_unit(
    size: float, dtype: torch.dtype, curvature: str, inside: bool
) -> None:
    """Gradients as small as size / BATCH would be zeros, or of a few bits, in float16 (from 6e-8 to 6e-5)."""
    course = Course(torch.float32, size)
    if inside:
        course.autocast = torch.autocast("cpu", dtype)
        course.unroll(curvature=curvature)
    else:
        with torch.autocast("cpu", dtype):
            course.unroll(curvature=curvature)
    found = course.gradients()
    assert all(g.dtype == torch.float32 for g in found)
    assert relative(found, truth(size)) <= ROOM[dtype].get(curvature, ROOM[dtype]["exact"])


@pytest.mark.parametrize("first", [1, 3])
def test_autocast_may_begin_at_a_later_step(first: int) -> None:
    """The last steps are then those whose products are small."""
    course = Course(torch.float32, 1e-6)
    loss = course.loss

    def later(model: Any, batch: Tensor, step: int) -> Tensor:
        course.autocast = contextlib.nullcontext() if step < first else torch.autocast("cpu", torch.float16)
        value = loss(model, batch, step)
        course.autocast = contextlib.nullcontext()
        return value

    course.loss = later  # type: ignore[method-assign]
    for options in ({}, {"curvature": "recompute"}, {"curvature": "central"}):
        course.unroll(**options)
        room = ROOM[torch.float16].get(options.get("curvature", ""), 1e-3)
        assert relative(course.gradients(), truth(1e-6)) <= room
    assert course.unroll()._steps.replay.unit == torch.finfo(torch.float16).eps


def test_the_walk_back_inside_of_autocast_has_the_same_bits() -> None:
    """Nothing of the optimiser's is to be computed in 16 bits there."""
    found = []
    for inside in (False, True):
        course, lr = Course(torch.float32, 1e-6), torch.tensor(0.1, requires_grad=True)
        with torch.autocast("cpu", torch.float16) as mode:
            run = l2t.unroll(
                course.student,
                course.x[:STEPS],
                course.loss,
                course.measure,
                optimizer=l2t.optim.SGD(lr=lr, momentum=0.9, clip_norm=0.05),
                along=2,
                schedule="every",
            )
            if inside:
                run.backward()
                assert torch.is_autocast_enabled("cpu")
        del mode
        if not inside:
            run.backward()
        found.append([lr.grad, course.weight.grad])
    assert found[0][0] != 0
    assert all(map(torch.equal, *found))


def test_scaled_products_have_the_same_bits_under_every_schedule() -> None:
    course, found = Course(torch.float32, 1e-4), []
    for options in ({}, {"curvature": "recompute"}, {"schedule": "every"}, {"along": {STEPS: 1.0}}):
        with torch.autocast("cpu", torch.float16):
            course.unroll(**options)
        found.append(course.gradients())
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_leaves_that_are_not_named_get_their_unscaled_gradient() -> None:
    course = Course(torch.float32, 1e-4)
    with torch.autocast("cpu", torch.float16):
        course.unroll()
        named = course.weight.grad
        course.weight.grad = torch.ones_like(course.weight)
        l2t.unroll(
            course.student,
            course.x[:STEPS],
            course.loss,
            course.measure,
            optimizer=l2t.optim.SGD(lr=0.1, momentum=0.9),
        ).backward()
    torch.testing.assert_close(course.weight.grad, 1 + named)


def test_a_measure_that_a_larger_scale_would_overflow_is_taken_without() -> None:
    course = Course(torch.float32, 1.0)
    plain = course.measure
    course.measure = lambda model: plain(model) * BATCH  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.float16):
        run = course.unroll()
    assert run.report.nonfinite is None
    assert relative(course.gradients(), [BATCH * g for g in truth(1.0)]) <= 2e-3


@pytest.mark.parametrize("size", [0.0, 1e-40, 3e-5, 0.7, 8.0, 1e15])
def test_scaling_is_exact(size: float) -> None:
    a = [torch.full((3,), size), torch.zeros(2)]
    scale = power_of_two(a)
    assert math.frexp(float(scale))[0] == 0.5
    if size >= 1e-30:
        assert 8 <= float(torch.stack([x.double().norm() for x in a]).norm() * scale) < 16
    leaf = torch.zeros(3, requires_grad=True)
    leaf.grad = torch.ones(3)
    scales = []

    def add(scale: Tensor) -> None:
        scales.append(float(scale))
        leaf.grad = torch.full((3,), size) * scale if len(scales) > 1 else torch.full((3,), math.inf)

    add_scaled([leaf], add, a, (64.0, 0.5))
    assert scales == [64 * float(scale), float(scale) / 2]
    if size >= 1e-30:
        assert torch.equal(leaf.grad, 1 + torch.full((3,), size))
