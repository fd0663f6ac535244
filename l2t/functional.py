"""dynamic_loss: the fused loss with trainable coefficients, called as `torch.nn.functional.cross_entropy` is.

Here the shapes that users have become rows, and dtypes follow PyTorch's rules. The loss itself is
docs/math.md, section 1.

Not here: arithmetic (csrc, reference.py), derivatives (autograd.py) and the sentences of errors (check.py).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from l2t import autograd, check, ops, reference
from l2t.weight import Diagonal, Full, LowRank, Weight

__all__ = ["dynamic_loss"]

LINKS = tuple(reference.LINKS)
REDUCTIONS = ("mean", "sum", "none")
NATIVE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_NUMBERS = {name: number for number, name in enumerate(LINKS)}
_DIM: dict[type, int] = {Full: 2, Diagonal: 1}
_REDUCTIONS = {"none": ops.NONE, "mean": ops.MEAN, "sum": ops.SUM}


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
    inplace_backward: bool = False,
) -> Tensor:
    """The dynamic loss ``-κ_y φ(Σ_j W[y, j] log softmax(logits)_j + b_y)`` of samples of class y.

    The family of Wu et al., "Learning to Teach with Dynamic Loss Functions" (NeurIPS 2018), docs/math.md
    section 1. Shapes, reductions, ``ignore_index``, empty batches and autocast are those of
    `torch.nn.functional.cross_entropy`, which is the special case ``link="identity"`` without coefficients.
    Other arguments are not: ``weight`` is W and no class weights, and neither ``label_smoothing`` nor targets
    of class probabilities are taken. With the identity link class weights w are
    ``sample_weight=w[target.where(target != ignore_index, 0)]``, under every reduction, and label smoothing
    is `Full.smoothed`; the two together are another loss than cross-entropy's, which weighs each class's
    share of the smoothing by that class.

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
        inplace_backward: backward may write the gradient over the logits, which saves the memory of a second
            (N, C) tensor and the time to touch it. Then nothing may read the logits after backward, and there
            is no second derivative.

    Returns:
        the loss, 0-dimensional, or of target's shape with ``reduction="none"``.

    The arithmetic is float64 for float64 logits and float32 for others; the result has the dtype of logits.
    Coefficients and sample weights must have the dtype of logits or that of the arithmetic. Under autocast
    they may be of any dtype up to float32, and the loss is computed and returned in float32, as cross-entropy
    is.

    Raises:
        ValueError: a shape, a device, a link or a reduction that does not fit.
        TypeError: a dtype or a layout that does not fit, a weight that is no coefficient matrix, or an
            ignore_index that is no integer.
        IndexError: a target that is neither a class nor ``ignore_index``.

    Example:
        >>> import torch, l2t
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> target = torch.tensor([0, 2])
        >>> weight = l2t.Full.identity(3)
        >>> l2t.dynamic_loss(logits, target, weight)
        tensor(-0.3543, grad_fn=<LossBackward>)
        >>> l2t.dynamic_loss(logits, target, link="identity")  # cross-entropy
        tensor(0.6216, grad_fn=<LossBackward>)
    """
    if sample_weight is None:
        loss = _quickly(logits, target, weight, bias, scale, link, ignore_index, reduction, inplace_backward)
        if loss is not None:
            return loss
    check.loss_choice("link", link, LINKS)
    check.loss_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check.loss_ignore_index(ignore_index)
    check.loss_tensors(logits, target)
    tables = checked_tables(logits, weight, bias, scale)
    if sample_weight is not None:
        check.loss_table("sample_weight", sample_weight, target.shape, logits)

    shape, dtype = target.shape, result_dtype(logits)
    if logits.dim() != 2:
        num_classes = logits.shape[min(logits.dim(), 2) - 1]
        logits = logits.movedim(min(logits.dim(), 2) - 1, -1).reshape(target.numel(), num_classes)
        target = target.reshape(target.numel())
    if target.dtype is torch.uint8:
        target = target.long()
    if logits.dtype not in NATIVE:
        logits = logits.float()
    number = ops.arithmetic(logits.dtype)
    *tables, sample_weight = [None if x is None else x.to(number) for x in (*tables, sample_weight)]

    if sample_weight is None:
        loss = _losses(logits, target, tables, link, ignore_index, reduction, inplace_backward)
    else:
        loss = _losses(logits, target, tables, link, ignore_index, "none", inplace_backward)
        factor = torch.where(target != ignore_index, sample_weight.reshape(target.shape), 0.0)
        loss = loss * factor
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / factor.sum()
    return loss.reshape(shape if reduction == "none" else ()).to(dtype)


def _quickly(
    logits: Tensor,
    target: Tensor,
    weight: Weight | Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    link: str,
    ignore_index: int,
    reduction: str,
    inplace: bool,
) -> Tensor | None:
    """The loss of what needs no conversion, checked by the core alone: small losses cost what is around them.

    None where something is to be converted or refused.
    """
    if type(link) is not str or type(reduction) is not str:
        return None
    number, kind = _NUMBERS.get(link), _REDUCTIONS.get(reduction)
    if inplace or number is None or kind is None or not ops.unwatched():
        return None
    left = right = None
    if type(weight) is LowRank:
        weight, left, right = weight
        if weight is None or left is None or right is None:
            return None
    elif (dim := _DIM.get(type(weight))) is not None:
        weight = weight[0]  # type: ignore[index]
        if not isinstance(weight, Tensor) or weight.dim() != dim:
            return None
    tensors = (logits, target, weight, left, right, bias, scale)
    if not ops.ordinary(*tensors):
        return None
    try:
        settings = (False, _with_grad(logits, kind), (number, ignore_index, 1, kind, 1))
        loss: Tensor = autograd.Loss.apply(settings, *tensors)
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError):
        return None  # the conversion, or the sentence, is the long way's
    return loss if loss.dtype is logits.dtype else loss.to(result_dtype(logits))


def _with_grad(logits: Tensor, kind: int) -> bool:
    """Whether the forward pass makes the gradient to the logits.

    Not in float16: that of a mean may be below all its numbers until backward's cotangent, that of a
    `torch.amp.GradScaler` say, has scaled it.
    """
    wanted = kind != ops.NONE and torch.is_grad_enabled() and logits.requires_grad
    return wanted and logits.dtype is not torch.float16


def _losses(
    logits: Tensor,
    target: Tensor,
    tables: list[Tensor | None],
    link: str,
    ignore_index: int,
    reduction: str,
    inplace: bool,
) -> Tensor:
    """The losses of rows (N, C), 0-dimensional or of one dimension."""
    kind = _REDUCTIONS[reduction]
    where = (logits, target, *tables, _NUMBERS[link], ignore_index, 1, kind, 1)
    direct = ops.unwatched() and ops.readable(logits, target, *tables)
    if inplace:
        check.inplace_logits(logits, direct)
    if direct:
        with_grad = not inplace and _with_grad(logits, kind)
        try:
            loss: Tensor = autograd.Loss.apply((inplace, with_grad, where[7:]), *where[:7])
        except ValueError:
            there = ops.fitted("value", *where) if inplace else None
            if there is not None:  # contiguous copies of all but the logits
                return autograd.Loss.apply((True, False, where[7:]), *there[:7])  # type: ignore[no-any-return]
        else:
            return loss
    loss = torch.ops.l2t.value.default(*where, False)[0]
    return loss


def autocast(device: str) -> bool:
    """Whether operations on this type of device are under autocast."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    """Whether there is autocast for this type of device, which torch 2.11 cannot trace."""
    return torch.amp.is_autocast_available(device)


# What torch.compiler.assume_constant_result says; that loads all of the compiler, half the time of an import.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products on the device of ``x`` are made in the dtype that their arguments have."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocast(device) else contextlib.nullcontext()


def result_dtype(logits: Tensor) -> torch.dtype:
    """That of the logits, or float32 under autocast, as for cross-entropy."""
    converted = ops.arithmetic(logits.dtype) is not logits.dtype and autocast(logits.device.type)
    return torch.float32 if converted else logits.dtype


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
