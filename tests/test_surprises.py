"""What users of other libraries met in an unrolled run, each named after the thread in which they told it.

A list to be read: a test shows that the thing works here, or that it is refused with a sentence that says
what to do. The rows group what was asked for alike; rows of other things (wheels, options of losses, speed)
are elsewhere. Owners of the threads are left out: higher is facebookresearch/higher, torchopt
metaopt/torchopt, learn2learn learnables/learn2learn, and so on. Tests of the parts go deeper.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_unroll as unrolled
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import l2t
from l2t.optim import SGD, Adam, AdamW
from l2t.students import Stack

torch.manual_seed(0)
X, Y = torch.randn(6, 8, dtype=torch.float64), torch.randint(3, (6,))
LR = 0.3
Model = Callable[[Tensor], Tensor]


def losses(model: Model, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y, reduction="none")


def task_loss(model: Model, x: Tensor = X) -> Tensor:
    return losses(model, x).mean()


def teach(student: nn.Module, steps: int = 4, x: Tensor = X, **options: Any) -> tuple[Tensor, l2t.Run]:
    """The gradient of the final loss to the weight of each sample in all steps, and the run."""
    weight = torch.ones(6, dtype=x.dtype, requires_grad=True)
    options = {"optimizer": SGD(lr=LR)} | options
    torch.manual_seed(1)
    run = l2t.unroll(
        student,
        range(steps),
        lambda model, batch, step: (weight * losses(model, x)).mean(),
        lambda model: task_loss(model, x),
        **options,
    )
    run.backward()
    return weight.grad, run


def plain(student: nn.Module, steps: int = 4) -> Tensor:
    """The same by autograd through the whole run."""
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    weights = dict(student.named_parameters())
    buffers = {name: b.clone() for name, b in student.named_buffers()}

    def model(x: Tensor) -> Tensor:
        return torch.func.functional_call(student, weights | buffers, x)

    torch.manual_seed(1)
    for _ in range(steps):
        loss = (weight * losses(model)).mean()
        # Under these the statistics of the step before stay as autograd has saved them.
        buffers = {name: b.clone() for name, b in buffers.items()}
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: w - LR * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return torch.autograd.grad(task_loss(model), weight)[0]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def same(one: Tensor, other: Tensor, room: float = 1e-11) -> None:
    """Relative to the norm."""
    assert float((one - other).norm()) <= room * float(other.norm())


# ---- row 1: memory must not grow with the steps


class Watch(nn.Linear):
    """A layer that knows of how many steps its weights, and its outputs, are alive at most."""

    def __init__(self) -> None:
        super().__init__(8, 8, dtype=torch.float64)
        self.alive: tuple[list[weakref.ref[Tensor]], ...] = ([], [])
        self.most = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x).tanh()
        for i, (refs, tensor) in enumerate(zip(self.alive, (self.weight, out), strict=True)):
            refs[:] = [ref for ref in refs if ref() is not None]
            refs.append(weakref.ref(tensor))
            self.most[i] = max(self.most[i], len({id(ref()) for ref in refs}))
        return out


def remembered(steps: int, **options: Any) -> list[int]:
    """How many steps' weights and graphs are there at most at a time."""
    torch.manual_seed(0)
    student = nn.Sequential(Watch(), nn.Linear(8, 3).double())
    teach(student, steps, **options)
    return student[0].most


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9), Adam(lr=0.1)], ids=["SGD", "Adam"])
def test_higher_6_37_learn2learn_284_393_maml_21_closer_look_2_memory_does_not_grow_with_the_steps(
    optimizer: l2t.optim.Optimizer,
) -> None:
    """Out of memory as the inner steps grow: "no solution if you back-propagate through them"."""
    assert min(remembered(60, optimizer=optimizer)) >= 60  # nothing was said about memory
    for most, again in zip(
        *(remembered(n, memory="20kB", optimizer=optimizer) for n in (60, 240)), strict=True
    ):
        assert max(again, most) < 30


def test_torchopt_218_steps_without_end_that_are_forgotten() -> None:
    """The memory of MetaAdam rises with each step even where the gradient is wanted through few."""
    assert max(remembered(40, truncate=3, optimizer=Adam(lr=0.1))) <= 6


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def test_higher_22_activation_checkpoints_inside_of_a_step() -> None:
    """torch.utils.checkpoint did not work with autograd.grad; the newer form does."""
    student = Checkpointed(*mlp())
    same(teach(student)[0], plain(mlp()))
    student.reentrant = True
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises(ValueError, match=r"depend on .* use_reentrant=False"),
    ):
        teach(student)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("curvature", ["reverse", "one-sided"])
def test_pytorch_32005_102223_the_older_checkpoints_would_leave_weights_as_they_are(
    before: bool, curvature: str
) -> None:
    """Reentrant ones raise with autograd.grad, or pass by weights where only inputs ask for a gradient."""
    student = Checkpointed(*mlp())
    student.reentrant = True
    first = nn.Linear(8, 8).double() if before else Called(lambda x: x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"got one with use_reentrant=True, .* with use_reentrant=False"):
        teach(nn.Sequential(first, student, nn.Linear(3, 3).double()), curvature=curvature)


def test_pytorch_32005_an_older_checkpoint_in_later_steps_only() -> None:
    student = nn.Sequential(
        Called(lambda x: x.clone().requires_grad_()), Checkpointed(*mlp()), nn.Linear(3, 3).double()
    )

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        model[1].reentrant = step > 1
        return task_loss(model)

    with pytest.raises(RuntimeError, match=r"got one with use_reentrant=True, .* with use_reentrant=False"):
        l2t.unroll(student, range(4), loss, task_loss)
    assert l2t.unroll(student, range(2), loss, task_loss).report.steps == 2


def test_higher_22_checkpoints_of_the_run_itself() -> None:
    """What that thread asked for: fewer remembered steps, the same gradient, to the bit."""
    everything, _ = teach(mlp(), 30)
    for plan in ({"schedule": "every"}, {"memory": "20kB"}, {"schedule": "binomial", "memory": "20kB"}):
        found, run = teach(mlp(), 30, **plan)
        assert torch.equal(found, everything)
        assert run.report.steps_again > 0


def test_higher_31_only_the_first_and_the_last_weights_are_wanted() -> None:
    """Every step between was kept to get the gradient to the initial weights: "inherent"."""
    found = []
    for plan in ({}, {"memory": "20kB"}):
        student = mlp()
        l2t.unroll(
            student,
            range(30),
            lambda model, batch, step: task_loss(model),
            task_loss,
            meta=student.parameters(),
            **plan,
        ).backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- row 3: second derivatives through fast kernels


class Attention(unrolled.Attention):
    switch: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.switch is None:
            return super().forward(x)
        with sdpa_kernel(self.switch):
            return super().forward(x)


def test_pytorch_116348_116350_181177_attention_is_refused_with_its_switch() -> None:
    """derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented."""
    torch.manual_seed(0)
    student = Attention().double()
    for curvature in ("reverse", "recompute"):
        with pytest.raises(RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
            teach(student, curvature=curvature)
    fast, _ = teach(student, curvature="central")
    student.switch = SDPBackend.MATH
    exact = plain(student)
    same(fast, exact, 1e-7)
    same(teach(student)[0], exact)


@pytest.mark.filterwarnings("ignore:l2t.unroll. with curvature='forward'")
def test_pytorch_128971_154226_attention_in_forward_mode() -> None:
    """Trying to use forward AD with an attention that does not support it."""
    torch.manual_seed(0)
    student = Attention().double()
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
        teach(student, curvature="forward")
    student.switch = SDPBackend.MATH
    found, run = teach(student, curvature="forward")
    assert run.report.curvature == "forward"
    same(found, plain(student))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("device", unrolled.DEVICES)
def test_higher_4_27_pytorch_5261_25315_134901_recurrent_networks(
    kind: type[nn.RNNBase], device: str
) -> None:
    """No second derivative of cuDNN's recurrent networks."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = kind(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x.view(-1, 4, 2).to(self.out.weight.device))[0][:, -1]).cpu()

    torch.manual_seed(0)
    student = Recurrent().double().to(device)
    if device == "cuda":
        with pytest.raises(RuntimeError, match=r"torch.backends.cudnn.flags\(enabled=False\)"):
            teach(student)
    with torch.backends.cudnn.flags(enabled=device == "cpu"):
        exact = plain(student)
        same(teach(student)[0], exact)
    same(teach(student, curvature="central")[0], exact, 1e-7)


class FastKernel(torch.autograd.Function):
    """A kernel of a third party: one derivative, written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v * (1 - ctx.saved_tensors[0].tanh().square())


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Model) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_function(function: Model) -> nn.Sequential:
    """The MLP with this in the place of tanh."""
    student = mlp()
    student[1] = Called(function)
    return student


def test_flash_attention_699_1672_xformers_552_natten_68_191_kernels_of_third_parties() -> None:
    """Second derivatives and JVPs of attention kernels: "no plan unless someone volunteers"."""
    student = with_function(FastKernel.apply)
    with pytest.raises(RuntimeError, match="Take curvature='central'"):
        teach(student)
    same(teach(student, curvature="central")[0], plain(mlp()), 1e-7)
    found, run = teach(student, curvature="one-sided")
    same(found, plain(mlp()), 1e-4)
    assert run.report.curvature_error is None  # there is nothing exact to hold it against, and it says so
    assert "once_differentiable" in run.report.curvature_error_reason


# ---- row 4: torch.compile with gradients of higher order


@pytest.mark.usefixtures("fresh_dynamo")
def test_pytorch_91469_133230_183603_cuequivariance_268_torchmd_net_307_pina_621_a_compiled_student() -> None:
    """A wrong second derivative, later an error, where a model has been compiled."""
    student = torch.compile(mlp(), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"compile neither model nor loss.*curvature='central'"):
        teach(student)
    same(teach(student, curvature="central")[0], plain(mlp()), 1e-7)
    assert "Leave it uncompiled." in str(
        l2t.preflight(student, X, lambda model, x, step: task_loss(model, x))
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward"])
def test_pytorch_181581_compiled_code_that_may_lose_a_graph_is_refused(
    monkeypatch: pytest.MonkeyPatch, curvature: str
) -> None:
    """create_graph=True gave gradients of compiled code without requires_grad, until torch 2.13."""
    monkeypatch.setattr("l2t.curvature.LOSES_COMPILED", True)
    student = torch.compile(mlp(), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"whose torch before 2.13 may lose in silence. Update torch, or "):
        teach(student, curvature=curvature)
    same(teach(student, curvature="central")[0], plain(mlp()), 1e-7)


class Dropped(torch.autograd.Function):
    """tanh, whose first gradient comes back without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return (v * (1 - ctx.saved_tensors[0].tanh().square())).detach()


def test_pytorch_181581_a_gradient_that_has_lost_its_graph_is_found() -> None:
    """create_graph=True gave gradients without requires_grad: MAML lost its second order, in silence."""
    student = with_function(Dropped.apply)
    with pytest.raises(RuntimeError, match=r"1: no second derivative \(it is off by"):
        teach(student)
    same(teach(student, curvature="central", preflight=True)[0], plain(mlp()), 1e-7)


@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward"])
def test_pytorch_190855_second_derivatives_are_not_compiled(curvature: str) -> None:
    """A constant added to every entry of a compiled Hessian where the function has a torch.trace."""

    def traced(x: Tensor) -> Tensor:
        return 1 / (3 + x.tanh() + 0.1 * torch.trace(x[:3, :3]))

    student = with_function(traced)
    found, _ = teach(student, curvature=curvature)
    same(found, plain(student))
    same(found, teach(student, curvature="central")[0], 1e-7)  # which no second derivative is asked for


class OwnTangent(torch.autograd.Function):
    """x², whose jvp is its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * v

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * t


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:l2t.unroll. with curvature='forward'")
def test_pytorch_192985_a_compiled_jvp_is_not_relied_upon() -> None:
    """Dynamo drops the jvp of an autograd Function in silence: other tangents."""
    expected = plain(with_function(OwnTangent.apply))
    found, run = teach(with_function(OwnTangent.apply), curvature="forward")
    same(found, expected)
    assert run.report.curvature == "forward"
    student = torch.compile(with_function(OwnTangent.apply), backend="aot_eager")
    found, run = teach(student, curvature="forward")
    same(found, expected)
    assert run.report.curvature == "recompute"  # as a warning says


# ---- row 5: what is wrong in silence must be an error


class SavedIntermediate(torch.autograd.Function):
    """The example of that thread: 6x, by way of what ctx holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice, ctx.x = 2 * x, x
        return (3 * ctx.twice).tanh()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return 6 * v * (1 - (3 * ctx.twice).tanh().square())


def test_pytorch_76185_a_function_that_saves_what_it_computed() -> None:
    """The second derivative leaves out what went through a saved intermediate, in silence."""
    student = with_function(SavedIntermediate.apply)
    with pytest.raises(RuntimeError, match=r"1: no second derivative \(it is off by"):
        teach(student)


def test_liger_968_a_fused_loss_that_hands_out_a_gradient_made_before() -> None:
    """Wrong in silence with reduction="none": a gradient written over the logits has no derivative."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.gradient = logits.softmax(dim=1) - F.one_hot(Y, 3)
            return F.cross_entropy(logits, Y, reduction="none")

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            return ctx.gradient * v.unsqueeze(1)

    found = l2t.preflight(mlp(), X, lambda model, x, step: Fused.apply(model(x)).mean())
    assert ("loss", "second derivative") in [(x.where, x.lacks) for x in found.findings]
    factor = torch.ones(6, dtype=torch.float64, requires_grad=True)
    by_row, by_hand = [], []
    for losses, into in (
        (lambda z: l2t.dynamic_loss(z, Y, link="identity", reduction="none"), by_row),
        (lambda z: F.cross_entropy(z, Y, reduction="none"), by_hand),
    ):
        factor.grad = None
        l2t.unroll(
            mlp(),
            range(3),
            lambda model, batch, step: (factor * losses(model(X))).mean(),  # noqa: B023
            task_loss,
        ).backward()
        into.append(factor.grad)
    same(by_row[0], by_hand[0], 1e-10)


def test_mrcl_15_first_order_by_accident() -> None:
    """create_graph was forgotten, and the code was first order without anybody's knowing."""
    exact, run = teach(mlp())
    first, other = teach(mlp(), order="first")
    same(exact, plain(mlp()))
    assert float((first - exact).norm()) > 1e-3 * float(exact.norm())
    assert (run.report.order, other.report.order) == ("exact", "first")


# ---- row 6: several GPUs


def test_higher_40_learn2learn_128_170_263_mwn_6_pytorch_47562_63812_63929_data_parallel_is_refused(
    tmp_path: Path,
) -> None:
    """DistributedDataParallel passes by torch.autograd.grad: each rank would go its own way, in silence."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = nn.Sequential(nn.parallel.DistributedDataParallel(mlp()))
        with pytest.raises(
            TypeError, match=r"got a DistributedDataParallel at 0, .* the process group as group"
        ):
            teach(student)
        weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
        l2t.unroll(
            student[0].module,
            range(4),
            lambda model, batch, step: (weight * losses(model)).mean(),
            task_loss,
            optimizer=SGD(lr=LR),
            meta=[weight],
            group=dist.group.WORLD,  # of one process; tests/test_ranks.py has more
        ).backward()
        same(weight.grad, plain(mlp()))
    finally:
        dist.destroy_process_group()


def test_pytorch_172543_sharded_parameters_are_refused() -> None:
    """FSDP reshards storage under a graph of second order that is still alive."""

    class FSDPModule:
        """What fully_shard mixes into a module."""

    class Sharded(FSDPModule, nn.Linear):
        pass

    with pytest.raises(TypeError, match="got a FSDPModule at the student itself"):
        teach(Sharded(8, 3).double())


# ---- row 7: NaN and instability


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_higher_125_torchopt_26_optax_882_diffsharp_287_adam_where_the_second_moment_is_zero(
    kind: type[Adam],
) -> None:
    """The derivative of the root at zero is NaN: a ReLU that is off, a pixel that is always black."""
    dark, dim = X.clone(), X.clone()
    dark[:, 0], dim[:, 0] = 0, 1e-9
    for curvature in ("reverse", "recompute", "forward", "central"):
        found, run = teach(mlp(), x=dark, optimizer=kind(lr=0.05, eps=1e-3), curvature=curvature)
        assert run.report.nonfinite is None
        # Nearly black is nearly the same: there v is not zero, and autograd's own rule would do.
        near, _ = teach(mlp(), x=dim, optimizer=kind(lr=0.05, eps=1e-3))
        same(found, near, 1e-5)


def test_forum_115608_half_precision_that_overflows_is_named() -> None:
    """NaN in the meta-gradient under AMP, with no word of where it arose."""
    student = mlp().float()
    run = l2t.unroll(
        student,
        range(4),
        lambda model, batch, step: (model(X.float()) * (1e30 if step == 2 else 1)).square().mean(),
        lambda model: task_loss(model, X.float()),
        optimizer=SGD(lr=0.1),
    )
    assert run.report.nonfinite == ("loss", 2)


# ---- row 8: BatchNorm and other buffers


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()


def test_higher_103_running_statistics_come_back() -> None:
    """The functional copy's running_mean and running_var never reached the model."""
    student = normalised()
    _, run = teach(student)
    again = normalised()
    optimizer = torch.optim.SGD(again.parameters(), lr=LR)
    for _ in range(4):
        optimizer.zero_grad()
        task_loss(again).backward()
        optimizer.step()
    for name, buffer in again.named_buffers():
        same(run.buffers[name].double(), buffer.double())
    assert torch.equal(student[1].running_mean, torch.zeros(7, dtype=torch.float64))  # the start is kept
    student.load_state_dict(run.weights | run.buffers)
    student.eval()
    again.eval()
    same(student(X).detach(), again(X).detach())


@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward"])
@pytest.mark.parametrize("tracks", [True, False])
def test_functorch_384_986_batch_norm_in_place(curvature: str, tracks: bool) -> None:
    """MAML and Hessian-vector products met an error for what BatchNorm writes in place."""
    student = normalised()
    if not tracks:
        student[1] = nn.BatchNorm1d(7, track_running_stats=False).double()
    same(teach(student, curvature=curvature)[0], plain(student))


@pytest.mark.parametrize("training", [True, False])
def test_functorch_273_867_batch_norm_under_vmap(training: bool) -> None:
    """Running statistics that are not batched, in place, under vmap: students side by side."""
    stack = Stack(normalised, seeds=[0, 0]).double()
    stack.train(training)
    weight = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)

    def both(model: Model) -> Tensor:
        return torch.stack([F.cross_entropy(z, Y, reduction="none") for z in model(torch.stack([X, X]))])

    l2t.unroll(
        stack,
        range(4),
        lambda model, batch, step: (weight * both(model)).mean(dim=1).sum(),
        lambda model: both(model).mean(dim=1),
        optimizer=SGD(lr=LR),
    ).backward()
    same(weight.grad, plain(normalised().train(training)).expand(2, 6), 1e-10)


# ---- row 9: mixed precision in the inner loop


def test_higher_127_liger_305_autocast_inside_of_a_step() -> None:
    """A gradient scaler that finds no .grad; losses that meet two dtypes."""
    x, found = X.float(), []
    for plan in ({}, {"schedule": "every"}, {"curvature": "recompute"}):
        weight = torch.ones(6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            run = l2t.unroll(
                mlp().float(),
                range(4),
                lambda model, batch, step: (
                    (
                        weight * l2t.dynamic_loss(model(x), Y, link="identity", reduction="none")  # noqa: B023
                    ).mean()
                ),
                lambda model: F.cross_entropy(model(x), Y),
                optimizer=SGD(lr=LR),
                **plan,
            )
        run.backward()  # outside of autocast, as PyTorch asks for
        assert {w.dtype for w in run.weights.values()} == {torch.float32}
        found.append(weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    same(found[0].double(), plain(mlp()), 0.05)


# ---- row 10: first order and truncation that do what they say


def test_higher_63_102_128_129_first_order_gives_gradients_and_says_so() -> None:
    """track_higher_grads=False left .grad None; detaching by hand was anybody's guess."""
    student = mlp()
    weights = {name: p.detach() for name, p in student.named_parameters()}
    for _ in range(4):
        at = {name: w.detach().requires_grad_() for name, w in weights.items()}
        loss = task_loss(lambda x: torch.func.functional_call(student, at, x))  # noqa: B023
        grads = torch.autograd.grad(loss, list(at.values()))
        weights = {name: w - LR * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    at = {name: w.requires_grad_() for name, w in weights.items()}
    last = torch.autograd.grad(
        task_loss(lambda x: torch.func.functional_call(student, at, x)), [*at.values()]
    )
    run = l2t.unroll(
        student,
        range(4),
        lambda model, batch, step: task_loss(model),
        task_loss,
        optimizer=SGD(lr=LR),
        meta=student.parameters(),
        order="first",
    )
    run.backward()
    for p, expected in zip(student.parameters(), last, strict=True):  # first-order MAML
        same(p.grad, expected)
    assert run.report.order == "first"


def test_higher_9_betty_3_back_through_the_last_steps_only() -> None:
    """How do I block the backprop after k steps? The gradient of a run that began there."""
    found, run = teach(mlp(), 6, truncate=2)
    _, before = teach(mlp(), 4)
    student = mlp()
    student.load_state_dict(before.weights)
    same(found, plain(student, 2))
    assert run.report.truncate == 2
    student = mlp()
    with pytest.raises(ValueError, match="truncate"):  # what would be None without a word
        teach(student, 6, truncate=2, meta=student.parameters())


# ---- row 12: backward(create_graph=True) leaks


@pytest.mark.parametrize("hooked", [False, True])
def test_pytorch_4661_7343_71068_78622_nothing_is_left_and_nothing_warns(hooked: bool) -> None:
    """A cycle of a parameter and its gradient, and full backward hooks, kept graphs for ever."""
    torch.manual_seed(0)
    student = nn.Sequential(Watch(), nn.Linear(8, 3).double())
    if hooked:
        student[1].register_full_backward_hook(lambda module, before, after: None)
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                _, run = teach(student)
                del run
                assert sum(ref() is not None for refs in student[0].alive for ref in refs) == 0
    finally:
        gc.enable()
    assert all(p.grad is None for p in student.parameters())


# ---- row 14: explain the schedule, choose it, and store all where memory allows


def test_diffrax_549_668_no_step_is_taken_again_where_memory_allows() -> None:
    """Checkpointing slower than a plain scan, and no variant that just stores everything."""
    for plan in ({}, {"schedule": "all"}, {"memory": "1GB"}):
        assert teach(mlp(), 30, **plan)[1].report.steps_again == 0
    again = [
        teach(mlp(), 30, memory=memory)[1].report.steps_again for memory in ("6kB", "10kB", "20kB", "40kB")
    ]
    assert again == sorted(set(again), reverse=True)  # all of the memory that it is given is used


def test_diffrax_564_what_is_stored_can_be_read_before_the_run() -> None:
    """What is being saved, and what is recomputed?"""
    plan = l2t.schedule.Segments(length=2, slots=1)
    said = [f"{action.value} {step}" for action, step in plan.actions(6)]
    assert said[:7] == ["forward 0", "forward 1", "store 2", "forward 2", "forward 3", "tape 4", "tape 5"]
    assert said[7:11] == ["reverse 5", "reverse 4", "restore 2", "tape 2"]
    _, run = teach(mlp(), 6, schedule=plan)
    after = said[said.index("reverse 5") :]
    assert run.report.steps_again == sum(word.startswith(("forward", "tape")) for word in after)
