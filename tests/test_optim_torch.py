"""l2t.optim.FromTorch: the steps of every optimiser of torch.optim to the bit, and their derivatives.

The oracle of whole runs is autograd through the updates as their papers and torch's documentation write them
(:data:`PLAIN`); that of options beside these is a difference of whole runs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_optim import (
    Sometimes,
    State,
    Task,
    Values,
    adam_arguments,
    assert_agrees,
    assert_slope,
    assert_trained_to,
    batches,
    loss,
    plain_adam,
    plain_adamw,
    plain_rmsprop,
    plain_sgd,
    trained_by_torch,
)
from torch import Tensor, nn

import l2t
from l2t.optim import Adam, FromTorch, Point

OPTIMISERS = [
    x for x in vars(torch.optim).values() if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)
]
KINDS = {x.__name__: x for x in OPTIMISERS if "differentiable" in inspect.signature(x).parameters}


@pytest.fixture(autouse=True)
def numbers_in_double() -> Iterator[None]:
    """torch.optim counts in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the updates as written: (w, state, g, k, values) -> (w, state), k = 1, 2, ...


def plain_adadelta(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    s, u = state
    d = g + at["weight_decay"] * w
    s = at["rho"] * s + (1 - at["rho"]) * d**2
    change = (u + at["eps"]).sqrt() / (s + at["eps"]).sqrt() * d
    u = at["rho"] * u + (1 - at["rho"]) * change**2
    return w - at["lr"] * change, (s, u)


def plain_adagrad(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g + at["weight_decay"] * w
    s = (at["initial_accumulator_value"] if k == 1 else state[0]) + d**2
    return w - at["lr"] / (1 + (k - 1) * at["lr_decay"]) * d / (s.sqrt() + at["eps"]), (s,)


def plain_adamax(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g + at["weight_decay"] * w
    m = at["beta1"] * state[0] + (1 - at["beta1"]) * d
    u = torch.maximum(at["beta2"] * state[1], d.abs() + at["eps"])
    return w - at["lr"] / (1 - at["beta1"] ** k) * m / u, (m, u)


def plain_asgd(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    rate = at["lr"] / (1 + at["lambd"] * at["lr"] * (k - 1)) ** at["alpha"]
    return w - rate * (at["lambd"] * w + g + at["weight_decay"] * w), ()


def plain_nadam(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g + at["weight_decay"] * w
    mu = [at["beta1"] * (1 - 0.5 * 0.96 ** (i * at["momentum_decay"])) for i in range(1, k + 2)]
    m = at["beta1"] * state[0] + (1 - at["beta1"]) * d
    v = at["beta2"] * state[1] + (1 - at["beta2"]) * d**2
    ahead = mu[-1] * m / (1 - math.prod(mu)) + (1 - mu[-2]) * d / (1 - math.prod(mu[:-1]))
    return w - at["lr"] * ahead / ((v / (1 - at["beta2"] ** k)).sqrt() + at["eps"]), (m, v)


def plain_radam(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g + at["weight_decay"] * w
    m = at["beta1"] * state[0] + (1 - at["beta1"]) * d
    v = at["beta2"] * state[1] + (1 - at["beta2"]) * d**2
    most = 2 / (1 - at["beta2"]) - 1
    length = most - 2 * k * at["beta2"] ** k / (1 - at["beta2"] ** k)
    scale: Any = 1.0
    if length > 5:
        rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        scale = (rectified * (1 - at["beta2"] ** k)).sqrt() / (v.sqrt() + at["eps"])
    return w - at["lr"] * m / (1 - at["beta1"] ** k) * scale, (m, v)


def plain_rprop(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    before, size = state[0], at["lr"] if k == 1 else state[1]
    turned, goes_on = g * before < 0, g * before > 0
    factor = torch.where(turned, at["eta_minus"], torch.where(goes_on, at["eta_plus"], 1.0))
    size = torch.minimum(torch.maximum(size * factor, at["least"]), at["most"])
    g = torch.where(turned, 0.0, g)
    return w - g.sign() * size, (g, size)


def options_of(at: Values) -> Values:
    """The settings as torch.optim takes them: some stand in tuples."""
    at = adam_arguments(at)
    if "least" in at:
        at["etas"] = at.pop("eta_minus"), at.pop("eta_plus")
        at["step_sizes"] = at.pop("least"), at.pop("most")
    return at


MOMENTS = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
# The update, how many tensors it keeps, and its settings.
PLAIN: dict[str, tuple[Callable[..., Any], int, Values]] = {
    "ASGD": (plain_asgd, 0, {"lr": 0.1, "lambd": 0.2, "alpha": 0.75, "weight_decay": 0.1}),
    "Adadelta": (plain_adadelta, 2, {"lr": 1.0, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.1}),
    "Adagrad": (
        plain_adagrad,
        1,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-3},
    ),
    "Adam": (plain_adam, 2, MOMENTS),
    "AdamW": (plain_adamw, 2, MOMENTS),
    "Adamax": (plain_adamax, 2, MOMENTS),
    "NAdam": (plain_nadam, 2, MOMENTS | {"momentum_decay": 0.1}),
    "RAdam": (plain_radam, 2, MOMENTS),
    "RMSprop": (
        plain_rmsprop,
        2,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.7},
    ),
    "Rprop": (
        plain_rprop,
        2,
        {"lr": 0.05, "eta_minus": 0.5, "eta_plus": 1.2, "least": 0.02, "most": 0.07},
    ),
    "SGD": (plain_sgd, 1, {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3}),
}


def test_every_optimiser_of_torch_is_here_or_refused() -> None:
    assert KINDS.keys() == PLAIN.keys()
    refused = {x for x in OPTIMISERS if x.__name__ not in KINDS} - {torch.optim.Optimizer}
    assert {x.__name__ for x in refused} >= {"LBFGS", "Adafactor", "SparseAdam"}
    for kind in refused:
        with pytest.raises(TypeError, match=r"kind must be a class of torch\.optim that has a mode"):
            FromTorch(kind)


@pytest.mark.parametrize("kind", list(PLAIN))
def test_every_meta_tensor_agrees_with_autograd_through_the_whole_run(kind: str) -> None:
    plain, kept, values = PLAIN[kind]
    task = Task(values)

    def update(name: str, w: Tensor, state: State, g: Tensor, k: int) -> tuple[Tensor, State]:
        return plain(w, state, g, k, task.settings)

    expected = task.oracle(update, kept)
    optimizer = FromTorch(KINDS[kind], **options_of(task.settings))
    assert_agrees(task, optimizer, expected)
    for leaf in (task.settings["lr"], task.sample_weight, task.initial[0]):
        assert_slope(task, optimizer, leaf)


# ---- options beside the settings


def variants() -> Iterator[Any]:
    """Each class with its settings as they are, and with each of its switches."""
    for name, kind in KINDS.items():
        switches = [x for x, p in inspect.signature(kind).parameters.items() if isinstance(p.default, bool)]
        for switch in [None, *(x for x in switches if x not in {"differentiable", "capturable"}), "foreach"]:
            yield pytest.param(name, {switch: True} if switch else {}, id=f"{name} {switch}")


def values_of(name: str, switches: Values) -> Values:
    return PLAIN[name][2] | ({"dampening": 0.0} if "nesterov" in switches else {})


@pytest.mark.parametrize(("name", "switches"), list(variants()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch_optim_to_the_bit(name: str, switches: Values, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    student = Sometimes().to(dtype)
    options = options_of(values_of(name, switches)) | switches
    expected = trained_by_torch(student, dtype, lambda model: KINDS[name](model.parameters(), **options))
    assert_trained_to(expected, student, FromTorch(KINDS[name], **options))


class Walk:
    """Six steps of one weight from everything moved by t along a direction, and the way back over them."""

    def __init__(
        self,
        name: str,
        switches: Values,
        shape: tuple[int, ...],
        t: float = 0.0,
        dtype: torch.dtype = torch.float64,
        only: str | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        at, along = (
            [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(7)] for _ in range(2)
        )
        values = values_of(name, switches)
        self.moved = {x: 0.1 * v for x, v in values.items() if v and only in (None, x)}
        self.leaves = {x: torch.tensor(values[x] + t * v, requires_grad=True) for x, v in self.moved.items()}
        self.optimizer = FromTorch(KINDS[name], **options_of(values | self.leaves), **switches)
        w, *grads = ((x + t * d).to(dtype) for x, d in zip(at, along, strict=True))
        self.along = along
        self.points: list[Point] = []
        self.weights, self.slots = [w], self.optimizer.start([w])
        for g in grads:
            hyper = self.optimizer.settings()(0)
            self.points.append(Point(self.weights, self.slots, [g], hyper, (0,)))
            self.weights, self.slots = self.optimizer.update(self.points[-1])

    def end(self) -> float:
        return float(self.weights[0].sum())

    def slope(self) -> float:
        v_w = [torch.ones_like(self.weights[0])]
        v_slots = [tuple(torch.zeros_like(x) for x in self.slots[0] if isinstance(x, Tensor))]
        total = 0.0
        for point, d in zip(reversed(self.points), reversed(self.along[1:]), strict=True):
            a, found = self.optimizer.transpose(point, v_w, v_slots)
            assert a[0].dtype == point.weights[0].dtype
            assert len(found) == len(self.moved)
            total += float((a[0] * d).sum())
            for x, leaf in self.leaves.items():
                total += sum(float(v) * self.moved[x] for y, v in found if y is leaf)
        return total + float((v_w[0] * self.along[0]).sum())


@pytest.mark.parametrize(("name", "switches"), list(variants()))
@pytest.mark.parametrize("shape", [(), (3,)])
def test_transposes_are_differences_of_steps(name: str, switches: Values, shape: tuple[int, ...]) -> None:
    """Along a direction in the space of weights, gradients and settings together."""
    ends = [Walk(name, switches, shape, t).end() for t in (1e-6, -1e-6)]
    slope = Walk(name, switches, shape).slope()
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", list(KINDS))
def test_settings_are_tensors_one_at_a_time(name: str) -> None:
    for setting in Walk(name, {}, (3,)).moved:
        ends = [Walk(name, {}, (3,), t, only=setting).end() for t in (1e-6, -1e-6)]
        slope = Walk(name, {}, (3,), only=setting).slope()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-7), setting


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_less_precision_have_the_same_derivatives(name: str, dtype: torch.dtype) -> None:
    exact = Walk(name, {}, (3,)).slope()
    torch.set_default_dtype(torch.float32)
    walk = Walk(name, {}, (3,), dtype=dtype)
    assert walk.slope() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 0.05)


# ---- beside our own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_and_clipping_give_what_our_own_adam_gives(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    found = []
    for make in (Adam, functools.partial(FromTorch, torch.optim.Adam)):
        torch.manual_seed(0)
        student = Sometimes().to(dtype)
        lr, other, beta, clip = (
            torch.tensor(x, dtype=dtype, requires_grad=True) for x in (0.1, 0.03, 0.7, 0.9)
        )
        groups = [{"params": "*.bias", "lr": lambda step, x=other: x * 0.9**step, "betas": (0.5, 0.9)}]
        optimizer = make(lr=lr, betas=(beta, 0.99), groups=groups, clip_norm=clip)
        run = l2t.unroll(
            student, batches(dtype), loss, lambda model: model.always.weight.square().sum(),
            optimizer=optimizer, schedule="auto", memory=1250 * dtype.itemsize,
        )  # fmt: skip
        run.backward()
        assert run.report.steps_again > 0
        found.append([run.measure, lr.grad, other.grad, beta.grad, clip.grad, run.report.steps_again])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for x, y in zip(*found, strict=True):
        assert float(x) == pytest.approx(float(y), rel=tolerance)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: FromTorch(Adam),
            TypeError,
            r"kind must be a class of torch\.optim .*, got l2t\.optim\.Adam\. Give",
        ),
        (lambda: FromTorch("Adam"), TypeError, r"kind must be a class of torch\.optim .*, got str\. Give"),
        (
            lambda: FromTorch(type("Own", (torch.optim.Adam,), {})),
            TypeError,
            r"kind must be a class of torch\.optim that has a mode differentiable=True, got .*Own\. Give",
        ),
        (
            lambda: FromTorch(torch.optim.NAdam, momentum=0.1),
            TypeError,
            r"l2t\.optim\.FromTorch: options of NAdam must be among lr, betas, .*, got 'momentum'\. Leave",
        ),
        (lambda: FromTorch(torch.optim.NAdam, differentiable=True), TypeError, "got 'differentiable'"),
        (
            lambda: FromTorch(torch.optim.NAdam, groups=[{"params": "*", "momentum": 0.1}]),
            ValueError,
            "settings of a group must be among lr, betas, eps, .*, got 'momentum'",
        ),
        (lambda: FromTorch(torch.optim.NAdam, lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (lambda: FromTorch(torch.optim.NAdam, betas=(torch.tensor(1.5), 0.9)), ValueError, "Invalid beta"),
        (
            lambda: FromTorch(torch.optim.NAdam, betas=(torch.ones(2), 0.9)),
            TypeError,
            r"l2t\.optim\.FromTorch: betas\[0\] must be a number, .* got shape \(2,\)",
        ),
    ],
)
def test_what_is_no_optimiser_of_torch_is_refused(
    make: Callable[[], object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        make()


def test_an_optimiser_of_torch_by_itself_is_told_the_way() -> None:
    student = nn.Linear(2, 1)
    with pytest.raises(
        TypeError, match=r"another one there, or l2t\.optim\.FromTorch\(torch\.optim\.NAdam, lr="
    ):
        l2t.unroll(student, [1], loss, len, optimizer=torch.optim.Adam(student.parameters()))
