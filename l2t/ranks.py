"""A run that several processes take together, each with batches of its own: what their ranks bring together.

Docs: section 5 of docs/math.md. All ranks hold the same weights and take the same steps. The loss of a step
is the mean of theirs and J the mean of their measures, so the gradient, H a, ∇M and the hypergradients are
means, too; everything else of a run is computed by each rank alone. What must agree is compared before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l2t import check
from l2t.optim import Tensors
from l2t.states import fingerprint
from l2t.tape import Adjoint, Grads

__all__ = ["Ranks"]


class Ranks:
    """The processes of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, dist.get_world_size(group)

    def _all(self, mine: Any) -> list[Any]:
        """What each rank has given."""
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def agree(self, when: str, **things: Any) -> None:
        """Raises, on every rank, what is not the same on all of them; of tensors by name their bytes."""
        mine = {
            what: {name: fingerprint(x) for name, x in x.items()} if isinstance(x, dict) else x
            for what, x in things.items()
        }
        every = self._all(mine)
        for what in things:
            values = [rank[what] for rank in every]
            check.unroll_ranks_agree(what, values, when)

    def most(self, sizes: Sequence[int]) -> list[int]:
        """The largest of these numbers on any rank, number by number."""
        return [max(x) for x in zip(*self._all(list(sizes)), strict=True)]

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Makes each tensor the mean of it over the ranks, in place."""
        for x in tensors:
            dist.all_reduce(x, group=self._group)
            x /= self._size

    def means(self, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """The mean over the ranks of tensors of one shape."""
        if not values:
            return values
        stacked = torch.stack(list(values.values()))
        self.mean([stacked])
        return dict(zip(values, stacked, strict=True))

    def gradient(self, grads: Sequence[Tensor | None], like: Tensors) -> Grads:
        """The mean gradient: zeros from a rank that does not reach a tensor; None where none does."""
        total = Adjoint(like)
        for part, x in zip(total.parts, grads, strict=True):
            if x is not None:
                part.copy_(x.detach().to_dense())
        reached = torch.tensor([float(x is not None) for x in grads], device=like[0].device)
        self.mean([*total.flats, reached])
        if not any(x is None for x in grads):
            return tuple(total.parts)
        return tuple(part if there else None for part, there in zip(total.parts, reached > 0, strict=True))

    @contextmanager
    def sharing(self, weights: Tensors, adjoint: Adjoint) -> Iterator[None]:
        """What is added to ``.grad`` of the weights inside, which is the adjoint, is the mean over ranks."""
        own = Adjoint(weights)
        for w, part in zip(weights, own.parts, strict=True):
            w.grad = part
        yield
        self.mean(own.flats)
        torch._foreach_add_(adjoint.flats, own.flats)
        for w, part in zip(weights, adjoint.parts, strict=True):
            w.grad = part
