"""Micro-batches: l2t.unroll(accumulate=) against autograd through the whole run, on one batch of them all.

The courses and the oracle are those of tests/test_unroll.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_unroll as unrolled
import torch
from torch import Tensor, nn

import l2t
from l2t.curvature import CURVATURES

ROOM = {"central": 5e-8, "one-sided": 1e-4}


@pytest.mark.filterwarnings("ignore:l2t.unroll. with curvature='forward'")
@pytest.mark.parametrize("use", [(), ("loss coefficients", "data")], ids=["every kind", "two kinds"])
@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("student", ["tied", "lstm"])
@pytest.mark.parametrize("pieces", [3])
def test_micro_batches_agree_with_autograd_through_the_run_on_whole_batches(
    student: str, curvature: str, pieces: int, use: tuple[str, ...]
) -> None:
    whole = unrolled.make_course(student, torch.float64, use=use)
    measure, _ = whole.oracle()
    course = unrolled.make_course(student, torch.float64, use=use, pieces=pieces)
    run = course.unroll(curvature, course.leaves())
    run.backward()
    room = ROOM.get(curvature, 1e-12)
    assert unrolled.relative([run.measure], [measure]) <= 1e-12
    for kind, leaves in whole.metas.items():
        expected = list(torch.autograd.grad(measure, leaves, retain_graph=True))
        assert unrolled.relative(unrolled.gradients(course.metas[kind]), expected) <= room, kind
    assert run.report.curvature_error <= room


@pytest.mark.parametrize("curvature", unrolled.EXACT)
@pytest.mark.parametrize("student", ["cnn", "normaliser"])
def test_buffers_and_random_numbers_go_from_one_micro_batch_to_the_next(student: str, curvature: str) -> None:
    course = unrolled.make_course(student, torch.float64, pieces=2)
    measure, _ = course.oracle()
    course.unroll(curvature, course.leaves()).backward()
    for kind, leaves in course.metas.items():
        expected = list(torch.autograd.grad(measure, leaves, retain_graph=True))
        assert unrolled.relative(unrolled.gradients(leaves), expected) <= 1e-12, kind


@pytest.mark.parametrize("curvatures", [unrolled.SAME_BITS, ("forward",), ("one-sided",)], ids=str)
def test_micro_batches_have_the_same_bits_under_every_schedule(curvatures: tuple[str, ...]) -> None:
    course = unrolled.make_course("cnn", torch.float32, pieces=3)
    found = []
    for curvature in curvatures:
        for plan in ({"schedule": "all"}, *unrolled.PLANS.values()):
            for x in course.leaves():
                x.grad = None
            run = course.unroll(curvature, course.leaves(), along=2, **plan)
            run.backward()
            found.append([run.measure, *run.buffers.values(), *unrolled.gradients(course.leaves())])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("order", "truncate"), [("first", None), ("exact", 2)])
@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_micro_batches_of_a_run_cut_short(order: str, truncate: int | None, curvature: str) -> None:
    course = unrolled.make_course("mlp", torch.float64, use=("loss coefficients", "momentum"), pieces=2)
    measure, _ = course.oracle(order == "first", truncate or unrolled.STEPS)
    course.unroll(curvature, course.leaves(), order=order, truncate=truncate).backward()
    expected = list(torch.autograd.grad(measure, course.leaves()))
    assert unrolled.relative(unrolled.gradients(course.leaves()), expected) <= ROOM.get(curvature, 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_weights_that_some_micro_batches_reach(curvature: str, momentum: float) -> None:
    torch.manual_seed(0)
    student = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("one", "two", "never")}).double()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64)
    optimizer = l2t.optim.SGD(lr=0.1, momentum=momentum)

    def loss(model: Any, batch: str, step: int) -> Tensor:
        return (scale * model[batch](x)).tanh().square().mean() if batch else scale.square()

    def whole(model: Any, batch: Any, step: int) -> Tensor:
        return sum(loss(model, name, step) for name in batch) / 3

    def measure(model: Any) -> Tensor:
        return model["one"](x).square().mean() + model["two"](x).square().mean()

    found = []
    batches = [["one", "two", ""], ["one", "one", ""], ["two", "one", "two"]]
    for function, pieces in ((loss, 3), (whole, 1)):
        scale.grad = None
        way = curvature if pieces > 1 else "reverse"
        l2t.unroll(
            student, batches, function, measure, optimizer=optimizer, accumulate=pieces, curvature=way
        ).backward()
        found.append(float(scale.grad))
    assert found[0] == pytest.approx(found[1], rel=ROOM.get(curvature, 1e-12))


class Ledger:
    """The numbers that autograd has saved and not given back, and the most of them."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, x: Tensor) -> Saved:
        return Saved(x.detach(), self)  # as it is, an output would hold its own graph


class Saved:
    def __init__(self, x: Tensor, ledger: Ledger) -> None:
        self.x, self.ledger = x, ledger
        ledger.now += x.numel()
        ledger.most = max(ledger.most, ledger.now)

    def __del__(self) -> None:
        self.ledger.now -= self.x.numel()


@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}], ids=["all", "every"])
@pytest.mark.parametrize("curvature", [name for name in CURVATURES if name != "forward"])
def test_the_graph_of_one_micro_batch_is_alive_at_a_time(curvature: str, plan: dict[str, Any]) -> None:
    """Forward mode is left out: hooks on saved tensors have no tangents."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    scale = torch.ones((), requires_grad=True)
    x = torch.randn(3, 256, 2)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return scale * model(batch).square().mean()

    most = {}
    for pieces in (1, 16):
        ledger = Ledger()
        batches = x if pieces == 1 else [b.chunk(pieces) for b in x]
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda saved: saved.x):
            run = l2t.unroll(
                student,
                batches,
                loss,
                lambda model: model(x[0, :4]).mean(),
                accumulate=pieces,
                curvature=curvature,
                **plan,
            )
            run.backward()
        del run
        most[pieces] = ledger.most
    if curvature == "reverse":
        assert most[16] > most[1] / 2  # a step's graphs are kept
    else:
        assert most[16] < most[1] / 3


@pytest.mark.parametrize("accumulate", [0, -1, True, 2.0, "2"])
def test_accumulate_is_an_integer(accumulate: object) -> None:
    _, _, run = unrolled.simple()
    with pytest.raises(ValueError, match="accumulate must be an integer of 1 or more"):
        run(accumulate=accumulate)


@pytest.mark.parametrize("preflight", [False, True])
def test_batches_are_sequences_of_micro_batches(preflight: bool) -> None:
    _, _, run = unrolled.simple()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert run(batches=[[x, x]] * 2, accumulate=2, preflight=preflight).report.steps == 2
    for batch in ([x], x, 7):
        with pytest.raises(ValueError, match=r"each of batches must be a sequence of 2 micro-batches"):
            run(batches=[batch] * 2, accumulate=2, preflight=preflight)
