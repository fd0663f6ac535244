"""Measures along the way: l2t.unroll(along=) against autograd through the whole run.

The courses and the oracle are those of tests/test_unroll.py; the cnn's measure draws random numbers (dropout)
and changes buffers (BatchNorm).
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import test_unroll as unrolled
import torch
from torch import Tensor, nn

import l2t
from l2t.curvature import CURVATURES
from l2t.schedule import Segments

STEPS = unrolled.STEPS
ALONG: list[tuple[Any, dict[int, float]]] = [
    (1, dict.fromkeys(range(1, STEPS + 1), 1 / STEPS)),
    (3, {3: 0.5, STEPS: 0.5}),
    (STEPS + 5, {STEPS: 1.0}),
    ({1: 0.25, STEPS: 2.0}, {1: 0.25, STEPS: 2.0}),
    ({3: -2.0, 2: 0.5}, {3: -2.0, 2: 0.5}),  # and J does not depend on the last step
]
SEVERAL = ALONG[0][0]


@pytest.mark.parametrize(("along", "weights"), ALONG, ids=str)
@pytest.mark.parametrize(
    ("curvature", "schedule"),
    [("reverse", "all"), ("reverse", "every"), ("recompute", "all"), ("forward", "every")],
)
@pytest.mark.parametrize("student", ["cnn", "normaliser"])
def test_a_path_is_judged_as_by_autograd_through_the_whole_run(
    student: str, curvature: str, schedule: str, along: Any, weights: dict[int, float]
) -> None:
    course = unrolled.make_course(student, torch.float64)
    measure, trajectory = course.oracle(along=weights)
    run = course.unroll(curvature, course.leaves(), along=along, schedule=schedule)
    run.backward()
    assert unrolled.relative([run.measure], [measure]) <= 1e-12
    assert list(run.measures) == sorted(weights)
    assert float(sum(weights[t] * x for t, x in run.measures.items())) == pytest.approx(float(run.measure))
    for kind, leaves in course.metas.items():
        expected = torch.autograd.grad(measure, leaves, retain_graph=True, allow_unused=True)
        expected = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, expected, strict=True)]
        assert unrolled.relative(unrolled.gradients(leaves), expected) <= 1e-12, kind
    norms = []
    for at in trajectory:
        grads = torch.autograd.grad(measure, list(at.values()), retain_graph=True, allow_unused=True)
        norms.append(math.hypot(*(float(g.norm()) for g in grads if g is not None)))
    assert run.report.adjoint_norms == pytest.approx(norms, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("student", ["cnn", "lstm"])
def test_a_judged_path_has_the_same_bits_under_every_schedule(student: str, dtype: torch.dtype) -> None:
    course = unrolled.make_course(student, dtype)
    found = []
    for curvature in unrolled.SAME_BITS:
        for plan in ({"schedule": "all"}, *unrolled.PLANS.values()):
            for x in course.leaves():
                x.grad = None
            run = course.unroll(curvature, course.leaves(), along=SEVERAL, **plan)
            run.backward()
            found.append([run.measure, *run.measures.values(), *unrolled.gradients(course.leaves())])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize(("order", "truncate"), [("first", None), ("exact", 2), ("first", 3)])
def test_a_judged_path_cut_short(order: str, truncate: int | None, curvature: str) -> None:
    course = unrolled.make_course("mlp", torch.float64)
    weights = {1: 0.5, 2: 1.0, 3: -2.0, 4: 0.25}
    measure, _ = course.oracle(order == "first", truncate or STEPS, weights)
    kinds = {k: xs for k, xs in course.metas.items() if truncate is None or k != "initial weights"}
    leaves = [x for xs in kinds.values() for x in xs]
    run = course.unroll(curvature, leaves, order=order, truncate=truncate, along=weights)
    run.backward()
    room = {"central": 5e-8, "one-sided": 1e-4}.get(curvature, 1e-12)
    for kind, xs in kinds.items():
        expected = torch.autograd.grad(measure, xs, retain_graph=True, allow_unused=True)
        expected = [torch.zeros_like(x) if d is None else d for x, d in zip(xs, expected, strict=True)]
        assert unrolled.relative(unrolled.gradients(xs), expected) <= room, kind


@pytest.mark.parametrize("along", [None, {1: 0.5, 3: -2.0, 4: 0.25}])
@pytest.mark.parametrize("plan", [{"schedule": "all"}, {"schedule": "every"}], ids=["all", "every"])
def test_a_damped_walk_back(along: dict[int, float] | None, plan: dict[str, str]) -> None:
    course = unrolled.make_course("mlp", torch.float64)
    measure, _ = course.oracle(along=along, damping=0.8)
    course.unroll("reverse", course.leaves(), along=along, damping=0.8, **plan).backward()
    expected = [
        torch.zeros_like(x) if d is None else d
        for x, d in zip(
            course.leaves(), torch.autograd.grad(measure, course.leaves(), allow_unused=True), strict=True
        )
    ]
    assert unrolled.relative(unrolled.gradients(course.leaves()), expected) <= 1e-12
    exact = torch.autograd.grad(course.oracle(along=along)[0], course.leaves()[0])[0]
    assert unrolled.relative([exact], expected[:1]) > 1e-3


@pytest.mark.parametrize("damping", [0.0, 1.1, True, "half", math.nan])
def test_a_damping_that_makes_no_sense_is_refused(damping: object) -> None:
    course = unrolled.make_course("mlp", torch.float64)
    with pytest.raises(ValueError, match=r"l2t\.unroll: damping must be above 0 and at most 1, got"):
        course.unroll("reverse", course.leaves(), damping=damping)


def test_leaves_of_a_judged_path_are_found_without_being_named() -> None:
    for kind in ("data", "regulariser", "computed lr"):
        course = unrolled.make_course("mlp", torch.float64, use=(kind,))
        measure, _ = course.oracle(along=dict(ALONG[0][1]))
        course.unroll(along=SEVERAL).backward()
        expected = list(torch.autograd.grad(measure, course.leaves()))
        assert unrolled.relative(unrolled.gradients(course.leaves()), expected) <= 1e-12


@pytest.mark.parametrize("batches", ["list", "generator"])
def test_several_measures_each_with_its_cotangent(batches: str) -> None:
    _, metas, run = unrolled.simple()
    x = torch.randn(4, 3, dtype=torch.float64)
    scale = metas["scale"]

    def measure(model: nn.Module) -> Tensor:
        return torch.stack([scale * model(x).mean(), model(x).square().mean()])

    def data() -> Any:
        return [x] * 3 if batches == "list" else iter([x] * 3)

    whole = run(measure=measure, batches=data(), along=2)
    whole.backward(torch.tensor([1.0, -3.0]))
    found = [float(m.grad) for m in metas.values()]
    parts = [0.0, 0.0]
    for t in (2, 3):
        for m in metas.values():
            m.grad = None
        part = run(measure=lambda model: (measure(model) * torch.tensor([1.0, -3.0])).sum(), batches=[x] * t)
        part.backward()
        assert torch.equal(whole.measures[t] @ torch.tensor([1.0, -3.0]).double(), part.measure)
        parts = [p + float(m.grad) / 2 for p, m in zip(parts, metas.values(), strict=True)]
    assert found == pytest.approx(parts, rel=1e-12)
    assert whole.measure.shape == (2,)


def test_no_graph_of_a_measure_along_the_way_is_kept() -> None:
    torch.manual_seed(0)
    student, x = unrolled.mlp(), torch.randn(5, 8)
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        alive.append(sum(ref() is not None for ref in outputs))
        return model(batch).square().mean()

    def measure(model: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in outputs))
        hidden = model[1](model[0](x))
        outputs.append(weakref.ref(hidden))
        return model[2](hidden).square().mean()

    for plan in ({}, {"schedule": "every"}):
        outputs.clear()
        run = l2t.unroll(student, [x] * 9, loss, measure, along=1, **plan)
        assert sum(ref() is not None for ref in outputs) == 1  # the last
        run.backward()
        assert len(outputs) == 9 + 8
        assert sum(ref() is not None for ref in outputs) == 0
    assert max(alive) == 0


def test_a_measure_may_clear_gradients() -> None:
    course = unrolled.make_course("mlp", torch.float64, use=("loss coefficients",))
    whole, _ = course.oracle(along=dict(ALONG[0][1]))
    plain = course.measure

    def clearing(model: Any) -> Tensor:
        model.zero_grad()
        return plain(model)

    course.measure = clearing  # type: ignore[method-assign]
    course.unroll(along=1).backward()
    expected = list(torch.autograd.grad(whole, course.leaves()))
    assert unrolled.relative(unrolled.gradients(course.leaves()), expected) <= 1e-12


def test_a_measure_along_the_way_that_is_not_finite_is_named() -> None:
    _, _, run = unrolled.simple()
    calls = iter([1.0, math.nan, 1.0])
    result = run(measure=lambda model: model.bias.sum() * next(calls), along=1)
    assert result.report.nonfinite == ("measure", 2)


def test_a_path_is_judged_at_rounded_weights_where_states_are_kept_rounded() -> None:
    course, found = unrolled.make_course("mlp", torch.float64), []
    for store in ("exact", "bfloat16"):
        for x in course.leaves():
            x.grad = None
        course.unroll("recompute", course.leaves(), along=1, schedule=Segments(1, 1), store=store).backward()
        found.append(unrolled.gradients(course.leaves()))
    assert 0 < unrolled.relative(found[1], found[0]) < 0.05


# ---- sentences


@pytest.mark.parametrize(
    "along", [0, -1, True, 1.5, "2", {}, {0: 1.0}, {1.0: 1.0}, {1: math.nan}, {1: "x"}, {True: 1.0}], ids=repr
)
def test_along_is_an_integer_or_weights_by_steps_taken(along: object) -> None:
    _, _, run = unrolled.simple()
    with pytest.raises(ValueError, match=r"along must be an integer of 1 or more, or a mapping"):
        run(along=along)


@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}], ids=["all", "every"])
@pytest.mark.parametrize("known", [True, False])
def test_along_lies_within_the_run(known: bool, plan: dict[str, Any]) -> None:
    _, _, run = unrolled.simple()
    x, steps = torch.randn(4, 3, dtype=torch.float64), []

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        steps.append(step)
        return model(batch).square().mean()

    with pytest.raises(ValueError, match=r"along must name numbers of steps up to 3, .* got 4"):
        run(loss=loss, batches=[x] * 3 if known else iter([x] * 3), along={4: 1.0}, **plan)
    assert not steps or not (known or plan)


def test_a_measure_that_changes_is_told() -> None:
    _, _, run = unrolled.simple()
    calls = iter(range(9))
    result = run(measure=lambda model: model.bias.sum() + next(calls), along=1)
    with pytest.raises(RuntimeError, match="measure must be the same when it is taken again"):
        result.backward()
    shapes = iter([1, 2, 3])
    with pytest.raises(ValueError, match="measure must always be of one shape and dtype"):
        run(measure=lambda model: model.bias.expand(next(shapes)), along=1)
