"""l2t.optim: the steps are torch.optim's to the bit, and the transposes are those that autograd finds.

The oracle of the transposes is autograd through the update as its paper writes it (:data:`PLAIN`), of one
step and of whole runs, in which some weights are not reached in every step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import l2t
from l2t.optim import SGD, Adam, AdamW, FromTorch, Hyper, Optimizer, Point, RMSprop
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


def plain_rmsprop(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    v, *m, b = state
    d = g + at["weight_decay"] * w
    v = at["alpha"] * v + (1 - at["alpha"]) * d**2
    m = [at["alpha"] * x + (1 - at["alpha"]) * d for x in m]
    b = at["momentum"] * b + d / ((v - sum(x**2 for x in m)).sqrt() + at["eps"])
    return w - at["lr"] * b, (v, *m, b)


def plain_rmsprop_at_rest(w: Tensor, state: State, g: Tensor, k: int, at: Values) -> tuple[Tensor, State]:
    w, (*means, _) = plain_rmsprop(w, (*state, torch.zeros_like(w)), g, k, at | {"momentum": 0})
    return w, tuple(means)


def adam_arguments(at: Values) -> Values:
    betas = {"betas": (at["beta1"], at["beta2"])} if "beta1" in at else {}
    return {name: x for name, x in at.items() if name not in {"beta1", "beta2"}} | betas


ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
RMSPROP = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}


class Plain(NamedTuple):
    """An optimiser of ours, of settings and whether ``groups`` and ``clip_norm``; and its oracle."""

    make: Callable[..., Optimizer]
    update: Callable[..., Any]  # as the paper writes it
    kept: int  # how many tensors it keeps
    values: Values
    square: int = -1  # which of these is a mean of squares


PLAIN: dict[str, Plain] = {
    "sgd": Plain(SGD, plain_sgd, 1, {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3}),
    "nesterov": Plain(
        functools.partial(SGD, nesterov=True),
        plain_nesterov,
        1,
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1},
    ),
    "adam": Plain(Adam, plain_adam, 2, ADAM, 1),
    "adamw": Plain(AdamW, plain_adamw, 2, ADAM, 1),
    "rmsprop": Plain(RMSprop, plain_rmsprop_at_rest, 1, RMSPROP, 0),
    "rmsprop momentum": Plain(RMSprop, plain_rmsprop, 2, RMSPROP | {"momentum": 0.7}, 0),
    "rmsprop centered": Plain(
        functools.partial(RMSprop, centered=True), plain_rmsprop, 3, RMSPROP | {"momentum": 0.7}, 0
    ),
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
        (torch.optim.RMSprop, RMSprop, {}),
        (torch.optim.RMSprop, RMSprop, {"lr": 0.02, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.1}),
        (torch.optim.RMSprop, RMSprop, {"lr": 0.02, "momentum": 0.9}),
        (torch.optim.RMSprop, RMSprop, {"lr": 0.02, "momentum": 0.9, "centered": True}),
        (torch.optim.RMSprop, RMSprop, {"alpha": 0.9, "centered": True, "weight_decay": 0.1}),
    ]
}


class Sometimes(nn.Module):
    """One part is not reached in every third step, another one never; one is frozen, and one weight tied."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(2, 2)
        self.frozen, self.tied = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)
        self.tied.weight = self.always.weight

    def forward(self, x: Tensor, step: int) -> Tensor:
        out = self.always(x) + self.tied(self.frozen(x).tanh())
        return out + (self.sometimes(x).tanh() if step % 3 else 0)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
    optimizer = make(student)
    for step, batch in enumerate(batches(dtype)):
        optimizer.zero_grad()
        loss(student, batch, step).backward()
        before_step(student, optimizer, step)
        optimizer.step()
    return trained(student)


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
    expected = trained_by_torch(
        student, dtype, lambda model: theirs(model.parameters(), **given_options, foreach=False)
    )
    assert_trained_to(expected, student, ours())


def test_a_schedule_takes_the_steps_of_torch_optim_to_the_bit() -> None:
    torch.manual_seed(0)
    student = Sometimes()

    def lr_of(step: int) -> float:
        return 0.3 * 0.5**step

    def schedule(student: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = lr_of(step)

    for theirs, ours in (
        (functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9), lambda lr: SGD(lr=lr, momentum=0.9)),
        (torch.optim.Adam, lambda lr: Adam(lr=lr)),
    ):
        make = lambda model, theirs=theirs: theirs(model.parameters())  # noqa: E731
        expected = trained_by_torch(student, torch.float32, make, schedule)
        for lr in (lr_of, lambda step: torch.tensor(lr_of(step), dtype=torch.float64)):
            assert_trained_to(expected, student, ours(lr))


# Settings of two groups in which the options of SAME may differ.
CHANGES: dict[type, list[Values]] = {
    SGD: [{"lr": 0.11, "momentum": 0.5}, {"weight_decay": 0.3}],
    Adam: [{"lr": 0.11, "betas": (0.5, 0.6)}, {"weight_decay": 0.3, "eps": 0.01}],
    AdamW: [{"lr": 0.11, "betas": (0.5, 0.6)}, {"weight_decay": 0.0, "eps": 0.01}],
    RMSprop: [{"lr": 0.11, "momentum": 0.5}, {"weight_decay": 0.3, "centered": True}],
}


@pytest.mark.parametrize("options", list(SAME))
@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_groups_and_clipping_are_those_of_torch_to_the_bit(options: str, clip_norm: float | None) -> None:
    torch.manual_seed(0)
    student = Sometimes()
    theirs, given_options, ours = SAME[options]
    first, second = CHANGES[type(ours())]

    def make(model: nn.Module) -> torch.optim.Optimizer:
        some = [model.sometimes.weight, model.tied.weight]
        biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
        return theirs(
            [{"params": some, **first}, {"params": biases, **second}], **given_options, foreach=False
        )

    norms = []

    def clip(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if clip_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))

    expected = trained_by_torch(student, torch.float32, make, clip)
    assert clip_norm is None or (min(norms) < clip_norm) == (clip_norm == 100) == (max(norms) < clip_norm)
    # A frozen parameter may be named by itself; the tied one goes by any of its names.
    for params in (["sometimes.weight", "tied.we*"], [student.sometimes.weight, *student.tied.parameters()]):
        if params[0] is not student.sometimes.weight:
            groups = [{"params": params, **first}, {"params": "*.bias", **second}]
        else:
            biases = (p for name, p in student.named_parameters() if name.endswith(".bias"))
            groups = [{"params": params[:-1], **first}, {"params": biases, **second}]
        assert_trained_to(
            expected, student, type(ours())(**given_options, groups=groups, clip_norm=clip_norm)
        )


# ---- transposes


def leaves_of(values: Values) -> dict[str, Tensor]:
    return {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in values.items()}


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


@every_rule
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    values=st.lists(numbers, min_size=18, max_size=18),
    scales=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    counts=st.lists(st.integers(0, 3), min_size=2, max_size=2),
)
def test_transposes_and_hypergradients_are_those_of_autograd(
    rule: str, values: list[float], scales: list[float], counts: list[int]
) -> None:
    """Of one step, for two weights that need not have taken equally many before."""
    make, plain, kept, defaults, square = PLAIN[rule]
    leaves = leaves_of(
        {name: x * (0.1 + 0.9 * s) for (name, x), s in zip(defaults.items(), scales, strict=False)}
    )
    table = torch.tensor(values, dtype=torch.float64).view(9, 2)
    # v > 0, and v > m²: zero has its own test. A weight without a step has empty moments.
    large = table[2:5].square().sum(0) + 0.1
    state = [[large if i == square else table[2 + i] for i in range(kept)] for _ in range(2)]
    state = [[x * (count > 0) for x in xs] for xs, count in zip(state, counts, strict=True)]
    inputs = [[x.clone().requires_grad_() for x in (table[0], table[1] + 0.01, *xs)] for xs in state]
    v_after = [[table[5] + i, *(table[6 + j] - i for j in range(kept))] for i in range(2)]
    outputs = []
    for (w, g, *xs), count in zip(inputs, counts, strict=True):
        new_w, new_state = plain(w, tuple(xs), g, count + 1, leaves)
        outputs += [new_w, *new_state]
    flat_inputs = [*inputs[0], *inputs[1], *leaves.values()]
    expected = torch.autograd.grad(outputs, flat_inputs, v_after[0] + v_after[1], materialize_grads=True)

    optimizer = make(**adam_arguments(leaves))
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
        self.initial = [p for name, p in trained(self.student).items() if not name.startswith("never")]
        self.shares: list[float] = []  # by which the oracle has clipped
        self.metas = [self.data, self.sample_weight, *self.initial, *self.settings.values()]

    def loss(self, model: Callable[..., Tensor], batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        each = nn.functional.cross_entropy(model(batch[0], step), batch[1], reduction="none")
        return (self.sample_weight * each).mean()

    def measure(self, model: Callable[..., Tensor]) -> Tensor:
        return model(self.data[0].detach(), 1).square().mean()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.data, self.target, strict=True))

    def oracle(self, update: Callable[..., Any], kept: int, clip_norm: Tensor | None = None) -> list[Tensor]:
        """Measure and gradients by autograd through the whole run; ``update`` knows a weight's values."""
        weights = trained(self.student)
        state = {name: (torch.zeros_like(w),) * kept for name, w in weights.items()}
        counts = dict.fromkeys(weights, 0)

        def model(x: Tensor, step: int) -> Tensor:
            return torch.func.functional_call(self.student, weights, (x, step))

        for step, batch in enumerate(self.batches()):
            value = self.loss(model, batch, step)
            names = list(weights)
            grads = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
            new = dict(weights)
            if clip_norm is not None:
                norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
                share = (clip_norm / (norm + 1e-6)).clamp(max=1)
                self.shares.append(share.item())
                grads = tuple(g if g is None else share * g for g in grads)
            for name, g in zip(names, grads, strict=True):
                if g is not None:
                    counts[name] += 1
                    new[name], state[name] = update(name, weights[name], state[name], g, counts[name])
            weights = new
        measure = self.measure(model)
        return [measure.detach(), *torch.autograd.grad(measure, self.metas)]

    def found(self, optimizer: Optimizer, **way: Any) -> list[Tensor]:
        for x in self.metas:
            x.grad = None
        run = l2t.unroll(
            self.student, self.batches(), self.loss, self.measure,
            optimizer=optimizer, meta=self.metas, **way,
        )  # fmt: skip
        run.backward()
        return [run.measure, *(x.grad for x in self.metas)]


# Curvatures and schedules that give the same bits.
ONE_WAY: list[dict[str, Any]] = [{"curvature": "reverse", "schedule": Segments(1, 1)}]
EVERY_WAY = [
    *ONE_WAY,
    {"curvature": "recompute", "schedule": "all"},
    {"curvature": "recompute", "schedule": "every"},
    {"curvature": "recompute", "schedule": "disk"},
    {"curvature": "recompute", "schedule": "binomial", "memory": "6kB"},
    {"curvature": "reverse", "schedule": "auto", "memory": "6kB"},
]


def assert_agrees(
    task: Task, optimizer: Optimizer, expected: list[Tensor], ways: list[dict[str, Any]] = EVERY_WAY
) -> None:
    """Within 1e-10 of the oracle, and the same bits in each of these ways."""
    first = task.found(optimizer)
    for x, y in zip(first, expected, strict=True):
        assert float((x - y).norm()) <= 1e-10 * float(y.norm()), (x, y)
    for way in ways:
        for x, y in zip(task.found(optimizer, **way), first, strict=True):
            assert torch.equal(x, y), way


@every_rule
@pytest.mark.parametrize("form", ["constant", "by step", "groups", "clipped", "clipped groups"])
def test_every_meta_tensor_agrees_with_autograd_through_the_whole_run(rule: str, form: str) -> None:
    make, plain, kept, values, _ = PLAIN[rule]
    task = Task(values)
    settings, more = task.settings, {}
    others = leaves_of({"lr": values["lr"] / 2, "weight_decay": 0.02}) if "groups" in form else {}
    clip = torch.tensor(0.8, dtype=torch.float64, requires_grad=True) if "clipped" in form else None
    task.metas += [*others.values(), *([] if clip is None else [clip])]

    def update(name: str, w: Tensor, state: State, g: Tensor, k: int) -> tuple[Tensor, State]:
        return plain(w, state, g, k, settings | others if name.startswith("sometimes") else settings)

    expected = task.oracle(update, kept, clip)
    if form == "by step":
        # Constant functions of the step: weights of one step may differ in k, so the oracle needs no step.
        settings = {name: (lambda step, x=x: x * 1) for name, x in settings.items()}
    if others:
        more["groups"] = [{"params": "sometimes.*", **others}]
    if clip is not None:
        assert min(task.shares) < 1 == max(task.shares)
        more["clip_norm"] = clip if others else lambda step: clip * 1
    ways = EVERY_WAY if form == "clipped groups" else ONE_WAY
    assert_agrees(task, make(**adam_arguments(settings), **more), expected, ways)


def assert_slope(task: Task, optimizer: Optimizer, leaf: Tensor) -> None:
    """The gradient to a meta tensor, summed, is a difference of whole runs."""
    grads = task.found(optimizer)[1:]
    slope = next(g for x, g in zip(task.metas, grads, strict=True) if x is leaf).sum()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf += sign * 1e-5
        ends.append(task.found(optimizer)[0])
        with torch.no_grad():
            leaf -= sign * 1e-5
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_norm", "sample_weight", "initial"])
@every_rule
def test_meta_tensors_agree_with_differences_of_whole_runs(rule: str, name: str) -> None:
    make, _, _, values, _ = PLAIN[rule]
    task = Task(values)
    clip = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    others = {"clip_norm": clip, "sample_weight": task.sample_weight, "initial": task.initial[0]}
    task.metas.append(clip)
    optimizer = make(**adam_arguments(task.settings), clip_norm=clip)
    assert_slope(task, optimizer, (task.settings | others)[name])


def test_clipping_at_the_limit_and_of_nothing() -> None:
    """Exactly at the limit: the derivative of a gradient just above it. A gradient of zero passes."""
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    limit = torch.nn.utils.get_total_norm([g]) + 1e-6
    for grad, scale in ((g, 1.0), (g, 1 + 1e-9), (g, 1 - 1e-9), (torch.zeros_like(g), 1.0), (g, 0.0)):
        inputs = [grad.clone().requires_grad_(), (limit * scale).requires_grad_()]
        share = inputs[1] / (torch.linalg.vector_norm(inputs[0]) + 1e-6)
        weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
        kept = torch.where(share <= 1, share, 1.0)  # clamp has another derivative at 1 in torch 2.15
        expected = torch.autograd.grad((kept * inputs[0]) @ weight, inputs)
        optimizer = SGD(1.0, clip_norm=inputs[1]).bound([["w"]], [g])
        point = Point([g], [()], [grad], optimizer.settings()(0), (0,))
        a, found = optimizer.transpose(point, [-weight], [()])
        torch.testing.assert_close([a[0], found[0][1]], list(expected), rtol=1e-12, atol=1e-12)


ROOTED = {
    "adam": functools.partial(Adam, eps=0.1),
    "adamw": functools.partial(AdamW, eps=0.1, weight_decay=0.01),
    "rmsprop": functools.partial(RMSprop, eps=0.1),
    "rmsprop centered": functools.partial(RMSprop, eps=0.1, momentum=0.9, centered=True),
    "torch's adam": lambda lr: FromTorch(torch.optim.Adam, lr=lr, eps=0.1, amsgrad=True),
    "torch's adagrad": lambda lr: FromTorch(torch.optim.Adagrad, lr=lr, eps=0.1),
    "torch's nadam": lambda lr: FromTorch(torch.optim.NAdam, lr=lr, eps=0.1),
}


@pytest.mark.parametrize("kind", list(ROOTED))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_higher_125_torchopt_26_optax_882_no_nan_where_the_second_moment_is_zero(
    kind: str, dtype: torch.dtype
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
            optimizer=ROOTED[kind](0.1),
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
        (
            lambda: AdamW(amsgrad=True),
            ValueError,
            r"amsgrad must be False, got True\. Leave it out, or take l2t\.optim\.FromTorch\(torch",
        ),
        (lambda: RMSprop(alpha=1.0), ValueError, r"l2t\.optim\.RMSprop: alpha must be in \[0, 1\), got 1\.0"),
        (
            lambda: SGD(0.1, clip_norm=-1.0),
            ValueError,
            r"l2t\.optim\.SGD: clip_norm must be finite and not neg",
        ),
        (
            lambda: SGD(0.1, groups=[{"lr": 0.1, "momentum": 0.2}]),
            TypeError,
            r"groups must be a list of dicts with the key 'params', got a dict of 'lr', 'momentum'\. Say",
        ),
        (lambda: SGD(0.1, groups=["*.bias"]), TypeError, "a list of dicts with the key 'params', got str"),
        (lambda: SGD(0.1, groups=1), TypeError, "a list of dicts with the key 'params', got int"),
        (
            lambda: SGD(0.1, groups=[{"params": [1.0]}]),
            TypeError,
            "params of a group must be patterns of names, or parameters, got float",
        ),
        (lambda: SGD(0.1, groups=[{"params": []}]), TypeError, "patterns of names, or parameters, got none"),
        (
            lambda: Adam(groups=[{"params": "*", "momentum": 0.1}]),
            ValueError,
            "settings of a group must be among lr, betas, eps, weight_decay, got 'momentum'",
        ),
        (
            lambda: SGD(0.1, groups=[{"params": "*", "clip_norm": 0.1}]),
            ValueError,
            "settings of a group must be among lr, momentum, .*, got 'clip_norm'",
        ),
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
    ("groups", "sentence"),
    [
        (
            [{"params": "alway.*"}],
            r"params of a group must be among the trained parameters of the student, got 'alway\.\*'\. They "
            r"are always\.weight, always\.bias, sometimes\.weight",
        ),
        ([{"params": "frozen.*"}], r"trained parameters of the student, got 'frozen\.\*'"),
        (
            [{"params": nn.Parameter(torch.ones(2))}],
            r"trained parameters of the student, got one of shape \(2,\), float32",
        ),
        (
            [{"params": "*.bias"}, {"params": ["always.*"]}],
            "a parameter must be in one group at most, got always.bias in groups 1 and 2",
        ),
        ([{"params": "always.*"}, {"params": "tied.*"}], "got always.weight in groups 1 and 2"),
    ],
)
def test_groups_that_do_not_suit_the_student_are_refused_before_the_run(groups: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        l2t.unroll(
            Sometimes(), batches(torch.float32), lambda *_: 1 / 0, len, optimizer=SGD(1.0, groups=groups)
        )


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


def test_a_setting_that_was_computed_before_its_leaf_changed_is_named() -> None:
    log_lr = torch.tensor(-2.0, requires_grad=True)
    outer = torch.optim.SGD([log_lr], 0.1)
    student = nn.Linear(3, 1)
    arguments: list[Any] = [
        student,
        range(3),
        lambda model, batch, step: model(torch.ones(2, 3)).square().mean(),
        lambda model: model(torch.ones(2, 3)).square().mean(),
    ]
    made_once = SGD(lr=log_lr.exp(), groups=[{"params": "bias", "lr": 2 * log_lr.exp()}])
    for _ in range(2):  # as often as one likes
        l2t.unroll(*arguments, optimizer=made_once).backward()
    outer.step()
    with pytest.raises(RuntimeError, match=r"optim\.SGD: lr must be computed anew when"):
        l2t.unroll(*arguments, optimizer=made_once)
    l2t.unroll(*arguments, optimizer=SGD(lr=log_lr.exp())).backward()
    l2t.unroll(*arguments, optimizer=SGD(lr=lambda step: log_lr.exp())).backward()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_a_setting_of_weights_of_two_dtypes_adds_up_in_the_wider_one(half: torch.dtype, first: bool) -> None:
    """Its gradient is near -5e5, which is more than float16 has."""
    lr, decay = torch.tensor(0.1, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    w = [torch.full((64,), 30.0, dtype=half if i == (not first) else torch.float32) for i in range(2)]
    v = [x * 10 for x in w]
    rule = SGD(lr=lr, weight_decay=decay)
    point = Point(w, [()] * 2, [x * 2 for x in w], rule.settings()(0), range(2))
    _, found = rule.transpose(point, [x.clone() for x in v], [()] * 2)
    a = 64 * 2 * 300 * (60 + 0.1 * 30)  # ⟨v, g + λ w⟩
    by_id = {id(x): d for x, d in found}
    assert float(by_id[id(lr)]) == pytest.approx(-a, rel=2e-3)
    assert float(by_id[id(decay)]) == pytest.approx(-0.1 * 64 * 2 * 300 * 30, rel=2e-3)
