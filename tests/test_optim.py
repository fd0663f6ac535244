"""l2t.optim: the steps are torch.optim's to the bit, and the transposes are those that autograd finds."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import l2t
from l2t.optim import SGD, Hyper, Point

SETTINGS = [
    pytest.param(
        {"lr": lr, "momentum": momentum, "weight_decay": decay, "nesterov": nesterov},
        id=f"{momentum}-{decay}-{nesterov}",
    )
    for lr, (momentum, decay, nesterov) in zip(
        itertools.cycle([0.3, 0.07]), itertools.product([0.0, 0.9], [0.0, 0.01], [False, True])
    )
    if momentum or not nesterov
]


class Sometimes(nn.Module):
    """One of its parts is not reached in every third step, another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.always(x) + (self.sometimes(x).tanh() if step % 3 else 0)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0], step), batch[1])


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(5, 4, generator=generator, dtype=dtype), torch.randint(3, (5,), generator=generator))
        for _ in range(8)
    ]


def trained_by_torch(
    student: nn.Module, dtype: torch.dtype, lr_of: Callable[[int], float] | None, **options: float
) -> dict[str, Tensor]:
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), **options)
    for step, batch in enumerate(batches(dtype)):
        if lr_of is not None:
            optimizer.param_groups[0]["lr"] = lr_of(step)
        optimizer.zero_grad()
        loss(student, batch, step).backward()
        optimizer.step()
    return dict(student.named_parameters())


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch_optim_to_the_bit(options: dict[str, float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student = Sometimes().to(dtype)
    expected = trained_by_torch(student, dtype, None, **options)
    run = l2t.unroll(
        student, batches(dtype), loss, lambda model: model.always.bias.sum(), optimizer=SGD(**options)
    )
    assert run.weights.keys() == expected.keys()
    for name, weight in run.weights.items():
        assert torch.equal(weight, expected[name]), name


def test_a_schedule_takes_the_steps_of_torch_optim_to_the_bit() -> None:
    torch.manual_seed(0)
    student = Sometimes()

    def lr_of(step: int) -> float:
        return 0.3 * 0.5**step

    expected = trained_by_torch(student, torch.float32, lr_of, lr=1.0, momentum=0.9)
    for lr in (lr_of, lambda step: torch.tensor(lr_of(step), dtype=torch.float64)):
        run = l2t.unroll(
            student,
            batches(torch.float32),
            loss,
            lambda model: model.always.bias.sum(),
            optimizer=SGD(lr=lr, momentum=0.9),
        )
        for name, weight in run.weights.items():
            assert torch.equal(weight, expected[name]), name


def plain_update(
    w: Tensor, m: Tensor, g: Tensor, lr: Tensor, momentum: Tensor, weight_decay: Tensor, nesterov: bool
) -> tuple[Tensor, Tensor]:
    d = g + weight_decay * w
    m = momentum * m + d
    return w - lr * (d + momentum * m if nesterov else m), m


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    values=st.lists(numbers, min_size=10, max_size=10),
    lr=st.floats(0, 2),
    momentum=st.floats(0.01, 1.5),
    weight_decay=st.floats(0, 2),
    nesterov=st.booleans(),
)
def test_transposes_and_hypergradients_are_those_of_autograd(
    values: list[float], lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    w, m, g, v_w, v_m = (
        x.clone().requires_grad_() for x in torch.tensor(values, dtype=torch.float64).view(5, 2)
    )
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (lr, momentum, weight_decay)]
    wanted = dict(zip(("lr", "momentum", "weight_decay"), leaves, strict=True))
    expected = torch.autograd.grad(plain_update(w, m, g, *leaves, nesterov), [w, m, g, *leaves], [v_w, v_m])

    optimizer = SGD(*leaves, nesterov=nesterov)
    hyper = optimizer.settings()(0)
    assert hyper == Hyper(lr, momentum, weight_decay, wanted)
    with torch.no_grad():
        v_w, v_m = [v_w.detach().clone()], [v_m.detach().clone()]
        a = optimizer.transpose_in(v_w, v_m, hyper)
        d = optimizer.hypergradients(Point([w], [m], [g], hyper), v_w, a)
        optimizer.transpose_out(v_w, v_m, a, hyper)
    found = [v_w[0], v_m[0], a[0], d["lr"], d["momentum"], d["weight_decay"]]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_settings_are_numbers_tensors_or_functions_of_the_step() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    at = SGD(lr=lambda step: rate * 2**-step, momentum=0.9, weight_decay=torch.tensor(0.25)).settings()
    assert at(0)[:3] == (0.5, 0.9, 0.25)
    assert at(2)[:3] == (0.125, 0.9, 0.25)
    assert list(at(2).wanted) == ["lr"]
    constant = SGD(lr=1)
    assert constant.settings()(3) == Hyper(1.0, 0.0, 0.0, {})
    assert constant.start([torch.ones(2)]) is None
    assert torch.equal(SGD(lr=1, momentum=rate).start([torch.ones(2)])[0], torch.zeros(2))


def test_a_function_of_the_step_is_asked_once_a_step_in_order() -> None:
    asked = []
    student = nn.Linear(2, 1)

    def lr(step: int) -> float:
        asked.append(step)
        return 0.1

    for curvature in ("reverse", "recompute"):
        l2t.unroll(
            student,
            [torch.ones(3, 2)] * 4,
            lambda model, batch, step: model(batch).square().mean(),
            lambda model: model.weight.sum(),
            optimizer=SGD(lr=lr),
            curvature=curvature,
        ).backward()
    assert asked == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"lr": -0.1}, ValueError, r"l2t\.optim\.SGD: lr must be finite and not negative, got -0\.1\."),
        ({"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
        ({"lr": 0.1, "momentum": math.inf}, ValueError, "momentum must be finite and not negative, got inf"),
        (
            {"lr": "0.1"},
            TypeError,
            "lr must be a number, a 0-dim floating-point tensor or a function of the step, got str",
        ),
        ({"lr": True}, TypeError, "lr must be a number, .* got bool"),
        (
            {"lr": torch.ones(2)},
            TypeError,
            r"lr must be .* got shape \(2,\), float32 on cpu\. Give one value",
        ),
        ({"lr": torch.tensor(1)}, TypeError, r"lr must be .* got shape \(\), int64 on cpu"),
        ({"lr": 0.1, "weight_decay": None}, TypeError, "weight_decay must be a number, .* got NoneType"),
        ({"lr": 0.1, "nesterov": True}, ValueError, "momentum must be positive with nesterov=True, got 0"),
    ],
)
def test_what_is_no_setting_is_refused(
    arguments: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        SGD(**arguments)


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (-1.0, ValueError, "lr must be finite and not negative, got -1.0 from its function at step 2"),
        (
            torch.ones(1),
            TypeError,
            r"lr must be .* got shape \(1,\), float32 on cpu from its function at step 2",
        ),
    ],
)
def test_what_a_function_of_the_step_returns_is_checked(
    value: object, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        SGD(lr=lambda step: value).settings()(2)


def test_repr_shows_what_it_was_made_of() -> None:
    assert repr(SGD(0.1, 0.9)) == "SGD(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False)"
