"""Ways to H a and ∂_Φ⟨g, a⟩ beyond those of second order: forward mode, differences, and what they ask for.

The exact ones are also run by the agreement tests of tests/test_unroll.py. The oracle here is the same:
plain autograd through the whole run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import test_unroll as unrolled
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import l2t
from l2t.curvature import CURVATURES, _size
from l2t.optim import SGD

DIFFERENCES = [name for name, curvature in CURVATURES.items() if not curvature.exact]
# Errors of a teacher gradient through four steps: the unit's power of the difference, and some room.
ROOM = {
    ("central", torch.float64): 5e-9,
    ("central", torch.float32): 5e-3,
    ("one-sided", torch.float64): 1e-5,
    ("one-sided", torch.float32): 1e-1,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("curvature", DIFFERENCES)
@pytest.mark.parametrize("student", list(unrolled.STUDENTS))
def test_a_difference_agrees_as_far_as_its_unit_allows(
    student: str, curvature: str, dtype: torch.dtype
) -> None:
    course = unrolled.make_course(student, dtype)
    measure, _ = course.oracle()
    run = course.unroll(curvature, course.leaves())
    run.backward()
    room = ROOM[curvature, dtype]
    for kind, leaves in course.metas.items():
        expected = list(torch.autograd.grad(measure, leaves, retain_graph=True))
        assert unrolled.relative(unrolled.gradients(leaves), expected) <= room, kind
    assert 0 < run.report.curvature_error <= room
    assert run.report.curvature_error_reason is None


@pytest.mark.parametrize("curvature", ["forward", *DIFFERENCES])
@pytest.mark.parametrize("student", ["cnn", "normaliser", "transformer"])
def test_the_gradient_has_the_same_bits_under_every_schedule(student: str, curvature: str) -> None:
    course = unrolled.make_course(student, torch.float32)
    found = []
    plans = (
        unrolled.PLANS if student == "cnn" else {k: unrolled.PLANS[k] for k in ("every", "disk and pairs")}
    )
    for plan in ({"schedule": "all"}, *plans.values()):
        for x in course.leaves():
            x.grad = None
        run = course.unroll(curvature, course.leaves(), **plan)
        run.backward()
        found.append([run.measure, *run.buffers.values(), *unrolled.gradients(course.leaves())])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("curvature", DIFFERENCES)
def test_leaves_are_found_without_being_named(curvature: str) -> None:
    found = []
    for name in (True, False):
        course = unrolled.make_course("mlp", torch.float64)
        leaves = [x for kind, xs in course.metas.items() if kind != "initial weights" for x in xs]
        course.unroll(curvature, leaves if name else None).backward()
        found.append(unrolled.gradients(leaves))
        assert all(p.grad is None for p in course.student.parameters())
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


class Cube(torch.autograd.Function):
    """x³ of which only the first derivative is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * v


def polynomial(cube: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, l2t.Run]:
    """A student with a cube in it: the gradient to a factor of its loss, and the run."""
    torch.manual_seed(0)
    student, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    run = l2t.unroll(
        student,
        range(4),
        lambda model, batch, step: scale * cube(model(x)).square().mean(),
        lambda model: model(x).square().mean(),
        optimizer=SGD(lr=0.05, momentum=0.5),
        **options,
    )
    run.backward()
    return scale.grad, run


@pytest.mark.parametrize(("curvature", "room"), [("central", 1e-8), ("one-sided", 1e-5)])
def test_a_difference_asks_for_no_second_derivative(curvature: str, room: float) -> None:
    expected, _ = polynomial(lambda x: x**3)
    found, run = polynomial(Cube.apply, curvature=curvature)
    torch.testing.assert_close(found, expected, rtol=room, atol=0)
    assert run.report.curvature_error is None
    assert "once_differentiable" in run.report.curvature_error_reason
    for exact in ("reverse", "recompute"):
        with pytest.raises(RuntimeError, match=r"curvature='central', which asks for first derivatives only"):
            polynomial(Cube.apply, curvature=exact)


@pytest.mark.filterwarnings("ignore:l2t.unroll. with curvature='forward'")
@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}], ids=["all", "every"])
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward"])
def test_a_second_derivative_is_not_left_out_in_silence(curvature: str, plan: dict[str, Any]) -> None:
    """Where inputs are named, torch's engine passes by the error of once_differentiable."""
    student = nn.Linear(3, 2).double()
    x, scale = torch.ones(6, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)
    for order in ("exact", "first"):
        run = l2t.unroll(
            student,
            range(4),
            lambda model, batch, step: scale * Cube.apply(model(x)).square().mean(),
            lambda model: model(x).square().mean(),
            meta=[scale],
            curvature=curvature,
            order=order,
            preflight=False,
            **plan,
        )
        with pytest.raises(RuntimeError, match="got an autograd Function whose backward is marked"):
            run.backward()
        assert scale.grad is None


@pytest.mark.parametrize("curvature", DIFFERENCES)
def test_attention_with_its_fast_kernel_needs_no_other(curvature: str) -> None:
    """pytorch#116350: the fused kernels of scaled_dot_product_attention are differentiable once."""
    torch.manual_seed(0)
    x, target = torch.randn(6, 8), torch.randint(3, (6,))
    fast, safe = unrolled.Attention(), unrolled.MathAttention()
    safe.load_state_dict(fast.state_dict())
    found = []
    for student, way in ((safe, "reverse"), (fast, curvature)):
        weight = torch.eye(3).requires_grad_()
        l2t.unroll(
            student,
            [x] * 3,
            lambda model, batch, step: l2t.dynamic_loss(model(batch), target, weight),  # noqa: B023
            lambda model: F.cross_entropy(model(x), target),
            curvature=way,
        ).backward()
        found.append([weight.grad])
    assert unrolled.relative(found[1], found[0]) < {"central": 1e-3, "one-sided": 3e-2}[curvature]


@pytest.mark.parametrize("curvature", DIFFERENCES)
def test_a_compiled_student_can_be_differentiated(curvature: str) -> None:
    """pytorch#91469: what torch.compile returns has no second derivative."""
    torch.manual_seed(0)
    student, x, target = (
        unrolled.mlp().double(),
        torch.randn(6, 8, dtype=torch.float64),
        torch.randint(3, (6,)),
    )
    found = []
    for model, way in ((student, "reverse"), (torch.compile(student, backend="aot_eager"), curvature)):
        weight = torch.eye(3, dtype=torch.float64).requires_grad_()
        run = l2t.unroll(
            model,
            [x] * 3,
            lambda model, batch, step: l2t.dynamic_loss(model(batch), target, weight),  # noqa: B023
            lambda model: F.cross_entropy(model(x), target),
            curvature=way,
        )
        run.backward()
        found.append([weight.grad])
    assert unrolled.relative(found[1], found[0]) < 1e-5
    assert run.report.curvature_error is None
    assert "double backward" in run.report.curvature_error_reason


class Opaque(torch.autograd.Function):
    """x³ with two derivatives backwards and none forwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * v


def test_forward_mode_falls_back_by_name() -> None:
    expected, exact = polynomial(Opaque.apply)
    for plan in ({}, {"schedule": "every"}):
        with pytest.warns(
            UserWarning, match=r"must have a derivative in forward mode, got one that has none"
        ) as said:
            found, run = polynomial(Opaque.apply, curvature="forward", **plan)
        assert len(said) == 1
        assert "Opaque" in str(said[0].message) or "jvp" in str(said[0].message)
        assert said[0].filename == __file__
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert run.report.curvature == "recompute"
    assert exact.report.curvature == "reverse"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, run = polynomial(lambda x: x**3, curvature="forward")
    assert (run.report.curvature, run.report.curvature_error) == ("forward", 0.0)


class Weighed(torch.autograd.Function):
    """Cross-entropy of rows, each weighed by p_0, which its gradient takes as given: that of no number."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.save_for_forward(logits, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        logits, target = ctx.saved_tensors
        p = logits.softmax(1)
        return v * p[:, :1] * (p - F.one_hot(target, 3)), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        logits, _ = ctx.saved_tensors
        return (0 * logits).sum()


def test_forward_mode_falls_back_where_the_derivative_of_a_step_is_not_symmetric() -> None:
    """The oracle: plain autograd through w - lr g(w), whose rows are weighed as they are in the step."""
    torch.manual_seed(0)
    student, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w, bias = (p.detach().clone().requires_grad_() for p in student.parameters())
    for _ in range(4):
        logits = x @ w.T + bias
        rows = F.cross_entropy(logits, y, reduction="none")
        weights = scale * logits.softmax(1)[:, 0]
        g = torch.autograd.grad(rows, (w, bias), weights, create_graph=True)
        w, bias = w - 0.5 * g[0], bias - 0.5 * g[1]
    (expected,) = torch.autograd.grad(F.cross_entropy(x @ w.T + bias, y), scale)

    def unrolled_by(curvature: str) -> tuple[Tensor, l2t.Run]:
        scale.grad = None
        kept = [torch.ones_like(p) for p in student.parameters()]
        for p, grad in zip(student.parameters(), kept, strict=True):
            p.grad = grad
        run = l2t.unroll(
            student,
            range(4),
            lambda model, batch, step: scale * Weighed.apply(model(x), y),
            lambda model: F.cross_entropy(model(x), y),
            optimizer=SGD(lr=0.5),
            meta=[scale],
            curvature=curvature,
        )
        run.backward()
        assert all(
            p.grad is grad and (grad == 1).all() for p, grad in zip(student.parameters(), kept, strict=True)
        )
        return scale.grad, run

    torch.testing.assert_close(unrolled_by("reverse")[0], expected, rtol=1e-11, atol=0)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="a step's gradient must be that of its loss, so that its") as said:
        found, run = unrolled_by("forward")
    said = [x for x in said if x.category is UserWarning]
    assert len(said) == 1
    assert said[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), state)
    assert run.report.curvature == "recompute"
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


def checkpointed(steps: Callable[[int], bool]) -> Callable[[nn.Module, int, int], Tensor]:
    """A loss that at some steps computes its norms in torch.no_grad inside of a checkpoint."""
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            h = model[0](x).tanh()
            with torch.no_grad():
                size = h.norm(dim=1, keepdim=True)
            return h / size

        h = checkpoint(inner, x, use_reentrant=False) if steps(step) else model[0](x)
        return F.cross_entropy(model[1](h), y)

    return loss


def test_forward_mode_sees_a_checkpoint_that_computes_without_gradient() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def run(curvature: str, steps: Callable[[int], bool]) -> Tensor:
        lr.grad, loss = None, checkpointed(steps)
        torch.manual_seed(1)
        l2t.unroll(
            student,
            range(6),
            loss,
            lambda model: loss(model, 0, 0),
            optimizer=SGD(lr=lr),
            curvature=curvature,
        ).backward()
        return lr.grad

    torch.manual_seed(1)
    expected = run("reverse", lambda step: True)
    torch.manual_seed(1)
    with pytest.warns(
        UserWarning, match="got one that is not, by .*torch.no_grad in an activation checkpoint"
    ):
        found = run("forward", lambda step: True)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    # Where steps before may have been wrong, there is no going on.
    with pytest.raises(
        RuntimeError, match="must have a symmetric derivative, got one that has none after 1 steps"
    ):
        run("forward", lambda step: step < 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_symmetric_derivative_is_taken_for_one(dtype: torch.dtype) -> None:
    """Along directions that H hardly bends, too: an even shift of all logits."""
    torch.manual_seed(0)
    student, x, y = nn.Linear(4, 3).to(dtype), torch.randn(8, 4, dtype=dtype), torch.arange(8) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = l2t.unroll(
            student,
            range(3),
            lambda model, batch, step: F.cross_entropy(model(x), y),
            lambda model: model.bias.sum() + 1e-4 * model.weight.square().sum(),
            curvature="forward",
            meta=[student.weight],
        )
        run.backward()
    assert run.report.curvature == "forward"


@pytest.mark.parametrize("curvature", DIFFERENCES)
def test_a_difference_that_moves_what_is_detached_is_told(curvature: str) -> None:
    torch.manual_seed(0)
    student, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def run(detached: bool) -> l2t.Run:
        def focal(model: nn.Module, batch: int, step: int) -> Tensor:
            ce = F.cross_entropy(model(x), y, reduction="none")
            hard = (1 - (-ce).exp()) ** 2
            return ((hard.detach() if detached else hard) * ce).mean()

        taken = l2t.unroll(
            student,
            range(3),
            focal,
            lambda model: F.cross_entropy(model(x), y),
            optimizer=SGD(lr=lr),
            curvature=curvature,
        )
        taken.backward()
        return taken

    with pytest.warns(UserWarning, match="differences must come near to the exact products") as said:
        error = run(True).report.curvature_error
    assert error > 0.1
    (said,) = (x for x in said if x.category is UserWarning)
    assert f"got an error of {error:.2g}" in str(said.message)
    assert said.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(False).report.curvature_error < 1e-3


def test_a_second_derivative_that_is_lost_in_some_steps_only_is_found() -> None:
    student, x = nn.Linear(3, 2).double(), torch.ones(6, 3, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for curvature in ("reverse", "recompute"):
        run = l2t.unroll(
            student,
            range(8),
            lambda model, batch, step: (
                scale * (model(x) if step % 2 else Cube.apply(model(x))).square().mean()
            ),
            lambda model: model(x).square().mean(),
            meta=[scale],
            curvature=curvature,
            preflight=False,
        )
        with pytest.raises(RuntimeError, match="got an autograd Function whose backward is marked"):
            run.backward()


def test_forward_mode_falls_back_where_sparse_matrices_have_no_tangents() -> None:
    edges = torch.eye(6, dtype=torch.float64).to_sparse()
    with pytest.warns(UserWarning, match=r"must have a derivative in forward mode, got one that has none"):
        found, run = polynomial(lambda x: edges @ x, curvature="forward")
    torch.testing.assert_close(found, polynomial(lambda x: edges @ x)[0], rtol=1e-12, atol=0)
    assert run.report.curvature == "recompute"


def test_the_error_of_a_difference_counts_imaginary_parts() -> None:
    assert _size([torch.tensor([3j]), torch.tensor([4.0])]) == 5.0


def test_other_errors_of_a_loss_are_its_own_in_forward_mode() -> None:
    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        calls.append(step)
        if len(calls) > 3:
            raise RuntimeError("of the loss itself")
        return model(torch.ones(1, 2)).square().sum()

    calls: list[int] = []
    run = l2t.unroll(
        nn.Linear(2, 1), range(3), loss, lambda model: model(torch.ones(1, 2)).sum(), curvature="forward"
    )
    with pytest.raises(RuntimeError, match="of the loss itself"):
        run.backward()


def test_what_is_computed_without_gradient_is_a_constant_in_forward_mode() -> None:
    torch.manual_seed(0)
    student, x = unrolled.mlp().double(), torch.randn(6, 8, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        out = model(x)
        with torch.no_grad():
            size = model(x).square().mean()
        with torch.set_grad_enabled(False):
            size = size + model(x).mean()
        return scale * (out.square() * size).mean() + (out.detach() * out).mean()

    found = []
    for curvature in unrolled.EXACT:
        scale.grad = None
        run = l2t.unroll(student, range(3), loss, lambda model: model(x).square().mean(), curvature=curvature)
        run.backward()
        found.append(scale.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("curvature", ["recompute", "forward", "central", "one-sided"])
def test_a_loss_that_draws_other_numbers_is_told_by_every_curvature_that_runs_it_again(
    curvature: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    run = l2t.unroll(
        nn.Linear(2, 1),
        range(3),
        lambda model, batch, step: model(torch.randn(4, 2, generator=generator)).square().mean(),
        lambda model: model(torch.ones(1, 2)).sum(),
        curvature=curvature,
    )
    with pytest.raises(RuntimeError, match="loss must be the same when a step is run again"):
        run.backward()


@pytest.mark.parametrize("curvature", ["forward", *DIFFERENCES])
def test_weights_that_a_step_does_not_reach_and_a_step_that_gives_no_direction(curvature: str) -> None:
    found = []
    for way in ("reverse", curvature):
        torch.manual_seed(0)
        student = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        l2t.unroll(
            student,
            range(4),
            lambda model, batch, step: scale * model[step % 2](x).square().mean(),  # noqa: B023
            # The second layer is not measured: the adjoint of its steps is zero.
            lambda model: model[0](x).square().mean(),  # noqa: B023
            optimizer=SGD(lr=0.1),
            curvature=way,
        ).backward()
        found.append(scale.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", DIFFERENCES)
def test_the_step_of_a_difference_knows_the_dtype_of_autocast(curvature: str) -> None:
    torch.manual_seed(0)
    student, x, target = unrolled.mlp(), torch.randn(6, 8), torch.randint(3, (6,))
    found = []
    for way in ("reverse", curvature):
        scale = torch.tensor(1.5, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            run = l2t.unroll(
                student,
                [x] * 3,
                lambda model, batch, step: scale * F.cross_entropy(model(batch), target),  # noqa: B023
                lambda model: F.cross_entropy(model(x), target),
                optimizer=SGD(lr=0.1),
                curvature=way,
            )
        run.backward()
        found.append(float(scale.grad))
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert run.report.curvature_error < 0.5


# ---- what is left out where that is asked for


@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("plan", [{}, {"schedule": "every"}], ids=["all", "every"])
@pytest.mark.parametrize(("order", "truncate"), [("first", None), ("exact", 2), ("first", 3), ("exact", 9)])
def test_first_order_and_truncation_are_those_of_a_cut_graph(
    order: str, truncate: int | None, plan: dict[str, Any], curvature: str
) -> None:
    """higher#63, #102, #128, betty#3: a first-order switch that does what it says."""
    course = unrolled.make_course("mlp", torch.float64)
    measure, _ = course.oracle(order == "first", truncate or unrolled.STEPS)
    kinds = {k: xs for k, xs in course.metas.items() if truncate is None or k != "initial weights"}
    leaves = [x for xs in kinds.values() for x in xs]
    run = course.unroll(curvature, leaves, order=order, truncate=truncate, **plan)
    run.backward()
    room = 1e-12 if CURVATURES[curvature].exact else ROOM[curvature, torch.float64]
    for kind, xs in kinds.items():
        expected = torch.autograd.grad(measure, xs, retain_graph=True, allow_unused=True)
        expected = [torch.zeros_like(x) if d is None else d for x, d in zip(xs, expected, strict=True)]
        assert unrolled.relative(unrolled.gradients(xs), expected) <= room, kind
    assert (run.report.order, run.report.truncate) == (order, truncate)
    assert f"order={order}, truncate={truncate}" in repr(run.report)
    assert len(run.report.adjoint_norms) == min(truncate or unrolled.STEPS, unrolled.STEPS) + 1


@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_first_order_finds_the_leaves_by_itself(curvature: str) -> None:
    course = unrolled.make_course("mlp", torch.float64, use=("loss coefficients", "data"))
    measure, _ = course.oracle(first=True)
    course.unroll(curvature, order="first").backward()
    expected = list(torch.autograd.grad(measure, course.leaves()))
    room = 1e-12 if CURVATURES[curvature].exact else ROOM[curvature, torch.float64]
    assert unrolled.relative(unrolled.gradients(course.leaves()), expected) <= room


def test_only_the_last_steps_are_remembered_of_a_truncated_run() -> None:
    for curvature in CURVATURES:
        for plan in ({}, {"schedule": "all"}, {"schedule": "every"}):
            run = unrolled.make_course("mlp", torch.float64).unroll(curvature, truncate=1, **plan)
            assert list(run._tape) == [unrolled.STEPS - 1]
            assert run.report.steps == unrolled.STEPS
            run.backward()
            assert run.report.steps_again == 0


def test_a_value_that_is_not_finite_is_named_by_its_step_in_a_truncated_run() -> None:
    student = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(student.weight)
    run = l2t.unroll(
        student,
        range(5),
        # At w = 0 losses and gradients are zero, and only the adjoint sees a curvature.
        lambda model, batch, step: (1e200 if step == 3 else 1.0) * model.weight.square().sum(),
        lambda model: model.weight.sum(),
        optimizer=SGD(lr=lambda step: 1e200 if step == 3 else 0.1),
        truncate=3,
    )
    run.backward()
    assert run.report.nonfinite == ("adjoint", 3)


def test_truncation_is_checked() -> None:
    course = unrolled.make_course("mlp", torch.float64)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"truncate must be an integer of 1 or more, or None, got"):
            course.unroll(truncate=wrong)
    with pytest.raises(ValueError, match=r"meta must hold no parameter of student with truncate=2, got one"):
        course.unroll(meta=course.leaves(), truncate=2)
    with pytest.raises(ValueError, match=r"the order must be one of exact, first, got 'second'"):
        course.unroll(order="second")
