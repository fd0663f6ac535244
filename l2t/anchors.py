"""Weights of a taped step that live no longer than its graph needs them.

Docs: section 6 of docs/math.md. The graph of a step holds the weights that its derivatives read: of a first
layer none. If the leaves at its ends were the weights themselves, it would hold all of them. So a step whose
weights nothing else asks for is taken at copies, w + (-0.0), whose leaves are *anchors*: as large as the
weights, of one number each. Adding a negative zero changes no bit.

What runs a part of the step again in its backward pass (an activation checkpoint) reads weights that may be
gone: :func:`reads_weights` tries it at one step, which then keeps its copies, and :class:`Gone` raises
wherever it is not foreseen. A loss that needs its weights to be leaves gets them: a step that fails at
copies, or calls backward() into them, is taken at the weights themselves. So are all that follow either.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from l2t import check
from l2t.graph import nodes_of
from l2t.tape import Randomness, Student

__all__ = ["anchored", "as_leaves", "gone", "large", "reads_weights", "stand_ins"]

LARGE = 1 << 20
"""Bytes of weights from which copies pay: they cost a pass over the weights, and some microseconds each."""


def large(weights: Sequence[Tensor]) -> bool:
    """Whether the weights are worth an anchor. Complex ones cannot have any: their zero has two signs."""
    if not all(w.is_floating_point() and w.layout is torch.strided for w in weights):
        return False
    return sum(w.nbytes for w in weights) >= LARGE


def stand_ins(weights: Sequence[Tensor]) -> list[Tensor]:
    """Anchors: leaves that require a gradient, as large as the weights, of one negative zero each."""
    return [w.detach().new_full((), -0.0).expand(w.shape).requires_grad_() for w in weights]


def anchored(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors, and copies of the weights that hang on them."""
    anchors = stand_ins(weights)
    return anchors, [w.detach() + anchor for w, anchor in zip(weights, anchors, strict=True)]


@contextlib.contextmanager
def as_leaves() -> Iterator[None]:
    """In it ``.grad`` of a copy raises: its reader, as ``model.zero_grad()``, takes it for a leaf."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


class Gone:
    """What stands in the place of a weight that is no more: whoever reads it hears of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise check.WeightsGoneError

    def __getattr__(self, name: str) -> Any:
        raise check.WeightsGoneError


def gone(weights: Sequence[Tensor]) -> list[Tensor]:
    """As many as there are weights."""
    return [cast("Tensor", Gone()) for _ in weights]


def reads_weights(student: Student, roots: Sequence[Tensor | GradientEdge], buffers: list[Tensor]) -> bool:
    """Whether what the graph of a step has saved reads the student's weights when it is unpacked.

    It is unpacked once, as the backward pass does it.
    """
    before = Randomness.now(student.cuda_devices)
    student.bind(gone(student.parameters), buffers)
    try:
        for node in nodes_of(roots):
            for name in dir(node):
                if name == "saved_tensors" or name.startswith("_saved_"):
                    getattr(node, name)
    except check.WeightsGoneError:
        return True
    finally:
        student.release()
        before.restore(student.cuda_devices)
    return False
