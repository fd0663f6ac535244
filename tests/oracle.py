"""The loss as docs/math.md section 1 states it, sample by sample: slow, and sharing no code with l2t.

W is written out as a dense matrix, the softmax as exponentials, the links by definition. Derivatives are
autograd's. Made for small float64 inputs of moderate size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import l2t

LINKS = ("sigmoid", "identity", "log-sigmoid")
STRUCTURES = ("none", "full", "diagonal", "low-rank")


def link_of(u: Tensor, link: str) -> Tensor:
    if link == "sigmoid":
        return 1 / (1 + torch.exp(-u))
    if link == "log-sigmoid":
        return -torch.log(1 + torch.exp(-u))
    assert link == "identity"
    return u


def dense_of(parts: Sequence[Tensor], num_classes: int, dtype: torch.dtype) -> Tensor:
    """W entry by entry."""
    if not parts:
        return torch.eye(num_classes, dtype=dtype)
    if len(parts) == 1 and parts[0].dim() == 2:
        return parts[0]
    return torch.stack(
        [
            torch.stack(
                [
                    (parts[0][y] if y == j else parts[0][y] * 0)
                    + (
                        sum(parts[1][y, k] * parts[2][j, k] for k in range(parts[1].shape[1]))
                        if parts[1:]
                        else 0
                    )
                    for j in range(num_classes)
                ]
            )
            for y in range(num_classes)
        ]
    )


def loss(
    logits: Tensor,
    target: Tensor,
    parts: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    link: str = "sigmoid",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss for logits (N, C)."""
    num_classes = logits.shape[1]
    dense = dense_of(parts, num_classes, logits.dtype)
    losses, factors = [], []
    for n in range(logits.shape[0]):
        y = int(target[n])
        if y == ignore_index:
            losses.append(logits.new_zeros(()))
            continue
        exponentials = torch.exp(logits[n])
        log_p = torch.log(exponentials / exponentials.sum())
        u = sum(dense[y, j] * log_p[j] for j in range(num_classes))
        if bias is not None:
            u = u + bias[y]
        row = -link_of(u, link)
        if scale is not None:
            row = row * scale[y]
        factors.append(logits.new_ones(()) if sample_weight is None else sample_weight[n])
        losses.append(row * factors[-1])
    rows = torch.stack(losses) if losses else logits.new_zeros(0)
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / torch.stack(factors).sum() if reduction == "mean" else total


def parts_of(
    structure: str, num_classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Random tables of a structure, near the identity so that losses are not flat."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if structure == "none":
        return ()
    if structure == "full":
        return (torch.eye(num_classes, dtype=dtype) + 0.3 * random(num_classes, num_classes),)
    diagonal = 1 + 0.3 * random(num_classes)
    if structure == "diagonal":
        return (diagonal,)
    return (diagonal, 0.4 * random(num_classes, 2), 0.4 * random(num_classes, 2))


def weight_of(parts: Sequence[Tensor]) -> l2t.Full | l2t.Diagonal | l2t.LowRank | None:
    """The record of these tables."""
    if not parts:
        return None
    if len(parts) == 3:
        return l2t.LowRank(*parts)
    return l2t.Full(parts[0]) if parts[0].dim() == 2 else l2t.Diagonal(parts[0])
