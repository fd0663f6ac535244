"""l2t.optim: the steps are torch.optim's to the bit, and the transposes are those that autograd finds.

The oracle of the transposes is autograd through the update as its paper writes it (:data:`PLAIN`), of one
step and of whole runs, in which some weights are not reached in every step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import l2t
from l2t.optim import SGD, Adam, AdamW, Hyper, Optimizer, Point
from l2t.schedule import Segments

Values = dict[str, Any]
State = tuple[Tensor, ...]


# ---- the updates as their papers write them: (w, state, g, k, values) -> (w, state), k = 1, 2, ...


def plain_sgd(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g + at["weight_decay"] * w
    share = 1 if k == 1 else 1 - at["dampening"]
    m = at["momentum"] * state[0] + share * d
    return w - at["lr"] * (d + at["momentum"] * m if at.get("nesterov") else m), (m,)


def plain_nesterov(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    return plain_sgd(w, state, g, k, at | {"nesterov": True, "dampening": 0})


def plain_adam(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    d = g if at.get("decoupled") else g + at["weight_decay"] * w
    m = at["beta1"] * state[0] + (1 - at["beta1"]) * d
    v = at["beta2"] * state[1] + (1 - at["beta2"]) * d**2
    m_hat, v_hat = m / (1 - at["beta1"] ** k), v / (1 - at["beta2"] ** k)
    if at.get("decoupled"):
        w = w - at["lr"] * at["weight_decay"] * w
    return w - at["lr"] * m_hat / (v_hat.sqrt() + at["eps"]), (m, v)


def plain_adamw(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    return plain_adam(w, state, g, k, at | {"decoupled": True})


def make_adam(kind: type[Adam], at: Values) -> Adam:
    return kind(at["lr"], (at["beta1"], at["beta2"]), at["eps"], at["weight_decay"])


ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
# Our optimiser, the update as its paper writes it, how many tensors it keeps, and its settings.
PLAIN: dict[str, tuple[Callable[[Values], Optimizer], Callable[..., Any], int, Values]] = {
    "sgd": (
        lambda at: SGD(**at),
        plain_sgd,
        1,
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3},
    ),
    "nesterov": (
        lambda at: SGD(**at, nesterov=True),
        plain_nesterov,
        1,
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1},
    ),
    "adam": (lambda at: make_adam(Adam, at), plain_adam, 2, ADAM),
    "adamw": (lambda at: make_adam(AdamW, at), plain_adamw, 2, ADAM),
}
every_rule = pytest.mark.parametrize("rule", list(PLAIN))

# The options of a torch.optim optimiser and ours; torch's own are the single-tensor ones.
SAME: dict[str, tuple[type[torch.optim.Optimizer], Values, Callable[[], Optimizer]]] = {
    f"{ours.__name__} {options}": (theirs, options, lambda ours=ours, options=options: ours(**options))
    for theirs, ours, options in [
        (torch.optim.SGD, SGD, {"lr": 0.3}),
        (torch.optim.SGD, SGD, {"lr": 0.07, "weight_decay": 0.01}),
        (torch.optim.SGD, SGD, {"lr": 0.3, "momentum": 0.9}),
        (torch.optim.SGD, SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, SGD, {"lr": 0.07, "momentum": 0.9, "weight_decay": 0.01}),
        (torch.optim.SGD, SGD, {"lr": 0.07, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (torch.optim.SGD, SGD, {"lr": 0.07, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.4}),
        (torch.optim.SGD, SGD, {"lr": 0.07, "dampening": 0.4}),
        (torch.optim.Adam, Adam, {}),
        (torch.optim.Adam, Adam, {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-3}),
        (torch.optim.Adam, Adam, {"lr": 0.03, "betas": (0.0, 0.0), "weight_decay": 0.1}),
        (torch.optim.AdamW, AdamW, {}),
        (torch.optim.AdamW, AdamW, {"lr": 0.03, "betas": (0.3, 0.99), "weight_decay": 0.2}),
    ]
}


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
    student: nn.Module,
    dtype: torch.dtype,
    make: Callable[[Any], torch.optim.Optimizer],
    before_step: Callable[[nn.Module, torch.optim.Optimizer, int], Any] = lambda *_: None,
) -> dict[str, Tensor]:
    student = copy.deepcopy(student)
    optimizer = make(student.parameters())
    for step, batch in enumerate(batches(dtype)):
        optimizer.zero_grad()
        loss(student, batch, step).backward()
        before_step(student, optimizer, step)
        optimizer.step()
    return dict(student.named_parameters())


def assert_trained_to(expected: dict[str, Tensor], student: nn.Module, optimizer: Optimizer) -> None:
    dtype = next(student.parameters()).dtype
    run = l2t.unroll(
        student, batches(dtype), loss, lambda model: model.always.bias.sum(), optimizer=optimizer
    )
    assert run.weights.keys() == expected.keys()
    for name, weight in run.weights.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("options", list(SAME))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch_optim_to_the_bit(options: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student = Sometimes().to(dtype)
    theirs, given_options, ours = SAME[options]
    expected = trained_by_torch(student, dtype, lambda ps: theirs(ps, **given_options, foreach=False))
    assert_trained_to(expected, student, ours())


def test_a_schedule_takes_the_steps_of_torch_optim_to_the_bit() -> None:
    torch.manual_seed(0)
    student = Sometimes()

    def lr_of(step: int) -> float:
        return 0.3 * 0.5**step

    def schedule(student: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = lr_of(step)

    for theirs, ours in (
        (lambda ps: torch.optim.SGD(ps, lr=1.0, momentum=0.9), lambda lr: SGD(lr=lr, momentum=0.9)),
        (lambda ps: torch.optim.Adam(ps, foreach=False), lambda lr: Adam(lr=lr)),
    ):
        expected = trained_by_torch(student, torch.float32, theirs, schedule)
        for lr in (lr_of, lambda step: torch.tensor(lr_of(step), dtype=torch.float64)):
            assert_trained_to(expected, student, ours(lr))


# ---- transposes


def leaves_of(values: Values) -> dict[str, Tensor]:
    return {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in values.items()}


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


@every_rule
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    values=st.lists(numbers, min_size=16, max_size=16),
    scales=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    counts=st.lists(st.integers(0, 3), min_size=2, max_size=2),
)
def test_transposes_and_hypergradients_are_those_of_autograd(
    rule: str, values: list[float], scales: list[float], counts: list[int]
) -> None:
    """Of one step, for two weights that need not have taken equally many before."""
    make, plain, kept, defaults = PLAIN[rule]
    leaves = leaves_of(
        {name: x * (0.1 + 0.9 * s) for (name, x), s in zip(defaults.items(), scales, strict=False)}
    )
    table = torch.tensor(values, dtype=torch.float64).view(8, 2)
    # v > 0: zero has its own test. A weight without a step has empty moments.
    state = [[table[2 + i] if i != 1 else table[3].square() + 0.1 for i in range(kept)] for _ in range(2)]
    state = [[x * (count > 0) for x in xs] for xs, count in zip(state, counts, strict=True)]
    inputs = [[x.clone().requires_grad_() for x in (table[0], table[1] + 0.01, *xs)] for xs in state]
    v_after = [[table[5] + i, *(table[6 + j] - i for j in range(kept))] for i in range(2)]
    outputs = []
    for (w, g, *xs), count in zip(inputs, counts, strict=True):
        new_w, new_state = plain(w, tuple(xs), g, count + 1, leaves)
        outputs += [new_w, *new_state]
    flat_inputs = [*inputs[0], *inputs[1], *leaves.values()]
    expected = torch.autograd.grad(outputs, flat_inputs, v_after[0] + v_after[1], materialize_grads=True)

    optimizer = make(leaves)
    hyper = optimizer.settings()(0)
    with torch.no_grad():
        # The constant behind the tensors of a slot, where the rule has one.
        blank = optimizer.start([table[0]])[0]
        constants = [tuple(type(x)(count) for x in blank[kept:]) for count in counts]
        slots = [(*(x.detach() for x in xs[2:]), *c) for xs, c in zip(inputs, constants, strict=True)]
        v_w = [v[0].clone() for v in v_after]
        v_slots = [tuple(x.clone() for x in v[1:]) for v in v_after]
        point = Point(
            [xs[0].detach() for xs in inputs], slots, [xs[1].detach() for xs in inputs], hyper, (0, 1)
        )
        new_w, new_slots = optimizer.update(point)
        found_outputs = [x for w, slot in zip(new_w, new_slots, strict=True) for x in (w, *slot[:kept])]
        a, d = optimizer.transpose(point, v_w, v_slots)
    for x, y in zip(found_outputs, outputs, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-12)
    found = [x for i in range(2) for x in (v_w[i], a[i], *v_slots[i])]
    found += [sum(grad for tensor, grad in d if tensor is leaf) for leaf in leaves.values()]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


# ---- whole runs


class Task:
    """A run of Sometimes; data, sample weights, initial weights and every setting are meta tensors."""

    def __init__(self, values: Values) -> None:
        torch.manual_seed(4)
        self.student = Sometimes().double()
        self.settings = leaves_of(values)
        given_batches = batches(torch.float64)
        self.data = torch.stack([x for x, _ in given_batches]).requires_grad_()
        self.target = torch.stack([y for _, y in given_batches])
        self.sample_weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64).requires_grad_()
        self.initial = [*self.student.always.parameters(), *self.student.sometimes.parameters()]
        self.metas = [self.data, self.sample_weight, *self.initial, *self.settings.values()]

    def loss(self, model: Callable[..., Tensor], batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        each = nn.functional.cross_entropy(model(batch[0], step), batch[1], reduction="none")
        return (self.sample_weight * each).mean()

    def measure(self, model: Callable[..., Tensor]) -> Tensor:
        return model(self.data[0].detach(), 1).square().mean()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.data, self.target, strict=True))

    def oracle(self, update: Callable[..., Any], kept: int) -> list[Tensor]:
        """Measure and gradients by autograd through the whole run; ``update`` knows a weight's values."""
        weights = dict(self.student.named_parameters())
        state = {name: (torch.zeros_like(w),) * kept for name, w in weights.items()}
        counts = dict.fromkeys(weights, 0)

        def model(x: Tensor, step: int) -> Tensor:
            return torch.func.functional_call(self.student, weights, (x, step))

        for step, batch in enumerate(self.batches()):
            value = self.loss(model, batch, step)
            names = list(weights)
            grads = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
            new = dict(weights)
            for name, g in zip(names, grads, strict=True):
                if g is not None:
                    counts[name] += 1
                    new[name], state[name] = update(name, weights[name], state[name], g, counts[name])
            weights = new
        measure = self.measure(model)
        return [measure.detach(), *torch.autograd.grad(measure, self.metas)]

    def found(self, optimizer: Optimizer, curvature: str = "reverse", **plan: Any) -> list[Tensor]:
        for x in self.metas:
            x.grad = None
        run = l2t.unroll(
            self.student, self.batches(), self.loss, self.measure,
            optimizer=optimizer, meta=self.metas, curvature=curvature, **plan,
        )  # fmt: skip
        run.backward()
        return [run.measure, *(x.grad for x in self.metas)]


EXACT = ["reverse", "recompute"]
PLANS: list[dict[str, Any]] = [
    {"schedule": "all"},
    {"schedule": "every"},
    {"schedule": Segments(1, 1)},
    {"schedule": "binomial", "memory": "20kB"},
    {"schedule": "auto", "memory": "20kB"},
]


def assert_agrees(task: Task, optimizer: Optimizer, expected: list[Tensor]) -> None:
    """Within 1e-10 of the oracle, and the same bits by every exact curvature and every schedule."""
    first = task.found(optimizer)
    for x, y in zip(first, expected, strict=True):
        assert float((x - y).norm()) <= 1e-10 * float(y.norm()), (x, y)
    for curvature in EXACT:
        for plan in PLANS:
            for x, y in zip(task.found(optimizer, curvature, **plan), first, strict=True):
                assert torch.equal(x, y), (curvature, plan)


@every_rule
@pytest.mark.parametrize("by_step", [False, True], ids=["constant", "by step"])
def test_every_meta_tensor_agrees_with_autograd_through_the_whole_run(rule: str, by_step: bool) -> None:
    make, plain, kept, values = PLAIN[rule]
    task = Task(values)
    settings = task.settings

    def update(name: str, w: Tensor, state: State, g: Tensor, k: int) -> tuple[Tensor, State]:
        return plain(w, state, g, k, settings)

    expected = task.oracle(update, kept)
    # Constant functions of the step: weights of one step may differ in k, so the oracle needs no step.
    optimizer = make(
        {name: (lambda step, x=x: x * 1) for name, x in settings.items()} if by_step else settings
    )
    assert_agrees(task, optimizer, expected)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_higher_125_torchopt_26_optax_882_no_nan_where_the_second_moment_is_zero(
    kind: type[Adam], dtype: torch.dtype
) -> None:
    """A coordinate without gradient for two steps: the derivative is that of w - η m̂ / (√v̂ + ε) at g = 0,
    by differences of the step itself, of which eps=0.1 makes them smooth enough to see."""
    kept = torch.tensor([1.0, 0.0], dtype=dtype)  # the second coordinate's inputs are zero
    scale = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)

    def run(scale: Tensor) -> l2t.Run:
        student = nn.Linear(2, 1, bias=False).to(dtype)
        nn.init.constant_(student.weight, 0.5)
        return l2t.unroll(
            student,
            [kept + scale] * 3,
            lambda model, batch, step: (model(batch if step == 2 else batch * scale).square()).sum(),
            lambda model: model.weight.sum(),
            optimizer=kind(0.1, eps=0.1, weight_decay=0.01 if kind is AdamW else 0.0),
        )

    result = run(scale)
    result.backward()
    assert result.report.nonfinite is None
    assert bool(scale.grad.isfinite().all())
    assert float(scale.grad[1]) != 0
    if dtype == torch.float64:
        # √v̂ is |g| here, so its part of the difference is of second order in the distance.
        for distance, tolerance in ((1e-5, 1e-3), (1e-7, 1e-5)):
            ends = [
                float(run(scale.detach() + torch.tensor([0.0, d], dtype=dtype)).measure)
                for d in (distance, -distance)
            ]
            assert float(scale.grad[1]) == pytest.approx((ends[0] - ends[1]) / (2 * distance), rel=tolerance)


def test_nothing_passes_through_the_root_of_zero() -> None:
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    adam = Adam(0.1, (0.9, 0.99), eps=0.5)
    point = Point([one], [(zero, zero, 0)], [zero], adam.settings()(0), (0,))
    v_w, v_slots = [one.clone()], [(zero.clone(), zero.clone())]
    a, _ = adam.transpose(point, v_w, v_slots)
    torch.testing.assert_close(a[0], -0.1 * one / 0.5)  # -η (1 - β₁)/((1 - β₁) ε)
    torch.testing.assert_close(v_slots[0][0], 0.9 * -1.0 * one / 0.5)
    assert torch.equal(v_slots[0][1], zero)


def test_settings_are_numbers_tensors_or_functions_of_the_step() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    at = SGD(lr=lambda step: rate * 2**-step, momentum=0.9, weight_decay=torch.tensor(0.25)).settings()
    assert at(0).values == (0.5, 0.9, 0.25, 0.0)
    assert at(2).values == (0.125, 0.9, 0.25, 0.0)
    assert list(at(2).wanted) == ["lr"]
    constant = SGD(lr=1)
    assert constant.settings()(3) == Hyper((1.0, 0.0, 0.0, 0.0), {})
    assert constant.start([torch.ones(2)]) == [()]
    assert torch.equal(SGD(lr=1, momentum=rate).start([torch.ones(2)])[0][0], torch.zeros(2))


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
    ("make", "error", "sentence"),
    [
        (
            lambda: Adam(betas=0.9),
            TypeError,
            r"l2t\.optim\.Adam: betas must be a pair of settings, got float",
        ),
        (
            lambda: AdamW(betas=(0.9, 1.0)),
            ValueError,
            r"l2t\.optim\.AdamW: beta2 must be in \[0, 1\), got 1\.0",
        ),
        (lambda: Adam(betas=(torch.tensor(1.5), 0.9)), ValueError, r"beta1 must be in \[0, 1\), got 1\.5"),
        (lambda: Adam(betas=(lambda step: 2.0, 0.9)).settings()(0), ValueError, r"beta1 must be in \[0, 1\)"),
        (lambda: Adam(eps=-1.0), ValueError, r"l2t\.optim\.Adam: eps must be finite and not negative"),
        (lambda: AdamW(amsgrad=True), ValueError, r"l2t\.optim\.AdamW: amsgrad must be False, got True"),
        (
            lambda: SGD(0.1, 0.9, dampening=0.1, nesterov=True),
            ValueError,
            "dampening must be the number 0 with nesterov=True, got another",
        ),
    ],
)
def test_what_is_no_setting_of_its_optimiser_is_refused(
    make: Callable[[], object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        make()


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
    assert repr(SGD(0.1, 0.9)) == "SGD(lr=0.1, momentum=0.9, weight_decay=0.0, dampening=0.0, nesterov=False)"
