"""dynamic_loss: the fused loss with trainable coefficients, called as `torch.nn.functional.cross_entropy` is.

Here the shapes that users have become rows, dtypes follow PyTorch's rules, and rows are reduced. The loss
itself is docs/math.md, section 1.

Not here: arithmetic (csrc, reference.py), derivatives (autograd.py) and the sentences of errors (check.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2t import autograd, check, ops, reference
from l2t.weight import Diagonal, Full, LowRank, Weight

__all__ = ["dynamic_loss"]

LINKS = tuple(reference.LINKS)
REDUCTIONS = ("mean", "sum", "none")


def dynamic_loss(
    logits: Tensor,
    target: Tensor,
    weight: Weight | Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    link: str = "sigmoid",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The dynamic loss ``-κ_y φ(Σ_j W[y, j] log softmax(logits)_j + b_y)`` of samples of class y.

    The family of Wu et al., "Learning to Teach with Dynamic Loss Functions" (NeurIPS 2018), docs/math.md
    section 1. Shapes, reductions, ``ignore_index``, empty batches and autocast are those of
    `torch.nn.functional.cross_entropy`, which is the special case ``link="identity"`` without coefficients.
    It is differentiable twice, to logits, weight, bias, scale and sample_weight, in reverse and forward mode;
    the same holds under `torch.func` and `torch.vmap`. Under `torch.compile` it is differentiable once.

    Args:
        logits: unnormalised scores of C classes, shape (N, C), (N, C, d1, ..., dK) or (C,); floating point.
        target: class of each sample, shape (N,), (N, d1, ..., dK) or (); int64 or uint8, in [0, C) or
            ``ignore_index``.
        weight: the coefficients W: a `Full`, `Diagonal` or `LowRank`; a tensor of shape (C, C) is full, one
            of shape (C,) a diagonal; None is the identity.
        bias: b, shape (C,); None is 0.
        scale: κ, shape (C,); None is 1.
        link: φ: ``"sigmoid"`` (the paper's), ``"identity"`` or ``"log-sigmoid"``.
        sample_weight: a factor for the loss of each sample, of target's shape; None is 1. A ``"mean"``
            divides by the sum of the factors of samples that are not ignored.
        ignore_index: a target that takes no part: its loss and its gradients are 0, whatever its logits. It
            may be a class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        the loss, 0-dimensional, or of target's shape with ``reduction="none"``.

    The arithmetic is float64 for float64 logits and float32 for others; the result has the dtype of logits.
    Coefficients and sample weights must have the dtype of logits or that of the arithmetic. Under autocast
    they may be of any dtype up to float32, and the loss is computed and returned in float32, as cross-entropy
    is.

    Raises:
        ValueError: a shape, a device, a link or a reduction that does not fit.
        TypeError: a dtype that does not fit, or a weight that is no coefficient matrix.
        IndexError: a target that is neither a class nor ``ignore_index``.

    Example:
        >>> import torch, l2t
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> target = torch.tensor([0, 2])
        >>> weight = l2t.Full.identity(3)
        >>> l2t.dynamic_loss(logits, target, weight)
        tensor(-0.3543, grad_fn=<ReducedBackward>)
        >>> l2t.dynamic_loss(logits, target, link="identity")  # cross-entropy
        tensor(0.6216, grad_fn=<ReducedBackward>)
    """
    check.loss_choice("link", link, LINKS)
    check.loss_choice("reduction", reduction, REDUCTIONS)
    check.loss_tensors(logits, target)
    tables = checked_tables(logits, weight, bias, scale)
    if sample_weight is not None:
        check.loss_table("sample_weight", sample_weight, target.shape, logits)

    dtype = logits.dtype
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    if dtype is not arithmetic and torch.is_autocast_enabled(logits.device.type):
        dtype = arithmetic

    shape = target.shape
    if logits.dim() != 2:
        num_classes = logits.shape[min(logits.dim(), 2) - 1]
        logits = logits.movedim(min(logits.dim(), 2) - 1, -1).reshape(target.numel(), num_classes)
        target = target.reshape(-1)
    if target.dtype is torch.uint8:
        target = target.long()
    *tables, sample_weight = [None if x is None else x.to(arithmetic) for x in (*tables, sample_weight)]
    logits = logits.to(arithmetic)
    settings = (LINKS.index(link), ignore_index, 1)

    if sample_weight is None and ops.direct(logits, target, *tables):
        loss: Tensor = autograd.Reduced.call(reduction, logits, target, *tables, *settings)
    else:
        loss = torch.ops.l2t.value.default(logits, target, *tables, *settings)[0]  # [N]
        factor = target != ignore_index
        if sample_weight is not None:
            factor = torch.where(factor, sample_weight.reshape(-1), 0.0)
            loss = loss * factor
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / factor.sum()
    if reduction == "none":
        loss = loss.reshape(shape)
    return loss.to(dtype)


def checked_tables(
    logits: Tensor, weight: Weight | Tensor | None, bias: Tensor | None, scale: Tensor | None
) -> list[Tensor | None]:
    """The coefficients as the ops take them: full matrix or diagonal, U, V, bias, scale."""
    num_classes = logits.shape[min(logits.dim(), 2) - 1]
    line = (num_classes,)
    first, left, right = None, None, None
    if isinstance(weight, Tensor):
        first = weight
        check.loss_matrix(first, num_classes, logits)
    elif isinstance(weight, Full):
        (first,) = weight
        check.loss_table("weight.weight", first, (num_classes, num_classes), logits)
    elif isinstance(weight, Diagonal):
        (first,) = weight
        check.loss_table("weight.diagonal", first, line, logits)
    elif isinstance(weight, LowRank):
        first, left, right = weight
        check.loss_table("weight.diagonal", first, line, logits)
        rank = left.shape[-1:] if isinstance(left, Tensor) else line
        check.loss_table("weight.left", left, (*line, *rank), logits)
        check.loss_table("weight.right", right, (*line, *rank), logits)
    elif weight is not None:
        raise check.loss_weight(weight)
    if bias is not None:
        check.loss_table("bias", bias, line, logits)
    if scale is not None:
        check.loss_table("scale", scale, line, logits)
    return [first, left, right, bias, scale]
