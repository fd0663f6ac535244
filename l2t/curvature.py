"""How a reverse step gets H a and ∂_Φ⟨g, a⟩: the derivatives of the inner product of a step's gradient g with a.

Docs: section 5 of docs/math.md. Both ways here are reverse over reverse, exact, and give the same bits: they differ in
what is remembered. A curvature is a row of :data:`CURVATURES`; the agreement tests run over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Variable

from l2t import check
from l2t.optim import Tensors
from l2t.tape import Step

__all__ = ["CURVATURES", "Curvature", "Recompute", "Reverse", "gradient"]

Grads = tuple[Tensor | None, ...]

# torch.autograd.grad and backward check every output in Python before they call this: 40 µs a step, a tenth of a small
# student's step. The outputs and cotangents here are of one shape and dtype by construction.
_run_backward = cast("Callable[..., Grads]", Variable._execution_engine.run_backward)


def gradient(loss: Tensor, weights: Tensors) -> Grads:
    """∇_w L with the graph that a second derivative needs; None for a weight that the loss does not reach."""
    return _run_backward(
        (loss,), (torch.ones_like(loss),), True, True, tuple(weights), allow_unreachable=True, accumulate_grad=False
    )


def accumulate(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Adds the derivatives of ⟨outputs, cotangents⟩ to ``.grad`` of these inputs, of every leaf reached where none are.

    The graph is kept: a part of it may be shared with other steps. It goes when the last reference to it does.
    """
    try:
        _run_backward(
            tuple(outputs),
            tuple(cotangents),
            True,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=True,
        )
    except RuntimeError as error:
        check.unroll_second_derivative(error)
        raise


class Curvature(Protocol):
    """A way to H a and ∂_Φ⟨g, a⟩."""

    keeps_graph: bool
    """Whether a step is remembered with its graph, or with what a replay needs."""

    def product(
        self, step: Step, replay: Callable[[Step], Grads], a: Tensors, inputs: Sequence[Tensor]
    ) -> None:
        """Leaves H a in ``.grad`` of the step's weights and adds ∂_Φ⟨g, a⟩ to that of the meta tensors.

        ``a`` has one entry for each gradient of the step that is not None. ``replay`` runs the step again.
        """


def _product(grads: Grads, a: Tensors, inputs: Sequence[Tensor]) -> None:
    reached = [g for g in grads if g is not None]
    # A gradient without a graph is constant (a loss linear in that weight).
    pairs = [(g, x) for g, x in zip(reached, a, strict=True) if g.requires_grad]
    if pairs:
        accumulate([g for g, _ in pairs], [x for _, x in pairs], inputs)


class Reverse:
    """Reverse over reverse through the graph that the run itself has built: fastest, O(T) activations."""

    keeps_graph = True

    def product(
        self, step: Step, replay: Callable[[Step], Grads], a: Tensors, inputs: Sequence[Tensor]
    ) -> None:
        """As :class:`Curvature` says, through the kept graph."""
        assert step.grads is not None
        _product(step.grads, a, inputs)


class Recompute:
    """Reverse over reverse through the graph of the step run again: one more run's time, O(T) weights only."""

    keeps_graph = False

    def product(
        self, step: Step, replay: Callable[[Step], Grads], a: Tensors, inputs: Sequence[Tensor]
    ) -> None:
        """As :class:`Curvature` says, through the graph of the replay."""
        step.grads = replay(step)
        _product(step.grads, a, inputs)


CURVATURES: dict[str, Curvature] = {"reverse": Reverse(), "recompute": Recompute()}
