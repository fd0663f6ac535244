"""unroll(): a student's whole training run, and the exact gradient of what it ends in to all that shaped it.

Docs: section 5 of docs/math.md. The run is taken as any training loop takes it; ``run.backward()`` walks back
over its steps with the adjoint (v_w, v_m) of weights and momentum, by the formulas of that section in their
order.

The parts: l2t/optim.py (an update and its transpose), l2t/curvature.py (derivatives of a step's gradient),
l2t/tape.py (what is remembered of a step, the student at given weights), l2t/schedule.py (which steps are
remembered). What a student learns, and from which loss, is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from l2t import check
from l2t.curvature import CURVATURES, Curvature, accumulate, gradient
from l2t.optim import SGD, Hyper, Point, Tensors
from l2t.schedule import Action, Schedule, StoreAll
from l2t.tape import Adjoint, Grads, Randomness, Roots, Step, Student

__all__ = ["Report", "Run", "unroll"]


class Report:
    """What a run cost and how it went. Numbers come from the device when they are asked for, not before.

    Attributes:
        steps: the number of steps T.
        seconds_forward: seconds of this process for the run, the measure included.
        seconds_backward: seconds for the walk back; None before it.
    """

    def __init__(self, losses: list[Tensor], measure: Tensor, seconds_forward: float) -> None:
        self.steps = len(losses)
        self.seconds_forward = seconds_forward
        self.seconds_backward: float | None = None
        self._losses = losses
        self._measure = measure
        self._norms: list[list[Tensor]] = []  # in the order of the walk back

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [float(x) for x in self._losses]

    @property
    def adjoint_norms(self) -> list[float]:
        """‖∂J/∂w_t‖ for t = 0, ..., T: of the initial weights first. Empty before the walk back.

        Orders of magnitude between its ends tell of a run that forgets (vanishing towards t = 0) or that is
        not stable (exploding). Taken in the weights' dtype: in float32 a norm beyond 1e19 reads inf.
        """
        return [math.hypot(*(float(x) for x in norms)) for norms in reversed(self._norms)]

    @property
    def nonfinite(self) -> tuple[str, int] | None:
        """The first value that is not finite, in the order of computation; None if all are.

        ``("loss", t)``: the loss of step t. ``("measure", T)``: the measure. ``("adjoint", t)``: ∂J/∂w_t.
        """
        for t, x in enumerate(self.losses):
            if not math.isfinite(x):
                return "loss", t
        if not bool(self._measure.isfinite().all()):
            return "measure", self.steps
        norms = self.adjoint_norms
        return next(
            (("adjoint", t) for t in reversed(range(len(norms))) if not math.isfinite(norms[t])), None
        )

    def __repr__(self) -> str:
        back = "none" if self.seconds_backward is None else f"{self.seconds_backward:.3g} s"
        return (
            f"Report(steps={self.steps}, forward={self.seconds_forward:.3g} s, backward={back}, "
            f"nonfinite={self.nonfinite})"
        )


class Run:
    """A run that was taken; :func:`unroll` makes it.

    Attributes:
        measure: the measure at the end, detached: 0-dim or (S,).
        weights: the final trained parameters by name, detached; frozen ones are the student's own.
        buffers: the final buffers by name, after the last step.
        report: a :class:`Report`.

    Example:
        The gradient of the loss after three steps to the learning rate of these steps:

        >>> import torch, l2t
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> def measure(model):  # w² / 2: each step multiplies w by 1 - lr
        ...     return model.weight.square().sum() / 2
        >>> optimizer = l2t.optim.SGD(lr=lr)
        >>> run = l2t.unroll(student, range(3), lambda model, batch, step: measure(model), measure,
        ...                  optimizer=optimizer)
        >>> run.backward()
        >>> run.measure, lr.grad  # (1 - lr)⁶ / 2 and its derivative -3 (1 - lr)⁵
        (tensor(0.0890), tensor(-0.7119))
        >>> [round(x, 4) for x in run.report.adjoint_norms]
        [0.178, 0.2373, 0.3164, 0.4219]
    """

    measure: Tensor
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: Report

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        optimizer: SGD,
        meta: list[Tensor] | None,
        schedule: Schedule,
        curvature: Curvature,
    ) -> None:
        self._student, self._loss, self._optimizer = student, loss, optimizer
        self._meta, self._schedule, self._curvature = meta, schedule, curvature
        self._tape: dict[int, Step] = {}
        self._end: tuple[Tensor, Tensors, list[Tensor]] | None = None  # measure, weights, buffers

    def _forward(self, batches: Iterable[Any], measure: Callable[..., Tensor]) -> None:
        start = perf_counter()
        student, optimizer, tape, keeps_graph = (
            self._student,
            self._optimizer,
            self._tape,
            self._curvature.keeps_graph,
        )
        settings = optimizer.settings()
        w: Tensors = [p.detach().clone().requires_grad_() for p in student.parameters]
        m = optimizer.start(w)
        b = student.buffers
        losses: list[Tensor] = []
        trains = False
        for t, batch in enumerate(batches):
            hyper = settings(t)
            for action, _ in self._schedule.forward(t):
                if action is Action.STORE:
                    tape[t] = step = Step(t, hyper, w, b, m if hyper.wanted else None)
                    if not keeps_graph:
                        step.batch, step.randomness = batch, Randomness.now(student.cuda_devices)
                else:
                    student.bind(w, b)
                    value = self._loss(student.module, batch, t)
                    check.unroll_loss(value, t)
                    g = gradient(value, w)
                    b = student.present_buffers()
                    student.release()
                    losses.append(value.detach())
                    w, m, reached = _update(optimizer, w, m, g, hyper)
                    trains |= reached != []
                    if t in tape:
                        step = tape[t]
                        step.loss, step.reached = losses[-1], reached
                        if keeps_graph:
                            step.roots = Roots.of(g)
                            step.grads = g if hyper.wanted else None
                    del value, g  # or they would hold this step's graph while the next one is built
        check.unroll_trains(trains or not losses)
        student.bind(w, b)
        value = measure(student.module)
        student.release()
        check.unroll_measure(value)
        self._end = value, w, b
        self.measure = value.detach()
        self.weights = {name: x.detach() for name, x in zip(student.names, w, strict=True)}
        self.buffers = dict(zip(student.buffer_names, b, strict=True))
        self.report = Report(losses, self.measure, perf_counter() - start)

    def backward(self, gradient: Tensor | None = None) -> None:
        """Walks back over the run and adds d measure / d meta to ``.grad`` of the meta tensors.

        A meta tensor that the measure does not depend on keeps its ``.grad``, None included, as in
        ``torch.autograd.backward``. What the steps remember is freed on the way, so this can be done once.

        Args:
            gradient: the cotangent of the measure, of its shape. Default ones: of several measures, the sum.

        Raises:
            RuntimeError: a second call; an operation of the loss that has no second derivative; a loss that
                carries a graph from one step to the next; with ``curvature="recompute"``, a loss that is not
                the same when its step is run again.
            ValueError: a cotangent of another shape.
        """
        check.unroll_not_inference()
        check.unroll_open(self._end is not None)
        v = check.unroll_cotangent(gradient, self.measure)
        start = perf_counter()
        devices = self._student.cuda_devices
        randomness = Randomness.now(devices)
        # meta=None gives every leaf that is reached its gradient, but the student's own are to be left out.
        own = self._student.parameters if self._meta is None else []
        own_grads = [p.grad for p in own]
        for p in own:
            p.grad = None
        try:
            with torch.no_grad():
                self._walk_back(v)
        finally:
            self._student.release()
            self._tape.clear()
            for p, kept in zip(own, own_grads, strict=True):
                p.grad = kept
            randomness.restore(devices)
        self.report.seconds_backward = perf_counter() - start

    def _walk_back(self, v: Tensor) -> None:
        assert self._end is not None
        (value, w, b), self._end = self._end, None
        steps, norms = self.report.steps, self.report._norms
        v_w, v_m = Adjoint(w), [torch.zeros_like(x) for x in w]
        v_settings: list[tuple[Tensor, Tensor]] = []

        _lend(w, v_w, steps)
        self._student.bind(w, b)
        accumulate([value], [v], self._inputs(w, steps))  # v_w = ∇M(w_T), v_m = 0
        del value, w
        norms.append(v_w.norm())
        for action, t in self._schedule.reverse(steps):
            if action is Action.RESTORE:
                step = self._tape[t]
            elif action is Action.REVERSE:
                self._reverse(step, v_w, v_m, v_settings)
                norms.append(v_w.norm())
            else:
                del self._tape[t]
        self._finish(v_w, v_settings)

    def _reverse(
        self, step: Step, adjoint: Adjoint, v_m: Tensors, v_settings: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Takes the adjoint (v_w, v_m) back over a step."""
        optimizer, hyper, reached = self._optimizer, step.hyper, step.reached
        if reached == []:
            return
        self._student.bind(step.weights, step.buffers)
        _lend(step.weights, adjoint, step.index)
        v_w, v_m = _pick(adjoint.parts, reached), _pick(v_m, reached)
        a = optimizer.transpose_in(v_w, v_m, hyper)
        if hyper.wanted:
            if step.grads is None:
                step.grads = self._replay(step)
            w, m = _pick(step.weights, reached), _pick(step.momentum, reached)
            grads = [g for g in step.grads if g is not None]
            for name, d in optimizer.hypergradients(Point(w, m, grads, hyper), v_w, a).items():
                v_settings.append((hyper.wanted[name], d.to(hyper.wanted[name])))
        optimizer.transpose_out(v_w, v_m, a, hyper)
        self._curvature.product(step, self._replay, a, self._inputs(step.weights, step.index))  # v_w += H a

    def _finish(self, v_w: Adjoint, v_settings: list[tuple[Tensor, Tensor]]) -> None:
        """Hands the gradients of settings and initial weights to the leaves behind them."""
        ends = v_settings
        if self._meta is not None:
            ends = [*ends, *zip(self._student.parameters, v_w.parts, strict=True)]
        if ends:
            accumulate([x for x, _ in ends], [v for _, v in ends], self._meta or [])

    def _replay(self, step: Step) -> Grads:
        """The gradient of a step, run again with its batch and random numbers. The student is bound to it."""
        assert step.randomness is not None
        step.randomness.restore(self._student.cuda_devices)
        lent = [w.grad for w in step.weights]
        with torch.enable_grad():
            value = self._loss(self._student.module, step.batch, step.index)
            check.unroll_replayed(value, step.loss, step.index)
            grads = gradient(value, step.weights)
        for w, part in zip(step.weights, lent, strict=True):
            w.grad = part  # the loss may have called model.zero_grad()
        return grads

    def _inputs(self, weights: Tensors, index: int) -> Tensors:
        """The leaves whose ``.grad`` the reverse of a step fills; none for every leaf that it reaches."""
        if self._meta is None:
            return []
        # The weights of the step before are there only so that _lend can tell a graph that leads into it.
        before = self._tape.get(index - 1)
        return [*weights, *(before.weights if before else ()), *self._meta]


def _lend(weights: Tensors, adjoint: Adjoint, index: int) -> None:
    """Makes the adjoint the ``.grad`` of a step's weights, so that the engine adds H a to it in place."""
    for w, part in zip(weights, adjoint.parts, strict=True):
        if w.grad is not None:
            raise check.unroll_leak(index)
        w.grad = part


def _update(
    optimizer: SGD, w: Tensors, m: Tensors | None, g: Grads, hyper: Hyper
) -> tuple[Tensors, Tensors | None, list[int] | None]:
    """The weights after a step, as leaves; the momentum; and which weights the loss reaches, None for all."""
    grads = [x for x in g if x is not None]
    reached = None if len(grads) == len(g) else [i for i, x in enumerate(g) if x is not None]
    with torch.no_grad():
        new_w, new_m = _pick(w, reached), _pick(m, reached)
        if grads:
            new_w, new_m = optimizer.update(Point(new_w, new_m, grads, hyper))
        if reached is not None:
            # The others stay as they are, but as leaves of their own: a leaf belongs to one step.
            new_w = _put(new_w, reached, [x.detach() for x in w])
            new_m = m if m is None or new_m is None else _put(new_m, reached, m)
    for x in new_w:
        x.requires_grad_()
    return new_w, new_m, reached


def _pick(xs: Any, indices: list[int] | None) -> Any:
    """The tensors at these indices; all of them, or None, where there is nothing to pick."""
    return xs if xs is None or indices is None else [xs[i] for i in indices]


def _put(xs: Tensors, indices: list[int], others: Tensors) -> Tensors:
    """These tensors at these indices among others."""
    by_index = dict(zip(indices, xs, strict=True))
    return [by_index.get(i, x) for i, x in enumerate(others)]


DEFAULT_OPTIMIZER = SGD(lr=0.1, momentum=0.9)


def unroll(
    student: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    measure: Callable[[nn.Module], Tensor],
    *,
    optimizer: SGD = DEFAULT_OPTIMIZER,
    meta: Iterable[Tensor] | None = None,
    curvature: str = "reverse",
) -> Run:
    """Trains a student over batches so that what it ends in can be differentiated to what shaped it.

    ``run.backward()`` then adds the gradient of the final measure, through every step of the training, to
    ``.grad`` of the meta tensors, and any ``torch.optim`` optimiser can step on these. The gradient is exact:
    that of automatic differentiation through the whole run, whose graph is never built.

    ``loss`` and ``measure`` are called with the student module itself, in whose places the weights of the
    step stand for the time of the call, so hooks, submodules and tied parameters work. The student's own
    parameters and buffers are the start of the run and are as they were when the call returns, or raises.
    Buffers (BatchNorm's statistics) are carried from step to step without gradient. Parameters that do not
    require a gradient stay constant.

    Args:
        student: any ``nn.Module`` with a parameter that requires a gradient.
        batches: an iterable (list, DataLoader, generator), one batch a step; a batch is what ``loss`` takes.
        loss: ``loss(model, batch, step)``, the 0-dim loss of a step, differentiable twice. It reaches earlier
            steps through the model's weights alone: what else it carries from step to step is detached.
        measure: ``measure(model)`` at the final weights, 0-dim or of shape (S,), differentiable.
        optimizer: the student's optimiser, from :mod:`l2t.optim`. Default ``SGD(lr=0.1, momentum=0.9)``.
        meta: the tensors whose ``.grad`` is wanted: leaves that require a gradient and sit anywhere in loss,
            measure, optimizer or batches. A parameter of the student among them means its initial value.
            Default: every leaf that is reached, the student's own parameters apart.
        curvature: ``"reverse"`` keeps each step's weights and graph, so memory grows with its activations;
            ``"recompute"`` keeps a step's weights and batch and runs it again in the walk back, the same step
            bit for bit (PyTorch's default random numbers and buffers included), for one more run's time and
            the same gradient to the bit. ``loss`` must then depend on model, batch and step alone.

    Returns:
        A :class:`Run` with ``measure``, ``weights``, ``buffers``, ``report`` and ``backward()``. A value that
        is
        not finite raises nothing: ``run.report.nonfinite`` says where the first one arose.

    Raises:
        TypeError, ValueError: an argument, or what loss or measure returns, is not as above.
        RuntimeError: inside ``torch.inference_mode``.

    Source: section 5 of docs/math.md; Maclaurin et al., "Gradient-based hyperparameter optimization through
    reversible learning" (ICML 2015); Franceschi et al., "Forward and reverse gradient-based hyperparameter
    optimization" (ICML 2017).

    Example:
        The weight of each sample, by its effect on other samples after a short training:

        >>> import torch, l2t
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 3), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
        >>> student = torch.nn.Linear(3, 2)
        >>> weight = torch.ones(8, requires_grad=True)
        >>> def loss(model, batch, step):
        ...     each = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        ...     return (weight * each).mean()
        >>> def measure(model):
        ...     return torch.nn.functional.cross_entropy(model(x[:2]), y[:2])
        >>> run = l2t.unroll(student, range(5), loss, measure, optimizer=l2t.optim.SGD(lr=0.5))
        >>> run.backward()
        >>> weight.grad.shape, run.report.steps, run.report.nonfinite
        (torch.Size([8]), 5, None)
    """
    check.unroll_not_inference()
    check.unroll_student(student)
    check.unroll_functions(loss, measure)
    check.unroll_batches(batches)
    check.unroll_optimizer(optimizer, SGD)
    chosen = check.unroll_meta(meta)
    check.known("unroll", "curvature", curvature, CURVATURES)
    run = Run(Student(student), loss, optimizer, chosen, StoreAll(), CURVATURES[curvature])
    try:
        with torch.enable_grad():
            run._forward(batches, measure)
    finally:
        run._student.release()
    return run
