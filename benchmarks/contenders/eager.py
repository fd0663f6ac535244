"""The loss as its definition reads in PyTorch, differentiated by autograd: what everybody can write.

In float64 it is also what every contender's results are compared with.

`grad_vjp` walks a graph that was built beforehand and kept, as l2t's op starts from what `value` left.
Forward mode has no graph to keep: `grad_jvp` includes the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case, Inputs, Job
from torch import Tensor

OPS = ("value", "value+grad", "grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all", "hvp", "linear")
LOSS = "dynamic"


def why_not(case: Case) -> str | None:
    return None


def definition(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor,
) -> Tensor:
    log_p = F.log_softmax(logits, dim=1, dtype=weight.dtype)
    if weight.dim() == 2:
        u = (weight[target] * log_p).sum(dim=1)
    else:
        u = weight[target] * log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    if left is not None:
        u = u + (left[target] * (log_p @ right)).sum(dim=1)
    return -torch.sigmoid(u + bias[target]).mean()


def make(case: Case, inputs: Inputs, loss: Callable[..., Tensor] = definition) -> Job:
    target = inputs.target
    logits = inputs.logits.clone().requires_grad_()
    tables = [x if x is None else x.detach().requires_grad_(case.to_all) for x in inputs[2:6]]
    leaves = (logits, *(x for x in tables if x is not None and case.to_all))

    def value() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(logits, target, *tables),)

    def value_and_grad() -> tuple[Tensor, ...]:
        logits.grad = None
        found = loss(logits, target, *tables)
        found.backward()
        return found.detach(), logits.grad

    def hvp() -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(loss(logits, target, *tables), logits, create_graph=True)
        return torch.autograd.grad(gradient, logits, inputs.direction)

    def linear() -> tuple[Tensor, ...]:
        features.grad = head.grad = None
        found = loss(features @ head.T, target, *tables)
        found.backward()
        return found.detach(), features.grad, head.grad

    def jvp() -> tuple[Tensor, ...]:
        tangents = (inputs.direction, *(torch.zeros_like(x) for x in leaves[1:]))
        return torch.func.jvp(torch.func.grad(of_leaves, tuple(range(len(leaves)))), leaves, tangents)[1]

    def of_leaves(first: Tensor, *rest: Tensor) -> Tensor:
        if not rest:
            return loss(first, target, *tables)
        given = iter(rest)
        return loss(first, target, *(None if x is None else next(given) for x in tables))

    if case.op.startswith("grad_vjp"):
        (gradient,) = torch.autograd.grad(loss(logits, target, *tables), logits, create_graph=True)
        return Job(lambda: torch.autograd.grad(gradient, leaves, inputs.direction, retain_graph=True))
    if case.op == "linear":
        features, head = inputs.features.clone().requires_grad_(), inputs.head.clone().requires_grad_()
    calls = {"value": value, "value+grad": value_and_grad, "hvp": hvp, "linear": linear}
    return Job(calls.get(case.op, jvp))
