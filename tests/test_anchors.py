"""Weights that the graph of a step alone keeps: the same bits, less memory, and nothing read that is gone."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_unroll import STUDENTS, Course, gradients, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l2t
from l2t import anchors, check

# None of them makes the optimiser's transpose read the weights.
KINDS = ("loss coefficients", "teacher weights", "sample weights", "data", "regulariser", "initial weights")
STEPS = 4


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "LARGE", 0)


@pytest.mark.parametrize("student", list(STUDENTS))
def test_the_same_bits_with_and_without(student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    course = Course(STUDENTS[student](), torch.float32, use=KINDS)
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(anchors, "LARGE", least)
        for plan in (
            {"schedule": "all"},
            {"schedule": "all", "along": 2},
            {"schedule": "every"},
            {"schedule": "binomial", "memory": "100kB"},
        ):
            for x in course.leaves():
                x.grad = None
            run = course.unroll("reverse", course.leaves(), **plan)
            taped = [step.anchored for step in run._tape.values()]
            assert taped
            if least:
                assert not any(taped)
            else:  # but where a measure along the way will ask for the weights
                asked = [plan.get("along") is not None and t % 2 == 0 and t > 0 for t in run._tape]
                assert taped == [not x for x in asked]
            run.backward()
            found.append([run.measure, *gradients(course.leaves()), torch.tensor(run.report.adjoint_norms)])
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_copy_has_the_bits_of_its_weight() -> None:
    weights = [torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, -3.0], dtype=torch.float32)]
    leaves, copies = anchors.anchored(weights)
    assert torch.equal(copies[0].detach().view(torch.int32), weights[0].view(torch.int32))
    assert leaves[0].is_leaf
    assert leaves[0].requires_grad
    assert leaves[0].untyped_storage().nbytes() == 4
    assert torch.autograd.grad(copies[0][5], leaves)[0].tolist() == [0, 0, 0, 0, 0, 1]


def test_which_weights_are_worth_it() -> None:
    assert anchors.large([torch.empty(1 << 18)])
    assert not anchors.large([torch.empty((1 << 18) - 1)])
    assert not anchors.large([torch.empty(1 << 18), torch.empty(1, dtype=torch.complex64)])


@pytest.mark.usefixtures("always")
def test_weights_that_no_derivative_reads_are_freed() -> None:
    torch.manual_seed(0)
    student, x = mlp(), torch.randn(6, 8)
    scale = torch.tensor(1.0, requires_grad=True)
    first: list[weakref.ref[Tensor]] = []

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        first.append(weakref.ref(model[0].weight))
        return scale * model(batch).square().mean()

    run = l2t.unroll(student, [x] * STEPS, loss, lambda model: model(x).mean())
    assert [ref() for ref in first] == [None] * STEPS
    run.backward()
    assert scale.grad is not None


@pytest.mark.usefixtures("always")
def test_a_checkpoint_that_reads_them_again_keeps_them() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.BatchNorm1d(8, affine=False), nn.Linear(8, 7), nn.Dropout(0.3), nn.Linear(7, 3)
    )
    x, target = torch.randn(6, 8), torch.randint(3, (6,))
    scale = torch.tensor(1.0, requires_grad=True)
    found, calls = [], []
    for call in (lambda model: model(x), lambda model: checkpoint(model, x, use_reentrant=False)):
        for plan in ({}, {"schedule": "binomial", "memory": "100kB"}):
            scale.grad = None
            torch.manual_seed(1)
            steps: list[int] = []

            def loss(model: nn.Module, batch: int, step: int) -> Tensor:
                steps.append(step)  # noqa: B023
                return scale * F.cross_entropy(call(model), target)  # noqa: B023

            run = l2t.unroll(
                student,
                range(STEPS),
                loss,
                lambda model: F.cross_entropy(model(x), target),
                **plan,
            )
            calls.append(steps.count(0))
            gone = {step.anchored and step.copies is None for step in run._tape.values()}
            run.backward()
            found.append([run.measure, scale.grad, *run.buffers.values()])
            assert gone == {len(found) <= 2}
    for one, other in (found[:2], found[2:]):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    torch.testing.assert_close(found[2][:2], found[0][:2], rtol=1e-6, atol=0)  # not what a second call counts
    assert calls[0] == calls[2] == 1
    assert int(student[0].num_batches_tracked) == 0


@pytest.mark.usefixtures("always")
def test_a_loss_with_a_checkpoint_is_called_once_a_step() -> None:
    """What it carries from step to step, detached, is then what it is in a loop of one's own."""
    torch.manual_seed(0)
    student, x = mlp(), torch.randn(6, 8)

    def make() -> Any:
        seen: list[float] = []

        def loss(model: nn.Module, batch: int, step: int) -> Tensor:
            value = checkpoint(model, x, use_reentrant=False).square().mean()
            seen.append(float(value.detach()))
            return value * sum(seen)

        return loss

    run = l2t.unroll(
        student, range(STEPS), make(), lambda model: model(x).mean(), optimizer=l2t.optim.SGD(lr=0.1)
    )
    run.backward()
    loss, losses, optimizer = make(), [], torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(STEPS):
        value = loss(student, step, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert run.report.losses == losses


@pytest.mark.parametrize("silenced", [False, True])
def test_a_loss_that_reads_gradients_from_a_later_step_on(
    silenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies have none: the step is begun anew at the weights themselves."""
    torch.manual_seed(0)
    student, x = mlp(), torch.randn(6, 8)
    scale = torch.tensor(1.0, requires_grad=True)

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        value = scale * model(x).square().mean()
        if step >= 2:
            with warnings.catch_warnings():
                if silenced:
                    warnings.simplefilter("ignore")
                value.backward(create_graph=True)
                value = value + sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        return value

    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(anchors, "LARGE", least)
        scale.grad = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            run = l2t.unroll(
                student, range(STEPS), loss, lambda model: model(x).square().mean(), meta=[scale]
            )
            assert [step.anchored for step in run._tape.values()] == [not least] * 2 + [False] * 2
            run.backward()
        found.append((run.report.losses, scale.grad.item()))
    assert found[0] == found[1]


class Reads(torch.autograd.Function):
    """The identity; its second derivative reads a module's weight, as if it ran the module again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Linear, again: bool) -> Tensor:
        ctx.module, ctx.again = module, again
        return x.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        if ctx.again:
            return v * (ctx.module.weight.detach().sum() * 0 + 1), None, None
        return Reads.apply(v, ctx.module, True), None, None


@pytest.mark.usefixtures("always")
def test_who_reads_them_unforeseen_hears_of_it() -> None:
    student, x = mlp(), torch.randn(6, 8)
    scale = torch.tensor(1.0, requires_grad=True)

    def loss(model: Any, batch: int, step: int) -> Tensor:
        return scale * Reads.apply(model(x), model[0], False).square().mean()

    def measure(model: nn.Module) -> Tensor:
        return model(x).mean()

    run = l2t.unroll(student, range(STEPS), loss, measure)
    with pytest.raises(
        check.WeightsGoneError, match=r"must not read the student's weights .* got one that does"
    ):
        run.backward()
    l2t.unroll(student, range(STEPS), loss, measure, curvature="recompute").backward()
    expected = scale.grad.clone()
    scale.grad = None
    l2t.unroll(student, range(STEPS), lambda m, b, t: scale * m(x).square().mean(), measure).backward()
    torch.testing.assert_close(scale.grad, expected)


def test_a_gone_weight_cannot_be_used() -> None:
    (gone,) = anchors.gone([torch.ones(1)])
    for use in (lambda: torch.add(gone, 1), lambda: gone.shape, lambda: F.linear(torch.ones(1, 1), gone)):
        with pytest.raises(check.WeightsGoneError):
            use()


def test_a_budget_counts_what_the_graph_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    student, x = mlp(), torch.randn(6, 8)
    sizes = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(anchors, "LARGE", least)
        plan = l2t.plan(student, [x] * STEPS, lambda model, batch, step: model(batch).square().mean())
        sizes.append(plan.sizes)
    first = student[0].weight
    assert sizes[0].state == sizes[1].state
    assert sizes[1].step - sizes[0].step >= first.nbytes


@pytest.mark.usefixtures("always")
def test_a_budget_counts_weights_that_measures_along_the_way_ask_for() -> None:
    student, x = mlp(), torch.randn(6, 8)
    sizes = [
        l2t.unroll(
            student,
            [x] * STEPS,
            lambda model, batch, step: model(batch).square().mean(),
            lambda model: model(x).mean(),
            memory="1MB",
            along=along,
        ).report.sizes
        for along in (None, 1)
    ]
    assert sizes[1].step - sizes[0].step >= student[0].weight.nbytes
