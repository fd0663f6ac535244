"""How a reverse step gets H a and ∂_Φ⟨g, a⟩: the derivatives of the product of a step's gradient g with a.

Docs: section 5 of docs/math.md. Both ways here are reverse over reverse, exact, and give the same bits: they
differ in what is remembered of a step. A curvature is a row of :data:`CURVATURES`, and the agreement tests
run over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from l2t import check
from l2t.optim import Tensors
from l2t.tape import Grads, Roots, Step

__all__ = ["CURVATURES", "Curvature", "Recompute", "Reverse", "accumulate", "gradient"]

# What torch.autograd.grad and torch.autograd.backward call in the end. They check shape and dtype of every
# output in Python first, which takes a tenth of a small student's step. Here these fit by construction.
_run_backward = cast("Callable[..., Grads]", Variable._execution_engine.run_backward)


def gradient(loss: Tensor, weights: Tensors) -> Grads:
    """∇_w L with the graph that a second derivative needs; None for a weight that the loss does not reach."""
    retain_graph = create_graph = allow_unreachable = True
    accumulate_grad = False
    return _run_backward(
        (loss,),
        (torch.ones_like(loss),),
        retain_graph,
        create_graph,
        tuple(weights),
        allow_unreachable,
        accumulate_grad,
    )


def accumulate(
    outputs: Sequence[Tensor | GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Adds the derivatives of ⟨outputs, cotangents⟩ to ``.grad`` of the inputs, or of every leaf if none.

    The graph is kept, since parts of it may be shared with other steps; it goes with the last reference.
    """
    retain_graph = allow_unreachable = accumulate_grad = True
    create_graph = False
    try:
        _run_backward(
            tuple(outputs),
            tuple(cotangents),
            retain_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable,
            accumulate_grad,
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
        """Adds H a to ``.grad`` of the step's weights, and ∂_Φ⟨g, a⟩ to that of the meta tensors.

        ``a`` has an entry for each gradient of the step that is not None. ``replay`` runs the step again.
        ``inputs`` are the leaves whose ``.grad`` is wanted, or empty for every leaf reached.
        """


def _product(roots: Roots, a: Tensors, inputs: Sequence[Tensor]) -> None:
    if roots.moving is not None:
        a = [a[i] for i in roots.moving]
    if roots.edges:
        accumulate(roots.edges, a, inputs)


class Reverse:
    """Reverse over reverse through the graph that the run itself built: memory for all activations."""

    keeps_graph = True

    def product(
        self, step: Step, replay: Callable[[Step], Grads], a: Tensors, inputs: Sequence[Tensor]
    ) -> None:
        """As :class:`Curvature` says, through the kept graph."""
        assert step.roots is not None
        _product(step.roots, a, inputs)


class Recompute:
    """Reverse over reverse through the graph of the step run again: memory for all weights; a run's time."""

    keeps_graph = False

    def product(
        self, step: Step, replay: Callable[[Step], Grads], a: Tensors, inputs: Sequence[Tensor]
    ) -> None:
        """As :class:`Curvature` says, through the graph of the replay."""
        if step.grads is None:
            step.grads = replay(step)
        _product(Roots.of(step.grads), a, inputs)


CURVATURES: dict[str, Curvature] = {"reverse": Reverse(), "recompute": Recompute()}
