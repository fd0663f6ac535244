"""Full, Diagonal, LowRank: the coefficient matrix W of a dynamic loss as records of tensors.

Row ``W[y]`` weighs the log-probabilities of a sample of class y (docs/math.md, section 1). Records are named
tuples, so they are pytrees: they pass through `torch.func`, `torch.vmap` and `torch.compile` as they are, and
`_replace` and unpacking work as for any tuple; not `==`, which asks tensors for one truth value.

Not here: what may be passed as a weight (check.py) and the arithmetic (csrc/math/weight.h, reference.py).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from l2t import check

__all__ = ["Diagonal", "Full", "LowRank", "Weight"]


class Full(NamedTuple):
    """A full matrix: C² coefficients, ``u = Σ_j W[y, j] log p_j`` (docs/math.md, section 1).

    Attributes:
        weight: shape (C, C), floating point; row y belongs to target class y.

    Example:
        >>> import l2t
        >>> weight = l2t.Full.smoothed(3, 0.3)
        >>> weight.dense()
        tensor([[0.8000, 0.1000, 0.1000],
                [0.1000, 0.8000, 0.1000],
                [0.1000, 0.1000, 0.8000]])
        >>> weight.num_parameters
        9
    """

    weight: Tensor

    @classmethod
    def identity(
        cls,
        num_classes: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Full:
        """The identity matrix, where Wu et al. (2018) start."""
        return cls(torch.eye(num_classes, dtype=dtype, device=device))

    @classmethod
    def smoothed(
        cls,
        num_classes: int,
        smoothing: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Full:
        """``(1 - ε) I + ε / C``: with the identity link, label smoothing ε of cross-entropy, from 0 to 1."""
        check.label_smoothing("Full", smoothing)
        eye = torch.eye(num_classes, dtype=dtype, device=device)
        return cls(eye * (1.0 - smoothing) + smoothing / max(num_classes, 1))

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.weight.shape[-1]

    @property
    def num_parameters(self) -> int:
        """How many numbers the record holds: C²."""
        return _numel(self)

    def dense(self) -> Tensor:
        """The matrix W, shape (C, C)."""
        return self.weight


class Diagonal(NamedTuple):
    """A diagonal matrix: C coefficients, ``u = d_y log p_y`` (docs/math.md, section 1).

    Attributes:
        diagonal: shape (C,), floating point.

    Example:
        >>> import l2t, torch
        >>> l2t.Diagonal(torch.tensor([1.0, 2.0])).dense()
        tensor([[1., 0.],
                [0., 2.]])
    """

    diagonal: Tensor

    @classmethod
    def identity(
        cls,
        num_classes: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Diagonal:
        """The identity matrix: a diagonal of ones."""
        return cls(torch.ones(num_classes, dtype=dtype, device=device))

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.diagonal.shape[-1]

    @property
    def num_parameters(self) -> int:
        """How many numbers the record holds: C."""
        return _numel(self)

    def dense(self) -> Tensor:
        """The matrix W, shape (C, C)."""
        return torch.diag_embed(self.diagonal)


class LowRank(NamedTuple):
    """A diagonal plus a matrix of rank r, ``W = diag(d) + U Vᵀ``: C (1 + 2r) coefficients.

    ``u = d_y log p_y + U[y]·(Vᵀ log p)`` (docs/math.md, section 1): a full matrix is never formed, so it is
    the form for many classes. Rank 1 holds label smoothing exactly (`smoothed`).

    Attributes:
        diagonal: d, shape (C,), floating point.
        left: U, shape (C, r); its row y belongs to target class y.
        right: V, shape (C, r); its row j belongs to the log-probability of class j.

    Example:
        >>> import l2t
        >>> weight = l2t.LowRank.smoothed(3, 0.3)
        >>> weight.dense()
        tensor([[0.8000, 0.1000, 0.1000],
                [0.1000, 0.8000, 0.1000],
                [0.1000, 0.1000, 0.8000]])
        >>> weight.rank, weight.num_parameters
        (1, 9)
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def identity(
        cls,
        num_classes: int,
        rank: int = 1,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRank:
        """The identity matrix with a low-rank part that can learn.

        U is zero and V is normal with standard deviation ``C**-0.5``: W is the identity exactly, and U has a
        gradient from the first step on. (With both at zero neither would ever move.)

        Args:
            num_classes: C.
            rank: r, at least 0.
            generator: source of V; None takes torch's global one.
            dtype: floating-point dtype of the record; None is torch's default.
            device: device of the record.
        """
        right = torch.randn(num_classes, rank, generator=generator, dtype=dtype, device=device)
        return cls(
            torch.ones(num_classes, dtype=dtype, device=device),
            torch.zeros(num_classes, rank, dtype=dtype, device=device),
            right * max(num_classes, 1) ** -0.5,
        )

    @classmethod
    def smoothed(
        cls,
        num_classes: int,
        smoothing: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRank:
        """At rank 1 ``(1 - ε) I + ε / C``: with the identity link, label smoothing ε, from 0 to 1."""
        check.label_smoothing("LowRank", smoothing)
        ones = torch.ones(num_classes, 1, dtype=dtype, device=device)
        return cls(ones[:, 0] * (1.0 - smoothing), ones * (smoothing / max(num_classes, 1)), ones.clone())

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.diagonal.shape[-1]

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.left.shape[-1]

    @property
    def num_parameters(self) -> int:
        """How many numbers the record holds: C (1 + 2r)."""
        return _numel(self)

    def dense(self) -> Tensor:
        """The matrix W, shape (C, C)."""
        return torch.diag_embed(self.diagonal) + self.left @ self.right.mT


Weight: TypeAlias = Full | Diagonal | LowRank


def _numel(weight: Weight) -> int:
    return sum(part.numel() for part in weight)
