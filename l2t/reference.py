"""The four ops in plain torch, from the definition of the loss alone (docs/math.md, section 1).

`rows` writes the definition down, `losses` reduces it; every derivative is autograd's. Nothing here knows a
formula of csrc/, so the file is both the kernels' oracle in the tests and what runs on a device that has no
kernel. Arguments and results are those of the ops (`l2t.ops`), stats apart: each implementation of `value`
fills them as it likes, and only its own `grad`s read them.

Not here: speed, and the checks of arguments (check.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of their numbers in csrc/l2t.h.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "identity": lambda u: u,
    "log-sigmoid": F.logsigmoid,
}


def rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: int,
    ignore_index: int,
    groups: int,
) -> Tensor:
    """The loss of every row, ``-κ φ(Σ_j a_j log p_j + β)``, shape (N,); 0 where the target is ignored."""
    num_classes = logits.shape[1]
    counts = target != ignore_index  # [N]
    entry = torch.where(counts, target, 0)  # [N], row of the coefficient tables
    label = entry.remainder(max(num_classes, 1)).unsqueeze(1)  # [N, 1]
    log_p = torch.log_softmax(torch.where(counts.unsqueeze(1), logits, 0.0), dim=1)  # [N, C]

    if weight is not None and weight.dim() == 2:
        u = _product(weight[entry], log_p).sum(1)
    else:
        own = torch.ones_like(log_p[:, 0]) if weight is None else weight[entry]  # [N]
        if left is None or right is None:
            u = _product(own, log_p.gather(1, label).squeeze(1))
        else:
            v = right.reshape(groups, num_classes, -1)  # [G, C, r]
            group = entry.div(max(num_classes, 1), rounding_mode="floor")
            a = left[entry] @ v[0].mT if groups == 1 else torch.einsum("nr,ncr->nc", left[entry], v[group])
            u = _product(a.scatter_add(1, label, own.unsqueeze(1)), log_p).sum(1)
    if bias is not None:
        u = u + bias[entry]

    loss = -list(LINKS.values())[link](u)
    if scale is not None:
        loss = loss * scale[entry]
    return torch.where(counts, loss, 0.0)


def _product(a: Tensor, log_p: Tensor) -> Tensor:
    """A log p; a class of probability 0 that has no weight is one that does not exist."""
    return a * log_p.masked_fill((a == 0) & log_p.isneginf(), 0.0)


def losses(logits: Tensor | None, target: Tensor, *rest: Any) -> Tensor:
    """The losses of `rows`, reduced within each of the segments: none, mean (1) or sum (2)."""
    weight, left, right, bias, scale, link, ignore_index, groups, reduction, segments = rest
    assert logits is not None
    if logits.dtype is not torch.float64:
        logits = logits.float()
    loss = rows(logits, target, weight, left, right, bias, scale, link, ignore_index, groups)
    if reduction == 0:
        return loss
    loss = loss.reshape(segments, -1).sum(1)
    return loss / (target != ignore_index).reshape(segments, -1).sum(1) if reduction == 1 else loss


def value(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: int,
    ignore_index: int,
    groups: int,
    reduction: int,
    segments: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``l2t::value``: the losses, stats that are left at zero, and the gradient to the logits."""
    inputs = _leaves(logits, weight, left, right, bias, scale)
    with torch.enable_grad():
        loss = losses(inputs[0], target, *inputs[1:], link, ignore_index, groups, reduction, segments)
        d_logits = _gradients(loss, inputs[:1], torch.ones_like(loss), create_graph=False)[0]
    return loss.detach(), loss.new_zeros(logits.shape[0], 3), _output(d_logits, with_grad, logits)


def grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: int,
    ignore_index: int,
    groups: int,
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``l2t::grad``: gradients of ⟨v_loss, loss⟩ to logits, weight, left, right, bias and scale."""
    inputs = _leaves(logits, weight, left, right, bias, scale)
    first = _first(
        inputs, target, link, ignore_index, groups, reduction, segments, v_loss, create_graph=False
    )
    return tuple(_output(d, want, logits) for d, want in zip(first, wanted, strict=True))


def grad_vjp(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: int,
    ignore_index: int,
    groups: int,
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor,
    x_logits: Tensor | None,
    x_weight: Tensor | None,
    x_left: Tensor | None,
    x_right: Tensor | None,
    x_bias: Tensor | None,
    x_scale: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``l2t::grad_vjp``: cotangents x of the outputs of `grad` back to v_loss and its six other inputs."""
    inputs = _leaves(logits, weight, left, right, bias, scale)
    cotangents = (x_logits, x_weight, x_left, x_right, x_bias, x_scale)
    with torch.enable_grad():
        v_loss = v_loss.detach().requires_grad_()
        first = _first(
            inputs, target, link, ignore_index, groups, reduction, segments, v_loss, create_graph=True
        )
        pairs = [
            (d * x).sum() for d, x in zip(first, cotangents, strict=True) if d is not None and x is not None
        ]
        total = torch.stack(pairs).sum() if pairs else v_loss.sum() * 0.0
        second = _gradients(total, [v_loss, *inputs], None, create_graph=False)
    return tuple(_output(d, want, logits) for d, want in zip(second, wanted, strict=True))


def grad_jvp(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: int,
    ignore_index: int,
    groups: int,
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor,
    t_v_loss: Tensor | None,
    t_logits: Tensor | None,
    t_weight: Tensor | None,
    t_left: Tensor | None,
    t_right: Tensor | None,
    t_bias: Tensor | None,
    t_scale: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``l2t::grad_jvp``: tangents of the outputs of `grad` along the tangents t of its inputs.

    A Hessian is symmetric, so its product with a tangent is `grad_vjp` of the same vector; `grad` is linear
    in v_loss.
    """
    where = (
        logits,
        target,
        weight,
        left,
        right,
        bias,
        scale,
        link,
        ignore_index,
        groups,
        reduction,
        segments,
        stats,
    )
    _, *along = grad_vjp(
        *where, v_loss, t_logits, t_weight, t_left, t_right, t_bias, t_scale, (False, *wanted)
    )
    if t_v_loss is None:
        return tuple(along)
    return tuple(a + b for a, b in zip(along, grad(*where, t_v_loss, wanted), strict=True))


def _leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().requires_grad_() for x in tensors]


def _first(
    inputs: Sequence[Tensor | None], target: Tensor, *rest: Any, create_graph: bool
) -> list[Tensor | None]:
    *constants, v_loss = rest
    with torch.enable_grad():
        loss = losses(inputs[0], target, *inputs[1:], *constants)
        return _gradients(loss, inputs, v_loss.reshape(loss.shape), create_graph=create_graph)


def _gradients(
    output: Tensor, inputs: Sequence[Tensor | None], cotangent: Tensor | None, *, create_graph: bool
) -> list[Tensor | None]:
    """Gradients to the inputs that are there, None for the others."""
    present = [x for x in inputs if x is not None]
    found = iter(
        torch.autograd.grad(output, present, cotangent, create_graph=create_graph, materialize_grads=True)
    )
    return [None if x is None else next(found) for x in inputs]


def _output(gradient: Tensor | None, want: bool, like: Tensor) -> Tensor:
    """An output of an op: empty where it is not wanted."""
    return gradient.detach().contiguous() if want and gradient is not None else like.new_empty(0)
