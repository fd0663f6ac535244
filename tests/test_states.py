"""States of an unrolled run between steps: whether they come again, and where they are kept meanwhile."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2t
from l2t import schedule
from l2t.states import Fingerprints
from l2t.tape import State, Student

STEPS = 7
BIT_FLIPS = [(0.0, -0.0), (float("nan"), -float("nan")), (1.0, 1 + 2**-52)]


class Net(nn.Module):
    """Layers, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.ones(()))  # the loss does not read it
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.bn(self.fc1(x)).tanh(), 0.2))


@pytest.fixture
def course() -> Callable[..., l2t.Run]:
    """A function that unrolls a student; the loss takes what is given as ``also`` besides."""
    torch.manual_seed(0)
    student, scale = Net().double(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(STEPS, 8, 5, dtype=torch.float64), torch.randint(3, (STEPS, 8))

    def run(
        also: Callable[..., Tensor | float] = lambda model, more, value, step: 0.0, **options: Any
    ) -> l2t.Run:
        torch.manual_seed(1)

        def loss(model: Net, batch: tuple[Tensor, ...], step: int) -> Tensor:
            value = scale * F.cross_entropy(model(batch[0]), batch[1])
            return value + also(model, batch[2], value, step)

        batches = [(a, b, torch.ones(())) for a, b in zip(x, y, strict=True)]
        given = {"optimizer": l2t.optim.SGD(lr=0.1, momentum=0.9)}
        scale.grad = None
        found = l2t.unroll(
            student, batches, loss, lambda model: F.cross_entropy(model(x[0]), y[0]), **(given | options)
        )
        found.scale = scale  # type: ignore[attr-defined]
        return found

    return run


# ---- verify


def hidden_state() -> Callable[..., Tensor]:
    """Adds zero with a gradient that grows from call to call: the value of the loss does not tell."""
    calls = itertools.count()
    return lambda model, more, value, step: next(calls) * (value - value.detach())


def changed_batch(model: Net, more: Tensor, value: Tensor, step: int) -> Tensor:
    """The batch says how steep the loss is, and is changed in place."""
    steepness = float(more.exp_())
    return steepness * (model.fc2.bias.sum() - model.fc2.bias.sum().detach())


def own_numbers() -> Callable[..., float]:
    """A buffer that nothing reads is filled with numbers from elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def also(model: Net, more: Tensor, value: Tensor, step: int) -> float:
        model.calls.fill_(torch.rand((), generator=generator))
        return 0.0

    return also


def touched_weights(model: Net, more: Tensor, value: Tensor, step: int) -> float:
    """A weight that the loss does not read is changed in place."""
    with torch.no_grad():
        model.spare.mul_(1.5)
    return 0.0


@pytest.mark.parametrize("verify", ["first", "all"])
@pytest.mark.parametrize(
    ("also", "options", "state", "tensor"),
    [
        (hidden_state, {"schedule": "every"}, "after step 4", "weights fc1.weight"),
        (lambda: changed_batch, {"schedule": "every"}, "after step 4", "weights fc2.bias"),
        (own_numbers, {"schedule": "every"}, "after step 4", "buffer calls"),
        (own_numbers, {"curvature": "recompute"}, "after step 6", "buffer calls"),
        (own_numbers, {"curvature": "recompute", "schedule": "every"}, "after step 6", "buffer calls"),
        (lambda: touched_weights, {"curvature": "recompute"}, "after step 5", "weights spare"),
    ],
)
def test_a_state_that_does_not_come_again_is_named(
    course: Callable[..., l2t.Run], also: Any, options: dict[str, Any], state: str, tensor: str, verify: str
) -> None:
    run = course(also(), verify=verify, **options)
    with pytest.raises(
        RuntimeError,
        match=rf"the state {state} must be the same when it is reached again, .* one in {tensor}\. Usual",
    ):
        run.backward()


def test_without_verify_a_value_alone_is_compared(course: Callable[..., l2t.Run]) -> None:
    course(hidden_state(), schedule=schedule.Segments(1)).backward()


def test_a_student_changed_before_the_walk_back_is_told(course: Callable[..., l2t.Run]) -> None:
    run = course(schedule=schedule.Segments(1, 0), verify="all")
    with torch.no_grad():
        run._student.module.spare += 1
    with pytest.raises(RuntimeError, match=r"the state before the first step must be .* in weights spare\. "):
        run.backward()


def test_first_looks_at_the_first_steps_taken_again_and_all_at_every_one(
    course: Callable[..., l2t.Run],
) -> None:
    def later(model: Net, more: Tensor, value: Tensor, step: int) -> Tensor | float:
        seen[step] += 1
        return (seen[step] - 1) * (value - value.detach()) if step == 1 else 0.0

    seen = [0] * STEPS
    course(later, schedule="every", verify="first").backward()
    assert seen == [2] * 6 + [1]
    seen = [0] * STEPS
    run = course(later, schedule="every", verify="all")
    with pytest.raises(RuntimeError, match=r"the state after step 1 must be the same"):
        run.backward()


@pytest.mark.parametrize("verify", ["first", "all"])
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward", "central", "one-sided"])
@pytest.mark.parametrize("plan", ["all", "every", schedule.Segments(2, 1)])
def test_a_run_that_comes_again_passes(
    course: Callable[..., l2t.Run], curvature: str, plan: Any, verify: str
) -> None:
    optimizer = l2t.optim.Adam(lr=0.01)
    run = course(curvature=curvature, schedule=plan, verify=verify, optimizer=optimizer, truncate=6)
    run.backward()
    found = run.scale.grad
    course(curvature=curvature, schedule=plan, optimizer=optimizer, truncate=6).backward()
    assert torch.equal(found, run.scale.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("was", "now"), BIT_FLIPS)
def test_every_bit_of_a_state_counts(was: float, now: float, dtype: torch.dtype) -> None:
    student = Student(Net())

    def state(value: float, steps: int = 3) -> State:
        weights = [torch.zeros_like(p) for p in student.parameters]
        numbers = torch.zeros(2, 3, dtype=dtype).t()
        numbers[2, 1] = value
        slots = [(torch.zeros(()), 1) for _ in weights]
        slots[0] = (numbers, steps)
        return State(weights, slots, student.buffers)

    def compared(*states: State) -> None:
        seen = Fingerprints(student, ("momentum",))
        for x in states:
            seen.see(4, x)

    compared(state(was), state(was))
    first = re.escape(student.names[0])
    with pytest.raises(RuntimeError, match=rf"after step 3 .* in momentum of {first}\. "):
        compared(state(was), state(now))
    with pytest.raises(RuntimeError, match=rf"after step 3 .* in optimiser state 1 of {first}\. "):
        compared(state(was), state(was, steps=4))


def test_verify_is_checked(course: Callable[..., l2t.Run]) -> None:
    with pytest.raises(ValueError, match=r"verify must be one of first, all"):
        course(verify="some")
