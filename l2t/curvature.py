"""How a reverse step gets H a and ∂_Φ⟨g, a⟩: the derivatives of the product of a step's gradient g with a.

Docs: section 5 of docs/math.md. A curvature is a row of :data:`CURVATURES`, and the agreement tests run over
all of them. Exact are :class:`Reverse` and :class:`Recompute` (reverse over reverse, the same bits, different
in what is remembered of a step) and :class:`Forward` (forward over reverse). :class:`Central` and
:class:`OneSided` are differences of first derivatives, for students and losses that have no second ones.

The products are taken along a fixed direction, so those of the weights and of all meta tensors come out of
the same pass: as tangents of the gradient, or as differences of it. :func:`measured_error` compares an
inexact curvature with an exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from l2t import check
from l2t.graph import foreign, leaves, nodes_of
from l2t.optim import Tensors
from l2t.tape import Grads, Roots, Step

__all__ = [
    "CURVATURES",
    "Central",
    "Curvature",
    "Forward",
    "NoGradIsConstant",
    "OneSided",
    "Recompute",
    "Replay",
    "Reverse",
    "Wanted",
    "accumulate",
    "add_scaled",
    "coarsest",
    "differentiable",
    "doubtful",
    "dtypes",
    "first_gradient",
    "gradient",
    "inner",
    "measured_error",
    "norm",
    "power_of_two",
    "precompiled",
    "products",
]

LOSES_COMPILED = [int(x) for x in torch.__version__.split(".")[:2]] < [2, 13]
"""Whether gradients out of compiled code may come back without their graph (pytorch#181581)."""

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


def first_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> Grads:
    """The gradient of the loss to these tensors, without a graph; None for one that it does not reach.

    The graph is kept where that can be, since parts of it may be shared with other steps.
    """

    def run(retain_graph: bool) -> Grads:
        create_graph = accumulate_grad = False
        allow_unreachable = True
        return _run_backward(
            (loss,),
            (torch.ones_like(loss),),
            retain_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable,
            accumulate_grad,
        )

    try:
        return run(retain_graph=True)
    except RuntimeError as error:
        if "donated buffers" not in str(error):  # torch.compile overwrites what its backward has read
            raise
        return run(retain_graph=False)


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


def products(
    roots: Roots, a: Sequence[Tensor], inputs: Sequence[Tensor], *, retain_graph: bool = False
) -> Grads:
    """The derivatives of ⟨g, a⟩ to the inputs, for the roots of g; None for one that it does not reach."""
    if roots.moving is not None:
        a = [a[i] for i in roots.moving]
    if not roots.edges:
        return (None,) * len(inputs)
    differentiable(roots.edges)
    create_graph = accumulate_grad = False
    allow_unreachable = True
    return _run_backward(
        tuple(roots.edges),
        tuple(a),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable,
        accumulate_grad,
    )


def doubtful(value: Tensor, grads: Grads, weights: Tensors) -> bool:
    """Whether a step's second derivative is missing, or may be in silence.

    The first is tried. The second is feared of derivatives that others have written; torch's own are right
    or raise. The graph stays for the run.
    """
    present = [g for g in grads if g is not None]
    along = [torch.ones(g.shape, dtype=g.dtype, device=g.device) for g in present]  # of sparse ones, too
    try:
        products(Roots.of(grads), along, weights, retain_graph=True)
    except RuntimeError:
        return True
    return foreign([value])


def differentiable(roots: Sequence[Tensor | GradientEdge]) -> None:
    """Raises where a graph holds what ``once_differentiable`` has cut.

    Its error hangs on a leaf of its own, so the engine does not come by where inputs are named, and leaves
    the second derivative out in silence.
    """
    for node in nodes_of(roots):
        if node.name() == "torch::autograd::Error":
            raise check.unroll_once_differentiable()


def dtypes(value: Tensor) -> set[torch.dtype]:
    """The dtypes of the numbers that go back through the graph of a loss: autocast inside it shows here."""
    every = {x.dtype for node in nodes_of([value]) for x in node._input_metadata}
    return {dtype for dtype in every if dtype.is_floating_point}


def checkpoints(value: Tensor) -> None:
    """Raises where the graph of a loss holds an activation checkpoint of the reentrant kind.

    It names no weight of the modules in it: ``backward()`` fills their ``.grad``, a gradient passes them by.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes_of([value])):
        raise check.unroll_reentrant()


def precompiled(value: Tensor) -> None:
    """Raises where the second derivative of compiled code in the graph of a loss may be lost in silence."""
    if LOSES_COMPILED and any(node.name() == "CompiledFunctionBackward" for node in nodes_of([value])):
        raise check.unroll_precompiled()


class Wanted(NamedTuple):
    """Whose derivatives of ⟨g, a⟩ are wanted."""

    hessian: bool
    """Whether the weights' are, which are H a; with ``order="first"`` they are not."""
    others: Tensors | None
    """The leaves beside the weights; None for every leaf that is reached."""

    def beside(self, weights: Tensors, roots: Sequence[Tensor | GradientEdge]) -> list[Tensor]:
        """The leaves beside the weights, those of the graphs of ``roots`` if none are named.

        Parameters that were frozen before a loss has asked for their gradient are none of them.
        """
        if self.others is not None:
            return list(self.others)
        own = {id(w) for w in weights}
        return [x for x in leaves(roots) if id(x) not in own and x.requires_grad]


class Replay(NamedTuple):
    """How a run takes a step again."""

    loss: Callable[[Step, Tensors], Tensor]
    """The step's loss at these weights, with the batch, the random numbers and the buffers of the step."""
    unit: float
    """The rounding unit of the coarsest arithmetic that the run is taken in."""
    half: bool = False
    """Whether the step computes in float16, whose numbers end at 6e-8: products with a are then scaled."""
    examines: bool = True
    """Whether it is looked for derivatives that are wrong in silence: at few steps of a run."""


class Curvature(Protocol):
    """A way to H a and ∂_Φ⟨g, a⟩."""

    keeps_graph: bool
    """Whether a step is remembered with its graph, or with what a replay needs."""
    exact: bool

    def keeps_gradient(self, wanted: bool) -> bool:
        """Whether a step is remembered with its gradient, which the optimiser's settings want or do not."""

    def gradient(
        self, loss: Tensor, weights: Tensors, others: Tensors | None
    ) -> tuple[Grads, list[tuple[Tensor, Tensor]] | None]:
        """∇_w L as the run needs it, and what is remembered of the gradient to the other leaves."""

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """Adds H a to ``.grad`` of the step's weights, and ∂_Φ⟨g, a⟩ to that of the other leaves.

        ``a`` has an entry for each gradient of the step that is not None.
        """


class _SecondOrder:
    """What reverse over reverse has in common: the graph of the step's gradient."""

    exact = True

    def gradient(
        self, loss: Tensor, weights: Tensors, others: Tensors | None
    ) -> tuple[Grads, list[tuple[Tensor, Tensor]] | None]:
        return gradient(loss, weights), None

    @staticmethod
    def _product(roots: Roots, a: Tensors, weights: Tensors, wanted: Wanted, replay: Replay) -> None:
        if roots.moving is not None:
            a = [a[i] for i in roots.moving]
        if not roots.edges:
            return
        if wanted.hessian:
            inputs = [] if wanted.others is None else [*weights, *wanted.others]
        else:
            inputs = wanted.beside(weights, roots.edges)
            if not inputs:  # which would mean every leaf
                return
        if replay.examines:
            differentiable(roots.edges)
        if replay.half:
            targets = [*(weights if wanted.hessian else ()), *wanted.beside(weights, roots.edges)]
            add_scaled(targets, lambda by: accumulate(roots.edges, torch._foreach_mul(a, by), targets), a)
        else:
            accumulate(roots.edges, a, inputs)


class Reverse(_SecondOrder):
    """Reverse over reverse through the graph that the run itself built: memory for all activations."""

    keeps_graph = True

    def keeps_gradient(self, wanted: bool) -> bool:
        """Where the settings read it: its graph is kept anyway."""
        return wanted

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """As :class:`Curvature` says, through the kept graph."""
        assert step.roots is not None
        self._product(step.roots, a, step.weights, wanted, replay)


class Recompute(_SecondOrder):
    """Reverse over reverse through the graph of the step run again: memory for all weights; a run's time."""

    keeps_graph = False

    def keeps_gradient(self, wanted: bool) -> bool:
        """Never: the step run again has it."""
        return False

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """As :class:`Curvature` says, through the graph of the replay."""
        grads = step.grads
        if grads is None or not any(g is not None and g.requires_grad for g in grads):
            grads = gradient(replay.loss(step, step.weights), step.weights)
        self._product(Roots.of(grads), a, step.weights, wanted, replay)


class _FirstOrder:
    """What the ways have in common that never differentiate a gradient backwards."""

    keeps_graph = False

    def keeps_gradient(self, wanted: bool) -> bool:
        """Where the settings read it: no step is run again at its own weights."""
        return wanted

    def gradient(
        self, loss: Tensor, weights: Tensors, others: Tensors | None
    ) -> tuple[Grads, list[tuple[Tensor, Tensor]] | None]:
        return first_gradient(loss, weights), None


class Forward(_FirstOrder):
    """Forward over reverse: the step is run again at weights with the tangent a, and what its first gradient
    has as a tangent is H a, and ∂_Φ⟨g, a⟩ for the other leaves. Memory for all weights.
    """

    exact = True

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """As :class:`Curvature` says; raises :class:`check.ForwardModeError` before anything is added."""
        if replay.examines:
            self._symmetric(step, replay, a)
        _add(*self._tangents(step, replay, a, wanted))

    def _symmetric(self, step: Step, replay: Replay, a: Tensors) -> None:
        """Raises where ⟨b, H a⟩ is not ⟨a, H b⟩: the walk back needs the transpose of H.

        So it is where g is no gradient of a number (a hook has changed it), or not what forward mode takes
        for it (a checkpoint that computes in torch.no_grad again).
        """
        generator = torch.Generator().manual_seed(0)
        b = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in a]
        weights = Wanted(hessian=True, others=[])
        along = []
        for v in (a, b):
            found = self._tangents(step, replay, v, weights)[1]
            along.append([found[i] for i in _reached(step)])
        h_a, h_b = (
            [torch.zeros_like(x) if t is None else t for x, t in zip(a, h, strict=True)] for h in along
        )
        off = abs(inner(b, h_a) - inner(a, h_b))
        # b is normal: it has a length of one along H a, and H b is that much longer than along a.
        size = _size(h_a) + _size(a) * _size(h_b) / max(1, sum(x.numel() for x in a)) ** 0.5
        check.unroll_symmetric(off, size, replay.unit**0.5)

    @staticmethod
    def _tangents(
        step: Step, replay: Replay, a: Tensors, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The leaves and what each has to be added."""
        scale = power_of_two(a) if replay.half else None
        if scale is not None:
            a = torch._foreach_mul(a, scale)
        try:
            with forward_ad.dual_level():
                weights = [w.detach() for w in step.weights]
                for i, t in zip(_reached(step), a, strict=True):
                    weights[i] = forward_ad.make_dual(weights[i], t)
                for w in weights:
                    w.requires_grad_()
                with torch.enable_grad(), NoGradIsConstant():
                    value = replay.loss(step, weights)
                check.unroll_replayed(forward_ad.unpack_dual(value).primal, step.loss, step.index)
                others = wanted.beside(weights, [value])
                inputs = [*(weights if wanted.hessian else ()), *others]
                grads = first_gradient(value, inputs) if inputs else ()
                tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
                if scale is not None:
                    tangents = [None if t is None else t / scale for t in tangents]
        except RuntimeError as error:  # NotImplementedError is one
            check.unroll_forward_mode(error)
            raise
        return [*(step.weights if wanted.hessian else ()), *others], tangents


class NoGradIsConstant(TorchFunctionMode):
    """Makes torch.no_grad hold for tangents, too: what a loss computes in it is a constant of the step."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return function(*args, **(kwargs or {}))


class _Difference(_FirstOrder):
    """What the differences have in common: the length of their step.

    The weights are moved by ε a with ε = u^p (1 + ‖w‖) / ‖a‖: u is the rounding unit of the coarsest dtype
    among weights and autocast, p = 1/3 for the central and 1/2 for the one-sided difference. There the error
    by rounding, u / u^p, is of the order of that by curvature of higher order, u^2p or u^p (Andrei,
    "Accelerated conjugate gradient algorithm with finite difference Hessian/vector product approximation",
    2009). One ε serves the whole vector a, in which no part should be much smaller than it matters.

    A kink between the two ends (a ReLU that turns) is an error of its own, whatever the length: up to all of
    a step's H a, a percent or so of a whole gradient (64-128-10, 100 steps: 2e-3 of float32's, where tanh in
    its place has 2e-5; lengths u^0.4 to u^0.6 were tried and are no better).
    """

    exact = False
    power: float

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """As :class:`Curvature` says, from gradients at two places."""
        reached = _reached(step)
        size = norm(a)
        length = replay.unit**self.power * (1 + norm([step.weights[i] for i in reached]))
        # A zero a gives no direction; what is not finite is left to the report to name.
        epsilon = length / torch.where(size > 0, size, 1)
        if len({x.device for x in a}) > 1:
            epsilon = epsilon.cpu()
        shift = torch._foreach_mul(a, epsilon)
        plus = self._at(step, replay, reached, shift, 1, wanted)
        minus = self._other(step, replay, reached, shift, wanted)
        targets = {id(x): x for x, _ in [*plus, *minus]}
        ends = [{id(x): g for x, g in end} for end in (plus, minus)]
        products: list[Tensor | None] = []
        for key, x in targets.items():
            after, before = (end.get(key) for end in ends)
            if after is None:
                difference = -cast("Tensor", before)
            else:
                difference = after if before is None else after - before
            products.append(difference.div_(self._width * epsilon.to(x.device)))
        _add(list(targets.values()), products)

    _width: float

    def _other(
        self, step: Step, replay: Replay, reached: Sequence[int], shift: Sequence[Tensor], wanted: Wanted
    ) -> list[tuple[Tensor, Tensor]]:
        """The gradients at the other end of the difference."""
        raise NotImplementedError

    @staticmethod
    def _at(
        step: Step, replay: Replay, reached: Sequence[int], shift: Sequence[Tensor], sign: int, wanted: Wanted
    ) -> list[tuple[Tensor, Tensor]]:
        """Leaves and their gradients where the weights have been moved."""
        weights = [w.detach() for w in step.weights]
        for i, x in zip(reached, shift, strict=True):
            weights[i] = torch.add(weights[i], x, alpha=sign)
        for w in weights:
            w.requires_grad_()
        value = replay.loss(step, weights)
        others = wanted.beside(weights, [value])
        own = [(step.weights[i], weights[i]) for i in reached] if wanted.hessian else []
        inputs = [*(x for _, x in own), *others]
        grads = first_gradient(value, inputs) if inputs else ()
        leaves = [*(w for w, _ in own), *others]
        return [(x, g) for x, g in zip(leaves, grads, strict=True) if g is not None]


class Central(_Difference):
    """(g(w + ε a) - g(w - ε a)) / 2ε, and the same of ∂_Φ L: two more first gradients a step."""

    power, _width = 1 / 3, 2.0

    def _other(
        self, step: Step, replay: Replay, reached: Sequence[int], shift: Sequence[Tensor], wanted: Wanted
    ) -> list[tuple[Tensor, Tensor]]:
        return self._at(step, replay, reached, shift, -1, wanted)


class OneSided(_Difference):
    """(g(w + ε a) - g(w)) / ε, and the same of ∂_Φ L: one more first gradient a step, since the run's own is
    remembered, with ∂_Φ L.
    """

    power, _width = 1 / 2, 1.0

    def keeps_gradient(self, wanted: bool) -> bool:
        """Always: it is one end of the difference."""
        return True

    def gradient(
        self, loss: Tensor, weights: Tensors, others: Tensors | None
    ) -> tuple[Grads, list[tuple[Tensor, Tensor]] | None]:
        beside = Wanted(hessian=True, others=others).beside(weights, [loss])
        grads = first_gradient(loss, [*weights, *beside])
        mixed = zip(beside, grads[len(weights) :], strict=True)
        return grads[: len(weights)], [(x, g) for x, g in mixed if g is not None]

    def _other(
        self, step: Step, replay: Replay, reached: Sequence[int], shift: Sequence[Tensor], wanted: Wanted
    ) -> list[tuple[Tensor, Tensor]]:
        assert step.grads is not None
        assert step.d_others is not None
        own: Any = zip(step.weights, step.grads, strict=True) if wanted.hessian else ()
        asked = {id(x) for x in wanted.others or ()}
        others = (pair for pair in step.d_others if wanted.others is None or id(pair[0]) in asked)
        return [*((w, g) for w, g in own if g is not None), *others]


def _reached(step: Step) -> Sequence[int]:
    return range(len(step.weights)) if step.reached is None else step.reached


def norm(xs: Sequence[Tensor]) -> Tensor:
    """The norm over all tensors of a list, in float64 on the first one's device."""
    parts = [x.to(xs[0].device, torch.float64) for x in torch._foreach_norm(tuple(xs))]
    total: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return total


def _add(targets: Sequence[Tensor], products: Sequence[Tensor | None]) -> None:
    """Adds to ``.grad`` of leaves; a first ``.grad`` is a tensor of its own."""
    for x, product in zip(targets, products, strict=True):
        if product is not None:
            if x.grad is None:
                x.grad = product.to(x, copy=True)
            else:
                x.grad += product


def power_of_two(a: Sequence[Tensor]) -> Tensor:
    """The power of two that brings the norm of a to between 8 and 16: multiplying by it is exact."""
    size = norm(a)
    mantissa, _ = torch.frexp(size)
    scale = torch.where(size > 0, 16 * mantissa / size, 1.0).clamp(max=2.0**100)
    return scale.cpu() if len({x.device for x in a}) > 1 else scale


def add_scaled(
    targets: Sequence[Tensor],
    add: Callable[[Tensor], None],
    a: Sequence[Tensor],
    factors: Sequence[float] = (1.0,),
) -> None:
    """Adds to ``.grad`` of leaves what ``add(scale)`` would add there, without the scale, which suits a.

    Of several factors of the scale, the first that leaves all finite is taken, or the last.
    """
    suits = power_of_two(a)
    with _scratch(targets):
        for factor in factors:
            for x in targets:
                x.grad = None
            scale = factor * suits
            add(scale)
            found = [x.grad for x in targets]
            if factor == factors[-1] or all(bool(g.isfinite().all()) for g in found if g is not None):
                break
    _add(targets, [None if g is None else g / scale.to(g.device) for g in found])


def coarsest(weights: Sequence[Tensor]) -> float:
    """The rounding unit of the coarsest dtype in which steps of these weights are now taken."""
    dtypes = {w.dtype for w in weights}
    dtypes |= {
        torch.get_autocast_dtype(kind)
        for kind in {w.device.type for w in weights}
        if torch.is_autocast_enabled(kind)
    }
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@contextmanager
def _scratch(targets: Sequence[Tensor]) -> Iterator[None]:
    """Lends these leaves an empty ``.grad``."""
    kept = [x.grad for x in targets]
    try:
        for x in targets:
            x.grad = None
        yield
    finally:
        for x, grad in zip(targets, kept, strict=True):
            x.grad = grad


def measured_error(
    curvature: Curvature, step: Step, replay: Replay, a: Tensors, wanted: Wanted
) -> tuple[float | None, str | None]:
    """How far a curvature's products at a step are from exact ones, or why that cannot be told.

    The larger of two relative errors in norm, that of H a and that of ∂_Φ⟨g, a⟩, as far as they are wanted.
    """
    value = replay.loss(step, step.weights)
    try:
        grads = gradient(value, step.weights)
        roots = Roots.of(grads)
        groups = [step.weights] if wanted.hessian else []
        groups.append(wanted.beside(step.weights, roots.edges))
        found: list[list[list[Tensor]]] = []
        targets = [x for group in groups for x in group]
        with _scratch(targets):
            exact = replay._replace(examines=True)
            _SecondOrder._product(roots, a, step.weights, Wanted(wanted.hessian, groups[-1]), exact)
            found.append([_grads(group) for group in groups])
        with _scratch(targets):
            curvature.product(step, replay, a, Wanted(wanted.hessian, groups[-1]))
            found.append([_grads(group) for group in groups])
    except RuntimeError as error:
        return None, str(error).splitlines()[0]
    errors = []
    for exact, inexact in zip(*found, strict=True):
        size = _size(exact)
        off = _size([x - y for x, y in zip(exact, inexact, strict=True)])
        if size or off:
            errors.append(off / size if size else math.inf)
    return max(errors, default=0.0), None


def _grads(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad.detach() for x in xs]


def inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """⟨x, y⟩ in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(xs, ys, strict=True))


def _size(xs: Sequence[Tensor]) -> float:
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in xs]
    return math.hypot(*(float(torch.linalg.vector_norm(x)) for x in wide))


CURVATURES: dict[str, Curvature] = {
    "reverse": Reverse(),
    "recompute": Recompute(),
    "forward": Forward(),
    "central": Central(),
    "one-sided": OneSided(),
}
