"""The loss inside torch.compile and make_fx: no graph break, eager's numbers, no silent second order.

Compiling takes seconds, so the tests that need no generated code use the backend that stops before it.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import l2t

N, C = 12, 5

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, generator=generator, requires_grad=True)
    target = torch.randint(C, (N,), generator=generator)
    target[1] = -100
    return logits, target


WEIGHTS = {
    "none": None,
    "full": l2t.Full.smoothed(C, 0.2),
    "diagonal": l2t.Diagonal.identity(C),
    "low-rank": l2t.LowRank.smoothed(C, 0.2),
}


def assert_same(compiled, eager, *tensors):
    """Same loss and same gradients."""
    leaves = [x for x in tensors if x.requires_grad]
    losses = compiled(*tensors), eager(*tensors)
    torch.testing.assert_close(*losses)
    assert losses[0].dtype == losses[1].dtype
    for a, b in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


def test_generated_code_equals_eager():
    """A student, the loss with every kind of coefficient, and backward, through the code generator."""
    layer = torch.nn.Linear(3, C)
    x, (_, target) = torch.randn(N, 3), inputs()
    weight = [part.clone().requires_grad_() for part in WEIGHTS["low-rank"]]
    bias, scale = torch.zeros(C, requires_grad=True), torch.ones(C, requires_grad=True)
    factors = torch.rand(N)

    def step(x, diagonal, left, right, bias, scale):
        record = l2t.LowRank(diagonal, left, right)
        return l2t.dynamic_loss(layer(x), target, record, bias, scale, sample_weight=factors)

    compiled = torch.compile(step, fullgraph=True)
    assert_same(compiled, step, x.requires_grad_(), *weight, bias, scale)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(step(x, *weight, bias, scale), parameters)
    for a, b in zip(
        torch.autograd.grad(compiled(x, *weight, bias, scale), parameters), expected, strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_graph_break(weight, reduction):
    logits, target = inputs()

    def loss(logits):
        return l2t.dynamic_loss(logits, target, weight, reduction=reduction)

    assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, logits)


def test_module_dynamic_shapes_and_autocast():
    module = l2t.DynamicLoss(l2t.Full.identity(C), bias=torch.zeros(C))

    def loss(logits, target):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(logits, target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    logits, target = inputs()
    for n in (N, 7, 3):
        part = logits[:n].detach().bfloat16().requires_grad_()
        assert_same(compiled, loss, part, target[:n])


def test_transforms_inside_the_graph():
    logits, target = (x.detach() for x in inputs())
    weight = WEIGHTS["full"]

    def loss(z, y):
        return l2t.dynamic_loss(z, y, weight)

    per_sample = torch.vmap(torch.func.grad(loss))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), per_sample(logits, target))


def test_jvp_inside_the_graph_keeps_its_tangent():
    """torch.compile drops the jvp of an autograd Function without a word; an op keeps its own."""
    logits, target = (x.detach() for x in inputs())
    tangent = torch.randn(N, C)

    def push(z, t):
        return torch.func.jvp(lambda z: l2t.dynamic_loss(z, target, WEIGHTS["low-rank"]), (z,), (t,))

    results = torch.compile(push, backend="aot_eager")(logits, tangent)
    for a, b in zip(results, push(logits, tangent), strict=True):
        torch.testing.assert_close(a, b)
    assert results[1].ne(0)


def test_a_second_derivative_through_a_compiled_graph_raises():
    logits, target = inputs()
    compiled = torch.compile(lambda z: l2t.dynamic_loss(z, target), fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(logits), logits, create_graph=True)
    assert first.requires_grad
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(first.sum(), logits)


def test_a_second_derivative_inside_a_traced_graph_is_right():
    """A graph that contains its derivatives is a first-order function, of the four ops."""
    logits, target = inputs()
    v = torch.randn(N, C)
    weight = l2t.Full(WEIGHTS["full"].weight.clone().requires_grad_())

    def product(logits, v, matrix):
        loss = l2t.dynamic_loss(logits, target, matrix)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad((first * v).sum(), (logits, matrix))

    graph = make_fx(product)(logits, v, weight.weight)
    called = {str(node.target) for node in graph.graph.nodes if "l2t" in str(node.target)}
    assert called == {"l2t.value.default", "l2t.grad.default", "l2t.grad_vjp.default"}
    other, _ = inputs(seed=1)
    expected = product(other, v, weight.weight)
    # Nobody asks for a third derivative: the graph's inputs need no gradient.
    other, matrix = other.detach(), weight.weight.detach()
    for run in (graph, torch.compile(graph, fullgraph=True, backend="aot_eager")):
        for a, b in zip(run(other, v, matrix), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_target_out_of_range_is_told_by_the_compiled_loss():
    logits, _ = inputs()
    compiled = torch.compile(l2t.dynamic_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="got 5 at position 0 of the flattened target"):
        compiled(logits, torch.full((N,), C))
