"""l2t.preflight: each thing that a step can lack is planted in a student, and found where it was planted."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_unroll as unrolled
import torch
import torch.nn.functional as F
from test_curvature import Weighed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import l2t
from l2t.graph import foreign
from l2t.preflight import Finding

BATCH = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def look(student: nn.Module, loss: Callable[..., Tensor] = loss) -> l2t.Preflight:
    dtype = next(student.parameters()).dtype
    return l2t.preflight(student, (BATCH[0].to(dtype), BATCH[1]), loss)


def function(second: str, forwards: bool) -> Callable[[Tensor], Tensor]:
    """x³ by an autograd Function: its second derivative right, raising or dropped, with and without a jvp."""

    def back(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if second == "dropped":
            x = x.detach()
        return 3 * x.square() * v

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x**3

        backward = staticmethod(once_differentiable(back) if second == "raising" else back)

    if forwards:

        def jvp(ctx: Any, t: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x.square() * t

        Cube.jvp = staticmethod(jvp)
    return Cube.apply


class Inner(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def around(f: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 5), Inner(f), nn.Linear(5, 3))
    return nn.Sequential(nn.Dropout(0.2), block, nn.BatchNorm1d(3)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("student", ["mlp", "cnn", "tied", "normaliser", "attention", "parametrised"])
def test_nothing_is_found_where_nothing_is_lacking(student: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    found = look(unrolled.STUDENTS[student]().to(dtype))
    assert found.findings == ()
    assert found.curvature == "reverse"
    assert all(found.suits(curvature) for curvature in ("reverse", "recompute", "forward", "central"))
    assert "Every part can be differentiated twice and in forward mode, and repeats its numbers." in str(
        found
    )
    assert "Take curvature='reverse' (or any other)." in str(found)


def test_the_fused_loss_has_all_it_needs() -> None:
    weight = torch.eye(3).requires_grad_()
    assert (
        look(
            unrolled.mlp(), lambda model, batch, step: l2t.dynamic_loss(model(batch[0]), batch[1], weight)
        ).findings
        == ()
    )
    assert weight.grad is None


@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize("second", ["right", "raising", "dropped"])
def test_a_function_is_found_in_its_module(second: str, forwards: bool) -> None:
    found = look(around(function(second, forwards)))
    # What drops its second derivative backwards keeps its tangents only if its backward is told of them.
    lacking = [finding.lacks for finding in found.findings]
    assert {finding.where for finding in found.findings} <= {"1.1"}
    assert ("second derivative" in lacking) == (second != "right")
    assert ("forward mode" in lacking) == (not forwards or second == "dropped")
    said = str(found)
    if second == "raising":
        assert "take curvature='central', which needs none" in said
    if second == "dropped":
        assert "of its size, against differences of the first derivative" in said
        assert "As it is, take curvature='central'." in said
    if not forwards and second == "right":
        assert "Give its autograd Function a jvp, or do without curvature='forward'." in said
        assert found.curvature == "reverse"
    if second == "raising" and forwards:
        assert found.curvature == "forward"
    assert found.suits("central")
    assert found.suits("reverse") == found.suits("recompute") == (second == "right")


class Fused(torch.autograd.Function):
    """Cross-entropy that makes its gradient in forward, as fused losses do, and has no second derivative."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(target, 3)) / len(target))
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return ctx.saved_tensors[0] * v, None


def fused_loss(model: nn.Module, batch: Any, step: int) -> Tensor:
    loss: Tensor = Fused.apply(model(batch[0]), batch[1])
    return loss


def test_a_fused_loss_that_drops_its_second_derivative_is_found() -> None:
    """Liger-Kernel#968: a loss that makes its gradient in forward returns a first derivative alone."""
    found = look(unrolled.mlp(), fused_loss)
    assert [(x.where, x.lacks) for x in found.findings] == [
        ("loss", "second derivative"),
        ("loss", "forward mode"),
    ]
    assert found.curvature == "central"


def test_attention_is_told_its_switch() -> None:
    """pytorch#116350."""
    found = look(unrolled.Attention())
    assert {finding.where for finding in found.findings} == {"student"}
    assert found.lacks("second derivative")
    assert "Call it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)." in str(found)
    assert found.curvature == "central"


def test_an_lstm_of_mkldnn_is_told_its_switch() -> None:
    found = look(unrolled.Recurrent())
    if torch.backends.mkldnn.is_available():
        assert [(x.where, x.lacks) for x in found.findings] == [("cell", "forward mode")]
        assert "Call it inside torch.backends.mkldnn.flags(enabled=False)." in str(found)
    with torch.backends.mkldnn.flags(enabled=False):
        assert look(unrolled.Recurrent()).findings == ()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_is_told_to_stay_uncompiled(in_place: bool) -> None:
    """pytorch#91469."""
    inner = Inner(torch.tanh)
    if in_place:
        inner.compile(backend="aot_eager")
    else:
        inner = torch.compile(inner, backend="aot_eager")
    found = look(nn.Sequential(nn.Linear(8, 5), inner, nn.Linear(5, 3)))
    assert found.lacks("second derivative")
    assert "Leave it uncompiled." in str(found)
    # What is compiled in place cannot be seen from outside, so the module around it is named.
    assert {finding.where for finding in found.findings} == {"student" if in_place else "1"}


def test_what_does_not_repeat_is_named() -> None:
    found = look(around(lambda x: x * (1 + random.random())))
    assert ("1.1", "determinism") in [(x.where, x.lacks) for x in found.findings]
    assert "two runs from the same random state gave different outputs" in str(found)
    assert "Let it draw from PyTorch's default random numbers alone" in str(found)
    noisy = look(unrolled.mlp(), lambda *given: loss(*given) * (1 + random.random()))
    assert ("loss", "determinism") in [(x.where, x.lacks) for x in noisy.findings]
    assert not noisy.suits("recompute")
    assert not noisy.suits("central")


def test_no_way_is_left_for_a_step_that_neither_repeats_nor_bends() -> None:
    cube = function("raising", forwards=False)
    found = look(around(lambda x: cube(x) * (1 + random.random())))
    assert found.curvature is None
    assert "No curvature is left" in str(found)
    assert not found.suits("reverse")


def penalty(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return F.cross_entropy(model(batch[0]), batch[1]) + g.square().mean()


def adversarial(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(model(x), batch[1]).backward()
    model.zero_grad()
    assert x.grad is not None
    return F.cross_entropy(model(x.detach() + 0.1 * x.grad.sign()), batch[1])


def two_batches(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    more = torch.cat([batch[0], -batch[0]])
    return F.cross_entropy(model(batch[0]), batch[1]) + model(more).softmax(1).square().mean()


@pytest.mark.parametrize("loss", [penalty, adversarial, two_batches])
def test_losses_that_call_the_student_more_than_once(loss: Callable[..., Tensor]) -> None:
    student = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in student.parameters()]
    assert look(student, loss).findings == ()
    assert all(p.grad is x for p, x in zip(student.parameters(), kept, strict=True))


def test_a_fault_in_such_a_loss_is_found_all_the_same() -> None:
    cube = function("dropped", False)
    student = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    found = look(
        student, lambda model, batch, step: penalty(model, batch, step) + cube(model(batch[0])).mean()
    )
    assert found.lacks("second derivative")


# ---- what is constant, and what is not symmetric


def focal(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    ce = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - (-ce).exp().detach()) ** 2 * ce).mean()


def item(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    ce = loss(model, batch, step)
    return ce / ce.item() + (model(batch[0]).data * model(batch[0])).mean()


class Normed(nn.Module):
    """A normaliser without gradient, whose running mean it writes; how, is chosen."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.ones(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return x / x.norm(dim=1, keepdim=True).detach()
        with torch.no_grad():
            noise = torch.rand_like(x) if self.how == "noise" else 1.0
            size = (x * noise).norm(dim=1, keepdim=True)
            if self.how == "buffer":
                self.mean.mul_(0.5).add_(size)
                self.mean[:2] = 2 * size[:2]
                self.mean[2:4].copy_(3 * size[2:4])
                size = self.mean.clone()
            if self.how == "out":
                size = torch.add(size, 1, out=torch.empty_like(size))
        return torch.rand(()) * x / size


@pytest.mark.parametrize("student", ["plain", "detach", "no_grad", "noise", "buffer", "out", "spectral"])
@pytest.mark.parametrize("loss", [loss, focal, item])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_step_takes_as_constant_is_no_finding(student: str, loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    if student == "spectral":
        layer = nn.utils.spectral_norm(layer)
    middle = nn.Tanh() if student in {"plain", "spectral"} else Normed(student)
    found = look(nn.Sequential(layer, middle, nn.Linear(6, 3)).double(), loss)
    assert found.findings == ()


def test_what_is_constant_in_students_side_by_side_is_no_finding() -> None:
    stack = l2t.Stack(lambda: nn.Sequential(nn.Linear(8, 6), Normed("detach"), nn.Linear(6, 3)), range(2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        return F.cross_entropy(model(batch[0].expand(2, 6, 8)).flatten(0, 1), batch[1].repeat(2))

    assert look(stack, loss).findings == ()


def test_a_derivative_that_is_lost_beside_a_constant_is_found() -> None:
    cube = function("dropped", False)
    found = look(around(lambda x: cube(x) / x.norm().detach()))
    assert {(x.where, x.lacks) for x in found.findings} == {
        ("1.1", "second derivative"),
        ("1.1", "forward mode"),
    }


def test_a_step_whose_derivative_is_not_symmetric_lacks_forward_mode_alone() -> None:
    student = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = look(student, lambda model, batch, step: Weighed.apply(model(batch[0]), batch[1]))
    assert [(x.where, x.lacks) for x in found.findings] == [("loss", "forward mode")]
    assert found.curvature == "reverse"
    assert "the derivative of its gradient is not symmetric, and a run needs the transpose" in str(found)
    assert "Do without curvature='forward', which takes one for the other." in str(found)


def test_a_hook_that_reverses_gradients_is_told_whatever_comes_of_it() -> None:
    """It acts once more in torch's second derivative, which is that of no step."""

    def reversal(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        h = model[0](batch[0]).tanh()
        back = h * 1.0
        if back.requires_grad:
            back.register_hook(lambda g: -g)
        return F.cross_entropy(model[1](h), batch[1]) + model[2](back).square().mean()

    student = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3), nn.Linear(5, 2)).double()
    found = look(student, reversal)
    assert found.lacks("second derivative")
    assert found.lacks("forward mode")
    batches = [(BATCH[0].double(), BATCH[1])]
    with pytest.raises(RuntimeError, match=r"student with loss: no second derivative"):
        l2t.unroll(student, batches, reversal, lambda model: model[0].weight.sum())


def test_a_part_that_gets_no_numbers_has_none_to_try() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x) + self.experts[1](x[:0]).sum()

    assert look(Experts()).findings == ()


def test_a_loss_that_calls_backward_and_freezes_leaves_no_trace() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    student[0].requires_grad_(False)
    weight = torch.ones(6, requires_grad=True)
    weight.grad = kept = torch.full((6,), 2.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        model.requires_grad_(True)
        value = (weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()
        value.backward(retain_graph=True)
        model[2].requires_grad_(False)
        return value

    l2t.preflight(student, BATCH, loss, meta=[weight])
    assert [p.requires_grad for p in student.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in student.parameters())
    assert weight.grad is kept
    assert torch.equal(kept, torch.full((6,), 2.0))

    def run(preflight: bool) -> l2t.Run:
        weight.grad = None
        taken = l2t.unroll(
            student,
            [BATCH] * 3,
            loss,
            lambda model: model(BATCH[0]).square().mean(),
            meta=[weight],
            preflight=preflight,
        )
        taken.backward()
        return taken

    one = run(False)
    expected = weight.grad
    other = run(True)
    assert list(one.weights) == list(other.weights) == ["2.weight", "2.bias"]
    assert torch.equal(one.measure, other.measure)
    assert torch.equal(weight.grad, expected)


def test_all_is_as_before() -> None:
    torch.manual_seed(3)
    student = unrolled.cnn()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    state = {name: x.clone() for name, x in student.state_dict().items()}
    parameters = list(student.parameters())
    expected = torch.get_rng_state()
    look(student)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(x, state[name]) for name, x in student.state_dict().items())
    assert all(x is y for x, y in zip(student.parameters(), parameters, strict=True))
    assert all(bool((p.grad == 1).all()) for p in parameters)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())


def run(student: nn.Module, loss: Callable[..., Tensor] = loss, steps: int = 3, **options: Any) -> l2t.Run:
    dtype = next(student.parameters()).dtype
    batches = options.pop("batches", [(BATCH[0].to(dtype), BATCH[1])] * steps)
    return l2t.unroll(student, batches, loss, lambda model: model(BATCH[0].to(dtype)).mean(), **options)


UNFIT = r"a step must be fit for curvature='{}', got one that is not. .* or preflight=False where you know"


@pytest.mark.parametrize("kind", ["list", "generator"])
@pytest.mark.parametrize("preflight", [None, True])
def test_a_run_looks_at_its_first_step(preflight: bool | None, kind: str) -> None:
    def tried(student: nn.Module, curvature: str) -> int:
        batches = [BATCH] * 3 if kind == "list" else (BATCH for _ in range(3))
        return run(student, batches=batches, curvature=curvature, preflight=preflight).report.steps

    with pytest.raises(RuntimeError, match=UNFIT.format("reverse")) as error:
        tried(unrolled.Attention(), "reverse")
    assert "SDPBackend.MATH" in str(error.value)
    assert tried(unrolled.Attention(), "central") == 3
    assert tried(unrolled.mlp(), "reverse") == 3


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_a_run_finds_by_itself_what_is_lost_in_silence(curvature: str) -> None:
    student = around(function("dropped", forwards=False))
    with pytest.raises(RuntimeError, match=UNFIT.format(curvature)) as error:
        run(student, curvature=curvature)
    assert "1.1: no second derivative (it is off by" in str(error.value)
    with pytest.raises(RuntimeError, match=UNFIT.format(curvature)):  # it has not come to be known
        run(student, curvature=curvature)
    # What suits differences does not count as known to be right.
    assert run(student, curvature="central", preflight=True).report.steps == 3
    with pytest.raises(RuntimeError, match=UNFIT.format(curvature)):
        run(student, curvature=curvature)
    # Told not to, or where no second derivative is asked for, it goes on.
    for options in ({"preflight": False}, {"order": "first"}):
        assert run(student, curvature=curvature, **options).report.steps == 3
    assert run(student, curvature="one-sided").report.steps == 3


def test_a_run_finds_a_gradient_that_has_no_graph_at_all() -> None:
    """A fused loss right on a linear student leaves nothing to differentiate again."""
    with pytest.raises(RuntimeError, match=UNFIT.format("reverse")):
        run(nn.Linear(8, 3).double(), fused_loss)


def test_a_run_finds_what_weighs_little_in_a_step() -> None:
    cube = function("dropped", forwards=False)
    with pytest.raises(RuntimeError, match=UNFIT.format("reverse")) as error:
        run(around(lambda x: x.tanh() + cube(x) / 32))
    assert "1.1: no second derivative" in str(error.value)


def test_a_run_tries_what_others_have_differentiated_once_a_loss_and_student() -> None:
    steps: list[int] = []
    cube = function("right", forwards=False)

    def noted(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        steps.append(step)
        return loss(model, batch, step)

    def calls(student: nn.Module, loss: Callable[..., Tensor] = noted, **options: Any) -> list[int]:
        steps.clear()
        run(student, loss, **options)
        return list(steps)

    student, tried = around(cube), [*[0] * 6, 1, 2]
    assert calls(student) == tried
    assert calls(student) == [0, 1, 2]
    assert calls(around(cube)) == tried
    assert calls(student, lambda *args: noted(*args)) == tried
    assert calls(around(cube), preflight=False) == [0, 1, 2]
    assert calls(around(cube), order="first") == [0, 1, 2]
    # PyTorch's own need no more calls, and neither does the loss of this library.
    assert calls(around(torch.tanh)) == [0, 1, 2]
    fused = l2t.DynamicLoss(torch.eye(3, dtype=torch.float64))
    assert calls(around(torch.tanh), lambda model, x, t: noted(model, x, t) + fused(model(x[0]), x[1])) == [
        0,
        1,
        2,
    ]

    class Loss:  # that no weak reference can be made to
        __slots__ = ()

        def __call__(self, *args: Any) -> Tensor:
            return noted(*args)

    one = Loss()
    assert calls(student, one) == calls(student, one) == tried


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_a_run_finds_what_no_pytorch_code_has_written(curvature: str) -> None:
    """Of a hook of a module nothing is known either."""
    student = unrolled.mlp()
    student[0].register_full_backward_hook(
        lambda module, into, out: tuple(x if x is None else -x for x in into)
    )
    first = nn.Sequential(nn.Linear(8, 8), student).double()
    with pytest.raises(RuntimeError, match=r"no second derivative \(it is off by"):
        run(first, curvature=curvature)


def test_a_function_of_cpp_counts_as_one_of_others() -> None:
    """Told by the name that torch gives its node; no operation of the CPU build makes one."""

    class Node:
        next_functions = ()

        def __init__(self, kind: str) -> None:
            self.name = lambda: kind

    for kind, others in (("torch::autograd::CppNode<RoIAlign>", True), ("AddmmBackward0", False)):
        assert foreign([SimpleNamespace(grad_fn=Node(kind))]) is others


def test_what_a_loss_keeps_from_call_to_call_is_as_the_run_left_it() -> None:
    """Hidden states are carried on from the first step, not from where it was looked at."""
    ends = []
    for preflight in (None, True, False):
        carried: list[Tensor] = []

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int, carried: Any = carried) -> Tensor:
            hidden = model[1](model[0](batch[0]) + (carried[0] if step else 0.0))
            carried[:] = [hidden.detach()]
            return F.cross_entropy(model[2](hidden), batch[1])

        torch.manual_seed(0)
        cube = Inner(function("right", forwards=False))
        student = nn.Sequential(nn.Linear(8, 5), cube, nn.Linear(5, 3)).double()
        ends.append(run(student, loss, preflight=preflight).report.losses)
    assert ends[0] == ends[1] == ends[2]


def test_a_loss_that_counts_its_calls_is_told_of_the_look() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        calls.append(step)
        return len(calls) * F.cross_entropy(model(batch[0]), batch[1])

    student = around(function("right", forwards=False))
    with pytest.raises(
        RuntimeError, match=r"loss must be the same when it is called again, for a look .*preflight=False"
    ):
        run(student, loss)
    calls.clear()
    assert run(student, loss, preflight=False).report.steps == 3
    assert run(around(torch.tanh), loss).report.steps == 3


@pytest.mark.parametrize("schedule", ["all", "every"])
def test_a_look_leaves_the_run_as_it_is(schedule: str) -> None:
    """Random numbers, running statistics and what is read from a generator are those of a run without it."""
    ends = []
    for preflight in (None, True, False):
        student = around(torch.tanh)
        torch.manual_seed(3)
        taken = run(student, steps=6, schedule=schedule, preflight=preflight)
        taken.backward()
        parts = [torch.tensor(taken.report.losses), *taken.weights.values(), *taken.buffers.values()]
        ends.append([*parts, torch.rand(1)])
    for end in ends[1:]:
        assert all(torch.equal(x, y) for x, y in zip(ends[0], end, strict=True))


def test_kinks_between_the_ends_of_a_difference_are_no_fault() -> None:
    """At weights of nearly nothing a ReLU turns along each direction."""
    student = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    nn.init.normal_(student[0].weight, std=1e-6)
    nn.init.normal_(student[0].bias, std=1e-6)
    assert run(student).report.steps == 3


def test_activation_checkpoints_are_no_fault() -> None:
    """They run the module again while derivatives are taken, at the weights that stand in it then."""

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    student = Checkpointed(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    assert [x for x in look(student).findings if x.lacks == "second derivative"] == []
    assert run(student).report.steps == 3


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"student must be an ordinary torch\.nn\.Module"):
        l2t.preflight(lambda x: x, BATCH, loss)
    with pytest.raises(TypeError, match="loss must be a function"):
        l2t.preflight(unrolled.mlp(), BATCH, 3)
    with pytest.raises(ValueError, match="loss must return a real 0-dim tensor"):
        look(unrolled.mlp(), lambda model, batch, step: model(batch[0]))
    assert (
        str(Finding("layer", "second derivative", "said", "Mend."))
        == "layer: no second derivative (said). Mend."
    )
