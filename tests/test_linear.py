"""dynamic_linear_loss: values and derivatives against oracle and two-step form, memory, every error."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import l2t
from l2t import linear, ops

STRUCTURES, LINKS = oracle.STRUCTURES, oracle.LINKS
REDUCTIONS = ("mean", "sum", "none")
N, D, C = 7, 3, 4


class Case:
    """Random inputs; `inputs` are all that can be differentiated, in the order of `loss`."""

    def __init__(
        self, structure, link, dtype=torch.float64, *, n=N, d=D, c=C, seed=0, chunk_rows=3, device="cpu"
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.link, self.chunk_rows = link, chunk_rows
        self.target = torch.randint(c, (n,), generator=generator).to(device)
        self.target[1] = -100
        parts = [x.to(device) for x in oracle.parts_of(structure, c, generator, dtype)]
        head = random(c, d) / max(d, 1) ** 0.5
        own = (random(n, d), head, 0.3 * random(c), random(c), 1 + 0.3 * random(c), 0.5 + random(n).abs())
        self.inputs = tuple(x.requires_grad_() for x in (*own, *parts))

    def loss(self, hidden, head, head_bias, bias, scale, sample_weight, *parts, reduction="mean"):
        return l2t.dynamic_linear_loss(
            hidden,
            head,
            self.target,
            oracle.weight_of(parts),
            bias,
            scale,
            head_bias=head_bias,
            link=self.link,
            sample_weight=sample_weight,
            reduction=reduction,
            chunk_rows=self.chunk_rows,
        )

    def unweighted(self, *inputs, reduction="mean"):
        """Without sample weights to be learned, which takes the way that makes gradients at once."""
        return self.loss(*inputs[:5], None, *inputs[5:], reduction=reduction)

    def fixed(self, *inputs, reduction="mean"):
        """With sample weights that are constants, which takes the same way."""
        return self.loss(*inputs[:5], self.inputs[5].detach(), *inputs[5:], reduction=reduction)

    def two_step(self, hidden, head, head_bias, bias, scale, sample_weight, *parts, reduction="mean"):
        return l2t.dynamic_loss(
            F.linear(hidden, head, head_bias),
            self.target,
            oracle.weight_of(parts),
            bias,
            scale,
            link=self.link,
            sample_weight=sample_weight,
            reduction=reduction,
        )

    def oracle(self, hidden, head, head_bias, bias, scale, sample_weight, *parts, reduction="mean"):
        return oracle.loss(
            hidden @ head.T + head_bias,
            self.target,
            parts,
            bias,
            scale,
            link=self.link,
            sample_weight=sample_weight,
            reduction=reduction,
        )

    @property
    def without(self):
        """The inputs but for sample_weight."""
        return tuple(x for i, x in enumerate(self.inputs) if i != 5)


def derivatives(fn, inputs, seed=0):
    """Value, first derivatives, and the derivatives of random combinations of these."""
    generator = torch.Generator().manual_seed(seed)

    def combined(tensors):
        return sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)).sum()
            for x in tensors
        )

    value = fn(*inputs)
    first = torch.autograd.grad(combined([value]), inputs, create_graph=True)
    assert all(x.requires_grad for x in first)
    second = torch.autograd.grad(combined(first), inputs)
    return (value, *first, *second)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance)


# ---- values and derivatives ----


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_agrees_with_the_oracle_to_the_second_derivative(structure, link, reduction, chunk_rows):
    case = Case(structure, link, chunk_rows=chunk_rows)
    tolerance = {"rtol": 1e-9, "atol": 1e-11}

    def run(fn, inputs):
        return derivatives(lambda *x: fn(*x, reduction=reduction), inputs)

    assert_same(run(case.loss, case.inputs), run(case.oracle, case.inputs), **tolerance)

    def unweighted(*x, reduction):
        return case.oracle(*x[:5], None, *x[5:], reduction=reduction)

    def fixed(*x, reduction):
        return case.oracle(*x[:5], case.inputs[5].detach(), *x[5:], reduction=reduction)

    assert_same(run(case.unweighted, case.without), run(unweighted, case.without), **tolerance)
    assert_same(run(case.fixed, case.without), run(fixed, case.without), **tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_as_near_to_float64_as_the_two_step_form(structure, dtype, reduction, device):
    """In half precision sums over stretches are in float32: the error may not grow with their number."""
    if dtype is torch.float32:
        case = Case(structure, "sigmoid", dtype, n=200, d=16, c=50, chunk_rows=7, device=device)
    else:
        case = Case(structure, "sigmoid", dtype, n=200, d=16, c=50, chunk_rows=23, device=device)
    exact = [x.detach().double().requires_grad_() for x in case.inputs]

    def run(fn, inputs):
        return derivatives(lambda *x: fn(*x, reduction=reduction), inputs)

    ours, theirs = run(case.loss, case.inputs), run(case.two_step, case.inputs)
    truth = run(case.two_step, exact)
    for mine, twos, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == twos.dtype
        assert mine.shape == twos.shape
        error, allowed = ((x.double() - true).norm() for x in (mine, twos))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_to_the_head_do_not_lose_bits_over_many_stretches(dtype):
    """Summed in half precision, 2000 equal parts would stand still on the way."""
    hidden, target = torch.ones(2000, 1, dtype=dtype), torch.zeros(2000, dtype=torch.int64)
    head, head_bias = (torch.zeros(s, dtype=dtype, requires_grad=True) for s in ((2, 1), (2,)))
    l2t.dynamic_linear_loss(
        hidden, head, target, link="identity", head_bias=head_bias, reduction="sum", chunk_rows=1
    ).backward()
    assert head.grad.flatten().tolist() == head_bias.grad.tolist() == [-1000.0, 1000.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_is_that_of_the_two_step_form(dtype, bias):
    case = Case("low-rank", "sigmoid", torch.float32, n=40, d=8, c=12)
    used = [x for i, x in enumerate(case.without) if bias or i != 2]

    def run(fn):
        def loss(hidden, head, *rest):
            head_bias, *rest = rest if bias else (None, *rest)
            with torch.autocast("cpu", dtype=dtype):
                return fn(hidden, head, head_bias, *rest)

        return derivatives(loss, used)

    ours = run(case.unweighted)
    theirs = run(lambda *x: case.two_step(*x[:5], None, *x[5:]))
    assert all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
    # Backward under autocast must not lower what forward did not.
    wide = Case("none", "sigmoid", torch.float32, n=40)
    loss = wide.unweighted(*wide.without)
    expected = torch.autograd.grad(loss, wide.without[:2], retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        first = torch.autograd.grad(loss, wide.without[:2], create_graph=True)
        second = torch.autograd.grad(first[0].sum(), wide.without[:2], retain_graph=True)
    assert_same(first, expected, rtol=1e-6, atol=1e-7)
    assert_same(second, torch.autograd.grad(first[0].sum(), wide.without[:2]), rtol=0, atol=0)


def test_cross_entropy_and_torchs_own_head():
    layer = torch.nn.Linear(8, 11)
    hidden, target = torch.randn(4, 5, 8, requires_grad=True), torch.randint(11, (4, 5))
    target[2] = -100
    leaves = (hidden, *layer.parameters())
    ours = l2t.dynamic_linear_loss(
        hidden, layer.weight, target, head_bias=layer.bias, link="identity", chunk_rows=4
    )
    theirs = F.cross_entropy(layer(hidden).movedim(-1, 1), target)
    torch.testing.assert_close(ours, theirs)
    assert_same(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,), (0, 3), (2, 0, 3), (1, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_shapes_of_hidden(shape, ignored, reduction, weighted):
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    head = torch.randn(C, shape[-1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(C, dtype=torch.float64, requires_grad=True)
    target = torch.randint(C, shape[:-1])
    if ignored == "all":
        target.fill_(-100)
    elif target.dim() and target.numel() > 1:
        target.view(-1)[0] = -100
    factor = torch.rand(target.shape, dtype=torch.float64) if weighted else None
    kwargs = {"sample_weight": factor, "reduction": reduction}
    ours = l2t.dynamic_linear_loss(hidden, head, target, bias=bias, chunk_rows=2, **kwargs)
    logits = F.linear(hidden, head)
    theirs = l2t.dynamic_loss(
        logits if logits.dim() == 1 else logits.movedim(-1, 1), target, bias=bias, **kwargs
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    leaves = (hidden, head, bias)
    first, expected = (
        torch.autograd.grad(x.sum(), leaves, create_graph=True, materialize_grads=True)
        for x in (ours, theirs)
    )
    assert_same(first, expected)
    second, expected = (
        torch.autograd.grad(sum((y**2).sum() for y in x), leaves, materialize_grads=True)
        for x in (first, expected)
    )
    assert_same(second, expected)


def test_no_class_and_small_targets():
    none = torch.full((2,), -100)
    assert l2t.dynamic_linear_loss(torch.ones(2, 3), torch.ones(0, 3), none, reduction="sum") == 0
    hidden, head = torch.randn(5, 3), torch.randn(4, 3)
    target = torch.tensor([0, 1, 255, 3, 2])
    assert torch.equal(
        l2t.dynamic_linear_loss(hidden, head, target, ignore_index=255),
        l2t.dynamic_linear_loss(hidden, head, target.to(torch.uint8), ignore_index=255),
    )


def test_rows_of_a_chunk_may_be_any_integer():
    hidden, head, target = torch.randn(5, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 3, 2])
    found = [l2t.dynamic_linear_loss(hidden, head, target, chunk_rows=rows) for rows in (2, np.int64(2))]
    assert torch.equal(*found)


def test_ignored_rows_do_not_leak():
    """Whatever stands in a row that takes no part."""
    case = Case("full", "sigmoid")
    hidden = case.inputs[0].detach().clone()
    hidden[1] = torch.tensor([1e300, -1e300, 1e300], dtype=torch.float64)
    hidden.requires_grad_()
    inputs = (hidden, *case.inputs[1:])
    assert_same(derivatives(case.loss, inputs), derivatives(case.two_step, inputs))
    assert torch.autograd.grad(case.loss(*inputs), hidden)[0][1].eq(0).all()


def test_strides_of_everything():
    case = Case("low-rank", "log-sigmoid", n=6, d=5)

    def strided(x):
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x.detach()
        return wide[..., ::2].requires_grad_()

    inputs = [
        strided(x.t()).detach().t().requires_grad_() if x.dim() == 2 else strided(x) for x in case.inputs
    ]
    case_of = case.target
    case.target = torch.stack([case_of, case_of], 1)[:, 0]
    assert not case.target.is_contiguous()
    assert_same(derivatives(case.loss, inputs), derivatives(case.oracle, case.inputs))
    rows = inputs[:5] + inputs[6:]
    assert_same(derivatives(case.unweighted, rows), derivatives(case.unweighted, case.without))


# ---- gradcheck ----


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradcheck(structure, link):
    case = Case(structure, link, n=4, c=3, chunk_rows=3)
    for fn, inputs in ((case.loss, case.inputs), (case.unweighted, case.without)):
        assert gradcheck(fn, inputs, check_forward_ad=True, check_batched_grad=True)
        # gradgradcheck can pass on nothing where the first gradient lost its graph.
        first = torch.autograd.grad(fn(*inputs), inputs, create_graph=True)
        assert all(x.requires_grad for x in first)
        assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("wanted", [x for x in itertools.product([False, True], repeat=4) if any(x)])
def test_any_subset_of_inputs_may_need_gradients(wanted):
    case = Case("low-rank", "sigmoid", n=3, c=3, chunk_rows=2)
    groups = (0, 1, 2, 3, 3, 3, 3, 3, 3)  # hidden, head, head_bias, coefficients
    inputs = [x.detach().requires_grad_(wanted[i]) for i, x in zip(groups, case.inputs, strict=True)]
    rows = [x for i, x in enumerate(inputs) if i != 5]
    for fn, these in ((case.loss, inputs), (case.unweighted, rows)):
        assert gradcheck(fn, these)
        assert gradgradcheck(fn, these)


def test_no_gradient_where_nobody_asks():
    case = Case("none", "sigmoid")
    with torch.no_grad():
        outside = case.unweighted(*case.without)
    assert not outside.requires_grad
    with torch.inference_mode():
        inside = case.unweighted(*case.without)
    torch.testing.assert_close(inside, outside)
    assert not case.unweighted(*(x.detach() for x in case.without)).requires_grad


def test_part_of_the_gradients_may_be_asked_for():
    """First some, by a backward that keeps the graph, then others, then all twice."""
    case = Case("diagonal", "sigmoid")
    expected = torch.autograd.grad(case.oracle(*case.inputs[:5], None, *case.inputs[6:]), case.without)
    for create_graph in (False, True):
        loss = case.unweighted(*case.without)
        for i in (1, 0, 3):
            options = {"create_graph": create_graph, "retain_graph": True}
            (one,) = torch.autograd.grad(loss, case.without[i], **options)
            torch.testing.assert_close(one, expected[i])
        assert_same(torch.autograd.grad(loss, case.without), expected)


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_a_second_backward_is_the_first(factor):
    case = Case("full", "sigmoid")
    loss = factor * case.unweighted(*case.without)
    runs = [torch.autograd.grad(loss, case.without, retain_graph=True) for _ in range(3)]
    twice = torch.autograd.grad(loss, case.without, create_graph=True)
    for other in (*runs[1:], twice):
        assert_same(other, runs[0], rtol=1e-13, atol=1e-15)
    runs[0][0].zero_()
    assert_same(torch.autograd.grad(loss, case.without), runs[1], rtol=1e-13, atol=1e-15)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, case.without)


def test_changing_an_input_before_backward_is_told():
    target = torch.randint(C, (N,))
    for reduction in REDUCTIONS:
        hidden = torch.randn(N, D, requires_grad=True)
        scaled, head = hidden * 1, torch.randn(C, D)
        loss = l2t.dynamic_linear_loss(scaled, head, target, reduction=reduction).sum()
        scaled.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_both_ways_through_the_dispatcher_and_past_it_agree(monkeypatch, reduction):
    case = Case("low-rank", "sigmoid", torch.float32, n=50)

    def run():
        return derivatives(lambda *x: case.fixed(*x, reduction=reduction), case.without)

    direct, again = run(), run()
    for a, b in zip(direct, again, strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(ops, "unwatched", lambda: False)
    assert_same(direct, run())


def test_a_device_without_a_kernel(monkeypatch):
    """There the ops of the loss write into nobody's memory, and their results are copied."""
    case = Case("low-rank", "sigmoid")
    expected = [
        [derivatives(case.loss, case.inputs), derivatives(case.fixed, case.without)],
        torch.func.jvp(torch.func.grad(case.unweighted), case.without, case.without),
    ]
    monkeypatch.setattr(ops, "has_kernel", lambda logits: False)
    assert_same(derivatives(case.loss, case.inputs), expected[0][0], rtol=0, atol=0)
    assert_same(derivatives(case.fixed, case.without), expected[0][1], rtol=0, atol=0)
    ours = torch.func.jvp(torch.func.grad(case.unweighted), case.without, case.without)
    assert_same(ours, expected[1], rtol=0, atol=0)


# ---- memory ----


def memory_of(run):
    """Every allocation of a run: the largest, and the most that was held at a time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return max(changes), max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", ["none", "diagonal", "low-rank"])
def test_no_more_than_a_stretch_of_logits_is_in_memory(structure, reduction, dtype, monkeypatch):
    n, d, c, rows = 1024, 4, 1024, 64
    monkeypatch.setattr(linear, "PIECE", 8 * c)
    case = Case(structure, "sigmoid", dtype, n=n, d=d, c=c, chunk_rows=rows)
    inputs = [x.detach().requires_grad_() for x in case.without]
    # The products of float16 are made in float32 on the CPU, beside the logits.
    size = rows * c * (dtype.itemsize + (4 if dtype is torch.float16 else 0))

    def first(fn):
        loss = fn(*inputs, reduction=reduction).sum()
        return torch.autograd.grad(loss, inputs)

    def second(fn):
        loss = fn(*inputs, reduction=reduction).sum()
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum((x.float() ** 2).sum() for x in found), inputs)

    def forward_over_reverse(fn):
        at = tuple(range(len(inputs)))
        primals = tuple(x.detach() for x in inputs)
        gradient = torch.func.grad(lambda *x: fn(*x, reduction=reduction).sum(), argnums=at)
        return torch.func.jvp(gradient, primals, primals)

    small = 30 * n * d * 4 + 25 * c * d * 4  # what is as long as the rows or as the head
    assert small + 3 * size < n * c * dtype.itemsize
    for fn in (case.unweighted, case.fixed):
        for run, held in ((first, 1), (second, 3), (forward_over_reverse, 3)):
            largest, most = memory_of(lambda run=run, fn=fn: run(fn))
            assert largest <= max(size, 5 * max(n, c) * d)
            assert most <= held * size + small
    # The measure sees what it is to see.
    largest, _ = memory_of(lambda: first(lambda *x, **k: case.two_step(*x[:5], None, *x[5:], **k)))
    assert largest >= n * c * dtype.itemsize


def test_a_stretch_has_no_more_rows_than_asked_and_as_many_as_fit(monkeypatch):
    seen = []
    room = linear._Call.room

    def watched(self, name, rows, dtype=None):
        seen.append(rows.stop - rows.start)
        return room(self, name, rows, dtype)

    monkeypatch.setattr(linear._Call, "room", watched)
    hidden, head, target = torch.randn(10, 2), torch.randn(8, 2), torch.randint(8, (10,))

    def stretches(**kwargs):
        seen.clear()
        l2t.dynamic_linear_loss(hidden, head, target, **kwargs)
        return list(seen)

    assert stretches() == [10]
    assert stretches(chunk_rows=4) == [4, 4, 2]
    assert stretches(chunk_rows=9) == [5, 5]
    assert stretches(chunk_rows=100) == [10]
    monkeypatch.setattr(linear, "CHUNK_BYTES", 3 * 8 * 4)
    assert stretches() == [3, 3, 3, 1]
    monkeypatch.setattr(linear, "CHUNK_BYTES", 1)
    assert stretches() == [1] * 10


# ---- torch.func, vmap, forward mode ----


def test_every_route_to_a_hessian():
    case = Case("low-rank", "sigmoid", n=4, c=3, chunk_rows=3)
    at = tuple(range(len(case.without)))
    inputs = tuple(x.detach() for x in case.without)
    func = torch.func

    def two(*x):
        return case.two_step(*x[:5], None, *x[5:])

    expected = func.hessian(two, at)(*inputs)
    for route in (
        func.hessian(case.unweighted, at),
        func.jacrev(func.jacrev(case.unweighted, at), at),
        func.jacrev(func.jacfwd(case.unweighted, at), at),
        lambda *x: torch.autograd.functional.hessian(case.unweighted, x),
    ):
        for ours, theirs in zip(route(*inputs), expected, strict=True):
            assert_same(ours, theirs)


def test_hessian_vector_products_of_torch_func():
    case = Case("full", "sigmoid")
    at = tuple(range(len(case.inputs)))
    inputs = tuple(x.detach() for x in case.inputs)
    v = tuple(torch.randn_like(x) for x in inputs)

    def by(fn):
        gradient = torch.func.grad(fn, at)
        _, forward = torch.func.jvp(gradient, inputs, v)
        _, pull = torch.func.vjp(gradient, *inputs)
        return forward, pull(v)

    (forward, reverse), (expected, _) = by(case.loss), by(case.two_step)
    assert_same(forward, expected)
    assert_same(reverse, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode(reduction):
    case = Case("diagonal", "log-sigmoid")
    tangents = [torch.randn_like(x) for x in case.inputs]
    results = []
    for fn in (case.loss, case.two_step):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(case.inputs, tangents, strict=True)]
            results.append(forward_ad.unpack_dual(fn(*duals, reduction=reduction)))
    assert_same(*results)


@pytest.mark.parametrize("own", [(0,), (0, 1), (3, 4, 6), tuple(range(7))], ids=str)
def test_vmap_over_students_and_over_coefficients(own):
    case = Case("diagonal", "sigmoid")
    inputs = [x.detach() for x in case.inputs]
    dims = [None] * len(inputs)
    for i in own:
        inputs[i] = torch.stack([(1 + 0.1 * b) * inputs[i] for b in range(3)], -1)
        dims[i] = -1
    at = tuple(range(len(inputs)))

    def both(fn):
        return torch.vmap(torch.func.grad_and_value(fn, at), in_dims=tuple(dims))(*inputs)

    (ours, loss), (theirs, expected) = both(case.loss), both(case.two_step)
    assert_same((loss, *ours), (expected, *theirs))


def test_an_inner_vmap_over_nothing_of_the_loss():
    """Values, and both second orders, where the loss is batched at an outer level only."""
    case = Case("none", "identity")
    hidden, head = (x.detach() for x in case.inputs[:2])
    students, tangents, five = torch.stack([hidden, -hidden]), torch.stack([hidden] * 5), torch.arange(5.0)

    def results(loss):
        def products(h):
            return torch.vmap(lambda v: torch.func.jvp(torch.func.grad(loss), (h,), (v,))[1])(tangents)

        along = torch.vmap(lambda h: torch.vmap(lambda v: torch.func.jvp(loss, (h,), (v,))[1])(tangents))
        return (
            torch.vmap(lambda h: torch.vmap(lambda v: loss(h))(five))(students),
            torch.vmap(torch.func.grad(lambda h: torch.vmap(lambda v: loss(h) * v)(five).sum()))(students),
            along(students),
            torch.vmap(products)(students),
            torch.vmap(torch.func.hessian(loss))(students),
            torch.vmap(torch.func.jacrev(torch.func.jacrev(loss)))(students),
        )

    ours = results(lambda h: l2t.dynamic_linear_loss(h, head, case.target, link="identity", chunk_rows=3))
    assert_same(ours, results(lambda h: F.cross_entropy(F.linear(h, head), case.target)))


def test_vmap_over_nobody():
    """As far as PyTorch goes with an empty batch."""
    head, target = torch.randn(C, D), torch.randint(C, (N,))

    def losses(hidden, head):
        return l2t.dynamic_linear_loss(hidden, head, target, reduction="none")

    nobody = torch.empty(0, N, D)
    assert torch.vmap(losses, (0, None))(nobody, head).shape == (0, N)
    gradients = torch.vmap(torch.func.grad(lambda h, a: losses(h, a).sum(), (0, 1)), (0, None))(nobody, head)
    assert [x.shape for x in gradients] == [(0, N, D), (0, C, D)]


def test_vmap_with_targets_and_second_order():
    case = Case("low-rank", "sigmoid")
    target = torch.stack([case.target, case.target.flip(0)])
    hidden = torch.stack([case.inputs[0].detach(), case.inputs[0].detach() * 2])
    head, _, bias, scale, *parts = (x.detach() for x in case.without[1:])
    weight = oracle.weight_of(parts)

    def product(form):
        def loss(hidden, head, target):
            return form(hidden, head, target)

        def one(hidden, target):
            gradient = torch.func.grad(lambda h, a: loss(h, a, target), (0, 1))
            return torch.func.jvp(gradient, (hidden, head), (hidden, head))[1]

        return torch.vmap(one)(hidden, target)

    ours = product(lambda h, a, y: l2t.dynamic_linear_loss(h, a, y, weight, bias, scale, chunk_rows=3))
    theirs = product(lambda h, a, y: l2t.dynamic_loss(F.linear(h, a), y, weight, bias, scale))
    assert_same(ours, theirs)


def test_the_third_derivative_and_forward_over_forward_raise():
    case = Case("none", "sigmoid")
    for fn, inputs in ((case.loss, case.inputs), (case.unweighted, case.without)):
        (first,) = torch.autograd.grad(fn(*inputs), inputs[0], create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="order of derivative must be 1 or 2"):
            torch.autograd.grad(second.sum(), inputs[0])
    hidden = case.inputs[0].detach()

    def loss(h):
        return case.unweighted(h, *(x.detach() for x in case.without[1:]))

    def product(x):
        return torch.func.jvp(torch.func.grad(loss), (x,), (x,))[1].sum()

    with pytest.raises(NotImplementedError, match="order of derivative must be 1 or 2"):
        torch.func.grad(product)(hidden)
    with pytest.raises(NotImplementedError, match=r"order of derivative must be 1 or 2|forward over forward"):
        torch.func.jvp(product, (hidden,), (hidden,))
    with pytest.raises(NotImplementedError, match="forward over forward"):
        torch.func.jvp(lambda x: torch.func.jvp(loss, (x,), (x,))[1], (hidden,), (hidden,))


def test_in_unroll():
    """A teacher gradient through steps of a student that ends in a linear head."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (3, 12), generator=generator)

    def run(form):
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, C)).double()
        diagonal = torch.ones(C, dtype=torch.float64, requires_grad=True)
        factor = torch.ones(12, dtype=torch.float64, requires_grad=True)

        def loss(model, batch, step):
            return form(model[:2](batch[0]), model[2], batch[1], l2t.Diagonal(diagonal), factor)

        def measure(model):
            return F.cross_entropy(model(x[0]), y[0])

        result = l2t.unroll(
            body, list(zip(x, y, strict=True)), loss, measure, optimizer=l2t.optim.SGD(lr=0.5, momentum=0.9)
        )
        result.backward()
        return result.measure, diagonal.grad, factor.grad

    ours = run(
        lambda h, layer, y, weight, factor: (
            l2t.dynamic_linear_loss(
                h, layer.weight, y, weight, head_bias=layer.bias, sample_weight=factor, chunk_rows=5
            )
            + l2t.dynamic_linear_loss(h, layer.weight, y, weight, head_bias=layer.bias, chunk_rows=5)
        )
    )
    theirs = run(
        lambda h, layer, y, weight, factor: (
            l2t.dynamic_loss(layer(h), y, weight, sample_weight=factor)
            + l2t.dynamic_loss(layer(h), y, weight)
        )
    )
    assert_same(ours, theirs)
    assert ours[1].ne(0).any()


# ---- torch.compile ----


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_graph_break(reduction):
    case = Case("low-rank", "sigmoid", torch.float32)
    for fn, inputs in ((case.loss, case.inputs), (case.unweighted, case.without)):

        def loss(*x, fn=fn):
            return fn(*x, reduction=reduction).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = [(f(*inputs), torch.autograd.grad(f(*inputs), inputs)) for f in (compiled, loss)]
        torch.testing.assert_close(results[0][0], results[1][0])
        assert_same(results[0][1], results[1][1])
        with pytest.raises(RuntimeError, match=r"double backward|requires create_graph=False"):
            torch.autograd.grad(
                torch.autograd.grad(compiled(*inputs), inputs[0], create_graph=True)[0].sum(), inputs[0]
            )


@pytest.mark.usefixtures("fresh_dynamo")
def test_generated_code_dynamic_shapes_and_autocast():
    head = torch.nn.Linear(D, C)

    def loss(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.tanh(x)
            return l2t.dynamic_linear_loss(hidden, head.weight, y, head_bias=head.bias)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (9, 5):
        x, y = torch.randn(n, D, requires_grad=True), torch.randint(C, (n,))
        leaves = (x, head.weight, head.bias)
        results = [(f(x, y), *torch.autograd.grad(f(x, y), leaves)) for f in (compiled, loss)]
        assert_same(*results, rtol=1e-2, atol=1e-3)


def test_a_second_derivative_inside_a_traced_graph_is_right():
    case = Case("diagonal", "sigmoid")

    def product(*inputs):
        first = torch.autograd.grad(case.unweighted(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in first), inputs)

    graph = make_fx(product)(*case.without)
    called = {str(node.target) for node in graph.graph.nodes if "l2t" in str(node.target)}
    assert called == {f"l2t.linear_{name}.default" for name in ("value", "grad", "grad_vjp")}
    other = Case("diagonal", "sigmoid", seed=1).without
    case.target = case.target.clone()
    # Nobody asks for a third derivative: the graph's inputs need no gradient.
    assert_same(graph(*(x.detach() for x in other)), product(*other))


@pytest.mark.parametrize("n", [N, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_ops_are_what_their_schemas_say(dtype, n):
    case = Case("low-rank", "sigmoid", dtype, n=max(n, 2))
    number = ops.arithmetic(dtype)
    hidden, head, head_bias = (x.detach() for x in case.inputs[:3])
    tables = [x.detach().to(number) for x in (*case.inputs[6:], *case.inputs[3:5])]
    where = (hidden[:n], case.target[:n], head, head_bias, *tables, 0, -100, 3)
    _, stats = torch.ops.l2t.linear_value(*where)
    v_loss = torch.ones(n, dtype=number)
    like = [torch.randn_like(where[i]) for i in linear._INPUTS]
    wanted = [True, False] * 4
    for name, arguments in {
        "linear_value": where,
        "linear_grad": (*where, stats, v_loss, wanted),
        "linear_grad_vjp": (*where, stats, v_loss, *like, [True, *wanted]),
        "linear_grad_jvp": (*where, stats, v_loss, v_loss, *like, wanted),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opcheck(getattr(torch.ops.l2t, name).default, arguments)


# ---- errors ----


def call(**changes):
    arguments = {
        "hidden": torch.ones(3, 2),
        "head": torch.ones(4, 2),
        "target": torch.tensor([0, 3, 1]),
        **changes,
    }
    return l2t.dynamic_linear_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a float32, float64, bfloat16 or float16 tensor"),
        ({"head": torch.ones(4, 2).int()}, TypeError, "head must be a float32, float64, bfloat16 or float16"),
        ({"head": torch.nn.Linear(2, 4)}, TypeError, "got Linear. Pass its weight, head.weight."),
        ({"head_bias": 1.0}, TypeError, "head_bias must be a float32, float64, bfloat16 or float16 tensor"),
        (
            {"hidden": torch.tensor(1.0)},
            ValueError,
            r"hidden and head must be of shapes \(..., D\) and \(C, D\)",
        ),
        (
            {"head": torch.ones(2, 4)},
            ValueError,
            r"hidden and head must be of shapes \(..., D\) and \(C, D\)",
        ),
        ({"head": torch.ones(2)}, ValueError, r"hidden and head must be of shapes \(..., D\) and \(C, D\)"),
        ({"head_bias": torch.ones(2)}, ValueError, r"head_bias must be of shape \(4,\), got shape \(2,\)"),
        ({"target": torch.ones(3)}, TypeError, "target must be class indices"),
        ({"target": torch.ones(3).int()}, TypeError, "target must be an int64 or uint8 tensor"),
        (
            {"target": torch.tensor(1)},
            ValueError,
            r"target must be of shape \(3,\) for hidden of shape \(3, 2\)",
        ),
        (
            {"target": torch.zeros(3, device="meta").long()},
            ValueError,
            "target must be on the device of hidden",
        ),
        ({"head": torch.ones(4, 2, device="meta")}, ValueError, "head must be on the device of hidden"),
        ({"head": torch.ones(4, 2).double()}, TypeError, "head must be float32 as hidden is"),
        ({"head_bias": torch.ones(4).half()}, TypeError, "head_bias must be float32 as hidden is"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an integer of 1 or more, got 0"),
        ({"chunk_rows": 2.0}, ValueError, "chunk_rows must be an integer of 1 or more, got 2.0"),
        (
            {"hidden": torch.ones(3, 2).to_sparse()},
            TypeError,
            "hidden must be a dense tensor, got a sparse_coo",
        ),
        ({"head": torch.ones(4, 2).to_sparse()}, TypeError, "head must be a dense tensor, got a sparse_coo"),
        ({"target": torch.ones(3).long().to_sparse()}, TypeError, "target must be a dense tensor"),
        ({"chunk_rows": True}, ValueError, "chunk_rows must be an integer of 1 or more, got True"),
        ({"link": "tanh"}, ValueError, "link must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be of shape \(4, 4\) or \(4,\)"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be of shape \(4,\)"),
        ({"scale": torch.ones(4).double()}, TypeError, "scale must be float32 with float32 logits"),
        ({"sample_weight": torch.ones(4)}, ValueError, r"sample_weight must be of shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_told(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        call(**changes)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wants", [True, False])
def test_a_target_out_of_range_is_told_by_its_row_among_all(reduction, wants):
    hidden = torch.ones(3, 2, requires_grad=wants)
    with pytest.raises(
        IndexError, match=r"must be in \[0, 4\) .* got 4 at position 2 of the flattened target"
    ):
        call(hidden=hidden, target=torch.tensor([0, 1, 4]), chunk_rows=1, reduction=reduction)


def test_gradients_that_are_not_there_are_refused():
    hidden, target, head = torch.ones(3, 2), torch.tensor([0, 3, 1]), torch.ones(4, 2)
    where = (hidden, target, head, *[None] * 6, 0, -100, 0)
    _, stats = torch.ops.l2t.linear_value(*where)
    for wanted in ([True] * 8, [True] * 7):
        with pytest.raises(ValueError, match="wanted must be a bool for each result"):
            torch.ops.l2t.linear_grad(*where, stats, torch.ones(3), wanted)


# ---- benchmarks/linear.py ----


@pytest.fixture
def benchmark_of_linear(monkeypatch):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "linear.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = [
        "linear.py",
        "--rows",
        "300",
        "--width",
        "4",
        "--classes",
        "500",
        "--chunk-rows",
        "10",
        "--rounds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", small)
    return module


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_benchmark_runs_and_sees_the_memory(benchmark_of_linear, order, tmp_path):
    sys.argv += ["--order", order, "--json", str(tmp_path / "rows.json")]
    benchmark_of_linear.main()
    peak = {
        (row["contender"], row["weight"]): row["peak_mb"] * 1e6
        for row in json.loads((tmp_path / "rows.json").read_text())["rows"]
    }
    whole = 300 * 500 * 4
    assert all(peak["linear", w] < whole / 2 < whole <= peak["two-step", w] for w in ("diagonal", "low-rank"))


def test_the_benchmark_times_nothing_that_is_wrong(benchmark_of_linear, monkeypatch):
    right = benchmark_of_linear.CONTENDERS["linear"]
    monkeypatch.setitem(benchmark_of_linear.CONTENDERS, "linear", lambda *x: right(*x) * 1.001)
    with pytest.raises(SystemExit, match="linear diagonal is wrong by"):
        benchmark_of_linear.main()


# ---- benchmarks/linear_memory.py ----


def test_the_memory_benchmark_runs_in_fresh_processes_and_sees_the_logits(monkeypatch, tmp_path):
    import linear_memory

    sizes = ["--rows=4096", "--width=4", "--classes=4000", "--rounds=1", "--clock=cpu"]
    monkeypatch.setattr(sys, "argv", ["linear_memory.py", *sizes, f"--json={tmp_path / 'rows.json'}"])
    monkeypatch.setattr(linear_memory, "KINDS", ("smoothing",))
    monkeypatch.setattr(linear_memory, "ORDERS", ("first",))
    linear_memory.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    whole = 4096 * 4000 * 4 / 2**20
    assert row["linear_mb"] < whole < row["plain_mb"]
    assert row["share"] == row["linear_mb"] / row["plain_mb"]


def test_the_memory_benchmark_measures_nothing_that_is_wrong(monkeypatch):
    import linear_memory

    right = linear_memory.loss
    monkeypatch.setattr(linear_memory, "loss", lambda *x: right(*x) * (1 if x[2] == "plain" else 1 + 1e-9))
    with pytest.raises(SystemExit, match="is wrong by"):
        linear_memory.check_agreement(20, 3, 30)
