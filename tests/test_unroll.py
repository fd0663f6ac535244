"""l2t.unroll against plain autograd through the whole run, and against finite differences of the whole run.

The oracle is a loop of torch.func.functional_call and torch.autograd.grad(create_graph=True): it knows
nothing of adjoints. Each course below is run with every kind of meta tensor at once, and the gradient of each
kind is checked.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import statistics
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import l2t
from l2t import schedule
from l2t.curvature import CURVATURES
from l2t.optim import SGD
from l2t.run import KEEP
from l2t.schedule import Action
from l2t.tape import Adjoint

STEPS, BATCH, CLASSES = 4, 6, 3
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SAME_BITS = ("reverse", "recompute")  # one graph of second order, kept or built again
EXACT = [name for name, curvature in CURVATURES.items() if curvature.exact]
exact_curvatures = pytest.mark.parametrize("curvature", EXACT)


# ---- students


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class Tied(nn.Module):
    """One matrix is the embedding of the input and, transposed, the read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, CLASSES, bias=False)
        self.mix = nn.Linear(CLASSES, 8)
        self.read_out = nn.Linear(8, CLASSES)
        self.read_out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.mix(self.embedding(x)).tanh())


class Normaliser(nn.Module):
    """Two buffers change in forward, and both are used at the next step."""

    assigns = False  # the new value is written into the buffer, or put in its place

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, CLASSES)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
        out = self.layer(x - self.centre / self.calls).tanh()
        centre = 0.5 * self.centre + out.detach().mean() + x.detach().mean(0)
        if self.assigns:
            self.centre = centre
        else:
            with torch.no_grad():
                self.centre.copy_(centre)
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 5, batch_first=True)
        self.read_out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.cell(x.view(-1, 4, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.read_out = nn.Linear(2, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(x.view(-1, 4, 2)).unsqueeze(1).chunk(3, dim=-1)
        return self.read_out(F.scaled_dot_product_attention(query, key, value).squeeze(1).mean(1))


class MathAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x)


class Transformer(nn.Module):
    """A language model's parts: an embedding that is the read-out, too, and an encoder layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inward = nn.Embedding(CLASSES, 4), nn.Linear(2, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True)
        self.read_out = nn.Linear(4, CLASSES, bias=False)
        self.read_out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 2)
        tokens = (x > 0).sum(dim=2)  # 0, 1, 2, beside which the numbers themselves go in
        with sdpa_kernel(SDPBackend.MATH):
            hidden = self.layer(self.embedding(tokens) + self.inward(x))
        return self.read_out(hidden.mean(dim=1))


class UnitRows(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v / torch.linalg.vector_norm(v, dim=1, keepdim=True)


def parametrised() -> nn.Module:
    layer = nn.Linear(8, CLASSES)
    nn.utils.parametrize.register_parametrization(layer, "weight", UnitRows())
    return layer


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5).float(), nn.Linear(5, CLASSES).double()
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.gain * self.first(x.float())).tanh().double())


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "tied": Tied,
    "normaliser": Normaliser,
    "lstm": Recurrent,
    "attention": MathAttention,
    "transformer": Transformer,
    "parametrised": parametrised,
}


# ---- a course with every kind of meta tensor, and the oracle


@dataclass
class Course:
    """A training run in which everything that can be a meta tensor is one."""

    student: nn.Module
    dtype: torch.dtype
    nesterov: bool = False
    use: tuple[str, ...] = ()  # kinds that are leaves; the others are constants of the same value
    pieces: int = 1  # micro-batches a step
    metas: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        self.teacher = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        for p in self.teacher.parameters():
            p.data = randn(*p.shape)
        self.teacher.to(self.dtype)
        self.weight = torch.eye(CLASSES, dtype=self.dtype) + 0.1 * randn(CLASSES, CLASSES)
        self.sample_weight = 1 + 0.1 * randn(STEPS, BATCH)
        self.data = randn(STEPS, BATCH, 8)
        self.target = torch.randint(CLASSES, (STEPS, BATCH), generator=generator)
        self.dev = randn(10, 8), torch.randint(CLASSES, (10,), generator=generator)
        self.strength = torch.tensor(0.05, dtype=self.dtype)
        self.log_lr = torch.tensor(-1.0, dtype=self.dtype)
        self.decay_by_step = torch.linspace(0.02, 0.01, STEPS, dtype=self.dtype)
        self.momentum = torch.tensor(0.8, dtype=self.dtype)
        kinds = {
            "loss coefficients": [self.weight],
            "teacher weights": list(self.teacher.parameters()),
            "sample weights": [self.sample_weight],
            "data": [self.data],
            "regulariser": [self.strength],
            "computed lr": [self.log_lr],
            "weight decay by step": [self.decay_by_step],
            "momentum": [self.momentum],
            "initial weights": [p for p in self.student.parameters() if p.requires_grad],
        }
        for p in self.teacher.parameters():
            p.requires_grad_(False)
        for kind in self.use or kinds:
            self.metas[kind] = kinds[kind]
            for x in kinds[kind]:
                x.requires_grad_()

    def leaves(self) -> list[Tensor]:
        return [x for xs in self.metas.values() for x in xs]

    def loss(self, model: Callable[[Tensor], Tensor], batch: tuple[Any, ...], step: int) -> Tensor:
        rows = batch[2] if len(batch) > 2 else slice(None)
        logits = model(batch[0])
        bias = self.teacher(torch.tensor([step / STEPS, 1.0], dtype=self.dtype))
        u = (self.weight[batch[1]] * logits.log_softmax(dim=1)).sum(dim=1) + bias[batch[1]]
        each = -torch.sigmoid(u) + self.strength * logits.square().sum(dim=1)
        return (self.sample_weight[step, rows] * each).mean()

    def measure(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        logits = model(self.dev[0])
        return F.cross_entropy(logits, self.dev[1]) + self.strength.square() * logits.square().mean()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.data, self.target, strict=True))

    def micro_batches(self) -> list[list[tuple[Any, ...]]]:
        rows = torch.arange(BATCH).chunk(self.pieces)
        return [[(x[i], y[i], i) for i in rows] for x, y in self.batches()]

    def lr(self, step: int) -> Tensor:
        return self.log_lr.exp() * (0.9**step if self.nesterov else 1)

    def unroll(self, curvature: str = "reverse", meta: list[Tensor] | None = None, **plan: Any) -> l2t.Run:
        torch.manual_seed(5)
        return l2t.unroll(
            self.student,
            self.batches() if self.pieces == 1 else self.micro_batches(),
            self.loss,
            self.measure,
            accumulate=self.pieces,
            optimizer=SGD(
                lr=self.lr if self.nesterov else self.lr(0),
                momentum=self.momentum,
                weight_decay=lambda step: self.decay_by_step[step],
                nesterov=self.nesterov,
            ),
            meta=meta,
            curvature=curvature,
            **plan,
        )

    def oracle(
        self,
        first: bool = False,
        truncate: int = STEPS,
        along: dict[int, float] | None = None,
        damping: float = 1.0,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The measure with the graph of the whole run, and the weights before every step and at the end.

        With ``first`` gradients are taken at weights of their own, to which no graph leads; truncated, all
        graphs begin at that step. ``along`` are the weights of measures by steps taken, {STEPS: 1} if none.
        Micro-batches are taken one after another.
        """
        total = torch.zeros((), dtype=self.dtype)
        torch.manual_seed(5)
        weights = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        momentum = {name: torch.zeros_like(p) for name, p in weights.items()}
        buffers = dict(self.student.named_buffers())
        trajectory = [weights]

        def model(x: Tensor) -> Tensor:
            return torch.func.functional_call(self.student, {**at, **buffers}, (x,))

        for step, micro_batches in enumerate(self.micro_batches()):
            if step == STEPS - truncate > 0:
                weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
                momentum = {name: m.detach() for name, m in momentum.items()}
            if damping != 1.0:  # the same numbers, which hand on a share of their gradient

                def damped(state: dict[str, Tensor]) -> dict[str, Tensor]:
                    return {name: damping * x + (1.0 - damping) * x.detach() for name, x in state.items()}

                weights, momentum = damped(weights), damped(momentum)
            at = {name: w.detach().requires_grad_() for name, w in weights.items()} if first else weights
            value = torch.zeros((), dtype=self.dtype)
            for batch in micro_batches:
                # Forward may write into buffers; what autograd has saved of the last step must not change
                # with them.
                buffers = {name: b.clone() for name, b in buffers.items()}
                value = value + self.loss(model, batch, step) / self.pieces
            grads = torch.autograd.grad(value, list(at.values()), create_graph=True)
            for (name, w), g in zip(list(weights.items()), grads, strict=True):
                d = g + self.decay_by_step[step] * w
                momentum[name] = self.momentum * momentum[name] + d
                direction = d + self.momentum * momentum[name] if self.nesterov else momentum[name]
                weights = weights | {name: w - self.lr(step) * direction}
            trajectory.append(weights)
            if step + 1 in (along or {STEPS: 1.0}):
                at, kept = weights, buffers
                buffers = {name: b.clone() for name, b in buffers.items()}
                value = self.measure(model)
                total = total + (along or {STEPS: 1.0})[step + 1] * (
                    value if step + 1 > STEPS - truncate else value.detach()
                )
                buffers = kept
        return total, trajectory


def make_course(student: str, dtype: torch.dtype, **options: Any) -> Course:
    torch.manual_seed(1)
    return Course(STUDENTS[student]().to(dtype), dtype, **options)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    difference = math.hypot(*(float((x.detach().double() - y.detach().double()).norm()) for x, y in pairs))
    return difference / math.hypot(*(float(y.detach().double().norm()) for _, y in pairs))


def gradients(leaves: list[Tensor]) -> list[Tensor]:
    grads = [x.grad for x in leaves]
    assert all(g is not None for g in grads)
    return grads


# ---- agreement


@exact_curvatures
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
@pytest.mark.parametrize("student", list(STUDENTS))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
def test_every_meta_kind_agrees_with_autograd_through_the_whole_run(
    student: str, nesterov: bool, curvature: str, dtype: torch.dtype, tolerance: float
) -> None:
    course = make_course(student, dtype, nesterov=nesterov)
    measure, trajectory = course.oracle()
    run = course.unroll(curvature, course.leaves())
    run.backward()

    assert relative([run.measure], [measure]) <= tolerance
    assert relative(list(run.weights.values()), list(trajectory[-1].values())) <= tolerance
    exact = make_course(student, torch.float64, nesterov=nesterov)
    exact_measure, _ = exact.oracle()
    for kind, leaves in course.metas.items():
        expected = list(torch.autograd.grad(measure, leaves, retain_graph=True))
        allowed = tolerance
        if dtype == torch.float32:
            # Where terms cancel (a single number, such as the learning rate) the oracle itself is further
            # off.
            truth = list(torch.autograd.grad(exact_measure, exact.metas[kind], retain_graph=True))
            allowed = max(tolerance, 8 * relative(expected, truth))
        assert relative(gradients(leaves), expected) <= allowed, kind

    norms = []
    for weights in trajectory:
        grads = torch.autograd.grad(measure, list(weights.values()), retain_graph=True)
        norms.append(math.hypot(*(float(g.norm()) for g in grads)))
    assert run.report.adjoint_norms == pytest.approx(norms, rel=10 * tolerance)


# The normaliser's buffers carry values from step to step that are constants by definition, but not to
# differences.
@pytest.mark.parametrize("student", [name for name in STUDENTS if name != "normaliser"])
def test_every_meta_kind_agrees_with_finite_differences_of_the_whole_run(student: str) -> None:
    course = make_course(student, torch.float64)
    course.unroll(meta=course.leaves()).backward()
    step = 1e-5
    for kind, leaves in course.metas.items():
        generator = torch.Generator().manual_seed(2)
        along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for x, d in zip(leaves, along, strict=True):
                    x += sign * step * d
            ends.append(float(course.unroll().measure))
            with torch.no_grad():
                for x, d in zip(leaves, along, strict=True):
                    x -= sign * step * d
        expected = (ends[0] - ends[1]) / (2 * step)
        found = sum(float((x.grad * d).sum()) for x, d in zip(leaves, along, strict=True))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), kind


PLANS: dict[str, dict[str, Any]] = {
    "every": {"schedule": "every"},
    "start only": {"schedule": schedule.Segments(1, 0)},
    "one slot": {"schedule": schedule.Segments(1, 1)},
    "pairs": {"schedule": schedule.Segments(2, 1)},
    "binomial": {"schedule": "binomial", "memory": "100kB"},
    "auto": {"schedule": "auto", "memory": 50_000},
    "disk": {"schedule": "disk"},
    "disk and pairs": {"schedule": schedule.TwoLevel(3, schedule.Segments(1, 0))},
    "host": {"schedule": schedule.TwoLevel(2, level="host")},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("student", list(STUDENTS))
def test_curvatures_of_second_order_and_schedules_give_the_same_bits(
    student: str, dtype: torch.dtype
) -> None:
    course = make_course(student, dtype)
    found = []
    for curvature in SAME_BITS:
        for plan in ({"schedule": "all"}, *PLANS.values()):
            for x in course.leaves():
                x.grad = None
            run = course.unroll(curvature, course.leaves(), **plan)
            run.backward()
            assert plan["schedule"] == "auto" or (run.report.steps_again > 0) == (plan["schedule"] != "all")
            found.append(
                [
                    run.measure,
                    *run.weights.values(),
                    *run.buffers.values(),
                    *gradients(course.leaves()),
                    torch.tensor(run.report.adjoint_norms),
                ]
            )
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_replayed_step_draws_the_numbers_of_the_step_on_every_device(device: str) -> None:
    torch.manual_seed(0)
    student = cnn().to(device)
    x, scale = torch.randn(STEPS, BATCH, 8, device=device), torch.ones((), device=device, requires_grad=True)
    found = []
    for curvature in SAME_BITS:
        scale.grad = None
        torch.manual_seed(1)
        run = l2t.unroll(
            student,
            x,
            lambda model, batch, step: scale * model(batch).square().mean(),
            lambda model: model(x[0]).mean(),
            curvature=curvature,
        )
        after = torch.rand(2, device=device)
        run.backward()
        found.append([scale.grad, *run.weights.values(), after, torch.rand(2, device=device)])
    assert float(found[0][0]) != 0
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@exact_curvatures
def test_a_run_under_autocast(curvature: str) -> None:
    torch.manual_seed(0)
    student, x, target = mlp(), torch.randn(BATCH, 8), torch.randint(CLASSES, (BATCH,))
    scale = torch.tensor(1.5, requires_grad=True)

    def loss(model: Callable[[Tensor], Tensor], batch: Tensor, step: int) -> Tensor:
        return scale * F.cross_entropy(model(batch), target)

    with torch.autocast("cpu", torch.bfloat16):
        weights = dict(student.named_parameters())
        for _ in range(3):
            value = loss(lambda x: torch.func.functional_call(student, weights, (x,)), x, 0)  # noqa: B023
            grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
            weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        measure = F.cross_entropy(torch.func.functional_call(student, weights, (x,)), target)
        expected = torch.autograd.grad(measure, scale)[0]
        run = l2t.unroll(
            student,
            [x] * 3,
            loss,
            lambda model: F.cross_entropy(model(x), target),
            optimizer=SGD(lr=0.1),
            curvature=curvature,
        )
        run.backward()
    assert all(w.dtype == torch.float32 for w in run.weights.values())
    torch.testing.assert_close(scale.grad, expected, rtol=1e-3, atol=0)


@exact_curvatures
@pytest.mark.parametrize("kind", list(make_course("mlp", torch.float64).metas))
def test_each_kind_alone_is_found_without_being_named(kind: str, curvature: str) -> None:
    course = make_course("mlp", torch.float64, use=(kind,))
    measure, _ = course.oracle()
    expected = torch.autograd.grad(measure, course.leaves())
    own = kind == "initial weights"
    course.unroll(curvature, course.leaves() if own else None).backward()
    assert relative(gradients(course.leaves()), list(expected)) <= 1e-12
    if not own:
        assert all(p.grad is None for p in course.student.parameters())


@exact_curvatures
def test_parameters_of_several_dtypes(curvature: str) -> None:
    torch.manual_seed(0)
    student, x = MixedDtypes(), torch.randn(6, 8, dtype=torch.float64)
    target = torch.randint(CLASSES, (6,))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.3, requires_grad=True)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return scale * F.cross_entropy(model(batch), target)

    weights = dict(student.named_parameters())
    start = list(weights.values())
    for _ in range(3):
        value = loss(lambda x: torch.func.functional_call(student, weights, (x,)), x, 0)  # noqa: B023
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        weights = {n: w - lr * g for (n, w), g in zip(weights.items(), grads, strict=True)}
    measure = torch.func.functional_call(student, weights, (x,)).square().mean()
    expected = torch.autograd.grad(measure, [scale, lr, *start])

    run = l2t.unroll(
        student,
        [x] * 3,
        loss,
        lambda model: model(x).square().mean(),
        optimizer=SGD(lr=lr),
        meta=[scale, lr, *student.parameters()],
        curvature=curvature,
    )
    run.backward()
    for meta, d in zip([scale, lr, *student.parameters()], expected, strict=True):
        assert meta.grad.dtype == meta.dtype
        torch.testing.assert_close(meta.grad, d, rtol=2e-5, atol=1e-7)
    assert len(run.report.adjoint_norms) == 4


@exact_curvatures
def test_the_fused_loss_and_its_definition_teach_alike(curvature: str) -> None:
    torch.manual_seed(0)
    student = mlp().double()
    x, target = torch.randn(STEPS, BATCH, 8, dtype=torch.float64), torch.randint(CLASSES, (STEPS, BATCH))
    weight = torch.eye(CLASSES, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)

    def fused(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        return l2t.dynamic_loss(model(batch[0]), batch[1], weight, bias)

    def written_out(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        u = (weight[batch[1]] * model(batch[0]).log_softmax(1)).sum(1) + bias[batch[1]]
        return -torch.sigmoid(u).mean()

    found = []
    for loss in (fused, written_out):
        weight.grad = bias.grad = None
        run = l2t.unroll(
            student,
            zip(x, target, strict=True),
            loss,
            lambda model: F.cross_entropy(model(x[0]), target[0]),
            curvature=curvature,
        )
        run.backward()
        found.append([weight.grad, bias.grad])
    assert relative(found[0], found[1]) <= 1e-12


@exact_curvatures
def test_students_side_by_side_under_vmap_get_each_its_own_gradient(curvature: str) -> None:
    torch.manual_seed(0)
    students = [mlp().double() for _ in range(3)]
    x, target = (
        torch.randn(STEPS, 3, BATCH, 8, dtype=torch.float64),
        torch.randint(CLASSES, (STEPS, 3, BATCH)),
    )

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stacked, _ = torch.func.stack_module_state(students)
            self.names = list(stacked)
            self.stacked = nn.ParameterList(stacked.values())
            self.base = [copy.deepcopy(students[0]).to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            def one(parameters: list[Tensor], x: Tensor) -> Tensor:
                named = dict(zip(self.names, parameters, strict=True))
                return torch.func.functional_call(self.base[0], named, (x,))

            return torch.func.vmap(one)(list(self.stacked), x)

    weight = torch.eye(CLASSES, dtype=torch.float64).repeat(3, 1, 1).requires_grad_()

    def each(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return l2t.dynamic_loss(logits, target, weight)

    together = l2t.unroll(
        Stacked(),
        zip(x, target, strict=True),
        lambda model, batch, step: torch.func.vmap(each)(model(batch[0]), batch[1], weight).sum(),
        lambda model: model(x[0]).square().mean(dim=(1, 2)),
        curvature=curvature,
    )
    assert together.measure.shape == (3,)
    together.backward()
    for i, student in enumerate(students):
        alone = weight.detach()[i].clone().requires_grad_()
        run = l2t.unroll(
            student,
            zip(x[:, i], target[:, i], strict=True),
            lambda model, batch, step: each(model(batch[0]), batch[1], alone),  # noqa: B023
            lambda model: model(x[0, i]).square().mean(),  # noqa: B023
        )
        run.backward()
        torch.testing.assert_close(weight.grad[i], alone.grad, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(together.measure[i], run.measure, rtol=1e-12, atol=0)


@exact_curvatures
def test_checkpointed_activations_are_those_of_the_step(curvature: str) -> None:
    """torch.func.functional_call gets this wrong: it recomputes when its parameters are gone again."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, CLASSES)
    ).double()
    x, target = torch.randn(BATCH, 8, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (lambda model: model(x), lambda model: checkpoint(model, x, use_reentrant=False)):
        scale.grad = None
        torch.manual_seed(1)
        run = l2t.unroll(
            student,
            range(STEPS),
            lambda model, batch, step: scale * F.cross_entropy(call(model), target),  # noqa: B023
            lambda model: F.cross_entropy(call(model), target),  # noqa: B023
            curvature=curvature,
        )
        run.backward()
        found.append([run.measure, scale.grad])
    assert relative(found[1], found[0]) <= 1e-12
    assert int(student[1].num_batches_tracked) == 0


# ---- what is a meta tensor


def simple(**options: Any) -> tuple[nn.Module, dict[str, Tensor], Callable[..., l2t.Run]]:
    """A linear student, two meta tensors, and a function that unrolls it."""
    torch.manual_seed(0)
    student = nn.Linear(3, 1).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    metas = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in (("scale", 1.5), ("shift", 0.5))
    }

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return (metas["scale"] * model(batch) - metas["shift"]).square().mean()

    def run(**arguments: Any) -> l2t.Run:
        given = {
            "student": student,
            "batches": [x] * 3,
            "loss": loss,
            "measure": lambda model: model(x).square().mean(),
        }
        return l2t.unroll(**(given | {"optimizer": SGD(lr=0.1, momentum=0.5)} | options | arguments))

    return student, metas, run


@exact_curvatures
def test_named_metas_alone_get_a_gradient(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    run().backward()
    expected = metas["scale"].grad.clone()
    metas["scale"].grad = metas["shift"].grad = None
    run(meta=[metas["scale"]]).backward()
    assert torch.equal(metas["scale"].grad, expected)
    assert metas["shift"].grad is None


@exact_curvatures
def test_gradients_add_up_as_in_pytorch(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    run().backward()
    once = metas["scale"].grad.clone()
    run().backward(torch.tensor(2.0))
    torch.testing.assert_close(metas["scale"].grad, 3 * once)


@exact_curvatures
def test_a_meta_tensor_that_is_not_reached_keeps_its_grad(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    idle, busy = (torch.ones(2, requires_grad=True) for _ in range(2))
    busy.grad = torch.full((2,), 7.0)
    run(meta=[*metas.values(), idle, busy]).backward()
    assert idle.grad is None
    assert torch.equal(busy.grad, torch.full((2,), 7.0))


@exact_curvatures
def test_the_student_may_change_between_the_run_and_the_walk_back(curvature: str) -> None:
    student, metas, run = simple(curvature=curvature)
    run().backward()
    expected = metas["scale"].grad
    metas["scale"].grad = None
    result = run()
    nn.init.ones_(student.weight)
    result.backward()
    assert torch.equal(metas["scale"].grad, expected)


@exact_curvatures
def test_a_loss_that_clears_gradients(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    found = []
    for clears in (False, True):
        metas["scale"].grad = None

        def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
            if clears:  # noqa: B023
                model.zero_grad()
            return (metas["scale"] * model(batch) - 1).square().mean()

        run(loss=loss).backward()
        found.append(metas["scale"].grad)
    assert torch.equal(*found)


@exact_curvatures
def test_a_lr_leaf_given_as_it_is(curvature: str) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    _, _, run = simple(curvature=curvature)
    run(optimizer=SGD(lr=lr)).backward()
    with torch.no_grad():
        ends = [float(run(optimizer=SGD(lr=0.1 + d)).measure) for d in (1e-6, -1e-6)]
    assert float(lr.grad) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7)


@exact_curvatures
def test_the_same_tensor_as_meta_and_as_rate(curvature: str) -> None:
    """A tensor that is reached in two ways gets the sum."""
    _, metas, run = simple(curvature=curvature)
    run(optimizer=SGD(lr=metas["shift"])).backward()
    value = metas["shift"].grad.clone()
    ends = []
    for d in (1e-6, -1e-6):
        with torch.no_grad():
            metas["shift"] += d
        ends.append(float(run(optimizer=SGD(lr=metas["shift"])).measure))
        with torch.no_grad():
            metas["shift"] -= d
    assert float(value) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7)


@exact_curvatures
def test_a_graph_shared_by_all_steps_may_be_walked_many_times(curvature: str) -> None:
    student, _, run = simple(curvature=curvature)
    teacher = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    found = []
    for shared in (True, False):
        teacher.zero_grad()
        once = teacher(torch.ones(2, dtype=torch.float64)).squeeze()

        def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
            target = once if shared else teacher(torch.ones(2, dtype=torch.float64)).squeeze()  # noqa: B023
            return (model(batch) - target).square().mean()

        run(
            loss=loss,
            optimizer=SGD(
                lr=once.exp() if shared else teacher(torch.ones(2, dtype=torch.float64)).squeeze().exp()
            ),
        ).backward()
        found.append([p.grad.clone() for p in teacher.parameters()])
    assert relative(found[0], found[1]) <= 1e-12
    assert student.weight.grad is None


@exact_curvatures
def test_initial_weights_are_reached_through_the_run_and_beside_it(curvature: str) -> None:
    """A proximal term on the initial weights: the user's own parameters, as constants or as meta tensors."""
    student, _, run = simple(curvature=curvature)
    start = dict(student.named_parameters())

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        pull = sum((p - start[name]).square().sum() for name, p in model.named_parameters())
        return (model(batch) - 1).square().mean() + 0.1 * pull

    student.weight.grad = torch.full_like(student.weight, 7)
    run(loss=loss).backward()
    assert torch.equal(student.weight.grad, torch.full_like(student.weight, 7))
    assert student.bias.grad is None

    student.zero_grad()
    run(loss=loss, meta=student.parameters()).backward()
    for p in student.parameters():
        ends = []
        for d in (1e-6, -1e-6):
            with torch.no_grad():
                p[0] += d
            ends.append(float(run(loss=loss).measure))
            with torch.no_grad():
                p[0] -= d
        assert float(p.grad[0].sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@exact_curvatures
def test_frozen_parameters_stay_and_are_no_meta_tensors(curvature: str) -> None:
    torch.manual_seed(0)
    student = mlp().double()
    student[0].weight.requires_grad_(False)
    x, scale = (
        torch.randn(BATCH, 8, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64, requires_grad=True),
    )
    run = l2t.unroll(
        student,
        [x] * 3,
        lambda model, batch, step: scale * model(batch).square().mean(),
        lambda model: model(x).mean(),
        curvature=curvature,
    )
    run.backward()
    assert list(run.weights) == ["0.bias", "2.weight", "2.bias"]
    assert scale.grad is not None
    assert student[0].weight.grad is None


# ---- measures


@exact_curvatures
def test_the_cotangent_of_several_measures(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def measures(model: nn.Module) -> Tensor:
        return torch.stack([model(x[0]).square().mean(), model(x[1]).mean()])

    rows = []
    for cotangent in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), None, torch.tensor([2.0, -3.0])):
        metas["scale"].grad = None
        run(measure=measures).backward(cotangent)
        rows.append(metas["scale"].grad)
    torch.testing.assert_close(rows[2], rows[0] + rows[1])
    torch.testing.assert_close(rows[3], 2 * rows[0] - 3 * rows[1])


@exact_curvatures
def test_no_steps_at_all(curvature: str) -> None:
    student, metas, run = simple(curvature=curvature)
    result = run(batches=[], meta=[*metas.values(), student.weight])
    result.backward()
    expected = torch.autograd.grad(result_of(student), student.weight)[0]
    torch.testing.assert_close(student.weight.grad, expected, rtol=1e-13, atol=0)
    assert metas["scale"].grad is None
    assert result.report.steps == 0
    assert result.report.losses == []
    assert len(result.report.adjoint_norms) == 1
    assert torch.equal(result.weights["weight"], student.weight)


def result_of(student: nn.Module) -> Tensor:
    torch.manual_seed(0)
    nn.Linear(3, 1)  # the numbers that simple() draws before its data
    return student(torch.randn(4, 3, dtype=torch.float64)).square().mean()


def test_a_measure_that_reaches_a_meta_tensor_alone() -> None:
    _, metas, run = simple()
    run(measure=lambda model: 2 * metas["shift"]).backward()
    assert float(metas["shift"].grad) == 2
    assert float(metas["scale"].grad) == 0


# ---- steps that do not reach all


@exact_curvatures
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("along", [None, {2: 0.5, 3: -1.0, 4: 2.0}])
def test_weights_that_a_step_does_not_reach(
    curvature: str, momentum: float, along: dict[int, float] | None
) -> None:
    """As torch.optim: no weight decay and no momentum for a parameter whose gradient is None."""
    torch.manual_seed(0)
    student = nn.ModuleDict(
        {"even": nn.Linear(3, 1), "odd": nn.Linear(3, 1), "never": nn.Linear(3, 1)}
    ).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    names = ["scale", "decay", "lr"]
    metas = {
        name: torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for name, v in zip(names, (1.5, 0.1, 0.2), strict=True)
    }

    def outputs(model: Any, batch: Tensor, step: int) -> Tensor:
        return metas["scale"] * model["odd" if step % 2 else "even"](batch) + step

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        if step == 3:
            return metas["scale"].square()  # a step that trains nothing
        return outputs(model, batch, step).square().mean()

    def measure(model: Any) -> Tensor:
        return sum((model[name](x[0]).square().mean() for name in model), torch.zeros(()))

    weights = dict(student.named_parameters())
    m: dict[str, Tensor] = {}

    class Bound(dict[str, Any]):
        def __missing__(self, name: str) -> Callable[[Tensor], Tensor]:
            return lambda batch: F.linear(batch, weights[f"{name}.weight"], weights[f"{name}.bias"])

    model = Bound()
    start, total = list(weights.values()), torch.zeros((), dtype=torch.float64)
    for step, batch in enumerate(x):
        grads = torch.autograd.grad(
            loss(model, batch, step), list(weights.values()), create_graph=True, allow_unused=True
        )
        for (name, w), g in zip(list(weights.items()), grads, strict=True):
            if g is not None:
                d = g + metas["decay"] * w
                m[name] = momentum * m[name] + d if name in m else d
                weights = weights | {name: w - metas["lr"] * m[name]}
        share = (along or {len(x): 1.0}).get(step + 1, 0.0)
        total = total + share * sum(model[name](x[0]).square().mean() for name in student)
    expected = torch.autograd.grad(total, [*metas.values(), *start])

    run = l2t.unroll(
        student,
        x,
        loss,
        measure,
        optimizer=SGD(lr=metas["lr"], momentum=momentum, weight_decay=metas["decay"]),
        meta=[*metas.values(), *student.parameters()],
        curvature=curvature,
        along=along,
    )
    run.backward()
    assert relative([x.grad for x in [*metas.values(), *student.parameters()]], list(expected)) <= 1e-12
    assert torch.equal(run.weights["never.weight"], student["never"].weight)


@exact_curvatures
def test_a_loss_linear_in_the_weights_has_constant_gradients(curvature: str) -> None:
    _, metas, run = simple(curvature=curvature)
    run(loss=lambda model, batch, step: metas["scale"] * model(batch).sum() + model.bias.sum()).backward()
    assert float(metas["scale"].grad) != 0
    assert metas["shift"].grad is None
    run(loss=lambda model, batch, step: model(batch).sum()).backward()  # not even a meta tensor in its graph


class Pull(torch.autograd.Function):
    """⟨x, pull⟩, whose gradient to x is the very tensor ``pull``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pull: Tensor) -> Tensor:
        ctx.save_for_backward(x, pull)
        return (x * pull).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, pull = ctx.saved_tensors
        return pull, grad * x


@exact_curvatures
@pytest.mark.parametrize("constant", ["without a graph", "a leaf"])
def test_a_constant_gradient_beside_one_that_moves(curvature: str, constant: str) -> None:
    """The weight is pulled by a constant, the bias by its own square: the oracle is autograd."""
    student, metas, run = simple(curvature=curvature)
    pull = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=constant == "a leaf")
    lr = 0.1

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        return Pull.apply(model.weight, pull) + (metas["scale"] * model.bias.square() + model.bias).sum()

    def measure(model: Any) -> Tensor:
        return model.weight.square().sum() + model.bias.square().sum()

    w, b = student.weight.detach(), student.bias.detach()
    for _ in range(3):
        w, b = w - lr * pull, b - lr * (2 * metas["scale"] * b + 1)
    leaves = [metas["scale"], *([pull] if pull.requires_grad else [])]
    expected = torch.autograd.grad(w.square().sum() + b.square().sum(), leaves)

    run(loss=loss, measure=measure, optimizer=SGD(lr=lr)).backward()
    assert relative(gradients(leaves), list(expected)) <= 1e-12


# ---- the student and its surroundings are left as they were


def state_of(student: nn.Module) -> list[tuple[int, Tensor]]:
    named = itertools.chain(
        student.named_parameters(remove_duplicate=False), student.named_buffers(remove_duplicate=False)
    )
    return [(id(x), x.detach().clone()) for _, x in named]


def assert_same_state(student: nn.Module, before: list[tuple[int, Tensor]]) -> None:
    for (i, x), (j, y) in zip(state_of(student), before, strict=True):
        assert i == j
        assert torch.equal(x, y)


@exact_curvatures
@pytest.mark.parametrize("name", list(STUDENTS))
def test_the_student_is_as_it_was(name: str, curvature: str) -> None:
    course = make_course(name, torch.float64)
    before = state_of(course.student)
    run = course.unroll(curvature)
    assert_same_state(course.student, before)
    run.backward()
    assert_same_state(course.student, before)
    copy.deepcopy(course.student)
    assert all(p.grad is None for p in course.student.parameters())


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["loss", "measure", "batches", "lr", "backward"])
def test_the_student_is_as_it_was_after_an_exception(place: str, error: BaseException) -> None:
    torch.manual_seed(0)
    student, x, calls = cnn(), torch.randn(BATCH, 8), []
    before = state_of(student)

    def fail(at: str, step: int) -> None:
        if at == place and step == 2:
            raise error

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        out = model(batch)
        calls.append(step)
        fail("loss", step)
        if len(calls) > 3:
            fail("backward", 2)
        return out.square().mean()

    def measure(model: nn.Module) -> Tensor:
        out = model(x).mean()
        fail("measure", 2)
        return out

    def batches() -> Iterator[Tensor]:
        for step in range(3):
            fail("batches", step)
            yield x

    def lr(step: int) -> float:
        fail("lr", step)
        return 0.1

    with pytest.raises(type(error)):
        l2t.unroll(student, batches(), loss, measure, optimizer=SGD(lr=lr), curvature="recompute").backward()
    assert_same_state(student, before)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1)).double()


@pytest.mark.parametrize("plan", [{}, {"curvature": "recompute"}, {"schedule": "every"}])
def test_the_walk_back_leaves_what_the_caller_has_made_of_the_student(plan: dict[str, Any]) -> None:
    """Weights and buffers of the run's end put in by assignment, another dtype, evaluation mode."""

    def assigned(student: nn.Module, run: l2t.Run) -> None:
        student.load_state_dict(run.weights | run.buffers, assign=True)

    found = []
    for change in (lambda *_: None, assigned, lambda student, _: student.eval()):
        student, (_, metas, unroll) = normalised(), simple()
        torch.manual_seed(1)
        run = unroll(student=student, **plan)
        change(student, run)
        before, modes = state_of(student), [part.training for part in student.modules()]
        run.backward()
        assert_same_state(student, before)
        assert [part.training for part in student.modules()] == modes
        found.append(metas["scale"].grad)
    assert all(torch.equal(x, found[0]) for x in found)
    student, (_, _, unroll) = normalised(), simple()
    run = unroll(student=student)
    student.float()
    run.backward()
    assert {x.dtype for x in student.state_dict().values()} == {torch.float32, torch.int64}


class Listed(nn.Module):
    """Reads its parameters from plain attributes, beside its own ones."""

    def __init__(self, holder: Callable[..., Any]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(1))
        self.double()
        self.__dict__["shared"] = self.weight
        self.parts = holder(self.bias)
        self.names = self.__dict__["names"] = ["of itself"]
        self.names.append(self.names)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.parts["inner"] if isinstance(self.parts, dict) else self.parts
        return F.linear(x, self.shared, inner[0])


@pytest.mark.parametrize("holder", [lambda x: [x], lambda x: {"inner": [x]}], ids=["list", "dict"])
def test_parameters_in_plain_attributes_are_those_of_the_step(holder: Callable[..., Any]) -> None:
    _, metas, unroll = simple()
    student, plain = Listed(holder), nn.Linear(3, 1).double()
    nn.init.ones_(plain.weight)
    nn.init.ones_(plain.bias)
    unroll(student=plain).backward()
    expected = metas["scale"].grad
    metas["scale"].grad = None
    unroll(student=student).backward()
    assert torch.equal(metas["scale"].grad, expected)
    assert student.shared is student.weight
    assert any(x is student.bias for x in (student.parts, *student.parts) if isinstance(x, Tensor)) or (
        student.parts["inner"][0] is student.bias
    )
    with pytest.raises(
        ValueError, match=r"places that can be set, got bias in a tuple in parts, which would"
    ):
        unroll(student=Listed(lambda x: (x,)))


@pytest.mark.parametrize("kind", ["prune", "spectral_norm", "weight_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_hooks_of_torch_compute_of_parameters_comes_back(kind: str) -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    if kind == "prune":
        prune.l1_unstructured(student[0], "weight", amount=0.5)
    elif kind == "spectral_norm":
        nn.utils.spectral_norm(student[0])
    else:
        nn.utils.weight_norm(student[0], dim=None)
    _, _, unroll = simple()
    before = student[0].weight
    run = unroll(student=student)
    assert student[0].weight is before
    run.backward()
    assert student[0].weight is before
    student(torch.ones(2, 3, dtype=torch.float64))
    l2t.preflight(student, torch.ones(2, 3, dtype=torch.float64), lambda model, x, step: model(x).mean())


def test_a_large_lstm_keeps_its_own_list_of_weights() -> None:
    student = nn.LSTM(2, 200)
    x = torch.ones(1, 1, 2)
    run = l2t.unroll(
        student, range(2), lambda model, batch, step: model(x)[0].mean(), lambda model: model(x)[0].mean()
    )
    run.backward()
    assert all(x is y for x, y in zip(student._flat_weights, student.parameters(), strict=True))


@pytest.mark.parametrize("plan", [{}, {"curvature": "recompute"}, {"schedule": "every"}])
def test_a_frozen_parameter_that_is_changed_is_named(plan: dict[str, Any]) -> None:
    """A moving average of the student in parameters that require no gradient: steps differed in silence."""

    class Followed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.target = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.target.weight.lerp_(self.line.weight, 0.1)
            return self.line(x) + self.target(x)

    _, _, unroll = simple()
    with pytest.raises(RuntimeError, match=r"stay as they are, got a change of target.weight in place"):
        unroll(student=Followed().double(), **plan)


@exact_curvatures
def test_a_loss_that_asks_for_gradients_of_frozen_parameters(curvature: str) -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    student[0].requires_grad_(False)
    _, metas, unroll = simple(curvature=curvature)
    unroll(student=student).backward()
    expected = metas["scale"].grad
    metas["scale"].grad = None

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        model.requires_grad_(True)
        return (metas["scale"] * model(batch) - metas["shift"]).square().mean()

    unroll(student=student, loss=loss).backward()
    assert torch.equal(metas["scale"].grad, expected)
    assert [p.requires_grad for p in student.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("assigns", [False, True])
def test_buffers_go_from_step_to_step_as_in_training(assigns: bool) -> None:
    torch.manual_seed(0)
    student, x = Normaliser().double(), torch.randn(3, BATCH, 8, dtype=torch.float64)
    student.assigns = assigns
    run = l2t.unroll(
        student, x, lambda model, batch, step: model(batch).square().mean(), lambda model: model(x[0]).mean()
    )
    trained = copy.deepcopy(student)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    for batch in x:
        optimizer.zero_grad()
        trained(batch).square().mean().backward()
        optimizer.step()
    assert run.buffers.keys() == dict(trained.named_buffers()).keys() == {"centre", "calls"}
    assert int(run.buffers["calls"]) == 3
    torch.testing.assert_close(run.buffers["centre"], trained.centre, rtol=1e-14, atol=0)


def test_tied_buffers_stay_tied() -> None:
    class Part(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)

    student = nn.ModuleDict(
        {"line": nn.Linear(2, 1), "one": Part(count := torch.zeros(())), "two": Part(count)}
    )

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        model["one"].count.add_(1)
        assert model["one"].count is model["two"].count
        return model["line"](batch).square().mean() * model["two"].count

    run = l2t.unroll(student, [torch.ones(3, 2)] * 3, loss, lambda model: model["line"].bias.sum())
    assert run.buffers["one.count"] == run.buffers["two.count"] == 3
    assert count == 0


def test_hooks_of_modules_run() -> None:
    torch.manual_seed(0)
    student, seen = mlp(), []
    student[0].register_forward_hook(lambda module, inputs, output: seen.append(module.weight) or 2 * output)
    x = torch.randn(BATCH, 8)
    run = l2t.unroll(
        student,
        [x] * 2,
        lambda model, batch, step: model(batch).square().mean(),
        lambda model: model(x).mean(),
    )
    assert len(seen) == 3
    assert torch.equal(seen[0], student[0].weight)
    assert torch.equal(seen[2], run.weights["0.weight"])


@exact_curvatures
def test_the_course_of_random_numbers_is_that_of_a_plain_loop(curvature: str) -> None:
    """The walk back uses no random number of the caller's, whatever it replays."""
    course = make_course("cnn", torch.float64)
    course.oracle()
    expected = torch.rand(())
    run = course.unroll(curvature)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(()), expected)
    torch.set_rng_state(state)
    run.backward()
    assert torch.equal(torch.rand(()), expected)


def test_generators_and_loaders_are_read_once_in_step_with_the_run() -> None:
    torch.manual_seed(0)
    student, log = nn.Linear(8, 1), []
    data = torch.randn(9, 8)

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            log.append(f"batch {i}")
            yield data[3 * i : 3 * i + 3]

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        log.append(f"step {step}")
        x = batch[0] if isinstance(batch, list) else batch
        return model(x).square().mean()

    found = []
    for source in (
        batches(),
        DataLoader(TensorDataset(data), batch_size=3),
        list(data.split(3)),
        data.view(3, 3, 8),
    ):
        run = l2t.unroll(student, source, loss, lambda model: model(data).mean())
        run.backward()
        assert run.report.steps == 3
        found.append(run.weights["weight"])
    assert log[:6] == ["batch 0", "step 0", "batch 1", "step 1", "batch 2", "step 2"]
    assert all(torch.equal(x, found[0]) for x in found)


def test_grad_mode_of_the_caller_does_not_matter() -> None:
    _, metas, run = simple()
    run().backward()
    expected = metas["scale"].grad.clone()
    metas["scale"].grad = None
    with torch.no_grad():
        run().backward()
        assert not torch.is_grad_enabled()
    assert torch.equal(metas["scale"].grad, expected)
    assert metas["scale"].grad.grad_fn is None


# ---- memory


@pytest.mark.parametrize(("curvature", "kept"), [("reverse", STEPS), ("recompute", 0)])
def test_what_is_kept_and_that_nothing_is_leaked(curvature: str, kept: int) -> None:
    torch.manual_seed(0)
    student, x = mlp(), torch.randn(BATCH, 8)
    scale = torch.tensor(1.0, requires_grad=True)
    activations, leaves, present = [], [], []

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        present.append(sum(ref() is not None for ref in activations))
        hidden = model[1](model[0](batch))
        activations.append(weakref.ref(hidden))
        leaves.append(weakref.ref(model[0].weight))
        return scale * model[2](hidden).square().mean()

    run = l2t.unroll(student, [x] * STEPS, loss, lambda model: model(x).mean(), curvature=curvature)
    assert sum(ref() is not None for ref in activations) == kept
    assert present == (list(range(STEPS)) if kept else [0] * STEPS)
    assert sum(ref() is not None for ref in leaves) == STEPS
    run.backward()
    assert sum(ref() is not None for ref in activations) == 0
    assert sum(ref() is not None for ref in leaves) == 0


def test_a_step_is_freed_as_soon_as_it_is_reversed() -> None:
    torch.manual_seed(0)
    student, x = mlp(), torch.randn(BATCH, 8)
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    class Count(torch.autograd.Function):
        """The identity; its second backward counts the steps that are still remembered."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return Again.apply(grad)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            counts.append(sum(ref() is not None for ref in alive))
            return grad

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        alive.append(weakref.ref(model[0].weight))
        return Count.apply(model(batch)).square().mean()

    l2t.unroll(student, [x] * STEPS, loss, lambda model: model(x).mean(), preflight=False).backward()
    assert counts == list(range(STEPS, 0, -1))


def test_the_trial_of_a_step_for_its_size_leaves_nothing_behind() -> None:
    _, _, run = simple(
        student=mlp(), batches=[torch.randn(4, 8)] * 3, loss=lambda model, x, t: model(x).mean()
    )

    def tensors() -> int:
        run(memory="1MB", measure=lambda model: model[2].bias.sum()).backward()
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    # What a run leaves behind comes with every run; what other tests left may go in between, once.
    counts = [tensors() for _ in range(6)]
    assert statistics.median(b - a for a, b in itertools.pairwise(counts)) == 0, counts


# ---- the report


def test_the_report_of_a_run() -> None:
    course = make_course("mlp", torch.float64)
    losses: list[float] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        value = F.cross_entropy(model(batch[0]), batch[1])
        losses.append(float(value.detach()))
        return course.strength * value

    run = l2t.unroll(course.student, course.batches(), loss, course.measure)
    report = run.report
    assert report.steps == STEPS
    assert report.losses == pytest.approx([0.05 * x for x in losses])
    assert report.adjoint_norms == []
    assert report.seconds_forward > 0
    assert report.seconds_backward is None
    assert "backward=none" in repr(report)
    run.backward()
    assert len(report.adjoint_norms) == STEPS + 1
    assert report.seconds_backward > 0
    assert report.nonfinite is None
    assert repr(report).startswith(f"Report(steps={STEPS}, forward=")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_report_says_where_a_value_is_not_finite(bad: float) -> None:
    _, _, run = simple()

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return model(batch).square().mean() * (bad if step == 1 else 1.0)

    result = run(loss=loss)
    assert result.report.nonfinite == ("loss", 1)
    result.backward()
    assert result.report.nonfinite == ("loss", 1)

    result = run(measure=lambda model: model.bias.sum() * bad)
    assert result.report.nonfinite == ("measure", 3)

    # d√|u|/du at u = 0: a finite loss with an infinite second derivative.
    def rough(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        u = model(batch) if step != 1 else (model(batch) - model(batch).detach())
        return (u.abs() + (0 if step == 1 else 1)).pow(1.5).sum()

    result = run(loss=rough, optimizer=SGD(lr=0.01))
    assert result.report.nonfinite is None
    result.backward()
    assert result.report.nonfinite == ("adjoint", 1)
    assert result.report.nonfinite_tensor == "weight"


@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}], ids=["all", "every"])
@pytest.mark.parametrize("last", [False, True])
def test_the_report_names_the_parameter_with_which_it_began(plan: dict[str, Any], last: bool) -> None:
    """The second step's loss is finite, and so are all gradients of it but that of one parameter."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        zero = model[1].bias - model[1].bias.detach()
        return model(batch).square().mean() + (zero.sum().sqrt() if step == 1 else 0)  # d√x/dx at 0

    run = l2t.unroll(student, [x] * (2 if last else 4), loss, lambda model: model(x).mean(), **plan)
    report = run.report
    assert (report.nonfinite, report.nonfinite_tensor) == (("measure" if last else "loss", 2), "1.bias")
    assert "nonfinite_tensor=1.bias" in repr(report)
    run.backward()
    assert report.nonfinite_tensor == "1.bias"

    run = l2t.unroll(student, [x] * 2, lambda m, b, t: m(b).mean() * math.inf, lambda m: m(x).mean(), **plan)
    assert (run.report.nonfinite, run.report.nonfinite_tensor) == (("loss", 0), None)


def test_the_report_names_the_parameter_whose_adjoint_is_not_finite() -> None:
    torch.manual_seed(0)
    student, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        zero = model[1].weight - model[1].weight.detach()
        return model(batch).square().mean() + (zero.abs().pow(1.5).sum() if step == 1 else 0)

    for measure in (lambda model: model(x).mean(), lambda model: (model[1].weight.sum() * 0).sqrt()):
        run = l2t.unroll(student, [x] * 3, loss, measure)
        assert run.report.nonfinite_tensor is None
        run.backward()
        assert run.report.nonfinite[0] == "adjoint"
        assert run.report.nonfinite_tensor == "1.weight"


# ---- sentences


def script() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(3, 1), torch.ones(1, 3))


def hooked() -> nn.Module:
    module = nn.Linear(3, 1)
    module.weight.register_hook(lambda grad: 0 * grad)
    return module


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 1))


def post_hooked() -> nn.Module:
    module = nn.Linear(3, 1)
    module.bias.register_post_accumulate_grad_hook(lambda p: None)
    return module


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"student": lambda x: x},
            TypeError,
            r"l2t\.unroll: student must be an ordinary torch\.nn\.Module, got function",
        ),
        (
            {"student": script()},
            TypeError,
            "student must be an ordinary torch.nn.Module, got TopLevelTracedModule",
        ),
        (
            {"student": nn.Linear(3, 1).requires_grad_(False)},
            ValueError,
            "student must have a parameter that requires",
        ),
        (
            {"student": nn.LazyLinear(1)},
            ValueError,
            "parameters of student must have a shape, got the uninitialised weight",
        ),
        (
            {"student": nn.Linear(3, 1, dtype=torch.complex64)},
            TypeError,
            r"parameters of student must be real, got weight of shape \(1, 3\), complex64",
        ),
        (
            {"student": hooked()},
            ValueError,
            "parameters of student must have no gradient hooks, got one on weight",
        ),
        (
            {"student": post_hooked()},
            ValueError,
            "parameters of student must have no gradient hooks, got one on bias",
        ),
        (
            {"student": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)))},
            ValueError,
            "operations of student must have right second derivatives, got weight_norm on 0, whose fused",
        ),
        (
            {"student": old_weight_norm()},
            ValueError,
            "operations of student must have right second derivatives, got weight_norm on student, whose",
        ),
        ({"batches": 5}, TypeError, "batches must be an iterable, got int"),
        (
            {"batches": {"x": torch.ones(4, 3)}},
            TypeError,
            r"batches must be one batch a step, got dict, .* Put a single batch in a list: \[batch",
        ),
        ({"batches": torch.tensor(3)}, TypeError, r"batches must be one batch a step, got shape \(\), int64"),
        (
            {"student": nn.Linear(3, 1, device="meta")},
            ValueError,
            "parameters of student must have numbers, got weight on the device meta",
        ),
        (
            {"loss": torch.ones(1)},
            TypeError,
            r"loss must be a function, got shape \(1,\), float32 .* called as loss\(model, batch, st",
        ),
        (
            {"measure": None},
            TypeError,
            r"measure must be a function, got NoneType. It is called as measure\(model\)",
        ),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)},
            TypeError,
            r"optimizer must be one of l2t\.optim, got torch\.optim\.sgd\.SGD",
        ),
        (
            {"meta": torch.ones(2, requires_grad=True)},
            TypeError,
            r"meta must be a list of tensors, got shape \(2,\)",
        ),
        ({"meta": 1.0}, TypeError, "meta must be a list of tensors, got float"),
        ({"meta": [1.0]}, TypeError, "meta must be a list of tensors, got float at position 0"),
        (
            {"meta": iter(())},
            ValueError,
            "meta must hold a tensor, got an empty list or a generator that was used up",
        ),
        ({"meta": [torch.ones(1)]}, ValueError, "at position 0, which does not require a gradient"),
        ({"meta": [torch.ones(1, requires_grad=True) * 2]}, ValueError, "at position 0, which is not a leaf"),
        (
            {"curvature": "Reverse"},
            ValueError,
            "the curvature must be one of reverse, recompute, forward, central, one-sided, got 'Reverse'",
        ),
        (
            {"loss": lambda model, batch, step: model(batch)},
            ValueError,
            r"loss must return a real 0-dim tensor, got shape \(4, 1\), float64 on cpu at step 0",
        ),
        (
            {"loss": lambda model, batch, step: 1.0},
            ValueError,
            "loss must return a real 0-dim tensor, got float at step 0",
        ),
        (
            {"loss": lambda model, batch, step: model(batch).mean().detach()},
            ValueError,
            "loss must return a tensor with a graph, got a detached one at step 0",
        ),
        (
            {"loss": lambda model, batch, step: torch.ones((), requires_grad=True) * 2},
            ValueError,
            "loss must depend on the parameters of the model",
        ),
        (
            {"measure": lambda model: model.weight},
            ValueError,
            r"measure must return a real tensor of shape \(\) or \(S,\), got shape \(1, 3\)",
        ),
        (
            {"measure": lambda model: model.weight.sum().item()},
            ValueError,
            "measure must return a real tensor .* got float",
        ),
        (
            {"measure": lambda model: model.weight.sum().detach()},
            ValueError,
            "measure must return a tensor with a graph, got a detached one",
        ),
    ],
)
def test_what_cannot_be_unrolled_is_refused(
    arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    _, _, run = simple()
    with pytest.raises(error, match=sentence):
        run(**arguments)


def test_weight_norm_is_refused_where_torch_is_wrong_and_nowhere_else() -> None:
    """When PyTorch's fused weight_norm is differentiated rightly this fails, and the refusal can go."""

    def second_derivative_is_right(student: nn.Module) -> bool:
        names = [name for name, _ in student.named_parameters()]
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        leaves = [p.detach().clone().requires_grad_() for p in student.parameters()]

        def call(*p: Tensor) -> Tensor:
            return torch.func.functional_call(student, dict(zip(names, p, strict=True)), (x,))

        return torch.autograd.gradgradcheck(call, leaves, raise_exception=False)

    torch.manual_seed(0)
    refused = []
    for dim in (0, 1, 2, None):
        student = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 2, 2), dim=dim).double()
        try:
            l2t.unroll(student, [], lambda *_: torch.ones(()), lambda model: model.bias.sum())
            refused.append(False)
        except ValueError:
            refused.append(True)
        assert refused[-1] != second_derivative_is_right(student)
    assert refused == [True, False, True, False]


def test_nothing_is_run_before_the_arguments_are_checked() -> None:
    _, _, run = simple()

    def never(*_: object) -> Tensor:
        raise AssertionError("was called")

    for arguments in ({"meta": []}, {"curvature": "none"}, {"optimizer": None}):
        with pytest.raises((TypeError, ValueError), match=r"^l2t\.unroll"):
            run(loss=never, measure=never, **arguments)


def test_a_run_is_walked_back_once() -> None:
    _, _, run = simple()
    result = run()
    result.backward()
    with pytest.raises(RuntimeError, match="backward must be called once a run, got a second call"):
        result.backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_a_call_within_a_transform_is_refused(transform: Callable[..., Any]) -> None:
    _, _, unroll = simple()
    student, x = nn.Linear(3, 1), torch.ones(2, 3)
    for call in (
        lambda lr: unroll(optimizer=SGD(lr=0.1)).measure * lr,
        lambda lr: l2t.preflight(student, x, lambda model, batch, step: model(batch).mean()),
    ):
        at = torch.ones(1 if transform is torch.func.vmap else ())
        with pytest.raises(RuntimeError, match=r"caller must be outside the transforms of torch.func, got a"):
            transform(call)(at)


@pytest.mark.parametrize("along", [None, 1])
@pytest.mark.parametrize("post", [False, True])
def test_a_hook_of_a_leaf_that_is_not_named(post: bool, along: int | None) -> None:
    """A clamp of the whole gradient would be one of what each step adds to it."""
    _, metas, unroll = simple()
    leaf, used = metas["scale"], torch.ones((), dtype=torch.float64, requires_grad=True)
    hooked = leaf if along is None else used
    hook = hooked.register_post_accumulate_grad_hook if post else hooked.register_hook
    handle = hook(lambda x: None)

    def measure(model: nn.Module) -> Tensor:
        return (used * model.weight).sum()

    with pytest.raises(ValueError, match=r"no gradient hooks, got one on that of shape .* name in meta"):
        unroll(measure=measure, along=along)
    unroll(measure=measure, along=along, meta=[metas["shift"]]).backward()
    handle.remove()
    unroll(measure=measure, along=along).backward()


def test_a_loss_that_is_a_parameter_itself() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor(2.0))

    for curvature in CURVATURES:
        lr = torch.tensor(0.25, requires_grad=True)
        run = l2t.unroll(
            Scalar(),
            range(3),
            lambda model, batch, step: model.p,
            lambda model: model.p,
            optimizer=SGD(lr=lr),
            curvature=curvature,
        )
        run.backward()
        assert (float(run.measure), float(lr.grad)) == (1.25, -3.0)


@pytest.mark.parametrize("gradient", [torch.ones(2), 1.0])
def test_a_cotangent_of_another_shape(gradient: object) -> None:
    _, metas, run = simple()
    result = run()
    with pytest.raises(ValueError, match=r"gradient must be a tensor of the measure's shape \(\), got"):
        result.backward(gradient)
    result.backward()  # a refused cotangent does not use the run up
    assert metas["scale"].grad is not None


def test_inference_mode() -> None:
    _, _, run = simple()
    result = run()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"the caller must be outside torch\.inference_mode"):
            run()
        with pytest.raises(RuntimeError, match=r"the caller must be outside torch\.inference_mode"):
            result.backward()
    result.backward()


def test_a_buffer_with_a_graph() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.register_buffer("average", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            self.average = 0.9 * self.average + out.mean()
            return out

    student = nn.Sequential(Averaging())
    with pytest.raises(
        ValueError,
        match=r"buffer 0\.average must be a tensor without a graph after a call of the model, got one with",
    ):
        l2t.unroll(
            student,
            [torch.ones(2, 3)],
            lambda model, batch, step: model(batch).mean(),
            lambda model: model[0].layer.bias.sum(),
        )
    assert student[0].average.grad_fn is None


@exact_curvatures
@pytest.mark.parametrize("named", [False, True], ids=["all", "named"])
def test_a_graph_carried_from_step_to_step(curvature: str, named: bool) -> None:
    """A running loss that is not detached: the state features that a teacher sees, made wrongly."""
    _, metas, run = simple(curvature=curvature)
    average: dict[int, Tensor] = {}

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = (metas["scale"] * model(batch) - average.get(step, 0.0)).square().mean()
        average.setdefault(step + 1, value)
        return value

    result = run(loss=loss, meta=list(metas.values()) if named else None)
    with pytest.raises(
        RuntimeError,
        match=r"loss and measure must reach earlier steps through the model's weights alone",
    ):
        result.backward()
    with pytest.raises(RuntimeError, match="got a second call"):
        result.backward()

    last: list[Tensor] = []
    result = run(
        loss=lambda model, batch, step: last.append(value := model(batch).square().mean()) or value,
        measure=lambda model: model.bias.sum() + last[2],
        meta=list(metas.values()) if named else None,
    )
    with pytest.raises(RuntimeError, match="got a graph that leads into step 2 from a later one"):
        result.backward()


def test_a_loss_that_changes_when_it_is_run_again() -> None:
    _, metas, run = simple(curvature="recompute")
    calls = itertools.count()
    result = run(
        loss=lambda model, batch, step: metas["scale"] * model(batch).square().mean() * (1 + next(calls))
    )
    with pytest.raises(
        RuntimeError,
        match=r"loss must be the same when a step is run again, got .* at step 2",
    ):
        result.backward()

    result = run()
    with torch.no_grad():
        metas["scale"] += 1
    with pytest.raises(RuntimeError, match="change no tensor in place before backward"):
        result.backward()


@exact_curvatures
def test_an_operation_without_a_second_derivative(curvature: str) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(BATCH, 8), torch.randint(CLASSES, (BATCH,))
    run = l2t.unroll(
        Attention(),
        [x] * 2,
        lambda model, batch, step: F.cross_entropy(model(batch), target),
        lambda model: model(x).mean(),
        curvature=curvature,
        preflight=False,
    )
    with pytest.raises(
        RuntimeError,
        match=r"every operation of loss must have a second derivative, .*flash_attention.*SDPBackend\.MATH",
    ) as caught:
        run.backward()
    assert "is not implemented" in str(caught.value.__cause__)


def test_other_errors_of_the_walk_back_are_left_alone() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("out of paper")
            return Broken.apply(grad)

    _, _, run = simple()
    result = run(loss=lambda model, batch, step: Broken.apply(model(batch)).square().mean(), preflight=False)
    with pytest.raises(RuntimeError, match=r"^out of paper$"):
        result.backward()


# ---- the parts


class Play:
    """A plan played on a run whose state is the number of the step."""

    def __init__(self, plan: schedule.Schedule, steps: int) -> None:
        stored, taped, state = set(), set(), 0
        self.reversed: list[int] = []
        self.slots = self.tapes = self.forwards = 0
        for action, step in plan.actions(steps):
            if action in KEEP:
                assert state == step
                stored.add(step)
            elif action is Action.FORWARD:
                assert state == step
                state += 1
                self.forwards += 1
            elif action is Action.TAPE:
                assert state == step
                state += 1
                taped.add(step)
            elif action is Action.RESTORE:
                assert step in stored or step == 0
                state = step
            elif action is Action.REVERSE:
                taped.remove(step)
                self.reversed.append(step)
            else:
                assert action is Action.DROP
                stored.remove(step)
            self.slots, self.tapes = max(self.slots, len(stored)), max(self.tapes, len(taped))
        assert not stored
        assert not taped


@functools.cache
def fewest_forwards(count: int, slots: int) -> int:
    """By trying every place for the next state."""
    if count < 2:
        return 0
    if slots == 0:
        return count * (count - 1) // 2
    return min(m + fewest_forwards(count - m, slots - 1) + fewest_forwards(m, slots) for m in range(1, count))


@given(steps=st.integers(0, 60), length=st.integers(1, 9), slots=st.none() | st.integers(0, 8))
def test_a_plan_reverses_every_step_once_from_its_own_state(
    steps: int, length: int, slots: int | None
) -> None:
    inner = schedule.Segments(1, slots)
    outer = schedule.TwoLevel(length, inner), schedule.TwoLevel(2 * length, schedule.TwoLevel(2), "host")
    for plan in (schedule.StoreAll(), schedule.Segments(length, slots), *outer):
        assert Play(plan, steps).reversed == list(reversed(range(steps)))
    played = Play(schedule.Segments(length, slots), steps)
    assert played.tapes <= length
    assert slots is None or played.slots <= slots
    if slots is None:
        assert played.forwards == max(-(-steps // length) - 1, 0) * length


@pytest.mark.parametrize("slots", range(7))
def test_no_plan_takes_fewer_steps_again(slots: int) -> None:
    """The closed form, the plan and the best over all plans of the kind are one number."""
    for steps in range(40):
        plan = schedule.Segments(1, slots)
        assert plan.forward_steps(steps) == Play(plan, steps).forwards == fewest_forwards(steps, slots)


@settings(deadline=None)
@given(steps=st.integers(1, 40), state=st.integers(1, 9), step=st.integers(1, 9), memory=st.integers(1, 200))
def test_the_fitted_plan_is_the_best_that_fits(steps: int, state: int, step: int, memory: int) -> None:
    if memory < min(steps * step, state + step):
        with pytest.raises(ValueError, match="memory must hold one step of the run"):
            schedule.fit(steps, state, step, memory)
        return
    plan = schedule.fit(steps, state, step, memory)
    played = Play(plan.schedule, steps)
    first = 0 if steps * step <= memory else state  # the state before the first step, if it is needed again
    assert first + played.slots * state + played.tapes * step <= plan.bytes <= memory
    assert played.forwards <= plan.forward_steps
    for length in range(1, min(steps, memory // step) + 1):
        segments = -(-steps // length)
        slots = (memory - first - length * step) // state
        if slots < 0:
            continue
        assert plan.forward_steps <= fewest_forwards(segments, min(slots, segments)) * length


def test_a_plan_of_a_long_run_is_made_at_once() -> None:
    plan = schedule.fit(100_000, state_bytes=3_200_000, step_bytes=2_100_000, memory=64_000_000)
    assert plan.forward_steps < 5 * 100_000
    assert Play(plan.schedule, 10_000).reversed[-1] == 0
    # Large batches of a small student: thousands of states fit, which were as many calls inside each other.
    plan = schedule.fit(10_000, state_bytes=1_000, step_bytes=10_000_000, memory=64_000_000)
    assert plan.schedule.slots > 1_500
    assert schedule.tally(plan.schedule, 10_000, 1, 1).steps_again < 10_000
    assert schedule.playable(schedule.Segments(), 3_000)


def test_a_student_of_no_numbers_has_states_of_no_bytes() -> None:
    student, x = nn.Linear(0, 1, bias=False, dtype=torch.float64), torch.ones(2, 0, dtype=torch.float64)
    run = l2t.unroll(
        student,
        range(3),
        lambda model, batch, step: model(x).sum(),
        lambda model: model(x).sum(),
        schedule="binomial",
        memory=1000,
    )
    run.backward()
    assert run.report.steps == 3


def test_a_schedule_and_its_memory_are_checked() -> None:
    _, _, run = simple()
    for wrong in ("some", 3, None, schedule.Segments):
        with pytest.raises(
            ValueError, match=r"schedule must be one of auto, all, every, binomial, disk or an object"
        ):
            run(schedule=wrong)
    for wrong in ("64", "64XB", "1.2.3MB", -5, 0, True, 2.5):
        with pytest.raises(ValueError, match=r"memory must be a number of bytes or a text such as '64MB'"):
            run(memory=wrong)
    with pytest.raises(ValueError, match=r"memory must be given with schedule='binomial', got None"):
        run(schedule="binomial")
    for wrong in ("all", "every", schedule.Segments(2)):
        with pytest.raises(
            ValueError, match=r"memory must be None with schedule=.*, which does not go by it"
        ):
            run(schedule=wrong, memory="64MB")
    for name in ("binomial", "auto", "disk"):
        with pytest.raises(ValueError, match=r"memory must hold one step of the run, \d+ bytes here, got 10"):
            run(schedule=name, memory=10)
    for good in ("100kB", "0.1MiB", "1GB", " 2 TB", 10**6):
        assert run(memory=good).report.steps


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_of_none_or_one_step_under_every_schedule(plan: dict[str, Any], steps: int) -> None:
    student, scale = mlp(), torch.ones((), requires_grad=True)
    run = l2t.unroll(
        student,
        torch.randn(steps, 2, 8),
        lambda model, batch, step: scale * model(batch).square().mean(),
        lambda model: sum(p.square().sum() for p in model.parameters()),
        **plan,
    )
    run.backward()
    assert (scale.grad is not None) == bool(steps)
    assert run.report.steps_again == 0


@pytest.mark.parametrize("plan", [{"schedule": "all"}, *PLANS.values()], ids=["all", *PLANS])
def test_a_rate_by_step_is_asked_once_a_step(plan: dict[str, Any]) -> None:
    asked: list[int] = []

    def lr(step: int) -> float:
        asked.append(step)
        return 0.1

    _, _, run = simple(optimizer=SGD(lr=lr, momentum=0.5))
    run(**plan).backward()
    assert asked == [0, 1, 2]


class Counted(list):
    """Batches that count how often each is read."""

    def __init__(self, batches: Any) -> None:
        super().__init__(batches)
        self.read = [0] * len(self)

    def __getitem__(self, index: Any) -> Any:
        self.read[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("kind", ["indexed", "generator"])
def test_batches_are_read_again_or_kept(kind: str) -> None:
    data = Counted(torch.randn(9, 2, 8))
    scale = torch.ones((), requires_grad=True)
    l2t.unroll(
        mlp(),
        data if kind == "indexed" else (x for x in list(data)),
        lambda model, batch, step: scale * model(batch).square().mean(),
        lambda model: sum(p.square().sum() for p in model.parameters()),
        schedule="every",
    ).backward()
    assert data.read == ([2] * 6 + [1] * 3 if kind == "indexed" else [0] * 9)


def test_a_step_that_does_not_come_again_is_told() -> None:
    _, _, run = simple()
    noise = iter(range(1000))
    result = run(
        loss=lambda model, batch, step: model(batch).square().mean() * (1 + next(noise)), schedule="every"
    )
    with pytest.raises(RuntimeError, match="loss must be the same when a step is run again"):
        result.backward()


def test_sizes_of_a_plan_are_checked() -> None:
    with pytest.raises(ValueError, match=r"length must be an integer of 1 or more, got 0"):
        schedule.Segments(0)
    with pytest.raises(ValueError, match=r"slots must be an integer of 0 or more, got -1"):
        schedule.Segments(1, -1)


def test_an_adjoint_is_cut_into_the_shapes_of_the_weights() -> None:
    weights = [
        torch.zeros(2, 3),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.zeros(4, 2).t(),
    ]
    adjoint = Adjoint(weights)
    assert [x.shape for x in adjoint.parts] == [w.shape for w in weights]
    assert [x.dtype for x in adjoint.parts] == [w.dtype for w in weights]
    assert len(adjoint.norm()) == 2
    for i, part in enumerate(adjoint.parts):
        part.fill_(i + 1)
    assert math.hypot(*(float(x) for x in adjoint.norm())) == pytest.approx(math.sqrt(6 + 3 * 4 + 9 + 8 * 25))


# ---- an adjoint that grows


def explosive(
    students: int, rate: float = 3.0
) -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """Students side by side at a rate far too high, and the weights of their losses by step."""
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:students]
    stack = l2t.Stack(lambda: nn.Linear(4, 1, dtype=torch.float64), range(students))
    weight = torch.ones(students, 12, dtype=torch.float64, requires_grad=True)

    def loss(model: Any, batch: Any, step: int) -> Tensor:
        return (rate * weight[:, step] * torch.cos(model(x)[..., 0]).mean(1)).sum()

    def measure(model: Any) -> Tensor:
        return model(x).square().mean((1, 2))

    return stack, loss, measure, weight


@pytest.mark.parametrize("curvature", ["reverse", "recompute", "central"])
@pytest.mark.parametrize(
    "optimizer", [l2t.optim.SGD(lr=1.0, momentum=0.5), l2t.optim.Adam(lr=0.2)], ids=["sgd", "adam"]
)
def test_the_walk_back_ends_where_the_adjoint_has_grown(optimizer: Any, curvature: str) -> None:
    def gradient(students: int, **limit: Any) -> tuple[Tensor, list[float]]:
        stack, loss, measure, weight = explosive(students)
        run = l2t.unroll(
            stack, range(12), loss, measure, optimizer=optimizer, meta=[weight], curvature=curvature, **limit
        )
        run.backward(torch.ones(students, dtype=torch.float64))
        return weight.grad, run.report.adjoint_norms

    whole, norms = gradient(1)
    longest = [max(norms[t:]) for t in range(13)]
    steps = next(k for k in range(3, 11) if norms[12 - k] > longest[13 - k])  # longer than ever before
    growth = (longest[13 - steps] + norms[12 - steps]) / 2 / norms[12]
    found, walked = gradient(1, growth=growth)
    assert len(walked) == steps + 1
    assert torch.equal(found, gradient(1, truncate=steps)[0])
    assert not torch.equal(found, whole)
    both, _ = gradient(2, growth=growth)
    torch.testing.assert_close(both[0], found[0])  # whatever goes on beside
    assert torch.equal(gradient(2, growth=1e30)[0], gradient(2)[0])


def test_growth_is_a_factor_and_goes_with_one_measure() -> None:
    stack, loss, measure, _ = explosive(1)
    for growth in (0.5, True, "ten", float("inf")):
        with pytest.raises(ValueError, match="growth must be a number of 1 or more"):
            l2t.unroll(stack, range(2), loss, measure, growth=growth)
    with pytest.raises(ValueError, match="growth must be None with measures along the way"):
        l2t.unroll(stack, range(2), loss, measure, growth=10, along=1)
    with pytest.raises(ValueError, match="meta must hold no parameter of student with growth=10"):
        l2t.unroll(stack, range(2), loss, measure, growth=10, meta=[*stack.parameters()])
